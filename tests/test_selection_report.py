"""What a selection log tells is what slow Python counts, and what cannot be read is named."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from effort import examples
from hypothesis import given, strategies as st

from siftloader import TokenShards
from siftloader.cli import main
from siftloader.errors import SiftError
from siftloader.selection_log import SelectionLog
from siftloader.selection_report import (
    COLUMNS,
    by_length,
    by_sample,
    by_source,
    drift,
    extremes,
    plot_drift,
    read_log,
    report,
    sources_of,
    tokens_of,
)
from siftloader.shards import ShardSet


ROOT = Path(__file__).parents[1]
DEMO = ROOT / "shards" / "demo"
TYPES = {name: pyarrow.type_for_alias(kind) for name, kind in COLUMNS.items()}
SCHEMA = pyarrow.schema(list(TYPES.items()))


def table_of(rows: list[dict]) -> pyarrow.Table:
    """Rows as a table; what is not said is unknown."""
    base = {"step": 0, "rank": 0, "pool": 0, "position": 0, "id": 0, "score": 0.0, "kept": False}
    full = [base | {"labels": -1, "source": -1} | row for row in rows]
    return pyarrow.Table.from_pylist(full, schema=SCHEMA)


def write(folder: Path, rank: int, part: int, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"rank-{rank:05d}-part-{part:06d}.parquet"
    pyarrow.parquet.write_table(table_of([row | {"rank": rank} for row in rows]), path)
    return path


def logged(folder: Path, pools: int = 6, samples: int = 8) -> Path:
    """Sample k scores k, so the upper half of every pool is kept."""
    log = SelectionLog(folder)
    for pool in range(pools):
        ids = torch.arange(samples)
        scores = ids.float() + pool
        log.add(10 * pool, pool, ids, scores, ids[samples // 2 :], labels=ids + 1)
    log.flush()
    return folder


# --- reading ---------------------------------------------------------------------------------------


PLACES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=8)


@examples(60)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from([0, 1, 70_000]), PLACES), min_size=1, max_size=5
    ).filter(lambda parts: any(places for _, places in parts))
)
def test_of_repeated_rows_the_latest_part_counts_and_the_order_is_that_of_the_pools(parts):
    with tempfile.TemporaryDirectory() as folder:
        expected = {}
        for number, (rank, places) in enumerate(parts):
            rows = []
            for row, (pool, position) in enumerate(places):
                key = (pool, rank, position)
                expected[key] = number * 100 + row
                rows.append({"pool": pool, "position": position, "id": expected[key]})
            write(Path(folder), rank, number, rows)
        found = read_log(folder).to_pylist()
        keys = [(row["pool"], row["rank"], row["position"]) for row in found]
        assert keys == sorted(expected)
        assert [row["id"] for row in found] == [expected[key] for key in keys]


def test_parts_count_by_number_not_by_name(tmp_path):
    write(tmp_path, 0, 1_000_000, [{"id": 2}])  # sorts before 999999 as text
    write(tmp_path, 0, 999_999, [{"id": 1}])
    assert read_log(tmp_path)["id"].to_pylist() == [2]


def test_a_resumed_run_repeats_steps_and_the_report_counts_them_once(tmp_path):
    path = tmp_path / "x.parquet"
    for begin, end in ((0, 8), (5, 12)):
        log = SelectionLog(path)
        for pool in range(begin, end):
            ids = torch.arange(4) + 10 * begin
            log.add(pool, pool, ids, torch.rand(4), torch.arange(2))
        log.flush()
    table = read_log(path)
    assert table["pool"].to_pylist() == [pool for pool in range(12) for _ in range(4)]
    assert table["id"].to_pylist()[5 * 4] == 50, "the later run's"
    assert pyarrow.parquet.read_table(path).num_rows == 15 * 4


def test_the_log_writes_the_columns_that_the_report_reads(tmp_path):
    assert read_log(logged(tmp_path / "x.parquet")).schema.equals(SCHEMA)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(SiftError, match="no finished part of a selection log here"):
        read_log(tmp_path / "gone.parquet")
    (tmp_path / ".rank-00000-part-000000.parquet.part").write_bytes(b"torn")
    with pytest.raises(SiftError, match="no finished part of a selection log here"):
        read_log(tmp_path)
    (tmp_path / "file.parquet").touch()
    with pytest.raises(SiftError, match="a file, and a selection log is a folder"):
        read_log(tmp_path / "file.parquet")
    write(tmp_path / "empty", 0, 0, [])
    with pytest.raises(SiftError, match="without a row"):
        read_log(tmp_path / "empty")


def test_a_torn_part_is_hidden_and_a_cut_one_is_named(tmp_path):
    path = logged(tmp_path / "x.parquet")
    (path / ".rank-00000-part-000001.parquet.part").write_bytes(b"PAR1 torn")
    assert len(read_log(path)) == 48
    logged(path)
    part = path / "rank-00000-part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(SiftError, match=r"part-000001.parquet: not a part .* or damaged"):
        read_log(path)


def test_a_part_with_other_columns_is_named(tmp_path):
    path = logged(tmp_path / "x.parquet")
    strange = path / "rank-00003-part-000000.parquet"
    pyarrow.parquet.write_table(table_of([{}]).drop_columns(["kept"]), strange)
    with pytest.raises(SiftError, match=r"rank-00003-part-000000.parquet: not a part"):
        read_log(path)
    ids = table_of([{}]).set_column(4, "id", pyarrow.array([0.5], pyarrow.float32()))
    pyarrow.parquet.write_table(ids, strange)
    with pytest.raises(SiftError, match=r"rank-00003-part-000000.parquet: not a part"):
        read_log(path)


def test_a_flipped_bit_is_never_read_as_a_value(tmp_path):
    path = tmp_path / "x.parquet"
    log = SelectionLog(path)
    drawn = torch.Generator().manual_seed(0)
    for pool in range(8):
        ids = torch.randint(2**40, (32,), generator=drawn)
        log.add(pool, pool, ids, torch.rand(32, generator=drawn), torch.arange(16), ids % 99)
    log.flush()
    (part,) = path.iterdir()
    whole, expected = part.read_bytes(), read_log(path)
    metadata = pyarrow.parquet.read_metadata(part).row_group(0)
    columns = [metadata.column(i) for i in range(metadata.num_columns)]
    end = max(column.data_page_offset + column.total_compressed_size for column in columns)
    chosen = random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        data[chosen.randrange(4, end)] ^= 1 << chosen.randrange(8)
        part.write_bytes(data)
        try:
            assert read_log(path).equals(expected)
        except SiftError as error:
            assert part.name in str(error)
            refused += 1
    assert refused > 100


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SiftError, match=r"pip install 'siftloader\[log\]'"):
        read_log(tmp_path)


# --- counting --------------------------------------------------------------------------------------


SCORES = st.one_of(st.integers(-8, 8).map(float), st.just(-np.inf), st.just(np.nan))
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "step": st.integers(0, 12),
            "pool": st.integers(0, 3),
            "rank": st.integers(0, 1),
            "id": st.sampled_from([0, 1, 2, 2**24, 2**24 + 1, 2**62, 2**62 + 1]),
            "score": SCORES,
            "kept": st.booleans(),
            "labels": st.integers(-1, 6),
            "source": st.integers(-1, 3),
        }
    ),
    min_size=1,
    max_size=40,
)


def mean(rows: list[dict]) -> float | None:
    real = [row["score"] for row in rows if np.isfinite(row["score"])]
    return sum(real) / len(real) if real else None


def groups_of(rows: list[dict], key: str) -> dict[int, list[dict]]:
    found = defaultdict(list)
    for row in rows:
        found[row[key]].append(row)
    return dict(found)


@given(rows=ROWS, top=st.integers(0, 4))
def test_most_and_least_kept_are_those_that_slow_python_finds(rows, top):
    samples = by_sample(table_of(rows))
    expected = [
        {
            "id": number,
            "seen": len(group),
            "kept": sum(row["kept"] for row in group),
            "share": sum(row["kept"] for row in group) / len(group),
            "score": mean(group),
            "labels": sum(row["labels"] for row in group) / len(group),
            "source": max(row["source"] for row in group),
        }
        for number, group in sorted(groups_of(rows, "id").items())
    ]
    found = sorted(samples.to_pylist(), key=lambda row: row["id"])
    assert found == expected
    among = [row for row in expected if row["seen"] > 1] or expected

    def ranked(sign: int) -> list[int]:
        def key(row):
            known = row["score"] is not None
            score = -sign * row["score"] if known else 0
            return -sign * row["share"], -row["seen"], not known, score, row["id"]

        return [row["id"] for row in sorted(among, key=key)][:top]

    most, least = extremes(samples, top)
    assert [row["id"] for row in most] == ranked(1)
    assert [row["id"] for row in least] == ranked(-1)


@given(rows=ROWS, bins=st.integers(1, 6))
def test_groups_by_length_cover_what_is_known_once(rows, bins):
    known = [row for row in rows if row["labels"] >= 0]
    groups = by_length(table_of(rows), bins)
    assert sum(group.rows for group in groups) == len(known)
    assert len(groups) <= bins
    last = -1
    for group in groups:
        low, high = int(group.name.split("..")[0]), int(group.name.split("..")[-1])
        assert last < low <= high
        last = high
        inside = [row for row in known if low <= row["labels"] <= high]
        assert group.rows == len(inside)
        assert group.share == pytest.approx(sum(row["kept"] for row in inside) / len(inside))
        assert group.score == pytest.approx(mean(inside) or np.nan, nan_ok=True) or not mean(
            inside
        )


def test_lengths_are_cut_where_as_many_rows_lie():
    rows = [{"labels": number} for number in range(100)]
    assert [group.rows for group in by_length(table_of(rows), 4)] == [25] * 4
    assert [group.name for group in by_length(table_of(rows), 2)] == ["0..49", "50..99"]
    assert [group.name for group in by_length(table_of([{"labels": 512}] * 9), 8)] == ["512"]


@given(rows=ROWS)
def test_groups_by_source_are_those_that_slow_python_finds(rows):
    groups = by_source(table_of(rows), names=("books", "wiki"))
    names = {-1: "unknown", 0: "books", 1: "wiki", 2: "source 2", 3: "source 3"}
    expected = groups_of(rows, "source")
    assert [group.name for group in groups] == [names[number] for number in sorted(expected)]
    for group, number in zip(groups, sorted(expected), strict=True):
        inside = expected[number]
        assert group.rows == len(inside)
        assert group.share == pytest.approx(sum(row["kept"] for row in inside) / len(inside))


@given(rows=ROWS, bins=st.integers(1, 5))
def test_drift_is_that_of_slow_python(rows, bins):
    rows = sorted(rows, key=lambda row: (row["pool"], row["rank"]))
    for row in rows:  # a pool has one step
        row["step"] = 3 * row["pool"] + row["rank"]
    found = drift(table_of(rows), bins)
    steps = [row["step"] for row in rows]
    low, span = min(steps), max(steps) - min(steps) + 1
    bins = min(bins, span)
    stretches = defaultdict(list)
    for row in rows:
        stretches[(row["step"] - low) * bins // span].append(row)
    assert len(found.rows) == len(stretches)
    for place, number in enumerate(sorted(stretches)):
        inside = stretches[number]
        assert found.first[place] == min(row["step"] for row in inside)
        assert found.last[place] == max(row["step"] for row in inside)
        assert found.rows[place] == len(inside)
        real = [row for row in inside if np.isfinite(row["score"])]
        for kept, quantiles in ((True, found.kept[place]), (False, found.dropped[place])):
            scores = [row["score"] for row in real if row["kept"] == kept]
            expected = np.quantile(scores, (0.1, 0.5, 0.9)) if scores else [np.nan] * 3
            assert quantiles == pytest.approx(expected, nan_ok=True, abs=1e-6)
        lowest = defaultdict(list)
        for row in real:
            if row["kept"]:
                lowest[row["pool"], row["rank"]].append(row["score"])
        expected = np.median([min(scores) for scores in lowest.values()]) if lowest else np.nan
        assert found.threshold[place] == pytest.approx(expected, nan_ok=True)


# --- printing --------------------------------------------------------------------------------------


def test_the_report_says_what_the_rows_say(tmp_path):
    text = report(read_log(logged(tmp_path / "x.parquet")), top=2)
    assert "rows     48 in 6 pools" in text
    assert "steps    0..50" in text
    assert "samples  8, each seen 6.0 times" in text
    assert "kept     50.0%" in text
    most, least = (
        re.findall(rf"{word} kept.*\n.*\n((?:  .*\n)*)", text)[0] for word in ("Most", "Least")
    )
    assert [line.split()[:5] for line in most.splitlines()] == [
        ["7", "6", "6", "100%", "9.500"],
        ["6", "6", "6", "100%", "8.500"],
    ]
    assert [line.split()[:5] for line in least.splitlines()] == [
        ["0", "6", "0", "0%", "2.500"],
        ["1", "6", "0", "0%", "3.500"],
    ]
    assert re.search(r"^  5 +6 +100.0% +6.500$", text, flags=re.MULTILINE)
    assert "Kept share by source: not recorded" in text
    assert re.search(r"^  0\.\.0 +8 +0.300 +1.500 +2.700 +4.000 +4.300", text, flags=re.MULTILINE)


def test_samples_seen_once_are_ranked_and_it_is_said():
    rows = [{"position": k, "id": k, "score": k / 2, "kept": k > 1} for k in range(4)]
    text = report(table_of(rows), top=1)
    assert "Most kept samples (all were seen once)\n" in text
    assert re.search(r"^  3 +1 +1 +100% +1.500 +-$", text, flags=re.MULTILINE)
    assert "by length (labelled positions): not recorded" in text


def test_rows_without_a_score_are_counted_and_spoil_no_mean():
    rows = [{"score": -np.inf}, {"score": np.nan}, {"score": 2.0, "kept": True}]
    text = report(table_of([row | {"position": k} for k, row in enumerate(rows)]), top=1)
    assert "no score 2 rows" in text
    assert re.search(r"^  0 +3 +1 +33% +2.000", text, flags=re.MULTILINE)
    assert "nan" not in text and "inf" not in text


def test_a_log_in_which_nothing_is_finite_is_reported_and_drawn(tmp_path):
    table = table_of([{"score": -np.inf, "position": k} for k in range(4)])
    assert "no score 4 rows" in report(table)
    plot_drift(drift(table, 60), tmp_path / "drift.png")


@pytest.mark.parametrize("pools", [1, 2, 40])
def test_the_plot_is_a_picture(tmp_path, pools):
    table = read_log(logged(tmp_path / "x.parquet", pools))
    plot_drift(drift(table, 60), tmp_path / "drift.png")
    data = (tmp_path / "drift.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Two epochs of the demo's shards, the upper half of the ids kept."""
    path = tmp_path_factory.mktemp("demo") / "x.parquet"
    shards = TokenShards(DEMO, with_ids=True)
    log = SelectionLog(path)
    for epoch in range(2):
        shards.set_epoch(epoch)
        for pool, batch in enumerate(shards.batches(311)):
            ids = batch["id"]
            labels = (batch["labels"] != -100).sum(1)
            log.add(epoch * 8 + pool, epoch * 8 + pool, ids, ids / 1000, ids > 1243, labels)
    log.flush()
    return path


