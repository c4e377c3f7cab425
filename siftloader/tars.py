"""Shards that others wrote: tars of any layout, read through webdataset's own pipeline.

    stream = webdataset("data/train-{000000..000127}.tar", batch_size=32, seed=0)
    stream = webdataset("text/*.tar", batch_size=8, tokenizer="gpt2", seq_len=1024, objective="clm")
    loader = DataLoader(stream, batch_size=None, num_workers=4)    # or wds.WebLoader, StatefulDataLoader

The stages are plain generator functions, and stand in anybody's pipeline:

    wds.DataPipeline(wds.SimpleShardList(urls), checked_tars, decoded, partial(batched, size=32))

What a tar cannot give and ``TokenShards`` can: a place to resume from without reading what lies before,
an order that ranks and workers have no part in, and, unless it was recorded, a hash of every byte.

Letters: n samples of a batch, T tokens of a sample, S tars.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import random
import re
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from siftloader.batches import IGNORED, Batch
from siftloader.errors import (
    CorpusError,
    CorruptShard,
    EmptyEpoch,
    FetchError,
    ShardError,
    StateError,
)
from siftloader.files import File, Reading, is_url, kind_of, open_file
from siftloader.masking import Mlm
from siftloader.packing import Documents, Packed, pack_clm, pack_mlm
from siftloader.shards import Tokenizer, write_atomically
from siftloader.tokens import describe_tokenizer, load_tokenizer, restore_tokenizer, tokenise
from siftloader.words import Words
from siftloader.world import World


Sample: TypeAlias = dict[
    str, Any
]  # "__key__", "__url__", and the fields: bytes, later what they mean
Stage: TypeAlias = Callable[[Iterator[Any]], Iterator[Any]]
Decoder: TypeAlias = Callable[[bytes], Any]

STATE_VERSION = 1
IMAGES = ("jpg", "jpeg", "png", "webp")
UNSAFE = (
    "pyd",
    "pkl",
    "pickle",
    "pth",
    "pt",
    "ckpt",
    "joblib",
    "dill",
)  # decoding runs their code
IDS = ("input_ids", "tokens")  # fields of these names hold token ids; .npy or .json alone may
TEXT = 1 << 18  # characters that are tokenised and packed at a time
TRIES, PAUSE = (
    4,
    1.0,
)  # how often a URL is asked for, and seconds to wait at first, then twice as long
WORKERS = 1024  # of one loader, at most


def webdataset(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
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
    sizes: Mapping[str, int] | str | os.PathLike[str] | None = None,
    batches_per_epoch: int | None = None,
    drop_last: bool = False,
    with_keys: bool = False,
    pipes: bool = False,
    world: World | None = None,
) -> TarStream:
    """Batches from the tars of others, seeded, checked and equal in number on every rank.

    webdataset("data/train-{000000..000127}.tar", batch_size=32)      # also a list, a glob, a folder, URLs
    webdataset("text/", batch_size=8, tokenizer="gpt2", seq_len=1024, objective="clm")

    * ``shuffle``: samples (of text: packed rows) that wait to be drawn from; tars are permuted anew in every
      epoch *before* they are dealt to ranks and workers. 0 is the order of the files, in every epoch.
    * ``tokenizer`` (a name, a path, an object) makes ``input_ids`` and ``labels`` [n, T] of the text in
      .txt, or under ``column`` of .json. ``masking`` is as in ``TokenShards``; ``"auto"`` knows what a
      dataset.json of ours records.
    * ``fields`` chooses what is decoded: ``("jpg;png", "cls")``. ``decoders={".ext": function of bytes}``.
    * ``stages`` see decoded samples (of text: documents), before they are packed or batched.
    * ``sizes``: samples of each tar, as a mapping, or a file of that kind; ``sizes.json``, ``manifest.jsonl``
      and ``dataset.json`` beside the tars are found. Tars are checked against them.
    * ``batches_per_epoch``, of each rank: needed on several ranks where sizes do not tell. A reader that has
      too few repeats its tars in another order; what is beyond is left for other epochs.
    * ``pipes=True`` lets ``pipe:`` URLs run their shell commands.

    Wrong arguments, tars that are not there and unbalanced braces are refused here.
    """
    _require_webdataset()
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("shuffle", shuffle, 0),
        ("batches_per_epoch", 1 if batches_per_epoch is None else batches_per_epoch, 1),
        ("seed", seed, None),
    ):
        _check_whole(name, value, least)
    found = _expanded(urls, pipes)
    records = _recorded(found, sizes)
    described = _described_by_us(found)
    text, about = _text_of(tokenizer, seq_len, objective, column)
    about = about or described[1]
    _check_stages(stages, decoders)
    recipe = _Recipe(
        urls=found,
        records=records,
        batch_size=int(batch_size),
        seed=int(seed),
        shuffle=int(shuffle),
        text=text,
        tokenizer=about,
        masking=_masking(masking, objective or described[0], about),
        pad=about.special_ids.get("pad") if about is not None else None,
        padded=(objective or described[0]) == "mlm",
        fields=None if fields is None else tuple(fields),
        decoders={name.lstrip(".").lower(): each for name, each in (decoders or {}).items()},
        stages=tuple(stages),
        batches_per_epoch=batches_per_epoch,
        drop_last=bool(drop_last),
        with_keys=bool(with_keys),
        pipes=bool(pipes),
        world=world,
    )
    return TarStream(recipe)


@dataclass(frozen=True)
class _Record:
    """What is known of a tar from elsewhere."""

    samples: int
    sha256: str | None
    by: str  # who says so


@dataclass(frozen=True)
class _Text:
    """How text becomes rows of ids."""

    serialised: str  # the tokenizer: as text it goes to any process
    seq_len: int
    objective: str
    column: str
    tokenizer: Tokenizer


@dataclass(frozen=True)
class _Recipe:
    """The arguments of ``webdataset``, resolved."""

    urls: tuple[str, ...]
    records: Mapping[str, _Record]
    batch_size: int
    seed: int
    shuffle: int
    text: _Text | None
    tokenizer: Tokenizer | None
    masking: Mlm | None
    pad: int | None
    padded: bool  # batches of ids have an attention_mask
    fields: tuple[str, ...] | None
    decoders: Mapping[str, Decoder]
    stages: tuple[Stage, ...]
    batches_per_epoch: int | None
    drop_last: bool
    with_keys: bool
    pipes: bool
    world: World | None

    @property
    def counts(self) -> list[int] | None:
        """Samples of every tar that end up in batches one for one; None where nobody knows."""
        if self.text is not None or self.stages or len(self.records) < len(self.urls):
            return None
        return [self.records[url].samples for url in self.urls]


@dataclass(frozen=True)
class Plan:
    """What an epoch of tars is, over all ranks and workers."""

    batches: int  # of each rank
    samples: int  # handed out, over all ranks
    left_out: int  # samples that no rank hands out in this epoch
    repeated: int  # of the samples handed out, those that were before in this epoch


class TarStream(IterableDataset[Batch]):
    """Batches of tars, one epoch per iteration; ``webdataset`` makes it.

    stream = webdataset("data/*.tar", batch_size=32)
    loader = DataLoader(stream, batch_size=None, num_workers=4)
    for epoch in range(3):
        for batch in loader: ...          # another order in every epoch, announced by set_epoch or not

    Iterates a ``wds.DataPipeline``, ``stream.pipeline(epoch)``. A batch of images and classes is (uint8
    [n, C, H, W], or a list of [C, H, W] where sizes differ; int64 [n]); of token ids, a dict of ``input_ids``,
    ``labels`` and for masked models ``attention_mask``, int64 [n, T]; of anything else, a dict of the fields,
    stacked where shapes allow it. ``with_keys`` adds ``__key__`` and ``__url__``, lists of str, to dicts.

    ``state_dict`` counts the batches of this reader in this epoch. ``load_state_dict`` reads them again and
    is exact on the same number of ranks and workers; on others it is refused. With loader workers that is for
    ``StatefulDataLoader`` to ask; whatever resumes by drawing again needs epochs announced (``set_epoch``).
    """

    def __init__(self, recipe: _Recipe) -> None:
        self._recipe = recipe
        self._epochs = _Epochs()
        # Of this iteration: epoch, batches, whether it has ended.
        self._at: tuple[int, int, bool] | None = None
        self._loaded: _Loaded | None = None
        self._dealt: tuple[tuple[int, int, int], list[list[_Share]]] | None = None
        self._reader = 0  # only the latest iteration is counted
        here = self._world()
        self._quota(0, here)  # refuses what cannot be equal on all ranks
        if len(recipe.urls) < here.ranks and not here.rank:
            self._warn_of_turns(here)

    @property
    def urls(self) -> tuple[str, ...]:
        """The tars, in the order they were given in."""
        return self._recipe.urls

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Whose ids these are: its size, its special ids; None where nothing says."""
        return self._recipe.tokenizer

    @property
    def dropped(self) -> int:
        """Tokens of text that filled no row at the end of an epoch, over all epochs of this rank so far."""
        return self._epochs.dropped()

    @property
    def guarantees(self) -> str:
        """What this stream promises, and what only ``TokenShards`` can."""
        recipe = self._recipe
        hashed = sum(record.sha256 is not None for record in recipe.records.values())
        counted = len(recipe.records)
        equal = (
            f"{recipe.batches_per_epoch} batches per epoch and rank: a reader with fewer repeats its tars, "
            f"what is beyond is left for other epochs (see plan())"
            if recipe.batches_per_epoch
            else "the same number of batches on every rank, by the recorded sizes (see plan())"
            if recipe.counts is not None
            else "one rank only: nothing says how many samples there are"
        )
        return (
            f"order: by seed and epoch, repeatable on the same number of ranks and workers, another on others\n"
            f"epochs: {equal}\n"
            f"resume: exact, by reading again what was handed out; same ranks and workers only\n"
            f"integrity: every tar is whole or an error; number of samples checked for {counted} of "
            f"{len(recipe.urls)} tars, every byte (sha256) for {hashed}; a flipped byte elsewhere goes unseen "
            f"(record_tars writes both)"
        )

    def __len__(self) -> int:
        """Batches of an epoch; TypeError where that depends on the number of workers, or on the tars."""
        if self._recipe.batches_per_epoch is None:
            raise TypeError(
                "how many batches there are depends on the loader's workers, or on what the tars hold; give "
                "batches_per_epoch=, or ask plan(workers=...).batches"
            )
        return self._recipe.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        self._at = None
        self._reader += 1
        return self._counted(self._reader)

    def _counted(self, reader: int) -> Iterator[Batch]:
        world = self._world()
        epoch, done, finished = self._begin(world)
        if reader == self._reader:
            self._at = epoch, done, finished
        if finished:  # a worker that had ended when the state was taken
            return
        for batch in self.pipeline(epoch, world, skip=done):
            done += 1
            if reader == self._reader:  # counted before it leaves: the caller may never return
                self._at = epoch, done, False
            yield batch
        if reader == self._reader:
            self._at = (epoch, done, True) if get_worker_info() else (epoch + 1, 0, False)

    def pipeline(self, epoch: int = 0, world: World | None = None, skip: int = 0) -> Any:
        """The ``wds.DataPipeline`` of one epoch of one reader, without its first ``skip`` batches."""
        from webdataset import DataPipeline

        recipe, here = self._recipe, world or self._world()
        quota = self._quota(epoch, here)
        if (
            here.ranks <= len(recipe.urls) < here.ranks * here.workers
            and not here.rank + here.worker
        ):
            self._warn_of_turns(here)
        decode = partial(decoded, fields=recipe.fields, decoders=recipe.decoders)
        batch = partial(batched, size=recipe.batch_size, drop_last=recipe.drop_last)
        outside: list[Stage] = [batch, partial(_without, first=skip)]
        if recipe.text is None and not recipe.stages:
            # What was handed out before need not be decoded again.
            outside = [partial(_without, first=skip * recipe.batch_size), decode, batch]
        outside += [
            partial(
                masked,
                masking=recipe.masking,
                seed=recipe.seed,
                epoch=epoch if recipe.shuffle else 0,
                pad=recipe.pad,
                padded=recipe.padded,
            ),
            partial(_named, keep=recipe.with_keys),
            partial(_first, count=None if quota is None else quota - skip),
        ]
        return DataPipeline(partial(self._passes, epoch, here), *outside)

    def _inside(self, key: str, turn: int, readers: int) -> list[Stage]:
        # From tars to what batches are made of, once through the tars.
        recipe = self._recipe
        shuffle = partial(shuffled, size=recipe.shuffle, key=key)
        read: list[Stage] = [
            partial(checked_tars, sizes=recipe.records, pipes=recipe.pipes),
            partial(_turns, turn=turn, readers=readers),
        ]
        decode = partial(decoded, fields=recipe.fields, decoders=recipe.decoders)
        if recipe.text is not None:
            if recipe.fields is None:
                decode = partial(_texts, decoders=recipe.decoders)
            pack = partial(_packed, text=recipe.text, key=key, dropped=self._drop)
            return [*read, decode, *recipe.stages, pack, shuffle]
        after: list[Stage] = [decode, *recipe.stages] if recipe.stages else []
        return [*read, shuffle, *after]

    def plan(self, workers: int = 1, epoch: int = 0) -> Plan:
        """What ``epoch`` hands out, leaves out and repeats with so many loader workers; needs sizes.

        stream.plan(workers=4)      # Plan(batches=312, samples=19968, left_out=32, repeated=0)
        """
        recipe, here = self._recipe, self._world()
        if recipe.counts is None:
            raise ValueError(
                "the number of samples is not known (text, own stages, or tars without recorded sizes), so "
                "nobody can plan; record_tars counts what tars hold"
            )
        samples = repeated = read = 0
        has = self._samples(epoch, here.ranks, workers)
        takes = self._quotas(epoch, here.ranks, workers)
        for own, batches in zip(itertools.chain(*has), itertools.chain(*takes), strict=True):
            given = batches * recipe.batch_size
            given = given if recipe.batches_per_epoch is not None else min(own, given)
            samples, read = samples + given, read + min(own, given)
            repeated += max(0, given - own)
        return Plan(sum(takes[0]), samples, sum(recipe.counts) - read, repeated)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration epoch ``epoch``; a restored state in this very epoch keeps its place.

        Reaches loader workers that are alive, too.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        self._epochs.set(epoch)
        if self._loaded is not None and self._loaded.epoch != epoch:
            self._loaded = None
        self._at = None
        self._reader += 1

    def state_dict(self) -> dict[str, Any]:
        """Where this reader stands, JSON-able: the batches it handed out in this epoch."""
        world = self._world()
        if get_worker_info() is None and self._epochs.by_workers():
            raise StateError(
                "loader workers read this stream, and only they know how far; take the state of a "
                "torchdata StatefulDataLoader around it, or read with num_workers=0"
            )
        epoch, batches, finished = self._at or self._upcoming(world)
        return {
            **self._identity(),
            **_place(world),
            "epoch": epoch,
            "batches": batches,
            "finished": finished,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken, by reading again what was handed out in its epoch.

        Raises StateError where the state belongs to another order: other tars, seed, ranks or workers.
        """
        _check_state(state, {**self._identity(), **_place(self._world())})
        loaded = _Loaded(
            state["epoch"], state["batches"], state["finished"], _place(self._world()), os.getpid()
        )
        if get_worker_info() is not None:
            self._epochs.note(self._world().worker, loaded.epoch - (not loaded.finished))
        else:
            if loaded.finished:
                loaded = _Loaded(loaded.epoch + 1, 0, False, loaded.place, loaded.process)
            self._epochs.set(loaded.epoch)
        self._loaded, self._at = loaded, None
        self._reader += 1

    def _identity(self) -> dict[str, Any]:
        recipe = self._recipe
        # Where the tars are does not matter; their sizes do, for they are dealt by size.
        sizes = [recipe.records[url].samples if url in recipe.records else 1 for url in self.urls]
        names = [url.rpartition("/")[2] for url in self.urls]
        text = recipe.text
        return {
            "version": STATE_VERSION,
            "tars": hashlib.sha256(repr((names, sizes)).encode()).hexdigest()[:16],
            "seed": recipe.seed,
            "batch_size": recipe.batch_size,
            "shuffle": recipe.shuffle,
            "batches_per_epoch": recipe.batches_per_epoch,
            "drop_last": recipe.drop_last,
            "stages": len(recipe.stages),
            "text": text and [text.objective, text.seq_len, text.tokenizer.sha256],
        }

    def _begin(self, world: World) -> tuple[int, int, bool]:
        epoch, batches, finished = self._upcoming(world)
        if self._loaded is not None and (batches or finished):
            # The workers of a loader may be others than at loading.
            _check_state(self._loaded.place, _place(world))
        self._loaded = None
        if not finished:
            self._epochs.note(world.worker, epoch, _iteration(world))
        return epoch, batches, finished

    def _upcoming(self, world: World) -> tuple[int, int, bool]:
        epoch = self._epochs.upcoming(world.worker, _iteration(world))
        loaded = self._loaded
        if loaded is None:
            return epoch, 0, False
        # Loaded in this worker: it counts. Loaded before the workers were made: in its epoch alone.
        if (get_worker_info() and loaded.process == os.getpid()) or loaded.epoch == epoch:
            return loaded.epoch, loaded.batches, loaded.finished
        return epoch, 0, False

    def _world(self) -> World:
        found, given = World.detect(), self._recipe.world
        if given is None or given.workers > 1:
            return given or found
        return World(given.rank, given.ranks, found.worker, found.workers)

    def _shares(self, epoch: int, world: World) -> list[list[_Share]]:
        # By rank and worker: tars are dealt to ranks, so evenly as their sizes allow, and then to workers.
        # A rank's tars do not depend on its workers.
        recipe = self._recipe
        asked = (epoch, world.ranks, world.workers)
        if self._dealt is not None and self._dealt[0] == asked:
            return self._dealt[1]
        key = f"{recipe.seed}/{epoch}" if recipe.shuffle else None
        order = list(range(len(recipe.urls)))
        order = order if key is None else _permuted(order, key)
        sizes = {
            number: recipe.records[url].samples if url in recipe.records else 1
            for number, url in enumerate(recipe.urls)
        }
        if len(order) < world.ranks:  # all read all of them, and hand out their turn
            readers = world.ranks * world.workers
            table = [
                [_Share(order, r + world.ranks * w, readers) for w in range(world.workers)]
                for r in range(world.ranks)
            ]
        else:
            table = []
            for tars in _deal(order, sizes, world.ranks, key):
                if len(tars) < world.workers:
                    shares = [_Share(tars, w, world.workers) for w in range(world.workers)]
                else:
                    shares = [
                        _Share(hand, 0, 1) for hand in _deal(tars, sizes, world.workers, key)
                    ]
                table.append(shares)
        self._dealt = asked, table
        return table

    def _samples(self, epoch: int, ranks: int, workers: int) -> list[list[int]]:
        # By rank and worker.
        counts = self._recipe.counts
        assert counts is not None
        return [
            [
                max(0, -(-(sum(counts[tar] for tar in each.tars) - each.turn) // each.readers))
                for each in shares
            ]
            for shares in self._shares(epoch, World(0, ranks, 0, workers))
        ]

    def _quotas(self, epoch: int, ranks: int, workers: int) -> list[list[int]]:
        # Batches by rank and worker: those of a rank's workers add up to the same on every rank.
        recipe, size = self._recipe, self._recipe.batch_size
        total = recipe.batches_per_epoch
        if total is not None:
            return [[total // workers + (w < total % workers) for w in range(workers)]] * ranks
        samples = self._samples(epoch, ranks, workers)
        full = [[n // size if recipe.drop_last else -(-n // size) for n in own] for own in samples]
        total = min(map(sum, full))
        if not total and ranks > 1:
            raise EmptyEpoch(
                f"{sum(recipe.counts or ())} samples in {len(self.urls)} tars for {ranks} ranks of {workers} "
                f"workers make {[sum(each) for each in full][:8]} batches of {size}, and a rank without any "
                f"would stop the others; use fewer ranks or workers, smaller batches, or batches_per_epoch="
            )
        return [_trimmed(own, total) for own in full]

    def _quota(self, epoch: int, world: World) -> int | None:
        # None where a reader just ends with its tars.
        if self._recipe.batches_per_epoch is None and world.ranks == 1:
            return None
        self._check_ranks(world)
        return self._quotas(epoch, world.ranks, world.workers)[world.rank][world.worker]

    def _check_ranks(self, world: World) -> None:
        recipe = self._recipe
        if world.ranks == 1 or recipe.batches_per_epoch is not None or recipe.counts is not None:
            return
        tars = [-(-len(self.urls) // world.ranks), len(self.urls) // world.ranks]
        why = (
            "how many rows text packs to is not known before"
            if recipe.text is not None
            else "own stages may change how many samples there are"
            if recipe.stages
            else "nothing beside them says how many samples they hold"
        )
        raise ValueError(
            f"{len(self.urls)} tars for {world.ranks} ranks ({tars[0]} or {tars[1]} each), and {why}: one rank "
            f"would end before the others, which then wait for ever; give batches_per_epoch= (samples // "
            f"({world.ranks} ranks * batch size {recipe.batch_size}))"
            + (
                ""
                if recipe.text is not None or recipe.stages
                else ", sizes=, or record the sizes beside the tars once: record_tars(urls)"
            )
        )

    def _warn_of_turns(self, world: World) -> None:
        readers = world.ranks * world.workers
        whole = len(self.urls) < world.ranks
        shared = (
            "every reader reads all of them"
            if whole
            else "the workers of a rank read the same tars"
        )
        warnings.warn(
            f"{len(self.urls)} tars for {world.ranks} ranks x {world.workers} workers = {readers} readers: "
            f"{shared} and hands out every "
            f"{readers if whole else world.workers}th sample; at least {readers} tars would be read once",
            stacklevel=3,
        )

    def _passes(self, epoch: int, world: World) -> Iterator[Sample]:
        # The tars of this reader; again, in other orders, for as long as batches are asked for.
        from webdataset import DataPipeline

        recipe = self._recipe
        mine = self._shares(epoch, world)[world.rank][world.worker]
        own = f"{recipe.seed}/{epoch}/{world.rank}/{world.worker}"
        order = mine.tars
        for repeat in itertools.count():
            if repeat and recipe.shuffle:
                order = _permuted(sorted(order), f"{own}/{repeat}")
            samples = 0
            tars = partial(iter, [{"url": recipe.urls[number]} for number in order])
            inside = self._inside(f"{own}/{repeat}", mine.turn, mine.readers)
            for sample in DataPipeline(tars, *inside):
                samples += 1
                yield sample
            alone = world.ranks * world.workers == 1
            if not samples and (alone or recipe.batches_per_epoch is not None):
                what = f"row of {recipe.text.seq_len} tokens" if recipe.text else "sample"
                raise EmptyEpoch(
                    f"{len(order)} tars ({self.urls[order[0]]} is one) hold not one {what} for rank "
                    f"{world.rank} of {world.ranks}, worker {world.worker} of {world.workers}; give more "
                    f"data, or use fewer ranks and workers"
                )
            if recipe.batches_per_epoch is None:
                return

    def _drop(self, tokens: int) -> None:
        self._epochs.drop(self._world().worker, tokens)


@dataclass(frozen=True)
class _Loaded:
    """A state that was loaded and not gone on from yet."""

    epoch: int
    batches: int
    finished: bool
    place: Mapping[str, int]
    process: int


class _Epochs:
    """Which epoch it is, agreed on by the workers of an iteration without a word between them.

    Loader workers hold copies of a stream, and nobody tells them when an iteration begins. So every worker
    leaves in shared memory which epoch it began last, and in which iteration: who finds that another worker
    of this iteration began already, joins it; the first begins the one after all others.
    """

    def __init__(self) -> None:
        self.marks = torch.zeros(WORKERS, 3, dtype=torch.int64)  # iteration, epoch, tokens dropped
        self.marks[:, 1] = -1
        self.marks.share_memory_()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self.marks.is_shared():  # type: ignore[no-untyped-call]  # a copy that no loader made
            self.marks.share_memory_()  # type: ignore[no-untyped-call]

    def set(self, epoch: int) -> None:
        self.marks[:, 0], self.marks[:, 1] = 0, epoch - 1

    def note(self, worker: int, epoch: int, iteration: int = 0) -> None:
        # The epoch first: who sees the iteration goes by its epoch.
        self.marks[worker, 1] = epoch
        self.marks[worker, 0] = iteration

    def upcoming(self, worker: int, iteration: int) -> int:
        seen = self.marks.clone()
        joined = (seen[:, 0] == iteration) & (seen[:, 1] > seen[worker, 1])
        if iteration and bool(joined.any()):
            return int(seen[joined, 1].max())
        return int(seen[:, 1].max()) + 1

    def by_workers(self) -> bool:
        return bool(self.marks[:, 0].any())

    def drop(self, worker: int, tokens: int) -> None:
        self.marks[worker, 2] += tokens

    def dropped(self) -> int:
        return int(self.marks[:, 2].sum())


def _iteration(world: World) -> int:
    # Drawn by torch for every iteration of a loader, the same in all its workers; 0 outside of them. The
    # number of workers is part of it: a seed may come again, for a loader of another size.
    info = get_worker_info()
    return (
        0 if info is None else ((info.seed - info.id) ^ (world.workers << 1)) & (1 << 62) - 1 | 1
    )


def _place(world: World) -> dict[str, int]:
    return {"ranks": world.ranks, "worker": world.worker, "workers": world.workers}


def _check_state(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    needed = [*expected, *([] if "version" not in expected else ["epoch", "batches", "finished"])]
    if missing := [name for name in needed if name not in state]:
        raise StateError(f"the state lacks {missing}; it needs {needed}, as state_dict() gives")
    if state.get("version", 0) > STATE_VERSION:
        raise StateError(
            f"found a state of version {state['version']}, this siftloader reads up to {STATE_VERSION}; "
            f"upgrade siftloader"
        )
    for name, value in expected.items():
        if state[name] != value:
            cause = (
                "the order of tars depends on ranks and workers: resume on as many as it was saved on"
                if name in ("ranks", "worker", "workers")
                else "these tars have other names or sizes than those it was saved from"
                if name == "tars"
                else "build the stream it was saved from"
            )
            raise StateError(
                f"the state belongs to another order: {name} {state[name]!r} found, {value!r} expected; "
                f"{cause}, or begin an epoch without the state (set_epoch)"
            )
    for name in ("epoch", "batches"):
        found = state.get(name, 0)
        if not isinstance(found, int) or found < 0:
            raise StateError(
                f"{name} {found!r} found, a whole number from 0 expected; it is damaged"
            )


@dataclass(frozen=True)
class _Share:
    """The tars of a reader, in order; of their samples, every ``readers``-th from ``turn`` on is its own."""

    tars: list[int]
    turn: int
    readers: int


def _deal(
    order: list[int], sizes: Mapping[int, int], among: int, key: str | None
) -> list[list[int]]:
    # The largest first, each to whoever has least; among equals, chance decides who begins.
    hands: list[list[int]] = [[] for _ in range(among)]
    begins = list(range(among)) if key is None else _permuted(list(range(among)), f"{key}/hands")
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


def _permuted(numbers: list[int], key: str) -> list[int]:
    return sorted(numbers, key=lambda number: hashlib.sha256(f"{key}/{number}".encode()).digest())


# What is read: names, sizes, and arguments that say how.


def _require_webdataset() -> None:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(
            "reading tars of others needs the `webdataset` package; pip install 'siftloader[webdataset]'"
        ) from error
    del webdataset


def _check_whole(name: str, value: Any, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_stages(stages: Sequence[Stage], decoders: Mapping[str, Decoder] | None) -> None:
    from webdataset.utils import PipelineStage

    for stage in stages:
        if not callable(stage) and not isinstance(stage, PipelineStage):
            raise TypeError(
                f"stages are functions of an iterator, as stage(samples) -> iterator, got {stage!r}"
            )
    for name, decoder in (decoders or {}).items():
        if not callable(decoder):
            raise TypeError(f"decoders[{name!r}] must be a function of bytes, got {decoder!r}")


def _expanded(urls: Any, pipes: bool) -> tuple[str, ...]:
    given = [urls] if isinstance(urls, (str, os.PathLike)) else list(urls)
    found = [url for each in given for url in _expand(os.fspath(each), pipes)]
    if not found:
        raise ValueError("no tars: give at least one path, glob, folder or URL")
    twice = [url for url, times in Counter(found).items() if times > 1]
    if twice:
        raise ValueError(
            f"{twice[0]}: given twice ({len(twice)} such), and every sample would count double; give "
            f"every tar once"
        )
    missing = [url for url in found if not _is_remote(url) and not Path(url).is_file()]
    if missing:
        hint = (
            "; braces count as in train-{000000..000127}.tar"
            if re.search("[{}]", missing[0])
            else ""
        )
        raise ShardError(
            f"{len(missing)} of {len(found)} tars are not there: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''} (looked from {Path.cwd()}){hint}"
        )
    return tuple(found)


def _expand(url: str, pipes: bool) -> list[str]:
    from webdataset.shardlists import expand_urls

    if not isinstance(url, str):
        raise TypeError(f"tars are named by paths and URLs, got {url!r}")
    try:
        expanded = [url] if Path(url).exists() else expand_urls(url)
    except (ValueError, AssertionError, OSError) as error:
        raise ValueError(
            f"{url}: {error}; braces count as in train-{{000000..000127}}.tar, and ${{NAME}} needs WDS_NAME "
            f"in the environment"
        ) from error
    found: list[str] = []
    for each in expanded:
        if each.startswith("pipe:") and not pipes:
            raise ValueError(
                f"{each}: pipe: runs a shell command; give pipes=True if you trust these URLs, or a plain URL"
            )
        path = each.partition("file:")[2].removeprefix("//") if each.startswith("file:") else each
        if _is_remote(path):
            found.append(path)
        elif Path(path).is_dir():
            inside = sorted(str(file) for file in Path(path).iterdir() if _is_tar(file))
            if not inside:
                raise ShardError(
                    f"{path}: no tar in this folder; for those in folders below, give a glob"
                )
            found += inside
        elif re.search("[*?[]", path) and not Path(path).exists():
            inside = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - Path's has other rules
            if not inside:
                raise ShardError(f"{path}: no file matches (looked from {Path.cwd()})")
            found += inside
        else:
            found.append(path)
    return found


def _is_remote(url: str) -> bool:
    return is_url(url) or url.startswith("pipe:")


def _is_tar(path: Path) -> bool:
    return (kind_of(path.name) or ("",))[0] == "tar" and path.is_file()


def _stem(url: str) -> str:
    # "000001" of "folder/000001.tar.gz"
    return re.sub(r"(\.tar(\.\w+)?|\.tgz)$", "", url.rpartition("/")[2])


def _recorded(
    urls: Sequence[str], sizes: Mapping[str, int] | str | os.PathLike[str] | None
) -> dict[str, _Record]:
    # By tar, what is said of it: by the caller, else by the files beside it.
    if isinstance(sizes, Mapping):
        said = {
            **{
                _stem(str(name)): _record(size, None, "sizes=", name)
                for name, size in sizes.items()
            },
            **{str(name): _record(size, None, "sizes=", name) for name, size in sizes.items()},
        }
        records = {url: said[key] for url in urls for key in (_stem(url), url) if key in said}
        known = {*urls, *map(_stem, urls)}
        unknown = [name for name in sizes if name not in known and _stem(str(name)) not in known]
        if unknown:
            raise ValueError(
                f"sizes= knows {unknown[0]!r}, which is none of the {len(urls)} tars ({urls[0]} is one); name "
                f"them as they are named there"
            )
        return records
    if sizes is not None:
        told = _sidecar(os.fspath(sizes))
        return {url: told[_stem(url)] for url in urls if _stem(url) in told}
    found: dict[str, _Record] = {}
    beside: dict[Path, dict[str, _Record]] = {}
    for url in urls:
        if _is_remote(url):
            continue
        folder = Path(url).parent
        if folder not in beside:
            beside[folder] = _beside(folder)
        if _stem(url) in beside[folder]:
            found[url] = beside[folder][_stem(url)]
    return found


def _beside(folder: Path) -> dict[str, _Record]:
    merged: dict[str, _Record] = {}
    for name in ("dataset.json", "sizes.json", "manifest.jsonl"):
        if not (folder / name).is_file():
            continue
        for stem, record in _sidecar(str(folder / name)).items():
            before = merged.get(stem, record)
            if before.samples != record.samples:
                raise ShardError(
                    f"{folder}: {before.by} says that {stem} has {before.samples} samples, {record.by} "
                    f"{record.samples}; delete the one that is out of date",
                    shard=stem,
                )
            merged[stem] = record  # the manifest is last: it may have hashes
    return merged


def _sidecar(file: str) -> dict[str, _Record]:
    name = file.rpartition("/")[2]
    try:
        with open_file(File(file, None, "")) as stream:
            text = stream.read().decode()
        if name.endswith(".jsonl"):
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            said = [(line["shard"], line["num_sequences"], line.get("sha256")) for line in lines]
        else:
            about = json.loads(text)
            if isinstance(about, dict) and isinstance(about.get("shardlist"), list):
                said = [(each["url"], each.get("nsamples"), None) for each in about["shardlist"]]
                said = [each for each in said if each[1] is not None]
            elif name == "dataset.json":  # somebody's own
                return {}
            else:
                said = [(tar, size, None) for tar, size in about.items()]
    except (CorpusError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{file}: cannot be read as sizes of tars ({type(error).__name__}: {error}); needed is "
            f'{{"name.tar": samples, ...}}, or lines of {{"shard": "name", "num_sequences": samples}}; mend '
            f"or delete it"
        ) from error
    return {_stem(str(tar)): _record(size, digest, name, tar) for tar, size, digest in said}


def _record(samples: Any, sha256: Any, by: str, name: Any) -> _Record:
    if isinstance(samples, bool) or not isinstance(samples, (int, np.integer)) or samples < 0:
        raise ShardError(
            f"{by}: {name} has {samples!r} samples; a whole number is needed, so mend it"
        )
    return _Record(int(samples), sha256 if isinstance(sha256, str) else None, by)


def record_tars(urls: Any, pipes: bool = False) -> list[Path]:
    """Read tars once and write ``manifest.jsonl`` beside them: samples, bytes and sha256 of each.

    record_tars("data/train-{000000..000127}.tar")      # [Path("data/manifest.jsonl")]

    From then on epochs are equal on all ranks, and every byte is checked whenever it is read. Lines of other
    tars of these folders stay. Tars behind URLs cannot be written beside: ValueError.
    """
    _require_webdataset()
    found = _expanded(urls, pipes)
    if remote := [url for url in found if _is_remote(url)]:
        raise ValueError(
            f"{remote[0]}: nothing can be written beside a URL; give sizes={{name: samples}}"
        )
    lines: dict[Path, dict[str, dict[str, Any]]] = {}
    for url in found:
        reading = Reading()
        samples = sum(1 for _ in _samples(url, None, False, reading))
        lines.setdefault(Path(url).parent, {})[_stem(url)] = {
            "shard": _stem(url),
            "num_sequences": samples,
            "bytes": reading.bytes,
            "sha256": reading.hashes[0],
        }
    for folder, own in lines.items():
        manifest = folder / "manifest.jsonl"
        if (folder / "dataset.json").is_file() and "schema" in json.loads(
            (folder / "dataset.json").read_text(encoding="utf-8")
        ):
            raise ValueError(f"{manifest}: siftloader wrote these shards, and their manifest")
        if manifest.is_file():
            text = manifest.read_text(encoding="utf-8")
            kept = [json.loads(line) for line in text.splitlines() if line.strip()]
            own = {**{line["shard"]: line for line in kept}, **own}
        text = "".join(json.dumps(own[stem]) + "\n" for stem in sorted(own))
        write_atomically(manifest, text.encode())
    return [folder / "manifest.jsonl" for folder in lines]


def _described_by_us(urls: Sequence[str]) -> tuple[str | None, Tokenizer | None]:
    # Objective and tokenizer of shards that siftloader wrote, if all the tars are such.
    folders = {Path(url).parent for url in urls if not _is_remote(url)}
    if len(folders) != 1 or any(map(_is_remote, urls)):
        return None, None
    file = folders.pop() / "dataset.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        objective, tokenizer = about["objective"], Tokenizer(**about["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, None  # not there, or somebody else's
    if objective == "mlm-nsp":
        raise ValueError(f"{file.parent}: sentence pairs, which only TokenShards reads")
    return objective, tokenizer


def _text_of(
    tokenizer: Any, seq_len: int | None, objective: str | None, column: str
) -> tuple[_Text | None, Tokenizer | None]:
    if objective not in (None, "mlm", "clm"):
        raise ValueError(f'objective must be "mlm" or "clm", got {objective!r}')
    if tokenizer is None:
        if seq_len is not None:
            raise ValueError(
                "seq_len packs text to rows and needs a tokenizer=; rows that are token ids already keep "
                "their length"
            )
        return None, None
    if objective is None:
        raise ValueError(
            'a tokenizer needs objective="mlm" or "clm": its special tokens go by that'
        )
    if seq_len is None:
        raise ValueError(
            "a tokenizer needs seq_len=, the tokens of a row; for tars of token ids leave the tokenizer "
            "out and give masking=Mlm(...)"
        )
    _check_whole("seq_len", seq_len, 3 if objective == "mlm" else 2)
    if isinstance(tokenizer, (str, os.PathLike)):
        loaded, name = load_tokenizer(tokenizer), tokenizer
    else:
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)  # transformers wraps it
        if not hasattr(inner, "to_str"):
            raise TypeError(
                f"tokenizer must be a name, a path or a fast tokenizer, got {type(tokenizer).__name__}"
            )
        loaded, name = inner, type(tokenizer).__name__
    about = describe_tokenizer(loaded, name, objective)
    return _Text(loaded.to_str(), int(seq_len), objective, column, about), about


def _masking(masking: Any, objective: str | None, about: Tokenizer | None) -> Mlm | None:
    if masking is None or isinstance(masking, Mlm):
        return masking
    probability = 0.15 if masking == "auto" else masking
    if isinstance(probability, bool) or not isinstance(probability, float):
        raise TypeError(f'masking must be "auto", None, a probability or an Mlm, got {masking!r}')
    if objective != "mlm":
        if masking == "auto":
            return None
        raise ValueError('masking by probability needs objective="mlm"')
    if about is None:
        raise ValueError(
            'objective="mlm" needs to know what to mask with: masking=Mlm(mask_id=..., vocab_size=..., '
            "special_ids=...), or a tokenizer= for text"
        )
    return Mlm.of(about, probability)


# The stages, in the order in which samples go through them.


def checked_tars(
    source: Iterable[Mapping[str, str] | str],
    sizes: Mapping[str, int | _Record] | None = None,
    pipes: bool = False,
) -> Iterator[Sample]:
    """Samples of tars, undecoded: ``{"__key__", "__url__", extension: bytes, ...}``; whole tars or errors.

    list(checked_tars(["train-000000.tar"]))      # or {"url": ...}, as wds.SimpleShardList gives

    Refused, with tar and key: a damaged or missing header, an end that comes too early, anything behind the
    end, a sample or field that comes twice, fields that are not adjacent, links, and another number of
    samples than ``sizes`` has for a URL. Names without extension are passed over, as
    webdataset does. What comes from a URL is asked for again, and continued behind what was given already.
    """
    for each in source:
        url = each if isinstance(each, str) else each["url"]
        record = (sizes or {}).get(url)
        if isinstance(record, int):
            record = _Record(record, None, "sizes=")
        given = 0
        for attempt in itertools.count(1):
            try:
                samples = _samples(url, record, pipes, Reading())
                for sample in itertools.islice(samples, given, None):
                    given += 1
                    yield sample
                break
            except (FetchError, CorruptShard) as error:
                if not is_url(url) or url.startswith("pipe:"):
                    raise
                if attempt == TRIES:
                    raise type(error)(
                        f"{error}; asked for {TRIES} times", shard=error.shard
                    ) from error
                time.sleep(PAUSE * 2 ** (attempt - 1))


def _samples(url: str, record: _Record | None, pipes: bool, reading: Reading) -> Iterator[Sample]:
    count = 0
    with _opened(url, pipes, reading) as stream:
        for sample in _grouped(url, _members(url, stream)):
            count += 1
            yield sample
    if record is None:
        return
    if count != record.samples:
        raise CorruptShard(
            f"{url}: {count} samples found, {record.by} says {record.samples}; fetch the tar again, or "
            f"mend {record.by} if it is out of date",
            shard=_stem(url),
        )
    if record.sha256 is not None and reading.hashes != [record.sha256]:
        raise CorruptShard(
            f"{url}: sha256 {', '.join(reading.hashes)} found, {record.by} says {record.sha256}; bytes "
            f"changed since it was recorded: fetch the tar again",
            shard=_stem(url),
        )


@contextmanager
def _opened(url: str, pipes: bool, reading: Reading) -> Iterator[BinaryIO]:
    try:
        if _by_gopen(url, pipes):
            with _gopened(url) as stream:
                yield stream
        else:
            with open_file(File(url, None, ""), reading) as stream:
                yield stream
                while stream.read(1 << 20):  # a compressed tar may be longer than what is in it
                    pass
    except CorpusError as error:
        kind = (
            FetchError if _is_remote(url) else CorruptShard if Path(url).is_file() else ShardError
        )
        raise kind(str(error), shard=_stem(url)) from error


def _by_gopen(url: str, pipes: bool) -> bool:
    # What fsspec cannot open here is for webdataset's own commands: pipe:, ais:, gsutil, curl.
    if url.startswith("pipe:"):
        if not pipes:
            raise ValueError(f"{url}: pipe: runs a shell command; give pipes=True if you trust it")
        return True
    if not is_url(url):
        return False
    scheme = url.partition("://")[0]
    try:
        from fsspec import get_filesystem_class

        get_filesystem_class(scheme)
    except (ImportError, ValueError):
        from webdataset.gopen import gopen_schemes

        return scheme in gopen_schemes
    return False


@contextmanager
def _gopened(url: str) -> Iterator[Any]:
    from webdataset.gopen import gopen

    stream = gopen(url, "rb")
    process = getattr(stream, "proc", None)
    try:
        yield stream
        stream.close()
        if process is not None and process.returncode:  # webdataset lets 141 and 23 pass
            raise OSError("what came may not be all")
    except OSError as error:
        status = None if process is None else process.poll()
        raise FetchError(
            f"{url}: cannot be read ({error}; status of its command: {status}); try it again, or fetch "
            f"the file yourself and give its path",
            shard=_stem(url),
        ) from error
    finally:
        if process is not None and process.poll() is None:  # nobody reads on
            process.terminate()
            process.stdout.close()
            process.wait()


class _Header(tarfile.TarInfo):
    """The header of a member. tarfile takes a damaged one for the end of the tar, and says nothing."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        stream: Any = tar.fileobj
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            while chunk := stream.read(1 << 16):
                if chunk.strip(b"\0"):
                    raise tarfile.ReadError(
                        "something follows the end of the archive; if it is another tar, take the two apart"
                    ) from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(
                "no end-of-archive mark" if str(error) == "empty header" else str(error)
            ) from None


@dataclass(frozen=True)
class _Member:
    name: str
    data: bytes


def _members(url: str, stream: BinaryIO) -> Iterator[_Member]:
    place = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                place = member.offset
                if member.isdir():
                    continue
                inside = tar.extractfile(member) if member.isreg() else None
                if inside is None:
                    raise ShardError(
                        f"{url}: member {member.name!r} is a link or a device, which is never followed; "
                        f"write the tar with the files themselves",
                        shard=_stem(url),
                        byte=place,
                    )
                yield _Member(member.name, inside.read())
    except (tarfile.TarError, EOFError) as error:
        raise CorruptShard(
            f"{url}: damaged, cut short, or no tar ({error}; byte {place} begins the last member that was "
            f"whole or nearly so); fetch it again",
            shard=_stem(url),
            byte=place,
        ) from error


_META = re.compile(r"__[^/]*__($|/)|__meta__[.]")  # notes about the tar, no samples
_NAME = re.compile(
    r"((?:.*/|)[^./]+)[.]([^/]*)"
)  # up to the first dot of the last part is the key


def _grouped(url: str, members: Iterable[_Member]) -> Iterator[Sample]:
    sample: Sample = {}
    seen: set[str] = set()
    passed: list[str] = []
    for member in members:
        match = _NAME.fullmatch(member.name)
        if match is None or _META.match(member.name):
            passed.append(member.name)
            continue
        key, extension = match[1], match[2].lower()
        if key != sample.get("__key__"):
            if sample:
                yield sample
            if key in seen:
                raise ShardError(
                    f"{url}: sample {key!r} comes back at {member.name!r} after others; the fields of a sample "
                    f"must be adjacent and its key its own: write the tar again, sorted",
                    shard=_stem(url),
                )
            seen.add(key)
            sample = {"__key__": key, "__url__": url}
        if extension in sample:
            raise ShardError(
                f"{url}: sample {key!r} has {extension!r} twice; every sample needs a key of its own",
                shard=_stem(url),
            )
        sample[extension] = member.data
    if sample:
        yield sample
    elif passed and not all(map(_META.match, passed)):
        raise ShardError(
            f"{url}: no samples among {len(passed)} members ({passed[0]!r} is one); names must be "
            f"KEY.EXTENSION",
            shard=_stem(url),
        )


def _turns(source: Iterable[Sample], turn: int, readers: int) -> Iterator[Sample]:
    return itertools.islice(source, turn, None, readers)


def shuffled(source: Iterable[Any], size: int, key: str = "") -> Iterator[Any]:
    """The same samples, each drawn from ``size`` that wait; the same ``key``, the same order."""
    draw = random.Random(key).random
    waiting: list[Any] = []
    for sample in source:
        if len(waiting) < size:
            waiting.append(sample)
            continue
        if not size:
            yield sample
            continue
        at = int(draw() * size)
        waiting[at], sample = sample, waiting[at]
        yield sample
    while waiting:
        at = int(draw() * len(waiting))
        waiting[at], waiting[-1] = waiting[-1], waiting[at]
        yield waiting.pop()


def decoded(
    source: Iterable[Sample],
    fields: Sequence[str] | None = None,
    decoders: Mapping[str, Decoder] | None = None,
) -> Iterator[Sample]:
    """Fields decoded by their extensions, by nothing that runs code of the data.

    list(decoded(checked_tars(urls), fields=("jpg;png", "cls")))

    .txt str; .json what it says; .cls .id int; .npy array, .npz dict of arrays, no pickles inside; .jpg .png
    .webp uint8 [3, H, W]; any of them .gz too. ``decoders`` come first; other extensions stay bytes.
    ShardError with tar and key where a field is damaged, or missing: without ``fields``, those of the
    first sample are what all need.
    """
    own = {name.lstrip(".").lower(): each for name, each in (decoders or {}).items()}
    wanted = None if fields is None else [name.lower().lstrip(".").split(";") for name in fields]
    first: Sample | None = None
    for sample in source:
        chosen = _chosen(sample, wanted)
        if first is None:
            first = chosen
        elif wanted is None and set(map(_family, chosen)) != set(map(_family, first)):
            raise ShardError(
                f"{_where(sample)}: fields {_fields(chosen)}, but {_where(first)} has {_fields(first)}; choose "
                f"what all of them have: fields=(...), with ; between alternatives",
                shard=_stem(sample["__url__"]),
            )
        yield {
            name: value if name in _META_FIELDS else _decode(sample, name, value, own)
            for name, value in chosen.items()
        }


_META_FIELDS = ("__key__", "__url__")


def _chosen(sample: Sample, wanted: list[list[str]] | None) -> Sample:
    if wanted is None:
        return sample
    chosen = {name: sample[name] for name in _META_FIELDS}
    for names in wanted:
        name = next((each for each in names if each in sample), None)
        if name is None:
            raise ShardError(
                f"{_where(sample)}: no field {' or '.join(names)!r} among {_fields(sample)}; mend the tar, or "
                f"choose other fields",
                shard=_stem(sample["__url__"]),
            )
        chosen[name] = sample[name]
    return chosen


def _family(name: str) -> str:
    return "image" if name in IMAGES else name


def _fields(sample: Sample) -> list[str]:
    return [name for name in sample if name not in _META_FIELDS]


def _where(sample: Sample) -> str:
    return f"{sample['__url__']}: sample {sample['__key__']!r}"


def _decode(sample: Sample, name: str, data: Any, own: Mapping[str, Decoder]) -> Any:
    kind = name.removesuffix(".gz").rpartition(".")[2]
    decoder = next(
        (own[each] for each in (name, name.rpartition(".")[2], kind) if each in own), None
    )
    if decoder is None and kind in UNSAFE:
        raise ShardError(
            f"{_where(sample)}: .{kind} runs code of whoever wrote it, so it is not decoded; choose other "
            f"fields with fields=(...), or give decoders={{'.{kind}': your function}}",
            shard=_stem(sample["__url__"]),
        )
    try:
        if decoder is not None:
            return decoder(data)
        if name.endswith(".gz"):
            data = gzip.decompress(data)
        return _DECODERS.get(kind, bytes)(data)
    except ImportError as error:
        raise ShardError(f"{_where(sample)}: {error}", shard=_stem(sample["__url__"])) from error
    except Exception as error:  # a decoder may raise anything, and none of them knows the sample
        raise ShardError(
            f"{_where(sample)}: field {name!r} cannot be decoded ({type(error).__name__}: {error}); mend it, or "
            f"give decoders={{'.{kind}': ...}}",
            shard=_stem(sample["__url__"]),
        ) from error


def _image(data: bytes) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "decoding images needs the `Pillow` package; pip install pillow"
        ) from error
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _array(data: bytes) -> NDArray[Any]:
    # As np.load(allow_pickle=False). Nearly all its time goes into the header, which is alike in all samples.
    if data[:8] != b"\x93NUMPY\x01\x00":
        array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    else:
        begin = 10 + int.from_bytes(data[8:10], "little")
        shape, fortran, dtype = _npy_header(data[8:begin])
        array = np.frombuffer(data, dtype, math.prod(shape), begin)
        array = array.reshape(shape, order="F" if fortran else "C").copy()
    return array.astype(array.dtype.newbyteorder("="), copy=False)


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    if dtype.hasobject:
        raise ValueError("it holds Python objects, so a pickle")
    return shape, fortran, dtype


