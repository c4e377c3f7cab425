from __future__ import annotations

import json
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, strategies as st
from torch.utils.data import DataLoader

from siftloader import SiftingDataLoader
from siftloader.errors import CorruptShard, EmptyEpoch, ShardError, StateError
from siftloader.masking import Mlm
from siftloader.shards import Layout, ShardSet, Source, Tokenizer, write_dataset, write_shard
from siftloader.stream import TokenShards
from siftloader.world import World


T, V = 16, 90
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
COUNTS = [(1,), (11,), (5, 7, 3, 6), (9, 1, 1, 14, 2, 1), (40, 40, 3)]
Make = Callable[..., Path]
Row = tuple[tuple[str, tuple[int, ...] | int], ...]


def write(folder: Path, counts: tuple[int, ...], objective: str, special: dict[str, int]) -> Path:
    """Shards of those sizes, and 3 + 4 samples of validation; one sample in three is padded."""
    rng = np.random.default_rng(0)
    pairs = objective == "mlm-nsp"
    layout = Layout.for_vocabulary(T, V, labels=pairs)
    folder.mkdir()
    written = []
    stems = [(f"train-{i:06d}", n) for i, n in enumerate(counts)]
    for stem, n in [*stems, ("val-000000", 3), ("val-000001", 4)]:
        ids = rng.integers(5, V, (n, T))
        if "pad" in special:
            ids[::3, T // 2 :] = special["pad"]
        if pairs:
            ids = np.array([pair(rng) for _ in range(n)])
        labels = label_of(ids) if pairs else None
        sources = rng.integers(0, 3, n).astype(np.uint8)
        written.append(write_shard(folder, stem, ids, sources, layout, labels))
    write_dataset(
        folder,
        written,
        layout=layout,
        objective=objective,
        tokenizer=Tokenizer("letters", "0" * 64, V, special),
        sources=[Source(name, "0" * 64, 1) for name in "abc"],
        unigrams=np.arange(V),
        seed=0,
    )
    return folder


def pair(rng: np.random.Generator) -> list[int]:
    """[CLS] A [SEP] B [SEP] and padding, every part of any length."""
    first = int(rng.integers(1, T - 4))
    second = int(rng.integers(1, T - 2 - first))
    a, b = rng.integers(5, V, first).tolist(), rng.integers(5, V, second).tolist()
    row = [SPECIAL["cls"], *a, SPECIAL["sep"], *b, SPECIAL["sep"]]
    return row + [SPECIAL["pad"]] * (T - len(row))


def label_of(ids: Any) -> Any:
    """A label that follows from the row, so that a row with another's label is seen."""
    return np.asarray(ids).sum(axis=-1) % 2


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root, made = tmp_path_factory.mktemp("shards"), {}

    def written(counts=(5, 7, 3, 6), objective="mlm", special=SPECIAL) -> Path:
        key = (counts, objective, tuple(special))
        if key not in made:
            made[key] = write(root / str(len(made)), counts, objective, dict(special))
        return made[key]

    return written


def opened(folder: Path, **options: Any) -> TokenShards:
    return TokenShards(folder, **({"with_ids": True, "with_source": True, "window": 2} | options))


def row(sample: dict[str, torch.Tensor]) -> Row:
    """A sample as a value that compares and hashes."""
    return tuple(
        (name, tuple(value.tolist()) if value.dim() else value.item())
        for name, value in sample.items()
    )


def rows(batch: dict[str, torch.Tensor]) -> list[Row]:
    return [
        row(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)
    ]


def epoch_of(folder: Path, epoch: int, **options: Any) -> list[Row]:
    """All rows of an epoch in the order of their global positions: the reference."""
    whole = opened(folder, world=World(), **options).read_batches(7, epoch)
    return [one for batch in whole for one in rows(batch)]


def ids_of(found: list[Row]) -> list[int]:
    return [dict(one)["id"] for one in found]


@given(
    counts=st.sampled_from(COUNTS),
    objective=st.sampled_from(["mlm", "mlm-nsp"]),
    seed=st.integers(0, 3),
    segments=st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 9), st.integers(0, 3)),
        max_size=7,
    ),
)
def test_any_number_of_restarts_on_any_ranks_changes_nothing(
    make, counts, objective, seed, segments
):
    """A segment: so many ranks take so many batches of so many rows (0: single samples), then stop.

    The next one restores the state of any of them. All rows, in the order of their global positions,
    masks included, are those of straight runs, but for the stated tail of an epoch.
    """
    folder = make(counts, objective)
    state, epoch, position = None, 0, 0
    for ranks, n, takes, saver in segments:
        if ranks > sum(counts):
            continue
        readers = [opened(folder, seed=seed, world=World(rank, ranks)) for rank in range(ranks)]
        handed = []
        for reader in readers:
            if state is not None:
                reader.load_state_dict(json.loads(json.dumps(state)))
            taken = islice(reader.batches(n) if n else reader, takes)
            handed.append([one for item in taken for one in (rows(item) if n else [row(item)])])
        whole = epoch_of(folder, epoch, seed=seed)
        equal = (len(whole) - position) // ranks
        end = position + min(takes * max(n, 1), equal) * ranks
        assert [handed[p % ranks].pop(0) for p in range(position, end)] == whole[position:end]
        assert not any(handed)
        exhausted = takes > -(-equal // max(n, 1))
        epoch, position = (epoch + 1, 0) if exhausted else (epoch, end)
        assert len({json.dumps(reader.state_dict()) for reader in readers}) == 1
        state = readers[saver % ranks].state_dict()
        assert (state["epoch"], state["position"]) == (epoch, position)


@given(
    counts=st.sampled_from(COUNTS[1:]),
    epoch=st.integers(0, 3),
    ranks=st.integers(1, 7),
    workers=st.integers(1, 4),
    n=st.integers(1, 9),
    split=st.sampled_from(["train", "val"]),
    start=st.integers(0, 99),
)
def test_ranks_and_workers_partition_an_epoch(
    make, counts, epoch, ranks, workers, n, split, start
):
    folder = make(counts)
    whole = epoch_of(folder, epoch, split=split)
    start = start % (len(whole) + 1)
    shards = opened(folder, split=split)
    seen: list[Row] = []
    for rank in range(ranks):
        own = whole[start:][(rank - start) % ranks :: ranks]
        if split == "train":  # equally many each, the tail left out
            own = own[: (len(whole) - start) // ranks]
        assert shards.rows(start, World(rank, ranks)) == len(own)
        for worker in range(workers):
            world = World(rank, ranks, worker, workers)
            batches = list(shards.read_batches(n, epoch, start, world))
            found = [one for batch in batches for one in rows(batch)]
            assert found == own[worker::workers]
            assert all(len(batch["id"]) == n for batch in batches[:-1])  # only the last is ragged
            seen += found
    assert len(set(seen)) == len(seen)
    left_out = len(whole) - start - len(seen)
    assert left_out == ((len(whole) - start) % ranks if split == "train" else 0)


@given(
    data=st.data(),
    objective=st.sampled_from(["mlm", "mlm-nsp"]),
    bit=st.integers(0, 7),
    n=st.integers(1, 9),
    samples=st.booleans(),
)
def test_a_flipped_bit_anywhere_is_found_before_a_wrong_sample(
    make, tmp_path_factory, data, objective, bit, n, samples
):
    made = make((5, 7, 3, 6), objective)
    right = set(epoch_of(made, 0))
    folder = tmp_path_factory.mktemp("flipped") / "shards"
    shutil.copytree(made, folder)
    files = sorted([*folder.glob("train-*.tar"), *folder.glob("train-*.sources.npy")])
    victim = data.draw(st.sampled_from(files))
    flip(victim, data.draw(st.integers(0, victim.stat().st_size - 1)), 1 << bit)
    shards = opened(folder, window=1)
    delivered: list[Row] = []
    with pytest.raises(CorruptShard, match=victim.name.split(".")[0]):
        for item in shards if samples else shards.batches(n):
            delivered += [row(item)] if samples else rows(item)
    assert right.issuperset(delivered)
    shutil.rmtree(folder.parent)


def flip(path: Path, at: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


@given(
    counts=st.sampled_from(COUNTS), n=st.integers(1, 60), split=st.sampled_from(["train", "val"])
)
@pytest.mark.parametrize("objective", ["mlm", "mlm-nsp"])
def test_batches_and_samples_are_the_same_rows(make, counts, n, split, objective):
    one, other = (opened(make(counts, objective), split=split) for _ in range(2))
    for _ in range(2):  # the next epoch too
        batched = [found for batch in one.batches(n) for found in rows(batch)]
        assert batched == [row(sample) for sample in other]
        assert len(batched) == len(one)


MASKINGS = {
    "auto": ("auto", "mlm", True),
    "none": (None, "mlm", False),
    "a probability": (0.5, "mlm", True),
    "an Mlm": (Mlm(0.5, mask_id=4, vocab_size=V, special_ids=(0,)), "mlm", True),
    "auto clm": ("auto", "clm", False),
    "Mlm on clm": (0.3, "clm", True),
}


@pytest.mark.parametrize(
    ("masking", "objective", "masked"), MASKINGS.values(), ids=MASKINGS.keys()
)
def test_a_batch_is_what_the_objective_takes(make, masking, objective, masked):
    folder = make((40, 40, 3), objective)
    batch = next(TokenShards(folder, masking=masking).batches(50))
    raw = next(TokenShards(folder, masking=None).batches(50))["input_ids"]
    names = ["input_ids", "labels"]
    if objective == "mlm":
        names.insert(1, "attention_mask")
        assert torch.equal(batch["attention_mask"], (raw != 0).long())
    assert list(batch) == names
    assert all(v.dtype == torch.int64 and v.shape == (50, T) for v in batch.values())
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], raw[labelled])
    assert not (labelled & (raw == 0)).any() or objective == "clm"
    if masked:
        assert 0.05 < labelled.float().mean() < 0.6
        assert not torch.equal(batch["input_ids"], raw)
    else:
        assert torch.equal(batch["input_ids"], raw)
        assert torch.equal(labelled, raw != 0 if objective == "mlm" else torch.ones_like(labelled))


@given(
    counts=st.sampled_from(COUNTS[1:]),
    n=st.integers(1, 50),
    masking=st.sampled_from(["auto", None]),
)
def test_pairs_come_as_bert_takes_them(make, counts, n, masking):
    """A loop over the tokens of a row is the reference for its segments."""
    names = ["input_ids", "token_type_ids", "attention_mask", "labels", "next_sentence_label"]
    folder = make(counts, "mlm-nsp")
    unmasked = TokenShards(folder, masking=None).batches(n)
    for batch, raw in zip(TokenShards(folder, masking=masking).batches(n), unmasked, strict=True):
        ids, rows = raw["input_ids"], len(raw["input_ids"])
        assert list(batch) == names
        assert all(value.dtype == torch.int64 for value in batch.values())
        assert batch["next_sentence_label"].shape == (rows,)
        assert batch["next_sentence_label"].tolist() == label_of(ids).tolist()
        assert all(batch[name].shape == (rows, T) for name in names[:4])
        assert batch["attention_mask"].tolist() == (ids != 0).long().tolist()
        expected = []
        for row in ids.tolist():
            seps = [at for at, token in enumerate(row) if token == SPECIAL["sep"]]
            assert len(seps) == 2
            expected.append([int(seps[0] < at <= seps[1]) for at in range(T)])
        assert batch["token_type_ids"].tolist() == expected
        labelled = batch["labels"] != -100
        assert torch.equal(batch["labels"][labelled], ids[labelled])
        assert torch.equal(batch["input_ids"][~labelled], ids[~labelled])


def test_a_row_that_is_one_segment_has_no_second(tmp_path):
    layout, full = Layout(T, labels=True), [2, *range(5, T + 4)]
    rows = np.array([[*full[:-1], 3], full])  # its [SEP] at the very end; none at all
    shard = write_shard(
        tmp_path, "train-000000", rows, np.zeros(2, np.uint8), layout, np.zeros(2, int)
    )
    write_dataset(
        tmp_path,
        [shard],
        layout=layout,
        objective="mlm-nsp",
        tokenizer=Tokenizer("letters", "0" * 64, V, SPECIAL),
        sources=[Source("a", "0" * 64, 1)],
        unigrams=np.zeros(V, np.int64),
        seed=0,
    )
    batch = next(TokenShards(tmp_path).batches(2))
    assert not batch["token_type_ids"].any()


def test_pairs_need_a_separator(tmp_path):
    special = {"pad": 0, "mask": 4}
    with pytest.raises(
        ShardError, match=r"'letters' records no \"sep\" token.*prepare the shards"
    ):
        TokenShards(write(tmp_path / "shards", (3,), "mlm-nsp", special))


@pytest.mark.parametrize("criterion", ["loss", "entropy"])
def test_pairs_train_bert_for_pretraining_through_sifting(make, criterion):
    """Rows, segments and labels stay together, and what is kept is what scored highest."""
    folder = make((40, 40, 3), "mlm-nsp")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=T,
    )
    model = transformers.BertForPreTraining(config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    files = ShardSet.open(folder)
    tokens = np.concatenate([files.read(shard) for shard in files.shards("train")])
    candidates: list[int] = []
    loader = SiftingDataLoader(
        TokenShards(folder, with_ids=True, masking=0.3),
        batch_size=4,
        model=model,
        criterion=criterion,
        warmup_steps=0,
        on_select=lambda ids, scores, kept: candidates.extend(ids[kept].tolist()),
    )
    before, handed = model.bert.pooler.dense.weight.clone(), []
    for batch in loader:
        ids = batch.pop("id")
        handed += ids.tolist()
        whole = tokens[ids]
        assert batch["next_sentence_label"].tolist() == label_of(whole).tolist()
        labelled = (batch["labels"] != -100).numpy()
        assert (batch["labels"].numpy()[labelled] == whole[labelled]).all()
        assert (batch["input_ids"].numpy()[~labelled] == whole[~labelled]).all()
        loss = model(**batch).loss
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(handed) == len(loader) * 4 == 40
    assert handed == candidates
    assert not torch.equal(before, model.bert.pooler.dense.weight), "the pairs were trained on"


def bert(vocab_size: int, **config: Any) -> transformers.PreTrainedModel:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=vocab_size,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=T,
            **config,
        )
    )


