"""Corpus preparation, measured beside the tokenizer alone and beside other tools.

    python tools/bench_prepare.py --corpus texts/ --tokenizer bert-base-uncased/tokenizer.json \\
        [--workers 2] [--repeats 3] [--rivals-python venv/bin/python ...] [--scale 20e9] [--json all.json]

CORPUS is a folder of .txt, documents separated by blank lines. Every arm is a process of its own, from
start to exit, on the same documents, after all files were read once (so from the page cache).

* bare: the tokenizer on documents that are in memory already, and its ids as uint16, nothing else. A
  search over ways to call it comes first (threads or processes, batch sizes); the fastest is "bare". For
  mlm-nsp the texts are sentences, divided before the clock starts.
* mlm, mlm-nsp, clm: the whole of `siftloader shard`: find, read, hold out, tokenise, pack, shuffle all of
  it, write, hash. With "-x2" the text twice, one byte of each document changed: memory must not grow.
* datasets, datasets-recipe, litdata, mosaic, datatrove: the nearest equivalent of other tools, from
  sixteen files of equal size (not charged), each in its favour: `encode_batch_fast` on batches, two bytes
  an id, as many processes. "recipe" is the usual one, through transformers. Only datasets and datatrove
  shuffle; litdata and mosaic leave that to their readers. Tools that do not import are named.

Steady: tokens per second after the first --skip seconds, while all workers work. Memory: the most that
the processes took together (PSS, so shared pages count once), sampled every 0.2 s; "anonymous" is the
part that cannot be dropped under pressure. Disk: the most that lay in the arm's folder. CPU: seconds of
all cores. "x bare": the steady rate, where there is none that of the whole run, over bare's steady rate.
Of several repeats the run of median time is printed. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np


OURS = ("mlm", "mlm-nsp", "clm")
RIVALS = {  # arm -> what must import for it
    "datasets": ("datasets", "tokenizers"),
    "datasets-recipe": ("datasets", "transformers"),
    "litdata": ("litdata", "tokenizers"),
    "mosaic": ("streaming", "tokenizers"),
    "datatrove": ("datatrove", "orjson", "tokenizers"),
}
ARMS = ("bare", "bare-nsp", *OURS, "mlm-x2", "mlm-nsp-x2", *RIVALS)
CALLS = ("encode_batch_fast", "encode_batch")
BATCHES = (  # what the tokenizer is given at a time
    ("documents", 64),
    ("documents", 256),
    ("documents", 1024),
    ("characters", 1 << 18),
    ("characters", 1 << 20),
)
PARTS = 8  # files for each worker of a rival
TOKENS = 512  # of a sample
QUIET = {  # of every arm: nothing is fetched, one thread for each process
    "HF_HUB_OFFLINE": "1",
    "LITDATA_DISABLE_VERSION_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Records = list[tuple[float, int]]  # seconds since the start, tokens so far


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.arm:
        work_as(options.arm, json.loads(options.job.read_bytes()))
        return
    if not options.corpus or not options.tokenizer:
        sys.exit("bench_prepare: --corpus FOLDER and --tokenizer FILE are needed")
    if not Path("/proc/self/smaps_rollup").exists():
        sys.exit("bench_prepare: memory is read from /proc/PID/smaps_rollup, so this needs Linux")
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-prepare-", dir=options.work) as folder:
        rows = measure_all(options, Path(folder))
    print(report(rows, options), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="of .txt, searched in depth")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json")
    parser.add_argument("--arms", default=",".join(ARMS), help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--rivals-python",
        type=Path,
        nargs="+",
        default=[],
        metavar="PYTHON",
        help="interpreters that have other tools; the first that imports one runs it",
    )
    parser.add_argument("--scale", type=float, metavar="BYTES", help="of text to extrapolate to")
    parser.add_argument(
        "--skip", type=float, default=5.0, help="seconds until steady (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of a bare arm (default: %(default)s)"
    )
    parser.add_argument(
        "--try-seconds", type=float, default=4.0, help="for each way of calling the tokenizer"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=1800.0,
        help="seconds an arm may take (default: %(default)s)",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=128e6,
        metavar="BYTES",
        help="that ours may take for writing shards (default: %(default).0f, which twice the text "
        "of a small corpus reaches; siftloader's own default lets it grow to 1 GiB)",
    )
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for scratch (default: temp)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures of all repeats")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # what a process of ours is started as
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arms = [arm for arm in options.arms.split(",") if arm]
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if options.workers < 1 or options.repeats < 1:
        parser.error("--workers and --repeats must be at least 1")
    return options


# Texts


def texts_of(file: Path) -> list[str]:
    """The documents of a file: what stands between blank lines."""
    found = re.split(r"\n[ \t]*\n", file.read_text(encoding="utf-8"))
    return [text.strip() for text in found if text.strip()]


def write_parts(corpus: Path, folder: Path, parts: int) -> dict[str, int]:
    """The corpus as files of equal size, as .txt and as .jsonl; how much there is."""
    folder.mkdir()
    files = sorted(corpus.rglob("*.txt"))
    size = sum(file.stat().st_size for file in files)
    if not size:
        sys.exit(f"bench_prepare: {corpus}: no .txt with text in this folder")
    count = done = 0
    plain = lines = None
    for file in files:
        for text in texts_of(file):
            number = min(done * parts // size, parts - 1)
            if plain is None or plain.name != str(folder / f"{number:03d}.txt"):
                for before in filter(None, (plain, lines)):
                    before.close()
                plain = (folder / f"{number:03d}.txt").open("w", encoding="utf-8")
                lines = (folder / f"{number:03d}.jsonl").open("w", encoding="utf-8")
            plain.write(f"{text}\n\n")
            lines.write(json.dumps({"text": text, "id": str(count)}) + "\n")
            count += 1
            done += len(text.encode()) + 2
    plain.close()
    lines.close()
    return {"documents": count, "bytes": size}


def plain_tokenizer(file: Path, folder: Path) -> Path:
    """A copy that neither cuts nor pads texts: not every tool switches that off."""
    folder.mkdir()
    whole = json.loads(file.read_bytes()) | {"truncation": None, "padding": None}
    copy = folder / "tokenizer.json"
    copy.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    return copy


def write_doubled(corpus: Path, folder: Path) -> None:
    """The corpus, and once more with the first letter of each document another one."""
    for file in sorted(corpus.rglob("*.txt")):
        copy = folder / file.relative_to(corpus)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        with copy.with_name(f"again-{copy.name}").open("w", encoding="utf-8") as again:
            for text in texts_of(file):
                again.write(f"{changed(text)}\n\n")


def changed(text: str) -> str:
    """``text`` with one byte changed."""
    first = re.search(r"[A-Za-z0-9]", text)
    at = first.start() if first else 0
    return f"{text[:at]}{'b' if text[at] == 'a' else 'a'}{text[at + 1 :]}"


def in_batches(texts: Iterable[str], unit: str, size: int) -> Iterator[list[str]]:
    """The texts in lists of ``size`` documents or characters, at the least."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text) if unit == "characters" else 1
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


