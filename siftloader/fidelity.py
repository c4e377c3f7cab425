"""How well early scores stand for those of the whole model, and what they select: the figures of an audit.

    sums = measured(early, full, early_losses, full_losses, kept)    # one pool, [P] each
    Fidelity.of(sums).rho                                            # 1.31
    Fidelity.of(sums + those_of_other_pools)                         # sums add, over pools and ranks

Letters: P candidates. Losses are means over the labelled positions of a sample, in nats. (Paper, sections 5 and 6.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray


Sums: TypeAlias = NDArray[np.float64]
PAIRED = 1024  # rows whose pairs are counted: half a million pairs tell as much as all

# What is added up. Weights stand beside the figures that have no value in some pools.
_SUMS = (
    *("rows", "loss", "squares", "kept", "loss_kept", "loss_top", "top", "common", "ordered"),
    *("rank_rows", "ranks", "pairs", "alike", "ratios", "log_ratio", "log_ratio_squares"),
)
SUMS = len(_SUMS)


@dataclass(frozen=True)
class Fidelity:
    """The exit beside the whole model, over the candidates that were scored by both.

    A figure without a value (nothing kept, a single candidate, losses of 0) is nan.
    """

    rows: int  # candidates that count: labelled, with finite losses and scores
    population_loss: (
        float  # mean loss of all of them by the whole model, nats: of the data, not of the kept
    )
    population_error: float  # its standard error over rows, nats
    rho: float  # mean loss of the kept over that of all: Definition 3's rho_R,approx (rho_R in Theorem 1)
    rho_full: float  # the same of as many with the highest losses: Definition 2, the most that an exit reaches
    overlap: float  # share of the highest early scores that are among the highest of the whole model, 0..1
    spearman: float  # rank correlation of both scores, within a pool
    agreement: float  # share of pairs that both scores order alike: p_j of equation 12, counted
    sigma: (
        float  # standard deviation of log(early loss / loss): Assumption 6, the noise of Theorem 4
    )

    @classmethod
    def of(cls, sums: Sums) -> Fidelity:
        """From sums over any number of pools."""
        found = dict(zip(_SUMS, map(float, sums), strict=True))
        rows, ratios = found["rows"], found["ratios"]
        loss = _ratio(found["loss"], rows)
        return cls(
            rows=int(rows),
            population_loss=loss,
            population_error=_ratio(_deviation(found["squares"], found["loss"], rows), rows**0.5),
            rho=_ratio(_ratio(found["loss_kept"], found["kept"]), loss),
            rho_full=_ratio(_ratio(found["loss_top"], found["top"]), loss),
            overlap=_ratio(found["common"], found["ordered"]),
            spearman=_ratio(found["ranks"], found["rank_rows"]),
            agreement=_ratio(found["alike"], found["pairs"]),
            sigma=_deviation(found["log_ratio_squares"], found["log_ratio"], ratios),
        )


def measured(
    early_scores: ArrayLike,
    full_scores: ArrayLike,
    early_losses: ArrayLike,
    full_losses: ArrayLike,
    kept: ArrayLike,
) -> Sums:
    """The sums of one pool, [SUMS]: scores and losses [P] at the exit and by the whole model, and who was kept [P].

    Rows with a score or a loss (by the whole model) that is not finite do not count.
    """
    early, full, early_loss, loss = (
        np.asarray(each, np.float64)
        for each in (early_scores, full_scores, early_losses, full_losses)
    )
    won = np.asarray(kept, bool)
    counts = np.isfinite(early) & np.isfinite(full) & np.isfinite(loss)
    early, full, early_loss, loss, won = (
        each[counts] for each in (early, full, early_loss, loss, won)
    )
    rows, top = len(loss), int(won.sum())
    sums = dict.fromkeys(_SUMS, 0.0)
    sums |= {"rows": rows, "loss": loss.sum(), "squares": np.square(loss).sum()}
    if top:
        best = _highest(full, top)
        sums |= {"kept": top, "loss_kept": loss[won].sum(), "ordered": top}
        sums |= {"top": top, "loss_top": loss[_highest(loss, top)].sum()}
        sums["common"] = len(np.intersect1d(_highest(early, top), best))
    if (correlation := _spearman(early, full)) is not None:
        sums |= {"rank_rows": rows, "ranks": rows * correlation}
    pairs, alike = _pairs(early[:PAIRED], full[:PAIRED])
    sums |= {"pairs": pairs, "alike": alike}
    real = np.isfinite(early_loss) & (early_loss > 0) & (loss > 0)
    log_ratio = np.log(early_loss[real] / loss[real])
    sums |= {"ratios": real.sum(), "log_ratio": log_ratio.sum()}
    sums["log_ratio_squares"] = np.square(log_ratio).sum()
    return np.array([sums[name] for name in _SUMS])


def _highest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    # The lower position wins a tie, as in a loader.
    return np.argsort(-values, kind="stable")[:count]


def _spearman(some: NDArray[np.float64], others: NDArray[np.float64]) -> float | None:
    # None where one of them does not vary: there is no order to agree with.
    x, y = _ranks(some), _ranks(others)
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # Equal values share the mean of their ranks.
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean: NDArray[np.float64] = (ends - (counts - 1) / 2)[place.reshape(-1)]
    return mean


def _pairs(early: NDArray[np.float64], full: NDArray[np.float64]) -> tuple[float, float]:
    # Pairs that the whole model orders, and of those how many the exit orders alike: half, where it cannot tell.
    first, second = np.triu_indices(len(full), 1)
    wanted, found = np.sign(full[first] - full[second]), np.sign(early[first] - early[second])
    told = wanted != 0
    return float(told.sum()), float((1 + wanted[told] * found[told]).sum() / 2)


def _deviation(squares: float, total: float, count: float) -> float:
    if count < 2:
        return math.nan
    return math.sqrt(max(0.0, squares - total * total / count) / (count - 1))


def _ratio(one: float, other: float) -> float:
    return one / other if other else math.nan
