"""Token shards on disk, both directions: a standard tar that is also an array.

Member ``i`` of ``train-000000.tar`` is ``train-000000-<i>.input_ids.npy``: 512 bytes of USTAR header,
128 of NPY header, ``T`` token ids, zeros to the next multiple of 512. Shards of sentence pairs have a
second member right after it, ``train-000000-<i>.cls``, whose one byte is the label. So sample ``i`` sits
at ``i * stride``, any tar or WebDataset tool reads the file, and we read it as one strided view.

    dataset = ShardSet.open("shards/demo")
    ids = dataset.read(dataset.shards("train")[0])    # [N, T] uint16, a view of the mapped file

The header of every sample carries the CRC-32 of its content (token ids, then the label, if there is one) in
two fields that mean nothing for a regular file: devmajor holds the high 16 bits, devminor the low ones. So
every byte of a shard follows from stem, token ids and labels, and damage is named to the sample and byte.

Beside the tars, never inside: ``manifest.jsonl`` (a line per shard: name, count, bytes, hashes; written
last), ``dataset.json`` (what the ids mean), ``<shard>.sources.npy`` (uint8 [N]) and ``unigrams.npy``
(int64 [V], how often each id occurs in the train split).

Letters: N samples of a shard, n of a chunk, T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from siftloader.errors import CorruptShard, FetchError, ShardError
from siftloader.manifest import (
    AGAIN,
    MANIFEST as MANIFEST,
    MOST,
    Manifest,
    Shard as Shard,
    as_lines,
    fingerprint,
)
from siftloader.storage import Folder, LocalFolder, open_folder


BLOCK = 512  # tar pads everything to this
END = b"\0" * (2 * BLOCK)  # two zero blocks end a tar
NPY_HEADER = 128  # NPY v1 header of a 1-D array: magic, version, length, dict, padding
AT_ONCE = 1 << 22  # bytes of a shard read at once where it is hashed
CHUNK = 1 << 21  # bytes of a shard encoded or checked at once
CHECKSUM, DEVMAJOR, DEVMINOR = 148, 329, 337  # where a USTAR header has them, 8 bytes each
ZERO = ord("0")
FORMAT_VERSION = 1
ATTEMPTS = 3  # to open a copy that others evict
DESCRIPTION = "dataset.json"
UNIGRAMS = "unigrams.npy"


@dataclass(frozen=True)
class Layout:
    """Where the tokens of sample ``i`` are: arithmetic, not an index.

    Layout(seq_len=512, dtype="<u2").stride == 2048   # bytes
    Layout(seq_len=512, labels=True).stride == 3072   # a second member, of one byte
    """

    seq_len: int
    dtype: str = "<u2"
    labels: bool = False  # whether a member ``.cls``, "0" or "1", follows the ids of every sample

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1 token, got {self.seq_len}")
        if self.dtype not in ("<u2", "<u4"):
            raise ValueError(f'dtype must be "<u2" or "<u4", got {self.dtype!r}')

    @classmethod
    def for_vocabulary(cls, seq_len: int, vocab_size: int, labels: bool = False) -> Layout:
        """Two bytes a token up to 65,536 ids, four above."""
        return cls(seq_len, "<u2" if vocab_size <= 1 << 16 else "<u4", labels)

    @property
    def payload(self) -> int:
        """Bytes of token ids in a sample."""
        return self.seq_len * np.dtype(self.dtype).itemsize

    @property
    def offset(self) -> int:
        """Bytes from the start of a sample to its first token."""
        return BLOCK + NPY_HEADER

    @property
    def label_header(self) -> int:
        """Bytes from the start of a sample to the end of its ids, where a label's member begins."""
        return BLOCK + -(-(NPY_HEADER + self.payload) // BLOCK) * BLOCK

    @property
    def label(self) -> int:
        """Bytes from the start of a sample to its label, if it has one."""
        return self.label_header + BLOCK

    @property
    def stride(self) -> int:
        """Bytes from one sample to the next."""
        return self.label_header + (2 * BLOCK if self.labels else 0)

    def size(self, samples: int) -> int:
        """Bytes of a shard of that many samples."""
        return samples * self.stride + len(END)


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer the ids came from; ``special_ids`` are never masked."""

    name: str
    sha256: str
    vocab_size: int
    special_ids: Mapping[str, int] = field(default_factory=dict)  # pad, unk, cls, sep, mask, eos


@dataclass(frozen=True)
class Source:
    """Where text came from: the index of a source is what ``<shard>.sources.npy`` holds."""

    name: str
    sha256: str
    documents: int
    tokens: int = 0  # of both splits, as often as they were packed
    weight: float = 1.0  # how often the documents of the train split were used


def encode(
    stem: str, ids: NDArray[Any], layout: Layout, labels: NDArray[Any] | None = None
) -> Iterator[memoryview]:
    """The bytes of a shard that holds the rows of ``ids`` [N, T], a chunk of about 2 MiB at a time.

    Raises ValueError where an id does not fit the dtype: a cast would wrap it in silence.
    """
    rows = np.asarray(ids)
    if rows.ndim != 2 or rows.shape[1] != layout.seq_len:
        raise ValueError(f"{stem}: need ids of shape [N, {layout.seq_len}], got {rows.shape}")
    limit = np.iinfo(layout.dtype).max
    if rows.size and (rows.min() < 0 or rows.max() > limit):
        raise ValueError(
            f"{stem}: ids must lie in 0..{limit} for dtype {layout.dtype}, "
            f"got {rows.min()}..{rows.max()}"
        )
    if len(rows) > MOST:
        raise ValueError(f"{stem}: at most {MOST:,} samples fit six digits, got {len(rows):,}")
    return _chunks(stem, rows, layout, _checked_labels(stem, len(rows), layout, labels))


def _checked_labels(
    stem: str, samples: int, layout: Layout, labels: NDArray[Any] | None
) -> NDArray[np.uint8] | None:
    # The byte that is stored for each sample, [N, 1].
    if not layout.labels:
        if labels is not None:
            raise ValueError(f"{stem}: this layout has no labels; use Layout(..., labels=True)")
        return None
    if labels is None or np.shape(labels) != (samples,):
        found = "none" if labels is None else f"an array of shape {np.shape(labels)}"
        raise ValueError(f"{stem}: need one label, 0 or 1, per sample ({samples}), got {found}")
    known = np.asarray(labels)
    if not np.isin(known, (0, 1)).all():
        wrong = int((~np.isin(known, (0, 1))).argmax())
        raise ValueError(f"{stem}: labels must be 0 or 1, got {known[wrong]} for sample {wrong}")
    return known.astype(np.uint8)[:, None] + np.uint8(ZERO)


def _chunks(
    stem: str, ids: NDArray[Any], layout: Layout, labels: NDArray[np.uint8] | None
) -> Iterator[memoryview]:
    for first, last in _spans(len(ids), layout):
        rows = np.ascontiguousarray(ids[first:last], dtype=layout.dtype).view(np.uint8)
        marks = None if labels is None else labels[first:last]
        yield memoryview(_encoded(stem, first, rows, marks, layout)).cast("B")
    yield memoryview(END)


def _spans(samples: int, layout: Layout) -> Iterator[tuple[int, int]]:
    # Bounded memory: that many samples at a time.
    step = max(1, CHUNK // layout.stride)
    for first in range(0, samples, step):
        yield first, min(first + step, samples)


def _encoded(
    stem: str,
    first: int,
    tokens: NDArray[np.uint8],
    labels: NDArray[np.uint8] | None,
    layout: Layout,
) -> NDArray[np.uint8]:
    # Samples [n, stride], numbered from `first`, of token bytes [n, payload] and label bytes [n, 1].
    samples = np.arange(first, first + len(tokens))
    out = np.zeros((len(tokens), layout.stride), np.uint8)
    crcs = _crcs(tokens, labels)
    out[:, :BLOCK] = _npy_headers(stem, samples, crcs, layout)
    out[:, BLOCK : layout.offset] = np.frombuffer(_npy_header(layout), np.uint8)
    out[:, layout.offset : layout.offset + layout.payload] = tokens
    if labels is not None:
        out[:, layout.label_header : layout.label] = _label_headers(stem, samples)
        out[:, layout.label : layout.label + 1] = labels
    return out


def _crcs(tokens: NDArray[np.uint8], labels: NDArray[np.uint8] | None) -> NDArray[np.int64]:
    # CRC-32 of the content of each sample, [n].
    found = [zlib.crc32(row) for row in tokens]
    if labels is not None:
        found = [zlib.crc32(label, crc) for label, crc in zip(labels, found, strict=True)]
    return np.array(found, np.int64)


def _npy_header(layout: Layout) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {"descr": layout.dtype, "fortran_order": False, "shape": (layout.seq_len,)},
    )
    header = buffer.getvalue()
    assert len(header) == NPY_HEADER, len(header)
    return header


def _npy_headers(
    stem: str, samples: NDArray[np.int64], crcs: NDArray[np.int64], layout: Layout
) -> NDArray[np.uint8]:
    headers = _tar_headers(stem, samples, "input_ids.npy", NPY_HEADER + layout.payload)
    for at, half in ((DEVMAJOR, crcs >> 16), (DEVMINOR, crcs & 0xFFFF)):
        headers[:, at : at + 7] = _digits(half, 7, base=8)
        headers[:, at + 7] = 0
    return _summed(headers)


def _label_headers(stem: str, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
    return _summed(_tar_headers(stem, samples, "cls", 1))


def _tar_headers(
    stem: str, samples: NDArray[np.int64], member: str, size: int
) -> NDArray[np.uint8]:
    # [n, 512]: the standard library writes the first header, the others differ in name and checksum.
    info = tarfile.TarInfo(f"{stem}-000000.{member}")
    info.size, info.mode, info.mtime = size, 0o444, 0
    template = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), np.uint8)
    headers = np.tile(template, (len(samples), 1))
    at = len(stem) + 1
    headers[:, at : at + 6] = _digits(samples, 6, base=10)
    return headers


def _summed(headers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    headers[:, CHECKSUM : CHECKSUM + 8] = ord(" ")  # what stands in the field while it is summed
    headers[:, CHECKSUM : CHECKSUM + 6] = _digits(headers.sum(axis=1, dtype=np.int64), 6, base=8)
    headers[:, CHECKSUM + 6] = 0
    return headers


def _digits(numbers: NDArray[np.int64], width: int, base: int) -> NDArray[np.uint8]:
    powers = base ** np.arange(width - 1, -1, -1)
    return (numbers[:, None] // powers % base + ZERO).astype(np.uint8)


def check_samples(stem: str, raw: NDArray[np.uint8], samples: int, layout: Layout) -> None:
    """Raise CorruptShard, naming sample and byte, unless ``raw`` is what ``encode`` writes.

    With the size known to be right, this makes the strided view the only possible reading. A shard from
    before samples had checksums is a ShardError: nothing can be said of it.
    """
    body = raw[: samples * layout.stride].reshape(samples, layout.stride)
    for first, last in _spans(samples, layout):
        found = body[first:last]
        expected, wrong = _compared(stem, first, found, layout)
        if wrong.any():
            if first == 0 and _without_checksums(found[:8], expected[:8]):
                raise ShardError(
                    f"{stem}: {stem}.tar was written by an older siftloader without checksums, so no "
                    f"sample of it can be checked; prepare it again",
                    shard=stem,
                )
            row = int(wrong.argmax())
            raise _damaged(stem, first + row, found[row], expected[row], layout)
    if raw[samples * layout.stride :].any():
        byte = samples * layout.stride + int((raw[samples * layout.stride :] != 0).argmax())
        raise CorruptShard(
            f"{stem}: byte {byte} of {stem}.tar, after the last sample, is {raw[byte]:#04x} where 0x00 "
            f"was written; {AGAIN}",
            shard=stem,
            byte=byte,
        )


def damaged_samples(
    stem: str, raw: NDArray[np.uint8], samples: int, layout: Layout
) -> NDArray[np.bool_]:
    """Which samples of a shard are not what ``encode`` writes, bool [N]; ``raw`` has the right size."""
    body = raw[: samples * layout.stride].reshape(samples, layout.stride)
    found = [
        _compared(stem, first, body[first:last], layout)[1]
        for first, last in _spans(samples, layout)
    ]
    return np.concatenate([np.zeros(0, bool), *found])


def _compared(
    stem: str, first: int, found: NDArray[np.uint8], layout: Layout
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    # What samples [n, stride] would be written as, and which of them differ from it.
    tokens = found[:, layout.offset : layout.offset + layout.payload]
    labels = found[:, layout.label : layout.label + 1] if layout.labels else None
    expected = _encoded(stem, first, tokens, labels, layout)
    wrong: NDArray[np.bool_] = (found != expected).any(axis=1)
    if labels is not None:
        wrong |= ~np.isin(labels[:, 0], (ZERO, ZERO + 1))
    return expected, wrong


def _without_checksums(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> bool:
    # Whether samples [n, stride] differ from what is expected in one thing: no CRC was ever written.
    fields = slice(DEVMAJOR, DEVMINOR + 8)
    if not np.isin(found[:, fields], (0, ZERO)).all():
        return False
    plain = expected.copy()
    plain[:, fields] = found[:, fields]  # zeros or nothing, as the tarfile of the day had it
    _summed(plain[:, :BLOCK])
    return bool((plain == found).all())


def _damaged(
    stem: str, sample: int, found: NDArray[np.uint8], expected: NDArray[np.uint8], layout: Layout
) -> CorruptShard:
    # The error for a sample whose bytes are not those that its own token ids would be written as.
    first, last, written = _blame(stem, sample, found, expected, layout)
    byte = sample * layout.stride + first
    if other := _other_name(found, expected):
        same = re.fullmatch(rf"{re.escape(stem)}-\d{{6}}\.input_ids\.npy", other)
        it = (
            "another sample of the same shard in its place"
            if same
            else "another shard under its name"
        )
        what = f"byte {byte} of {stem}.tar: found {other!r}, so this is {it}"
    elif written is not None:
        what = (
            f"byte {byte} of {stem}.tar ({_part(first, layout)}): found {found[first]:#04x} where "
            f"{written:#04x} was written"
        )
    elif first == last:
        what = f"byte {byte} of {stem}.tar: a label must be 0 or 1, found {found[first]:#04x}"
    else:
        end = sample * layout.stride + last
        parts = " to ".join(dict.fromkeys(_part(at, layout) for at in (first, last)))
        what = f"in bytes {byte}..{end} of {stem}.tar ({parts}): not what was written"
    return CorruptShard(
        f"{stem}: sample {sample}, {what}; {AGAIN}", shard=stem, sample=sample, byte=byte
    )


def _blame(
    stem: str, sample: int, found: NDArray[np.uint8], expected: NDArray[np.uint8], layout: Layout
) -> tuple[int, int, int | None]:
    # The first and last byte of a sample that may be wrong, and what was written where they are one.
    different = np.flatnonzero(found != expected)
    stored, computed = _stored_crc(found), _stored_crc(expected)
    assert computed is not None
    if stored is None or stored == computed:
        sound = False
    else:
        crc = np.array([stored], np.int64)
        header = _npy_headers(stem, np.array([sample]), crc, layout)[0]
        sound = bool((found[:BLOCK] == header).all())
    if sound and stored is not None:  # the header fits itself, so what it speaks of does not
        elsewhere = different[different >= BLOCK].tolist()
        end = layout.offset + layout.payload
        content = [*range(layout.offset, end), *([layout.label] if layout.labels else [])]
        single = None if elsewhere else single_byte(len(content), stored ^ computed)
        if single is not None:
            at = content[single[0]]
            return at, at, int(found[at]) ^ single[1]
        return min([content[0], *elsewhere]), max([content[-1], *elsewhere]), None
    if not len(different):
        return layout.label, layout.label, None
    first, last = int(different[0]), int(different[-1])
    return first, last, int(expected[first]) if first == last else None


def _stored_crc(sample: NDArray[np.uint8]) -> int | None:
    halves = [bytes(sample[at : at + 7]) for at in (DEVMAJOR, DEVMINOR)]
    if any(set(half) - set(b"01234567") for half in halves):
        return None
    high, low = (int(half, 8) for half in halves)
    return high << 16 | low if high <= 0xFFFF and low <= 0xFFFF else None


def single_byte(length: int, difference: int) -> tuple[int, int] | None:
    """Which byte of ``length`` explains that two CRC-32s differ by that xor, and by which xor itself.

    The difference depends on position and xor alone, and no two of them share it in 32,769 bytes.
    """
    table = np.array([zlib.crc32(bytes([value])) for value in range(256)], np.uint32)
    table ^= np.uint32(zlib.crc32(b"\0"))
    effect, found = table[1:], []  # [255]: of each xor, at the last byte first
    for at in range(length - 1, -1, -1):
        found += [(at, int(hit) + 1) for hit in np.flatnonzero(effect == np.uint32(difference))]
        effect = table[effect & np.uint32(0xFF)] ^ (effect >> np.uint32(8))
    return found[0] if len(found) == 1 else None


def _other_name(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> str | None:
    # The name in a header that is sound, but not the one that belongs here.
    names = [bytes(sample[:100]).rstrip(b"\0") for sample in (found, expected)]
    header = found[:BLOCK]
    if names[0] == names[1] or (_summed(header[None].copy())[0] != header).any():
        return None
    return names[0].decode("ascii", "replace")


def _part(at: int, layout: Layout) -> str:
    if at < layout.offset:
        return "header"
    if at < layout.offset + layout.payload:
        return f"token {(at - layout.offset) * layout.seq_len // layout.payload}"
    if at < layout.label_header or at > layout.label:
        return "padding"
    return "label" if at == layout.label else "header of the label"


def sha256(data: bytes | NDArray[np.uint8]) -> str:
    """Hex sha256 of bytes already in memory or mapped."""
    return hashlib.sha256(memoryview(data)).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Make ``path`` appear with all of ``data`` or not at all, and survive a power cut."""
    with _appearing(path) as file:
        file.write(data)


@contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    # A file that gets its name at the end; where that is not reached, nothing is left of it.
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            _settle(file)
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            part.unlink()
        raise


def _settle(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _settle_names(folder: Path) -> None:
    # What was renamed in a folder survives a power cut only once the folder itself is on disk.
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(
    folder: Path,
    stem: str,
    ids: NDArray[Any],
    sources: NDArray[np.uint8],
    layout: Layout,
    labels: NDArray[Any] | None = None,
) -> Shard:
    """Write ``<stem>.tar`` and ``<stem>.sources.npy``; return the line for the manifest.

    ``labels`` are 0 or 1, one a sample, where the layout has them. Takes a few MiB besides the arguments,
    and leaves nothing with a final name where it fails, on a full disk say.
    """
    if sources.shape != (len(ids),) or sources.dtype != np.uint8:
        raise ValueError(f"{stem}: need one uint8 source per sample, got {sources.shape}")
    digest, sidecar = hashlib.sha256(), _npy_bytes(sources)
    chunks = encode(stem, ids, layout, labels)
    with _appearing(folder / f"{stem}.tar") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        _settle(file)  # what can fail has been done before the first name appears
        write_atomically(folder / f"{stem}.sources.npy", sidecar)
    _settle_names(folder)
    return Shard(stem, len(ids), layout.size(len(ids)), digest.hexdigest(), sha256(sidecar))


def _npy_bytes(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_dataset(
    folder: Path,
    shards: Sequence[Shard],
    *,
    layout: Layout,
    objective: str,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    unigrams: NDArray[np.int64],
    seed: int,
    accounts: Mapping[str, Any] | None = None,
) -> str:
    """Write what surrounds the shards, the manifest last; return the fingerprint.

    A folder without a manifest is unfinished and refused by ``ShardSet.open``.
    """
    if unigrams.shape != (tokenizer.vocab_size,):
        raise ValueError(f"need unigrams of shape [{tokenizer.vocab_size}], got {unigrams.shape}")
    if layout.labels != (objective == "mlm-nsp"):
        raise ValueError(
            f"objective {objective!r} {'has no' if layout.labels else 'needs'} labels; use "
            f"Layout(..., labels={not layout.labels})"
        )
    ordered = sorted(shards, key=lambda shard: shard.shard)
    schema = {
        "version": FORMAT_VERSION,
        "objective": objective,
        "fields": _fields(layout),
        "stride": layout.stride,
        "vocab_size": tokenizer.vocab_size,
        "special_ids": dict(sorted(tokenizer.special_ids.items())),
    }
    counts = _npy_bytes(unigrams.astype("<i8"))
    description = {
        # The wids keys list the train split only: a reader of this list must not train on val.
        "wids_version": 1,
        "name": "+".join(
            source.name for source in sources
        ),  # not the folder's: a copy is the same
        "shardlist": [
            {"url": f"{shard.shard}.tar", "nsamples": shard.num_sequences}
            for shard in ordered
            if shard.split == "train"
        ],
        "schema": schema,
        "objective": objective,
        "seed": seed,
        "tokenizer": asdict(tokenizer),
        "sources": [asdict(source) for source in sources],
        "accounts": dict(accounts or {}),  # what became of the text: skipped, dropped, padded
        "unigrams_sha256": sha256(counts),
        "fingerprint": fingerprint(ordered, schema),
    }
    description["sha256"] = _sealed(description)
    write_atomically(folder / UNIGRAMS, counts)
    write_atomically(folder / DESCRIPTION, _json_bytes(description, indent=2))
    _settle_names(folder)  # all else is on disk before the manifest says so
    write_atomically(folder / MANIFEST, as_lines(ordered))
    _settle_names(folder)
    return str(description["fingerprint"])


def _fields(layout: Layout) -> dict[str, Any]:
    # By the names of the members: what each of them holds.
    fields: dict[str, Any] = {"input_ids": {"dtype": layout.dtype, "shape": [layout.seq_len]}}
    if layout.labels:  # 0: the second segment follows the first in the text, 1: it does not
        fields["cls"] = {"dtype": "ascii", "shape": [], "values": ["0", "1"]}
    return fields


def _sealed(description: Mapping[str, Any]) -> str:
    # The fingerprint covers what the shards hold; this covers every word said about them.
    rest = {key: value for key, value in description.items() if key != "sha256"}
    return sha256(json.dumps(rest, sort_keys=True).encode())


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, indent=indent, sort_keys=False) + "\n").encode()


@dataclass(frozen=True)
class ShardSet:
    """A finished folder of shards, opened and cross-checked; nothing of the shards is read yet."""

    files: Folder
    manifest: Manifest
    layout: Layout
    objective: str
    tokenizer: Tokenizer
    sources: tuple[Source, ...]
    seed: int
    fingerprint: str
    unigrams_sha256: str
    accounts: Mapping[str, Any] = field(default_factory=dict)  # as the preparation counted

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> ShardSet:
        """Read manifest and description; raise ShardError where they are missing or disagree.

        ``folder`` is a path or a URL that fsspec opens; of the latter, ``cache`` holds verified copies of
        ``cache_bytes`` at most (see ``storage.open_folder``).
        """
        files = open_folder(folder, cache=cache, cache_bytes=cache_bytes)
        root = files.root if isinstance(files, LocalFolder) else files.name
        lines = _read_manifest(files)
        about = _read_description(files)
        try:
            schema = about["schema"]
            if schema["version"] > FORMAT_VERSION:
                raise ShardError(
                    f"{root}: written in format {schema['version']}, this siftloader reads up to "
                    f"{FORMAT_VERSION}; upgrade siftloader"
                )
            fields = schema["fields"]
            tokens = fields["input_ids"]
            layout = Layout(int(tokens["shape"][0]), tokens["dtype"], "cls" in fields)
            opened = cls(
                files=files,
                manifest=Manifest.parse(lines, layout.size, f"{root}/{MANIFEST}"),
                layout=layout,
                objective=about["objective"],
                tokenizer=Tokenizer(**about["tokenizer"]),
                sources=tuple(Source(**source) for source in about["sources"]),
                seed=about["seed"],
                fingerprint=about["fingerprint"],
                unigrams_sha256=about["unigrams_sha256"],
                accounts=about.get("accounts", {}),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ShardError(
                f"{root}/{DESCRIPTION}: not a shard description ({error!r}); {AGAIN}"
            ) from error
        _check_agreement(f"{root}/{DESCRIPTION}", opened, schema)
        found = fingerprint(opened.manifest, schema)
        if opened.fingerprint != found:
            raise ShardError(
                f"{root}: {MANIFEST} and {DESCRIPTION} do not belong together (fingerprint "
                f"{opened.fingerprint[:12]} recorded, {found[:12]} found); two generations in one "
                f"folder? prepare the shards again into an empty one"
            )
        if opened.manifest.doubt is not None:
            raise opened.manifest.doubt
        return opened

    @property
    def name(self) -> str:
        """Where it is, for messages: the path, or the URL without secrets."""
        return self.files.name

    @property
    def folder(self) -> Path:
        """The folder on this machine; ShardError where there is none because they are behind a URL."""
        if not isinstance(self.files, LocalFolder):
            raise ShardError(f"{self.name}: not on this machine; copy the folder here for that")
        return self.files.root

    def shards(self, split: str) -> Manifest:
        """The shards of a split, in the order of their names; raises ShardError if there are none."""
        found = self.manifest.of(split)
        if found is None:
            names = list(self.splits)
            raise ShardError(f"{self.name}: no shards of split {split!r}, only of {names}")
        return found

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in order."""
        return self.manifest.splits

    def first_id(self, split: str) -> int:
        """Global id of the split's first sample: ids count through the manifest."""
        return self.shards(split).first_id(0)

    def path(self, shard: Shard) -> Path:
        """Where the tar of a shard is on this machine; fetched if it has to be."""
        return self.files.path(f"{shard.shard}.tar", size=shard.bytes, sha256=shard.sha256)

    def fetch_ahead(self, shards: Iterable[Shard]) -> None:
        """Begin to fetch these from where they are, if that is elsewhere; return at once."""
        self.files.fetch_ahead((f"{s.shard}.tar", s.bytes, s.sha256) for s in shards)

    def read(self, shard: Shard, verify: bool = True) -> NDArray[Any]:
        """The token ids of a shard, [N, T], a read-only view of the mapped file.

        With ``verify`` the sha256 of the whole file is compared first: CorruptShard on any flipped bit,
        naming sample and byte.
        """
        return self.open_shard(shard, verify).tokens

    def read_labels(self, shard: Shard, verify: bool = True) -> NDArray[np.uint8]:
        """The labels of a shard, uint8 [N]: 0 where the second segment follows the first, else 1.

        ShardError where the objective has none; ``verify`` as for ``read``.
        """
        labels = self.open_shard(shard, verify).labels
        if labels is None:
            raise ShardError(
                f"{self.name}: objective {self.objective!r} has no labels; prepare the shards with "
                f'"mlm-nsp" for them'
            )
        return labels

    def damaged(self, shard: Shard) -> NDArray[np.bool_]:
        """Which samples of a shard cannot be trusted, bool [N]: all of them where it cannot be told."""
        try:
            raw, _, _ = self._map(shard, verify=False)
        except ShardError:
            return np.ones(shard.num_sequences, bool)
        found = damaged_samples(shard.shard, raw, shard.num_sequences, self.layout)
        # Every sample sound, and yet not the recorded bytes: another shard under this name.
        other = not found.any() and sha256(raw) != shard.sha256
        return np.ones_like(found) if other else found

    def open_shard(self, shard: Shard, verify: bool = True) -> Mapped:
        """The shard as it is mapped, with the file it lies in; ``verify`` and errors as for ``read``."""
        try:
            raw, path, stat = self._map(shard, verify)
        except CorruptShard:
            if isinstance(self.files, LocalFolder) or not verify:
                raise
            # The copy took damage since it was verified: the original may be whole.
            self.files.forget(f"{shard.shard}.tar", sha256=shard.sha256)
            raw, path, stat = self._map(shard, verify)
        dtype = np.dtype(self.layout.dtype)
        tokens: NDArray[Any] = np.ndarray(
            (shard.num_sequences, self.layout.seq_len),
            dtype,
            buffer=raw,
            offset=self.layout.offset,
            strides=(self.layout.stride, dtype.itemsize),
        )
        labels = None
        if self.layout.labels:
            labels = raw[self.layout.label : -len(END) : self.layout.stride] - np.uint8(ZERO)
        return Mapped(tokens, labels, path, stat)

    def _map(self, shard: Shard, verify: bool) -> tuple[NDArray[np.uint8], Path, os.stat_result]:
        for left in reversed(range(ATTEMPTS)):
            path = self.path(shard)
            try:
                # Without waiting, should a pipe stand in the place of the file.
                with open(path, "rb", buffering=0, opener=_without_waiting) as file:
                    found = os.fstat(file.fileno())
                    if not stat.S_ISREG(found.st_mode):
                        raise OSError(errno.EINVAL, "not a regular file")
                    if found.st_size != shard.bytes:
                        raise self._resized(shard, found.st_size)
                    # Read, not mapped, while it is hashed: a disk that fails is an error then, no signal.
                    fits = not verify or _hashed(file, found.st_size) == shard.sha256
                    raw = np.memmap(file, np.uint8, mode="r")
            except FileNotFoundError as error:
                # A copy may be evicted between its being found and its being opened.
                if isinstance(self.files, LocalFolder) or not left:
                    raise self._unreadable(shard, path, error) from error
            except (OSError, ValueError) as error:
                raise self._unreadable(shard, path, error) from error
            else:
                if not fits:
                    self._blame(shard, raw)
                return raw, path, found
        raise AssertionError  # the last of them raises

    def _blame(self, shard: Shard, raw: NDArray[np.uint8]) -> None:
        check_samples(shard.shard, raw, shard.num_sequences, self.layout)  # names the sample
        raise CorruptShard(
            f"{shard.shard}: a sound shard, but not the one of the manifest (sha256 differs): its "
            f"samples are others; {AGAIN}",
            shard=shard.shard,
        )

    def _unreadable(self, shard: Shard, path: Path, error: Exception) -> ShardError:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "raise the limit (ulimit -n), or use a smaller window or fewer lanes"
        else:
            remedy = f"is {path} in place?"
        return ShardError(f"{shard.shard}: cannot be read ({error}); {remedy}", shard=shard.shard)

    def _resized(self, shard: Shard, size: int) -> CorruptShard:
        found = f"{shard.shard}: {size} bytes on disk, {shard.bytes} in the manifest"
        sample, byte = None, min(size, shard.bytes)
        if size > shard.bytes:
            what = f"the file goes on after byte {byte}, its end"
        elif size < self.layout.size(shard.num_sequences) - len(END):
            sample = size // self.layout.stride
            what = f"the file ends at byte {byte}, in sample {sample}"
        else:
            what = f"the file ends at byte {byte}, after its last sample"
        return CorruptShard(
            f"{found}: {what}; {AGAIN}", shard=shard.shard, sample=sample, byte=byte
        )

    def read_sources(self, shard: Shard) -> NDArray[np.uint8]:
        """Index into ``sources`` for every sample of the shard, uint8 [N]."""
        name = f"{shard.shard}.sources.npy"
        data = _read_hashed(self.files, name, shard.sources_sha256, shard.shard)
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False), np.uint8)

    @cached_property
    def unigrams(self) -> NDArray[np.int64]:
        """How often each id occurs in the train split, int64 [V]."""
        data = _read_hashed(self.files, UNIGRAMS, self.unigrams_sha256)
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False), np.int64)


