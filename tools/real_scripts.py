"""Other projects' training scripts, one line changed: python tools/real_scripts.py NAME --checkout PATH

NAME is run_mlm_no_trainer, run_clm_no_trainer, run_mlm (Hugging Face transformers), nanogpt or litgpt; PATH is a
checkout of that project, a work tree or a git directory without one. The script is copied, one line is added to
the copy (printed as a diff; the script itself stays as it is, its sha256 is printed), and both are run on
text of this repository, with a tiny model, offline. Checked are, each from what the model was really given:

* keep=1.0   the same batches, outputs and final weights as the plain script, bit for bit
* sifting    every pool is the next rows that were drawn; the scores are those of a model that never had more
             than one layer, which is built at that moment; the kept are its top half, and the model trains on
             exactly those; the selection log says the same
* updates    accumulation that does not divide the epoch: the last partial update happens
* resume     killed in the middle of an epoch and resumed as the script resumes: the batches and the final weights
             of a run that was not killed, wherever the plain script can do that
* two ranks  no sample on both, each sifts its own, keep=1.0 as the plain script; where the script runs on CPUs

Needs what the scripts need, beside siftloader: datasets and accelerate, or litgpt and litdata. A check that a script
cannot be put to is listed with the reason. Ends with 1 if any check failed.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import difflib
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import lzma
import os
import pickle
import platform
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from siftloader.errors import SiftError


REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "shards" / "demo"
VOCABULARY = 8192  # of the demo's tokenizer
ROWS, LENGTH, BATCH = 176, 64, 8  # 11 pools of two batches an epoch, 22 batches without sifting
IGNORED = -100
CLOSE = 2e-5  # between a score and its reference; scores at another depth differ by far more
WRAP = "from siftloader import SiftingDataLoader; train_dataloader = SiftingDataLoader.wrap(train_dataloader, {options})"
ATTACH = "from siftloader.integrations import attach; attach(trainer, {options})"
CALLS = (
    "from siftloader.integrations import sift_calls; get_batch = sift_calls(get_batch, {options})"
)
# The loss stands in the loop, two lines of it, so these go into the line as they are.
LITGPT_LOSS = (
    "score_fn=lambda model, batch: chunked_cross_entropy(model(batch[:, :-1].contiguous().long()), "
    "batch[:, 1:].contiguous().long(), chunk_size=0)"
)


PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "lightning",
    "litgpt",
    "litdata",
    "siftloader",
)
HUGGING_FACE = (
    "accelerate",
    "datasets",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
)
NO_TRAINER = (
    "accelerate 1.15 has no DistributedType.TPU, which the script asks for: it is set to XLA before the script starts",
)


@dataclass(frozen=True)
class Run:
    """One run of a script: plain (``keep`` None) or with the line, and how."""

    name: str
    folder: Path
    keep: float | None = None
    epochs: int = 2
    accumulate: int = 1
    ranks: int = 1
    die_after: int | None = None  # batches trained on
    resumes: str | None = None  # the run whose output it goes on with

    @property
    def pool(self) -> int:
        """Rows of which a batch is chosen."""
        return round(BATCH / (self.keep or 1))

    @property
    def out(self) -> Path:
        """Where the script writes."""
        return self.folder.parent / (self.resumes or self.name) / "out"


@dataclass(frozen=True)
class Target:
    """A script of another project: which line is added where, and how it is run."""

    files: tuple[str, ...]  # of the checkout, the script first
    before: str  # the line stands before this one
    line: str
    model: str  # the class that is trained
    layers: str  # its stack
    depth: str  # and how its configuration counts it
    arguments: Callable[[Run, Path], list[str]]
    prepare: Callable[[Path], None]
    resume: Callable[[Run], list[str]]
    weights: str  # below Run.out
    options: str = "model=model, "
    entry: str = ""  # what is run, the script where it is empty
    masked: bool = False  # inputs are masked, so a text is known by its labels
    shifted: bool = False  # labels stand beside their inputs, not one place on
    preload: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    accumulate: int = 3  # batches to an update, on one rank
    epochs: int = 2
    carries: bool = False  # it counts batches on over the end of an epoch
    draws: bool = True  # from a torch DataLoader, in the process that trains
    die_after: int = 8  # batches, of 11 in an epoch; a checkpoint lies before
    one_rank: str = ""  # why it does not run on two ranks of CPUs
    forgets: str = ""  # why its own resume is not exact
    notes: tuple[str, ...] = ()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(TARGETS))
    parser.add_argument("--checkout", type=Path, required=True, help="of the script's project")
    parser.add_argument("--work", type=Path, default=Path("runs/real_scripts"))
    parser.add_argument("--keep", type=float, default=0.5)
    options = parser.parse_args(arguments)
    work = options.work.resolve() / options.name
    shutil.rmtree(work, ignore_errors=True)
    return (
        0
        if check(options.name, TARGETS[options.name], options.checkout, work, options.keep)
        else 1
    )


def check(name: str, target: Target, checkout: Path, work: Path, keep: float) -> bool:
    """Run a script and its copy with the line, print what held; True if all of it did."""
    work.mkdir(parents=True)
    commit = bring(checkout, target.files, work / "plain")
    script = work / "plain" / target.files[0]
    text = script.read_text()
    sifts = Run("sifted", work / "sifted", keep, target.epochs, target.accumulate)
    both = [
        text.splitlines(True),
        patched(text, target.before, line_of(target, sifts)).splitlines(True),
    ]
    print("".join(difflib.unified_diff(*both, "the script", "the copy", n=1)))
    print(f"{name} of {checkout} at {commit}")
    print(f"sha256 {hashlib.sha256(script.read_bytes()).hexdigest()}")
    for note in target.notes:
        print(f"note: {note}")
    target.prepare(work)
    with Table(target, work) as table:
        one_rank(table, target, sifts)
        if target.one_rank:
            table.rows.append(("two ranks", "not run", target.one_rank))
        else:
            two_ranks(table, target, sifts)
    return table.printed()


def one_rank(table: Table, target: Target, sifts: Run) -> None:
    """All that can be checked in one process."""
    plain, same = like(sifts, "plain", keep=None), like(sifts, "keep-1", keep=1.0)
    for run in (plain, same, sifts):
        table.run(run)
    table.row("keep=1.0: same batches, same outputs", lambda: same_training(*seen(plain, same)))
    table.row("keep=1.0: same final weights", lambda: same_weights(target, plain, same))
    table.row(
        "sifting is on, and right", lambda: sifted(*seen(sifts), sifts.pool, selections(sifts, 0))
    )
    if target.draws:
        table.row(
            "pools are the next rows drawn", lambda: drawn_in_order(*seen(sifts), sifts.pool)
        )
    table.row("updates", lambda: updated(*seen(sifts), sifts, target.carries))
    broken, resumed = restarted(table, target, sifts)
    table.row(
        "resumed: its epoch goes on",
        lambda: continues(*seen(sifts, broken, resumed), sifts),
        target.forgets,
    )
    table.row("resumed: sifting is on, and right", lambda: sifted(*seen(resumed), sifts.pool))
    why = "and so with the plain script"
    exact = table.row(
        "resumed: same rows to the end", lambda: identical(*seen(sifts, resumed)), why
    )
    exact &= table.row(
        "resumed: same final weights", lambda: same_weights(target, sifts, resumed), why
    )
    if exact:
        return
    broken, resumed = restarted(table, target, plain)
    own = "the script's own"
    table.row(
        "  plain script: its epoch goes on",
        lambda: continues(*seen(plain, broken, resumed), plain),
        own,
    )
    exact = table.row(
        "  plain script: same rows to the end", lambda: identical(*seen(plain, resumed)), own
    )
    exact &= table.row(
        "  plain script: same final weights", lambda: same_weights(target, plain, resumed), own
    )
    if exact:
        table.failed = True
        table.rows.append(("resumed", "FAILED", "exact with the plain script, not with the line"))


def two_ranks(table: Table, target: Target, sifts: Run) -> None:
    """The same on two ranks, where the script runs on CPUs."""
    sifts = like(sifts, "sifted-2", ranks=2, accumulate=target.accumulate + 1)
    plain, same = like(sifts, "plain-2", keep=None), like(sifts, "keep-1-2", keep=1.0)
    for run in (plain, same, sifts):
        table.run(run)
    for rank in range(2):
        on = f"2 ranks, rank {rank}: "
        at = [records(run)[rank : rank + 1] for run in (plain, same, sifts)]
        table.row(on + "keep=1.0, same outputs", partial(same_training, *at[0], *at[1]))
        table.row(
            on + "sifting",
            lambda at=at, rank=rank: sifted(*at[2], sifts.pool, selections(sifts, rank)),
        )
        table.row(on + "updates", lambda at=at: updated(*at[2], sifts, target.carries))
    table.row("2 ranks: keep=1.0, same final weights", lambda: same_weights(target, plain, same))
    table.row("2 ranks: no sample on both", lambda: disjoint(seen(sifts), sifts.epochs))


def like(run: Run, name: str, **differences: Any) -> Run:
    """The same run under another name, with differences."""
    return replace(run, name=name, folder=run.folder.parent / name, **differences)


def restarted(table: Table, target: Target, run: Run) -> tuple[Run, Run]:
    """The run killed in the middle of an epoch, and the one that goes on with it."""
    broken = like(run, f"{run.name}-broken", die_after=target.die_after)
    resumed = like(run, f"{run.name}-resumed", resumes=broken.name)
    table.run(broken)
    table.run(resumed)
    return broken, resumed


def seen(*runs: Run) -> list[Events]:
    """What was written down, of all ranks of one run, or of one rank of several."""
    found = [records(run) for run in runs]
    if not all(found):
        raise Failed("a run that it takes was not run")
    return found[0] if len(runs) == 1 else [ranks[0] for ranks in found]


class Table:
    """Runs, what they took, and what was found."""

    def __init__(self, target: Target, work: Path) -> None:
        self.target, self.work = target, work
        self.rows: list[tuple[str, str, str]] = []
        self.seconds: dict[str, float] = {}
        self.failed = False
        environment = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(work / "home"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            **target.env,
        }
        self.stable = Stable(target.preload, environment)

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.stable.close()

    def run(self, run: Run) -> None:
        """Run a script; one that ends otherwise than it should is a check that failed."""
        began = time.monotonic()
        try:
            execute(self.target, run, self.work, self.stable)
        except RuntimeError as error:
            print(error)
            self.failed = True
            self.rows.append((f"run {run.name}", "FAILED", str(error).splitlines()[0]))
        self.seconds[run.name] = time.monotonic() - began
        print(f"ran {run.name} in {self.seconds[run.name]:.0f} s", flush=True)

    def row(self, what: str, finding: Callable[[], str], excuse: str = "") -> bool:
        """Add a check; one that fails for a known reason of the script's own is listed with it."""
        try:
            self.rows.append((what, "ok", finding()))
        except (Failed, SiftError, OSError, IndexError, ValueError, RuntimeError) as error:
            self.failed |= not excuse
            words = f"{error}" + (f" ({excuse})" if excuse else "")
            self.rows.append((what, "no" if excuse else "FAILED", words))
            return False
        return True

    def printed(self) -> bool:
        """Print the table; True if nothing failed."""
        print()
        for what, outcome, detail in self.rows:
            print(f"{outcome:7} {what:38} {detail}")
        spent = (f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
        print(f"seconds a run: {', '.join(spent)}")
        print(
            f"{platform.machine()}, {os.cpu_count()} cores | Python {platform.python_version()}, "
            f"{', '.join(versions(PACKAGES))} | {datetime.date.today()}"
        )
        return not self.failed


def versions(names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---- the copy ----


def bring(checkout: Path, files: Iterable[str], to: Path) -> str:
    """Copy files and folders of a checkout, byte for byte; returns which commit they are of."""
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    to.mkdir(parents=True)
    for name in files:
        if (source := checkout / name).is_dir():
            shutil.copytree(source, to / name, dirs_exist_ok=True)
        elif source.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to / name)
        else:
            packed = subprocess.run([*git, "archive", "HEAD", name], capture_output=True)
            if packed.returncode:
                raise SystemExit(f"{checkout}: no {name} in there; give a checkout of its project")
            with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
                archive.extractall(to, filter="data")
    return commit.stdout.strip() or "of no git repository"


def patched(text: str, before: str, line: str) -> str:
    """The script with the line, indented as its neighbour; ValueError unless that is there exactly once."""
    lines = text.splitlines(keepends=True)
    found = [i for i, each in enumerate(lines) if each.strip() == before.strip()]
    if len(found) != 1:
        raise ValueError(
            f"the line {before.strip()!r} is there {len(found)} times, once is needed: another version "
            f"of the script? Say in tools/real_scripts.py where the line goes"
        )
    at = found[0]
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    return "".join([*lines[:at], f"{indent}{line}\n", *lines[at:]])


# ---- running ----


class Stable:
    """A process that has imported what the scripts import, and forks to run them: importing takes most of their time.

    Nothing else happens in it, so that a fork is as good as a new process.
    """

    def __init__(self, preload: Iterable[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "stable", *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def run(self, job: Mapping[str, Any]) -> list[int]:
        """Exit codes of the ranks."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the process that runs the scripts ended with {self._process.wait()}"
            )
        return list(json.loads(answer))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def execute(target: Target, run: Run, work: Path, stable: Stable) -> None:
    """Run the script in processes that are watched; RuntimeError with its last words if it fails."""
    code = work / "plain"
    if run.keep is not None:
        code = work / f"{run.name}-copy"
        shutil.copytree(work / "plain", code)
        script = code / target.files[0]
        script.write_text(patched(script.read_text(), target.before, line_of(target, run)))
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "record": str(run.folder),
        "model": target.model,
        "layers": target.layers,
        "depth": target.depth,
        "masked": target.masked,
        "shifted": target.shifted,
        "die_after": run.die_after,
    }
    console = run.folder / "console.txt"
    resume = target.resume(run) if run.resumes else []
    job = {
        "arguments": [
            str(code / (target.entry or target.files[0])),
            *target.arguments(run, work),
            *resume,
        ],
        "folder": str(code),
        "console": str(console),
        "environment": {"REAL_SCRIPTS": json.dumps(settings)},
        "ranks": run.ranks,
    }
    ended = stable.run(job)
    wanted = [0] * run.ranks if run.die_after is None else [-signal.SIGKILL]
    if ended != wanted:
        last = "".join(console.read_text().splitlines(keepends=True)[-30:])
        raise RuntimeError(
            f"run {run.name} ended with {ended}, not {wanted}; {console} ends with\n{last}"
        )


def line_of(target: Target, run: Run) -> str:
    """The line for this run."""
    # A run that goes on with another's goes on with its log, too.
    log = run.out.parent / "selections.parquet"
    options = f"{target.options}keep={run.keep}, warmup_steps=0"
    if run.keep != 1.0:
        options += f", log_selections={str(log)!r}"
    return target.line.format(options=options)


# ---- the checks, each on what was written down ----

Events = list[dict[str, Any]]


class Failed(Exception):
    """A check that did not hold, in words."""


def records(run: Run) -> list[Events]:
    """What every rank of a run wrote down."""
    found = sorted(run.folder.glob("rank-*.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in found]


def of(events: Events, kind: str) -> Events:
    return [event for event in events if event["event"] == kind]


def pools(events: Events, size: int) -> Events:
    """What was scored as a pool of ``size`` rows, or of fewer at the end of an epoch.

    A pool may be scored in several calls, and rows of it before, to hear how the model reads its labels: what was
    said of a row last counts.
    """
    found: Events = []
    closed = True
    for event in events:
        if event["event"] == "trained":
            closed = True
        if event["event"] != "scored":
            continue
        scored = {
            row: (text, *values)
            for row, text, *values in zip(
                event["rows"],
                event["texts"],
                event["reference"] or [None] * len(event["rows"]),
                event["full"] or [None] * len(event["rows"]),
                strict=True,
            )
        }
        if closed or (len(found[-1]) >= size and not scored.keys() <= found[-1].keys()):
            found.append({})
        closed = False
        found[-1].update(scored)
        if len(scored) == len(found[-1]):
            found[-1] = scored  # in their order
    names = ("texts", "reference", "full")
    return [
        {
            "rows": list(pool),
            **dict(zip(names, map(list, zip(*pool.values(), strict=True)), strict=True)),
        }
        for pool in found
    ]


def same_training(one: Events, other: Events) -> str:
    """The same batches, in the same order, and the same bits came out of the model."""
    first, second = of(one, "trained"), of(other, "trained")
    if not first or len(first) != len(second):
        raise Failed(f"{len(first)} batches were trained on, and {len(second)}")
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        if a != b:
            what = "outputs differ" if a["rows"] == b["rows"] else "the rows differ"
            raise Failed(f"batch {number} of {len(first)}: {what}")
    return f"{len(first)} batches"


def sifted(
    events: Events, size: int, log: Mapping[int, list[tuple[float, bool]]] | None = None
) -> str:
    """Every batch is the top half of its pool by the reference, and the log says the same."""
    found, trained = pools(events, size), of(events, "trained")
    if not found or not trained:
        raise Failed(f"{len(found)} pools were scored: this loader does not sift")
    while found and trained[0]["rows"][0] not in found[0]["rows"]:  # skipped, after a restart
        found = found[1:]
    if not 0 <= len(found) - len(trained) <= 1:  # one may be drawn ahead
        raise Failed(f"{len(found)} pools were scored, {len(trained)} batches trained on")
    worst, apart, wanted = 0.0, 0.0, len(trained[0]["rows"])
    for number, (pool, batch) in enumerate(zip(found, trained, strict=False)):
        rows, scores = pool["rows"], pool["reference"]
        if None in scores:
            raise Failed(f"pool {number}: its rows were never drawn")
        if strange := [row for row in batch["rows"] if row not in rows]:
            raise Failed(f"batch {number}: {len(strange)} rows are not of its pool")
        kept = [rows.index(row) for row in batch["rows"]]
        if kept != sorted(kept) or len(set(kept)) != wanted:
            raise Failed(
                f"batch {number}: the kept are {kept}, wanted are {wanted} in their order"
            )
        dropped = [i for i in range(len(rows)) if i not in kept]
        if dropped and min(scores[i] for i in kept) < max(scores[i] for i in dropped) - CLOSE:
            raise Failed(f"batch {number}: the kept are not the top of the pool by the reference")
        apart += sum(abs(a - b) for a, b in zip(scores, pool["full"], strict=True)) / len(rows)
        if log is None:
            continue
        logged = log.get(number)
        if logged is None or len(logged) != len(rows):
            raise Failed(f"pool {number} is not in the selection log")
        if [i for i, (_, keeps) in enumerate(logged) if keeps] != kept:
            raise Failed(f"pool {number}: the log names others than were trained on")
        worst = max(worst, *(abs(score - scores[i]) for i, (score, _) in enumerate(logged)))
    if worst > CLOSE:
        raise Failed(f"scores are up to {worst:.1e} off the reference")
    if apart < 100 * CLOSE * len(trained):
        raise Failed("all depths score alike here, so this shows nothing")
    sizes = f"{sum(len(pool['rows']) for pool in found)} candidates in {len(found)} pools"
    return sizes + ("" if log is None else f", scores within {worst:.0e} of the reference")


def drawn_in_order(events: Events, size: int) -> str:
    """The pools are the rows that were drawn, none left out but fewer than a batch at the end of an epoch."""
    first = of(events, "trained")[0]["rows"][0]
    data = next((e["data"] for e in of(events, "drawn") if first in e["rows"]), None)
    if data is None:
        raise Failed("what was trained on was never drawn")
    stream = [row for e in of(events, "drawn") if e["data"] == data for row in e["rows"]]
    at = 0
    for number, pool in enumerate(pools(events, size)):
        rows = pool["rows"]
        skipped = next(
            (n for n in range(BATCH) if stream[at + n : at + n + len(rows)] == rows), None
        )
        if skipped is None:
            raise Failed(f"pool {number} is not the next {len(rows)} rows that were drawn")
        at += skipped + len(rows)
    return f"{at} of {len(stream)} rows drawn"


def updated(events: Events, run: Run, carries: bool) -> str:
    """An optimizer step after so many batches, and after those that are left at the end of an epoch."""
    groups, batches = [], 0
    for event in events:
        batches += event["event"] == "trained"
        if event["event"] == "updated":
            groups.append(batches)
            batches = 0
    total, epochs = len(of(events, "trained")), 1 if carries else run.epochs
    full, last = divmod(total // epochs, run.accumulate)
    left, part = (last, []) if carries else (0, [last] * (last > 0))
    wanted = ([run.accumulate] * full + part) * epochs
    if total % epochs or batches != left or groups != wanted:
        raise Failed(f"updates after {groups} batches (and {batches} left), wanted {wanted}")
    return f"after {groups[: len(groups) // epochs]} batches" + f", {left} left" * (left > 0)


def continues(unbroken: Events, broken: Events, resumed: Events, run: Run) -> str:
    """In the epoch that was broken off, every candidate comes that came, and no other."""
    whole, before, after = (of(events, "trained") for events in (unbroken, broken, resumed))
    start, each = len(whole) - len(after), len(whole) // run.epochs
    if not 0 < start <= len(before):
        raise Failed(f"{len(before)} of {len(whole)} batches, then {len(after)}: what was lost?")
    compare(range(len(before)), whole, before, "rows")
    here = range(start, start - start % each + each)
    if wanted := pools(unbroken, run.pool)[
        start:
    ]:  # a script that skips batches may have them scored before
        whole, after = wanted, pools(resumed, run.pool)[-len(wanted) :]
    else:
        whole = whole[start:]
    compare(here, whole, after, "texts")
    return f"killed after {len(before)} batches of {each}, went on at {start}"


def identical(unbroken: Events, resumed: Events) -> str:
    """To the end of the run, the resumed run trains on the very rows, masks included."""
    whole, after = of(unbroken, "trained"), of(resumed, "trained")
    start = len(whole) - len(after)
    if not after or start < 0:
        raise Failed(f"{len(after)} batches after the restart, {len(whole)} in all")
    compare(range(start, len(whole)), whole[start:], after, "rows")
    return f"{len(after)} batches"


def compare(numbers: range, wanted: Events, found: Events, name: str) -> None:
    """Rows or texts of the batches of these numbers are the same in both."""
    for number, one, other in zip(numbers, wanted, found, strict=False):
        if one[name] != other[name]:
            raise Failed(f"batch {number} has other {name}")


def disjoint(ranks: list[Events], epochs: int) -> str:
    """In an epoch no text is trained on by two ranks."""
    counts = []
    for here, there in zip(
        *(per_epoch(of(events, "trained"), epochs) for events in ranks), strict=True
    ):
        if not here or not there or here & there:
            raise Failed(
                f"{len(here)} and {len(there)} texts, {len(here & there)} of them on both"
            )
        counts.append(len(here) + len(there))
    return f"{counts} texts an epoch"


def per_epoch(batches: Events, epochs: int) -> list[set[str]]:
    """The texts of every epoch."""
    each = max(1, len(batches) // epochs)
    parts = [batches[first : first + each] for first in range(0, len(batches), each)]
    return [{text for batch in part for text in batch["texts"]} for part in parts]


def selections(run: Run, rank: int) -> dict[int, list[tuple[float, bool]]]:
    """Score and kept of every candidate, by pool, of a rank."""
    from siftloader.selection_report import read_log

    table = read_log(run.out.parent / "selections.parquet").to_pydict()
    found: dict[int, list[tuple[float, bool]]] = {}
    for of_rank, pool, score, kept in zip(
        *(table[name] for name in ("rank", "pool", "score", "kept")), strict=True
    ):
        if of_rank == rank:
            found.setdefault(pool, []).append((score, kept))
    return found


def weights(target: Target, run: Run) -> str:
    """Digest of the tensors that the script saved at its end."""
    path = run.out / target.weights
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return digest(saved["model"])


def same_weights(target: Target, one: Run, other: Run) -> str:
    if (a := weights(target, one)) != (b := weights(target, other)):
        raise Failed(f"final weights {a} and {b}")
    return f"final weights {a}"


# ---- in the process of the script ----


def serve(preload: list[str]) -> None:
    """Fork for every job that comes in as a line, answer with the exit codes of its ranks."""
    for name in ("siftloader", "torch._dynamo", *preload):
        importlib.import_module(name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        environment = dict(job["environment"])
        if job["ranks"] > 1:  # as torchrun says it
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                environment["MASTER_PORT"] = str(free.getsockname()[1])
            environment |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(job["ranks"])}
            environment |= {"LOCAL_WORLD_SIZE": str(job["ranks"])}
        children = []
        for rank in range(job["ranks"]):
            if not (child := os.fork()):
                if job["ranks"] > 1:
                    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ.update(environment)
                words = os.open(job["console"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for stream, to in ((0, os.open(os.devnull, os.O_RDONLY)), (1, words), (2, words)):
                    os.dup2(to, stream)
                os.chdir(job["folder"])
                watch(job["arguments"])
                return
            children.append(child)
        print(json.dumps(waited_for(children)), flush=True)


def waited_for(children: list[int], grace: float = 20.0, limit: float = 900.0) -> list[int]:
    """Their exit codes; where one failed, or after all of ``limit`` seconds, the others are killed."""
    ended: dict[int, int] = {}
    give_up = time.monotonic() + limit
    while len(ended) < len(children):
        for child in children:
            if child not in ended and (status := os.waitpid(child, os.WNOHANG))[0]:
                ended[child] = os.waitstatus_to_exitcode(status[1])
                if ended[child]:
                    give_up = min(give_up, time.monotonic() + grace)
        if time.monotonic() > give_up:
            for child in children:
                if child not in ended:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    return [ended[child] for child in children]


def watch(arguments: list[str]) -> None:
    """Run a script as it would run by itself, and write down what its model is given."""
    Watch(json.loads(os.environ["REAL_SCRIPTS"])).begin()
    mend()
    script = Path(arguments[0])
    sys.argv = arguments
    sys.path[0] = str(script.parent if script.name != "__main__.py" else script.parent.parent)
    runpy.run_path(str(script), run_name="__main__")


def mend() -> None:
    """What a script of these versions needs of the libraries of today; said in ``Target.notes``."""
    if "accelerate" in sys.modules or importlib.util.find_spec("accelerate"):
        from accelerate import DistributedType

        if not hasattr(DistributedType, "TPU"):
            DistributedType.TPU = DistributedType.XLA


class Watch:
    """Hooks that torch offers for every module, optimizer and loader, writing one JSON line an event.

    ``drawn`` (rows that a DataLoader fetched), ``scored`` (rows given to a cut model, with what an independently
    built model of one layer says of them), ``trained`` (rows, digest of what came out), ``updated``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.labels: dict[str, Tensor] = {}  # of the rows drawn, by the digest of their inputs
        self.live: nn.Module | None = None
        self.trained, self.busy = 0, False
        self.datasets: list[Any] = []

    def begin(self) -> None:
        from torch.nn.modules.module import register_module_forward_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook
        from torch.utils.data._utils import fetch

        register_module_forward_hook(self.called, with_kwargs=True)
        register_optimizer_step_post_hook(lambda *_: self.write("updated"))
        # Nothing else sees what is drawn: a loader in between may be the one that is looked at.
        for fetcher in (fetch._MapDatasetFetcher, fetch._IterableDatasetFetcher):
            fetcher.fetch = self.watched_fetch(fetcher.fetch)

    def watched_fetch(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        def fetch(fetcher: Any, index: Any) -> Any:
            batch = draw(fetcher, index)
            if (found := parts(batch)) is not None:
                inputs, labels = found
                for name, row in zip(
                    digests(inputs), labels if labels is not None else (), strict=False
                ):
                    self.labels[name] = row
                data = next((i for i, d in enumerate(self.datasets) if d is fetcher.dataset), None)
                if data is None:
                    data = len(self.datasets)
                    self.datasets.append(fetcher.dataset)
                self.write(
                    "drawn", data=data, rows=digests(inputs), texts=self.texts(inputs, labels)
                )
            return batch

        return fetch

    def texts(self, inputs: Tensor, labels: Tensor | None) -> list[str]:
        if labels is None or not self.settings["masked"]:
            return digests(inputs)
        return digests(torch.where(labels == IGNORED, inputs, labels))

    def called(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.busy or type(module).__name__ != self.settings["model"]:
            return
        given = parts(kwargs) or parts(args)
        if given is None or given[0].device.type == "meta":
            return
        inputs, labels = given
        known = [self.labels.get(name) for name in digests(inputs)]
        if all(row is not None for row in known):  # else those of the call, which may be a trial's
            labels = torch.stack(known)  # type: ignore[arg-type]
        rows, texts = digests(inputs), self.texts(inputs, labels)
        whole = getattr(module.config, self.settings["depth"])
        if len(module.get_submodule(self.settings["layers"])) < whole:
            scores = [
                None if labels is None else self.reference(module, args, kwargs, labels, d)
                for d in (1, whole)
            ]
            self.write("scored", rows=rows, texts=texts, reference=scores[0], full=scores[1])
        elif module.training and torch.is_grad_enabled():
            self.live = module
            self.write("trained", rows=rows, texts=texts, out=digest(output))
            self.trained += 1
            if self.trained == self.settings["die_after"]:
                os.kill(os.getpid(), signal.SIGKILL)

    def reference(
        self, twin: nn.Module, args: Any, kwargs: Any, labels: Tensor, depth: int
    ) -> list[float]:
        """Loss per row [P] of a new model of so many layers with the weights of now."""
        self.busy = True
        stream = torch.get_rng_state()
        # We are in the middle of a scoring, which may be listening for the losses that the model computes.
        with torch._C.DisableTorchFunction():
            try:
                return self.losses(twin, args, kwargs, labels, depth)
            finally:
                torch.set_rng_state(stream)
                self.busy = False

    def losses(
        self, twin: nn.Module, args: Any, kwargs: Any, labels: Tensor, depth: int
    ) -> list[float]:
        source = (self.live or self.found(twin)).state_dict()
        config = copy.copy(twin.config)
        setattr(config, self.settings["depth"], depth)
        model = type(twin)(config)
        model.load_state_dict({name: source[name] for name in model.state_dict()})
        model.eval()
        with torch.no_grad():
            given = {name: value for name, value in kwargs.items() if name != "labels"}
            logits = first_tensor(model(*args, **given)).float()
        if self.settings["shifted"]:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(labels.shape)
        scores = losses.sum(1) / (labels != IGNORED).sum(1)
        return [float(score) for score in scores]

    def found(self, twin: nn.Module) -> nn.Module:
        """The model that is trained, before the first batch shows it: the whole one that shares the twin's weights."""
        first = next(twin.parameters())
        for thing in gc.get_objects():
            if type(thing) is type(twin) and any(each is first for each in thing.parameters()):
                whole = getattr(thing.config, self.settings["depth"])
                if len(thing.get_submodule(self.settings["layers"])) == whole:
                    return thing
        raise RuntimeError(f"no whole {type(twin).__name__} lives here")

    def write(self, event: str, **what: Any) -> None:
        rank = os.environ.get("RANK", "0")
        with (Path(self.settings["record"]) / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, **what}) + "\n")


def parts(batch: Any) -> tuple[Tensor, Tensor | None] | None:
    """Inputs and labels [rows, T] of a batch, or of the arguments of a call; None if it is neither."""
    if isinstance(batch, Mapping):
        inputs, labels = batch.get("input_ids"), batch.get("labels")
    elif isinstance(batch, Tensor):
        inputs, labels = batch[:, :-1], batch[:, 1:].long()
    elif isinstance(batch, (tuple, list)) and batch:
        inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
    else:
        return None
    if not isinstance(inputs, Tensor) or inputs.ndim != 2:
        return None
    return inputs, labels if isinstance(labels, Tensor) else None


def digests(rows: Tensor) -> list[str]:
    """One digest per row [rows, T]."""
    return [digest(row.long()) for row in rows]


def digest(output: Any) -> str:
    """Of all tensors that a model gave out, bit for bit."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors(output):
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.reshape(-1)]
    values = output.values() if isinstance(output, Mapping) else output
    return [leaf for value in values if value is not None for leaf in tensors(value)]


def first_tensor(output: Any) -> Tensor:
    """The logits [P, T, V] of what a model gives out without a loss, or with one."""
    return next(tensor for tensor in outputs(output) if tensor.ndim == 3)


def outputs(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Tensor)]


# ---- the scripts ----


def text_of(tokens_of: Callable[[str], int], rows: int, start: int = 0) -> str:
    """Lines of the demo's prose that hold just so many rows of LENGTH tokens."""
    with lzma.open(DEMO / "embedded_pd.txt.xz", "rt") as file:
        lines = [line for line in file.read(400_000).splitlines() if line.strip()][start:]
    taken, tokens = [], 0
    for line in lines:
        while tokens + tokens_of(line) >= (rows + 1) * LENGTH:
            line = line.rpartition(" ")[0]
        taken.append(line)
        tokens += tokens_of(line)
        if tokens >= rows * LENGTH:
            return "\n".join(taken) + "\n"
    raise AssertionError("the demo's text is too short")


def words(work: Path) -> Callable[[str], int]:
    """The demo's tokenizer as a folder at ``work / "tokenizer"``; returns what counts the tokens of a line."""
    from tokenizers import Tokenizer

    folder = work / "tokenizer"
    folder.mkdir(parents=True)
    shutil.copyfile(DEMO / "tokenizer.json", folder / "tokenizer.json")
    special = {
        f"{name}_token": f"[{name.upper()}]" for name in ("mask", "pad", "cls", "sep", "unk")
    }
    special["bos_token"] = special["cls_token"]  # litgpt wants one
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LENGTH, **special}
        )
    )
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return lambda line: len(tokenizer.encode(line).ids)