# Measuring


@dataclass
class Row:
    """One run of one arm, from its start to its exit; ``failed`` says why there is no result."""

    arm: str
    seconds: float = 0.0
    cpu: float = 0.0
    peak: int = 0  # bytes of memory
    anonymous: int = 0
    peak_at: float = 0.0  # seconds after the start
    others: float = 0.0  # cores that other programs kept busy meanwhile
    disk: int = 0  # bytes, the most there were
    kept: int = 0  # bytes of the result
    text: int = 0  # bytes of text it was given
    result: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    @property
    def tokens(self) -> int:
        return int(self.result.get("tokens", 0))

    @property
    def steady(self) -> float | None:
        rate = self.result.get("steady")
        return None if rate is None else float(rate)


def measure_all(options: argparse.Namespace, folder: Path) -> list[Row]:
    say("writing the texts of the rivals and of the doubled arms")
    about = write_parts(options.corpus, folder / "parts", PARTS * options.workers)
    print(
        f"{about['documents']:,} documents, {about['bytes'] / 1e6:.1f} MB; "
        f"{options.workers} workers, samples of {TOKENS} tokens\n",
        flush=True,
    )
    if any(arm.endswith("-x2") for arm in options.arms):
        write_doubled(options.corpus, folder / "doubled")
    job: dict[str, Any] = {
        "corpus": str(options.corpus.absolute()),
        "parts": str(folder / "parts"),
        "documents": about["documents"],
        "tokenizer": str(plain_tokenizer(options.tokenizer, folder / "tokenizer")),
        "workers": options.workers,
        "memory": int(options.memory),
        "skip": options.skip,
        "seconds": options.seconds,
        "work": str(folder / "arm"),
    }
    rows: list[Row] = []
    if {"bare", "bare-nsp"} & set(options.arms):
        seconds = options.try_seconds
        rows.append(
            measure(
                sys.executable,
                "search",
                dict(job, seconds=seconds, skip=seconds / 4),
                options.limit,
            )
        )
        job["way"] = rows[-1].result.get("way", [1, "encode_batch_fast", "characters", 1 << 18])
    for repeat in range(options.repeats):
        for arm in options.arms:
            say(f"{arm}, {repeat + 1} of {options.repeats}")
            text = about["bytes"]
            todo = job
            if arm.endswith("-x2"):
                todo, text = dict(job, corpus=str(folder / "doubled")), 2 * text
            python: str | None = sys.executable
            if arm in RIVALS:
                python = which_python(options.rivals_python, RIVALS[arm])
            if python is None:
                needed = " and ".join(RIVALS[arm])
                row = Row(arm, failed=f"no --rivals-python that imports {needed}")
            else:
                row = measure(python, arm, todo, options.limit)
            row.text = text
            say(f"{arm}: {row.failed or f'{row.seconds:.1f} s'}")
            rows.append(row)
    return rows