@dataclass(frozen=True)
class Mapped:
    """A shard as it is mapped: tokens [N, T], labels [N] where it has any, and the file they lie in."""

    tokens: NDArray[Any]
    labels: NDArray[np.uint8] | None
    path: Path
    stat: os.stat_result


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _hashed(file: io.FileIO, size: int) -> str:
    # Few calls of much: after each, a thread waits up to 5 ms for its turn while another one computes.
    digest, buffer = hashlib.sha256(), memoryview(bytearray(max(1, min(size, AT_ONCE))))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def verify(folder: str | os.PathLike[str]) -> Iterator[Shard]:
    """Read every byte of a folder; yield each shard found good, raise at the first that is not.

    Stronger than opening: headers, id range, source range, strangers and the unigram counts too.
    """
    dataset = ShardSet.open(folder)
    counted = np.zeros(dataset.tokenizer.vocab_size, np.int64)
    if isinstance(dataset.files, LocalFolder):
        expected = {f"{shard.shard}.tar" for shard in dataset.manifest}
        found = {tar.name for tar in dataset.folder.glob("*.tar")}
        if strangers := sorted(found - expected):
            raise ShardError(
                f"{dataset.name}: {strangers[0]} is not in {MANIFEST}; move it out of the folder"
            )
    for shard in dataset.manifest:
        ids = dataset.read(shard)
        raw = np.memmap(dataset.path(shard), np.uint8, mode="r")
        check_samples(shard.shard, raw, shard.num_sequences, dataset.layout)
        for first, last in _spans(shard.num_sequences, dataset.layout):
            rows = ids[first:last]
            check_ids(dataset, shard, rows, first)
            if shard.split == "train":
                counted += np.bincount(rows.ravel(), minlength=len(counted))
        check_sources(dataset, shard, dataset.read_sources(shard))
        yield shard
    if not np.array_equal(dataset.unigrams, counted):
        raise CorruptShard(f"{UNIGRAMS}: not the counts of the train split; prepare it again")


