"""Wherever tasks are worked on: the same results, in order, and nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from effort import examples
from engine_tasks import (
    CountedJob,
    dying,
    environment,
    failing,
    finishing,
    first_waits,
    large,
    length,
    meeting,
    scaled,
    sleepy,
    slow_first,
    undecodable,
    unpicklable,
    untransportable,
)
from hypothesis import given, strategies as st

from siftloader.engines import ONE_THREAD, WorkerTraceback, run_here, run_processes
from siftloader.errors import CorpusError, CorruptShard


TESTS = Path(__file__).parent
SOON = 60.0  # seconds: "at once", on a busy machine


# ---- helpers


def gone(pids: list[int], within: float = SOON) -> bool:
    deadline = time.monotonic() + within
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    # Not so a zombie that its new parent has not buried.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int, but: Collection[int] = ()) -> list[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        found = [
            int(child) for task in threads for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return [child for child in found if child not in but]


@pytest.fixture
def there() -> list[int]:
    """What other tests of this process left running: multiprocessing's resource tracker stays to the end."""
    return children(os.getpid())


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


def script(folder: Path, body: str) -> Path:
    path = folder / "script.py"
    # A test run in the background ignores interrupts, and what it starts would too.
    text = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    text += f"import sys\nsys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n"
    path.write_text(text + textwrap.dedent(body))
    return path


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script; kill what a failing test leaves of it."""
    running: list[subprocess.Popen[str]] = []

    def start(*command: str | Path, **options: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the workers too: they hold the pipes
        process.communicate()


# ---- laws


@examples(8)
@given(
    tasks=st.lists(st.integers(-5, 5), max_size=12),
    job=st.integers(),
    workers=st.integers(1, 3),
    ahead=st.integers(1, 3),
)
def test_processes_give_what_one_process_gives(tasks, job, workers, ahead):
    here = list(run_here(scaled, job, iter(tasks)))
    assert list(run_processes(scaled, job, iter(tasks), workers, ahead)) == here
    assert here == [job * task for task in tasks]


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (2, 1), (2, 2), (2, 5), (3, 1)])
def test_never_more_tasks_drawn_than_agreed(workers, ahead, tmp_path):
    drawn, reached = 0, tmp_path / "reached"

    def tasks() -> Iterator[int]:
        nonlocal drawn
        for task in range(30):
            drawn += 1
            if drawn == workers * ahead:
                reached.touch()
            yield task

    most = 0
    results = run_processes(first_waits, str(reached), tasks(), workers, ahead)
    assert drawn == 0
    for taken, result in enumerate(results):
        assert result == taken
        most = max(most, drawn - taken)
    assert drawn == 30
    assert most == workers * ahead  # also reached: else the workers would wait for tasks


def test_one_process_draws_tasks_one_by_one():
    drawn: list[int] = []
    results = run_here(scaled, 2, (drawn.append(task) or task for task in range(5)))
    assert next(results) == 0
    assert drawn == [0]


def test_order_is_that_of_the_tasks_when_the_first_is_the_slowest():
    assert list(run_processes(slow_first, 0.5, range(20), 2, ahead=4)) == list(range(20))


def test_workers_work_at_the_same_time(tmp_path):
    with closing(run_processes(meeting, (str(tmp_path), 2), range(12), 2)) as results:
        pids = list(results)
    assert len(set(pids)) == 2
    assert os.getpid() not in pids


def test_large_tasks_and_results_pass_each_other():
    # Megabytes both ways at once: each side would wait for the other if it did not read meanwhile.
    tasks = [bytes([number]) * 3_000_000 for number in range(8)]
    job = b"j" * 3_000_000
    assert list(run_processes(large, job, tasks, 2, ahead=3)) == [task + job for task in tasks]


def test_the_job_is_sent_once_to_each_worker(tmp_path):
    log = tmp_path / "log"
    results = list(run_processes(length, CountedJob(log), range(40), 2))
    assert results == [3_000_000 + task for task in range(40)]
    pids = log.read_text().split()
    assert 1 <= len(pids) == len(set(pids)) <= 2  # one may be done before the other has begun


def test_no_more_workers_than_tasks(tmp_path):
    log = tmp_path / "log"
    assert list(run_processes(length, CountedJob(log), [1], 4)) == [3_000_001]
    assert len(log.read_text().split()) == 1
    assert list(run_processes(length, CountedJob(log), [], 4)) == []
    assert len(log.read_text().split()) == 1


def test_workers_count_on_one_thread_and_the_caller_keeps_its_environment():
    before = dict(os.environ)
    found = list(run_processes(environment, None, ONE_THREAD, 1))
    assert [value for value, _, _ in found] == list(ONE_THREAD.values())
    assert all(ignored for _, _, ignored in found)
    assert dict(os.environ) == before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2, "ahead": 0}], ids=str)
def test_options_are_checked_at_once(options):
    with pytest.raises(ValueError, match=f"must be at least 1, got {min(options.values())}"):
        run_processes(scaled, 1, [1], **options)


# ---- errors


@pytest.mark.parametrize(
    "engine", [run_here, lambda *a: run_processes(*a, workers=2)], ids=["here", "processes"]
)
def test_the_lowest_task_that_fails_is_heard_after_the_results_before_it(engine):
    given = []
    with pytest.raises(CorruptShard, match=r"^task 3$") as raised:  # though task 4 fails sooner
        given += engine(failing, {3: 0.5, 4: 0.0, 5: 0.0}, range(10))
    assert given == [0, 1, 2]
    if engine is not run_here:
        assert isinstance(raised.value.__cause__, WorkerTraceback)
        assert "in failing" in str(raised.value.__cause__)


@pytest.mark.parametrize(
    "engine", [run_here, lambda *a: run_processes(*a, workers=2)], ids=["here", "processes"]
)
def test_a_source_that_fails_is_heard_in_its_turn(engine):
    def tasks() -> Iterator[int]:
        yield from range(3)
        raise CorpusError("half a file")

    results = engine(slow_first, 0.3, tasks())
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CorpusError, match="half a file"):
        next(results)


def test_an_earlier_failure_wins_over_the_source():
    def tasks() -> Iterator[int]:
        yield from range(2)
        raise CorpusError("half a file")

    with pytest.raises(CorruptShard, match="task 1"):
        list(run_processes(failing, {1: 0.3}, tasks(), 2))


def test_errors_that_do_not_pickle_say_what_they_were():
    with pytest.raises(RuntimeError, match=r"^TwoArguments: this and that$"):
        list(run_processes(untransportable, None, [1], 1))
    with pytest.raises(Exception, match="lambda"):
        list(run_processes(unpicklable, None, [1], 1))
    with pytest.raises(UnicodeDecodeError, match="0xff in position 1"):
        list(run_processes(undecodable, None, [b"a\xff"], 1))


@linux
def test_what_is_at_work_when_another_fails_is_finished_and_nothing_else_begun(tmp_path, there):
    with pytest.raises(CorpusError, match="task 0"):
        list(run_processes(finishing, str(tmp_path), range(20), 2, ahead=3))
    assert not children(os.getpid(), there)  # which could begin another
    names = {path.name for path in tmp_path.iterdir()}
    begun = {name.split("-")[1] for name in names if name.startswith("begun")} - {"0"}
    assert "1" in begun
    assert len(begun) <= 2  # the failed worker may have gone on to the next before it was stopped
    assert {name.split("-")[1] for name in names if name.startswith("done")} == begun


@pytest.mark.parametrize(
    ("with_signal", "said"),
    [
        (signal.SIGKILL, "most likely .* out of memory.*fewer workers"),
        (signal.SIGSEGV, "signal 11"),
    ],
    ids=["killed", "crashed"],
)
def test_a_worker_that_dies_is_an_error(with_signal, said):
    begun = time.monotonic()
    with pytest.raises(CorpusError, match=rf"(?s)worker process \d+ .*{said}"):
        list(run_processes(dying, int(with_signal), range(100), 2))
    assert time.monotonic() - begun < SOON


@linux
def test_a_worker_killed_between_megabytes_is_an_error(there):
    tasks = (bytes(4 << 20) for _ in range(100))
    results = run_processes(sleepy, 0.3, tasks, 2)
    victim = next(results)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(CorpusError, match=f"worker process {victim} was killed"):
        list(results)
    assert gone(children(os.getpid(), there))


def test_tasks_do_not_wait_behind_one_another_while_workers_start(tmp_path):
    with closing(run_processes(meeting, (str(tmp_path), 3), range(3), 3)) as results:
        assert len(set(results)) == 3


def test_workers_do_not_read_what_is_meant_for_the_caller(tmp_path, started):
    body = """
        from engine_tasks import eavesdropping
        from siftloader.engines import run_processes
        print(list(run_processes(eavesdropping, None, [1], 1)), sys.stdin.read())
    """
    caller = started(script(tmp_path, body), stdin=subprocess.PIPE)
    assert caller.communicate("hello", timeout=SOON) == ("[''] hello\n", "")


def test_a_function_of_the_main_script_is_refused(tmp_path, started):
    body = """
        from siftloader.engines import run_processes
        def mine(job, task):
            return task
        run_processes(mine, None, [1], 2)
    """
    _, errors = started(script(tmp_path, body)).communicate(timeout=SOON)
    assert "ValueError: mine is defined in the main script" in errors


# ---- who starts it


BODY = """
    from engine_tasks import scaled
    from siftloader.engines import run_processes
    print(list(run_processes(scaled, 10, range(4), 2)))
