"""``Sifter``: the step itself, for loops that draw their own candidates.

    sift = Sifter(model, exit_layer=1, criterion="entropy")
    batch = sift(get_batch("train"))        # P rows in, keep * P out

Letters: b rows kept, P candidates, T positions of a row, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from siftloader.batches import IGNORED, Batch, leaves, move, rows, select
from siftloader.errors import ScoringError
from siftloader.exits import EarlyExit
from siftloader.scores import Criterion, Predictions, Random, Rarity, Targets, criterion_named
from siftloader.selection import Selection, TopK
from siftloader.stack import unwrap
from siftloader.stats import Stats


Model: TypeAlias = nn.Module | Callable[[], nn.Module]
Labels: TypeAlias = str | Callable[[Batch], Tensor]
ScoreFunction: TypeAlias = Callable[[EarlyExit, Batch], Tensor]


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
    dtype to score in where the training loop owns the autocast context.

    Labels of -100 are not predicted. Rows without labels and rows whose score is not finite score ``-inf``, so they rank last. Nothing of
    the model is touched: no parameter, buffer, flag, hook or random stream. (Paper, section 7.)
    """

    def __init__(
        self,
        model: Model,
        *,
        exit_layer: int | str = 1,
        criterion: Criterion | str = "loss",
        keep: float = 0.5,
        selection: Selection | None = None,
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
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise ValueError(f"keep must be a number above 0 and at most 1, got {keep!r}")
        if isinstance(selection, type):
            raise TypeError(f"selection must be an object: {selection.__name__}(), with brackets")
        self.keep = keep
        self.exit_layer = exit_layer
        self.criterion = criterion_named(criterion)
        self.selection = selection or TopK()
        self.counts = Stats()
        self.pools = 0  # scored so far: the key of random draws
        self._labels, self._score_fn = labels, score_fn
        self._shift, self._autocast = shift_labels, autocast
        self._early: EarlyExit | None = None
        self.attach_model(model)

    def attach_model(self, model: Model) -> None:
        """Score with this model from now on: after wrapping it, say."""
        self._model, self._early = model, None
        # What cannot be cut fails here, not after the warm-up. A callable may have nothing to find yet.
        if isinstance(model, nn.Module) and self._needs_model:
            self._early = EarlyExit(model, self.exit_layer)

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
        return select(candidates, self.winners(candidates, labels, keep)[0])

    def score(self, candidates: Batch) -> Tensor:
        """One score per candidate, [P] float32, on the model's device; -inf ranks last."""
        return self.rate(move(candidates, self.device), self.labels_of(candidates))[0]

    def winners(
        self, candidates: Batch, labels: Tensor | None, keep: int
    ) -> tuple[Tensor, Tensor]:
        """Indices of the kept [b], rising, and all scores [P]; both counted."""
        with self.counts.timing(self.device):
            scores, nonfinite, unlabelled = self.rate(candidates, labels)
            index = self.selection(scores, keep)
        self.pools += 1
        self.counts.count_pool(scores, index, nonfinite, unlabelled)
        return index, scores

    def labels_of(self, batch: Batch) -> Tensor | None:
        """The labels of a batch as they lie; None where nobody looks at them."""
        if self._score_fn is not None:
            return None
        if callable(self._labels):
            return self._labels(batch)
        found: Any = None
        if isinstance(batch, Mapping):
            found = batch.get(self.label_name)
        elif hasattr(batch, self.label_name):
            found = getattr(batch, self.label_name)
        elif isinstance(batch, (tuple, list)) and len(batch) > 1:
            found = batch[-1]
        if isinstance(found, Tensor):
            return found
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

    def rate(self, candidates: Batch, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [P], how many were not finite, how many rows had no label; all on the device.

        ``candidates`` lie on the model's device, ``labels`` best on the host; None is for criteria
        that look at no label.
        """
        device, samples = self.device, rows(candidates)
        with torch.no_grad(), self._precision(device):
            if self._score_fn is not None:
                scores = self._score_fn(self._exit(), candidates)
                labelled = torch.ones(samples, dtype=torch.bool, device=device)
            else:
                shifted = labels is not None and self._shifted(candidates, labels)
                labels = torch.zeros(samples, dtype=torch.long) if labels is None else labels
                targets = Targets.of(labels, device, shifted)
                labelled = targets.labelled()
                scores = self.criterion(self._predictions(candidates, targets))
        if not isinstance(scores, Tensor) or scores.shape != (samples,):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ScoringError(f"need one score per candidate, [{samples}], got {found}")
        scores = scores.detach().to(device, torch.float32)
        finite = scores.isfinite()
        ranked = scores.masked_fill(~(finite & labelled), -torch.inf)
        return ranked, (~finite & labelled).sum(), (~labelled).sum()

    def _predictions(self, candidates: Batch, targets: Targets) -> Predictions:
        def chunks() -> Iterator[Tensor]:
            return self._exit().logits_at(
                candidates, targets.positions, targets.starts, targets.length
            )

        return Predictions(targets, chunks, self.pools)

    @property
    def _needs_model(self) -> bool:
        return self._score_fn is not None or not isinstance(self.criterion, (Random, Rarity))

    def _exit(self) -> EarlyExit:
        if self._early is None or not self._early.is_of(self.model):
            self._early = EarlyExit(self.model, self.exit_layer)
        return self._early

    def _shifted(self, candidates: Batch, labels: Tensor) -> bool:
        if self._shift is None:
            known = _is_causal(self.model)
            ids = next((leaf for leaf in leaves(candidates) if isinstance(leaf, Tensor)), None)
            if known is None and _labels_are_inputs(ids, labels):
                raise ScoringError(
                    "the labels are the inputs themselves, so either this is a causal model whose "
                    "loss shifts them (pass shift_labels=True) or an unmasked one "
                    "(shift_labels=False); every score would be wrong otherwise"
                )
            self._shift = bool(known)
        return self._shift

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        # The loop's own autocast context is kept, without its cache: casts made here, without
        # gradients, must not be found by the training step.
        dtype = self._autocast
        if dtype is None and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype, cache_enabled=False)


def whole(number: float) -> int | None:
    """The integer a product or quotient of sizes means, None where it is none."""
    nearest = round(number)
    return nearest if nearest >= 1 and abs(number - nearest) < 1e-6 * nearest else None


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


def _labels_are_inputs(ids: Tensor | None, labels: Tensor) -> bool:
    if ids is None or labels.ndim != 2 or ids.shape != labels.shape or ids.is_floating_point():
        return False
    wanted = labels != IGNORED
    return bool(((labels == ids.to(labels.device)) | ~wanted).all()) and bool(wanted.any())
