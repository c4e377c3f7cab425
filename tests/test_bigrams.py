"""Counts of pairs, and the surprise they give: pytest tests/test_bigrams.py"""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from siftloader import (
    Loss,
    Pool,
    Predictions,
    Rarity,
    Residual,
    ScoringError,
    Sifter,
    Stride,
    TokenShards,
)
from siftloader.bigrams import (
    BIGRAMS,
    DISCOUNT,
    PAIR,
    SEAL,
    Bigrams,
    _spans,
    count_bigrams,
    read_bigrams,
    write_bigrams,
)
from siftloader.cli import main
from siftloader.errors import CorruptShard, ShardError
from siftloader.shards import Layout, ShardSet, Source, Tokenizer, write_dataset, write_shard
from siftloader.targets import Targets


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"
T, V = 12, 23
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "eos": 3}
UNPADDED = {name: number for name, number in SPECIAL.items() if name != "pad"}  # 0 is a word
FRAME = {"mlm": {0, 2, 3, 4}, "mlm-nsp": {0, 2, 3, 4}, "clm": {0, 2, 4}}  # never part of a pair
NOTHING = -1


def write(folder: Path, objective: str = "mlm", seed: int = 0, special=SPECIAL) -> Path:
    """Shards of skewed ids, specials among them, and a held-out one of others."""
    rng = np.random.default_rng(seed)
    layout = Layout.for_vocabulary(T, V, labels=objective == "mlm-nsp")
    folder.mkdir()
    written, train = [], []
    for stem, n in [
        *((f"train-{i:06d}", n) for i, n in enumerate((9, 31, 2, 17))),
        ("val-000000", 3),
    ]:
        ids = np.minimum(rng.geometric(0.15, (n, T)) - 1, V - 1)
        labels = np.zeros(n, int) if layout.labels else None
        written.append(write_shard(folder, stem, ids, np.zeros(n, np.uint8), layout, labels))
        train += [ids] if stem.startswith("train") else []
    write_dataset(
        folder,
        written,
        layout=layout,
        objective=objective,
        tokenizer=Tokenizer("letters", "0" * 64, V, special),
        sources=[Source("letters", "0" * 64, 1)],
        unigrams=np.bincount(np.concatenate(train).reshape(-1), minlength=V),
        seed=0,
    )
    return folder


def by_hand(dataset: ShardSet) -> Counter:
    frame, found = FRAME[dataset.objective] & {*dataset.tokenizer.special_ids.values()}, Counter()
    for shard in dataset.shards("train"):
        for row in dataset.read(shard).tolist():
            found.update(pair for pair in pairwise(row) if not frame & {*pair})
    return found


def as_dict(pairs) -> dict:
    return {(left, right): count for left, right, count in pairs.tolist()}


# --- counting


@pytest.mark.parametrize("objective", FRAME)
def test_pairs_are_those_within_samples_without_the_frame(tmp_path, objective):
    dataset = ShardSet.open(write(tmp_path / "s", objective))
    pairs = count_bigrams(dataset)
    assert as_dict(pairs) == by_hand(dataset)
    assert pairs["prev"].max() < V and (pairs["count"] > 0).all()
    key = pairs["prev"].astype(int) * V + pairs["next"]
    assert (np.diff(key) > 0).all()


@pytest.mark.parametrize("limit", [1, 40, 10**6])
def test_counts_know_nothing_of_chunks_and_room(tmp_path, limit):
    dataset = ShardSet.open(write(tmp_path / "s"))
    expected = count_bigrams(dataset, limit)
    for chunk, room in ((1, 10**9), (3 * T, 10**9), (5 * T, 40), (10**9, 1)):
        found = count_bigrams(dataset, limit, chunk=chunk, room=room)
        assert found.tobytes() == expected.tobytes(), (chunk, room)