"""


def test_a_script_needs_no_guard(tmp_path, started):
    out, errors = started(script(tmp_path, BODY)).communicate(timeout=SOON)
    assert (out, errors) == ("[0, 10, 20, 30]\n", "")


def test_a_script_may_come_from_standard_input(tmp_path, started):
    with script(tmp_path, BODY).open() as source:
        out, errors = started("-", stdin=source).communicate(timeout=SOON)
    assert (out, errors) == ("[0, 10, 20, 30]\n", "")


def test_the_folder_the_script_runs_in_shadows_nothing(tmp_path, started):
    for name in ("queue", "signal", "multiprocessing", "siftloader"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out, errors = started(script(elsewhere, BODY), cwd=tmp_path).communicate(timeout=SOON)
    assert (out, errors) == ("[0, 10, 20, 30]\n", "")


# ---- ends


@linux
def test_closing_early_ends_the_workers(there):
    tasks = iter(range(1000))
    results = run_processes(sleepy, 0.5, tasks, 2)
    next(results)
    workers = children(os.getpid(), there)
    assert len(workers) >= 2
    begun = time.monotonic()
    results.close()
    assert time.monotonic() - begun < SOON
    assert not any(map(alive, workers))
    assert next(tasks) <= 5
    gc.collect()  # a ResourceWarning would be an error


@linux
def test_forgotten_results_end_the_workers(there):
    results = run_processes(sleepy, 0.5, range(1000), 2)
    next(results)
    workers = children(os.getpid(), there)
    del results
    gc.collect()
    assert gone(workers)


ENDLESS = """
    import os, time
    from engine_tasks import sleepy
    from siftloader.engines import run_processes
    results = run_processes(sleepy, {sleep}, range(10_000), 2)
    pids = set()
    while len(pids) < 2:
        pids.add(next(results))
    print(*pids, flush=True)
    {then}
