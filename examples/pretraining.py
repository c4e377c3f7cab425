"""What a long training run needs beside its loop: ranks, a clock, a log, checkpoints.

pretrain_bert.py and pretrain_gpt.py use it. Nothing here knows of models, data or sifting.
"""

from __future__ import annotations

import datetime
import json
import os
import pickle
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import siftloader
from siftloader import World


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the other processes that torchrun started, if it did; the device of this one."""
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def wrapped(model: nn.Module, compiled: bool) -> nn.Module:
    """The model as the loop calls it: gradients averaged over the ranks, compiled if asked for."""
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    return torch.compile(model) if compiled else model


def unwrapped(model: nn.Module) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def over_ranks(sums: Tensor) -> Tensor:
    """Sums of this rank to sums of all."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


class Average:
    """The mean of what was added since it was last taken, over all ranks; adding never waits for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # values, how many

    def add(self, value: Tensor) -> None:
        self._sums += torch.stack((value.detach().double(), torch.ones_like(value).double()))

    def take(self) -> float:
        total, count = over_ranks(self._sums.clone()).tolist()
        self._sums.zero_()
        return total / count

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])


class Clock:
    """Seconds of training, evaluation left out, and those of them spent waiting for a batch."""

    def __init__(self, device: torch.device) -> None:
        self.training = self.waiting = self._since = 0.0
        self._gpu = device.type == "cuda"

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()
        self.training += time.perf_counter() - self._since

    def loading(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            since = time.perf_counter()
            batch = next(batches)
            self.waiting += time.perf_counter() - since
            yield batch

    def state_dict(self) -> dict[str, float]:
        self.stop()
        self.start()
        return {"training": self.training, "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.training, self.waiting = state["training"], state["waiting"]


class Log:
    """JSON lines, the first one about the run; a resumed run drops those that it is about to write again.

    Rank 0 writes; the others keep silent.
    """

    def __init__(self, file: Path | None, run: dict[str, Any], keep_until: int) -> None:
        self._silent = World.detect().rank > 0
        self._file = None if self._silent else file
        kept: list[str] = []
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if keep_until and self._file.exists():
                # A kill in the middle of a line leaves half of it, without its end.
                whole = self._file.read_text().splitlines(keepends=True)
                kept = [line for line in whole if line.endswith("\n")]
                kept = [line for line in kept if json.loads(line).get("step", 0) <= keep_until]
            unfinished = self._file.with_name(self._file.name + ".tmp")
            unfinished.write_text("".join(kept))
            unfinished.replace(self._file)
        if not kept:
            self.write({"run": run})

    def write(self, record: dict[str, Any]) -> None:
        if self._silent:
            return
        line = json.dumps(record)
        tqdm.write(line)
        if self._file is not None:
            with self._file.open("a") as stream:
                stream.write(line + "\n")


class Checkpoint:
    """Everything that a run is made of, in one file: a run that is killed goes on to the bit.

    ``run`` says which run it is: the state of another is refused. ``shared`` parts are alike on all ranks,
    ``own`` ones belong to this rank; every part has ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, run: dict[str, Any], shared: dict[str, Any], own: dict[str, Any]) -> None:
        self._run, self._shared, self._own = run, shared, own

    def save(self, file: Path, step: int) -> None:
        mine = {name: part.state_dict() for name, part in self._own.items()}
        mine["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            mine["cuda_rng"] = torch.cuda.get_rng_state()
        world = World.detect()
        ranks: list[Any] = [mine]
        if dist.is_initialized():
            ranks = [None] * world.ranks
            dist.all_gather_object(ranks, mine)
        if world.rank == 0:
            state = {name: part.state_dict() for name, part in self._shared.items()}
            state |= {"step": step, "run": self._run, "ranks": ranks}
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(file.name + ".tmp")
            torch.save(state, unfinished)
            unfinished.replace(file)  # killed while saving, the checkpoint before is still there
        if dist.is_initialized():
            dist.barrier()  # whichever rank is killed from here on, all find this file

    def load(self, file: Path) -> int:
        """Put everything back where it was; returns the number of steps done."""
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            of, ranks = state["run"], state["ranks"]
        except (EOFError, KeyError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise SystemExit(
                f"{file} is damaged, or no checkpoint of this program ({error!r}); give the file that "
                f"--checkpoint wrote"
            ) from error
        if of != self._run:
            apart = [
                f"{name} was {of.get(name)!r}, is {self._run.get(name)!r}"
                for name in sorted({*of, *self._run})
                if of.get(name) != self._run.get(name)
            ]
            raise SystemExit(
                f"{file} belongs to another run: {'; '.join(apart)}; give the options it was made with, "
                f"or start afresh without it"
            )
        mine = ranks[World.detect().rank]
        for name, part in self._shared.items():
            part.load_state_dict(state[name])
        for name, part in self._own.items():
            part.load_state_dict(mine[name])
        torch.set_rng_state(mine["rng"])
        if torch.cuda.is_available() and "cuda_rng" in mine:  # a run may move from a CPU to a GPU
            torch.cuda.set_rng_state(mine["cuda_rng"])
        return int(state["step"])


def surroundings() -> dict[str, Any]:
    """Where and with what a run runs: for the first line of its log."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": f"{gpu or processor}, {platform.system()}",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "siftloader": siftloader.__version__,
        },
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
    }
