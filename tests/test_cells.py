"""All samples, in the order of their keys, whatever the cells were and however often they were cut off."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from effort import examples
from hypothesis import given, strategies as st

import siftloader.cells
from siftloader.cells import Shuffle, count_keys, plan_cells, shards_per_cell, write_cell
from siftloader.errors import CorpusError
from siftloader.runs import SPLITS, Run, RunFile, Samples, sample_keys, write_run
from siftloader.shards import Layout, Shard


T, V = 6, 1000


def make_runs(
    folder: Path, sizes: list[tuple[int, int]], labels: bool = False, seed: int = 0
) -> Shuffle:
    """A run for each (train, val) count; every token tells which sample it is of."""
    work, names, first = folder / ".work", [], 0
    work.mkdir(parents=True)
    for number, counts in enumerate(sizes):
        samples = {}
        for split, count in zip(SPLITS, counts, strict=True):
            rows = np.repeat(np.arange(first, first + count), T).reshape(count, T) % V
            marks = (np.arange(count) % 2).astype(np.uint8) if labels else None
            samples[split] = Samples(rows.astype("<u2"), marks)
            first += count
        name = f"{number}.run"
        write_run(work / name, Run(number % 3, samples), seed=seed, number=number)
        names.append(name)
    return Shuffle(folder, work, tuple(names), Layout(T, "<u2", labels), V)


def expected(job: Shuffle, split: str, seed: int = 0) -> list[tuple[int, int]]:
    """(first token, source) of all samples in the order of (key, run, place), the slow way."""
    found = []
    for number, name in enumerate(job.runs):
        run = RunFile.open(job.work / name)
        rows = run.read(f"{split}.rows")
        for place, key in enumerate(run.read(f"{split}.keys").tolist()):
            found.append((key, number, place, int(rows[place, 0]), run.source))
    return [(token, source) for _, _, _, token, source in sorted(found)]


def shards_of(job: Shuffle, size: int, each: int) -> dict[str, list[tuple[int, int]]]:
    """What all cells of both splits wrote, read back from the tars."""
    keys = count_keys(job.work, job.runs)
    found: dict[str, list[tuple[int, int]]] = {}
    for split in SPLITS:
        found[split] = []
        for cell in plan_cells(split, keys[split], size, each):
            written = write_cell(job, cell)
            assert [shard.shard for shard in written.shards] == cell.stems
            tokens = []
            for shard in written.shards:
                tokens += read(job, shard)
            found[split] += tokens
            counted = np.bincount([token for token, _ in tokens for _ in range(T)], minlength=V)
            assert written.unigrams.tolist() == counted.tolist()
    return found


def read(job: Shuffle, shard: Shard) -> list[tuple[int, int]]:
    raw = np.fromfile(job.out / f"{shard.shard}.tar", np.uint8)
    first = np.ndarray(
        shard.num_sequences, "<u2", raw, job.layout.offset, (job.layout.stride,)
    ).tolist()
    sources = np.load(job.out / f"{shard.shard}.sources.npy").tolist()
    return list(zip(first, sources, strict=True))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@examples(25)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=5),
    size=st.integers(1, 12),
    each=st.integers(1, 5),
    labels=st.booleans(),
)
def test_shards_hold_every_sample_once_in_the_order_of_keys(
    tmp_path_factory, sizes, size, each, labels
):
    job = make_runs(tmp_path_factory.mktemp("law") / "out", sizes, labels)
    found = shards_of(job, size, each)
    for split in SPLITS:
        assert found[split] == expected(job, split)


@pytest.mark.parametrize("bits", [0, 1, 3], ids=lambda bits: f"{bits} bits")
def test_keys_that_meet_in_one_bucket_or_are_equal_keep_the_order_of_runs(
    tmp_path, monkeypatch, bits
):
    """With few distinct keys, buckets overflow shards and cells begin inside of them."""
    top = np.uint64((1 << bits) - 1) << np.uint64(64 - bits) if bits else np.uint64(0)
    monkeypatch.setattr(siftloader.runs, "sample_keys", lambda *about: sample_keys(*about) & top)
    job = make_runs(tmp_path / "out", [(20, 3), (0, 0), (17, 4)])
    for each in (1, 2, 9):
        found = shards_of(job, 5, each)
        assert found == {split: expected(job, split) for split in SPLITS}
        for entry in job.work.glob("*.json"):
            entry.unlink()


def test_the_cells_do_not_show_in_the_bytes(tmp_path):
    hashes = set()
    for each in (1, 3, 100):
        job = make_runs(tmp_path / str(each), [(40, 9), (33, 2)], labels=True)
        shards_of(job, 7, each)
        hashes.add(tuple(sorted((path.name, path.read_bytes()) for path in job.out.glob("*-*"))))
    assert len(hashes) == 1


def test_every_sample_may_go_anywhere():
    """A true shuffle: neighbours part, and the mean distance travelled is a third of the whole."""
    keys = np.concatenate([sample_keys(500, 1, "train", number) for number in range(20)])
    place = np.argsort(np.argsort(keys))
    travelled = np.abs(place - np.arange(len(keys))).mean() / len(keys)
    assert abs(travelled - 1 / 3) < 0.02
    assert abs(np.corrcoef(place[:-1], place[1:])[0, 1]) < 0.03
    assert len(set(keys.tolist())) == len(keys)


def test_keys_are_pinned_and_depend_on_seed_split_and_block():
    assert sample_keys(2, 0, "train", 0).tolist() == [
        np.random.PCG64(np.random.SeedSequence((1, 0, 0, 0))).random_raw(),
        17_532_960_557_476_522_086,
    ]
    others = [(1, "train", 0), (0, "val", 0), (0, "train", 1)]
    first = sample_keys(9, 0, "train", 0).tolist()
    assert all(sample_keys(9, *other).tolist() != first for other in others)


@pytest.mark.parametrize(
    "loss", ["note", "tar", "sources", "flipped", "cut", "count", "bytes", "type", "other text"]
)
def test_shards_already_written_are_kept_only_if_whole(tmp_path, monkeypatch, loss):
    job = make_runs(tmp_path / "out", [(20, 0), (20, 0)])
    keys = count_keys(job.work, job.runs)
    (cell,) = plan_cells("train", keys["train"], 10, 4)
    before = write_cell(job, cell)
    tar, note = job.out / "train-000002.tar", job.work / f"train-000002.{job.digest}.json"
    data = tar.read_bytes()
    if loss == "note":
        note.unlink()
    elif loss == "tar":
        tar.unlink()
    elif loss == "sources":
        (job.out / "train-000002.sources.npy").write_bytes(b"")
    elif loss == "flipped":
        tar.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    elif loss == "cut":
        tar.write_bytes(data[:-5])
    elif loss in ("count", "bytes", "type"):
        noted = json.loads(note.read_bytes())
        lie = {"count": {"num_sequences": 9}, "bytes": {"bytes": 5}, "type": {"bytes": "x"}}
        note.write_text(json.dumps({**noted, **lie[loss]}))
    else:
        changed = Shuffle(job.out, job.work, job.runs[::-1], job.layout, job.vocab_size)
        assert changed.digest != job.digest
        job = changed
    again = write_cell(job, cell)
    if loss == "other text":
        return
    assert again.shards == before.shards
    assert again.unigrams.tolist() == before.unigrams.tolist()
    assert tar.read_bytes() == data
    monkeypatch.setattr(siftloader.cells, "write_shard", None)  # would fail if it were called
    assert write_cell(job, cell).shards == before.shards


def test_a_run_that_is_gone_or_cut_is_named(tmp_path):
    job = make_runs(tmp_path / "out", [(5, 1)])
    path = job.work / "0.run"
    assert RunFile.open(path).whole()
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CorpusError, match=r"0\.run: not a whole run"):
        RunFile.open(path)
    for at in range(0, len(data), 7):  # also in the header, which says what the arrays are
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with contextlib.suppress(CorpusError, KeyError, TypeError):
            assert not RunFile.open(path).whole()
    path.write_bytes(b"siftrun1" + b"\xff" * 8)
    with pytest.raises(CorpusError, match=r"0\.run: "):
        RunFile.open(path)
    path.unlink()
    with pytest.raises(CorpusError, match=r"0\.run: cannot be read"):
        RunFile.open(path)


@pytest.mark.parametrize(
    ("shards", "workers", "memory", "expected"),
    [
        (3, 2, 1000, (1, 2)),  # enough for all of it, but two shall work
        (100, 2, 1000, (3, 2)),  # 500 each: 3 shards of a cell, one to write, one to spare
        (100, 8, 1000, (1, 3)),  # 333 each: only three may write
        (100, 1, 10_000, (50, 1)),
        (1, 8, 10_000, (1, 1)),
    ],
)
def test_cells_fit_the_memory_there_is(shards, workers, memory, expected):
    assert shards_per_cell(shards, workers, memory, 100) == expected


def test_counting_ids_takes_a_part_at_a_time(tmp_path, monkeypatch):
    job = make_runs(tmp_path / "out", [(40, 0)])
    (cell,) = plan_cells("train", count_keys(job.work, job.runs)["train"], 25, 2)
    whole = write_cell(job, cell)
    monkeypatch.setattr(siftloader.cells, "COUNTED", 2 * T + 1)
    monkeypatch.setattr(siftloader.cells.np, "bincount", bounded(np.bincount, 2 * T), raising=True)
    assert write_cell(job, cell).unigrams.tolist() == whole.unigrams.tolist()


def bounded(real, most):
    def bincount(ids, **named):
        assert len(ids) <= most
        return real(ids, **named)

    return bincount


def test_a_run_tells_what_its_block_counted(tmp_path):
    run = Run(7, {}, {"val.0.documents": np.arange(3)}, {"documents": 2})
    write_run(tmp_path / "x.run", run, seed=0, number=0)
    found = RunFile.open(tmp_path / "x.run")
    assert (found.source, found.counted, found.carried()) == (7, {"documents": 2}, ["val.0"])
    assert found.read("val.0.documents", 1).tolist() == [1, 2]
    assert found.count("train.rows") == 0
    assert json.dumps(dict(found.about))