def check_sources(dataset: ShardSet, shard: Shard, sources: NDArray[np.uint8]) -> None:
    """Raise CorruptShard unless every sample has a source, and one that there is."""
    if sources.shape != (shard.num_sequences,) or (sources >= len(dataset.sources)).any():
        raise CorruptShard(
            f"{shard.shard}.sources.npy: needs {shard.num_sequences} numbers below "
            f"{len(dataset.sources)}; prepare the shards again",
            shard=shard.shard,
        )


def check_ids(dataset: ShardSet, shard: Shard, rows: NDArray[Any], first: int) -> None:
    """Raise CorruptShard where ``rows`` [n, T], from sample ``first`` on, leave the vocabulary."""
    beyond = rows >= dataset.tokenizer.vocab_size
    if not beyond.any():
        return
    row, token = np.argwhere(beyond)[0].tolist()
    layout, sample = dataset.layout, first + row
    raise CorruptShard(
        f"{shard.shard}: sample {sample} holds an id outside the vocabulary of "
        f"{dataset.tokenizer.vocab_size}, {rows[row, token]} at token {token}; prepare the shards again",
        shard=shard.shard,
        sample=sample,
        byte=sample * layout.stride + layout.offset + token * layout.payload // layout.seq_len,
    )


def _read_hashed(files: Folder, name: str, expected: str, shard: str | None = None) -> bytes:
    tries = 1 if isinstance(files, LocalFolder) else ATTEMPTS
    for left in reversed(range(tries)):
        path = files.path(name, sha256=expected)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            if not left:  # a copy may be evicted between its being found and its being read
                raise _missing(name, path, error, shard) from error
            continue
        except OSError as error:
            raise _missing(name, path, error, shard) from error
        if sha256(data) == expected:
            return data
        # A copy may have taken damage since it was verified: the original may be whole.
        files.forget(name, sha256=expected)
    raise CorruptShard(f"{name}: sha256 differs from the recorded one; {AGAIN}", shard=shard)


