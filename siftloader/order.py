"""The order of an epoch as a pure function: (fingerprint, seed, epoch, position) -> (shard, row).

Shards are permuted, taken ``window`` at a time, and the samples of a window are permuted by a
Feistel network. Nothing is buffered and nothing is drawn, so any position is found without those
before it:

    order = Order((4, 3, 5), fingerprint="ab12", seed=0, epoch=0)
    shard, row = order.locate(np.arange(12))    # every (shard, row) once, int64 [12] each

Letters: S shards, n positions asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


ROUNDS = 8  # a Feistel network needs four; more where the halves have few bits
MOST_LANES = 1 << 16
SORTED = 1024  # up to here a sort is cheaper, and a network of few bits reaches few permutations


@dataclass(frozen=True, eq=False)
class Order:
    """Where every position of one epoch lies; equal arguments give an equal order on any machine.

    Order(counts, fingerprint, seed=0, epoch=3).locate(positions)
    Order(counts, shuffle=False).locate(positions)    # the order of the manifest, for validation

    With ``lanes=n`` the permuted shards are dealt out as n stretches of equally many samples, each with windows
    of its own, and position ``p`` is the next one of stretch ``p % n``. So a reader of the positions that are
    equal modulo n opens the shards of one stretch alone, one n-th of all, and two that share a border.
    """

    counts: Sequence[int] | NDArray[Any]  # samples of each shard, in the order of the manifest
    fingerprint: str = ""
    seed: int = 0
    epoch: int = 0
    window: int = 8
    shuffle: bool = True
    lanes: int = 1

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts)
        if not counts.size or counts.min() < 0:
            raise ValueError(f"counts need one number >= 0 per shard, got {self.counts[:8]}")
        object.__setattr__(self, "counts", counts)
        if self.window < 1:
            raise ValueError(f"window must be at least 1 shard, got {self.window}")
        if not 1 <= self.lanes <= MOST_LANES:
            raise ValueError(f"lanes must be at least 1, at most {MOST_LANES}, got {self.lanes}")
        if self.epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {self.epoch}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard and the row in it for every position, int64 [n] each; any order, any repeats.

        Memory is O(n) plus two numbers per shard: no permutation of samples is ever written down.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(
                f"positions must lie in 0..{len(self) - 1}, got "
                f"{positions.min()}..{positions.max()}"
            )
        place = self._shuffled(self._on_line(positions)) if self.shuffle else positions
        slot = np.searchsorted(self._starts, place, side="right") - 1
        return self._shards[slot].astype(np.int64), place - self._starts[slot]

    def window_at(self, position: int) -> tuple[list[int], int | None]:
        """The shards that are read around a position, and where the next window of its lane begins.

        None instead of a position in the last window of the lane.
        """
        lane = position % self.lanes if self.shuffle else 0
        lanes = self.lanes if self.shuffle else 1
        begin, end = self._stretches[lane : lane + 2].tolist()
        place = begin + position // lanes
        number = int(np.searchsorted(self._bounds, place, side="right")) - 1
        first, last = self._bounds[number : number + 2].tolist()
        slots = slice(
            int(np.searchsorted(self._starts, first, side="right")) - 1,
            int(np.searchsorted(self._starts, last, side="left")),
        )
        shards = self._shards[slots].tolist()
        return shards, (last - begin) * lanes + lane if last < end else None

    def _on_line(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        # The line: the samples of the permuted shards one after the other.
        if self.lanes == 1:
            return positions
        turn, lane = np.divmod(positions, self.lanes)
        return self._stretches[lane] + turn

    def _shuffled(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        # A window occupies the same range of the line before and after its permutation.
        window = np.searchsorted(self._bounds, places, side="right") - 1
        shuffled = np.empty_like(places)
        for number in np.unique(window).tolist():
            at = np.flatnonzero(window == number)
            first, end = self._bounds[number : number + 2].tolist()
            shuffled[at] = first + permute(places[at] - first, end - first, self._key(number))
        return shuffled

    def _key(self, part: int | str) -> bytes:
        text = f"{self.fingerprint}/{self.seed}/{self.epoch}/{part}"
        return hashlib.blake2b(text.encode(), digest_size=4 * ROUNDS).digest()

    @cached_property
    def _shards(self) -> NDArray[np.int32]:
        # int32 [S]: the shards in the order they are read
        shards = np.arange(len(self.counts), dtype=np.int64)
        permuted = permute(shards, len(shards), self._key("shards")) if self.shuffle else shards
        return permuted.astype(np.int32)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        # int64 [S + 1]: the place of each shard's first sample once the shards are permuted
        starts = np.zeros(len(self.counts) + 1, np.int64)
        np.cumsum(np.asarray(self.counts)[self._shards], dtype=np.int64, out=starts[1:])
        return starts

    @cached_property
    def _stretches(self) -> NDArray[np.int64]:
        # int64 [lanes + 1]: where on the line each lane begins; the first ones have one sample more
        lanes = self.lanes if self.shuffle else 1
        sizes = -((np.arange(lanes) - len(self)) // lanes)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        # int64: where on the line each window begins, those of lane 0 first, and the end of the line
        found = []
        for begin, end in pairwise(self._stretches.tolist()):
            first = int(np.searchsorted(self._starts, begin))
            first -= self._starts[first] > begin  # a shard that the lane before it shares
            inner = self._starts[first : np.searchsorted(self._starts, end) : self.window][1:]
            found.append(np.array([begin]))
            found.append(inner)
        return np.concatenate([*found, self._starts[-1:]])


def permute(index: NDArray[np.int64], size: int, key: bytes) -> NDArray[np.int64]:
    """The place of every index in a permutation of ``range(size)`` that the key picks, int64 [n].

    A Feistel network permutes the next power of two; what leaves the range goes through again
    (cycle-walking) until it is back, which keeps the map one-to-one.
    """
    keys = np.frombuffer(key, "<u4").astype(np.uint32)
    if size <= SORTED:
        words = mix32(mix32(np.arange(size, dtype=np.uint32) ^ keys[0]) ^ keys[1])
        return np.argsort(words, kind="stable").astype(np.int64)[index]
    bits = (size - 1).bit_length()
    place = _feistel(index, bits, keys)
    outside = np.flatnonzero(place >= size)
    while outside.size:
        again = _feistel(place[outside], bits, keys)
        place[outside] = again
        outside = outside[again >= size]
    return place


def _feistel(index: NDArray[np.int64], bits: int, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
    low = bits // 2
    high = bits - low
    left = (index >> low).astype(np.uint32)
    right = (index & ((1 << low) - 1)).astype(np.uint32)
    for one, two in zip(keys[0::2], keys[1::2], strict=True):
        left ^= mix32(right ^ one) >> np.uint32(32 - high)
        right ^= mix32(left ^ two) >> np.uint32(32 - low)
    return (left.astype(np.int64) << low) | right.astype(np.int64)


def mix32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Scramble 32-bit words in place and return them: every input bit reaches every output bit.

    Multiply and xor-shift on fixed-width words, so it is the same on every platform.
    """
    shifted = x >> np.uint32(16)
    x ^= shifted
    x *= np.uint32(0x7FEB352D)
    np.right_shift(x, np.uint32(15), out=shifted)
    x ^= shifted
    x *= np.uint32(0x846CA68B)
    np.right_shift(x, np.uint32(16), out=shifted)
    x ^= shifted
    return x


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words: every input bit reaches every output bit, and no two words become one."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
