"""Real processes: training that is killed, and resumed on another number of them.

pytest tests/test_processes.py -m slow; the processes run this very file: python tests/test_processes.py train FOLDER
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_laws import in_order, slots_of, write
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from siftloader import SiftingDataLoader, TokenShards, World


SIZES = (90, 200, 7, 23, 160)  # 480 samples: pools of 8 fit exactly into 1, 2 and 4 ranks
BATCH, EPOCHS, EVERY, WARMUP = 4, 2, 3, 3
OTHER = (100, 1, 59)  # the second set of the mix
CHECKPOINT = "checkpoint.pt"


def shards_of(folder: Path, kind: str, world: World | None = None) -> TokenShards:
    """One set, or two mixed in lanes for two machines."""
    one, other = folder / "mlm-0", folder / "mlm-1"
    if kind == "set":
        return TokenShards(one, with_ids=True, world=world)
    mix = {one: 3, other: 1}
    return TokenShards.mix(mix, epoch_samples=480, lanes=2, with_ids=True, world=world)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 90)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def train(folder: Path) -> None:
    """A training script as a user has it; what it was handed goes into a log of this run and rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    candidates: list[int] = []
    loader = SiftingDataLoader(
        shards_of(folder, os.environ["KIND"]),
        BATCH,
        model=model,
        warmup_steps=WARMUP,
        on_select=lambda ids, scores, kept: candidates.extend(ids.tolist()),
    )
    step, done, warned = 0, 0, []
    if (folder / CHECKPOINT).exists():
        saved = torch.load(folder / CHECKPOINT, weights_only=True)
        step, done = saved["step"], saved["epochs"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loader.load_state_dict(json.loads(saved["loader"]))
        warned = [str(each.message) for each in caught]
    log = (folder / f"{os.environ['RUN']}-{rank}.jsonl").open("a", buffering=1)

    def say(**what: Any) -> None:
        print(json.dumps(what), file=log)

    say(ranks=ranks, step=step, epoch=done, warned=warned)
    for epoch in range(done, EPOCHS):
        dropped = loader.stats["tail_dropped"]
        for batch in loader:
            optimizer.zero_grad()
            logits = model(batch["input_ids"])
            nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
            optimizer.step()
            step += 1
            kept = batch["id"].tolist()
            say(step=step, epoch=epoch, drawn=candidates or kept, kept=kept)
            candidates.clear()
            if step % EVERY == 0:
                save(folder, loader, model, optimizer, step, epoch)
        say(step=step, epoch=epoch, dropped=loader.stats["tail_dropped"] - dropped)
        save(folder, loader, model, optimizer, step, epoch + 1)
    say(step=step, weights=sum(p.double().sum().item() for p in model.parameters()))
    log.close()
    dist.destroy_process_group()


def read(folder: Path) -> None:
    """Two epochs of a loader, where the ranks agree, or rank 1 is told something else."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    case, odd = os.environ["KIND"], dist.get_rank() == 1
    data = folder / ("mlm-1" if case == "fingerprint" and odd else "mlm-0")
    shards = TokenShards(data, seed=int(case == "seed" and odd), verify=False)
    if case == "position" and odd:
        shards.load_state_dict({**shards.state_dict(), "position": 8})
    loader: Any = DataLoader(shards, 8, num_workers=2 if case == "workers" else 0)
    if case == "seed":
        loader = SiftingDataLoader(shards, 8, model=Net(), keep=1.0)
    for epoch in range(2):
        shards.set_epoch(epoch)
        rows = sum(len(batch["input_ids"]) for batch in loader)
        assert case != "workers" or rows == 240
    dist.barrier()
    dist.destroy_process_group()


def save(
    folder: Path,
    loader: SiftingDataLoader,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    epochs: int,
) -> None:
    """The state of any of the ranks will do; the file is old or new, never half."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, loader.state_dict())
    if dist.get_rank():
        return
    for state in states:
        assert same(state) == same(states[0]), "every rank stands at the same place"
    saved = {"step": step, "epochs": epochs, "loader": json.dumps(states[step % len(states)])}
    saved |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, folder / "checkpoint.tmp")
    (folder / "checkpoint.tmp").replace(folder / CHECKPOINT)


