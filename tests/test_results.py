"""Runs are read as they were logged, kept as they were read, and what is no run is named."""

from __future__ import annotations

import builtins
import json
import math
import random
import re
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from effort import examples
from hypothesis import given, strategies as st

from siftloader.errors import SiftError
from siftloader.results import (
    COLUMNS,
    Evaluation,
    Results,
    Run,
    read_results,
    write_results,
)


def line(step: int, **more: object) -> dict:
    record = {"step": step, "samples": 8 * step, "val_loss": 7.0 - step / 100, "val_accuracy": 0.1}
    return {**record, "train_loss": 7.0, "seconds_training": 0.5 * step, **more}


def log(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- logs ------------------------------------------------------------------------------------------


def test_a_log_without_a_header_is_named_after_its_file_and_folder(tmp_path):
    log(tmp_path / "seeds" / "bert-loss-3.jsonl", line(10), line(20), line(20, final=True))
    (run,) = read_results(tmp_path).runs
    assert run.key == ("seeds", "bert-loss", 3)
    assert run.steps == 20 and run.settings == {}
    assert run.end == Evaluation(
        20, 160, 10.0, 6.8, 0.1, True, {"train_loss": 7.0, "seconds_training": 10.0}
    )
    log(tmp_path / "seeds" / "bert.jsonl", line(1, final=True))
    assert ("seeds", "bert", 0) in [run.key for run in read_results(tmp_path).runs]


def test_a_header_says_it_better(tmp_path):
    header = {"arm": "loss, rank sampled", "seed": 4, "steps": 90, "experiment": "gpt", "lr": 1e-3}
    log(tmp_path / "x-0.jsonl", {"run": header}, line(90, final=True))
    (run,) = read_results(tmp_path).runs
    assert run.key == ("gpt", "loss, rank sampled", 4)
    assert run.steps == 90 and run.settings == {"lr": 1e-3}
    assert read_results(tmp_path / "x-0.jsonl").runs == (run,), "a single file is read, too"


def test_files_beside_the_top_belong_to_an_experiment_named_after_the_folder(tmp_path):
    log(tmp_path / "demo" / "plain.jsonl", line(1))
    assert read_results(tmp_path / "demo").experiments == ["demo"]


def test_what_a_run_is_charged_is_what_it_says_it_is_charged(tmp_path):
    log(tmp_path / "a.jsonl", line(10, seconds=99), line(20, seconds=100.5, final=True))
    (run,) = read_results(tmp_path).runs
    assert [one.seconds for one in run.evaluations] == [99.0, 100.5]
    assert run.evaluations[0].fields["seconds_training"] == 5.0


def test_a_run_under_way_is_kept_and_counted(tmp_path):
    log(tmp_path / "a-0.jsonl", line(1, final=True))
    torn = log(tmp_path / "a-1.jsonl", line(1), line(2))
    torn.write_text(torn.read_text() + '{"step": 3, "samp')
    (tmp_path / "a-2.jsonl").write_text("")
    results = read_results(tmp_path)
    assert [len(run.evaluations) for run in results.runs] == [1, 2, 0]
    assert [run.seed for run in results.unfinished] == [1, 2]
    torn.write_text(json.dumps(line(1)))
    assert len(read_results(torn).runs[0].evaluations) == 1, "only its last newline is missing"


@pytest.mark.parametrize(
    "cut", ['{"step": 3, "nested": {"a": 1}', '{"text": "\u00e9', '{"step": 3}}']
)
def test_half_a_line_is_no_damage_wherever_it_was_cut(tmp_path, cut):
    torn = log(tmp_path / "a-1.jsonl", line(1), line(2))
    torn.write_bytes(torn.read_bytes() + cut.encode()[: len(cut)])
    (run,) = read_results(tmp_path).runs
    assert len(run.evaluations) == 2 and run.end is None


def test_what_lies_beside_is_passed_over(tmp_path):
    log(tmp_path / "a.jsonl", line(1, final=True))
    log(tmp_path / ".cache" / "b.jsonl", {"no": "log"})
    part = tmp_path / "x.parquet" / "rank-00000-part-000000.parquet"
    part.parent.mkdir()
    part.write_bytes(b"a selection log, and none of ours")
    (tmp_path / "table.txt").write_text("-")
    assert len(read_results(tmp_path).runs) == 1


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("{nonsense\n", 1, "not JSON"),
        ("[1]\n", 1, "list where a JSON object is needed"),
        ('{"shard": "train-000000", "num_sequences": 7}\n', 1, "no 'step'"),
        ('{"run": {}}\n{"step": 1}\n', 2, "no 'samples'"),
        ('{"run": 7}\n', 1, "run is 7"),
        ('{"run": {"arm": 7}}\n', 1, "arm is 7, which is no name"),
        ('{"run": {"arm": "a\\nb"}}\n', 1, "arm is 'a\\nb'"),
        ('{"run": {"seed": "0"}}\n', 1, "seed of the run is '0', not a whole number"),
        (json.dumps(line(1, val_loss="low")) + "\n", 1, "val_loss is 'low'"),
        (json.dumps(line(-1)) + "\n", 1, "step is -1"),
        (json.dumps(line(1, final=1)) + "\n", 1, "final is 1"),
        (json.dumps({"step": 1, "samples": 2}) + "\n", 1, "no 'seconds_training'"),
        (json.dumps(line(9)) + "\n\n" + json.dumps(line(8)) + "\n", 3, "step 8 after step 9"),
        (json.dumps(line(9)) + "\n" + json.dumps(line(9)) + "\n", 2, "two runs in one file"),
        (
            json.dumps(line(1, final=True)) + "\n" + json.dumps(line(2)) + "\n",
            2,
            "after the final",
        ),
        ("[" * 100_000 + "\n", 1, "not JSON"),
        (json.dumps(line(1, seconds=math.nan)) + "\n", 1, "seconds is nan"),
        (json.dumps(line(1, seconds_training=-1)) + "\n", 1, "seconds_training is -1.0"),
        (json.dumps(line(1, seconds=math.inf)) + "\n", 1, "seconds is inf"),
        (json.dumps(line(1, val_loss=10**400)) + "\n", 1, "val_loss is 1000"),
        (json.dumps(line(2**63)) + "\n", 1, "step is 9223372036854775808"),
        ('{"run": {"seed": 9223372036854775808}}\n', 1, "seed of the run is 9223372036854775808"),
        ('{"run": {"steps": -1}}\n', 1, "steps of the run is -1"),
        ('{"step": ' + "1" * 5000 + "}\n", 1, "not JSON"),
    ],
)
def test_what_is_no_log_is_named_with_its_line(tmp_path, text, where, message):
    (tmp_path / "odd.jsonl").write_text(text)
    with pytest.raises(SiftError) as caught:
        read_results(tmp_path)
    said = str(caught.value)
    assert f"odd.jsonl, line {where}: " in said and message in said
    assert "move what is no such log out of the folder" in said


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "odd.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(SiftError, match="not UTF-8 at byte 0"):
        read_results(tmp_path)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(SiftError, match="give the folder that the runs wrote their logs to"):
        read_results(tmp_path / "gone")


