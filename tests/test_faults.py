"""What else goes wrong with a data set, its files and its states: the rows of FAULTS.md that no other test has."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effort import examples
from hypothesis import given, strategies as st
from models import classifier
from test_loader import Rows, make
from test_prepare import BERT, WORDS, save_tokenizer
from test_shards import reseal, ustar, write_set
from test_stream import SPECIAL, T, V, write
from torch.utils.data import DataLoader

from siftloader import SiftingDataLoader
from siftloader.errors import CorruptShard, EmptyEpoch, ShardError, SiftError, StateError
from siftloader.opened import Budget
from siftloader.prepare import Preparation, prepare
from siftloader.shards import (
    Layout,
    ShardSet,
    Source,
    Tokenizer,
    sha256,
    verify,
    write_dataset,
    write_shard,
)
from siftloader.stream import TokenShards
from siftloader.world import World


COUNTS = (5, 7, 3, 6)
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sound") / "shards", COUNTS, "mlm", SPECIAL)


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def opened(folder: Path, **options: Any) -> TokenShards:
    return TokenShards(folder, **({"with_ids": True, "window": 2} | options))


def values(batches: Iterator[dict[str, torch.Tensor]]) -> list[dict[str, list[Any]]]:
    return [{name: value.tolist() for name, value in batch.items()} for batch in batches]


def everything(folder: Path, **options: Any) -> list[dict[str, list[Any]]]:
    return values(opened(folder, **options).batches(4))


# The manifest


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)


def rewrite(change: Callable[[list[bytes]], list[bytes]]) -> Change:
    return lambda folder: (folder / "manifest.jsonl").write_bytes(
        b"".join(change(lines_of(folder)))
    )


HARMLESS = {
    "CRLF": rewrite(lambda lines: [line.rstrip() + b"\r\n" for line in lines]),
    "no final newline": rewrite(lambda lines: [*lines[:-1], lines[-1].rstrip()]),
    "white space": rewrite(lambda lines: [line.replace(b":", b" : ") for line in lines]),
    "keys in another order": rewrite(
        lambda lines: [
            json.dumps(dict(sorted(json.loads(x).items()))).encode() + b"\n" for x in lines
        ]
    ),
}


@pytest.mark.parametrize("form", HARMLESS)
def test_a_manifest_of_another_form_is_the_same_manifest(sound, copy, form):
    before = lines_of(copy)
    HARMLESS[form](copy)
    assert lines_of(copy) != before
    assert everything(copy) == everything(sound)


BROKEN = {
    "last line cut": rewrite(lambda lines: [*lines[:-1], lines[-1][:-20]]),
    "last line gone": rewrite(lambda lines: lines[:-1]),
    "first line gone": rewrite(lambda lines: lines[1:]),
    "line twice": rewrite(lambda lines: [lines[0], *lines]),
    "line twice, apart": rewrite(lambda lines: [*lines, lines[0]]),
    "lines exchanged": rewrite(lambda lines: [lines[1], lines[0], *lines[2:]]),
    "unknown shard": rewrite(
        lambda lines: [*lines, lines[-1].replace(b"val-000001", b"val-000002")]
    ),
    "renamed shard": rewrite(
        lambda lines: [lines[0].replace(b"train-000000", b"test-000000"), *lines[1:]]
    ),
    "extra key": rewrite(lambda lines: [lines[0].replace(b"{", b'{"extra": 1, '), *lines[1:]]),
    "UTF-16": rewrite(lambda lines: [b"".join(lines).decode().encode("utf-16")]),
    "two lines in one": rewrite(lambda lines: [lines[0].rstrip(), *lines[1:]]),
    "an error page": lambda folder: (folder / "manifest.jsonl").write_text("<html>503</html>"),
    "a folder": lambda folder: (
        (folder / "manifest.jsonl").unlink(),
        (folder / "manifest.jsonl").mkdir(),
    ),
    "zeros": rewrite(lambda lines: [bytes(len(b"".join(lines)))]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_manifest_is_refused_by_its_name(copy, fault):
    BROKEN[fault](copy)
    with pytest.raises(ShardError, match=r"manifest\.jsonl"):
        TokenShards(copy)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**63, 2**64, 10**400]),
    st.floats(),
    st.text(max_size=70),
    st.sampled_from(["train-000000", "../escape", "a/b", "", "0" * 64, "g" * 64, "\ud800", "\0"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@examples(150)
@given(data=st.data())
def test_no_value_in_the_manifest_is_believed_or_crashes(sound, data):
    """Any JSON value in any field of any line: refused, naming the manifest, unless it means the same."""
    lines = [json.loads(line) for line in lines_of(sound)]
    number = data.draw(st.integers(0, len(lines) - 1))
    key = data.draw(st.sampled_from(sorted(lines[0])))
    original, odd = lines[number][key], data.draw(ODD)
    lines[number][key] = odd
    before = (sound / "manifest.jsonl").read_bytes()
    try:
        (sound / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            found = ShardSet.open(sound)
        except ShardError as error:
            assert "manifest.jsonl" in str(error)
        else:
            assert type(odd) is type(original) and odd == original
            assert found.fingerprint
    finally:
        (sound / "manifest.jsonl").write_bytes(before)


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths_of(value[key], (*at, key))


@examples(150)
@given(data=st.data())
def test_no_value_in_a_description_crashes_even_where_its_seal_fits(sound, data):
    """Hand-edited by somebody who made the hash fit: opened, or a ShardError, never anything else."""
    path = sound / "dataset.json"
    before = path.read_bytes()
    about = json.loads(before)
    at = data.draw(st.sampled_from(sorted(paths_of(about), key=str)))
    inner = about
    for key in at[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[at[-1]] = data.draw(ODD)
    else:
        del inner[at[-1]]
    rest = {key: value for key, value in about.items() if key != "sha256"}
    try:
        about["sha256"] = sha256(json.dumps(rest, sort_keys=True).encode())
        path.write_text(json.dumps(about))
        try:
            TokenShards(sound)
        except (ShardError, ValueError) as error:
            assert isinstance(error, ShardError) or "mask" in str(error)
    finally:
        path.write_bytes(before)


# Tars that a manifest vouches for


def member(row: int, name: str, content: bytes) -> bytes:
    return ustar(f"train-000000-{row:06d}.{name}", content)


def npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


WRITTEN_OTHERWISE = {
    "big-endian": npy(np.arange(5, dtype=">u2")),
    "signed": npy(np.arange(5, dtype="<i2")),
    "longer": npy(np.arange(6, dtype="<u2")),
    "shorter": npy(np.arange(4, dtype="<u2")),
    "0-d": npy(np.uint16(5)),
    "2-d, Fortran order": npy(np.asfortranarray(np.ones((5, 2), "<u2"))),
    "objects": npy(np.array([1, "two"], object), allow_pickle=True),
    "no array": b"text",
}


@pytest.mark.parametrize("kind", WRITTEN_OTHERWISE)
def test_verify_names_an_array_of_another_kind_where_all_hashes_fit(tmp_path, kind):
    """Whoever wrote such a shard and its manifest is no writer of ours; nothing is unpickled to see it."""
    write_set(tmp_path, {"train-000000": np.zeros((2, 5), int)})
    path = tmp_path / "train-000000.tar"
    sample = member(1, "input_ids.npy", WRITTEN_OTHERWISE[kind])
    data = path.read_bytes()[:1024] + sample.ljust(1024, b"\0")[:1024] + bytes(1024)
    path.unlink()
    path.write_bytes(data)
    reseal(tmp_path, sha256=sha256(data))
    with pytest.raises(CorruptShard, match="train-000000: sample 1, ") as caught:
        list(verify(tmp_path))
    assert (caught.value.shard, caught.value.sample) == ("train-000000", 1)


# Files


STANDS_THERE: dict[str, Change] = {
    "nothing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/null"),
    "another shard by a link": lambda path: path.symlink_to("train-000001.tar"),
}


@pytest.mark.parametrize("what", STANDS_THERE)
@pytest.mark.parametrize("check", [True, False], ids=["verify", "trust"])
def test_what_is_no_shard_in_the_place_of_one_is_an_error_that_names_it(copy, what, check):
    """A pipe does not hang the reader, and not even verify=False takes another file for the shard."""
    (copy / "train-000002.tar").unlink()
    STANDS_THERE[what](copy / "train-000002.tar")
    with pytest.raises(ShardError, match="train-000002") as caught:
        everything(copy, verify=check)
    assert caught.value.shard == "train-000002"


def test_shards_behind_links_are_read(sound, tmp_path):
    folder = tmp_path / "links"
    folder.mkdir()
    for path in sound.iterdir():
        (folder / path.name).symlink_to(path)
    assert everything(folder) == everything(sound)


def test_reading_writes_nothing_beside_the_shards(copy):
    """So a read-only mount will do."""
    before = {path.name: path.stat().st_mtime_ns for path in [copy, *copy.iterdir()]}
    everything(copy)
    everything(copy, split="val")
    assert {path.name: path.stat().st_mtime_ns for path in [copy, *copy.iterdir()]} == before


def test_a_tar_that_no_manifest_names_is_not_read(sound, copy):
    """Neither by the stream nor in its counts; `siftloader verify` names it."""
    shutil.copy(copy / "train-000001.tar", copy / "train-000009.tar")
    assert everything(copy) == everything(sound)
    with pytest.raises(ShardError, match=r"train-000009\.tar is not in manifest"):
        list(verify(copy))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN])
@pytest.mark.parametrize("call", ["stat", "open"])
def test_a_file_system_that_fails_is_an_error_that_names_the_shard(copy, monkeypatch, code, call):
    shards = opened(copy)
    stream = shards.batches(1)
    next(stream)
    real_stat, real_open = Path.stat, io.open

    def stat(self: Path, **options: Any) -> os.stat_result:
        if self.suffix == ".tar":
            raise OSError(code, os.strerror(code), str(self))
        return real_stat(self, **options)

    def open_(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).endswith(".tar"):
            raise OSError(code, os.strerror(code), str(file))
        return real_open(file, *arguments, **options)

    with monkeypatch.context() as patch:
        if call == "stat":
            patch.setattr(Path, "stat", stat)
        else:
            patch.setattr("builtins.open", open_)
            patch.setattr(io, "open", open_)
        with pytest.raises(ShardError, match=f"train-00000.*{os.strerror(code)}") as caught:
            everything(copy)
    assert caught.value.shard.startswith("train-")


class Failing(io.FileIO):
    """A file whose disk fails on its second half."""

    def readinto(self, buffer: Any) -> int:
        half = os.fstat(self.fileno()).st_size // 2
        if self.tell() >= half:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(memoryview(buffer)[:half])


@pytest.mark.parametrize("lenient", [False, True])
def test_a_disk_that_fails_while_a_shard_is_verified_is_an_error(copy, monkeypatch, lenient):
    """Verified by reading: a page of a mapped file that cannot be had would end the process by SIGBUS."""
    real = open

    def broken(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).endswith("train-000001.tar"):
            return Failing(file)
        return real(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", broken)
        with pytest.raises(
            ShardError, match=r"train-000001: cannot be read .*Input/output"
        ) as caught:
            everything(copy, **({"on_error": Budget(3)} if lenient else {}))
    assert caught.value.shard == "train-000001"
    assert len(everything(copy)) == 6


def test_a_mount_that_vanishes_is_named_and_the_stream_goes_on_when_it_is_back(
    sound, copy, monkeypatch
):
    """What was handed out before was right; the state restores the rest."""
    monkeypatch.setattr("siftloader.stream.BLOCK_TOKENS", T)  # a row at a time
    shards = opened(copy, window=1)
    handed: list[int] = []
    with pytest.raises(ShardError, match="train-00000") as caught:
        for batch in shards.batches(1):
            handed += batch["id"].tolist()
            if copy.exists():
                copy.rename(copy.with_name("away"))
    assert caught.value.shard is not None
    copy.with_name("away").rename(copy)
    again = opened(copy, window=1)
    again.load_state_dict(shards.state_dict())
    straight = [i for batch in everything(sound, window=1) for i in batch["id"]]
    assert handed + [i for batch in again.batches(1) for i in batch["id"].tolist()] == straight


# A file that changes while it is read


READ_WHILE_IT_CHANGES = """
import json, os, shutil, sys, time
from bisect import bisect
from pathlib import Path
import siftloader.stream as stream

