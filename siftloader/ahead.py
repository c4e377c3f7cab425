"""Items made by a thread, a few ahead of whoever needs them.

    for batch in prefetched(batches, 4, timeout=30): ...

What takes too long is ``Stalled``, with the stacks of all threads.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
import traceback
import warnings
from collections.abc import Generator, Iterator
from typing import Any, Generic, TypeVar

from siftloader.errors import Stalled


Item = TypeVar("Item")
PATIENCE = 60.0  # seconds without an item before a warning, where there is no timeout
LINGER = 2.0  # seconds that closing waits for a thread in the middle of an item
HASTE = 0.2  # and where it is Ctrl-C that closes


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
    except KeyboardInterrupt:
        maker.end(HASTE)
        raise
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

    def end(self, linger: float | None = None) -> None:
        """Let the thread end, and wait for that a little."""
        self._wanted = False
        if os.getpid() != self._process or self.ident is None:
            return
        self._room.put(None)
        # Collected by the very thread, or in the last moments of the interpreter: nothing to wait for.
        if self is threading.current_thread() or sys.is_finalizing() or self._hangs:
            return
        linger = LINGER if linger is None else linger
        self.join(linger)
        if self.is_alive():
            self._hangs = True
            warnings.warn(
                f"thread {self.name!r} still makes an item, {linger:g} s after nobody wants it: a read of "
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
