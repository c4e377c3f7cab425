"""Logits that are not made: what a model's last product is of, and what its forward does with it.

    with Deferring():
        logits = 30 * torch.tanh(functional.linear(hidden, weight) / 30)
    logits.made.hidden, logits.made.head()      # [m, H], LinearHead(weight, softcap=30.0)

Letters: m positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from siftloader.fused import LinearHead


class Undeferred(Exception):
    """These logits must be made: they are not a linear head's, or something wants to look at them."""


class Deferring(TorchFunctionMode):
    """What is multiplied with a weight by ``linear`` is not: it becomes deferred logits."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.linear:
            return _deferred(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _deferred(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Deferred:  # noqa: A002
    tensors = [input, weight] if bias is None else [input, weight, bias]
    fits = weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])
    if not all(map(_is_plain, tensors)) or not fits or input.ndim < 2:
        kinds = ", ".join(f"{type(each).__name__} {each.dtype}" for each in tensors)
        raise Undeferred(f"the head multiplies {kinds}")
    # In the precision of now, which autocast decides; seen on nothing.
    none = functional.linear(
        input.reshape(-1, input.shape[-1])[:0], weight[:1], None if bias is None else bias[:1]
    )
    hidden = input.reshape(-1, input.shape[-1]).to(none.dtype)
    shaped = none.new_empty((*input.shape[:-1], len(weight)), device="meta")
    return Deferred(_Made(hidden, weight, bias), shaped)


@dataclass(frozen=True)
class _Made:
    """Logits as what they are made of: ``outer * act(inner * (hidden @ weight.T + bias)) + constant``.

    ``act`` is tanh where they are capped, else nothing and ``outer`` 1. No softmax sees the constant.
    """

    hidden: Tensor  # [m, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    inner: float = 1.0
    outer: float = 1.0
    capped: bool = False
    moved: bool = False  # whether the constant is not 0

    def head(self) -> LinearHead:
        if not self.capped:
            return LinearHead(self.weight, self.bias, self.inner)
        # c tanh(i z) = c tanh((i c) z / c), whatever the signs.
        return LinearHead(self.weight, self.bias, self.inner * self.outer, abs(self.outer))

    def scaled(self, factor: float) -> _Made | None:
        if not math.isfinite(factor) or factor == 0:
            return None
        if self.capped:
            return replace(self, outer=self.outer * factor)
        return replace(self, inner=self.inner * factor)

    def bounded(self, factor: float) -> _Made | None:
        # tanh, and 2 sigmoid(x) - 1 = tanh(x / 2)
        if self.capped or self.moved:
            return None
        return replace(self, inner=self.inner * factor, outer=factor, capped=True)

    def plus(self, other: Any, classes: int, dtype: torch.dtype) -> _Made | None:
        if _is_number(other):
            return replace(self, moved=True)
        if self.capped or not isinstance(other, Tensor) or not _is_plain(other):
            return None
        if torch.promote_types(dtype, other.dtype) != self.hidden.dtype:
            return None  # added in a better precision than the head's own bias would be
        if other.shape[-1:] != (classes,) or other.numel() != classes:
            return None
        more = other.reshape(classes) / self.inner
        return replace(self, bias=more if self.bias is None else self.bias + more)

    def only(self, classes: range) -> _Made | None:
        if classes.step != 1 or not len(classes):
            return None
        part = slice(classes.start, classes.stop)
        bias = None if self.bias is None else self.bias[part]
        return replace(self, weight=self.weight[part], bias=bias)


_ATEN = torch.ops.aten
# Another shape or precision, the same logits in the same order while the last dimension stays.
_SAME = {
    _ATEN._to_copy.default,
    _ATEN._unsafe_view.default,
    _ATEN.alias.default,
    _ATEN.clone.default,
    _ATEN.detach.default,
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.unsqueeze.default,
    _ATEN.view.default,
}
# What asks logits for no more than their precision and device.
_WITHOUT_DATA = {
    _ATEN.new_empty.default,
    _ATEN.new_full.default,
    _ATEN.new_ones.default,
    _ATEN.new_zeros.default,
}


@final
class Deferred(Tensor):
    """Logits that were not made: their shape, dtype and device, and what they are made of.

    It has no data. What makes other logits of it that a linear head has, too, gives another of its kind;
    whatever else is done with it raises Undeferred.
    """

    made: _Made
    _shaped: Tensor  # on no device

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, made: _Made, shaped: Tensor) -> Deferred:
        """The logits ``made`` stands for, in the shape and precision of ``shaped``."""
        found: Deferred = Tensor._make_wrapper_subclass(
            cls,
            shaped.shape,
            strides=shaped.stride(),
            dtype=shaped.dtype,
            device=made.hidden.device,
        )
        found.made, found._shaped = made, shaped
        # A kernel that asks for its address is to fail on the host: on a GPU it would read at 0.
        torch._C._set_throw_on_mutable_data_ptr(found)
        return found

    def __init__(self, made: _Made, shaped: Tensor) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        logits = args[0]
        if not isinstance(logits, cls) or any(isinstance(each, cls) for each in args[1:]):
            raise Undeferred(str(func))
        if kwargs.get("device") not in (None, logits.device):
            raise Undeferred(f"{func} to another device")
        if func in _WITHOUT_DATA:
            hidden = logits.made.hidden
            return func(hidden, *args[1:], **{"dtype": logits.dtype, **kwargs})
        kwargs.pop("device", None)
        made = _after(func, logits, args[1:], kwargs)
        if made is None:
            raise Undeferred(str(func))
        shaped = func(logits._shaped, *map(_shape_of, args[1:]), **kwargs)
        if shaped.shape[-1:] != (len(made.weight),) or not shaped.is_floating_point():
            raise Undeferred(f"{func} to {tuple(shaped.shape)} {shaped.dtype}")
        return cls(made, shaped)


def _after(func: Any, logits: Deferred, others: Any, kwargs: dict[str, Any]) -> _Made | None:
    made, kind = logits.made, func.overloadpacket
    if func in _SAME:
        return made
    if func == _ATEN.slice.Tensor:
        dimension = others[0] if others else 0
        size = logits.shape[dimension]
        kept = range(size)[slice(*(*others[1:], *[None] * 3)[:3])]
        if dimension in (-1, logits.ndim - 1):
            return made.only(kept)
        return made if kept == range(size) else None
    if kwargs or func in (_ATEN.div.Tensor_mode, _ATEN.div.Scalar_mode):
        return None  # rounded, or with an alpha
    if kind in (_ATEN.mul, _ATEN.div) and _is_number(others[0]):
        number = float(others[0])
        return made.scaled(number if kind is _ATEN.mul else 1 / number if number else 0)
    if func == _ATEN.tanh.default:
        return made.bounded(1.0)
    if func == _ATEN.sigmoid.default:
        return made.bounded(0.5)
    if func == _ATEN.add.Tensor:
        return made.plus(others[0], logits.shape[-1], logits.dtype)
    return None


def _shape_of(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain(tensor: Tensor) -> bool:
    # Not one that is spread over ranks, or quantised: those know another product.
    plain = type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)
    return plain and tensor.is_floating_point() and tensor.layout == torch.strided
