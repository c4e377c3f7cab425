"""Rows on their way from the inner loader into a pool: carried over, put together, with their place.

    held = deque([Drawn(move(piece.batch, device), piece), ...])
    taken = take(held, 64)                     # the next 64 rows; what is left of a batch stays held
    taken.merged(pad_id, "labels"), taken.labels(of), taken.fields(), taken.cursor

Letters: P rows of a pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from siftloader.batches import IGNORED, Batch, cut, leaves, merge, merge_labels
from siftloader.candidates import Cursor, Piece
from siftloader.coverage import Coverage


@dataclass
class Drawn:
    """A piece of the inner loader, its batch on the device."""

    batch: Batch
    piece: Piece
    used: int = 0  # rows of the piece that are gone

    @property
    def rows(self) -> int:
        """Rows that are left."""
        return self.piece.rows - self.used


@dataclass
class Taken:
    """The rows of one pool, or of one batch that passes through."""

    parts: list[Batch] = field(default_factory=list)
    slices: list[tuple[Piece, int, int]] = field(default_factory=list)  # where they come from

    @property
    def rows(self) -> int:
        """How many they are."""
        return sum(end - first for _, first, end in self.slices)

    @property
    def last(self) -> Piece:
        """The piece the last of them come from."""
        return self.slices[-1][0]

    @property
    def cursor(self) -> Cursor:
        """Where to go on after them."""
        piece, _, used = self.slices[-1]
        return piece.after(used)

    @property
    def first(self) -> Taken:
        """Those of the first piece alone."""
        return Taken(self.parts[:1], self.slices[:1])

    @property
    def ragged(self) -> bool:
        """Whether there is something to pad when they are merged."""
        shapes = [
            [leaf.shape[1:] for leaf in leaves(part) if isinstance(leaf, Tensor)]
            for part in self.parts
        ]
        return any(each != shapes[0] for each in shapes)

    def merged(self, pad_id: int, label: str, ignored: int = IGNORED) -> Batch:
        """One batch of all of them, labels padded with ``ignored``; the parts are let go of."""
        parts, self.parts = self.parts, []
        return merge(parts, pad_id, label, ignored)

    def labels(self, of: Callable[[Batch], Tensor | None]) -> Tensor | None:
        """Their labels where the inner loader had them: on the host, they cost no synchronisation."""
        found = [(of(piece.batch), first, last) for piece, first, last in self.slices]
        return merge_labels([None if each is None else each[a:b] for each, a, b in found])

    def covered(self) -> Coverage:
        """Which samples of the shards they are; the pieces know their ids."""
        parts = (piece.fields["id"][first:end] for piece, first, end in self.slices)
        return sum(map(Coverage.of, parts), Coverage())

    def fields(self) -> dict[str, Tensor]:
        """What is known of all of them beside the batch, [P], on the host."""
        known = set.intersection(*(set(piece.fields) for piece, _, _ in self.slices))
        return {
            name: torch.cat([piece.fields[name][a:b] for piece, a, b in self.slices])
            for name in sorted(known)
        }


def take(held: deque[Drawn], count: int) -> Taken:
    """The first ``count`` of the held rows; batches that are used up are held no longer."""
    taken = Taken()
    while not taken.slices or count:
        one = held[0]
        first, one.used = one.used, one.used + min(count, one.rows)
        count -= one.used - first
        whole = one.used - first == one.piece.rows
        taken.parts.append(one.batch if whole else cut(one.batch, first, one.used))
        taken.slices.append((one.piece, first, one.used))
        if not one.rows:
            held.popleft()
    return taken
