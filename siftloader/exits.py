"""Early exit: the live model's first ``j`` layers under its own head, without touching the model.

    early = EarlyExit(model, layer=1)
    logits = early.logits(batch)          # [P, T, V], what the model would say if it had one layer

Embeddings, masks, rotary tables, final norm, head and soft-caps are computed by the code of the model's
author, with the weights of this very moment, through the live twin (twin.py); nothing of the live model
is flipped, patched or copied. At ``j = N`` the early exit equals the model in eval mode bit for bit.

Letters: P samples, T positions, H hidden size, V vocabulary (or classes), M wanted positions, j exit
layer, N layers.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from siftloader.batches import IGNORED, Batch, cut, leaves, rows
from siftloader.compiled import check_mode
from siftloader.deferred import Undeferred
from siftloader.errors import ScoringError
from siftloader.fused import LinearHead, loss_and_entropy
from siftloader.labels import arguments, with_labels
from siftloader.sharded import gathered, is_fsdp1, within
from siftloader.stack import exit_at, unwrap
from siftloader.taps import Tap, listen
from siftloader.targets import Targets
from siftloader.twin import COMPARED, Twin, check_shape, rows_at_a_time


# Fields that change predictions, also where a forward takes them as **kwargs.
HANDED_ON = ("attention_mask", "token_type_ids", "position_ids")


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], [m], nats."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def token_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-sum p log p of softmax(logits), [m], nats."""
    log_p = logits.log_softmax(-1)
    # 0 * -inf is NaN: a class ruled out by the model contributes nothing.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


class Task(NamedTuple):
    """How a model's own loss reads the labels of a batch; None where it cannot be told."""

    shift: bool | None = None
    ignored: int = IGNORED


