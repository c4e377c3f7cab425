"""The corpus job: text in, a finished folder of token shards out.

    summary = prepare(["wiki/*.txt"], Preparation(out="shards/wiki", tokenizer="bert-base-uncased"))

One process reads and cuts the text to blocks; workers turn blocks into runs of samples, and runs into
shards, in the order of random keys. What decides the bytes is the text, the options and the seed: not
the workers, not the engine, not how often the job was killed on the way.

While it runs, ``<out>/.work`` holds what was made so far; the manifest comes last. Memory: about
200 MB for each worker that tokenises; ``memory`` for those that write, all together. Disk: the token
ids once in ``.work`` until the end, and the shards.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from siftloader.cells import Shuffle, Written, count_keys, plan_cells, shards_per_cell, write_cell
from siftloader.corpus import Format, cut_blocks
from siftloader.engines import run_here, run_processes, run_ray
from siftloader.errors import CorpusError, ShardError
from siftloader.files import Input, Reading, check_unchanged, find_inputs, hash_input, kind_of
from siftloader.packing import Packing
from siftloader.runs import SPLITS, RunFile
from siftloader.samples import Job, gather, make_last_run, make_run
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
)
from siftloader.tokens import NEEDED, describe_tokenizer, load_tokenizer
from siftloader.wikitext import wikitext_parser


RECIPE = "prepare.json"  # marks a folder as ours, and says what it was asked to hold
WORK = ".work"  # in the folder, until it is finished
ENGINES = ("local", "ray")
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
    memory: int = 1 << 30  # bytes, for writing the shards

    def __post_init__(self) -> None:
        if self.objective not in NEEDED:
            raise ValueError(
                f"objective must be one of {', '.join(NEEDED)}; got {self.objective!r}"
            )
        least = 5 if self.objective == "mlm-nsp" else 3
        if self.seq_len < least:
            raise ValueError(f"seq_len must be at least {least} tokens, got {self.seq_len}")
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
        if self.memory < 1:
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
    packing: dict[str, Packing] = field(default_factory=dict)  # by split
    unknown: int = 0  # tokens of the train split the vocabulary has no word for


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
    inputs = find_inputs(paths)
    tokenizer = load_tokenizer(options.tokenizer)
    about = describe_tokenizer(tokenizer, options.tokenizer, options.objective)
    recipe = _recipe(options, about, inputs)
    with _claimed(out, recipe, inputs) as finished:
        if finished:
            return _reuse(options.out, finished, time.perf_counter() - begun)
        job = Job(
            work=out / WORK,
            objective=options.objective,
            seed=options.seed,
            val_fraction=options.val_fraction,
            weights=tuple(source.weight for source in inputs),
            tokenizer=tokenizer.to_str(),
            about=about,
            layout=_layout(options, about),
        )
        progress = _Progress(on_progress, begun)
        progress.estimate(estimate(inputs, job.layout, out))
        reading, total = Reading(), _Total(options.max_bad)
        runs = list(_tokenise(inputs, job, options, reading, total, progress))
        runs += list(_pack_carried(job, options, runs, total))
        check_unchanged(inputs)
        return _write(job, options, inputs, recipe, runs, reading, total, progress)


def _layout(options: Preparation, about: Tokenizer) -> Layout:
    dtype = Layout.for_vocabulary(options.seq_len, about.vocab_size).dtype
    return Layout(options.seq_len, dtype, labels=options.objective == "mlm-nsp")


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
    with progress.bar("tokenising", size, "B") as bar:
        for name in _each(options, make_run, job, blocks, options.workers):
            total.add(RunFile.open(job.work / name))
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
    bad = Counter(bad.reason for bad in reading.bad)
    total.add_bad(bad, [bad.message for bad in reading.bad])


def _pack_carried(
    job: Job, options: Preparation, runs: Sequence[str], total: _Total
) -> Iterator[str]:
    tasks = gather(job, runs)
    # Tails are nothing; only documents that wait for partners can be worth more processes.
    many = sum(len(task.runs) for task in tasks) * options.seq_len > 1 << 24
    made = (
        _each(options, make_last_run, job, tasks, options.workers)
        if many
        else run_here(make_last_run, job, tasks)
    )
    for name in made:
        total.add(RunFile.open(job.work / name))
        yield name


def _write(
    job: Job,
    options: Preparation,
    inputs: Sequence[Input],
    recipe: Mapping[str, Any],
    runs: Sequence[str],
    reading: Reading,
    total: _Total,
    progress: _Progress,
) -> Summary:
    out, layout = job.work.parent, job.layout
    keys = count_keys(job.work, runs)
    samples = {split: int(keys[split].sum()) for split in SPLITS}
    _check_some(samples, total, options)
    shuffle = Shuffle(out, job.work, tuple(runs), layout, job.about.vocab_size)
    shard_bytes = options.samples_per_shard * (layout.payload + 16)
    shards = sum(-(-count // options.samples_per_shard) for count in samples.values())
    each, writers = shards_per_cell(shards, _writers(options), options.memory, shard_bytes)
    cells = [
        cell
        for split in SPLITS
        for cell in plan_cells(split, keys[split], options.samples_per_shard, each)
    ]
    done: list[Shard] = []
    unigrams = np.zeros(job.about.vocab_size, np.int64)
    with progress.bar("writing", sum(samples.values()), "samples") as bar:
        results: Iterator[Written] = _each(options, write_cell, shuffle, cells, writers)
        for cell, written in zip(cells, results, strict=True):
            done += written.shards
            if cell.split == "train":
                unigrams += written.unigrams
            bar.update(sum(cell.counts))
            progress.tell("writing", bar, samples=int(bar.n), total_samples=sum(samples.values()))

    sources = [
        Source(
            source.name,
            reading.sha256[index],
            total.documents[index],
            tokens=total.tokens[index],
            weight=source.weight,
        )
        for index, source in enumerate(inputs)
    ]
    hashes = [{"name": source.name, "sha256": source.sha256} for source in sources]
    _tidy(out, {shard.shard for shard in done})
    write_atomically(out / RECIPE, _json(dict(recipe, sources=_merged(recipe, hashes))))
    fingerprint = write_dataset(
        out,
        done,
        layout=layout,
        objective=options.objective,
        tokenizer=job.about,
        sources=sources,
        unigrams=unigrams,
        seed=options.seed,
    )
    shutil.rmtree(job.work)
    unknown = job.about.special_ids.get("unk")
    return Summary(
        out=Path(options.out),
        fingerprint=fingerprint,
        samples=samples,
        bytes=sum(shard.bytes for shard in done),
        seconds=time.perf_counter() - progress.begun,
        documents=total.documents.total(),
        sources=sources,
        skipped=dict(total.skipped),
        bad=dict(total.bad),
        packing=total.packing,
        unknown=0 if unknown is None else int(unigrams[unknown]),
    )


def _each(
    options: Preparation,
    function: Callable[[Any, T], R],
    job: Any,
    tasks: Iterable[T],
    workers: int | None,
) -> Iterator[R]:
    if options.engine == "ray":
        return run_ray(function, job, iter(tasks), workers=options.workers)
    if workers == 1:
        return run_here(function, job, iter(tasks))
    return run_processes(function, job, iter(tasks), workers=workers or _cores())


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
    free: int  # on the disk of the folder


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
    return Estimate(
        text=int(text),
        work=int(samples * (layout.payload + 8)),
        shards=int(samples * layout.stride),
        free=shutil.disk_usage(home).free,
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
        return tqdm(  # silent unless stderr is a terminal
            total=total or None, desc=what, unit=unit, unit_scale=True, disable=None, leave=False
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


def _check_some(samples: Mapping[str, int], total: _Total, options: Preparation) -> None:
    if samples["train"]:
        return
    raise CorpusError(
        f"nothing to train on: {total.documents.total()} documents, "
        f"{total.packing['train'].tokens} tokens of them outside the held-out split, no full sample "
        f"of {options.seq_len}; give more text, a shorter seq_len or a smaller val_fraction (it is "
        f"{options.val_fraction})"
    )


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
        "tokenizer": asdict(about),
        "sources": [{"name": source.name, "weight": source.weight} for source in inputs],
    }


def _markup(inputs: Sequence[Input]) -> str | None:
    # The version of what strips the markup, where there is any to strip.
    kinds = {(kind_of(file.path) or ("", ""))[0] for source in inputs for file in source.files}
    if "wiki" not in kinds:
        return None
    wikitext_parser()  # or the error that says how to get it
    return version("mwparserfromhell")


def _without_hashes(found: Mapping[str, Any]) -> dict[str, Any]:
    sources = [
        {key: value for key, value in source.items() if key != "sha256"}
        for source in found.get("sources", ())
    ]
    return dict(found, sources=sources)


def _merged(
    recipe: Mapping[str, Any], hashes: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    return [{**source, **more} for source, more in zip(recipe["sources"], hashes, strict=True)]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


@contextmanager
def _claimed(
    out: Path, recipe: Mapping[str, Any], inputs: Sequence[Input]
) -> Iterator[ShardSet | None]:
    """Hold the folder alone, ready to begin or to continue; or the finished set."""
    handle = None
    try:
        _check_free(out, recipe)  # before anything is made
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
        _lock(handle, out)
        _check_free(out, recipe)  # another run may have been faster
        finished = _finished(out, recipe, inputs)
        if finished is None:
            _check_foreign(out)
            # The manifest first: from here on, whatever happens, the folder is unfinished.
            (out / MANIFEST).unlink(missing_ok=True)
            if _read_json(out / WORK / RECIPE) != recipe:  # none, or of a job that made nothing
                shutil.rmtree(out / WORK, ignore_errors=True)
                (out / WORK).mkdir()
                write_atomically(out / WORK / RECIPE, _json(recipe))
        else:
            shutil.rmtree(out / WORK, ignore_errors=True)
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
    except BlockingIOError as error:
        raise CorpusError(
            f"{out}: another run is writing here; wait for it, or give another folder"
        ) from error


def _check_free(out: Path, recipe: Mapping[str, Any]) -> None:
    # Nothing of anybody else's is in the folder, nor the work of another job.
    if not out.exists():
        return
    if not out.is_dir():
        raise CorpusError(f"{out}: a file; give a folder for the shards")
    names = sorted(entry.name for entry in out.iterdir())
    if names and WORK not in names and _read_json(out / RECIPE) is None:
        raise CorpusError(
            f"{out}: holds {_some(names)}, and no {RECIPE} that would mark it as an earlier run; "
            f"give another folder, or empty this one"
        )
    if not (out / MANIFEST).exists():  # beside finished shards others may put what they like
        _check_foreign(out)
    unfinished = _read_json(out / WORK / RECIPE)
    if unfinished is not None and any((out / WORK).glob("*.run")):
        _refuse_other(out, unfinished, recipe, "an unfinished job", "finish it as it was begun")


def _check_foreign(out: Path) -> None:
    foreign = sorted(entry.name for entry in out.iterdir() if not _ours(entry.name))
    if foreign:
        raise CorpusError(
            f"{out}: holds {_some(foreign)} besides an earlier run; move it out, or give another "
            f"folder"
        )


def _refuse_other(
    out: Path, found: Mapping[str, Any], asked: Mapping[str, Any], what: str, remedy: str
) -> None:
    different = [key for key in asked if found.get(key) != asked[key]]
    if different:
        named = ", ".join(_difference(key, found, asked) for key in different)
        raise CorpusError(
            f"{out}: holds {what} with other options ({named}); {remedy}, give another folder, or "
            f"remove this one"
        )


def _difference(key: str, found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    if isinstance(asked[key], list | dict):
        return f"other {key}"
    return f"{key} {found.get(key)!r} there, {asked[key]!r} asked"


def _finished(out: Path, recipe: Mapping[str, Any], inputs: Sequence[Input]) -> ShardSet | None:
    # The finished set if it is exactly the one asked for; None if it is to be made.
    if not (out / MANIFEST).exists():
        return None
    found = _read_json(out / RECIPE) or {}
    _refuse_other(out, _without_hashes(found), recipe, "finished shards", "keep them")
    hashes = [{"name": source.name, "sha256": hash_input(source)} for source in inputs]
    asked = dict(recipe, sources=_merged(recipe, hashes))
    _refuse_other(out, found, asked, "finished shards", "keep them")
    return _intact(out)


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


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _ours(name: str) -> bool:
    files = "|".join(map(re.escape, (RECIPE, MANIFEST, DESCRIPTION, UNIGRAMS)))
    return name == WORK or bool(
        re.fullmatch(rf"({files}|({'|'.join(SPLITS)})-\d{{6}}\.(tar|sources\.npy))(\.part)?", name)
    )


def _tidy(out: Path, stems: set[str]) -> None:
    # Shards that a run before this one left, of text that changed since, and half-written files.
    for entry in sorted(out.iterdir()):
        stem = entry.name.split(".")[0]
        kept = entry.name == WORK or stem in stems or entry.name == RECIPE
        if not kept or entry.name.endswith(".part"):
            entry.unlink()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _reuse(out: str | os.PathLike[str], finished: ShardSet, seconds: float) -> Summary:
    samples = dict.fromkeys(SPLITS, 0)
    for shard in finished.manifest:
        samples[shard.split] += shard.num_sequences
    return Summary(
        out=Path(out),
        fingerprint=finished.fingerprint,
        samples=samples,
        bytes=sum(shard.bytes for shard in finished.manifest),
        seconds=seconds,
        reused=True,
        documents=sum(source.documents for source in finished.sources),
        sources=list(finished.sources),
    )
