"""Reading shards, measured beside other loaders, a memory map and the hash itself.

    python tools/bench_stream.py [--rivals venvs/ [--install]] [--samples 262144] [--passes 5] [--json all.json]

Every arm reads the same samples (random ids in uint16, the small ones more often) in batches of 256 that end
as int64 tensors, from the page cache, in one process and in two (two ranks, each a process of one thread, begun
together: their rates while both run, added up). Passes are interleaved; the median counts.

* siftloader: ``TokenShards.batches(256)``, verified before the clock starts. It gives ids and labels
  (objective clm), masked ids, labels and attention mask (mlm). "First pass": a new ``TokenShards`` each
  time, so every byte is hashed while it is read; with ``lanes`` each rank opens, and hashes, its share alone.
* memory map: what a loop over one ``.npy`` costs at least. ``numpy.take`` of 256 rows at places that lie ready
  in an array (windows of 8 shards, permuted before the clock starts), ``astype(int64)``, ``from_numpy``, and
  the same fields as siftloader. "Ids alone" leaves the labels out.
* sha256: hashlib over the mapped bytes of the tars, one thread a process, nothing else.
* webdataset, datasets: stock, from the same tars: ``WebDataset(urls).decode()``; ``load_dataset("webdataset",
  streaming=True)`` as it comes (lists), which is much faster than its NumPy format. mosaic: MDS, litdata: tokens
  (``TokensLoader``), both written from the same samples, as many files. All four in their favour: no shuffling,
  the ids alone, stacked and cast, and a pass ends after --limit seconds.
* "masked": for all the same call, ``siftloader.masking.Mlm``, on a batch at a time.

All arms alike are told (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_) to keep the memory that they freed. By
default glibc may hand every batch back to the kernel and have it zeroed anew, or not, by what was freed before; that
decides about a factor of up to 8, for a memory map as for us.

Memory: PSS of the processes beyond what they had before their first pass (shared pages count once), sampled every
20 ms in passes of their own; mapped files are in it, "anonymous" is the part that cannot be dropped.
"x tar": over the faster of webdataset and datasets; "x map": over the memory map with the same fields; "CPU us": of
all threads, for a sample: on a busy machine the steadiest figure.
Every arm's rows are compared with what was written: none unknown, none twice. --install makes two environments
in the folder of --rivals (what mosaic needs contradicts what datasets needs); tools that do not import are named.

At the end: what 100,000 shards cost before the first one is read: memory by shard, and seconds to a state a
thousand million samples in. Their manifest is written, their tars are not. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import inspect
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from bench_prepare import describe_machine, family, last_line, memory_of


ROOT = Path(__file__).resolve().parent.parent
BATCH, VOCABULARY, WINDOW, MASKED = 256, 30522, 8, 0.15
LISTED = 16_384  # samples of a shard that is only listed: 100,000 hold more than 10 ** 9
PATIENCE = 60.0  # seconds: what has not answered by then is ended
SPECIAL = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
RIVALS = {  # arm -> the package that has it
    "webdataset": "webdataset",
    "datasets": "datasets",
    "mosaic": "mosaicml-streaming",
    "litdata": "litdata",
}
OF_TARS = ("webdataset", "datasets")
INSTALLED = {  # environment -> packages
    "most": ("webdataset", "datasets", "litdata"),
    "mosaic": ("mosaicml-streaming",),
}
ARMS = ("siftloader", "map", "sha256", *RIVALS)
ROWS = {  # (arm, kind of pass) -> what the table says
    ("siftloader", "first"): "siftloader, first pass (verifying)",
    ("siftloader", "plain"): "siftloader, verified",
    ("map", "plain"): "memory map, same fields",
    ("map", "alone"): "memory map, ids alone",
    ("sha256", "plain"): "sha256 alone",
    **{(arm, "plain"): arm for arm in RIVALS},
    ("siftloader", "masked"): "siftloader, masked",
    ("map", "masked"): "memory map, masked",
    **{(arm, "masked"): f"{arm}, masked" for arm in RIVALS},
}
KEPT = str(1 << 30)
QUIET = {
    "MALLOC_MMAP_THRESHOLD_": KEPT,
    "MALLOC_TRIM_THRESHOLD_": KEPT,
    "HF_HUB_OFFLINE": "1",
    "LITDATA_DISABLE_VERSION_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Key = tuple[str, str]  # arm, kind
Batch = Any  # a dict of tensors, or for what has no rows their number
Read = Callable[[str], Iterator[Batch]]  # kind -> one pass
Records = list[tuple[float, int]]  # monotonic seconds, rows so far


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.child:
        CHILDREN[options.child](options, json.loads(options.job.read_bytes()))
        return
    if not Path("/proc/self/smaps_rollup").exists():
        sys.exit("bench_stream: memory is read from /proc/PID/smaps_rollup, so this needs Linux")
    if options.install:
        install(options.rivals)
    print(describe_machine(), flush=True)
    print(
        f"{options.samples:,} samples of {options.tokens} uint16 ids in {options.shards} shards, "
        f"batches of {BATCH}, {options.passes} passes\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="bench-stream-", dir=options.work) as folder:
        rows = measure_all(options, Path(folder))
        many = measure_many(options, Path(folder)) if options.many else {}
    if many:
        print(report_many(many), flush=True)
    if options.json:
        found = {"rows": [asdict(row) for row in rows], "many": many}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--samples", type=int, default=262_144, help="default: %(default)s")
    add("--tokens", type=int, default=512, help="of a sample (default: %(default)s)")
    add("--shards", type=int, default=64, help="default: %(default)s")
    add("--passes", type=int, default=5, help="of each kind (default: %(default)s)")
    add("--limit", type=float, default=2.0, help="seconds of a pass of others (default: 2)")
    add("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    add("--arms", default=",".join(ARMS), help="default: %(default)s")
    add("--rivals", type=Path, metavar="FOLDER", help="of environments that have other tools")
    add("--install", action="store_true", help="make these environments first")
    add("--many", type=int, default=100_000, help="shards that are only listed; 0: not measured")
    add("--work", type=Path, metavar="FOLDER", help="for scratch (default: temp)")
    add("--json", type=Path, metavar="FILE", help="all figures")
    add("--child", help=argparse.SUPPRESS)  # what a process of ours is started as
    add("--arm", help=argparse.SUPPRESS)
    add("--job", type=Path, help=argparse.SUPPRESS)
    add("--rank", type=int, default=0, help=argparse.SUPPRESS)
    add("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arms = [arm for arm in options.arms.split(",") if arm]
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if options.shards < 1 or options.samples % options.shards:
        parser.error("--samples must be a multiple of --shards")
    if options.passes < 1 or min(options.processes) < 1:
        parser.error("--passes and --processes must be at least 1")
    if options.install and not options.rivals:
        parser.error("--install needs --rivals FOLDER")
    return options


def install(folder: Path) -> None:
    torch = metadata.version("torch").partition("+")[0]
    for name, packages in INSTALLED.items():
        python = folder / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        command = [python, "-m", "pip", "install", "--quiet", f"torch=={torch}", "numpy", "tqdm"]
        subprocess.run([*command, *packages], check=True)


# The samples


def write_all(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tars for us and for others, one .npy, and the keys of all rows; the job that says where."""
    from siftloader.shards import Layout, write_shard

    rng = np.random.default_rng(0)
    layout = Layout.for_vocabulary(options.tokens, VOCABULARY)
    by_shard = options.samples // options.shards
    rows = np.lib.format.open_memmap(
        folder / "rows.npy", "w+", np.uint16, (options.samples, options.tokens)
    )
    (folder / "mlm").mkdir()
    (folder / "clm").mkdir()
    written = []
    for number in range(options.shards):
        words = random_words(rng, by_shard, options.tokens)
        rows[number * by_shard : (number + 1) * by_shard] = words
        stem = f"train-{number:06d}"
        written.append(
            write_shard(folder / "mlm", stem, words, np.zeros(by_shard, np.uint8), layout)
        )
        for file in (folder / "mlm").glob(f"{stem}.*"):
            (folder / "clm" / file.name).hardlink_to(file)
    for objective in ("mlm", "clm"):
        describe(folder / objective, written, layout, objective)
    np.save(folder / "keys.npy", np.sort(row_keys(rows)))
    np.save(folder / "places.npy", windowed(rng, options.shards, by_shard))
    return {
        "folder": str(folder),
        "samples": options.samples,
        "tokens": options.tokens,
        "shards": options.shards,
        "bytes": rows.nbytes,
    }