def _arrays(data: bytes) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


_DECODERS: dict[str, Decoder] = {
    **dict.fromkeys(("txt", "text", "transcript"), bytes.decode),
    **dict.fromkeys(("cls", "cls2", "id", "index", "inx"), int),
    **dict.fromkeys(("json", "jsn"), json.loads),
    **dict.fromkeys(IMAGES, _image),
    "npy": _array,
    "npz": _arrays,
}


def _texts(source: Iterable[Sample], decoders: Mapping[str, Decoder]) -> Iterator[Sample]:
    # Of each sample the field that holds text, and nothing else.
    names = ("txt", "text", "json", "jsn", "txt.gz", "json.gz")
    for sample in source:
        yield from decoded([sample], fields=(";".join(names),), decoders=decoders)


def packed(
    source: Iterable[Sample],
    tokenizer: Any,
    seq_len: int,
    objective: Literal["mlm", "clm"],
    column: str = "text",
) -> Iterator[Sample]:
    """Documents to rows of token ids, ``{"__key__", "__url__", "input_ids": [T]}``.

    packed(decoded(checked_tars(urls)), "gpt2", seq_len=1024, objective="clm")

    Documents run on from one row to the next, also from one tar to the next; what fills no row at the end is
    dropped.
    """
    text, _ = _text_of(tokenizer, seq_len, objective, column)
    if text is None:
        raise ValueError("packed needs a tokenizer: a name, a path or an object")
    return _packed(source, text)


