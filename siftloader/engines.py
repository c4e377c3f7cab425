"""Where the work is done: one function over many tasks, the results in the order of the tasks.

results = run_here(function, job, tasks)                    # in this process
results = run_processes(function, job, tasks, workers=8)    # in eight on this machine
results = run_ray(function, job, tasks)                     # on the cluster

``function(job, task)`` must be the same wherever it runs: a function of a module, of its arguments alone.
All three give the same results, and raise what the first task to fail raised, after the results before it.
``tasks`` is drawn as workers come free, at most ``ahead * workers`` tasks beyond the last result that was
taken. Close the results (``contextlib.closing``) to stop early: no worker outlives them.

The processes are new interpreters with a pipe each, not a ``ProcessPoolExecutor``: there is no lock that
a killed worker could take along (on Python 3.10 that pool never ends once one dies with tasks of megabytes
on their way), and the script of the caller is not run again, so it needs no ``__main__`` guard and may as
well be a notebook or come from standard input.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import sysconfig
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, TypeVar

from siftloader.errors import CorpusError


J = TypeVar("J")
T = TypeVar("T")
R = TypeVar("R")

# As many workers as cores: each counts on one core only. Read when libraries are imported.
ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
# What a worker is told to run; nothing is imported before it has the import path of the caller.
_START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from siftloader.engines import _work; _work(int(sys.argv[1]))"
)
_HELLO = _STOP = b""  # no pickle is empty
_QUEUED = (
    2  # tasks of a worker: the one at work, and one that waits so that the next starts at once
)
_PATIENCE = 5.0  # seconds between asking a worker to end and making it


def run_here(
    function: Callable[[J, T], R], job: J, tasks: Iterable[T]
) -> Generator[R, None, None]:
    """Yield ``function(job, task)`` of every task, each when it is asked for."""
    for task in tasks:
        yield function(job, task)


def run_processes(
    function: Callable[[J, T], R], job: J, tasks: Iterable[T], workers: int, ahead: int = 2
) -> Generator[R, None, None]:
    """Yield ``function(job, task)`` of every task in order, worked out by ``workers`` processes.

    ``job`` is sent to each of them once. A worker that dies is a CorpusError.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if os.name == "nt":
        raise CorpusError("worker processes need a POSIX system; use one worker, or WSL")
    _check(function, ahead)
    return _in_processes(function, job, tasks, workers, ahead)


