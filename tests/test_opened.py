"""Shards opened: verified ahead, found out when written to, damage passed over within a budget."""

from __future__ import annotations

import errno
import inspect
import os
import shutil
import sys
import threading
import time
import warnings
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from test_stream import SPECIAL, epoch_of, make, opened, rows, write  # noqa: F401

from siftloader import TokenShards
from siftloader.errors import CorruptShard, FetchError, ShardError
from siftloader.opened import Budget, Opened
from siftloader.reading import copied
from siftloader.shards import ShardSet
from siftloader.world import World


@pytest.fixture
def folder(make, tmp_path) -> Path:  # noqa: F811
    shutil.copytree(make((9, 8, 7, 6)), tmp_path / "shards")
    return tmp_path / "shards"


def damage(folder: Path, stem: str, sample: int) -> None:
    files = ShardSet.open(folder)
    with (folder / f"{stem}.tar").open("r+b") as file:
        file.seek(sample * files.layout.stride + files.layout.offset + 3)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 64]))


def all_ids(shards: TokenShards) -> list[int]:
    return [one for batch in shards.batches(4) for one in batch["id"].tolist()]


def test_a_file_written_to_after_it_was_verified_is_found(folder):
    """The mapped view shows the new bytes at once: what was verified is not what is read."""
    shards = opened(folder, window=4)
    stream = shards.read_batches(4, 0)
    assert len(list(stream)) == 8
    reader = Opened(shards._parts, shards._verdicts, limit=9)
    content = reader.get(1)
    before = content.tokens.copy()
    assert not reader.renew([1])
    time.sleep(0.02)  # a file system's clock ticks slowly
    damage(folder, "train-000001", 5)
    assert not np.array_equal(content.tokens, before), "mapped, so the damage shows through"
    assert reader.renew([1])
    with pytest.raises(CorruptShard, match="train-000001: sample 5"):
        reader.get(1)
    reader.close()


def test_rows_copied_while_a_file_was_written_to_are_not_handed_out(folder, monkeypatch):
    shards = opened(folder, window=4)
    renew, calls = Opened.renew, count(1)

    def meddling(self, numbers):
        if next(calls) == 2:  # the rows were copied, and are looked at again
            time.sleep(0.02)
            damage(folder, "train-000002", 1)
        return renew(self, numbers)

    monkeypatch.setattr(Opened, "renew", meddling)
    with pytest.raises(CorruptShard, match="train-000002: sample 1"):
        list(shards.read_batches(4, 0))


@pytest.mark.parametrize("how", ["the same bytes", "another shard", "gone"])
def test_a_replaced_or_removed_file_is_looked_at_anew(folder, tmp_path, how):
    """Nobody knows what the mapped file went through before it went."""
    shards = opened(folder)
    reader = Opened(shards._parts, shards._verdicts, limit=9)
    tokens = reader.get(0).tokens.copy()
    tar = folder / "train-000000.tar"
    tar.rename(tmp_path / "elsewhere.tar")
    if how != "gone":
        source = (
            tmp_path / "elsewhere.tar" if how == "the same bytes" else folder / "val-000000.tar"
        )
        shutil.copy(source, tar)
    assert reader.renew([0])
    if how == "the same bytes":
        assert np.array_equal(reader.get(0).tokens, tokens)
    else:
        with pytest.raises(ShardError, match="train-000000"):
            reader.get(0)
    reader.close()


def test_a_file_written_to_while_it_was_hashed_is_hashed_again(folder, monkeypatch):
    shards, calls = opened(folder), count(1)
    open_shard = ShardSet.open_shard

    def meddling(self, shard, verify=True):
        mapped = open_shard(self, shard, verify)
        if next(calls) == 1:
            time.sleep(0.02)
            damage(folder, "train-000002", 1)
        return mapped

    monkeypatch.setattr(ShardSet, "open_shard", meddling)
    reader = Opened(shards._parts, shards._verdicts, limit=9)
    with pytest.raises(CorruptShard, match="train-000002: sample 1"):
        reader.get(2)
    reader.close()