def same(state: dict[str, Any]) -> dict[str, Any]:
    own = {
        "seconds_scoring",
        "seconds_auditing",
        "nonfinite",
        "unlabelled",
    }  # of a rank's own rows
    return {**state, "stats": {k: v for k, v in state["stats"].items() if k not in own}}


def machines(ranks: int) -> int:
    return 2 if ranks % 2 == 0 else 1


@dataclass
class Run:
    """Processes under way."""

    processes: list[subprocess.Popen[str]]

    def kill(self) -> list[str]:
        """As the out-of-memory killer does it, and the scheduler: no handler runs, nothing is flushed."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return [process.communicate()[1] for process in self.processes]

    def finished(self, within: float = 240) -> None:
        """Wait until all have ended well; if one did not, the others, who wait for it, are killed."""
        deadline = time.monotonic() + within
        while self.alive() and time.monotonic() < deadline:
            if any(process.poll() for process in self.processes):
                break
            time.sleep(0.02)
        ended = [process.poll() for process in self.processes]
        errors = self.kill()
        assert ended == [0] * len(ended), f"exit codes {ended}\n" + "\n".join(errors)

    def alive(self) -> bool:
        return any(process.poll() is None for process in self.processes)


def start(
    folder: Path, ranks: int, run: int, kind: str = "set", what: Callable[[Path], None] = train
) -> Run:
    """As torchrun starts them, half of them on another machine, it says; each is a group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks // machines(ranks)), "OMP_NUM_THREADS": "1"}
    shared |= {"RUN": f"{run:03d}", "KIND": kind}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, what.__name__, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]
    return Run(processes)


