from __future__ import annotations

import torch
from hypothesis import given, strategies as st
from torch import Tensor

from siftloader.padding import by_length, covering, ends_of, shortened, without_mask
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
