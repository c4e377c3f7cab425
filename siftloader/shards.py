"""Token shards on disk, both directions: a standard tar that is also an array.

Member ``i`` of ``train-000000.tar`` is ``train-000000-<i>.input_ids.npy``: 512 bytes of USTAR header,
128 of NPY header, ``T`` token ids, zeros to the next multiple of 512. So sample ``i`` sits at
``i * stride``, any tar or WebDataset tool reads the file, and we read it as one strided view.

    dataset = ShardSet.open("shards/demo")
    ids = dataset.read(dataset.shards("train")[0])    # [N, T] uint16, a view of the mapped file

Beside the tars, never inside: ``manifest.jsonl`` (a line per shard: name, count, bytes, hashes; written
last), ``dataset.json`` (what the ids mean), ``<shard>.sources.npy`` (uint8 [N]) and ``unigrams.npy``
(int64 [V], how often each id occurs in the train split).

Letters: N samples of a shard, T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.errors import CorruptShard, ShardError


BLOCK = 512  # tar pads everything to this
END = b"\0" * (2 * BLOCK)  # two zero blocks end a tar
NPY_HEADER = 128  # NPY v1 header of a 1-D array: magic, version, length, dict, padding
FORMAT_VERSION = 1
MANIFEST = "manifest.jsonl"
DESCRIPTION = "dataset.json"
UNIGRAMS = "unigrams.npy"


@dataclass(frozen=True)
class Layout:
    """Where the tokens of sample ``i`` are: arithmetic, not an index.

    Layout(seq_len=512, dtype="<u2").stride == 2048   # bytes
    """

    seq_len: int
    dtype: str = "<u2"

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1 token, got {self.seq_len}")
        if self.dtype not in ("<u2", "<u4"):
            raise ValueError(f'dtype must be "<u2" or "<u4", got {self.dtype!r}')

    @classmethod
    def for_vocabulary(cls, seq_len: int, vocab_size: int) -> Layout:
        """Two bytes a token up to 65,536 ids, four above."""
        return cls(seq_len, "<u2" if vocab_size <= 1 << 16 else "<u4")

    @property
    def payload(self) -> int:
        """Bytes of token ids in a sample."""
        return self.seq_len * np.dtype(self.dtype).itemsize

    @property
    def offset(self) -> int:
        """Bytes from the start of a sample to its first token."""
        return BLOCK + NPY_HEADER

    @property
    def stride(self) -> int:
        """Bytes from one sample to the next."""
        return BLOCK + -(-(NPY_HEADER + self.payload) // BLOCK) * BLOCK

    def size(self, samples: int) -> int:
        """Bytes of a shard of that many samples."""
        return samples * self.stride + len(END)


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


def encode(stem: str, ids: NDArray[Any], layout: Layout) -> bytes:
    """The bytes of a shard that holds the rows of ``ids`` [N, T].

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
    if len(rows) > 1_000_000:
        raise ValueError(f"{stem}: at most 1,000,000 samples fit six digits, got {len(rows):,}")
    out = np.zeros((len(rows), layout.stride), np.uint8)
    out[:, :BLOCK] = _tar_headers(stem, np.arange(len(rows)), layout)
    out[:, BLOCK : layout.offset] = np.frombuffer(_npy_header(layout), np.uint8)
    tokens = np.ascontiguousarray(rows, dtype=layout.dtype).view(np.uint8)
    out[:, layout.offset : layout.offset + layout.payload] = tokens
    return out.tobytes() + END


def _npy_header(layout: Layout) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {"descr": layout.dtype, "fortran_order": False, "shape": (layout.seq_len,)},
    )
    header = buffer.getvalue()
    assert len(header) == NPY_HEADER, len(header)
    return header


def _tar_headers(stem: str, samples: NDArray[np.int64], layout: Layout) -> NDArray[np.uint8]:
    # [n, 512]: the standard library writes the first header, only name and checksum differ after it.
    info = tarfile.TarInfo(f"{stem}-000000.input_ids.npy")
    info.size, info.mode, info.mtime = NPY_HEADER + layout.payload, 0o444, 0
    template = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), np.uint8)
    headers = np.tile(template, (len(samples), 1))
    at = len(stem) + 1
    headers[:, at : at + 6] = _digits(samples, 6, base=10)
    headers[:, 148:156] = ord(" ")  # the checksum is taken with its own field as spaces
    checksum = headers.sum(axis=1, dtype=np.int64)
    headers[:, 148:154] = _digits(checksum, 6, base=8)
    headers[:, 154] = 0
    return headers