class EarlyExit:
    """Predict with the first ``layer`` layers of a live model and its own head.

    EarlyExit(model, layer=1)                      # the stack of equal layers is found
    EarlyExit(model, layer="transformer.h:2")      # or named
    EarlyExit(model, layer="full")                 # the whole model: exact scores, any architecture
    EarlyExit(model, compile=True)                 # its layers compiled, for shapes that come again
    EarlyExit(model, device="cuda:1")              # a copy there, as of the last `fetch`

    Shares the live parameters, and copies them only where a ``device`` is given. ``compile`` may be a mode
    of torch.compile. Raises ScoringError where the model has no stack to cut or the layer is out of 1..N.
    (Paper, section 6: the head on an intermediate representation.)
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int | str = 1,
        compile: bool | str = False,  # noqa: A002 - as torch and Trainer have it
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._compile = check_mode(compile)
        self._device = None if device is None else torch.device(device)
        self._root = unwrap(model)
        with gathered(filter(is_fsdp1, self._root.modules())):  # only then they have their shapes
            self._exit = exit_at(self._root, layer)
        self.layer, self.layers = self._exit.layer, self._exit.layers
        self._twin: Twin | None = None
        self._capture: bool | None = None  # whether the head at M positions was seen to be right
        self._defers = True  # until its logits are seen to be no linear head's
        self._compared: dict[tuple[Any, ...], bool] = {}  # by kind of head: are its values right?
        self._held = False

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is the early exit of that very module."""
        return self._root is unwrap(model)

    @property
    def twin(self) -> Twin | None:
        """The shells that ran last, fit to run in another thread.

        None where they are no more those of the model, draw random numbers, or are about to be compiled.
        """
        twin = self._twin
        if twin is None or not twin.is_of(self._root) or twin.draws or twin.pending:
            return None
        return twin

    def hold(self) -> None:
        """Take over what the live model is now, but for its weights; nothing more before ``release``.

        For a forward that runs beside the live one, in another thread or on another stream.
        """
        self._followed().hold()
        self._held = True

    def fetch(self) -> None:
        """Copy the live weights of now to ``device``; between two fetches the copy stays what it was.

        On return they are read, those on a GPU by what its stream of now was told to do: whatever writes
        them comes after that on this stream, or waits for it. Nothing where weights are shared.
        """
        twin = self._twin if self._held and self._twin is not None else self._followed()
        twin.fetch(self._held)

    @property
    def copied_bytes(self) -> int:
        """What the copy on ``device`` takes, 0 where weights are shared."""
        return self._live_twin().copied_bytes

    def release(self) -> None:
        """Follow the live model again."""
        self._held = False

    def opened(self) -> AbstractContextManager[None]:
        """To score a pool in: weights that lie on several ranks are gathered once, not at every call."""
        return self._live_twin().opened()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own forward returns, cut at the exit layer; no gradients."""
        with torch.no_grad():
            return self._live_twin().run(args, kwargs)

    def logits(self, batch: Batch) -> Tensor:
        """All early predictions, [P, T, V] (or [P, C]): the slow, obvious reference."""
        with torch.no_grad():
            return self._live_twin().logits(*model_inputs(self._root, batch))

    def logits_at(self, batch: Batch, targets: Targets) -> Iterator[Tensor]:
        """Early predictions at the targets only, in chunks [m, V] that add up to [M, V].

        The head runs on these positions alone and at most 2**26 logits are alive at a time. Call it
        under ``torch.no_grad()``.
        """
        twin = self._live_twin()
        args, kwargs = model_inputs(self._root, batch)
        count = len(targets.positions)
        if self._captures(twin, args, kwargs, targets) and twin.in_one_go(count):
            places = targets.samples * targets.length
            yield from twin.head_chunks(args, kwargs, targets.positions, places)
        else:
            yield from self._row_chunks(batch, targets)

    def values_at(
        self,
        batch: Batch,
        targets: Targets,
        values: Iterable[Callable[[Tensor, Tensor], Tensor]],
    ) -> dict[Any, Tensor] | None:
        """``token_loss`` and ``token_entropy`` at the targets in one pass, [M] each, without any logits.

        early.values_at(batch, targets, [token_loss])[token_loss]

        None where only logits will do: other ``values``, soft labels, hooks that would see them, a head that
        is not a linear one followed by scales, a bias, a soft-cap or a cut-off of padding. What it is made
        of is read from every run. How it is computed is compared, at first use and again for another
        precision or size, with the model's own logits on up to two rows, with a warning where they differ.
        Memory: the head's inputs at the targets, M x H of its precision (again as much where autocast
        casts them), beside what ``loss_and_entropy`` takes. Call it under ``torch.no_grad()``.
        """
        wanted = tuple(values)
        soft = targets.labels.is_floating_point()
        if soft or not {token_loss, token_entropy}.issuperset(wanted):
            return None
        twin = self._live_twin()  # it may be a new one, of which nothing is known
        if not self._defers:
            return None
        with twin.opened():
            return self._values_at(twin, batch, targets, wanted)

    def _values_at(
        self, twin: Twin, batch: Batch, targets: Targets, wanted: tuple[Any, ...]
    ) -> dict[Any, Tensor] | None:
        args, kwargs = model_inputs(self._root, batch)
        if not self._captures(twin, args, kwargs, targets):
            return None
        try:
            places = targets.samples * targets.length
            hidden, head = twin.deferred(args, kwargs, targets.positions, places)
            kind = _kind(hidden, head)
            right = self._compared.get(kind)
            if right is None and (right := self._compare(twin, batch, targets)) is not None:
                self._compared[kind] = right
        except Undeferred:
            self._defers = False
            return None
        if not right:
            return None
        loss, entropy = _values_of(hidden, targets.labels, head)
        if targets.real is not None:  # wrong labels among them, too
            entropy = entropy.masked_fill(targets.labels < 0, torch.nan)
        found = {token_loss: loss, token_entropy: entropy}
        return {value: found[value] for value in wanted}

    def _compare(self, twin: Twin, batch: Batch, targets: Targets) -> bool | None:
        # None where these rows cannot tell. A head is not of one kind with another precision.
        few = min(2, targets.samples)
        args, kwargs = model_inputs(self._root, cut(batch, 0, few))
        part = targets.part(0, few)
        positions, labels = part.positions[:COMPARED], part.labels[:COMPARED].clamp_min(0)
        if not len(positions):  # the first rows have no label: any will do
            positions = torch.arange(min(8, part.length), device=part.labels.device)
            labels = torch.zeros_like(positions)
        places = few * part.length
        with twin.eagerly():
            logits = torch.cat(list(twin.head_chunks(args, kwargs, positions, places)))
        if logits.shape[-1] < 2:
            return False  # no cross-entropy, which is for the caller to say
        wide = logits if logits.dtype == torch.float64 else logits.float()
        expected = torch.stack((token_loss(wide, labels), token_entropy(wide, labels)))
        if bool((unknown := expected.isnan()).all()):
            return None
        with twin.eagerly():
            hidden, head = twin.deferred(args, kwargs, positions, places)
        found = torch.stack(_values_of(hidden, labels, head))
        # Both are roundings of the truth, and logits are rounded in proportion to their size: those that
        # weigh anything, and the label's.
        weighs = wide > wide.amax(1, keepdim=True) - 87
        largest = wide.where(weighs, 0).abs().amax(1) + expected[0].abs()
        precision = max(torch.finfo(each.dtype).eps for each in (hidden, logits))
        allowed = min(precision**0.5, 4 * precision if precision > 1e-6 else 1) * (1 + largest)
        apart = torch.where(expected == found, 0, (expected - found).abs())  # infinite ones alike
        if bool(((apart <= allowed) | unknown).all()):
            return True
        warnings.warn(
            f"loss and entropy as they come from the head's inputs differ from those of the logits of "
            f"{type(self._root).__name__} by up to {float(apart.max()):.2g} nats on the first rows, so the "
            f"logits are made: right, but slower, and in chunks of 256 MiB",
            stacklevel=2,
        )
        return False

    def _captures(
        self, twin: Twin, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Targets
    ) -> bool:
        if self._capture is None:
            self._capture = twin.captures_at(
                args, kwargs, targets.positions, targets.starts, targets.length
            )
        if self._capture is False:
            twin.compile_layers()
        return bool(self._capture)

    def classes(self, batch: Batch, length: int) -> int:
        """V, seen on two samples; ScoringError where a label has no prediction without the labels.

        Models that compute their own loss may predict the last position only, or nothing at all, unless
        they are given the labels.
        """
        few = min(2, rows(batch))
        return self._whole(cut(batch, 0, few), few, length).shape[-1]

    def with_labels(self, batch: Batch) -> Any:
        """What the cut forward returns when it is given the whole batch, labels too, as a loop would."""
        args, kwargs = model_inputs(self._root, batch, labels=True)
        return self._live_twin().run(args, kwargs)

    def takes_labels(self, batch: Batch) -> bool:
        """Whether the model's forward has a place for the labels of such a batch."""
        args, kwargs = model_inputs(self._root, batch, labels=True)
        try:
            bound = inspect.signature(within(self._root).forward).bind(*args, **kwargs)
        except TypeError:
            return False
        # The last of a tuple may only go where labels belong, not into an optional mask.
        return _is_label(list(bound.arguments)[-1]) if args else any(map(_is_label, kwargs))

    def task(self, batch: Batch, name: str, labels: Tensor) -> Task:
        """How the model's own loss reads ``labels`` [P] or [P, T]: heard on one sample.

        That sample is given labels of our own, zeros and ones at random, so that neither what is marked
        as ignored nor chance in the data can mislead. ``name`` is the field of the labels.
        """
        # Some models decide by the first labels they see what their task is: never by ours for others.
        if labels.ndim not in (1, 2) or labels.is_floating_point() or not self.takes_labels(batch):
            return Task()
        length = labels.shape[1] if labels.ndim == 2 else 1
        drawn = torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 0.5
        device = next((leaf.device for leaf in leaves(batch) if isinstance(leaf, Tensor)), None)
        given = drawn.view(1, *labels.shape[1:]).to(device, labels.dtype)
        try:
            one = with_labels(_unpadded(cut(batch, 0, 1)), name, given)
            taps = [] if one is None else listen(lambda: self.with_labels(one))[1]
        except Exception:
            return (
                Task()
            )  # a loss that wants other labels than these; scoring tells if it fails, too
        # One loss in several calls, or several losses, of which one is enough.
        for heard in ([taps] if taps else []) + [[tap] for tap in taps]:
            if (found := _heard_task(heard, drawn.long())) is not None:
                return found
        return Task(None, taps[0].ignored if taps else IGNORED)

    def _row_chunks(self, batch: Batch, targets: Targets) -> Iterator[Tensor]:
        # No head to capture: the whole output of as many rows as fit, then the wanted positions.
        samples, length, starts = targets.samples, targets.length, targets.starts
        first, step = 0, 1 if length > 1 else samples
        while first < samples:
            last = min(first + step, samples)
            logits = self._whole(cut(batch, first, last), last - first, length)
            flat = logits.reshape(-1, logits.shape[-1])
            wanted = targets.positions[starts[first] : starts[last]] - first * length
            yield flat.index_select(0, wanted)
            first, step = last, rows_at_a_time(length * logits.shape[-1])

    def _whole(self, batch: Batch, samples: int, length: int) -> Tensor:
        args, kwargs = model_inputs(self._root, batch)
        logits = self._live_twin().logits(args, kwargs)
        if length > 1 and logits.shape == (
            samples,
            length,
        ):  # yes or no at every position (ELECTRA)
            return torch.stack((torch.zeros_like(logits), logits), -1)
        check_shape(logits, samples, length)
        return logits

    def _live_twin(self) -> Twin:
        if self._twin is None or not (self._held or self._device is not None):
            return self._followed()
        self._twin.lend_again()
        return self._twin

    def _followed(self) -> Twin:
        # Weights are shared, module objects are not: rebuilt when one was replaced (resize, PEFT).
        if self._twin is None or not self._twin.is_of(self._root):
            self._twin = None  # two copies need not fit side by side
            self._twin = Twin(self._root, self._exit, self._compile, self._device)
            self._capture, self._defers, self._compared = None, True, {}
        self._twin.refresh()
        return self._twin


