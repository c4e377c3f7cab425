"""Loops as people write them, each unchanged but for the line that makes its loader: pytest tests/test_loops.py

A loop is a text below. It runs plain, sifted, and with a loader written by hand that does the same in the most
obvious way: the losses of the last two must be equal, bit for bit, for then the kept sets are.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from torch import Tensor, nn
from torch.nn import functional

from siftloader import EarlyExit, ScoringError, Sifter, SiftingDataLoader


T = 24  # positions of a row


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def run(script: str, **names: Any) -> dict[str, Any]:
    names.setdefault("losses", [])
    exec(compile(script, "loop", "exec"), names)
    return names


def with_line(script: str, line: str, other: str) -> str:
    """The script with another text for one line, and nothing else."""
    changed = script.replace(line, other)
    rows = difflib.unified_diff(script.splitlines(), changed.splitlines(), n=0)
    removed = [row for row in rows if row[0] == "-" and row[:3] != "---"]
    assert len(removed) == 1 and script.count(line) == 1
    return changed


def best(scores: Tensor, keep: int) -> Tensor:
    """The rows with the highest scores, in the order of the pool; the lower one of two equals."""
    order = sorted(range(len(scores)), key=lambda row: (-float(scores[row]), row))
    return torch.tensor(sorted(order[:keep]))


def mean_loss(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """One loss per row, over its labelled positions: logits [P, T, V], labels [P, T] -> [P]."""
    rows = zip(logits, labels, strict=True)
    return torch.stack([functional.cross_entropy(a, b, ignore_index=ignored) for a, b in rows])


# nanochat: a generator of (inputs, targets, where to resume from) whose buffers come again and again; the loss
# inside of the model, `next` between backward and step.


CHAT = """
loader = batches(start)
x, y, place = next(loader)
for step in range(steps):
    for _ in range(2):
        loss = model(x, y)
        losses.append(loss.item())
        (loss / 2).backward()
        x, y, place = next(loader)
    optimizer.step()
    optimizer.zero_grad()
"""
CHAT_LINE = "loader = batches(start)"
CHAT_SIFTED = (
    "loader = SiftingDataLoader.wrap(batches(start), model=model, warmup_steps=2, keep=keep)"
)


def buffered(start: int = 0, rows: int = 4) -> Iterator[tuple[Tensor, Tensor, dict[str, int]]]:
    x, y = torch.empty(rows, T, dtype=torch.long), torch.empty(rows, T, dtype=torch.long)
    while True:
        drawn = torch.randint(VOCAB, (rows, T + 1), generator=torch.Generator().manual_seed(start))
        x.copy_(drawn[:, :-1])
        y.copy_(drawn[:, 1:])
        start += 1
        yield x, y, {"row_group": start, "epoch": 1}


def chat(script: str = CHAT, **names: Any) -> dict[str, Any]:
    model = FAMILIES["nanochat"].model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    given = {"model": model, "optimizer": optimizer, "SiftingDataLoader": SiftingDataLoader}
    return run(
        script, **given, **{"batches": buffered, "start": 0, "steps": 4, "keep": 0.5} | names
    )


def chat_by_hand(start: int, rows: int = 4) -> Any:
    def batches(model: nn.Module) -> Iterator[Any]:
        inner, handed = buffered(start, rows), 0
        while True:
            x, y, place = copy.deepcopy(next(inner))
            if handed >= 2:
                x2, y2, place = copy.deepcopy(next(inner))
                x, y = torch.cat((x, x2)), torch.cat((y, y2))
                kept = best(mean_loss(EarlyExit(model, 1).logits((x, y)), y), rows)
                x, y = x[kept], y[kept]
            handed += 1
            yield x, y, place

    return batches


def test_a_generator_with_a_third_element_is_sifted_by_one_line():
    sifted = chat(with_line(CHAT, CHAT_LINE, CHAT_SIFTED))
    hand = chat(with_line(CHAT, CHAT_LINE, "loader = by_hand(model)"), by_hand=chat_by_hand(0))
    assert sifted["losses"] == hand["losses"] != chat()["losses"]
    assert sifted["place"] == hand["place"] == {"row_group": 2 + 2 * 7, "epoch": 1}, (
        "the last drawn"
    )
    assert sifted["loader"].stats["kept"] == 4 * 7


def test_a_generator_with_a_third_element_is_itself_while_nothing_is_sifted():
    plain, off = chat(), chat(with_line(CHAT, CHAT_LINE, CHAT_SIFTED), keep=1.0)
    assert off["losses"] == plain["losses"] and off["place"] == plain["place"]


@pytest.mark.parametrize("rows", [2, 3])
def test_a_tuple_of_as_many_parts_as_rows_is_no_list_of_samples(rows):
    model = FAMILIES["nanochat"].model()
    loader = SiftingDataLoader.wrap(buffered(0, rows), model=model, warmup_steps=0)
    x, y, place = next(loader)
    pool = torch.cat([next(buffered(start, rows))[0] for start in range(2)])
    wanted = torch.cat([next(buffered(start, rows))[1] for start in range(2)])
    kept = best(mean_loss(EarlyExit(model, 1).logits((pool, wanted)), wanted), rows)
    assert torch.equal(x, pool[kept]) and torch.equal(y, wanted[kept])
    assert place == {"row_group": 2, "epoch": 1}


def test_what_holds_no_tensor_at_the_end_of_a_tuple_is_no_label():
    model, (x, y, place) = FAMILIES["nanochat"].model(), next(buffered())
    scores = Sifter(model).score((x, y))
    assert torch.equal(Sifter(model).score([x, y, place]), scores)
    assert torch.equal(Sifter(model).score((x, y, list("abcd"), None)), scores)
    with pytest.raises(ScoringError, match="last in a tuple"):
        Sifter(model).score((x, place))