class Plain(torch.nn.Module):
    """Not of Hugging Face: its config alone tells how many ids it knows."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)


MODELS = {
    "model": bert,
    "config": lambda vocab_size: bert(vocab_size).config,
    "data parallel": lambda vocab_size: torch.nn.DataParallel(bert(vocab_size)),
    "compiled": lambda vocab_size: torch.compile(bert(vocab_size), backend="eager"),
    "not of Hugging Face": Plain,
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_with_fewer_embeddings_than_ids_is_refused(make, kind):
    shards = TokenShards(make())
    with pytest.raises(ValueError, match=rf"'letters' of .* has {V} token ids.* only {V - 1}:"):
        shards.check_model(MODELS[kind](V - 1))
    for enough in (V, 128):
        shards.check_model(MODELS[kind](enough))
    shards.check_model(torch.nn.Linear(2, 2))  # says nothing about itself


def test_special_ids_of_another_tokenizer_are_warned_of(make):
    shards = TokenShards(make())
    with pytest.warns(
        UserWarning, match=r"pad_token_id 7, in the shards \(tok.*'letters'\) it is 0"
    ):
        shards.check_model(bert(V, pad_token_id=7))
    with pytest.warns(UserWarning, match=r"mask_token_id 5,.* it is 4; build"):
        config = bert(V).config
        config.mask_token_id = 5
        shards.check_model(config)
    config.mask_token_id = V + 1  # nobody set what the model cannot embed
    config.sep_token_id = SPECIAL["sep"]
    shards.check_model(config)


def test_ids_and_sources_come_on_request_and_are_those_of_the_manifest(make):
    folder = make()
    files = ShardSet.open(folder)
    tokens = np.concatenate([files.read(shard) for shard in files.manifest])
    sources = np.concatenate([files.read_sources(shard) for shard in files.manifest])
    for split in ("train", "val"):
        for sample in opened(folder, split=split, masking=None):
            assert sample["id"].shape == sample["source"].shape == ()
            assert sample["input_ids"].tolist() == tokens[sample["id"]].tolist()
            assert sample["source"] == sources[sample["id"]]
    assert set(next(iter(TokenShards(folder)))) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "beef"}, "fingerprint 'beef' found.*expected.*open the data set"),
        ({"seed": 5}, r"seed 5 found, 0 expected; construct TokenShards\(..., seed=5\)"),
        ({"split": "val"}, "split 'val' found, 'train' expected; load it into"),
        ({"window": 3}, r"window 3 found, 2 expected; construct .*window=3"),
        ({"lanes": 4}, r"lanes 4 found, 1 expected; construct .*lanes=4"),
        ({"weights": [1.0]}, r"weights \[1.0\] found, None expected; mix the sets with"),
        (
            {"samples": 9},
            r"samples 9 found, 21 expected; construct .*epoch_samples=9.*override=.*not at all",
        ),
        ({"version": 3}, "version 3.*up to 2; upgrade"),
        ({"position": 22}, "position 22 found, a whole number from 0 to 21 expected"),
        ({"position": -1}, "position -1 found"),
        ({"epoch": 0.5}, "epoch 0.5 found"),
    ],
    ids=[
        "data",
        "seed",
        "split",
        "window",
        "lanes",
        "weights",
        "samples",
        "newer",
        "beyond",
        "negative",
        "fraction",
    ],
)
def test_states_of_another_order_are_refused(make, change, message):
    shards = opened(make())
    before = shards.state_dict()
    with pytest.raises(StateError, match=message):
        shards.load_state_dict(before | change)
    assert shards.state_dict() == before


def test_a_state_that_lacks_a_field_is_refused(make):
    shards = opened(make())
    state = shards.state_dict()
    del state["position"], state["seed"]
    with pytest.raises(StateError, match=r"lacks \['position', 'seed'\]; it needs \['version'"):
        shards.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": "test"}, ShardError, r"no shards of split 'test', only of \['train', 'val'\]"),
        ({"masking": "mlm"}, ValueError, 'masking must be "auto", None, a probability or an Mlm'),
        ({"masking": 1.5}, ValueError, "between 0 and 1, got 1.5"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"world": World(0, 22)}, EmptyEpoch, "21 samples.* 22 ranks are 21 // 22 = 0 each"),
    ],
    ids=["split", "masking", "probability", "window", "ranks"],
)
def test_wrong_arguments_are_refused(make, options, error, message):
    with pytest.raises(error, match=message):
        TokenShards(make(), **options)


def test_what_is_no_shard_folder_is_refused(make, tmp_path):
    with pytest.raises(ShardError, match="so not a finished shard folder"):
        TokenShards(make() / "manifest.jsonl")
    with pytest.raises(ShardError, match=r"no manifest\.jsonl"):
        TokenShards(tmp_path)
    with pytest.raises(ValueError, match="needs a mask token"):
        TokenShards(make((11,), "mlm", {"pad": 0}))
    assert len(TokenShards(make((11,), "mlm", {"pad": 0}), masking=None)) == 11


def test_wrong_reads_are_refused_before_the_first_batch(make):
    shards = opened(make())
    for wrong in (lambda: shards.batches(0), lambda: shards.read_batches(0, 0)):
        with pytest.raises(ValueError, match="n must be at least 1 row, got 0"):
            wrong()
    with pytest.raises(ValueError, match=r"position must lie in 0\.\.21, got 22"):
        shards.read_batches(1, 0, 22)
    for n in (2.5, "4", True):
        with pytest.raises(ValueError, match=f"n must be a whole number, got {n!r}"):
            shards.batches(n)
    with pytest.raises(ValueError, match=r"epoch must be a whole number, got 1\.5"):
        shards.set_epoch(1.5)
    few = [rows(batch) for batch in shards.read_batches(np.uint8(4), 0)]
    assert few == [rows(batch) for batch in shards.read_batches(4, 0)]
    for wrong in (lambda: shards.read_batches(1, -1), lambda: shards.set_epoch(-1)):
        with pytest.raises(ValueError, match="epoch must be 0 or more, got -1"):
            wrong()


@pytest.mark.parametrize("damage", ["cut", "longer", "missing"])
def test_a_damaged_folder_is_named(make, tmp_path, damage):
    folder = tmp_path / "shards"
    shutil.copytree(make(), folder)
    path = folder / "train-000002.tar"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1024] if damage == "cut" else content + bytes(512))
    with pytest.raises(ShardError, match="train-000002"):
        list(opened(folder, verify=False))  # the size is compared even so


def test_every_iteration_begins_the_next_epoch(make):
    shards = opened(make())
    expected = [epoch_of(make(), epoch) for epoch in range(7)]
    assert len({tuple(ids_of(one)) for one in expected}) == 7
    assert [row(sample) for sample in shards] == expected[0]
    for _ in shards.batches(4):
        break  # half-way out of epoch 1
    assert (shards.state_dict()["epoch"], shards.state_dict()["position"]) == (1, 4)
    iter(shards)  # never drawn from: begins nothing
    assert [row(sample) for sample in shards] == expected[2]
    shards.set_epoch(6)
    assert [row(sample) for sample in shards] == expected[6]
    shards.set_epoch(1)
    next(iter(shards))
    shards.set_epoch(1)  # again, from its start
    assert [row(sample) for sample in shards] == expected[1]


def test_a_late_epoch_resumes_and_announcing_it_does_no_harm(make):
    first = opened(make())
    first.set_epoch(3)
    for _ in islice(first.batches(4), 2):
        pass
    for announce in (False, True):
        second = opened(make())
        second.load_state_dict(first.state_dict())
        if announce:
            second.set_epoch(3)
        assert [row(sample) for sample in second] == epoch_of(make(), 3)[8:]
        assert [row(sample) for sample in second] == epoch_of(make(), 4)
    second.load_state_dict(first.state_dict())
    second.set_epoch(5)  # another epoch than the state's: from its start
    assert [row(sample) for sample in second] == epoch_of(make(), 5)


def test_the_state_counts_what_was_handed_out_when_the_loop_saves(make):
    shards = opened(make(), world=World(1, 2))
    positions = [shards.state_dict()["position"] for _ in shards.batches(3)]
    assert positions == [6, 12, 18, 20]
    assert (shards.state_dict()["epoch"], shards.state_dict()["position"]) == (1, 0)


def test_a_state_of_the_very_end_has_an_empty_rest_and_then_the_next_epoch(make):
    """A loop that counts epochs itself must not train one of them twice."""
    first = opened(make())
    for _ in islice(first, len(first)):
        pass
    second = opened(make())
    second.load_state_dict(first.state_dict())
    assert list(second) == []
    assert [row(sample) for sample in second] == epoch_of(make(), 1)


def test_a_state_is_plain_json_whatever_the_numbers_were_given_as(make):
    shards = opened(make(), seed=np.int64(2))
    shards.set_epoch(np.int64(3))
    next(shards.batches(4))
    assert json.loads(json.dumps(shards.state_dict())) == {
        "version": 2,
        "fingerprint": shards.fingerprint,
        "split": "train",
        "seed": 2,
        "window": 2,
        "lanes": 1,
        "weights": None,
        "samples": 21,
        "epoch": 3,
        "position": 4,
    }


def test_a_stale_iterator_moves_nothing(make):
    shards = opened(make())
    stale = shards.batches(2)
    next(stale)
    fresh = shards.batches(3)
    next(fresh)
    next(stale)
    assert (shards.state_dict()["epoch"], shards.state_dict()["position"]) == (1, 3)


def test_validation_is_the_manifest_in_order_with_the_same_masks_always(make):
    shards = opened(make(), split="val")
    first = [row(sample) for sample in shards]
    assert ids_of(first) == list(range(21, 28))
    assert [row(sample) for sample in shards] == first
    shards.set_epoch(9)
    assert [row(sample) for sample in shards] == first
    assert [len(batch["id"]) for batch in shards.batches(3)] == [3, 3, 1]
    assert [len(opened(make(), split="val", world=World(r, 3))) for r in range(3)] == [3, 2, 2]


def test_masks_change_with_epoch_and_seed_only(make):
    def masks(**options: Any) -> dict[int, tuple[int, ...]]:
        epoch = options.pop("epoch", 0)
        return {dict(one)["id"]: dict(one)["labels"] for one in epoch_of(make(), epoch, **options)}

    assert masks() == masks(window=1)  # another order, the same masks
    assert masks() != masks(epoch=1)
    assert masks() != masks(seed=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_dataloader_reads_an_epoch_whatever_its_workers(make, workers):
    shards = opened(make((40, 40, 3)))
    loader = DataLoader(shards, batch_size=8, num_workers=workers)
    for epoch in (0, 1):
        shards.set_epoch(epoch)
        found = [one for batch in loader for one in rows(batch)]
        straight = epoch_of(make((40, 40, 3)), epoch)
        assert sorted(found) == sorted(straight)
        if not workers:
            assert found == straight


@pytest.mark.parametrize(
    ("workers", "cut"),
    [
        *((0, cut) for cut in (1, 5, 10, 11)),
        *(pytest.param(2, cut, marks=pytest.mark.slow) for cut in (1, 11)),
        *((2, cut) for cut in (5, 10)),
    ],
)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_stateful_dataloader_resumes_exactly(make, workers, cut):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return torchdata.StatefulDataLoader(
            opened(make((40, 40, 3))), batch_size=8, num_workers=workers
        )

    straight = [rows(batch) for batch in loader()]
    first, second = loader(), loader()
    for _ in islice(first, cut):
        pass
    second.load_state_dict(first.state_dict())
    assert [rows(batch) for batch in second] == straight[cut:]


def test_ranks_are_found_when_reading_begins(make, monkeypatch):
    shards = opened(make())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(shards) == 10
    assert [row(sample) for sample in shards] == epoch_of(make(), 0)[1:20:2]
    monkeypatch.setenv("WORLD_SIZE", "22")
    with pytest.raises(EmptyEpoch, match=r"21 // 22 = 0"):
        next(iter(shards))


def test_reading_ahead_in_a_thread_touches_nothing(make):
    shards = opened(make((40, 40, 3)))
    ahead: list[Row] = []

    def read() -> None:
        for batch in shards.read_batches(3, 5, 10):
            ahead.extend(rows(batch))

    thread = threading.Thread(target=read)
    thread.start()
    found = [row(sample) for sample in shards]
    thread.join()
    assert found == epoch_of(make((40, 40, 3)), 0)
    assert ahead == epoch_of(make((40, 40, 3)), 5)[10:]
    assert (shards.state_dict()["epoch"], shards.state_dict()["position"]) == (1, 0)


def test_a_copy_in_another_process_continues_where_this_one_stands(make):
    shards = opened(make((40, 40, 3)))
    stream = iter(shards)
    for _ in range(30):
        next(stream)
    pickled = pickle.dumps(shards)
    assert len(pickled) < 10_000  # no maps, no rows
    copy = pickle.loads(pickled)
    assert copy.state_dict() == shards.state_dict()
    copy.load_state_dict(shards.state_dict())
    assert [row(sample) for sample in copy] == epoch_of(make((40, 40, 3)), 0)[30:]


def test_rows_own_their_storage(make):
    """A view would keep, and pickle, the whole batch it was cut from."""
    sample = next(iter(opened(make((40, 40, 3)))))
    assert all(v.untyped_storage().nbytes() == v.numel() * 8 for v in sample.values())
    batch = next(opened(make((40, 40, 3))).batches(2))
    assert all(v.untyped_storage().nbytes() == v.numel() * 8 for v in batch.values())


def test_a_shard_is_verified_once_and_again_when_touched(make, tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    shutil.copytree(make(), folder)
    verified: list[str] = []
    open_shard = ShardSet.open_shard

    def spy(self, shard, verify=True):
        verified.extend([shard.shard] * verify)
        return open_shard(self, shard, verify)

    monkeypatch.setattr(ShardSet, "open_shard", spy)
    shards = TokenShards(folder)
    for _ in range(3):
        list(shards)
    assert sorted(verified) == [f"train-{i:06d}" for i in range(4)]
    flip(folder / "train-000002.tar", 700)
    with pytest.raises(CorruptShard, match="train-000002"):
        list(shards)
    assert len(list(TokenShards(folder, verify=False))) == 21  # trusted, as asked


def test_few_shards_are_open_at_once(make, tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("counts the mapped files in /proc/self/maps; run on Linux")
    folder = tmp_path / "shards"
    write(folder, (2,) * 12, "mlm", SPECIAL)

    def mapped() -> int:
        files = {line.split()[-1] for line in maps.read_text().splitlines()}
        return sum(file.startswith(str(folder)) for file in files)

    stream = TokenShards(folder, window=2).batches(1)
    assert max(mapped() for _ in stream) <= 3
    deadline = time.monotonic() + 60
    while mapped() and time.monotonic() < deadline:  # by a thread that verified one just now
        time.sleep(0.01)
    assert mapped() == 0


def test_the_data_set_is_described(make):
    shards = TokenShards(make(), seed=3)
    assert (shards.seed, shards.split, shards.vocab_size) == (3, "train", V)
    assert shards.fingerprint == ShardSet.open(make()).fingerprint
    assert shards.unigrams.tolist() == list(range(V))
