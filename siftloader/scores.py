"""Criteria: from early predictions and labels to one score per sample.

A criterion is a callable of one argument. ``each`` walks over the predictions at the labelled positions
(only there does the head run), ``reduce`` gathers the values of a sample:

    class Confidence(Criterion):
        def __call__(self, early: Predictions) -> Tensor:
            return early.reduce(early.each(lambda logits, labels: logits.softmax(-1).amax(-1)))

The sample with the highest score wins, so that ``Loss`` keeps what the model gets wrong. Criteria add up:
``Loss() + 0.1 * Entropy()`` is one, and runs the model once.

Letters: P samples, V vocabulary (or classes), M labelled positions, m those of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from siftloader.errors import ScoringError
from siftloader.predictions import Predictions, Reduction, Value
from siftloader.targets import Unigrams, to_device


ScoreOf: TypeAlias = Callable[[Predictions], Tensor]


class Criterion:
    """From early predictions to one score per sample, [P]; higher is kept.

    Any callable of that kind is a criterion; those that inherit from this class may be added, subtracted
    and scaled. ``values`` are the functions it will ask ``early.each`` for, so that a sum of criteria
    runs the model once.
    """

    values: tuple[Value, ...] = ()

    def __call__(self, early: Predictions) -> Tensor:
        """Return the scores, [P], on the device of the predictions."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(early)")

    def __add__(self, other: ScoreOf) -> Weighted:
        return Weighted(((1.0, self), (1.0, other)))

    def __radd__(self, other: object) -> Weighted:
        if other == 0:  # where sum() begins
            return Weighted(((1.0, self),))
        return NotImplemented

    def __sub__(self, other: ScoreOf) -> Weighted:
        return Weighted(((1.0, self), (-1.0, other)))

    def __mul__(self, weight: float) -> Weighted:
        return Weighted(((weight, self),))

    __rmul__ = __mul__

    def __neg__(self) -> Weighted:
        return Weighted(((-1.0, self),))


@final
@dataclass(frozen=True)
class Weighted(Criterion):
    """A weighted sum of criteria: what ``Loss() + 0.1 * Entropy()`` makes."""

    terms: tuple[tuple[float, ScoreOf], ...]

    def __post_init__(self) -> None:
        for weight, criterion in self.terms:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"a criterion is scaled by a number, got {weight!r}")
            if not math.isfinite(weight):
                raise ValueError(f"a criterion is scaled by a finite number, got {weight!r}")
            if not callable(criterion) or isinstance(criterion, type):
                raise TypeError(f"criteria are added to criteria, got {criterion!r}")

    @property
    def values(self) -> tuple[Value, ...]:  # type: ignore[override]
        """All that its terms ask for, each once."""
        asked = (v for _, each in self.terms for v in getattr(each, "values", ()))
        return tuple(dict.fromkeys(asked))

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the weighted sum of the terms' scores."""
        if values := self.values:
            early.ahead(*values)
        total = torch.zeros(early.samples, device=early.device)
        for weight, criterion in self.terms:
            total = total + weight * criterion(early)
        return total


@dataclass(frozen=True)
class _PerPosition(Criterion):
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        _check(self.reduction)

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the mean (or sum) over a sample's labelled positions."""
        return early.reduce(early.each(self.values[0]), self.reduction)


def _check(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], [m], nats."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def token_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-sum p log p of softmax(logits), [m], nats."""
    log_p = logits.log_softmax(-1)
    # 0 * -inf is NaN: a class ruled out by the model contributes nothing.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def token_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - (p of the likeliest class - p of the second), [m], in 0..1."""
    best = logits.softmax(-1).topk(2, dim=-1).values
    return 1 - (best[:, 0] - best[:, 1])


