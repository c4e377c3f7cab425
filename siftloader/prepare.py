"""The corpus job: text files in, a finished folder of token shards out.

    summary = prepare(["wiki/*.txt"], Preparation(out="shards/wiki", tokenizer="bert-base-uncased"))

Read, hold out, tokenise, pack, shuffle, write: each stage is a function of what the one before it
gives, so the same inputs, options and seed give the same bytes in every file, on any machine.

Memory: the token ids of the whole corpus, two bytes each (four above 65,536 ids), three times over at
the most (packed, joined, shuffled), plus a shard or three. Text is streamed.

Letters: N samples of a split, T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import json
import os
import re
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from siftloader.corpus import (
    BOUNDARIES,
    Document,
    Input,
    Reading,
    find_inputs,
    hash_input,
    read_documents,
)
from siftloader.errors import CorpusError, ShardError
from siftloader.packing import Packing, pack_clm, pack_mlm
from siftloader.shards import (
    DESCRIPTION,
    FORMAT_VERSION,
    MANIFEST,
    UNIGRAMS,
    Layout,
    Shard,
    ShardSet,
    Source,
    Tokenizer,
    write_atomically,
    write_dataset,
    write_shard,
)
from siftloader.tokens import NEEDED, Tokens, describe_tokenizer, load_tokenizer, tokenise


RECIPE = "prepare.json"  # marks a folder as ours, and says what it was asked to hold
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Preparation:
    """What to make of a corpus; checks itself.

    Preparation(out="shards/books", tokenizer="bert/tokenizer.json", objective="mlm", seq_len=512)
    """

    out: str | os.PathLike[str]  # a folder: new, empty, or left unfinished by an earlier run
    tokenizer: str | os.PathLike[str]  # a tokenizer.json, a folder that holds one, or a hub name
    objective: Literal["mlm", "clm"] = "mlm"
    seq_len: int = 512
    val_fraction: float = 0.005  # of the documents, chosen by their content
    seed: int = 0  # of the shuffle; the held-out split does not depend on it
    samples_per_shard: int = 32_768  # 64 MiB at 512 tokens
    documents: Literal["blank-line", "file"] = "blank-line"

    def __post_init__(self) -> None:
        if self.objective not in NEEDED:
            raise ValueError(
                f"objective must be one of {', '.join(NEEDED)}; got {self.objective!r}"
            )
        if self.documents not in BOUNDARIES:
            raise ValueError(
                f"documents must be one of {', '.join(BOUNDARIES)}; got {self.documents!r}"
            )
        if self.seq_len < 3:
            raise ValueError(f"seq_len must be at least 3 tokens, got {self.seq_len}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {self.val_fraction}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 1 <= self.samples_per_shard <= 1_000_000:
            raise ValueError(
                f"samples_per_shard must be in 1..1,000,000 (six digits name a sample), "
                f"got {self.samples_per_shard}"
            )


@dataclass
class Summary:
    """What became of the corpus; ``reused`` if the folder already held exactly this."""

    out: Path
    fingerprint: str
    samples: dict[str, int]  # by split
    bytes: int  # of the tars
    seconds: float = 0.0
    reused: bool = False
    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # by reason
    packing: dict[str, Packing] = field(default_factory=dict)  # by split
    unknown: int = 0  # tokens of the train split the vocabulary has no word for


def prepare(paths: Iterable[str], options: Preparation) -> Summary:
    """Read ``paths`` (see ``find_inputs``) and write the shards that ``options`` describe.

    Killed at any moment, the same call starts again and gives the same bytes. A folder that holds
    anything else is refused, before and after the long part of the work.
    """
    begun = time.perf_counter()
    out = Path(options.out)
    inputs = find_inputs(paths)
    tokenizer = load_tokenizer(options.tokenizer)
    about = describe_tokenizer(tokenizer, options.tokenizer, options.objective)
    hashes = [hash_input(source) for source in inputs]
    recipe = _recipe(options, about, inputs, hashes)
    if finished := _look(out, recipe):
        return _reuse(out, finished, time.perf_counter() - begun)

    reading, summary = Reading(), Summary(out, "", {}, 0)
    with _bar("reading", sum(_size(source) for source in inputs), "B") as bar:
        documents = read_documents(inputs, options.documents, reading)
        tokens = tokenise(_watched(documents, reading, bar), tokenizer)
        held = _gather(tokens, options, about, reading)
    _check_unchanged(inputs, hashes, reading)
    layout = Layout.for_vocabulary(options.seq_len, about.vocab_size)
    samples = {split: _pack(held, split, options, about, layout, summary) for split in SPLITS}
    _check_some(samples, summary, reading, options)
    unigrams = np.bincount(samples["train"][0].ravel(), minlength=about.vocab_size)

    with _claimed(out, recipe) as finished:
        if finished:  # another run was faster
            return _reuse(out, finished, time.perf_counter() - begun)
        shards = list(_write(out, samples, layout, options))
        summary.fingerprint = write_dataset(
            out,
            shards,
            layout=layout,
            objective=options.objective,
            tokenizer=about,
            sources=[
                Source(source.name, digest, reading.documents[index])
                for index, (source, digest) in enumerate(zip(inputs, hashes, strict=True))
            ],
            unigrams=unigrams.astype(np.int64),
            seed=options.seed,
        )
    summary.samples = {split: len(ids) for split, (ids, _) in samples.items()}
    summary.bytes = sum(shard.bytes for shard in shards)
    summary.documents = reading.documents.total()
    summary.skipped = dict(reading.skipped)
    summary.unknown = int(unigrams[about.special_ids["unk"]]) if "unk" in about.special_ids else 0
    summary.seconds = time.perf_counter() - begun
    return summary


def split_of(content: bytes, val_fraction: float) -> str:
    """The split of a document, by the sha256 of its text: a duplicate goes where its twin went."""
    return "val" if int.from_bytes(content[:8], "big") < int(val_fraction * 2**64) else "train"


class Column:
    """Documents end to end, in as many bytes as their ids need and eight for each length."""

    def __init__(self, dtype: str) -> None:
        self.ids = array("H" if dtype == "<u2" else "I")
        self.lengths = array("q")

    def append(self, ids: NDArray[np.uint32]) -> None:
        """Add a document, whose ids must fit."""
        assert ids.max(initial=0) < 1 << (8 * self.ids.itemsize)
        self.ids.frombytes(ids.astype(f"u{self.ids.itemsize}").tobytes())
        self.lengths.append(len(ids))

    def __iter__(self) -> Iterator[NDArray[Any]]:
        whole = np.frombuffer(self.ids, f"u{self.ids.itemsize}")
        first = 0
        for length in self.lengths:
            yield whole[first : first + length]
            first += length


Held = dict[tuple[str, int], Column]  # by split and source


def _gather(
    documents: Iterable[Tokens], options: Preparation, about: Tokenizer, reading: Reading
) -> Held:
    held: Held = {}
    dtype = Layout.for_vocabulary(options.seq_len, about.vocab_size).dtype
    for document in documents:
        if not len(document.ids):
            reading.skipped["documents without a token"] += 1
            continue
        if document.ids.max() >= about.vocab_size:
            raise CorpusError(
                f"the tokenizer gave id {document.ids.max()}, but says that its vocabulary has "
                f"{about.vocab_size} entries; save it again from the library that made it"
            )
        key = split_of(document.content, options.val_fraction), document.source
        held.setdefault(key, Column(dtype)).append(document.ids)
    return held


def _pack(
    held: Held,
    split: str,
    options: Preparation,
    about: Tokenizer,
    layout: Layout,
    summary: Summary,
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    # Samples [N, T] and their sources [N], shuffled over the whole split.
    blocks = [np.empty((0, options.seq_len), layout.dtype)]
    sources = [np.empty(0, np.uint8)]
    total = Packing()
    for key in sorted(key for key in held if key[0] == split):
        packing = Packing()
        for block in _packer(held.pop(key), options, about, packing):
            blocks.append(block.astype(layout.dtype))
            sources.append(np.full(len(block), key[1], np.uint8))
        total += packing
    summary.packing[split] = total
    ids, origin = np.concatenate(blocks), np.concatenate(sources)
    order = shuffled(len(ids), options.seed, SPLITS.index(split))
    return ids[order], origin[order]


def _packer(
    documents: Iterable[NDArray[Any]], options: Preparation, about: Tokenizer, packing: Packing
) -> Iterator[NDArray[np.int64]]:
    special = about.special_ids
    if options.objective == "clm":
        return pack_clm(documents, options.seq_len, eos=special["eos"], packing=packing)
    return pack_mlm(
        documents,
        options.seq_len,
        cls=special["cls"],
        sep=special["sep"],
        pad=special["pad"],
        packing=packing,
    )


def shuffled(count: int, seed: int, split: int) -> NDArray[np.int64]:
    """A permutation of ``count`` samples, the same for every version of numpy.

    The raw stream of a bit generator is guaranteed to stay as it is; ``Generator.permutation`` is not.
    """
    keys = np.random.PCG64(np.random.SeedSequence((seed, split))).random_raw(count)
    return np.argsort(keys, kind="stable")


def _write(
    out: Path,
    samples: Mapping[str, tuple[NDArray[Any], NDArray[np.uint8]]],
    layout: Layout,
    options: Preparation,
) -> Iterator[Shard]:
    size = options.samples_per_shard
    with _bar("writing", sum(len(ids) for ids, _ in samples.values()), "samples") as bar:
        for split, (ids, sources) in samples.items():
            for number, first in enumerate(range(0, len(ids), size)):
                rows = slice(first, first + size)
                yield write_shard(out, f"{split}-{number:06d}", ids[rows], sources[rows], layout)
                bar.update(len(ids[rows]))


def _check_unchanged(inputs: Sequence[Input], hashes: Sequence[str], reading: Reading) -> None:
    for index, source in enumerate(inputs):
        if reading.sha256[index] != hashes[index]:
            raise CorpusError(
                f"source {source.name!r} changed while it was read; run again once it is at rest"
            )


def _check_some(
    samples: Mapping[str, tuple[NDArray[Any], NDArray[np.uint8]]],
    summary: Summary,
    reading: Reading,
    options: Preparation,
) -> None:
    if len(samples["train"][0]):
        return
    tokens = summary.packing["train"].tokens
    raise CorpusError(
        f"nothing to train on: {reading.documents.total()} documents, {tokens} tokens of them "
        f"outside the held-out split, no full sample of {options.seq_len}; give more text, a "
        f"shorter seq_len or a smaller val_fraction (it is {options.val_fraction})"
    )


def _recipe(
    options: Preparation, about: Tokenizer, inputs: Sequence[Input], hashes: Sequence[str]
) -> dict[str, Any]:
    # All that decides the bytes; no path, time or host, so it may lie beside the shards.
    return {
        "format": FORMAT_VERSION,
        "objective": options.objective,
        "seq_len": options.seq_len,
        "val_fraction": options.val_fraction,
        "seed": options.seed,
        "samples_per_shard": options.samples_per_shard,
        "documents": options.documents,
        "tokenizer": asdict(about),
        "sources": [
            {"name": source.name, "sha256": digest}
            for source, digest in zip(inputs, hashes, strict=True)
        ],
    }


def _look(out: Path, recipe: Mapping[str, Any]) -> ShardSet | None:
    # The finished set if it is exactly the one asked for; None if the folder is free to be written.
    if not out.exists():
        return None
    if not out.is_dir():
        raise CorpusError(f"{out}: a file; give a folder for the shards")
    names = sorted(entry.name for entry in out.iterdir())
    if names in ([], [f"{RECIPE}.part"]):  # the second: killed at the very first write
        return None
    found = _found_recipe(out)
    if found is None:
        raise CorpusError(
            f"{out}: holds {_some(names)}, and no {RECIPE} that would mark it as an earlier run; "
            f"give another folder, or empty this one"
        )
    if (out / MANIFEST).exists():
        different = [key for key in recipe if found.get(key) != recipe[key]]
        if different:
            asked = ", ".join(_difference(key, found, recipe) for key in different)
            raise CorpusError(
                f"{out}: already holds finished shards made otherwise ({asked}); give another "
                f"folder, or remove this one"
            )
        finished = _intact(out)
        if finished is not None:
            return finished
    foreign = [name for name in names if not _ours(name)]
    if foreign:
        raise CorpusError(
            f"{out}: holds {_some(foreign)} besides an unfinished run; move it out, or give "
            f"another folder"
        )
    return None


def _found_recipe(out: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((out / RECIPE).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "format" in found else None


def _intact(out: Path) -> ShardSet | None:
    # Quick: names and sizes only. `siftloader verify` reads every byte.
    try:
        finished = ShardSet.open(out)
    except ShardError:
        return None
    for shard in finished.manifest:
        tar = out / f"{shard.shard}.tar"
        if not tar.is_file() or tar.stat().st_size != shard.bytes:
            return None
        if not (out / f"{shard.shard}.sources.npy").is_file():
            return None
    return finished if (out / UNIGRAMS).is_file() else None


def _ours(name: str) -> bool:
    files = "|".join(map(re.escape, (RECIPE, MANIFEST, DESCRIPTION, UNIGRAMS)))
    return bool(
        re.fullmatch(rf"({files}|({'|'.join(SPLITS)})-\d{{6}}\.(tar|sources\.npy))(\.part)?", name)
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _difference(key: str, found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    if isinstance(asked[key], list | dict):
        return f"other {key}"
    return f"{key} {found.get(key)!r} there, {asked[key]!r} asked"


@contextmanager
def _claimed(out: Path, recipe: Mapping[str, Any]) -> Iterator[ShardSet | None]:
    """Hold the folder alone, emptied of what an unfinished run left; or the finished set."""
    handle = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
        _lock(handle, out)
        finished = _look(out, recipe)
        if finished is None:
            # The manifest first: from here on, whatever happens, the folder is unfinished.
            (out / MANIFEST).unlink(missing_ok=True)
            write_atomically(out / RECIPE, (json.dumps(recipe, indent=2) + "\n").encode())
            for entry in sorted(out.iterdir()):
                if entry.name != RECIPE:
                    entry.unlink()
        yield finished
    except OSError as error:
        raise CorpusError(
            f"{out}: cannot be written ({error}); once it can, run the same again"
        ) from error
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such lock here: two runs into one folder are the user's to avoid
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CorpusError(
            f"{out}: another run is writing here; wait for it, or give another folder"
        ) from error


def _reuse(out: Path, finished: ShardSet, seconds: float) -> Summary:
    samples = dict.fromkeys(SPLITS, 0)
    for shard in finished.manifest:
        samples[shard.split] += shard.num_sequences
    return Summary(
        out=out,
        fingerprint=finished.fingerprint,
        samples=samples,
        bytes=sum(shard.bytes for shard in finished.manifest),
        seconds=seconds,
        reused=True,
        documents=sum(source.documents for source in finished.sources),
    )


# Silent unless stderr is a terminal.
def _bar(what: str, total: int, unit: str) -> Any:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=None, leave=False)


def _watched(documents: Iterable[Document], reading: Reading, bar: Any) -> Iterator[Document]:
    for document in documents:
        bar.update(reading.bytes - bar.n)
        yield document


def _size(source: Input) -> int:
    return sum(file.stat().st_size for file in source.files)
