"""The command line does what it says, and says what went wrong in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from siftloader.cli import main
from siftloader.shards import ShardSet


ROOT = Path(__file__).parents[1]
DEMO = ROOT / "shards" / "demo"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "tale.txt"
    path.write_text("\n\n".join(f"Chapter {n}. Call me Ishmael, the {n}th." for n in range(60)))
    return path


def shard(text: Path, out: Path, *more: str) -> list[str]:
    tokenizer = str(DEMO / "tokenizer.json")
    return [
        *("shard", str(text), "--out", str(out), "--tokenizer", tokenizer),
        *("--seq-len", "16", "--val-fraction", "0.2", *more),
    ]


def test_shard_verify_and_inspect_tell_one_story(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(shard(text, out)) == 0
    printed, complaints = capsys.readouterr()
    dataset = ShardSet.open(out)
    counts = {
        split: sum(shard.num_sequences for shard in dataset.shards(split))
        for split in ("train", "val")
    }
    table = {line[:14].strip(): line[14:].strip() for line in printed.splitlines()}
    assert table["documents"] == "60"
    assert table["train samples"] == f"{counts['train']:,}"
    assert table["val samples"] == f"{counts['val']:,}"
    assert table["fingerprint"] == dataset.fingerprint
    assert complaints == ""

    assert main(["verify", str(out)]) == 0
    assert f"2 shards, {sum(counts.values())} samples, all as they" in capsys.readouterr().out

    assert main(["inspect", str(out), "--samples", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"train: 1 shards, {counts['train']} samples" in printed
    assert f"{counts['val']} samples of tale" in printed
    assert "| 2 " in printed, "ids, where no tokenizer is at hand"
    assert main(["inspect", str(out), "--tokenizer", str(DEMO)]) == 0
    assert "call me ishmael" in capsys.readouterr().out


def test_a_second_run_says_that_all_is_done(text, tmp_path, capsys):
    assert main(shard(text, tmp_path / "out")) == 0
    assert main(shard(text, tmp_path / "out")) == 0
    assert "left as it is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--seq-len", "2"], 2, "seq_len must be at least 3 tokens, got 2"),
        (["--val-fraction", "1"], 2, "val_fraction must be in [0, 1), got 1.0"),
        (["--tokenizer", "gone/tokenizer.json"], 1, "no such tokenizer file or folder"),
        (["--out", __file__], 1, "a file; give a folder for the shards"),
        (["--out", str(DEMO)], 1, "already holds finished shards made otherwise"),
        (["--val-fraction", "0.9999999"], 1, "nothing to train on"),
    ],
    ids=str,
)
def test_what_went_wrong_is_one_line_and_a_status(text, tmp_path, capsys, more, status, message):
    assert main(shard(text, tmp_path / "out", *more)) == status
    printed, complaint = capsys.readouterr()
    assert printed == ""
    assert complaint.startswith("siftloader: ") and complaint.count("\n") == 1
    assert message in complaint


def test_an_interruption_is_one_line_too(text, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("siftloader.prepare.tokenise", interrupted)
    assert main(shard(text, tmp_path / "out")) == 130
    assert capsys.readouterr() == ("", "siftloader: interrupted; the same command starts again\n")


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(shard(tmp_path / "gone.txt", tmp_path / "out")) == 1
    assert "gone.txt: no such file or folder" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 1
    assert "not a finished shard folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["shard"], ["shuffle"], ["shard", "a.txt", "--out", "o"]], ids=str
)
def test_a_command_that_makes_no_sense_is_status_2(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert "usage: siftloader" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["shard", "verify", "inspect"])
def test_help_teaches_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"example: siftloader {command} " in capsys.readouterr().out


def test_verify_names_the_first_bad_shard_and_sample(tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(DEMO, folder)
    path = folder / "train-000002.tar"
    data = bytearray(path.read_bytes())
    data[1024 * 17 + 3] ^= 1  # in the name of member 17
    path.write_bytes(data)
    assert main(["verify", str(folder)]) == 1
    assert "train-000002: sample 17 does not start with the header" in capsys.readouterr().err


def test_the_demo_is_as_it_was_written_and_small_enough_to_carry(capsys):
    assert main(["verify", str(DEMO)]) == 0
    assert main(["inspect", str(DEMO)]) == 0
    assert "[CLS]" in capsys.readouterr().out
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert max(sizes.values()) < 3_000 * 1024, "no file above 3,000 KiB"
    assert sum(sizes.values()) < 6_500_000
    dataset = ShardSet.open(DEMO)
    assert sum(shard.num_sequences for shard in dataset.shards("train")) > 2_000
    assert sum(shard.num_sequences for shard in dataset.shards("val")) > 90
    special = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert dataset.tokenizer.special_ids == special


@pytest.mark.parametrize("script", [["tools/make_shards.py"], ["-m", "siftloader.cli", "shard"]])
def test_script_and_module_are_the_same_command(text, tmp_path, script):
    arguments = shard(text, tmp_path / "out", "--objective", "clm")[1:]
    done = subprocess.run(
        [sys.executable, *script, *arguments],
        cwd=ROOT,
        env=os.environ | {"LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train samples" in done.stdout
    assert done.stderr == ""
    assert ShardSet.open(tmp_path / "out").objective == "clm"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m siftloader.cli inspect {DEMO} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("folder") and done.stderr == ""
