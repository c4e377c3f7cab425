"""A healthy run of a loader is untouched by who watches it: pytest tests/test_watched.py

What happens to workers, data and signals in whole runs: test_failures.py.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from torch.utils.data import DataLoader

from siftloader import watched
from siftloader.errors import WorkerDied
from siftloader.watched import Watched


FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


def watching(loader) -> Watched:
    return Watched(loader, lambda: iter(loader))


def rows(count: int = 40) -> DataLoader:
    return DataLoader(range(count), 4, num_workers=1)


def until(happened, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)
    return happened()


@pytest.fixture(autouse=True)
def _torch_has_set_its_handler():
    if multiprocessing.active_children():  # of other tests, in garbage
        gc.collect()
        assert until(lambda: not multiprocessing.active_children())
    list(rows(4))
    before = signal.getsignal(signal.SIGCHLD)
    yield
    assert signal.getsignal(signal.SIGCHLD) is before
    assert not multiprocessing.active_children()


def helper_that_fails() -> int:
    """A process of the user's own, which ends with exit code 3."""
    helper = FORK.Process(target=os._exit, args=(3,))
    helper.start()
    os.waitid(os.P_PID, helper.pid, os.WEXITED | os.WNOWAIT)
    return helper.pid


class WithHelper:
    """Starts a process of its own with the first item, which fails at the fifth."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index):
        if index == 0:
            self.end = FORK.Event()
            self.helper = FORK.Process(target=lambda: (self.end.wait(), os._exit(3)))
            self.helper.start()
        if index == 4:
            self.end.set()
            os.waitid(os.P_PID, self.helper.pid, os.WEXITED | os.WNOWAIT)
        if index == 8 and self.error is not None:
            raise self.error
        return torch.tensor(index)


class Iterable:
    def __init__(self, data: WithHelper) -> None:
        self.data = data

    def __iter__(self):
        for first in range(0, 12, 4):
            yield torch.stack([self.data[index] for index in range(first, first + 4)])


SHAPES = {
    "a loader without workers": lambda data: DataLoader(data, 4),
    "an iterable of its own": Iterable,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_process_of_the_data_set_is_no_worker(shape):
    found = torch.cat(list(watching(SHAPES[shape](WithHelper()))))
    assert found.tolist() == list(range(12))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_error_is_itself_though_some_other_process_failed(shape):
    with pytest.raises(ValueError, match="row 8"):
        list(watching(SHAPES[shape](WithHelper(ValueError("row 8")))))


class Strange:
    """As another library, or another torch, may name things."""

    num_workers = 1
    persistent_workers = True

    def __init__(self) -> None:
        self._workers = [threading.current_thread()]

    @property
    def _iterator(self):
        raise NotImplementedError

    def __iter__(self):
        yield from self._steps()

    def _steps(self):
        yield 1
        raise LookupError("two")


def test_private_names_that_mean_something_else_are_left_alone():
    source = watching(Strange())
    assert next(source) == 1
    with pytest.raises(LookupError, match="two"):
        next(source)


def test_a_torch_that_names_nothing_still_tells_of_a_death(monkeypatch):
    monkeypatch.setattr(watched, "_attribute", lambda holder, name: None)
    source = watching(rows(10**4))
    next(source)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(WorkerDied, match=f"pid {worker.pid}"):
        list(source)
    del source


def test_a_death_while_a_socket_is_opened_is_told_as_soon_as_it_is_open(monkeypatch):
    """Torch tells once; left to itself it would look again when its timeout is over."""
    looks = iter([True, True])
    monkeypatch.setattr(watched, "_opens", lambda frame: next(looks, False))
    data = DataLoader([torch.zeros(1)] * 8, 4, num_workers=1, collate_fn=long_pause, timeout=60)
    source = watching(data)
    (worker,) = multiprocessing.active_children()
    killer = threading.Thread(target=lambda: until(lambda: source._waits) and worker.kill())
    killer.start()
    begin = time.monotonic()
    with pytest.raises(WorkerDied, match=f"pid {worker.pid}"):
        next(source)
    assert time.monotonic() - begin < 30
    assert next(looks, None) is None
    killer.join()


def long_pause(rows):
    time.sleep(60)


def test_loaders_that_begin_and_end_in_any_order_leave_the_handler_as_it_was():
    before = signal.getsignal(signal.SIGCHLD)
    first, second, third = (watching(rows(400)) for _ in range(3))
    next(first), next(second)
    first.close()
    next(third)  # in front of one that is over
    second.close()
    assert signal.getsignal(signal.SIGCHLD).before is before
    third.close()
    assert signal.getsignal(signal.SIGCHLD) is before
    one = watching(rows(400))
    next(one)
    for _ in range(3):  # never is nobody watching
        other = watching(rows(400))
        next(other)
        one.close()
        one = other
    assert signal.getsignal(signal.SIGCHLD).before is before
    one.close()


def test_one_loader_inside_another_in_one_loop():
    before = signal.getsignal(signal.SIGCHLD)
    seen = 0
    train = watching(rows(8))
    for _ in train:
        held = watching(rows(8))
        seen += len(list(held))
        held.close()
    train.close()
    assert seen == 4
    assert signal.getsignal(signal.SIGCHLD) is before


def test_a_loader_that_nobody_closed_lets_everything_pass():
    before = signal.getsignal(signal.SIGCHLD)
    source = watching(rows(400))
    next(source)
    del source
    other = watching(rows(4))
    list(other)
    other.close()
    assert signal.getsignal(signal.SIGCHLD) is before


def test_handlers_of_the_user_are_called_and_kept():
    called = []
    torchs = signal.getsignal(signal.SIGCHLD)

    def users(number, frame):
        called.append(number)
        torchs(number, frame)

    source = watching(rows(400))
    signal.signal(signal.SIGCHLD, users)
    try:
        next(source)
        helper_that_fails()
        assert until(lambda: called)
        source.close()
        assert signal.getsignal(signal.SIGCHLD) is users
        # Put in front of ours, while we watch.
        source = watching(rows(400))
        next(source)
        ours = signal.getsignal(signal.SIGCHLD)
        signal.signal(signal.SIGCHLD, lambda number, frame: ours(number, frame))
        outermost = signal.getsignal(signal.SIGCHLD)
        source.close()
        assert signal.getsignal(signal.SIGCHLD) is outermost
        called.clear()
        helper_that_fails()
        assert until(lambda: called)
        multiprocessing.active_children()  # reaps
    finally:
        signal.signal(signal.SIGCHLD, torchs)


def test_outside_the_main_thread_no_handler_is_set():
    # In a process of its own: a worker forked from a thread, beside what other tests left running, may die of that.
    script = """
