"""Items made ahead of whoever needs them: by a thread, or by the processes of a loader.

    for batch in prefetched(batches, 4, timeout=30): ...     # made by a thread, at most 4 ahead
    for batch in Watched(loader, lambda: iter(loader)): ...  # made by workers: one error if one is killed

What takes too long is ``Stalled``, with the stacks of all threads; a worker that ended is ``WorkerDied``.
"""

from __future__ import annotations

import atexit
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar, final

from siftloader.errors import ShardError, Stalled, WorkerDied


Item = TypeVar("Item")
PATIENCE = 60.0  # seconds without an item before a warning, where there is no timeout
LINGER = 2.0  # seconds that closing waits for a thread in the middle of an item, or for workers
SHARED = Path("/dev/shm")  # where batches of workers lie on their way


def prefetched(
    items: Iterator[Item], depth: int, *, timeout: float = 0
) -> Generator[Item, None, None]:
    """The same items, made by a thread that stays at most ``depth`` ahead.

    An exception of the maker is raised here, at its place in the order. Closing, or letting go, ends the
    thread; one that hangs in a read is left behind with a warning. After ``timeout`` seconds without an
    item (0: for ever, with one warning after a minute) it raises Stalled. A forked child has no such
    thread: it may let go of this, and gets a RuntimeError if it reads on.
    """
    if not (isinstance(timeout, (int, float)) and 0 <= timeout < threading.TIMEOUT_MAX):
        raise ValueError(f"timeout must be 0 (none) or a number of seconds, got {timeout!r}")
    maker = _Maker(items, depth)
    del items
    # Before the interpreter stops threads wherever they are, in the middle of a copy of torch's too.
    atexit.register(maker.end)
    try:
        maker.start()
        while (made := maker.take(timeout)) is not _END:
            yield made.pop()
    finally:
        atexit.unregister(maker.end)
        maker.end()