@pytest.mark.parametrize("limit", [0, 1, 20, 60])
def test_the_most_frequent_stay_and_the_others_are_summed_up(tmp_path, limit):
    dataset = ShardSet.open(write(tmp_path / "s"))
    counts = by_hand(dataset)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept = dict(ranked[:limit])
    if limit in (20, 60):
        assert ranked[limit - 1][1] == ranked[limit][1], "a tie, so that its order is seen"
    for (left, right), count in ranked[limit:]:
        for margin in ((left, V), (V, right)):
            kept[margin] = kept.get(margin, 0) + count
    assert as_dict(count_bigrams(dataset, limit)) == kept


def shards_of(folder: Path, size: int, *train: np.ndarray) -> ShardSet:
    """Shards of these ids, of a vocabulary of ``size``."""
    folder.mkdir()
    layout = Layout.for_vocabulary(train[0].shape[1], size)
    written = [
        write_shard(folder, f"train-{i:06d}", ids, np.zeros(len(ids), np.uint8), layout)
        for i, ids in enumerate(train)
    ]
    write_dataset(
        folder,
        written,
        layout=layout,
        objective="clm",
        tokenizer=Tokenizer("numbers", "0" * 64, size, {"unk": 1}),
        sources=[Source("numbers", "0" * 64, 1)],
        unigrams=np.bincount(np.concatenate(train).reshape(-1), minlength=size),
        seed=0,
    )
    return ShardSet.open(folder)


@pytest.mark.parametrize("size", [2, 65_535, 65_536, 65_537, 300_000])
def test_keys_do_not_overflow_whatever_the_vocabulary(tmp_path, size):
    """The highest ids, where 16 and 32 bits end, counted in one span and in many."""
    ids = np.maximum(size - np.random.default_rng(0).integers(1, 9, (20, T)), 0)
    dataset = shards_of(tmp_path / "s", size, ids)
    expected = by_hand(dataset)
    assert max(expected) == (size - 1, size - 1)
    assert as_dict(count_bigrams(dataset)) == expected
    assert as_dict(count_bigrams(dataset, room=3)) == expected
    bigrams = Bigrams(count_bigrams(dataset), dataset.unigrams, masked=False)
    chances = np.exp(-bigrams.surprise(np.arange(size)[None], np.array([[size - 1], [0], [-1]])))
    assert chances.sum(1) == pytest.approx(1)


@pytest.mark.parametrize("rows", [(0,), (0, 5, 0), (1,)])
def test_shards_of_nothing_or_one_sample_are_counted(tmp_path, rows):
    rng = np.random.default_rng(0)
    dataset = shards_of(tmp_path / "s", V, *(rng.integers(0, V, (n, T)) for n in rows))
    assert as_dict(count_bigrams(dataset)) == by_hand(dataset)
    assert write_bigrams(dataset.folder) and read_bigrams(dataset).surprise([1], [2])[0] > 0


def test_memory_is_bounded_by_room_and_chunk(tmp_path):
    size, room, chunk = 400, 1 << 15, 1 << 12
    ids = np.random.default_rng(0).integers(0, size, (2000, 129))  # most pairs there can be
    dataset = shards_of(tmp_path / "s", size, ids)
    tracemalloc.start()
    try:
        count_bigrams(dataset, 100, chunk=chunk, room=room)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(_spans(dataset.unigrams, room)) > 4
    assert peak < 4 * PAIR.itemsize * room + 64 * chunk, f"{peak / PAIR.itemsize / room:.1f} rooms"


def test_progress_is_told_to_the_end(tmp_path):
    dataset, told = ShardSet.open(write(tmp_path / "s")), []
    count_bigrams(dataset, chunk=T, room=40, tell=lambda *progress: told.append(progress))
    done, total = zip(*told, strict=True)
    assert len({*total}) == 1 and list(done) == sorted(done) and done[-1] == total[0]
    assert total[0] % (59 * T) == 0 and total[0] > 59 * T, "several passes over 59 samples"


# --- the distribution


