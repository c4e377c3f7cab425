"""The corpus job: text in, a finished folder of token shards out.

    summary = prepare(["wiki/*.txt"], Preparation(out="shards/wiki", tokenizer="bert-base-uncased"))

One process reads and cuts the text to blocks; workers turn blocks into runs of samples, and runs into
shards, in the order of random keys. What decides the bytes is the text, the options and the seed: not
the workers, not the engine, not how often the job was killed on the way.

While it runs, ``<out>/.work`` holds what was made so far; the manifest comes last. Memory: about
200 MB for each worker that tokenises; ``memory`` for those that write, all together. Disk: the token
ids in ``.work`` until the end, and the shards.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from siftloader.cells import Shuffle, count_keys, plan_cells, shards_per_cell, write_cell
from siftloader.corpus import Format, cut_blocks
from siftloader.engines import run_here, run_processes, run_ray
from siftloader.errors import CorpusError
from siftloader.files import (
    Input,
    Reading,
    check_unchanged,
    find_inputs,
    hash_input,
    kind_of,
)
from siftloader.folder import WORK, claimed, close, remove_work
from siftloader.packing import Packing
from siftloader.runs import SPLITS, RunFile
from siftloader.samples import Job, gather, make_last_run, make_run
from siftloader.shards import (
    FORMAT_VERSION,
    Layout,
    Shard,
    ShardSet,
    Source,
    Tokenizer,
    write_dataset,
)
from siftloader.tokens import NEEDED, describe_tokenizer, load_tokenizer
from siftloader.wikitext import wikitext_parser


ENGINES = ("local", "ray")
MANY = 1 << 22  # tokens that are worth starting processes for
METHOD = 1  # of making samples; another number, other bytes
INFLATES = {".gz": 2.8, ".tgz": 2.8, ".bz2": 3.6, ".xz": 3.6, ".zst": 3.0, ".parquet": 1.8}
BYTES_PER_TOKEN = 4.4  # of English text, for estimates only

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Preparation:
    """What to make of a corpus; checks itself.

    Preparation(out="shards/books", tokenizer="bert/tokenizer.json", objective="mlm", seq_len=512)

    ``workers``, ``engine`` and ``memory`` decide how fast it goes and ``max_bad`` whether it ends;
    all others, with the text, what it gives.
    """

    out: str | os.PathLike[str]  # a folder: new, empty, or left unfinished by the same job
    tokenizer: str | os.PathLike[str]  # a tokenizer.json, a folder that holds one, or a hub name
    objective: Literal["mlm", "mlm-nsp", "clm"] = "mlm"
    seq_len: int = 512
    val_fraction: float = 0.005  # of the documents, chosen by their content
    seed: int = 0  # of the shuffle and the pairs; the held-out split does not depend on it
    samples_per_shard: int = 32_768  # 64 MiB at 512 tokens
    documents: Literal["blank-line", "file"] = "blank-line"  # what ends one in .txt
    column: str | None = None  # where the text is in .jsonl, .parquet, .arrow, .csv; else found
    block_bytes: int = 4 << 20  # of text that are packed together; partners of pairs are in one
    max_bad: int = 0  # bad records that may be skipped and counted before the job gives up
    workers: int | None = 1  # processes; on Ray, tasks at a time (None: as many as there are CPUs)
    engine: Literal["local", "ray"] = "local"
    memory: int | None = None  # bytes, for writing shards; None: what a shard a worker takes

    def __post_init__(self) -> None:
        if self.objective not in NEEDED:
            raise ValueError(
                f"objective must be one of {', '.join(NEEDED)}; got {self.objective!r}"
            )
        for name in ("seq_len", "seed", "samples_per_shard", "max_bad"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        least = 5 if self.objective == "mlm-nsp" else 3
        if self.seq_len < least:
            raise ValueError(f"seq_len must be at least {least} tokens, got {self.seq_len}")
        if "://" in os.fspath(self.out):
            raise ValueError(f"out must be a folder of this machine's, got the URL {self.out}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {self.val_fraction}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 1 <= self.samples_per_shard <= 1_000_000:
            raise ValueError(
                f"samples_per_shard must be in 1..1,000,000 (six digits name a sample), "
                f"got {self.samples_per_shard}"
            )
        if self.max_bad < 0:
            raise ValueError(f"max_bad must be 0 or more records, got {self.max_bad}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {self.engine!r}")
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"memory must be a number of bytes, got {self.memory}")
        _ = self.format  # checks itself

    @property
    def format(self) -> Format:
        """How files become documents."""
        return Format(self.documents, self.column, self.block_bytes)


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
    sources: list[Source] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)  # by reason
    bad: dict[str, int] = field(default_factory=dict)  # by reason; at most max_bad together
    told: list[str] = field(default_factory=list)  # the first of them, if this run met them
    packing: dict[str, Packing] = field(default_factory=dict)  # by split
    unknown: float = 0.0  # share of the train split's text that the vocabulary has no word for


Report = Callable[[dict[str, Any]], None]


def prepare(
    paths: Iterable[str], options: Preparation, on_progress: Report | None = None
) -> Summary:
    """Read ``paths`` (see ``find_inputs``) and write the shards that ``options`` describe.

    Killed at any moment, the same call continues and gives the same bytes. A folder that holds
    anything else is refused. ``on_progress`` is given a dict after every block and shard:
    ``stage`` ("estimate", "tokenising", "writing"), ``seconds``, and what was done so far.

    Raises CorpusError where text cannot be read, more records are bad than ``max_bad`` allows, or
    the folder belongs to another job.
    """
    begun = time.perf_counter()
    out = Path(options.out).absolute()
    inputs = find_inputs(paths, without=out)
    tokenizer = load_tokenizer(options.tokenizer)
    about = describe_tokenizer(tokenizer, options.tokenizer, options.objective)
    recipe = _recipe(options, about, inputs)
    layout = _layout(options, about)
    memory = _memory(options, layout)
    with claimed(out, recipe, lambda: [hash_input(source) for source in inputs]) as finished:
        if finished:
            return _summary(options.out, finished, time.perf_counter() - begun, reused=True)
        job = Job(
            work=out / WORK,
            objective=options.objective,
            seed=options.seed,
            val_fraction=options.val_fraction,
            weights=tuple(source.weight for source in inputs),
            tokenizer=tokenizer.to_str(),
            about=about,
            layout=layout,
        )
        progress = _Progress(on_progress, begun)
        progress.estimate(estimate(inputs, job.layout, out))
        reading, total = Reading(), _Total(options.max_bad)
        runs = list(_tokenise(inputs, job, options, reading, total, progress))
        runs += list(_pack_carried(job, options, runs, total))
        check_unchanged(inputs)
        _write(job, options, memory, inputs, recipe, runs, reading, total, progress)
        finished = ShardSet.open(out)
        remove_work(out)
        summary = _summary(options.out, finished, time.perf_counter() - begun)
        summary.told = total.told  # names files, so it is not kept with the shards
        return summary


def _layout(options: Preparation, about: Tokenizer) -> Layout:
    dtype = Layout.for_vocabulary(options.seq_len, about.vocab_size).dtype
    return Layout(options.seq_len, dtype, labels=options.objective == "mlm-nsp")


def _memory(options: Preparation, layout: Layout) -> int:
    # Enough for one writer with one shard, or an error before hours of work.
    least = 3 * options.samples_per_shard * (layout.payload + 16)
    if options.memory is None:
        return least * _writers(options)
    if options.memory < least:
        most = options.memory // (3 * (layout.payload + 16))
        raise CorpusError(
            f"a memory cap of {options.memory:,} bytes is less than the {least:,} that writing shards of "
            f"{options.samples_per_shard:,} samples takes; allow more, or ask for at most {most:,} "
            f"samples_per_shard"
        )
    return options.memory


class _Total:
    """The sum of what the runs counted; gives up when there is too much bad."""

    def __init__(self, max_bad: int) -> None:
        self.max_bad = max_bad
        self.documents: Counter[int] = Counter()  # by source, of both splits
        self.tokens: Counter[int] = Counter()  # by source, of both splits
        self.skipped: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.told: list[str] = []  # the first bad records
        self.packing = {split: Packing() for split in SPLITS}

    def add(self, run: RunFile) -> None:
        counted = run.counted
        self.documents[run.source] += counted.get("documents", 0)
        self.skipped.update(counted.get("skipped", {}))
        for split, packing in counted["packing"].items():
            self.packing[split] += Packing(**packing)
            self.tokens[run.source] += packing["tokens"]
        self.add_bad(counted.get("bad", {}), counted.get("told", ()))

    def accounts(self) -> dict[str, Any]:
        """What became of the text, as JSON: to be kept with the shards."""
        return {
            "documents": self.documents.total(),
            "skipped": dict(sorted(self.skipped.items())),
            "bad": dict(sorted(self.bad.items())),
            "packing": {split: asdict(packing) for split, packing in self.packing.items()},
        }

    def add_bad(self, bad: Mapping[str, int], told: Sequence[str]) -> None:
        self.bad.update(bad)
        self.told += told[: 5 - len(self.told)]
        if self.bad.total() > self.max_bad:
            found = "; ".join(f"{count:,} x {reason}" for reason, count in self.bad.items())
            budget = f" ({found}; max_bad allows {self.max_bad:,})" if self.max_bad else ""
            first = "; ".join(self.told) if self.max_bad else self.told[0]
            raise CorpusError(f"{first}{budget}")


def _tokenise(
    inputs: Sequence[Input],
    job: Job,
    options: Preparation,
    reading: Reading,
    total: _Total,
    progress: _Progress,
) -> Iterator[str]:
    blocks = cut_blocks(inputs, options.format, reading)
    size = _size(inputs)
    told = 0  # of what the reader itself found bad
    names = _each(options, make_run, job, blocks, options.workers)
    with progress.bar("tokenising", size, "B") as bar, closing(names):
        for name in names:
            total.add(RunFile.open(job.work / name))
            for bad in reading.bad[told:]:
                total.add_bad({bad.reason: 1}, [bad.message])
            told = len(reading.bad)
            yield name
            tokens = sum(packing.tokens for packing in total.packing.values())
            bar.update(reading.bytes - bar.n)
            progress.tell(
                "tokenising",
                bar,
                documents=total.documents.total(),
                tokens=tokens,
                bytes=reading.bytes,
                total_bytes=size,
            )
    total.skipped.update(reading.skipped)
    for bad in reading.bad[told:]:
        total.add_bad({bad.reason: 1}, [bad.message])


def _pack_carried(
    job: Job, options: Preparation, runs: Sequence[str], total: _Total
) -> Iterator[str]:
    tasks = gather(job, runs)
    # Tails are nothing; only documents that wait for partners can be worth more processes.
    many = sum(task.tokens for task in tasks) > MANY
    names = (
        _each(options, make_last_run, job, tasks, options.workers)
        if many
        else run_here(make_last_run, job, tasks)
    )
    with closing(names):
        for name in names:
            total.add(RunFile.open(job.work / name))
            yield name


def _write(
    job: Job,
    options: Preparation,
    memory: int,
    inputs: Sequence[Input],
    recipe: Mapping[str, Any],
    runs: Sequence[str],
    reading: Reading,
    total: _Total,
    progress: _Progress,
) -> None:
    out, layout = job.work.parent, job.layout
    keys = count_keys(job.work, runs)
    samples = {split: int(keys[split].sum()) for split in SPLITS}
    if not samples["train"]:
        remove_work(out)  # nothing worth keeping, and nothing that binds the next try
        raise CorpusError(_nothing(total, options))
    shuffle = Shuffle(out, job.work, tuple(runs), layout, job.about.vocab_size)
    shards = sum(-(-count // options.samples_per_shard) for count in samples.values())
    shard_bytes = options.samples_per_shard * (layout.payload + 16)
    each, writers = shards_per_cell(shards, _writers(options), memory, shard_bytes)
    cells = [
        cell
        for split in SPLITS
        for cell in plan_cells(split, keys[split], options.samples_per_shard, each)
    ]
    done: list[Shard] = []
    unigrams = np.zeros(job.about.vocab_size, np.int64)
    results = _each(options, write_cell, shuffle, cells, writers, ahead=1)
    with progress.bar("writing", sum(samples.values()), "samples") as bar, closing(results):
        for cell, written in zip(cells, results, strict=True):
            done += written.shards
            if cell.split == "train":
                unigrams += written.unigrams
            bar.update(sum(cell.counts))
            progress.tell("writing", bar, samples=int(bar.n), total_samples=sum(samples.values()))

    hashes = [reading.sha256[index] for index in range(len(inputs))]
    close(out, recipe, hashes, {shard.shard for shard in done})
    write_dataset(
        out,
        done,
        layout=layout,
        objective=options.objective,
        tokenizer=job.about,
        sources=[
            Source(
                source.name,
                hashes[index],
                total.documents[index],
                tokens=total.tokens[index],
                weight=source.weight,
            )
            for index, source in enumerate(inputs)
        ],
        unigrams=unigrams,
        seed=options.seed,
        accounts=total.accounts(),
    )


def _nothing(total: _Total, options: Preparation) -> str:
    passed = [f"{count:,} {reason}" for reason, count in (total.skipped + total.bad).items()]
    found = f" (skipped: {', '.join(passed)})" if passed else ""
    return (
        f"nothing to train on: {total.documents.total()} documents, "
        f"{total.packing['train'].tokens} tokens of them outside the held-out split, no full sample "
        f"of {options.seq_len}{found}; give more text, a shorter seq_len or a smaller val_fraction "
        f"(it is {options.val_fraction})"
    )


def _each(
    options: Preparation,
    function: Callable[[Any, T], R],
    job: Any,
    tasks: Iterable[T],
    workers: int | None,
    ahead: int = 2,
) -> Generator[R, None, None]:
    # ``workers`` at a time; with ``ahead`` 1, no more of them on any engine.
    if options.engine == "ray":
        return run_ray(function, job, tasks, workers=workers, ahead=ahead)
    if workers == 1:
        return run_here(function, job, tasks)
    return run_processes(function, job, tasks, workers=workers or _cores(), ahead=ahead)


def _writers(options: Preparation) -> int:
    # How many shards may be worth writing at once; how many machines a cluster has is not ours to know.
    return options.workers or (32 if options.engine == "ray" else _cores())


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


@dataclass(frozen=True)
class Estimate:
    """Roughly what a preparation will take, in bytes; from the sizes of the files alone."""

    text: int
    work: int  # in .work, until the end
    shards: int
    free: int  # on the disk of the folder, or taken by this job already


def estimate(inputs: Sequence[Input], layout: Layout, out: Path) -> Estimate:
    """Text at 4.4 bytes a token, compressed files at usual ratios; 0 for files of unknown size."""
    text = 0.0
    for source in inputs:
        for file in source.files:
            suffix = Path(file.path).suffix.lower()
            text += (file.size or 0) * INFLATES.get(suffix, 1.0) * source.weight
    samples = text / BYTES_PER_TOKEN / layout.seq_len
    if layout.labels:
        samples *= 1.4  # random second segments are used twice, and short pairs are padded
    home = next(folder for folder in (out, *out.parents) if folder.exists())
    there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return Estimate(
        text=int(text),
        work=int(samples * (layout.payload + 8)),
        shards=int(samples * layout.stride),
        free=shutil.disk_usage(home).free + there,
    )


class _Progress:
    """A bar where somebody watches, a dict for whoever asked."""

    def __init__(self, report: Report | None, begun: float) -> None:
        self.report, self.begun = report, begun

    def estimate(self, found: Estimate) -> None:
        if self.report:
            self.report({"stage": "estimate", "seconds": self._seconds(), **asdict(found)})

    @staticmethod
    def bar(what: str, total: int, unit: str) -> Any:
        # Silent unless stderr is a terminal; there may be none at all.
        return tqdm(
            total=total or None,
            desc=what,
            unit=unit,
            unit_scale=True,
            disable=None if sys.stderr else True,
            leave=False,
        )

    def tell(self, stage: str, bar: Any, **done: int) -> None:
        seconds = self._seconds()
        if "tokens" in done and not bar.disable:
            rate = {name: f"{done[name] / seconds:,.0f}/s" for name in ("documents", "tokens")}
            bar.set_postfix(rate, refresh=False)
        if self.report:
            self.report({"stage": stage, "seconds": seconds, **done})

    def _seconds(self) -> float:
        return time.perf_counter() - self.begun


def _size(inputs: Sequence[Input]) -> int:
    return sum(file.size or 0 for source in inputs for file in source.files)


def _recipe(options: Preparation, about: Tokenizer, inputs: Sequence[Input]) -> dict[str, Any]:
    # All that decides the bytes but the text; no path, time or host, so it may lie beside the shards.
    return {
        "format": FORMAT_VERSION,
        "method": METHOD,
        "objective": options.objective,
        "seq_len": options.seq_len,
        "val_fraction": options.val_fraction,
        "seed": options.seed,
        "samples_per_shard": options.samples_per_shard,
        "documents": options.documents,
        "column": options.column,
        "block_bytes": options.block_bytes,
        "markup": _markup(inputs),
        "tokenizer": {key: value for key, value in asdict(about).items() if key != "name"},
        "sources": [{"name": source.name, "weight": source.weight} for source in inputs],
    }


def _markup(inputs: Sequence[Input]) -> str | None:
    # The version of what strips the markup, where there is any to strip.
    kinds = {(kind_of(file.path) or ("", ""))[0] for source in inputs for file in source.files}
    if "wiki" not in kinds:
        return None
    wikitext_parser()  # or the error that says how to get it
    return version("mwparserfromhell")


def _summary(
    out: str | os.PathLike[str], finished: ShardSet, seconds: float, reused: bool = False
) -> Summary:
    # From what lies in the folder, so that a run that finds it finished tells the same.
    samples = dict.fromkeys(SPLITS, 0)
    for shard in finished.manifest:
        samples[shard.split] += shard.num_sequences
    special, unigrams, accounts = (
        finished.tokenizer.special_ids,
        finished.unigrams,
        finished.accounts,
    )
    unknown = int(unigrams[special["unk"]]) if "unk" in special else 0
    frame = sum(int(unigrams[number]) for number in set(special.values())) - unknown
    return Summary(
        out=Path(out),
        fingerprint=finished.fingerprint,
        samples=samples,
        bytes=sum(shard.bytes for shard in finished.manifest),
        seconds=seconds,
        reused=reused,
        documents=accounts["documents"],
        sources=list(finished.sources),
        skipped=accounts["skipped"],
        bad=accounts["bad"],
        packing={split: Packing(**counts) for split, counts in accounts["packing"].items()},
        unknown=unknown / max(1, int(unigrams.sum()) - frame),
    )
