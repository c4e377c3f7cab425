"""FAULTS.md keeps its word: every row has a test that exists, or says why there is none."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parent
TABLE = (HERE / "FAULTS.md").read_text()
PARTS = {  # how many faults each is known by, at least
    "Shard content": 24,
    "Data set": 18,
    "Resume and ranks": 29,
    "Processes and disks": 28,
    "Preparation": 24,
}
NAMED = re.compile(r"`([\w.]+\.py)::(\w+)`")


def rows_of(text: str) -> dict[str, list[list[str]]]:
    """By part: the cells of every row of its table."""
    parts = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, rest = part.partition("\n")
        lines = [line for line in rest.splitlines() if line.startswith("|")]
        assert lines[:2] == ["| fault | what we do | test |", "|---|---|---|"], title
        parts[title] = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]
        ]
    return parts


@lru_cache
def functions_of(name: str) -> frozenset[str]:
    """The test functions of a file, read, not imported."""
    tree = ast.parse((HERE / name).read_text())
    return frozenset(
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def missing(text: str) -> list[str]:
    """Tests that are named and do not exist."""
    return [
        f"{file}::{test}"
        for file, test in NAMED.findall(text)
        if not (HERE / file).exists() or test not in functions_of(file)
    ]


def untested(text: str) -> list[str]:
    """Rows with neither a test nor the reason why there is none."""
    rows = [row for part in rows_of(text).values() for row in part]
    return [
        " | ".join(row)
        for row in rows
        if len(row) != 3
        or not row[0]
        or not row[1]
        or not (NAMED.search(row[2]) or row[1].startswith("gap: "))
        or NAMED.sub("", row[2]).strip(" ,")
    ]


def test_every_test_that_is_named_exists():
    assert missing(TABLE) == []


def test_every_fault_has_a_test_or_a_reason():
    assert untested(TABLE) == []


def test_the_table_has_all_its_parts_and_no_fault_twice():
    parts = rows_of(TABLE)
    assert list(parts) == list(PARTS)
    assert {part: len(rows) for part, rows in parts.items() if len(rows) < PARTS[part]} == {}
    faults = [row[0] for rows in parts.values() for row in rows]
    assert len(set(faults)) == len(faults)


@pytest.mark.parametrize(
    "row",
    [
        "| a fault | refused | |",
        "| a fault | refused | by hand |",
        "| a fault | | `test_fuzz.py::test_a_reader_that_trusts_the_disk_is_caught` |",
        "| a fault | refused | `test_fuzz.py::test_a_reader_that_trusts_the_disk_is_caught` mostly |",
    ],
)
def test_a_row_without_a_test_is_found(row):
    head = "## Part\n| fault | what we do | test |\n|---|---|---|\n"
    assert untested(head + row + "\n") != []


@pytest.mark.parametrize("name", ["test_fuzz.py::test_nothing", "test_nowhere.py::test_a"])
def test_a_test_that_does_not_exist_is_found(name):
    assert missing(f"`{name}`") == [name]


def test_what_the_fuzz_draws_is_what_the_table_says():
    """The number of kinds of faults stands in the table too."""
    source = ast.parse((HERE.parent / "tools" / "fuzz_shards.py").read_text())
    kinds = [
        len(node.value.keys)
        for node in source.body
        if isinstance(node, ast.AugAssign) and getattr(node.target, "id", "") == "KINDS"
    ]
    assert f"| {kinds[0]} kinds of damage by chance" in TABLE
