"""``Pool``: the candidates of one step, and draws that repeat on resume.

Letters: P candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from torch import Tensor

from siftloader.batches import Batch, cut
from siftloader.errors import ScoringError


@final
@dataclass(frozen=True)
class Pool:
    """What criteria and selections may look at, beside predictions and scores.

    ``ends`` [P] is how many positions of each row are read, on the host, where that is known there. ``number`` counts the pools scored before this one on this ``rank``, one of ``ranks`` whose pools are selected
    from together (1: each selects from its own). ``fields`` [P] are known of the
    rows without being part of the batch: ``id`` and ``source`` where the candidates come from shards.
    """

    batch: Batch = None
    number: int = 0
    rank: int = 0
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    ranks: int = 1
    ends: Tensor | None = None

    def field(self, name: str) -> Tensor:
        """One value per candidate, [P]; ScoringError where neither the loader nor the batch has it."""
        found = self.fields.get(name)
        if found is None and isinstance(self.batch, Mapping):
            found = self.batch.get(name)
        if found is None:
            found = getattr(self.batch, name, None)
        if isinstance(found, Tensor) and found.ndim == 1:
            return found
        known = sorted({*self.fields, *(self.batch if isinstance(self.batch, Mapping) else ())})
        raise ScoringError(
            f'no field "{name}" with one value per candidate (there are {known}); let the data set '
            f'give it, as in {{"{name}": ..., "input_ids": ...}}'
        )

    def part(self, first: int, last: int) -> Pool:
        """The rows ``first`` to ``last`` alone."""
        fields = {name: values[first:last] for name, values in self.fields.items()}
        ends = None if self.ends is None else self.ends[first:last]
        return Pool(cut(self.batch, first, last), self.number, self.rank, fields, self.ranks, ends)

    def uniform(self, seed: int, samples: int) -> Tensor:
        """[P] float64 on the host, in (0, 1): a function of (seed, rank, number) alone.

        Where ranks select together: what one rank would draw for the candidates of all of them.
        """
        rank, first = (self.rank, 0) if self.ranks == 1 else (0, self.rank)
        keys = np.random.SeedSequence((seed, rank, self.number)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(keys[0] >> np.uint64(1)))
        drawn = torch.rand(samples * self.ranks, generator=generator, dtype=torch.float64)
        drawn = drawn[first :: self.ranks]
        return drawn.clamp_min(2.0**-53)  # a logarithm may follow