# --- the same run twice ----------------------------------------------------------------------------


def test_the_same_run_twice_counts_once(tmp_path):
    nan = line(2, val_loss=math.nan, final=True)
    log(tmp_path / "a" / "x-1.jsonl", {"run": {"experiment": "e", "lr": {"b": 1, "a": 2}}}, nan)
    log(tmp_path / "b" / "x-1.jsonl", {"run": {"experiment": "e", "lr": {"a": 2, "b": 1}}}, nan)
    results = read_results(tmp_path)
    assert len(results.runs) == 1
    write_results(results, tmp_path / "all.parquet")
    assert len(read_results(tmp_path).runs) == 1


def test_two_runs_of_one_name_are_told_by_both_files(tmp_path):
    for folder, loss in (("a", 3.0), ("b", 4.0)):
        header = {"run": {"experiment": "e"}}
        log(tmp_path / folder / "x-1.jsonl", header, line(2, val_loss=loss, final=True))
    with pytest.raises(SiftError) as caught:
        read_results(tmp_path)
    for name in ("a/x-1.jsonl", "b/x-1.jsonl", "arm 'x', seed 1", "differ"):
        assert name in str(caught.value)


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("folders", [("a", "b"), ("b", "a")])
def test_a_copy_from_before_the_end_does_not_count(tmp_path, folders, final):
    header = {"run": {"experiment": "e", "arm": "x"}}
    log(tmp_path / folders[0] / "x.jsonl", header, line(1))
    more = [line(2), line(2, final=True)] if final else [line(2)]
    log(tmp_path / folders[1] / "x.jsonl", header, line(1), *more)
    (run,) = read_results(tmp_path).runs
    assert len(run.evaluations) == 2 + final and (run.end is not None) == final


# --- Parquet ---------------------------------------------------------------------------------------

NUMBERS = st.floats(allow_nan=False)
NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=6)
JSONS = st.dictionaries(st.text(max_size=4), NUMBERS | st.text(max_size=4) | st.none(), max_size=2)