def token_doubt(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - p of the likeliest class, [m], in 0..1."""
    return 1 - logits.softmax(-1).amax(-1)


def token_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """The length of p - y, [m], in 0..sqrt(2): the loss' gradient with respect to the logits."""
    p = logits.softmax(-1)
    if labels.is_floating_point():
        return (p - labels).square().sum(-1).sqrt()
    own = p.gather(1, labels[:, None]).squeeze(1)
    # Not sum(p^2) - 2 p_y + 1: for a sure and right prediction that cancels to noise.
    others = (p.square().sum(-1) - own.square()).clamp_min(0)
    return ((1 - own).square() + others).sqrt()


@final
@dataclass(frozen=True)
class Loss(_PerPosition):
    """Cross-entropy of the early prediction, in nats: SIFT's first criterion (paper, section 7)."""

    values = (token_loss,)


@final
@dataclass(frozen=True)
class Entropy(_PerPosition):
    """Entropy of the early prediction, in nats: SIFT's better criterion (paper, section 7).

    Taken where there is a label, though its value is not used.
    """

    values = (token_entropy,)


@final
@dataclass(frozen=True)
class Margin(_PerPosition):
    """How little the likeliest class is ahead of the second: 1 - (p1 - p2), in 0..1.

    Margin sampling (Scheffer et al., 2001). Taken where there is a label, its value not used.
    """

    values = (token_margin,)


@final
@dataclass(frozen=True)
class LeastConfidence(_PerPosition):
    """How unsure the likeliest class is: 1 - p1, in 0..1 (Lewis and Gale, 1994).

    Taken where there is a label, its value not used.
    """

    values = (token_doubt,)


@final
@dataclass(frozen=True)
class GradNorm(_PerPosition):
    """An upper bound of the gradient's length, up to a constant: the mean length of p - y.

    Katharopoulos and Fleuret, 2018, section 3.2, with the last layer's logits as pre-activations; the
    mean over positions bounds the gradient of a sample's mean loss by the triangle inequality.
    """

    values = (token_gradient,)


@final
@dataclass(frozen=True)
class Random(Criterion):
    """A random half: the control every other criterion must beat. Costs nothing, repeats on resume."""

    seed: int = 0

    def __call__(self, early: Predictions) -> Tensor:
        """[P], uniform in (0, 1), a function of (seed, rank, pool) alone."""
        return to_device(early.pool.uniform(self.seed, early.samples).float(), early.device)


@final
@dataclass(frozen=True, eq=False)
class Rarity(Criterion):
    """Mean surprise of a sample's labels under fixed counts, in nats: no model, the control to beat.

    Rarity(shards.unigrams)      # int64 [V], from preparation; add-one smoothed

    Early losses are largely token rarity; a criterion that does not beat this one learns nothing from
    the model. The counts are given, never learned on the fly.
    """

    unigrams: NDArray[np.int64]
    reduction: Reduction = "mean"
    _surprise: Unigrams = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.reduction)
        object.__setattr__(self, "_surprise", Unigrams(self.unigrams))

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the mean of -log p(label) over a sample's labelled positions."""
        return early.reduce(_hard(early, "Rarity", self._surprise), self.reduction)


@final
@dataclass(frozen=True, eq=False)
class Residual(Criterion):
    """Loss minus rarity, in nats: what the model misses beyond how rare the tokens are.

    Residual(shards.unigrams)        # int64 [V]

    On mixed text the samples of highest loss are those with the rarest tokens; here they have no advantage.
    """

    unigrams: NDArray[np.int64]
    reduction: Reduction = "mean"
    _surprise: Unigrams = field(init=False, repr=False)

    values = (token_loss,)

    def __post_init__(self) -> None:
        _check(self.reduction)
        object.__setattr__(self, "_surprise", Unigrams(self.unigrams))

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the mean of loss + log p(label) over a sample's labelled positions."""
        rarity = _hard(early, "Residual", self._surprise)
        return early.reduce(early.each(token_loss) - rarity, self.reduction)


def _hard(early: Predictions, name: str, surprise: Unigrams) -> Tensor:
    if early.labels.is_floating_point():
        raise ScoringError(f"{name} needs labels that are classes, found probabilities")
    # Negative: no label, or a wrong one on a device, whose sample must not win by it.
    return surprise(early.labels).masked_fill(early.labels < 0, torch.nan)


