"""What the ranks of a job must agree on at every step, asked of all at once: none goes on alone.

    agreement = Agreement()
    agreement.step(Doing.SIFTS, 12, 32)      # the same on every rank: go on; else RanksDisagree on every rank
    agreement.gathered(values)               # those of all ranks, in rank order

A rank that sifts while another passes batches through, or that ended its epoch while others did not, would
leave the others waiting in the next collective for as long as their process group allows. So they are asked
before, in one small reduction on the host: no GPU is waited for, and no collective of the loop is disturbed,
as the question has a process group of its own.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections import defaultdict
from datetime import timedelta
from enum import IntEnum
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from siftloader.errors import RanksDisagree


class Doing(IntEnum):
    """What a rank is about to do."""

    EVALUATES = 0
    PASSES = 1
    SIFTS = 2
    HANDS_OUT = 3
    ENDS = 4
    COMPARES = 5
    FAILED = 6


_NO_MEMBER = dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else None
PATIENCE = timedelta(seconds=60)  # of silence before a warning
LAST_WORD = timedelta(seconds=20)  # that a rank which failed waits for the others to hear of it
SAID = {
    Doing.EVALUATES: "passes a batch through to a model in eval mode",
    Doing.PASSES: "passes a batch through",
    Doing.SIFTS: "sifts",
    Doing.HANDS_OUT: "hands out what it sifted",
    Doing.ENDS: "has no more batches",
    Doing.COMPARES: "compares its candidates with those of others",
    Doing.FAILED: "failed (its own error says why)",
}


@final
class Agreement:
    """Of the ranks of ``process_group`` (all); where no process group runs, everything is agreed.

    The first question makes a group of their own, on the host (gloo), so all of them must come to it.
    """

    def __init__(self, process_group: Any = None) -> None:
        if process_group is not None and process_group == _NO_MEMBER:
            raise ValueError(
                "this rank is not one of process_group's, as dist.new_group() says of ranks that it was not given; "
                "give every rank the group that it steps with"
            )
        self.process_group = process_group
        self._own: Any = None
        self._home: Any = None  # the default group when that was made

    @property
    def ranks(self) -> int:
        """How many must agree."""
        running = dist.is_available() and dist.is_initialized()
        return dist.get_world_size(self.process_group) if running else 1

    @property
    def members(self) -> list[int]:
        """Their ranks among all."""
        if self.process_group is None:
            return list(range(self.ranks))
        return [*dist.get_process_group_ranks(self.process_group)]

    @property
    def rank(self) -> int:
        """This one among them."""
        return dist.get_rank(self.process_group) if self.ranks > 1 else 0

    def step(self, doing: Doing, step: int, settings: int, epoch: int = 0) -> bool:
        """Whether there is a batch at this step; RanksDisagree, on all ranks, where they do different things.

        Where some have no more batches, all end here. ``settings`` is a number that stands for how each of
        them sifts (``number_of``).
        """
        if self.ranks == 1:
            return doing is not Doing.ENDS
        words = torch.tensor([doing, epoch, step, settings])
        low, high = self._extremes(words)
        if torch.equal(low, high):
            return doing is not Doing.ENDS
        if high[0] == Doing.ENDS and torch.equal(low[1:], high[1:]):
            return False
        raise self._disagreement(words)

    def failed(self) -> None:
        """Tell the others, who wait for this rank, that it goes no further; its own error is on the way.

        To be called while that error is handled; nothing where they have heard of it.
        """
        error: Any = sys.exc_info()[1]
        if self.ranks == 1 or getattr(error, "_ranks_told", False):
            return
        words = torch.tensor([Doing.FAILED, -1, -1, -1])
        try:
            self._extremes(words, LAST_WORD)
            self._disagreement(words)
        except (RanksDisagree, RuntimeError):
            pass  # they are gone, or never come
        if error is not None:
            error._ranks_told = True

    def gathered(self, values: Tensor) -> list[Tensor]:
        """What each rank gives, [n, ...] of any n but one dtype, on the host, in rank order.

        RanksDisagree, on all ranks, where one of them does something else, or has failed.
        """
        values = values.cpu()
        if self.ranks == 1:
            return [values]
        # A question like that of a step, so that a rank which goes no further can answer it.
        kind = number_of(values.dtype, tuple(values.shape[1:]))
        words = torch.tensor([Doing.COMPARES, -1, len(values), kind])
        low, high = self._extremes(words)
        if low[0] != high[0] or low[3] != high[3]:
            raise self._disagreement(words)
        counts = [len(values)] * self.ranks
        if low[2] != high[2]:
            counts = [int(each[2]) for each in self._all(words)]
        longest = values.new_zeros(max(counts), *values.shape[1:])
        longest[: len(values)] = values
        return [each[:count] for each, count in zip(self._all(longest), counts, strict=True)]

    def _disagreement(self, words: Tensor) -> RanksDisagree:
        return RanksDisagree(_told(self._all(words)))

    def _all(self, values: Tensor) -> list[Tensor]:
        # As bytes: gloo does not know every dtype.
        own = values.view(torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(found, own, self._group())
        return [each.view(values.dtype) for each in found]

    def _extremes(self, words: Tensor, wait: timedelta | None = None) -> tuple[Tensor, Tensor]:
        # One reduction finds the lowest and the highest of each.
        both = torch.cat((words, -words))
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        if wait is not None:
            options.timeout = wait  # for good: no process exits while such a question is open
        work = self._group().allreduce([both], options)
        try:
            self._wait(work, wait)
        except RuntimeError as error:
            raise RanksDisagree(
                f"the ranks disagree: another one went away, or failed while this one was elsewhere (its own "
                f"error says why): {error}"
            ) from error
        return both[: len(words)], -both[len(words) :]

    def _wait(self, work: Any, wait: timedelta | None) -> None:
        if wait is not None:
            work.wait()
            return
        try:
            work.wait(PATIENCE)
        except RuntimeError:
            if not work.is_completed():
                warnings.warn(
                    f"the other ranks did not come to this step of their loaders for {PATIENCE.seconds} seconds; "
                    f"waiting on: is a model in eval mode there, or does one rank work alone?",
                    stacklevel=7,
                )
            work.wait()  # of what has failed raises again; the others may also have come just now

    def _group(self) -> Any:
        home = dist.group.WORLD
        if self._own is None or self._home is not home:
            ranks = (
                None
                if self.process_group is None
                else dist.get_process_group_ranks(self.process_group)
            )
            self._own = dist.new_group(
                ranks, backend="gloo", use_local_synchronization=ranks is not None
            )
            self._home = home
        return self._own


def number_of(*settings: Any) -> int:
    """A number that is equal where the settings are written alike."""
    digest = hashlib.sha256(repr(settings).encode()).digest()
    return int.from_bytes(digest[:7], "big")  # its negative fits into 64 bits, too


def _told(words: list[Tensor]) -> str:
    said: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, word in enumerate(words):
        doing, epoch, step, settings = word.tolist()
        said[doing, epoch, -1 if doing == Doing.COMPARES else step, settings].append(rank)
    doings, epochs, steps, _ = map(set, zip(*said, strict=True))
    parts = [
        f"{_ranks(ranks)} {SAID[Doing(doing)]}"
        + (f" at step {step}" if step >= 0 else "")
        + (f" of epoch {epoch}" if epoch >= 0 and len(epochs) > 1 else "")
        for (doing, epoch, step, _), ranks in said.items()
    ]
    apart = " and ".join(map(_ranks, said.values()))
    advice = (
        "every rank must take the same steps: build the loader alike and call model.train() on all"
    )
    if Doing.FAILED in doings:
        advice = "all stop, as no rank can go on without the others"
    elif doings == {Doing.COMPARES}:
        parts = [f"{apart} have candidates, or fields, of different shapes or dtypes"]
        advice = "draw the same kind of data on all ranks"
    elif len(doings) == len(steps) == len(epochs) == 1:
        parts = [f"{apart} sift with different options"]
        advice = "build the loader with the same options (keep, warmup_steps, exit_layer, ...) on all ranks"
    elif len(doings) == len(steps) == 1:
        advice = "begin and leave epochs on all ranks together"
    return f"the ranks disagree: {'; '.join(parts)}. {advice[0].upper()}{advice[1:]}"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
