"""What is recommended is what the class does with those options: nothing else, and never instead of yours."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_bigrams import T, V, write
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from siftloader import SiftingDataLoader, Stride, TokenShards
from siftloader.loader import SPARSE, WARMUP


def gpt() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": T}
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, **sizes)).train()


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=V, intermediate_size=16, **sizes)).train()


def drawn(loader: SiftingDataLoader, epochs: int = 4) -> list[torch.Tensor]:
    return [batch["input_ids"] for _ in range(epochs) for batch in loader]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def given(total: int, **more: object) -> dict:
    """What it stands for, written out."""
    shares = {"warmup_steps": round(WARMUP * total)}
    return {**shares, "total_steps": total, **more}


def test_running_text_is_scored_at_one_position_of_eight(tmp_path):
    shards = TokenShards(write(tmp_path / "s", "clm"))
    found = drawn(SiftingDataLoader.recommended(shards, 4, model=gpt(), total_steps=40))
    sparse = Stride(SPARSE, control=shards.unigrams)
    written = SiftingDataLoader(shards, 4, model=gpt(), **given(40, positions=sparse))
    assert same(found, drawn(written))
    everywhere = SiftingDataLoader(shards, 4, model=gpt(), **given(40))
    assert not same(found, drawn(everywhere)), "it is seen in what is kept"


def test_masked_text_is_scored_at_all_of_its_labels(tmp_path):
    shards = TokenShards(write(tmp_path / "s", "mlm"))
    found = drawn(SiftingDataLoader.recommended(shards, 4, model=bert(), total_steps=40))
    assert same(found, drawn(SiftingDataLoader(shards, 4, model=bert(), **given(40))))


def test_other_data_keep_all_positions(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(V, (64, T))]
    found = drawn(SiftingDataLoader.recommended(rows, 4, model=gpt(), total_steps=40))
    assert same(found, drawn(SiftingDataLoader(rows, 4, model=gpt(), **given(40))))


def test_it_begins_with_plain_training_and_sifts_to_the_end():
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(V, (800, T))]
    loader = SiftingDataLoader.recommended(rows, 4, model=gpt(), total_steps=60)
    seen = [0, *(loader.stats["candidates"] for _, _ in zip(range(60), loader, strict=False))]
    sifted = [step for step, (before, after) in enumerate(pairwise(seen)) if after - before > 4]
    assert sifted == list(range(round(WARMUP * 60), 60))


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_steps": 0},
        {"cooldown_steps": 0.2},
        {"positions": None},
        {"positions": Stride(3)},
        {"keep": 0.25, "criterion": "entropy", "cooldown_steps": 5},
    ],
    ids=str,
)
def test_what_is_given_replaces_what_is_recommended(tmp_path, options):
    shards = TokenShards(write(tmp_path / "s", "clm"))
    found = SiftingDataLoader.recommended(shards, 4, model=gpt(), total_steps=30, **options)
    sparse = {"positions": Stride(SPARSE, control=shards.unigrams)}
    written = SiftingDataLoader(shards, 4, model=gpt(), **given(30, **{**sparse, **options}))
    assert same(drawn(found), drawn(written))
    assert len(found) == len(written)


@pytest.mark.parametrize("criterion", ["loss", "entropy", "random", "rarity", "residual"])
def test_every_criterion_that_has_a_name_can_be_had_so(tmp_path, criterion):
    shards = TokenShards(write(tmp_path / "s", "clm"))
    options = {"total_steps": 10, "warmup_steps": 0, "criterion": criterion}
    loader = SiftingDataLoader.recommended(shards, 4, model=gpt(), **options)
    batches = len(loader)
    assert len(drawn(loader, 1)) == batches > 0


def test_a_score_of_ones_own_is_not_in_its_way(tmp_path):
    shards = TokenShards(write(tmp_path / "s", "clm"))

    def longest(early, batch):
        return batch["input_ids"].float().mean(1)

    options = {"total_steps": 10, "warmup_steps": 0, "score_fn": longest}
    loader = SiftingDataLoader.recommended(shards, 4, model=gpt(), **options)
    batches = len(loader)
    assert len(drawn(loader, 1)) == batches == 7, "half of an epoch"


def test_a_share_of_many_steps_is_a_long_warm_up(tmp_path):
    folder = write(tmp_path / "s", "clm")
    plain = [batch["input_ids"] for batch in DataLoader(TokenShards(folder), 4, drop_last=True)]
    options = {"total_steps": 10**6, "drop_last": True}
    loader = SiftingDataLoader.recommended(TokenShards(folder), 4, model=gpt(), **options)
    with pytest.warns(UserWarning, match="ended inside the warm-up"):
        assert same(drawn(loader, 1), plain), "which is the plain loader's"


@pytest.mark.parametrize("total", [0, -1, 1.5, True, None, "100"])
def test_steps_are_a_number_of_them(total):
    with pytest.raises(ValueError, match=r"total_steps must be an int of at least 1, got"):
        SiftingDataLoader.recommended([1], 1, model=gpt(), total_steps=total)


def test_without_steps_or_model_python_says_so():
    with pytest.raises(TypeError, match="total_steps"):
        SiftingDataLoader.recommended([1], 1, model=gpt())
    with pytest.raises(TypeError, match="model"):
        SiftingDataLoader.recommended([1], 1, total_steps=10)


def test_what_the_class_refuses_is_refused():
    rows = [{"input_ids": torch.zeros(T, dtype=torch.int64)}]
    with pytest.raises(ValueError, match="keep"):
        SiftingDataLoader.recommended(rows, 4, model=gpt(), total_steps=10, keep=2.0)