def random_words(rng: np.random.Generator, count: int, tokens: int) -> np.ndarray:
    """Ordinary ids [count, tokens], [CLS] first, [SEP] last; the product of two makes small ones frequent."""
    limit = VOCABULARY - 1000
    one, two = rng.integers(0, limit, (2, count, tokens), np.uint32)
    words = (1000 + one * two // limit).astype(np.uint16)
    words[:, 0], words[:, -1] = SPECIAL["cls"], SPECIAL["sep"]
    return words


def describe(folder: Path, shards: Sequence[Any], layout: Any, objective: str) -> None:
    from siftloader.shards import Source, Tokenizer, write_dataset

    write_dataset(
        folder,
        shards,
        layout=layout,
        objective=objective,
        tokenizer=Tokenizer("random", "0" * 64, VOCABULARY, SPECIAL),
        sources=[Source("random", "0" * 64, 1)],
        unigrams=np.zeros(VOCABULARY, np.int64),
        seed=0,
    )


def row_keys(rows: np.ndarray) -> np.ndarray:
    """A number for each row of ids [n, T], another for another row: uint64 [n]."""
    weights = np.random.default_rng(1).integers(0, 1 << 63, rows.shape[1], np.uint64) * 2 + 1
    keys = [
        (rows[at : at + BATCH].astype(np.uint64) * weights).sum(axis=1)
        for at in range(0, len(rows), BATCH)
    ]
    return np.concatenate([np.zeros(0, np.uint64), *keys])


def windowed(rng: np.random.Generator, shards: int, by_shard: int) -> np.ndarray:
    """All rows, int64, shards permuted and each ``WINDOW`` of them shuffled together."""
    order = rng.permutation(shards)
    parts = []
    for first in range(0, shards, WINDOW):
        window = order[first : first + WINDOW]
        parts.append(rng.permutation((window[:, None] * by_shard + np.arange(by_shard)).ravel()))
    return np.concatenate(parts)


def write_mosaic(job: dict[str, Any]) -> None:
    torchvision_beside_cpu()
    from streaming import MDSWriter

    rows = np.load(Path(job["folder"], "rows.npy"), mmap_mode="r")
    out = str(Path(job["folder"], "mosaic"))
    columns = {"input_ids": f"ndarray:uint16:{job['tokens']}"}
    with MDSWriter(out=out, columns=columns, size_limit=job["bytes"] // job["shards"]) as writer:
        for row in rows:
            writer.write({"input_ids": row})


def write_litdata(job: dict[str, Any]) -> None:
    import litdata
    from litdata.streaming.item_loader import TokensLoader

    by_shard = job["samples"] // job["shards"]
    litdata.optimize(
        fn=partial(tokens_of, job["folder"], by_shard),
        inputs=list(range(job["shards"])),
        output_dir=str(Path(job["folder"], "litdata")),
        chunk_size=job["tokens"] * by_shard,
        item_loader=TokensLoader(),
        num_workers=1,
    )


def tokens_of(folder: str, by_shard: int, number: int) -> Any:
    import torch

    rows = np.load(Path(folder, "rows.npy"), mmap_mode="r")
    return torch.from_numpy(np.array(rows[number * by_shard : (number + 1) * by_shard]).ravel())


WRITERS = {"mosaic": write_mosaic, "litdata": write_litdata}


# What reads them: each gets its rank and gives a function that makes one pass


def open_siftloader(job: dict[str, Any], rank: int, ranks: int) -> Read:
    from siftloader.stream import TokenShards
    from siftloader.world import World

    own_share = {"lanes": ranks} if "lanes" in inspect.signature(TokenShards).parameters else {}

    def opened(objective: str, masking: float | None) -> TokenShards:
        folder = Path(job["folder"], objective)
        return TokenShards(folder, masking=masking, world=World(rank, ranks), **own_share)

    kept = {"plain": opened("clm", None), "masked": opened("mlm", MASKED)}

    def read(kind: str) -> Iterator[Batch]:
        shards = opened("clm", None) if kind == "first" else kept[kind]
        return shards.batches(BATCH)

    return read


def open_map(job: dict[str, Any], rank: int, ranks: int) -> Read:
    import torch

    places = np.load(Path(job["folder"], "places.npy"))[rank::ranks]
    mask = masker()

    def read(kind: str) -> Iterator[Batch]:
        rows = np.load(Path(job["folder"], "rows.npy"), mmap_mode="r")
        for first in range(0, len(places), BATCH):
            at = places[first : first + BATCH]
            tokens = np.take(rows, at, axis=0)
            if kind == "masked":
                input_ids, labels = mask(tokens, at)
                real = (tokens != SPECIAL["pad"]).astype(np.int64)
                arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": real}
            else:
                input_ids = tokens.astype(np.int64)
                arrays = {"input_ids": input_ids}
                if kind != "alone":
                    arrays["labels"] = input_ids.copy()
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}

    return read


def open_sha256(job: dict[str, Any], rank: int, ranks: int) -> Read:
    def read(kind: str) -> Iterator[Batch]:
        for file in sorted(Path(job["folder"], "clm").glob("*.tar"))[rank::ranks]:
            hashlib.sha256(np.memmap(file, np.uint8, mode="r")).digest()
            yield job["samples"] // job["shards"]

    return read


def open_webdataset(job: dict[str, Any], rank: int, ranks: int) -> Read:
    import webdataset

    def rows() -> Iterator[Any]:
        data = webdataset.WebDataset(
            tars_of(job), shardshuffle=False, nodesplitter=webdataset.split_by_node
        )
        for sample in data.decode():
            yield sample["input_ids.npy"]

    return in_batches(rows, job)


def open_datasets(job: dict[str, Any], rank: int, ranks: int) -> Read:
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node

    data = load_dataset(
        "webdataset", data_files={"train": tars_of(job)}, split="train", streaming=True
    )
    data = split_dataset_by_node(data, rank, ranks)
    return in_batches(lambda: (sample["input_ids.npy"] for sample in data), job)


def open_mosaic(job: dict[str, Any], rank: int, ranks: int) -> Read:
    torchvision_beside_cpu()
    from streaming import StreamingDataset

    folder = str(Path(job["folder"], "mosaic"))
    data = StreamingDataset(local=folder, shuffle=False, batch_size=BATCH)
    return in_batches(lambda: (sample["input_ids"] for sample in data), job)


def open_litdata(job: dict[str, Any], rank: int, ranks: int) -> Read:
    from litdata import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    loader = TokensLoader(block_size=job["tokens"])
    data = StreamingDataset(
        str(Path(job["folder"], "litdata")), item_loader=loader, shuffle=False, drop_last=False
    )
    return in_batches(lambda: iter(data), job)


OPENERS: dict[str, Callable[[dict[str, Any], int, int], Read]] = {
    "siftloader": open_siftloader,
    "map": open_map,
    "sha256": open_sha256,
    "webdataset": open_webdataset,
    "datasets": open_datasets,
    "mosaic": open_mosaic,
    "litdata": open_litdata,
}


def tars_of(job: dict[str, Any]) -> list[str]:
    return [str(path) for path in sorted(Path(job["folder"], "clm").glob("*.tar"))]


def in_batches(rows: Callable[[], Iterator[Any]], job: dict[str, Any]) -> Read:
    """Passes over ``rows`` in batches of int64 tensors, masked if asked for."""
    import torch

    mask = masker()

    def made(some: list[Any], first: int, kind: str) -> Batch:
        if kind != "masked":
            return {"input_ids": torch.from_numpy(stacked(some).astype(np.int64, copy=False))}
        arrays = mask(stacked(some), np.arange(first, first + len(some)))
        return dict(zip(("input_ids", "labels"), map(torch.from_numpy, arrays), strict=True))

    def read(kind: str) -> Iterator[Batch]:
        some: list[Any] = []
        done = 0
        for row in rows():
            some.append(row)
            if len(some) == BATCH:
                yield made(some, done, kind)
                done += len(some)
                some = []
        if some:
            yield made(some, done, kind)

    return read


def stacked(rows: list[Any]) -> np.ndarray:
    import torch

    if isinstance(rows[0], list):
        return np.array(rows, np.int64)
    if isinstance(rows[0], torch.Tensor):
        return torch.stack(rows).numpy()
    return np.stack(rows)


def masker() -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    from siftloader.masking import Mlm

    special = tuple(sorted(SPECIAL.values()))
    mlm = Mlm(MASKED, mask_id=SPECIAL["mask"], vocab_size=VOCABULARY, special_ids=special)
    return partial(mlm, seed=0, epoch=0)


def torchvision_beside_cpu() -> None:
    """streaming imports torchvision, whose package on PyPI is built for CUDA and does not import beside a torch
    without it unless these two are there, which nothing here calls."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou) -> Tensor"
            )


# A process that reads: a line with what to do comes in, a line with what came of it goes out


def serve(options: argparse.Namespace, job: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print goes to the log
    read = OPENERS[options.arm](job, options.rank, options.ranks)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(one_pass(read, json.loads(line))), file=answers)


def one_pass(read: Read, todo: dict[str, Any]) -> dict[str, Any]:
    """Read until the end, or for ``limit`` seconds; once more if ``least`` seconds are not over yet."""
    time.sleep(max(0.0, todo["at"] - time.monotonic()))
    begin = now = time.monotonic()
    worked = time.process_time()
    records: Records = []
    keys: list[np.ndarray] = []
    done = 0
    while not records or now - begin < todo["least"]:
        batches = read(todo["kind"])
        for batch in batches:
            done += batch if isinstance(batch, int) else len(batch["input_ids"])
            now = time.monotonic()
            records.append((now, done))
            if todo["keys"] and not isinstance(batch, int):
                keys.append(row_keys(batch["input_ids"].numpy()))
            if now - begin > todo["limit"]:
                break
        batches.close()
    if todo["keys"]:
        np.save(todo["keys"], np.concatenate([np.zeros(0, np.uint64), *keys]))
    return {"begin": begin, "records": records, "cpu": time.process_time() - worked}


# Measuring


@dataclass
class Row:
    """What one arm did in one kind of pass, in so many processes; ``failed`` says why it did not."""

    arm: str
    kind: str
    processes: int
    rates: list[float] = field(default_factory=list)  # samples a second, a number a pass
    cpu: list[float] = field(default_factory=list)  # seconds a sample, of all threads
    memory: int = 0  # bytes beyond those before the first pass of its process
    anonymous: int = 0
    failed: str = ""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates) if self.rates else 0.0


class Workers:
    """The processes of an arm, one a rank, that wait for a pass to make."""

    def __init__(self, arm: str, python: str, job: Path, ranks: int) -> None:
        self.arm = arm
        self.log = job.with_name(f"{arm}-{ranks}.log")
        self.processes = []
        self.before = (0, 0)  # memory, before the first pass
        world = world_of(ranks)
        with self.log.open("wb") as log:
            for rank in range(ranks):
                command = [python, "-W", "ignore", __file__, "--child", "serve", "--arm", arm]
                command += ["--job", job, "--rank", str(rank), "--ranks", str(ranks)]
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env=environment(job.parent, world, rank),
                        start_new_session=True,
                    )
                )

    def answers(self) -> list[dict[str, Any]]:
        start = time.monotonic()
        late = threading.Timer(PATIENCE, self.kill)
        late.start()
        try:
            lines = [process.stdout.readline() for process in self.processes if process.stdout]
        finally:
            late.cancel()
        if not all(lines) and time.monotonic() - start >= PATIENCE:
            raise RuntimeError(f"no answer in {PATIENCE:.0f} s")
        if not all(lines):
            raise RuntimeError(last_line(self.log) or "ended without a word")
        return [json.loads(line) for line in lines]

    def make(
        self, kind: str, limit: float = 1e9, least: float = 0.0, keys: Path | None = None
    ) -> list[dict[str, Any]]:
        at = time.monotonic() + 0.01  # for all of them at once
        for rank, process in enumerate(self.processes):
            file = None if keys is None else str(keys.with_name(f"{keys.name}-{rank}.npy"))
            todo = {"kind": kind, "at": at, "limit": limit, "least": least, "keys": file}
            assert process.stdin is not None
            process.stdin.write(json.dumps(todo) + "\n")
            process.stdin.flush()
        return self.answers()

    def memory(self) -> tuple[int, int]:
        return memory_of(set().union(*(family(process.pid) for process in self.processes)))

    def kill(self) -> None:
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started

    def end(self) -> None:
        late = threading.Timer(PATIENCE, self.kill)
        late.start()
        for process in self.processes:
            process.communicate()  # no more lines: it ends
        late.cancel()


def world_of(ranks: int) -> dict[str, str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}


def environment(folder: Path, world: dict[str, str], rank: int = 0) -> dict[str, str]:
    ours = dict.fromkeys(("RANK", "LOCAL_RANK", "GLOBAL_RANK"), str(rank))
    ours |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf")}
    return {**os.environ, **QUIET, **world, **ours}


def measure_all(options: argparse.Namespace, folder: Path) -> list[Row]:
    say("writing the samples")
    job = write_all(folder, options)
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    pythons, lacking = pythons_of(options, file)
    rows: list[Row] = []
    for ranks in options.processes:
        wanted = [key for key in ROWS if key[0] in options.arms]
        table = {key: Row(*key, ranks, failed=lacking.get(key[0], "")) for key in wanted}
        measure(table, pythons, file, options)
        rows += table.values()
        print(report(list(table.values())), flush=True)
    return rows


def pythons_of(options: argparse.Namespace, job: Path) -> tuple[dict[str, str], dict[str, str]]:
    """For each arm an interpreter, its samples written; for the others a reason."""
    found = {arm: sys.executable for arm in options.arms if arm not in RIVALS}
    lacking = {}
    for arm in [arm for arm in RIVALS if arm in options.arms]:
        package = RIVALS[arm]
        candidates = sorted(options.rivals.glob("*/bin/python")) if options.rivals else []
        for python in [*map(str, candidates), sys.executable]:
            code = f"from importlib.metadata import version; print(version('{package}'))"
            tried = subprocess.run([python, "-c", code], capture_output=True, text=True)
            if tried.returncode == 0:
                print(f"{arm}: {package} {tried.stdout.strip()}", flush=True)
                found[arm] = python
                break
        else:
            lacking[arm] = f"{package} is not installed"
        if arm in WRITERS and arm in found:
            say(f"writing the samples for {arm}")
            log = job.with_name(f"write-{arm}.log")
            command = [found[arm], "-W", "ignore", __file__, "--child", "write", "--arm", arm]
            with log.open("wb") as out:
                tried = subprocess.run(
                    [*command, "--job", job],
                    stdout=out,
                    stderr=out,
                    env=environment(job.parent, world_of(1)),
                )
            if tried.returncode:
                lacking[arm] = last_line(log)
                del found[arm]
    print(flush=True)
    return found, lacking


def measure(
    table: dict[Key, Row], pythons: dict[str, str], job: Path, options: argparse.Namespace
) -> None:
    arms = list(dict.fromkeys(row.arm for row in table.values() if not row.failed))
    ranks = next(iter(table.values())).processes
    say(f"starting {len(arms)} arms of {ranks} processes")
    working = {arm: Workers(arm, pythons[arm], job, ranks) for arm in arms}

    def attempt(row: Row, what: Callable[[Workers], None]) -> None:
        if row.failed:
            return
        try:
            what(working[row.arm])
        except (RuntimeError, OSError) as error:
            for each in table.values():
                if each.arm == row.arm:
                    each.failed = str(error)[:200]

    try:
        for arm in arms:
            first = next(row for row in table.values() if row.arm == arm)
            attempt(first, ready)
        say("looking at the rows")
        for row in table.values():
            attempt(row, partial(look, row, job, options))
        say("memory")
        for row in table.values():
            attempt(row, partial(weigh, row, options))
        for number in range(options.passes):
            say(f"pass {number + 1} of {options.passes}")
            for row in table.values():
                attempt(row, partial(clock, row, options))
    finally:
        for workers in working.values():
            workers.end()


def ready(workers: Workers) -> None:
    if not all("ready" in answer for answer in workers.answers()):
        raise RuntimeError("an answer to nothing")
    workers.before = workers.memory()


def look(row: Row, job: Path, options: argparse.Namespace, workers: Workers) -> None:
    """One whole pass (of others: a part of one): the rows are those that were written, each once."""
    keys = job.with_name(f"keys-{row.arm}")
    checked = row.kind != "masked" and row.arm != "sha256"
    workers.make(row.kind, limit_of(row, options) / 2, keys=keys if checked else None)
    if checked:
        files = [keys.with_name(f"{keys.name}-{rank}.npy") for rank in range(row.processes)]
        check_keys(np.load(job.with_name("keys.npy")), [np.load(file) for file in files])


def check_keys(known: np.ndarray, found: list[np.ndarray]) -> None:
    every = np.concatenate(found)
    if not np.isin(every, known).all():
        raise RuntimeError("rows that were never written")
    if len(np.unique(every)) < len(every):
        raise RuntimeError(f"{len(every) - len(np.unique(every)):,} rows twice")


def limit_of(row: Row, options: argparse.Namespace) -> float:
    return options.limit if row.arm in RIVALS else 1e9


def weigh(row: Row, options: argparse.Namespace, workers: Workers) -> None:
    over = threading.Event()
    peak = [*workers.before]

    def watch() -> None:
        while not over.wait(0.02):
            peak[:] = map(max, peak, workers.memory())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        workers.make(row.kind, limit_of(row, options), least=options.limit / 2)
    finally:
        over.set()
        watching.join()
    row.memory, row.anonymous = peak[0] - workers.before[0], peak[1] - workers.before[1]


def clock(row: Row, options: argparse.Namespace, workers: Workers) -> None:
    answers = workers.make(row.kind, limit_of(row, options))
    row.rates.append(together(answers))
    rows = sum(answer["records"][-1][1] for answer in answers)
    row.cpu.append(sum(answer["cpu"] for answer in answers) / rows)


def together(answers: Sequence[dict[str, Any]]) -> float:
    """The rates of processes added up, each until the first of them has ended."""
    until = min(answer["records"][-1][0] for answer in answers)
    total = 0.0
    for answer in answers:
        inside = [record for record in answer["records"] if record[0] <= until]
        if inside:
            seconds, rows = inside[-1]
            total += rows / (seconds - answer["begin"])
    return total


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# Very many shards, none of which is there


def measure_many(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What opening so many shards costs, and a hundredth of them, in a process that does nothing else."""
    few, many = max(1, options.many // 100), options.many
    for count in (few, many):
        say(f"{count:,} shards that are only listed")
        list_shards(folder / f"many-{count}", count)
    job = folder / "many.json"
    folders = [str(folder / f"many-{count}") for count in (few, many)]
    job.write_text(json.dumps({"folders": folders}))
    tried = subprocess.run(
        [sys.executable, __file__, "--child", "many", "--job", job],
        capture_output=True,
        text=True,
        env=environment(folder, world_of(1)),
    )
    if tried.returncode:
        raise RuntimeError(tried.stderr)
    small, large = json.loads(tried.stdout)
    by_shard = {
        f"{name} by shard": (large[name] - small[name]) / (many - few) for name in ("held", "peak")
    }
    return {"shards": many, **by_shard, **large}


def list_shards(folder: Path, count: int) -> None:
    """A data set of so many shards of 16,384 samples, without the shards."""
    from siftloader.shards import Layout, Shard

    layout = Layout.for_vocabulary(16, VOCABULARY)
    bytes_each = layout.size(LISTED)
    shards = []
    for number in range(count):
        hashes = [hashlib.sha256(f"{what} {number}".encode()).hexdigest() for what in "ab"]
        shards.append(Shard(f"train-{number:06d}", LISTED, bytes_each, *hashes))
    folder.mkdir()
    describe(folder, shards, layout, "clm")


def cost_of_opening(folder: Path) -> dict[str, float]:
    """Seconds and bytes (held: by what is alive then) up to where the first shard would be read."""
    from siftloader.stream import TokenShards

    gc.collect()
    start = time.perf_counter()
    shards = TokenShards(folder, masking=None, verify=False)
    opened = time.perf_counter()
    position = min(1_000_000_000, len(shards) * 3 // 4)
    shards.load_state_dict({**shards.state_dict(), "position": position})
    to_the_first_shard(shards)
    resumed = time.perf_counter()
    del shards
    gc.collect()
    tracemalloc.start()
    shards = TokenShards(folder, masking=None, verify=False)
    to_the_first_shard(shards)
    gc.collect()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    seconds = {"open": opened - start, "resume": resumed - opened}
    return {**seconds, "position": position, "held": held, "peak": peak}


def to_the_first_shard(shards: Any) -> None:
    """All that comes before the first byte of a shard: the first block is located, the shard is missing."""
    from siftloader.errors import ShardError

    try:
        next(shards.batches(BATCH))
    except ShardError:
        return
    raise RuntimeError("a shard was read that is not there")


CHILDREN: dict[str, Callable[[argparse.Namespace, dict[str, Any]], None]] = {
    "serve": serve,
    "write": lambda options, job: WRITERS[options.arm](job),
    "many": lambda options, job: print(json.dumps([*map(cost_of_opening, job["folders"])])),
}


# The report


def report(rows: Sequence[Row]) -> str:
    ranks = rows[0].processes
    title = f"{ranks} process{'es' * (ranks > 1)}, samples per second"
    lines = [
        f"{title:<38}{'median':>11}{'least':>11}{'most':>11}{'x tar':>8}{'x map':>7}"
        f"{'CPU us':>8}{'MB':>7}{'anonymous':>11}"
    ]
    for row in rows:
        name = ROWS[row.arm, row.kind]
        if row.failed:
            lines.append(f"{name:<38}  {row.failed}")
            continue
        masked = row.kind == "masked"
        lines.append(
            f"{name:<38}{row.rate:>11,.0f}{min(row.rates):>11,.0f}{max(row.rates):>11,.0f}"
            f"{times(row.rate, best_of_tars(rows, masked)):>8}"
            f"{times(row.rate, rate_of(rows, 'map', 'masked' if masked else 'plain')):>7}"
            f"{1e6 * statistics.median(row.cpu):>8.2f}"
            f"{row.memory / 1e6:>7.0f}{row.anonymous / 1e6:>11.0f}"
        )
    return "\n".join([*lines, "", *bars(rows), ""])


def bars(rows: Sequence[Row]) -> list[str]:
    """What is asked of us, and whether it is so; nothing where what it is compared with is missing."""
    plain, first = rate_of(rows, "siftloader", "plain"), rate_of(rows, "siftloader", "first")
    tar = best_of_tars(rows, masked=False)
    whole, hashing = rate_of(rows, "map", "plain"), rate_of(rows, "sha256", "plain")
    lines = []
    if plain and tar:
        lines.append(bar("verified, x the best other reader of tars", plain / tar, 10))
    if plain and whole:
        lines.append(bar("verified, x the memory map with the same fields", plain / whole, 0.7))
    masked, masked_map = rate_of(rows, "siftloader", "masked"), rate_of(rows, "map", "masked")
    if masked and masked_map:
        lines.append(bar("masked, x the memory map masked alike", masked / masked_map, 0.7))
    if first and whole and hashing:
        name, least = min(
            ("0.7 x the memory map", 0.7 * whole),
            ("0.8 x sha256 alone", 0.8 * hashing),
            key=lambda each: each[1],
        )
        lines.append(bar(f"first pass, x the lesser of two ({name})", first / least, 1))
    return lines


def bar(what: str, found: float, least: float, most: float = float("inf")) -> str:
    asked = f"at least {least:g}" if most == float("inf") else f"at most {most:g}"
    return f"{what}: {found:.3g}, bar {asked}: {'met' if least <= found <= most else 'MISSED'}"


def rate_of(rows: Sequence[Row], arm: str, kind: str) -> float:
    return next((row.rate for row in rows if (row.arm, row.kind) == (arm, kind)), 0.0)


def best_of_tars(rows: Sequence[Row], masked: bool) -> float:
    return max(rate_of(rows, arm, "masked" if masked else "plain") for arm in OF_TARS)


def times(rate: float, of: float) -> str:
    return f"{rate / of:.2f}" if of else "-"


def report_many(many: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"{many['shards']:,} shards, opened in {many['open']:.2f} s; beyond a hundredth of them, "
            f"bytes a shard (tracemalloc): {many['held by shard']:.0f} held, "
            f"{many['peak by shard']:.0f} at the peak",
            bar("bytes held for each shard", many["held by shard"], 0, 100),
            bar(
                f"seconds from a state at sample {many['position']:,} to the first shard",
                many["resume"],
                0,
                1,
            ),
        ]
    )


if __name__ == "__main__":
    main()