def chance(counts: Counter, unigrams, word: int, context: int, side: int, kept: set) -> float:
    """P(word | the neighbour ``context`` on ``side``), absolute discounting, from dictionaries."""
    base = (int(unigrams[word]) + 1) / sum(int(n) + 1 for n in unigrams)
    with_context = {pair: n for pair, n in counts.items() if pair[side] == context}
    total = sum(with_context.values())
    if not total:
        return base
    listed = {pair: n - DISCOUNT for pair, n in with_context.items() if pair in kept}
    pair = (context, word) if side == 0 else (word, context)
    rest = 1 - sum(listed.values()) / total
    return listed.get(pair, 0.0) / total + rest * base


@pytest.mark.parametrize("limit", [0, 30, 10**6])
def test_the_surprise_is_the_formula_and_the_chances_sum_to_one(tmp_path, limit):
    dataset = ShardSet.open(write(tmp_path / "s", "clm"))
    bigrams = Bigrams(count_bigrams(dataset, limit), dataset.unigrams, masked=False)
    counts = by_hand(dataset)
    kept = {pair for pair in as_dict(bigrams.pairs) if V not in pair}
    words = np.arange(V)
    for context in range(NOTHING, V):
        found = np.exp(-bigrams.surprise(words, np.full(V, context)))
        assert abs(math.fsum(found) - 1) < 1e-12
        expected = [chance(counts, dataset.unigrams, w, context, 0, kept) for w in range(V)]
        assert np.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("special", [SPECIAL, UNPADDED], ids=["padded", "unpadded"])
@pytest.mark.parametrize("limit", [0, 30, 10**6])
def test_both_neighbours_are_mixed_by_how_much_they_tell(tmp_path, limit, special):
    dataset = ShardSet.open(write(tmp_path / "s", "mlm", special=special))
    bigrams = Bigrams(count_bigrams(dataset, limit), dataset.unigrams, masked=True)
    counts = by_hand(dataset)
    kept = {pair for pair in as_dict(bigrams.pairs) if V not in pair}
    words = np.arange(V)

    def given(context: int, side: int) -> np.ndarray:
        return np.array([chance(counts, dataset.unigrams, w, context, side, kept) for w in words])

    def weight(p: np.ndarray) -> float:
        return math.exp((p * np.log(p)).sum())  # one over the perplexity

    sides = {(c, side): given(c, side) for c in range(NOTHING, V) for side in (0, 1)}
    for left in range(NOTHING, V):
        for right in range(NOTHING, V):
            found = np.exp(-bigrams.surprise(words, np.full(V, left), np.full(V, right)))
            assert abs(math.fsum(found) - 1) < 1e-12
            before, after = sides[left, 0], sides[right, 1]
            a, b = weight(before), weight(after)
            assert np.allclose(found, (a * before + b * after) / (a + b), rtol=1e-9)


def test_neighbours_predict_held_out_tokens_better_than_counts_do():
    dataset = ShardSet.open(DEMO)
    bigrams = Bigrams(count_bigrams(dataset), dataset.unigrams, masked=True)
    rows = np.concatenate([dataset.read(shard) for shard in dataset.shards("val")]).astype(int)
    inner = ~np.isin(rows, [0, 2, 3, 4])
    inner[:, [0, -1]] = False
    row, at = np.nonzero(inner)
    words, left, right = rows[row, at], rows[row, at - 1], rows[row, at + 1]
    alone = bigrams.surprise(words, np.full(len(words), NOTHING)).mean()
    smooth = dataset.unigrams + 1.0
    assert abs(alone - np.log(smooth.sum() / smooth[words]).mean()) < 1e-12
    one, both = bigrams.surprise(words, left).mean(), bigrams.surprise(words, left, right).mean()
    assert alone > one + 0.8 > both + 1.2, f"{alone:.3f} {one:.3f} {both:.3f} nats"


