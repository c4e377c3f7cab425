"""Several sets in one endless stream: turn of the stream -> (set, its own epoch, position in that epoch).

    mixture = Mixture(sizes=(1_000_000, 20_000), weights=(0.9, 0.1), length=1_020_000)
    which, repeat, position = mixture.locate(np.arange(32), epoch=0)    # int64 [32] each

Of 4,096 turns in a row each set has its share, in an order drawn anew for every 4,096. A set goes through
its own samples once before any of them comes again: that is its own epoch, here called a repeat, however
long an epoch of the stream is. One set alone and an epoch as long as the set is the plain order.

Letters: K sets, n positions asked for.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from siftloader.order import ROUNDS, permute


BLOCK = 4096  # turns among which the shares hold exactly: a share is a whole number of 4,096ths


@dataclass(frozen=True)
class Mixture:
    """Whose turn it is; equal arguments give an equal answer on any machine.

    ``sizes`` are samples of each set, ``weights`` in what proportion they are drawn, ``length`` how many
    samples the stream calls an epoch, ``lanes`` as for ``Order``: the turns of each are dealt by themselves, and
    turn ``t`` of a set in lane ``l`` is place ``t * lanes + l`` of that set's epochs one after the other.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)
    length: int | None = None  # the samples of all sets where None
    seed: int = 0
    lanes: int = 1

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.weights):
            raise ValueError(
                f"a mix needs one weight per set, got {len(self.weights)} for {len(self.sizes)} sets"
            )
        if not (min(self.weights) > 0 and math.isfinite(sum(self.weights))):
            raise ValueError(
                f"weights must be positive numbers with a finite sum, got {list(self.weights)}"
            )
        if min(self.sizes) < 1:
            raise ValueError(f"every set needs a sample, got {list(self.sizes)}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"an epoch needs at least 1 sample, got {self.length}")
        if min(self._quotas) == 0:
            raise ValueError(
                f"a weight of less than one in {BLOCK} of all is never drawn, got "
                f"{list(self.weights)}; leave that set out, or give it more"
            )

    def __len__(self) -> int:
        return sum(self.sizes) if self.length is None else self.length

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the stream that each set really has: its weight, as a number of 4,096ths."""
        return tuple(quota / BLOCK for quota in self._quotas)

    def locate(
        self, positions: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Set, repeat and position in that repeat, int64 [n] each, of positions of an epoch."""
        # Since the very beginning: were lanes dealt anew in every epoch, the first of them would come more often.
        turn, lane = np.divmod(epoch * len(self) + positions, self.lanes)
        which = np.zeros_like(turn)
        if len(self.sizes) > 1:
            which, turn = self._dealt(turn, lane)
        sizes = np.array(self.sizes, np.int64)
        repeat, place = np.divmod(turn * self.lanes + lane, sizes[which])
        return which, repeat, place

    def _dealt(
        self, turn: NDArray[np.int64], lane: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # The set of each turn, and how often that set had a turn in that lane before.
        block, place = np.divmod(turn, BLOCK)
        which, before = np.empty_like(turn), np.empty_like(turn)
        quotas = np.array(self._quotas)
        for key in np.unique(block * self.lanes + lane).tolist():
            number, own = divmod(key, self.lanes)
            at = np.flatnonzero((block == number) & (lane == own))
            sets, turns = self._pattern(number, own)
            which[at] = sets[place[at]]
            before[at] = number * quotas[which[at]] + turns[place[at]]
        return which, before

    def _pattern(self, block: int, lane: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # For each of 4,096 turns: whose it is, and the how-manieth of that set in the block.
        text = f"mix/{self.seed}/{lane}/{block}"
        key = hashlib.blake2b(text.encode(), digest_size=4 * ROUNDS).digest()
        quotas = np.array(self._quotas)
        sets = np.repeat(np.arange(len(quotas)), quotas)[permute(np.arange(BLOCK), BLOCK, key)]
        turns = np.empty(BLOCK, np.int64)
        starts = np.cumsum(quotas) - quotas
        turns[np.argsort(sets, kind="stable")] = np.arange(BLOCK) - np.repeat(starts, quotas)
        return sets, turns

    @cached_property
    def _quotas(self) -> tuple[int, ...]:
        # Whole numbers that add up to a block: what is left over goes to the largest remainders.
        exact = [weight / sum(self.weights) * BLOCK for weight in self.weights]
        quotas = [math.floor(each) for each in exact]
        largest = sorted(range(len(exact)), key=lambda k: quotas[k] - exact[k])
        for k in largest[: BLOCK - sum(quotas)]:
            quotas[k] += 1
        return tuple(quotas)