def _digits(numbers: NDArray[np.int64], width: int, base: int) -> NDArray[np.uint8]:
    powers = base ** np.arange(width - 1, -1, -1)
    return (numbers[:, None] // powers % base + ord("0")).astype(np.uint8)


def check_headers(stem: str, raw: NDArray[np.uint8], samples: int, layout: Layout) -> None:
    """Raise CorruptShard unless every header of ``raw`` is exactly the one ``encode`` writes.

    With the size known to be right, this makes the strided view the only possible reading.
    """
    body = raw[: samples * layout.stride].reshape(samples, layout.stride)
    for first in range(0, samples, 4096):  # bounded memory: 4,096 expected headers at a time
        last = min(first + 4096, samples)
        expected = _tar_headers(stem, np.arange(first, last), layout)
        wrong = (body[first:last, :BLOCK] != expected).any(axis=1)
        npy = np.frombuffer(_npy_header(layout), np.uint8)
        wrong |= (body[first:last, BLOCK : layout.offset] != npy).any(axis=1)
        wrong |= body[first:last, layout.offset + layout.payload :].any(axis=1)
        if wrong.any():
            raise CorruptShard(
                f"{stem}: sample {first + int(wrong.argmax())} does not start with the header it "
                f"was written with; restore the shard from its source or prepare it again"
            )
    if raw[samples * layout.stride :].any():
        raise CorruptShard(f"{stem}: bytes after the last sample; prepare the shard again")


def sha256(data: bytes | NDArray[np.uint8]) -> str:
    """Hex sha256 of bytes already in memory or mapped."""
    return hashlib.sha256(memoryview(data)).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Make ``path`` appear with all of ``data`` or not at all, and survive a power cut."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_shard(
    folder: Path, stem: str, ids: NDArray[Any], sources: NDArray[np.uint8], layout: Layout
) -> Shard:
    """Write ``<stem>.tar`` and ``<stem>.sources.npy``; return the line for the manifest."""
    if sources.shape != (len(ids),) or sources.dtype != np.uint8:
        raise ValueError(f"{stem}: need one uint8 source per sample, got {sources.shape}")
    data = encode(stem, ids, layout)
    sidecar = _npy_bytes(sources)
    write_atomically(folder / f"{stem}.sources.npy", sidecar)
    write_atomically(folder / f"{stem}.tar", data)
    return Shard(stem, len(ids), len(data), sha256(data), sha256(sidecar))


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
) -> str:
    """Write what surrounds the shards, the manifest last; return the fingerprint.

    A folder without a manifest is unfinished and refused by ``ShardSet.open``.
    """
    if unigrams.shape != (tokenizer.vocab_size,):
        raise ValueError(f"need unigrams of shape [{tokenizer.vocab_size}], got {unigrams.shape}")
    ordered = sorted(shards, key=lambda shard: shard.shard)
    schema = {
        "version": FORMAT_VERSION,
        "objective": objective,
        "fields": {"input_ids": {"dtype": layout.dtype, "shape": [layout.seq_len]}},
        "stride": layout.stride,
        "vocab_size": tokenizer.vocab_size,
        "special_ids": dict(sorted(tokenizer.special_ids.items())),
    }
    counts = _npy_bytes(unigrams.astype("<i8"))
    description = {
        # The wids keys list the train split only: a reader of this list must not train on val.
        "wids_version": 1,
        "name": folder.name,
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
        "unigrams_sha256": sha256(counts),
        "fingerprint": _fingerprint(ordered, schema),
    }
    description["sha256"] = _sealed(description)
    write_atomically(folder / UNIGRAMS, counts)
    write_atomically(folder / DESCRIPTION, _json_bytes(description, indent=2))
    lines = b"".join(_json_bytes(asdict(shard)) for shard in ordered)
    write_atomically(folder / MANIFEST, lines)
    return str(description["fingerprint"])


