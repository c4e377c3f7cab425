"""Every kind of batch a loop may use: pytest tests/test_kinds.py"""

from __future__ import annotations

import dataclasses
from collections import namedtuple

import pytest
import torch
import transformers
from models import LENGTH, VOCAB, Classifier, bert, candidates, classifier, gpt2, llama
from torch import Tensor

from siftloader import Sifter, SiftingDataLoader


Pair = namedtuple("Pair", ["x", "labels"])


@dataclasses.dataclass(frozen=True)
class Sample:
    x: Tensor
    labels: Tensor
    names: list[str]


BASE = candidates("classifier")
X, Y = BASE["x"], BASE["labels"]
NAMES = [f"sample {row}" for row in range(8)]
KINDS = {
    "dict": {"x": X, "labels": Y},
    "encoding": transformers.BatchEncoding({"x": X, "labels": Y}),
    "tuple": (X, Y),
    "list": [X, Y],
    "named tuple": Pair(X, Y),
    "dataclass": Sample(X, Y, NAMES),
    "dict in a tuple": ({"x": X}, Y),
    "leaves of other kinds": {"x": X, "labels": Y, "names": NAMES, "scale": 0.5, "on": None},
    "float64 labels as classes": {
        "x": X,
        "labels": torch.nn.functional.one_hot(Y.clamp_min(0), 10).float() * (Y >= 0)[:, None],
    },
    "int32 labels": {"x": X, "labels": Y.int()},
}


def parts(batch) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        first = batch[0]
        return (first["x"] if isinstance(first, dict) else first), batch[1]
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        return batch["x"], batch["labels"]
    return batch.x, batch.labels


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_scores_alike_and_comes_out_as_it_went_in(kind):
    model, batch = classifier(), KINDS[kind]
    expected = Sifter(model).score(BASE)
    index = expected.argsort(descending=True, stable=True)[:4].sort().values
    assert torch.allclose(Sifter(model).score(batch), expected, atol=1e-6)
    (kept,) = SiftingDataLoader.wrap([batch], model=model, warmup_steps=0, pool="split")
    assert type(kept) is type(batch)
    x, labels = parts(kept)
    assert torch.equal(x, X[index]) and torch.equal(labels, parts(batch)[1][index])
    if kind == "leaves of other kinds":
        assert kept["names"] == [NAMES[row] for row in index]
        assert kept["scale"] == 0.5 and kept["on"] is None
    if kind == "dataclass":
        assert kept.names == [NAMES[row] for row in index]


def test_a_bare_tensor_is_scored_by_two_lines_of_the_loop():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = gpt2()

        def forward(self, ids):
            return self.inner(ids).logits

    model = Model().train()
    batch = torch.randint(5, VOCAB, (8, LENGTH + 1))

    def loss_of(model, batch):
        logits = model(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:])

    pairs = (batch[:, :-1], batch[:, 1:])
    expected = Sifter(model, shift_labels=False).score(pairs)
    assert torch.allclose(Sifter(model, score_fn=loss_of).score(batch), expected, atol=1e-5)
    loader = SiftingDataLoader.wrap(
        [batch], model=model, score_fn=loss_of, warmup_steps=0, pool="split"
    )
    (kept,) = loader
    index = expected.argsort(descending=True, stable=True)[:4].sort().values
    assert torch.equal(kept, batch[index])


