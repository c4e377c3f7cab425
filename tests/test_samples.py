"""What a block cannot pack by itself is packed with others, in an order that is pinned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from siftloader.corpus import Format, cut_blocks
from siftloader.files import find_inputs
from siftloader.runs import RunFile
from siftloader.samples import GATHERED, Job, _grouped, gather, make_last_run, make_run
from siftloader.shards import Layout
from siftloader.tokens import describe_tokenizer, load_tokenizer


DEMO = Path(__file__).parents[1] / "shards" / "demo"


def job(work: Path, objective: str, sources: int = 1) -> Job:
    work.mkdir()
    tokenizer = load_tokenizer(DEMO)
    return Job(
        work=work,
        objective=objective,
        seed=0,
        val_fraction=0.3,
        weights=(1.0,) * sources,
        tokenizer=tokenizer.to_str(),
        about=describe_tokenizer(tokenizer, DEMO, objective),
        layout=Layout(32, "<u2", labels=objective == "mlm-nsp"),
    )


def run_all(job: Job, *paths: Path, block_bytes: int = 1000) -> list[str]:
    blocks = cut_blocks(find_inputs(map(str, paths)), Format(block_bytes=block_bytes))
    return [make_run(job, block) for block in blocks]


def write(path: Path, documents: int, sentences: int = 6) -> Path:
    texts = [
        " ".join(f"This is sentence {n} of tale {number}." for n in range(sentences))
        for number in range(documents)
    ]
    path.write_text("\n\n".join(texts))
    return path


@pytest.mark.parametrize(
    ("parts", "expected"),
    [  # (documents, tokens) of what each run carried; groups of them
        ([(1, 5)], [1]),
        ([(3, GATHERED), (3, GATHERED), (3, 9), (3, 9)], [2, 2]),  # enough documents, then tokens
        ([(3, 5), (3, 5), (3, 5)], [3]),  # enough documents, few tokens: still one group
        ([(3, GATHERED), (1, 9), (3, 9)], [3]),  # what is left has too few: it joins the last
        ([(4, GATHERED), (4, 9)], [1, 1]),
        ([(1, GATHERED)] * 9, [4, 5]),
    ],
    ids=str,
)
def test_documents_gather_until_there_are_partners_and_tokens_enough(parts, expected):
    named = [(str(n), documents, tokens) for n, (documents, tokens) in enumerate(parts)]
    groups = _grouped(named)
    assert [len(group) for group in groups] == expected
    assert [part for group in groups for part in group] == named


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_tails_gather_by_source_and_split_in_the_order_of_blocks(tmp_path, objective):
    paths = [write(tmp_path / f"{name}.txt", 20) for name in "ab"]
    asked = job(tmp_path / "work", objective, sources=2)
    names = run_all(asked, *paths)
    assert len(names) > 4
    tasks = gather(asked, names)
    assert [(task.source, task.prefix) for task in tasks] == [
        (source, prefix) for source in (0, 1) for prefix in ("train.0", "val.0")
    ]
    assert [task.number for task in tasks] == list(range(len(names), len(names) + 4))
    for task in tasks:
        assert list(task.runs) == [name for name in names if name in task.runs]
        carried = sum(
            len(RunFile.open(asked.work / name).read(f"{task.prefix}.ids")) for name in task.runs
        )
        run = RunFile.open(asked.work / make_last_run(asked, task))
        packing = run.counted["packing"][task.prefix.split(".")[0]]
        assert (run.source, packing["tokens"], packing["documents"]) == (task.source, 0, 0)
        assert packing["kept"] + packing["tail_kept"] + packing["dropped"] == carried


def test_pairs_wait_for_partners_that_have_a_token(tmp_path):
    """Three documents and one of a control character only, which gives no token: too few."""
    texts = [*(f"Tale {n} begins. It goes on. It ends." for n in range(3)), "\u200b"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    asked = job(tmp_path / "work", "mlm-nsp")
    object.__setattr__(asked, "val_fraction", 0.0)
    (name,) = run_all(asked, tmp_path / "a.txt")
    run = RunFile.open(asked.work / name)
    assert run.counted["skipped"] == {"documents without a token": 1}
    assert run.count("train.rows") == 0
    assert run.count("train.0.documents") == 4  # offsets of three
    (task,) = gather(asked, [name])
    last = RunFile.open(asked.work / make_last_run(asked, task))
    assert last.count("train.rows") == last.count("train.labels") > 0
    assert np.isin(last.read("train.labels"), (0, 1)).all()
