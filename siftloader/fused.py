"""The loss and the entropy of a linear head, both in one pass and without its logits.

    head = LinearHead(decoder.weight, decoder.bias, softcap=30.0)
    loss, entropy = loss_and_entropy(hidden, labels, head)      # [M] each, nats

A tile of logits at a time is made, reduced to four numbers a row, and dropped; the numbers of all tiles
are put together at the end. On a GPU the tiles live in registers (kernels.py); where that cannot be, and
on a CPU, they are of a few MiB.

Letters: M positions, H hidden size, V vocabulary (or classes), S tiles of it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from siftloader.errors import ScoringError


# Rows and classes of a tile. On a CPU 2**22 logits: of 2**23, which are 32 MiB, malloc asks the system for new
# pages every time, and all took 1.6 times as long. Elsewhere enough that launching costs little.
TILE_OF_A_HOST, TILE_OF_A_DEVICE = (512, 8192), (4096, 4096)
CAST_BYTES = 64 << 20  # of a weight at a time, where a kernel needs another precision


@dataclass(frozen=True, eq=False)
class LinearHead:
    """What a model makes of its last hidden states: ``cap(scale * (hidden @ weight.T + bias))``.

    LinearHead(decoder.weight, decoder.bias)             # BERT
    LinearHead(lm_head.weight, softcap=30.0)             # Gemma 2: cap(x) = 30 * tanh(x / 30)
    LinearHead(lm_head.weight, scale=0.0625)             # Cohere

    ``weight`` [V, H] and ``bias`` [V] are shared, never copied or written to. They may be of another
    precision than the hidden states, which decide.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or not self.weight.is_floating_point():
            raise ValueError(
                f"weight must be floating, [V, H], got {self.weight.dtype} {list(self.weight.shape)}"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias must be [{len(self.weight)}], got {list(self.bias.shape)}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale!r}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be a number above 0, got {self.softcap!r}")

    def part(self, first: int, last: int, dtype: torch.dtype) -> LinearHead:
        """Of the classes ``first`` to ``last`` alone, in the given precision."""
        count = min(last, len(self.weight)) - first
        bias = None if self.bias is None else self.bias.narrow(0, first, count).to(dtype)
        return replace(self, weight=self.weight.narrow(0, first, count).to(dtype), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [M, V] it stands for, float32 (float64 where ``hidden`` is): the slow reference."""
        head = self.part(0, len(self.weight), hidden.dtype)
        found = torch.nn.functional.linear(hidden, head.weight, head.bias)
        found = found if found.dtype == torch.float64 else found.float()
        if self.softcap is not None:
            return found.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return found if self.scale == 1 else found.mul_(self.scale)


def loss_and_entropy(hidden: Tensor, labels: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
    """-log p(label) and the entropy of p = softmax(logits) at M positions, [M] each, in nats.

    loss, entropy = loss_and_entropy(hidden, labels, head)       # hidden [M, H], labels [M]

    Both are float32, float64 where ``hidden`` is, without gradients, on the device of ``hidden``. A
    negative label is none: its loss is NaN. Under autocast, products are of its precision, as the
    model's own would be. On a GPU nothing waits for the device.

    Memory beside the result: on a CPU 40 MiB, and a copy of 8,192 classes of the weight if that is of
    another precision; on a GPU a copy of at most 64 MiB of it, without Triton 160 MiB. Of the rows next to
    nothing: 16 bytes for each tile of the vocabulary.

    Raises ScoringError where shapes do not fit, and on a CPU for a label that is no class of the head;
    on a GPU such a label's loss is NaN. (One pass: Milakov and Gimelshein 2018; logits that are not
    stored: Wijmans et al. 2024, cut cross-entropy.)
    """
    _check(hidden, labels, head)
    dtype = _precision(hidden)
    with torch.no_grad(), _own_precision(hidden.device.type):
        hidden, labels = hidden.to(dtype), labels.long()
        if hidden.device.type == "cpu" and hidden.dtype == torch.float16:
            hidden = hidden.float()  # four times as fast there, and better
        return _combined(
            _all_tiles(hidden, labels, head), (labels >= 0) & (labels < len(head.weight))
        )


def _check(hidden: Tensor, labels: Tensor, head: LinearHead) -> None:
    classes, width = head.weight.shape
    if hidden.ndim != 2 or hidden.shape[1] != width or not hidden.is_floating_point():
        raise ScoringError(
            f"the head needs hidden [M, {width}], got {list(hidden.shape)} of {hidden.dtype}"
        )
    if labels.shape != hidden.shape[:1] or labels.is_floating_point():
        raise ScoringError(
            f"hidden states {list(hidden.shape)} need integer labels [{len(hidden)}], got "
            f"{labels.dtype} {list(labels.shape)}"
        )
    if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= classes:
        raise ScoringError(
            f"found label {int(labels.max())}, the head predicts {classes} classes (0 to "
            f"{classes - 1}); is it the tokenizer that the model was built for?"
        )


def _own_precision(device: str) -> AbstractContextManager[object]:
    # Sums must not be of autocast's precision. (Entered where it is on: without a GPU it would warn.)
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _precision(hidden: Tensor) -> torch.dtype:
    # Of the products: as F.linear would have it, which autocast leaves alone in float64.
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _all_tiles(hidden: Tensor, labels: Tensor, head: LinearHead) -> Tensor:
    if kernel := _kernel(hidden):
        return _tiles_by(kernel, hidden, labels, head)
    tile = TILE_OF_A_HOST if hidden.device.type == "cpu" else TILE_OF_A_DEVICE
    return _tiles(hidden, labels, head, *tile)


def _tiles(hidden: Tensor, labels: Tensor, head: LinearHead, rows: int, classes: int) -> Tensor:
    # What each tile leaves of a row: [4, S, M]. Classes outside, so that each is cast once.
    columns = []
    for first in range(0, len(head.weight), classes):
        part = head.part(first, first + classes, hidden.dtype)
        pieces = zip(torch.split(hidden, rows), torch.split(labels - first, rows), strict=True)
        columns.append(torch.cat([_left(part.logits(some), place) for some, place in pieces], 1))
    return torch.stack(columns, 1)


def _kernel(hidden: Tensor) -> Callable[..., Tensor] | None:
    # Subclasses (of tests, of compilers that trace) are not what a kernel could read.
    plain = type(hidden) in (Tensor, nn.Parameter) and hidden.device.type == "cuda"
    if not plain or not len(hidden) or hidden.dtype == torch.float64:
        return None
    return _tried(hidden.device, hidden.dtype)


@functools.cache
def _tried(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    # The kernel, where there is Triton and it runs: it wants a compiler of C, and a GPU that it knows.
    try:
        from siftloader.kernels import tiles
    except ImportError:
        return None
    try:
        # AMD's processors have less memory of their own, older ones of NVIDIA no bfloat16; never tried there.
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
            return None
        few = torch.zeros(16, 16, device=device, dtype=dtype)
        tiles(few, few.new_zeros(16, dtype=torch.long), few)
    except Exception as error:
        warnings.warn(
            f"Triton does not run here ({type(error).__name__}: {error}), so the head's loss and entropy "
            f"are computed by torch: right, but slower",
            stacklevel=2,
        )
        return None
    return tiles


def _tiles_by(
    kernel: Callable[..., Tensor], hidden: Tensor, labels: Tensor, head: LinearHead
) -> Tensor:
    # [4, S, M], as `_tiles`, in one go: with a copy of some of the weight where it must be cast.
    classes = len(head.weight)
    if head.weight.dtype != hidden.dtype:
        classes = max(1, CAST_BYTES // (hidden.shape[1] * hidden.element_size()))
    found = []
    for first in range(0, len(head.weight), classes):
        part = head.part(first, first + classes, hidden.dtype)
        of = part.weight, part.bias, part.scale, part.softcap
        found.append(kernel(hidden, labels - first, *of))
    return torch.cat(found, 1)


def _left(logits: Tensor, place: Tensor) -> Tensor:
    # Of the logits z of a tile [r, C], which are overwritten: their maximum m, sum e^(z - m),
    # sum (z - m) e^(z - m), and the logit at `place`, 0 where that is in another tile; [4, r].
    inside = (place >= 0) & (place < logits.shape[1])
    place = place.clamp(0, logits.shape[1] - 1)
    wanted = torch.where(inside, logits.gather(1, place.unsqueeze(1)).squeeze(1), 0)
    most = logits.amax(1)
    # Where all are ruled out, -inf - -inf would be NaN.
    base = most.clamp_min(torch.finfo(most.dtype).min)
    below = _at_least(logits.sub_(base.unsqueeze(1)))
    shares = below.exp()
    return torch.stack([most, shares.sum(1), shares.mul_(below).sum(1), wanted])


def _combined(left: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    # From what tiles leave, [4, S, M], to loss and entropy, [M] each.
    most, total, moment, wanted = left.unbind()
    top = most.amax(0)
    below = _at_least(most - top)
    share = below.exp()
    moment = (share * (moment + below * total)).sum(0)
    total = (share * total).sum(0)
    # In this order both are sums of what is not negative.
    loss = total.log() + (top - wanted.sum(0))
    return torch.where(labelled, loss, torch.nan), total.log() - moment / total


def _at_least(exponents: Tensor) -> Tensor:
    # e^-87 is the smallest normal float32: what lies below contributes nothing, be it -inf, and must not
    # slow the CPU down as denormal numbers do. NaN stays.
    return exponents.clamp_min_(-708.0 if exponents.dtype == torch.float64 else -87.0)