stream.BLOCK_TOKENS = 16  # a row at a time: those after the change are read after the change
sound, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
reading = lambda folder, window: stream.TokenShards(
    folder, masking=None, with_ids=True, window=window
).batches(1)
right = {int(batch["id"]): batch["input_ids"].tolist() for batch in reading(sound, 8)}
for name, change in changes.items():
    for before, window in [(12, 8), (1, 8), (1, 1)]:  # all are mapped; the others are only verified
        folder = shutil.copytree(sound, sound.parent / f"{name} {before} {window}")
        batches = reading(folder, window)
        handed = [next(batches) for _ in range(before)]
        time.sleep(0.05)  # what verifies ahead is done; and some clocks of files tick every 4 ms only
        seen = {bisect([0, 5, 12, 15], int(batch["id"])) - 1 for batch in handed}
        for number in range(4) if before > 1 else {*range(4)} - seen:
            path = folder / f"train-{number:06d}.tar"
            exec(change)
        try:
            handed += batches
            answer = "ended"
        except stream.ShardError as error:
            answer = f"found, {error.shard}"
        if any(batch["input_ids"].tolist() != right[int(batch["id"])] for batch in handed):
            answer = "a wrong row"
        if answer == "ended" and len(handed) < len(right):
            answer = "ended early"
        print(json.dumps([name, answer]), flush=True)
