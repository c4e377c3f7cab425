"""What a batch is made of: pytest tests/test_batches.py"""

from __future__ import annotations

import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from simulated import Gpu
from transformers import BatchEncoding

from siftloader import BatchError
from siftloader.batches import Copies, clone, cut, merge, move, rows, select


Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    names: list[str]
    scale: float


def x(count: int = 4) -> torch.Tensor:
    return torch.arange(3 * count).view(count, 3)


SHAPES = {
    "dict": lambda n: {"x": x(n), "y": torch.arange(n)},
    "ordered": lambda n: OrderedDict(x=x(n), y=torch.arange(n)),
    "encoding": lambda n: BatchEncoding({"x": x(n), "y": torch.arange(n)}),
    "tuple": lambda n: (x(n), torch.arange(n)),
    "list": lambda n: [x(n), torch.arange(n)],
    "named": lambda n: Pair(x(n), torch.arange(n)),
    "dataclass": lambda n: Record(x(n), [f"s{i}" for i in range(n)], 0.5),
    "tensor": x,
    "nested": lambda n: {"in": (x(n), {"deep": [x(n)]}), "text": [f"s{i}" for i in range(n)]},
    "others": lambda n: {"x": x(n), "scale": torch.tensor(2.0), "name": "wiki", "none": None},
    "collated strings": lambda n: [x(n), tuple(f"s{i}" for i in range(n)), torch.arange(n)],
    "per-sample tensors": lambda n: {"x": x(n), "var": [torch.ones(i + 1) * i for i in range(n)]},
    "per-sample pairs": lambda n: {"x": x(n), "var": [(torch.ones(i + 1), "t") for i in range(n)]},
    "numpy": lambda n: {"x": x(n), "id": np.arange(n)},
}


def flat(batch) -> list:
    if isinstance(batch, (dict, BatchEncoding)):
        return [entry for key in batch for entry in (key, flat(batch[key]))]
    if isinstance(batch, Record):
        return flat((batch.x, batch.names, batch.scale))
    if isinstance(batch, (tuple, list)):
        return [flat(each) for each in batch]
    return batch.tolist() if hasattr(batch, "tolist") else batch


@pytest.mark.parametrize("shape", SHAPES)
def test_structure_and_types_come_out_as_they_went_in(shape):
    batch = SHAPES[shape](4)
    for changed in (
        select(batch, torch.arange(4)),
        merge([batch]),
        clone(batch),
        move(batch, "cpu"),
    ):
        assert type(changed) is type(batch)
        assert flat(changed) == flat(batch)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_counted_selected_cut_and_merged(shape):
    batch = SHAPES[shape](4)
    assert rows(batch) == 4
    picked = select(batch, torch.tensor([1, 3]))
    assert rows(picked) == 2
    assert rows(cut(batch, 1, 4)) == 3
    halves = [select(batch, torch.tensor([0, 1])), select(batch, torch.tensor([2, 3]))]
    assert flat(merge(halves)) == flat(batch)
    assert flat(cut(batch, 2, 4)) == flat(halves[1])


@given(data=st.data(), count=st.integers(1, 12))
def test_selection_composes(data, count):
    first = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=12))
    second = data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, max_size=12))
    batch = SHAPES["nested"](count)
    twice = select(select(batch, torch.tensor(first)), torch.tensor(second))
    assert flat(twice) == flat(select(batch, torch.tensor([first[i] for i in second])))


def test_a_clone_is_safe_from_a_reused_buffer():
    buffer = x()
    held = clone({"x": buffer})
    buffer.zero_()
    assert held["x"].sum() > 0


def test_rows_of_different_lengths_are_padded_by_their_meaning():
    def batch(count: int, length: int) -> dict[str, torch.Tensor]:
        ones = torch.ones(count, length, dtype=torch.long)
        return {"input_ids": ones * 7, "attention_mask": ones, "labels": ones, "id": ones[:, 0]}

    merged = merge([batch(1, 2), batch(2, 4)], pad_id=9)
    assert merged["input_ids"].tolist() == [[7, 7, 9, 9], [7] * 4, [7] * 4]
    assert merged["attention_mask"].tolist()[0] == [1, 1, 0, 0]
    assert merged["labels"].tolist()[0] == [1, 1, -100, -100]
    assert merged["id"].tolist() == [1, 1, 1]


