"""What was delivered, as one number: equal for equal samples, in whatever order and by whomever.

    sum((Coverage.of(ids) for ids in delivered), Coverage()) == shards.expected_coverage(epoch=0)

The digest is the sum of the scrambled ids, so parts of an epoch, read by other ranks or before a restart, add
up to the whole, and a sample that is lost, or comes twice, is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from siftloader.order import mix64


@dataclass(frozen=True)
class Coverage:
    """So many samples, and a 64-bit digest of which; two of them add up.

    print(Coverage.of(np.array([7, 8])))    # 2 samples, b765dfcd49f47c15
    """

    samples: int = 0
    digest: int = 0

    @classmethod
    def of(cls, ids: ArrayLike) -> Coverage:
        """The coverage of samples with these global ids, int64 [n]: an array, or a tensor on the host."""
        ids = np.asarray(ids, np.int64)
        # Scrambled twice with a constant between: the sum of small numbers must not show through.
        words = mix64(mix64(ids.astype(np.uint64) + np.uint64(1)) ^ np.uint64(0x9E3779B97F4A7C15))
        return cls(len(ids), int(words.sum(dtype=np.uint64)))

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(self.samples + other.samples, (self.digest + other.digest) % (1 << 64))

    def __str__(self) -> str:
        return f"{self.samples} samples, {self.digest:016x}"
