"""Where candidates come from: the batches of an inner loader, each with the place to resume from.

Two kinds. ``ShardCandidates`` reads whole batches of ``TokenShards`` in a thread and resumes by
arithmetic. ``LoaderCandidates`` takes any iterable of batches as it is, and resumes by what that iterable
offers: its own ``state_dict``, indices that need not be fetched, or a replay.
"""

from __future__ import annotations

import base64
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, TypeVar, final

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from siftloader.batches import Batch, clone, cut, pin, rows
from siftloader.errors import StateError
from siftloader.stream import TokenShards
from siftloader.world import World


Item = TypeVar("Item")
Cursor: TypeAlias = dict[str, Any]  # JSON-able; {} is the start of an epoch
PREFETCH = 4  # batches read ahead of the loop


@dataclass(frozen=True)
class Piece:
    """An inner batch, and where to go on once some of its rows were used."""

    batch: Batch
    rows: int
    after: Callable[[int], Cursor]  # rows used of this piece -> cursor


@final
class ShardCandidates:
    """Batches of ``TokenShards``, read ahead by one thread whatever ``num_workers`` says."""

    def __init__(
        self, shards: TokenShards, batch_size: int, drop_last: bool = False, pinned: bool = False
    ) -> None:
        self.shards, self.batch_size = shards, batch_size
        self._drop_last, self._pinned = drop_last, pinned

    def epoch_rows(self) -> int:
        """Rows this rank draws in a whole epoch."""
        total = self.shards.rows()
        return total - total % self.batch_size if self._drop_last else total

    def draw(self, epoch: int, cursor: Cursor) -> tuple[Cursor, Iterator[Piece]]:
        """The pieces of an epoch from the cursor on, and the cursor of where that is."""
        self.check(cursor)
        start = cursor.get("position", 0)
        return {**self._identity(), "position": start}, self._pieces(epoch, start)

    def check(self, cursor: Cursor) -> None:
        """Raise StateError unless the cursor belongs to these shards in this order."""
        for name, expected in self._identity().items() if cursor else ():
            if cursor.get(name) != expected:
                raise StateError(
                    f"the state was saved with {name} {cursor.get(name)!r}, these shards have "
                    f"{expected!r}; open the shards it was saved with, or start afresh without it"
                )

    def set_epoch(self, epoch: int) -> None:
        """Nothing to tell: the epoch is given to ``draw``."""

    def _identity(self) -> dict[str, Any]:
        state = self.shards.state_dict()
        return {k: v for k, v in state.items() if k not in ("version", "epoch", "position")}

    def _pieces(self, epoch: int, start: int) -> Iterator[Piece]:
        ranks = (self.shards.world or World.detect()).ranks
        total, left = self.shards.total, self.shards.rows(start)
        if self._drop_last:
            left -= left % self.batch_size
        identity, used = self._identity(), 0
        batches = self.shards.read_batches(self.batch_size, epoch, start)
        ahead = prefetched(map(pin, batches) if self._pinned else batches, PREFETCH)
        try:
            for batch in ahead:
                count = rows(batch)
                if used + count > left:
                    return
                position = start + used * ranks
                yield Piece(batch, count, _ShardPlace(identity, position, ranks, total))
                used += count
        finally:
            ahead.close()


