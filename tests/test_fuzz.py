"""Law 8: no fault of a shard lets a wrong sample through. The faults are those of tools/fuzz_shards.py."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from effort import FACTOR


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import fuzz_shards
from fuzz_shards import COUNTS, KINDS, Batches, Fault, Sound, draw, inflicted, read, read_stock

from siftloader.errors import ShardError
from siftloader.opened import Budget
from siftloader.shards import verify
from siftloader.stream import TokenShards


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Sound]:
    return fuzz_shards.write_sets(tmp_path_factory.mktemp("fuzz"))


def stream(folder: Path, rows: int = 4, **options: Any) -> Batches:
    return TokenShards(folder, with_ids=True, **options).batches(rows)


def survive(sets: list[Sound], count: int, seed: int, **options: int) -> None:
    """Every fault that changes a byte is found, in its shard, after right rows alone."""
    wrong, found = [], Counter[str]()
    for number in range(count):
        sound, fault = draw(sets, number, seed)
        with inflicted(sound, fault) as changed:
            reading = read(sound, fault, partial(stream, sound.folder, 1 + number % 7, **options))
        found[fault.kind] += changed
        if reading.verdict != ("found" if changed else "harmless"):
            name = f"draw(sets, {number}, seed={seed}): {fault.kind} in {sound.folder.name}"
            wrong.append(f"{name}: {reading.verdict}, {reading.detail}")
    assert not wrong, "\n".join([f"{len(wrong)} of {count} faults:", *wrong[:20]])
    assert all(found[kind] for kind in KINDS), "a kind of fault that changes nothing tests nothing"


def test_no_fault_lets_a_wrong_sample_through(sets):
    survive(sets, 360 * FACTOR, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 1}, {"window": 2, "lanes": 3}, {"epoch_samples": sum(COUNTS)}],
    ids=str,
)
def test_thousands_of_faults_let_no_wrong_sample_through(sets, options):
    survive(sets, 3_000 * FACTOR, seed=len(str(options)), **options)


def test_verify_finds_every_fault_too(sets):
    """It names one of the tars that changed."""
    for number in range(3 * len(KINDS)):
        sound, fault = draw(sets, number, seed=6)
        with inflicted(sound, fault) as changed:
            if not changed:
                assert [shard.shard for shard in verify(sound.folder)] == list(sound.tars)
                continue
            with pytest.raises(ShardError, match="|".join(fault.tars)) as caught:
                list(verify(sound.folder))
        assert caught.value.shard in fault.tars, (number, fault.kind)


def strike(sound: Sound, fault: Fault, in_place: bool) -> None:
    """The fault happens now: over the bytes of the same file, or as another file under its name."""
    for stem, data in fault.tars.items():
        path = sound.folder / f"{stem}.tar"
        if data is None:
            path.unlink()
        elif in_place and len(data) == path.stat().st_size:  # cutting off a mapped file is SIGBUS
            with path.open("r+b") as file:
                file.write(data)
        else:
            path.with_suffix(".new").write_bytes(data)
            path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("in_place", [False, True], ids=["replaced", "overwritten"])
def test_no_fault_that_happens_while_a_stream_reads_lets_a_wrong_sample_through(
    sets, in_place, monkeypatch
):
    """Blocks of two rows, so that most of them are read after the fault."""
    verdicts = Counter[str]()
    for number in range(5 * len(KINDS)):
        sound, fault = draw(sets, number, seed=8)
        monkeypatch.setattr("siftloader.stream.BLOCK_TOKENS", 2 * sound.layout.seq_len)
        before = Fault(number, fault.kind, {stem: sound.tars[stem] for stem in fault.tars})

        def meanwhile(sound: Sound = sound, fault: Fault = fault) -> Batches:
            for count, batch in enumerate(stream(sound.folder, 1, window=1)):
                yield batch
                if count == fault.number % 15:
                    strike(sound, fault, in_place)

        with inflicted(sound, before):
            for stem in fault.tars:  # as if written long ago: some clocks tick every 4 ms only
                os.utime(sound.folder / f"{stem}.tar", (0, 0))
            reading = read(sound, fault, meanwhile)
        assert reading.verdict in ("found", "harmless"), (number, fault.kind, reading.detail)
        verdicts[reading.verdict] += 1
    assert verdicts["found"] > 40, verdicts


def test_what_is_passed_over_is_made_up_for_by_right_samples(sets):
    """With a budget large enough: as many rows as ever, each the one of its id, or an error."""
    verdicts = Counter[str]()
    for number in range(5 * len(KINDS)):
        sound, fault = draw(sets, number, seed=9)
        with inflicted(sound, fault) as changed, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            reading = read(
                sound, fault, partial(stream, sound.folder, on_error=Budget(100)), again=True
            )
        assert reading.verdict != "WRONG", (number, fault.kind, reading.detail)
        assert changed == bool(told or reading.verdict == "found"), (number, fault.kind)
        verdicts[reading.verdict] += 1
    assert verdicts["passed over"] > 100, verdicts


def test_a_reader_that_trusts_the_disk_is_caught(sets):
    """The fuzz itself can fail: without verification it sees wrong rows, and they are named."""
    kinds = Counter[str]()
    for number in range(10 * len(KINDS)):
        sound, fault = draw(sets, number, seed=0)
        trusting = TokenShards(sound.folder, with_ids=True, verify=False)
        with inflicted(sound, fault):
            kinds[fault.kind] += (
                read(sound, fault, partial(trusting.batches, 3)).verdict == "WRONG"
            )
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
    last = [line for line in out.splitlines() if line.startswith("all ")][-1].split()
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
