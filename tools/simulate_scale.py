"""python tools/simulate_scale.py [--shards 100000] [--ranks-per-machine 8]

What a very large run asks of its machines, without having them: a manifest of 10^5 shards of 32,768 samples
of 512 tokens (6.7 TB) is written, not the shards; orders, readers and their states are the real ones, of every
rank that is looked at. For 1, 8 and 128 machines, with and without lanes:

* the share of all bytes that a machine opens in an epoch: every shard that a position of its ranks lies in, counted by
  locating positions (all of a stretch of windows), as each shard is verified, and fetched, as a whole;
* shards mapped by a rank at once, and shards in use on a machine at once (two windows a lane: read and fetched ahead),
  which is what a cache must hold;
* downloads in flight at most: each rank fetches two ahead and waits for two, and no two ranks of a machine the same;
* seconds from nothing to the first positions of a rank, and from a state at position 10^9; memory of a rank.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import platform
import tempfile
import time
import tracemalloc
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from siftloader.opened import THREADS
from siftloader.shards import Layout, Shard, Source, Tokenizer, write_dataset
from siftloader.storage import AHEAD
from siftloader.stream import MOST_OPEN, TokenShards
from siftloader.world import World


SAMPLES, TOKENS, VOCABULARY, WINDOW = 32_768, 512, 30_522, 8
STRETCH = 6  # windows whose every position is located to count what a machine opens


def main() -> None:
    options = _options()
    print(
        f"{platform.machine()}, python {platform.python_version()}, torch {torch.__version__}, numpy "
        f"{np.__version__}, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    )
    size = Layout(TOKENS).size(SAMPLES)
    print(
        f"{options.shards:,} shards of {SAMPLES:,} samples, {options.shards * size / 1e12:.1f} TB; window "
        f"{WINDOW}, {options.ranks_per_machine} ranks a machine\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), options.shards)
        rows = [
            measured(Path(folder), lanes, machines, options.ranks_per_machine)
            for lanes, machines in tqdm(CASES, desc="topologies", leave=False)
        ]
    print(table(rows))


CASES = [(1, 1), (1, 8), (1, 128), (128, 128), (128, 8), (128, 1), (8, 8), (8, 1)]
COLUMNS = {
    "lanes": "lanes",
    "machines": "machines",
    "ranks": "ranks",
    "share": "opened, % of bytes",
    "mapped": "mapped, a rank",
    "cached": "in use, a machine",
    "cache": "GB of them",
    "flight": "downloads at once",
    "start": "start, s",
    "resume": "resume at 10^9, s",
    "memory": "memory, MB a rank",
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=100_000, help="in the simulated manifest")
    parser.add_argument("--ranks-per-machine", type=int, default=8)
    return parser.parse_args()


def write_manifest(folder: Path, shards: int) -> None:
    """A data set without its shards."""
    layout = Layout(TOKENS)
    lines = [
        Shard(
            f"train-{number:06d}",
            SAMPLES,
            layout.size(SAMPLES),
            sha256(b"%d" % number).hexdigest(),
            sha256(b"sources %d" % number).hexdigest(),
        )
        for number in range(shards)
    ]
    write_dataset(
        folder,
        lines,
        layout=layout,
        objective="clm",
        tokenizer=Tokenizer("none", "0" * 64, VOCABULARY),
        sources=[Source("none", "0" * 64, 1)],
        unigrams=np.zeros(VOCABULARY, np.int64),
        seed=0,
    )


def measured(folder: Path, lanes: int, machines: int, per_machine: int) -> dict[str, float]:
    """One row of the table."""
    ranks = machines * per_machine
    world = World(0, ranks, machines=machines)
    gc.collect()
    tracemalloc.start()
    shards = TokenShards(folder, lanes=lanes, world=world)
    _first_block(shards, world, 0)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    begin = time.perf_counter()
    shards = TokenShards(folder, lanes=lanes, world=world)
    _first_block(shards, world, 0)
    start = time.perf_counter() - begin
    position = min(10**9, shards.total // 2)
    state = json.loads(json.dumps({**shards.state_dict(), "epoch": 1, "position": position}))
    begin = time.perf_counter()
    shards.load_state_dict(state)
    _first_block(shards, world, position, epoch=1)
    resume = time.perf_counter() - begin

    here = lanes // math.gcd(lanes, machines)  # of which a machine reads
    of_rank = lanes // math.gcd(lanes, ranks)
    in_use = min(len(shards.shard_set.shards("train")), 2 * WINDOW * here)
    return {
        "lanes": lanes,
        "machines": machines,
        "ranks": ranks,
        "share": 100 * opened(shards, lanes, machines, per_machine),
        "mapped": min(MOST_OPEN, (WINDOW + 1) * of_rank),
        "cached": in_use,
        "cache": in_use * Layout(TOKENS).size(SAMPLES) / 1e9,
        "flight": min(in_use, per_machine * (AHEAD + THREADS)),
        "start": start,
        "resume": resume,
        "memory": memory / 1e6,
    }


def _first_block(shards: TokenShards, world: World, position: int, epoch: int = 0) -> None:
    # What a reader locates before it opens its first shard.
    turns = np.arange(2048, dtype=np.int64)
    first = position + (shards._slot(world) - position) % world.ranks
    shards._places().locate(first + world.ranks * turns, epoch)


def opened(shards: TokenShards, lanes: int, machines: int, per_machine: int) -> float:
    """The share of the shards of a stretch of the order that the first machine opens."""
    order = shards._places().order(0, 0)
    ranks = machines * per_machine
    slots = [
        World(rank, ranks, machines=machines).slot if lanes > 1 else rank
        for rank in range(per_machine)
    ]
    end = min(len(order), STRETCH * WINDOW * SAMPLES * lanes)  # so many windows of every lane
    mine: set[int] = set()
    everyone: set[int] = set()
    # All positions of one rank's turn: what the whole run opens meanwhile, by its windows.
    for lane in range(lanes):
        position: int | None = lane
        while position is not None and position < end:
            of_window, position = order.window_at(position)
            everyone.update(of_window)
    for slot in slots:
        for begin in range(slot, end, ranks << 20):
            at = np.arange(begin, min(end, begin + (ranks << 20)), ranks, dtype=np.int64)
            mine.update(np.unique(order.locate(at)[0]).tolist())
    return len(mine) / len(everyone)


def table(rows: list[dict[str, float]]) -> str:
    """The rows for people, in Markdown."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [_cell(name, row[name]) for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, value: float) -> str:
    digits = {"share": 1, "cache": 1, "start": 2, "resume": 3, "memory": 1}.get(name, 0)
    return f"{value:,.{digits}f}"


if __name__ == "__main__":
    main()