def run_ray(
    function: Callable[[J, T], R],
    job: J,
    tasks: Iterable[T],
    workers: int | None = None,
    ahead: int = 2,
) -> Generator[R, None, None]:
    """Yield ``function(job, task)`` of every task in order, worked out by a Ray cluster, a core each.

    The cluster is the one this process is connected to, RAY_ADDRESS names, or `ray start` began on this
    machine; else one is started here, and stopped at the end. ``workers`` (None: as many as there are cores)
    bounds the look-ahead: with ``ahead`` 1, no more tasks run at a time. Tasks of a machine that is lost are
    done again on another.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    _check(function, ahead)
    return _on_ray(function, job, tasks, workers, ahead)


def _check(function: Callable[..., Any], ahead: int) -> None:
    if ahead < 1:
        raise ValueError(f"ahead must be at least 1, got {ahead}")
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError(
            f"{function.__qualname__} is defined in the main script, which workers do not run; move it "
            f"to a module that they can import"
        )


# ---- what travels back


@dataclass(frozen=True)
class _Result:
    value: Any


@dataclass(frozen=True)
class _Failure:
    error: BaseException
    told: str  # the traceback, which does not travel with the error

    def raised(self) -> BaseException:
        self.error.__cause__ = WorkerTraceback(f"\n{self.told}") if self.told else None
        return self.error


class WorkerTraceback(Exception):
    """Where in a worker an error was raised, as text."""


def _failure(error: BaseException) -> _Failure:
    told = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if type(copy) is not type(error):
        return _Failure(RuntimeError(f"{type(error).__qualname__}: {error}"), told)
    return _Failure(error, told)


def _answer(function: Callable[..., Any], *arguments: Any) -> bytes:
    try:
        return pickle.dumps(_Result(function(*arguments)))
    except BaseException as error:  # of the function, or a result that cannot travel
        return pickle.dumps(_failure(error))


# ---- the side of the worker


def _work(handle: int) -> None:
    # Ctrl-C is for the caller alone, which started this with the signal held back.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    connection: Connection[Any, Any] = Connection(handle)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    _send(connection, _HELLO)
    call: tuple[Callable[[Any, Any], Any], Any] | None = None

    def step(message: bytes) -> Any:
        nonlocal call
        if call is None:
            call = pickle.loads(message)
            return None
        function, job = call
        return function(job, pickle.loads(message))

    while message := inbox.get():
        _send(connection, _answer(step, message))


def _send(connection: Connection[Any, Any], message: bytes) -> None:
    try:
        connection.send_bytes(message)
    except OSError:  # nobody is left to hear it
        os._exit(1)


def _receive(connection: Connection[Any, Any], inbox: queue.SimpleQueue[bytes]) -> None:
    # A thread of its own, so that the next task is at hand when one is done, and a worker whose caller was
    # killed ends in the middle of a task.
    try:
        while message := connection.recv_bytes():
            inbox.put(message)
        try:
            while True:
                inbox.get_nowait()  # what has not begun will not
        except queue.Empty:
            inbox.put(_STOP)
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


# ---- the side of the caller


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    ready: bool = False  # it runs and has the job
    numbers: deque[int] = field(default_factory=deque)  # of its tasks, in the order of its answers


def _in_processes(
    function: Callable[[J, T], R], job: J, tasks: Iterable[T], workers: int, ahead: int
) -> Generator[R, None, None]:
    call = pickle.dumps((function, job))
    source = iter(tasks)
    pool: list[_Worker] = []
    waiting: deque[tuple[int, bytes]] = deque()  # drawn, and not with a worker yet
    outcomes: dict[int, _Result | _Failure] = {}
    drawn = given = 0
    more = True
    try:
        while True:
            while more and drawn - given < ahead * workers and len(waiting) < workers:
                try:
                    task = next(source)
                except StopIteration:
                    more = False
                except Exception as error:  # takes its turn like the failure of a task
                    outcomes[drawn], drawn, more = _Failure(error, ""), drawn + 1, False
                else:
                    waiting.append((drawn, pickle.dumps(task)))
                    drawn += 1
                    del task
                    if len(pool) < workers:
                        _start(pool)
                _collect(pool, call, outcomes, timeout=0)
                _hand_out(pool, waiting)
            if given in outcomes:
                outcome = outcomes.pop(given)
                if isinstance(outcome, _Failure):
                    _let_finish(pool)
                    raise outcome.raised()
                given += 1
                yield outcome.value
                del outcome
            elif given < drawn:
                _collect(pool, call, outcomes, timeout=None)
                _hand_out(pool, waiting)
            elif not more:
                _let_finish(pool)
                return
    finally:
        _end(pool)


def _start(pool: list[_Worker]) -> None:
    # Held back here, and by inheritance there, until each side can deal with an interrupt: the worker
    # ignores it, and the caller has the worker among those that it ends. The pipe too: an interrupt in the
    # middle of making one is written to standard error by the socket that is thrown away.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        pool.append(_started(number=len(pool) + 1))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _started(number: int) -> _Worker:
    ours, theirs = Pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), *map(str, sys.path)],
            env={**os.environ, **ONE_THREAD},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    except OSError as error:
        ours.close()
        raise CorpusError(
            f"worker process {number} could not be started ({error}); use fewer workers"
        ) from error
    finally:
        theirs.close()
    return _Worker(process, ours)


def _collect(
    pool: list[_Worker],
    call: bytes,
    outcomes: dict[int, _Result | _Failure],
    timeout: float | None,
) -> None:
    of: dict[Any, _Worker] = {worker.connection: worker for worker in pool}
    for connection in wait(list(of), timeout):
        worker = of[connection]
        try:
            message = worker.connection.recv_bytes()
            if message == _HELLO:
                worker.connection.send_bytes(call)
                worker.numbers.append(-1)
                continue
        except (EOFError, OSError) as error:
            raise CorpusError(_epitaph(worker)) from error
        outcome = pickle.loads(message)
        number = worker.numbers.popleft()
        if number >= 0:
            outcomes[number] = outcome
        elif isinstance(outcome, _Failure):  # of the job itself
            raise outcome.raised()
        else:
            worker.ready = True


def _hand_out(pool: list[_Worker], waiting: deque[tuple[int, bytes]]) -> None:
    ready = [worker for worker in pool if worker.ready]
    starting = len(ready) < len(pool)
    while waiting and ready:
        worker = min(ready, key=lambda worker: len(worker.numbers))
        if len(worker.numbers) >= (1 if starting else _QUEUED):
            return
        number, message = waiting.popleft()
        try:
            worker.connection.send_bytes(message)
        except OSError as error:
            raise CorpusError(_epitaph(worker)) from error
        worker.numbers.append(number)


def _epitaph(worker: _Worker) -> str:
    try:
        code = worker.process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        return f"worker process {worker.process.pid} closed its pipe; run the same again"
    if code == -signal.SIGKILL:
        return (
            f"worker process {worker.process.pid} was killed (SIGKILL), most likely because the machine "
            f"ran out of memory; run the same again, with fewer workers or less memory for each"
        )
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    when = "in the middle of its work" if worker.ready else "before it could begin"
    return (
        f"worker process {worker.process.pid} ended {when} ({how}); what it said is on standard error. "
        f"Run the same again, with fewer workers if memory is short"
    )


def _let_finish(pool: list[_Worker]) -> None:
    # What is at work is worth having; what waits behind it is not begun.
    for worker in pool:
        try:
            worker.connection.send_bytes(_STOP)
        except OSError:
            continue  # it is gone
    for worker in pool:
        try:
            while True:
                worker.connection.recv_bytes()
        except (EOFError, OSError):
            worker.process.wait()


def _end(pool: list[_Worker]) -> None:
    for worker in pool:
        worker.process.terminate()
    for worker in pool:
        try:
            worker.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        worker.connection.close()


# ---- Ray


def _on_ray(
    function: Callable[[J, T], R], job: J, tasks: Iterable[T], workers: int | None, ahead: int
) -> Generator[R, None, None]:
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise CorpusError(
            "a Ray cluster needs the `ray` package; pip install 'siftloader[ray]'"
        ) from error
    connected = _connect(ray)
    pending: deque[Any] = deque()
    failure: _Failure | None = None
    more = True
    try:
        cores = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        call = ray.put((function, job))
        remote = ray.remote(_ray_task).options(
            num_cpus=1, runtime_env={"env_vars": _environment()}
        )
        source = iter(tasks)
        while True:
            while more and len(pending) < ahead * cores:
                try:
                    task = next(source)
                except StopIteration:
                    more = False
                except Exception as error:  # takes its turn like the failure of a task
                    failure, more = _Failure(error, ""), False
                else:
                    pending.append(remote.remote(call, task))
                    del task
            if pending:
                outcome = pickle.loads(_awaited(ray, pending.popleft()))
            elif failure:
                outcome = failure
            else:
                return
            if isinstance(outcome, _Failure):
                raise outcome.raised()
            yield outcome.value
            del outcome
    finally:
        _cancel(ray, pending)
        if connected:
            ray.shutdown()  # disconnects, and stops what _connect started


def _ray_task(call: tuple[Callable[[Any, Any], Any], Any], task: Any) -> bytes:
    function, job = call
    return _answer(function, job, task)


def _connect(ray: Any) -> bool:
    # Whether a connection was made, which is then ours to end.
    if ray.is_initialized():
        return False
    try:
        # Without an address: RAY_ADDRESS, else what `ray start` began here, else one of its own. ("auto"
        # would join whatever private cluster another program runs on this machine.)
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        address = os.environ.get("RAY_ADDRESS")
        where = f"at {address} (RAY_ADDRESS)" if address else "where one left its address"
        raise CorpusError(
            f"no Ray cluster answers {where}: {error}; start it, or clear that address (unset "
            f"RAY_ADDRESS, `ray stop`) for one of this machine alone"
        ) from error
    return True


def _environment() -> dict[str, str]:
    # Of the workers: they import siftloader from where it is here, unless it is installed.
    found = {**ONE_THREAD}
    root = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    if Path(root) not in installed:
        paths.insert(0, root)
    if paths:
        found["PYTHONPATH"] = os.pathsep.join(paths)
    return found


def _awaited(ray: Any, reference: Any) -> bytes:
    try:
        answer: bytes = ray.get(reference)
    except ray.exceptions.RayError as error:  # of the cluster: those of the function are answers
        raise CorpusError(
            f"the Ray cluster lost a task and gave it up ({type(error).__name__}: {error}); run the "
            f"same again, with less memory for each worker if that was short"
        ) from error
    return answer


def _cancel(ray: Any, pending: deque[Any]) -> None:
    for reference in pending:
        ray.cancel(reference)
    if pending:
        ray.wait(list(pending), num_returns=len(pending), timeout=_PATIENCE)