@dataclass(frozen=True)
class Log:
    """What the ranks of one run wrote: first lines, one line a step, one at the end of an epoch."""

    ranks: int
    began: tuple[int, int]  # step and epoch of the checkpoint that was taken up
    warned: list[list[str]]  # by rank
    lines: list[list[dict[str, Any]]]  # by rank

    def drawn(self, epoch: int, until: tuple[int, int]) -> list[list[int]]:
        """By rank, the ids that count: steps after the checkpoint that the next run took up do not."""
        return [
            [i for line in own if self.counts(line, epoch, until) for i in line["drawn"]]
            for own in self.lines
        ]

    def slots(self, kind: str) -> list[int]:
        count = machines(self.ranks)
        return slots_of((count, self.ranks // count), 1 if kind == "set" else 2)

    @staticmethod
    def counts(line: dict[str, Any], epoch: int, until: tuple[int, int]) -> bool:
        return "drawn" in line and line["epoch"] == epoch and line["step"] <= until[0]

    def dropped(self, epoch: int) -> int:
        """Rows that were too few for a batch at the end of an epoch, of all ranks."""
        lines = [line for own in self.lines for line in own if "dropped" in line]
        return sum(line["dropped"] for line in lines if line["epoch"] == epoch)


def logs_of(folder: Path) -> list[Log]:
    """Of the runs that came as far as to take up a checkpoint, in their order."""
    runs = sorted({path.name.partition("-")[0] for path in folder.glob("*-*.jsonl")})
    found = []
    for run in runs:
        texts = [path.read_text() for path in sorted(folder.glob(f"{run}-*.jsonl"))]
        # The last line of a killed process may be cut.
        lines = [[json.loads(line) for line in text.split("\n")[:-1]] for text in texts]
        if not all(lines):
            continue  # died before all of them began
        first = lines[0][0]
        assert len(lines) == first["ranks"]
        assert all(
            (own[0]["step"], own[0]["epoch"]) == (first["step"], first["epoch"]) for own in lines
        )
        warned = [own[0]["warned"] for own in lines]
        found.append(Log(first["ranks"], (first["step"], first["epoch"]), warned, lines))
    return found


def check_every_sample_once(folder: Path, logs: list[Log], kind: str) -> None:
    """What counts of all runs is, position by position, what one process reads straight."""
    shards = shards_of(folder, kind, World())
    ends = [*[log.began for log in logs[1:]], (sys.maxsize, EPOCHS)]
    for epoch in range(EPOCHS):
        straight = [i for batch in shards.read_batches(64, epoch) for i in batch["id"].tolist()]
        at = 0
        for log, until in zip(logs, ends, strict=True):
            if not log.began[1] <= epoch <= until[1]:
                continue
            begin = at
            found = in_order(log.drawn(epoch, until), log.slots(kind), at)
            at += len(found)
            assert found == straight[begin:at]
            if (
                until[1] > epoch
            ):  # it saw the end: equally many for each rank, and no batch of less
                left_out = (len(straight) - begin) % log.ranks
                assert len(straight) - at == left_out + log.dropped(epoch)
                assert left_out + log.dropped(epoch) < log.ranks * (BATCH + 1)
        assert len(straight) - at < 4 * (BATCH + 1)


def weights_of(log: Log) -> set[float]:
    return {own[-1]["weights"] for own in log.lines}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "mlm-0", SIZES, "mlm")
    write(tmp_path / "mlm-1", OTHER, "mlm")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["set", "mix"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_so_many_processes_deliver_the_same_candidates(folder, ranks, kind):
    start(folder, ranks, 0, kind).finished()
    (log,) = logs_of(folder)
    assert (log.ranks, log.warned, log.dropped(0)) == (ranks, [[]] * ranks, 0)
    check_every_sample_once(folder, [log], kind)
    assert len(weights_of(log)) == 1, "one model"


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kind"), [(0, "set"), (1, "mix")])
def test_killed_at_any_moment_and_resumed_on_any_number_of_processes_loses_nothing(
    folder, seed, kind
):
    chance = random.Random(seed)
    for number in range(7):
        run = start(folder, chance.choice([1, 2, 3, 4]), number, kind)
        wait_for_lines(folder / f"{number:03d}-0.jsonl", chance.randrange(1, 16), run)
        time.sleep(chance.random() / 20)
        run.kill()
    start(folder, chance.choice([1, 2, 4]), 99, kind).finished()
    logs = logs_of(folder)
    assert len(logs) > 3 and len({log.ranks for log in logs}) > 1
    assert len({log.began for log in logs}) > 3, "checkpoints were taken up"
    check_every_sample_once(folder, logs, kind)
    check_warnings(logs)
    assert len(weights_of(logs[-1])) == 1, "one model"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["seed", "fingerprint", "position"])
def test_ranks_that_read_something_else_are_told(folder, case):
    with pytest.raises(AssertionError, match=rf"RanksDisagree: rank [01] of 2 .*{case}"):
        start(folder, 2, 0, case, read).finished()


@pytest.mark.slow
def test_ranks_with_loader_workers_read_epoch_after_epoch(folder):
    start(folder, 2, 0, "workers", read).finished()


def wait_for_lines(log: Path, lines: int, run: Run) -> None:
    deadline = time.monotonic() + 120
    while run.alive() and not (log.exists() and log.read_text().count("\n") >= lines):
        assert time.monotonic() < deadline, f"no {lines} lines in {log.name} after two minutes"
        time.sleep(0.002)


def check_warnings(logs: list[Log]) -> None:
    """Whoever continues what another number of ranks saved is told so: each process, once."""
    saved_by = {(0, 0): None}
    for log in logs:
        before = saved_by[log.began]
        for warned in log.warned:
            if before in (None, log.ranks):
                assert warned == []
            else:
                (message,) = warned
                assert f"resuming with {log.ranks} ranks what {before} began" in message
                assert "which of them are kept depends on the number of ranks" in message
        for line in log.lines[0]:
            if "dropped" in line:
                saved_by[line["step"], line["epoch"] + 1] = log.ranks
            elif "drawn" in line and line["step"] % EVERY == 0:
                saved_by[line["step"], line["epoch"]] = log.ranks


if __name__ == "__main__":
    {"train": train, "read": read}[sys.argv[1]](Path(sys.argv[2]))
    # About one process in a hundred that used gloo aborts while it ends (torch 2.13, "terminate called
    # without an active exception", without siftloader too): what is tested is over by now.
    os._exit(0)
