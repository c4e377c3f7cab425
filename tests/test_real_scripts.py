"""The driver of other projects' scripts finds what it is there to find: python -m pytest tests/test_real_scripts.py"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from siftloader import SiftingDataLoader


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import real_scripts as tool


P = 4  # candidates of a pool
RUN = tool.Run("toy", Path("toy"), 0.5, epochs=2, accumulate=2)


def pool(name: str, scores: list[float]) -> dict[str, Any]:
    rows = [f"{name}{i}" for i in range(len(scores))]
    full = [score + 1 for score in scores]
    return {"event": "scored", "rows": rows, "texts": rows, "reference": scores, "full": full}


def trained(*rows: str) -> dict[str, Any]:
    return {"event": "trained", "rows": list(rows), "texts": list(rows), "out": "bits"}


def drawn(*rows: str) -> dict[str, Any]:
    return {"event": "drawn", "data": 0, "rows": list(rows), "texts": list(rows)}


UPDATED = {"event": "updated"}
SIFTED = [
    drawn("a0", "a1", "a2", "a3"),
    pool("a", [1.0, 4.0, 2.0, 3.0]),
    trained("a1", "a3"),
    drawn("b0", "b1", "b2", "b3"),
    pool("b", [4.0, 3.0, 2.0, 1.0]),
    trained("b0", "b1"),
]
LOG = {
    0: [(1.0, False), (4.0, True), (2.0, False), (3.0, True)],
    1: [(4.0, True), (3.0, True), (2.0, False), (1.0, False)],
}


def changed(at: int, event: dict[str, Any]) -> list[dict[str, Any]]:
    return [*SIFTED[:at], event, *SIFTED[at + 1 :]]


def test_the_top_half_of_every_pool_is_found_right():
    assert "8 candidates in 2 pools" in tool.sifted(SIFTED, P, LOG)


@pytest.mark.parametrize(
    ("events", "log", "words"),
    [
        ([trained("a0", "a1")], {}, "does not sift"),
        (changed(2, trained("a0", "a1")), LOG, "not the top of the pool"),
        (changed(2, trained("a3", "a1")), LOG, "in their order"),
        (changed(2, trained("a1", "b0")), LOG, "1 rows are not of its pool"),
        (
            [*SIFTED[:-1], pool("c", [1.0] * 4), pool("d", [1.0] * 4)],
            LOG,
            "4 pools were scored, 1",
        ),
        (SIFTED, {0: LOG[0]}, "pool 1 is not in the selection log"),
        (SIFTED, {0: LOG[0], 1: LOG[1][::-1]}, "the log names others"),
        (SIFTED, {**LOG, 0: [(s + 0.1, kept) for s, kept in LOG[0]]}, "off the reference"),
        ([{**e, "full": e.get("reference")} for e in SIFTED], LOG, "all depths score alike"),
    ],
)
def test_what_is_not_sifting_is_found(events: Any, log: Any, words: str):
    with pytest.raises(tool.Failed, match=words):
        tool.sifted(events, P, log)


def test_what_is_scored_to_hear_the_model_is_no_pool():
    trial = [
        pool("a", [9.0]),
        pool("a", [9.0] * P),
        pool("a", [8.0] * 2),
    ]  # of the pool that comes
    assert tool.pools([*trial, *SIFTED], P) == tool.pools(SIFTED, P)


def test_a_pool_may_be_scored_in_parts():
    whole, half = pool("a", [1.0, 4.0, 2.0, 3.0]), P // 2
    values = ("rows", "texts", "reference", "full")
    parts = [
        {"event": "scored", **{name: whole[name][part] for name in values}}
        for part in (slice(0, half), slice(half, P))
    ]
    assert tool.pools([*parts, *SIFTED[2:]], P) == tool.pools(SIFTED, P)


def test_pools_are_the_rows_drawn_but_for_less_than_a_batch():
    assert tool.drawn_in_order(SIFTED, P)
    early = [drawn(*(f"x{i}" for i in range(tool.BATCH))), *SIFTED]
    with pytest.raises(tool.Failed, match="pool 0 is not the next 4 rows"):
        tool.drawn_in_order(early, P)
    swapped = [SIFTED[0], SIFTED[4], SIFTED[2], SIFTED[3], SIFTED[1], SIFTED[5]]
    with pytest.raises(tool.Failed, match="pool 1 is not"):
        tool.drawn_in_order(swapped, P)


def test_another_output_is_no_longer_the_same_training():
    assert tool.same_training(SIFTED, SIFTED) == "2 batches"
    with pytest.raises(tool.Failed, match="batch 0 of 2: outputs differ"):
        tool.same_training(SIFTED, changed(2, {**SIFTED[2], "out": "other bits"}))
    with pytest.raises(tool.Failed, match="the rows differ"):
        tool.same_training(SIFTED, changed(2, trained("a0", "a3")))
    with pytest.raises(tool.Failed, match="2 batches were trained on, and 1"):
        tool.same_training(SIFTED, SIFTED[:-1])


def test_a_partial_update_that_is_lost_is_found():
    epoch = [trained("a"), trained("b"), UPDATED, trained("c"), UPDATED]
    assert tool.updated(epoch * 2, RUN, carries=False) == "after [2, 1] batches"
    lost = [trained("a"), trained("b"), UPDATED, trained("c")]
    with pytest.raises(tool.Failed, match=r"updates after \[2, 3\] batches \(and 1 left\)"):
        tool.updated(lost * 2, RUN, carries=False)
    carried = [*epoch[:3], *epoch[:3], trained("c")]
    assert tool.updated(carried, RUN, carries=True) == "after [2, 2] batches, 1 left"


def test_a_restart_that_repeats_or_leaves_out_is_found():
    run = replace(RUN, epochs=1, keep=1.0)
    whole = [event for name in "abcd" for event in (pool(name, [2.0, 1.0]), trained(f"{name}0"))]
    assert "went on at 2" in tool.continues(whole, whole[:6], whole[4:], run)
    assert tool.identical(whole, whole[4:]) == "2 batches"
    with pytest.raises(tool.Failed, match="batch 1 has other texts"):
        tool.continues(whole, whole[:6], whole[:6], run)
    with pytest.raises(tool.Failed, match="what was lost"):
        tool.continues(whole, whole[:2], whole[4:], run)
    with pytest.raises(tool.Failed, match="batch 2 has other rows"):
        tool.identical(whole, [*whole[4:5], trained("c1"), *whole[6:]])


def test_a_text_on_two_ranks_in_one_epoch_is_found():
    first, second = [trained("a"), trained("b")], [trained("b"), trained("a")]
    assert tool.disjoint([first, second], epochs=2)
    with pytest.raises(tool.Failed, match="1 and 1 texts, 1 of them on both"):
        tool.disjoint([first, [trained("c"), trained("b")]], epochs=2)
    with pytest.raises(tool.Failed, match="2 of them on both"):
        tool.disjoint([first, second], epochs=1)


def test_a_script_is_changed_at_a_line_that_is_there_once():
    script = "def main():\n    loader = 1\n    # go\n    run(loader)\n"
    line = "loader = 2"
    assert tool.patched(script, "# go", line) == script.replace(
        "    # go", "    loader = 2\n    # go"
    )
    for before, times in (("# stop", 0), ("x", 2)):
        with pytest.raises(ValueError, match=f"is there {times} times"):
            tool.patched(script + "x\nx\n", before, line)


def test_a_checkout_is_copied_byte_for_byte_from_a_tree_or_a_git_directory(tmp_path: Path):
    tree, git = tmp_path / "tree", ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C"]
    (tree / "folder").mkdir(parents=True)
    (tree / "folder" / "train.py").write_bytes(b"a = 1\r\n\xff")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, str(tree), *words], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(tree), str(tmp_path / "bare")], check=True)
    commits = set()
    for source in ("tree", "bare"):
        to = tmp_path / f"copy-{source}"
        commits.add(tool.bring(tmp_path / source, ["folder/train.py"], to))
        assert (to / "folder" / "train.py").read_bytes() == b"a = 1\r\n\xff"
    assert len(commits) == 1 and len(commits.pop()) == 40
    with pytest.raises(SystemExit, match=r"no other\.py in there"):
        tool.bring(tree, ["other.py"], tmp_path / "nothing")


def test_ranks_that_wait_for_one_that_failed_are_ended():
    children = [
        os.posix_spawn("/bin/sh", ["sh", "-c", words], {}) for words in ("exit 3", "sleep 60")
    ]
    assert tool.waited_for(children, grace=0.1) == [3, -signal.SIGKILL]


def test_digests_tell_bits_apart():
    x = torch.zeros(2, 3)
    assert tool.digest(x) != tool.digest(-x)
    assert tool.digest({"loss": x}) == tool.digest((x,))
    assert (
        tool.digests(torch.tensor([[1, 2], [1, 2], [2, 1]]))[0:2]
        == [tool.digest(torch.tensor([1, 2]))] * 2
    )


class Told(IterableDataset[dict[str, torch.Tensor]]):
    """A data set as litdata's: its loader tells it how far it is."""

    def __iter__(self) -> Any:
        return ({"x": torch.tensor([i]), "labels": torch.tensor(i % 2)} for i in range(8))

    def state_dict(self, samples: int, workers: int, batch_size: int) -> dict[str, int]:
        raise AssertionError("asked by somebody who cannot know")

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError("told by somebody who cannot know")