def test_the_command_prints_texts_and_names(demo, tmp_path, capsys):
    png = tmp_path / "drift.png"
    command = ["inspect-selections", str(demo), "--top", "3", "--plot", str(png)]
    assert main([*command, "--shards", str(DEMO)]) == 0
    printed, complaints = capsys.readouterr()
    assert complaints == ""
    assert "samples  2,488, each seen 2.0 times" in printed
    assert re.search(r"^  embedded_pd +4,976 +50.0% ", printed, flags=re.MULTILINE)
    row = r"^  2487 +2 +2 +100% +2.487 +\d+  (.*)$"
    first = re.search(row, printed, flags=re.MULTILINE)
    assert first is not None
    tokens = ShardSet.open(DEMO).read(ShardSet.open(DEMO).shards("train")[3])[567]
    assert tokens_of(ShardSet.open(DEMO), [2487]) == {2487: tokens.tolist()}
    assert len(first[1]) == 120 and first[1].endswith("...")
    assert "[CLS]" not in printed and "[PAD]" not in printed
    assert png.read_bytes().startswith(b"\x89PNG") and f"wrote {png}" in printed
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "add --shards" in printed and "by source: not recorded" in printed


def test_what_is_needed_for_texts_is_said(demo, tmp_path, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    for entry in DEMO.iterdir():
        if entry.name != "tokenizer.json":
            (folder / entry.name).symlink_to(entry)
    command = ["inspect-selections", str(demo), "--top", "1", "--shards", str(folder)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "add --tokenizer demo, or wherever that tokenizer is" in printed
    assert "text\n" not in printed
    assert main([*command, "--tokenizer", str(DEMO)]) == 0
    printed = capsys.readouterr().out
    assert "  text\n" in printed and "note:" not in printed


def test_another_tokenizer_is_noticed(demo, tmp_path, capsys):
    other = tmp_path / "tokenizer.json"
    other.write_text((DEMO / "tokenizer.json").read_text().replace('"the"', '"thx"', 1))
    command = ["inspect-selections", str(demo), "--shards", str(DEMO), "--top", "1"]
    assert main([*command, "--tokenizer", str(other)]) == 0
    assert "is not the tokenizer the shards were made with (demo," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["gone.parquet"], 1, "gone.parquet: no finished part of a selection log here"),
        (["LOG", "--tokenizer", "x"], 2, "--tokenizer needs --shards"),
        (["LOG", "--top", "-1"], 2, "--top must be 0 or more samples, got -1"),
        (["LOG", "--shards", "gone"], 1, "not a finished shard folder"),
        (["LOG", "--plot", "gone/x.png"], 1, "gone/x.png"),
    ],
    ids=str,
)
def test_what_went_wrong_is_one_line_and_a_status(demo, capsys, arguments, status, message):
    command = [str(demo) if word == "LOG" else word for word in arguments]
    assert main(["inspect-selections", *command]) == status
    complaint = capsys.readouterr().err
    assert complaint.startswith("siftloader: ") and complaint.count("\n") == 1
    assert message in complaint


