"""A block of raw records to a run of samples: parse, hold out, tokenise, pack.

    name = make_run(job, block)                 # of a file in job.work, finished
    gathered = gather(job, names)               # what single blocks could not pack
    name = make_last_run(job, gathered[0])

Both are pure functions of a job and a task and write one file, so any process on any machine may run
them, twice if need be. A run that is already there is not made again.

Letters: D documents of a block, T tokens of a sample.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftloader.corpus import Block, parse
from siftloader.errors import CorpusError
from siftloader.packing import Documents, Packed, Packing, pack_clm, pack_mlm
from siftloader.pairs import Pairing, Segmented, pack_pairs, segment
from siftloader.runs import COPIES, PAIRS, SPLITS, Run, RunFile, Samples, stream, write_run
from siftloader.shards import Layout, Tokenizer
from siftloader.tokens import restore_tokenizer, tokenise
from siftloader.words import Words


PARTNERS = 4  # a pair's random second segment is drawn from at least so many documents
GATHERED = 1 << 20  # tokens of the documents that are paired together in the last stage
CHECKED = 500  # characters of some thirty texts of a block that are tokenised both ways
TOLD = 5  # bad records of a block that are described; all are counted


@dataclass(frozen=True)
class Job:
    """All that decides the samples of a block, but the block; sent to every worker once."""

    work: Path
    objective: str
    seed: int
    val_fraction: float
    weights: tuple[float, ...]  # by source
    tokenizer: str  # serialised
    about: Tokenizer
    layout: Layout


def make_run(job: Job, block: Block) -> str:
    """Write the run of a block unless it is there; return the file's name."""
    name = f"{block.number:08d}-{block.digest[:16]}.run"
    if _finished(job.work / name):
        return name
    parsed = parse(block)
    skipped = Counter(parsed.skipped)
    documents = _tokenised(job, parsed.texts)
    empty = np.diff(documents.ids_at_documents) == 0
    if empty.any():
        skipped["documents without a token"] += int(empty.sum())
    contents = [hashlib.sha256(text.encode()).digest() for text in parsed.texts]
    samples: dict[str, Samples] = {}
    carried: dict[str, NDArray[Any]] = {}
    packing: dict[str, Any] = {}
    for split in SPLITS:
        groups = [
            documents.take(chosen[~empty[chosen]])
            for chosen in _copies(job, block, contents, split)
        ]
        made = _pack(job, groups, split, block.number)
        samples[split], packing[split] = made.samples, asdict(made.packing)
        carried |= made.carried
    counted = {
        "documents": int((~empty).sum()),
        "skipped": dict(skipped),
        "bad": dict(Counter(bad.reason for bad in parsed.bad)),
        "told": [bad.message for bad in parsed.bad[:TOLD]],
        "packing": packing,
    }
    run = Run(block.source, samples, carried, counted)
    write_run(job.work / name, run, seed=job.seed, number=block.number)
    return name


def split_of(content: bytes, val_fraction: float) -> str:
    """The split of a document, by the sha256 of its text: a duplicate goes where its twin went."""
    return "val" if int.from_bytes(content[:8], "big") < int(val_fraction * 2**64) else "train"


def copies_of(content: bytes, weight: float) -> int:
    """How often a document of the train split is used: ``weight`` times, on average.

    Other bits of the content decide than those that hold a document out.
    """
    share = int.from_bytes(content[8:16], "big") / 2**64
    return int(weight) + (share < weight % 1)


def _copies(
    job: Job, block: Block, contents: Sequence[bytes], split: str
) -> Iterator[NDArray[np.int64]]:
    # The documents of a split, then those to be used again, each time in another order, so that a
    # copy shares its samples with other neighbours.
    weight = job.weights[block.source] if split == "train" else 1.0
    times = np.array(
        [
            copies_of(content, weight) if split_of(content, job.val_fraction) == split else 0
            for content in contents
        ],
        np.int64,
    )
    yield np.flatnonzero(times > 0)
    for copy in range(1, int(times.max(initial=0))):
        chosen = np.flatnonzero(times > copy)
        keys = stream(COPIES, job.seed, copy, block.number).random_raw(len(chosen))
        yield chosen[np.argsort(keys, kind="stable")]