def which_python(pythons: Sequence[Path], modules: Sequence[str]) -> str | None:
    command = "; ".join(f"import {module}" for module in modules)
    for python in pythons:
        tried = subprocess.run(
            [python, "-W", "ignore", "-c", command], capture_output=True, check=False
        )
        if tried.returncode == 0:
            return str(python)
    return None


def measure(python: str, arm: str, job: dict[str, Any], limit: float) -> Row:
    """Run one arm in a process of its own; its result, or why there is none."""
    work = Path(job["work"])
    work.mkdir()
    (work / "tmp").mkdir()
    warm(Path(job["corpus"]) if arm in OURS or arm.endswith("-x2") else Path(job["parts"]))
    (work / "job.json").write_text(json.dumps(job))
    command = [python, __file__, "--arm", arm, "--job", str(work / "job.json")]
    environment = dict(os.environ, TMPDIR=str(work / "tmp"), HF_HOME=str(work / "tmp"), **QUIET)
    row = Row(arm)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = busy_seconds()
    start = time.perf_counter()
    with (work / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        watching = threading.Thread(target=watch, args=(process, work, row), daemon=True)
        watching.start()
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            row.failed = f"stopped after {limit:.0f} s"
        finally:
            row.seconds = time.perf_counter() - start
            end(process)
            watching.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of children that were waited for; a forkserver's are not, and are found by looking.
    waited = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row.cpu = max(waited, row.cpu)
    row.others = max(0.0, busy_seconds() - busy - row.cpu) / row.seconds
    row.kept = size_of(work / "out")
    row.disk = max(row.disk, size_of(work))
    if process.returncode and not row.failed:
        row.failed = last_line(work / "log.txt") or f"exit status {process.returncode}"
    elif not row.failed:
        row.result = json.loads((work / "result.json").read_bytes())
    shutil.rmtree(work)
    return row


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started are gone."""
    members = family(process.pid)
    if process.poll() is None:
        process.kill()
    process.wait()
    for pid in members - {process.pid}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def watch(process: subprocess.Popen[bytes], work: Path, row: Row) -> None:
    start = time.perf_counter()
    used: dict[int, float] = {}
    while process.poll() is None:
        members = family(process.pid)
        for pid in members:
            used[pid] = max(cpu_of(pid), used.get(pid, 0.0))
        row.cpu = sum(used.values())
        peak, anonymous = memory_of(members)
        if peak > row.peak:
            row.peak, row.peak_at = peak, time.perf_counter() - start
        row.anonymous = max(row.anonymous, anonymous)
        row.disk = max(row.disk, size_of(work))
        time.sleep(0.2)


def family(pid: int) -> set[int]:
    """The process and what descends from it, or shares its session."""
    children: dict[int, list[int]] = {}
    session = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name of the program, in brackets, may hold anything.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.name))
        if int(fields[3]) == pid:
            session.add(int(entry.name))
    found = {pid}
    waiting = [pid, *session]
    while waiting:
        here = waiting.pop()
        found.add(here)
        waiting += [child for child in children.get(here, []) if child not in found]
    return found


def busy_seconds() -> float:
    """Seconds that all cores together have worked since the machine started."""
    times = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, interrupts, soft_interrupts = times[:7]  # not idle, not waiting
    return (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK")


def cpu_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pids: Iterable[int]) -> tuple[int, int]:
    """Bytes of memory of these processes together, pages they share counted once: all, anonymous."""
    total = anonymous = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        sizes = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
        total += sizes.get("Pss", 0)
        anonymous += sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)
    return total * 1024, anonymous * 1024


def size_of(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(parent, name).stat().st_size
            except OSError:  # renamed or removed meanwhile
                continue
    return total


def warm(folder: Path) -> None:
    for file in sorted(folder.rglob("*.*")):
        with file.open("rb") as stream:
            while stream.read(1 << 20):
                pass


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


def steady(records: Records, skip: float, until: float = float("inf")) -> float | None:
    """Tokens per second between the first record after ``skip`` and the last before ``until``."""
    inside = [(seconds, tokens) for seconds, tokens in records if skip <= seconds <= until]
    if len(inside) < 2:
        return None
    (first, before), (last, after) = inside[0], inside[-1]
    return (after - before) / (last - first) if last > first else None


def together(workers: Sequence[Records], skip: float) -> float | None:
    """The steady rates of several workers added up, while all of them work."""
    until = min(records[-1][0] for records in workers)
    rates = [steady(records, skip, until) for records in workers]
    return None if None in rates else sum(rate for rate in rates if rate is not None)


# The report


def describe_machine() -> str:
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = [f"python {platform.python_version()}"]
    versions += [f"{name} {version_of(name)}" for name in ("siftloader", "tokenizers", "numpy")]
    now = datetime.datetime.now(datetime.timezone.utc)
    busy = os.getloadavg()[0]
    warning = f"\nwarning: the load is {busy:.1f} before anything has begun" if busy > 0.5 else ""
    return (
        f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores, "
        f"{memory / 2**30:.0f} GiB, {platform.platform()}\n"
        f"{', '.join(versions)}, {now:%Y-%m-%d}{warning}"
    )


def version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "?"


def report(rows: Sequence[Row], options: argparse.Namespace) -> str:
    best = {arm: middle([row for row in rows if row.arm == arm]) for arm in options.arms}
    lines = []
    for row in rows:
        if row.arm == "search":
            lines += ways(row)
    lines += table(best)
    lines += remarks(best, options)
    return "\n".join(lines)


def middle(rows: Sequence[Row]) -> Row:
    """The run of median time, the slower one of two; the failure if all failed."""
    done = sorted((row for row in rows if not row.failed), key=lambda row: row.seconds)
    return done[len(done) // 2] if done else rows[0]


def ways(row: Row) -> list[str]:
    if row.failed:
        return [
            f"the search failed ({row.failed}); bare is processes of one thread, 256 kB a call"
        ]
    lines = ["Ways to call the tokenizer, million tokens a second:", ""]
    for way, rate in row.result["tried"]:
        lines.append(f"    {rate / 1e6:6.3f}  {way_as_text(way)}")
    return [*lines, ""]


def way_as_text(way: Sequence[Any]) -> str:
    threads, call, unit, size = way
    split = "processes of one thread" if threads == 1 else f"one process of {threads} threads"
    return f"{call}, {size:,} {unit} a call, {split}"


def table(best: dict[str, Row]) -> list[str]:
    lines = [
        "| arm | M tokens | seconds | CPU s | M tokens/s | steady | x bare | memory MB | anonymous "
        "MB | disk MB | result MB |",
        "|---|" + "---:|" * 10,
    ]
    for arm, row in best.items():
        if row.failed:
            lines.append(f"| {arm} | failed: {row.failed} |" + " |" * 9)
            continue
        bare = best.get(bare_of(arm))
        rate = row.steady or row.tokens / row.seconds
        ratio = f"{rate / bare.steady:.2f}" if bare and bare.steady else ""
        if arm.startswith("bare"):  # its seconds are chosen, not found
            cells = [
                row.tokens / 1e6,
                None,
                None,
                None,
                row.steady,
                ratio,
                row.peak,
                row.anonymous,
            ]
            cells += [None, None]
        else:
            cells = [row.tokens / 1e6, row.seconds, row.cpu, row.tokens / row.seconds, row.steady]
            cells += [ratio, row.peak, row.anonymous, row.disk, row.kept]
        lines.append(f"| {arm} | " + " | ".join(_cells(cells)) + " |")
    return [*lines, ""]


def _cells(cells: Sequence[float | str | None]) -> Iterator[str]:
    formats = ("{:.2f}", "{:.1f}", "{:.1f}", "{:.2f}", "{:.2f}", "{}", *("{:,.0f}",) * 4)
    units = (1, 1, 1, 1e6, 1e6, None, *(1e6,) * 4)
    for cell, shape, unit in zip(cells, formats, units, strict=True):
        if cell is None or cell == "":
            yield ""
        else:
            yield shape.format(cell if unit is None or isinstance(cell, str) else cell / unit)


def bare_of(arm: str) -> str:
    return "bare-nsp" if "nsp" in arm else "bare"


def remarks(best: dict[str, Row], options: argparse.Namespace) -> list[str]:
    done = {arm: row for arm, row in best.items() if not row.failed}
    lines = [
        f"Not to be trusted: while {arm} ran, other programs kept {row.others:.1f} cores busy."
        for arm, row in done.items()
        if row.others > 0.2
    ]
    ours = done.get("mlm")
    for arm, row in done.items():
        if arm not in RIVALS:
            continue
        line = f"{arm} ({row.result['versions']}): {row.result['did']}."
        if ours:
            rate = (row.tokens / row.seconds) / (ours.tokens / ours.seconds)
            line += f" {rate:.2f} x the speed of mlm, {row.peak / ours.peak:.1f} x its memory."
            if abs(row.tokens - ours.tokens) > ours.tokens * 1e-4:
                line += " NOT THE SAME WORK: it counts other tokens."
        lines.append(line)
    for arm in ("mlm", "mlm-nsp"):
        once, twice = done.get(arm), done.get(f"{arm}-x2")
        if once and twice:
            lines.append(
                f"{arm}, twice the text: memory {once.peak / 1e6:.0f} -> {twice.peak / 1e6:.0f} MB, "
                f"{once.seconds:.1f} -> {twice.seconds:.1f} s."
            )
            if options.scale:
                lines.append(extrapolated(once, twice, options.scale))
    return lines


def extrapolated(once: Row, twice: Row, scale: float) -> str:
    """What ``scale`` bytes of text would take, on the line through both runs, never below them.

    Memory that grew by less than a tenth, as it does from one run to the next, is called flat.
    """
    step = twice.text - once.text

    def at_scale(small: float, large: float) -> float:
        return max(large, large + (large - small) / step * (scale - twice.text))

    seconds = at_scale(once.seconds, twice.seconds)
    flat = twice.peak < 1.1 * once.peak
    memory = max(once.peak, twice.peak) if flat else at_scale(once.peak, twice.peak)
    disk, kept = at_scale(once.disk, twice.disk), at_scale(once.kept, twice.kept)
    took = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
    return (
        f"{scale / 1e9:g} GB of text ({once.arm}), on a line through these two: {took}, "
        f"{disk / 1e9:.1f} GB of disk while it runs, {kept / 1e9:.1f} GB of it the shards, "
        f"{memory / 1e6:,.0f} MB of memory ({'flat' if flat else 'it grew'})."
    )


def say(line: str) -> None:
    print(f"bench_prepare: {line}", file=sys.stderr, flush=True)


# The arms. What follows runs in a process of its own, maybe of another interpreter.


def work_as(arm: str, job: dict[str, Any]) -> None:
    begun = time.perf_counter()
    do: Callable[[dict[str, Any]], dict[str, Any]]
    match arm:
        case "search":
            do = search
        case "bare" | "bare-nsp":
            job["sentences"] = arm == "bare-nsp"
            do = bare
        case "datasets":
            do = with_datasets
        case "datasets-recipe":
            do = with_datasets_recipe
        case "litdata":
            do = with_litdata
        case "mosaic":
            do = with_mosaic
        case "datatrove":
            do = with_datatrove
        case _:
            job["objective"] = arm.removesuffix("-x2")
            do = with_siftloader
    result = do(job)
    result["inside"] = time.perf_counter() - begun
    Path(job["work"], "result.json").write_text(json.dumps(result))


def load(job: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(job["tokenizer"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(tokenizer: Any) -> int:
    for name in ("[SEP]", "<|endoftext|>", "</s>"):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    sys.exit("the tokenizer has no [SEP], <|endoftext|> or </s> to end a document with")


def dtype_of(tokenizer: Any) -> str:
    return "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"


def parts_of(job: dict[str, Any], kind: str = "txt") -> list[str]:
    return [str(file) for file in sorted(Path(job["parts"]).glob(f"*.{kind}"))]


def count(job: dict[str, Any], tokens: int) -> None:
    """Remember that so many tokens of text were made; any process may."""
    with Path(job["work"], f"{os.getpid()}.count").open("a") as file:
        file.write(f"{tokens}\n")


def counted(job: dict[str, Any]) -> int:
    files = Path(job["work"]).glob("*.count")
    return sum(int(line) for file in files for line in file.read_text().split())


def versions_of(*names: str) -> str:
    return ", ".join(f"{name} {version_of(name)}" for name in names)


def search(job: dict[str, Any]) -> dict[str, Any]:
    job["sentences"] = False
    found = []
    for threads in dict.fromkeys((1, job["workers"])):
        for call in CALLS:
            # The slow call once: it is there to be seen, not to win.
            for unit, size in BATCHES if call == CALLS[0] else BATCHES[-2:-1]:
                way = [threads, call, unit, size]
                rate = bare(dict(job, way=way))["steady"]
                if rate is not None:
                    found.append((way, rate))
    best = max(found, key=lambda pair: pair[1])
    return {"tried": found, "way": best[0]}


def bare(job: dict[str, Any]) -> dict[str, Any]:
    threads = job["way"][0]
    workers = 1 if threads > 1 else job["workers"]
    # Read when the library is loaded, by the children.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    spawn = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Records] = spawn.Queue()
    gate = spawn.Barrier(workers)
    processes = [
        spawn.Process(target=bare_worker, args=(job, number, workers, gate, results), daemon=True)
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    records: list[Records] = []
    while len(records) < workers:
        try:
            records.append(results.get(timeout=0.2))
        except queue.Empty:
            if any(process.exitcode for process in processes):
                sys.exit(1)  # it has said why
    for process in processes:
        process.join()
    tokens = sum(each[-1][1] for each in records)
    return {"tokens": tokens, "steady": together(records, job["skip"]), "way": job["way"]}


def bare_worker(job: dict[str, Any], number: int, workers: int, gate: Any, results: Any) -> None:
    tokenizer = load(job)
    _, call, unit, size = job["way"]
    texts = [text for part in parts_of(job)[number::workers] for text in texts_of(Path(part))]
    batches = list(in_batches(texts, unit, size))
    if job["sentences"]:
        from siftloader.pairs import segment

        batches = [[piece for text in batch for piece in segment(text)] for batch in batches]
    encode, dtype = getattr(tokenizer, call), dtype_of(tokenizer)
    gate.wait(timeout=600)
    start, tokens = time.perf_counter(), 0
    records: Records = [(0.0, 0)]
    for batch in cycle(batches):
        encodings = encode(batch, add_special_tokens=False)
        ids = np.concatenate([np.array(encoding.ids, dtype) for encoding in encodings])
        tokens += len(ids)
        records.append((time.perf_counter() - start, tokens))
        if records[-1][0] > job["seconds"]:
            break
    results.put(records)


def with_siftloader(job: dict[str, Any]) -> dict[str, Any]:
    from siftloader.prepare import Preparation, prepare

    records: Records = []
    start = time.perf_counter()

    def progress(now: dict[str, Any]) -> None:
        if now["stage"] == "tokenising":
            records.append((time.perf_counter() - start, now["tokens"]))

    options = Preparation(
        out=Path(job["work"], "out"),
        tokenizer=job["tokenizer"],
        objective=job["objective"],
        seq_len=TOKENS,
        workers=job["workers"],
        memory=job["memory"],
    )
    summary = prepare([job["corpus"]], options, on_progress=progress)
    return {
        "tokens": sum(packing.tokens for packing in summary.packing.values()),
        "samples": sum(summary.samples.values()),
        "documents": summary.documents,
        "steady": steady(records, job["skip"]),
        "tokenised": records[-1][0],  # seconds
        "fingerprint": summary.fingerprint,
    }


def with_datasets(job: dict[str, Any]) -> dict[str, Any]:
    """One pass from text to samples in two bytes an id, then shuffled while it is saved."""
    import datasets

    tokenizer = load(job)
    end_id, dtype = end_of_text(tokenizer), dtype_of(tokenizer)

    def pack(batch: dict[str, list[str]]) -> dict[str, Any]:
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable((*each.ids, end_id) for each in encodings), dtype)
        count(job, len(ids) - len(encodings))
        return {"input_ids": ids[: len(ids) // TOKENS * TOKENS].reshape(-1, TOKENS)}

    texts = _datasets_texts(job)
    packed = texts.map(
        pack,
        batched=True,
        batch_size=256,
        num_proc=job["workers"],
        remove_columns=["text"],
        features=datasets.Features({"input_ids": datasets.Sequence(datasets.Value(dtype))}),
    )
    packed.shuffle(seed=0).save_to_disk(f"{job['work']}/out", num_proc=job["workers"])
    did = "shuffles all samples; drops a tail in every 256 documents; Arrow"
    return {"tokens": counted(job), "samples": len(packed), "did": did} | {
        "versions": versions_of("datasets", "tokenizers", "pyarrow")
    }


def with_datasets_recipe(job: dict[str, Any]) -> dict[str, Any]:
    """Tokenise, then group, as the examples of transformers do."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=job["tokenizer"])
    end_id = end_of_text(tokenizer.backend_tokenizer)

    def tokenise(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer(
            batch["text"],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        count(job, sum(map(len, ids)))
        return {"input_ids": [[*each, end_id] for each in ids]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        whole = len(ids) // TOKENS * TOKENS
        return {"input_ids": [ids[first : first + TOKENS] for first in range(0, whole, TOKENS)]}

    texts = _datasets_texts(job)
    workers = job["workers"]
    tokenised = texts.map(tokenise, batched=True, num_proc=workers, remove_columns=["text"])
    grouped = tokenised.map(group, batched=True, num_proc=workers)
    grouped.shuffle(seed=0).save_to_disk(f"{job['work']}/out", num_proc=workers)
    did = "shuffles all samples; drops a tail in every 1,000 documents; Arrow"
    return {"tokens": counted(job), "samples": len(grouped), "did": did} | {
        "versions": versions_of("datasets", "transformers", "tokenizers", "pyarrow")
    }


def _datasets_texts(job: dict[str, Any]) -> Any:
    from datasets import load_dataset

    return load_dataset(
        "text",
        data_files=parts_of(job),
        sample_by="paragraph",
        split="train",
        cache_dir=f"{job['work']}/tmp/cache",
        num_proc=job["workers"],
    )


def ids_of_part(job: dict[str, Any], part: str, tokenizer: Any) -> Iterator[Any]:
    """Token arrays of the documents of a file, the end of each marked, some documents at a time."""
    end_id, dtype = end_of_text(tokenizer), dtype_of(tokenizer)
    tokens = 0
    for batch in in_batches(texts_of(Path(part)), "characters", 1 << 18):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            tokens += len(encoding)
            yield np.array((*encoding.ids, end_id), dtype)
    count(job, tokens)


def litdata_part(part: str, job: dict[str, Any]) -> Iterator[Any]:
    import torch

    tokenizer = load(job)
    for ids in ids_of_part(job, part, tokenizer):
        yield torch.from_numpy(ids)


def with_litdata(job: dict[str, Any]) -> dict[str, Any]:
    from functools import partial

    from litdata import TokensLoader, optimize

    optimize(
        fn=partial(litdata_part, job=job),
        inputs=parts_of(job),
        output_dir=f"{job['work']}/out",
        chunk_bytes="64MB",
        num_workers=job["workers"],
        item_loader=TokensLoader(block_size=TOKENS),
        verbose=False,
    )
    tokens = counted(job)
    samples = (tokens + job["documents"]) // TOKENS
    did = "no shuffle, left to its reader; its own chunks"
    return {"tokens": tokens, "samples": samples, "did": did} | {
        "versions": versions_of("litdata", "tokenizers", "torch")
    }


def mosaic_parts(job: dict[str, Any], number: int) -> int:
    from streaming import MDSWriter

    tokenizer = load(job)
    parts = parts_of(job)[number :: job["workers"]]
    written = 0
    rest = np.empty(0, dtype_of(tokenizer))
    with MDSWriter(
        out=f"{job['work']}/out/{number}", columns={"tokens": f"ndarray:{rest.dtype}:{TOKENS}"}
    ) as writer:
        for part in parts:
            for ids in ids_of_part(job, part, tokenizer):
                rest = np.concatenate([rest, ids])
                whole = len(rest) // TOKENS
                for row in rest[: whole * TOKENS].reshape(-1, TOKENS):
                    writer.write({"tokens": row})
                written += whole
                rest = rest[whole * TOKENS :]
    return written


def with_mosaic(job: dict[str, Any]) -> dict[str, Any]:
    from concurrent.futures import ProcessPoolExecutor

    from streaming.base.util import merge_index

    workers = job["workers"]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        written = list(pool.map(mosaic_parts, [job] * workers, range(workers)))
    merge_index(f"{job['work']}/out", keep_local=True)
    did = "no shuffle, left to its reader; MDS"
    return {"tokens": counted(job), "samples": sum(written), "did": did} | {
        "versions": versions_of("mosaicml-streaming", "tokenizers")
    }


def with_datatrove(job: dict[str, Any]) -> dict[str, Any]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    tokenizer = load(job)
    end_id = end_of_text(tokenizer)
    work = Path(job["work"])
    LocalPipelineExecutor(
        [
            JsonlReader(job["parts"], glob_pattern="*.jsonl"),
            DocumentTokenizer(
                str(work / "tokenised"),
                tokenizer_name_or_path=job["tokenizer"],
                eos_token=tokenizer.id_to_token(end_id),
                batch_size=256,
                shuffle_documents=False,
                shuffle_chunk_size=TOKENS,
                seed=0,
            ),
        ],
        tasks=job["workers"],
        workers=job["workers"],
        logging_dir=str(work / "logs" / "tokenise"),
    ).run()
    LocalPipelineExecutor(
        [
            DocumentTokenizerMerger(
                str(work / "tokenised"),
                str(work / "out"),
                "train",
                shuffle_chunk_size=TOKENS,
                seed=0,
                progress=False,
            )
        ],
        tasks=1,
        logging_dir=str(work / "logs" / "merge"),
    ).run()
    stats = json.loads((work / "logs" / "tokenise" / "stats.json").read_bytes())
    tokens = int(stats[-1]["stats"]["tokens"]["total"]) - job["documents"]
    merged = sum(file.stat().st_size for file in (work / "out").glob("*.ds"))
    samples = merged // (TOKENS * np.dtype(dtype_of(tokenizer)).itemsize)
    did = "shuffles all samples; one process merges; a bare file of ids"
    return {"tokens": tokens, "samples": samples, "did": did} | {
        "versions": versions_of("datatrove", "tokenizers")
    }


if __name__ == "__main__":
    main()
