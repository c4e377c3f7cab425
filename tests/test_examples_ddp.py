"""examples/pretrain_bert.py on two ranks, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_examples import (
    SHORT,
    SIFTED,
    SMALLEST,
    VAL,
    assert_equal,
    assert_same_runs,
    letters,
    lines,
    load,
    save_and_die,
)

from siftloader import TokenShards


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import pretrain_bert


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_thrice(rank: int, ports: list[int], shards: str, folder: Path) -> None:
    """Straight; killed after five steps; the same command again."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    models, save, handed = [], pretrain_bert.Checkpoint.save, []

    def build(preset: pretrain_bert.Preset, shards: TokenShards) -> torch.nn.Module:
        models.append(pretrain_bert.build_bert(preset, shards))
        models[-1].register_forward_pre_hook(
            lambda module, inputs, batch: (
                handed.append(batch["input_ids"].clone()) if module.training else None
            ),
            with_kwargs=True,
        )
        return models[-1]

    for name, port in zip(("straight", "killed", "killed"), ports, strict=True):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        files = [f"--checkpoint={folder / name}.pt", f"--log={folder / name}.jsonl"]
        options = ["--sift=loss", "--checkpoint-every=5", "--final-samples=5", "--continue"]
        arguments = [f"--shards={shards}", *files, *options, *SHORT, *SIFTED]
        killed = name == "killed" and len(models) == 1
        pretrain_bert.Checkpoint.save = save_and_die if killed else save
        try:
            pretrain_bert.pretrain(arguments, "", {"tiny": SMALLEST}, build)
        except KeyboardInterrupt:
            assert killed
        if name == "straight":
            torch.save(handed, folder / f"handed-{rank}.pt")
    torch.save([model.state_dict() for model in models], folder / f"models-{rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    letters(folder / "shards", "mlm-nsp")
    ports = [free_port() for _ in range(3)]
    on_ranks(train_thrice, ports, str(folder / "shards"), folder)
    return folder


def test_two_ranks_that_are_killed_resume_as_if_never_interrupted(trained: Path) -> None:
    assert_same_runs(trained)
    one, two = load(trained / "straight.pt")["ranks"]
    assert not torch.equal(one["rng"], two["rng"]), "each rank drops out other neurons"


def test_two_ranks_train_one_model_on_samples_of_their_own(trained: Path) -> None:
    one, two = (load(trained / f"models-{rank}.pt") for rank in range(2))
    assert_equal(one, two)
    mine, yours = (load(trained / f"handed-{rank}.pt") for rank in range(2))
    assert len(mine) == len(yours) == 8  # steps
    rows = [{tuple(row) for batch in each for row in batch.tolist()} for each in (mine, yours)]
    assert not rows[0] & rows[1]
    assert [line["samples"] for line in lines(trained / "straight.jsonl")[1:]] == [32, 64, 64]
    assert lines(trained / "straight.jsonl")[0]["run"]["ranks"] == 2


def test_two_ranks_evaluate_every_sample_once(trained: Path) -> None:
    shards = TokenShards(trained / "shards", split="val")
    model = pretrain_bert.build_bert(SMALLEST, shards)
    model.load_state_dict(load(trained / "straight.pt")["model"])
    *_, last, final = lines(trained / "straight.jsonl")
    for line, samples in ((last, VAL), (final, 5)):
        alone = pretrain_bert.evaluate(model, shards, samples)
        assert alone == pytest.approx({name: line[name] for name in alone}, rel=1e-6)


def test_a_checkpoint_of_two_ranks_is_not_for_one(trained: Path) -> None:
    arguments: list[Any] = [f"--shards={trained / 'shards'}", "--sift=loss", *SHORT, *SIFTED]
    presets = {"tiny": SMALLEST}
    with pytest.raises(SystemExit, match="another run: ranks was 2, is 1; give"):
        pretrain_bert.pretrain(
            [*arguments, f"--resume={trained / 'straight.pt'}"],
            "",
            presets,
            pretrain_bert.build_bert,
        )


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path: Path) -> None:
    shards = letters(tmp_path / "shards", "mlm-nsp")
    example = Path(pretrain_bert.__file__)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--sift", "entropy", "--log-file", tmp_path / "log.jsonl", *SHORT, *SIFTED]
    command = [*torchrun, "--master-port", str(free_port()), example, "--shards", shards, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "log.jsonl")[-1]["final"]
    assert done.stdout.count('{"run"') == 1, "one rank speaks"