def _packed(
    source: Iterable[Sample],
    text: _Text,
    key: str = "",
    dropped: Callable[[int], None] | None = None,
) -> Iterator[Sample]:
    tokenizer, words = _tokenizer(text.serialised)
    rest = Documents(np.empty(0, np.uint32), np.empty(0, np.int64))
    rows = 0
    for texts in _some(_plain(source, text.column)):
        ids, lengths = words.tokenise(texts) if words else tokenise(texts, tokenizer)
        whole = Documents(np.concatenate([rest.ids, ids]), np.concatenate([rest.lengths, lengths]))
        result = _pack(whole, text)
        rest = result.tail
        for row in result.rows:
            yield {"__key__": f"{key}/{rows}", "__url__": "", "input_ids": row}
            rows += 1
    if dropped is not None:
        dropped(len(rest.ids))


def _pack(documents: Documents, text: _Text) -> Packed:
    special = text.tokenizer.special_ids
    if text.objective == "clm":
        return pack_clm(documents, text.seq_len, eos=special["eos"])
    return pack_mlm(
        documents, text.seq_len, cls=special["cls"], sep=special["sep"], pad=special["pad"]
    )


@lru_cache(maxsize=2)
def _tokenizer(serialised: str) -> tuple[Any, Words | None]:
    # Kept from epoch to epoch, with the words it was asked for; made where it is used, not before a fork.
    tokenizer = restore_tokenizer(serialised)
    return tokenizer, Words.of(tokenizer)