def test_a_data_set_that_must_be_told_how_far_it_is_is_not_asked():
    inner = DataLoader(Told(), batch_size=2)
    loader = SiftingDataLoader.wrap(
        inner, model=torch.nn.Linear(1, 2), exit_layer="full", keep=1.0
    )
    assert len(list(loader)) == 4
    assert loader.state_dict()["cursor"].get("inner") is None


TOY = """
import argparse
import os
from types import SimpleNamespace
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader


class Toy(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(40, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(config.layers))
        self.head = nn.Linear(8, 40)

    def forward(self, x, targets=None):
        h = self.embed(x)
        for layer in self.layers:
            h = h + 3 * torch.tanh(layer(h))
        logits = self.head(h)
        return logits, None if targets is None else cross_entropy(logits.flatten(0, 1), targets.flatten())


parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--resume")
args = parser.parse_args()
torch.manual_seed(0)
model = Toy(SimpleNamespace(layers=3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.randint(40, (88, 7))
loader = DataLoader([(row[:-1], row[1:]) for row in data], batch_size=8)
model.train()
done = 0
if args.resume:
    saved = torch.load(args.resume)
    model.load_state_dict(saved["model"])
    done = saved["done"]
number = 0
for epoch in range(2):
    for step, (x, y) in enumerate(loader):
        number += 1
        if number <= done:
            continue
        model(x, y)[1].backward()
        if step % 2 or step == len(loader) - 1:
            optimizer.step()
            optimizer.zero_grad()
            os.makedirs(args.out, exist_ok=True)
            torch.save({"model": model.state_dict(), "done": number}, f"{args.out}/model.pt")
"""
LINE = (
    "from siftloader import SiftingDataLoader; loader = SiftingDataLoader.wrap(loader, {options})"
)


