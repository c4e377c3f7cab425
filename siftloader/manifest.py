"""The manifest: which shards there are, as columns of numbers and hashes, about 70 bytes a shard.

    manifest = Manifest.parse(lines, size=layout.size)
    manifest[7]                       # Shard(shard='train-000007', num_sequences=32768, ...)
    manifest.of("train")              # those of a split, a view
    manifest.first_id(7)              # the global id of its first sample: ids count through the manifest

A line for each shard; their names are in order, so those of a split stand together.

Letters: S shards.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice, pairwise
from operator import itemgetter, ne
from typing import Any, final, overload

import numpy as np
from numpy.typing import NDArray

from siftloader.errors import ShardError


MANIFEST = "manifest.jsonl"
AGAIN = "copy the file again, or prepare the shards again"
AT_ONCE = 1024  # lines parsed together
STEP = 64  # of how many shards there is one running sum
FIELDS = {"shard", "num_sequences", "bytes", "sha256", "sources_sha256"}
MOST = 1_000_000  # samples of a shard: six digits number them


@dataclass(frozen=True)
class Shard:
    """A line of the manifest: what a finished shard must look like."""

    shard: str  # the stem: train-000000
    num_sequences: int
    bytes: int
    sha256: str
    sources_sha256: str

    @property
    def split(self) -> str:
        """The split, which is how the name begins."""
        return self.shard.partition("-")[0]


@final
class Manifest(Sequence[Shard]):
    """The shards of a data set in the order of their names; iterating makes one ``Shard`` at a time."""

    def __init__(
        self,
        names: Sequence[str],
        counts: NDArray[np.int32],
        hashes: NDArray[np.void],
        size: Callable[[int], int],
        first: int = 0,
        doubt: ShardError | None = None,
    ) -> None:
        self.doubt = doubt  # a size that does not fit; a fingerprint that does not fit says more
        self.counts = counts  # int32 [S]: samples
        self._names, self._hashes, self._size = names, hashes, size
        sums = np.add.reduceat(counts, range(0, len(counts), STEP), dtype=np.int64)
        self._marks = first + np.concatenate([np.zeros(1, np.int64), np.cumsum(sums)])

    @classmethod
    def parse(cls, lines: bytes, size: Callable[[int], int], where: str = MANIFEST) -> Manifest:
        """Read the bytes of a manifest; ``size`` says how many bytes that many samples take.

        Raises ShardError, naming the line, where one is not what it should be.
        """
        columns = _Columns(size, where)
        for number, some in _chunks(lines):
            columns.add(number, some)
        if not columns.counts:
            raise ShardError(f"{where}: needs at least one shard; {AGAIN}")
        counts = np.concatenate(columns.counts)
        hashes = np.concatenate(columns.hashes)
        return cls(_compact(columns.names), counts, hashes, size, doubt=columns.doubt)

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, index: int) -> Shard: ...

    @overload
    def __getitem__(self, index: slice) -> Manifest: ...

    def __getitem__(self, index: int | slice) -> Shard | Manifest:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step != 1 or last <= first:
                raise ValueError(f"a manifest is cut into whole, not empty pieces, got {index}")
            part = self.counts[first:last], self._hashes[first:last]
            return Manifest(self._names[first:last], *part, self._size, self.first_id(first))
        number = range(len(self))[index]
        hashes, count = bytes(self._hashes[number]).hex(), int(self.counts[number])
        return Shard(self._names[number], count, self._size(count), hashes[:64], hashes[64:])

    def __iter__(self) -> Iterator[Shard]:
        for name, count, hashes in zip(
            self._names, self.counts.tolist(), self._hashes, strict=True
        ):
            digits = hashes.tobytes().hex()
            yield Shard(name, count, self._size(count), digits[:64], digits[64:])

    def first_id(self, number: int) -> int:
        """The global id of the first sample of a shard; of what comes after the last one, too."""
        whole = number // STEP
        return int(self._marks[whole] + self.counts[whole * STEP : number].sum(dtype=np.int64))

    def of(self, split: str) -> Manifest | None:
        """The shards of a split, None where there are none."""
        first, last = self._bound(f"{split}-"), self._bound(f"{split}.")  # "." follows "-"
        return self[first:last] if first < last else None

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in order."""
        found, number = [], 0
        while number < len(self):
            found.append(self._names[number].partition("-")[0])
            number = self._bound(f"{found[-1]}.")
        return tuple(sorted(found))

    def _bound(self, name: str) -> int:
        # How many names come before this one.
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._names[middle] < name:
                low = middle + 1
            else:
                high = middle
        return low


_values = itemgetter("shard", "num_sequences", "bytes", "sha256", "sources_sha256")


def fingerprint(shards: Iterable[Shard], schema: Mapping[str, Any]) -> str:
    """Hex sha256 of what was written, never of where: a copy on another disk is the same data set."""
    # The JSON of {"schema": ..., "shards": [[name, samples, sha256, sha256], ...]}, a part at a time.
    digest = hashlib.sha256(f'{json.dumps({"schema": schema})[:-1]}, "shards": ['.encode())
    rest, between = iter(shards), ""
    while some := list(islice(rest, AT_ONCE)):
        part = [[s.shard, s.num_sequences, s.sha256, s.sources_sha256] for s in some]
        digest.update((between + json.dumps(part)[1:-1]).encode())
        between = ", "
    digest.update(b"]}\n")
    return digest.hexdigest()


def as_lines(shards: Iterable[Shard]) -> bytes:
    """The bytes of a manifest."""
    return b"".join(json.dumps(asdict(shard)).encode() + b"\n" for shard in shards)


