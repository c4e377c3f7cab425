"""How many rows: of a batch, of a pool, of an epoch. Known from the first inner batch on, if not before.

    sizes = Sizes(Schedule(warmup_steps=0), split=False, accumulation=1)
    sizes.learn(32)                      # rows of an inner batch
    sizes.pool(step=0) == 64
    sizes.epoch(step=0, rows=1000).batches == 16

Letters: b rows the loop receives, P rows of a pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from siftloader.schedule import Epoch, Schedule, whole


@final
class Sizes:
    """``batch`` is b, ``inner`` the rows of an inner batch; None before they are known.

    With ``split`` an inner batch is a pool, and b a share of it; else b is the inner batch's size.
    """

    def __init__(self, schedule: Schedule, split: bool, accumulation: int) -> None:
        self.batch: int | None = None
        self.inner: int | None = None
        self.split = split
        self._schedule, self._accumulation = schedule, accumulation

    @property
    def least(self) -> int:
        """Rows without which there is no sifted batch."""
        return self.batch or 1

    def learn(self, inner: int) -> None:
        """From the rows of an inner batch; ValueError where they make no whole batch or pool."""
        if not self.split:
            self._schedule.check_batch(inner)
            self.batch = self.inner = inner
            return
        batch = whole(inner * self._share)
        if batch is None:
            raise ValueError(
                f"batch_size {inner} * keep {self._share} must be a whole number of rows; choose a "
                f"batch_size that fits"
            )
        self.batch, self.inner = batch, inner

    def pool(self, step: int) -> int | None:
        """P at this step."""
        if self.split or self.batch is None:
            return self.inner
        return self._schedule.pool(step, self.batch)

    def kept_of(self, rows: int) -> int:
        """What is handed out of an inner batch of a split pool, the ragged last one too."""
        return whole(rows * self._share) or max(1, int(rows * self._share))

    def epoch(self, step: int, rows: int | None, ranks: int = 1, sifting: bool = True) -> Epoch:
        """What an epoch of ``rows`` rows hands out from this step on; TypeError where that is unknown.

        Without ``sifting`` all of it passes through, as with a gate that stays closed. Rows that are yet to be divided among ``ranks`` are planned for all of them together, as they will be.
        """
        if self.batch is None or self.inner is None:
            raise TypeError("the length of the wrapped loader is not known before its first batch")
        if rows is None:
            raise TypeError("the inner loader has no length, so this one has none")
        each = -(-rows // ranks)
        if sifting:
            planned = self._planned(step, each, self.batch, self.inner)
        else:
            planned = self._passed(each, self.batch, self.inner)
        return Epoch(planned.batches * ranks, planned.samples * ranks)

    def _passed(self, rows: int, batch: int, inner: int) -> Epoch:
        full, rest = divmod(rows, inner)
        handed = self.kept_of(rest) if self.split and rest else rest
        return Epoch(full + (rest > 0), full * batch + handed)

    def _planned(self, step: int, rows: int, batch: int, inner: int) -> Epoch:
        each = self._accumulation
        if not self.split:
            return self._schedule.scaled(each).epoch(step * each, rows, batch)
        full, rest = divmod(rows, inner)
        sifts = self._schedule.sifts(step + full // each)
        last = (batch if rest >= batch else 0) if sifts else rest and self.kept_of(rest)
        return Epoch(full + (last > 0), full * batch + last)

    @property
    def _share(self) -> float:
        assert not isinstance(self._schedule.keep, Mapping)  # refused for split pools
        return self._schedule.keep
