"""Positions of a stream -> rows: where they are, which shards that takes, copied out of mapped files.

    places = Places(parts, mixture, seed=0, window=8, shuffle=True, lanes=1)
    where = places.locate(np.arange(2048), epoch=3)
    opened.announce(*Windows(places).upcoming(where))
    rows = copied(where, opened, layout)

Letters: m rows of a block, T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.mixture import Mixture
from siftloader.opened import Opened, Part
from siftloader.order import Order
from siftloader.shards import Layout


@dataclass(frozen=True)
class Where:
    """Where the samples of some positions are, int64 [m] each: set, its epoch, its position, shard, row."""

    which: NDArray[np.int64]
    repeat: NDArray[np.int64]
    place: NDArray[np.int64]
    number: NDArray[np.int64]  # of the shard, among those of all sets
    row: NDArray[np.int64]

    def part(self, first: int, end: int) -> Where:
        """Those of some of the positions."""
        cut = slice(first, end)
        columns = (self.which, self.repeat, self.place, self.number, self.row)
        return Where(*(column[cut] for column in columns))


@dataclass(frozen=True)
class Rows:
    """Rows as they lie on disk: tokens [m, T], ids and epochs [m], sources and labels of pairs [m] or None."""

    tokens: NDArray[Any]
    ids: NDArray[np.int64]
    repeat: NDArray[np.int64]
    sources: NDArray[np.int64] | None
    pairs: NDArray[np.int64] | None

    def part(self, first: int, end: int) -> Rows:
        """Some of the rows."""
        cut = slice(first, end)
        return Rows(
            self.tokens[cut],
            self.ids[cut],
            self.repeat[cut],
            None if self.sources is None else self.sources[cut],
            None if self.pairs is None else self.pairs[cut],
        )


class Places:
    """Where the positions of a stream lie; keeps the orders that one reader is in, of each set the latest two."""

    def __init__(
        self,
        parts: Sequence[Part],
        mixture: Mixture | None,
        *,
        seed: int,
        window: int,
        shuffle: bool,
        lanes: int,
    ) -> None:
        self.lanes = lanes if shuffle else 1
        # The number of the first shard of each set, among those of all.
        self.bases = list(accumulate((len(part.shards) for part in parts), initial=0))
        self._parts, self._mixture = parts, mixture
        self._seed, self._window, self._shuffle = seed, window, shuffle
        self._kept: dict[tuple[int, int], Order] = {}

    def order(self, which: int, epoch: int) -> Order:
        """The order of an epoch of a set."""
        if (which, epoch) not in self._kept:
            part = self._parts[which]
            for old in sorted(key for key in self._kept if key[0] == which)[:-1]:
                del self._kept[old]
            self._kept[which, epoch] = Order(
                part.shards.counts,
                fingerprint=part.files.fingerprint,
                seed=self._seed,
                epoch=epoch,
                window=self._window,
                shuffle=self._shuffle,
                lanes=self.lanes,
            )
        return self._kept[which, epoch]

    def locate(self, positions: NDArray[np.int64], epoch: int) -> Where:
        """Where these positions of an epoch of the stream are, int64 [m]."""
        if self._mixture is None:
            epoch = epoch if self._shuffle else 0
            number, row = self.order(0, epoch).locate(positions)
            return Where(
                np.zeros_like(number), np.full_like(number, epoch), positions, number, row
            )
        which, repeat, place = self._mixture.locate(positions, epoch)
        number, row = np.empty_like(place), np.empty_like(place)
        for key in np.unique(np.stack([which, repeat]), axis=1).T.tolist():
            at = np.flatnonzero((which == key[0]) & (repeat == key[1]))
            number[at], row[at] = self.order(*key).locate(place[at])
            number[at] += self.bases[key[0]]
        return Where(which, repeat, place, number, row)


class Windows:
    """Which shards come next: those of a window when it begins, and those of the one after it."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._until: dict[int, tuple[int, int]] = {}  # by set and lane: where the window ends
        self._told: dict[int, set[int]] = {}  # by set and lane: its shards, and those of the next

    def upcoming(self, where: Where) -> tuple[list[int], set[int]]:
        """The shards to get ready for a block, the most urgent first; those of windows that are past."""
        lanes, bases = self._places.lanes, self._places.bases
        keys = where.which * lanes + where.place % lanes
        found, last = np.unique(keys[::-1], return_index=True)
        soon, later, past = [], [], set[int]()
        for key, back in zip(found.tolist(), last.tolist(), strict=True):
            at = len(keys) - 1 - back
            repeat, place = int(where.repeat[at]), int(where.place[at])
            if (repeat, place) < self._until.get(key, (0, 0)):
                continue
            which = key // lanes
            order = self._places.order(which, repeat)
            shards, following = order.window_at(place)
            after = [] if following is None else order.window_at(following)[0]
            soon += [bases[which] + shard for shard in shards]
            later += [bases[which] + shard for shard in after]
            self._until[key] = (repeat + 1, 0) if following is None else (repeat, following)
            past |= self._told.get(key, set())
            self._told[key] = {bases[which] + shard for shard in (*shards, *after)}
        return [*soon, *later], past - {*soon, *later}


def copied(where: Where, opened: Opened, layout: Layout, sources: bool = False) -> Rows:
    """The rows, copied out of their shards; ShardError where one is damaged. ``sources``: these, too."""
    m = len(where.row)
    record = np.dtype(f"V{layout.payload}")  # a sample's ids as one item: copied as one
    tokens = np.empty(m, record)
    origins = np.empty(m, np.int64) if sources else None
    pairs = np.empty(m, np.int64) if layout.labels else None
    ids = np.empty(m, np.int64)
    by_shard = np.argsort(where.number, kind="stable")
    numbers, firsts = np.unique(where.number[by_shard], return_index=True)
    places = np.split(by_shard, firsts[1:])
    # In the order of first use: a block that crosses into a new window opens each shard once.
    ordered = sorted(zip(numbers.tolist(), places, strict=True), key=lambda pair: pair[1][0])
    while True:
        opened.renew(number for number, _ in ordered)
        for number, at in ordered:
            content = opened.get(number)
            row = content.sound(where.row[at])
            tokens[at] = content.tokens.view(record)[row, 0]
            ids[at] = content.first_id + row
            if origins is not None and content.sources is not None:
                origins[at] = content.first_source + content.sources[row].astype(np.int64)
            if pairs is not None and content.pairs is not None:
                pairs[at] = content.pairs[row]
        # Under our hands a file may have changed: then what was copied may be either.
        if not opened.renew(number for number, _ in ordered):
            whole = tokens.view(layout.dtype).reshape(m, layout.seq_len)
            return Rows(whole, ids, where.repeat, origins, pairs)
