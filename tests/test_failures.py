"""Workers that die, data that fails, reads that hang, Ctrl-C: pytest tests/test_failures.py

Each is one kind of exception, soon, leaves no process, thread or shared memory behind, and a new iter() works.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from models import classifier
from test_loader import Rows, ids, planted
from torch.utils.data import DataLoader, IterableDataset, dataloader as torchs, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from siftloader import SiftingDataLoader, TokenShards, ahead, watched
from siftloader.errors import CorruptShard, Stalled, WorkerDied
from siftloader.shards import Layout, Source, Tokenizer, write_dataset, write_shard


pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
DEMO = "shards/demo"
SHARED = Path("/dev/shm")


SOON = 50.0  # seconds: at once, on a busy machine; what hangs here does so for longer


def until(happened, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)
    return happened()


KILLED: set[int] = set()


def kill(worker: multiprocessing.Process) -> None:
    """From outside, so between naming a piece of shared memory and unnaming it, too: nobody is to blame."""
    KILLED.add(worker.pid)
    worker.kill()


def killed(worker: multiprocessing.Process) -> None:
    """Kill, and wait for the end, which on a busy machine takes a while; it stays unreaped."""
    kill(worker)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


def shared_memory() -> set[str]:
    """What this process and those it started have there, and what dead ones left."""
    ours = {os.getpid(), *(each.pid for each in psutil.Process().children(recursive=True))}
    found = set()
    for each in SHARED.glob("torch_*_*"):
        pid = int(each.name.split("_")[1])
        if pid in KILLED:
            each.unlink(missing_ok=True)
        elif pid in ours or not psutil.pid_exists(pid):
            found.add(each.name)
    return found


def children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if not _serves(each)]


def _serves(process: psutil.Process) -> bool:
    # What multiprocessing itself keeps, and whatever is gone by now.
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return True
    return "multiprocessing.resource_tracker" in line or "multiprocessing.forkserver" in line


@pytest.fixture(autouse=True)
def _nothing_is_left():
    if multiprocessing.active_children():  # of other tests, in garbage
        gc.collect()
        assert until(lambda: not multiprocessing.active_children())
    before = shared_memory(), set(threading.enumerate()), set(children())

    def clean() -> bool:
        multiprocessing.active_children()  # reaps
        now = shared_memory(), set(threading.enumerate()), set(children())
        return now[0] <= before[0] and now[1] <= before[1] and now[2] <= before[2]

    yield
    if not clean():
        gc.collect()
        assert until(clean), (children(), threading.enumerate(), shared_memory() - before[0])


class Broken(Exception):
    """Nothing that torch knows how to build."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(f"row {row}: {why}")


def fail(kind: str) -> None:
    assert get_worker_info() is not None, "this would end the tests"
    if kind == "exit 0":
        os._exit(0)
    if kind == "exit 3":
        sys.exit(3)
    if kind == "hang":
        time.sleep(600)
    if kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
        time.sleep(60)
    if kind == "ValueError":
        raise ValueError("row 20 is broken")
    if kind == "KeyError":
        raise KeyError("no such column")
    if kind == "ConnectionResetError":
        raise ConnectionResetError("by the storage")
    if kind == "CorruptShard":
        raise CorruptShard(
            "train-000001: sample 7, bytes 4096..4100 of train-000001.tar: not what was written"
        )
    if kind == "Broken":
        raise Broken(20, "beyond repair")


class Failing(Rows):
    """Row ``at`` fails in its own way, in the worker that fetches it, while the file exists."""

    def __init__(self, kind: str, switch: Path, at: int = 20, count: int = 100) -> None:
        super().__init__(count)
        self.kind, self.switch, self.at = kind, switch, at

    def __getitem__(self, index):
        if index == self.at and self.switch.exists():
            (self.switch.parent / "now").touch()
            fail(self.kind)
        return super().__getitem__(index)


class FailingStream(IterableDataset):
    def __init__(self, rows: Failing) -> None:
        self.rows = rows

    def __iter__(self):
        info = get_worker_info()
        for index in range(info.id, len(self.rows), info.num_workers):
            yield self.rows[index]


def generator_around(loader):
    """An iterable that shows neither its loader nor its workers."""

    class Around:
        def __iter__(self):
            yield from (dict(batch) for batch in loader)

    return Around()


