"""Predictions of a pool from losses that are listened to: of the model itself, or of the loop.

Letters: P samples, L positions of a sample as the loss sees them, V vocabulary (or classes), M positions with
a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from siftloader.batches import IGNORED, Batch, rows
from siftloader.pool import Pool
from siftloader.predictions import Predictions, Value, value_of
from siftloader.taps import Reading, SampleTaps
from siftloader.targets import Positions, Targets


def hear(
    reading: Reading,
    call: Callable[[Batch], Any],
    pool: Pool,
    positions: Positions | None,
    values: tuple[Value, ...],
    learn: bool,
) -> tuple[Predictions, Tensor]:
    """The predictions of the pool, and which samples have a label, bool [P].

    The loss is run once, a few samples at a time, and ``values`` are found as it goes; a criterion that asks
    for others has it run again, unless all of the pool fitted at once.
    """
    samples = rows(pool.batch)
    found: dict[Value, list[Tensor]] = {value: [] for value in values}
    labels: list[Tensor] = []
    parts: list[SampleTaps] = []
    for part in reading.samples(call, pool.batch, samples):
        labels.append(part.labels)
        for value, dense in found.items():
            flat = part.labels.flatten(0, 1)
            each = value_of(value, part.logits.flatten(0, 1), flat, wrong_allowed=True)
            dense.append(each.view(part.logits.shape[:2]))
        # Kept where it is the only one: what does not fit at once must not pile up.
        parts = [part] if part.last - part.first == samples else []
    longest = max(each.shape[1] for each in labels)
    everything = torch.cat([_padded(each, longest, IGNORED) for each in labels])
    targets = Targets.of(everything, everything.device, False, positions, dense=True)
    known = {
        value: torch.cat([_padded(each, longest, 0) for each in dense])
        .reshape(-1)
        .index_select(0, targets.positions)
        for value, dense in found.items()
    }

    def run(batch: Batch, targets: Targets, first: int) -> Iterator[Tensor]:
        # Of a part of the pool, too: then of its rows alone.
        again = iter(parts) if parts and targets.samples == samples else None
        for part in again or reading.samples(call, batch, targets.samples):
            yield _at(part, targets)

    return Predictions(targets, run, pool, known=known, learn=learn), targets.labelled()


def _at(part: SampleTaps, targets: Targets) -> Tensor:
    # Logits at the targets of these samples; positions that do not count may lie past their end.
    begin, end = targets.starts[part.first], targets.starts[part.last]
    wanted = targets.positions[begin:end] - part.first * targets.length
    length, classes = part.logits.shape[1:]
    if not length:
        return part.logits.new_zeros(end - begin, classes)
    row, at = wanted // targets.length, (wanted % targets.length).clamp_max(length - 1)
    return part.logits.flatten(0, 1).index_select(0, row * length + at)


def _padded(values: Tensor, length: int, fill: float) -> Tensor:
    if values.shape[1] == length or values.ndim > 2:  # soft labels come in one length
        return values
    return torch.nn.functional.pad(values, (0, length - values.shape[1]), value=fill)
