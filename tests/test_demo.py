from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from siftloader import TokenShards
from siftloader.shards import Layout, Source, Tokenizer, write_dataset, write_shard


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import demo


T, V = 16, 90
SPECIAL = {"pad": 0, "cls": 2, "sep": 3, "mask": 4, "eos": 3}


def letters(folder: Path, objective: str) -> Path:
    rng, layout = np.random.default_rng(0), Layout.for_vocabulary(T, V)
    folder.mkdir()
    written = [
        write_shard(folder, stem, rng.integers(5, V, (n, T)), np.zeros(n, np.uint8), layout)
        for stem, n in (("train-000000", 600), ("val-000000", 16))
    ]
    write_dataset(
        folder,
        written,
        layout=layout,
        objective=objective,
        tokenizer=Tokenizer("letters", "0" * 64, V, SPECIAL),
        sources=[Source("letters", "0" * 64, 1)],
        unigrams=np.bincount(rng.integers(5, V, 9000), minlength=V),
        seed=0,
    )
    return folder


def test_the_demo_ends_with_a_table_words_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert, gpt = letters(tmp_path / "mlm", "mlm"), letters(tmp_path / "clm", "clm")
    out = tmp_path / "demo"
    given = ["--quick", f"--bert={bert}", f"--gpt={gpt}", f"--out={out}"]
    demo.main([*given, "--criteria", "loss", "entropy"])
    table = (out / "table.txt").read_text()
    assert table.splitlines()[0] in capsys.readouterr().out
    for row in ("plain", "random half", "SIFT, loss", "SIFT, entropy", "unigrams alone"):
        assert sum(line.startswith(row + " ") for line in table.splitlines()) == 2, row
    assert "one seed" in table or ("seed" in table and "plateau" in table)
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    for model in ("bert", "gpt"):
        logs = [out / f"{model}-{arm}.jsonl" for arm in ("none", "random", "loss", "entropy")]
        ends = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
        assert len({end["samples"] for end in ends}) == 1
        assert all(end["final"] and end["learning_rate"] == 0 for end in ends)
    for subject in demo.subjects_of(demo.parse(given)):
        new = subject.build(subject.preset, TokenShards(subject.shards)).state_dict()
        model = demo.trained(subject, out)
        assert any(not torch.equal(new[name], own) for name, own in model.state_dict().items())


@pytest.mark.parametrize(
    ("gap", "says"),
    [
        (-0.3, "sifting won here"),
        (-0.06, "sifting won here"),
        (-0.04, "a tie for one seed"),
        (0.04, "a tie for one seed"),
        (0.06, "sifting lost here"),
        (0.3, "sifting lost here"),
    ],
)
def test_a_gap_is_never_oversold(gap: float, says: str) -> None:
    assert says in demo.verdict(gap)
    assert "one seed" in demo.verdict(gap) and "0.05 nats" in demo.verdict(gap)


def test_unigram_entropy_is_that_of_the_labelled_tokens(tmp_path: Path) -> None:
    # 85 letters, about equally frequent
    assert demo.unigram_entropy(letters(tmp_path / "clm", "clm")) == pytest.approx(
        np.log(85), abs=0.1
    )