LOADERS = {
    "torch": lambda data, **kw: DataLoader(data, 8, num_workers=2, **kw),
    "persistent": lambda data, **kw: DataLoader(
        data, 8, num_workers=2, persistent_workers=True, **kw
    ),
    "one worker": lambda data, **kw: DataLoader(data, 8, num_workers=1, **kw),
    "iterable": lambda data, **kw: DataLoader(FailingStream(data), 8, num_workers=2, **kw),
    "stateful": lambda data, **kw: StatefulDataLoader(data, 8, num_workers=2, **kw),
    "stateful persistent": lambda data, **kw: StatefulDataLoader(
        data, 8, num_workers=2, persistent_workers=True, **kw
    ),
    "around": lambda data, **kw: generator_around(DataLoader(data, 8, num_workers=2, **kw)),
}
SLOW = {"one worker", "iterable", "stateful", "stateful persistent"}
SIFTS = {"plain": {"keep": 1.0}, "sifting": {"keep": 0.5, "warmup_steps": 0}}


def sifting(inner, **options) -> SiftingDataLoader:
    options = {"keep": 1.0, "warmup_steps": 0, "score_fn": planted} | options
    return SiftingDataLoader.wrap(inner, model=classifier(), **options)


@pytest.fixture
def hasty(monkeypatch) -> None:
    """A worker that hangs is waited for a moment only."""
    monkeypatch.setattr(watched, "LINGER", 0.3)


@pytest.fixture
def switch(tmp_path) -> Path:
    path = tmp_path / "fail"
    path.touch()
    return path


def assert_it_works_again(loader, switch) -> None:
    switch.unlink()
    assert sorted(row for batch in loader for row in ids(batch)) == list(range(100))


# Workers that die


def slowly(hows, slow):
    return [pytest.param(how, marks=pytest.mark.slow) if how in slow else how for how in hows]


@pytest.mark.parametrize("how", slowly(LOADERS, SLOW))
@pytest.mark.parametrize("kind", slowly(["SIGKILL", "exit 3"], {"exit 3"}))
def test_a_worker_that_dies_is_one_kind_of_error(kind, how, switch):
    loader = sifting(LOADERS[how](Failing(kind, switch)))
    begin = time.monotonic()
    with pytest.raises(WorkerDied) as raised:
        list(loader)
    assert time.monotonic() - begin < SOON
    text = str(raised.value)
    assert {"SIGKILL": "SIGKILL", "exit 3": "exit code 3"}[kind] in text
    assert "pid " in text and "iter()" in text
    if kind == "SIGKILL":
        assert "memory" in text
    if how != "around":  # there the generator lets go of them with the traceback
        assert not multiprocessing.active_children()
    del raised
    assert_it_works_again(loader, switch)


@pytest.mark.parametrize(
    "kind", slowly(["SIGBUS", "SIGSEGV", "SIGTERM", "exit 0"], {"SIGSEGV", "SIGTERM", "exit 0"})
)
def test_the_ways_to_die_are_told_apart(kind, switch):
    loader = sifting(LOADERS["torch"](Failing(kind, switch)))
    with pytest.raises(WorkerDied) as raised:
        list(loader)
    text = str(raised.value)
    if kind in ("exit 0", "SIGTERM"):  # torch's workers take SIGTERM from themselves as a signal
        assert "pid" in text
    else:
        assert kind in text
    if kind == "SIGBUS":
        assert "/dev/shm" in text and "--shm-size" in text
    assert_it_works_again(loader, switch)


@pytest.mark.parametrize("turn", slowly(range(10), range(1, 10)))
def test_however_the_death_shows_the_type_is_the_same(turn, switch):
    """Killed from outside at many moments: torch has RuntimeError, EOFError, ConnectionResetError for it."""

    class Slow(Rows):
        def __getitem__(self, index):
            time.sleep(0.001)
            return super().__getitem__(index)

    loader = sifting(DataLoader(Slow(400_000), 8, num_workers=2))  # for minutes
    iterator = iter(loader)
    next(iterator)
    victim = multiprocessing.active_children()[turn % 2]
    timer = threading.Timer(0.01 + 0.007 * turn, kill, [victim])
    timer.start()
    with pytest.raises(WorkerDied, match="SIGKILL") as raised:
        for _ in iterator:
            pass
    assert f"pid {victim.pid}" in str(raised.value)
    assert not multiprocessing.active_children()
    timer.join()


