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

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from siftloader.batches import Batch, cut
from siftloader.errors import ScoringError
from siftloader.stack import exit_at, unwrap
from siftloader.twin import Twin, check_shape, rows_at_a_time


class EarlyExit:
    """Predict with the first ``layer`` layers of a live model and its own head.

    EarlyExit(model, layer=1)                      # the stack of equal layers is found
    EarlyExit(model, layer="transformer.h:2")      # or named
    EarlyExit(model, layer="full")                 # the whole model: exact scores, any architecture

    Shares the live parameters, never copies them. Raises ScoringError where the model has no stack to
    cut or the layer is out of 1..N. (Paper, section 6: the head on an intermediate representation.)
    """

    def __init__(self, model: nn.Module, layer: int | str = 1) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._root = unwrap(model)
        self._exit = exit_at(self._root, layer)
        self.layer, self.layers = self._exit.layer, self._exit.layers
        self._twin: Twin | None = None
        self._capture: bool | None = None  # whether the head at M positions was seen to be right

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is the early exit of that very module."""
        return self._root is unwrap(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own forward returns, cut at the exit layer; no gradients."""
        with torch.no_grad():
            return self._live_twin().run(args, kwargs)

    def logits(self, batch: Batch) -> Tensor:
        """All early predictions, [P, T, V] (or [P, C]): the slow, obvious reference."""
        with torch.no_grad():
            return self._live_twin().logits(*model_inputs(self._root, batch))

    def logits_at(
        self, batch: Batch, positions: Tensor, starts: list[int], length: int
    ) -> Iterator[Tensor]:
        """Early predictions at the wanted positions only, in chunks [m, V] that add up to [M, V].

        ``positions`` [M] are flat (``row * length + t``, rising), on the model's device; those of row
        ``i`` are ``starts[i]`` to ``starts[i + 1]``. The head runs on these positions alone and at
        most 2**26 logits are alive at a time. Call it under ``torch.no_grad()``.
        """
        twin = self._live_twin()
        args, kwargs = model_inputs(self._root, batch)
        if self._capture is None:
            self._capture = twin.captures_at(args, kwargs, positions, starts, length)
        if self._capture:
            yield from twin.head_chunks(args, kwargs, positions)
        else:
            yield from self._row_chunks(batch, positions, starts, length)

    def _row_chunks(
        self, batch: Batch, positions: Tensor, starts: list[int], length: int
    ) -> Iterator[Tensor]:
        # No head to capture: the whole output of as many rows as fit, then the wanted positions.
        samples = len(starts) - 1
        first, step = 0, 1 if length > 1 else samples
        while first < samples:
            last = min(first + step, samples)
            args, kwargs = model_inputs(self._root, cut(batch, first, last))
            logits = self._live_twin().logits(args, kwargs)
            check_shape(logits, last - first, length)
            flat = logits.reshape(-1, logits.shape[-1])
            yield flat.index_select(0, positions[starts[first] : starts[last]] - first * length)
            first, step = last, rows_at_a_time(length * logits.shape[-1])

    def _live_twin(self) -> Twin:
        # Weights are shared, module objects are not: rebuilt when one was replaced (resize, PEFT).
        if self._twin is None or not self._twin.is_of(self._root):
            self._twin = Twin(self._root, self._exit)
            self._capture = None
        self._twin.refresh()
        return self._twin


def model_inputs(model: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What of a batch the model's forward takes: never labels, so that it computes no loss.

    Mappings are matched by name; the last element of a tuple is taken for the labels; a tensor is an
    input on its own.
    """
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        inputs = tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
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
    fields = {k: v for k, v in batch.items() if "label" not in k and (any_name or k in named)}
    if not fields:
        raise ScoringError(
            f"none of the batch's fields {sorted(batch)} is a parameter of the model's forward "
            f"({sorted(named)}); rename the fields or pass score_fn="
        )
    # A cache or all hidden states of a scoring pass would be memory for nothing.
    quiet = {"use_cache": False, "output_hidden_states": False, "output_attentions": False}
    return (), {**fields, **{k: v for k, v in quiet.items() if k in named and k not in fields}}


def _parameters_of(model: nn.Module) -> tuple[set[str], bool]:
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    # forward(labels=None, **inputs) names no input: then everything is one.
    nameless = all("label" in name for name in named)
    return named, nameless and any(p.kind is p.VAR_KEYWORD for p in parameters)
