"""What training runs found: read from their logs, kept in one Parquet file.

    results = read_results("runs/compare")                # every *.jsonl and *.parquet under it
    results.experiments                                   # names, sorted
    write_results(results, "runs/compare/results.parquet")

A log is JSON lines, as examples/pretrain_bert.py writes them: maybe a first line ``{"run": {"arm": "loss",
"seed": 0, ...}}``, then a line per evaluation, the last with ``"final": true``; between them maybe lines
``{"audit": {"step": 500, "rho": 1.3, ...}}``, what ``loader.audits`` holds. What names a run is
(experiment, arm, seed). Needs numpy, and pyarrow for Parquet.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from siftloader.errors import SiftError
from siftloader.shards import write_atomically


COLUMNS = {
    "experiment": "string",
    "arm": "string",
    "seed": "int64",
    "step": "int64",
    "steps": "int64",  # planned
    "samples": "int64",  # backpropagated
    "seconds": "double",  # what the run is charged
    "loss": "double",  # held out, nats
    "accuracy": "double",  # held out, nan where it was not measured
    "final": "bool",
    "settings": "string",  # JSON: everything else the header says
    "fields": "string",  # JSON: everything else the evaluation says; may be missing
    "audits": "string",  # JSON: those since the row before, and in a run's last row all others; may be missing
}
MAY_BE_MISSING = {"fields": "{}", "audits": "[]"}  # of files from before there were such columns
# A selection log is a folder of these; it lies beside the runs and is none.
SELECTIONS = re.compile(r"rank-\d{5,}-part-\d{6,}\.parquet")
LARGEST = (1 << 63) - 1  # of a whole number in Parquet
_SEEDED = re.compile(r"(.+)-(\d+)")

RunKey: TypeAlias = tuple[str, str, int]


@dataclass(frozen=True)
class Evaluation:
    """What was measured on held-out text at one moment of a run.

    ``seconds`` are those the run is charged, ``fields`` whatever else the log says of this moment.
    """

    step: int
    samples: int
    seconds: float
    loss: float
    accuracy: float = math.nan
    final: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run: an arm of an experiment under one seed. ``steps`` is what it set out to do.

    ``audits`` are those of its loader, by step: ``{"step": 500, "population_loss": 3.1, "rho": 1.3, ...}``.
    """

    experiment: str
    arm: str
    seed: int
    steps: int
    evaluations: tuple[Evaluation, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = field(default="", compare=False)
    audits: tuple[Mapping[str, Any], ...] = ()

    @property
    def key(self) -> RunKey:
        """What a run is called: (experiment, arm, seed)."""
        return self.experiment, self.arm, self.seed

    @property
    def end(self) -> Evaluation | None:
        """The final evaluation; None of a run that has not finished."""
        last = self.evaluations[-1] if self.evaluations else None
        return last if last is not None and last.final else None


@dataclass(frozen=True)
class Results:
    """Runs, each once, sorted by (experiment, arm, seed)."""

    runs: tuple[Run, ...]

    @property
    def experiments(self) -> list[str]:
        """The names of the experiments, sorted."""
        return sorted({run.experiment for run in self.runs})

    @property
    def unfinished(self) -> list[Run]:
        """Runs without an end: under way, or killed. No comparison counts them."""
        return [run for run in self.runs if run.end is None]

    def of(self, experiment: str) -> list[Run]:
        """The runs of one experiment, sorted."""
        found = (run for run in self.runs if run.experiment == experiment)
        return sorted(found, key=lambda run: run.key)


def read_results(folder: str | os.PathLike[str]) -> Results:
    """Every run in the logs (``*.jsonl``) and Parquet files under ``folder``; or in one such file.

    Where a header does not say so, the experiment is the folder a log lies in, the arm its stem, and the
    seed the number after the last ``-`` of that. Selection logs and hidden files are passed over.

    A run may be there twice if both say the same; of an unfinished run and its finished self the latter
    counts. Raises SiftError where there is no run, where a file is damaged or none of ours (naming file
    and line), and where two files contradict each other.
    """
    root = Path(folder)
    files = [root] if root.is_file() else sorted(_files(root))
    if not files:
        raise SiftError(
            f"{root}: no log (*.jsonl) or results (*.parquet) here; give the folder that the runs wrote "
            f"their logs to, as `--log` of examples/pretrain_bert.py says"
        )
    found: dict[RunKey, Run] = {}
    for file in files:
        runs = [_read_log(file, root)] if file.suffix == ".jsonl" else _read_parquet(file)
        for run in runs:
            found[run.key] = _one_of(found[run.key], run) if run.key in found else run
    return Results(tuple(found[key] for key in sorted(found)))


def _files(root: Path) -> Iterable[Path]:
    for path in root.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or path.suffix not in (".jsonl", ".parquet") or SELECTIONS.fullmatch(path.name):
            continue
        if path.is_file():  # a selection log is a folder that may well be called x.parquet
            yield path


def _one_of(one: Run, other: Run) -> Run:
    if _content(one) == _content(other):
        return one
    if one.end is None or other.end is None:  # a copy made while it ran, or beside a later start
        return max(one, other, key=lambda run: (run.end is not None, len(run.evaluations)))
    raise SiftError(
        f"{one.source} and {other.source} both hold arm {one.arm!r}, seed {one.seed} of experiment "
        f"{one.experiment!r}, and differ; move one of them out of the folder, or name their experiments apart"
    )


def _content(run: Run) -> str:
    # As text, in which nan equals nan.
    rows = [_row(one) for one in run.evaluations]
    return json.dumps([run.steps, run.settings, rows, run.audits], sort_keys=True)


# ---- logs


def _read_log(file: Path, root: Path) -> Run:
    *lines, torn = file.read_bytes().split(b"\n")
    # Half a line at the end was being written when we looked, or when the run was killed.
    if _is_whole(torn):
        lines.append(torn)
    records = [
        (number, _object(file, number, line))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    header: dict[str, Any] = {}
    if records and "run" in records[0][1]:
        header = dict(_needed(file, 1, records.pop(0)[1], "run", dict))
    evaluations: list[Evaluation] = []
    audits: list[dict[str, Any]] = []
    for number, record in records:
        if record.keys() == {"audit"}:
            audits.append(_audit(file, number, record["audit"], audits))
            continue
        found = _evaluation(file, number, record)
        if evaluations:
            _check_order(file, number, evaluations[-1], found)
        evaluations.append(found)

    named = _SEEDED.fullmatch(file.stem)
    arm, seed = (named[1], int(named[2])) if named else (file.stem, 0)
    inside = file.parent.relative_to(root).as_posix() if file != root else "."
    experiment = file.resolve().parent.name if inside == "." else inside
    last = evaluations[-1].step if evaluations else 0
    experiment = _named(file, header.pop("experiment", experiment), "experiment")
    arm = _named(file, header.pop("arm", arm), "arm")
    seed, steps = header.pop("seed", seed), header.pop("steps", last)
    for name, number, least in (("seed", seed, -LARGEST), ("steps", steps, 0)):
        if type(number) is not int or not least <= number <= LARGEST:
            problem = f"{name} of the run is {number!r}, not a whole number from {least} on"
            raise _foreign(file, 1, f"{problem} of at most 63 bits")
    run = Run(experiment, arm, seed, steps, tuple(evaluations), header, str(file))
    return replace(run, audits=tuple(audits))


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _object(file: Path, number: int, line: bytes | str) -> dict[str, Any]:
    found = _decoded(file, number, line)
    if not isinstance(found, dict):
        raise _foreign(file, number, f"{type(found).__name__} where a JSON object is needed")
    return found


def _list(file: Path, number: int, text: str) -> list[Any]:
    found = _decoded(file, number, text)
    if not isinstance(found, list):
        raise _foreign(file, number, f"{type(found).__name__} where a JSON list is needed")
    return found


def _decoded(file: Path, number: int, line: bytes | str) -> Any:
    try:
        return json.loads(line if isinstance(line, str) else line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _foreign(file, number, f"not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise _foreign(file, number, f"not JSON ({error})") from error


def _evaluation(file: Path, number: int, record: dict[str, Any]) -> Evaluation:
    rest = dict(record)
    step, samples = (_needed(file, number, rest, name, int) for name in ("step", "samples"))
    charged = "seconds" if "seconds" in rest else "seconds_training"
    seconds = _needed(file, number, rest, charged, float)
    _check_amount(file, number, charged, seconds)
    if charged == "seconds_training":
        rest["seconds_training"] = seconds  # it says more than what is charged
    loss = _needed(file, number, rest, "val_loss", float)
    accuracy = math.nan
    if "val_accuracy" in rest:
        accuracy = _needed(file, number, rest, "val_accuracy", float)
    final = _needed(file, number, {"final": False, **rest}, "final", bool)
    rest.pop("final", None)
    return Evaluation(step, samples, seconds, loss, accuracy, final, rest)


def _audit(file: Path, number: int, found: Any, before: list[dict[str, Any]]) -> dict[str, Any]:
    step = found.get("step") if isinstance(found, dict) else None
    if type(step) is not int or not 0 <= step <= LARGEST:
        raise _foreign(file, number, "an audit without a step")
    if before and step <= before[-1]["step"]:
        raise _foreign(
            file, number, f"audit {step} after audit {before[-1]['step']}: two runs in one file"
        )
    return dict(found)


def _needed(file: Path, number: int, record: dict[str, Any], name: str, kind: type) -> Any:
    """Take a field out of the record; whole numbers are real ones too."""
    if name not in record:
        raise _foreign(file, number, f"no {name!r}")
    value: Any = record.pop(name)
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if type(value) is not kind:
        said = f"{value!r}"
        raise _foreign(file, number, f"{name} is {said[:40]}{'...' * (len(said) > 40)}")
    if isinstance(value, int) and kind is int:
        _check_amount(file, number, name, value)
    return value


def _check_amount(file: Path, number: int, name: str, value: float) -> None:
    if not 0 <= value <= LARGEST:  # nan is not, either
        raise _foreign(file, number, f"{name} is {value}")


def _check_order(file: Path, number: int, before: Evaluation, after: Evaluation) -> None:
    if before.final:
        raise _foreign(file, number, "an evaluation after the final one: two runs in one file")
    if after.step < before.step or (after.step == before.step and not after.final):
        raise _foreign(
            file, number, f"step {after.step} after step {before.step}: two runs in one file"
        )


def _named(file: Path, name: Any, what: str) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise _foreign(file, 1, f"{what} is {name!r}, which is no name")
    return name


def _foreign(file: Path, number: int, problem: str) -> SiftError:
    return SiftError(
        f"{file}, line {number}: {problem}; a log of training has a JSON object per evaluation (step, "
        f"samples, val_loss, val_accuracy, seconds or seconds_training); move what is no such log out of "
        f"the folder, or run again what is damaged"
    )


# ---- Parquet


def write_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Write one row per evaluation, sorted by (experiment, arm, seed, step, final); all or nothing.

    The same results give the same bytes. A run without any evaluation leaves no row.
    """
    arrow, parquet = _pyarrow()
    rows = [
        (
            *run.key,
            run.steps,
            _json(run.settings),
            *_row(evaluation),
            json.dumps(audits, sort_keys=True),
        )
        for run in sorted(results.runs, key=lambda run: run.key)
        for evaluation, audits in _audited(run)
    ]
    order = ("experiment", "arm", "seed", "steps", "settings", *_ROW, "audits")
    columns = dict(zip(order, zip(*rows, strict=True), strict=True)) if rows else {}
    table = arrow.table(
        {
            name: arrow.array(columns.get(name, ()), arrow.type_for_alias(kind))
            for name, kind in COLUMNS.items()
        }
    )
    whole = io.BytesIO()
    parquet.write_table(table, whole, compression="zstd")
    write_atomically(Path(path), whole.getvalue())


def _audited(run: Run) -> Iterable[tuple[Evaluation, list[Mapping[str, Any]]]]:
    # Every audit once: with the evaluation that follows it, or else with the last.
    left = [*run.audits]
    evaluations = sorted(run.evaluations, key=lambda one: (one.step, one.final))
    for number, one in enumerate(evaluations, 1):
        last = number == len(evaluations)
        here = [audit for audit in left if last or audit["step"] <= one.step]
        left = left[len(here) :]
        yield one, here


_ROW = ("step", "samples", "seconds", "loss", "accuracy", "final", "fields")


def _row(one: Evaluation) -> tuple[Any, ...]:
    head = (one.step, one.samples, one.seconds, one.loss, one.accuracy, one.final)
    return (*head, _json(one.fields))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)


def _read_parquet(file: Path) -> list[Run]:
    arrow, parquet = _pyarrow()
    try:
        there = set(parquet.read_schema(file).names)
        for name in COLUMNS:
            if name not in there and name not in MAY_BE_MISSING:
                raise ValueError(f"no column {name}; needed are {', '.join(COLUMNS)}")
        names = [name for name in COLUMNS if name in there]
        table = parquet.read_table(file, columns=names, partitioning=None)
        columns = [_values(arrow, table[name], name) for name in names]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise SiftError(
            f"{file}: not a file of results that write_results wrote, or damaged ({error}); move it out of "
            f"the folder"
        ) from error
    grouped: dict[RunKey, list[tuple[int, dict[str, Any]]]] = {}
    for number, row in enumerate(rows, 1):
        if None in row.values():
            raise _foreign(file, number, "a row with a missing value")
        key = (_named(file, row["experiment"], "experiment"), _named(file, row["arm"], "arm"))
        grouped.setdefault((*key, row["seed"]), []).append((number, row))
    return [_run(file, key, numbered) for key, numbered in grouped.items()]


def _values(arrow: Any, column: Any, name: str) -> list[Any]:
    """A column as ours, whatever wrote it: categories, other widths, and null for nan."""
    types, needed, found = arrow.types, COLUMNS[name], column.type
    if types.is_dictionary(found):
        found = found.value_type
    fits = {
        "string": types.is_string(found) or types.is_large_string(found),
        "int64": types.is_integer(found),
        "double": types.is_floating(found) or types.is_integer(found),
        "bool": types.is_boolean(found),
    }
    if not fits[needed]:
        raise ValueError(f"{name} is {found}, needed is {needed}")
    values: list[Any] = column.cast(found).cast(arrow.type_for_alias(needed)).to_pylist()
    if name in ("loss", "accuracy"):
        return [math.nan if value is None else value for value in values]
    return values


def _run(file: Path, key: RunKey, numbered: list[tuple[int, dict[str, Any]]]) -> Run:
    evaluations: list[Evaluation] = []
    audits: list[dict[str, Any]] = []
    first = numbered[0][1]
    for number, row in numbered:
        if (row["steps"], row["settings"]) != (first["steps"], first["settings"]):
            raise _foreign(file, number, "other steps or settings than its run had before")
        texts = {name: row.get(name, none) for name, none in MAY_BE_MISSING.items()}
        fields = _object(file, number, texts["fields"])
        for each in _list(file, number, texts["audits"]):
            audits.append(_audit(file, number, each, audits))
        for name in ("steps", "step", "samples", "seconds"):
            _check_amount(file, number, name, row[name])
        step, samples, seconds, loss, accuracy, final = (row[name] for name in _ROW[:-1])
        found = Evaluation(step, samples, seconds, loss, accuracy, final, fields)
        if evaluations:
            _check_order(file, number, evaluations[-1], found)
        evaluations.append(found)
    settings = _object(file, numbered[0][0], first["settings"])
    run = Run(*key, first["steps"], tuple(evaluations), settings, str(file))
    return replace(run, audits=tuple(audits))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SiftError(
            "results in Parquet need the `pyarrow` package; pip install 'siftloader[log]'"
        ) from error
    return pyarrow, pyarrow.parquet
