from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from siftloader import Entropy, Margin, Predicted, Sifter, SiftingDataLoader
from siftloader.padding import by_length, columns, covering, ends_of, shortened, without_mask
from siftloader.targets import Targets


CPU = torch.device("cpu")


def mask(ends: list[int], length: int) -> Tensor:
    return (torch.arange(length) < torch.tensor(ends)[:, None]).long()


def test_where_rows_end_is_read_from_a_mask_of_right_padding() -> None:
    wanted = [3, 5, 0, 1]
    for kind in (torch.long, torch.bool, torch.float32):
        assert ends_of({"attention_mask": mask(wanted, 5).to(kind)}).tolist() == wanted
    assert without_mask({"attention_mask": 1, "x": 2}) == {"x": 2}


def test_nothing_is_read_from_what_says_more_or_is_not_there() -> None:
    left = mask([3, 5], 5).flip(1)
    packed = torch.tensor([[1, 1, 2, 2, 3]])
    for batch in (
        {"attention_mask": left},
        {"attention_mask": packed},
        {"attention_mask": torch.ones(2, 1, 5, 5)},
        {"attention_mask": mask([3, 5], 5).to("meta")},
        {"attention_mask": None},
        {"x": left},
        (left, left),
        left,
    ):
        assert ends_of(batch) is None


def test_a_label_behind_the_end_moves_it() -> None:
    labels = torch.full((3, 6), -100)
    labels[0, 1], labels[1, 4] = 7, 0
    assert covering(torch.tensor([3, 3, 3]), labels).tolist() == [3, 5, 3]


