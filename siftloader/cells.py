"""Runs to shards: every sample at its place in the order of all keys, in bounded memory.

    keys = count_keys(work, runs)
    for cell in plan_cells("train", keys["train"], samples_per_shard=32_768, shards_per_cell=4):
        written = write_cell(job, cell)

A *cell* is a range of keys that covers some whole shards. Its samples lie next to one another in every
run, because runs are sorted, so writing it takes one read of each run. How many shards a cell covers
follows from the memory there is, and changes nothing in the bytes.

Letters: N samples of a split, T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.errors import CorpusError
from siftloader.runs import SPLITS, RunFile
from siftloader.shards import Layout, Shard, sha256, write_atomically, write_shard


BUCKETS = 1 << 16  # keys are counted by their highest 16 bits
SHIFT = np.uint64(48)
COUNTED = 1 << 20  # ids that are counted at a time


@dataclass(frozen=True)
class Cell:
    """Whole shards of a split, and the keys their samples have; the task of the last stage."""

    split: str
    first_shard: int
    counts: tuple[int, ...]  # samples of each shard
    buckets: tuple[int, int]  # of the keys: from, to before
    skip: int  # samples of the first bucket that belong to the shard before

    @property
    def stems(self) -> list[str]:
        """The names of the shards."""
        numbers = range(self.first_shard, self.first_shard + len(self.counts))
        return [f"{self.split}-{number:06d}" for number in numbers]


@dataclass(frozen=True)
class Shuffle:
    """All that decides the shards of a cell, but the cell; sent to every worker once."""

    out: Path
    work: Path
    runs: tuple[str, ...]  # their names, in the order of their blocks
    layout: Layout
    vocab_size: int

    @property
    def digest(self) -> str:
        """Tells apart shards that a run before this one left, from other text."""
        return hashlib.sha256(repr(self.runs).encode()).hexdigest()[:16]


def count_keys(work: Path, runs: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """How many keys of a split have each of the 65,536 highest 16 bits, over all runs."""
    counts = {split: np.zeros(BUCKETS, np.int64) for split in SPLITS}
    for name in runs:
        run = RunFile.open(work / name)
        for split in SPLITS:
            if run.count(f"{split}.keys"):
                buckets = (run.read(f"{split}.keys") >> SHIFT).astype(np.int64)
                counts[split] += np.bincount(buckets, minlength=BUCKETS)
    return counts


def plan_cells(
    split: str, keys: NDArray[np.int64], samples_per_shard: int, shards_per_cell: int
) -> Iterator[Cell]:
    """Cut a split into cells of at most so many shards; the last shard takes the rest.

    ``keys`` is how many keys there are in each bucket, as ``count_keys`` gives it.
    """
    below = np.concatenate([[0], np.cumsum(keys)])  # samples with a lower bucket
    total, size = int(below[-1]), samples_per_shard * shards_per_cell
    for first in range(0, total, size):
        end = min(first + size, total)
        low = int(np.searchsorted(below, first, side="right")) - 1
        high = int(np.searchsorted(below, end, side="left"))
        counts = [min(samples_per_shard, end - at) for at in range(first, end, samples_per_shard)]
        yield Cell(
            split,
            first // samples_per_shard,
            tuple(counts),
            (low, high),
            first - int(below[low]),
        )


@dataclass(frozen=True)
class Written:
    """The shards of a cell, and how often each id occurs in them, int64 [V]."""

    shards: tuple[Shard, ...]
    unigrams: NDArray[np.int64]


def write_cell(job: Shuffle, cell: Cell) -> Written:
    """Write the shards of a cell, unless they are there to the last byte.

    Memory: the token ids of the cell, once more those of one shard, and some MiB.
    """
    unigrams = np.zeros(job.vocab_size, np.int64)
    shards = [
        _finished(job, stem, count, unigrams)
        for stem, count in zip(cell.stems, cell.counts, strict=True)
    ]
    if not all(shards):
        unigrams[:] = 0
        shards = list(_write(job, cell, unigrams))
    return Written(tuple(shard for shard in shards if shard), unigrams)


def _write(job: Shuffle, cell: Cell, unigrams: NDArray[np.int64]) -> Iterator[Shard]:
    arrays = _collect(job, cell)
    order = np.argsort(arrays["keys"], kind="stable")[cell.skip :]
    first = 0
    for stem, count in zip(cell.stems, cell.counts, strict=True):
        chosen = order[first : first + count]
        first += count
        rows = arrays["rows"][chosen]
        labels = arrays["labels"][chosen] if job.layout.labels else None
        shard = write_shard(
            job.out, stem, rows, arrays["sources"][chosen], job.layout, labels=labels
        )
        _count(rows, unigrams)
        write_atomically(_note(job, stem), json.dumps(asdict(shard)).encode())
        yield shard


def _collect(job: Shuffle, cell: Cell) -> dict[str, NDArray[Any]]:
    # Arrays over all samples with a key in the range, in the order of runs.
    found: list[tuple[RunFile, int, int, NDArray[np.uint64]]] = []
    for name in job.runs:
        run = RunFile.open(job.work / name)
        if not run.count(f"{cell.split}.keys"):
            continue
        keys = run.read(f"{cell.split}.keys")
        first, end = np.searchsorted(keys >> SHIFT, cell.buckets).tolist()
        if first < end:
            found.append((run, first, end, keys[first:end]))
    total = sum(end - first for _, first, end, _ in found)
    needed = cell.skip + sum(cell.counts)
    if total < needed:
        raise CorpusError(
            f"{job.work}: {total} samples for {cell.stems[0]}, {needed} expected; the files of this "
            f"unfinished run were changed: remove them, and run again"
        )
    arrays: dict[str, NDArray[Any]] = {
        "keys": np.concatenate([keys for _, _, _, keys in found]),
        "rows": np.empty((total, job.layout.seq_len), job.layout.dtype),
        "labels": np.empty(total if job.layout.labels else 0, np.uint8),
        "sources": np.empty(total, np.uint8),
    }
    at = 0
    for run, first, end, _ in found:
        here = slice(at, at + end - first)
        arrays["rows"][here] = run.read(f"{cell.split}.rows", first, end)
        if job.layout.labels:
            arrays["labels"][here] = run.read(f"{cell.split}.labels", first, end)
        arrays["sources"][here] = run.source
        at += end - first
    return arrays


def _note(job: Shuffle, stem: str) -> Path:
    return job.work / f"{stem}.{job.digest}.json"


def _count(rows: NDArray[Any], unigrams: NDArray[np.int64]) -> None:
    # A part at a time: counting takes eight bytes for every id.
    part = max(1, COUNTED // rows.shape[1])
    for first in range(0, len(rows), part):
        ids = rows[first : first + part].ravel()
        unigrams += np.bincount(ids, minlength=len(unigrams))


def _finished(job: Shuffle, stem: str, count: int, unigrams: NDArray[np.int64]) -> Shard | None:
    # The shard as noted, if it is the one wanted and its bytes are those; ids are counted on the way.
    layout = job.layout
    try:
        shard = Shard(**json.loads(_note(job, stem).read_bytes()))
        if (shard.shard, shard.num_sequences, shard.bytes) != (stem, count, layout.size(count)):
            return None
        data = np.memmap(job.out / f"{stem}.tar", np.uint8, mode="r")
        sources = (job.out / f"{stem}.sources.npy").read_bytes()
    except (OSError, ValueError, TypeError):
        return None
    if sha256(data) != shard.sha256 or sha256(sources) != shard.sources_sha256:
        return None
    if len(data) != shard.bytes:
        return None
    ids = np.ndarray(
        (count, layout.seq_len),
        layout.dtype,
        buffer=data,
        offset=layout.offset,
        strides=(layout.stride, np.dtype(layout.dtype).itemsize),
    )
    _count(ids, unigrams)
    return shard


def shards_per_cell(shards: int, workers: int, memory: int, shard_bytes: int) -> tuple[int, int]:
    """How many shards a cell may cover, and how many workers may write at once.

    A worker holds the ids of its cell, once more those of a shard, and what is small beside a third.
    """
    writers = max(1, min(workers, memory // (3 * shard_bytes), shards))
    most = memory // writers // shard_bytes - 2
    return max(1, min(most, -(-shards // (2 * writers)))), writers