class _Columns:
    """What was read so far, checked."""

    def __init__(self, size: Callable[[int], int], where: str) -> None:
        self.size, self.where = size, where
        self.doubt: ShardError | None = None
        self.names: list[Sequence[str]] = []
        self.counts: list[NDArray[np.int32]] = []
        self.hashes: list[NDArray[np.void]] = []

    def add(self, number: int, lines: list[bytes]) -> None:
        # number: of the first line, from 1
        try:
            read = json.loads(b"[" + b",".join(lines) + b"]")
            sound = len(read) == len(lines) and all(map(_sound, read))
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            read = [self._line(number + at, line) for at, line in enumerate(lines)]
        names, counts, sizes, hashes, sources = zip(*map(_values, read), strict=True)
        before = self.names[-1][-1:] if self.names else ()
        for one, other in pairwise((*before, *names)):
            if one >= other:
                raise ShardError(
                    f"{self.where}: {other} follows {one}, but it needs every name once and in order; "
                    f"{AGAIN}"
                )
        if self.doubt is None and any(map(ne, sizes, map(self.size, counts))):
            self.doubt = self._missized(read)
        self.names.append(names)
        self.counts.append(np.array(counts, np.int32))
        digits = "".join(chain.from_iterable(zip(hashes, sources, strict=True)))
        self.hashes.append(np.frombuffer(bytes.fromhex(digits), "V64"))

    def _line(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            shard = Shard(**json.loads(line))
            _check_types(shard)
        except (ValueError, TypeError, RecursionError) as error:
            raise ShardError(
                f"{self.where}: line {number} is not a manifest line ({error}); {AGAIN}"
            ) from error
        return asdict(shard)

    def _missized(self, read: Iterable[Mapping[str, Any]]) -> ShardError:
        name, count, size = next(
            (name, count, size)
            for name, count, size, *_ in map(_values, read)
            if size != self.size(count)
        )
        return ShardError(
            f"{self.where}: says that {name} has {count} samples and {size} bytes, but that many "
            f"samples take {self.size(count)}; {AGAIN}",
            shard=name,
        )


def _sound(line: Any) -> bool:
    # What _check_types asks for, at a glance: 10^5 lines are looked at in a fraction of a second.
    if not (isinstance(line, dict) and len(line) == len(FIELDS) and line.keys() == FIELDS):
        return False
    name, count, size, one, two = _values(line)
    return (
        type(name) is str
        and type(count) is type(size) is int
        and 0 <= count <= MOST
        and type(one) is type(two) is str
        and re.fullmatch("[0-9a-f]{128}", one + two) is not None
        and len(one) == 64
        and name.find("-") > 0
        and "/" not in name
        and "\\" not in name
    )


def _check_types(shard: Shard) -> None:
    if not isinstance(shard.shard, str) or "/" in shard.shard or "\\" in shard.shard:
        raise TypeError(f"shard must be a name, got {shard.shard!r}")
    if shard.shard.find("-") < 1:
        raise ValueError(f"shard must begin with its split, as train-000000, got {shard.shard!r}")
    for name in ("num_sequences", "bytes"):
        value = getattr(shard, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise TypeError(f"{name} must be a whole number, got {value!r}")
    if shard.num_sequences > MOST:
        raise ValueError(f"a shard has at most {MOST:,} samples, got {shard.num_sequences:,}")
    for name in ("sha256", "sources_sha256"):
        value = getattr(shard, name)
        if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise ValueError(f"{name} must be 64 hexadecimal digits, got {value!r}")


def _chunks(lines: bytes) -> Iterator[tuple[int, list[bytes]]]:
    # Never all lines at once: 10^5 of them would take 50 MB for a moment.
    start, number = 0, 1
    while start < len(lines):
        some: list[bytes] = []
        while start < len(lines) and len(some) < AT_ONCE:
            end = lines.find(b"\n", start)
            end = len(lines) if end < 0 else end
            some.append(lines[start:end].removesuffix(b"\r"))
            start = end + 1
        yield number, some
        number += len(some)


@final
class _Counting(Sequence[str]):
    """Names as our preparation gives them: train-000000, train-000001, ...; no memory at all."""

    def __init__(self, parts: Sequence[tuple[str, int, int]]) -> None:
        self._parts = parts  # split, first number, how many

    def __len__(self) -> int:
        return sum(count for _, _, count in self._parts)

    def __iter__(self) -> Iterator[str]:
        for split, number, count in self._parts:
            for each in range(number, number + count):
                yield f"{split}-{each:06d}"

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> _Counting: ...

    def __getitem__(self, index: int | slice) -> str | _Counting:
        if isinstance(index, slice):
            first, last, _ = index.indices(len(self))
            parts = []
            for split, number, count in self._parts:
                a, b = min(max(first, 0), count), min(max(last, 0), count)
                if a < b:
                    parts.append((split, number + a, b - a))
                first, last = first - count, last - count
            return _Counting(parts)
        for split, number, count in self._parts:
            if index < count:
                return f"{split}-{number + index:06d}"
            index -= count
        raise IndexError(index)


def _compact(names: Iterable[Sequence[str]]) -> Sequence[str]:
    parts: list[tuple[str, int, int]] = []
    for name in chain.from_iterable(names):
        split, _, digits = name.partition("-")
        if not (len(digits) == 6 and digits.isascii() and digits.isdigit()):
            return list(chain.from_iterable(names))
        number = int(digits)
        if parts and parts[-1][0] == split and sum(parts[-1][1:]) == number:
            parts[-1] = (split, parts[-1][1], parts[-1][2] + 1)
        else:
            parts.append((split, number, 1))
    return _Counting(parts) if len(parts) <= STEP else list(chain.from_iterable(names))