@st.composite
def runs(draw) -> list[Run]:
    found = {}
    for _ in range(draw(st.integers(1, 5))):
        steps = sorted(draw(st.sets(st.integers(0, 1000), min_size=1, max_size=4)))
        evaluations = [
            Evaluation(
                step,
                draw(st.integers(0, 99)),
                draw(st.floats(0, 1e18)),
                draw(NUMBERS),
                draw(NUMBERS),
            )
            for step in steps
        ]
        if draw(st.booleans()):
            last = Evaluation(steps[-1], 7, 1.0, 2.0, 0.5, True, draw(JSONS))
            evaluations.append(last)
        key = (draw(NAMES), draw(NAMES), draw(st.integers(0, 3)))
        audited = sorted(draw(st.sets(st.integers(0, 1200), max_size=4)))
        audits = tuple({**draw(JSONS), "step": step} for step in audited)
        settings, steps = draw(JSONS), draw(st.integers(0, 99))
        found[key] = Run(*key, steps, tuple(evaluations), settings, audits=audits)
    return list(found.values())


@examples(40)
@given(runs=runs(), order=st.randoms(use_true_random=False))
def test_results_survive_parquet_and_the_same_ones_are_the_same_bytes(runs, order: random.Random):
    with tempfile.TemporaryDirectory() as folder:
        once, again = Path(folder) / "one.parquet", Path(folder) / "other.parquet"
        write_results(Results(tuple(runs)), once)
        order.shuffle(runs)
        write_results(Results(tuple(runs)), again)
        assert once.read_bytes() == again.read_bytes()
        found = read_results(once)
        assert found.runs == tuple(sorted(runs, key=lambda run: run.key))
        assert read_results(folder) == found, "both files hold the same runs"


def test_the_columns_are_those_that_are_documented(tmp_path):
    write_results(Results(()), tmp_path / "x.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert {field.name: str(field.type) for field in table.schema} == COLUMNS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.parquet"], (
        "no half file is left"
    )


def test_a_file_of_the_columns_without_fields_and_audits_is_read(tmp_path):
    run = Run("e", "a", 0, 1, (Evaluation(1, 2, 3.0, 4.0),), audits=({"step": 1},))
    write_results(Results((run,)), tmp_path / "x")
    table = pyarrow.parquet.read_table(tmp_path / "x").drop_columns(["fields", "audits"])
    pyarrow.parquet.write_table(table, tmp_path / "y.parquet")
    (run,) = read_results(tmp_path / "y.parquet").runs
    assert run.evaluations[0].loss == 4.0 and run.evaluations[0].fields == {} and run.audits == ()


AUDITED = [{"step": 1, "rho": 1.25}, {"step": 2, "rho": None}, {"step": 5, "rho": 1.5}]