"""


def endless(folder: Path, then: str, sleep: float = 0.2) -> Path:
    return script(folder, ENDLESS.format(sleep=sleep, then=then))


@linux
@pytest.mark.parametrize("sleep", [0.2, 60], ids=["between tasks", "in a long one"])
def test_a_killed_caller_leaves_nobody(tmp_path, started, sleep):
    body = f"""
        import time
        from engine_tasks import slow_but_first
        from siftloader.engines import run_processes
        results = run_processes(slow_but_first, {sleep}, range(1000), 2)
        print(next(results), flush=True)
        time.sleep(600)
    """
    caller = started(script(tmp_path, body))
    assert caller.stdout.readline() == "0\n"
    time.sleep(0.6)  # both are at work
    workers = children(caller.pid)
    assert len(workers) == 2
    assert all(map(alive, workers))
    caller.kill()
    assert gone(workers, 30)  # half of a long one


@linux
def test_an_interrupt_is_for_the_caller_alone(tmp_path, started):
    caller = started(endless(tmp_path, "list(results)"))
    workers = list(map(int, caller.stdout.readline().split()))
    os.killpg(caller.pid, signal.SIGINT)
    _, errors = caller.communicate(timeout=SOON)
    assert caller.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not any(map(alive, workers))


@linux
@pytest.mark.parametrize("after", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_an_interrupt_while_workers_start_is_for_the_caller_alone(tmp_path, started, after):
    body = """
        from engine_tasks import sleepy
        from siftloader.engines import run_processes
        print("go", flush=True)
        list(run_processes(sleepy, 0.1, range(10_000), 2))
    """
    caller = started(script(tmp_path, body))
    caller.stdout.readline()
    time.sleep(after)
    workers = children(caller.pid)
    os.killpg(caller.pid, signal.SIGINT)
    _, errors = caller.communicate(timeout=SOON)
    assert errors.count("Traceback") == 1, errors
    assert gone(workers)


@linux
def test_results_left_open_do_not_keep_python_from_ending(tmp_path, started):
    caller = started(endless(tmp_path, "kept = results", sleep=1.0))
    workers = list(map(int, caller.stdout.readline().split()))
    _, errors = caller.communicate(timeout=SOON)
    assert (caller.returncode, errors) == (0, "")
    assert gone(workers)