@pytest.mark.filterwarnings("ignore:.*position_ids.*")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_packed_documents_are_scored_with_their_positions_and_masks(make):
    # Two documents in a row: positions begin anew, and a block mask keeps them apart.
    model, half = make().double(), LENGTH // 2
    ids = torch.randint(5, VOCAB, (8, LENGTH))
    position_ids = torch.arange(half).repeat(2).expand(8, LENGTH).contiguous()
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).fill_(torch.finfo(torch.float64).min)
    for begin in (0, half):
        block = slice(begin, begin + half)
        mask[block, block] = mask[block, block].triu(1)
    labels = ids.clone()
    labels[:, 0] = labels[:, half] = -100  # nothing before them to predict them from
    packed = {
        "input_ids": ids,
        "position_ids": position_ids,
        "attention_mask": mask.expand(8, 1, LENGTH, LENGTH).contiguous(),
        "labels": labels,
    }
    found = Sifter(model, exit_layer=2).score(packed)
    apart = [
        Sifter(model, exit_layer=2).score({"input_ids": i, "labels": j})
        for i, j in zip(ids.chunk(2, 1), labels.chunk(2, 1), strict=True)
    ]
    assert torch.allclose(found, (apart[0] + apart[1]) / 2, atol=1e-5)
    mixed = Sifter(model, exit_layer=2).score({"input_ids": ids, "labels": labels})
    assert (mixed - found).abs().max() > 1e-2, "documents must be apart, or this could not fail"


def test_batches_of_different_padded_lengths_make_one_pool():
    model = bert()
    short, long = candidates("bert", 8, 16), candidates("bert", 8, LENGTH)
    (kept,) = SiftingDataLoader.wrap([short, long], model=model, warmup_steps=0)
    scores = torch.cat([Sifter(model).score(short), Sifter(model).score(long)])
    index = scores.argsort(descending=True, stable=True)[:8].sort().values
    assert kept["input_ids"].shape == (8, LENGTH)
    for row, number in zip(kept["input_ids"], index.tolist(), strict=True):
        of, at = (short, number) if number < 8 else (long, number - 8)
        own = of["input_ids"][at]
        assert torch.equal(row[: len(own)], own) and (row[len(own) :] == 0).all()


def test_soft_labels_score_the_cross_entropy_against_them():
    model = classifier()
    soft = torch.rand(8, 10).softmax(-1)
    soft[3] = 0  # no label
    found = Sifter(model, exit_layer=2).score({"x": X, "labels": soft})
    logits = Sifter(model, exit_layer=2).scorer._exit().logits({"x": X})
    expected = -(soft * logits.log_softmax(-1)).sum(-1)
    rows = torch.arange(8) != 3
    assert torch.allclose(found[rows], expected[rows], atol=1e-5) and found[3] == -torch.inf
    mixed = SiftingDataLoader.wrap(
        [(X, soft)], model=model, warmup_steps=0, pool="split", exit_layer=2
    )
    ((x, labels),) = mixed
    index = found.argsort(descending=True)[:4].sort().values
    assert torch.equal(x, X[index]) and torch.equal(labels, soft[index])


def test_a_frozen_or_refreshed_proxy_scores_like_a_live_model():
    batch, proxy = candidates("bert"), bert(2).eval()
    sift = Sifter(proxy, exit_layer=2)  # smaller, and at full depth
    before = sift.score(batch)
    index = before.argsort(descending=True, stable=True)[:4].sort().values
    assert torch.equal(sift(batch)["input_ids"], batch["input_ids"][index])
    proxy.load_state_dict(bert(2).state_dict())  # refreshed
    assert (sift.score(batch) - before).abs()[torch.arange(8) != 3].max() > 1e-3
    # In a loader, too: its mode says whether to sift, whatever it is used for.
    loader = SiftingDataLoader.wrap(
        [batch], model=proxy.train(), exit_layer=2, warmup_steps=0, pool="split"
    )
    (kept,) = loader
    index = sift.score(batch).argsort(descending=True, stable=True)[:4].sort().values
    assert torch.equal(kept["input_ids"], batch["input_ids"][index])


def test_fields_the_model_does_not_take_stay_in_the_batch():
    model = Classifier().train()
    batch = {"x": X, "labels": Y, "id": torch.arange(8) + 2**40, "weight": torch.rand(8)}
    (kept,) = SiftingDataLoader.wrap([batch], model=model, warmup_steps=0, pool="split")
    index = Sifter(model).score(BASE).argsort(descending=True, stable=True)[:4].sort().values
    assert torch.equal(kept["id"], batch["id"][index])
    assert torch.equal(kept["weight"], batch["weight"][index])
