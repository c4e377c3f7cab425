"""What every pool decided, as a folder of Parquet files that any reader takes as one table.

    log = SelectionLog("runs/a/selections.parquet", rank=0)
    log.add(step, pool, ids, scores, index)          # [P], [P], [b]; never waits for the device
    log.flush()                                      # beside every checkpoint, and at the end of an epoch

A Parquet file without its footer cannot be read, so one file that grows would be lost in a crash. The
path is a folder of finished parts instead: each is written under a hidden name, synced, and renamed.
``pyarrow``, ``pandas`` and ``polars`` read the folder as one table; ``read_log`` also drops the rows that
a resumed run wrote again.

Letters: P candidates of a pool, b of them kept.
"""

from __future__ import annotations

import os
import re
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siftloader.errors import SiftError


PART = re.compile(r"rank-(\d{5,})-part-(\d{6,})\.parquet")
PART_ROWS = 65_536  # 0.5 MB: small enough to hold, large enough to compress
NEEDS = "a selection log needs the `pyarrow` package; pip install 'siftloader[log]'"


@final
class SelectionLog:
    """Writes one row per candidate: who it was, what it scored, whether it was kept.

    log = SelectionLog("selections.parquet", rank=world.rank)
    log.add(step=7, pool=3, ids=ids, scores=scores, kept=index)

    Columns: ``step`` int64, ``rank`` int32, ``pool`` int64, ``position`` int32 (place in the pool), ``id``
    int64, ``score`` float32, ``kept`` bool, ``labels`` int32 (labelled positions, -1 unknown), ``source``
    int32 (-1 unknown, or no such number). About 7 bytes a row in a data set of a million samples.

    ``ids`` says what the ids count: the fingerprint of a shard set, ``"batch"`` (a field of the batch) or
    ``"candidates"`` (no more than their order). A part is written once ``part_rows`` rows are there, once the last one is ``flush_seconds`` old, by
    ``flush()``, and when the log or the interpreter ends; a kill loses what came after the last part.
    A run in the folder of an earlier one adds parts and replaces none. Every rank writes its own.

    Raises ValueError where the path is a file or a folder with files of others, SiftError where
    pyarrow is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        rank: int = 0,
        *,
        ids: str = "",
        part_rows: int = PART_ROWS,
        flush_seconds: float = 60.0,
    ) -> None:
        if rank < 0:
            raise ValueError(f"rank must be 0 or more, got {rank}")
        if part_rows < 1:
            raise ValueError(f"part_rows must be at least 1 row, got {part_rows}")
        if not flush_seconds >= 0:
            raise ValueError(f"flush_seconds must be 0 or more seconds, got {flush_seconds}")
        self._part_rows, self._flush_seconds = part_rows, flush_seconds
        self._writer = _Writer(Path(path), rank, ids)
        # Not __del__: this also runs at interpreter exit, while imports still work.
        weakref.finalize(self, self._writer.write_all)

    @property
    def ids(self) -> str:
        """What the ids count, written beside the rows: the fingerprint of shards, or a word."""
        return self._writer.ids

    @ids.setter
    def ids(self, what: str) -> None:
        self._writer.ids = what

    def add(
        self,
        step: int,
        pool: int,
        ids: Tensor,
        scores: Tensor,
        kept: Tensor,
        labels: Tensor | None = None,
        sources: Tensor | None = None,
    ) -> None:
        """Note a pool: ``ids`` [P], ``scores`` [P], ``kept`` as bool [P] or as indices [b].

        ``labels`` [P] counts the labelled positions, ``sources`` [P] are indices of sources. Tensors
        on a GPU are copied behind the work already queued and looked at once they have arrived: nothing
        waits, and the originals may be reused at once. Raises ValueError for wrong shapes and types.
        """
        columns = {"id": ids, "score": scores, "labels": labels, "source": sources}
        for name, tensor in columns.items():
            if tensor is not None and (ids.ndim != 1 or tensor.shape != ids.shape):
                raise ValueError(
                    f"{name}: need one per candidate, [P], got {list(tensor.shape)} for ids "
                    f"{list(ids.shape)}"
                )
        if kept.ndim != 1 or (kept.dtype == torch.bool and kept.shape != ids.shape):
            raise ValueError(
                f"kept: need bool [P] or the indices [b] of the kept, got {kept.dtype} "
                f"{list(kept.shape)} for ids {list(ids.shape)}"
            )
        for name, tensor in (columns | {"kept": kept}).items():
            if name != "score" and tensor is not None and tensor.is_floating_point():
                raise ValueError(
                    f"{name}: need integers, got {tensor.dtype}; floats merge neighbours, float32 "
                    f"those above 16,777,216"
                )
        self._writer.pending.append(_Pending.of(step, pool, ids, scores, kept, labels, sources))
        self._writer.take_over()
        if self._writer.rows >= self._part_rows or self._writer.age() >= self._flush_seconds:
            self._writer.write()

    def flush(self) -> None:
        """Write all that was added; the one call that may wait for the GPU."""
        self._writer.write_all()


@dataclass(frozen=True)
class _Pending:
    """A pool whose tensors may still be on their way to the host."""

    step: int
    pool: int
    host: dict[str, Tensor]
    arrivals: tuple[torch.cuda.Event, ...]  # none where everything was on the host

    @classmethod
    def of(
        cls,
        step: int,
        pool: int,
        ids: Tensor,
        scores: Tensor,
        kept: Tensor,
        labels: Tensor | None,
        sources: Tensor | None,
    ) -> _Pending:
        given = {
            "id": (ids, torch.int64),
            "score": (scores, torch.float32),
            "kept": (kept, torch.bool if kept.dtype == torch.bool else torch.int64),
            "labels": (labels, torch.int32),
            "source": (sources, torch.int64),  # which of them fit is looked at on the host
        }
        host: dict[str, Tensor] = {}
        devices = set()
        for name, (tensor, dtype) in given.items():
            if tensor is not None:
                host[name] = _to_host(tensor.detach().to(dtype))
                devices |= {tensor.device} if tensor.is_cuda else set()
        return cls(step, pool, host, tuple(map(_recorded, devices)))

    def arrived(self) -> bool:
        """Whether the values are there; asks, never waits."""
        return all(bool(event.query()) for event in self.arrivals)  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait until they are."""
        for event in self.arrivals:
            event.synchronize()

    def columns(self, rank: int) -> dict[str, NDArray[Any]]:
        """The rows of the pool, every column [P], in memory of their own."""
        samples = len(self.host["id"])
        kept = self.host["kept"].numpy()
        if kept.dtype != np.bool_:
            index, kept = kept, np.zeros(samples, np.bool_)
            if len(index) and (index.min() < 0 or index.max() >= samples):
                raise ValueError(
                    f"pool {self.pool}: kept must be indices in 0..{samples - 1}, got "
                    f"{index.min()}..{index.max()}"
                )
            kept[index] = True
        unknown = np.full(samples, -1, np.int32)
        # Copies, because page-locked memory is better given back than kept until a part is full.
        return {
            "step": np.full(samples, self.step, np.int64),
            "rank": np.full(samples, rank, np.int32),
            "pool": np.full(samples, self.pool, np.int64),
            "position": np.arange(samples, dtype=np.int32),
            "id": self.host["id"].numpy().copy(),
            "score": self.host["score"].numpy().copy(),
            "kept": kept.copy(),
            "labels": self.host["labels"].numpy().copy() if "labels" in self.host else unknown,
            "source": _fitting(self.host["source"].numpy()) if "source" in self.host else unknown,
        }


