"""tools/bench_stream.py and tools/shuffle_quality.py: pytest tests/test_bench_stream.py"""

from __future__ import annotations

import gc
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from effort import examples
from hypothesis import given, strategies as st


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench_stream
import shuffle_quality
from bench_stream import Row


linux = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc"
)
TINY = ["--samples=768", "--shards=12", "--tokens=16", "--passes=1", "--limit=0.1"]


@pytest.mark.slow
@linux
def test_one_call_measures_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.json"
    arms = ["--arms=siftloader,sha256,mosaic", "--processes=2", "--many=0"]
    bench_stream.main([*TINY, *arms, f"--json={out}", f"--work={tmp_path}"])
    printed = capsys.readouterr().out
    rows = json.loads(out.read_bytes())["rows"]
    done = [row for row in rows if not row["failed"]]
    assert {(row["arm"], row["kind"]) for row in done} == {
        *(("siftloader", kind) for kind in ("first", "plain", "masked")),
        ("sha256", "plain"),
    }
    assert all(row["processes"] == 2 and row["rates"][0] > 0 < row["cpu"][0] for row in done)
    assert {row["failed"] for row in rows} == {"", "mosaicml-streaming is not installed"}
    assert "2 processes, samples per second" in printed
    assert list(tmp_path.iterdir()) == [out]  # nothing stays


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return bench_stream.write_all(tmp_path_factory.mktemp("samples"), bench_stream.parse(TINY))


KINDS = {"siftloader": ("first", "plain", "masked"), "map": ("plain", "alone", "masked")}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("arm", ["siftloader", "map", "webdataset"])
def test_each_arm_reads_every_row_once(
    arm: str, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = np.load(Path(job["folder"], "keys.npy"))
    if arm == "webdataset":
        pytest.importorskip("webdataset")
    for kind in KINDS.get(arm, ("plain", "masked")):
        found, names = [], set()
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "2")
            for batch in bench_stream.OPENERS[arm](job, rank, 2)(kind):
                assert {str(value.dtype) for value in batch.values()} == {"torch.int64"}
                found.append(bench_stream.row_keys(batch["input_ids"].numpy()))
                names |= set(batch)
        if kind == "masked":
            assert not np.isin(np.concatenate(found), known).all()
        else:
            bench_stream.check_keys(known, found)
            assert sum(map(len, found)) == len(known)
        if arm == "map" and kind != "alone":  # what ours gives
            assert len(names) == (3 if kind == "masked" else 2)
    gc.collect()  # what is left open, while that is not an error


@pytest.mark.slow
def test_shards_that_are_only_listed(tmp_path: Path) -> None:
    costs = []
    for count in (3, 300):
        bench_stream.list_shards(tmp_path / str(count), count)
        costs.append(bench_stream.cost_of_opening(tmp_path / str(count)))
    assert 20 < (costs[1]["held"] - costs[0]["held"]) / 297 < 1000
    assert costs[1]["position"] == 225 * bench_stream.LISTED
    many = {"shards": 300, "held by shard": 101.0, "peak by shard": 0}
    lines = bench_stream.report_many({**many, **costs[1], "resume": 0.9}).splitlines()
    assert [line.rpartition(" ")[2] for line in lines[1:]] == ["MISSED", "met"]


def row(arm: str, kind: str, rate: float) -> Row:
    return Row(arm, kind, 1, [rate])


# ours first, ours, the map, sha256, best of two tars, ours masked (the map: 10) -> what is met
@pytest.mark.parametrize(
    ("first", "plain", "whole", "hashing", "tar", "masked", "met"),
    [
        (80, 70, 100, 100, 7, 7, "met met met met"),
        (69, 70, 100, 100, 7, 7, "met met met MISSED"),
        (70, 70, 100, 100, 7, 7, "met met met met"),  # 0.7 x the map is the lesser
        (40, 70, 100, 50, 7, 7, "met met met met"),  # 0.8 x the hash is
        (39, 70, 100, 50, 7, 7, "met met met MISSED"),
        (80, 69, 100, 100, 7, 7, "MISSED MISSED met met"),
        (80, 70, 100, 100, 7.1, 7, "MISSED met met met"),
        (80, 70, 100, 100, 7, 6.9, "met met MISSED met"),
    ],
)
def test_bars(
    first: float,
    plain: float,
    whole: float,
    hashing: float,
    tar: float,
    masked: float,
    met: str,
) -> None:
    rows = [row("siftloader", "first", first), row("siftloader", "plain", plain)]
    rows += [row("map", "plain", whole), row("map", "alone", 999), row("sha256", "plain", hashing)]
    rows += [row("webdataset", "plain", tar), row("datasets", "plain", 1)]
    rows += [row("siftloader", "masked", masked), row("map", "masked", 10)]
    rows += [row("mosaic", "plain", 99), row("webdataset", "masked", 99)]
    assert [line.rpartition(" ")[2] for line in bench_stream.bars(rows)] == met.split()
    assert bench_stream.bars(rows[:1]) == []  # with nothing to compare with


def test_rates_count_until_the_first_process_ends() -> None:
    short = {"begin": 0.0, "records": [(1.0, 10), (2.0, 20)]}
    long = {"begin": 0.0, "records": [(1.0, 30), (2.5, 60), (9.0, 999)]}
    assert bench_stream.together([short, long]) == pytest.approx(10 + 30)
    assert bench_stream.together([long]) == pytest.approx(111)