@pytest.mark.parametrize(
    "how",
    slowly(["torch", "persistent", "stateful", "around"], {"persistent", "stateful", "around"}),
)
def test_a_death_in_the_middle_of_a_step_waits_for_its_end(how, switch):
    """Torch raises wherever the main thread is: half an optimizer step would be taken."""
    switch.unlink()
    loader = sifting(LOADERS[how](Failing("never", switch)))
    list(DataLoader(Rows(4), 2, num_workers=1))  # torch has set its own by now
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    killed(multiprocessing.active_children()[0])
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # the loop's step
        sum(range(1000))
    with pytest.raises(WorkerDied, match="SIGKILL"):
        list(iterator)
    assert signal.getsignal(signal.SIGCHLD) is before
    assert sorted(row for batch in loader for row in ids(batch)) == list(range(100))


@pytest.mark.usefixtures("hasty")
def test_a_death_is_told_at_once_though_the_timeout_is_long(switch):
    loader = sifting(LOADERS["torch"](Failing("hang", switch, at=0), timeout=100))
    iterator = iter(loader)
    victim = multiprocessing.active_children()[0]
    timer = threading.Timer(0.3, kill, [victim])
    timer.start()
    begin = time.monotonic()
    with pytest.raises(WorkerDied, match=f"pid {victim.pid}"):
        next(iterator)
    assert time.monotonic() - begin < SOON
    timer.join()


def test_persistent_workers_that_died_between_epochs_are_told_at_the_next(switch, monkeypatch):
    # Torch itself looks after five seconds.
    monkeypatch.setattr(torchs._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (99,))
    switch.unlink()
    loader = sifting(LOADERS["persistent"](Failing("never", switch)))
    list(loader)
    victim = multiprocessing.active_children()[0]
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise right here
    try:
        kill(victim)
        victim.join()
        begin = time.monotonic()
        with pytest.raises(WorkerDied, match=f"pid {victim.pid}"):
            next(iter(loader))
        assert time.monotonic() - begin < SOON
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert sorted(row for batch in loader for row in ids(batch)) == list(range(100))


@pytest.mark.parametrize("kind", slowly(["ValueError", "SIGKILL"], {"SIGKILL"}))
@pytest.mark.parametrize("epochs", [1, 0.5])
def test_a_resumed_run_with_persistent_workers_fails_and_begins_again_too(kind, epochs, switch):
    def make():
        return sifting(LOADERS["persistent"](Failing(kind, switch, at=90)))

    switch.unlink()
    first = make()
    iterator = iter(first)
    for _ in range(13 if epochs == 1 else 6):
        next(iterator)
    assert (next(iterator, None) is None) == (epochs == 1)
    state = first.state_dict()
    del iterator, first
    switch.touch()
    loader = make()
    loader.load_state_dict(state)
    with pytest.raises({"ValueError": ValueError, "SIGKILL": WorkerDied}[kind]) as raised:
        list(loader)
    del raised
    assert_it_works_again(loader, switch)


def test_persistent_workers_end_at_once_with_their_loader(monkeypatch):
    """A cycle holds our loader: its queues close before torch would say through them that it is over."""
    monkeypatch.setattr(torchs._utils, "MP_STATUS_CHECK_INTERVAL", 99)  # it waits so long for each
    loader = SiftingDataLoader(
        Rows(40),
        8,
        num_workers=2,
        persistent_workers=True,
        model=classifier(),
        score_fn=planted,
        keep=1.0,
    )
    list(loader)
    assert len(multiprocessing.active_children()) == 2
    begin = time.monotonic()
    del loader
    gc.collect()
    assert not multiprocessing.active_children()
    assert time.monotonic() - begin < SOON


def test_the_death_of_another_loaders_worker_is_torchs_to_tell():
    ours = iter(sifting(DataLoader(Rows(10**4), 8, num_workers=1)))
    next(ours)
    known = {*multiprocessing.active_children()}
    plain = iter(DataLoader(Rows(10**4), 8, num_workers=1))
    next(plain)
    (victim,) = {*multiprocessing.active_children()} - known
    with pytest.raises(RuntimeError, match=f"pid {victim.pid}") as raised:
        kill(victim)
        time.sleep(60)  # torch raises in here
    assert not isinstance(raised.value, WorkerDied)
    next(ours)
    ours.close()


