"""Shards opened: fetched if they are elsewhere, verified before and while they are used, mapped.

    opened = Opened(parts, verdicts=Verdicts(parts), limit=9)
    opened.announce([4, 5, 6])        # threads fetch and hash them while others are read
    content = opened.get(4)           # tokens [N, T], a view of the mapped file
    opened.close()

Shards are numbered over all parts. What was hashed once is not hashed again while the file is untouched.

Letters: N samples of a shard, T tokens of a sample, S shards of all parts.
"""

from __future__ import annotations

import errno
import os
import threading
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from queue import Empty, SimpleQueue
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from siftloader.errors import CorruptShard, FetchError, ShardError
from siftloader.manifest import Manifest, Shard
from siftloader.shards import Mapped, ShardSet
from siftloader.storage import LocalFolder


THREADS = 2  # that hash: one keeps up with any reader, two shorten the start
ATTEMPTS = 3  # to hash a file that somebody writes to
UNSEEN = 0  # the verdict on a shard that was never hashed


@dataclass(frozen=True)
class Budget:
    """Pass over up to ``samples`` damaged samples of a run, by each process, before raising.

    TokenShards("shards/books", on_error=Budget(100))

    In the place of a damaged sample comes the next sound one of its shard, in the place of a shard that is
    missing or cut short the same rows of the next one: batches keep their size and every position its place. It
    is warned of every shard, and ``TokenShards.passed_over`` counts.
    """

    samples: int

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(
                f"Budget needs a number of samples of at least 1, got {self.samples!r}"
            )


@dataclass(frozen=True)
class Part:
    """The shards of one data set that are read; ids and sources count on from those before."""

    files: ShardSet
    shards: Manifest
    first_id: int  # of the data set, in the mix
    first_source: int

    def first_ids(self) -> NDArray[np.int64]:
        """The global id of the first sample of each shard, int64 [S]."""
        counts = self.shards.counts
        before = np.cumsum(counts, dtype=np.int64) - counts
        return self.first_id + self.shards.first_id(0) + before