def test_a_log_may_have_audits_between_its_evaluations(tmp_path):
    one, two = line(2), line(4, final=True)
    order = [{"audit": AUDITED[0]}, {"audit": AUDITED[1]}, one, {"audit": AUDITED[2]}, two]
    file = log(tmp_path / "loss-0.jsonl", *order)
    (run,) = read_results(file).runs
    assert run.audits == tuple(AUDITED) and [one.step for one in run.evaluations] == [2, 4]
    write_results(Results((run,)), tmp_path / "x.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    rows = [json.loads(text) for text in table["audits"].to_pylist()]
    assert rows == [AUDITED[:2], AUDITED[2:]], "each once: in the next row, or in the last"
    assert read_results(tmp_path / "x.parquet").runs == (run,)


@pytest.mark.parametrize(
    ("audits", "said"),
    [
        ([{"rho": 1.0}], "line 1: an audit without a step"),
        ([{"step": -1}], "line 1: an audit without a step"),
        ([{"step": True}], "line 1: an audit without a step"),
        ([7], "line 1: an audit without a step"),
        ([{"step": 3}, {"step": 3}], "line 2: audit 3 after audit 3: two runs in one file"),
    ],
)
def test_audits_that_no_run_can_have_are_named(tmp_path, audits, said):
    file = log(tmp_path / "loss-0.jsonl", *({"audit": each} for each in audits), line(4))
    with pytest.raises(SiftError, match=said):
        read_results(file)
    if said.startswith("line 1"):
        # As a column of a file: in the first row.
        run = Run("e", "a", 0, 1, (Evaluation(1, 2, 3.0, 4.0),), audits=({"step": 1},))
        write_results(Results((run,)), tmp_path / "x.parquet")
        table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
        column = pyarrow.array([json.dumps(audits)])
        table = table.set_column(table.column_names.index("audits"), "audits", column)
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(SiftError, match=said):
            read_results(tmp_path / "x.parquet")


def rewritten(table: pyarrow.Table, **kinds: pyarrow.DataType) -> pyarrow.Table:
    for name, kind in kinds.items():
        column = table.column_names.index(name)
        table = table.set_column(column, name, table[name].cast(kind))
    return table


def test_a_file_that_another_program_rewrote_is_read(tmp_path):
    """Categories, smaller and larger integers, no NaN but nulls, more columns, another order."""
    ends = (Evaluation(1, 2, 3.0, 4.5), Evaluation(1, 2, 3.0, math.nan, 0.5, True))
    results = Results((Run("e", "a", 0, 1, ends, {"lr": 1}), Run("e", "b", 7, 1, ends)))
    write_results(results, tmp_path / "x")
    table = pyarrow.parquet.read_table(tmp_path / "x")
    odd = rewritten(
        table,
        experiment=pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        arm=pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
        settings=pyarrow.large_string(),
        seed=pyarrow.int8(),
        step=pyarrow.uint64(),
        samples=pyarrow.int32(),
        seconds=pyarrow.float32(),
    )
    for name in ("loss", "accuracy"):  # as pandas writes them
        values = [None if math.isnan(one) else one for one in table[name].to_pylist()]
        odd = odd.set_column(odd.column_names.index(name), name, [values])
    odd = odd.append_column("more", [[1] * len(odd)]).select(sorted([*odd.column_names, "more"]))
    pyarrow.parquet.write_table(odd, tmp_path / "y.parquet")
    found = read_results(tmp_path / "y.parquet")
    assert [run.key for run in found.runs] == [("e", "a", 0), ("e", "b", 7)]
    assert found.runs[0].settings == {"lr": 1}
    write_results(found, tmp_path / "z")
    assert (tmp_path / "z").read_bytes() == (tmp_path / "x").read_bytes()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("seed", pyarrow.string(), "seed is string, needed is int64"),
        ("steps", pyarrow.float64(), "steps is double, needed is int64"),
        ("arm", pyarrow.binary(), "arm is binary, needed is string"),
        ("final", pyarrow.int8(), "final is int8, needed is bool"),
        ("loss", None, "no column loss"),
    ],
)
def test_columns_that_are_not_ours_are_named(tmp_path, name, kind, message):
    write_results(Results((Run("e", "a", 0, 1, (Evaluation(1, 2, 3.0, 4.0),)),)), tmp_path / "x")
    table = pyarrow.parquet.read_table(tmp_path / "x")
    table = table.drop_columns(name) if kind is None else rewritten(table, **{name: kind})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SiftError, match=rf"x\.parquet: not a file of results.*{message}"):
        read_results(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seconds", math.nan, "seconds is nan"),
        ("seconds", None, "a row with a missing value"),
        ("step", -1, "step is -1"),
        ("samples", 2**63, "x.parquet: not a file of results"),
        ("seed", None, "a row with a missing value"),
        ("arm", "", "arm is '', which is no name"),
        ("settings", "[", "not JSON"),
    ],
)
def test_rows_that_no_run_can_have_are_named(tmp_path, name, value, message):
    write_results(Results((Run("e", "a", 0, 1, (Evaluation(1, 2, 3.0, 4.0),)),)), tmp_path / "x")
    table = pyarrow.parquet.read_table(tmp_path / "x")
    kind = pyarrow.uint64() if value == 2**63 else table[name].type
    column = pyarrow.array([value], kind)
    table = table.set_column(table.column_names.index(name), name, column)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SiftError, match=re.escape(message)):
        read_results(tmp_path / "x.parquet")


@pytest.mark.parametrize("data", [b"", b"PAR1PAR1", b"PAR1" + 40 * b"\xff" + b"PAR1"])
def test_files_of_nothing_and_noise_are_named(tmp_path, data):
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(SiftError, match=r"x\.parquet: not a file of results"):
        read_results(tmp_path)


def test_a_foreign_or_damaged_parquet_file_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "loss": [2.0]}), tmp_path / "x.parquet")
    with pytest.raises(
        SiftError, match=r"x\.parquet: not a file of results.*no column experiment"
    ):
        read_results(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SiftError, match=r"x\.parquet: not a file of results.*damaged"):
        read_results(tmp_path)


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def blocked(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(SiftError, match=r"siftloader\[log\]"):
        write_results(Results(()), tmp_path / "x.parquet")
    log(tmp_path / "a.jsonl", line(1, final=True))
    assert len(read_results(tmp_path).runs) == 1, "logs need none"
