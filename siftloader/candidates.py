"""Where candidates come from: the batches of an inner loader, each with the place to resume from.

Two kinds. ``ShardCandidates`` reads whole batches of ``TokenShards`` in a thread and resumes by
arithmetic. ``LoaderCandidates`` takes any iterable of batches as it is, and resumes by what that iterable
offers: its own ``state_dict``, indices that need not be fetched, or a replay.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    default_collate,
)

from siftloader.accelerated import Prepared, is_prepared, prepared
from siftloader.ahead import prefetched
from siftloader.batches import Batch, clone, cut, pin, rows
from siftloader.coverage import Coverage
from siftloader.errors import BatchError, StateError
from siftloader.indices import (
    check_recorded,
    decoded,
    encoded,
    is_indexed,
    recorded_order,
    too_short,
    unknown_samplers,
    without_first,
)
from siftloader.stream import STATE_VERSION as VERSION, TokenShards
from siftloader.tars import TarStream
from siftloader.watched import Watched
from siftloader.world import World


Cursor: TypeAlias = dict[str, Any]  # JSON-able; {} is the start of an epoch
PREFETCH = 4  # batches read ahead of the loop
WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


@dataclass(frozen=True)
class Piece:
    """An inner batch, and where to go on once some of its rows were used."""

    batch: Batch
    rows: int
    after: Callable[[int], Cursor]  # rows used of this piece -> cursor
    fields: Mapping[str, Tensor] = field(default_factory=dict)  # [rows], on the host: who they are


@dataclass(frozen=True)
class Existing:
    """A loader to be taken as it is; ``sharded`` if it gives each rank its own share already."""

    loader: Iterable[Batch]
    sharded: bool


@final
class ShardCandidates:
    """Batches of ``TokenShards``, read ahead by one thread whatever ``num_workers`` says.

    ``loader`` is the DataLoader that would collate them sample by sample; its options count.
    """

    def __init__(self, shards: TokenShards, loader: DataLoader[Any]) -> None:
        assert loader.batch_size is not None
        self.shards, self.batch_size = shards, loader.batch_size
        self._drop_last, self._generator = loader.drop_last, loader.generator
        self._timeout = loader.timeout
        self._pinned = loader.pin_memory and torch.cuda.is_available()
        # Ids and sources are known of every candidate, whether or not the batch is to have them.
        self._informed = copy.copy(shards)
        self._informed.with_ids = self._informed.with_source = True
        self._hidden = {"id"} if not shards.with_ids else set()
        self._hidden |= {"source"} if not shards.with_source else set()

    @property
    def ids(self) -> str:
        """What the ids of the pieces count: the samples of these shards."""
        return self.shards.fingerprint

    def epoch_rows(self, size: int) -> int:
        """Rows this rank draws in a whole epoch."""
        total = self.shards.rows()
        return total - total % size if self._drop_last else total

    def first(self) -> tuple[int, Cursor]:
        """The epoch to begin with, and where in it: the shards may have been told, or restored."""
        epoch, position = self.shards.upcoming()
        return epoch, self._at(position) if position else {}

    def next_start(self) -> Cursor:
        """Where the next epoch begins, for a state taken between epochs."""
        return self._at(0)

    def draw(self, epoch: int, cursor: Cursor) -> tuple[Cursor, Iterator[Piece]]:
        """The pieces of an epoch from the cursor on, and the cursor of where that is."""
        position = cursor.get("position", 0)
        self.shards.check_ranks(epoch, position)
        if not position:
            # What iter(DataLoader) draws: keep=1.0 must leave the global stream where it leaves it.
            torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        return self._at(position), self._pieces(epoch, position)

    def checked(self, cursor: Cursor, override: Collection[str] = ()) -> Cursor:
        """The cursor, as of today and of here; StateError unless it belongs to these shards in this order."""
        if not cursor:
            return {}
        version = VERSION if "lanes" in cursor else 1
        state = {"version": version, "epoch": 0, **cursor}
        return self._at(self.shards.checked_state(state, override)["position"])

    def covered(self, epoch: int, cursor: Cursor) -> Coverage:
        """Which samples this rank is given of an epoch before the cursor."""
        return self.shards.covered(epoch, cursor.get("position", 0))

    def set_epoch(self, epoch: int) -> None:
        """Nothing to tell: the epoch is given to ``draw``."""

    @property
    def ended(self) -> bool | None:
        """Whether the last batch was drawn: not known before another one is asked for."""
        return None

    def prepare(self, accelerator: Any) -> None:
        """Nothing to prepare: the shards give each rank its own share."""

    @property
    def undivided(self) -> int:
        """Among how many ranks the rows of an epoch are yet to be divided: they are."""
        return 1

    def _at(self, position: int) -> Cursor:
        return {**self._identity(), "position": position}

    def _identity(self) -> dict[str, Any]:
        return self.shards.identity()

    def _pieces(self, epoch: int, start: int) -> Iterator[Piece]:
        # Pieces begin where they would in an unbroken epoch: a restart inside one reads it from its
        # beginning and cuts off what was used.
        size, ranks = self.batch_size, (self.shards.world or World.detect()).ranks
        used = start // ranks
        offset = used % size
        first, drawn, limit = start - offset * ranks, used - offset, self.epoch_rows(size)
        batches = self._informed.read_batches(size, epoch, first)
        batches = map(pin, batches) if self._pinned else batches
        ahead = prefetched(batches, PREFETCH, timeout=self._timeout)
        identity, total = self._identity(), self.shards.total
        try:
            for batch in ahead:
                count = rows(batch)
                if self._drop_last and drawn + count > limit:
                    return
                place = _ShardPlace(identity, first + offset * ranks, ranks, total)
                if offset < count:
                    part = cut(batch, offset, count) if offset else batch
                    fields = {name: part[name] for name in ("id", "source") if name in part}
                    part = {k: v for k, v in part.items() if k not in self._hidden}
                    yield Piece(part, count - offset, place, fields)
                first, drawn, offset = first + count * ranks, drawn + count, 0
        finally:
            ahead.close()


@final
class LoaderCandidates:
    """The batches of any iterable, untouched: ``iter`` draws what it would draw without us."""

    def __init__(self, loader: Iterable[Batch], sharded: bool = False) -> None:
        self.loader, self._sharded = _taken(loader), sharded
        self._told: int | None = None  # the last epoch that was announced
        # Batches that torch collates are new ones; anything else may hand out one buffer again and again.
        self._fresh = isinstance(loader, DataLoader) and (
            loader.num_workers > 0 or loader.collate_fn is default_collate
        )

    @property
    def ended(self) -> bool | None:
        """Whether the last batch was drawn, None where that is not known before another one is asked for."""
        return self.loader.ended if isinstance(self.loader, Prepared) else None

    def prepare(self, accelerator: Any) -> None:
        """Have the Accelerator shard the inner loader, unless something gives each rank its share already."""
        if isinstance(self.loader, DataLoader) and not (self._sharded or _shares(self.loader)):
            self.loader = Prepared(prepared(accelerator, self.loader))

    @property
    def undivided(self) -> int:
        """Among how many ranks the rows of an epoch are yet to be divided; 1 where that is done."""
        return 1 if self._sharded or _shares(self.loader) else World.detect().ranks

    @property
    def batch_size(self) -> int | None:
        """Rows of a batch, where the loader tells."""
        for holder in (self.loader, getattr(self.loader, "batch_sampler", None)):
            if isinstance(size := getattr(holder, "batch_size", None), int):
                return size
        return None

    @property
    def ids(self) -> str:
        """What the ids of the pieces count: whatever a field of the batch counts."""
        return "batch"

    def epoch_rows(self, size: int) -> int | None:
        """Rows of a whole epoch in batches of ``size``, None where nobody can tell."""
        try:
            return _epoch_rows(self.loader, size)
        except TypeError:  # something in there has no len()
            return None

    def first(self) -> tuple[int, Cursor]:
        """The epoch to begin with, and where in it."""
        return 0, {}

    def next_start(self) -> Cursor:
        """Where the next epoch begins, for a state taken between epochs: what it draws from is as now."""
        return {
            "batches": 0,
            "offset": 0,
            **self._snapshot(),
            **self._order(),
            **self._own_epoch(),
            **self._identity(),
        }

    def draw(self, epoch: int, cursor: Cursor) -> tuple[Cursor, Iterator[Piece]]:
        """The pieces of an epoch from the cursor on, and the cursor of where that is.

        The inner ``iter`` is taken now, not at the first ``next``.
        """
        self._refuse_unsharded()
        fixed = {**self._order(), **self._own_epoch(), **self._identity()}
        if not cursor:
            source = self._begun()
            start = {"batches": 0, "offset": 0, **self._snapshot(), **fixed}
            return start, self._pieces(source, 0, 0, fixed)
        number, offset = cursor["batches"], cursor["offset"]
        holder = self._stateful()
        if holder is not None and (state := cursor.get("inner")) is not None:
            holder.load_state_dict(decoded(state))
            here = torch.get_rng_state()
            source = self._begun()
            if number or offset:
                torch.set_rng_state(here)  # the unbroken run drew its share when the epoch began
            return cursor, self._pieces(source, number, offset, fixed)
        own = cursor.get("own_epoch")
        if own is not None and "own_epoch" in fixed and cursor.get("told_epoch") == self._told:
            dataset: Any = getattr(self.loader, "dataset", None)
            dataset.set_epoch(own)
        fixed = {name: cursor[name] for name in fixed if name in cursor} | self._own_epoch()
        return cursor, self._pieces(self._skipping(number, fixed), number, offset, fixed)

    def checked(self, cursor: Cursor, override: Collection[str] = ()) -> Cursor:
        """The cursor; StateError where the order of the inner loader cannot be taken up again."""
        if override:
            raise ValueError(
                "only a state over TokenShards can be overridden; start afresh without it"
            )
        if not cursor:
            return {}
        if cursor.get("batches") is None:
            raise StateError(
                "the state was saved over TokenShards, this loader draws from "
                f"{type(self.loader).__name__}; build the loader it was saved with"
            )
        for name in ("batches", "offset", *({"own_epoch"} & cursor.keys())):
            value = cursor.get(name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
                raise StateError(
                    f"the state is damaged: cursor.{name} {value!r} found, a whole number expected"
                )
        stateful = cursor.get("inner") is not None and self._stateful() is not None
        if not stateful and isinstance(self.loader, Iterator) and cursor["batches"]:
            raise StateError(
                f"{type(self.loader).__name__} is an iterator without state_dict, its order cannot "
                f"be repeated; wrap something that begins anew at iter(), or that has state_dict"
            )
        for name, expected in self._identity().items():
            if (found := cursor.get(name)) != expected:
                raise StateError(
                    f"the state was saved over data with {name} {found!r}, this loader's has "
                    f"{expected!r}; build the loader it was saved with, or start afresh without it"
                )
        if isinstance(self.loader, DataLoader) and is_indexed(self.loader):
            check_recorded(self.loader, cursor)
        return cursor

    def set_epoch(self, epoch: int) -> None:
        """Tell the inner loader and whatever it draws from, each once."""
        self._told = epoch
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        holders: tuple[Any, ...] = (
            self.loader,
            getattr(self.loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
            getattr(self.loader, "dataset", None),
        )
        for holder in {id(holder): holder for holder in holders}.values():
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)

    def _pieces(
        self, source: Watched[Batch], number: int, offset: int, fixed: Cursor
    ) -> Iterator[Piece]:
        look: Callable[[], Cursor] = dict if self._stateful() is None else self._snapshot
        try:
            before = look()
            while (batch := next(source, _END)) is not _END:
                after = look()
                batch = batch if self._fresh else clone(batch)
                count = _rows_or_none(batch)
                if offset < count or not count:
                    place = _Place(number, offset, count, fixed, before, after)
                    part = cut(batch, offset, count) if offset else batch
                    yield Piece(part, count - offset, place, _own_fields(part, count - offset))
                number, offset, before = number + 1, 0, after
        finally:
            source.close()

    def _begun(self) -> Watched[Batch]:
        return Watched(self.loader, lambda: iter(self.loader))

    def _stateful(self) -> Any:
        # The loader itself, or the iterable data set that it reads in this very process.
        dataset = getattr(self.loader, "dataset", None)
        near = isinstance(dataset, IterableDataset) and not getattr(self.loader, "num_workers", 0)
        for holder in (self.loader, dataset if near else None):
            if hasattr(holder, "load_state_dict") and _gives_state(holder):
                return holder
        return None

    def _snapshot(self) -> Cursor:
        # A copy, of now: what a holder gives out may be what it goes on to change.
        holder = self._stateful()
        return {} if holder is None else {"inner": encoded(holder.state_dict())}

    def _identity(self) -> Cursor:
        # What can be told of the data and its order without reading it.
        if isinstance(self.loader, Prepared):
            return self.loader.identity()
        if not is_indexed(self.loader):
            return {}
        loader: Any = self.loader
        sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler or loader.sampler)
        return {"samples": _length(loader.dataset), "sampler": type(sampler).__name__}

    def _order(self) -> Cursor:
        loader = self.loader
        return (
            recorded_order(loader) if isinstance(loader, DataLoader) and is_indexed(loader) else {}
        )

    def _own_epoch(self) -> Cursor:
        # Of a data set that counts its epochs by itself, which one comes: a new process would begin at 0.
        # Who announces another one after a restart is believed instead.
        dataset: Any = getattr(self.loader, "dataset", None)
        if not isinstance(dataset, IterableDataset) or not hasattr(dataset, "set_epoch"):
            return {}
        epoch = getattr(dataset, "epoch", None)
        if not isinstance(epoch, int) or self._stateful() is not None:
            return {}
        return {"own_epoch": epoch, "told_epoch": self._told}

    def _skipping(self, batches: int, order: Cursor) -> Watched[Batch]:
        loader = self.loader
        if isinstance(loader, DataLoader) and is_indexed(loader):
            if batches and (unknown := unknown_samplers(loader)):
                warnings.warn(
                    f"resuming {batches} batches into the order of {', '.join(unknown)}: exact only "
                    f"if it draws from torch's generators and nothing else",
                    stacklevel=2,
                )
            return Watched(loader, lambda: without_first(loader, batches, order))
        if batches:
            warnings.warn(
                f"resuming by drawing {batches} batches of {type(loader).__name__} again: exact "
                f"only if it repeats its order; give it state_dict/load_state_dict to resume at once",
                stacklevel=2,
            )
        source = self._begun()
        for drawn in range(batches):
            if next(source, _END) is _END:
                raise too_short(drawn, batches)
        return source

    def _refuse_unsharded(self) -> None:
        ranks = self.undivided
        if ranks == 1:
            return
        raise ValueError(
            f"{ranks} ranks run, but nothing says that the inner {type(self.loader).__name__} gives each "
            f"its own share: every rank would train on the same samples; use a DistributedSampler, "
            f"accelerator.prepare(loader), or SiftingDataLoader.wrap(loader, sharded=True) if it is split "
            f"already"
        )


def _taken(loader: Iterable[Batch]) -> Iterable[Batch]:
    # As it is, but for one that accelerate prepared: that is taken with a state to go on from.
    if not hasattr(loader, "base_dataloader") or not is_prepared(loader):
        return loader
    dataset: Any = loader.base_dataloader.dataset
    own = getattr(dataset, "dataset", dataset)
    if isinstance(own, (TokenShards, TarStream)) and World.detect().ranks > 1:
        raise ValueError(
            f"accelerate prepared a loader over {type(own).__name__}, which gives each rank its own share by "
            f"itself: it would be divided twice; prepare the SiftingDataLoader over it, and nothing inside"
        )
    return Prepared(loader)


def _shares(loader: Any) -> bool:
    # Whether each rank is known to get a share of its own.
    if is_prepared(loader) or isinstance(loader, Prepared):
        return True
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        return True
    return isinstance(getattr(loader, "dataset", None), (TokenShards, TarStream))


def candidates_of(
    dataset: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> ShardCandidates | LoaderCandidates:
    """The candidates of a data set and DataLoader arguments, or of a loader that exists."""
    if isinstance(dataset, Existing):
        loader = dataset.loader
        if isinstance(loader, Dataset):
            raise TypeError(
                f"wrap takes a loader of batches, {type(loader).__name__} is a data set of samples; "
                f"use SiftingDataLoader(dataset, batch_size=..., model=...)"
            )
        if isinstance(loader, (Mapping, Tensor, str)) or not hasattr(loader, "__iter__"):
            raise TypeError(
                f"wrap takes an iterable of batches, got {type(loader).__name__}; call a generator "
                f"function, give sift_calls() one that draws a batch, put a single batch into a list, use "
                f"Sifter for one pool at a time"
            )
        if args or options:
            raise TypeError(
                f"wrap takes a loader as it is; it does not take {sorted(options) or args}"
            )
        return LoaderCandidates(loader, dataset.sharded)
    if isinstance(dataset, (str, os.PathLike)):
        raise TypeError(
            f"the data set is the path {str(dataset)!r}; give TokenShards({str(dataset)!r})"
        )
    inner: DataLoader[Any] = DataLoader(
        dataset, *args, **options
    )  # torch's errors for its arguments
    if isinstance(dataset, TokenShards) and options.get("collate_fn") is None:
        if inner.batch_size is None:
            raise ValueError(
                "TokenShards gives samples, so batch_size must be a number; for batches of its own "
                "use SiftingDataLoader.wrap(shards.batches(n), model=...)"
            )
        return ShardCandidates(dataset, inner)
    return LoaderCandidates(inner)


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
    fixed: Cursor
    before: Cursor  # state of the inner loader
    after: Cursor

    def __call__(self, used: int) -> Cursor:
        done = self.offset + used == self.rows
        return {
            "batches": self.number + done,
            "offset": 0 if done else self.offset + used,
            **(self.after if done else self.before),
            **self.fixed,
        }


_END = object()


def _gives_state(holder: Any) -> bool:
    # Some data sets (litdata's, MosaicML's) must be told by their own loader how far it is, which we cannot.
    if not hasattr(holder, "state_dict"):
        return False
    try:
        inspect.signature(holder.state_dict).bind()
    except TypeError:
        return False
    except ValueError:
        return True  # written in C: nothing is known of its arguments
    return True


def _own_fields(batch: Batch, count: int) -> dict[str, Tensor]:
    # What a data set says of its samples, kept where it lies: a look at it costs no synchronisation.
    # Anything but whole numbers under these names is something else, and the user's own.
    found = {name: batch.get(name) for name in ("id", "source") if isinstance(batch, Mapping)}
    return {
        name: each
        for name, each in found.items()
        if isinstance(each, Tensor) and each.shape == (count,) and each.dtype in WHOLE
    }


def _rows_or_none(batch: Batch) -> int:
    # 0 for a batch of a kind unknown to us, which may pass through, but cannot be sifted.
    try:
        return rows(batch)
    except BatchError:
        return 0


def _epoch_rows(loader: Any, size: int) -> int:
    if isinstance(loader, Prepared):
        return loader.rows(size)
    if not isinstance(loader, DataLoader):
        return len(loader) * size
    if isinstance(loader.dataset, IterableDataset):
        total = _length(loader.dataset)
        if total is None:
            raise TypeError("an iterable data set without a length")
        return total - total % size if loader.drop_last else total
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if sampler is None or getattr(loader.batch_sampler, "drop_last", loader.drop_last):
        return len(loader) * size
    return len(sampler)


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except TypeError:
        return None
