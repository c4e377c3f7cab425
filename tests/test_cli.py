"""The command line does what it says, and says what went wrong in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from servers import serving

from siftloader.cli import main
from siftloader.shards import Layout, ShardSet, Source, write_dataset, write_shard
from siftloader.tokens import describe_tokenizer, load_tokenizer


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
    assert re.search(rf"tale +{counts['val']}  100.00%", printed)
    assert re.search(r"\n +0  tale .*  2 \d+ \d+", printed), "ids, where no tokenizer is at hand"
    assert main(["inspect", str(out), "--tokenizer", str(DEMO)]) == 0
    printed = capsys.readouterr().out
    assert "call me ishmael" in printed
    assert "note:" not in printed, "it is the tokenizer they were made with"


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
        (
            ["--out", str(DEMO)],
            1,
            "holds finished shards of another job (seq_len 128 there, 16 asked",
        ),
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


def test_without_any_standard_error_it_works_as_well(text, tmp_path):
    """As under pythonw, or with `2>&-`."""
    command = " ".join([sys.executable, "-m", "siftloader.cli", *shard(text, tmp_path / "out")])
    done = subprocess.run(f"{command} 2>&-", shell=True, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out" / "manifest.jsonl").exists()


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


@pytest.mark.parametrize("command", ["shard", "verify", "inspect", "report"])
def test_help_teaches_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"example: siftloader {command} " in capsys.readouterr().out


@pytest.fixture
def copy(tmp_path):
    """The demo's shards, which a test may damage."""
    return Path(shutil.copytree(DEMO, tmp_path / "copy"))


def flip(path: Path, *places: int) -> None:
    data = bytearray(path.read_bytes())
    for at in places:
        data[at] ^= 1
    path.write_bytes(data)


def test_verify_goes_on_and_names_every_bad_shard(copy, capsys):
    """A large set takes hours: whoever copies it anew wants the whole list."""
    name = 1024 * 17 + 3  # in the name of member 17
    flip(copy / "train-000000.tar", name, 1024 * 19 + 700, 1024 * 40 + 700)
    (copy / "train-000001.tar").unlink()
    flip(copy / "val-000000.sources.npy", -1)
    assert main(["verify", str(copy)]) == 1
    printed, complaints = capsys.readouterr()
    assert printed == ""
    first, second, third, last = complaints.splitlines()
    assert first.startswith("siftloader: train-000000: sample 17, byte ")
    assert f"byte {name} of train-000000.tar (header)" in first
    assert first.endswith("; 3 samples of it are damaged")
    assert second.startswith("siftloader: train-000001: cannot be read")
    assert third.startswith("siftloader: val-000000.sources.npy: sha256 differs")
    good = [s for s in ShardSet.open(copy).manifest if s.shard in ("train-000002", "train-000003")]
    assert last == (
        f"siftloader: {copy}: 3 faults; 2 of 5 shards, {sum(s.num_sequences for s in good):,} samples, "
        "are as they were written"
    )


def test_verify_names_every_tar_that_is_no_shard(ready, capsys):
    for name in ("train-000001.tar", "val-000001.tar"):
        shutil.copy(ready / "train-000000.tar", ready / name)
    assert main(["verify", str(ready)]) == 1
    complaints = capsys.readouterr().err.splitlines()
    assert "train-000001.tar is not in" in complaints[0]
    assert "val-000001.tar is not in" in complaints[1]
    assert complaints[2].endswith("2 faults; 2 of 2 shards, 2 samples, are as they were written")


def test_verify_compares_the_counts_where_all_shards_are_good(ready, capsys):
    """With a bad shard among them they cannot agree, and nothing new would be said."""
    ids = np.array([[2, 9, 9, 9, 9, 9, 3]])
    again = write_shard(ready, "train-000000", ids, np.zeros(1, np.uint8), Layout(7))
    held_out = next(shard for shard in ShardSet.open(ready).manifest if shard.split == "val")
    dataset = ShardSet.open(ready)
    write_dataset(
        ready,
        [again, held_out],
        layout=Layout(7),
        objective="mlm",
        tokenizer=dataset.tokenizer,
        sources=dataset.sources,
        unigrams=dataset.unigrams,
        seed=0,
    )
    assert main(["verify", str(ready)]) == 1
    assert "unigrams.npy: not the counts of the train split" in capsys.readouterr().err
    flip(ready / "train-000000.tar", 700)
    assert main(["verify", str(ready)]) == 1
    assert "unigrams.npy" not in capsys.readouterr().err


