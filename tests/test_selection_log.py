"""The selection log holds what was added, in parts that outlive the process, and waits for nothing."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch
from effort import examples
from hypothesis import given, strategies as st

from siftloader import selection_log
from siftloader.errors import SiftError
from siftloader.selection_log import SelectionLog, _Pending


TYPES = {
    "step": "int64",
    "rank": "int32",
    "pool": "int64",
    "position": "int32",
    "id": "int64",
    "score": "float",
    "kept": "bool",
    "labels": "int32",
    "source": "int32",
}


def read(path: Path) -> dict[str, list]:
    """As any reader does: the folder is the table."""
    return pyarrow.parquet.read_table(path).to_pydict()


def parts(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def add(log: SelectionLog, pool: int, samples: int = 4, **more) -> None:
    ids = torch.arange(samples) + pool * samples
    log.add(pool + 100, pool, ids, ids / 8, torch.arange(samples // 2) * 2, **more)


IDS = st.one_of(
    st.integers(0, 50), st.integers(2**24, 2**24 + 9), st.integers(2**62 - 9, 2**63 - 1)
)
ROW = st.tuples(IDS, st.floats(width=32, allow_nan=False), st.booleans(), st.integers(-1, 512))


@examples(60)
@given(
    pools=st.lists(st.lists(ROW, max_size=7), max_size=6),
    part_rows=st.integers(1, 12),
    flushes=st.sets(st.integers(0, 5)),
    as_index=st.booleans(),
)
def test_what_was_added_is_what_any_reader_finds(pools, part_rows, flushes, as_index):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs" / "x.parquet"
        log = SelectionLog(path, rank=3, part_rows=part_rows)
        expected = {name: [] for name in TYPES}
        for number, pool in enumerate(pools):
            ids, scores, kept, labels = ([row[column] for row in pool] for column in range(4))
            mask = torch.tensor(kept, dtype=torch.bool)
            log.add(
                10 * number,
                number,
                torch.tensor(ids, dtype=torch.int64),
                torch.tensor(scores, dtype=torch.float32),
                torch.arange(len(pool))[mask] if as_index else mask,
                labels=torch.tensor(labels, dtype=torch.int64),
            )
            if number in flushes:
                log.flush()
            n = len(pool)
            rows = ([10 * number] * n, [3] * n, [number] * n, list(range(n)), ids, scores, kept)
            for name, values in zip(TYPES, (*rows, labels, [-1] * n), strict=True):
                expected[name] += values
        log.flush()
        if expected["id"]:
            assert read(path) == expected
        else:
            assert parts(path) == []


def test_the_types_are_those_promised(tmp_path):
    log = SelectionLog(tmp_path / "x.parquet")
    ids = torch.tensor([2**24 + 1, 2**62 + 1], dtype=torch.int64)
    kept = torch.tensor([True, False])
    scores = torch.tensor([0.1, 7.0], dtype=torch.bfloat16)
    log.add(0, 0, ids, scores, kept, labels=ids % 7, sources=ids % 5)
    log.flush()
    schema = pyarrow.parquet.read_schema(tmp_path / "x.parquet" / parts(tmp_path / "x.parquet")[0])
    assert {field.name: str(field.type) for field in schema} == TYPES
    assert read(tmp_path / "x.parquet")["id"] == [16_777_217, 4_611_686_018_427_387_905]
    assert read(tmp_path / "x.parquet")["source"] == [(2**24 + 1) % 5, (2**62 + 1) % 5]


def test_float_ids_are_refused_because_they_merge_samples(tmp_path):
    log = SelectionLog(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"id: need integers, got torch.float32; floats merge"):
        log.add(0, 0, torch.arange(4.0), torch.rand(4), torch.arange(2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"scores": torch.zeros(3)},
            r"score: need one per candidate, \[P\], got \[3\] for ids \[4",
        ),
        ({"ids": torch.ones(4, 1).long()}, r"id: need one per candidate"),
        ({"labels": torch.ones(4, 2).long()}, r"labels: need one per candidate"),
        ({"sources": torch.ones(4)}, r"source: need integers, got torch.float32"),
        ({"kept": torch.ones(3).bool()}, r"kept: need bool \[P\] or the indices"),
        ({"kept": torch.tensor(1)}, r"kept: need bool \[P\] or the indices"),
        ({"kept": torch.tensor([1, 4])}, r"pool 7: kept must be indices in 0..3, got 1..4"),
    ],
    ids=str,
)
def test_a_pool_that_does_not_fit_together_is_refused(tmp_path, changed, message):
    log = SelectionLog(tmp_path / "x.parquet")
    pool = {"ids": torch.arange(4), "scores": torch.rand(4), "kept": torch.arange(2)}
    with pytest.raises(ValueError, match=message):
        log.add(0, 7, **(pool | changed))


def test_what_the_loop_reuses_is_copied_before(tmp_path):
    log = SelectionLog(tmp_path / "x.parquet")
    ids, scores, kept = torch.arange(4), torch.ones(4), torch.tensor([True, True, False, False])
    labels = torch.full((4,), 5, dtype=torch.int32)
    log.add(0, 0, ids, scores, kept, labels=labels, sources=labels)
    for tensor in (ids, scores, labels):
        tensor.fill_(9)
    kept.fill_(False)
    log.flush()
    found = read(tmp_path / "x.parquet")
    assert found["id"] == [0, 1, 2, 3] and found["score"] == [1.0] * 4
    assert found["kept"] == [True, True, False, False]
    assert found["labels"] == found["source"] == [5] * 4


def test_scores_that_carry_gradients_or_are_not_finite_are_written_as_they_are(tmp_path):
    log = SelectionLog(tmp_path / "x.parquet")
    scores = torch.tensor([-torch.inf, torch.nan, 1.0], requires_grad=True)
    log.add(0, 0, torch.arange(3), scores, torch.tensor([2]))
    log.flush()
    lowest, missing, real = read(tmp_path / "x.parquet")["score"]
    assert lowest == -np.inf and np.isnan(missing) and real == 1.0


def test_a_part_is_written_when_it_is_full_or_old(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("siftloader.selection_log.time.monotonic", lambda: now[0])
    full = SelectionLog(tmp_path / "full", part_rows=8)
    for pool in range(5):
        add(full, pool)
    assert len(parts(tmp_path / "full")) == 2
    assert max(read(tmp_path / "full")["pool"]) == 3

    old = SelectionLog(tmp_path / "old", flush_seconds=60)
    add(old, 0)
    now[0] += 59
    add(old, 1)
    assert parts(tmp_path / "old") == []
    now[0] += 1
    add(old, 2)
    assert sorted(set(read(tmp_path / "old")["pool"])) == [0, 1, 2]
    now[0] += 59
    add(old, 3)
    assert len(parts(tmp_path / "old")) == 1


def test_nothing_to_write_writes_nothing(tmp_path):
    log = SelectionLog(tmp_path / "x.parquet")
    log.flush()
    add(log, 0)
    log.flush()
    log.flush()
    assert parts(tmp_path / "x.parquet") == ["rank-00000-part-000000.parquet"]


def test_a_second_run_adds_parts_and_every_rank_its_own(tmp_path):
    path = tmp_path / "x.parquet"
    for run in range(3):
        for rank in (0, 2):
            log = SelectionLog(path, rank)
            add(log, run)
            before = {entry: entry.read_bytes() for entry in path.iterdir()}
            log.flush()
            assert {entry: entry.read_bytes() for entry in before} == before, "nothing replaced"
    names = [f"rank-0000{rank}-part-00000{part}.parquet" for rank in (0, 2) for part in range(3)]
    assert parts(path) == names
    assert len(read(path)["id"]) == 24


def test_two_logs_at_once_do_not_overwrite_each_other(tmp_path):
    path = tmp_path / "x.parquet"
    first, second = SelectionLog(path), SelectionLog(path)
    add(first, 0)
    first.flush()
    add(second, 1)
    second.flush()
    assert sorted(set(read(path)["pool"])) == [0, 1]


def test_numbers_go_on_after_gaps_and_past_six_digits(tmp_path):
    path = tmp_path / "x.parquet"
    log = SelectionLog(path)
    add(log, 0)
    log.flush()
    (path / "rank-00000-part-000000.parquet").rename(path / "rank-00000-part-999999.parquet")
    log = SelectionLog(path)
    add(log, 1)
    log.flush()
    assert (path / "rank-00000-part-1000000.parquet").is_file()
    add(again := SelectionLog(path), 2)
    again.flush()
    assert (path / "rank-00000-part-1000001.parquet").is_file()


def test_a_path_of_others_is_refused_at_construction(tmp_path):
    file = tmp_path / "x.parquet"
    file.write_text("a table of somebody")
    with pytest.raises(ValueError, match="a file, and a selection log is a folder"):
        SelectionLog(file)
    assert file.read_text() == "a table of somebody"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds notes\.txt, which is not of a selection log"):
        SelectionLog(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").rename(tmp_path / "mine" / ".DS_Store")
    SelectionLog(tmp_path / "mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank must be 0 or more, got -1"),
        ({"part_rows": 0}, "part_rows must be at least 1 row, got 0"),
        ({"flush_seconds": float("nan")}, "flush_seconds must be 0 or more seconds, got nan"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SelectionLog(tmp_path / "x.parquet", **options)


def test_without_pyarrow_the_construction_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SiftError, match=r"pip install 'siftloader\[log\]'"):
        SelectionLog(tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


def test_a_disk_that_refuses_is_explained_and_nothing_is_lost(tmp_path, monkeypatch):
    log = SelectionLog(tmp_path / "x.parquet")
    add(log, 0)

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("siftloader.selection_log.os.fsync", full)
        with pytest.raises(SiftError, match=r"part-000000.parquet: the selection log cannot be"):
            log.flush()
    assert pyarrow.dataset.dataset(tmp_path / "x.parquet").files == [], "the torn part is hidden"
    log.flush()
    assert read(tmp_path / "x.parquet")["pool"] == [0] * 4
    assert parts(tmp_path / "x.parquet") == ["rank-00000-part-000000.parquet"]


def test_a_log_that_is_dropped_writes_its_rest(tmp_path):
    log = SelectionLog(tmp_path / "x.parquet")
    add(log, 0)
    del log
    gc.collect()
    assert read(tmp_path / "x.parquet")["pool"] == [0] * 4


@pytest.mark.parametrize("path", ["x.parquet", "./x.parquet"])
def test_a_log_that_is_dropped_in_the_midst_of_another_ones_writing_writes_beside_it(
    tmp_path, monkeypatch, path
):
    """As the collector of garbage may have it; both begin with the same part."""
    monkeypatch.chdir(tmp_path)
    logs = [SelectionLog(tmp_path / "x.parquet"), SelectionLog(path)]
    for pool, log in enumerate(logs):
        add(log, pool)
    dropped, write_table = [logs.pop(0)], selection_log._write_table
    del log

    def meanwhile(*given):
        dropped.clear()
        write_table(*given)

    monkeypatch.setattr(selection_log, "_write_table", meanwhile)
    (kept,) = logs
    kept.flush()
    assert sorted(read(tmp_path / "x.parquet")["pool"]) == [0] * 4 + [1] * 4
    assert parts(tmp_path / "x.parquet") == [f"rank-00000-part-{n:06d}.parquet" for n in (0, 1)]
    add(kept, 2)
    kept.flush()
    assert len(parts(tmp_path / "x.parquet")) == 3
    assert not selection_log._WRITING


def test_a_forked_child_does_not_write_the_rows_of_its_parent(tmp_path, monkeypatch):
    log = SelectionLog(tmp_path / "x.parquet")
    add(log, 0)
    with monkeypatch.context() as child:
        child.setattr("siftloader.selection_log.os.getpid", lambda: -1)
        log.flush()
        assert parts(tmp_path / "x.parquet") == []
    log.flush()
    assert read(tmp_path / "x.parquet")["pool"] == [0] * 4


ENDLESS = """
import sys, torch
from siftloader.selection_log import SelectionLog
log = SelectionLog(sys.argv[1], part_rows=int(sys.argv[2]))
for pool in range(int(sys.argv[3])):
    ids = torch.arange(64) + 64 * pool
    log.add(pool, pool, ids, ids / 8, torch.arange(32))
    print(pool, flush=True)
