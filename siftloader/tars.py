"""Shards that others wrote: tars of any layout, read through webdataset's own pipeline.

    stream = webdataset("data/train-{000000..000127}.tar", batch_size=32, seed=0)
    stream = webdataset("text/*.tar", batch_size=8, tokenizer="gpt2", seq_len=1024, objective="clm")
    loader = DataLoader(stream, batch_size=None, num_workers=4)    # or wds.WebLoader, StatefulDataLoader

Its stages (``tar_samples``, ``tar_batches``) are plain generator functions, and stand in anybody's pipeline.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import operator
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from siftloader.batches import Batch
from siftloader.errors import EmptyEpoch, StateError
from siftloader.masking import Mlm
from siftloader.shards import Tokenizer
from siftloader.tar_batches import META, TEXTS, Decoder, TextRows, batched, decoded, masked, packed
from siftloader.tar_samples import (
    Sample,
    Urls,
    checked_tars,
    find_tars,
    record_tars as record_tars,
    written_by_us,
)
from siftloader.world import World, iteration


Stage: TypeAlias = Callable[[Iterator[Any]], Iterator[Any]]

STATE_VERSION = 1
WORKERS = 1024  # of one loader, at most


@dataclass(frozen=True)
class Plan:
    """What an epoch of tars is, over all ranks and workers."""

    batches: int  # of each rank
    samples: int  # handed out, over all ranks
    left_out: int  # samples that no rank hands out in this epoch
    repeated: int  # of the samples handed out, those that were before in this epoch


class TarStream(IterableDataset[Batch]):
    """Batches from the tars of others, seeded, checked and equal in number on every rank.

    webdataset("data/train-{000000..000127}.tar", batch_size=32)      # also a list, a glob, a folder, URLs
    webdataset("text/", batch_size=8, tokenizer="gpt2", seq_len=1024, objective="clm")

    * ``shuffle``: samples (of text: packed rows) that wait to be drawn from; tars are permuted anew in every
      epoch *before* they are dealt to ranks and workers. 0 is the order of the files, in every epoch.
    * ``tokenizer`` (a name, a path, an object) makes ``input_ids`` and ``labels`` [n, T] of the text in .txt, or
      under ``column`` of .json. ``masking`` is as in ``TokenShards``.
    * ``fields`` chooses what is decoded: ``("jpg;png", "cls")``. ``decoders={".ext": function of bytes}``.
    * ``stages`` see decoded samples (of text: documents), before they are packed or batched.
    * ``sizes``: samples of each tar, by name; else what ``record_tars`` wrote, ``sizes.json`` or wids'
      ``dataset.json`` beside the tars says so. Tars are checked against them.
    * ``batches_per_epoch``, of each rank: needed on several ranks where sizes do not tell. A reader that has
      too few repeats its tars in another order; what is beyond is left for other epochs.
    * ``pipes=True`` lets ``pipe:`` URLs run their shell commands.

    A batch of images and classes is (uint8 [n, C, H, W], or a list of [C, H, W] where sizes differ; int64 [n]); of
    token ids, a dict of ``input_ids``, ``labels`` and for masked models ``attention_mask``, int64 [n, T]; of
    anything else, a dict of the fields, stacked where shapes allow it. ``with_keys`` adds ``__key__`` and
    ``__url__`` to dicts. Every iteration is an epoch in another order, announced by ``set_epoch`` or not.

    What ``TokenShards`` promises and this cannot:

    * resume at once: a state counts batches, and resuming reads again all that lies before it in its epoch;
    * elasticity: order, masks of text and states hold on the same number of ranks and workers only;
    * every sample once: ranks end together because some samples are left out or repeated (``plan()`` counts);
    * integrity before use: a changed byte is seen at the end of a tar, and only if ``record_tars`` wrote its hash;
    * a true shuffle: samples mix within the ``shuffle`` that wait, and tars follow one another.
    """

    def __init__(
        self,
        urls: Urls,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: int = 1000,
        tokenizer: Any = None,
        seq_len: int | None = None,
        objective: Literal["mlm", "clm"] | None = None,
        column: str = "text",
        masking: Mlm | float | Literal["auto"] | None = "auto",
        fields: Sequence[str] | None = None,
        decoders: Mapping[str, Decoder] | None = None,
        stages: Sequence[Stage] = (),
        sizes: Mapping[str, int] | None = None,
        batches_per_epoch: int | None = None,
        drop_last: bool = False,
        with_keys: bool = False,
        pipes: bool = False,
        world: World | None = None,
    ) -> None:
        _require_webdataset()
        wanted = 1 if batches_per_epoch is None else batches_per_epoch
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("shuffle", shuffle, 0),
            ("batches_per_epoch", wanted, 1),
        ):
            if operator.index(value) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if objective not in (None, "mlm", "clm"):
            raise ValueError(f'objective must be "mlm" or "clm", got {objective!r}')
        self._tars = find_tars(urls, sizes, pipes)
        written, self._tokenizer = written_by_us(self._tars)
        self._rows: TextRows | None = None
        if tokenizer is not None:
            if objective is None or seq_len is None:
                raise ValueError('a tokenizer needs seq_len= and objective="mlm" or "clm"')
            self._rows = TextRows.of(tokenizer, seq_len, objective, column)
            self._tokenizer = self._rows.about
            fields = (";".join(TEXTS),) if fields is None else fields
        elif seq_len is not None:
            raise ValueError("seq_len packs text to rows, which needs a tokenizer=")
        self._seed, self._shuffle = operator.index(seed), shuffle
        self._size, self._drop_last, self._total = batch_size, drop_last, batches_per_epoch
        self._given_world, self._with_keys, self._stages = world, with_keys, list(stages)
        self._home: World | None = None  # the process that this one was sent from
        self._read = partial(checked_tars, pipes=pipes)
        self._decode = partial(decoded, fields=fields, decoders=decoders)
        special = {} if self._tokenizer is None else self._tokenizer.special_ids
        kind = objective or written
        self._mask = partial(
            masked,
            masking=_masking(masking, kind, self._tokenizer),
            seed=self._seed,
            pad=special.get("pad"),
            padded=kind == "mlm",
        )
        # Samples of every tar that end up in batches one for one; None where nobody knows.
        counts = [tar.samples for tar in self._tars if tar.samples is not None]
        known = len(counts) == len(self._tars) and self._rows is None and not self._stages
        self._counts = counts if known else None
        self._epochs = _Epochs()
        # Of this iteration: epoch, batches, whether it has ended.
        self._at: tuple[int, int, bool] | None = None
        # A state that was loaded and not gone on from yet, and the process it was loaded in.
        self._loaded: tuple[Mapping[str, Any], int] | None = None
        self._reader = 0  # only the latest iteration is counted
        self._quota(0, self._world())  # refuses what cannot be equal on all ranks

    @property
    def urls(self) -> tuple[str, ...]:
        """The tars, in the order they were given in."""
        return tuple(tar.url for tar in self._tars)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Whose ids these are: its size, its special ids; None where nothing says."""
        return self._tokenizer

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration is."""
        return self._upcoming(self._world())[0]

    @property
    def dropped(self) -> int:
        """Tokens of text that filled no row at the end of an epoch, over all epochs of this rank so far."""
        return int(self._epochs.marks[:, 1].sum())

    @property
    def guarantees(self) -> str:
        """How far these very tars can be trusted."""
        counted = sum(tar.samples is not None for tar in self._tars)
        hashed = sum(tar.sha256 is not None for tar in self._tars)
        return (
            f"every tar is whole or an error; number of samples checked for {counted} of {len(self._tars)} tars, "
            f"every byte (sha256) for {hashed}; a flipped byte elsewhere goes unseen (record_tars writes both)"
        )

    def __len__(self) -> int:
        """Batches of an epoch; TypeError where that depends on the number of workers, or on the tars."""
        if self._total is None:
            raise TypeError("give batches_per_epoch=, or ask plan(workers=...).batches")
        return self._total

    def __iter__(self) -> Iterator[Batch]:
        self._at = None
        self._reader += 1
        return self._counted(self._reader)

    def _counted(self, reader: int) -> Iterator[Batch]:
        world = self._world()
        epoch, done, finished = self._upcoming(world)
        if self._loaded is not None and (done or finished):
            # The workers of a loader may be others than at loading.
            _check_state(self._loaded[0], self._identity(world))
        self._loaded = None
        if reader == self._reader:
            self._at = epoch, done, finished
        if finished:  # a worker that had ended when the state was taken
            return
        self._epochs.note(world.worker, epoch, iteration())
        for batch in self.pipeline(epoch, world, skip=done):
            done += 1
            if reader == self._reader:  # counted before it leaves: the caller may never return
                self._at = epoch, done, False
            yield batch
        if reader == self._reader:
            self._at = (epoch, done, True) if iteration() else (epoch + 1, 0, False)

    def pipeline(self, epoch: int = 0, world: World | None = None, skip: int = 0) -> Any:
        """The ``wds.DataPipeline`` of one epoch of one reader, without its first ``skip`` batches."""
        import webdataset as wds

        here = world or self._world()
        quota = self._quota(epoch, here)
        batch = partial(batched, size=self._size, drop_last=self._drop_last)
        stages: list[Any] = [batch, wds.slice(skip, None)]
        if self._rows is None and not self._stages:
            # What was handed out before need not be decoded again.
            stages = [wds.slice(skip * self._size, None), self._decode, batch]
        stages += [partial(self._mask, epoch=epoch if self._shuffle else 0)]
        if not self._with_keys:
            stages += [_without_keys]
        if quota is not None:
            stages += [wds.slice(quota - skip)]
        return wds.DataPipeline(partial(self._passes, epoch, here), *stages)

    def _passes(self, epoch: int, world: World) -> Iterator[Sample]:
        # The tars of this reader; again, in other orders, for as long as batches are asked for.
        import webdataset as wds

        mine = self._shares(epoch, world.ranks, world.workers)[world.rank][world.worker]
        readers = world.ranks * world.workers
        if mine.readers > 1 and not world.rank + world.worker:
            warnings.warn(
                f"{len(self._tars)} tars for {world.ranks} ranks x {world.workers} workers = {readers} readers: "
                f"{mine.readers} of them read the same tars and hand out every {mine.readers}th sample; at "
                f"least {readers} tars would be read once",
                stacklevel=2,
            )
        order = mine.tars
        for repeat in itertools.count():
            key = f"{self._seed}/{epoch}/{world.rank}/{world.worker}/{repeat}"
            if repeat and self._shuffle:
                order = _permuted(sorted(order), key)
            tars = partial(iter, [self._tars[number] for number in order])
            stages: list[Any] = [tars, self._read, wds.slice(mine.turn, None, mine.readers)]
            if self._rows is not None or self._stages:
                stages += [self._decode, *self._stages]
            if self._rows is not None:
                drop = partial(self._epochs.drop, world.worker)
                stages += [partial(packed, rows=self._rows, key=key, dropped=drop)]
            if self._shuffle:
                # Stock would hand out when 100 wait.
                stages += [
                    wds.shuffle(self._shuffle, initial=self._shuffle, rng=random.Random(key))
                ]
            samples = 0
            for sample in wds.DataPipeline(*stages):
                samples += 1
                yield sample
            if not samples and (readers == 1 or self._total is not None):
                what = f"row of {self._rows.seq_len} tokens" if self._rows else "sample"
                raise EmptyEpoch(
                    f"{len(order)} tars ({self.urls[order[0]]} is one) hold not one {what} for {world}; give more "
                    f"data, or use fewer ranks and workers"
                )
            if self._total is None:
                return

    def plan(self, workers: int = 1, epoch: int = 0) -> Plan:
        """What ``epoch`` hands out, leaves out and repeats with so many loader workers; needs sizes.

        stream.plan(workers=4)      # Plan(batches=312, samples=19968, left_out=32, repeated=0)
        """
        if self._counts is None:
            raise ValueError("sizes are not known (of text never); record_tars counts")
        ranks = self._world().ranks
        quotas = self._quotas(epoch, ranks, workers)
        has = itertools.chain(*self._samples(epoch, ranks, workers))
        takes = [batches * self._size for batches in itertools.chain(*quotas)]
        read = sum(map(min, has, takes))
        samples = read if self._total is None else sum(takes)
        return Plan(sum(quotas[0]), samples, sum(self._counts) - read, samples - read)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration epoch ``epoch``; a restored state in this very epoch keeps its place.

        Reaches loader workers that are alive, too.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        self._epochs.set(epoch)
        if self._loaded is not None and self._loaded[0]["epoch"] != epoch:
            self._loaded = None
        self._at = None
        self._reader += 1

    def state_dict(self) -> dict[str, Any]:
        """Where this reader stands, JSON-able: the batches it handed out in this epoch."""
        world = self._world()
        if not iteration() and self._epochs.seen()[0].any():
            raise StateError(
                "loader workers read this stream, and only they know how far; take the state of a "
                "torchdata StatefulDataLoader around it, or read with num_workers=0"
            )
        epoch, batches, finished = self._at or self._upcoming(world)
        place = {"epoch": epoch, "batches": batches, "finished": finished}
        return {**self._identity(world), **place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken, by reading again what was handed out in its epoch.

        Raises StateError where the state belongs to another order: other tars, seed, ranks or workers.
        """
        world = self._world()
        _check_state(state, self._identity(world))
        if iteration():
            self._epochs.note(world.worker, state["epoch"] - (not state["finished"]))
        else:
            self._epochs.set(state["epoch"] + state["finished"])
        self._loaded, self._at = (state, os.getpid()), None
        self._reader += 1

    def _identity(self, world: World) -> dict[str, Any]:
        # Where the tars are does not matter; their sizes do, for they are dealt by size.
        tars = [(tar.url.rpartition("/")[2], tar.samples) for tar in self._tars]
        rows = self._rows
        return {
            "version": STATE_VERSION,
            "tars": hashlib.sha256(repr(tars).encode()).hexdigest()[:16],
            "seed": self._seed,
            "batch_size": self._size,
            "shuffle": self._shuffle,
            "batches_per_epoch": self._total,
            "drop_last": self._drop_last,
            "stages": len(self._stages),
            "text": rows and [rows.objective, rows.seq_len, rows.about.sha256],
            "ranks": world.ranks,
            "worker": world.worker,
            "workers": world.workers,
        }

    def _upcoming(self, world: World) -> tuple[int, int, bool]:
        epoch = self._epochs.upcoming(world.worker, iteration())
        if self._loaded is not None:
            state, process = self._loaded
            # Loaded in this worker: it counts. Loaded before the workers were made: in its epoch alone.
            if (iteration() and process == os.getpid()) or state["epoch"] == epoch:
                return state["epoch"], state["batches"], state["finished"]
        return epoch, 0, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_home": World.detect()}

    def _world(self) -> World:
        found, given = World.detect(self._home), self._given_world
        if given is None or given.workers > 1:
            return given or found
        return World(given.rank, given.ranks, found.worker, found.workers)

    def _shares(self, epoch: int, ranks: int, workers: int) -> list[list[_Share]]:
        # By rank and worker: tars are dealt to ranks, so evenly as their sizes allow, and then to workers.
        # A rank's tars do not depend on its workers.
        key = f"{self._seed}/{epoch}" if self._shuffle else None
        sizes = [1 if tar.samples is None else tar.samples for tar in self._tars]
        whole = _Share(_permuted(range(len(sizes)), key), 0, 1)
        return [rank.among(workers, sizes, key) for rank in whole.among(ranks, sizes, key)]

    def _samples(self, epoch: int, ranks: int, workers: int) -> list[list[int]]:
        # By rank and worker.
        assert self._counts is not None
        shares, counts = self._shares(epoch, ranks, workers), self._counts
        return [[each.samples(counts) for each in rank] for rank in shares]

    def _quotas(self, epoch: int, ranks: int, workers: int) -> list[list[int]]:
        # Batches by rank and worker: those of a rank's workers add up to the same on every rank.
        if self._total is not None:
            more = self._total % workers
            return [[self._total // workers + (w < more) for w in range(workers)]] * ranks
        up = 0 if self._drop_last else self._size - 1
        samples = self._samples(epoch, ranks, workers)
        full = [[(count + up) // self._size for count in rank] for rank in samples]
        total = min(map(sum, full))
        if not total and ranks > 1:
            raise EmptyEpoch(
                f"{sum(self._counts or ())} samples in {len(self._tars)} tars for {ranks} ranks of {workers} "
                f"workers make {[sum(each) for each in full][:8]} batches of {self._size}, and a rank without "
                f"any would stop the others; use fewer ranks or workers, smaller batches, or batches_per_epoch="
            )
        return [_trimmed(own, total) for own in full]

    def _quota(self, epoch: int, world: World) -> int | None:
        # None where a reader just ends with its tars.
        tars, ranks = len(self._tars), world.ranks
        if self._total is None and ranks == 1:
            return None
        if self._total is None and self._counts is None:
            what = "samples own stages give" if self._stages else "samples they hold"
            what = "rows text packs to" if self._rows else what
            raise ValueError(
                f"{tars} tars for {ranks} ranks ({-(-tars // ranks)} or {tars // ranks} each), and nothing says "
                f"how many {what}: one rank would end before the others, which then wait for ever; give "
                f"batches_per_epoch= (samples // ({ranks} ranks * batch size {self._size})); for plain samples "
                f"sizes= does, or record_tars(urls) once"
            )
        return self._quotas(epoch, ranks, world.workers)[world.rank][world.worker]


webdataset = TarStream  # the name that says what it takes the place of


def _require_webdataset() -> None:
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "reading tars of others needs the `webdataset` package; pip install 'siftloader[webdataset]'"
        ) from error


def _masking(masking: Any, objective: str | None, about: Tokenizer | None) -> Mlm | None:
    if masking is None or isinstance(masking, Mlm):
        return masking
    if masking == "auto" and objective != "mlm":
        return None
    if objective != "mlm" or about is None:
        raise ValueError(
            'masking needs objective="mlm", and to know what to mask with: a tokenizer= for text, or '
            "masking=Mlm(mask_id=..., vocab_size=..., special_ids=...) for tars of token ids"
        )
    return Mlm.of(about, 0.15 if masking == "auto" else masking)


class _Epochs:
    """Which epoch it is, agreed on by the workers of an iteration without a word between them.

    Loader workers hold copies of a stream, and nobody tells them when an iteration begins. So every worker
    leaves in shared memory which epoch it began last, and in which iteration: who finds that another worker
    of this iteration began already, joins it; the first begins the one after all others.
    """

    def __init__(self) -> None:
        # By worker: the iteration it began last and, in 32 bits below that, the epoch after it; tokens dropped.
        self.marks = torch.zeros(WORKERS, 2, dtype=torch.int64)
        self.marks.share_memory_()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.marks = state["marks"]
        if not self.marks.is_shared():  # type: ignore[no-untyped-call]  # a copy that no loader made
            self.marks.share_memory_()  # type: ignore[no-untyped-call]

    def set(self, epoch: int) -> None:
        self.marks[:, 0] = epoch

    def note(self, worker: int, epoch: int, iteration: int = 0) -> None:
        # One word, so that nobody sees the half of it.
        self.marks[worker, 0] = iteration << 32 | epoch + 1

    def seen(self) -> tuple[Tensor, Tensor]:
        marks = self.marks[:, 0].clone()
        return marks >> 32, marks & (1 << 32) - 1

    def upcoming(self, worker: int, iteration: int) -> int:
        iterations, epochs = self.seen()
        joined = (iterations == iteration) & (epochs > epochs[worker])
        if iteration and bool(joined.any()):
            return int(epochs[joined].max()) - 1
        return int(epochs.max())

    def drop(self, worker: int, tokens: int) -> None:
        self.marks[worker, 1] += tokens


def _check_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    needed = [*own, "epoch", "batches", "finished"]
    if missing := [name for name in needed if name not in state]:
        raise StateError(f"the state lacks {missing}; it needs {needed}, as state_dict() gives")
    for name, value in own.items():
        if state[name] != value:
            raise StateError(
                f"the state belongs to another order: {name} {state[name]!r} found, {value!r} expected (the "
                f"order depends on names and sizes of the tars, on ranks and workers); build the stream it was "
                f"saved from, or begin an epoch without the state (set_epoch)"
            )
    for name in ("epoch", "batches"):
        if not isinstance(state[name], int) or state[name] < 0:
            raise StateError(f"the state is damaged: {name} {state[name]!r} found")


@dataclass(frozen=True)
class _Share:
    """Numbers of tars, in order; of their samples, every ``readers``-th from ``turn`` on is the owner's."""

    tars: list[int]
    turn: int
    readers: int

    def samples(self, counts: Sequence[int]) -> int:
        """How many the owner has, of tars that hold so many."""
        return len(range(self.turn, sum(counts[tar] for tar in self.tars), self.readers))

    def among(self, count: int, sizes: Sequence[int], key: str | None) -> list[_Share]:
        """Dealt to ``count`` readers; where tars are too few, all read all of them and take turns."""
        if len(self.tars) >= count and self.readers == 1:
            return [_Share(hand, 0, 1) for hand in _deal(self.tars, sizes, count, key)]
        turns = range(self.turn, self.readers * count, self.readers)
        return [_Share(self.tars, turn, self.readers * count) for turn in turns]


def _deal(order: list[int], sizes: Sequence[int], among: int, key: str | None) -> list[list[int]]:
    # The largest first, each to whoever has least; among equals, chance decides who begins.
    hands: list[list[int]] = [[] for _ in range(among)]
    begins = _permuted(range(among), key and f"{key}/hands")
    waiting = [(0, place, hand) for place, hand in enumerate(begins)]
    for number in sorted(order, key=lambda number: -sizes[number]):
        load, place, hand = heapq.heappop(waiting)
        hands[hand].append(number)
        heapq.heappush(waiting, (load + max(1, sizes[number]), place, hand))
    rank_of = {number: place for place, number in enumerate(order)}
    return [sorted(hand, key=rank_of.__getitem__) for hand in hands]


def _trimmed(own: list[int], total: int) -> list[int]:
    # Of every worker's batches its share of the total; what rounding left over, to whoever has room.
    shares = [each * total // max(1, sum(own)) for each in own]
    for worker, most in enumerate(own):
        if sum(shares) < total and shares[worker] < most:
            shares[worker] += 1
    return shares


def _permuted(numbers: Iterable[int], key: str | None) -> list[int]:
    if key is None:
        return list(numbers)
    return sorted(numbers, key=lambda number: hashlib.sha256(f"{key}/{number}".encode()).digest())


def _without_keys(source: Iterable[Batch]) -> Iterator[Batch]:
    for batch in source:
        if isinstance(batch, dict):
            batch = {name: value for name, value in batch.items() if name not in META}
        yield batch