def test_two_loaders_at_once_each_tell_of_their_own(switch):
    first = sifting(DataLoader(Rows(10**4), 8, num_workers=1))
    second = sifting(DataLoader(Rows(10**4), 8, num_workers=1))
    one, two = iter(first), iter(second)
    next(one)
    workers_of_one = {*multiprocessing.active_children()}  # and of two, which began as well
    next(two)
    assert len(workers_of_one) == 2
    victim = next(iter(workers_of_one))
    killed(victim)
    time.sleep(0.2)
    told = []
    for iterator in (one, two):
        try:
            for _ in range(50):
                next(iterator)
        except WorkerDied:
            told.append(iterator)
    assert len(told) == 1
    one.close()
    two.close()
    before = signal.getsignal(signal.SIGCHLD)
    list(sifting(DataLoader(Rows(40), 8, num_workers=1)))
    assert signal.getsignal(signal.SIGCHLD) is before


# Data that fails


@pytest.mark.parametrize(
    "how",
    slowly(
        ["torch", "persistent", "stateful", "iterable", "around"],
        {"persistent", "stateful", "iterable"},
    ),
)
@pytest.mark.parametrize(
    "kind",
    slowly(
        ["ValueError", "KeyError", "ConnectionResetError"], {"KeyError", "ConnectionResetError"}
    ),
)
def test_an_exception_of_the_data_keeps_its_type_and_the_traceback_of_the_worker(
    kind, how, switch
):
    loader = sifting(LOADERS[how](Failing(kind, switch)))
    begin = time.monotonic()
    with pytest.raises(
        {"ValueError": ValueError, "KeyError": KeyError}.get(kind, OSError)
    ) as raised:
        list(loader)
    assert time.monotonic() - begin < SOON
    assert type(raised.value).__name__ == kind
    assert "in fail" in str(raised.value) and "worker process" in str(raised.value)
    if how in ("torch", "iterable", "stateful"):
        assert not multiprocessing.active_children()
    del raised
    assert_it_works_again(loader, switch)


def test_an_exception_that_torch_cannot_build_is_its_runtime_error(switch):
    loader = sifting(LOADERS["torch"](Failing("Broken", switch)))
    with pytest.raises(RuntimeError, match="Broken: row 20: beyond repair") as raised:
        list(loader)
    assert not isinstance(raised.value, WorkerDied)


def test_a_broken_shard_read_by_a_worker_knows_its_place(switch):
    loader = sifting(LOADERS["torch"](Failing("CorruptShard", switch)))
    with pytest.raises(CorruptShard) as raised:
        list(loader)
    error = raised.value
    assert (error.shard, error.sample, error.byte) == ("train-000001", 7, 4096)
    assert "in fail" in str(error)


# Reads that hang


@pytest.mark.parametrize(
    "how",
    slowly(["torch", "persistent", "stateful", "around"], {"persistent", "stateful", "around"}),
)
@pytest.mark.usefixtures("hasty")
def test_a_worker_that_hangs_is_told_with_stacks_and_states(how, switch):
    inner = LOADERS[how](Failing("hang", switch), timeout=1)
    loader = sifting(inner)
    begin = time.monotonic()
    with pytest.raises(Stalled) as raised:
        list(loader)
    assert time.monotonic() - begin < SOON
    text = str(raised.value)
    assert "timed out after 1 seconds" in text
    assert "MainThread" in text and "test_a_worker_that_hangs" in text
    assert text.count("worker 0 (pid ") == text.count("worker 1 (pid ") == 1
    assert "waiting, " in text and "py-spy" in text
    assert raised.value.__cause__ is not None
    if how != "around":
        assert not multiprocessing.active_children()
    del raised
    if how != "around":
        inner.timeout = 100  # what is only slow may take its time
        assert_it_works_again(loader, switch)


class Stuck(TokenShards):
    """The fourth batch does not come before ``free``."""

    free = threading.Event()

    def read_batches(self, *args, **options):
        for number, batch in enumerate(super().read_batches(*args, **options)):
            if number == 3:
                self.free.wait(60)
            yield batch


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_honour_the_timeout_whatever_the_workers(workers):
    Stuck.free.clear()
    shards = Stuck(DEMO)
    loader = SiftingDataLoader(
        shards, 8, model=classifier(), keep=1.0, timeout=1.5, num_workers=workers
    )
    begin, seen = time.monotonic(), 0
    with pytest.raises(Stalled) as raised:
        for _ in loader:
            seen += 1
    assert time.monotonic() - begin < SOON
    assert seen == 3
    assert "read_batches" in str(raised.value) and "MainThread" in str(raised.value)
    state = loader.state_dict()
    Stuck.free.set()
    again = SiftingDataLoader(TokenShards(DEMO, with_ids=True), 8, model=classifier(), keep=1.0)
    again.load_state_dict(state)
    straight = [batch["id"].tolist() for batch in TokenShards(DEMO, with_ids=True).batches(8)]
    assert [batch["id"].tolist() for batch in again] == straight[3:]


