"""The pool that comes next, scored while the loop trains on the one before: for ``overlap=True``.

    prescored = Prescored(sifter)
    prescored.begin(take(copied(held), 64), pad_id)      # as a batch leaves: the next pool, with the weights of now
    prescored.take(taken)                                # its candidates and scores; None for any other rows

A cache, and no more: whatever was scored ahead and is not asked for in the end is dropped.

Letters: P rows of a pool.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from siftloader.batches import Batch, leaves
from siftloader.candidates import Piece
from siftloader.drawn import Drawn, Taken
from siftloader.overlap import HasRead, Overlap
from siftloader.padding import ends_of
from siftloader.scorer import Scores
from siftloader.sifter import Sifter


class Merged(NamedTuple):
    """One pool, put together: the batch on the device, labels where they lay, what else is known of the rows."""

    candidates: Batch
    labels: Tensor | None
    fields: Mapping[str, Tensor]
    ends: Tensor | None = None  # of the rows, on the host
    scores: Scores | None = None  # if they are known

    @classmethod
    def of(cls, taken: Taken, sifter: Sifter, pad_id: int) -> Merged:
        """Those of ``taken``, whose parts are let go of."""
        scorer = sifter.scorer
        candidates = taken.merged(pad_id, scorer.label_name, scorer.ignored)
        found = [ends_of(piece.batch) for piece, _, _ in taken.slices]
        known = [
            each[first:end]
            for each, (_, first, end) in zip(found, taken.slices, strict=True)
            if each is not None
        ]
        ends = torch.cat(known) if len(known) == len(found) else None
        return cls(candidates, taken.labels(scorer.labels_of), taken.fields(), ends)


@final
class Prescored:
    """Scores of one pool ahead; at most one pool's candidates are alive beyond those of the step."""

    def __init__(self, sifter: Sifter) -> None:
        self._sifter = sifter
        scorer = sifter.scorer
        on_host = scorer.scorer_device is not None and scorer.scorer_device.type == "cpu"
        self._overlap = Overlap(lambda: scorer.given_model, in_thread=on_host)
        self._slices: list[tuple[Piece, int, int]] | None = None  # of the pool under way
        self._merged: Merged | None = None
        self._found: Scores | None = None  # of it, where somebody has asked already
        self._restored: Scores | None = None  # of the first pool after a state was loaded
        self._told = False

    def begin(self, taken: Taken, pad_id: int) -> None:
        """Score the rows of ``taken``, which stay held, beside what the loop does next; at once if that cannot be."""
        self.drop()
        slices, merged = taken.slices, Merged.of(taken, self._sifter, pad_id)
        self._slices, self._merged = slices, merged
        sifter, scorer = self._sifter, self._sifter.scorer
        pool = sifter.pool(merged.candidates, merged.fields, merged.ends)
        counts = sifter.counts
        job = scorer.ahead(pool, merged.labels)
        if (
            job is None
        ):  # with the same weights all the same: a restart must not change what is kept
            with counts.scoring.timing(scorer.device):
                self._found = scorer.score(pool, merged.labels)
            return

        def timed(has_read: HasRead) -> Scores:
            with counts.scoring.timing(scorer.device):
                return job(has_read)

        tensors = [each for each in leaves(merged.candidates) if isinstance(each, Tensor)]
        self._overlap.start(timed, scorer.device, tensors)

    def take(self, taken: Taken) -> Merged | None:
        """The pool that was begun, if it is that of ``taken``, whose scores may be unknown; it is forgotten here."""
        if self._slices is None or not _same(self._slices, taken.slices):
            self._forget()
            return None
        merged, scores = self._merged, self._scores()
        assert merged is not None
        self._forget()
        return merged._replace(scores=scores)

    def restored(self, rows: int) -> Scores | None:
        """What a state knew of the first pool after it; given once, and only for as many rows."""
        found, self._restored = self._restored, None
        return found if found is not None and len(found.values) == rows else None

    def wait(self) -> None:
        """Until no job is under way; what it found is kept."""
        self._known()

    def drop(self) -> None:
        """Forget what is under way, and what a state knew."""
        self._forget()
        self._restored = None

    def close(self) -> None:
        """Forget all but the scores of the pool under way, and listen to no optimizer any more."""
        self._restored = self._known()
        self._forget()
        self._overlap.close()

    def state(self) -> dict[str, Any] | None:
        """The scores of the pool under way, JSON-able; waits for them. None where there is none."""
        if (found := self._known()) is None:
            return None
        values = [None if math.isinf(each) else each for each in found.values.tolist()]
        missing = [int(found.nonfinite), int(found.unlabelled), int(found.capped)]
        return {"scores": values, "missing": missing, "rank": self._sifter.scorer.data_rank}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take up what ``state`` returned, on the rank that it was saved on; others score anew."""
        self.drop()
        if state is None or state["rank"] != self._sifter.scorer.data_rank:
            return
        device = self._sifter.scorer.device
        values = [-math.inf if each is None else each for each in state["scores"]]
        missing = (torch.tensor(each, device=device) for each in state["missing"])
        scores = torch.tensor(values, dtype=torch.float32, device=device)
        self._restored = Scores(scores, *missing)

    def _known(self) -> Scores | None:
        # None, too, where scoring fails: that is for whoever wants that pool.
        try:
            return self._restored if self._slices is None else self._scores()
        except Exception:
            return None

    def _forget(self) -> None:
        self._overlap.drop()
        self._slices = self._merged = self._found = None

    def _scores(self) -> Scores | None:
        if self._found is None and self._overlap.runs:
            self._found = self._overlap.result()
            if self._found is None and not self._told:
                self._told = True
                warnings.warn(
                    "the model's weights were written while they were read for scoring, and not by an optimizer of "
                    "torch that waits (an update by hand, weights swapped for an evaluation, a compiled optimizer "
                    "step): such pools are scored anew with the weights of then, at the full cost; use "
                    "overlap=False if that is the rule",
                    stacklevel=6,
                )
        return self._found


def copied(held: deque[Drawn]) -> deque[Drawn]:
    """To take from without taking away."""
    return deque(copy.copy(one) for one in held)


def _same(some: list[tuple[Piece, int, int]], others: list[tuple[Piece, int, int]]) -> bool:
    return len(some) == len(others) and all(
        a[0] is b[0] and a[1:] == b[1:] for a, b in zip(some, others, strict=True)
    )
