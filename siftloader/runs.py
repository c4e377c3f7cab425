"""Runs: what one block of text became, on disk, with its samples sorted by random keys.

    write_run(path, Run(source=0, splits={"train": Samples(rows, labels)}, ...), seed=0, number=7)
    run = RunFile.open(path)
    rows = run.read("train.rows", 10, 20)      # samples 10..19 in the order of their keys

Every sample draws a 64-bit key from (seed, split, number of the block, its place in the block). The
final order of a split is the order of the keys: a true shuffle of all samples, whoever made them, with
however little memory. A run file appears at once or not at all, and ends in its own sha256: a finished
file is also the note that its block is done.

Letters: n samples, T tokens of a sample, D documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.errors import CorpusError
from siftloader.shards import write_atomically


SPLITS = ("train", "val")
MAGIC = b"siftrun1"
HEADER = 16  # bytes: the magic, and the length of the JSON after it
DIGEST = hashlib.sha256().digest_size  # bytes at the end: of everything before them
KEYS, PAIRS, COPIES = 1, 2, 3  # what random numbers are for: no two of them share a stream


@dataclass(frozen=True)
class Samples:
    """Samples of one split, rows [n, T], and their labels uint8 [n] where the objective has any."""

    rows: NDArray[Any]
    labels: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Run:
    """What a block became: samples by split, documents to be packed later, and what was counted.

    ``carried`` holds the arrays of documents that go on to the last stage, by name.
    """

    source: int
    samples: Mapping[str, Samples]
    carried: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    counted: Mapping[str, Any] = field(default_factory=dict)  # JSON


def sample_keys(count: int, seed: int, split: str, number: int) -> NDArray[np.uint64]:
    """The keys of a block's samples, the same for every version of numpy.

    The raw stream of a bit generator is guaranteed to stay as it is; ``Generator`` methods are not.
    """
    keys: NDArray[np.uint64] = stream(KEYS, seed, SPLITS.index(split), number).random_raw(count)
    return keys


def stream(purpose: int, *key: int) -> Any:
    """A bit generator of its own for every purpose and key."""
    return np.random.PCG64(np.random.SeedSequence((purpose, *key)))


def write_run(path: Path, run: Run, *, seed: int, number: int) -> RunFile:
    """Write ``run`` with its samples sorted by their keys; ties keep their order."""
    arrays: dict[str, NDArray[Any]] = {}
    for split, samples in run.samples.items():
        keys = sample_keys(len(samples.rows), seed, split, number)
        order = np.argsort(keys, kind="stable")
        arrays[f"{split}.keys"] = keys[order]
        arrays[f"{split}.rows"] = samples.rows[order]
        if samples.labels is not None:
            arrays[f"{split}.labels"] = samples.labels[order]
    arrays |= run.carried
    layout, at, pieces = {}, 0, []
    for name, array in arrays.items():
        data = np.ascontiguousarray(array)
        layout[name] = {"dtype": data.dtype.str, "shape": data.shape, "at": at}
        at += data.nbytes
        pieces.append(memoryview(data).cast("B") if data.size else b"")
    about = {
        "source": run.source,
        "counted": run.counted,
        "arrays": layout,
        "bytes": at,
    }
    header = json.dumps(about).encode()
    pieces = [MAGIC, len(header).to_bytes(HEADER - len(MAGIC), "little"), header, *pieces]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    write_atomically(path, b"".join([*pieces, digest.digest()]))
    return RunFile(path, HEADER + len(header), about)


@dataclass(frozen=True)
class RunFile:
    """A run on disk; arrays are read when asked for, as few bytes of them as asked for."""

    path: Path
    offset: int  # of the first array
    about: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> RunFile:
        """Read the header; raises CorpusError where the file is not a whole run."""
        try:
            with path.open("rb") as file:
                start, size = file.read(HEADER), path.stat().st_size
                length = int.from_bytes(start[len(MAGIC) :], "little")
                whole = start.startswith(MAGIC) and HEADER + length <= size
                about = json.loads(file.read(length)) if whole else {}
                whole = whole and size == HEADER + length + about["bytes"] + DIGEST
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read ({error}); run the same again") from error
        except (ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            raise CorpusError(f"{path}: not a whole run of samples; run the same again")
        return cls(path, HEADER + length, about)

    @property
    def source(self) -> int:
        """The index of the source all of it came from."""
        return int(self.about["source"])

    @property
    def counted(self) -> Mapping[str, Any]:
        """What the block's worker counted."""
        counted: Mapping[str, Any] = self.about["counted"]
        return counted

    def has(self, name: str) -> bool:
        """Whether there is such an array."""
        return name in self.about["arrays"]

    def count(self, name: str) -> int:
        """Its first dimension; 0 where there is no such array."""
        return int(self.about["arrays"][name]["shape"][0]) if self.has(name) else 0

    def carried(self) -> list[str]:
        """What the names of the carried arrays begin with: ``train.0``."""
        names = self.about["arrays"]
        return [name.removesuffix(".documents") for name in names if name.endswith(".documents")]

    def read(self, name: str, first: int = 0, end: int | None = None) -> NDArray[Any]:
        """Elements ``first`` to ``end`` of an array, along its first dimension."""
        found = self.about["arrays"][name]
        count, *rest = found["shape"]
        end = count if end is None else end
        dtype = np.dtype(found["dtype"])
        size = int(np.prod(rest, dtype=np.int64))  # elements in one
        at = self.offset + found["at"] + first * size * dtype.itemsize
        flat = np.fromfile(self.path, dtype, (end - first) * size, offset=at)
        return flat.reshape(end - first, *rest)

    def whole(self) -> bool:
        """Whether every byte is as it was written. Reads them all."""
        digest, left = hashlib.sha256(), self.offset + int(self.about["bytes"])
        with self.path.open("rb") as file:
            while left > 0 and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
            return file.read() == digest.digest()