def toy(checkout: Path, line: str = LINE, script: str = TOY) -> tool.Target:
    """A target whose script trains a tiny model and resumes by itself, exactly."""
    checkout.mkdir()
    (checkout / "toy.py").write_text(script)
    return tool.Target(
        files=("toy.py",),
        before="model.train()",
        line=line,
        model="Toy",
        layers="layers",
        depth="layers",
        arguments=lambda run, work: ["--out", str(run.out)],
        prepare=lambda work: None,
        resume=lambda run: ["--resume", f"{run.out}/model.pt"],
        weights="model.pt",
        accumulate=2,
        die_after=4,
        one_rank="a toy",
    )


@pytest.mark.slow
def test_a_script_is_run_and_checked_from_end_to_end(tmp_path: Path, capsys: Any):
    assert tool.check("toy", toy(tmp_path / "toy"), tmp_path / "toy", tmp_path / "work", 0.5)
    words = capsys.readouterr().out
    assert "+from siftloader import" in words and "sha256" in words
    assert "FAILED" not in words and "killed after 4 batches of 6, went on at" in words
    assert "after [2, 2, 2] batches" in words and "scores within 0e+00" in words


@pytest.mark.slow
def test_a_line_that_does_not_sift_fails(tmp_path: Path, capsys: Any):
    rebuilt = LINE + "; loader = DataLoader(loader._source.loader.dataset, batch_size=8)"
    target = toy(tmp_path / "toy", rebuilt)
    assert not tool.check("toy", target, tmp_path / "toy", tmp_path / "work", 0.5)
    assert "FAILED  sifting is on, and right" in capsys.readouterr().out


@pytest.mark.slow
def test_a_script_that_fails_says_its_last_words(tmp_path: Path, capsys: Any):
    target = toy(tmp_path / "toy", script=TOY + "raise SystemExit('out of tokens')")
    assert not tool.check("toy", target, tmp_path / "toy", tmp_path / "work", 0.5)
    assert "out of tokens" in capsys.readouterr().out
