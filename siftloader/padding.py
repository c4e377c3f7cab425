"""Where the rows of a batch end, so that their padding is not computed.

    ends = ends_of(batch)                                           # [P] on the host; None where nothing tells
    batch, targets, ends, places = by_length(batch, targets, ends)  # the longest row first
    part, wanted = shortened(batch, targets, 128)                   # columns beyond 128 cut off

Letters: P samples, T positions, M positions with a prediction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siftloader.batches import IGNORED, Batch, leaves, map_leaves, rows, select
from siftloader.targets import Targets, to_device


MASK = "attention_mask"
POSITIONS = "position_ids"
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


def columns(batch: Batch) -> frozenset[str]:
    """The names of the fields [P, T, ...]; by chance also of one that is as wide as the rows are long."""
    shape = (rows(batch), batch[MASK].shape[1])
    return frozenset(
        name for name, value in batch.items() if any(_fits(leaf, shape) for leaf in leaves(value))
    )


def at_the_end(targets: Targets, length: int) -> Targets:
    """Those of one row, and the last places before it is cut to ``length``: they see best what is cut off."""
    if targets.length == 1:
        return targets
    after = min(_rounded(length), targets.length)
    last = torch.arange(max(0, after - 2 * ROUND), after, device=targets.positions.device)
    positions = torch.cat((targets.positions, last)).sort().values
    labels, starts = positions.new_zeros(len(positions)), [0, len(positions)]
    return Targets(positions, labels, starts, targets.length, targets.counts)


def shortened(
    batch: Batch, targets: Targets, length: int, fields: Collection[str] | None = None
) -> tuple[Batch, Targets]:
    """The first ``length`` columns, a multiple of 8, of the ``fields`` [P, T, ...] (all), and the targets in them."""
    before = batch[MASK].shape[1]
    shape, after = (rows(batch), before), min(_rounded(length), before)
    if after == before:
        return batch, targets

    if targets.length == before:  # else a sample has one prediction
        positions = targets.positions - targets.positions // before * (before - after)
        targets = replace(targets, positions=positions, length=after)
    fewer = map_leaves(batch, lambda leaf: leaf[:, :after] if _fits(leaf, shape) else leaf)
    for name in () if fields is None else batch.keys() - fields:
        fewer[name] = batch[name]
    return fewer, targets


def _rounded(length: int) -> int:
    return -(-max(length, 1) // ROUND) * ROUND


def _fits(leaf: Any, shape: tuple[int, int]) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[:2] == shape