def test_shards_without_a_timeout_warn_after_a_while(monkeypatch):
    def told() -> str:
        text = stacks()
        Stuck.free.set()
        return text

    stacks = ahead.stacks
    monkeypatch.setattr(ahead, "PATIENCE", 0.5)
    monkeypatch.setattr(ahead, "stacks", told)
    Stuck.free.clear()
    with pytest.warns(UserWarning, match=r"(?s)nothing came.*read_batches") as caught:
        total = sum(
            len(batch["labels"])
            for batch in SiftingDataLoader(Stuck(DEMO), 8, model=classifier(), keep=1.0)
        )
    assert total == len(TokenShards(DEMO))
    assert len(caught) == 1


def test_other_data_keeps_torchs_rule_of_timeouts():
    with pytest.raises(AssertionError):
        iter(DataLoader(Rows(), 8, timeout=3))
    with pytest.raises(AssertionError):
        iter(SiftingDataLoader(Rows(), 8, model=classifier(), score_fn=planted, timeout=3))


# Loops that fail


@pytest.mark.parametrize("mode", slowly(SIFTS, {"plain"}))
@pytest.mark.parametrize("source", ["shards", "workers"])
def test_a_loop_that_fails_leaves_no_thread_process_or_hook(source, mode):
    """Once its traceback is gone; until then the frame of the loop holds the iterator."""
    model = classifier()
    options = SIFTS[mode] | ({"score_fn": lambda early, batch: batch["labels"][:, 0].float()})
    if source == "shards":
        loader = SiftingDataLoader(TokenShards(DEMO), 8, model=model, **options)
    else:
        loader = SiftingDataLoader(
            Rows(), 8, num_workers=2, model=model, **options | {"score_fn": planted}
        )
    threads = set(threading.enumerate())

    def train():
        for number, _ in enumerate(loader):
            if number == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        train()
    del raised
    gc.collect()
    assert until(lambda: threads >= {*threading.enumerate()})  # each ends with what it is at
    assert not multiprocessing.active_children()
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    count = sum(1 for _ in loader)
    assert count == len(loader)


# Ctrl-C

SCRIPT = """
import json, sys, time, warnings
import torch
from siftloader import SiftingDataLoader, TokenShards
from torch.utils.data import DataLoader, Dataset

warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="256 batches were sifted by a model that the loop neither")
torch.set_num_threads(1)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Rows(Dataset):
    def __len__(self):
        return 400

    def __getitem__(self, index):
        return {"x": torch.full((8,), float(index)), "labels": torch.tensor(index % 10), "id": torch.tensor(index)}


def make(source, scoring=0.0):
    def score(early, batch):
        time.sleep(scoring)
        return (batch["id"] % 7).float()

    torch.manual_seed(0)
    model = Model()
    how = {"exit_layer": 1, "warmup_steps": 2, "score_fn": score}
    if source == "shards":
        return SiftingDataLoader(TokenShards("shards/demo", with_ids=True), 4, model=model, **how)
    return SiftingDataLoader(Rows(), 4, shuffle=True, num_workers=2, model=model, **how)


if __name__ == "__main__":
    source, scoring, out = sys.argv[1:]
    loader, seen = make(source, float(scoring)), []
    try:
        for step, batch in enumerate(loader):
            seen.append(batch["id"].tolist())
            if step == 5:
                print("now", flush=True)
            time.sleep(0.01 if step < 15 else 1)  # it must not be over before the signal comes
    finally:
        with open(out, "w") as file:
            json.dump({"seen": seen, "state": loader.state_dict()}, file)
"""


