from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftloader.shards import Layout, Source, Tokenizer, write_dataset, write_shard


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import pretrain_bert
import pretrain_gpt
import sift_own_batches


ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "shards" / "demo"
SHORT = ("--steps=8", "--batch-size=4", "--eval-every=4", "--eval-samples=8", "--final-samples=8")
SIFTED = ("--warmup-steps=2", "--cooldown=0.25")


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def clm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random letters as shards for next-token prediction."""
    folder, layout = tmp_path_factory.mktemp("clm"), Layout.for_vocabulary(16, 90)
    rng = np.random.default_rng(0)
    written = [
        write_shard(folder, stem, rng.integers(0, 90, (n, 16)), np.zeros(n, np.uint8), layout)
        for stem, n in (("train-000000", 42), ("val-000000", 8))
    ]
    write_dataset(
        folder,
        written,
        layout=layout,
        objective="clm",
        tokenizer=Tokenizer("letters", "0" * 64, 90, {"eos": 0}),
        sources=[Source("letters", "0" * 64, 1)],
        unigrams=np.arange(90),
        seed=0,
    )
    return folder


@pytest.mark.parametrize("sift", ["none", "random", "loss", "entropy"])
def test_bert_trains_on_real_text_whatever_makes_its_batches(sift: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    pretrain_bert.main([f"--shards={DEMO}", f"--sift={sift}", f"--log={log}", *SHORT, *SIFTED])
    half, whole, final = lines(log)
    assert [half["samples"], whole["samples"]] == [16, 32]
    assert final["final"] and final["learning_rate"] == 0
    assert whole["val_loss"] < half["val_loss"] < math.log(8192) + 0.5
    assert 0 < half["train_loss"] < 20 and 0 <= whole["val_accuracy"] <= 1
    assert (whole["seconds_scoring"] > 0) == (sift != "none")
    assert whole["seconds_training"] > whole["seconds_scoring"] + whole["seconds_loading"] > 0


@pytest.mark.parametrize("sift", ["none", "loss"])
def test_gpt_trains_in_the_same_loop(clm: Path, sift: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    pretrain_gpt.main([f"--shards={clm}", f"--sift={sift}", f"--log={log}", *SHORT, *SIFTED])
    assert all(math.isfinite(line["val_loss"]) for line in lines(log))


@pytest.mark.parametrize("sift", ["none", "loss"])
def test_a_killed_run_resumes_as_if_never_interrupted(
    sift: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"--shards={DEMO}", f"--sift={sift}", *SHORT, *SIFTED]
    assert_resumes_exactly(pretrain_bert.main, arguments, 5, tmp_path, monkeypatch)


@pytest.mark.parametrize("sift", ["none", "loss", "random"])
@pytest.mark.parametrize("killed_at", [10, 13])
def test_it_resumes_at_and_after_the_end_of_an_epoch(
    clm: Path, sift: str, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 42 samples: ten plain batches of four and two samples over, five sifted ones
    arguments = [f"--shards={clm}", f"--sift={sift}", *SHORT, *SIFTED, "--steps=18"]
    assert_resumes_exactly(pretrain_gpt.main, arguments, killed_at, tmp_path, monkeypatch)


def assert_resumes_exactly(
    main: Callable[[list[str]], None],
    arguments: list[str],
    killed_at: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(name: str, *more: str) -> dict[str, Any]:
        files = [f"--checkpoint={folder / name}.pt", f"--log={folder / name}.jsonl"]
        main([*arguments, *files, f"--checkpoint-every={killed_at}", *more])
        return torch.load(folder / f"{name}.pt")

    def logged(name: str) -> list[Any]:
        found = lines(folder / f"{name}.jsonl")
        return [[line[k] for k in ("step", "val_loss", "val_accuracy")] for line in found]

    straight, save = run("straight"), pretrain_bert.save

    def save_and_die(*state: Any) -> None:
        save(*state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain_bert, "save", save_and_die)
        run("killed")
    assert torch.load(folder / "killed.pt")["step"] == killed_at
    resumed = run("killed", f"--resume={folder / 'killed.pt'}")
    assert logged("killed") == logged("straight")
    for name, parameter in straight["model"].items():
        assert torch.equal(parameter, resumed["model"][name]), name
    moments = (run["optimizer"]["state"].values() for run in (straight, resumed))
    for mine, theirs in zip(*moments, strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_sifting_is_one_expression_that_the_loop_does_not_see() -> None:
    text = (ROOT / "examples" / "pretrain_bert.py").read_text()
    module = ast.parse(text)
    calls = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "SiftingDataLoader"
    ]
    loops = {n.name: ast.unparse(n) for n in module.body if isinstance(n, ast.FunctionDef)}
    assert len(calls) == 1 and ast.unparse(calls[0]) in loops["make_loader"]
    assert "sift" not in loops["train"].lower()
    assert "SiftingDataLoader" not in (ROOT / "examples" / "pretrain_gpt.py").read_text()


@pytest.mark.parametrize("example", [pretrain_bert, pretrain_gpt])
def test_help_teaches_every_option(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--sift {value}" in text for value in ("none", "loss", "entropy", "random"))


def test_base_is_the_paper() -> None:
    base = pretrain_bert.PRESETS["base"]
    assert (base.layers, base.hidden, base.batch_size, base.steps) == (12, 768, 32, 800_000)
    assert round(base.sift_warmup * base.steps) == 20_000
    assert (base.lr, base.lr_warmup, base.dropout, base.cooldown) == (1e-4, 0.002, 0.1, 0)


def test_a_loop_with_its_own_batches_needs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    sift_own_batches.main([str(text), "--steps=40"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 20: loss ") and second.startswith("step 40: loss ")
    assert float(second.split()[3]) < float(first.split()[3])