@dataclass(frozen=True)
class Content:
    """A mapped shard: tokens [N, T], sources and labels [N] where there are any, the id of row 0.

    ``rows``: where samples are damaged, the row to read for each.
    """

    tokens: NDArray[Any]
    sources: NDArray[np.uint8] | None
    pairs: NDArray[np.uint8] | None
    first_id: int
    first_source: int
    path: str
    stat: os.stat_result  # when it was mapped
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.tokens if self.rows is None else self.rows)

    def sound(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows to read for those asked for."""
        return row if self.rows is None else self.rows[row]


@dataclass(frozen=True)
class Damage:
    """What a budget passes over in a shard: so many samples of the file of that identity, None if it is gone.

    ``rows``: the row to read for each sample, None where the whole shard is lost.
    """

    samples: int
    identity: tuple[int, ...] | None
    rows: NDArray[np.int64] | None


@dataclass
class Verdicts:
    """Which files were hashed and found good, 8 bytes a shard, and what is passed over.

    One for all readers of a stream: what one of them hashed the others need not.
    """

    good: NDArray[np.int64]  # [S]: a hash of the identity of the file, or UNSEEN
    damaged: dict[int, Damage] = field(
        default_factory=dict
    )  # that a budget passes over, by number

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Verdicts:
        """No verdict on any shard yet."""
        return cls(np.zeros(sum(len(part.shards) for part in parts), np.int64))


@final
class Opened:
    """The shards that one reader has open, least recently used first out; not to be shared by threads."""

    def __init__(
        self,
        parts: Sequence[Part],
        verdicts: Verdicts,
        *,
        limit: int,
        verify: bool = True,
        sources: bool = False,
        budget: Budget | None = None,
    ) -> None:
        self._parts, self._verdicts = parts, verdicts
        self._limit, self._verify, self._sources = limit, verify, sources
        self._budget = budget
        self._dated = [part.files.files.dated for part in parts]
        self._bounds = list(accumulate((len(part.shards) for part in parts), initial=0))
        self._contents: OrderedDict[int, Content] = OrderedDict()
        self._coming: dict[int, Future[Mapped | None]] = {}
        self._crew: _Crew | None = None
        self._process = os.getpid()

    def get(self, number: int) -> Content:
        """The content of a shard, verified; ShardError where it cannot be had or is damaged."""
        if number in self._contents:
            self._contents.move_to_end(number)
            return self._contents[number]
        try:
            content = self._open(number)
        except ShardError as error:
            if len(self._parts) > 1:  # every set has such a shard
                error.args = (f"{self._place(number)[0].files.name}: {error}",)
            raise
        self._contents[number] = content
        if len(self._contents) > self._limit:
            self._contents.popitem(last=False)
        return content

    def announce(self, numbers: Iterable[int], past: Iterable[int] = ()) -> None:
        """Fetch and hash these soon, in this order, in threads: what they find ``get`` will tell.

        ``past``: announced before, and no longer wanted.
        """
        self._after_fork()
        for number in past:
            if (future := self._coming.pop(number, None)) is not None:
                future.cancel()
        new = []
        for number in numbers:
            here = isinstance(self._place(number)[0].files.files, LocalFolder)
            known = here and (not self._verify or self._verdicts.good[number] != UNSEEN)
            known |= number in self._verdicts.damaged
            if not (known or number in self._coming or number in self._contents):
                new.append(number)
        if not new:
            return
        if self._crew is None:
            self._crew = _Crew()
        self._coming |= {number: self._crew.begin(self._judge_ahead, number) for number in new}
        for which, part in enumerate(self._parts):
            first, end = self._bounds[which : which + 2]
            coming = [part.shards[n - first] for n in self._coming if first <= n < end]
            part.files.fetch_ahead(coming)

    def renew(self, numbers: Iterable[int]) -> bool:
        """Let go of those that were written to since they were verified; tells whether there were any.

        To be asked before rows are copied out of the mapped files, for one cut short must not be touched,
        and after: what was copied from one that changed counts for nothing.
        """
        if not self._verify:
            return False
        stale = []
        for number in numbers:
            content = self._contents.get(number)
            if content is not None and self._touched(number, content.path, content.stat):
                stale.append(number)
        for number in stale:
            del self._contents[number]
        return bool(stale)

    def close(self) -> None:
        """Let go of all files; threads end with what they are at."""
        self._contents.clear()
        self._coming.clear()
        if self._crew is not None:
            self._crew.dismiss()
            self._crew = None

    def _after_fork(self) -> None:
        # The threads stayed with the parent: whoever waits for one of them here waits for ever.
        if os.getpid() != self._process:
            self._process, self._crew = os.getpid(), None
            self._coming.clear()

    def _place(self, number: int) -> tuple[Part, int, Shard]:
        which = bisect_right(self._bounds, number) - 1
        part, own = self._parts[which], number - self._bounds[which]
        return part, own, part.shards[own]

    def _judge(self, number: int) -> Mapped:
        # Fetches and maps the shard, and hashes it unless it is known to be good.
        part, _, shard = self._place(number)
        for _ in range(ATTEMPTS):
            before = self._identity(part, shard)
            known = not self._verify or self._verdicts.good[number] == hash(before)
            mapped = part.files.open_shard(shard, verify=not known)
            found = _signs(mapped.stat, part.files.files.dated)
            if part.files.files.dated:
                whole = found == before == self._identity(part, shard)
            else:  # a copy, which may have been evicted since, and fetched anew before
                touched = self._touched(number, str(mapped.path), mapped.stat)
                whole = not touched and (not known or found == before)
            if whole:
                if self._verify:
                    self._verdicts.good[number] = hash(found)
                return mapped
        raise CorruptShard(
            f"{shard.shard}: written to again and again while it was read; let nobody write to the "
            f"shards of a run",
            shard=shard.shard,
        )

    def _judge_ahead(self, number: int) -> Mapped | None:
        mapped = self._judge(number)
        # A mapped shard keeps a file descriptor: not more of them than are to be open.
        return mapped if len(self._coming) <= self._limit else None

    def _identity(self, part: Part, shard: Shard) -> tuple[int, ...]:
        dated = part.files.files.dated
        for left in reversed(range(ATTEMPTS)):
            path = part.files.path(shard)
            try:
                return _signs(path.stat(), dated)
            except OSError as error:
                # A copy may be evicted between its being found and its being looked at.
                if not dated and left and isinstance(error, FileNotFoundError):
                    continue
                raise ShardError(
                    f"{shard.shard}: cannot be read ({error}); is {path} in place?",
                    shard=shard.shard,
                ) from error
        raise AssertionError  # the last of them raises

    def _touched(self, number: int, path: str, stat: os.stat_result) -> bool:
        # Replaced and removed count too: nobody knows what the mapped file went through before it went.
        dated = self._dated[bisect_right(self._bounds, number) - 1]
        try:
            now = os.stat(path)  # noqa: PTH116 - thousands a second
        except OSError:
            return dated  # a copy, though, may have been evicted
        return _signs(now, dated) != _signs(stat, dated)

    def _judged(self, number: int) -> Mapped:
        # As _judge, or as a thread did it in advance.
        self._after_fork()
        coming = self._coming.pop(number, None)
        mapped = None
        with suppress(FetchError):  # that was then: the network may be back
            mapped = None if coming is None else coming.result()
        if mapped is None or self._touched(number, str(mapped.path), mapped.stat):
            return self._judge(number)
        return mapped

    def _content(
        self, number: int, mapped: Mapped, rows: NDArray[np.int64] | None = None
    ) -> Content:
        part, own, shard = self._place(number)
        return Content(
            mapped.tokens,
            part.files.read_sources(shard) if self._sources else None,
            mapped.labels,
            part.first_id + part.shards.first_id(own),
            part.first_source,
            str(mapped.path),
            mapped.stat,
            rows,
        )

    def _open(self, number: int) -> Content:
        if (content := self._sound(number)) is not None:
            return content
        part, own, shard = self._place(number)
        after = [*range(own + 1, len(part.shards)), *range(own)]
        for other in after:
            if not part.shards.counts[other]:
                continue
            if (content := self._sound(number - own + other)) is not None:
                rows = np.arange(shard.num_sequences, dtype=np.int64)
                return replace(content, rows=content.sound(rows % len(content)))
        raise ShardError(
            f"{shard.shard}: lost, and so is every other shard of its set; is {part.files.name} in "
            f"place?",
            shard=shard.shard,
        )

    def _sound(self, number: int) -> Content | None:
        # What of a shard is sound; None where a budget passes over all of it.
        if self._budget is None:
            return self._content(number, self._judged(number))
        damage = self._known_damage(number)
        if damage is None:
            try:
                return self._content(number, self._judged(number))
            except ShardError as error:
                if _passes(error):
                    raise
                damage = self._pass_over(number, error)
                self._verdicts.damaged[number] = damage
        if damage.rows is None:
            return None
        # Damaged in rows that are known, so its hash says nothing.
        part, _, shard = self._place(number)
        return self._content(number, part.files.open_shard(shard, verify=False), damage.rows)

    def _known_damage(self, number: int) -> Damage | None:
        # Of this very file: a shard that was mended, or took more damage, is judged anew.
        damage = self._verdicts.damaged.get(number)
        if damage is not None and damage.identity != self._identity_or_none(number):
            self._verdicts.damaged.pop(number, None)  # or another reader did
            return None
        return damage

    def _identity_or_none(self, number: int) -> tuple[int, ...] | None:
        part, _, shard = self._place(number)
        try:
            return self._identity(part, shard)
        except FetchError:
            raise
        except ShardError:
            return None

    def _pass_over(self, number: int, error: ShardError) -> Damage:
        part, _, shard = self._place(number)
        assert self._budget is not None
        identity = self._identity_or_none(number)
        bad = part.files.damaged(shard)
        if not (count := int(bad.sum())):
            raise error  # not of the samples, so nothing that could be passed over
        spent = count + sum(each.samples for each in [*self._verdicts.damaged.values()])
        if spent > self._budget.samples:
            raise CorruptShard(
                f"{error} ({count} samples of {shard.shard} are damaged, {spent} of all shards opened: "
                f"more than Budget({self._budget.samples}) passes over)",
                shard=error.shard,
                sample=error.sample,
                byte=error.byte,
            ) from error
        warnings.warn(
            f"{error} -- {count} samples of {shard.shard} are passed over, {spent} of "
            f"{self._budget.samples} allowed so far",
            stacklevel=2,
        )
        if bad.all():
            return Damage(count, identity, None)
        sound = np.flatnonzero(~bad)
        at = np.searchsorted(sound, np.arange(len(bad))) % len(sound)
        return Damage(count, identity, sound[at].astype(np.int64))


class _Crew:
    """Threads that judge one shard after the other; they hold up neither a reader's end nor a process's."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[
            tuple[Future[Mapped | None], Callable[[int], Mapped | None], int] | None
        ] = SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(target=self._work, name="siftloader-verify", daemon=True).start()

    def begin(self, judge: Callable[[int], Mapped | None], number: int) -> Future[Mapped | None]:
        """Judge this shard when those before it are done."""
        future: Future[Mapped | None] = Future()
        self._tasks.put((future, judge, number))
        return future

    def dismiss(self) -> None:
        """End the threads once each has done what it is at; nobody waits for the rest."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        for _ in range(THREADS):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            _do(*task)
            del task  # while this waits for the next one it must keep no shard mapped


def _do(future: Future[Mapped | None], judge: Callable[[int], Mapped | None], number: int) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(judge(number))
    except BaseException as error:
        future.set_exception(error)


def _passes(error: ShardError) -> bool:
    # No damage: of the network, or of this process, which has too much open.
    cause = error.__cause__
    code = cause.errno if isinstance(cause, OSError) else None
    return isinstance(error, FetchError) or code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def _signs(stat: os.stat_result, dated: bool) -> tuple[int, ...]:
    # The time of modification can be set back, and is by cp -p; that of the last change cannot.
    found = stat.st_ino, stat.st_dev, stat.st_size, stat.st_mtime_ns
    return (*found, stat.st_ctime_ns) if dated else found