def hugging_face(work: Path) -> None:
    count = words(work)
    (work / "train.txt").write_text(text_of(count, ROWS))
    (work / "validation.txt").write_text(text_of(count, 16, start=600))
    common = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.2,
    }  # depths that differ in their scores
    bert = {
        "model_type": "bert",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
    }
    bert |= {"intermediate_size": 64, "max_position_embeddings": LENGTH}
    gpt2 = {"model_type": "gpt2", "n_layer": 4, "n_embd": 32, "n_head": 2, "n_positions": LENGTH}
    for name, config in (("bert", bert), ("gpt2", gpt2)):
        (work / name).mkdir()
        (work / name / "config.json").write_text(json.dumps(config | common))


def texts_and_model(run: Run, work: Path, model: str) -> list[str]:
    given = {
        "train_file": work / "train.txt",
        "validation_file": work / "validation.txt",
        "config_name": work / model,
        "tokenizer_name": work / "tokenizer",
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": run.epochs,
        "gradient_accumulation_steps": run.accumulate,
        "learning_rate": 1e-3,
        "seed": 0,
        "output_dir": run.out,
        "block_size" if model == "gpt2" else "max_seq_length": LENGTH,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def no_trainer(run: Run, work: Path, model: str) -> list[str]:
    return [*texts_and_model(run, work, model), "--checkpointing_steps", "2"]


def with_trainer(run: Run, work: Path) -> list[str]:
    given = "--do_train --use_cpu --save_steps 2 --logging_steps 1 --report_to none"
    given += " --ddp_backend gloo" * (run.ranks > 1)
    return [*texts_and_model(run, work, "bert"), *given.split()]


def latest(run: Run, pattern: str) -> str:
    """The checkpoint that the broken run wrote last."""
    found = sorted(
        run.out.glob(pattern), key=lambda path: int(path.name.split("-")[-1].split("_")[-1])
    )
    if not found:
        raise RuntimeError(f"no {pattern} in {run.out}: the run was killed before it wrote one")
    return str(found[-1])


def tokens_in_a_file(work: Path) -> None:
    import numpy as np
    from tokenizers import Tokenizer

    count, tokenizer = words(work), Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    (work / "data").mkdir()
    for name, rows, start in (("train", ROWS, 0), ("val", 16, 600)):
        ids = tokenizer.encode(text_of(count, rows, start)).ids
        np.array(ids, np.uint16).tofile(work / "data" / f"{name}.bin")
    (work / "data" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": VOCABULARY}))


def nanogpt(run: Run, work: Path) -> list[str]:
    given = {
        "out_dir": run.out,
        "dataset": work / "data",
        "device": "cpu",
        "dtype": "float32",
        "compile": False,
        "eval_interval": 2,
        "eval_iters": 2,
        "max_iters": 6,
        "gradient_accumulation_steps": run.accumulate,
        "batch_size": BATCH,
        "block_size": LENGTH,
        "n_layer": 4,
        "n_head": 2,
        "n_embd": 32,
        "dropout": 0.1,
    }
    return [f"--{name}={value}" for name, value in given.items()]


def texts_in_folders(work: Path) -> None:
    count = words(work)
    # A sample of litgpt's takes one token more, and the file one to begin with.
    rows = ROWS + -(-(ROWS + 1) // LENGTH)
    for name, lines, start in (("train", rows, 0), ("val", 18, 600)):
        (work / name).mkdir()
        (work / name / "text.txt").write_text(text_of(count, lines, start))


def litgpt(run: Run, work: Path) -> list[str]:
    batches = run.epochs * ROWS // BATCH // 2
    given = {
        "model_config.name": "tiny",
        "model_config.block_size": LENGTH,
        "model_config.n_layer": 4,
        "model_config.n_head": 2,
        "model_config.n_embd": 32,
        "model_config.vocab_size": VOCABULARY,
        "out_dir": run.out,
        "tokenizer_dir": work / "tokenizer",
        "data": "TextFiles",
        "data.train_data_path": work / "train",
        "data.val_data_path": work / "val",
        "data.num_workers": 0,
        "precision": "32-true",
        "devices": run.ranks,
        "logger_name": "csv",
        "train.micro_batch_size": BATCH,
        "train.global_batch_size": BATCH * run.accumulate * run.ranks,
        "train.max_tokens": batches * BATCH * LENGTH * run.ranks,
        "train.lr_warmup_steps": 1,
        "train.save_interval": 2,
        "eval.interval": 2,
        "eval.max_iters": 1,
    }
    return ["pretrain", "tiny", *(f"--{name}={value}" for name, value in given.items())]


TARGETS = {
    "run_mlm_no_trainer": Target(
        files=("examples/pytorch/language-modeling/run_mlm_no_trainer.py",),
        before="# Optimizer",
        line=WRAP,
        model="BertForMaskedLM",
        layers="bert.encoder.layer",
        depth="num_hidden_layers",
        arguments=lambda run, work: no_trainer(run, work, "bert"),
        prepare=hugging_face,
        preload=HUGGING_FACE,
        resume=lambda run: ["--resume_from_checkpoint", latest(run, "step_*")],
        weights="model.safetensors",
        masked=True,
        env={"ACCELERATE_USE_CPU": "1"},
        notes=NO_TRAINER,
    ),
    "run_clm_no_trainer": Target(
        files=("examples/pytorch/language-modeling/run_clm_no_trainer.py",),
        before="# Optimizer",
        line=WRAP,
        model="GPT2LMHeadModel",
        layers="transformer.h",
        depth="n_layer",
        arguments=lambda run, work: no_trainer(run, work, "gpt2"),
        prepare=hugging_face,
        preload=HUGGING_FACE,
        resume=lambda run: ["--resume_from_checkpoint", latest(run, "step_*")],
        weights="model.safetensors",
        shifted=True,
        env={"ACCELERATE_USE_CPU": "1"},
        notes=NO_TRAINER,
    ),
    "run_mlm": Target(
        files=("examples/pytorch/language-modeling/run_mlm.py",),
        before="train_result = trainer.train(resume_from_checkpoint=checkpoint)",
        line=ATTACH,
        options="",
        model="BertForMaskedLM",
        layers="bert.encoder.layer",
        depth="num_hidden_layers",
        arguments=with_trainer,
        prepare=hugging_face,
        preload=HUGGING_FACE,
        resume=lambda run: ["--resume_from_checkpoint", latest(run, "checkpoint-*")],
        weights="model.safetensors",
        masked=True,
        notes=("--do_eval is left out: evaluate.load() wants the network",),
    ),
    "nanogpt": Target(
        files=("train.py", "model.py", "configurator.py"),
        before="X, Y = get_batch('train') # fetch the very first batch",
        line=CALLS,
        model="GPT",
        layers="transformer.h",
        depth="n_layer",
        arguments=nanogpt,
        prepare=tokens_in_a_file,
        resume=lambda run: ["--init_from=resume"],
        weights="ckpt.pt",
        draws=False,
        epochs=1,
        carries=True,
        die_after=13,
        one_rank="its DDP branch puts rank n on cuda:n",
        forgets="it saves no random state: what is resumed draws what a new run draws",
        notes=("--compile=False: hooks that watch would be compiled, too",),
    ),
    "litgpt": Target(
        files=("litgpt/pretrain.py", "litgpt"),
        before="if initial_checkpoint_dir:",
        line=WRAP,
        options=f"model=model, {LITGPT_LOSS}, ",
        model="GPT",
        layers="transformer.h",
        depth="n_layer",
        arguments=litgpt,
        prepare=texts_in_folders,
        preload=("lightning", "litdata", "jsonargparse", "torchmetrics", "transformers"),
        resume=lambda run: ["--resume=true"],
        weights="final/lit_model.pth",
        entry="litgpt/__main__.py",
        env={"TORCHDYNAMO_DISABLE": "1"},
        carries=True,
        one_rank="two devices take its FSDPStrategy, which is for CUDA",
        notes=("torch.compile is switched off: hooks that watch would be compiled, too",),
    ),
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["stable"]:
        serve(sys.argv[2:])
    else:
        sys.exit(main())
