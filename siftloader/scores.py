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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from siftloader.bigrams import Bigrams
from siftloader.errors import ScoringError
from siftloader.exits import token_entropy as token_entropy, token_loss as token_loss
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
    Rarity(shards.bigrams)       # given the neighbours: the stronger control

    Early losses are largely token rarity; a criterion that does not beat this one learns nothing from
    the model. The counts are given, never learned on the fly.
    """

    reference: NDArray[np.int64] | Bigrams
    reduction: Reduction = "mean"
    _surprise: _Reference = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.reduction)
        object.__setattr__(self, "_surprise", _Reference(self.reference, "Rarity"))

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the mean of -log p(label) over a sample's labelled positions."""
        return early.reduce(self._surprise(early), self.reduction)


@final
@dataclass(frozen=True, eq=False)
class Residual(Criterion):
    """Loss minus a surprise that is known for free, in nats: what the model misses beyond that.

    Residual(shards.unigrams)        # minus rarity: int64 [V]
    Residual(shards.bigrams)         # minus the surprise given the neighbours

    On mixed text the samples of highest loss are those with the rarest tokens; here they have no advantage.
    Bigrams of ``clm`` shards look at the token before the label, those of ``mlm`` shards at both
    neighbours, as they were before masking (but for neighbours that ``positions=`` leaves out).
    """

    reference: NDArray[np.int64] | Bigrams
    reduction: Reduction = "mean"
    _surprise: _Reference = field(init=False, repr=False)

    values = (token_loss,)

    def __post_init__(self) -> None:
        _check(self.reduction)
        object.__setattr__(self, "_surprise", _Reference(self.reference, "Residual"))

    def __call__(self, early: Predictions) -> Tensor:
        """[P], the mean of loss + log p(label) over a sample's labelled positions."""
        known = self._surprise(early)  # first, as it may refuse and costs little
        return early.reduce(early.each(token_loss) - known, self.reduction)


class _Reference:
    """The surprise of the labels of predictions, [M] nats; NaN where there is no label."""

    def __init__(self, known: NDArray[np.int64] | Bigrams, name: str) -> None:
        self._name = name
        self._pairs = _Pairs(known) if isinstance(known, Bigrams) else None
        self._alone = Unigrams(known.unigrams if isinstance(known, Bigrams) else known)

    def __call__(self, early: Predictions) -> Tensor:
        if early.labels.is_floating_point():
            raise ScoringError(f"{self._name} needs labels that are classes, found probabilities")
        found = self._alone(early.labels)
        if self._pairs is not None:
            found = self._pairs(early, found)
        # Negative: no label, or a wrong one on a device, whose sample must not win by it.
        return found.masked_fill(early.labels < 0, torch.nan)


class _Pairs:
    """``Bigrams.surprise`` of the labels of predictions: in float32, where they are, and without waiting."""

    def __init__(self, bigrams: Bigrams) -> None:
        self._size, self._masked = bigrams.vocab_size, bigrams.masked
        keys = torch.as_tensor(bigrams.keys)
        sides = (bigrams.left, bigrams.right) if bigrams.masked else (bigrams.left,)
        tables = [torch.as_tensor(t).float() for s in sides for t in (s.listed, s.rest, s.weight)]
        self._tables = {torch.device("cpu"): (keys, *tables)}

    def __call__(self, early: Predictions, alone: Tensor) -> Tensor:
        """[M] nats; ``alone`` [M] are those of the unigrams."""
        if early.device not in self._tables:
            host = self._tables[torch.device("cpu")]
            self._tables[early.device] = tuple(to_device(each, early.device) for each in host)
        keys, *tables = self._tables[early.device]
        word, base, stride = early.labels.clamp_min(0), (-alone).exp(), self._size + 1
        if not self._masked:
            before = self._before(early)
            return -self._chance(keys, tables, before, before * stride + word, base).log()
        before, after = self._around(early)
        left = self._chance(keys, tables[:3], before, before * stride + word, base)
        right = self._chance(keys, tables[3:], after, word * stride + after, base)
        a, b = tables[2][before], tables[5][after]
        return -((a * left + b * right) / (a + b)).log()

    def _chance(
        self, keys: Tensor, side: list[Tensor], given: Tensor, key: Tensor, base: Tensor
    ) -> Tensor:
        at = torch.searchsorted(keys, key)
        return torch.where(keys[at] == key, side[0][at], 0) + side[1][given] * base

    def _before(self, early: Predictions) -> Tensor:
        # A causal model predicts where the token before the label is read.
        ids, row, at = self._ids(early)
        if ids.device.type == "cpu" and not bool(_is_next(early.labels, ids, row, at).all()):
            raise ScoringError(
                "bigrams of running text (clm) need labels that are the next token of input_ids, found "
                "another (is the text masked?); take those of the shards that the batches come from"
            )
        return ids[row, at]

    def _around(self, early: Predictions) -> tuple[Tensor, Tensor]:
        # The neighbours as they were before masking: labels say what was there.
        ids, row, at = self._ids(early)
        if ids.device.type == "cpu":
            following = _is_next(early.labels, ids, row, at)
            if len(following) > 1 and bool(following.all()):
                raise ScoringError(
                    "bigrams of masked text (mlm) need labels that stand where they are predicted, found "
                    "the next tokens of input_ids; prepare shards with the objective clm for that"
                )
        width = ids.shape[1] + 2
        text = torch.nn.functional.pad(ids, (1, 1), value=self._size).flatten()
        here = row * width + at + 1
        text[here] = torch.where(early.labels >= 0, early.labels, text[here])
        return text[here - 1], text[here + 1]

    def _ids(self, early: Predictions) -> tuple[Tensor, Tensor, Tensor]:
        # input_ids [P, T], V for those that no count knows, and where the predictions stand in them.
        batch, targets = early.pool.batch, early.targets
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if ids is None and isinstance(batch, (tuple, list)) and batch:
            ids = batch[0]
        if ids is None:
            ids = getattr(batch, "input_ids", None)
        # A loss that is heard may have left out the last position, which predicts nothing.
        if (
            not isinstance(ids, Tensor)
            or ids.ndim != 2
            or ids.is_floating_point()
            or targets.length not in (ids.shape[1], ids.shape[1] - 1)
        ):
            found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else "none"
            raise ScoringError(
                f"bigrams need input_ids, integers [P, T], and a prediction for each of them: found "
                f"{found} with {targets.length} predictions a sample"
            )
        ids = to_device(ids, early.device).long()
        ids = ids.masked_fill((ids < 0) | (ids > self._size), self._size)
        return ids, targets.positions // targets.length, targets.positions % targets.length


def _is_next(labels: Tensor, ids: Tensor, row: Tensor, at: Tensor) -> Tensor:
    # Whether labels [M] are what follows in ids [P, T]; of those that are and have something after them.
    inner = (at + 1 < ids.shape[1]) & (labels >= 0)
    return ids[row[inner], at[inner] + 1] == labels[inner]


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