class _Maker(threading.Thread, Generic[Item]):
    # Knows nothing of its reader, which may be collected at any moment. The two talk through queues that
    # hold no Python lock: a signal, a finalizer or a fork may cut in anywhere and find nothing locked.

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        super().__init__(name="siftloader-ahead", daemon=True)
        self._items, self._process = items, os.getpid()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each item to make
        self._made: queue.SimpleQueue[list[Item] | BaseException] = queue.SimpleQueue()
        self._wanted, self._taken, self._warned, self._hangs = True, 0, False, False
        for _ in range(depth):
            self._room.put(None)

    def run(self) -> None:
        try:
            while self._room.get() is None and self._wanted:
                self._made.put([next(self._items)])
        except StopIteration:
            self._made.put(_END)
        except BaseException as error:
            self._made.put(error)
        finally:
            del self._items

    def take(self, timeout: float) -> list[Item]:
        """The next item in a list of its own, which is ``_END`` after the last."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"process {os.getpid()} was forked from {self._process} in the middle of an iteration: "
                f"the thread that reads ahead stayed there; call iter() anew in this process"
            )
        try:
            made = self._made.get(timeout=timeout or (None if self._warned else PATIENCE))
        except queue.Empty:
            if timeout:
                self._hangs = True
                raise Stalled(self._complaint(timeout)) from None
            self._warned = True
            warnings.warn(self._complaint(PATIENCE), stacklevel=3)
            made = self._made.get()
        if isinstance(made, BaseException):
            try:
                raise made
            finally:
                del made  # or the error would hold itself, through this frame
        self._taken += 1
        self._room.put(None)
        return made

    def end(self) -> None:
        """Let the thread end, and wait for that a little."""
        self._wanted = False
        if os.getpid() != self._process or self.ident is None:
            return
        self._room.put(None)
        # Collected by the very thread, or in the last moments of the interpreter: nothing to wait for.
        if self is threading.current_thread() or sys.is_finalizing() or self._hangs:
            return
        self.join(LINGER)
        if self.is_alive():
            warnings.warn(
                f"thread {self.name!r} still makes an item, {LINGER:g} s after nobody wants it: a read of "
                f"the storage that hangs, or a slow one; it ends with that read, or with the process",
                stacklevel=3,
            )

    def _complaint(self, waited: float) -> str:
        s = "" if self._taken == 1 else "s"
        return (
            f"nothing came for {waited:g} s, after {self._taken} item{s}: thread {self.name!r} makes the "
            f"next and has not come back; its stack says from where. A read that hangs is the storage "
            f"(a network mount that is gone, a dying disk: see df and dmesg); if it is only slow, "
            f"give a longer timeout=, in seconds (0: none)\n\n{stacks()}"
        )


_END: list[Any] = []


def stacks() -> str:
    """Where every thread of this process stands, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, '?')!r}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


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
        self._workers: list[BaseProcess] = []
        self._holder: Any = None  # torch's iterator that has the workers, ours to end
        self._begun = self._waits = False
        self._handler: Callable[[int, Any], None] | None = None
        self._before: Any = None  # the handler that ours stands in for
        self._others = {*active_children()}
        # Persistent workers stand ready before the iteration begins, or lie dead.
        self._few = getattr(loader, "num_workers", None)  # 0: nothing to watch
        self._lasts = bool(getattr(loader, "persistent_workers", False))
        self._source: Any = getattr(loader, "_iterator", None) if self._lasts else None
        self._find()
        self._source = self._ask(begin)
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
        self._workers, self._source, self._holder = [], iter(()), None

    def _find(self, error: BaseException | None = None) -> None:
        holders = [self._source]
        if error is not None and self._holder is None:
            # Of a generator around a loader: what it was asking is in the traceback.
            frames = traceback.walk_tb(error.__traceback__)
            holders += [frame.f_locals.get("self") for frame, _ in frames]
        for holder in holders:
            workers = getattr(holder, "_workers", None)
            if holder is not self and isinstance(workers, list) and workers:
                break
        else:
            self._workers = self._workers or [
                each for each in active_children() if each not in self._others
            ]
            return
        if holder is self._source and workers != self._workers and self._lasts:
            # Collected in a cycle, its queues close first: torch would wait five seconds for each worker.
            weakref.finalize(self._loader, _terminate, os.getpid(), workers).atexit = False
        self._workers, self._holder = list(workers), holder

    def _ask(self, make: Callable[[], Any]) -> Any:
        if dead := self._dead():
            text = self._death(dead, "")
            self._end()
            raise WorkerDied(text)
        self._listen()
        self._waits = True
        try:
            return make()
        except StopIteration:
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
        if not named and _is_of_a_pipe(error):
            # Its end of the pipe closes some time before the process counts as ended.
            until = time.monotonic() + LINGER
            while self._workers and not self._dead() and time.monotonic() < until:
                time.sleep(0.01)
        pids = named[1].split(", ") if named else []
        dead = self._dead() or [worker for worker in self._workers if str(worker.pid) in pids]
        return WorkerDied(self._death(dead, text)) if dead or named else error

    def _dead(self) -> list[BaseProcess]:
        if os.getpid() != self._process:
            return []
        return [worker for worker in self._workers if worker.exitcode]

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
        if self._handler is not None or self._few == 0 or os.name != "posix":
            return
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGCHLD)
        if not callable(before):
            return

        def died(number: int, frame: Any) -> None:
            try:
                before(number, frame)
            except RuntimeError:
                if not _opens(frame) if self._waits else not self._dead():
                    raise

        self._before, self._handler = before, died
        signal.signal(signal.SIGCHLD, died)

    def _unlisten(self) -> None:
        if self._handler is None or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGCHLD) is self._handler:
            signal.signal(signal.SIGCHLD, self._before)
        self._handler = self._before = None

    def _end(self) -> None:
        # The iterator itself may live on for long, in the traceback of what ended it.
        if self._loader is not None and getattr(self._loader, "_iterator", self) is self._source:
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
    # In the middle of opening files or sockets, which would stay open. None of it waits for long: either it
    # fails by itself, for the worker is gone, or the death is seen before the next item.
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