@pytest.mark.parametrize(
    ("pairs", "unigrams", "text"),
    [
        ([(1, 2, 3)], [[1, 2]], r"counts \[V\]"),
        ([(1, 2, 3)], [4, -1, 5], "non-negative"),
        ([(1, 9, 3)], [4, 1, 5], r"0\.\.3"),
        ([(2, 1, 3), (1, 2, 3)], [4, 1, 5], "rising"),
        ([(1, 2, 0)], [4, 1, 5], "at least 1"),
    ],
)
def test_counts_that_are_none_are_refused(pairs, unigrams, text):
    with pytest.raises(ValueError, match=text):
        Bigrams(np.array(pairs, PAIR), np.array(unigrams), masked=False)


# --- beside the shards


def test_what_was_written_is_read_and_left_alone(tmp_path):
    folder = write(tmp_path / "s")
    assert write_bigrams(folder)
    files = {name: (folder / name).read_bytes() for name in (BIGRAMS, SEAL)}
    dataset = ShardSet.open(folder)
    found = read_bigrams(dataset)
    assert np.array_equal(found.pairs, count_bigrams(dataset)) and found.masked
    assert np.array_equal(TokenShards(folder).bigrams.pairs, found.pairs)
    assert not write_bigrams(folder), "it is there"
    assert write_bigrams(folder, limit=5) and len(read_bigrams(dataset).pairs) > 5
    assert write_bigrams(folder)
    assert files == {name: (folder / name).read_bytes() for name in (BIGRAMS, SEAL)}
    assert not list(folder.glob("*.part"))
    array = np.load(folder / BIGRAMS, allow_pickle=False)
    assert array.dtype.names == ("prev", "next", "count")


def test_those_that_were_not_made_are_missed_with_the_command_that_makes_them(tmp_path):
    folder = write(tmp_path / "s")
    with pytest.raises(ShardError, match=rf"no bigrams\.json.*siftloader bigrams {folder}"):
        _ = TokenShards(folder).bigrams


@pytest.mark.parametrize("what", ["stale", "damaged", "gone", "half", "no json", "newer"])
def test_those_of_other_shards_and_damaged_ones_are_refused_and_made_again(tmp_path, what):
    folder = write(tmp_path / "s")
    write_bigrams(folder)
    good = (folder / BIGRAMS).read_bytes()
    text, kind = "", ShardError
    if what == "stale":
        other = write(tmp_path / "other", seed=1)
        write_bigrams(other)
        for name in (BIGRAMS, SEAL):
            shutil.copy(other / name, folder / name)
        text = "of other shards"
    elif what == "damaged":
        (folder / BIGRAMS).write_bytes(good[:-3] + b"\1" + good[-2:])
        text, kind = "sha256", CorruptShard
    elif what == "gone":
        (folder / BIGRAMS).unlink()
        text = "cannot be read"
    elif what == "half":  # killed between the two files, of which the seal is the last
        (folder / SEAL).unlink()
        text = "no bigrams.json"
    elif what == "no json":
        (folder / SEAL).write_text("[1")
        text = "not a description"
    else:
        seal = json.loads((folder / SEAL).read_text())
        (folder / SEAL).write_text(json.dumps(seal | {"version": 99}))
        text = "99"
    with pytest.raises(kind, match=text) as caught:
        read_bigrams(ShardSet.open(folder))
    assert f"siftloader bigrams {folder}" in str(caught.value)
    assert write_bigrams(folder)
    assert (folder / BIGRAMS).read_bytes() == good


# --- scores


