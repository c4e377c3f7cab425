"""``Sifter``: the step itself, for loops that draw their own candidates.

    sift = Sifter(model, exit_layer=1, criterion="entropy")
    batch = sift(get_batch("train"))        # P rows in, keep * P out

Letters: b rows kept, P candidates, T positions of a row, V vocabulary.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from siftloader.batches import IGNORED, Batch, cut, leaves, move, rows, select
from siftloader.errors import ScoringError
from siftloader.exits import EarlyExit, Task
from siftloader.heads import ExitHead, ProbeExit
from siftloader.pool import Pool
from siftloader.predictions import Predictions
from siftloader.schedule import check_keep, whole
from siftloader.scores import Random, Rarity, ScoreOf, Weighted, criterion_named
from siftloader.selection import Selection, TopK, samples, weights
from siftloader.stack import unwrap
from siftloader.stats import Stats
from siftloader.taps import Reading, listen
from siftloader.targets import Positions, Targets
from siftloader.world import World


Model: TypeAlias = nn.Module | Callable[[], nn.Module]
Labels: TypeAlias = str | Callable[[Batch], Tensor]
ScoreFunction: TypeAlias = Callable[[EarlyExit, Batch], Tensor]


WATCHES = 256  # batches handed out without a forward of the model before one stops watching for it


class Sifter:
    """Keep the candidates with the highest score: P in, ``keep * P`` out.

    sift = Sifter(model, exit_layer=1, criterion="entropy", keep=0.5)
    batch = sift(candidates)            # same structure and types, rows in candidate order
    scores = sift.score(candidates)     # [P] float32 on the model's device, nats

    ``model`` is the live model, wrapped or not, or a callable that finds it. ``exit_layer`` is j in 1..N,
    ``"path.to.stack:j"``, or ``"full"``. Labels are ``batch["labels"]``, else the last element of a
    tuple, else ``labels`` (a key, or a function of the batch). ``score_fn(early, batch)`` replaces all
    that: it gets the early exit to call like the model and returns [P]. ``shift_labels`` says whether the
    label at t + 1 belongs to the prediction at t; found for Hugging Face models. ``autocast`` is the
    dtype to score in where the training loop owns the autocast context (a loader learns it from the
    loop's first forward).

    Labels of -100 are not predicted. Rows without labels and rows whose score is not finite score ``-inf``, so they rank last. Nothing of
    the model is touched: no parameter, buffer, flag, hook or random stream. (Paper, section 7.)
    """

    def __init__(
        self,
        model: Model,
        *,
        exit_layer: int | str = 1,
        criterion: ScoreOf | str = "loss",
        keep: float = 0.5,
        selection: Selection | None = None,
        positions: Positions | None = None,
        sift_weight: bool = False,
        exit_head: ExitHead | Literal["probe"] | None = None,
        labels: Labels | None = None,
        score_fn: ScoreFunction | None = None,
        shift_labels: bool | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(
                f"model must be a torch.nn.Module or a function that returns one, "
                f"got {type(model).__name__}"
            )
        check_keep(keep)
        if isinstance(keep, Mapping):
            raise TypeError("a Sifter counts no steps: keep must be a number, not one by step")
        if isinstance(selection, type):
            raise TypeError(f"selection must be an object: {selection.__name__}(), with brackets")
        self.keep = keep
        self.exit_layer = exit_layer
        self.criterion = criterion_named(criterion)
        self.selection = selection or TopK()
        self.positions = positions
        self.weighs = sift_weight
        if sift_weight and not (isinstance(self.criterion, Random) or samples(self.selection)):
            weights(self.selection, torch.zeros(2), 1, Pool())  # says what is needed
        self.counts = Stats()
        self.pools = 0  # scored so far: the key of random draws
        if exit_head not in (None, "probe") and not isinstance(exit_head, ExitHead):
            raise ValueError(f'exit_head must be None, "probe" or an ExitHead, got {exit_head!r}')
        if exit_head is not None and score_fn is not None:
            raise ValueError(
                "score_fn calls the model's own early exit, exit_head replaces it: give one of them"
            )
        self.exit_head = ExitHead() if isinstance(exit_head, str) else exit_head
        self._labels, self._score_fn = labels, score_fn
        self._shift, self._autocast = shift_labels, autocast
        self._early: EarlyExit | ProbeExit | None = None
        self._watching: RemovableHandle | None = None
        self._watches = WATCHES
        self.attach_model(model)

    def attach_model(self, model: Model) -> None:
        """Score with this model from now on: after wrapping it, say."""
        self.unwatch_precision()
        self._model, self._early = model, None
        self._task: Task | None = None  # how labels are read; learned from the first pool, as are
        self._tried = False  # whether scoring works
        self._reading: Reading | None = None  # and by whose loss, where it is not by the logits
        # What cannot be cut fails here, not after the warm-up. A callable may have nothing to find yet.
        if isinstance(model, nn.Module) and self._needs_model:
            self._exit()

    @property
    def model(self) -> nn.Module:
        """The live model without its compiled and data-parallel wrappers."""
        model = self._model if isinstance(self._model, nn.Module) else self._model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model= returned {type(model).__name__}, need a torch.nn.Module")
        return unwrap(model)

    @property
    def device(self) -> torch.device:
        """Where the model reads its input: the device of its input embedding, else its first parameter."""
        model = self.model
        try:
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            return torch.device(embedding.weight.device)
        except (AttributeError, NotImplementedError):
            first = next(model.parameters(), None)
            return torch.device("cpu") if first is None else first.device

    def digests(self) -> dict[str, str]:
        """What was learned beside the model, by name: the sha256 of each, for a state to refer to."""
        named: dict[str, Any] = {f"criterion {n}": e for n, e in enumerate(_terms(self.criterion))}
        named["exit_head"] = self.exit_head
        return {name: each.digest() for name, each in named.items() if hasattr(each, "digest")}

    @property
    def stats(self) -> dict[str, Any]:
        """What happened so far, a plain dict; reading it may wait for the GPU."""
        return self.counts.read()

    def __call__(self, candidates: Batch) -> Batch:
        """The best ``keep * P`` rows of ``candidates``; raises ValueError where that is not whole."""
        keep = whole(rows(candidates) * self.keep)
        if keep is None:
            raise ValueError(
                f"{rows(candidates)} candidates * keep {self.keep} is not a whole number of rows"
            )
        labels = self.labels_of(candidates)
        candidates = move(candidates, self.device)
        index, _, found = self.winners(candidates, labels, keep)
        return weighted(select(candidates, index), found, index)

    def score(self, candidates: Batch) -> Tensor:
        """One score per candidate, [P] float32, on the model's device; -inf ranks last."""
        return self.rate(move(candidates, self.device), self.labels_of(candidates))[0]

    def watch_precision(self) -> None:
        """Learn from the model's next forward in which precision the loop runs it; once.

        A hook on the model as it was given, gone after that forward or with ``unwatch_precision``. Models
        compiled in place or given without their compiled wrapper are not watched from inside their
        graph: for those, ``autocast`` must be given.
        """
        model = self._model if isinstance(self._model, nn.Module) else self._model()
        if self._autocast is not None or not self._watches:
            return
        self._watches -= 1

        def look(module: nn.Module, args: Any) -> None:
            # Shells carry copies of hooks; a graph must not see any of this.
            if torch.compiler.is_compiling() or module is not model or not module.training:
                return
            kind = self.device.type
            if torch.is_autocast_enabled(kind):
                self._autocast = torch.get_autocast_dtype(kind)
            self._watches = 0
            self.unwatch_precision()

        self._watching = model.register_forward_pre_hook(look)

    @property
    def precision(self) -> str | None:
        """The dtype given or learned, by name; None where scoring runs in the model's own."""
        return None if self._autocast is None else str(self._autocast).removeprefix("torch.")

    @precision.setter
    def precision(self, name: str | None) -> None:
        self._autocast = None if name is None else getattr(torch, name)

    def unwatch_precision(self) -> None:
        """Take the hook off, whether or not it saw a forward."""
        if self._watching is not None:
            self._watching.remove()
            self._watching = None

    def winners(
        self,
        candidates: Batch,
        labels: Tensor | None,
        keep: int,
        fields: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Indices of the kept [b], rising, all scores [P], weights [P] if wanted; counted."""
        pool = self._pool(candidates, fields)
        with self.counts.timing(self.device):
            scores, nonfinite, unlabelled = self._rate(pool, labels, learn=True)
            index = self.selection(scores, keep, pool)
            found = self._weights_of(scores, keep, pool) if self.weighs else None
        self.pools += 1
        self.counts.count_pool(scores, index, nonfinite, unlabelled)
        return index, scores, found

    def labels_of(self, batch: Batch) -> Tensor | None:
        """The labels of a batch as they lie; None where nobody looks at them."""
        if self._score_fn is not None:
            return None
        if callable(self._labels):
            return self._labels(batch)
        return self._found(batch)

    def _found(self, batch: Batch) -> Tensor | None:
        found: Any = None
        if isinstance(batch, Mapping):
            found = batch.get(self.label_name)
        elif hasattr(batch, self.label_name):
            found = getattr(batch, self.label_name)
        elif isinstance(batch, (tuple, list)) and len(batch) > 1:
            found = batch[-1]
        if isinstance(found, Tensor):
            return _without_padding(found, batch) if _skips_padding(self.model) else found
        if isinstance(self.criterion, Random):
            return None
        fields = f" with fields {sorted(batch)}" if isinstance(batch, Mapping) else ""
        raise ScoringError(
            f"no labels in a {type(batch).__name__}{fields}: they must be tensors under "
            f'"{self.label_name}" or last in a tuple; or pass labels= (a key or a function) or '
            f"score_fn="
        )

    @property
    def label_name(self) -> str:
        """The key under which labels are looked for."""
        return self._labels if isinstance(self._labels, str) else "labels"

    def teach(self, batch: Batch, labels: Tensor | None) -> None:
        """Train the exit head on a batch that is not sifted; nothing where there is none."""
        if isinstance(early := self._exit() if self.exit_head else None, ProbeExit):
            with torch.no_grad(), self._precision(self.device):
                early.learn(batch, self._targets(batch, labels, self.device))

    def rate(
        self, candidates: Batch, labels: Tensor | None, fields: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [P], how many were not finite, how many rows had no label; all on the device.

        ``candidates`` lie on the model's device, ``labels`` best on the host; None is for criteria
        that look at no label.
        """
        return self._rate(self._pool(candidates, fields), labels)

    def _pool(self, candidates: Batch, fields: Mapping[str, Tensor] | None) -> Pool:
        return Pool(candidates, self.pools, World.detect().rank, fields or {})

    def _rate(
        self, pool: Pool, labels: Tensor | None, learn: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, samples = self.device, rows(pool.batch)
        with torch.no_grad(), self._precision(device):
            if self._score_fn is not None and self._needs_model:
                scores, labelled = self._by_function(self._score_fn, pool)
            else:
                scores, labelled = self._by_labels(pool, labels, device, learn)
        if not isinstance(scores, Tensor) or scores.shape != (samples,):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ScoringError(f"need one score per candidate, [{samples}], got {found}")
        scores = scores.detach().to(device, torch.float32)
        finite = scores.isfinite()
        ranked = scores.masked_fill(~(finite & labelled), -torch.inf)
        return ranked, (~finite & labelled).sum(), (~labelled).sum()

    def _by_labels(
        self, pool: Pool, labels: Tensor | None, device: torch.device, learn: bool
    ) -> tuple[Any, Tensor]:
        targets = self._targets(pool.batch, labels, device)
        if self._needs_model and not self._tried:
            self._try(pool.batch, targets)
        if self._reading is not None:
            return self._heard(self._reading, self._own_exit().with_labels, pool)

        def run(batch: Batch, targets: Targets, first: int) -> Iterator[Tensor]:
            return self._exit().logits_at(batch, targets)

        scores = self.criterion(Predictions(targets, run, pool))
        if learn and isinstance(early := self._exit(), ProbeExit):
            early.learn(
                pool.batch, targets
            )  # after the scores: those are of the weights before it
        return scores, targets.labelled()

    def _targets(self, batch: Batch, labels: Tensor | None, device: torch.device) -> Targets:
        if labels is None:
            labels = torch.zeros(rows(batch), dtype=torch.long)
        task = self._task_of(batch, labels)
        if task.ignored != IGNORED:
            labels = labels.masked_fill(labels == task.ignored, IGNORED)
        return Targets.of(labels, device, bool(task.shift), self.positions)

    def _try(self, candidates: Batch, targets: Targets) -> None:
        # Once: are there predictions without the labels? Else the model's own loss is listened to.
        early, samples = self._exit(), targets.samples
        try:
            classes = early.classes(candidates, targets.length)
        except ScoringError as error:
            if isinstance(early, EarlyExit) and early.takes_labels(candidates):
                self._reading = Reading.of(early.with_labels, candidates, samples)
            if self._reading is None:
                raise error from None
            self._warn_if_slow()
        else:
            labels = targets.labels
            if not labels.is_floating_point() and labels.numel() and int(labels.max()) >= classes:
                raise ScoringError(
                    f"found label {int(labels.max())}, the model predicts {classes} classes (0 to "
                    f"{classes - 1}); is it the tokenizer that the model was built for?"
                )
        self._tried = True

    def _by_function(self, function: ScoreFunction, pool: Pool) -> tuple[Any, Tensor]:
        def call(batch: Batch) -> Any:
            return function(self._own_exit(), batch)

        samples = rows(pool.batch)
        if not self._tried:
            few = min(2, samples)
            found, taps = listen(lambda: call(cut(pool.batch, 0, few)))
            one_each = isinstance(found, Tensor) and found.ndim == 1 and len(found) == few
            if taps and not one_each:
                self._reading = Reading.of(call, pool.batch, samples)
                self._warn_if_slow()
            self._tried = True
        if self._reading is not None:
            return self._heard(self._reading, call, pool)
        scores = call(pool.batch)
        if isinstance(scores, Tensor) and scores.ndim == 0:
            raise ScoringError(
                "score_fn returned one number for all candidates and did not call cross_entropy, "
                "where their losses could be heard apart; return one score per candidate, [P]"
            )
        return scores, torch.ones(samples, dtype=torch.bool, device=self.device)

    def _warn_if_slow(self) -> None:
        if self._reading is not None and self._reading.order == "alone":
            warnings.warn(
                "the loss of several samples together does not show which position belongs to which "
                "sample, so they are scored one at a time: right, but slower",
                stacklevel=2,
            )

    def _heard(
        self, reading: Reading, call: Callable[[Batch], Any], pool: Pool
    ) -> tuple[Tensor, Tensor]:
        scores, labelled = [], []
        for part in reading.samples(call, pool.batch, rows(pool.batch)):
            logits, device = part.logits.flatten(0, 1), part.logits.device
            targets = Targets.of(part.labels, device, False, self.positions, dense=True)

            def run(
                batch: Batch, targets: Targets, first: int, logits: Tensor = logits
            ) -> Iterator[Tensor]:
                yield logits.index_select(0, targets.positions + first * targets.length)

            early = Predictions(targets, run, pool.part(part.first, part.last))
            scores.append(self.criterion(early))
            labelled.append(targets.labelled())
        return torch.cat(scores), torch.cat(labelled)

    def _weights_of(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        # A random criterion makes any selection a draw: all that can win do so alike.
        if isinstance(self.criterion, Random) and not samples(self.selection):
            can_win = scores.isfinite()
            return can_win * (keep / can_win.sum()).clamp_min(1)
        return weights(self.selection, scores, keep, pool)

    @property
    def _needs_model(self) -> bool:
        return self._score_fn is not None or not isinstance(self.criterion, (Random, Rarity))

    def _exit(self) -> EarlyExit | ProbeExit:
        if self._early is None or not self._early.is_of(self.model):
            if self.exit_head is None:
                self._early = EarlyExit(self.model, self.exit_layer)
            else:
                self._early = ProbeExit(self.model, self.exit_layer, self.exit_head)
        return self._early

    def _own_exit(self) -> EarlyExit:
        early = self._exit()
        assert isinstance(early, EarlyExit)  # exit heads have no loss to listen to, nor a score_fn
        return early

    def _task_of(self, candidates: Batch, labels: Tensor) -> Task:
        if self._task is None:
            known = _is_causal(self.model)
            task = Task(known)
            if known is None and self._needs_model:
                task = self._exit().task(candidates, labels)
            if self._shift is not None:
                task = Task(self._shift, task.ignored)
            ids = next((leaf for leaf in leaves(candidates) if isinstance(leaf, Tensor)), None)
            if task.shift is None and _labels_are_inputs(ids, labels):
                raise ScoringError(
                    "the labels are the inputs themselves, so either this is a causal model whose "
                    "loss shifts them (pass shift_labels=True) or an unmasked one "
                    "(shift_labels=False); every score would be wrong otherwise"
                )
            self._task = task
        return self._task

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        # The loop's own autocast context is kept, without its cache: casts made here, without
        # gradients, must not be found by the training step.
        dtype = self._autocast
        if dtype is None and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype, cache_enabled=False)


def _terms(criterion: ScoreOf) -> Iterator[ScoreOf]:
    if isinstance(criterion, Weighted):
        for _, each in criterion.terms:
            yield from _terms(each)
    else:
        yield criterion


def weighted(batch: Batch, weights: Tensor | None, index: Tensor | None) -> Batch:
    """The batch with ``sift_weight`` [b], where weights [P] are wanted."""
    if weights is None:
        return batch
    if not isinstance(batch, MutableMapping):
        raise ValueError(
            f"sift_weight is a field of the batch, which must be a dict; got {type(batch).__name__}"
        )
    out = copy.copy(batch)  # keeps the type
    out["sift_weight"] = weights if index is None else weights.index_select(0, index)
    return out


def _is_causal(model: nn.Module) -> bool | None:
    # Hugging Face names the loss on the model or the task in a class it inherits from; None for anyone
    # else's, and for tasks whose name does not tell.
    names = [kind.__name__ for kind in type(model).__mro__]
    loss = getattr(model, "loss_type", None)
    if isinstance(loss, str) and loss.startswith("For"):
        names = [loss]
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")) for name in names):
        return True
    told = (name for name in names if "ForConditionalGeneration" not in name)
    return False if any(re.search("For[A-Z]", name) for name in told) else None


def _skips_padding(model: nn.Module) -> bool:
    # Replaced-token detection labels every position; its loss leaves those without attention out.
    return any(
        kind.__name__.startswith("Electra") and kind.__name__.endswith("ForPreTraining")
        for kind in type(model).__mro__
    )


def _without_padding(labels: Tensor, batch: Batch) -> Tensor:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return labels if mask is None else labels.masked_fill(mask.to(labels.device) == 0, IGNORED)


def _labels_are_inputs(ids: Tensor | None, labels: Tensor) -> bool:
    if ids is None or labels.ndim != 2 or ids.shape != labels.shape or ids.is_floating_point():
        return False
    wanted = labels != IGNORED
    return bool(((labels == ids.to(labels.device)) | ~wanted).all()) and bool(wanted.any())