def test_what_is_announced_is_verified_in_threads_and_told_where_it_is_used(folder, monkeypatch):
    shards = opened(folder)
    threads: list[str] = []
    open_shard = ShardSet.open_shard

    def spy(self, shard, verify=True):
        threads.extend([threading.current_thread().name] * verify)
        return open_shard(self, shard, verify)

    monkeypatch.setattr(ShardSet, "open_shard", spy)
    damage(folder, "train-000002", 0)
    reader = Opened(shards._parts, shards._verdicts, limit=9)
    reader.announce([0, 1, 2, 3])
    for number in (0, 1, 3):
        reader.get(number)
    with pytest.raises(CorruptShard, match="train-000002"):
        reader.get(2)
    reader.close()
    assert sum(name.startswith("siftloader-verify") for name in threads) >= 4
    again = Opened(shards._parts, shards._verdicts, limit=9)
    threads.clear()
    again.announce([0, 1, 3])
    assert [len(again.get(number).tokens) for number in (0, 1, 3)] == [9, 8, 6]
    assert threads == [], "verified once, whoever did it"


def test_readers_leave_no_thread_behind(folder):
    before = set(threading.enumerate())
    for _ in range(3):
        shards = opened(folder)
        next(shards.batches(2))
    deadline = time.monotonic() + 60
    while not before >= set(threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert before >= set(threading.enumerate())


def test_the_next_window_is_announced_when_a_window_begins(make, tmp_path, monkeypatch):  # noqa: F811
    write(tmp_path / "shards", (6,) * 8, "mlm", SPECIAL)
    announced: list[list[int]] = []
    monkeypatch.setattr("siftloader.stream.BLOCK_TOKENS", 16 * 4)
    announce = Opened.announce
    monkeypatch.setattr(
        Opened,
        "announce",
        lambda self, numbers, past: announced.append(numbers) or announce(self, numbers, past),
    )
    shards = TokenShards(tmp_path / "shards", window=2, masking=None)
    list(shards.read_batches(4, 0))
    told = [numbers for numbers in announced if numbers]
    assert len(told[0]) == 4 and len(told) == 4
    assert sorted({one for numbers in told for one in numbers}) == list(range(8))
    order = shards._places().order(0, 0)
    for number, position in enumerate((0, 12, 24, 36)):
        assert set(order.window_at(position)[0]) <= {*told[number]}


def test_shards_that_a_rank_never_touches_are_given_up(tmp_path, monkeypatch):
    """A rank of many reads a few samples of a window: what it does not open must not pile up."""
    write(tmp_path / "shards", (2,) * 64, "mlm", SPECIAL)
    monkeypatch.setattr("siftloader.stream.BLOCK_TOKENS", 8)
    seen = []
    monkeypatch.setattr(
        "siftloader.stream.copied",
        lambda where, reader, *more: (
            seen.append(len(reader._coming)) or copied(where, reader, *more)
        ),
    )
    shards = opened(tmp_path / "shards", window=2, world=World(0, 8))
    assert sum(len(batch["id"]) for batch in shards.batches(1)) == 16
    assert max(seen) <= 4, "two windows"


def test_a_network_that_was_gone_when_a_shard_was_announced_may_be_back(folder, monkeypatch):
    shards = opened(folder, window=4)
    reader = Opened(shards._parts, shards._verdicts, limit=9)
    judge, tries = Opened._judge, []

    def gone_once(self, number):
        tries.append(number)
        if len(tries) == 1:
            raise FetchError("no route to host")
        return judge(self, number)

    monkeypatch.setattr(Opened, "_judge", gone_once)
    reader.announce([2])
    assert len(reader.get(2)) == 7 and tries == [2, 2]
    reader.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_waits_for_no_thread_of_its_parent(folder):
    shards = opened(folder, window=4)
    reader = Opened(shards._parts, shards._verdicts, limit=9)
    stuck = threading.Event()
    reader._judge_ahead = lambda number: stuck.wait()  # in the middle of it
    reader.announce([0, 1, 2, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads run, which is the point
        child = os.fork()
    if not child:
        del reader._judge_ahead
        reader.announce([3])
        os._exit(len(reader.get(1)) + len(reader.get(3)))
    deadline = time.monotonic() + 100
    while not (found := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    stuck.set()
    if not found[0]:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(found[1]) == 8 + 6
    reader.close()


def test_a_damaged_sample_gives_its_place_to_the_next_sound_one(folder):
    whole = {dict(row)["id"]: row for row in epoch_of(folder, 0)}
    damage(folder, "train-000001", 3)
    damage(folder, "train-000001", 7)  # the last one: the first takes its place
    with pytest.raises(CorruptShard, match="train-000001: sample 3"):
        all_ids(opened(folder))
    shards = opened(folder, on_error=Budget(2))
    with pytest.warns(
        UserWarning, match="sample 3.*2 samples of train-000001 are passed over, 2 of 2"
    ):
        found = [row for batch in shards.batches(4) for row in rows(batch)]
    ids = [dict(row)["id"] for row in found]
    first = 9  # id of the first sample of the second shard
    expected = [{first + 3: first + 4, first + 7: first}.get(i, i) for i in ids_in_order(folder)]
    assert ids == expected, "every other sample in its place"
    assert all(whole[i] == row for i, row in zip(ids, found, strict=True))
    assert shards.passed_over == {"train-000001": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_ids(shards)  # counted, and told, once
    assert shards.passed_over == {"train-000001": 2}


def ids_in_order(folder: Path) -> list[int]:
    shards = TokenShards(folder, window=2, with_ids=True, verify=False, masking=None)
    return all_ids(shards)


@pytest.mark.parametrize("how", ["missing", "short", "another"])
def test_a_shard_that_is_lost_gives_its_places_to_the_next_one(folder, how):
    expected = ids_in_order(folder)
    path = folder / "train-000003.tar"
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-600])
    else:
        shutil.copy(folder / "val-000000.tar", path)
    shards = opened(folder, on_error=Budget(6))
    with pytest.warns(
        UserWarning, match="train-000003.*6 samples of train-000003 are passed over"
    ):
        ids = all_ids(shards)
    assert ids == [i - 24 if i >= 24 else i for i in expected], "rows of the first shard instead"
    with pytest.raises(CorruptShard, match=r"6 samples of train-000003.*more than Budget\(5\)"):
        all_ids(opened(folder, on_error=Budget(5)))


def test_the_budget_is_one_for_all_shards_and_all_damage_is_no_epoch(folder):
    damage(folder, "train-000000", 1)
    damage(folder, "train-000001", 1)
    with pytest.warns(UserWarning), pytest.raises(CorruptShard, match=r"2 of all shards"):
        all_ids(opened(folder, on_error=Budget(1)))
    for path in folder.glob("train-*.tar"):
        path.unlink()
    with pytest.warns(UserWarning), pytest.raises(ShardError, match="so is every other"):
        all_ids(opened(folder, on_error=Budget(1000)))


def test_an_empty_shard_takes_the_place_of_no_other(tmp_path):
    folder = write(tmp_path / "shards", (3, 0, 4), "mlm", SPECIAL)
    (folder / "train-000000.tar").unlink()
    with pytest.warns(UserWarning, match="3 samples of train-000000"):
        assert sorted(all_ids(opened(folder, on_error=Budget(3)))) == [3, 3, 4, 4, 5, 5, 6]


def test_any_number_of_shards_in_a_row_may_be_lost(tmp_path, monkeypatch):
    folder = write(tmp_path / "shards", (1,) * 150, "mlm", SPECIAL)
    for number in range(1, 150):
        (folder / f"train-{number:06d}.tar").unlink()
    shards = opened(folder, on_error=Budget(149))
    depth = sys.getrecursionlimit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one for every shard
        sys.setrecursionlimit(len(inspect.stack()) + 100)
        try:
            found = all_ids(shards)
        finally:
            sys.setrecursionlimit(depth)
    assert found == [0] * 150 and len(shards.passed_over) == 149


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM])
def test_too_many_open_files_are_no_damage(folder, monkeypatch, code):
    def refused(self, shard, verify=True):
        raise ShardError("cannot be read") from OSError(code, "no more")

    monkeypatch.setattr(ShardSet, "_map", refused)
    shards = opened(folder, on_error=Budget(1000))
    with pytest.raises(ShardError, match="cannot be read"):
        all_ids(shards)
    assert shards.passed_over == {}


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, None])
def test_a_budget_checks_itself(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        Budget(wrong)


def test_on_error_is_raise_or_a_budget(folder):
    with pytest.raises(ValueError, match='"raise" or a Budget'):
        TokenShards(folder, on_error="warn")


def test_ranks_pass_over_alike(folder):
    damage(folder, "train-000000", 2)
    found: list[list[int]] = []
    for rank in range(2):
        shards = opened(folder, on_error=Budget(9), world=World(rank, 2))
        with pytest.warns(UserWarning, match="passed over"):
            found.append(all_ids(shards))
    with pytest.warns(UserWarning, match="passed over"):
        alone = all_ids(opened(folder, on_error=Budget(9)))
    assert [i for pair in zip(*found, strict=True) for i in pair] == alone