def _fitting(sources: NDArray[np.int64]) -> NDArray[np.int32]:
    known = sources == sources.astype(np.int32)
    return np.where(known, sources, -1).astype(np.int32)


def _to_host(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def _recorded(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class _Writer:
    """Pools on their way, rows that arrived, and the folder they go to."""

    def __init__(self, folder: Path, rank: int, ids: str) -> None:
        _pyarrow()
        self.folder, self.rank, self.ids = folder, rank, ids
        self.number = _next_part(folder, rank)
        self.pending: deque[_Pending] = deque()
        self.rows = 0  # that arrived and are not written
        self._arrived: list[dict[str, NDArray[Any]]] = []
        self._written = time.monotonic()
        self._process = os.getpid()

    def age(self) -> float:
        """Seconds since the last part, 0 where there is nothing to write."""
        return time.monotonic() - self._written if self.rows else 0.0

    def take_over(self) -> None:
        """Take the pools whose values have arrived, oldest first."""
        while self.pending and self.pending[0].arrived():
            columns = self.pending.popleft().columns(self.rank)
            self._arrived.append(columns)
            self.rows += len(columns["id"])

    def write_all(self) -> None:
        """Wait for what is on its way and write it."""
        if os.getpid() != self._process:
            return  # a forked child: the rows are its parent's
        for pool in self.pending:
            pool.wait()
        self.take_over()
        self.write()

    def write(self) -> None:
        """Write what has arrived as one part; rows stay here until they are on the disk."""
        if not self.rows:
            self._written = time.monotonic()
            return
        with self._free_part() as part, _explained(part):
            hidden = part.with_name(f".{part.name}.part")  # readers skip a leading dot
            with hidden.open("wb") as file:
                _write_table(self._arrived, self.ids, file)
                file.flush()
                os.fsync(file.fileno())
            hidden.replace(part)
            _sync_folder(self.folder)
        self.number, self.rows, self._arrived = self.number + 1, 0, []
        self._written = time.monotonic()

    @contextmanager
    def _free_part(self) -> Iterator[Path]:
        # The next that is neither there nor being written: a log that nobody holds any more writes its rest when it
        # is collected, in whatever thread, and be it in the midst of another one's writing.
        while True:
            part = self.folder / _part(self.rank, self.number)
            name = str(part.absolute())  # whoever puts a str there first has it, without a lock
            if _WRITING.setdefault(name, self) is self:
                if not part.exists():
                    break
                del _WRITING[name]
            self.number += 1
        try:
            yield part
        finally:
            del _WRITING[name]


_WRITING: dict[str, _Writer] = {}  # parts that are being written, and by whom


def _part(rank: int, number: int) -> str:
    return f"rank-{rank:05d}-part-{number:06d}.parquet"


def _next_part(folder: Path, rank: int) -> int:
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{folder}: a file, and a selection log is a folder of Parquet files; give another path"
        )
    folder.mkdir(parents=True, exist_ok=True)
    last = -1
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "_")):
            continue  # readers skip it too
        named = PART.fullmatch(entry.name)
        if named is None:
            raise ValueError(
                f"{folder}: holds {entry.name}, which is not of a selection log; give a new folder or "
                f"that of an earlier log"
            )
        if int(named[1]) == rank:
            last = max(last, int(named[2]))
    return last + 1


@contextmanager
def _explained(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SiftError(
            f"{part}: the selection log cannot be written ({error}); make room, or train without it"
        ) from error


def _write_table(pools: list[dict[str, NDArray[Any]]], ids: str, file: Any) -> None:
    arrow, parquet = _pyarrow()
    table = arrow.table(
        {name: np.concatenate([pool[name] for pool in pools]) for name in pools[0]},
        metadata={"siftloader.ids": ids},
    )
    # Measured: 7.0 bytes a row, against 11.8 with zstd alone and 14.2 with the defaults. A dictionary
    # only costs where values hardly repeat.
    plain = {"id": "DELTA_BINARY_PACKED", "score": "BYTE_STREAM_SPLIT"}
    repeated = [name for name in table.column_names if name not in plain]
    parquet.write_table(
        table,
        file,
        compression="zstd",
        use_dictionary=repeated,
        column_encoding=plain,
        write_page_checksum=True,  # zstd alone does not notice every flipped bit
    )


def _sync_folder(folder: Path) -> None:
    # A rename is in the folder, and only a synced folder survives a power cut.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SiftError(NEEDS) from error
    return pyarrow, pyarrow.parquet