@dataclass(frozen=True)
class _Texts:
    """Tokenised documents: ids end to end, the ends of their segments, the ends of documents."""

    ids: NDArray[Any]
    segments: NDArray[np.int64]  # [S + 1] offsets into ids
    documents: NDArray[np.int64]  # [D + 1] offsets into segments

    @property
    def ids_at_documents(self) -> NDArray[np.int64]:
        """[D + 1]: where the documents begin among the ids."""
        begins: NDArray[np.int64] = self.segments[self.documents]
        return begins

    def take(self, chosen: NDArray[np.int64]) -> _Texts:
        """These documents, in this order."""
        segments = _ranges(self.documents[chosen], self.documents[chosen + 1])
        ids = _ranges(self.segments[segments], self.segments[segments + 1])
        return _Texts(
            self.ids[ids],
            _offsets(np.diff(self.segments)[segments]),
            _offsets(np.diff(self.documents)[chosen]),
        )


def _joined(parts: Sequence[_Texts], dtype: str) -> _Texts:
    return _Texts(
        np.concatenate([np.empty(0, dtype), *(part.ids for part in parts)]).astype(dtype),
        _offsets(np.concatenate([_NONE, *(np.diff(part.segments) for part in parts)])),
        _offsets(np.concatenate([_NONE, *(np.diff(part.documents) for part in parts)])),
    )


