"""What loss and entropy of a head cost, made in several ways: python tools/bench_head.py

Heads of real models (without bias), hidden states and weights drawn at random so that predictions are
neither flat nor certain:

* product       F.linear alone, all logits at once: what no way without one can beat
* eager         F.linear, its result as float32, cross_entropy, then the entropy from log_softmax: at once
* eager, 2**26  the same in chunks of 2**26 logits, which was siftloader's way
* siftloader    `loss_and_entropy` as the loader calls it: on a GPU the Triton kernel
* in torch      the same without Triton (on a CPU there is nothing else)
* Liger         fused linear cross-entropy, where liger-kernel is installed; the loss alone
* CCE           cut cross-entropy, where cut-cross-entropy is installed; the loss alone

ms is the median over rounds in which all ways take turns, TFLOP/s counts 2 M H V, whatever else is done, peak
is what was alive at most beside the arguments, and the errors are the largest and the mean one of the loss
in nats, beside float64, over 256 rows.

    python tools/bench_head.py --full             # on a CPU, with as many positions as on a GPU
    python tools/bench_head.py --tune             # on a GPU: which block sizes of the kernel are best
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from siftloader import fused
from siftloader.fused import LinearHead, loss_and_entropy


Values = tuple[Tensor, Tensor | None]
CHUNK = 1 << 26
EAGER_BYTES = (
    18  # of a logit at the peak: bfloat16, float32, and log_softmax, its exp and their product
)


@dataclass(frozen=True)
class Shape:
    """M positions of a model with hidden size H and a vocabulary of V; fewer of them on a CPU."""

    name: str
    positions: int
    width: int
    classes: int
    few: int

    @property
    def flops(self) -> float:
        return 2.0 * self.positions * self.width * self.classes


SHAPES = [
    Shape("BERT-base, 64 x 512 at 15 %", 4915, 768, 30522, few=1024),
    Shape("GPT-2, 64 x 1,024", 65536, 768, 50257, few=512),
    Shape("Llama 1B, 16 x 1,024", 16384, 2048, 128256, few=128),
]


def eager(hidden: Tensor, labels: Tensor, head: LinearHead) -> Values:
    logits = functional.linear(hidden, head.weight).float()
    log_p = logits.log_softmax(-1)
    loss = functional.cross_entropy(logits, labels, reduction="none")
    return loss, -(log_p.exp() * log_p).sum(-1)


def eager_in_chunks(hidden: Tensor, labels: Tensor, head: LinearHead) -> Values:
    rows = max(1, CHUNK // len(head.weight))
    pieces = zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)
    found = [eager(some, wanted, head) for some, wanted in pieces]
    return torch.cat([loss for loss, _ in found]), torch.cat([each for _, each in found])


def in_torch(hidden: Tensor, labels: Tensor, head: LinearHead) -> Values:
    kept, fused._kernel = fused._kernel, lambda hidden: None
    try:
        return loss_and_entropy(hidden, labels, head)
    finally:
        fused._kernel = kept


def ways(device: torch.device) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Each by its name; other people's where they are installed."""
    yield "product", lambda hidden, labels, head: functional.linear(hidden, head.weight)
    yield "eager", eager
    yield "eager, 2**26", eager_in_chunks
    yield "siftloader", loss_and_entropy
    if device.type != "cuda":
        return
    yield "in torch", in_torch
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        yield (
            f"Liger {metadata.version('liger-kernel')}",
            lambda hidden, labels, head: (
                liger_fused_linear_cross_entropy(hidden, head.weight, labels, reduction="none"),
                None,
            ),
        )
    except ImportError:
        print("no Liger: pip install liger-kernel")
    try:
        from cut_cross_entropy import linear_cross_entropy

        yield (
            f"CCE {metadata.version('cut-cross-entropy')}",
            lambda hidden, labels, head: (
                linear_cross_entropy(hidden, head.weight, labels, reduction="none"),
                None,
            ),
        )
    except ImportError:
        print("no CCE: pip install cut-cross-entropy")


