from __future__ import annotations

import argparse
import ast
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from siftloader import Sifter, SiftError, TokenShards, theory
from siftloader.shards import Layout, Source, Tokenizer, write_dataset, write_shard


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import convex_gsgd
import linear_early_exit
import pretrain_bert
import pretrain_gpt
import pretraining
import sift_own_batches


ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "shards" / "demo"
T, V = 16, 90
TRAIN, VAL = 42, 7  # samples
SHORT = ("--steps=8", "--batch-size=4", "--eval-every=4")
SIFTED = ("--warmup-steps=2", "--cooldown=0.25")
ARMS = ("none", "random", "loss", "entropy")
# With dropout, so that a random stream that is not restored shows.
SMALLEST = replace(pretrain_bert.TINY, hidden=32, heads=2, dropout=0.1)


def letters(folder: Path, objective: str) -> Path:
    """Random letters as shards: 42 samples to train on, 7 held out."""
    special = {"eos": 0} if objective == "clm" else {"pad": 0, "cls": 1, "sep": 2, "mask": 3}
    pairs = objective == "mlm-nsp"
    layout, rng = Layout.for_vocabulary(T, V, labels=pairs), np.random.default_rng(0)
    folder.mkdir()
    written = []
    for stem, n in (("train-000000", TRAIN), ("val-000000", VAL)):
        ids, labels = rng.integers(4, V, (n, T)), None
        if objective != "clm":
            ids[:, 0], ids[:, -1] = special["cls"], special["sep"]
        if pairs:
            labels = rng.integers(0, 2, n).astype(np.uint8)
            ids[:, 7] = special["sep"]
            ids[:, 8:12] = 10 + labels[:, None]  # what tells, unless all is masked
        written.append(write_shard(folder, stem, ids, np.zeros(n, np.uint8), layout, labels))
    write_dataset(
        folder,
        written,
        layout=layout,
        objective=objective,
        tokenizer=Tokenizer("letters", "0" * 64, V, special),
        sources=[Source("letters", "0" * 64, 1)],
        unigrams=np.arange(V),
        seed=0,
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("letters")
    return {each: letters(root / each, each) for each in ("mlm", "mlm-nsp", "clm")}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pretrain_bert.PRESETS, "tiny", SMALLEST)
    monkeypatch.setitem(pretrain_gpt.PRESETS, "tiny", SMALLEST)


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def logged(log: Path) -> list[dict[str, Any]]:
    """What was logged but for the seconds, and for the head of the log."""
    return [
        {name: value for name, value in line.items() if not name.startswith("seconds")}
        for line in lines(log)[1:]
    ]