def test_a_set_behind_a_url_is_verified_and_inspected(ready, tmp_path, capsys):
    pytest.importorskip("aiohttp")
    files = {path.name: path.read_bytes() for path in ready.iterdir()}
    cache = ["--cache", str(tmp_path / "cache"), "--cache-bytes", "1MB"]
    with serving(files) as web:
        url = web.url.replace("http://", "http://me:secret@")
        assert main(["verify", f"{url}?key=secret", *cache]) == 0
        first, _ = capsys.readouterr()
        assert main(["verify", f"{url}?key=secret", *cache]) == 0
        assert main(["verify", f"{url}?key=secret", *cache, "--json"]) == 0
        assert main(["inspect", f"{url}?key=secret", *cache]) == 0
        asked = dict(web.asked)
        assert main(["verify", f"{url}/gone?key=secret", *cache]) == 0, (
            "the server knows one folder"
        )
        web.files.pop("manifest.jsonl")
        assert main(["verify", f"{url}?key=secret", *cache]) == 1
    assert asked["train-000000.tar"] == 1, "the copy serves the rest"
    printed, complaints = capsys.readouterr()
    name = f"{web.url.replace('http://', 'http://***@')}?***"
    assert first == f"{name}: 2 shards, 2 samples, all as they were written\n"
    assert printed.startswith(
        f"{name}: 2 shards, 2 samples, all as they were written; 2 of them on this machine already: "
        "to read all from there, give an empty --cache\n"
    )
    assert '"copies": 2' in printed
    assert "train: 1 shards, 1 samples" in printed
    assert "manifest.jsonl?***: not there" in complaints
    assert "secret" not in first + printed + complaints
    copies = sorted(path.suffix for path in (tmp_path / "cache").glob("??/*"))
    assert copies.count(".tar") == 2