def test_a_log_of_other_data_is_noticed(tmp_path, capsys):
    log = SelectionLog(tmp_path / "x.parquet")
    log.add(0, 0, torch.tensor([0, 10**6]), torch.rand(2), torch.tensor([0]))
    log.flush()
    assert main(["inspect-selections", str(tmp_path / "x.parquet"), "--shards", str(DEMO)]) == 1
    assert "the log names 1000000; give the shards that the run" in capsys.readouterr().err
    with pytest.raises(SiftError, match="the log names -1"):
        sources_of(ShardSet.open(DEMO), np.array([-1]))


def test_without_matplotlib_the_tables_are_there_and_the_plot_says_what_to_install(
    demo, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["inspect-selections", str(demo), "--top", "1"]) == 0
    assert "Scores over steps" in capsys.readouterr().out
    assert main(["inspect-selections", str(demo), "--plot", "drift.png"]) == 1
    assert "pip install 'siftloader[log]'" in capsys.readouterr().err
    assert not Path("drift.png").exists()


def test_help_teaches_with_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect-selections", "--help"])
    assert stopped.value.code == 0
    assert "example: siftloader inspect-selections " in capsys.readouterr().out


def test_the_report_needs_no_torch_and_shards_need_no_pyarrow(demo):
    program = (
        "import sys; sys.modules[sys.argv.pop(1)] = None\n"
        "from siftloader.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for missing, command in (
        ("torch", ["inspect-selections", str(demo), "--shards", str(DEMO)]),
        ("pyarrow", ["inspect", str(DEMO)]),
    ):
        subprocess.run(
            [sys.executable, "-c", program, missing, *command],
            env=os.environ | {"LC_ALL": "C"},
            capture_output=True,
            check=True,
        )