"""


def test_a_killed_run_leaves_whole_parts_and_the_next_one_goes_on(tmp_path):
    path = tmp_path / "x.parquet"
    command = [sys.executable, "-c", ENDLESS, str(path), "128", "1000000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        for _ in range(40):
            run.stdout.readline()
        time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
    pools = read(path)["pool"]
    assert pools == [pool for pool in range(len(pools) // 64) for _ in range(64)]
    assert len(pools) >= 38 * 64, "all but the last part"
    before = len(parts(path))
    log = SelectionLog(path)
    add(log, 1 << 40)
    log.flush()
    assert len(read(path)["pool"]) == len(pools) + 4
    assert len([name for name in parts(path) if name[0] == "."]) <= 1
    assert len(parts(path)) <= before + 1


def test_a_run_that_ends_writes_its_rest(tmp_path):
    path = tmp_path / "x.parquet"
    command = [sys.executable, "-W", "error", "-c", ENDLESS, str(path), "100000", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert read(path)["id"] == list(range(192))


class Late:
    """An event of a copy that arrives when it is told to."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_copies_under_way_are_left_alone_until_they_arrive_or_are_waited_for(
    tmp_path, monkeypatch
):
    log = SelectionLog(tmp_path / "x.parquet", part_rows=1)
    events: list[Late] = []

    def on_its_way(*arguments):
        events.append(Late())
        return replace(original(*arguments), arrivals=(events[-1],))

    original = _Pending.of
    monkeypatch.setattr(_Pending, "of", on_its_way)
    for pool in range(3):
        add(log, pool)
    assert parts(tmp_path / "x.parquet") == [], "add() does not wait"
    events[1].done = True
    add(log, 3)
    assert parts(tmp_path / "x.parquet") == [], "in order: the first has not arrived"
    events[0].done = True
    add(log, 4)
    assert sorted(set(read(tmp_path / "x.parquet")["pool"])) == [0, 1]
    log.flush()
    assert sorted(set(read(tmp_path / "x.parquet")["pool"])) == [0, 1, 2, 3, 4]
    assert all(event.done for event in events)


