"""What the workers of test_engines.py run: they import this file, and start quickly for it is small."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from siftloader.errors import CorpusError, CorruptShard


def scaled(job: int, task: int) -> int:
    return job * task


def slow_first(job: float, task: int) -> int:
    time.sleep(job if task == 0 else 0)
    return task


def waited_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def first_waits(job: str, task: int) -> int:
    # Task 0 waits for the file, and a moment more.
    if task == 0:
        waited_for(Path(job))
        time.sleep(0.2)
    return task


def meeting(job: tuple[str, int], task: int) -> int:
    # Every worker waits, in its first task, until so many others are in one too.
    folder, workers = job
    Path(folder, str(os.getpid())).touch()
    end = time.monotonic() + 60
    while len(list(Path(folder).iterdir())) < workers and time.monotonic() < end:
        time.sleep(0.01)
    return os.getpid()


def slow_but_first(job: float, task: int) -> int:
    time.sleep(job if task else 0)
    return task


def sleepy(job: float, task: int) -> int:
    time.sleep(job)
    return os.getpid()


def failing(job: dict[int, float], task: int) -> int:
    # job: the tasks that fail, and after how many seconds.
    if task in job:
        time.sleep(job[task])
        raise CorruptShard(f"task {task}")
    return task


class TwoArguments(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def untransportable(job: object, task: int) -> int:
    raise TwoArguments("this", "that")


def unpicklable(job: object, task: int) -> object:
    return lambda: task


def undecodable(job: object, task: bytes) -> str:
    return task.decode()


def finishing(job: str, task: int) -> int:
    # Task 0 fails as soon as task 1 has begun; the others take a while and leave a file.
    Path(job, f"begun-{task}").touch()
    if task == 0:
        while not Path(job, "begun-1").exists():
            time.sleep(0.01)
        raise CorpusError("task 0")
    time.sleep(1)
    Path(job, f"done-{task}").touch()
    return task


def eavesdropping(job: object, task: int) -> str:
    return sys.stdin.read()


def environment(job: object, task: str) -> tuple[str | None, bool, bool]:
    return (
        os.environ.get(task),
        "numpy" in sys.modules,
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    )


def large(job: bytes, task: bytes) -> bytes:
    return task + job


def dying(job: int, task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), job)
    time.sleep(0.01)
    return task


class CountedJob:
    """Writes a line each time it is unpickled."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.filling = b"x" * 3_000_000

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        with self.log.open("a") as log:
            log.write(f"{os.getpid()}\n")


def length(job: CountedJob, task: int) -> int:
    return len(job.filling) + task