"""
OVERWRITE = "file = path.open('r+b'); file.write(path.read_bytes()[::-1]); file.close()"
MEANWHILE = {  # what happens to all shards, and whether it may pass unseen
    "replaced": ("path.with_suffix('.x').write_bytes(bytes(99)); path.with_suffix('.x').replace(path)", True),
    "removed": ("path.unlink()", True),
    "made longer": ("file = path.open('ab'); file.write(b'more'); file.close()", True),
    "overwritten": (OVERWRITE, False),
    "overwritten, its date put back": (
        f"at = path.stat().st_mtime_ns; {OVERWRITE}; os.utime(path, ns=(at, at))", False,
    ),
    "overwritten, then replaced by a whole one": (
        f"{OVERWRITE}; shutil.copy(sound / path.name, path.with_suffix('.x')); path.with_suffix('.x').replace(path)",
        True,
    ),
    "overwritten, then removed": (f"{OVERWRITE}; path.unlink()", False),
    "cut off": ("os.truncate(path, 0)", False),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """In a process of its own: a mapped file that is cut off may end it by SIGBUS."""
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("meanwhile") / "shards")
    changes = json.dumps({name: change for name, (change, _) in MEANWHILE.items()})
    done = subprocess.run(
        [sys.executable, "-c", READ_WHILE_IT_CHANGES, str(folder), changes],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    killed = f"no answer, status {done.returncode}: {done.stderr[-500:]}"
    found = [json.loads(line) for line in done.stdout.splitlines()]
    by_name = {name: [answer for one, answer in found if one == name] for name in MEANWHILE}
    return {name: by_name[name] + [killed] * (3 - len(by_name[name])) for name in MEANWHILE}


@pytest.mark.parametrize("what", MEANWHILE)
def test_a_shard_that_changes_while_it_is_read_gives_no_wrong_row(answers, what):
    """Rows that were read before it changed are right; later ones are right, or there are none."""
    unseen = {"ended"} if MEANWHILE[what][1] else set()
    assert set(answers[what]) <= {f"found, train-{n:06d}" for n in range(4)} | unseen


# Damage within a budget


def rows_of(batches: Iterator[dict[str, torch.Tensor]]) -> list[tuple[int, list[int]]]:
    return [
        (number, row)
        for batch in batches
        for number, row in zip(batch["id"].tolist(), batch["input_ids"].tolist(), strict=True)
    ]


def damage(folder: Path, stem: str, sample: int) -> None:
    """One bit of a token of a sample."""
    path = folder / f"{stem}.tar"
    data = bytearray(path.read_bytes())
    data[sample * Layout(T).stride + Layout(T).offset] ^= 1
    path.write_bytes(data)


@pytest.fixture
def lenient(copy: Path) -> Callable[..., TokenShards]:
    return lambda **options: opened(copy, masking=None, on_error=Budget(100), **options)


@pytest.mark.filterwarnings("ignore:.*are passed over")
@pytest.mark.parametrize("window", [1, 2, 8])
def test_damage_that_is_passed_over_stays_passed_over_epoch_after_epoch(
    sound, copy, lenient, window
):
    """Whoever verifies ahead meets it again; and what is damaged later is not trusted for it."""
    right = dict(rows_of(opened(sound, masking=None).batches(4)))
    damage(copy, "train-000001", 0)
    damage(copy, "train-000003", 2)
    shards = lenient(window=window)
    for epoch in range(6):
        if epoch == 3:
            damage(copy, "train-000001", 4)
        found = rows_of(shards.batches(4))
        assert len(found) == len(right)
        assert [number for number, row in found if right[number] != row] == []
        assert shards.passed_over == {"train-000001": 1 + (epoch >= 3), "train-000003": 1}


@pytest.mark.filterwarnings("ignore:.*are passed over")
@pytest.mark.parametrize("lost", [(0, 1), (1, 2), (2, 3), (0, 1, 2), (1, 2, 3), (0, 3)])
def test_any_shards_may_be_lost_and_a_restart_changes_nothing(sound, copy, lenient, lost):
    """What stands in for a shard does not depend on which of them was found lost first."""
    right = dict(rows_of(opened(sound, masking=None).batches(4)))
    for number in lost:
        (copy / f"train-{number:06d}.tar").unlink()
    for seed in range(4):
        straight = rows_of(lenient(seed=seed, window=1).batches(4))
        assert len(straight) == len(right)
        assert all(right[number] == row for number, row in straight)
        for cut in (1, 3, 5):
            first, second = (lenient(seed=seed, window=1) for _ in range(2))
            second.load_state_dict(advanced(first, cut).state_dict())
            assert rows_of(second.batches(4)) == straight[4 * cut :], (seed, cut)


@pytest.mark.filterwarnings("ignore:.*are passed over")
def test_when_all_shards_are_lost_a_budget_does_not_help(copy, lenient):
    for path in copy.glob("train-*.tar"):
        path.unlink()
    shards = lenient()
    for _ in range(2):  # asked again, it answers again
        with pytest.raises(ShardError, match="train-00000"):
            list(shards.batches(4))


# Few samples, or none


def written(folder: Path, counts: dict[str, int], ids: Any = None) -> Path:
    folder.mkdir()
    layout = Layout(T)
    shards = []
    for stem, count in counts.items():
        rows = np.full((count, T), 7) if ids is None else ids
        shards.append(write_shard(folder, stem, rows, np.zeros(len(rows), np.uint8), layout))
    write_dataset(
        folder,
        shards,
        layout=layout,
        objective="mlm",
        tokenizer=Tokenizer("letters", "0" * 64, V, SPECIAL),
        sources=[Source("a", "0" * 64, 1)],
        unigrams=np.zeros(V, np.int64),
        seed=0,
    )
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_split_without_samples_is_refused_with_the_arithmetic(tmp_path, split, shards):
    folder = written(tmp_path / "none", {f"{split}-{n:06d}": 0 for n in range(shards)})
    with pytest.raises(EmptyEpoch, match=f"0 samples in split '{split}'"):
        TokenShards(folder, split=split)


def test_shards_without_samples_among_others_are_passed_over(tmp_path):
    counts = {f"train-{n:06d}": n % 3 for n in range(9)}
    folder = written(tmp_path / "some", counts)
    for window in (1, 2, 8):
        found = [i for batch in everything(folder, window=window) for i in batch["id"]]
        assert sorted(found) == list(range(sum(counts.values())))


def test_fewer_samples_than_one_pool_are_refused_with_the_arithmetic(sound):
    """21 samples cannot fill a batch of 64 once half of a pool of 128 is kept."""
    loader = SiftingDataLoader(
        TokenShards(sound), 64, model=classifier(), criterion="random", warmup_steps=0
    )
    with pytest.raises(EmptyEpoch, match=r"21.*64|64.*21"):
        list(loader)


def test_fewer_samples_than_a_batch_are_one_ragged_batch(sound):
    assert [len(batch["id"]) for batch in opened(sound).batches(64)] == [21]
    halves = [opened(sound, world=World(rank, 2)) for rank in range(2)]
    assert [[len(b["id"]) for b in half.batches(64)] for half in halves] == [[10], [10]]


def test_a_giant_beside_dwarfs_loses_nothing_on_any_ranks(tmp_path):
    counts = {f"train-{n:06d}": 3_000 if n == 2 else 1 for n in range(6)}
    folder = written(tmp_path / "uneven", counts)
    for ranks in (1, 3, 8):
        found: list[int] = []
        for rank in range(ranks):
            reader = opened(folder, world=World(rank, ranks))
            own = [i for batch in reader.batches(100) for i in batch["id"].tolist()]
            assert len(own) == len(reader) == sum(counts.values()) // ranks
            found += own
        assert len(set(found)) == len(found) == sum(counts.values()) // ranks * ranks


@pytest.mark.parametrize("token", ["pad", "unk"])
def test_a_sample_of_nothing_but_one_special_token_is_labelled_nowhere(tmp_path, token):
    """It is handed out, as every sample is, and teaches nothing; sifting keeps it last."""
    folder = written(tmp_path / token, {"train-000000": 1}, np.full((1, T), SPECIAL[token]))
    (batch,) = TokenShards(folder).batches(1)
    assert (batch["labels"] == -100).all()
    assert batch["attention_mask"].tolist() == [[int(token != "pad")] * T]
    assert (batch["input_ids"] == SPECIAL[token]).all()


# Several readers


def test_two_loaders_in_one_process_do_not_know_of_each_other(sound):
    one, other = opened(sound, seed=1), opened(sound, seed=2)
    alone = [everything(sound, seed=seed) for seed in (1, 2)]
    together: tuple[list[Any], list[Any]] = ([], [])
    for first, second in zip(one.batches(4), other.batches(4), strict=True):
        together[0].append({name: value.tolist() for name, value in first.items()})
        together[1].append({name: value.tolist() for name, value in second.items()})
    assert list(together) == alone
    assert one.state_dict()["seed"] == 1


def test_two_loaders_over_one_object_each_get_the_whole_epoch(sound):
    """Only the state is shared: it follows whichever iterator started last."""
    shards = opened(sound)
    straight = [i for batch in everything(sound) for i in batch["id"]]
    nested = []
    for outer in shards.batches(4):
        nested += outer["id"].tolist()
        next(shards.batches(4))
    assert nested == straight


@pytest.mark.filterwarnings("ignore:loader workers begin epoch 0 once more")
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_stay_go_on_to_the_next_epoch(sound, persistent):
    """Those that do not stay need set_epoch, as the docstring of TokenShards says, and as they warn."""
    shards = opened(sound)
    loader = DataLoader(shards, batch_size=4, num_workers=1, persistent_workers=persistent)
    epochs = [[i for batch in loader for i in batch["id"].tolist()] for _ in range(2)]
    reader = opened(sound)
    expected = [[i for b in reader.read_batches(4, e) for i in b["id"].tolist()] for e in (0, 1)]
    assert epochs == (expected if persistent else [expected[0]] * 2)


@pytest.mark.parametrize("mistake", ["none", "seed", "data", "rank", "epoch"])
def test_ranks_that_do_not_agree_are_seen_in_what_they_covered(sound, mixed, mistake):
    """Nothing is exchanged while training; 16 bytes of every rank, added up, are compared with the order."""
    other = mixed().shard_sets[1].folder
    readers = []
    for rank in range(3):
        odd = mistake if rank == 1 else "none"
        reader = opened(
            other if odd == "data" else sound,
            seed=int(odd == "seed"),
            world=World(2 if odd == "rank" else rank, 3),
        )
        reader.set_epoch(5 if odd == "epoch" else 4)
        readers.append(reader)
    whole = opened(sound)
    total = whole.total // 3 * 3
    for reader in readers:
        list(reader.batches(4))
    found = readers[0].coverage() + readers[1].coverage() + readers[2].coverage()
    assert (found == whole.expected_coverage(4, samples=total)) == (mistake == "none")


# States


def advanced(shards: TokenShards, batches: int, n: int = 4) -> TokenShards:
    for _ in islice(shards.batches(n), batches):
        pass
    return shards


WRONG = {
    "none": None,
    "true": True,
    "negative": -1,
    "fraction": 1.5,
    "whole float": 4.0,
    "nan": float("nan"),
    "huge": 10**30,
    "text": "4",
    "list": [4],
    "dict": {},
}


@pytest.fixture(scope="module")
def mixed(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], TokenShards]:
    other = write(tmp_path_factory.mktemp("other") / "shards", (4, 9), "mlm", SPECIAL)
    return lambda: TokenShards.mix({sound: 0.7, other: 0.3}, epoch_samples=30, lanes=2)


@pytest.mark.parametrize("kind", ["one set", "mix"])
@pytest.mark.parametrize("what", WRONG)
def test_no_field_of_a_state_is_believed_when_it_is_of_another_kind(sound, mixed, what, kind):
    """Every field in turn; what is refused moves nothing."""
    fresh = mixed if kind == "mix" else lambda: opened(sound)
    shards, before = fresh(), advanced(fresh(), 2).state_dict()
    shards.load_state_dict(before)
    for name, value in before.items():
        if what == "none" and value is None:
            continue
        with pytest.raises(StateError, match=name):
            shards.load_state_dict(before | {name: WRONG[what]})
        assert shards.state_dict() == before, name


def test_a_state_that_lost_any_field_is_refused_by_its_name(sound):
    shards = opened(sound)
    state = advanced(opened(sound), 2).state_dict()
    for name in state:
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(StateError, match=name):
            shards.load_state_dict(rest)


def sifting(folder: Path) -> SiftingDataLoader:
    shards = opened(folder)
    return SiftingDataLoader(shards, 2, model=classifier(), criterion="random", warmup_steps=1)


def mapped(folder: Path) -> SiftingDataLoader:
    return make(Rows(64), 4, True, warmup_steps=1)


MAY_BE = {  # what a field of a loader's state may well be
    "precision": ("none",),
    "reading": ("none",),
    "learned": ("dict",),
    "set_epoch": ("none",),
    "watched": ("true",),
    "ahead": ("none",),
    "room": ("none",),
    "gate": ("true",),  # of a run that had one
    "lanes": ("missing",),  # in the first version there were none: it means one
}


@pytest.mark.filterwarnings("ignore:the epoch ended inside")
@pytest.mark.parametrize("loader", [sifting, mapped])
def test_no_field_of_a_loaders_state_is_believed(sound, loader):
    """A cursor without its position would begin the epoch anew, and nobody would know."""
    other = loader(sound)
    for _ in islice(other, 3):
        pass
    state = json.loads(json.dumps(other.state_dict()))
    fresh = loader(sound)
    fresh.load_state_dict(state)
    before = fresh.state_dict()
    believed = []
    for place, rest in (("", state), ("cursor", state["cursor"]), ("stats", state["stats"])):
        for name, value in rest.items():
            wrong = {kind: WRONG[kind] for kind in WRONG if kind not in MAY_BE.get(name, ())}
            if name not in ("epoch", "position"):
                del wrong["huge"]
            if isinstance(value, float):  # seconds: any number will do
                wrong = {kind: wrong[kind] for kind in ("none", "text", "list", "dict")}
            if name in ("rng", "weights", "learned"):
                wrong = {kind: wrong[kind] for kind in ("true", "negative", "text")}
            changed = {kind: rest | {name: odd} for kind, odd in wrong.items() if odd != value}
            if "missing" not in MAY_BE.get(name, ()):
                changed["missing"] = {key: rest[key] for key in rest if key != name}
            for kind, damaged in changed.items():
                try:
                    fresh.load_state_dict(state | {place: damaged} if place else damaged)
                except StateError:
                    continue
                except Exception as error:
                    believed.append(f"{place}.{name} {kind}: {type(error).__name__}")
                else:
                    believed.append(f"{place}.{name} {kind}")
                    fresh.load_state_dict(state)
    assert believed == []
    assert fresh.state_dict() == before


@pytest.mark.parametrize(
    "state", [None, [], "{}", 4, {}], ids=["none", "list", "text", "number", "empty"]
)
def test_what_is_no_state_is_refused(sound, state):
    with pytest.raises(StateError):
        opened(sound).load_state_dict(state)


def test_a_state_file_cut_anywhere_is_refused(sound):
    """By the reader of JSON or by us: no beginning of a state is a state."""
    shards = opened(sound)
    text = json.dumps(advanced(opened(sound), 2).state_dict())
    for end in range(len(text)):
        with pytest.raises((ValueError, StateError)):
            shards.load_state_dict(json.loads(text[:end]))
    assert shards.state_dict() == opened(sound).state_dict()


def test_a_state_saved_before_the_first_batch_is_the_whole_epoch(sound):
    shards = opened(sound)
    for begun in (False, True):
        if begun:
            shards.batches(4)  # asked for, never drawn from
        resumed = opened(sound)
        resumed.load_state_dict(shards.state_dict())
        assert values(resumed.batches(4)) == everything(sound)


def test_a_state_saved_twice_in_a_row_is_the_same_and_so_is_one_loaded_and_saved(sound):
    shards = advanced(opened(sound), 3)
    assert shards.state_dict() == shards.state_dict()
    resumed = opened(sound)
    resumed.load_state_dict(shards.state_dict())
    assert resumed.state_dict() == shards.state_dict()
    resumed.load_state_dict(shards.state_dict())
    assert values(resumed.batches(4)) == everything(sound)[3:]


def test_a_state_saved_after_the_end_begins_the_next_epoch(sound):
    shards = opened(sound)
    for _ in range(3):  # into epochs 1, 2 and 3
        list(shards.batches(4))
        resumed = opened(sound)
        resumed.load_state_dict(shards.state_dict())
        epoch = shards.state_dict()["epoch"]
        assert values(resumed.batches(4)) == values(opened(sound).read_batches(4, epoch))
    assert epoch == 3


def test_a_state_loaded_while_an_iterator_runs_ends_that_iterator(sound):
    """What it would hand out next belongs to the state before: a loop must not train on it unseen."""
    saved = advanced(opened(sound), 3).state_dict()
    for reads in (lambda shards: shards.batches(4), iter):
        shards = opened(sound)
        running = reads(shards)
        next(running)
        shards.load_state_dict(saved)
        with pytest.raises(StateError, match=r"while this iterator ran.*begin a new iterator"):
            next(running)
        assert shards.state_dict() == saved
        assert values(shards.batches(4)) == everything(sound)[3:]


def test_every_refusal_is_an_error_of_ours(sound):
    """`except SiftError` around a restore catches whatever a state can be."""
    with pytest.raises(SiftError):
        opened(sound, seed=3).load_state_dict(opened(sound).state_dict())


# Text


def test_a_document_longer_than_many_shards_is_cut_not_lost(tmp_path):
    words = [f"w{n % WORDS}" for n in range(1_000)]
    (tmp_path / "t.txt").write_text(" ".join(words))
    summary = prepare(
        [str(tmp_path / "t.txt")],
        Preparation(
            out=tmp_path / "out",
            tokenizer=save_tokenizer(tmp_path / "tiny" / "tokenizer.json").parent,
            objective="clm",
            seq_len=16,
            samples_per_shard=10,
            val_fraction=0,
        ),
    )
    dataset = ShardSet.open(tmp_path / "out")
    samples = 1_001 // 16  # the document's end is a token too
    assert summary.samples["train"] == samples
    assert len(dataset.manifest) == -(-samples // 10)
    stored = np.concatenate([dataset.read(shard).ravel() for shard in verify(tmp_path / "out")])
    expected = Counter(n % WORDS + len(BERT) for n in range(1_000))
    assert (Counter(stored.tolist()) & expected).total() >= samples * 16 - 1
