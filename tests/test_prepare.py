"""The same text, options and seed give the same bytes, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from effort import FACTOR, examples
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import siftloader.folder
import siftloader.prepare
import siftloader.samples
import siftloader.shards
import siftloader.tokens
from siftloader.bigrams import write_bigrams
from siftloader.errors import CorpusError, ShardError
from siftloader.packing import Packing
from siftloader.prepare import Preparation, prepare
from siftloader.samples import copies_of, split_of
from siftloader.shards import ShardSet, verify
from siftloader.tokens import load_tokenizer, restore_tokenizer, tokenise


BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = 200
OBJECTIVES = ("mlm", "mlm-nsp", "clm")
DEMO = Path(__file__).parents[1] / "shards" / "demo"


def save_tokenizer(path: Path, special=BERT, words: int = WORDS) -> Path:
    """A tokenizer that knows w0, w1, ... and splits at white space."""
    vocabulary = {word: n for n, word in enumerate([*special, *(f"w{n}" for n in range(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def write_text(path: Path, documents: int, seed: int = 0) -> Path:
    """Documents of 1 to 40 known words each."""
    rng = np.random.default_rng(seed)
    texts = [
        " ".join(f"w{n}" for n in rng.integers(0, WORDS, rng.integers(1, 41)))
        for _ in range(documents)
    ]
    path.write_text("\n\n".join(texts) + "\n")
    return path


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Two sources and a tokenizer."""
    folder = tmp_path_factory.mktemp("desk")
    save_tokenizer(folder / "tiny" / "tokenizer.json")
    write_text(folder / "a.txt", 60, seed=1)
    write_text(folder / "b.txt", 30, seed=2)
    return folder


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(siftloader.shards.os, "fsync", lambda handle: None)


def options(desk: Path, out: Path, **changes) -> Preparation:
    given = {
        "tokenizer": desk / "tiny",
        "seq_len": 16,
        "val_fraction": 0.2,
        "samples_per_shard": 20,
        "seed": 3,
    }
    given["block_bytes"] = 900  # so that there are many
    return Preparation(out=out, **(given | changes))


def run(desk: Path, out: Path, *paths: Path, **changes):
    paths = paths or (desk / "a.txt", desk / "b.txt")
    return prepare([str(path) for path in paths], options(desk, out, **changes))