class Guess(nn.Module):
    """Logits from a table; like BERT, or like a causal model that shifts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Embedding(V, V)

    def forward(self, input_ids):
        return self.logits(input_ids)


def scored(criterion, batch, causal: bool, **options) -> torch.Tensor:
    shift = {"shift_labels": causal}
    sifter = Sifter(Guess(), criterion=criterion, exit_layer="full", **shift, **options)
    return sifter.score(batch).double()


def examples(objective: str) -> tuple[dict, np.ndarray]:
    """A batch, and the ids before anything was masked."""
    rng = np.random.default_rng(3)
    ids = torch.tensor(rng.integers(5, V, (8, T)))
    ids[:, 7], ids[2, 9:] = SPECIAL["sep"], SPECIAL["pad"]
    original = ids.numpy().copy()
    if objective == "clm":
        return {"input_ids": ids, "labels": ids.clone()}, original
    labels = torch.full_like(ids, -100)
    chosen = torch.tensor(rng.random((8, T)) < 0.5) & (ids > 4)
    chosen[:, :2] = chosen[0, -1] = True  # neighbours, and the ends of a sample
    chosen[5] = False
    labels[chosen] = ids[chosen]
    ids[chosen] = torch.where(torch.rand(ids.shape) < 0.9, SPECIAL["mask"], 6)[chosen]
    return {"input_ids": ids, "labels": labels}, original


@pytest.mark.parametrize("limit", [25, 10**6])
@pytest.mark.parametrize("special", [SPECIAL, UNPADDED], ids=["padded", "unpadded"])
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_rarity_and_residual_take_the_surprise_given_the_neighbours(
    tmp_path, objective, special, limit
):
    folder, causal = write(tmp_path / "s", objective, special=special), objective == "clm"
    write_bigrams(folder, limit)
    bigrams = TokenShards(folder).bigrams
    batch, original = examples(objective)
    expected = []
    for row, labels in zip(original, batch["labels"].numpy(), strict=True):
        found = []
        for t in range(T):
            word = labels[t]
            if word == -100 or (causal and t == 0):
                continue
            left = row[t - 1] if t else NOTHING
            right = None if causal else np.array([row[t + 1] if t + 1 < T else NOTHING])
            found.append(bigrams.surprise(np.array([word]), np.array([left]), right)[0])
        expected.append(np.mean(found) if found else -np.inf)
    expected = torch.tensor(expected)
    rarity = scored(Rarity(bigrams), batch, causal)
    assert torch.allclose(rarity, expected, atol=1e-5)
    loss, residual = (scored(each, batch, causal) for each in (Loss(), Residual(bigrams)))
    some = expected.isfinite()
    assert torch.allclose(residual[some], (loss - expected)[some], atol=1e-5)
    assert (residual[~some] == -torch.inf).all() and (~some).sum() == (not causal)
    total = scored(Residual(bigrams, reduction="sum"), batch, causal)
    assert (total[some] - residual[some]).abs().min() > 1e-3
    part = scored(Loss() - Rarity(bigrams), batch, causal)
    assert torch.allclose(part[some], residual[some], atol=1e-5)


def test_shifted_beforehand_is_as_good(tmp_path):
    write_bigrams(folder := write(tmp_path / "s", "clm"))
    bigrams = TokenShards(folder).bigrams
    ids = examples("clm")[0]["input_ids"]
    shifted = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    plain = scored(Rarity(bigrams), {"input_ids": ids, "labels": ids.clone()}, True)
    assert torch.equal(scored(Rarity(bigrams), shifted, False), plain)
    pairs = scored(Rarity(bigrams), (shifted["input_ids"], shifted["labels"]), False)
    assert torch.equal(pairs, plain)


def test_some_positions_are_scored_by_their_own_neighbours(tmp_path):
    write_bigrams(folder := write(tmp_path / "s", "clm"))
    bigrams = TokenShards(folder).bigrams
    batch, original = examples("clm")
    found = scored(Rarity(bigrams), batch, True, positions=Stride(4))
    at = np.arange(0, T - 1, 4)
    expected = bigrams.surprise(original[:, at + 1].ravel(), original[:, at].ravel())
    assert np.allclose(found, expected.reshape(8, -1).mean(1), atol=1e-5)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_on_a_device_nothing_waits(tmp_path, objective):
    write_bigrams(folder := write(tmp_path / "s", objective))
    rarity, batch = Rarity(TokenShards(folder).bigrams), examples(objective)[0]
    # There are no values on this one: whoever asks for a number, or for how many there are, fails.
    meta = torch.device("meta")
    far = {name: value.to(meta) for name, value in batch.items()}
    targets = Targets.of(far["labels"], meta, shift=objective == "clm", dense=True)
    scores = rarity(Predictions(targets, lambda *_: iter(()), Pool(far)))
    assert scores.device == meta and scores.shape == (8,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_a_gpu_finds_the_same(tmp_path, objective):
    write_bigrams(folder := write(tmp_path / "s", objective))
    residual, batch = Residual(TokenShards(folder).bigrams), examples(objective)[0]
    options = {"exit_layer": "full", "shift_labels": objective == "clm"}
    there = {name: value.cuda() for name, value in batch.items()}
    sifter = Sifter(Guess().cuda(), criterion=residual, **options)
    found = sifter.score(there)
    expected = Sifter(Guess(), criterion=residual, **options).score(batch)
    assert torch.allclose(found.cpu(), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [Rarity, Residual])
def test_what_has_no_neighbours_is_told(tmp_path, kind):
    write_bigrams(folder := write(tmp_path / "s", "clm"))
    clm = kind(TokenShards(folder).bigrams)
    batch = examples("clm")[0]
    with pytest.raises(ScoringError, match="found label 42"):
        scored(clm, batch | {"labels": batch["labels"] + 20}, False)
    with pytest.raises(ScoringError, match=r"running text.*label.*masked"):
        scored(clm, examples("mlm")[0], False)
    write_bigrams(other := write(tmp_path / "t", "mlm"))
    with pytest.raises(ScoringError, match=r"masked text.*found the next tokens"):
        scored(kind(TokenShards(other).bigrams), batch, True)
    features = {"input": torch.zeros(8, T), "labels": torch.zeros(8, dtype=torch.long)}
    with pytest.raises(ScoringError, match=r"bigrams need input_ids.*found none with 1 pred"):
        Sifter(nn.Linear(T, V), criterion=clm, exit_layer="full").score(features)


def test_a_reference_is_counts_or_bigrams(tmp_path):
    for kind in (Rarity, Residual):
        with pytest.raises(ValueError, match="counts"):
            kind(np.ones((2, 2)))


# --- the command


def test_the_command_makes_them_beside_the_shards(tmp_path, capsys):
    folder = write(tmp_path / "s")
    assert main(["bigrams", str(folder), "--limit", "50"]) == 0
    told = capsys.readouterr().out
    assert "bigrams.npy" in told and "50 of " not in told
    assert (read_bigrams(ShardSet.open(folder)).pairs["next"] < V).sum() >= 50
    assert main(["bigrams", str(folder), "--limit", "50"]) == 0
    assert "left as" in capsys.readouterr().out
    assert main(["verify", str(folder)]) == 0
    assert main(["bigrams", str(tmp_path)]) == 1
    assert "not a finished shard folder" in capsys.readouterr().err
    assert main(["bigrams", str(folder), "--limit", "-1"]) == 2


def test_preparation_makes_them_at_its_end_and_once_more_where_it_did_not(tmp_path, capsys):
    text = tmp_path / "tale.txt"
    text.write_text("\n\n".join(f"Chapter {n}. Call me Ishmael, the {n}th." for n in range(60)))
    names, found = (BIGRAMS, SEAL), []

    def shard(out: str, *more: str) -> int:
        options = ["--tokenizer", str(DEMO / "tokenizer.json"), "--seq-len", "16"]
        return main(["shard", str(text), "--out", str(tmp_path / out), *options, *more])

    assert shard("a", "--bigrams", "--workers", "1") == 0
    assert shard("b", "--workers", "2") == 0  # as if killed when all but the pairs was done
    assert not (tmp_path / "b" / BIGRAMS).exists()
    assert shard("b", "--bigrams", "--workers", "2") == 0
    for out in "ab":
        found.append([(tmp_path / out / name).read_bytes() for name in names])
        assert main(["verify", str(tmp_path / out)]) == 0
    assert found[0] == found[1]
    assert shard("a", "--bigrams", "--workers", "1") == 0
