"""When to sift: after the warm-up, until the cool-down; and how much that makes of an epoch.

Letters: b rows the loop receives, P rows of a pool (b / keep).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Epoch(NamedTuple):
    """What an epoch hands out."""

    batches: int
    samples: int


@dataclass(frozen=True)
class Schedule:
    """Sift from step ``warmup_steps`` on, stop ``cooldown_steps`` before ``total_steps``.

    Schedule(warmup_steps=20_000, total_steps=800_000)                       # the paper
    Schedule(warmup_steps=1_000, cooldown_steps=0.2, total_steps=10_000)     # the last fifth is plain

    A step is a batch handed out in training mode; steps count from 0.
    """

    warmup_steps: int = 1000
    cooldown_steps: int | float = 0
    total_steps: int | None = None

    def __post_init__(self) -> None:
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

    def sifts(self, step: int) -> bool:
        """Whether the batch of this step is sifted."""
        end = self.cooldown_begins
        return self.warmup_steps <= step and (end is None or step < end)

    def epoch(self, step: int, rows: int, batch: int, pool: int) -> Epoch:
        """What ``rows`` rows make from this step on: ``w + n // P + (n % P >= b)`` batches.

        ``w`` batches pass through the warm-up with ``batch`` rows each, the ``n`` rows left are sifted
        ``pool`` at a time; what a cool-down leaves passes through again, the rest of a half-used inner
        batch first. With ``pool == batch`` everything passes through.
        """
        end = self.cooldown_begins
        if pool == batch or (end is not None and step >= end):
            return Epoch(-(-rows // batch), rows)
        warm = min(max(0, self.warmup_steps - step), -(-rows // batch))
        left = max(0, rows - warm * batch)
        sifted = left // pool + (left % pool >= batch)
        plain = 0  # batches of the cool-down
        cool = 0  # their rows
        if end is not None and sifted >= end - step - warm:
            sifted = end - step - warm
            cool = max(0, left - sifted * pool)
            rest = min(cool, -sifted * pool % batch)
            plain = (rest > 0) + -(-(cool - rest) // batch)
        return Epoch(warm + sifted + plain, min(rows, warm * batch) + sifted * batch + cool)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
