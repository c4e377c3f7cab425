from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftloader import TokenShards
from siftloader.pool import Pool
from siftloader.samples import split_of
from siftloader.shards import Layout, Source, Tokenizer, write_dataset, write_shard


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import compare
import repeat_documents
from arms import FULL_GRID, LOSS, PLAIN, RANDOM, SPARSE, SUITES, Arm, Middle, Spread, charged
from compare import Comparison


ROOT = Path(__file__).resolve().parent.parent
EVERY = {arm.name: arm for suite in SUITES.values() for arm in suite}
TIMES = {"seconds_training", "seconds_loading", "seconds_scoring", "date"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random letters for next-token prediction, of two sources."""
    folder, layout = tmp_path_factory.mktemp("clm"), Layout.for_vocabulary(16, 90)
    rng = np.random.default_rng(0)
    written = [
        write_shard(
            folder, stem, rng.integers(0, 90, (n, 16)), (np.arange(n) % 2).astype(np.uint8), layout
        )
        for stem, n in (("train-000000", 160), ("val-000000", 8))
    ]
    write_dataset(
        folder,
        written,
        layout=layout,
        objective="clm",
        tokenizer=Tokenizer("letters", "0" * 64, 90, {"eos": 0}),
        sources=[Source("a", "0" * 64, 1), Source("b", "1" * 64, 1)],
        unigrams=np.arange(90),
        seed=0,
    )
    return folder


def options(shards: Path, out: Path, *more: str) -> Any:
    out.mkdir(parents=True, exist_ok=True)
    least = ("--steps=8", "--batch-size=4", "--final-samples=8", "--workers=1", "--preset=cpu")
    return compare.parse([f"--shards={shards}", f"--out={out}", *least, "--threads=1", *more])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Costs as if measured: a plain step 2 s, a sifted one half as long again. Which arms, per call."""
    asked = []

    def measure(comparison: Comparison, arms: Any) -> tuple[float, dict[str, float]]:
        asked.append([arm.name for arm in arms])
        return 2.0, {arm.name: 1.5 if arm.sifts else 1.0 for arm in arms}

    monkeypatch.setattr(compare, "measure", measure)
    return asked


def told(file: Path) -> list[dict[str, Any]]:
    """A run's file without what differs from run to run: when, and how long it took."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0] = lines[0]["run"]
    for audit in (line["audit"] for line in lines if "audit" in line):
        assert audit.pop("scoring_cost") is None or "sifting" in audit
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


# Arms differ in nothing but the loader.


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"residual-bigram"}))
def test_every_arm_draws_the_same_candidates_in_the_same_order(shards, name):
    torch.manual_seed(0)
    data = TokenShards(shards, seed=3)
    model = compare.SUBJECTS["gpt"].build(
        replace(compare.pretrain_gpt.TINY, layers=3, hidden=32), data
    )
    order = [int(sample["id"]) for sample in TokenShards(shards, seed=3, with_ids=True)]
    seen: list[int] = []
    loader = replace(EVERY[name], warmup=0.0, cooldown=0.0).loader(
        data, model, 4, 6, layers=3, autocast=None, on_select=lambda ids, *_: seen.extend(ids)
    )
    handed = [len(batch["labels"]) for _, batch in zip(range(6), loader, strict=False)]
    assert handed == [4] * 6
    if EVERY[name].sifts:
        assert len(seen) == round(6 * 4 / EVERY[name].keep)
    assert list(map(int, seen)) == order[: len(seen)]


def test_arms_of_a_seed_start_from_the_same_weights(shards, tmp_path, measured, monkeypatch):
    comparison = Comparison.prepare(options(shards, tmp_path / "c"))
    found = []

    def train(options, preset, model, loader, train_shards, val_shards):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        found.append((weights, torch.get_rng_state(), val_shards.split, options.eval_samples))
        raise KeyboardInterrupt

    monkeypatch.setattr(compare.pretrain_bert, "train", train)
    for arm in comparison.arms:
        with pytest.raises(KeyboardInterrupt):
            compare.run(comparison, arm.name, 1)
    (weights, stream, *rest), *others = found
    assert len(others) == 3
    for other, other_stream, *other_rest in others:
        assert torch.equal(weights, other) and torch.equal(stream, other_stream)
        assert rest == other_rest


# What an arm is charged.


def test_with_equal_time_scoring_is_paid_in_steps(shards, tmp_path, measured):
    comparison = Comparison.prepare(options(shards, tmp_path / "c", "--steps=1000"))
    plain, loss, timed = PLAIN, LOSS, charged(SPARSE)
    assert [comparison.steps(arm) for arm in (plain, RANDOM, loss)] == [1000] * 3
    assert comparison.seconds_at(plain, 1000) == 2000
    # 5 % pass through before and 20 % after, the others take half as long again
    assert comparison.seconds_at(loss, 1000) == 2000 + 750 * 0.5 * 2
    assert comparison.scoring_at(loss, 50) == 0 and comparison.scoring_at(loss, 51) == 1
    steps = comparison.steps(timed)
    assert steps == int(1000 / 1.375)
    assert 0 <= 2000 - comparison.seconds_at(timed, steps) < 4


def test_a_budget_is_a_share_of_the_plain_one(shards, tmp_path, measured):
    comparison = Comparison.prepare(
        options(shards, tmp_path / "c", "--steps=1000", "--suite=full", "--arms", "plain@0.71")
    )
    assert [arm.name for arm in comparison.arms] == ["plain", "random", "plain@0.71"]
    assert comparison.steps(comparison.arm("plain@0.71")) == 710


def test_the_plan_is_kept_and_only_new_arms_are_measured(shards, tmp_path, measured):
    out = tmp_path / "c"
    first = Comparison.prepare(options(shards, out, "--name=a"))
    again = Comparison.prepare(options(shards, out, "--suite=full", "--arms", "loss", "entropy"))
    assert measured[0] == [arm.name for arm in SUITES["quick"]]
    assert measured[1:] == [["entropy"]]
    assert again.costs == {**first.costs, "entropy": 1.5} and again.name == "a"
    assert "loss, 1 in 8, equal time" in {arm.name for arm in Comparison.open(out, shards).arms}


def test_arms_that_differ_in_their_budget_alone_cost_the_same(shards, tmp_path, measured):
    arms = ["loss, 1 in 8"]
    Comparison.prepare(options(shards, tmp_path / "c", "--suite=full", "--arms", *arms))
    arms += ["loss, 1 in 8@2", "loss, 1 in 8, equal time", "plain@2"]
    more = Comparison.prepare(options(shards, tmp_path / "c", "--suite=full", "--arms", *arms))
    assert len(measured) == 1
    assert {more.costs[name] for name in arms[:-1]} == {1.5} and more.costs["plain@2"] == 1


def test_a_plan_goes_on_with_its_threads_on_any_number_of_cores(
    shards, tmp_path, measured, monkeypatch, capsys
):
    out = tmp_path / "c"
    found = Comparison.prepare(options(shards, out))
    monkeypatch.setattr(compare.os, "sched_getaffinity", lambda _: set(range(96)))
    assert Comparison.prepare(options(shards, out)).threads == found.threads != 96
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match="made with threads"):
        Comparison.prepare(options(shards, out, "--threads=96"))


def test_another_machine_is_no_secret(shards, tmp_path, measured, monkeypatch, capsys):
    out = tmp_path / "c"
    Comparison.prepare(options(shards, out))
    monkeypatch.setattr(compare, "machine", lambda: "another, torch 9, 2030-01-01")
    again = Comparison.prepare(options(shards, out))
    said = capsys.readouterr().err
    assert "here it is another, torch 9" in said and "at the prices of the former" in said
    assert again.machine != "another, torch 9, 2030-01-01"


@pytest.mark.parametrize("text", ["", '{"preset": {}, "arms": []}', '{"preset": {"a": 1}}', "[]"])
def test_a_damaged_plan_says_so(shards, tmp_path, measured, text):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "plan.json").write_text(text)
    with pytest.raises(SystemExit, match=r"plan\.json is missing, damaged, .* put back"):
        Comparison.prepare(options(shards, tmp_path / "c"))


def test_a_comparison_has_a_name_wherever_it_is(shards, tmp_path, measured, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Comparison.prepare(options(shards, Path())).name == tmp_path.name


@pytest.mark.parametrize("wrong", ["--steps=0", "--workers=0", "--seeds=x", "--tokenizer=none"])
def test_what_cannot_be_is_refused_before_anything_runs(shards, tmp_path, wrong, capsys):
    with pytest.raises(SystemExit):
        options(shards, tmp_path / "c", wrong)
    said = capsys.readouterr().err
    assert "whole number of at least 1" in said or "no such file or folder" in said


def test_a_plan_names_no_place(shards, tmp_path, measured):
    Comparison.prepare(options(shards, tmp_path / "c"))
    assert os.sep not in (tmp_path / "c" / "plan.json").read_text()


@pytest.mark.parametrize("change", ["--steps=9", "--batch-size=8", "--final-samples=4"])
def test_a_folder_of_another_comparison_is_refused(shards, tmp_path, measured, change):
    out = tmp_path / "c"
    Comparison.prepare(options(shards, out))
    with pytest.raises(SystemExit, match="choose another --out"):
        Comparison.prepare(options(shards, out, change))


def test_an_arm_that_changed_is_refused(shards, tmp_path, measured, monkeypatch):
    out = tmp_path / "c"
    Comparison.prepare(options(shards, out))
    changed = [replace(arm, keep=0.25) if arm.name == "loss" else arm for arm in SUITES["quick"]]
    monkeypatch.setitem(compare.SUITES, "quick", changed)
    with pytest.raises(SystemExit, match="'loss' was"):
        Comparison.prepare(options(shards, out))


def test_one_writer_to_a_folder(tmp_path):
    with (
        compare.alone(tmp_path),
        pytest.raises(SystemExit, match="in use"),
        compare.alone(tmp_path),
    ):
        pass


# A run.


def test_what_steps_cost_is_measured(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROUNDS", 2)
    comparison = Comparison._wanted(options(shards, tmp_path / "c"))
    arms = [PLAIN, RANDOM, LOSS, charged(LOSS)]
    seconds, costs = compare.measure(comparison, arms)
    assert costs.keys() == {arm.name for arm in arms}
    assert seconds > 0 and costs["plain"] == 1
    assert costs["loss"] == costs["loss, equal time"] > 0


@pytest.mark.parametrize("name", ["plain", "loss"])
def test_a_run_repeats_and_continues_to_the_bit(shards, tmp_path, measured, monkeypatch, name):
    straight = Comparison.prepare(options(shards, tmp_path / "a", "--name=c"))
    broken = Comparison.prepare(options(shards, tmp_path / "b", "--name=c"))
    monkeypatch.setattr(compare, "LEAST_CHECKPOINT", 3)
    arm = straight.arm(name)
    compare.run(straight, name, 1)
    with monkeypatch.context() as patch:
        written = []

        def write(log: Any, record: dict[str, Any]) -> None:
            written.append(record)
            if record.get("step") == 5:
                raise KeyboardInterrupt

        patch.setattr(compare.pretrain_bert.Log, "write", write)
        with pytest.raises(KeyboardInterrupt):
            compare.run(broken, name, 1)
    assert not broken.file(arm, 1).exists() and list((tmp_path / "b" / ".unfinished").glob("*.pt"))
    compare.run(broken, name, 1)
    # The log of the broken run was the patched one's: what was written after the break is compared.
    ours, theirs = told(straight.file(arm, 1)), told(broken.file(arm, 1))
    audited = [line for line in ours if "audit" in line]
    assert len(audited) == 7 and theirs[1:8] == ours[1:8] == audited
    assert theirs[8:] and theirs[8:] == ours[-len(theirs[8:]) :]
    assert ours[-1]["final"] and ours[-1]["seconds"] == straight.seconds_at(arm, 8)
    assert ours[0]["arm"] == name and ours[0]["shards"] == straight.fingerprint
    assert not list((tmp_path / "b" / ".unfinished").iterdir())


@pytest.mark.parametrize(("name", "steps"), [("plain", 42), ("loss", 25)])
def test_audits_change_no_training_and_tell_of_it(
    shards, tmp_path, measured, monkeypatch, name, steps
):
    found = []
    for audits in (0, 5):
        monkeypatch.setattr(compare, "AUDITS", audits)
        # More than an epoch; plain training without audits has torch's own loader.
        chosen = options(shards, tmp_path / str(audits), "--name=c", f"--steps={steps}")
        comparison = Comparison.prepare(chosen)
        compare.run(comparison, name, 0)
        found.append(told(comparison.file(comparison.arm(name), 0)))
    without, audited = found
    assert [line for line in audited if "audit" not in line] == without
    every = steps // 5
    audits = [line["audit"] for line in audited if "audit" in line]
    assert [audit["step"] for audit in audits] == [*range(every, steps, every)]
    sifted = [name == "loss" and audit["step"] < 0.8 * steps for audit in audits]
    assert [audit["sifting"] for audit in audits] == sifted
    (run,) = compare.read_results(comparison.folder).runs
    assert [audit["step"] for audit in run.audits] == [audit["step"] for audit in audits]
    for audit in run.audits:
        # Of random letters that a model has hardly learned, every pool's loss is about log(90).
        assert abs(audit["population_loss"] - math.log(90)) < 0.5
        assert audit["rho"] <= audit["rho_full"] and audit["rho_full"] > 1
        assert audit["rows"] == (8 if audit["sifting"] else 4)


def test_plain_steps_are_drawn_and_learned_like_sifted_ones(shards, tmp_path, monkeypatch):
    # torch's loader collates sample by sample: on a GPU a third of a step, charged to plain alone.
    monkeypatch.setattr(compare, "ROUNDS", 1)
    used, adam = [], torch.optim.AdamW

    def optimizer(*arguments: Any, **given: Any) -> Any:
        used.append(given)
        return adam(*arguments, **given)

    def collate(*_: Any) -> Any:
        raise AssertionError("sample by sample")

    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    monkeypatch.setattr(torch.utils.data._utils.collate, "default_collate", collate)
    monkeypatch.setattr(compare.TokenShards, "__iter__", collate)
    comparison = Comparison._wanted(options(shards, tmp_path / "c"))
    _, costs = compare.measure(comparison, [PLAIN, EVERY["plain@2"], RANDOM])
    assert costs["plain"] == costs["plain@2"] == 1 <= costs["random"]
    assert used == [{"fused": True}]


def test_only_a_run_that_continues_finds_its_older_selections(
    shards, tmp_path, measured, monkeypatch
):
    comparison = Comparison.prepare(options(shards, tmp_path / "c"))
    monkeypatch.setattr(compare.pretrain_bert, "train", lambda *_: {}["killed"])
    part = comparison.selections(LOSS) / "rank-00000-part-000007.parquet"
    checkpoint = tmp_path / "c" / ".unfinished" / "loss-0.pt"
    for file in (part, checkpoint):
        file.parent.mkdir(parents=True)
        file.touch()
    for continues in (True, False):
        with pytest.raises(KeyError, match="killed"):
            compare.run(comparison, "loss", 0)
        assert part.exists() == continues
        checkpoint.unlink(missing_ok=True)


@pytest.mark.parametrize("parent_dies", [True, False])
def test_a_run_ends_with_the_process_that_began_it_and_by_itself(parent_dies):
    source = inspect.getsource(compare.end_with_parent)
    wait = "time.sleep(60)" if parent_dies else "time.sleep(0.1)"
    code = f"import os, sys, threading, time\n{source}\nend_with_parent(0)\n{wait}"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stderr is not None
    if parent_dies:
        process.stdin.close()
    assert process.wait(30) == parent_dies
    assert process.stderr.read() == b""
    process.stdin.close()
    process.stderr.close()


# Which runs.


def finish(comparison: Comparison, losses: dict[str, list[float]]) -> None:
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            run = {"experiment": comparison.name, "arm": name, "seed": seed, "steps": 8}
            end = {"step": 8, "samples": 32, "val_loss": loss, "val_accuracy": 0.1}
            lines = [{"run": run}, {**end, "seconds": 1.0, "seconds_training": 1.0, "final": True}]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            comparison.file(comparison.arm(name), seed).write_text(text)


def names(runs: list[tuple[Arm, int]]) -> list[tuple[str, int]]:
    return [(arm.name, seed) for arm, seed in runs]


def test_runs_go_seed_by_seed(shards, tmp_path, measured):
    chosen = options(shards, tmp_path / "c", "--seeds=2", "--least-seeds=2")
    comparison = Comparison.prepare(chosen)
    arms = [arm.name for arm in SUITES["quick"]]
    assert names(compare.wanted(comparison, chosen)) == [(a, s) for s in range(2) for a in arms]
    finish(comparison, {"plain": [1.0], "loss": [1.0, 1.0]})
    left = [(a, s) for a, s in [(a, s) for s in range(2) for a in arms]]
    left = [run for run in left if run not in {("plain", 0), ("loss", 0), ("loss", 1)}]
    assert names(compare.wanted(comparison, chosen)) == left


def test_seeds_are_added_until_every_interval_is_narrow(shards, tmp_path, measured):
    chosen = options(shards, tmp_path / "c", "--seeds=4", "--least-seeds=3")
    comparison = Comparison.prepare(chosen)
    settled = {"plain": [5.0, 6.0, 7.0], "random": [5.001, 6.0, 7.001]}
    narrow, wide = [5.1, 6.101, 7.1], [5.1, 6.3, 7.0]
    finish(comparison, {**settled, "loss": narrow, "loss, 1 in 8, equal time": narrow})
    assert compare.wanted(comparison, chosen) == []
    finish(comparison, {"loss": wide})
    assert names(compare.wanted(comparison, chosen)) == [("plain", 3), ("random", 3), ("loss", 3)]
    finish(comparison, {"plain": [5, 6, 7, 8], "random": [5, 6, 7, 8], "loss": [*wide, 9.0]})
    assert compare.wanted(comparison, chosen) == []  # of four at most


def test_repeats_ask_for_no_more_seeds(shards, tmp_path, measured):
    chosen = options(
        shards, tmp_path / "c", "--seeds=4", "--suite=gpu", "--arms", "plain#1", "loss"
    )
    comparison = Comparison.prepare(chosen)
    ends = [5.0, 6.0, 7.0]
    finish(comparison, {arm.name: ends for arm in comparison.arms})
    assert [arm.name for arm in comparison.arms] == ["plain", "random", "loss", "plain#1"]
    assert compare.wanted(comparison, chosen) == []


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [(0.25, []), (0.5, ["plain", "random"]), (0.7, ["plain", "random", "plain@2"])],
)
def test_no_run_begins_that_would_not_end_in_time(
    shards, tmp_path, measured, monkeypatch, capsys, minutes, expected
):
    # Eight steps of two seconds; plain@2 takes twice as many. The clock stands still.
    chosen = options(
        shards, tmp_path / "c", f"--minutes={minutes}", "--suite=full", "--seeds=1", "--least-seeds=1",
        *("--arms", "plain@2"),
    )  # fmt: skip
    comparison, begun = Comparison.prepare(chosen), []
    monkeypatch.setattr(compare.time, "monotonic", lambda: 7.0)

    def start(comparison: Comparison, arm: Arm, seed: int, alive: int) -> Any:
        begun.append(arm.name)
        finish(comparison, {arm.name: [5.0]})
        return subprocess.Popen(["true"])

    monkeypatch.setattr(compare, "start", start)
    compare.work(comparison, chosen, 7.0)
    assert begun == expected
    said = capsys.readouterr().out
    assert ("the same command goes on" in said) == (len(expected) < 3)


def test_the_end_of_another_run_says_how(shards, tmp_path, measured, monkeypatch):
    chosen = options(shards, tmp_path / "c")
    comparison = Comparison.prepare(chosen)
    monkeypatch.setattr(compare, "start", lambda *_: subprocess.Popen(["sh", "-c", "kill -9 $$"]))
    with pytest.raises(SystemExit, match=r"plain, seed 0 failed \(exit status -9"):
        compare.work(comparison, chosen, time.monotonic())


def test_results_are_told_without_the_arm_that_shows_its_texts(shards, tmp_path, measured):
    out = tmp_path / "c"
    Comparison.prepare(options(shards, out, "--suite=full", "--arms", "loss"))
    chosen = options(shards, out, "--suite=full", "--arms", "entropy")
    comparison = Comparison.prepare(chosen)
    finish(comparison, {arm: [1.0, 2.0] for arm in ("plain", "random", "entropy")})
    comparison.selections(LOSS).mkdir(
        parents=True
    )  # of a run that was killed before its first part
    compare.say(comparison, chosen)
    assert (out / "report.html").exists()


def test_finished_runs_count_when_only_the_parquet_file_is_left(shards, tmp_path, measured):
    chosen = options(shards, tmp_path / "c", "--seeds=3", "--least-seeds=3")
    comparison = Comparison.prepare(chosen)
    finish(comparison, {arm: [1.0, 2.0] for arm in ("plain", "random", "loss")})
    before = names(compare.wanted(comparison, chosen))
    compare.say(comparison, chosen)
    for file in (tmp_path / "c").glob("*.jsonl"):
        file.unlink()
    assert names(compare.wanted(comparison, chosen)) == before
    assert ("loss", 2) in before and ("loss", 1) not in before
    assert (tmp_path / "c" / "table.txt").read_text().count("loss") >= 2


def test_steps_may_follow_from_seconds_and_then_stay(shards, tmp_path, measured):
    out = tmp_path / "c"
    assert Comparison.prepare(options(shards, out, "--seconds=600")).preset.steps == 300
    assert Comparison.prepare(options(shards, out, "--seconds=60")).preset.steps == 300


def test_two_names_are_never_one_file(shards, tmp_path, measured):
    comparison = Comparison.prepare(options(shards, tmp_path / "c"))
    assert len({comparison.file(arm, 0).name for arm in EVERY.values()}) == len(EVERY)
    assert len({json.dumps(arm.settings()) for arm in FULL_GRID}) == len(FULL_GRID)


# Selections that no user needs.


def test_spread_takes_one_of_each_run_of_neighbours():
    scores = torch.randperm(64, generator=torch.Generator().manual_seed(0)).float()
    ranked = torch.sort(scores, descending=True).indices.tolist()
    drawn = set()
    for number in range(50):
        kept = Spread()(scores, 16, Pool(number=number)).tolist()
        assert kept == sorted(set(kept)) and len(kept) == 16
        assert sorted(ranked.index(k) // 4 for k in kept) == list(range(16))
        drawn |= set(kept)
    assert len(drawn) == 64


def test_the_middle_leaves_out_as_many_above_as_below():
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 7.0, 6.0])
    assert Middle()(scores, 4, Pool()).tolist() == [0, 2, 3, 4]


# Text that repeats itself.


def test_repeated_documents_are_never_held_out(tmp_path):
    # The second is written without its blank line: other text, which would be held out.
    texts = [f"document {number}\n\nends here" for number in range(200)]
    text, out = tmp_path / "text.jsonl", tmp_path / "out.txt"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    repeat_documents.main([str(text), "--out", str(out), "--share", "0.5", "--size", "500"])
    written = out.read_text()
    assert 0.45 < len(written) / (len(written) + sum(map(len, texts))) < 0.6
    copies = [each for each in written.split("\n\n") if each]
    assert len(set(copies)) > 10
    # Of each both texts, as it was and as it is, are among the upper half by hash.
    for copy in set(copies):
        for each in (copy, copy.replace("\n", "\n\n")):
            assert split_of(hashlib.sha256(each.encode()).digest(), 0.5) == "train", each


# Where nothing is installed.


def test_the_tools_run_without_an_installation_and_without_extras(tmp_path):
    code = f"""
import runpy, sys
sys.path[:] = [path for path in sys.path if path not in ("", {str(ROOT)!r})]
for name in ("webdataset", "torchdata", "zstandard", "ray", "mwparserfromhell", "fsspec"):
    sys.modules[name] = None
sys.argv = ["compare.py", "--help"]
try:
    runpy.run_path({str(ROOT / "tools" / "compare.py")!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--minutes" in done.stdout, done.stderr


def test_results_of_before_do_not_replace_a_plan_that_went_on(tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    (tmp_path / "Makefile").write_text(makefile)
    kept = tmp_path / "tools" / "results" / "gpu-bert"
    kept.mkdir(parents=True)
    (kept / "plan.json").write_text("before")
    arguments = ["make", "gpu-arms", "RUN=true", "GPU_OUT=out"]
    subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True)
    plan = tmp_path / "out" / "bert" / "plan.json"
    assert plan.read_text() == "before"
    plan.write_text("went on")
    done = subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert plan.read_text() == "went on" and not done.stderr


# Stories.


@pytest.mark.slow
def test_killed_anywhere_the_same_command_continues(shards, tmp_path):
    def command(out: Path) -> list[str]:
        arguments = ["--seeds=2", "--least-seeds=2", "--workers=2", "--steps=120", "--preset=cpu"]
        return [
            *(sys.executable, str(ROOT / "tools" / "compare.py"), f"--shards={shards}"),
            *(f"--out={out}", "--name=c", "--batch-size=4", "--final-samples=8", *arguments),
        ]

    straight, broken = tmp_path / "a", tmp_path / "b"
    done = subprocess.run(command(straight), check=True, capture_output=True, text=True)
    assert "minus plain" in done.stdout and (straight / "report.html").exists()
    # The same prices: another measurement would be another number of steps.
    broken.mkdir()
    (broken / "plan.json").write_bytes((straight / "plan.json").read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen(
            command(broken), stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(5, 25))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(broken), check=True, capture_output=True)
    runs = sorted(file.name for file in straight.glob("*.jsonl"))
    assert len(runs) == 8 and runs == sorted(file.name for file in broken.glob("*.jsonl"))
    for name in runs:
        assert told(straight / name) == told(broken / name)