def _plain(source: Iterable[Sample], column: str) -> Iterator[str]:
    for sample in source:
        names = _fields(sample)
        value = sample[names[0]] if len(names) == 1 else sample.get("txt", sample.get("json"))
        if isinstance(value, Mapping):
            value = value.get(column)
        if not isinstance(value, str):
            raise ShardError(
                f"{_where(sample)}: no text in .txt or under {column!r} of .json (fields {names}); name the key "
                f"with column=, the field with fields=(...), or leave the tokenizer out",
                shard=_stem(sample["__url__"]),
            )
        yield value


def _some(texts: Iterable[str]) -> Iterator[list[str]]:
    held: list[str] = []
    characters = 0
    for text in texts:
        held.append(text)
        characters += len(text)
        if characters >= TEXT:
            yield held
            held, characters = [], 0
    if held:
        yield held


def batched(source: Iterable[Sample], size: int, drop_last: bool = False) -> Iterator[Batch]:
    """``size`` samples at a time: images and classes as a tuple, anything else as a dict, stacked.

    Token ids, alone or named ``input_ids``, become int64 [n, T]; classes int64 [n]; what has no common shape
    stays a list. Dicts have ``__key__`` and ``__url__``, lists of str.
    """
    held: list[Sample] = []
    for sample in source:
        held.append(sample)
        if len(held) == size:
            yield _collated(held)
            held = []
    if held and not drop_last:
        yield _collated(held)