def load(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("sift", ARMS)
def test_bert_trains_on_real_text_whatever_makes_its_batches(sift: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    short = [*SHORT, *SIFTED, "--eval-samples=8", "--final-samples=8"]
    pretrain_bert.main([f"--shards={DEMO}", f"--sift={sift}", f"--log={log}", *short])
    _, half, whole, final = lines(log)
    assert [half["samples"], whole["samples"]] == [16, 32]
    assert final["final"] and final["learning_rate"] == 0
    assert whole["val_loss"] < half["val_loss"] < math.log(8192) + 0.5
    assert 0 < half["train_loss"] < 20 and 0 <= whole["val_accuracy"] <= 1
    assert "val_nsp_accuracy" not in final
    assert (whole["seconds_scoring"] > 0) == (sift != "none")
    assert whole["seconds_training"] > whole["seconds_scoring"] + whole["seconds_loading"] > 0


@pytest.mark.parametrize("sift", ["none", "loss"])
def test_gpt_trains_in_the_same_loop(
    folders: dict[str, Path], sift: str, tmp_path: Path, small: None
) -> None:
    log = tmp_path / "log.jsonl"
    pretrain_gpt.main([f"--shards={folders['clm']}", f"--sift={sift}", f"--log={log}", *SHORT])
    assert all(math.isfinite(line["val_loss"]) for line in lines(log)[1:])


def test_next_sentences_are_learned_beside_the_words(
    folders: dict[str, Path], tmp_path: Path, small: None
) -> None:
    log = tmp_path / "log.jsonl"
    options = ["--steps=100", "--batch-size=8", "--lr=5e-3", "--sift=loss", "--warmup-steps=2"]
    pretrain_bert.main([f"--shards={folders['mlm-nsp']}", f"--log={log}", *options])
    head, *_, last, final = lines(log)
    assert head["run"]["model"] == "BertOfPairs"
    assert final["val_nsp_accuracy"] == 1  # four letters tell
    assert last["train_loss"] > 1 and 0 <= final["val_accuracy"] <= 1


@pytest.fixture
def pairs(folders: dict[str, Path]) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of pairs without dropout, and 16 of them."""
    shards = TokenShards(folders["mlm-nsp"])
    model = pretrain_bert.build_bert(replace(SMALLEST, dropout=0), shards)
    return model.train(), next(iter(shards.batches(16)))


def test_the_loss_of_pairs_is_the_sum_that_hugging_face_computes(pairs: Any) -> None:
    model, batch = pairs
    stock = transformers.BertForPreTraining(model.config)
    stock.load_state_dict(model.state_dict())
    output = model(**batch)
    assert output.loss.item() == pytest.approx(stock(**batch).loss.item(), rel=1e-6)
    assert len(output.prediction_logits) == (batch["labels"] != -100).sum()


def test_pairs_are_scored_by_their_masked_words_alone(pairs: Any) -> None:
    model, batch = pairs
    scores = Sifter(model, exit_layer="full").score(batch)
    inputs = {name: field for name, field in batch.items() if "label" not in name}
    with torch.no_grad():
        logits = model(**inputs).prediction_logits  # [16, T, V]
    words = functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    labelled = (batch["labels"] != -100).sum(1)
    expected = (words.sum(1) / labelled)[labelled > 0]
    torch.testing.assert_close(scores[labelled > 0], expected)
    batch["next_sentence_label"] = 1 - batch["next_sentence_label"]
    assert torch.equal(Sifter(model, exit_layer="full").score(batch), scores)


@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("objective", ["mlm", "mlm-nsp", "clm"])
def test_an_evaluation_is_the_mean_over_the_first_samples(
    folders: dict[str, Path], objective: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_bert, "EVALUATION_BATCH", 3)
    shards = TokenShards(folders[objective], split="val")
    build = pretrain_gpt.build_gpt if objective == "clm" else pretrain_bert.build_bert
    model = build(SMALLEST, shards)
    found = pretrain_bert.evaluate(model, shards, samples)
    batch = {name: field[:samples] for name, field in next(iter(shards.batches(VAL))).items()}
    inputs = {name: field for name, field in batch.items() if "label" not in name}
    with torch.no_grad():
        output = model.eval()(**inputs)
    logits, labels = output[0], batch["labels"]
    if objective == "clm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = functional.cross_entropy(logits.transpose(1, 2), labels)
    assert found["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    right = (logits.argmax(-1) == labels)[labels != -100].double().mean()
    assert found["val_accuracy"] == pytest.approx(right.item())
    if objective == "mlm-nsp":
        right = (output[1].argmax(-1) == batch["next_sentence_label"]).double().mean()
        assert found["val_nsp_accuracy"] == pytest.approx(right.item())


@pytest.mark.parametrize("sift", ARMS)
@pytest.mark.parametrize("objective", ["mlm-nsp", "clm"])
def test_a_killed_run_resumes_as_if_never_interrupted(
    folders: dict[str, Path],
    sift: str,
    objective: str,
    tmp_path: Path,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 42 samples: ten plain batches of four and two samples over, five sifted ones
    main = pretrain_gpt.main if objective == "clm" else pretrain_bert.main
    arguments = [f"--shards={folders[objective]}", f"--sift={sift}", *SHORT, *SIFTED, "--steps=15"]
    assert_resumes_exactly(main, arguments, [5, 10, 13], tmp_path, monkeypatch)


def test_a_run_in_bf16_resumes_as_if_never_interrupted(
    folders: dict[str, Path], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"--shards={folders['mlm']}", "--sift=loss", *SHORT, *SIFTED, "--precision=bf16"]
    assert_resumes_exactly(pretrain_bert.main, arguments, [5], tmp_path, monkeypatch)


def assert_resumes_exactly(
    main: Callable[[list[str]], None],
    arguments: list[str],
    killed_at: list[int],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One run never stopped, and one killed at each of these steps, are the same run."""

    def run(name: str, save_at: int) -> None:
        files = [f"--checkpoint={folder / name}.pt", f"--log={folder / name}.jsonl"]
        main([*arguments, *files, f"--checkpoint-every={save_at}", "--continue"])

    run("straight", 1000)
    for step in killed_at:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pretrain_bert.Checkpoint, "save", save_and_die)
            run("killed", step)
        assert load(folder / "killed.pt")["step"] == step
    run("killed", 1000)
    assert_same_runs(folder)
    before = (folder / "killed.jsonl").read_bytes()
    run("killed", 1000)  # it is done
    assert (folder / "killed.jsonl").read_bytes() == before


def assert_same_runs(folder: Path) -> None:
    """straight.pt and .jsonl, killed.pt and .jsonl hold the same to the bit, but for the seconds."""
    assert logged(folder / "killed.jsonl") == logged(folder / "straight.jsonl")
    straight, resumed = load(folder / "straight.pt"), load(folder / "killed.pt")
    for state in (straight, resumed):
        for rank in state["ranks"]:
            del rank["clock"]
            for seconds in ("seconds_scoring", "seconds_auditing"):
                rank["data"].get("stats", {}).pop(seconds, None)
    assert_equal(straight, resumed)


def assert_equal(one: Any, other: Any, at: str = "state") -> None:
    assert type(one) is type(other), at
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), at
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            assert_equal(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{at}[{number}]")
    else:
        assert one == other, at


save = pretrain_bert.Checkpoint.save


def save_and_die(*arguments: Any) -> None:
    save(*arguments)
    raise KeyboardInterrupt


def test_a_kill_while_saving_loses_nothing(
    folders: dict[str, Path], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> None:
        files = [f"--checkpoint={tmp_path / name}.pt", f"--log={tmp_path / name}.jsonl"]
        options = [*SHORT, *SIFTED, "--sift=entropy", "--checkpoint-every=3", "--continue"]
        pretrain_bert.main([f"--shards={folders['mlm']}", *files, *options])

    def save_half(state: Any, file: Path) -> None:
        write(state, file)
        if state["step"] == 6:
            file.write_bytes(file.read_bytes()[:5000])
            raise KeyboardInterrupt

    write = torch.save
    run("straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining.torch, "save", save_half)
        run("killed")
    with (tmp_path / "killed.jsonl").open("a") as log:
        log.write('{"step": 8, "samp')  # and while logging
    assert load(tmp_path / "killed.pt")["step"] == 3
    run("killed")
    assert_same_runs(tmp_path)


def test_a_checkpoint_that_cannot_be_resumed_says_why(
    folders: dict[str, Path], tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = functools.partial(run_for, [f"--shards={folders['mlm']}", *SHORT])
    file = tmp_path / "a.pt"
    with pytest.raises(SystemExit):
        run(f"--resume={file}")
    assert "no such file; give one that --checkpoint wrote, or use" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--continue")
    assert "--continue needs --checkpoint FILE" in capsys.readouterr().err
    run(f"--checkpoint={file}")
    with pytest.raises(
        SystemExit, match=r"another run: seed was 0, is 1; steps was 8, is 9; give"
    ):
        run(f"--resume={file}", "--seed=1", "--steps=9")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(SystemExit, match=r"a\.pt is damaged, or no checkpoint of this program"):
        run(f"--resume={file}")


def test_what_a_cpu_began_a_gpu_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = pretraining.Checkpoint({"seed": 0}, {}, {})
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        checkpoint.save(tmp_path / "a.pt", 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checkpoint.load(tmp_path / "a.pt") == 7


@pytest.mark.parametrize(
    "option", ["--eval-samples=0", "--final-samples=0", "--eval-every=0", "--checkpoint-every=0"]
)
def test_a_division_by_zero_does_not_wait_for_the_end_of_a_run(
    parsed: Any, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(option)
    assert "needed is a whole number of at least 1" in capsys.readouterr().err


def run_for(arguments: list[str], *more: str) -> None:
    pretrain_bert.main([*arguments, *more])


def test_text_of_another_objective_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(SystemExit, match=r"'clm', BERT needs mlm or mlm-nsp; prepare .*GPT"):
        pretrain_bert.main([f"--shards={folders['clm']}", *SHORT])
    with pytest.raises(SystemExit, match=r"'mlm', a GPT needs clm; prepare .*BERT"):
        pretrain_gpt.main([f"--shards={folders['mlm']}", *SHORT])


@pytest.fixture
def parsed(folders: dict[str, Path]) -> Callable[..., tuple[argparse.Namespace, Any]]:
    def parse(*more: str) -> tuple[argparse.Namespace, Any]:
        arguments = [f"--shards={folders['mlm']}", *SHORT, *more]
        return pretrain_bert.parse(arguments, "", {"tiny": SMALLEST})

    return parse


def test_a_log_begins_with_its_run(parsed: Any, tmp_path: Path) -> None:
    options, preset = parsed("--sift=loss", f"--log={tmp_path / 'log.jsonl'}", "--seed=3")
    options.header = {"arm": "mine"}
    shards = TokenShards(options.shards, seed=3)
    model = pretrain_bert.build_bert(preset, shards)
    loader = pretrain_bert.make_loader(options, preset, shards, model)
    held_out = TokenShards(options.shards, split="val")
    pretrain_bert.train(options, preset, model, loader, shards, held_out)
    run = lines(tmp_path / "log.jsonl")[0]["run"]
    assert (run["arm"], run["sift"], run["exit_layer"], run["seed"]) == ("mine", "loss", 1, 3)
    assert (run["preset"], run["layers"], run["hidden"], run["steps"]) == ("tiny", 2, 32, 8)
    assert (run["objective"], run["shards"]) == ("mlm", shards.fingerprint)
    assert (run["precision"], run["ranks"]) == ("fp32", 1)
    assert run["versions"]["torch"] == torch.__version__ and run["machine"] and run["date"]


def test_bf16_is_trained_and_scored_in_where_it_is_asked_for(parsed: Any) -> None:
    scores, losses = [], []
    for precision in ("fp32", "bf16"):
        options, preset = parsed("--sift=loss", "--warmup-steps=0", f"--precision={precision}")
        shards = TokenShards(options.shards)
        torch.manual_seed(0)
        model = pretrain_bert.build_bert(preset, shards).train()
        loader = pretrain_bert.make_loader(options, preset, shards, model)
        next(iter(loader))
        scores.append(loader.stats["score_kept"])
        losses.append(
            pretrain_bert.evaluate(model, shards, None, bf16=precision == "bf16")["val_loss"]
        )
    assert parsed()[0].precision == ("bf16" if torch.cuda.is_available() else "fp32")
    for exact, rounded in (scores, losses):
        assert exact != rounded and exact == pytest.approx(rounded, rel=0.02)


@pytest.mark.parametrize("example", [pretrain_bert, pretrain_gpt])
def test_a_small_vocabulary_is_no_cause_for_warnings(
    example: Any, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bert = example is pretrain_bert
    transformers.utils.logging.get_logger("transformers").warning_once.cache_clear()
    shards = TokenShards(folders["mlm" if bert else "clm"])
    (pretrain_bert.build_bert if bert else pretrain_gpt.build_gpt)(SMALLEST, shards)
    assert capfd.readouterr() == ("", "")


# What torch itself says where a graph ends in the middle of a forward, at the masked positions.
GRAPH_BREAK = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that torch.compile does but for generating code, which takes a minute."""
    quick = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(pretraining.torch, "compile", quick)
    yield
    torch._dynamo.reset()


def compiled_and_not(shards: Path, folder: Path) -> list[float]:
    found = []
    for more in ((), ("--compile",)):
        log = folder / f"{len(more)}.jsonl"
        options = ["--sift=loss", f"--log={log}", f"--checkpoint={folder / 'a.pt'}"]
        pretrain_bert.main([f"--shards={shards}", *options, *SHORT, *SIFTED, *more])
        assert not any("_orig_mod" in name for name in load(folder / "a.pt")["model"])
        found.append(lines(log)[-1]["val_loss"])
    return found


@GRAPH_BREAK
def test_a_compiled_model_learns_the_same(
    folders: dict[str, Path], tmp_path: Path, small: None, quick_compiler: None
) -> None:
    plain, compiled = compiled_and_not(folders["mlm-nsp"], tmp_path)
    assert compiled == pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, about itself
def test_a_really_compiled_model_learns_the_same(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undropped = replace(SMALLEST, dropout=0)  # compiled code draws otherwise
    monkeypatch.setitem(pretrain_bert.PRESETS, "tiny", undropped)
    plain, compiled = compiled_and_not(folders["mlm-nsp"], tmp_path)
    assert compiled == pytest.approx(plain, rel=1e-3)


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
    for other in ("pretrain_gpt.py", "pretraining.py"):
        assert "SiftingDataLoader" not in (ROOT / "examples" / other).read_text()


@pytest.mark.parametrize("example", [pretrain_bert, pretrain_gpt])
def test_help_teaches_every_option(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--sift {value}" in text for value in ("none", "loss", "entropy", "random"))
    assert "torchrun" in text and "--continue" in text
    assert example is pretrain_gpt or "wikibooks \\\n        --sift" in text  # a command to copy


def test_base_is_the_paper() -> None:
    base = pretrain_bert.PRESETS["base"]
    assert (base.layers, base.hidden, base.batch_size, base.steps) == (12, 768, 32, 800_000)
    assert round(base.sift_warmup * base.steps) == 20_000
    assert (base.lr, base.lr_warmup, base.dropout, base.cooldown) == (1e-4, 0.002, 0.1, 0)
    groups = pretrain_bert.parameter_groups(torch.nn.Linear(2, 2))
    assert [group["weight_decay"] for group in groups] == [0.01, 0]


def test_a_loop_with_its_own_batches_needs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    sift_own_batches.main([str(text), "--steps=40"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 20: loss ") and second.startswith("step 40: loss ")
    assert float(second.split()[3]) < float(first.split()[3])


def test_every_example_is_run_by_a_test() -> None:
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for example in (ROOT / "examples").glob("*.py"):
        if "__main__" in example.read_text():
            name = re.escape(example.stem)
            ran = rf"\bimport {name}\b|\bfrom {name} import main\b|[\"'/]{name}(\.py)?[\"']"
            assert re.search(ran, tests), f"no test runs {example.name}"


def test_greedy_sgd_is_ahead_early_in_the_example_and_its_picture_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "new" / "convex.png"
    convex_gsgd.main(["--steps=600", "--runs=2", f"--out={picture}"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "SGD" in line[:9]]
    (plain, _, eight), (_, logistic, _) = rows[:3], rows[3:]
    assert float(eight[-4]) < 0.7 * float(plain[-1])  # the last loss of least squares, over F*
    assert logistic[:4] == ["GSGD,", "R", "=", "2"] and 1 < float(logistic[4]) < 2  # rho*
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SiftError, match=r"pip install 'siftloader\[examples\]'"):
        convex_gsgd.main(["--steps=10", "--runs=1", f"--out={picture}"])


def test_curves_cross_where_the_example_says() -> None:
    marks = np.array([1, 10, 100, 1000])
    plain = np.array([4.0, 3.0, 2.0, 1.0])
    assert convex_gsgd.crossing(marks, plain - [1, 1, -1, -1], plain) == pytest.approx(10**1.5)
    assert convex_gsgd.crossing(marks, plain - [0, -1, 1, -1], plain) == pytest.approx(10**2.5)
    assert convex_gsgd.crossing(marks, plain - 1, plain) == math.inf


def test_the_linear_network_fails_if_its_counts_are_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--pairs=4000", "--layers=3", "--width=5"]
    linear_early_exit.main(short)
    assert "standard errors off" in capsys.readouterr().out
    right = theory.p_j
    monkeypatch.setattr(theory, "p_j", lambda beta: 0.9 * right(beta))
    with pytest.raises(SystemExit) as stopped:
        linear_early_exit.main([*short, "--weights=residual"])
    assert stopped.value.code == 1