def _fingerprint(shards: Sequence[Shard], schema: Mapping[str, Any]) -> str:
    # What was written, never where: a copy on another disk is the same data set.
    content = [
        (shard.shard, shard.num_sequences, shard.sha256, shard.sources_sha256) for shard in shards
    ]
    return sha256(_json_bytes({"schema": schema, "shards": content}))


def _sealed(description: Mapping[str, Any]) -> str:
    # The fingerprint covers what the shards hold; this covers every word said about them.
    rest = {key: value for key, value in description.items() if key != "sha256"}
    return sha256(json.dumps(rest, sort_keys=True).encode())


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, indent=indent, sort_keys=False) + "\n").encode()


@dataclass(frozen=True)
class ShardSet:
    """A finished folder of shards, opened and cross-checked; nothing of the shards is read yet."""

    folder: Path
    manifest: tuple[Shard, ...]
    layout: Layout
    objective: str
    tokenizer: Tokenizer
    sources: tuple[Source, ...]
    seed: int
    fingerprint: str
    unigrams_sha256: str

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ShardSet:
        """Read manifest and description; raise ShardError where they are missing or disagree."""
        root = Path(folder)
        shards = _read_manifest(root)
        about = _read_description(root)
        try:
            schema = about["schema"]
            if schema["version"] > FORMAT_VERSION:
                raise ShardError(
                    f"{root}: written in format {schema['version']}, this siftloader reads up to "
                    f"{FORMAT_VERSION}; upgrade siftloader"
                )
            tokens = schema["fields"]["input_ids"]
            opened = cls(
                folder=root,
                manifest=shards,
                layout=Layout(int(tokens["shape"][0]), tokens["dtype"]),
                objective=about["objective"],
                tokenizer=Tokenizer(**about["tokenizer"]),
                sources=tuple(Source(**source) for source in about["sources"]),
                seed=about["seed"],
                fingerprint=about["fingerprint"],
                unigrams_sha256=about["unigrams_sha256"],
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ShardError(
                f"{root / DESCRIPTION}: not a shard description ({error!r})"
            ) from error
        if opened.fingerprint != _fingerprint(shards, schema):
            raise ShardError(
                f"{root}: {MANIFEST} and {DESCRIPTION} do not belong together (fingerprint "
                f"{opened.fingerprint[:12]} recorded, {_fingerprint(shards, schema)[:12]} found); "
                f"two generations in one folder? prepare the shards again into an empty one"
            )
        for shard in shards:
            if shard.bytes != opened.layout.size(shard.num_sequences):
                raise ShardError(
                    f"{shard.shard}: the manifest says {shard.num_sequences} samples and "
                    f"{shard.bytes} bytes, but that many samples take "
                    f"{opened.layout.size(shard.num_sequences)}; prepare the shards again"
                )
        return opened

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split, in the order of their names; raises ShardError if there are none."""
        found = tuple(shard for shard in self.manifest if shard.split == split)
        if not found:
            splits = sorted({shard.split for shard in self.manifest})
            raise ShardError(f"{self.folder}: no shards of split {split!r}, only of {splits}")
        return found

    def first_id(self, split: str) -> int:
        """Global id of the split's first sample: ids count through the manifest."""
        stems = [shard.shard for shard in self.manifest]
        before = self.manifest[: stems.index(self.shards(split)[0].shard)]
        return sum(shard.num_sequences for shard in before)

    def read(self, shard: Shard, verify: bool = True) -> NDArray[Any]:
        """The token ids of a shard, [N, T], a read-only view of the mapped file.

        With ``verify`` the sha256 of the whole file is compared first: CorruptShard on any flipped bit.
        """
        path = self.folder / f"{shard.shard}.tar"
        try:
            size = path.stat().st_size
            if size != shard.bytes:
                raise CorruptShard(
                    f"{shard.shard}: {size} bytes on disk, {shard.bytes} in the manifest; the file "
                    f"was cut or replaced: copy it again or prepare the shards again"
                )
            raw = np.memmap(path, np.uint8, mode="r")
        except OSError as error:
            raise ShardError(
                f"{shard.shard}: cannot be read ({error}); is {path} in place?"
            ) from error
        if verify and sha256(raw) != shard.sha256:
            check_headers(shard.shard, raw, shard.num_sequences, self.layout)  # names the sample
            raise CorruptShard(
                f"{shard.shard}: the token ids are not those that were written (sha256 differs); "
                f"copy the file again or prepare the shards again"
            )
        return np.ndarray(
            (shard.num_sequences, self.layout.seq_len),
            np.dtype(self.layout.dtype),
            buffer=raw,
            offset=self.layout.offset,
            strides=(self.layout.stride, np.dtype(self.layout.dtype).itemsize),
        )

    def read_sources(self, shard: Shard) -> NDArray[np.uint8]:
        """Index into ``sources`` for every sample of the shard, uint8 [N]."""
        data = _read_hashed(self.folder / f"{shard.shard}.sources.npy", shard.sources_sha256)
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False), np.uint8)

    @cached_property
    def unigrams(self) -> NDArray[np.int64]:
        """How often each id occurs in the train split, int64 [V]."""
        data = _read_hashed(self.folder / UNIGRAMS, self.unigrams_sha256)
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False), np.int64)


