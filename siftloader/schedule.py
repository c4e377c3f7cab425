"""When to sift and how hard: after the warm-up, until the cool-down; and what that makes of an epoch.

Letters: b rows the loop receives, P rows of a pool (b / keep).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias


Keep: TypeAlias = float | Mapping[int, float]  # a mapping: from that step on


class Epoch(NamedTuple):
    """What an epoch hands out."""

    batches: int
    samples: int


@dataclass(frozen=True)
class Schedule:
    """Sift from step ``warmup_steps`` on, stop ``cooldown_steps`` before ``total_steps``.

    Schedule(warmup_steps=20_000, total_steps=800_000)                       # the paper
    Schedule(warmup_steps=1_000, cooldown_steps=0.2, total_steps=10_000)     # the last fifth is plain
    Schedule(warmup_steps=0, keep={0: 0.5, 10_000: 0.25})                    # harder as training goes on

    ``keep`` is the share of a pool that is handed out, or from which step on it is which share (1.0
    before the first of them), as Ordered SGD shrinks it (Kawaguchi and Lu, 2020). A step is a batch
    handed out in training mode, or a step of the optimizer; steps count from 0.
    """

    warmup_steps: int = 1000
    cooldown_steps: int | float = 0
    total_steps: int | None = None
    keep: Keep = 0.5

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int):
            raise TypeError(f"warmup_steps must be an int, got {self.warmup_steps!r}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if self.total_steps is not None and not _is_count(self.total_steps):
            raise ValueError(
                f"total_steps must be an int of at least 1 or None, got {self.total_steps!r}"
            )
        if isinstance(self.cooldown_steps, float) and not 0 <= self.cooldown_steps <= 1:
            raise ValueError(
                f"cooldown_steps as a fraction must be in 0..1, got {self.cooldown_steps}; "
                f"a number of steps must be an int"
            )
        if self.cooldown_steps < 0:
            raise ValueError(f"cooldown_steps must not be negative, got {self.cooldown_steps}")
        if self.cooldown_steps and self.total_steps is None:
            raise ValueError("cooldown_steps needs total_steps: the end to count back from")
        end = self.cooldown_begins
        if end is not None and self.warmup_steps >= end:
            raise ValueError(
                f"nothing would ever be sifted: the warm-up lasts {self.warmup_steps} steps and the "
                f"cool-down begins at step {end} of {self.total_steps}; shorten one of them"
            )

    @property
    def cooldown_begins(self) -> int | None:
        """The first step of the cool-down, None where there is none."""
        if self.total_steps is None or not self.cooldown_steps:
            return None
        steps = self.cooldown_steps
        if isinstance(steps, float):
            steps = round(steps * self.total_steps)
        return max(0, self.total_steps - steps)

    def keep_at(self, step: int) -> float:
        """The share of a pool that this step hands out; 1.0 while batches pass through."""
        end = self.cooldown_begins
        if step < self.warmup_steps or (end is not None and step >= end):
            return 1.0
        if not isinstance(self.keep, Mapping):
            return self.keep
        begun = [begin for begin in self.keep if begin <= step]
        return self.keep[max(begun)] if begun else 1.0

    def sifts(self, step: int) -> bool:
        """Whether the batch of this step is sifted."""
        return self.keep_at(step) < 1

    @property
    def shares(self) -> list[float]:
        """Every keep that this schedule knows."""
        return [*self.keep.values()] if isinstance(self.keep, Mapping) else [self.keep]

    @property
    def ever_sifts(self) -> bool:
        """Whether any step is."""
        return min(self.shares) < 1

    def ahead(self, step: int) -> bool:
        """Whether there is sifting from this step on, now or later."""
        end = self.cooldown_begins
        return self.ever_sifts and (end is None or step < end)

    def pool(self, step: int, batch: int) -> int:
        """P: the rows drawn for a batch of ``batch``; ValueError where that is not whole."""
        keep = self.keep_at(step)
        pool = whole(batch / keep)
        if pool is None:
            raise ValueError(
                f"batch_size {batch} / keep {keep} must be a whole number of rows; choose a "
                f"batch_size that fits"
            )
        return pool

    def check_batch(self, batch: int) -> None:
        """Raise ValueError unless every pool of this schedule is a whole number of rows."""
        for step in (self.warmup_steps, *self._changes):
            self.pool(step, batch)

    def epoch(self, step: int, rows: int, batch: int) -> Epoch:
        """What ``rows`` rows make from this step on: ``w + n // P + (n % P >= b)`` batches.

        ``w`` batches pass through the warm-up with ``batch`` rows each, the ``n`` rows left are sifted
        ``P`` at a time; what a cool-down leaves passes through again, the rest of a half-used inner
        batch first.
        """
        used = batches = samples = 0
        while used < rows:
            left, pool = rows - used, self.pool(step, batch)
            until = min((c for c in self._changes if c > step), default=math.inf)
            if pool == batch:
                first = min(-used % batch or batch, left)
                count = int(min(until - step, 1 + -(-(left - first) // batch)))
                drawn = handed = min(left, first + (count - 1) * batch)
            else:
                count = int(min(until - step, left // pool))
                drawn, handed = count * pool, count * batch
                if (
                    count < until - step
                ):  # the data ends here: a short pool, or too few rows for one
                    short = left - drawn >= batch
                    count, drawn, handed = count + short, left, handed + short * batch
            used, samples = used + drawn, samples + handed
            batches, step = batches + count, step + count
        return Epoch(batches, samples)

    def scaled(self, times: int) -> Schedule:
        """The same where every step is ``times`` as many: in batches, where it counts optimizer steps."""
        if times == 1:
            return self
        total, end = self.total_steps, self.cooldown_begins
        keep = self.keep
        return replace(
            self,
            warmup_steps=self.warmup_steps * times,
            cooldown_steps=0 if total is None or end is None else (total - end) * times,
            total_steps=None if total is None else total * times,
            keep={b * times: k for b, k in keep.items()} if isinstance(keep, Mapping) else keep,
        )

    @property
    def _changes(self) -> list[int]:
        end = self.cooldown_begins
        steps = list(self.keep) if isinstance(self.keep, Mapping) else []
        return sorted({self.warmup_steps, *steps, *([] if end is None else [end])})


def check_keep(keep: Keep) -> None:
    """Raise TypeError or ValueError unless ``keep`` is a share, or shares by step."""
    for step in keep if isinstance(keep, Mapping) else ():
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"keep by step needs steps of 0 or more, got {step!r}")
    shares = list(keep.values()) if isinstance(keep, Mapping) else [keep]
    for share in shares:
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not number or not 0 < share <= 1:
            raise ValueError(f"keep must be a number above 0 and at most 1, got {share!r}")
    if not shares:
        raise ValueError("keep by step needs at least one step, as in {0: 0.5, 10_000: 0.25}")


def whole(number: float) -> int | None:
    """The integer a product or quotient of sizes means, None where it is none."""
    nearest = round(number)
    return nearest if nearest >= 1 and abs(number - nearest) < 1e-6 * nearest else None


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