def test_labels_by_any_name_are_padded_with_what_losses_skip():
    def batch(length: int) -> dict[str, torch.Tensor]:
        ones = torch.ones(1, length, dtype=torch.long)
        return {"input_ids": ones, "attention_mask": ones, "targets": ones}

    assert merge([batch(1), batch(2)], label="targets")["targets"].tolist() == [[1, -100], [1, 1]]


def test_labels_are_padded_with_the_mark_that_the_models_loss_skips():
    def batch(length: int) -> dict[str, torch.Tensor]:
        ones = torch.ones(1, length, dtype=torch.long)
        return {"input_ids": ones, "attention_mask": ones, "labels": ones, "my_label": ones}

    merged = merge([batch(1), batch(2)], pad_id=9, ignored=-1)
    assert merged["labels"].tolist() == merged["my_label"].tolist() == [[1, -1], [1, 1]]
    assert merged["input_ids"].tolist() == [[1, 9], [1, 1]]


def test_padding_without_a_mask_is_refused():
    with pytest.raises(BatchError, match="attention_mask"):
        merge([{"x": torch.ones(2, 3)}, {"x": torch.ones(2, 4)}])


def test_a_batch_without_rows_is_refused():
    with pytest.raises(BatchError, match="sample dimension"):
        rows({"scale": torch.tensor(1.0), "name": "x"})
    with pytest.raises(BatchError, match="differ in structure"):
        merge([{"x": x()}, {"x": x(), "y": x()}])


def test_a_field_of_another_first_dimension_is_left_alone():
    batch = {"x": x(4), "y": torch.arange(4), "frequencies": torch.arange(6)}
    picked = select(batch, torch.tensor([0]))
    assert len(picked["frequencies"]) == 6 and rows(batch) == 4


HOST = torch.device("cpu")


def test_copies_are_moves_on_the_host():
    copies = Copies()
    batch = SHAPES["dict"](4)
    assert copies.to(batch, HOST) is batch
    assert copies.to(5, HOST) == 5


def test_a_copy_to_a_gpu_is_pinned_and_beside_the_loop():
    with Gpu() as gpu:
        copies, batch = Copies(), {**SHAPES["dict"](4), "names": list("abcd")}
        moved = [copies.to(batch, gpu.device) for _ in range(3)]
        assert not gpu.waits and len(set(gpu.copied_on)) == 1
        own = gpu.copied_on[0]
        assert own is not gpu.current and own in gpu.current.after
        assert not own.after  # it waits for nothing that the loop does
        used = {id(each) for each in gpu.current.uses}
        for each in moved:
            assert {id(each["x"]), id(each["y"])} <= used
            assert torch.equal(each["x"].held, batch["x"]) and each["names"] is batch["names"]
        assert copies.to(moved[0], gpu.device) is moved[0]


def test_what_is_being_copied_is_kept_until_then():
    with Gpu() as gpu:
        copies, gone = Copies(), []
        for number in range(3):
            gpu.finishes = number == 2  # before the third nothing is done
            source = {"x": x(4).pin_memory()}
            weakref.finalize(source["x"], gone.append, number)
            copies.to(source, gpu.device)
            del source
        assert gone == [0, 1]


def test_a_batch_that_is_moved_is_pinned_first():
    with Gpu() as gpu:
        moved = move({"x": x(4), "scale": torch.tensor(2.0)}, gpu.device)
        assert moved["x"].is_cuda and not gpu.waits
        move({"x": x(4).to_sparse()}, HOST)


def test_what_lies_on_the_gpu_in_part_is_copied_in_part():
    with Gpu() as gpu:
        there = {"x": move(x(4), gpu.device), "y": torch.arange(4)}
        moved = Copies().to(there, gpu.device)
        assert moved["x"].held is there["x"].held and moved["y"].is_cuda and not gpu.waits