def verify(folder: str | os.PathLike[str]) -> Iterator[Shard]:
    """Read every byte of a folder; yield each shard found good, raise at the first that is not.

    Stronger than opening: headers, id range, source range, strangers and the unigram counts too.
    """
    dataset = ShardSet.open(folder)
    counted = np.zeros(dataset.tokenizer.vocab_size, np.int64)
    expected = {f"{shard.shard}.tar" for shard in dataset.manifest}
    strangers = sorted(
        tar.name for tar in dataset.folder.glob("*.tar") if tar.name not in expected
    )
    if strangers:
        raise ShardError(
            f"{dataset.folder}: {strangers[0]} is not in {MANIFEST}; move it out of the folder"
        )
    for shard in dataset.manifest:
        ids = dataset.read(shard)
        raw = np.memmap(dataset.folder / f"{shard.shard}.tar", np.uint8, mode="r")
        check_headers(shard.shard, raw, shard.num_sequences, dataset.layout)
        beyond = (ids >= dataset.tokenizer.vocab_size).any(axis=1)
        if beyond.any():
            raise CorruptShard(
                f"{shard.shard}: sample {int(beyond.argmax())} holds an id outside the vocabulary "
                f"of {dataset.tokenizer.vocab_size}; prepare the shards again"
            )
        sources = dataset.read_sources(shard)
        if sources.shape != (shard.num_sequences,) or (sources >= len(dataset.sources)).any():
            raise CorruptShard(
                f"{shard.shard}.sources.npy: needs {shard.num_sequences} numbers below "
                f"{len(dataset.sources)}; prepare the shards again"
            )
        if shard.split == "train":
            counted += np.bincount(ids.ravel(), minlength=len(counted))
        yield shard
    if not np.array_equal(dataset.unigrams, counted):
        raise CorruptShard(f"{UNIGRAMS}: not the counts of the train split; prepare it again")


def _read_hashed(path: Path, expected: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path.name}: cannot be read ({error})") from error
    if sha256(data) != expected:
        raise CorruptShard(f"{path.name}: sha256 differs from the recorded one; prepare it again")
    return data


def _read_manifest(root: Path) -> tuple[Shard, ...]:
    path = root / MANIFEST
    if not path.is_file():
        raise ShardError(
            f"{root}: no {MANIFEST}, so this is not a finished shard folder; finish it with "
            f"`siftloader shard`, or give the folder that holds the manifest"
        )
    shards = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            shards.append(Shard(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ShardError(f"{path}: line {number} is not a manifest line ({error})") from error
    stems = [shard.shard for shard in shards]
    if not shards or stems != sorted(set(stems)):
        raise ShardError(f"{path}: needs at least one shard, every name once and in order")
    return tuple(shards)


def _read_description(root: Path) -> dict[str, Any]:
    try:
        about = json.loads((root / DESCRIPTION).read_bytes())
    except (OSError, ValueError) as error:
        raise ShardError(f"{root / DESCRIPTION}: cannot be read ({error})") from error
    if not isinstance(about, dict):
        raise ShardError(f"{root / DESCRIPTION}: needs a JSON object, got {type(about).__name__}")
    if about.get("sha256") != _sealed(about):
        raise ShardError(
            f"{root / DESCRIPTION}: not as it was written (its own sha256 differs); copy it again, "
            f"or prepare the shards again"
        )
    return about
