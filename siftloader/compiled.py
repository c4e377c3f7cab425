"""A forward that torch.compile made quick for the shapes that come again and again; eager for all others.

    trunk = Compiled(bert.forward, mode=True, unmoved=run)
    hidden = trunk(ids, mask)           # eager at first, compiled from the third call of one shape on

One graph for a shape, at most ``SHAPES`` of them. Dynamo keeps what it compiled, and counts how often, at code
objects; the classes of a model share those with everyone. So each graph gets a code object of its own, and is
whole (``fullgraph``): nothing that is called within it is ever compiled by itself, and a model that is
compiled for training has the graphs, and the recompilations, that it would have without us.

Letters: P samples, T positions, H hidden size.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from siftloader.batches import leaves


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
SHAPES = 4
# The end of an epoch has a shape of its own, once; tests of the first pool have theirs, once or twice.
SIGHTS = 3
# Compilations in all: weights that change their dtype, or cease to need gradients, cost one more each.
GRAPHS = 4 * SHAPES
# Shapes that are counted but not compiled, lest lengths that never repeat be remembered for ever.
COUNTED = 256

Forward: TypeAlias = Callable[..., Any]
# Runs a function and puts back the random streams that it moved; whether there was one.
Unmoved: TypeAlias = Callable[[Callable[[], Any]], tuple[Any, bool]]


def check_mode(mode: object) -> bool | str:
    """``mode`` as it is: False, True or a mode of torch.compile; ValueError for anything else."""
    if isinstance(mode, bool) or mode in MODES:
        return mode
    raise ValueError(
        f"compile must be True, False or one of torch.compile's modes ({', '.join(MODES)}), "
        f"got {mode!r}"
    )


class Listening(TorchFunctionMode):
    """A mode that wants to hear what no layer does: with nothing else on, layers run compiled."""


@final
class Compiled:
    """Call ``forward`` without gradients, compiled where the same shapes came before.

    What the compiled forward returns is compared with the eager one's once for each shape. Where they differ,
    where it cannot be compiled in one piece, or where it draws random numbers, it stays eager, with one warning
    that says why, and that others with the same ``told`` do not repeat. Compiling takes seconds to minutes, and
    sets the random streams of all threads back to its beginning, so only the thread that made this compiles.
    ``tensors`` lists the weights it reads, on which dynamo leaves marks that are taken off again.
    """

    def __init__(
        self,
        forward: Forward,
        mode: bool | str,
        unmoved: Unmoved,
        tensors: Callable[[], Iterator[Tensor]],
        told: set[str],
    ) -> None:
        self._forward, self._unmoved, self._tensors = forward, unmoved, tensors
        self._backend = _Backend(None if mode is True else str(mode))
        self._sights: dict[Any, int] = {}
        self._graphs: dict[Any, Forward] = {}
        self._eager = False  # for good
        self._told = told
        self._thread = threading.get_ident()
        self.pending = False  # whether what ran last will be compiled when it comes again

    @property
    def graphs(self) -> int:
        """How many graphs were compiled so far."""
        return self._backend.graphs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` returns."""
        listened = _listened()
        if self._eager or torch.is_grad_enabled() or listened is None:
            return self._forward(*args, **kwargs)
        with torch._C.DisableTorchFunction() if listened else nullcontext():
            return self._run((listened, _kind((args, kwargs))), args, kwargs)

    def _run(self, kind: Any, args: Any, kwargs: Any) -> Any:
        self.pending = False
        if kind in self._graphs:
            return self._compiled(self._graphs[kind], args, kwargs)
        if threading.get_ident() == self._thread and self._is_due(kind):
            return self._first(kind, args, kwargs)
        return self._forward(*args, **kwargs)

    def _is_due(self, kind: Any) -> bool:
        if len(self._sights) >= COUNTED:
            self._sights.clear()
        self._sights[kind] = self._sights.get(kind, 0) + 1
        seen, room = self._sights[kind] >= SIGHTS, len(self._graphs) < SHAPES
        self.pending = room and not seen
        if room or not seen:
            return room and seen
        self._warn(
            "shapes",
            f"compile: the pools come in more than {SHAPES} shapes; {SHAPES} are compiled, all others are "
            f"scored without; pad them to one length, or to a few",
        )
        return False

    def _first(self, kind: Any, args: Any, kwargs: Any) -> Any:
        # Both ways, and the eager result: a backend that errs must not decide even once.
        expected, drew = self._unmoved(lambda: self._forward(*args, **kwargs))
        if drew:
            self._give_up("it draws random numbers in evaluation mode too")
            return expected
        try:
            compiled = torch.compile(
                _with_own_code(self._forward), backend=self._backend, dynamic=False, fullgraph=True
            )
            with _unmarked(self._tensors):
                found, _ = self._unmoved(lambda: compiled(*args, **kwargs))
            agree = _agree(found, expected)
        except Exception as error:  # dynamo's, the backend's, the compiler's: of any kind
            self._give_up(_reason(error))
            return expected
        if not agree:
            self._give_up("compiled, it returned something else")
            return expected
        self._graphs[kind] = compiled
        return expected

    def _compiled(self, compiled: Forward, args: Any, kwargs: Any) -> Any:
        before = self.graphs
        try:
            found = compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise  # eager takes no less
        except Exception as error:
            self._give_up(_reason(error))  # an error of the model's own comes again
            return self._forward(*args, **kwargs)
        if self.graphs > before:
            _unmark(self._tensors())
            if self.graphs > GRAPHS:
                self._give_up(f"it was compiled {self.graphs} times, as something in it changes")
        return found

    def _give_up(self, reason: str) -> None:
        self._eager = True
        self._graphs.clear()
        self._warn("eager", f"compile: {_name(self._forward)} is scored without: {reason}")

    def _warn(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(message, stacklevel=2)


@final
class _Backend:
    """Inductor, but it counts its graphs. Dynamo never forgets a backend, so it must hold nobody else."""

    def __init__(self, mode: str | None) -> None:
        self.graphs = 0
        self._mode, self._thread = mode, threading.get_ident()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Forward:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "something in it changed, and beside the training step nothing can be compiled"
            )
        self.graphs += 1
        return inductor(graph, inputs, self._mode)


