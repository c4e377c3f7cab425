"""Hugging Face accelerate: what it makes of a loader, and what it wants to know of one.

    loader = accelerator.prepare(SiftingDataLoader(dataset, 32, model=model))

Accelerate asks a loader one attribute, ``_is_accelerate_prepared``, and rebuilds whoever says no; it learns
from the loader under way which batch is an epoch's last; and it saves one state for all ranks, or none. Each
part below answers one of these. Tested with accelerate 1.6 and 1.15.
"""

from __future__ import annotations

import json
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, final

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from siftloader.batches import Batch
from siftloader.errors import StateError
from siftloader.indices import (
    decoded,
    encoded,
    recorded_order,
    too_short,
    unknown_samplers,
    without_first,
)


def asking(frame: FrameType) -> Any:
    """The Accelerator whose method runs in this frame, None if it is anybody else.

    ``prepare`` tells a loader nothing but that it asks, and only the Accelerator itself can shard the loader
    inside: the bare ``prepare_data_loader`` does not synchronise a shuffle, and ranks would share samples.
    """
    known = getattr(sys.modules.get("accelerate"), "Accelerator", None)
    # Of others not even the locals are looked at: Python then keeps what is in them for as long as they run.
    if not frame.f_globals.get("__name__", "").startswith("accelerate."):
        return None
    asker = frame.f_locals.get("self")
    return asker if known is not None and isinstance(asker, known) else None


def prepared(accelerator: Any, loader: DataLoader[Any]) -> Any:
    """The loader as the Accelerator shards it; its state is its owner's to save, not accelerate's."""
    options = accelerator.dataloader_config
    stateful = options.use_stateful_dataloader
    try:
        # Indices are skipped by us; torchdata would draw them again from a stream that has gone on.
        options.use_stateful_dataloader = stateful and isinstance(loader.dataset, IterableDataset)
        made = accelerator.prepare_data_loader(loader)
    finally:
        options.use_stateful_dataloader = stateful
    accelerator._dataloaders.remove(made)
    return made


def is_prepared(loader: Any) -> bool:
    """Whether accelerate made this loader."""
    return type(loader).__module__.partition(".")[0] == "accelerate"