def _kind(hidden: Tensor, head: LinearHead) -> tuple[Any, ...]:
    # What decides how a head is computed; its weights and numbers change with every step.
    weight, bias = head.weight, head.bias
    kinds = [(each.dtype, each.device) for each in (hidden, weight, bias) if each is not None]
    return head.softcap is None, weight.shape, *kinds


def _values_of(hidden: Tensor, labels: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
    # The precision is that of `hidden`, as autocast wanted it where the model multiplied.
    device = hidden.device.type
    on = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if on else nullcontext():
        return loss_and_entropy(hidden, labels, head)


def _heard_task(taps: list[Tap], own: Tensor) -> Task | None:
    # Some losses see every position, some only those with a label; some mark padding 0 or 1 themselves.
    if any(tap.labels.is_floating_point() for tap in taps):
        return None
    heard = torch.cat([tap.labels for tap in taps]).cpu()
    for ignored in (taps[0].ignored, 0, 1):
        marked = own.masked_fill(own == ignored, IGNORED)
        later = torch.nn.functional.pad(marked[:, 1:], (0, 1), value=IGNORED)
        fits = {
            shift
            for shift, wanted in ((False, marked[0]), (True, marked[0, 1:]), (True, later[0]))
            if torch.equal(heard, wanted) or torch.equal(heard, wanted[wanted != IGNORED])
        }
        if len(fits) == 1:
            return Task(fits.pop(), ignored)
    return None


def _unpadded(batch: Batch) -> Batch:
    mask = batch.get("attention_mask") if isinstance(batch, MutableMapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return batch
    out = copy.copy(batch)
    out["attention_mask"] = torch.ones_like(mask)
    return out


def model_inputs(
    model: nn.Module, batch: Batch, labels: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What of a batch the model's forward takes; without ``labels`` so that it computes no loss.

    Mappings are matched by name; the last element of a tuple that holds a tensor is taken for the labels; a
    tensor is an input on its own.
    """
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        inputs = tuple(arguments(batch))
        inputs = inputs[:-1] if len(inputs) > 1 and not labels else inputs
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return model_inputs(model, inputs[0])
        return inputs, {}
    if hasattr(batch, "_fields"):
        batch = batch._asdict()
    elif hasattr(batch, "__dataclass_fields__") and not isinstance(batch, Mapping):
        batch = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    if not isinstance(batch, Mapping):
        return (batch,), {}
    named, any_name = _parameters_of(model)
    fields = {
        k: v for k, v in batch.items() if (labels or "label" not in k) and (any_name or k in named)
    }
    if _takes_any(model):  # a wrapper that hands on what it does not name
        fields |= {k: batch[k] for k in HANDED_ON if k in batch}
    if not fields:
        raise ScoringError(
            f"none of the batch's fields {sorted(batch)} is a parameter of the model's forward "
            f"({sorted(named)}); rename the fields or pass score_fn="
        )
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if not labels and shifted and "decoder_input_ids" in named and "labels" in batch:
        # What an encoder-decoder makes of its labels, where the loop leaves that to the model.
        fields.setdefault("decoder_input_ids", shifted(batch["labels"]))
    # A cache or all hidden states of a scoring pass would be memory for nothing.
    quiet = {"use_cache": False, "output_hidden_states": False, "output_attentions": False}
    fields |= {k: v for k, v in quiet.items() if k in named and k not in fields}
    if "past_key_values" in named and (cache := _no_cache(model, fields)) is not None:
        fields["past_key_values"] = cache
    return (), fields


def _no_cache(model: nn.Module, fields: Mapping[str, Any]) -> Any:
    # Without a cache and a mask, causal models of transformers look whether position ids show several texts
    # in a row, and wait for the GPU to tell; those that they make themselves never do. With a cache they do
    # not ask: this one keeps nothing.
    transformers = sys.modules.get("transformers")
    told = fields.keys() & {"past_key_values", "attention_mask", "position_ids"}
    config = getattr(model, "config", None)
    if transformers is None or told or getattr(model, "_is_stateful", True):
        return None
    if getattr(config, "is_encoder_decoder", True) or not hasattr(transformers, "DynamicCache"):
        return None
    return _keepless(transformers.DynamicCache)()


@functools.cache
def _keepless(cache: type) -> type:
    def update(self: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        return keys, values

    return type("NoCache", (cache,), {"update": update})


def _takes_any(model: nn.Module) -> bool:
    parameters = inspect.signature(within(model).forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _is_label(name: str) -> bool:
    return name == "y" or "label" in name or "target" in name


def _parameters_of(model: nn.Module) -> tuple[set[str], bool]:
    parameters = inspect.signature(within(model).forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    # forward(labels=None, **inputs) names no input: then everything is one.
    nameless = all("label" in name for name in named)
    return named, nameless and any(p.kind is p.VAR_KEYWORD for p in parameters)
