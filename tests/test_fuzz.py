"""Law 8: no fault of a shard lets a wrong sample through. The faults are those of tools/fuzz_shards.py."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from effort import FACTOR


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import fuzz_shards
from fuzz_shards import KINDS, Sound, draw, inflicted, read, read_stock


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Sound]:
    return fuzz_shards.write_sets(tmp_path_factory.mktemp("fuzz"))


def survive(sets: list[Sound], count: int, seed: int) -> None:
    """Every fault that changes a byte is found, in its shard, after right rows alone."""
    wrong, found = [], Counter[str]()
    for number in range(count):
        sound, fault = draw(sets, number, seed)
        with inflicted(sound, fault) as changed:
            reading = read(sound, fault)
        found[fault.kind] += changed
        if reading.verdict != ("found" if changed else "harmless"):
            name = f"draw(sets, {number}, seed={seed}): {fault.kind} in {sound.folder.name}"
            wrong.append(f"{name}: {reading.verdict}, {reading.detail}")
    assert not wrong, "\n".join([f"{len(wrong)} of {count} faults:", *wrong[:20]])
    assert all(found[kind] for kind in KINDS), "a kind of fault that changes nothing tests nothing"


def test_no_fault_lets_a_wrong_sample_through(sets):
    survive(sets, 360 * FACTOR, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_faults_let_no_wrong_sample_through(sets, seed):
    survive(sets, 3_000 * FACTOR, seed)


def test_a_reader_that_trusts_the_disk_is_caught(sets):
    """The fuzz itself can fail: without verification it sees wrong rows, and they are named."""
    kinds = Counter[str]()
    for number in range(10 * len(KINDS)):
        sound, fault = draw(sets, number, seed=0)
        with inflicted(sound, fault):
            kinds[fault.kind] += read(sound, fault, verify=False).verdict == "WRONG"
    for kind in (
        "byte flipped: token ids",
        "samples exchanged",
        "two tars exchanged",
        "all zeros",
    ):
        assert kinds[kind], kind


def test_the_folder_is_sound_again_after_a_fault(sets):
    for number in range(len(KINDS)):
        sound, fault = draw(sets, number, seed=5)
        with inflicted(sound, fault):
            pass
        assert read(sound, fault).verdict == "harmless"


STOCK = {  # what webdataset makes of a fault, always
    "byte flipped: token ids": {"wrong"},
    "byte flipped: closing zeros": {"harmless"},
    "cut off: between samples": {"short"},
    "cut off: in the token ids": {"error"},
    "tar of another data set": {"wrong"},
    "two tars exchanged": {"harmless"},  # all its samples came, in another order
    "sample removed": {"short"},
    "packed again by tar": {"harmless"},
    "empty file": {"error"},
    "no file": {"error"},
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_table_counts_what_stock_webdataset_does(sets):
    pytest.importorskip("webdataset")
    seen: dict[str, set[str]] = {}
    for number in range(3 * len(KINDS)):
        sound, fault = draw(sets, number, seed=3)
        if fault.kind in STOCK:
            with inflicted(sound, fault):
                seen.setdefault(fault.kind, set()).add(read_stock(sound, fault).verdict)
    assert seen == STOCK
    sound, fault = draw(sets, 0, seed=3)
    assert read_stock(sound, fault).verdict == "harmless", "sound shards give all samples"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_tool_prints_a_table_and_its_machine(monkeypatch, capsys):
    count = 2 * len(KINDS)
    monkeypatch.setattr("sys.argv", ["fuzz_shards.py", "--faults", str(count), "--no-webdataset"])
    fuzz_shards.main()
    out = capsys.readouterr().out
    assert f"{count} faults, seed 0" in out
    last = next(line for line in out.splitlines() if line.startswith("all ")).split()
    assert last[-1] == "-", "nothing is WRONG"
    assert sum(int(number) for number in last[1:-1] if number != "-") == count
    assert all(kind in out for kind in KINDS)


def test_a_fault_can_be_repeated_alone(monkeypatch, capsys):
    number = list(KINDS).index("two tars exchanged")
    monkeypatch.setattr(
        "sys.argv", ["fuzz_shards.py", "--only", str(number), "--no-webdataset", "--seed", "4"]
    )
    fuzz_shards.main()
    assert f"fault {number} (two tars exchanged, " in capsys.readouterr().out
