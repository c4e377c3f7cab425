"""Where the rows of a batch end, so that their padding is not computed.

    ends = ends_of(batch)                                           # [P] on the host; None where nothing tells
    batch, targets, ends, places = by_length(batch, targets, ends)  # the longest row first
    part, wanted = shortened(batch, targets, 128)                   # columns beyond 128 cut off

Letters: P samples, T positions, M positions with a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siftloader.batches import IGNORED, Batch, map_leaves, rows, select
from siftloader.targets import Targets, to_device


MASK = "attention_mask"
ROUND = 8  # columns: what matrix units like


def ends_of(batch: Batch) -> Tensor | None:
    """How many positions of each row are read, int64 [P]; None where no mask on the host tells.

    A mask [P, T] of ones, and zeros to the right of them: any other says more than where rows end.
    """
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.device.type != "cpu":
        return None
    read = mask != 0
    if bool((read[:, 1:] & ~read[:, :-1]).any()) or not bool((mask[read] == 1).all()):
        return None
    return read.sum(1)


def covering(ends: Tensor, labels: Tensor) -> Tensor:
    """The ends, moved behind the last label of each row of ``labels`` [P, T], on the host."""
    columns = torch.arange(1, labels.shape[1] + 1)
    return torch.maximum(ends, (columns * (labels != IGNORED)).amax(1))


def without_mask(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch of rows that are all read to their end, where a mask says nothing."""
    return {name: value for name, value in batch.items() if name != MASK}


def by_length(
    batch: Batch, targets: Targets, ends: Tensor
) -> tuple[Batch, Targets, Tensor, Tensor]:
    """Batch, targets and ends with the longest row first; and where the targets stood before, [M]."""
    order = torch.sort(ends, descending=True, stable=True).indices
    starts, length = np.asarray(targets.starts), targets.length
    counts = np.diff(starts)[order.numpy()]
    begins = np.concatenate([[0], counts.cumsum()])
    # Row after row: the run of indices that begins where the row's targets do.
    places = np.arange(begins[-1]) + np.repeat(starts[:-1][order.numpy()] - begins[:-1], counts)
    device = targets.positions.device
    here, row = to_device(torch.as_tensor(places), device), to_device(order, device)
    rank = torch.empty_like(row).index_copy_(0, row, torch.arange(len(row), device=device))
    positions = targets.positions.index_select(0, here)
    moved = Targets(
        rank.index_select(0, positions // length) * length + positions % length,
        targets.labels.index_select(0, here),
        begins.tolist(),
        length,
        targets.counts.index_select(0, row),
        None if targets.real is None else targets.real.index_select(0, here),
    )
    return select(batch, row), moved, ends[order], here


def shortened(batch: Batch, targets: Targets, length: int) -> tuple[Batch, Targets]:
    """The first ``length`` columns of all fields [P, T, ...], a multiple of 8, and the targets in them."""
    count, before = rows(batch), batch[MASK].shape[1]
    after = min(-(-max(length, 1) // ROUND) * ROUND, before)
    if after == before:
        return batch, targets

    def cut(leaf: Any) -> Any:
        fits = isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[:2] == (count, before)
        return leaf[:, :after] if fits else leaf

    if targets.length == before:  # else a sample has one prediction
        positions = targets.positions - targets.positions // before * (before - after)
        targets = replace(targets, positions=positions, length=after)
    return map_leaves(batch, cut), targets