def inductor(graph: torch.fx.GraphModule, inputs: list[Any], mode: str | None) -> Forward:
    """``graph`` compiled by inductor as torch.compile(mode=mode) does."""
    import torch._inductor as inductor

    made: Forward = inductor.compile(
        graph, inputs, options=inductor.list_mode_options(mode) if mode else None
    )
    return made


def _with_own_code(forward: Forward) -> Forward:
    # Functions that one `def` makes share its code object; a replaced one is an object of its own.
    def scored(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    code = scored.__code__.replace()
    return FunctionType(code, scored.__globals__, "scored", None, scored.__closure__)


MARK = "_dynamo_static_input_type"


@contextmanager
def _unmarked(tensors: Callable[[], Iterator[Tensor]]) -> Iterator[None]:
    # Dynamo notes on every weight that its address does not change: no trace of us is to stay on the live ones.
    marked = {id(each) for each in tensors() if hasattr(each, MARK)}
    try:
        yield
    finally:
        _unmark(each for each in tensors() if id(each) not in marked)


def _unmark(tensors: Iterator[Tensor]) -> None:
    for each in tensors:
        if each.__dict__.get(MARK) == "unguarded":  # a user's own mark is a guarded one
            del each.__dict__[MARK]


def _listened() -> bool | None:
    # None where something watches that a graph would hide from: a counter of FLOPs, say.
    if torch._C._len_torch_dispatch_stack():
        return None
    kinds = [type(each) for each in _get_current_function_mode_stack()]  # type: ignore[no-untyped-call]
    if kinds and all(issubclass(each, Listening) for each in kinds):
        return True
    # A default device is a mode, too, but it watches nobody.
    return False if all(each is DeviceContext for each in kinds) else None


def _kind(value: Any) -> Any:
    # All that dynamo would guard by, as far as it may change from call to call.
    device = next((each.device.type for each in leaves(value) if isinstance(each, Tensor)), "cpu")
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return autocast, _shape(value)


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_shape, value))
    if isinstance(value, Mapping):
        return tuple((name, _shape(each)) for name, each in value.items())
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    return type(value)


def _agree(found: Any, expected: Any) -> bool:
    pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
    return all(one.shape == other.shape and _close(one, other) for one, other in pairs)


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in leaves(value) if isinstance(each, Tensor)]


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.dtype != expected.dtype or not expected.is_floating_point():
        return found.dtype == expected.dtype and torch.equal(found, expected)
    # Where both are nothing (rows of padding alone) there is nothing to compare.
    real = expected.isfinite()
    if not torch.equal(found.isfinite(), real):
        return False
    scale = torch.where(real, expected, 0).abs().amax().clamp_min(1e-6)
    off = torch.where(real, found - expected, 0).abs().amax()
    return bool(off <= _precision(expected) ** 0.5 * scale)


def _precision(tensor: Tensor) -> float:
    # Of the coarsest numbers in it: what autocast takes for products, and TF32 on a GPU.
    kind, found = tensor.device.type, torch.finfo(tensor.dtype).eps
    if torch.is_autocast_enabled(kind):
        found = max(found, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    return max(found, 2**-10) if kind == "cuda" and tensor.dtype == torch.float32 else found


def _name(forward: Forward) -> str:
    return type(getattr(forward, "__self__", forward)).__name__


def _reason(error: Exception) -> str:
    # The first line that says something: dynamo's errors go on for pages, and wrap those of a backend.
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]