def _collated(samples: list[Sample]) -> Batch:
    names = _fields(samples[0])
    if {"image", "cls"} == set(map(_family, names)) and len(names) == 2:
        images = [next(each[n] for n in each if _family(n) == "image") for each in samples]
        alike = len({image.shape for image in images if isinstance(image, Tensor)}) == 1
        classes = torch.tensor([each["cls"] for each in samples], dtype=torch.int64)
        return (torch.stack(images) if alike else images, classes)
    batch: Sample = {name: [each[name] for each in samples] for name in _META_FIELDS}
    for name in names:
        values = [each.get(name) for each in samples]
        ids = [_token_ids(value) for value in values] if _holds_ids(name, names) else []
        if ids and all(each is not None for each in ids):
            batch["input_ids"] = _stacked_ids(samples, ids)
        else:
            batch[name.removesuffix(".npy")] = _stacked(values)
    return batch


def _holds_ids(name: str, names: list[str]) -> bool:
    base, _, kind = name.removesuffix(".gz").rpartition(".")
    return (base or kind) in IDS or (len(names) == 1 and name in ("npy", "json", "json.gz"))


def _token_ids(value: Any) -> NDArray[np.int64] | None:
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        value = np.array(value, np.int64)
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return value.astype(np.int64)
    return None


