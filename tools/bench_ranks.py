"""What several ranks pay for going together: tools/bench_ranks.py

Spawns gloo ranks on this machine and times, per step and interleaved, in milliseconds of rank 0:

* asking     the two questions of a sifted step, whether all ranks do the same (no GPU is waited for)
* all-reduce of one MiB of gradients in the same ranks, to compare with
* by rank    a whole sifted draw of b from P rows with scope="rank"
* globally   the same with scope="global": scores gathered, winners exchanged; and how many rows moved

    python tools/bench_ranks.py --ranks 2 4

More ranks than cores take turns, so their figures say nothing of a cluster but an upper bound.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_scoring import header
from torch import Tensor, nn

from siftloader import Sifter
from siftloader.agreement import Agreement, Doing


class Scores(nn.Module):
    """A model that costs nothing: the scores are in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    print(header(torch.device("cpu")))
    print(
        f"P = {options.pool} rows of {options.length} tokens (three int64 fields), half kept; medians of "
        f"{options.repeats} steps, milliseconds\n"
    )
    print(
        f"{'ranks':>5} {'asking':>9} {'all-reduce':>11} {'by rank':>9} {'globally':>9} {'moved':>8}"
    )
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (ranks, options, f"file://{folder}/store"), nprocs=ranks)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pool", type=int, default=64, help="P, rows (64)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--repeats", type=int, default=200, help="steps that are timed (200)")
    return parser.parse_args(arguments)


def work(rank: int, ranks: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    ids = torch.randint(0, 30_000, (options.pool, options.length))
    batch: dict[str, Any] = {
        "input_ids": ids,
        "labels": ids.clone(),
        "attention_mask": torch.ones_like(ids),
    }

    def scores(early: Any, batch: Any) -> Tensor:
        return torch.rand(len(batch["input_ids"]))

    agreement, gradients, moved = Agreement(), torch.ones(1 << 18), []
    sifters = [Sifter(Scores(), score_fn=scores, scope=scope) for scope in ("rank", "global")]  # type: ignore[arg-type]

    def ask() -> None:
        agreement.step(Doing.SIFTS, 0, 1)
        agreement.step(Doing.HANDS_OUT, 0, 1)

    def globally() -> None:
        before = sifters[1].stats["kept"]
        sifters[1](batch)
        moved.append(max(0, sifters[1].stats["kept"] - before - options.pool // 2))

    kinds: list[Callable[[], object]] = [
        ask,
        lambda: dist.all_reduce(gradients),
        lambda: sifters[0](batch),
        globally,
    ]
    found: list[list[float]] = [[] for _ in kinds]
    for repeat in range(options.repeats + 10):
        for kind, seconds in zip(kinds, found, strict=True):
            dist.barrier()
            begin = time.perf_counter()
            kind()
            if repeat >= 10:
                seconds.append(time.perf_counter() - begin)
    if rank == 0:
        asking, reduced, by_rank, by_all = (1000 * statistics.median(each) for each in found)
        print(
            f"{ranks:>5} {asking:>9.3f} {reduced:>11.3f} {by_rank:>9.3f} {by_all:>9.3f} "
            f"{statistics.mean(moved):>8.1f}",
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