_NONE: NDArray[np.int64] = np.empty(0, np.int64)


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _ranges(first: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    # first[0]..end[0] - 1, first[1]..end[1] - 1, ... end to end
    lengths = end - first
    shifts: NDArray[np.int64] = np.repeat(first - (np.cumsum(lengths) - lengths), lengths)
    shifts += np.arange(len(shifts))
    return shifts


@lru_cache(maxsize=1)
def _tokenizer(serialised: str) -> Any:
    return restore_tokenizer(serialised)


@lru_cache(maxsize=1)
def _words(serialised: str) -> Words | None:
    return Words.of(_tokenizer(serialised))


def _tokenised(job: Job, texts: Sequence[str]) -> _Texts:
    parts = [segment(text) for text in texts] if job.objective == "mlm-nsp" else None
    flat = [part for document in parts for part in document] if parts is not None else texts
    words = _words(job.tokenizer)
    # Each block is its own trial, of the beginnings of some thirty texts.
    trial = [text[:CHECKED] for text in flat[:: max(1, len(flat) // 32)]]
    if words is not None and words.agree(trial):
        ids, lengths = words.tokenise(flat)
    else:
        ids, lengths = tokenise(flat, _tokenizer(job.tokenizer))
    if len(ids) and ids.max() >= job.about.vocab_size:
        raise CorpusError(
            f"the tokenizer gave id {ids.max()}, but says that its vocabulary has "
            f"{job.about.vocab_size} entries; save it again from the library that made it"
        )
    counts = [len(document) for document in parts] if parts is not None else [1] * len(texts)
    # It fits: the layout was chosen for the vocabulary.
    return _Texts(
        ids.astype(job.layout.dtype), _offsets(lengths), _offsets(np.array(counts, np.int64))
    )


@dataclass(frozen=True)
class _Made:
    samples: Samples
    carried: Mapping[str, NDArray[Any]]
    packing: Packing


def _pack(job: Job, groups: Sequence[_Texts], split: str, number: int) -> _Made:
    if job.objective == "mlm-nsp":
        return _pack_pairs(job, groups, split, number)
    packed = _packed(job, _joined(groups, job.layout.dtype), last=False)
    ends = np.arange(len(packed.tail.lengths) + 1)
    tail = _Texts(packed.tail.ids, _offsets(packed.tail.lengths), ends)
    packing = replace(packed.packing, carried=len(tail.ids))
    return _Made(Samples(packed.rows), _named(f"{split}.0", tail), packing)


def _packed(job: Job, texts: _Texts, last: bool) -> Packed:
    documents = Documents(texts.ids, np.diff(texts.ids_at_documents))
    special, seq_len = job.about.special_ids, job.layout.seq_len
    if job.objective == "clm":
        return pack_clm(documents, seq_len, eos=special["eos"], last=last)
    return pack_mlm(
        documents,
        seq_len,
        cls=special["cls"],
        sep=special["sep"],
        pad=special["pad"],
        last=last,
    )


def _pack_pairs(job: Job, groups: Sequence[_Texts], split: str, number: int) -> _Made:
    # Each copy apart: a document must not meet its own copy as if it were another document.
    rows = [np.empty((0, job.layout.seq_len), job.layout.dtype)]
    labels = [np.empty(0, np.uint8)]
    carried: dict[str, NDArray[Any]] = {}
    total = Packing()
    for copy, texts in enumerate(groups):
        if len(texts.documents) - 1 < PARTNERS:
            carried |= _named(f"{split}.{copy}", texts)
            documents, tokens = len(texts.documents) - 1, len(texts.ids)
            total += Packing(documents=documents, tokens=tokens, carried=tokens)
            continue
        block, label, packing = _paired(job, texts, (SPLITS.index(split), number, copy))
        rows.append(block)
        labels.append(label)
        total += packing
    return _Made(Samples(np.concatenate(rows), np.concatenate(labels)), carried, total)


def _paired(
    job: Job, texts: _Texts, key: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[np.uint8], Packing]:
    special, pairing = job.about.special_ids, Pairing()
    rows, labels = pack_pairs(
        Segmented(texts.ids, texts.segments, texts.documents),
        job.layout.seq_len,
        cls=special["cls"],
        sep=special["sep"],
        pad=special["pad"],
        key=(PAIRS, job.seed, *key),
        pairing=pairing,
    )
    packing = Packing(
        documents=pairing.documents,
        tokens=pairing.tokens,
        kept=pairing.kept,
        dropped=pairing.dropped,
        reused=pairing.reused,
        padding=pairing.padding,
        samples=pairing.samples,
        random=pairing.random,
        short=pairing.short,
        alone=pairing.alone,
    )
    return rows.astype(job.layout.dtype), labels, packing


def _named(prefix: str, texts: _Texts) -> dict[str, NDArray[Any]]:
    if len(texts.documents) == 1:
        return {}
    return {f"{prefix}.{name}": array for name, array in vars(texts).items()}


@dataclass(frozen=True)
class Gathered:
    """Runs whose carried documents of one kind are packed together; the task of the last stage."""

    number: int  # counts on from the blocks'
    source: int
    prefix: str  # of the carried arrays: "train.0"
    runs: tuple[str, ...]
    tokens: int


def gather(job: Job, names: Sequence[str]) -> list[Gathered]:
    """What to pack together of what the runs could not pack, in their order.

    Tails of a split and source all go together: one is the last. Documents without partners go
    together until there are enough of them.
    """
    waiting: dict[tuple[int, str], list[tuple[str, int, int]]] = {}
    for name in names:
        run = RunFile.open(job.work / name)
        for prefix in run.carried():
            waiting.setdefault((run.source, prefix), []).append(
                (name, run.count(f"{prefix}.documents") - 1, run.count(f"{prefix}.ids"))
            )
    found: list[Gathered] = []
    for (source, prefix), parts in sorted(waiting.items()):
        for group in _grouped(parts) if job.objective == "mlm-nsp" else [parts]:
            runs = tuple(name for name, _, _ in group)
            tokens = sum(count for _, _, count in group)
            found.append(Gathered(len(names) + len(found), source, prefix, runs, tokens))
    return found


def _grouped(parts: Sequence[tuple[str, int, int]]) -> list[list[tuple[str, int, int]]]:
    groups: list[list[tuple[str, int, int]]] = [[]]
    for part in parts:
        documents = sum(count for _, count, _ in groups[-1])
        tokens = sum(count for _, _, count in groups[-1])
        if documents >= PARTNERS and tokens >= GATHERED:
            groups.append([])
        groups[-1].append(part)
    if len(groups) > 1 and sum(count for _, count, _ in groups[-1]) < PARTNERS:
        last = groups.pop()
        groups[-1] += last
    return groups


def make_last_run(job: Job, task: Gathered) -> str:
    """Write the run of carried documents unless it is there; return the file's name."""
    digest = hashlib.sha256(repr((task.prefix, task.runs)).encode()).hexdigest()
    name = f"{task.number:08d}-{digest[:16]}.run"
    if _finished(job.work / name):
        return name
    runs = [RunFile.open(job.work / run) for run in task.runs]
    texts = _joined(
        [
            _Texts(*(run.read(f"{task.prefix}.{each.name}") for each in fields(_Texts)))
            for run in runs
        ],
        job.layout.dtype,
    )
    split, _, copy = task.prefix.partition(".")
    if job.objective == "mlm-nsp":
        key = (SPLITS.index(split), task.number, int(copy))
        rows, labels, packing = _paired(job, texts, key)
        samples = Samples(rows, labels)
    else:
        packed = _packed(job, texts, last=True)
        samples, packing = Samples(packed.rows), packed.packing
    # They were counted when they came in.
    packing = replace(packing, documents=0, tokens=0)
    counted = {"packing": {split: asdict(packing)}}
    run = Run(task.source, {split: samples}, counted=counted)
    write_run(job.work / name, run, seed=job.seed, number=task.number)
    return name


def _finished(path: Path) -> bool:
    """Whether the run is there, to the last byte; one that is not whole is made again."""
    if not path.exists():
        return False
    try:
        return RunFile.open(path).whole()
    except (CorpusError, ValueError, TypeError, KeyError):
        return False