import signal, threading
from torch.utils.data import DataLoader
from siftloader.watched import Watched

loader = DataLoader(range(8), 4, num_workers=1)
list(loader)  # torch has set its own
before, seen = signal.getsignal(signal.SIGCHLD), []

def read():
    source = Watched(loader, lambda: iter(loader))
    seen.append(next(source))
    seen.append(signal.getsignal(signal.SIGCHLD))
    list(source)
    source.close()

thread = threading.Thread(target=read)
thread.start()
thread.join()
assert seen[1] is before
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert not done.returncode, done.stderr[-2000:]


def finalized() -> list[object]:
    """What has finalizers, once for each."""
    peeks = [each.peek() for each in [*weakref.finalize._registry]]
    return [peek[0] for peek in peeks if peek is not None]


def test_epochs_of_persistent_workers_pile_nothing_up():
    loader = DataLoader(range(8), 4, num_workers=1, persistent_workers=True)
    ends = []
    for _ in range(3):
        source = watching(loader)
        assert len(list(source)) == 2
        source.close()
        ends.append(sum(each is loader for each in finalized()))
    assert ends == [1] * 3
    del loader, source
    gc.collect()


def test_watching_takes_microseconds_a_batch():
    """Eight workers that stand ready, and items that cost nothing."""
    workers = [FORK.Process(target=time.sleep, args=(60,)) for _ in range(8)]

    class Ready:
        num_workers, _workers = 8, workers

        def __iter__(self):
            return self

        def __next__(self):
            return 1

    for worker in workers:
        worker.start()
    source = watching(Ready())
    try:
        took = []
        for _ in range(20):
            begin = time.perf_counter()
            for _ in range(100):
                next(source)
            took.append((time.perf_counter() - begin) / 100)
        assert min(took) < 1e-4, f"{min(took) * 1e6:.1f} us"
    finally:
        source.close()
        for worker in workers:
            worker.kill()
            worker.join()
