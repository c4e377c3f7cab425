"""Items made by a thread: pytest tests/test_ahead.py"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref

import pytest

from siftloader import SiftError, ahead
from siftloader.ahead import prefetched, stacks
from siftloader.errors import Stalled


NAME = "siftloader-ahead"


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def until(happened, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.005)
    return happened()


@pytest.fixture(autouse=True)
def _long_patience(monkeypatch):
    """What is to end at once ends long before: no stall of a busy machine is taken for a read that hangs."""
    monkeypatch.setattr(ahead, "LINGER", 100.0)


SOON = 50.0  # seconds: at once, on a busy machine, and no lingering


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    if readers():
        gc.collect()
    assert until(lambda: not readers()), readers()


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_it_yields_the_same_items_in_their_order(depth):
    assert list(prefetched(iter(range(100)), depth)) == list(range(100))
    assert list(prefetched(iter(()), depth)) == []
    assert list(prefetched(iter([None, False]), depth)) == [None, False]


@pytest.mark.parametrize("depth", [1, 3])
def test_the_thread_stays_at_most_depth_ahead(depth):
    made: list[int] = []
    items = prefetched((made.append(i) or i for i in range(50)), depth)
    assert made == []  # nothing before the first next
    for taken in range(1, 6):
        next(items)
        assert until(lambda wanted=taken + depth: len(made) == wanted)
        time.sleep(0.01)
        assert len(made) == taken + depth
    items.close()


class Broken(Exception):
    pass


@pytest.mark.parametrize("kind", [Broken, KeyboardInterrupt, SystemExit, SiftError])
def test_an_error_of_the_maker_is_raised_at_its_place(kind):
    def make():
        yield from range(3)
        raise kind("third")

    items, seen = prefetched(make(), 2), []
    with pytest.raises(kind, match="third") as raised:
        seen.extend(items)
    assert "make" in [entry.name for entry in raised.traceback]
    items = prefetched(make(), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(kind, match="third"):
        next(items)
    assert next(items, "over") == "over"


def test_an_error_is_held_by_nobody_once_it_was_handled():
    def make():
        yield 0
        raise Broken

    gc.disable()
    try:
        with pytest.raises(Broken) as raised:
            list(prefetched(make(), 2))
        error = weakref.ref(raised.value)
        del raised
        assert until(lambda: error() is None)
    finally:
        gc.enable()


def test_closing_ends_a_thread_that_waits_for_room():
    items = prefetched(iter(range(10**9)), 2)
    next(items)
    begin = time.monotonic()
    items.close()
    assert time.monotonic() - begin < SOON
    assert not readers()


def test_closing_waits_for_the_item_being_made_and_lets_go_of_the_maker():
    begun, finished, closed = threading.Event(), [], []

    def make():
        try:
            yield 0
            begun.set()
            time.sleep(0.2)
            finished.append(1)
            yield 1
        finally:
            closed.append(1)

    items = prefetched(make(), 2)
    next(items)
    assert begun.wait(60)
    items.close()
    assert not readers()
    del items
    gc.collect()
    assert finished == closed == [1]


def test_closing_does_not_wait_for_ever_for_a_maker_that_hangs(monkeypatch):
    monkeypatch.setattr(ahead, "LINGER", 0.05)
    begun, free = threading.Event(), threading.Event()

    def make():
        yield 0
        begun.set()
        free.wait(100)

    items = prefetched(make(), 2)
    next(items)
    assert begun.wait(60)
    begin = time.monotonic()
    with pytest.warns(UserWarning, match=r"siftloader-ahead.* still .*0\.05 s"):
        items.close()
    assert time.monotonic() - begin < SOON
    free.set()


def test_a_reader_that_nobody_holds_lets_the_thread_end():
    items = prefetched(iter(range(10**9)), 2)
    next(items)
    assert readers()
    del items
    gc.collect()
    assert not readers()


def test_a_reader_in_a_cycle_that_the_thread_itself_collects_ends_it():
    collect = threading.Event()

    def make():
        yield 0
        collect.wait(60)
        gc.collect()  # the cycle goes here, in the thread that it would wait for
        yield 1

    holder: dict[str, object] = {}
    holder["items"], holder["self"] = prefetched(make(), 3), holder
    next(holder["items"])
    gc.disable()
    try:
        del holder
        collect.set()
        assert until(lambda: not readers())
    finally:
        gc.enable()


def test_it_holds_no_item_that_it_gave():
    class Item:
        pass

    made: list[weakref.ref[Item]] = []

    def make():
        while True:
            item = Item()
            made.append(weakref.ref(item))
            yield item
            del item

    items = prefetched(make(), 1)
    for number in range(3):
        next(items)
        assert until(lambda number=number: len(made) == number + 2)
        assert until(lambda number=number: made[number]() is None)
    items.close()


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="needs a clock per thread")
def test_an_idle_wait_costs_no_processor():
    """Both sides wait for half a second: the reader for a slow maker, then the maker for room."""

    def make():
        time.sleep(0.5)
        yield from range(100)

    begin = time.thread_time()
    items = prefetched(make(), 2)
    next(items)
    (maker,) = readers()
    time.sleep(0.5)
    # Of these two threads: others of this process may be at work.
    makers = time.clock_gettime(time.pthread_getcpuclockid(maker.ident))
    assert time.thread_time() - begin + makers < 0.1
    items.close()


# Stalls


def test_a_timeout_says_where_every_thread_stands():
    free = threading.Event()

    def a_read_that_hangs():
        yield 0
        free.wait(60)  # far beyond the timeout

    idle = threading.Thread(target=free.wait, args=(60,), name="somebody-else", daemon=True)
    idle.start()
    items = prefetched(a_read_that_hangs(), 2, timeout=1)  # which the first one must not take
    assert next(items) == 0
    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the error says it all
        with pytest.raises(Stalled) as raised:
            next(items)
    assert 0.9 < time.monotonic() - begin < SOON
    text = str(raised.value)
    assert "for 1 s" in text and "timeout" in text and "1 item" in text
    for name in (NAME, "a_read_that_hangs", "somebody-else", "MainThread", "free.wait(60)"):
        assert name in text, name
    assert isinstance(raised.value, RuntimeError)
    assert next(items, "over") == "over"
    free.set()
    idle.join()


def test_a_slow_maker_within_the_timeout_is_fine():
    slow = (time.sleep(0.05) or number for number in range(4))
    assert list(prefetched(slow, 2, timeout=60)) == [0, 1, 2, 3]


def test_without_a_timeout_a_long_wait_is_warned_about_once(monkeypatch):
    monkeypatch.setattr(ahead, "PATIENCE", 0.5)
    slow = (time.sleep(2 - number) or number for number in range(2))
    with pytest.warns(UserWarning, match="nothing came") as caught:
        assert list(prefetched(slow, 1)) == [0, 1]
    assert len(caught) == 1
    assert "time.sleep(2 - number)" in str(caught[0].message)
    assert "timeout=" in str(caught[0].message)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "3"])
def test_a_timeout_is_a_number_of_seconds(timeout):
    with pytest.raises(ValueError, match="timeout"):
        next(prefetched(iter(()), 1, timeout=timeout))


def test_stacks_name_the_threads_and_show_their_code():
    text = stacks()
    assert "MainThread" in text
    assert "test_stacks_name_the_threads" in text


# Interrupts, forks and exits


def test_ctrl_c_while_waiting_passes_at_once_and_the_next_one_begins_afresh():
    free, waits = threading.Event(), threading.Event()
    main = threading.main_thread().ident

    def a_read_that_hangs():
        yield 0
        waits.set()
        free.wait(100)

    def waiting():
        return sys._current_frames()[main].f_code is ahead._Maker.take.__code__

    def interrupt():
        waits.wait(60)
        until(waiting)  # anywhere else an interrupt would end the tests
        time.sleep(0.1)
        began.append(time.monotonic())
        signal.pthread_kill(main, signal.SIGINT)

    items, began = prefetched(a_read_that_hangs(), 2), []
    next(items)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.warns(UserWarning, match=r"still .*0\.2 s"), pytest.raises(KeyboardInterrupt):
        next(items)
    assert time.monotonic() - began[0] < SOON
    thread.join()
    free.set()
    assert list(prefetched(iter(range(3)), 2)) == [0, 1, 2]


@pytest.mark.parametrize("moments", [40])
def test_an_interrupt_at_any_moment_leaves_neither_a_thread_nor_a_lock(moments):
    """SIGALRM raises wherever the reader happens to be; a held lock would hang the close."""

    # As Ctrl-C is: the start of a thread takes any Exception for its own failure.
    class Rung(BaseException):
        pass

    def ring(*_):
        raise Rung

    before = signal.signal(signal.SIGALRM, ring)
    gc.disable()  # what is raised in a callback of the collector goes nowhere
    try:
        for moment in range(moments):
            items = prefetched(iter(range(10**9)), 2)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + moment * 3e-5)
                for _ in items:
                    pass
            except Rung:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                items.close()
            assert until(lambda: not readers())
    finally:
        gc.enable()
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_may_drop_it_and_is_told_not_to_read_from_it():
    items = prefetched(iter(range(10**9)), 2)
    next(items)
    child = os.fork()
    if not child:
        status = 1
        try:
            next(items)
        except RuntimeError as error:
            status = 0 if "forked" in str(error) else 2
        finally:
            del items  # closing must not wait for a thread that is not here
            os._exit(status)
    begin = time.monotonic()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert time.monotonic() - begin < SOON
    assert [next(items) for _ in range(3)] == [1, 2, 3]
    items.close()


SCRIPTS = {
    "held by the script": "items = prefetched(closing(), 2); next(items)",
    "held for good": "import builtins; builtins.kept = items = prefetched(closing(), 2); next(items)",
    "in a cycle": "a = [prefetched(count(), 2)]; a.append(a); next(a[0])",
    "in a loop that fails": "for _ in prefetched(count(), 2): 1 / 0",
}


MAKER = """
from itertools import count
from siftloader import ahead
from siftloader.ahead import prefetched

ahead.LINGER = 100.0

def closing():
    try:
        yield from count()
    finally:
        print("closed")
"""


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_that_ends_in_the_middle_ends_at_once_and_quietly(script):
    code = f"{MAKER}\n{script}\n"
    # Without torch, which takes seconds to import: the room needs nothing of it.
    stub = """
    import sys, types, pathlib
    package = types.ModuleType("siftloader")
    package.__path__ = [str(pathlib.Path("siftloader").resolve())]
    sys.modules["siftloader"] = package
    """
    run = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(stub) + code],
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )
    if "1 / 0" in script:
        assert "ZeroDivisionError" in run.stderr and "Exception ignored" not in run.stderr
    else:
        assert (run.returncode, run.stderr) == (0, "")
    # The thread ended, it was not stopped wherever it was.
    assert run.stdout == ("closed\n" if "closing" in script else "")