def _missing(name: str, path: Path, error: OSError, shard: str | None) -> ShardError:
    return ShardError(f"{name}: cannot be read ({error}); is {path} in place?", shard=shard)


def _read_manifest(files: Folder) -> bytes:
    if not isinstance(files, LocalFolder):
        return files.read(MANIFEST)
    root = files.root
    if not root.is_dir():
        found = "a file" if root.exists() else f"no such folder (looked from {Path.cwd()})"
        raise ShardError(
            f"{root}: {found}, so not a finished shard folder; give the one that holds {MANIFEST}"
        )
    if not (root / MANIFEST).is_file():
        raise ShardError(
            f"{root}: no {MANIFEST}, so this is not a finished shard folder; finish it with "
            f"`siftloader shard`, or give the folder that holds the manifest (tars of others are read "
            f"by siftloader.stream.webdataset)"
        )
    return files.read(MANIFEST)


def _check_agreement(where: str, opened: ShardSet, schema: Mapping[str, Any]) -> None:
    # What the description says twice: the fingerprint covers the schema alone.
    said = {
        "objective": opened.objective,
        "vocab_size": opened.tokenizer.vocab_size,
        "special_ids": opened.tokenizer.special_ids,
    }
    for name, value in said.items():
        # As text, for 0 is 0.0 and False otherwise.
        if json.dumps(schema.get(name), sort_keys=True) != json.dumps(value, sort_keys=True):
            raise ShardError(
                f"{where}: {name} is {value!r}, but {schema.get(name)!r} in its schema; {AGAIN}"
            )
    if not isinstance(opened.fingerprint, str):
        raise ShardError(f"{where}: fingerprint {opened.fingerprint!r}, need a string; {AGAIN}")


def _read_description(files: Folder) -> dict[str, Any]:
    where = f"{files.name}/{DESCRIPTION}"
    try:
        about = json.loads(files.read(DESCRIPTION))
    except FetchError:
        raise  # of the way, not of the file
    except (ShardError, ValueError) as error:
        raise ShardError(f"{where}: cannot be read ({error}); {AGAIN}") from error
    if not isinstance(about, dict):
        raise ShardError(f"{where}: needs a JSON object, got {type(about).__name__}; {AGAIN}")
    if about.get("sha256") != _sealed(about):
        raise ShardError(
            f"{where}: not as it was written (its own sha256 differs); copy it again, or prepare "
            f"the shards again"
        )
    return about