@given(data=st.data(), shift=st.booleans(), dense=st.booleans())
def test_targets_mean_the_same_in_any_order_and_length(
    data: st.DataObject, shift: bool, dense: bool
) -> None:
    samples, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    ends = data.draw(st.lists(st.integers(0, length), min_size=samples, max_size=samples))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ids = torch.randint(1, 90, (samples, length), generator=generator)
    hidden = torch.rand(samples, length, generator=generator) < 0.5
    labels = ids.masked_fill(hidden | (mask(ends, length) == 0), -100)
    batch = {"input_ids": ids, "attention_mask": mask(ends, length), "name": torch.arange(samples)}
    targets = Targets.of(labels, CPU, shift, dense=dense)
    read = ends_of(batch)
    assert read is not None and torch.equal(covering(read, labels), read)
    moved, wanted, sorted_ends, places = by_length(batch, targets, read)
    assert sorted_ends.tolist() == sorted(ends, reverse=True)
    assert sorted(places.tolist()) == list(range(len(targets.positions)))
    parts = data.draw(st.integers(1, samples))
    seen = []
    for first in range(0, samples, parts):
        last = min(first + parts, samples)
        rows = {name: value[first:last] for name, value in moved.items()}
        longest = length if dense else int(sorted_ends[first])
        part, few = shortened(rows, wanted.part(first, last), max(longest, 1))
        assert part["input_ids"].shape[1] == few.length == part["attention_mask"].shape[1]
        assert few.length % 8 == 0 or few.length == length
        assert torch.equal(part["name"], rows["name"])
        # What is read at a target, and whose row that is.
        at = part["input_ids"].reshape(-1)[few.positions]
        row = part["name"][few.positions // few.length]
        seen += zip(row.tolist(), at.tolist(), few.labels.tolist(), strict=True)
        assert few.starts[-1] == len(few.positions)
        assert torch.equal(few.counts, targets.counts[part["name"]])
    before = zip(
        (targets.positions // length).tolist(),
        ids.reshape(-1)[targets.positions].tolist(),
        targets.labels.tolist(),
        strict=True,
    )
    given_back: list[tuple[int, int, int]] = [(0, 0, 0)] * len(places)
    for place, one in zip(places.tolist(), seen, strict=True):
        given_back[place] = one
    assert given_back == list(before)


# In a Sifter


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = hf.BertConfig(vocab_size=97, num_hidden_layers=3, **shape, **options)
    return _loud(hf.BertForMaskedLM(config))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    return _loud(hf.GPT2LMHeadModel(config))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = hf.BertConfig(vocab_size=97, num_hidden_layers=3, num_labels=5, **shape)
    return _loud(hf.BertForSequenceClassification(config))


class Mixing(nn.Module):
    """Predicts at each position from the mean of all of them, padding too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 97)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) * 8
        for layer in self.layers:
            x = layer(x + x.mean(1, keepdim=True)).tanh()
        return self.head(x)


def _loud(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.train()


ENDS = [64, 9, 17, 33, 40, 1, 12, 63]


def padded(ends: list[int] = ENDS, single: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    read = mask(ends, 64)
    ids = torch.randint(1, 97, (len(ends), 64), generator=generator) * read
    hidden = (torch.rand(ids.shape, generator=generator) < 0.7) | (read == 0)
    labels = torch.arange(len(ends)) % 5 if single else ids.masked_fill(hidden, -100)
    return {"input_ids": ids, "attention_mask": read, "labels": labels}


class Positions(TorchDispatchMode):
    """Counts positions that are embedded."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.count += args[1].numel()
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Positions]:
    with Positions() as found:
        yield found


def plainly(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """Scores of somebody who knows of no ends."""
    sifter = Sifter(model, **options)
    return sifter.scorer.score(sifter.pool(batch), sifter.scorer.labels_of(batch)).values


@pytest.mark.parametrize("criterion", ["loss", Entropy(), Margin()])
@pytest.mark.parametrize("build", [bert, gpt2])
def test_scores_do_not_depend_on_whether_padding_is_computed(build: Any, criterion: Any) -> None:
    model, batch = build(), padded()
    sifter = Sifter(model, criterion=criterion)
    expected = plainly(model, batch, criterion=criterion)
    for _ in range(2):
        assert torch.allclose(sifter.score(batch), expected, atol=1e-4)
    assert torch.equal(expected.isfinite(), (batch["labels"] != -100).any(1))


def test_padding_is_not_computed_and_how_much_is_not() -> None:
    model, batch = bert(), padded()
    sifter = Sifter(model, score_batch_size=2)
    sifter.score(batch)
    with counting() as ours:
        sifter.score(batch)
    plain = Sifter(model, score_batch_size=2)
    plain.scorer.score(plain.pool(batch), batch["labels"])
    with counting() as theirs:
        plain.scorer.score(plain.pool(batch), batch["labels"])
    # In order of length, two rows at a time, in multiples of 8: 64, 64, 40, 40, 24, 24, 16, 16.
    assert ours.count * 8 * 64 == theirs.count * 2 * (64 + 40 + 24 + 16)


def test_a_classifier_of_whole_rows_skips_it_too() -> None:
    model, batch = classifier(), padded(single=True)
    expected = plainly(model, batch)
    sifter = Sifter(model, score_batch_size=1)
    assert torch.allclose(sifter.score(batch), expected, atol=1e-4)
    with counting() as ours:
        sifter.score(batch)
    with counting() as theirs:
        plainly(model, batch)
    assert ours.count < 0.7 * theirs.count


def test_a_mask_that_masks_nothing_is_left_out_and_any_other_is_not() -> None:
    seen: list[bool] = []

    class Watched(hf.BertForMaskedLM):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
            seen.append(attention_mask is not None)
            return super().forward(input_ids, attention_mask, **others)

    quiet = bert()
    model = Watched(quiet.config).train()
    model.load_state_dict(quiet.state_dict())
    sifter, whole = Sifter(model), padded([64] * 8)
    expected = plainly(quiet, whole)
    for _ in range(2):
        seen.clear()
        assert torch.allclose(sifter.score(whole), expected, atol=1e-5)
    assert seen and not any(seen)
    # Behind every end stands a label: nothing can be cut off, and the mask does mask.
    ends = [64] * 7 + [20]
    labelled = padded(ends)
    labelled["labels"][7, 63] = 5
    seen.clear()
    assert torch.allclose(sifter.score(labelled), plainly(quiet, labelled), atol=1e-4)
    assert seen and all(seen)


def test_a_model_that_mixes_padding_in_is_told_of_once_and_computed_whole() -> None:
    model, batch = Mixing().train(), padded()
    expected = plainly(model, batch, shift_labels=False)
    sifter = Sifter(model, shift_labels=False)
    with pytest.warns(UserWarning, match="padding at the end of a row is cut off"):
        assert torch.allclose(sifter.score(batch), expected, atol=1e-5)
    assert torch.allclose(sifter.score(batch), expected, atol=1e-5)  # and not told again


def test_a_forward_that_wants_its_mask_keeps_it() -> None:
    model, batch = Mixing().train(), padded([64] * 8)
    sifter = Sifter(model, shift_labels=False)
    assert torch.allclose(
        sifter.score(batch), plainly(model, batch, shift_labels=False), atol=1e-5
    )


def test_a_criterion_that_asks_for_a_part_of_the_pool_gets_it() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 1)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.linear(input_ids.float())

    model, batch = bert(), padded()
    torch.manual_seed(0)
    sifter = Sifter(model, criterion=Predicted(Small(), teach=0.5))
    for _ in range(3):
        sifter(batch)
    assert sifter.stats["candidates"] == 24


@pytest.mark.parametrize("overlap", [False, True])
def test_a_loader_of_padded_rows_keeps_what_it_kept(overlap: bool) -> None:
    """Pools of padded rows and whole ones in turn; weights stand still."""
    pools = [padded(), padded([64] * 8), padded(ENDS[::-1]), padded(), padded([64] * 8)]
    model = bert()
    expected = [plainly(model, pool) for pool in pools]
    found: list[Tensor] = []
    loader = SiftingDataLoader.wrap(
        pools,
        model=model,
        pool="split",
        warmup_steps=0,
        overlap=overlap,
        on_select=lambda ids, scores, kept: found.append(scores),
    )
    for batch in loader:
        model(**batch)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))


