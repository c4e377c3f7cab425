"""Criteria: from early predictions and labels to one score per sample, in nats.

A criterion is a callable of one argument. ``each`` walks over the predictions at the labelled positions
(only there does the head run), ``reduce`` gathers the values of a sample:

    class Confidence:
        def __call__(self, early: Predictions) -> Tensor:
            return early.reduce(early.each(lambda logits, labels: logits.softmax(-1).amax(-1)))

The sample with the highest score wins, so that ``Loss`` keeps what the model gets wrong.

Letters: P samples, T positions, V vocabulary (or classes), M labelled positions, m those of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siftloader.batches import IGNORED
from siftloader.errors import ScoringError


Reduction: TypeAlias = Literal["mean", "sum"]


@dataclass(frozen=True)
class Targets:
    """What there is to predict: the labelled positions of P samples of ``length`` positions each.

    ``positions`` [M] are flat, ``row * length + t`` in rising order, and name where the *prediction*
    stands: for a causal model one position before the label. ``starts`` [P + 1] lives on the host, so
    that no one waits for the device to learn how many labels a row has. ``real`` [M] is None unless
    unlabelled positions had to be taken along.
    """

    positions: Tensor
    labels: Tensor
    starts: list[int]
    length: int
    real: Tensor | None = None

    @property
    def samples(self) -> int:
        """P."""
        return len(self.starts) - 1

    def labelled(self) -> Tensor:
        """Which samples have a label at all, bool [P], on the device."""
        if self.real is not None:
            return self.real.view(self.samples, self.length).any(1)
        return _to(torch.tensor(self.starts).diff() > 0, self.positions.device)

    @classmethod
    def of(cls, labels: Tensor, device: torch.device, shift: bool) -> Targets:
        """Find the labelled positions of ``labels`` [P, T] or [P]; -100 marks the others.

        With ``shift`` the label at ``t + 1`` belongs to the prediction at ``t``. Labels on the host
        cost no synchronisation; labels on a GPU none with ``shift`` and one without.
        """
        if labels.ndim not in (1, 2) or labels.is_floating_point():
            raise ScoringError(
                f"labels must be integers of shape [P] or [P, T], got {labels.dtype} "
                f"{tuple(labels.shape)}; for anything else pass score_fn="
            )
        labels = labels.long()
        if shift and labels.ndim != 2:
            raise ScoringError(f"a causal model needs labels [P, T], got {tuple(labels.shape)}")
        samples, length = labels.shape[0], labels.shape[1] if labels.ndim == 2 else 1
        wanted = labels.reshape(samples, length)
        if shift:  # a last column without label keeps the geometry [P, T]
            wanted = torch.nn.functional.pad(wanted[:, 1:], (0, 1), value=IGNORED)
        if labels.device.type != "cpu" and shift:
            flat = torch.arange(samples * length, device=labels.device)
            starts = list(range(0, (samples + 1) * length, length))
            chosen = wanted.reshape(-1)
            return cls(flat, chosen, starts, length, chosen != IGNORED)
        wanted = wanted.cpu()
        mask = wanted != IGNORED
        starts = [0, *mask.sum(1).cumsum(0).tolist()]
        positions = mask.reshape(-1).nonzero().squeeze(1)
        chosen = wanted.reshape(-1)[positions]
        if chosen.numel() and chosen.min() < 0:
            raise ScoringError(
                f"found label {int(chosen.min())}; labels must be 0 or more, or {IGNORED} where there "
                f"is nothing to predict (pass labels= with a function that says so)"
            )
        return cls(_to(positions, device), _to(chosen, device), starts, length)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")


@final
class Predictions:
    """Early predictions of a pool, made when a criterion asks for them.

    ``pool`` counts the pools scored before this one: the key for draws that must repeat on resume.
    """

    def __init__(
        self, targets: Targets, chunks: Callable[[], Iterator[Tensor]], pool: int = 0
    ) -> None:
        self._targets, self._chunks, self.pool = targets, chunks, pool

    @property
    def samples(self) -> int:
        """P, the number of candidates."""
        return self._targets.samples

    @property
    def labels(self) -> Tensor:
        """The labels at the labelled positions, [M], those of a sample side by side."""
        return self._targets.labels

    def each(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Apply ``value`` to logits [m, V] and labels [m], chunk by chunk; returns [M].

        Low-precision logits come as float32.
        """
        found: list[Tensor] = []
        done = 0
        for logits in self._chunks():
            if logits.shape[-1] < 2:
                raise ScoringError(
                    "the model predicts a single number per position, which has no cross-entropy; "
                    "pass score_fn= with the loss of your loop"
                )
            labels = self.labels[done : done + len(logits)]
            if self._targets.real is not None:
                labels = labels.clamp_min(0)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            found.append(value(wide, labels))
            done += len(logits)
        return torch.cat(found) if found else torch.zeros(0, device=self.labels.device)

    def reduce(self, values: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Mean (or sum) of ``values`` [M] over the labelled positions of each sample: [P].

        A sample without labels gets NaN, which never wins.
        """
        targets = self._targets
        # Through a dense [P, T]: index_put without repeats is deterministic on a GPU, index_add is not.
        dense = values.new_zeros(targets.samples * targets.length)
        if targets.real is None:
            dense[targets.positions] = values
            starts = torch.tensor(targets.starts)
            counts = _to(starts.diff(), values.device)
        else:
            dense[targets.positions] = torch.where(targets.real, values, 0)
            counts = targets.real.view(targets.samples, targets.length).sum(1)
        sums = dense.view(targets.samples, targets.length).sum(1)
        means = sums / counts.to(sums.dtype) if reduction == "mean" else sums
        return torch.where(counts > 0, means, torch.nan)


class Criterion(Protocol):
    """From early predictions to one score per sample, [P]; higher is kept."""

    def __call__(self, early: Predictions) -> Tensor:
        """Return the scores, [P], on the device of the predictions."""
        ...


def _check(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')


@final
@dataclass(frozen=True)
class Loss:
    """Cross-entropy of the early prediction, in nats: SIFT's first criterion (paper, section 7)."""

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        _check(self.reduction)

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the mean over a sample's labelled positions."""
        return early.reduce(early.each(token_loss), self.reduction)


@final
@dataclass(frozen=True)
class Entropy:
    """Entropy of the early prediction, in nats: SIFT's better criterion (paper, section 7).

    Taken where there is a label, though its value is not used.
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        _check(self.reduction)

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the mean over a sample's labelled positions."""
        return early.reduce(early.each(token_entropy), self.reduction)


@final
@dataclass(frozen=True)
class Random:
    """A random half: the control every other criterion must beat. Costs nothing, repeats on resume."""

    seed: int = 0

    def __call__(self, early: Predictions) -> Tensor:
        """[P], uniform in [0, 1), a function of (seed, pool) alone."""
        key = np.random.SeedSequence((self.seed, early.pool)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(key >> np.uint64(1)))
        return torch.rand(early.samples, generator=generator).to(
            early.labels.device, non_blocking=early.labels.device.type != "cpu"
        )


@final
@dataclass(frozen=True, eq=False)
class Rarity:
    """Mean surprise of a sample's labels under fixed counts, in nats: no model, the control to beat.

    Rarity(shards.unigrams)      # int64 [V], from preparation; add-one smoothed

    Early losses are largely token rarity; a criterion that does not beat this one learns nothing from
    the model. The counts are given, never learned on the fly.
    """

    unigrams: NDArray[np.int64]
    reduction: Reduction = "mean"
    _surprise: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.reduction)
        counts = np.asarray(self.unigrams)
        if counts.ndim != 1 or counts.size < 2 or (counts < 0).any():
            raise ValueError(f"unigrams must be non-negative counts [V], got shape {counts.shape}")

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the mean of -log p(label) over a sample's labelled positions."""
        device = early.labels.device
        if device not in self._surprise:
            counts = torch.as_tensor(np.asarray(self.unigrams, np.float64) + 1)
            self._surprise[device] = (counts.sum() / counts).log().float().to(device)
        return early.reduce(self._surprise[device][early.labels.clamp_min(0)], self.reduction)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], [m], nats."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def token_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-sum p log p of softmax(logits), [m], nats."""
    log_p = logits.log_softmax(-1)
    # 0 * -inf is NaN: a class ruled out by the model contributes nothing.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def criterion_named(
    criterion: Criterion | str, unigrams: Callable[[], Any] = lambda: None
) -> Criterion:
    """Resolve "loss", "entropy", "random", or "rarity" where unigrams can be had."""
    if isinstance(criterion, type):
        raise TypeError(f"criterion must be an object: {criterion.__name__}(), with brackets")
    if callable(criterion):
        return criterion
    named: dict[str, Callable[[], Criterion]] = {
        "loss": Loss,
        "entropy": Entropy,
        "random": Random,
    }
    if criterion == "rarity" and (counts := unigrams()) is not None:
        return Rarity(counts)
    if criterion in named:
        return named[criterion]()
    hint = "; Rarity needs counts: pass Rarity(unigrams)" if criterion == "rarity" else ""
    raise ValueError(
        f"criterion must be one of {sorted(named)} or a Criterion object, got {criterion!r}{hint}"
    )