@pytest.mark.parametrize(
    ("source", "scoring", "group"),
    [
        pytest.param("shards", 0.1, False, marks=pytest.mark.slow),
        pytest.param("shards", 0.0, False, marks=pytest.mark.slow),
        ("workers", 0.0, True),  # as a terminal does: the workers get it, too
        pytest.param("workers", 0.0, False, marks=pytest.mark.slow),
        pytest.param("workers", 0.1, False, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_ends_training_at_once_with_a_state_that_resumes(source, scoring, group, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "state.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-X", "dev", str(script), source, str(scoring), str(out)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
    ) as run:
        assert run.stdout.readline() == "now\n", run.stderr.read()
        workers = psutil.Process(run.pid).children(recursive=True)
        assert len(workers) == (2 if source == "workers" else 0)
        begin = time.monotonic()
        (os.killpg if group else os.kill)(run.pid, signal.SIGINT)
        _, errors = run.communicate(timeout=100)
        assert time.monotonic() - begin < SOON
    assert run.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "Exception ignored" not in errors
    assert until(lambda: not any(each.is_running() for each in workers))

    saved = json.loads(out.read_text())
    make = runpy.run_path(str(script))["make"]
    straight = [batch["id"].tolist() for batch in make(source)]
    done = len(saved["seen"])
    assert 5 < done < len(straight)
    resumed = make(source)
    resumed.load_state_dict(saved["state"])
    assert saved["seen"] + [batch["id"].tolist() for batch in resumed] == straight


@pytest.mark.usefixtures("hasty")
def test_ctrl_c_between_two_batches_of_workers_leaves_none(switch):
    loader = sifting(LOADERS["persistent"](Failing("hang", switch, at=40)))

    def interrupt():
        until((switch.parent / "now").exists)
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        list(loader)
    assert not multiprocessing.active_children()
    thread.join()
    assert_it_works_again(loader, switch)


# Ways to start workers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "persistent"),
    [("fork", False), ("fork", True), ("spawn", False), ("spawn", True), ("forkserver", False)],
)
@pytest.mark.parametrize("kind", ["SIGKILL", "ValueError"])
def test_failures_are_told_however_workers_start(kind, start, persistent, switch):
    inner = DataLoader(
        Failing(kind, switch),
        8,
        num_workers=2,
        persistent_workers=persistent,
        multiprocessing_context=start,
    )
    # Two in one process: the other one is not harmed.
    other = iter(sifting(DataLoader(Rows(100), 8, num_workers=1)))
    rows = ids(next(other))
    with pytest.raises({"SIGKILL": WorkerDied, "ValueError": ValueError}[kind]):
        list(sifting(inner))
    assert len(multiprocessing.active_children()) == (
        1 + 2 * (persistent and kind == "ValueError")
    )
    switch.unlink()
    assert sorted(row for batch in sifting(inner) for row in ids(batch)) == list(range(100))
    rows += [row for batch in other for row in ids(batch)]
    assert rows == list(range(100))


# Limits


def test_many_shards_need_few_descriptors(tmp_path):
    """Those of the window are open at once, not those of the epoch: 120 shards, 64 descriptors."""
    rows, source = np.arange(8 * 120).reshape(-1, 1, 8) % 50, np.zeros(1, np.uint8)
    layout, folder = Layout.for_vocabulary(8, 50), tmp_path / "many"
    folder.mkdir()
    written = [
        write_shard(folder, f"train-{i:06d}", row, source, layout) for i, row in enumerate(rows)
    ]
    write_dataset(
        folder,
        written,
        layout=layout,
        objective="clm",
        tokenizer=Tokenizer("tiny", "0" * 64, 50, {"eos": 1}),
        sources=[Source("tiny", "0" * 64, 1)],
        unigrams=np.bincount(rows.reshape(-1), minlength=50),
        seed=0,
    )
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len([*Path("/proc/self/fd").iterdir()])
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(64, held + 12), limits[1]))
    try:
        shards = TokenShards(folder, with_ids=True, with_source=True)
        seen = sorted(row for batch in shards.batches(7) for row in batch["id"].tolist())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert seen == list(range(120))


SMALL = """
import sys, warnings
warnings.simplefilter("error")
import torch
from siftloader import SiftingDataLoader
from torch.utils.data import DataLoader

data = [torch.zeros(1 << 19) for _ in range(16)]
inner = DataLoader(data, 4, num_workers=2, timeout=50)
try:
    list(SiftingDataLoader.wrap(inner, model=torch.nn.Linear(2, 2), keep=1.0, exit_layer="full"))
except RuntimeError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="mounts a small /dev/shm: needs root",
)
def test_too_little_shared_memory_says_what_to_do(tmp_path):
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    mount = 'mount -t tmpfs -o size=2m tmpfs /dev/shm || exit 77; exec "$@"'
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
    )
    if run.returncode in (1, 77) and "not permitted" in run.stderr:
        pytest.skip("may not mount here")
    assert run.returncode == 0, run.stderr
    assert "of 2 MiB free" in run.stdout and "--shm-size" in run.stdout, run.stdout