def passed(*batches: Any, **todo: Any) -> dict[str, Any]:
    read = lambda kind: (batch for batch in batches)  # noqa: E731
    return bench_stream.one_pass(
        read, {"kind": "", "at": 0, "limit": 9, "keys": None, "least": 0} | todo
    )


def test_a_pass_ends_with_the_data_its_limit_or_not_before_its_least() -> None:
    assert [rows for _, rows in passed(3, 4, 5)["records"]] == [3, 7, 12]
    assert [rows for _, rows in passed(3, 4, 5, limit=0)["records"]] == [3]
    assert len(passed(3, 4, 5, least=0.02)["records"]) > 3


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([[1, 2], [3]], None),
        ([[1], []], None),
        ([[1, 4], [3]], "never written"),
        ([[1, 2], [2, 1]], "2 rows twice"),  # ranks that were not split
        ([[1, 1]], "1 rows twice"),
    ],
)
def test_rows_are_looked_at(found: list[list[int]], message: str | None) -> None:
    known, keys = np.array([1, 2, 3], np.uint64), [np.array(each, np.uint64) for each in found]
    if message is None:
        bench_stream.check_keys(known, keys)
        return
    with pytest.raises(RuntimeError, match=message):
        bench_stream.check_keys(known, keys)


def test_rows_have_keys_of_their_own() -> None:
    words = bench_stream.random_words(np.random.default_rng(0), 600, 8)
    assert words.min() >= 101 and words.max() < bench_stream.VOCABULARY
    assert not np.isin(words[:, 1:-1], list(bench_stream.SPECIAL.values())).any()
    keys = bench_stream.row_keys(words)
    assert len(np.unique(keys)) == len(np.unique(words, axis=0)) == 600
    assert np.array_equal(bench_stream.row_keys(words.astype(np.int64)[::-1]), keys[::-1])
    swapped = words[:1, ::-1]
    assert bench_stream.row_keys(swapped) != keys[0]


def test_places_of_the_map_are_windows_of_whole_shards() -> None:
    places = bench_stream.windowed(np.random.default_rng(0), 20, 5)
    assert sorted(places) == list(range(100))
    windows = [set((places[at : at + 40] // 5).tolist()) for at in range(0, 100, 40)]
    assert [len(window) for window in windows] == [8, 8, 4]


# shuffle_quality


def test_uniform_is_one_and_the_disk_is_not() -> None:
    uniform = np.random.default_rng(0).permutation(1 << 15)
    found = shuffle_quality.measure(uniform, 16)
    for column in ("moved", "parted", "same shard", "mix, sorted", "mix, prepared"):
        assert found[column] == pytest.approx(1, abs=0.1), column
    disk = shuffle_quality.measure(np.arange(1 << 15), 16)
    assert disk["moved"] == 0
    assert disk["parted"] == pytest.approx(3 / (1 << 15), rel=0.01)
    assert disk["adjacent"] == pytest.approx((1 << 15) / 2)
    assert disk["same shard"] == pytest.approx(16, rel=0.01)
    assert disk["mix, sorted"] == pytest.approx(256, rel=0.01)
    assert disk["mix, prepared"] == pytest.approx(1, abs=0.1)


def test_parted_is_of_neighbours_on_disk() -> None:
    evens_first = np.r_[0:1024:2, 1:1024:2]  # neighbours come half the stream apart
    assert shuffle_quality.measure(evens_first, 16)["parted"] == pytest.approx(1.5, rel=0.01)


@examples(30)
@given(count=st.integers(0, 400), size=st.integers(1, 250), seed=st.integers(0, 99))
def test_the_buffer_is_webdatasets(count: int, size: int, seed: int) -> None:
    filters = pytest.importorskip("webdataset.filters")
    theirs = filters._shuffle(iter(range(count)), size, 100, rng=random.Random(seed))
    ours = shuffle_quality.webdataset_buffer(range(count), size, random.Random(seed))
    assert list(ours) == list(theirs)


def test_every_order_holds_every_sample_once() -> None:
    for name, order in shuffle_quality.orders(1024, 16, seed=0).items():
        assert sorted(order(1)) == list(range(1024)), name
        assert name == "as on disk" or list(order(0)) != list(order(1)), name


def test_shards_are_read_ten_at_a_time_in_turn() -> None:
    assert list(shuffle_quality.in_turn(range(11), 2))[:13] == [
        *(0, 4, 6, 8, 10, 12, 14, 16, 18, 20),  # the first stretch has two shards
        *(1, 5, 7),
    ]
    assert sorted(shuffle_quality.in_turn(range(11), 2)) == list(range(22))


def test_quality_prints_a_row_for_each_order(capsys: pytest.CaptureFixture[str]) -> None:
    shuffle_quality.main(["--samples=4096", "--shards=16", "--epochs=1"])
    printed = capsys.readouterr().out
    assert "siftloader, window 8 (default)" in printed
    assert len(printed.splitlines()) == 4 + len(shuffle_quality.orders(4096, 16, 0))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SystemExit):
        shuffle_quality.main(["--samples=100", "--shards=16"])
    with pytest.raises(SystemExit):
        bench_stream.main(["--samples=100", "--shards=16"])