def test_verify_gives_up_where_nothing_arrives_any_more(copy, tmp_path, capsys, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("siftloader.cli.LOST", 2)
    files = {path.name: path.read_bytes() for path in copy.iterdir() if path.suffix != ".tar"}
    with serving(files) as web:
        assert main(["verify", web.url, "--cache", str(tmp_path / "cache")]) == 1
    complaints = capsys.readouterr().err.splitlines()
    assert "train-000000.tar: not there" in complaints[0]
    assert "train-000001.tar: not there" in complaints[1]
    assert (
        "2 shards in a row did not arrive, so the 3 after them were not asked for" in complaints[2]
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat x", "would run a program"),
        ("htp://host/x", "cannot be opened"),
        ("http:/host/x", "no such folder"),
    ],
)
def test_a_wrong_url_is_one_line(url, message, capsys):
    assert main(["verify", url]) in (1, 2)
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "told"),
    [("shard", "interrupted; the same command continues"), ("verify", "interrupted")],
)
def test_only_what_continues_says_so(command, told, text, ready, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("siftloader.prepare.cut_blocks", interrupted)
    monkeypatch.setattr("siftloader.cli.check_samples", interrupted)
    arguments = shard(text, tmp_path / "out") if command == "shard" else ["verify", str(ready)]
    assert main(arguments) == 130
    assert capsys.readouterr() == ("", f"siftloader: {told}\n")


@pytest.fixture
def ready(tmp_path):
    """Shards as some other run of this tokenizer made them: two samples, one of them held out."""
    folder, path = tmp_path / "ready", DEMO / "tokenizer.json"
    folder.mkdir()
    tokenizer = load_tokenizer(path)
    rows = [
        tokenizer.encode(text, add_special_tokens=False).ids for text in ("the whale", "a ship")
    ]
    ids = np.array([[2, *row[:5], *[0] * (5 - len(row)), 3] for row in rows])
    about = describe_tokenizer(tokenizer, path, "mlm")
    shards = [
        write_shard(folder, f"{split}-000000", ids[[n]], np.zeros(1, np.uint8), Layout(7))
        for n, split in enumerate(("train", "val"))
    ]
    write_dataset(
        folder,
        shards,
        layout=Layout(7),
        objective="mlm",
        tokenizer=about,
        sources=[Source("sea", "0" * 64, 2)],
        unigrams=np.bincount(ids[0], minlength=about.vocab_size),
        seed=0,
    )
    return folder


def test_verify_as_json_says_all_is_well(ready, capsys):
    assert main(["verify", str(ready), "--json"]) == 0
    printed, complaints = capsys.readouterr()
    assert complaints == "", "no progress bar where nobody watches"
    assert json.loads(printed) == {
        "folder": str(ready),
        "ok": True,
        "shards": 2,
        "samples": 2,
        "bytes": 2 * 2048,
        "copies": 0,
        "fingerprint": ShardSet.open(ready).fingerprint,
        "errors": [],
    }


def test_verify_as_json_names_the_byte(ready, capsys):
    path = ready / "val-000000.tar"
    data = bytearray(path.read_bytes())
    data[642] ^= 0x10
    path.write_bytes(data)
    assert main(["verify", str(ready), "--json"]) == 1
    printed, complaints = capsys.readouterr()
    verdict = json.loads(printed)
    assert complaints == ""
    assert (verdict["ok"], verdict["shards"], verdict["samples"], verdict["bytes"]) == (
        False,
        1,
        1,
        2048,
    )
    [error] = verdict["errors"]
    message = error.pop("message")
    assert error == {"shard": "val-000000", "sample": 0, "byte": 642, "damaged": 1}
    assert message.startswith(
        "val-000000: sample 0, byte 642 of val-000000.tar (token 1): found 0x"
    )
    assert main(["verify", str(ready)]) == 1
    assert capsys.readouterr().err.startswith(
        f"siftloader: {message}; 1 samples of it are damaged\n"
    )


@pytest.mark.parametrize("what", ["no folder", "no manifest", "no shard"])
def test_verify_as_json_of_what_is_missing(ready, capsys, what):
    folder = ready / "gone" if what == "no folder" else ready
    lost = {"no manifest": "manifest.jsonl", "no shard": "train-000000.tar"}
    if what in lost:
        (ready / lost[what]).unlink()
    assert main(["verify", str(folder), "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert not verdict["ok"] and verdict["shards"] == (1 if what == "no shard" else 0)
    assert (verdict["fingerprint"] is None) == (what != "no shard")
    [error] = verdict["errors"]
    assert error["shard"] == ("train-000000" if what == "no shard" else None)
    assert error["message"]


def test_verify_shows_its_progress_to_a_terminal(ready, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["verify", str(ready)]) == 0
    assert "verifying: " in capsys.readouterr().err


def test_inspect_tells_of_a_tokenizer_that_is_another(ready, tmp_path, capsys):
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    other = tmp_path / "other.json"
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["the"], vocabulary["a"] = vocabulary["a"], vocabulary["the"]
    other.write_text(json.dumps(tokenizer))
    assert main(["inspect", str(ready), "--tokenizer", str(other)]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"note: .*other.json is not the tokenizer .* \(.*\); the texts may be wrong", printed
    )
    assert "[CLS] a whale" in printed, "as it reads them"
    assert main(["inspect", str(ready), "--tokenizer", str(other), "--json"]) == 0
    assert "is not the tokenizer" in json.loads(capsys.readouterr().out)["notes"][0]
    vocabulary["[gone]"] = vocabulary.pop("[MASK]")
    tokenizer["added_tokens"] = [
        token for token in tokenizer["added_tokens"] if token["content"] != "[MASK]"
    ]
    other.write_text(json.dumps(tokenizer))  # one that could not have made them
    assert main(["inspect", str(ready), "--tokenizer", str(other)]) == 0
    assert "is not the tokenizer" in capsys.readouterr().out


def test_inspect_reads_a_tokenizer_that_lies_beside_the_shards(ready, capsys):
    shutil.copy(DEMO / "tokenizer.json", ready)
    assert main(["inspect", str(ready), "--split", "val"]) == 0
    printed = capsys.readouterr().out
    assert "[CLS] a ship" in printed and "note:" not in printed
    assert "train:" not in printed
    assert main(["inspect", str(ready), "--json", "--samples", "9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["splits"]) == ["train", "val"]
    assert found["notes"] == []
    assert found["splits"]["train"]["examples"][0]["text"].startswith("[CLS] the whale")


def test_inspect_draws(ready, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "drawn.png"
    assert main(["inspect", str(ready), "--plot", str(drawn)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {drawn}\n")
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--samples", "-1"], 2, "--samples must be 0 or more, got -1"),
        (["--split", "test"], 1, "no shards of split 'test', only of ['train', 'val']"),
        (["--tokenizer", "gone.json"], 1, "gone.json: no such tokenizer file"),
    ],
    ids=["samples", "split", "tokenizer"],
)
def test_inspect_says_what_is_wrong(ready, capsys, more, status, message):
    assert main(["inspect", str(ready), *more]) == status
    printed, complaint = capsys.readouterr()
    assert printed == "" and message in complaint


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


# --- report ----------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two arms of two seeds, and one of them still under way in a third."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for arm, ends_at in (("plain", 6.0), ("loss", 5.9)):
        for seed in range(2 + (arm == "loss")):
            lines: list[dict] = [{"run": {"experiment": "small", "arm": arm, "seed": seed}}]
            for step in (10, 20, 30):
                loss = ends_at + seed + 1 / step + 0.001 * seed * (arm == "loss")
                record = {"step": step, "samples": 8 * step, "val_loss": loss}
                lines.append({**record, "val_accuracy": 0.1, "seconds_training": 2.0 * step})
            if seed < 2:
                lines.append({**lines[-1], "final": True})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{arm}-{seed}.jsonl").write_text(text)
    return folder


def test_report_prints_the_table_and_writes_page_and_parquet(runs, tmp_path, capsys):
    parquet = tmp_path / "all.parquet"
    assert main(["report", str(runs), "--parquet", str(parquet)]) == 0
    printed, complaints = capsys.readouterr()
    assert re.search(r"\nloss +2 +240 +60 .* -0\.0995 ± 0\.0064 .* better\n", printed)
    assert "not finished, and left out: loss (seed 2)" in printed
    assert f"wrote {parquet}\n" in printed
    page = runs / "report.html"
    assert printed.endswith(f"wrote {page}: the same with figures, to open in a browser\n")
    assert complaints == ""
    assert page.read_text().startswith("<!doctype html>")

    again = tmp_path / "again.html"
    assert main(["report", str(parquet), "--out", str(again)]) == 0
    assert again.read_bytes() == page.read_bytes(), "Parquet holds all that the logs hold"


def test_report_shows_selections_with_their_texts(runs, tmp_path, capsys):
    log = tmp_path / "x.selections"
    write_selections(log, ShardSet.open(DEMO).fingerprint)
    command = ["report", str(runs), "--selections", str(log), "--control", "loss"]
    assert main([*command, "--shards", str(DEMO), "--tokenizer", str(DEMO)]) == 0
    assert re.search(r"\nplain .* \+0\.0995 ± 0\.0064 .* worse\n", capsys.readouterr().out)
    text = (runs / "report.html").read_text()
    assert "What was selected: x.selections" in text
    assert re.search(r'<td class="word text">[^<]{60,}</td>', text), "a line of text"
    write_selections(tmp_path / "y", "another fingerprint")
    assert main(["report", str(runs), "--selections", str(tmp_path / "y"), "--shards", str(DEMO)])
    assert "the log is of shards with fingerprint another" in capsys.readouterr().err


def write_selections(folder: Path, ids: str) -> None:
    import torch

    from siftloader.selection_log import SelectionLog

    log = SelectionLog(folder, ids=ids)
    for pool in range(4):
        scores = torch.arange(6.0)
        log.add(pool, pool, torch.arange(6), scores, scores.topk(3).indices)
    log.flush()


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--control", "none"], 1, "no finished run of an arm 'none' to compare with, only loss"),
        (["--out", "x.pdf"], 2, "x.pdf: give it a name that ends in .html"),
        (["--out", "gone/x.html"], 1, "no folder gone; make it, or write somewhere else"),
        (["--parquet", "x.csv"], 2, "x.csv: give it a name that ends in .parquet"),
        (["--shards", str(DEMO)], 2, "--shards are for the texts of --selections"),
        (["--selections", "gone", "--tokenizer", "t"], 2, "--tokenizer needs --shards"),
        (["--selections", "gone"], 1, "gone: no finished part of a selection log here"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_report_is_one_line(runs, capsys, more, status, message):
    assert main(["report", str(runs), *more]) == status
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and message in complaint
    assert not (runs / "report.html").exists()


def test_a_report_of_what_is_no_log_names_file_and_line(runs, capsys):
    (runs / "odd.jsonl").write_text('{"shard": "train-000000"}\n')
    assert main(["report", str(runs)]) == 1
    assert "odd.jsonl, line 1: no 'step'; a log of training has" in capsys.readouterr().err
    assert main(["report", str(runs / "gone")]) == 1
    assert "no log (*.jsonl) or results (*.parquet) here" in capsys.readouterr().err


def test_what_a_run_is_called_cannot_command_the_terminal(runs, capsys):
    path = runs / "loss-0.jsonl"
    path.write_text(path.read_text().replace('"loss"', '"\\u001b[31mloss"'))
    assert main(["report", str(runs)]) == 1
    complaint = capsys.readouterr().err
    assert "which is no name" in complaint and "\x1b[" not in complaint
