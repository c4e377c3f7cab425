"""Which candidates win, given their scores.

A selection is a callable of scores [P] (finite, or -inf for rows that must not win) and the number to
keep; it returns the winners' indices [b] in candidate order, without asking the device for a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor


class Selection(Protocol):
    """From scores [P] to the indices [b] of the kept, rising."""

    def __call__(self, scores: Tensor, keep: int) -> Tensor:
        """Return exactly ``keep`` distinct indices in rising order, int64 on the scores' device."""
        ...


@final
@dataclass(frozen=True)
class TopK:
    """The highest scores win, the lower position wins a tie: the paper's rule (section 7)."""

    def __call__(self, scores: Tensor, keep: int) -> Tensor:
        """[b]; depends on the scores alone, so any order of the rows gives the same winners."""
        # topk breaks ties as it likes, a stable sort by position.
        ranked = torch.sort(scores, descending=True, stable=True).indices
        return ranked[:keep].sort().values
