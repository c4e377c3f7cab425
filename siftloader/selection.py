"""Which candidates win, given their scores.

A selection is a callable of scores [P] (finite, or -inf for rows that must not win), the number to keep
and the pool; it returns the winners' indices [b] in candidate order, without asking the device for a
value. Rows of -inf win only where nothing else is left, the lower position first.

``TopK`` is the paper's rule. ``TrimmedTopK`` and ``Robust`` are guards against noise: the hardest rows may
be the broken ones. ``Stratified`` keeps the mix of the pool. ``RankSample`` and ``Gumbel`` draw, so that
every row has a chance, and ``weights`` makes the mean over the drawn unbiased.

Letters: P candidates, n of them with a finite score, b kept, phi log-weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, final

import torch
from torch import Tensor

from siftloader.batches import Batch
from siftloader.errors import ScoringError
from siftloader.pool import Pool


class Selection(Protocol):
    """From scores [P] to the indices [b] of the kept, rising."""

    def __call__(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        """Return exactly ``keep`` distinct indices in rising order, int64 on the scores' device."""
        ...


class Sampling(Selection, Protocol):
    """A selection that draws, and can say how likely each row was."""

    def inclusion(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        """[P] float64, the probability that a row is kept, given the threshold of this very draw."""
        ...


@final
@dataclass(frozen=True)
class TopK:
    """The highest scores win, the lower position wins a tie: the paper's rule (section 7)."""

    def __call__(self, scores: Tensor, keep: int, pool: Pool | None = None) -> Tensor:
        """[b]; depends on the scores alone, so any order of the rows gives the same winners."""
        return _first(_descending(scores), keep)


@final
@dataclass(frozen=True)
class TrimmedTopK:
    """The highest scores win after the very highest are dropped: a guard where labels are noisy.

    TrimmedTopK(drop_top=0.1)    # of 64 candidates the 6 with the highest scores cannot win

    ``drop_top`` is a share of all P candidates, rounded to whole rows. Where fewer than ``keep``
    others have a finite score, or a short pool at the end of an epoch leaves fewer, the least high of
    the dropped win before rows of -inf do.
    """

    drop_top: float = 0.1

    def __post_init__(self) -> None:
        if not _is_number(self.drop_top) or not 0 <= self.drop_top < 1:
            raise ValueError(
                f"drop_top must be a share of the candidates, at least 0 and below 1, "
                f"got {self.drop_top!r}"
            )

    def check(self, share: float) -> None:
        """Raise ValueError where a whole pool would leave fewer than ``share`` of it to keep."""
        if self.drop_top > 1 - share + 1e-9:
            raise ValueError(
                f"drop_top={self.drop_top} of the candidates leaves too few for keep={share}; choose "
                f"drop_top of at most 1 - keep"
            )

    def __call__(self, scores: Tensor, keep: int, pool: Pool | None = None) -> Tensor:
        """[b]; the highest of all are only among them if there is nothing else."""
        drop = math.floor(self.drop_top * len(scores) + 0.5)
        dropped = torch.zeros_like(scores, dtype=torch.bool)
        dropped = dropped.scatter(0, _descending(scores)[:drop], True)
        return _first(_late(scores, dropped), keep)


@final
@dataclass(frozen=True)
class Robust:
    """The highest scores win, except outliers: those win only when nothing else is left.

    Robust(z=3.0)    # outlier: score > median + 3 * 1.4826 * (median absolute deviation)

    Median and deviation are those of the finite scores of the pool; 1.4826 times the deviation is the
    standard deviation where scores are normal. The least outlying come first among outliers. Where more
    than half of the scores are equal the deviation is zero, and every higher score is an outlier.
    """

    z: float = 3.0

    def __post_init__(self) -> None:
        if not _is_number(self.z) or not 0 < self.z < math.inf:
            raise ValueError(
                f"z must be a number above 0, in standard deviations, got {self.z!r}; without "
                f"outliers it is TopK()"
            )

    def __call__(self, scores: Tensor, keep: int, pool: Pool | None = None) -> Tensor:
        """[b]; depends on the scores alone."""
        exact = scores.double()
        count = _can_win(scores).sum()
        median = _median(exact, count)
        # The distance of a row of -inf is set to -inf, so that it is not counted either.
        distance = torch.where(_can_win(scores), (exact - median).abs(), -torch.inf)
        outlier = exact > median + self.z * 1.4826 * _median(distance, count)
        return _first(_late(scores, outlier), keep)


@final
@dataclass(frozen=True)
class Stratified:
    """Every stratum keeps its share of the pool, by the highest scores within it.

    Stratified(by="source")                             # a field the loader or the batch knows
    Stratified(by=lambda batch: batch["length"] // 128)

    ``by`` names a field [P] of integers (see ``Pool.field``) or computes one from the batch. A stratum
    of m of the n rows that can win keeps b * m / n of them, rounded up or down so that there are b
    in all: the largest remainders are rounded up, and of equal ones those with the higher next score.
    """

    by: str | Callable[[Batch], Tensor] = "source"

    def __post_init__(self) -> None:
        if isinstance(self.by, type) or not (isinstance(self.by, str) or callable(self.by)):
            raise TypeError(
                f"by must be the name of a field or a function of the batch, got {self.by!r}"
            )

    def __call__(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        """[b]; ScoringError where the strata are unknown or not integers [P]."""
        ranked = _descending(scores)
        strata, grouped = self._strata(scores, pool)[ranked].sort(stable=True)
        ranked = ranked[grouped]  # stratum by stratum, the highest scores first
        begin = torch.searchsorted(strata, strata)
        end = torch.searchsorted(strata, strata, right=True)
        can_win = _can_win(scores)[ranked]
        before = torch.nn.functional.pad(can_win.cumsum(0), (1, 0))
        # Whole numbers, so that no rounding moves a quota by one row.
        share, total = keep * (before[end] - before[begin]), before[-1].clamp_min(1)
        quota, remainder = share // total, share % total
        place = torch.arange(len(scores), device=scores.device) - begin  # within the stratum

        # First the rows within their quota, then the next row of each stratum by its remainder.
        wait = torch.where(place < quota, 0, 2 * total)
        wait = torch.where(place == quota, 2 * total - remainder, wait)
        wait = torch.where(can_win, wait, 3 * total)
        return _first(_by(torch.empty_like(wait).scatter(0, ranked, wait), scores), keep)

    def _strata(self, scores: Tensor, pool: Pool) -> Tensor:
        found: Any = pool.field(self.by) if isinstance(self.by, str) else self.by(pool.batch)
        if isinstance(found, Tensor) and found.shape == scores.shape:
            if not found.is_floating_point() and not found.is_complex():
                return _to(found.long(), scores.device)
            kind = str(found.dtype)
        else:
            kind = f"{list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ScoringError(
            f"by={self.by!r} gives {kind}, need the stratum of each candidate as an integer tensor "
            f"[{len(scores)}]"
        )


@final
@dataclass(frozen=True)
class RankSample:
    """Drawn without replacement, a higher rank with a higher probability: softer than ``TopK``.

    RankSample()             # of rank r = 0..n-1 from the easiest: ((r + 0.5) / n) ** (P / b - 1)
    RankSample(power=3.0)    # an exponent of your own; 0 draws evenly

    Only the order of the scores counts, not how far they lie apart; equal scores share their mean rank.
    A function of (seed, rank, number of the pool), so that a resumed run draws the same. (Loshchilov and
    Hutter, "Online Batch Selection", 2016; the exponent is that of Composer's selective backprop.)
    """

    power: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.power is not None and (not _is_number(self.power) or not 0 <= self.power <= 1e30):
            raise ValueError(
                f"power must be None or a number from 0 (drawn evenly) to 1e30 (nearly TopK), "
                f"got {self.power!r}"
            )
        _check_seed(self.seed)

    def __call__(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        """[b], another draw for each pool."""
        return _draw(self._log_weights(scores, keep), keep, pool, self.seed)

    def inclusion(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        """[P] float64, the probability that a row is kept, given the threshold of this very draw."""
        return _inclusion(self._log_weights(scores, keep), keep, pool, self.seed)

    def _log_weights(self, scores: Tensor, keep: int) -> Tensor:
        _check_keep(keep, len(scores))
        ordered, scores = scores.sort().values, scores.contiguous()
        lower = torch.searchsorted(ordered, scores)
        upper = torch.searchsorted(ordered, scores, right=True)
        can_win = _can_win(scores)
        rank = (lower + upper - 1).double() / 2 - (~can_win).sum()  # rows of -inf have none
        power = len(scores) / keep - 1 if self.power is None else self.power
        return torch.where(can_win, power * (rank + 0.5).log(), -torch.inf)


@final
@dataclass(frozen=True)
class Gumbel:
    """Drawn without replacement with probability proportional to exp(score / temperature).

    Gumbel()                   # a score one nat higher is e times as likely to be drawn next
    Gumbel(temperature=0.1)    # nearer to TopK, which it is at zero; evenly drawn at infinity

    A function of (seed, rank, number of the pool), so that a resumed run draws the same. (Kool, van Hoof
    and Welling, "Stochastic Beams and Where to Find Them", 2019: the Gumbel-top-k trick.)
    """

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 1e-30 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be a finite number of at least 1e-30, in the unit of the scores, "
                f'got {self.temperature!r}; its limits are TopK() at zero and criterion="random" '
                f"at infinity"
            )
        _check_seed(self.seed)

    def __call__(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        """[b], another draw for each pool."""
        return _draw(scores.double() / self.temperature, keep, pool, self.seed)

    def inclusion(self, scores: Tensor, keep: int, pool: Pool) -> Tensor:
        """[P] float64, the probability that a row is kept, given the threshold of this very draw."""
        return _inclusion(scores.double() / self.temperature, keep, pool, self.seed)


def check_share(selection: Selection, share: float) -> None:
    """Let a selection refuse to keep ``share`` of every pool, at construction rather than later."""
    if hasattr(selection, "check"):
        selection.check(share)


def samples(selection: Selection) -> TypeGuard[Sampling]:
    """Whether a selection draws and can say how likely each row was: whether ``weights`` takes it."""
    return callable(getattr(selection, "inclusion", None))


def weights(selection: Selection, scores: Tensor, keep: int, pool: Pool) -> Tensor:
    """[P] float32, so that the mean of weight * f over the kept estimates the mean of f, unbiased.

    index = selection(scores, keep, pool)
    loss = (weights(selection, scores, keep, pool)[index] * losses[index]).mean()

    The weight of a row is b / (n * q), with q its inclusion probability given the threshold of this
    draw; rows of -inf weigh 0 and are no part of the mean. ValueError for a selection that does not
    draw. (Kool, van Hoof and Welling 2019, section 4; Duffield, Lund and Thorup, priority sampling.)
    """
    if not samples(selection):
        raise ValueError(
            f"{selection!r} keeps the same rows every time, so no weight makes up for those it never "
            f'keeps; use RankSample, Gumbel, or criterion="random"'
        )
    # What was kept is at least as likely as 2 ** -53; the floor only keeps the others finite.
    likely = selection.inclusion(scores, keep, pool).clamp_min(2.0**-60)
    can_win = _can_win(scores)
    return torch.where(can_win, keep / (can_win.sum() * likely), 0.0).float()


def _can_win(scores: Tensor) -> Tensor:
    return scores > -torch.inf


def _descending(scores: Tensor) -> Tensor:
    # topk breaks ties as it likes, a stable sort by position.
    return torch.sort(scores, descending=True, stable=True).indices


def _by(wait: Tensor, scores: Tensor) -> Tensor:
    """Indices [P] by ``wait`` [P] rising, then by score falling, then by position."""
    ranked = _descending(scores)
    return ranked[wait[ranked].sort(stable=True).indices]


def _late(scores: Tensor, late: Tensor) -> Tensor:
    """Indices [P], best first; the ``late`` come after the others, lowest first, -inf after all."""
    group = torch.where(_can_win(scores), late.long(), 2)
    return _by(group, torch.where(late, -scores, scores))


def _first(order: Tensor, keep: int) -> Tensor:
    _check_keep(keep, len(order))
    return order[:keep].sort().values


def _check_keep(keep: int, samples: int) -> None:
    if not 1 <= keep <= samples:
        raise ValueError(f"cannot keep {keep} of {samples} candidates")


def _median(values: Tensor, count: Tensor) -> Tensor:
    """The median of the ``count`` highest of ``values``, -inf where there is none."""
    middle = torch.stack((count - 1, count)).div(2, rounding_mode="floor").clamp_min(0)
    return values.sort(descending=True).values[middle].mean()


def _draw(phi: Tensor, keep: int, pool: Pool, seed: int) -> Tensor:
    # The highest of log-weight + Gumbel noise are a draw without replacement (Plackett-Luce).
    return _first(_descending(_perturbed(phi, keep, pool, seed)[1]), keep)


def _inclusion(phi: Tensor, keep: int, pool: Pool, seed: int) -> Tensor:
    phi, perturbed = _perturbed(phi, keep, pool, seed)
    # The highest that is not kept; nothing is left out where all rows that can win do.
    threshold = torch.nn.functional.pad(perturbed, (0, 1), value=-torch.inf)
    threshold = threshold.sort(descending=True).values[keep]
    # P(phi + noise > threshold), without cancellation where it is small.
    return torch.where(_can_win(phi), -torch.expm1(-torch.exp(phi - threshold)), 0.0)


def _perturbed(phi: Tensor, keep: int, pool: Pool, seed: int) -> tuple[Tensor, Tensor]:
    """Log-weights [P] and the same with Gumbel noise, float64."""
    _check_keep(keep, len(phi))
    # Noise is of size one: added to a huge weight it would be lost, and position would decide between
    # equals. So the weight at the edge of being kept becomes zero.
    edge = phi.topk(keep).values[-1]
    phi = phi - torch.where(_can_win(edge), edge, 0.0)
    uniform = _to(pool.uniform(seed, len(phi)), phi.device)
    return phi, phi - (-uniform.log()).log()


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_seed(seed: object) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number, 0 or more, got {seed!r}")
