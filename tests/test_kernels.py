"""The Triton kernel, on a GPU where there is one, else with Triton's interpreter on the CPU.

The interpreter must be asked for before Triton is imported, so without a GPU one test runs all others of
this file in a process of their own:

    TRITON_INTERPRET=1 pytest tests/test_kernels.py
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fused import KINDS, check_no_worse, made, reference
from torch import Tensor

from siftloader import fused
from siftloader.fused import LinearHead, loss_and_entropy


HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE.type == "cpu" and not INTERPRETED),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1",
)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton: pip install 'siftloader[emulators]'")
@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRETED, reason="the others run by themselves")
def test_all_the_others_with_tritons_interpreter() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            __file__,
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def values(hidden: Tensor, labels: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
    """On a GPU as everybody gets them; else by the kernel, interpreted, in blocks that fit small shapes."""
    if DEVICE.type == "cuda":
        on = LinearHead(
            head.weight.to(DEVICE),
            None if head.bias is None else head.bias.to(DEVICE),
            head.scale,
            head.softcap,
        )
        assert fused._kernel(hidden.to(DEVICE)) is not None or not len(hidden)
        loss, entropy = loss_and_entropy(hidden.to(DEVICE), labels.to(DEVICE), on)
        return loss.cpu(), entropy.cpu()
    left = fused._tiles_by(interpreted, hidden, labels, head)
    return fused._combined(left, (labels >= 0) & (labels < len(head.weight)))


def interpreted(*args: Any) -> Tensor:
    from siftloader.kernels import Blocks, tiles

    with warnings.catch_warnings():  # NumPy warns of what a GPU passes over
        warnings.simplefilter("ignore", RuntimeWarning)
        return tiles(*args, blocks=Blocks(32, 128, 32, 4, 1), processors=1)


@runs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_the_eager_path(dtype: torch.dtype, kind: str) -> None:
    for shape in ((1, 8, 2), (7, 33, 31), (33, 100, 1003), (70, 64, 512)):
        check_no_worse(*made(*shape, dtype, **KINDS[kind]), by=values)


@runs
@pytest.mark.parametrize("spread", [0.0, 30.0, 3000.0])
def test_flat_and_steep_predictions_too(spread: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, labels, head = made(33, 100, 1003, dtype, spread=spread)
        check_no_worse(hidden, labels, head, by=values)
        check_no_worse(hidden, labels, replace(head, softcap=1000.0), by=values)


@runs
def test_soft_caps_far_above_the_logits_change_nothing() -> None:
    hidden, labels, head = made(33, 32, 200, torch.float32)
    for softcap in (1e2, 1e4, 1e6):
        found = values(hidden, labels, replace(head, softcap=softcap))
        best = reference(hidden, labels, replace(head, softcap=softcap))
        for ours, right in zip(found, best, strict=True):
            assert (ours.double() - right).abs().max() < 1e-5


@runs
def test_without_a_label_no_loss_and_never_a_read_out_of_bounds() -> None:
    hidden, labels, head = made(40, 33, 200, torch.float32)
    right = values(hidden, labels, head)
    wrong = labels.clone()
    wrong[::4] = torch.tensor([-100, -1, 200, 255, 256, 2**31, 2**32, 2**40, -(2**40), 2**62])
    ours = values(hidden, wrong, head)
    bad = wrong != labels
    assert torch.equal(ours[0].isnan(), bad)
    assert torch.equal(ours[0][~bad], right[0][~bad])
    assert torch.equal(ours[1], right[1])


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_class_that_is_ruled_out_contributes_nothing(dtype: torch.dtype) -> None:
    hidden, labels, head = made(33, 33, 700, dtype, bias=True)
    assert head.bias is not None
    out = torch.ones(700, dtype=torch.bool)
    out[300:400] = False  # the first tiles and the last have none that is left
    few = LinearHead(head.weight[~out], head.bias[~out])
    without = replace(head, bias=head.bias.masked_fill(out, -torch.inf))
    found = values(hidden, labels % 100 + 300, without)
    for ours, right in zip(found, reference(hidden, labels % 100, few), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)
    loss, entropy = values(hidden, torch.zeros_like(labels), without)
    assert (loss == torch.inf).all()
    assert entropy.isfinite().all()
    none = replace(head, bias=torch.full_like(head.bias, -torch.inf))
    assert not any(each.isfinite().any() for each in values(hidden, labels, none))


@runs
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_is_not_finite_is_alone_with_it(dtype: torch.dtype, bad: float) -> None:
    hidden, labels, head = made(70, 33, 500, dtype, bias=True)
    right = values(hidden, labels, head)
    hidden[5, 7], hidden[69] = bad, bad
    hit = torch.zeros(70, dtype=torch.bool)
    hit[[5, 69]] = True
    found = values(hidden, labels, head)
    for ours, usual in zip(found, right, strict=True):
        assert torch.equal(ours[~hit], usual[~hit])
        assert not ours[hit].isfinite().any()


@runs
def test_rows_know_nothing_of_each_other_and_the_same_gives_the_same_bits() -> None:
    hidden, labels, head = made(70, 33, 500, torch.float32)
    together, again = values(hidden, labels, head), values(hidden, labels, head)
    alone = values(hidden[66:67], labels[66:67], head)
    assert all(map(torch.equal, together, again))
    for all_of_them, one in zip(together, alone, strict=True):
        torch.testing.assert_close(one, all_of_them[66:67])


@runs
def test_any_strides() -> None:
    hidden, labels, head = made(33, 33, 200, torch.float32, bias=True)
    assert head.bias is not None
    right = values(hidden, labels, head)
    columns = LinearHead(head.weight.T.contiguous().T, torch.stack([head.bias] * 2, 1)[:, 0])
    wide = torch.zeros(33, 66)
    wide[:, ::2] = hidden
    found = values(wide[:, ::2], torch.stack([labels] * 2, 1)[:, 0], columns)
    for ours, same in zip(found, right, strict=True):
        torch.testing.assert_close(ours, same)


@runs
def test_a_weight_of_another_precision_is_cast_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels, head = made(33, 32, 700, torch.bfloat16, bias=True, softcap=9.0)
    assert head.bias is not None
    right = values(hidden, labels, head)
    monkeypatch.setattr(fused, "CAST_BYTES", 150 * 32 * 2)  # 150 classes at a time
    found = values(hidden, labels, replace(head, weight=head.weight.float()))
    for ours, same in zip(found, right, strict=True):
        torch.testing.assert_close(ours, same)


@runs
def test_every_processor_has_work_and_every_class_one_place() -> None:
    from siftloader.kernels import shares

    assert shares(239, 39, 132) == (18, 14)
    assert shares(393, 512, 132) == (197, 2)
    for tiles in (1, 2, 7, 239, 1002):
        for row_blocks in (1, 3, 39, 5000):
            for processors in (1, 108, 132):
                steps, parts = shares(tiles, row_blocks, processors)
                assert steps * parts >= tiles > steps * (parts - 1)
                assert parts * row_blocks <= 4 * processors + row_blocks


@runs
def test_no_more_loads_are_in_flight_than_fit() -> None:
    from siftloader.kernels import BLOCKS

    h100, laptop = 227 * 1024, 99 * 1024
    for dtype, blocks in BLOCKS.items():
        for memory in (h100, laptop, 64 * 1024):
            fit = blocks.fitting(memory, dtype.itemsize)
            assert fit.stages * (fit.rows + fit.classes) * fit.width * dtype.itemsize <= memory
        assert blocks.fitting(h100, dtype.itemsize) == blocks


@runs
@pytest.mark.skipif(DEVICE.type == "cuda", reason="memory is fenced on the host")
def test_nothing_is_read_beyond_the_last_row_and_the_last_class() -> None:
    """What is read lies at the end of a page, and the next page must not be touched: the process would die."""
    hidden, labels, head = made(37, 33, 300, torch.float32, bias=True)
    assert head.bias is not None
    right = values(hidden, labels, head)
    found = values(
        fenced(hidden), fenced(labels), LinearHead(fenced(head.weight), fenced(head.bias))
    )
    for ours, same in zip(found, right, strict=True):
        assert torch.equal(ours, same)


def fenced(tensor: Tensor) -> Tensor:
    """A copy that ends where memory that may be read ends."""
    size = tensor.numel() * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert libc.mprotect(ctypes.c_void_p(begin + room), mmap.PAGESIZE, 0) == 0
    whole = torch.frombuffer(pages, dtype=tensor.dtype, count=room // tensor.element_size())
    return whole[-tensor.numel() :].view(tensor.shape).copy_(tensor)