@final
class Prepared:
    """The batches of a loader that accelerate prepared, drawn as it draws them, with a state to go on from.

    batches = Prepared(accelerator.prepare(loader))
    for batch in batches: state = batches.state_dict()
    batches.load_state_dict(state)                      # the next iter() continues

    Indices that were used are skipped, not fetched; a stateful loader inside goes on by its own state.
    """

    def __init__(self, loader: Any) -> None:
        self.loader, self.base = loader, loader.base_dataloader
        self._dispatches = type(loader).__name__ == "DataLoaderDispatcher"
        self._indexed = not isinstance(self.base.dataset, IterableDataset)
        self._stateful = hasattr(self.base, "state_dict") and not self._indexed
        self._begun: dict[str, Any] | None = None  # the order of the epoch under way
        self._drawn = 0  # batches of it that were drawn
        self._saved: dict[str, Any] | None = None  # the state to go on from
        self._active: Any = None  # the loader under way

    def __iter__(self) -> Iterator[Batch]:
        state, self._saved = self._saved, None
        loader, self._drawn = self.loader, 0
        if state is not None:
            loader, self._drawn = self._taken_up(state), state["batches"]
        self._begun = self._order() if state is None else state["order"]
        self._active = loader
        try:
            # Accelerate's dispatcher has no answer to an epoch without a batch.
            if state is None or not self._done():
                for batch in loader:
                    self._drawn += 1
                    yield batch
            if (
                state is not None
            ):  # which counts in the loader that was given only when it ran itself
                self.loader.iteration = state["order"]["iteration"] + 1
        finally:
            leave(loader)  # accelerate leaves one that was broken off as the active one
            self._begun, self._drawn = None, 0

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def ended(self) -> bool:
        """Whether the batch that was drawn last is the epoch's last: accelerate looks one ahead."""
        return self._active is not None and bool(self._active.end_of_dataloader)

    @property
    def num_workers(self) -> int:
        """Workers of the loader inside."""
        return int(self.base.num_workers)

    @property
    def batch_size(self) -> int | None:
        """Rows of a batch on this rank, None where accelerate does not know either."""
        sampler = self._batch_sampler
        size = self.base.batch_size if sampler is None else getattr(sampler, "batch_size", None)
        if size is None or not self._splits:
            return size
        return int(size) // self._ranks

    def rows(self, size: int) -> int:
        """Rows of a whole epoch on this rank in batches of ``size``; TypeError where nobody can tell."""
        sampler = self._batch_sampler
        if self._dispatches:
            group = size * self._ranks
            full, rest = divmod(self._all_rows(sampler, group), group)
            return full * size + (0 if self.base.drop_last else -(-rest // self._ranks))
        if type(sampler).__name__ == "BatchSamplerShard":
            return self._share(sampler, size)
        if type(self.base.dataset).__name__ == "IterableDatasetShard":
            if self.base.dataset.split_batches:
                raise TypeError("accelerate does not tell the length of split batches of a stream")
            total = _length(self.base.dataset)
            return total - total % size if self.base.drop_last else total
        return self._all_rows(sampler, size)

    def identity(self) -> dict[str, Any]:
        """What can be told of the data and its order without reading it."""
        sampler = self._batch_sampler
        if sampler is None or not hasattr(self.base.dataset, "__len__"):
            return {}
        try:
            samples = _length(self.base.dataset)
        except TypeError:
            return {}  # accelerate's share of a stream has a length where the stream has one
        sampler = getattr(sampler, "batch_sampler", sampler)
        sampler = getattr(sampler, "sampler", sampler)
        return {"samples": samples, "sampler": type(sampler).__name__}

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader, its samplers and its data set."""
        self.loader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch under way is, else where the next begins."""
        order = self._order() if self._begun is None else self._begun
        state = {"batches": self._drawn, "order": order}
        if self._stateful:
            state["inner"] = encoded(self._active_or_given.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there at the next iter()."""
        order, batches = state.get("order"), state.get("batches")
        if not (isinstance(order, Mapping) and isinstance(batches, int) and "iteration" in order):
            raise StateError(
                "the state is damaged: cursor.inner is not that of a loader that accelerate prepared; take "
                "another one, or start afresh without it"
            )
        if ("inner" in state) != self._stateful:
            raise StateError(
                "the state was saved with another use_stateful_dataloader than accelerate is configured with "
                "now; set it as it was, or start afresh without the state"
            )
        self._saved = dict(state)

    @property
    def _active_or_given(self) -> Any:
        return self.loader if self._active is None else self._active

    @property
    def _batch_sampler(self) -> Any:
        base = self.base
        return base.sampler if isinstance(base.sampler, BatchSampler) else base.batch_sampler

    @property
    def _splits(self) -> bool:
        holder = self.loader if self._dispatches else self._batch_sampler
        return bool(getattr(holder, "split_batches", False))

    @property
    def _ranks(self) -> int:
        holder = self.loader.state if self._dispatches else self._batch_sampler
        return int(getattr(holder, "num_processes", 1))

    def _all_rows(self, sampler: Any, size: int) -> int:
        # Rows of all ranks, drawn by one of them, or by the only one.
        if not self._indexed:
            total = _length(self.base.dataset)
        elif (inner := getattr(sampler, "sampler", None)) is None:
            return _length(sampler) * size
        else:
            total = _length(inner)
        whole = getattr(sampler, "batch_size", None) or size
        drop_last = getattr(sampler, "drop_last", self.base.drop_last)
        return total - total % whole if drop_last else total

    def _share(self, shard: Any, size: int) -> int:
        # As BatchSamplerShard deals: whole batches in turn, or every rank its part of each.
        inner = getattr(shard.batch_sampler, "sampler", None)
        if shard.batch_size is None or inner is None:
            return _length(shard) * size
        whole: int = shard.batch_size
        rank: int = shard.process_index
        ranks = self._ranks
        full, rest = divmod(_length(inner), whole)
        if shard.drop_last:
            return full * size if shard.split_batches else full // ranks * size
        count = full + (rest > 0)
        if shard.even_batches:
            return (count if shard.split_batches else -(-count // ranks)) * size
        if shard.split_batches:
            return full * size + max(0, min(size, rest - size * rank))
        short = whole - rest if rest and full % ranks == rank else 0
        return len(range(rank, count, ranks)) * size - short

    def _order(self) -> dict[str, Any]:
        # Enough to draw the epoch again: which it is, and the generators its samplers will draw from.
        order: dict[str, Any] = {"iteration": self.loader.iteration}
        if self._stateful:
            return order
        if (shared := getattr(self.loader, "synchronized_generator", None)) is not None:
            return {**order, "shared": encoded(shared.get_state())}
        return {**order, **(recorded_order(self.base) if self._indexed else {})}

    def _taken_up(self, state: dict[str, Any]) -> Any:
        # The same loader around the rest of its batches: what it does with them is accelerate's to say.
        order, batches = state["order"], state["batches"]
        self.loader.set_epoch(order["iteration"])
        if self._stateful:
            self.loader.load_state_dict(decoded(state["inner"]))
            return self.loader
        if "shared" in order:  # before accelerate gives that of rank 0 to all
            self.loader.synchronized_generator.set_state(decoded(order["shared"]))
        each = self._ranks if self._dispatches and not self._splits else 1
        loader = object.__new__(type(self.loader))
        loader.__dict__.update(self.loader.__dict__)
        loader.base_dataloader = _Rest(self.base, batches * each, order)
        return loader

    def _done(self) -> bool:
        try:
            return self._drawn >= len(self.loader)
        except TypeError:
            return False


class _Rest:
    """A DataLoader without its first batches."""

    def __init__(self, base: DataLoader[Any], first: int, order: dict[str, Any]) -> None:
        self._base, self._first, self._order = base, first, order

    def __iter__(self) -> Iterator[Batch]:
        base, first = self._base, self._first
        if not isinstance(base.dataset, IterableDataset):
            if first and (unknown := [n for n in unknown_samplers(base) if n not in _KNOWN]):
                warnings.warn(
                    f"resuming {first} batches into the order of {', '.join(unknown)}: exact only "
                    f"if it draws from torch's generators and nothing else",
                    stacklevel=2,
                )
            return without_first(base, first, self._order)
        if first:
            warnings.warn(
                f"resuming by drawing {first} batches of {type(base.dataset).__name__} again: exact "
                f"only if it repeats its order",
                stacklevel=2,
            )
        source: Iterator[Batch] = iter(base)
        if (drawn := sum(1 for _ in islice(source, first))) < first:
            raise too_short(drawn, first)
        return source

    def __getattr__(self, name: str) -> Any:
        if name in (
            "state_dict",
            "load_state_dict",
        ):  # of torchdata's, which would begin an iterator
            raise AttributeError(name)
        return getattr(self._base, name)


def _length(thing: Any) -> int:
    return len(thing)


_KNOWN = {"BatchSamplerShard", "SeedableRandomSampler"}  # of accelerate


def announce(loader: Any, last: bool) -> None:
    """Tell accelerate which loader is under way, and whether its last batch is out.

    ``accumulate`` then steps with what is left at the end of an epoch. Said again for every batch: another loader,
    of an evaluation that was broken off, say, may still stand as the one under way.
    """
    loader.end_of_dataloader = last
    state = sys.modules["accelerate.state"].GradientState()
    if state.active_dataloader is not loader:
        leave(loader)
        state._add_dataloader(loader)


def leave(loader: Any) -> None:
    """Tell accelerate that this loader is no longer under way."""
    state = sys.modules["accelerate.state"].GradientState()
    if any(each is loader for each in state.dataloader_references):
        state._remove_dataloader(loader)


def accumulates() -> bool:
    """Whether an Accelerator of this process accumulates gradients, and must hear of an epoch's end."""
    state = _gradient_state()
    return state is not None and state.num_steps > 1 and state.sync_with_dataloader


def begun_by(dataset: Any) -> Any:
    """The loader of accelerate that has just begun to draw from this data set, None if it is anybody else.

    Each of them says that it is under way before it draws.
    """
    state = _gradient_state()
    active: Any = None if state is None else state.active_dataloader
    return active if is_prepared(active) and active.dataset is dataset else None


def _gradient_state() -> Any:
    # None where no Accelerator was ever made: asking would make one's state.
    kind = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    return kind() if kind is not None and kind._shared_state else None


def save_with(accelerator: Any, loader: Any) -> None:
    """Let ``save_state`` and ``load_state`` of the Accelerator take the loader's state along.

    A file for every rank: accelerate's own way (``use_stateful_dataloader``) has all ranks write the same one.
    """
    known: Callable[[], Any] = weakref.ref(loader)

    def path(folder: str, rank: int) -> Path | None:
        # Several loaders: in the order of preparation, as accelerate numbers everything. None: freed.
        here = [each for each in accelerator._dataloaders if type(each) is type(known())]
        number = next((i for i, each in enumerate(here) if each is known()), None)
        return None if number is None else Path(folder) / f"siftloader_{number}_{rank}.json"

    def save(models: Any, weights: Any, folder: str) -> None:
        if (file := path(folder, accelerator.process_index)) is not None:
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(known().state_dict()))
            partial.replace(file)

    def load(models: Any, folder: str) -> None:
        own, first = (path(folder, rank) for rank in (accelerator.process_index, 0))
        if own is None or first is None:
            return
        # More ranks than were saved: the loader looks at whether it can go on from that of rank 0.
        file = own if own.exists() else first
        if not file.exists():
            warnings.warn(
                f"{folder} holds no state of the SiftingDataLoader: it begins anew, its warm-up too",
                stacklevel=3,
            )
            return
        known().load_state_dict(json.loads(file.read_text()))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
