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
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


ROUNDS = 8  # a Feistel network needs four; more where the halves have few bits
SORTED = 1024  # up to here a sort is cheaper, and a network of few bits reaches few permutations


@dataclass(frozen=True)
class Order:
    """Where every position of one epoch lies; equal arguments give an equal order on any machine.

    Order(counts, fingerprint, seed=0, epoch=3).locate(positions)
    Order(counts, shuffle=False).locate(positions)    # the order of the manifest, for validation
    """

    counts: tuple[int, ...]  # samples of each shard, in the order of the manifest
    fingerprint: str = ""
    seed: int = 0
    epoch: int = 0
    window: int = 8
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 0:
            raise ValueError(f"counts need one number >= 0 per shard, got {self.counts[:8]}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 shard, got {self.window}")
        if self.epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {self.epoch}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard and the row in it for every position, int64 [n] each; any order, any repeats.

        Memory is O(n) plus one number per shard: no permutation is ever written down.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(
                f"positions must lie in 0..{len(self) - 1}, got "
                f"{positions.min()}..{positions.max()}"
            )
        place = self._shuffled(positions) if self.shuffle else positions
        slot = np.searchsorted(self._starts, place, side="right") - 1
        return self._shards[slot], place - self._starts[slot]

    def _shuffled(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        # A window occupies the same range before and after its permutation, so the result is again
        # a place on the line of permuted shards.
        bounds = self._starts[np.r_[0 : len(self.counts) : self.window, len(self.counts)]]
        window = np.searchsorted(bounds, positions, side="right") - 1
        place = np.empty_like(positions)
        for number in np.unique(window).tolist():
            at = np.flatnonzero(window == number)
            first, end = bounds[number : number + 2].tolist()
            place[at] = first + permute(positions[at] - first, end - first, self._key(number))
        return place

    def _key(self, part: int | str) -> bytes:
        text = f"{self.fingerprint}/{self.seed}/{self.epoch}/{part}"
        return hashlib.blake2b(text.encode(), digest_size=4 * ROUNDS).digest()

    @cached_property
    def _shards(self) -> NDArray[np.int64]:
        # int64 [S]: the shards in the order they are read
        shards = np.arange(len(self.counts), dtype=np.int64)
        return permute(shards, len(shards), self._key("shards")) if self.shuffle else shards

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        # int64 [S + 1]: the place of each shard's first sample once the shards are permuted
        counts = np.asarray(self.counts, np.int64)[self._shards]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


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