@final
@dataclass(frozen=True, eq=False)
class Reducible(Criterion):
    """Loss minus the loss that a small model trained on held-out data keeps, in nats: RHO-LOSS.

    Reducible(ids, losses)                     # [N] int64, [N] nats
    Reducible.read("irreducible.parquet")      # what tools/irreducible.py writes

    What even that model cannot predict (noise, typos, random strings) is not worth learning. Samples
    are known by their ``id``: shards have one, other data sets give it as a field of the batch. A sample
    without an irreducible loss is an error, or, where ids lie on a GPU, a score that is not
    finite: last, and counted. (Mindermann et al., 2022.)
    """

    ids: ArrayLike
    losses: ArrayLike
    _table: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    values = (token_loss,)

    def __post_init__(self) -> None:
        ids, losses = np.asarray(self.ids), np.asarray(self.losses, np.float32)
        if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 1 or ids.shape != losses.shape:
            raise ValueError(
                f"need integer ids [N] and as many losses, got {ids.dtype} {ids.shape} and "
                f"{losses.shape}"
            )
        if len(ids) and ids.max() > np.iinfo(np.int64).max:
            raise ValueError(f"ids must be below 2**63, got {ids.max()}")
        if not len(ids) or not np.isfinite(losses).all():
            raise ValueError(
                f"need at least one irreducible loss, all of them finite; got {len(ids)}, of "
                f"which {int((~np.isfinite(losses)).sum())} are not"
            )
        order = np.argsort(ids, kind="stable")
        known = torch.as_tensor(ids.astype(np.int64)[order])
        if (known.diff() == 0).any():
            raise ValueError("an id has several irreducible losses; give each id once")
        self._table[torch.device("cpu")] = known, torch.as_tensor(losses[order])

    @classmethod
    def read(cls, path: str | Path) -> Reducible:
        """From a Parquet file with the columns ``id`` and ``loss``."""
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(
                "reading Parquet needs pyarrow: pip install 'siftloader[log]'"
            ) from error
        table = parquet.read_table(path, columns=["id", "loss"])
        return cls(table["id"].to_numpy(), table["loss"].to_numpy())

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the mean loss over a sample's labelled positions minus its irreducible one."""
        ids = early.pool.field("id")
        if ids.is_floating_point() or ids.is_complex():
            raise ScoringError(f"the ids are {ids.dtype}, which rounds large ones; give integers")
        if ids.device not in self._table:
            known, losses = self._table[torch.device("cpu")]
            self._table[ids.device] = to_device(known, ids.device), to_device(losses, ids.device)
        known, losses = self._table[ids.device]
        at = torch.searchsorted(known, ids).clamp_max(len(known) - 1)
        found = known[at] == ids
        if ids.device.type == "cpu" and not bool(found.all()):
            raise ScoringError(
                f"no irreducible loss for sample {int(ids[~found][0])} (there are {len(known)}, "
                f"ids {int(known[0])} to {int(known[-1])}); make them for this data set"
            )
        kept = torch.where(found, losses[at], torch.nan)
        return early.reduce(early.each(token_loss)) - to_device(kept, early.device)


def criterion_named(
    criterion: ScoreOf | str, unigrams: Callable[[], Any] = lambda: None
) -> ScoreOf:
    """Resolve a criterion's name; "rarity" and "residual" where unigrams can be had."""
    if isinstance(criterion, type):
        raise TypeError(f"criterion must be an object: {criterion.__name__}(), with brackets")
    if callable(criterion):
        return criterion
    named: dict[str, Callable[[], Criterion]] = {
        "loss": Loss,
        "entropy": Entropy,
        "margin": Margin,
        "least-confidence": LeastConfidence,
        "grad-norm": GradNorm,
        "random": Random,
    }
    counted: dict[str, Callable[[Any], Criterion]] = {"rarity": Rarity, "residual": Residual}
    if criterion in named:
        return named[criterion]()
    if criterion in counted and (counts := unigrams()) is not None:
        return counted[criterion](counts)
    hint = ""
    if criterion in counted:
        name = criterion.title()
        hint = f"; {name} needs counts: pass {name}(unigrams)"
    raise ValueError(
        f"criterion must be one of {sorted([*named, *counted])} or a Criterion object, got "
        f"{criterion!r}{hint}"
    )
