"""Samples of tars to batches: decoded, packed, batched, masked, each a generator function of a source.

    wds.DataPipeline(wds.SimpleShardList(urls), checked_tars, decoded, partial(batched, size=32))
    masked(batched(packed(decoded(checked_tars(urls)), TextRows.of("gpt2", 1024, "clm")), 8))

Nothing here runs code that the data brought along: pickles stay closed.

Letters: n samples of a batch, T tokens of a sample.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siftloader.batches import IGNORED, Batch
from siftloader.errors import ShardError
from siftloader.masking import Mlm
from siftloader.packing import Documents, Packed, pack_clm, pack_mlm
from siftloader.shards import Tokenizer
from siftloader.tar_samples import Sample, Tar
from siftloader.tokens import describe_tokenizer, load_tokenizer, restore_tokenizer, tokenise
from siftloader.words import Words


Decoder: TypeAlias = Callable[[bytes], Any]

META = ("__key__", "__url__")
IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "text", "json", "jsn", "txt.gz", "json.gz")
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
        if wanted is not None:
            names = [next((n for n in each if n in sample), " or ".join(each)) for each in wanted]
        else:
            names, first = _fields(sample), first or sample
            if set(map(_family, names)) != set(map(_family, _fields(first))):
                why = f"fields {names}, but {first['__key__']!r} has {_fields(first)}; choose what all have, as"
                raise _unusable(sample, f'{why} fields=("jpg;png", "cls")')
        yield {
            **{name: sample[name] for name in META},
            **{name: _decoded(sample, name, own) for name in names},
        }


def _fields(sample: Sample) -> list[str]:
    return [name for name in sample if name not in META]


def _family(name: str) -> str:
    return "image" if name in IMAGES else name


def _unusable(sample: Sample, why: str) -> ShardError:
    return Tar(sample["__url__"]).fault(ShardError, f"sample {sample['__key__']!r}: {why}")


def _decoded(sample: Sample, name: str, own: Mapping[str, Decoder]) -> Any:
    if name not in sample:
        raise _unusable(sample, f"no field {name!r} among {_fields(sample)}; choose other fields")
    kind = name.removesuffix(".gz").rpartition(".")[2]
    decoder = own.get(name) or own.get(kind)
    if decoder is None and kind in UNSAFE:
        why = f".{kind} runs code of whoever wrote it, so it is not decoded; choose others with fields=(...), or"
        raise _unusable(sample, f"{why} give decoders={{'.{kind}': your function}}")
    try:
        if decoder is not None:
            return decoder(sample[name])
        data = gzip.decompress(sample[name]) if name.endswith(".gz") else sample[name]
        return _DECODERS.get(kind, bytes)(data)
    except Exception as error:  # a decoder may raise anything, and none of them knows the sample
        why = (
            f"field {name!r} cannot be decoded ({type(error).__name__}: {error}); mend it, or give"
        )
        raise _unusable(sample, f"{why} decoders={{'.{kind}': ...}}") from error


def _image(data: bytes) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need the `Pillow` package; pip install pillow") from error
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


_DECODERS: dict[str, Decoder] = {
    **dict.fromkeys(("txt", "text", "transcript"), bytes.decode),
    **dict.fromkeys(("cls", "cls2", "id", "index", "inx"), int),
    **dict.fromkeys(("json", "jsn"), json.loads),
    **dict.fromkeys(IMAGES, _image),
    "npy": _array,
    "npz": lambda data: dict(np.load(io.BytesIO(data), allow_pickle=False)),
}


@dataclass(frozen=True)
class TextRows:
    """How text becomes rows of token ids.

    TextRows.of("gpt2", seq_len=1024, objective="clm")
    """

    serialised: str  # the tokenizer: as text it goes to any process
    about: Tokenizer
    seq_len: int
    objective: str
    column: str = "text"

    @classmethod
    def of(
        cls, tokenizer: Any, seq_len: int, objective: Literal["mlm", "clm"], column: str = "text"
    ) -> TextRows:
        """From a tokenizer: a name, a path, or a fast one of ``tokenizers`` or ``transformers``."""
        loaded, name = getattr(tokenizer, "backend_tokenizer", tokenizer), type(tokenizer).__name__
        if isinstance(tokenizer, (str, os.PathLike)):
            loaded, name = load_tokenizer(tokenizer), os.fspath(tokenizer)
        if not hasattr(loaded, "to_str"):
            raise TypeError(f"tokenizer must be a name, a path or a fast tokenizer, got {name}")
        if (least := 3 if objective == "mlm" else 2) > seq_len:
            raise ValueError(f"seq_len must be at least {least}, got {seq_len}")
        about = describe_tokenizer(loaded, name, objective)
        return cls(loaded.to_str(), about, seq_len, objective, column)

    def pack(self, documents: Documents) -> Packed:
        """Rows of ``seq_len`` ids, and the tail that fills none."""
        special = self.about.special_ids
        if self.objective == "clm":
            return pack_clm(documents, self.seq_len, eos=special["eos"])
        cls, sep, pad = (special[name] for name in ("cls", "sep", "pad"))
        return pack_mlm(documents, self.seq_len, cls=cls, sep=sep, pad=pad)


def packed(
    source: Iterable[Sample],
    rows: TextRows,
    key: str = "",
    dropped: Callable[[int], None] | None = None,
) -> Iterator[Sample]:
    """Documents to rows of token ids, ``{"__key__", "__url__", "input_ids": [T]}``.

    packed(decoded(checked_tars(urls)), TextRows.of("gpt2", 1024, "clm"))

    Documents run on from one row to the next, also from one tar to the next. What fills no row at the end is
    left out, and ``dropped`` told how many tokens that are. Keys are ``key`` and the number of the row.
    """
    tokenizer, words = _tokenizer(rows.serialised)
    rest, numbers = Documents(np.empty(0, np.uint32), np.empty(0, np.int64)), itertools.count()
    for texts in _some(_plain(source, rows.column)):
        ids, lengths = words.tokenise(texts) if words else tokenise(texts, tokenizer)
        whole = Documents(np.concatenate([rest.ids, ids]), np.concatenate([rest.lengths, lengths]))
        result = rows.pack(whole)
        rest = result.tail
        for row in result.rows:
            yield {"__key__": f"{key}/{next(numbers)}", "__url__": "", "input_ids": row}
    if dropped is not None:
        dropped(len(rest.ids))


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
            why = f"no text in .txt or under {column!r} of .json (fields {names}); name the key with column=, the"
            raise _unusable(sample, f"{why} field with fields=(...), or leave the tokenizer out")
        yield value


def _some(texts: Iterator[str]) -> Iterator[list[str]]:
    while held := list(itertools.islice(texts, 1)):
        characters = len(held[0])
        while characters < TEXT and (text := next(texts, None)) is not None:
            held.append(text)
            characters += len(text)
        yield held


def batched(source: Iterable[Sample], size: int, drop_last: bool = False) -> Iterator[Batch]:
    """``size`` samples at a time: images and classes as a tuple, anything else as a dict, stacked.

    Token ids, alone or named ``input_ids``, become int64 [n, T]; classes int64 [n]; what has no common shape
    stays a list. Dicts have ``__key__`` and ``__url__``, lists of str.
    """
    samples = iter(source)
    while held := list(itertools.islice(samples, size)):
        if len(held) == size or not drop_last:
            yield _collated(held)


def _collated(samples: list[Sample]) -> Batch:
    names = _fields(samples[0])
    if sorted(map(_family, names)) == ["cls", "image"]:
        images = [next(each[n] for n in each if _family(n) == "image") for each in samples]
        return _stacked(images), torch.tensor([each["cls"] for each in samples], dtype=torch.int64)
    batch: Sample = {name: [each[name] for each in samples] for name in META}
    for name in names:
        values = [each.get(name) for each in samples]
        base, _, kind = name.removesuffix(".gz").rpartition(".")
        may_be_ids = (base or kind) in IDS or (len(names) == 1 and name in ("npy", *TEXTS))
        ids: list[Any] = [_token_ids(value) for value in values] if may_be_ids else [None]
        if any(each is None for each in ids):
            batch[name.removesuffix(".npy")] = _stacked(values)
            continue
        for sample, row in zip(samples, ids, strict=True):
            if len(row) != len(ids[0]):
                why = f"{len(row)} token ids, but {samples[0]['__key__']!r} has {len(ids[0])}; rows of a batch need"
                raise _unusable(sample, f"{why} one length: pad or cut them in stages=[...]")
        batch["input_ids"] = torch.from_numpy(np.stack(ids))
    return batch


def _token_ids(value: Any) -> Any:
    # [T], or None for what is something else.
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return np.array(value, np.int64)
    whole = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu"
    return value.astype(np.int64) if whole else None


def _stacked(values: list[Any]) -> Any:
    if all(type(value) in (int, float) for value in values):
        return torch.tensor(values)
    if all(isinstance(value, np.ndarray) and value.dtype.kind in "biuf" for value in values):
        values = [torch.from_numpy(value) for value in values]
    alike = {(value.shape, value.dtype) if isinstance(value, Tensor) else None for value in values}
    return torch.stack(values) if len(alike) == 1 and None not in alike else values


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
        made = dict(batch)
        if padded:
            made.setdefault("attention_mask", torch.from_numpy(real.astype(np.int64)))
        if masking is not None:
            named = list(zip(batch["__url__"], batch["__key__"], strict=True))
            keys = [f"{Tar(url).stem}/{key}".encode() for url, key in named]
            hashes = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
            numbers = np.frombuffer(hashes, "<i8").astype(np.int64)
            try:
                ids, labels = masking(ids, numbers, seed=seed, epoch=epoch)
            except ValueError as error:
                first = {name: batch[name][0] for name in META}
                raise _unusable(first, f"or one of its batch: {error}") from error
            made |= {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        elif "labels" not in made:
            labels = np.where(real, ids, IGNORED) if padded else ids.copy()
            made["labels"] = torch.from_numpy(labels)
        yield made