class Alive(TorchDispatchMode):
    """The bytes of all tensors made on a CPU that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(each.untyped_storage()) for each in args if isinstance(each, Tensor)}
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor) and id(each.untyped_storage()) not in given | self._known:
                self._add(each.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_of(call: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with Alive() as alive:
        call()
    return alive.peak


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def made(shape: Shape, count: int, device: torch.device, dtype: torch.dtype) -> Any:
    draw = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(count, shape.width, device=device, dtype=dtype, generator=draw)
    # Logits with a spread of 3 nats: an entropy some nats below that of a flat prediction.
    weight = torch.randn(
        shape.classes, shape.width, device=device, dtype=dtype, generator=draw
    ).mul_(3 / shape.width**0.5)
    labels = torch.randint(shape.classes, (count,), device=device, generator=draw)
    return hidden, labels, LinearHead(weight)


def error_of(
    loss: Tensor, hidden: Tensor, labels: Tensor, head: LinearHead
) -> tuple[float, float]:
    few = slice(0, min(256, len(hidden)))
    wide = hidden[few].double()
    logits = torch.cat([wide @ part.double().T for part in torch.split(head.weight, 1 << 14)], 1)
    right = functional.cross_entropy(logits, labels[few], reduction="none")
    off = (loss[few].double() - right).abs()
    return float(off.max()), float(off.mean())


def measure(
    shape: Shape, count: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> None:
    hidden, labels, head = made(shape, count, device, dtype)
    logits = count * shape.classes
    print(
        f"\n{shape.name}: M = {count:,}, H = {shape.width:,}, V = {shape.classes:,}; logits would be "
        f"{logits * 2 / 2**20:,.0f} MiB of bfloat16"
    )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
    runs: dict[str, Callable[[], Any]] = {}
    lines: dict[str, str] = {}
    for name, way in ways(device):
        if (
            name in ("eager", "product")
            and logits * (EAGER_BYTES if name == "eager" else 2) > free
        ):
            print(f"{name}: left out, it needs more than the {free / 2**30:.0f} GiB there are")
            continue
        try:
            found = way(hidden, labels, head)
            runs[name] = lambda way=way: way(hidden, labels, head)  # type: ignore[misc]
            error = ""
            if name != "product":
                error = "   {:.2g} / {:.2g}".format(*error_of(found[0], hidden, labels, head))
            del found
            lines[name] = f"{peak_of(runs[name], device) / 2**20:10,.1f}{error}"
        except Exception as problem:  # someone else's kernel that does not run here
            runs.pop(name, None)
            print(f"{name}: {type(problem).__name__}: {problem}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(run, device))
    print(f"{'':16}{'ms':>9}{'(least)':>10}{'TFLOP/s':>9}{'peak MiB':>10}   error, max / mean")
    for name, line in lines.items():
        usual = statistics.median(times[name])
        rate = shape.flops * count / shape.positions / usual / 1e12
        print(f"{name:16}{1000 * usual:9.2f}{1000 * min(times[name]):10.2f}{rate:9.3g}{line}")


def tune(shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """The kernel alone, with block sizes that may do: the five best, and what it takes now."""
    from siftloader.kernels import Blocks, _blocks, tiles

    hidden, labels, head = made(shape, shape.positions, device, dtype)
    usual = _blocks(device, dtype)
    candidates = [
        Blocks(rows, classes, width, warps, stages)
        for rows, classes, width, warps, stages in product(
            (64, 128), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
        )
        if rows * classes * 4 <= warps * 32 * 4 * 128  # at most 128 registers of sums for a thread
    ]
    found: dict[Blocks, float] = {}
    started, limit = time.monotonic(), 90.0  # seconds for a shape: compiling is what takes them
    for blocks in dict.fromkeys([usual, *candidates]):
        if time.monotonic() - started > limit:
            print(f"stopped after {limit:g} s with {len(found)} of {len(candidates)} sizes tried")
            break

        def run(blocks: Blocks = blocks) -> Tensor:
            return tiles(hidden, labels, head.weight, blocks=blocks)

        try:
            run()
            found[blocks] = statistics.median(seconds_of(run, device) for _ in range(5))
        except Exception as error:  # more memory or registers than there are
            print(f"{blocks}: {type(error).__name__}")
    print(f"\n{shape.name}, {dtype}: block sizes, best first, then those of now")
    best = sorted(found, key=found.__getitem__)[:5]
    for blocks in [*best, *({usual} & found.keys())]:
        print(
            f"{1000 * found[blocks]:9.3f} ms {shape.flops / found[blocks] / 1e12:8.1f} TFLOP/s  {blocks}"
        )


def header(device: torch.device) -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    machine = names[0] if names else platform.processor()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
        try:
            versions += f", triton {metadata.version('triton')}"
        except metadata.PackageNotFoundError:
            versions += ", no triton"
    threads = f"{torch.get_num_threads()} threads"
    return f"{machine}, {threads} | {versions} | {datetime.date.today().isoformat()}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--full", action="store_true", help="all positions, on a CPU too")
    parser.add_argument("--shapes", default="", help="only those whose name contains this")
    parser.add_argument("--rounds", type=int, default=0, help="default: 20 on a GPU, 3 on a CPU")
    parser.add_argument("--tune", action="store_true", help="try block sizes of the kernel")
    options = parser.parse_args(argv)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if options.tune and device.type != "cuda":
        parser.error("--tune needs a GPU: on a CPU there are no block sizes")
    print(header(device), options.dtype, sep=" | ")
    with torch.no_grad():
        for shape in SHAPES:
            if options.shapes.lower() not in shape.name.lower():
                continue
            if options.tune:
                tune(shape, device, dtype)
                continue
            all_of_them = options.full or device.type == "cuda"
            count = shape.positions if all_of_them else shape.few
            rounds = options.rounds or (20 if device.type == "cuda" else 3)
            measure(shape, count, device, dtype, rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
