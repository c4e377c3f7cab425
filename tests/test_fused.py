"""The loss and the entropy of a linear head, made without its logits.

The criterion (cut-cross-entropy's): beside float64 the fused values are no worse than what a loop computes,
F.linear in the precision of the model, its result as float32, log_softmax. Neither the largest error nor
the mean one may exceed that path's. It can be held because tiles of logits equal those of the whole product
(bfloat16: to the bit) or are better (float16 on a CPU), and all after them is float32. What float32 itself
cannot promise is allowed: four units in the last place of the largest sum of magnitudes.

    pytest tests/test_fused.py
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from siftloader import fused
from siftloader.errors import ScoringError
from siftloader.fused import LinearHead, _combined, _tiles, loss_and_entropy


LOW = [torch.float32, torch.bfloat16, torch.float16]
# M, H, V: nothing of them divides anything; the last crosses tiles of classes.
SHAPES = [(1, 8, 2), (7, 33, 31), (129, 100, 1000), (129, 8, 1003), (7, 20, 50261)]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"bias": True, "scale": 0.125},
    "capped": {"softcap": 15.0},
    "all": {"bias": True, "scale": 3.0, "softcap": 30.0},
}


def made(
    count: int,
    width: int,
    classes: int,
    dtype: torch.dtype,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    spread: float = 3.0,
) -> tuple[Tensor, Tensor, LinearHead]:
    """Hidden [M, H], labels [M], a head: logits of about the given spread before scale and cap."""
    draw = torch.Generator().manual_seed(count * 7919 + width * 31 + classes)
    hidden = torch.randn(count, width, generator=draw)
    weight = torch.randn(classes, width, generator=draw) * spread / math.sqrt(width)
    added = torch.randn(classes, generator=draw).to(dtype) if bias else None
    labels = torch.randint(0, classes, (count,), generator=draw)
    return hidden.to(dtype), labels, LinearHead(weight.to(dtype), added, scale, softcap)


def capped(logits: Tensor, head: LinearHead) -> Tensor:
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def values_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    loss = -log_p.gather(1, labels[:, None]).squeeze(1)
    return loss, -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def reference(hidden: Tensor, labels: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
    bias = None if head.bias is None else head.bias.double()
    logits = functional.linear(hidden.double(), head.weight.double(), bias)
    return values_of(capped(logits, head), labels)


def eager(hidden: Tensor, labels: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
    logits = functional.linear(hidden, head.weight, head.bias)
    return values_of(capped(logits.float(), head), labels)


def floor(hidden: Tensor, head: LinearHead) -> float:
    """What float32 cannot promise: a few units in the last place of the largest sum of magnitudes."""
    sums = hidden.double().abs() @ head.weight.double().abs().T
    if head.bias is not None:
        sums = sums + head.bias.double().abs()
    largest = max(1.0, head.scale) * float(sums.amax()) + (head.softcap or 0.0)
    return 4 * torch.finfo(torch.float32).eps * max(largest, math.log(len(head.weight)))


def check_no_worse(
    hidden: Tensor, labels: Tensor, head: LinearHead, by: Callable[..., Any] = loss_and_entropy
) -> None:
    found = by(hidden, labels, head)
    best, usual = reference(hidden, labels, head), eager(hidden, labels, head)
    allowed = floor(hidden, head)
    for name, ours, theirs, right in zip(("loss", "entropy"), found, usual, best, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == labels.shape
        error, usual_error = (ours.double() - right).abs(), (theirs.double() - right).abs()
        for how in (Tensor.amax, Tensor.mean):
            assert how(error) <= how(usual_error) + allowed, (
                f"{name}: {how(error):.3g} beside {how(usual_error):.3g} of the eager path "
                f"(and {allowed:.1g} of float32)"
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_no_worse_than_the_eager_path(
    dtype: torch.dtype, shape: tuple[int, int, int], kind: str
) -> None:
    check_no_worse(*made(*shape, dtype, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_any_size_make_the_same(dtype: torch.dtype, kind: str) -> None:
    hidden, labels, head = made(129, 33, 1003, dtype, **KINDS[kind])
    right = loss_and_entropy(hidden, labels, head)
    for tile in ((37, 100), (129, 1002), (1, 500)):
        found = _combined(_tiles(hidden, labels, head, *tile), labels >= 0)
        for ours, same in zip(found, right, strict=True):
            torch.testing.assert_close(ours, same, rtol=1e-5, atol=floor(hidden, head))


def test_rows_of_several_tiles() -> None:
    check_no_worse(*made(1031, 33, 1003, torch.bfloat16, bias=True))


@pytest.mark.parametrize("spread", [0.0, 30.0, 3000.0])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_flat_and_steep_predictions_too(dtype: torch.dtype, spread: float) -> None:
    """Logits all alike, and up to about 1e4."""
    hidden, labels, head = made(129, 100, 1003, dtype, spread=spread)
    check_no_worse(hidden, labels, head)
    if not spread:
        loss, entropy = loss_and_entropy(hidden, labels, head)
        torch.testing.assert_close(loss, torch.full((129,), math.log(1003)))
        torch.testing.assert_close(entropy, torch.full((129,), math.log(1003)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_stays_float64(shape: tuple[int, int, int], kind: str) -> None:
    hidden, labels, head = made(*shape, torch.float64, **KINDS[kind])
    found, best = loss_and_entropy(hidden, labels, head), reference(hidden, labels, head)
    for ours, right in zip(found, best, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


def test_no_positions_no_values() -> None:
    for dtype in (*LOW, torch.float64):
        hidden, labels, head = made(0, 8, 31, dtype, bias=True)
        loss, entropy = loss_and_entropy(hidden, labels, head)
        assert loss.shape == entropy.shape == (0,)
        assert loss.dtype == entropy.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_where_there_is_no_label_there_is_no_loss_but_an_entropy() -> None:
    hidden, labels, head = made(129, 33, 9001, torch.float32)
    loss, entropy = loss_and_entropy(hidden, labels, head)
    some = labels.clone()
    some[::3] = -100
    some[1] = -1
    ours = loss_and_entropy(hidden, some, head)
    assert torch.equal(ours[0].isnan(), some < 0)
    assert torch.equal(ours[0][some >= 0], loss[some >= 0])
    assert torch.equal(ours[1], entropy)


def test_a_label_that_the_head_does_not_predict_is_an_error_on_the_host() -> None:
    hidden, labels, head = made(7, 33, 31, torch.float32)
    labels[3] = 31
    with pytest.raises(ScoringError, match="found label 31, the head predicts 31 classes"):
        loss_and_entropy(hidden, labels, head)


def test_on_a_device_nobody_waits_and_wrong_labels_read_nothing() -> None:
    """With fake CUDA tensors a synchronisation or a read of the labels raises."""
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float32):
            hidden = torch.empty(5000, 64, device="cuda", dtype=dtype)
            weight = torch.empty(9001, 64, device="cuda", dtype=dtype)
            labels = torch.full((5000,), 9001, device="cuda")
            loss, entropy = loss_and_entropy(hidden, labels, LinearHead(weight, softcap=5.0))
            assert loss.shape == entropy.shape == (5000,)
            assert loss.device.type == entropy.device.type == "cuda"


def test_out_of_range_labels_have_no_loss_where_nobody_may_wait() -> None:
    hidden, labels, head = made(7, 33, 31, torch.float32)
    wrong = labels.clone()
    wrong[3], wrong[4] = 31, 2**40
    loss, _ = _combined(_tiles(hidden, wrong, head, 4, 8), (wrong >= 0) & (wrong < 31))
    assert loss.isnan().tolist() == [False, False, False, True, True, False, False]


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_a_class_that_is_ruled_out_contributes_nothing(dtype: torch.dtype) -> None:
    hidden, labels, head = made(129, 33, 20000, dtype, bias=True)
    assert head.bias is not None
    out = torch.ones(20000, dtype=torch.bool)
    out[9000:9100] = False  # whole tiles of them, too
    few = LinearHead(head.weight[~out], head.bias[~out])
    labels = labels % 100
    found = loss_and_entropy(
        hidden, labels + 9000, replace(head, bias=head.bias.masked_fill(out, -torch.inf))
    )
    for ours, right in zip(found, reference(hidden, labels, few), strict=True):
        torch.testing.assert_close(
            ours.double(), right, rtol=torch.finfo(dtype).eps * 30, atol=1e-4
        )


def test_a_label_that_is_ruled_out_is_infinitely_surprising() -> None:
    hidden, labels, head = made(7, 33, 31, torch.float32)
    bias = torch.zeros(31)
    bias[int(labels[2])] = -torch.inf
    loss, entropy = loss_and_entropy(hidden, labels, replace(head, bias=bias))
    assert loss[2] == torch.inf
    assert entropy.isfinite().all()


def test_one_huge_logit_leaves_no_doubt() -> None:
    hidden, weight = torch.ones(3, 8), torch.zeros(9001, 8)
    weight[8500] = 1e6
    loss, entropy = loss_and_entropy(hidden, torch.tensor([8500, 0, -100]), LinearHead(weight))
    assert loss[:2].tolist() == [0.0, 8e6]
    assert entropy.max() < 1e-30


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_alone_with_it(dtype: torch.dtype, bad: float) -> None:
    hidden, labels, head = made(600, 33, 9001, dtype, bias=True, softcap=30.0)
    right = loss_and_entropy(hidden, labels, replace(head, softcap=None))
    hidden[5, 7], hidden[555] = bad, bad
    hit = torch.zeros(600, dtype=torch.bool)
    hit[[5, 555]] = True
    found = loss_and_entropy(hidden, labels, replace(head, softcap=None))
    for ours, usual in zip(found, right, strict=True):
        assert torch.equal(ours[~hit], usual[~hit])
        assert not ours[hit].isfinite().any()
    assert loss_and_entropy(hidden, labels, head)[0][~hit].isfinite().all()


def test_rows_know_nothing_of_each_other() -> None:
    hidden, labels, head = made(1031, 33, 9001, torch.bfloat16, bias=True)
    together = loss_and_entropy(hidden, labels, head)
    order = torch.randperm(1031, generator=torch.Generator().manual_seed(0))
    shuffled = loss_and_entropy(hidden[order], labels[order], head)
    alone = loss_and_entropy(hidden[700:701], labels[700:701], head)
    for all_of_them, moved, one in zip(together, shuffled, alone, strict=True):
        torch.testing.assert_close(moved, all_of_them[order])
        torch.testing.assert_close(one, all_of_them[700:701])
    again = loss_and_entropy(hidden, labels, head)
    assert all(map(torch.equal, together, again))


def test_any_strides() -> None:
    hidden, labels, head = made(129, 33, 2053, torch.float32, bias=True)
    right = loss_and_entropy(hidden, labels, head)
    columns = LinearHead(head.weight.T.contiguous().T, torch.stack([head.bias] * 2, 1)[:, 0])
    wide = torch.zeros(129, 66)
    wide[:, ::2] = hidden
    found = loss_and_entropy(wide[:, ::2], torch.stack([labels] * 2, 1)[:, 0], columns)
    for ours, same in zip(found, right, strict=True):
        torch.testing.assert_close(ours, same)


def test_under_autocast_it_computes_as_the_head_would() -> None:
    """float32 weights and states, bfloat16 products: the values of the model's own head."""
    hidden, labels, head = made(129, 33, 9001, torch.float32, bias=True)
    low = LinearHead(head.weight.bfloat16(), head.bias.bfloat16())
    expected = loss_and_entropy(hidden.bfloat16(), labels, low)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_entropy(hidden, labels, head)
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=0, atol=0)
        wide = [each.double() for each in (hidden, head.weight, head.bias)]
        loss, _ = loss_and_entropy(wide[0], labels, LinearHead(*wide[1:]))
    torch.testing.assert_close(loss, reference(hidden, labels, head)[0])
    # The same without autocast: the states decide.
    for ours, right in zip(
        loss_and_entropy(hidden.bfloat16(), labels, head), expected, strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_never_made_nor_is_a_second_weight(autocast: bool) -> None:
    hidden, labels, head = made(1031, 16, 50261, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Largest() as seen:
        loss_and_entropy(hidden, labels, head)
    logits = 1031 * 50261 * 4
    assert seen.bytes <= 2**24, f"{seen.bytes} of {logits} bytes"
    hidden, labels, head = made(1, 100, 50261, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Largest() as seen:
        loss_and_entropy(hidden, labels, head)
    assert seen.bytes <= 8192 * 100 * 4, f"{seen.bytes} of {head.weight.nbytes} bytes"


def test_nothing_is_touched_and_nothing_learns() -> None:
    hidden, labels, head = made(129, 33, 31, torch.float32, bias=True, scale=2.0, softcap=9.0)
    for each in (hidden, head.weight, head.bias):
        assert each is not None
        each.requires_grad_()
    before = [each.detach().clone() for each in (hidden, labels, head.weight, head.bias)]
    loss, entropy = loss_and_entropy(hidden, labels, head)
    assert not loss.requires_grad
    assert not entropy.requires_grad
    for was, now in zip(before, (hidden, labels, head.weight, head.bias), strict=True):
        assert torch.equal(was, now)
        assert now._version == 0
    state = torch.get_rng_state()
    loss_and_entropy(hidden, labels, head)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_that_it_stands_for(kind: str) -> None:
    hidden, _, head = made(7, 33, 31, torch.bfloat16, **KINDS[kind])
    logits = functional.linear(hidden, head.weight, head.bias).float()
    torch.testing.assert_close(head.logits(hidden), capped(logits, head))
    before = hidden.clone()
    head.logits(hidden)
    assert torch.equal(hidden, before)


def test_heads_that_cannot_be_are_refused() -> None:
    weight = torch.zeros(31, 8)
    with pytest.raises(ValueError, match=r"weight must be floating, \[V, H\]"):
        LinearHead(weight[0])
    with pytest.raises(ValueError, match=r"weight must be floating, \[V, H\]"):
        LinearHead(weight.long())
    with pytest.raises(ValueError, match=r"bias must be \[31\], got \[8\]"):
        LinearHead(weight, torch.zeros(8))
    for scale in (math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be a finite number"):
            LinearHead(weight, scale=scale)
    for softcap in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="softcap must be a number above 0"):
            LinearHead(weight, softcap=softcap)


def test_states_and_labels_must_fit() -> None:
    head = LinearHead(torch.zeros(31, 8))
    with pytest.raises(ScoringError, match=r"hidden \[M, 8\], got \[3, 9\]"):
        loss_and_entropy(torch.zeros(3, 9), torch.zeros(3).long(), head)
    with pytest.raises(ScoringError, match=r"hidden \[M, 8\], got \[2, 3, 8\]"):
        loss_and_entropy(torch.zeros(2, 3, 8), torch.zeros(6).long(), head)
    with pytest.raises(ScoringError, match=r"integer labels \[3\], got torch.float32 \[3\]"):
        loss_and_entropy(torch.zeros(3, 8), torch.zeros(3), head)
    with pytest.raises(ScoringError, match=r"integer labels \[3\], got torch.int64 \[4\]"):
        loss_and_entropy(torch.zeros(3, 8), torch.zeros(4).long(), head)
    loss, _ = loss_and_entropy(torch.zeros(3, 8), torch.zeros(3, dtype=torch.int32), head)
    torch.testing.assert_close(loss, torch.full((3,), math.log(31)))


def test_it_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_and_entropy(*made(7, 33, 31, torch.bfloat16))


def test_a_kernel_that_does_not_run_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton wants a compiler of C, and a GPU that it knows; scoring goes on without."""

    def tiles(*args: Any) -> Tensor:
        raise RuntimeError("no compiler of C")

    module = ModuleType("siftloader.kernels")
    module.tiles = tiles  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "siftloader.kernels", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cpu")
    fused._tried.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"Triton does not run here \(RuntimeError: no comp"):
            assert fused._tried(device, torch.bfloat16) is None
        assert fused._tried(device, torch.bfloat16) is None
        # Not even tried on a GPU before Ampere, nor where Triton is not installed.
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert fused._tried(device, torch.float16) is None
        monkeypatch.setitem(sys.modules, "siftloader.kernels", None)
        assert fused._tried(device, torch.float32) is None
        # One that runs is used.
        module.tiles = lambda *args: torch.zeros(4, 1, 16)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "siftloader.kernels", module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert fused._tried(torch.device("cpu", 0), torch.float32) is module.tiles
    finally:
        fused._tried.cache_clear()