def test_host_tensors_of_a_pool_under_way_are_copied_too(tmp_path, monkeypatch):
    log = SelectionLog(tmp_path / "x.parquet")
    original = _Pending.of
    monkeypatch.setattr(
        _Pending, "of", lambda *arguments: replace(original(*arguments), arrivals=(Late(),))
    )
    ids, labels = torch.arange(4), torch.full((4,), 5, dtype=torch.int32)
    log.add(0, 0, ids, torch.rand(4), torch.arange(2), labels=labels)
    ids.zero_()
    labels.zero_()
    log.flush()
    assert read(tmp_path / "x.parquet")["id"] == [0, 1, 2, 3]
    assert read(tmp_path / "x.parquet")["labels"] == [5] * 4


def test_seven_bytes_a_row(tmp_path):
    drawn = np.random.default_rng(0)
    log = SelectionLog(tmp_path / "x.parquet")
    for pool in range(1024):
        scores = torch.from_numpy(drawn.normal(6, 1, 64).astype(np.float32))
        ids = torch.from_numpy(drawn.integers(0, 1_000_000, 64))
        labels = torch.from_numpy(drawn.binomial(500, 0.15, 64))
        log.add(pool, pool, ids, scores, scores.argsort()[32:], labels, ids % 3)
    log.flush()
    (part,) = (tmp_path / "x.parquet").iterdir()
    assert part.stat().st_size / 65_536 < 7.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adding_from_a_gpu_synchronises_nothing(tmp_path):
    log = SelectionLog(tmp_path / "x.parquet", part_rows=256)
    ids = torch.arange(64, device="cuda") + 2**62
    scores = torch.rand(64, device="cuda")
    add(log, 0)  # the first page-locked memory is taken before
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pool in range(1, 50):
            index = scores.topk(32).indices
            log.add(pool, pool, ids, scores, index, labels=(ids % 7), sources=torch.arange(64))
            ids += 1  # the buffers are reused at once
            scores.neg_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    log.flush()
    found = read(tmp_path / "x.parquet")
    rows = [place for place, pool in enumerate(found["pool"]) if pool == 49]
    assert [found["id"][row] for row in rows] == [2**62 + 48 + k for k in range(64)]
    kept = [found["score"][row] for row in rows if found["kept"][row]]
    assert min(kept) >= sorted(found["score"][row] for row in rows)[32]