# What one look at the first pool must not mislead to


class Nearby(nn.Module):
    """Predicts at each position from those within three of it, padding too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 16)
        self.layers = nn.ModuleList(nn.Conv1d(16, 16, 5, padding=2) for _ in range(3))
        self.head = nn.Linear(16, 97)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids).transpose(1, 2) * 4
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x.transpose(1, 2)) * 4


class Conditioned(nn.Module):
    """Takes 64 numbers of each row, which are no columns though some rows are as long."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.given = nn.Embedding(97, 16), nn.Linear(64, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 97)

    def forward(
        self, input_ids: Tensor, features: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        x = self.embed(input_ids) + self.given(features)[:, None]
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def test_a_tail_that_only_its_neighbours_see_is_noticed_too() -> None:
    """In the first pool no label stands near an end; in the second one does."""
    model = Nearby().train()
    sifter = Sifter(model, shift_labels=False, score_batch_size=1)
    first, second = padded([64, 12, 30, 35, 44]), padded([64, 16, 8, 24, 40, 48])
    with pytest.warns(UserWarning, match="padding at the end of a row is cut off"):
        sifter.score(first)
    assert torch.allclose(sifter.score(second), plainly(model, second, shift_labels=False))


def test_a_field_that_is_as_wide_as_later_rows_are_long_is_not_cut() -> None:
    model = Conditioned().train()
    sifter = Sifter(model, shift_labels=False, score_batch_size=1)
    features = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for length in (40, 64):
        batch = {name: value[:, :length] for name, value in padded([1, 40, 20, 3]).items()}
        batch["features"] = features
        expected = plainly(model, batch, shift_labels=False)
        assert torch.allclose(sifter.score(batch), expected, atol=1e-5)
    assert "features" not in columns({**padded([1, 40, 20, 3]), "features": features[:, :9]})
    with counting() as ours:
        sifter.score(batch)
    assert ours.count == 8 + 40 + 24 + 8  # and the others are


def test_a_field_that_comes_later_is_looked_at_anew() -> None:
    class Typed(Conditioned):
        def forward(  # type: ignore[override]
            self, input_ids: Tensor, features: Any = None, attention_mask: Any = None
        ) -> Tensor:
            features = input_ids.new_zeros(len(input_ids), 64) if features is None else features
            return super().forward(input_ids, features.float())

    model, batch = Typed().train(), padded([1, 40, 20, 3])
    sifter = Sifter(model, shift_labels=False, score_batch_size=1)
    sifter.score({name: value[:, :40] for name, value in batch.items()})
    batch["features"] = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    expected = plainly(model, batch, shift_labels=False)
    with pytest.warns(UserWarning, match="padding at the end of a row is cut off"):
        assert torch.allclose(sifter.score(batch), expected, atol=1e-5)


def test_packed_rows_that_positions_tell_apart_keep_their_mask() -> None:
    """Without one, transformers takes positions that begin anew for another document; with one it does not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = hf.LlamaConfig(vocab_size=97, num_hidden_layers=3, num_key_value_heads=2, **sizes)
    model = _loud(hf.LlamaForCausalLM(config))
    sifter, positions = Sifter(model), torch.arange(64).repeat(4, 1)
    for each in (positions, positions % 20):
        batch = {**padded([64] * 4), "position_ids": each}
        assert torch.allclose(sifter.score(batch), plainly(model, batch), atol=1e-4)
