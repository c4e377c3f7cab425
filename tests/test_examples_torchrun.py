"""examples/ddp_torchrun.py and examples/fsdp2_torchrun.py on two ranks, as torchrun starts them."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from siftloader.shards import Layout, Source, Tokenizer, write_dataset, write_shard


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ("ddp_torchrun", "fsdp2_torchrun")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_all(rank: int, ports: list[int], shards: Path, folder: Path) -> None:
    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    for name, port in zip(NAMES, ports, strict=True):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        example = importlib.import_module(name)
        with (folder / f"{name}-{rank}").open("w") as out, contextlib.redirect_stdout(out):
            example.main([f"--shards={shards}", "--steps=20"])


def letters(folder: Path) -> Path:
    """Samples of which each is made of few letters, some of fewer than others."""
    special, rng = {"pad": 0, "cls": 1, "sep": 2, "mask": 3}, np.random.default_rng(0)
    layout, folder = Layout.for_vocabulary(32, 90), folder / "letters"
    folder.mkdir()
    written = []
    for stem, count in (("train-000000", 500), ("val-000000", 4)):
        ids = 10 + rng.integers(0, rng.integers(2, 80, (count, 1)), (count, 32))
        ids[:, 0], ids[:, -1] = special["cls"], special["sep"]
        written.append(write_shard(folder, stem, ids, np.zeros(count, np.uint8), layout))
    write_dataset(
        folder,
        written,
        layout=layout,
        objective="mlm",
        tokenizer=Tokenizer("letters", "0" * 64, 90, special),
        sources=[Source("letters", "0" * 64, 1)],
        unigrams=np.arange(90),
        seed=0,
    )
    return folder


def told(text: str) -> tuple[float, float, float]:
    """Loss, and the scores of the kept and of the others, in the last line."""
    words = text.splitlines()[-1].replace(",", "").split()
    return float(words[3]), float(words[words.index("kept") + 1]), float(words[-1])


def test_two_ranks_sift_and_sharding_changes_nothing_but_the_precision(tmp_path: Path) -> None:
    shards = letters(tmp_path)
    mp.spawn(run_all, ([free_port(), free_port()], shards, tmp_path), nprocs=2)
    ddp, fsdp2 = (told((tmp_path / f"{name}-0").read_text()) for name in NAMES)
    assert ddp == pytest.approx(fsdp2, abs=0.02)
    for _, kept, others in (ddp, fsdp2):
        assert kept > others
    assert all((tmp_path / f"{name}-1").read_text() == "" for name in NAMES), "one rank speaks"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_torchrun_starts_it(name: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, f"--master-port={free_port()}", EXAMPLES / f"{name}.py", "--steps=20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    _, kept, others = told(done.stdout)
    assert kept > others