@final
class LoaderCandidates:
    """The batches of any iterable, untouched: ``iter`` draws what it would draw without us."""

    def __init__(self, loader: Iterable[Batch], sharded: bool = False) -> None:
        self.loader, self._sharded = loader, sharded
        # A DataLoader's batches are its own; anything else may hand out one buffer again and again.
        self._fresh = isinstance(loader, DataLoader)

    @property
    def batch_size(self) -> int | None:
        """Rows of a batch, where the loader tells."""
        for holder in (self.loader, getattr(self.loader, "batch_sampler", None)):
            if isinstance(size := getattr(holder, "batch_size", None), int):
                return size
        return None

    def epoch_rows(self) -> int | None:
        """Rows of a whole epoch, None where nobody can tell."""
        if (size := self.batch_size) is None:
            return None
        try:
            return _epoch_rows(self.loader, size)
        except TypeError:  # something in there has no len()
            return None

    def draw(self, epoch: int, cursor: Cursor) -> tuple[Cursor, Iterator[Piece]]:
        """The pieces of an epoch from the cursor on, and the cursor of where that is.

        The inner ``iter`` is taken now, not at the first ``next``.
        """
        self._refuse_unsharded()
        holder = self._stateful()
        if not cursor:
            order = self._order()
            start = {"batches": 0, "offset": 0, **order} if holder is None else {}
            return start, self._pieces(iter(self.loader), 0, 0, order)
        number, offset = cursor["batches"], cursor["offset"]
        if holder is not None and (state := cursor.get("inner")) is not None:
            holder.load_state_dict(state)
            return cursor, self._pieces(iter(self.loader), number, offset, {})
        order = {name: cursor[name] for name in ("rng", "generator") if name in cursor}
        return cursor, self._pieces(self._skipping(number, order), number, offset, order)

    def check(self, cursor: Cursor) -> None:
        """Raise StateError where the order of the inner loader cannot be taken up again."""
        if not cursor:
            return
        if cursor.get("batches") is None:
            raise StateError(
                "the state was saved over TokenShards, this loader draws from "
                f"{type(self.loader).__name__}; build the loader it was saved with"
            )
        stateful = cursor.get("inner") is not None and self._stateful() is not None
        if not stateful and iter(self.loader) is self.loader:
            raise StateError(
                f"{type(self.loader).__name__} is an iterator without state_dict, its order cannot "
                f"be repeated; wrap something that begins anew at iter(), or that has state_dict"
            )

    def set_epoch(self, epoch: int) -> None:
        """Tell the inner loader and whatever it draws from, once."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        holders: tuple[Any, ...] = (
            self.loader,
            getattr(self.loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
            getattr(self.loader, "dataset", None),
        )
        for holder in holders:
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)

    def _pieces(
        self, source: Iterator[Batch], number: int, offset: int, order: Cursor
    ) -> Iterator[Piece]:
        before = self._snapshot()
        while (batch := next(source, _END)) is not _END:
            after = self._snapshot()
            batch = batch if self._fresh else clone(batch)
            count = rows(batch)
            if offset < count:
                place = _Place(number, offset, count, order, before, after)
                yield Piece(cut(batch, offset, count) if offset else batch, count - offset, place)
            number, offset, before = number + 1, 0, after

    def _stateful(self) -> Any:
        # The loader itself, or the iterable data set that it reads in this very process.
        dataset = getattr(self.loader, "dataset", None)
        near = isinstance(dataset, IterableDataset) and not getattr(self.loader, "num_workers", 0)
        for holder in (self.loader, dataset if near else None):
            if hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict"):
                return holder
        return None

    def _snapshot(self) -> Any:
        holder = self._stateful()
        return None if holder is None else holder.state_dict()

    def _order(self) -> Cursor:
        # What a sampler will draw its permutation from: enough to draw it again.
        loader = self.loader
        if not isinstance(loader, DataLoader) or _iterable(loader):
            return {}
        sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
        if isinstance(sampler, (SequentialSampler, DistributedSampler)):
            return {}
        own = loader.generator or getattr(sampler, "generator", None)
        if own is not None:
            return {"generator": _encoded(own.get_state())}
        return {"rng": _encoded(torch.get_rng_state())}

    def _skipping(self, batches: int, order: Cursor) -> Iterator[Batch]:
        loader = self.loader
        if isinstance(loader, DataLoader) and not _iterable(loader):
            yield from _in_order(lambda: iter(_without_first(loader, batches)), loader, order)
            return
        warnings.warn(
            f"resuming by drawing {batches} batches of {type(loader).__name__} again: exact only if "
            f"it repeats its order; give it state_dict/load_state_dict to resume at once",
            stacklevel=2,
        )
        source = iter(loader)
        for _ in range(batches):
            if next(source, _END) is _END:
                raise StateError(
                    f"the state is {batches} batches into an epoch, the inner loader has fewer; "
                    f"it is not the one the state was saved with"
                )
        yield from source

    def _refuse_unsharded(self) -> None:
        ranks = World.detect().ranks
        if ranks == 1 or self._sharded:
            return
        loader = self.loader
        batch_sampler = getattr(loader, "batch_sampler", None)
        samplers = (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
        if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
            return
        if isinstance(getattr(loader, "dataset", None), TokenShards):
            return
        if type(loader).__module__.partition(".")[0] == "accelerate":
            return
        raise ValueError(
            f"{ranks} ranks run, but nothing says that the inner {type(loader).__name__} gives each "
            f"its own share: every rank would train on the same samples; use a DistributedSampler, "
            f"or SiftingDataLoader.wrap(loader, sharded=True) if it is split already"
        )


@dataclass(frozen=True)
class _ShardPlace:
    identity: Cursor
    position: int
    ranks: int
    total: int

    def __call__(self, used: int) -> Cursor:
        return {**self.identity, "position": min(self.position + used * self.ranks, self.total)}


@dataclass(frozen=True)
class _Place:
    number: int
    offset: int  # rows of this batch that were used before the piece began
    rows: int
    order: Cursor
    before: Any  # state of the inner loader
    after: Any

    def __call__(self, used: int) -> Cursor:
        done = self.offset + used == self.rows
        state = self.after if done else self.before
        return {
            "batches": self.number + done,
            "offset": 0 if done else self.offset + used,
            **({} if state is None else {"inner": state}),
            **self.order,
        }


_END = object()


def _epoch_rows(loader: Any, size: int) -> int:
    if not isinstance(loader, DataLoader):
        return len(loader) * size
    if _iterable(loader):
        total = len(loader.dataset)  # type: ignore[arg-type]
        return total - total % size if loader.drop_last else total
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    drops = getattr(loader.batch_sampler, "drop_last", loader.drop_last)
    if drops or loader.batch_sampler is None:
        return len(loader) * size
    return len(sampler)  # type: ignore[arg-type]


def _iterable(loader: DataLoader[Any]) -> bool:
    return isinstance(loader.dataset, IterableDataset)


def _encoded(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


class _After:
    """A sampler without its first entries: indices are skipped, nothing is fetched for them."""

    def __init__(self, sampler: Iterable[Any], first: int) -> None:
        self._sampler, self._first = sampler, first

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._sampler), self._first, None)


def _without_first(loader: DataLoader[Any], batches: int) -> DataLoader[Any]:
    sampled: dict[str, Any] = (
        {"batch_size": None, "sampler": _After(loader.sampler, batches)}
        if loader.batch_sampler is None
        else {"batch_sampler": _After(loader.batch_sampler, batches)}
    )
    return DataLoader(
        loader.dataset,
        **sampled,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


def _in_order(
    begin: Callable[[], Iterator[Batch]], loader: DataLoader[Any], order: Cursor
) -> Iterator[Batch]:
    # The permutation is drawn at the first next(), from the generator as it was in the saved run; the
    # caller's global generator is left as it is.
    if "generator" in order:
        sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
        (loader.generator or sampler.generator).set_state(_decoded(order["generator"]))
    here = torch.get_rng_state()
    if "rng" in order:
        torch.set_rng_state(_decoded(order["rng"]))
    try:
        source = begin()
        first = next(source, _END)
    finally:
        torch.set_rng_state(here)
    if first is _END:
        return
    yield first
    yield from source


def prefetched(items: Iterator[Item], depth: int) -> Generator[Item, None, None]:
    """The same items, made by a thread that stays at most ``depth`` ahead.

    An exception of the maker is raised here, at its place in the order. Closing the generator ends the
    thread.
    """
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def give(item: Item | None, error: BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not give(item, None):
                    return
        except BaseException as error:
            give(None, error)
        else:
            give(None, StopIteration())

    thread = threading.Thread(target=make, name="siftloader-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        while not ready.empty():  # wakes a thread that waits for room
            ready.get_nowait()
        thread.join()
