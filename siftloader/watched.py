"""The batches of a loader, with one error for all that befalls the processes behind it.

    for batch in Watched(loader, lambda: iter(loader)): ...

A worker that ended is ``WorkerDied``; one that hangs is ``Stalled``, with what each of them did.

What is private to torch is looked at (the workers of an iterator, the iterator that persistent workers belong
to, how to shut one down) and never relied on: where it is not as expected, errors are torch's own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar, final

from siftloader.ahead import stacks
from siftloader.errors import ShardError, Stalled, WorkerDied


Item = TypeVar("Item")
LINGER = 2.0  # seconds that workers have to end, before they are made to
SHARED = Path("/dev/shm")  # where batches of workers lie on their way


@final
class Watched(Generic[Item]):
    """The iterator of a loader, with one error for all that befalls the processes behind it.

    for batch in Watched(loader, lambda: iter(loader)): ...

    Torch raises a RuntimeError, an EOFError or one of several OSErrors when a worker was killed, and
    the first of them wherever the main thread happens to be, in the middle of an optimizer's step, say.
    Here it is ``WorkerDied``, when the next item is asked for; what took longer than the loader's ``timeout`` is
    ``Stalled``. An exception of the data set is itself, with the traceback of the worker; a ShardError knows its
    place again. After any of them no worker is left but persistent ones that are whole.

    ``begin`` makes the iterator, now. A loader without workers is asked for items, and nothing else.
    """

    def __init__(self, loader: Any, begin: Callable[[], Iterator[Item]]) -> None:
        self._loader, self._process = loader, os.getpid()
        self._alone = _attribute(loader, "num_workers") == 0
        self._workers: list[BaseProcess] = []
        self._holder: Any = None  # torch's iterator that has the workers, ours to end
        self._begun = self._waits = False
        self._guessed = False  # whether somebody else may have started what we take for workers
        self._heard = False  # whether torch said that a worker died
        self._owed: RuntimeError | None = None  # what it said of that, to be raised a little later
        self._listener: _Listener | None = None
        self._others = set() if self._alone else {*active_children()}
        # Persistent workers stand ready before the iteration begins, or lie dead.
        lasting = _attribute(loader, "persistent_workers") is True
        self._lasts = False  # whether workers outlive this iteration
        self._source: Any = _attribute(loader, "_iterator") if lasting else None
        self._find()
        self._source = self._ask(begin)
        self._lasts = lasting and _attribute(loader, "_iterator") is self._source
        self._unlisten()  # whoever never asks for an item never closes this either
        self._find()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item: Item = self._ask(self._source.__next__)
        if not self._begun:
            self._begun = True
            self._find()  # a generator around a loader starts the workers only now
        return item

    def close(self) -> None:
        """Let go of the iterator, and with it of workers that are not persistent."""
        self._unlisten()
        self._workers, self._source, self._holder, self._owed = [], iter(()), None, None

    def _find(self, error: BaseException | None = None) -> None:
        if self._alone:
            return
        holders = [self._source]
        if error is not None and self._holder is None:
            # Of a generator around a loader: what it was asking is in the traceback.
            frames = traceback.walk_tb(error.__traceback__)
            holders += [frame.f_locals.get("self") for frame, _ in frames]
        for holder in holders:
            if holder is not self and (workers := _workers_of(holder)):
                break
        else:
            if not self._workers:
                self._workers = [each for each in active_children() if each not in self._others]
                self._guessed = True
            return
        if holder is self._source and workers != self._workers and self._lasts:
            # Collected in a cycle, its queues close first: torch would wait five seconds for each worker.
            weakref.finalize(self._loader, _terminate, os.getpid(), workers).atexit = False
        self._workers, self._holder, self._guessed = workers, holder, False

    def _ask(self, make: Callable[[], Any]) -> Any:
        if self._alone:
            return make()
        if (self._heard or not self._guessed) and (dead := self._dead()):
            text = self._death(dead, "")
            self._end()
            raise WorkerDied(text)
        self._listen()
        self._waits = True
        try:
            return make()
        except StopIteration:
            self._unlisten()
            raise
        except BaseException as error:
            self._waits = False
            self._find(error)
            self._listen()
            told = self._told(error)
            if not (self._lasts and _is_of_the_data(told)):
                self._end()
            if told is error:
                raise
            # What torch left in its frames would go to the new workers: files, queues, an iterator to shut down.
            traceback.clear_frames(error.__traceback__)
            try:
                raise told from error
            finally:
                del told  # or it would hold itself, through this frame
        finally:
            self._waits = False

    def _told(self, error: BaseException) -> BaseException:
        if not isinstance(error, Exception):
            return error
        text = str(error)
        if _is_of_the_data(error):
            if isinstance(error, ShardError) and error.shard is None:
                error.shard, error.sample, error.byte = _place(text)
            if type(error) is RuntimeError and "shared memory" in text:
                return RuntimeError(f"a loader worker found no shared memory: {_room()}\n{text}")
            return error
        if text.startswith("DataLoader timed out"):
            return Stalled(self._complaint(text))
        named = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text)
        if not named and self._guessed and not _is_of_a_pipe(error):
            return error
        if not named and _is_of_a_pipe(error):
            # Its end of the pipe closes some time before the process counts as ended.
            until = time.monotonic() + LINGER
            while self._workers and not self._ended() and time.monotonic() < until:
                time.sleep(0.01)
            if not self._dead() and (
                ended := self._ended()
            ):  # with exit code 0, in the middle of a batch
                return WorkerDied(self._death(ended, text))
        pids = named[1].split(", ") if named else []
        dead = self._dead() or [worker for worker in self._workers if str(worker.pid) in pids]
        return WorkerDied(self._death(dead, text)) if dead or named else error

    def _dead(self) -> list[BaseProcess]:
        if os.getpid() != self._process:
            return []
        return [worker for worker in self._workers if worker.exitcode]

    def _ended(self) -> list[BaseProcess]:
        if os.getpid() != self._process:
            return []
        return [worker for worker in self._workers if worker.exitcode is not None]

    def _death(self, dead: list[BaseProcess], text: str) -> str:
        if not dead:
            return f"{text.rstrip('. ')}; {_AFRESH}"
        # The first to die: others may have been ended for it.
        first = min(dead, key=lambda worker: worker.exitcode == -signal.SIGTERM)
        number, code = self._workers.index(first), first.exitcode or 0
        who = f"loader worker {number} of {len(self._workers)} (pid {first.pid})"
        if code >= 0:
            how = f"ended itself with exit code {code}: os._exit or sys.exit in the data set?"
        else:
            name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
            how = f"was killed by {name}{_MEANING.get(name, '')}"
            how += f": {_room()}" if name == "SIGBUS" else ""
        return f"{who} {how}{'' if 'SIGBUS' in how else _little_room()}; {_AFRESH}"

    def _complaint(self, text: str) -> str:
        states = "\n".join(
            f"  worker {number} (pid {worker.pid}): {_state(worker)}"
            for number, worker in enumerate(self._workers)
        )
        return (
            f"{text}: no worker finished a batch. They were:\n{states}\n"
            f"A worker that waits hangs in its data set, or for its storage: py-spy dump --pid PID shows "
            f"where. One that runs is only slow: give a longer timeout=, or more workers{_little_room()}; "
            f"{_AFRESH}\n\nThis process:\n{stacks()}"
        )

    def _listen(self) -> None:
        # Torch raises out of a SIGCHLD handler. While we wait that is prompt, and told above; anywhere else it
        # would tear up the loop, and can wait until the next item.
        if self._listener is not None or os.name != "posix":
            return
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGCHLD)
        if callable(before):
            self._listener = _Listener(_in_force(before), self)
            signal.signal(signal.SIGCHLD, self._listener)

    def _unlisten(self) -> None:
        if self._listener is None:
            return
        self._listener.watched, self._listener = _nobody, None
        if threading.current_thread() is threading.main_thread():
            now = signal.getsignal(signal.SIGCHLD)
            if isinstance(now, _Listener):
                signal.signal(signal.SIGCHLD, _in_force(now))

    def _due(self, error: RuntimeError | None, frame: Any) -> RuntimeError | None:
        # What to raise at this frame, of what torch says now or said before.
        error, self._owed = error or self._owed, None
        if error is None:
            return None
        if not self._waits:
            ours = bool(self._dead())
            self._heard |= ours
            return None if ours else error
        if not _opens(frame):
            return error
        # Torch says it once, and itself looks again in five seconds: the signal will come again.
        self._owed = error
        again = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGCHLD))
        again.daemon = True
        again.start()
        return None

    def _end(self) -> None:
        # The iterator itself may live on for long, in the traceback of what ended it.
        if self._source is not None and _attribute(self._loader, "_iterator") is self._source:
            self._loader._iterator = None  # it would be asked to begin again
        if self._holder is not None and os.getpid() == self._process:
            # In a thread, for it waits long for a worker that hangs.
            ending = threading.Thread(target=_shut_down, args=(self._holder,), daemon=True)
            ending.start()
            ending.join(LINGER)
            for end in ("terminate", "kill"):
                left = [worker for worker in self._workers if worker.is_alive()]
                until = time.monotonic() + LINGER
                for worker in left:
                    getattr(worker, end)()
                for worker in left:
                    worker.join(max(0.0, until - time.monotonic()))
            ending.join(LINGER)
        self.close()


class _Listener:
    # In front of the SIGCHLD handler that was there, as long as somebody watches. Loaders begin and end in any
    # order, and whoever put a handler before ours calls it for ever: one that is over passes everything on.

    def __init__(self, before: Callable[[int, Any], Any], watched: Watched[Any]) -> None:
        self.before = before
        self.watched: Callable[[], Watched[Any] | None] = weakref.ref(watched)

    def __call__(self, number: int, frame: Any) -> None:
        error = None
        try:
            self.before(number, frame)
        except RuntimeError as raised:
            error = raised
        try:
            if (watched := self.watched()) is not None:
                error = watched._due(error, frame)
            if error is not None:
                raise error
        finally:
            del error  # or it would hold itself, through this frame


def _nobody() -> None:
    return None


def _in_force(handler: Any) -> Any:
    # Without the listeners that are over, wherever they stand in the chain.
    while isinstance(handler, _Listener) and handler.watched() is None:
        handler = handler.before
    if isinstance(handler, _Listener):
        handler.before = _in_force(handler.before)
    return handler


def _attribute(holder: Any, name: str) -> Any:
    # Of whatever it is: that of another version may be missing, or raise.
    try:
        return getattr(holder, name, None)
    except Exception:
        return None


def _workers_of(holder: Any) -> list[BaseProcess]:
    workers = _attribute(holder, "_workers")
    whole = isinstance(workers, list) and all(isinstance(each, BaseProcess) for each in workers)
    return list(workers) if whole else []


# What the system tells with a signal, as far as it is known.
_MEANING = {
    "SIGKILL": (
        ", by the system when memory runs out, or by somebody: see dmesg and the memory limit of the "
        "container or job; fewer workers, a smaller prefetch_factor or a data set that shares its memory help"
    ),
    "SIGSEGV": ", a crash in compiled code: num_workers=0 and python -X faulthandler show where",
    "SIGABRT": ", a crash in compiled code: num_workers=0 and python -X faulthandler show where",
}
_AFRESH = "a new iter() starts new workers, after load_state_dict() from where the state was taken"
_STATES = {"R": "running", "S": "waiting", "D": "waiting for a disk", "T": "stopped", "Z": "ended"}


def _shut_down(iterator: Any) -> None:
    with suppress(Exception):  # it is about to be dropped, whatever state it is in
        iterator._shutdown_workers()


def _terminate(process: int, workers: list[BaseProcess]) -> None:
    if os.getpid() == process:
        for worker in workers:
            worker.terminate()


def _is_of_the_data(error: BaseException) -> bool:
    first = str(error).partition("\n")[0]
    return first.startswith("Caught ") and "in DataLoader worker process" in first


def _opens(frame: Any) -> bool:
    # In the middle of opening files or sockets, which would stay open. None of it waits for long.
    opening = ("tempfile", "contextlib", "multiprocessing.resource_sharer")
    while frame is not None and frame.f_globals.get("__name__") != __name__:
        if frame.f_globals.get("__name__") in opening:
            return True
        frame = frame.f_back
    return False


def _is_of_a_pipe(error: BaseException) -> bool:
    # Raised between the processes, whatever its type: EOFError, ConnectionResetError, FileNotFoundError, ...
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return "multiprocessing" in Path(frame.f_code.co_filename).parts


def _place(text: str) -> tuple[str | None, int | None, int | None]:
    # Of a ShardError that came out of a worker as nothing but text.
    last = text.rstrip().rpartition("\nsiftloader.errors.")[2]
    shard = re.match(r"\w+: (\S+?)(?:\.tar)?: ", last)
    sample, byte = re.search(r"sample (\d+)", last), re.search(r"bytes? (\d+)", last)
    return (
        Path(shard[1]).name if shard else None,
        int(sample[1]) if sample else None,
        int(byte[1]) if byte else None,
    )


def _room() -> str:
    try:
        usage = shutil.disk_usage(SHARED)
    except OSError:
        return f"there is no {SHARED}; give the container one (docker run --shm-size=8g)"
    return (
        f"{SHARED}, through which batches travel, has {usage.free >> 20} of {usage.total >> 20} MiB free; "
        f"give it more (docker run --shm-size=8g, or --ipc=host), or use fewer workers, a smaller "
        f"prefetch_factor or smaller batches"
    )


def _little_room() -> str:
    try:
        usage = shutil.disk_usage(SHARED)
    except OSError:
        return ""
    return f". {_room()}" if usage.total < 1 << 30 or usage.free < usage.total / 10 else ""


def _state(worker: BaseProcess) -> str:
    try:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "alive" if worker.is_alive() else f"ended with exit code {worker.exitcode}"
    used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return f"{_STATES.get(fields[0], fields[0])}, {used:.1f} s of processor time so far"
