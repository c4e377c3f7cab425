"""Tiles of logits that never leave the registers of a GPU: a Triton kernel. Import it where there is Triton.

    left = tiles(hidden, labels, weight, bias, scale=1.0, softcap=None)      # [4, S, M] float32

What it leaves of a tile of the vocabulary are four numbers a row (fused.py puts them together): with logits
z their maximum m, sum e^(z - m), sum (z - m) e^(z - m), and the logit of the label, 0 if that is elsewhere.

A program takes a block of rows through a part of the vocabulary, a tile of classes at a time; those that
run at once hold other rows and the same classes, which come from the L2 cache then. Rows are few and GPUs
wide, so the vocabulary is split until every processor has work; parts are put together in a fixed order,
without atomics, so that the same input gives the same bits.

The block sizes are guesses until `tools/bench_head.py --tune` has run on a GPU: those of a matrix product
that reads little from the L2 cache, compiled for sm_90 and sm_80 and seen to need no more registers than
there are.

Letters: M rows, H hidden size, V classes, S parts of the vocabulary.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver


@dataclass(frozen=True)
class Blocks:
    """What a program holds at a time, and how many threads and loads in flight it has for that."""

    rows: int
    classes: int
    width: int  # of H
    warps: int
    stages: int

    def fitting(self, memory: int, itemsize: int) -> Blocks:
        """With no more loads in flight than ``memory`` bytes of a processor's own hold."""
        stage = (self.rows + self.classes) * self.width * itemsize
        stages = max(1, min(self.stages, memory // stage))
        return replace(self, stages=stages)


BLOCKS = {
    torch.bfloat16: Blocks(128, 256, 64, 8, 3),
    torch.float16: Blocks(128, 256, 64, 8, 3),
    torch.float32: Blocks(64, 64, 32, 4, 3),
}
PROGRAMS = 4  # for every processor, so that the last of them do not leave many idle
# e^-87 is the smallest normal float32: what lies below contributes nothing, be it -inf.
LOWEST = tl.constexpr(-87.0)


def tiles(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    *,
    blocks: Blocks | None = None,
    processors: int | None = None,
) -> Tensor:
    """[4, S, M] float32 of hidden [M, H] and weight [V, H], both bfloat16, float16 or float32; M of 1 or more.

    Sums are float32; float32 products are TF32 only where torch's may be. ``labels`` [M] int64: those
    outside of 0..V-1 have no logit, 0. Any strides. ``blocks`` and ``processors`` are for those who
    measure.
    """
    if blocks is None:
        blocks = _blocks(hidden.device, hidden.dtype)
    if processors is None:
        processors = _processors(hidden.device)
    (count, width), classes = hidden.shape, len(weight)
    row_blocks = triton.cdiv(count, blocks.rows)
    steps, parts = shares(triton.cdiv(classes, blocks.classes), row_blocks, processors)
    left = hidden.new_empty(4, parts, count, dtype=torch.float32)
    with torch.cuda.device_of(hidden):  # Triton launches on the current one
        _tiles[(row_blocks * parts,)](
            hidden,
            weight,
            hidden if bias is None else bias.contiguous(),
            labels.contiguous(),
            left,
            count,
            classes,
            width,
            parts,
            steps,
            float(scale),
            1.0 if softcap is None else float(softcap),
            hidden.stride(0),
            hidden.stride(1),
            weight.stride(0),
            weight.stride(1),
            HAS_BIAS=bias is not None,
            HAS_CAP=softcap is not None,
            EVEN=width % blocks.width == 0,
            PRECISION=_precision(),
            # Triton's interpreter takes the bits of bfloat16 for integers.
            WIDEN=hidden.dtype == torch.bfloat16 and not hidden.is_cuda,
            ROWS=blocks.rows,
            CLASSES=blocks.classes,
            WIDTH=blocks.width,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return left


def shares(tiles: int, row_blocks: int, processors: int) -> tuple[int, int]:
    """How many tiles a program walks over, and in how many parts the vocabulary is split for that.

    shares(239, 39, 132) == (18, 14)        # BERT-base, 4,915 positions, an H100: 546 programs
    shares(393, 512, 132) == (197, 2)       # GPT-2, 65,536 positions
    """
    parts = min(tiles, triton.cdiv(PROGRAMS * processors, row_blocks))
    steps = triton.cdiv(tiles, parts)
    return steps, triton.cdiv(tiles, steps)


def _precision() -> str:
    # Of float32 products. Since torch 2.9 the older name raises where the newer one was set.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if newer is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if newer == "tf32" else "ieee"


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _blocks(device: torch.device, dtype: torch.dtype) -> Blocks:
    blocks = BLOCKS[dtype]
    if torch.cuda.get_device_capability(device) < (9, 0):  # operands take registers, too
        blocks = replace(blocks, classes=min(128, blocks.classes))
    # torch has a name for it only since 2.7
    memory = driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return blocks.fitting(int(memory), dtype.itemsize)


# How many rows, and so how many parts, is another thing at every step: not a reason to compile again.
@triton.jit(do_not_specialize=["count", "classes", "parts", "steps"])
def _tiles(
    hidden,
    weight,
    bias,
    labels,
    left,
    count,
    classes,
    width,
    parts,
    steps,
    scale,
    softcap,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row_blocks = tl.cdiv(count, ROWS)
    block = tl.program_id(0) % row_blocks
    part = tl.program_id(0) // row_blocks
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    # Where a tile begins takes 64 bits (V x H may exceed 2**31), what lies within it 32, which spares
    # registers. The last row (or class) stands in for those beyond it: no mask, and it is not stored.
    rows_begin = hidden + (block * ROWS).to(tl.int64) * hidden_row
    x_within = (tl.minimum(row, count - 1) - block * ROWS)[:, None] * hidden_row
    x_within += column[None, :] * hidden_column
    label = tl.load(labels + row, mask=row < count, other=-1)
    # Those of other parts, too, lest they meet what the last tile has beyond the last class.
    label = tl.where((label >= 0) & (label < classes), label, -1).to(tl.int32)

    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    wanted = tl.zeros((ROWS,), tl.float32)
    begin = part * steps * CLASSES
    end = tl.minimum(begin + steps * CLASSES, classes)
    classes_begin = weight + begin.to(tl.int64) * weight_row
    for first in range(begin, end, CLASSES):
        of_class = first + tl.arange(0, CLASSES)
        w_within = (tl.minimum(of_class, classes - 1) - first)[None, :] * weight_row
        w_within += column[:, None] * weight_column
        x_begin, w_begin = rows_begin, classes_begin
        classes_begin += CLASSES * weight_row
        logits = tl.zeros((ROWS, CLASSES), tl.float32)
        for at in range(0, width, WIDTH):
            x_at, w_at = x_begin + x_within, w_begin + w_within
            x_begin += WIDTH * hidden_column
            w_begin += WIDTH * weight_column
            if EVEN:
                x = tl.load(x_at)
                w = tl.load(w_at)
            else:
                x = tl.load(x_at, mask=(at + column < width)[None, :], other=0.0)
                w = tl.load(w_at, mask=(at + column < width)[:, None], other=0.0)
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            logits = tl.dot(x, w, logits, input_precision=PRECISION)
        if HAS_BIAS:
            logits += tl.load(bias + tl.minimum(of_class, classes - 1)).to(tl.float32)[None, :]
        logits = logits * scale
        if HAS_CAP:
            logits = softcap * _tanh(logits / softcap)
        logits = tl.where((of_class < classes)[None, :], logits, float("-inf"))
        wanted += tl.sum(tl.where(of_class[None, :] == label[:, None], logits, 0.0), 1)

        higher = tl.maximum(most, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        below = _at_least(logits - base[:, None])
        share = tl.exp(below)
        down = _at_least(most - base)
        scaled = tl.exp(down)
        moment = scaled * (moment + down * total) + tl.sum(share * below, 1)
        total = scaled * total + tl.sum(share, 1)
        most = higher

    place = part.to(tl.int64) * count + row
    plane = parts.to(tl.int64) * count
    tl.store(left + place, most, mask=row < count)
    tl.store(left + plane + place, total, mask=row < count)
    tl.store(left + 2 * plane + place, moment, mask=row < count)
    tl.store(left + 3 * plane + place, wanted, mask=row < count)


@triton.jit
def _at_least(exponents):
    # Not tl.maximum, which loses NaN.
    return tl.where(exponents < LOWEST, LOWEST, exponents)


@triton.jit
def _tanh(x):
    # By its series where 1 - e^(-2|x|) would lose digits. Both are right to a few units in the last place.
    share = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - share) / (1.0 + share)
    square = x * x
    series = 2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))
    near = x * (1.0 + square * (-1.0 / 3 + square * series))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))