def _stacked_ids(samples: list[Sample], ids: list[Any]) -> Tensor:
    for sample, row in zip(samples, ids, strict=True):
        if len(row) != len(ids[0]):
            raise ShardError(
                f"{_where(sample)}: {len(row)} token ids, but {_where(samples[0])} has {len(ids[0])}; rows of a "
                f"batch need one length: pad or cut them in a stage of your own (stages=[...])",
                shard=_stem(sample["__url__"]),
            )
    return torch.from_numpy(np.stack(ids))


def _stacked(values: list[Any]) -> Any:
    if all(type(value) in (int, float) for value in values):
        return torch.tensor(values)
    if all(isinstance(value, np.ndarray) and value.dtype.kind in "biuf" for value in values):
        if len({(value.shape, value.dtype) for value in values}) == 1:
            return torch.from_numpy(np.stack(values))
        return [torch.from_numpy(value) for value in values]
    if all(isinstance(value, Tensor) for value in values) and len({v.shape for v in values}) == 1:
        return torch.stack(values)
    return values


def masked(
    source: Iterable[Batch],
    masking: Mlm | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    pad: int | None = None,
    padded: bool = False,
) -> Iterator[Batch]:
    """Labels for batches of ``input_ids``: BERT's masks by ``masking``, else the ids themselves.

    Masks are keyed by (seed, epoch, tar and key), so they depend on neither batch nor reader. ``padded`` adds an
    ``attention_mask``, 0 at ``pad``, which is never labelled. Other batches pass.
    """
    for batch in source:
        if not isinstance(batch, dict) or "input_ids" not in batch:
            yield batch
            continue
        ids = batch["input_ids"].numpy()
        real = np.ones(ids.shape, bool) if pad is None else ids != pad
        if masking is not None:
            keys = [
                f"{_stem(url)}/{key}"
                for url, key in zip(batch["__url__"], batch["__key__"], strict=True)
            ]
            try:
                ids, labels = masking(ids, _hashes(keys), seed=seed, epoch=epoch)
            except ValueError as error:
                raise ShardError(
                    f"{batch['__url__'][0]}: sample {batch['__key__'][0]!r} or one of its "
                    f"batch: {error}"
                ) from error
        else:
            labels = np.where(real, ids, IGNORED) if padded else ids.copy()
        made = {**batch, "input_ids": torch.from_numpy(ids)}
        if padded:
            made.setdefault("attention_mask", torch.from_numpy(real.astype(np.int64)))
        if masking is not None or "labels" not in made:
            made["labels"] = torch.from_numpy(labels)
        yield made


def _hashes(keys: list[str]) -> NDArray[np.int64]:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, "<i8").astype(np.int64)


def _without(source: Iterable[Any], first: int) -> Iterator[Any]:
    return itertools.islice(source, first, None)


def _first(source: Iterable[Any], count: int | None) -> Iterator[Any]:
    return itertools.islice(source, count)


def _named(source: Iterable[Batch], keep: bool) -> Iterator[Batch]:
    for batch in source:
        if isinstance(batch, dict) and not keep:
            batch = {name: value for name, value in batch.items() if name not in _META_FIELDS}
        yield batch