def hashes(folder: Path) -> dict[str, str]:
    """Of every file, in folders too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def texts_of(folder: Path, split: str) -> list[list[int]]:
    """The text of a split as lists of word numbers, one per [SEP]-ended run, in no order."""
    dataset = ShardSet.open(folder)
    rows = np.concatenate([dataset.read(shard) for shard in dataset.shards(split)])
    return rows.tolist()


# Laws.


def test_another_process_hash_seed_timezone_and_locale_give_the_same_bytes(desk, tmp_path):
    """Law 7, across everything a process inherits."""
    run(desk, tmp_path / "here" / "set")
    program = (
        "import sys; from siftloader.prepare import Preparation, prepare\n"
        "prepare(sys.argv[2:4], Preparation(out=sys.argv[1], tokenizer=sys.argv[4], seq_len=16,"
        " val_fraction=0.2, samples_per_shard=20, seed=3, block_bytes=900))"
    )
    environment = {
        "PYTHONHASHSEED": "12345",
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONPATH": str(Path(siftloader.prepare.__file__).parents[1]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    arguments = ["there/set", "a.txt", desk / "b.txt", "tiny/tokenizer.json"]  # other spellings
    subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, cwd=desk, check=True
    )
    assert hashes(desk / "there" / "set") == hashes(tmp_path / "here" / "set")
    shutil.rmtree(desk / "there")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "changes",
    [
        {"workers": 3},
        {"memory": 1 << 14},
        {"max_bad": 5},
        pytest.param({"workers": 2}, marks=pytest.mark.slow),
        pytest.param({"workers": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_workers_and_memory_do_not_show_in_the_bytes(desk, tmp_path, objective, changes):
    """Law 7."""
    run(desk, tmp_path / "one" / "set", objective=objective)
    run(desk, tmp_path / "two" / "set", objective=objective, **changes)
    assert hashes(tmp_path / "one" / "set") == hashes(tmp_path / "two" / "set")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"val_fraction": 0.3},
        {"seq_len": 17},
        {"objective": "clm"},
        {"objective": "mlm-nsp"},
        {"block_bytes": 2000},
    ],
    ids=str,
)
def test_another_question_gives_another_answer(desk, tmp_path, changes):
    first = run(desk, tmp_path / "first")
    second = run(desk, tmp_path / "second", **changes)
    assert first.fingerprint != second.fingerprint


def test_another_seed_reorders_the_same_samples(desk, tmp_path):
    run(desk, tmp_path / "x", seed=0)
    run(desk, tmp_path / "y", seed=1)
    for split in ("train", "val"):
        x, y = texts_of(tmp_path / "x", split), texts_of(tmp_path / "y", split)
        assert x != y
        assert sorted(x) == sorted(y)


@examples(30)
@given(
    documents=st.lists(st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=30), min_size=8),
    objective=st.sampled_from(OBJECTIVES),
    seq_len=st.integers(5, 12),
    seed=st.integers(0, 3),
)
def test_every_word_is_in_the_shards_or_counted_as_dropped(
    desk, tmp_path_factory, documents, objective, seq_len, seed
):
    folder = tmp_path_factory.mktemp("law")
    words = [[f"w{n}" for n in document] for document in documents]
    (folder / "t.txt").write_text("\n\n".join(" ".join(line) for line in words))
    try:
        summary = run(
            desk, folder / "o", folder / "t.txt", objective=objective, seq_len=seq_len, seed=seed
        )
    except CorpusError as error:
        assert "nothing to train on" in str(error)
        return
    count = Counter(n + len(BERT) for document in documents for n in document)
    stored: Counter[int] = Counter()
    for split in [split for split, samples in summary.samples.items() if samples]:
        stored += Counter(
            token for row in texts_of(folder / "o", split) for token in row if token >= len(BERT)
        )
    total = sum(summary.packing.values(), Packing())
    assert total.tokens == total.kept + total.tail_kept + total.dropped
    if objective == "mlm-nsp":
        assert stored.total() == total.samples * (seq_len - 3) - total.padding
    else:
        assert stored.total() == total.kept + total.tail_kept
        assert stored <= count
        assert (count - stored).total() == total.dropped
    assert sum(packing.tokens for packing in summary.packing.values()) == count.total()
    assert summary.documents == len(documents)
    list(verify(folder / "o"))


@given(content=st.binary(min_size=32, max_size=32), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_larger_fraction_holds_out_the_same_documents_and_more(content, low, high):
    low, high = sorted((low, high))
    assert split_of(content, low) == "train" or split_of(content, high) == "val"
    assert split_of(content, 0) == "train"


def test_about_the_asked_fraction_is_held_out():
    contents = [hashlib.sha256(str(n).encode()).digest() for n in range(20_000)]
    share = sum(split_of(content, 0.05) == "val" for content in contents) / len(contents)
    assert abs(share - 0.05) < 0.005


def test_a_duplicate_never_sits_on_both_sides(desk, tmp_path):
    """Each document is one word over and over, in both sources and in other layouts."""
    documents = [" ".join([f"w{n}"] * 14) for n in range(WORDS)]
    (tmp_path / "one.txt").write_text("\n\n".join(documents))
    (tmp_path / "two.txt").write_bytes("\r\n \r\n".join(reversed(documents)).encode() + b"\r\n")
    run(desk, tmp_path / "out", tmp_path / "one.txt", tmp_path / "two.txt")
    train, val = (
        {token for row in texts_of(tmp_path / "out", split) for token in row} - set(range(5))
        for split in ("train", "val")
    )
    assert len(train) + len(val) == WORDS
    assert train.isdisjoint(val)
    assert val, "a fifth of 200 documents is held out"


def test_no_sample_holds_two_sources(desk, tmp_path):
    (tmp_path / "low.txt").write_text("\n\n".join(f"w{n} w{n + 1}" for n in range(90)))
    (tmp_path / "high.txt").write_text("\n\n".join(f"w{n} w{n + 1}" for n in range(100, 190)))
    run(desk, tmp_path / "out", tmp_path / "low.txt", tmp_path / "high.txt")
    dataset = ShardSet.open(tmp_path / "out")
    assert [source.name for source in dataset.sources] == ["low", "high"]
    assert [source.documents for source in dataset.sources] == [90, 90]
    for shard in dataset.manifest:
        for row, source in zip(dataset.read(shard), dataset.read_sources(shard), strict=True):
            words = row[row >= len(BERT)] - len(BERT)
            assert len(words) and ((words >= 100) == bool(source)).all()


def test_shards_of_a_split_are_equal_but_for_the_last(desk, tmp_path):
    summary = run(desk, tmp_path / "out")
    dataset = ShardSet.open(tmp_path / "out")
    for split in ("train", "val"):
        *full, last = [shard.num_sequences for shard in dataset.shards(split)]
        assert all(count == 20 for count in full)
        assert 1 <= last <= 20
        assert sum(full) + last == summary.samples[split]
    assert len(dataset.shards("train")) > 2


def test_unigrams_count_the_train_split_as_stored(desk, tmp_path):
    run(desk, tmp_path / "out")
    dataset = ShardSet.open(tmp_path / "out")
    train = np.array(texts_of(tmp_path / "out", "train"))
    assert dataset.unigrams.tolist() == np.bincount(train.ravel(), minlength=WORDS + 5).tolist()


def test_a_weight_says_how_often_the_train_documents_are_used(desk, tmp_path):
    """Twice means twice, in other surroundings; the held-out documents are used once."""
    single, double, some = (
        run(desk, tmp_path / name, desk / f"a.txt{weight}", objective="clm")
        for name, weight in (("single", ""), ("double", ":2"), ("some", ":2.5"))
    )
    train, val = single.packing["train"].tokens, single.packing["val"].tokens
    assert double.packing["train"].tokens == 2 * train
    assert 2 * train < some.packing["train"].tokens < 3 * train
    assert double.packing["val"].tokens == some.packing["val"].tokens == val
    rows = texts_of(tmp_path / "double", "train")
    assert len(rows) > 10 and len({tuple(row) for row in rows}) > 0.95 * len(rows)


@given(content=st.binary(min_size=32, max_size=32), weight=st.floats(0.01, 5))
def test_copies_are_the_weight_rounded_down_or_up(content, weight):
    assert copies_of(content, weight) in (int(weight), int(weight) + 1)
    assert copies_of(content, float(int(weight) + 1)) == int(weight) + 1


def test_copies_are_the_weight_on_average():
    contents = [hashlib.sha256(str(n).encode()).digest() for n in range(20_000)]
    assert abs(np.mean([copies_of(content, 1.3) for content in contents]) - 1.3) < 0.01
    held_out = [content for content in contents if split_of(content, 0.05) == "val"]
    assert abs(np.mean([copies_of(content, 1.3) for content in held_out]) - 1.3) < 0.1


# Interruptions.


class Killed(BaseException):
    """Not an Exception, so that nothing may catch it by accident."""


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_write_it_leaves_no_manifest_and_continues_to_the_same_bytes(
    desk, tmp_path, monkeypatch, moment, objective
):
    """Before a file gets its name (only .part is there), and right after."""
    files = {"block_bytes": 2000}
    if FACTOR == 1:  # half as many files
        files = {"block_bytes": 4000, "samples_per_shard": 50}
    changes = {"objective": objective, **files}
    run(desk, tmp_path / "straight" / "set", **changes)
    straight = hashes(tmp_path / "straight" / "set")
    replace = Path.replace
    writes = 0

    def counted(self, target):
        nonlocal writes
        writes += 1
        if writes == fatal and moment == "before":
            raise Killed
        replace(self, target)
        if writes == fatal:
            raise Killed

    survived = 0
    for fatal in range(1, 200):
        out = tmp_path / str(fatal) / "set"
        writes = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", counted)
            try:
                run(desk, out, **changes)
            except Killed:
                survived += 1
            else:
                break
        if not (out / "manifest.jsonl").exists():  # the very last write is the manifest itself
            with pytest.raises(ShardError, match="not a finished shard folder"):
                ShardSet.open(out)
        else:
            list(verify(out))
        run(desk, out, **changes)
        assert hashes(out) == straight
        assert not (out / ".work").exists()
    assert survived > len(straight)


def test_what_was_made_is_not_made_again(desk, tmp_path, monkeypatch):
    """A kill costs the blocks and shards under way, not those that are done."""
    made = []
    write = siftloader.samples.write_run

    def counted(path, *arguments, **named):
        made.append(path.name)
        return write(path, *arguments, **named)

    monkeypatch.setattr(siftloader.samples, "write_run", counted)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(siftloader.prepare, "count_keys", killed)
        run(desk, tmp_path / "out")
    first = list(made)
    assert len(first) > 5
    run(desk, tmp_path / "out")
    assert made == first
    # A run that was cut or bent on disk is made again.
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(siftloader.prepare, "count_keys", killed)
        run(desk, tmp_path / "bent" / "out")
    straight = hashes(tmp_path / "out")
    some = sorted((tmp_path / "bent" / "out" / ".work").glob("*.run"))[:2]
    data = some[0].read_bytes()
    some[0].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    some[1].write_bytes(data[: len(data) // 2])
    del made[:]
    run(desk, tmp_path / "bent" / "out")
    assert made == [path.name for path in some]
    assert hashes(tmp_path / "bent" / "out") == straight


def test_text_that_changed_between_a_kill_and_the_next_run_is_read_again(desk, tmp_path):
    """Blocks are known by their content: those that changed are made again, with all that follow."""
    (tmp_path / "t").mkdir()
    source = tmp_path / "t" / "a.txt"
    text = (desk / "a.txt").read_text()
    source.write_text(text)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(siftloader.prepare, "write_dataset", killed)
        run(desk, tmp_path / "killed" / "set", source)
    source.write_text(text.replace("w7", "w8"))
    run(desk, tmp_path / "killed" / "set", source)
    run(desk, tmp_path / "fresh" / "set", source)
    assert hashes(tmp_path / "killed" / "set") == hashes(tmp_path / "fresh" / "set")


def test_shards_of_text_that_shrank_after_a_kill_do_not_stay(desk, tmp_path):
    (tmp_path / "t").mkdir()
    source = tmp_path / "t" / "a.txt"
    text = (desk / "a.txt").read_text()
    source.write_text(text)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(siftloader.prepare, "write_dataset", killed)
        run(desk, tmp_path / "killed" / "set", source)
    before = len(list((tmp_path / "killed" / "set").glob("*.tar")))
    source.write_text(text[: len(text) // 3])
    run(desk, tmp_path / "killed" / "set", source)
    run(desk, tmp_path / "fresh" / "set", source)
    assert hashes(tmp_path / "killed" / "set") == hashes(tmp_path / "fresh" / "set")
    assert len(list((tmp_path / "fresh" / "set").glob("*.tar"))) < before


def test_a_damaged_set_is_made_again_and_its_bigrams_do_not_outlive_it(desk, tmp_path):
    out = tmp_path / "set"
    run(desk, out)
    before = hashes(out)
    write_bigrams(out)
    shard = min(out.glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    run(desk, out)
    assert hashes(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mlm", "mlm-nsp"])
def test_killed_at_random_moments_it_continues_to_the_same_bytes(tmp_path, objective):
    """Law 7 the hard way: `kill -9` at random moments, on real text, until it is through."""
    command = [sys.executable, "-m", "siftloader.cli", "shard", str(DEMO / "embedded_pd.txt.xz")]
    command += ["--tokenizer", str(DEMO / "tokenizer.json"), "--seq-len", "128"]
    command += ["--objective", objective, "--val-fraction", "0.05", "--workers", "2"]
    command += ["--samples-per-shard", "512", "--out"]
    begun = time.monotonic()
    straight = tmp_path / "straight" / "set"
    subprocess.run([*command, str(straight)], check=True, capture_output=True)
    seconds = time.monotonic() - begun
    rng, killed, again = np.random.default_rng(0), 0, tmp_path / "killed" / "set"
    groups = set()
    while killed < 25:
        process = subprocess.Popen(
            [*command, str(again)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        groups.add(process.pid)
        try:
            process.wait(timeout=rng.uniform(0.05, 0.8) * seconds)
            shutil.rmtree(again)  # it got through: begin anew
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    subprocess.run([*command, str(again)], check=True, capture_output=True)
    assert hashes(straight) == hashes(again)
    deadline = time.monotonic() + 20
    while any(alive(group) for group in groups):
        assert time.monotonic() < deadline, "workers outlived the killed process"
        time.sleep(0.1)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_full_disk_is_named_and_leaves_no_file_that_looks_whole(desk, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(siftloader.shards.os, "fsync", full)
        with pytest.raises(CorpusError, match=r"out.*: cannot be written .*No space left"):
            run(desk, tmp_path / "out")
    left = set(hashes(tmp_path / "out"))
    assert all(name.startswith(".work/") for name in left)
    run(desk, tmp_path / "out")
    list(verify(tmp_path / "out"))


def test_a_disk_that_runs_full_is_named_and_the_job_continues_on_a_larger_one(tmp_path):
    """A real file system, too small at every size up to the one that is enough; then it grows."""
    words = np.random.default_rng(0).integers(0, WORDS, 60_000)
    (tmp_path / "t.txt").write_text(
        "\n\n".join(" ".join(f"w{n}" for n in part) for part in np.split(words, 200))
    )
    tokenizer = save_tokenizer(tmp_path / "tiny" / "tokenizer.json")
    (tmp_path / "disk").mkdir()
    command = (
        f"{sys.executable} -m siftloader.cli shard {tmp_path}/t.txt --out {tmp_path}/disk/set"
        f" --tokenizer {tokenizer} --seq-len 16 --samples-per-shard 1000"
        f" --workers {1 if FACTOR == 1 else 2}"
    )
    script = f"""
        mount -t tmpfs -o size=64k none {tmp_path}/disk || exit 99
        for size in 100k 200k 400k 800k; do
            {command} 2>> {tmp_path}/errors && exit 98
            test ! -e {tmp_path}/disk/set/manifest.jsonl || exit 97
            mount -o remount,size=$size {tmp_path}/disk
        done
        mount -o remount,size=16m {tmp_path}/disk
        {command} > /dev/null && cp -r {tmp_path}/disk/set {tmp_path}/set
    """
    root = str(Path(siftloader.prepare.__file__).parents[1])
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    if done.returncode in (1, 99) and not (tmp_path / "errors").exists():
        pytest.skip(f"this machine lets nobody mount a small disk: {done.stderr.strip()}")
    assert done.returncode == 0, (done.returncode, done.stderr)
    told = (tmp_path / "errors").read_text().splitlines()
    warnings, errors = told[::2], told[1::2]
    assert len(warnings) == len(errors) == 4
    assert all("warning: the disk may be too small: about 2" in line for line in warnings)
    assert all("cannot be written" in line and "No space left" in line for line in errors)
    assert all("once it can, run the same again" in line for line in errors)
    options = Preparation(
        out=tmp_path / "straight" / "set",
        tokenizer=tokenizer,
        seq_len=16,
        samples_per_shard=1000,
    )
    prepare([str(tmp_path / "t.txt")], options)
    assert hashes(tmp_path / "set") == hashes(tmp_path / "straight" / "set")


def test_a_process_that_dies_leaves_what_the_next_one_can_use(desk, tmp_path):
    """No exception, no clean-up: the process is gone, in the middle of a shard."""
    program = (
        "import os, sys; from siftloader.prepare import Preparation, prepare\n"
        "left = iter(range(4)); os.fsync = lambda handle: next(left, None) or os._exit(9)\n"
        "left = iter([1] * 30); prepare(sys.argv[2:4], Preparation(out=sys.argv[1],"
        " tokenizer=sys.argv[4], seq_len=16, val_fraction=0.2, samples_per_shard=20, seed=3,"
        " block_bytes=900))"
    )
    out = tmp_path / "killed" / "set"
    arguments = [out, desk / "a.txt", desk / "b.txt", desk / "tiny"]
    root = str(Path(siftloader.prepare.__file__).parents[1])
    died = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=os.environ | {"PYTHONPATH": root}
    )
    assert died.returncode == 9
    left = set(hashes(out))
    assert "manifest.jsonl" not in left and any(name.endswith(".part") for name in left)
    run(desk, out)
    run(desk, tmp_path / "straight" / "set")
    assert hashes(out) == hashes(tmp_path / "straight" / "set")


def test_a_finished_set_is_left_alone_quickly(desk, tmp_path, monkeypatch):
    first = run(desk, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(siftloader.prepare, "make_run", None)  # would fail if it were called
    second = run(desk, tmp_path / "out")
    assert second.reused and not first.reused
    assert (second.fingerprint, second.samples, second.bytes, second.documents) == (
        first.fingerprint,
        first.samples,
        first.bytes,
        first.documents,
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_what_others_put_beside_finished_shards_is_theirs(desk, tmp_path):
    run(desk, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    assert run(desk, tmp_path / "out").reused
    (tmp_path / "out" / "train-000000.tar").unlink()
    with pytest.raises(CorpusError, match=r"holds README\.md besides an earlier run"):
        run(desk, tmp_path / "out")


def test_a_finished_set_that_lost_a_shard_is_made_again(desk, tmp_path):
    run(desk, tmp_path / "out")
    before = hashes(tmp_path / "out")
    (tmp_path / "out" / "train-000001.tar").unlink()
    assert not run(desk, tmp_path / "out").reused
    assert hashes(tmp_path / "out") == before


def test_a_repair_begins_by_taking_the_manifest_away(desk, tmp_path, monkeypatch):
    """Else a repair that is killed would leave a folder that looks finished."""
    run(desk, tmp_path / "out")
    (tmp_path / "out" / "val-000000.sources.npy").unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(siftloader.folder, "write_atomically", killed)
        run(desk, tmp_path / "out")
    assert "manifest.jsonl" not in hashes(tmp_path / "out")
    run(desk, tmp_path / "out")
    list(verify(tmp_path / "out"))


def killed(*arguments, **named):
    raise Killed


def test_an_unfinished_job_is_not_taken_over_with_other_options(desk, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(siftloader.prepare, "count_keys", killed)
        run(desk, tmp_path / "out")
    before = hashes(tmp_path / "out")
    with pytest.raises(CorpusError, match=r"an unfinished job of another job \(seed 3 there, 9"):
        run(desk, tmp_path / "out", seed=9)
    with pytest.raises(
        CorpusError, match=r"unfinished.*sources a, b there, a asked.*finish it as"
    ):
        run(desk, tmp_path / "out", desk / "a.txt")
    assert hashes(tmp_path / "out") == before
    run(desk, tmp_path / "out")


def test_a_job_that_made_nothing_yet_may_be_given_other_options(desk, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(siftloader.prepare, "cut_blocks", killed)
        run(desk, tmp_path / "out")
    run(desk, tmp_path / "out", seed=9)
    list(verify(tmp_path / "out"))


def test_what_others_put_into_the_folder_meanwhile_stays(desk, tmp_path):
    out = tmp_path / "out"

    def meddle(progress):
        if progress["stage"] == "writing":
            (out / "notes.txt").write_text("mine")
            (out / "sub").mkdir(exist_ok=True)

    paths = [str(desk / "a.txt")]
    prepare(paths, options(desk, out), meddle)
    assert (out / "notes.txt").read_text() == "mine" and (out / "sub").is_dir()
    list(verify(out))


@pytest.mark.parametrize("name", ["thesis.txt", "sub/00000000-0123456789abcdef.run"])
def test_a_work_folder_of_somebody_else_is_refused_untouched(desk, tmp_path, name):
    mine = tmp_path / "out" / ".work" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(CorpusError, match=r"its \.work is not of a preparation \(it holds "):
        run(desk, tmp_path / "out")
    assert mine.read_text() == "mine"


def test_a_prepare_json_of_somebody_else_is_no_mark(desk, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepare.json").write_text('{"my": "config"}')
    with pytest.raises(CorpusError, match=r"holds prepare\.json, and no prepare\.json that would"):
        run(desk, tmp_path / "out")


def test_an_unfinished_job_without_its_recipe_is_not_thrown_away(desk, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(siftloader.prepare, "count_keys", killed)
        run(desk, tmp_path / "out")
    (tmp_path / "out" / ".work" / "prepare.json").write_text("{")
    before = hashes(tmp_path / "out")
    with pytest.raises(CorpusError, match=r"cannot be read.*remove \.work to begin again"):
        run(desk, tmp_path / "out")
    assert hashes(tmp_path / "out") == before


def test_what_is_left_of_shards_made_otherwise_is_not_overwritten(desk, tmp_path):
    run(desk, tmp_path / "out")
    (tmp_path / "out" / "manifest.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"finished shards of another job \(seed 3 there, 4"):
        run(desk, tmp_path / "out", seed=4)
    run(desk, tmp_path / "out")
    list(verify(tmp_path / "out"))


def test_text_that_changed_since_the_shards_were_made_is_named(desk, tmp_path):
    for name in "ab":
        shutil.copyfile(desk / f"{name}.txt", tmp_path / f"{name}.txt")
    paths = (tmp_path / "a.txt", tmp_path / "b.txt")
    run(desk, tmp_path / "out", *paths)
    write_text(tmp_path / "b.txt", 20, seed=9)
    with pytest.raises(CorpusError, match=r"finished shards.*\(the text of 'b' is another\)"):
        run(desk, tmp_path / "out", *paths)
    with pytest.raises(CorpusError, match=r"\(the weight of 'a' is another\)"):
        run(desk, tmp_path / "out", f"{paths[0]}:2", paths[1])


@pytest.mark.parametrize("name", ["train-000001.tar", "val-000000.sources.npy", "unigrams.npy"])
def test_a_flipped_bit_in_finished_shards_is_mended_by_the_same_command(desk, tmp_path, name):
    run(desk, tmp_path / "out")
    before = hashes(tmp_path / "out")
    path = tmp_path / "out" / name
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    assert not run(desk, tmp_path / "out").reused
    assert hashes(tmp_path / "out") == before


def test_the_names_of_folders_do_not_show_in_the_bytes(desk, tmp_path):
    shutil.copytree(desk / "tiny", tmp_path / "also" / "tiny")
    run(desk, tmp_path / "one")
    prepare(
        [str(desk / "a.txt"), str(desk / "b.txt")],
        options(desk, tmp_path / "two", tokenizer=tmp_path / "also" / "tiny"),
    )
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_a_copy_of_the_tokenizer_under_another_name_is_the_same_job(desk, tmp_path):
    run(desk, tmp_path / "out")
    shutil.copytree(desk / "tiny", tmp_path / "other")
    paths = [str(desk / "a.txt"), str(desk / "b.txt")]
    assert prepare(paths, options(desk, tmp_path / "out", tokenizer=tmp_path / "other")).reused


def test_shards_inside_the_folder_of_the_text_are_not_text(desk, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copyfile(desk / "a.txt", folder / "a.txt")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(siftloader.prepare, "write_dataset", killed)
        run(desk, folder / "out", folder)
    run(desk, folder / "out", folder)
    assert run(desk, folder / "out", folder).reused
    shutil.copytree(folder / "out", tmp_path / "kept")
    shutil.rmtree(folder / "out")
    run(desk, tmp_path / "aside", folder)
    assert hashes(tmp_path / "kept") == hashes(tmp_path / "aside")
    with pytest.raises(CorpusError, match=r"lies in .*aside, which is to be written"):
        run(desk, tmp_path / "aside", tmp_path / "aside")


def test_too_little_memory_is_told_before_anything_is_done(desk, tmp_path):
    with pytest.raises(CorpusError, match=r"999 bytes is less than .* at most \d+ samples_per_"):
        run(desk, tmp_path / "out", memory=999)
    assert not (tmp_path / "out").exists()
    run(desk, tmp_path / "out", samples_per_shard=1_000_000)  # more than there are, or will be


def test_nothing_to_train_on_does_not_bind_the_folder(desk, tmp_path):
    (tmp_path / "t.txt").write_text("w1 w2 w3")
    with pytest.raises(CorpusError, match="give more text, a shorter seq_len"):
        run(desk, tmp_path / "out", tmp_path / "t.txt", val_fraction=0, objective="clm")
    run(desk, tmp_path / "out", tmp_path / "t.txt", val_fraction=0, objective="clm", seq_len=3)


def test_a_run_that_finds_all_done_tells_the_same_summary(desk, tmp_path):
    text = (desk / "a.txt").read_bytes() + b"\n\nw1 \xff w2\n"
    (tmp_path / "t.txt").write_bytes(text)
    first = run(desk, tmp_path / "out", tmp_path / "t.txt", max_bad=1)
    second = run(desk, tmp_path / "out", tmp_path / "t.txt", max_bad=1)
    assert first.bad == {"not UTF-8": 1}
    assert "t.txt: line" in first.told[0] and not second.told
    told = [replace(summary, seconds=0.0, reused=False, told=[]) for summary in (first, second)]
    assert told[0] == told[1]


def test_unknown_words_are_a_share_of_the_text(desk, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(["w1 strange w2 stranger"] * 50))
    for objective in OBJECTIVES:
        summary = run(
            desk, tmp_path / objective, tmp_path / "t.txt", objective=objective, val_fraction=0
        )
        assert abs(summary.unknown - 0.5) < 0.05


def test_an_error_while_writing_leaves_no_worker_behind(desk, tmp_path):
    def stop(progress):
        if progress["stage"] == "writing":
            raise RuntimeError("enough")

    paths = [str(desk / "a.txt"), str(desk / "b.txt")]
    asked = options(desk, tmp_path / "out", workers=2, samples_per_shard=3)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(RuntimeError, match="enough"):
        prepare(paths, asked, stop)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_a_tokenizer_that_draws_its_merges_is_made_to_decide(tmp_path):
    """BPE dropout gives other ids in every run."""
    vocabulary = {
        each: n for n, each in enumerate(["<unk>", "</s>", "a", "b", "ab", "aba", "abab"])
    }
    merges = [("a", "b"), ("ab", "a"), ("ab", "ab")]
    model = models.BPE(vocabulary, merges, dropout=0.5, unk_token="<unk>")
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    found = {tuple(tokenise(["ababababa"], tokenizer)[0].tolist()) for _ in range(20)}
    assert len(found) == 1


@pytest.mark.parametrize("name", ["notes.md", "train-000000.tar", "manifest.jsonl", ".hidden"])
def test_a_folder_with_anything_else_is_refused_untouched(desk, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(CorpusError, match=rf"holds {re.escape(name)}.*give another folder"):
        run(desk, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: "mine"}


def test_an_unfinished_run_with_a_strangers_file_is_refused_untouched(desk, tmp_path):
    run(desk, tmp_path / "out")
    (tmp_path / "out" / "manifest.jsonl").unlink()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    before = hashes(tmp_path / "out")
    with pytest.raises(CorpusError, match=r"holds thesis\.txt besides an earlier run"):
        run(desk, tmp_path / "out")
    assert hashes(tmp_path / "out") == before


def test_finished_shards_made_otherwise_are_refused_with_the_difference(desk, tmp_path):
    run(desk, tmp_path / "out")
    before = hashes(tmp_path / "out")
    with pytest.raises(CorpusError, match=r"seed 3 there, 4 asked"):
        run(desk, tmp_path / "out", seed=4)
    with pytest.raises(CorpusError, match=r"\(sources a, b there, a asked\)"):
        run(desk, tmp_path / "out", desk / "a.txt")
    assert hashes(tmp_path / "out") == before


def test_a_file_where_the_folder_should_be_is_refused(desk, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CorpusError, match="out: a file; give a folder"):
        run(desk, tmp_path / "out")


def test_two_runs_cannot_write_into_one_folder(desk, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(CorpusError, match="another run is writing here"):
            run(desk, out)
    finally:
        os.close(handle)
    run(desk, out)


def test_text_that_changes_while_it_is_read_is_refused(desk, tmp_path, monkeypatch):
    path = write_text(tmp_path / "t.txt", 50)
    real = siftloader.prepare.cut_blocks

    def meddled(*arguments):
        yield from real(*arguments)
        path.write_text(path.read_text() + "\n\nw1 w2")

    with monkeypatch.context() as patch:
        patch.setattr(siftloader.prepare, "cut_blocks", meddled)
        with pytest.raises(CorpusError, match=r"t\.txt.*changed while it was read"):
            run(desk, tmp_path / "out", path)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    run(desk, tmp_path / "out", path)
    list(verify(tmp_path / "out"))


# Bad inputs.

BAD = {
    "no UTF-8": (b"w1 \xff", "not UTF-8"),
    "NUL": (b"w1\0w2", "NUL byte"),
    "empty": (b"", "nothing to train on: 0 documents"),
    "white space": (b" \n\n\t\n", "nothing to train on: 0 documents"),
    "all held out": (b"w1 w2", "nothing to train on: 1 documents, 0 tokens"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", BAD)
def test_bad_text_is_refused_and_the_folder_is_free_again(desk, tmp_path, case, workers):
    data, message = BAD[case]
    (tmp_path / "t.txt").write_bytes(data)
    fraction = 0.999_999 if case == "all held out" else 0.0
    with pytest.raises(CorpusError, match=message):
        run(desk, tmp_path / "out", tmp_path / "t.txt", val_fraction=fraction, workers=workers)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    if case in ("empty", "white space"):  # nothing was made, so nothing binds the folder
        run(desk, tmp_path / "out")


def test_bad_records_are_skipped_and_counted_up_to_a_budget(desk, tmp_path):
    """The same budget for all workers, and the error tells the first of them."""
    good = [f"w{n} w{n + 1} w{n + 2}" for n in range(60)]
    bad = [document.encode() for document in good]
    for n in (7, 20, 41):
        bad[n] += b" \xff"
    (tmp_path / "t.txt").write_bytes(b"\n\n".join(bad))
    (tmp_path / "u.txt").write_bytes("\n\n".join(good).encode())
    paths = (tmp_path / "t.txt", tmp_path / "u.txt")
    summary = run(desk, tmp_path / "ok" / "set", *paths, max_bad=3, block_bytes=100)
    assert summary.bad == {"not UTF-8": 3}
    assert [source.documents for source in summary.sources] == [57, 60]
    for workers in (1, 2):
        out = tmp_path / str(workers) / "set"
        with pytest.raises(
            CorpusError, match=r"t\.txt: line 15,.*\(3 x not UTF-8; max_bad allows 2"
        ):
            run(desk, out, *paths, max_bad=2, block_bytes=100, workers=workers)
        run(desk, out, *paths, max_bad=3, block_bytes=100, workers=workers)
        assert hashes(out) == hashes(tmp_path / "ok" / "set")


def test_text_cut_short_in_its_compression_is_refused(desk, tmp_path):
    whole = lzma.compress((desk / "a.txt").read_bytes())
    (tmp_path / "t.txt.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"t\.txt\.xz: damaged or cut short"):
        run(desk, tmp_path / "out", tmp_path / "t.txt.xz")


def test_a_byte_order_mark_changes_nothing(desk, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + (desk / "a.txt").read_bytes())
    plain = run(desk, tmp_path / "plain", desk / "a.txt")
    marked = run(desk, tmp_path / "marked", tmp_path / "t.txt")
    assert plain.fingerprint == marked.fingerprint


def test_less_text_than_one_sample_is_a_padded_one_or_none(desk, tmp_path):
    (tmp_path / "t.txt").write_text("w1 w2 w3")
    run(desk, tmp_path / "mlm", tmp_path / "t.txt", val_fraction=0)
    assert texts_of(tmp_path / "mlm", "train") == [[2, 6, 7, 8, 3] + [0] * 11]
    with pytest.raises(CorpusError, match=r"3 tokens .*no full sample of 16"):
        run(desk, tmp_path / "clm", tmp_path / "t.txt", val_fraction=0, objective="clm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "nsp"}, "objective must be one of mlm, mlm-nsp, clm; got 'nsp'"),
        ({"objective": "mlm-nsp", "seq_len": 4}, "seq_len must be at least 5"),
        ({"max_bad": -1}, "max_bad must be 0 or more"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"engine": "dask"}, "engine must be one of local, ray; got 'dask'"),
        ({"memory": 0}, "memory must be a number of bytes"),
        ({"documents": "line"}, "documents must be one of blank-line, file; got 'line'"),
        ({"seq_len": 2}, "seq_len must be at least 3"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\)"),
        ({"val_fraction": -0.1}, "val_fraction must be"),
        ({"val_fraction": float("nan")}, "val_fraction must be"),
        ({"seed": -1}, "seed must not be negative"),
        ({"samples_per_shard": 0}, r"samples_per_shard must be in 1\.\.1,000,000"),
        ({"samples_per_shard": 1_000_001}, "samples_per_shard must be"),
    ],
    ids=str,
)
def test_options_check_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        Preparation(out="out", tokenizer="t", **changes)


# Tokenizers.


@pytest.mark.parametrize(
    ("special", "objective", "expected"),
    [
        (BERT, "mlm", {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}),
        (BERT, "clm", {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "eos": 3}),
        (("<|endoftext|>", "?"), "clm", {"eos": 0, "unk": 1}),
        (("<s>", "<unk>", "</s>"), "clm", {"unk": 1, "cls": 0, "sep": 2, "eos": 2}),
        (("<s>", "<unk>", "<pad>", "</s>", "<mask>"), "mlm", None),
        (("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "mlm", r"lacks: mask \(\[MASK\], <mask>\)"),
        (("[PAD]", "[UNK]", "[CLS]", "[EOS]"), "mlm", r"lacks: sep .*; mask "),
        (("[PAD]", "[UNK]"), "clm", r"objective 'clm' needs .*lacks: eos \(<\|endoftext\|>"),
    ],
    ids=str,
)
def test_special_ids_are_found_by_their_names(desk, tmp_path, special, objective, expected):
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json", special)
    asked = Preparation(tmp_path / "out", tokenizer, objective=objective, seq_len=8)
    if isinstance(expected, str):
        with pytest.raises(CorpusError, match=expected):
            prepare([str(desk / "a.txt")], asked)
        assert not (tmp_path / "out").exists()
        return
    prepare([str(desk / "a.txt")], asked)
    found = dict(ShardSet.open(tmp_path / "out").tokenizer.special_ids)
    if expected is None:
        expected = {"cls": 0, "unk": 1, "pad": 2, "sep": 3, "mask": 4, "eos": 3}
    assert found == expected


def test_text_that_spells_a_special_token_stays_text():
    tokenizer = load_tokenizer(DEMO / "tokenizer.json")
    ids, _ = tokenise(["Call me [MASK]. [SEP] [PAD]"], tokenizer)
    assert min(ids) > 4
    again, _ = tokenise(["Call me [MASK]. [SEP] [PAD]"], restore_tokenizer(tokenizer.to_str()))
    assert again.tolist() == ids.tolist()
    assert tokenizer.decode(ids.tolist()) == "call me [ mask ]. [ sep ] [ pad ]"


def test_padding_truncation_and_templates_of_a_tokenizer_change_nothing(desk, tmp_path):
    tokenizer = Tokenizer.from_file(str(desk / "tiny" / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", None, [("[CLS]", 2)])
    (tmp_path / "tiny").mkdir()
    tokenizer.save(str(tmp_path / "tiny" / "tokenizer.json"), pretty=False)
    run(desk, tmp_path / "x" / "set")
    run(tmp_path, tmp_path / "y" / "set", desk / "a.txt", desk / "b.txt")
    assert hashes(tmp_path / "x" / "set") == hashes(tmp_path / "y" / "set")


def test_the_tokenizer_hash_follows_the_vocabulary_not_the_path(desk, tmp_path):
    def hash_of(path):
        asked = Preparation(tmp_path / f"{path.parent.name}-out", path, seq_len=8)
        prepare([str(desk / "a.txt")], asked)
        return ShardSet.open(asked.out).tokenizer.sha256

    same = save_tokenizer(tmp_path / "p" / "tokenizer.json")
    also = save_tokenizer(tmp_path / "q" / "tokenizer.json")
    other = save_tokenizer(tmp_path / "r" / "tokenizer.json", words=WORDS + 1)
    assert hash_of(same) == hash_of(also) != hash_of(other)


def test_above_65536_ids_a_token_takes_four_bytes(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "big" / "tokenizer.json", words=70_000)
    (tmp_path / "t.txt").write_text("w69999 w0 w65531")
    prepare(
        [str(tmp_path / "t.txt")],
        Preparation(tmp_path / "out", tokenizer, seq_len=5, val_fraction=0),
    )
    assert ShardSet.open(tmp_path / "out").layout.dtype == "<u4"
    assert texts_of(tmp_path / "out", "train") == [[2, 70_004, 5, 65_536, 3]]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "gone/tokenizer.json", "no such tokenizer file or folder"),
        (None, "./gone", "no such tokenizer file or folder"),
        ("{}", "t.json", r"t\.json: a tokenizer that can be loaded"),
        ("<html>", "t.json", "give a tokenizer.json"),
        ("", "folder/vocab.txt", r"no tokenizer\.json in this folder; save the tokenizer there"),
    ],
    ids=str,
)
def test_a_tokenizer_that_cannot_be_had_is_named(tmp_path, monkeypatch, content, name, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_tokenizer("folder" if name.startswith("folder") else name)


def test_without_tokenizers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CorpusError, match=r"pip install 'siftloader\[prepare\]'"):
        load_tokenizer("any")


def test_a_long_document_is_tokenised_in_pieces_to_the_same_ids(desk, monkeypatch):
    """Cut at line ends, at spaces, never inside a word."""
    tokenizer = load_tokenizer(desk / "tiny")
    text = "w1 w22 w3\nw44 w5\n" * 9 + "w6 " * 20 + "\n\n" + "w7 w8"
    texts = [text, "w9", "", text]
    whole, lengths = tokenise(texts, tokenizer)
    assert lengths.tolist() == [lengths[0], 1, 0, lengths[0]] and lengths.sum() == len(whole)
    for piece in (6, 7, 10, 33):
        monkeypatch.setattr(siftloader.tokens, "PIECE", piece)
        monkeypatch.setattr(siftloader.tokens, "BATCH", 2 * piece)
        again, counts = tokenise(texts, tokenizer)
        assert again.tolist() == whole.tolist()
        assert counts.tolist() == lengths.tolist()


# Stories.


def test_nothing_on_disk_tells_where_when_or_by_whom_it_was_made(desk, tmp_path):
    run(desk, tmp_path / "out")
    for name in ("dataset.json", "prepare.json", "manifest.jsonl"):
        text = (tmp_path / "out" / name).read_text()
        assert str(desk) not in text and str(tmp_path) not in text and os.sep not in text
    recipe = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert ShardSet.open(tmp_path / "out").tokenizer.name == "tiny"
    assert [source["name"] for source in recipe["sources"]] == ["a", "b"]


def test_progress_is_silent_when_nobody_watches(desk, tmp_path, capfd):
    run(desk, tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_would_lose_characters_is_refused(desk, tmp_path):
    model = models.BPE({"a": 0, "</s>": 1}, [])
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    asked = options(desk, tmp_path / "out", tokenizer=tmp_path, objective="clm")
    with pytest.raises(CorpusError, match="characters would vanish; give it an unk token"):
        prepare([str(desk / "a.txt")], asked)


def test_a_tokenizer_that_fails_on_text_is_named(desk, tmp_path):
    vocabulary = {word: n for n, word in enumerate([*BERT, "w1"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="gone"))
    tokenizer.add_special_tokens(list(BERT))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CorpusError, match=r"the tokenizer failed on text \(.*mend it, or choose"):
        prepare([str(desk / "a.txt")], options(desk, tmp_path / "out", tokenizer=tmp_path))


def test_nothing_to_train_on_tells_what_was_skipped(desk, tmp_path):
    (tmp_path / "t.txt").write_bytes("hello".encode("utf-16"))
    with pytest.raises(CorpusError, match=r"nothing to train on.*\(skipped: 1 UTF-16"):
        run(desk, tmp_path / "out", tmp_path / "t.txt", max_bad=5)
    with pytest.raises(ValueError, match=r"out must be a folder of this machine's, got the URL"):
        Preparation("s3://bucket/x", tmp_path)
