"""A GPU that is none: its tensors say ``cuda:0``, are computed on the host, and whoever waits for them is told.

    with Gpu() as gpu:
        model = gpu.moved(model)
        gpu.waits.clear()
        ...                         # a step
    assert not gpu.waits            # names of operators that would have waited, and from where

A wait is what ``torch.cuda.set_sync_debug_mode("error")`` refuses (a value asked for, a size that depends on
values, a blocking copy), and, stricter, an asynchronous copy from memory that is not pinned.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


DEVICE = torch.device("cuda:0")
# Operators whose result, or its size, the host must know.
ASKS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "histc", "multinomial_asks",
    "repeat_interleave",
}  # fmt: skip
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class OnGpu(Tensor):
    """Claims to lie on ``cuda:0``; ``held`` is the tensor that it is."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        # A torch without CUDA can guard no device but "meta"; the keys say for whom autocast casts.
        size, strides = held.shape, held.stride()
        with torch._C._DisableTorchDispatch():
            shape = torch.empty_strided(size, strides, dtype=held.dtype, device="meta")
            out = Tensor._make_subclass(cls, shape, False, device_for_backend_keys=DEVICE)
        out.held = held
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a tensor of the simulated GPU, outside of `with Gpu()`")

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def is_meta(self) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        stream.uses.append(self)

    def __repr__(self) -> str:
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"


class Gpu(TorchDispatchMode):
    """The device, while it is entered; ``waits`` holds what would have waited for it."""

    device = DEVICE

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.pinned: list[Any] = []  # storages, kept so that no address is used again
        self.finishes = True  # whether events are over when they are asked
        self.current: Any = None
        self.copied_on: list[Any] = []  # the stream of every copy to the device

    def __enter__(self) -> Gpu:
        self._lifts = torch._C._only_lift_cpu_tensors()
        # torch.tensor([...], device=...) is then made on the host, and copied in sight
        torch._C._set_only_lift_cpu_tensors(True)
        # module.to(device) then makes new parameters, rather than new data for the old ones
        self._overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._patched = ExitStack()
        for name, value in self._of_torch().items():
            self._patched.enter_context(patch.object(torch.cuda, name, value))
        # autocast asks by this whether there is a GPU
        self._patched.enter_context(
            patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patched.close()
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrites)

    def _of_torch(self) -> dict[str, Any]:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
                self.stream: Any = None

            def record(self, stream: Any = None) -> None:
                self.stream = stream or gpu.current

            def wait(self, stream: Any = None) -> None:
                (stream or gpu.current).wait_event(self)

            def query(self) -> bool:
                return gpu.finishes

            def synchronize(self) -> None:
                gpu._note("Event.synchronize")

            def elapsed_time(self, end: Any) -> float:
                return 1.0

        class Stream:
            def __init__(self, device: Any = None, priority: int = 0) -> None:
                self.uses: list[Tensor] = []
                self.after: set[Any] = set()  # streams it waited for

            def record_event(self, event: Any = None) -> Any:
                event = event or Event()
                event.record(self)
                return event

            def wait_event(self, event: Any) -> None:
                self.after |= {event.stream} | (event.stream.after if event.stream else set())

            def wait_stream(self, stream: Any) -> None:
                self.wait_event(stream.record_event())

            def synchronize(self) -> None:
                gpu._note("Stream.synchronize")

        @contextmanager
        def stream(new: Any) -> Iterator[None]:
            before, gpu.current = gpu.current, new
            try:
                yield
            finally:
                gpu.current = before

        gpu.current = Stream()
        return {
            "Event": Event,
            "Stream": Stream,
            "stream": stream,
            "current_stream": lambda device=None: gpu.current,
            "default_stream": lambda device=None: gpu.current,
            "synchronize": lambda device=None: gpu._note("torch.cuda.synchronize"),
            "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda state, device=None: None,
            "_lazy_init": lambda: None,
            "current_device": lambda: 0,
            "is_bf16_supported": lambda *_: True,
        }

    def moved(self, model: nn.Module) -> nn.Module:
        """The model on this device, tied weights tied: for ``model.to``, which needs real storage."""
        memo: dict[int, nn.Parameter] = {}
        with torch.no_grad():
            for module in model.modules():
                for name, each in module._parameters.items():
                    if each is not None and not isinstance(each, OnGpu):
                        new = nn.Parameter(OnGpu(each.detach().clone()), each.requires_grad)
                        module._parameters[name] = memo.setdefault(id(each), new)
                for name, each in module._buffers.items():
                    if each is not None:
                        module._buffers[name] = OnGpu(each.clone())
        return model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        given = list(_tensors((args, kwargs)))
        here = [each for each in given if isinstance(each, OnGpu)]
        wanted = kwargs.get("device")
        to_gpu = wanted is not None and torch.device(wanted).type != "cpu"
        if name in ("_pin_memory", "pin_memory"):
            return self._pin(args[0].clone())
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if kwargs.pop("pin_memory", False):
            return self._pin(func(*args, **kwargs))
        if not here and not to_gpu:
            return func(*args, **kwargs)
        if name == "_fused_sdp_choice":
            return 0  # by plain operators: what the host would choose a GPU has not
        if name in ("_to_copy", "copy_"):
            return self._copied(name, func, args, kwargs, to_gpu)
        self._check(name, args, given)
        if to_gpu:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        written = [
            number for number, each in enumerate(func._schema.arguments)
            if each.alias_info is not None and each.alias_info.is_write
        ]  # fmt: skip
        if written and isinstance(out, Tensor):
            own = args[written[0]] if written[0] < len(args) else kwargs["out"]
            assert isinstance(own, OnGpu), f"{name} writes to the host"
            if own.shape != own.held.shape:
                raise NotImplementedError(f"{name} changes a shape in place")
            return own
        return tree_map(lambda each: OnGpu(each) if isinstance(each, Tensor) else each, out)

    def _copied(self, name: str, func: Any, args: Any, kwargs: Any, to_gpu: bool) -> Any:
        source = args[1] if name == "copy_" else args[0]
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        from_gpu = isinstance(source, OnGpu)
        if name == "copy_":
            to_gpu = isinstance(args[0], OnGpu)
        elif "device" not in kwargs or kwargs["device"] is None:
            to_gpu = from_gpu
        if to_gpu != from_gpu and source.numel():
            if to_gpu:
                self.copied_on.append(self.current)
            if waits:
                self._note("a blocking copy")
            elif to_gpu and not self._is_pinned(source):
                self._note("a copy from memory that is not pinned")
            elif not to_gpu and name == "copy_" and not self._is_pinned(args[0]):
                self._note("a copy to memory that is not pinned")
        if name == "copy_":
            _held(args[0]).copy_(_held(source))
            return args[0]
        kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None)
        if to_gpu and from_gpu and kwargs.get("dtype") in (None, source.dtype):
            return OnGpu(source.held)  # the very tensor, in truth
        out = func(_held(source), **kwargs)
        if to_gpu:
            return OnGpu(out)
        return self._pin(out) if not waits else out

    def _check(self, name: str, args: Any, given: list[Tensor]) -> None:
        if name in ASKS:
            self._note(name)
        if name in INDEXES:
            indices = [each for each in args[1] if isinstance(each, Tensor)]
            if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
                self._note(f"{name} with a mask")
            if not all(isinstance(each, OnGpu) for each in indices):
                self._note(f"{name} with indices of the host")
            given = [args[0]] if isinstance(args[0], Tensor) else []
        strange = [each for each in given if not isinstance(each, OnGpu)]
        if name.startswith("where") and strange:
            self._note("where with a number of the host as a tensor")
        if any(each.ndim for each in strange):
            shapes = [tuple(each.shape) for each in strange]
            raise RuntimeError(f"{name} of tensors on cuda:0 and on the host, {shapes}")

    def _note(self, what: str) -> None:
        stack = traceback.extract_stack()[:-2]
        stack = [
            each for each in stack if "/torch/" not in each.filename and each.filename != __file__
        ]
        own = [each for each in stack if "/siftloader/" in each.filename]
        where = stack[-1]
        self.waits.append(
            f"{what} at {where.filename.rsplit('/', 1)[-1]}:{where.lineno}"
            + (f" ({own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno})" if own else "")
        )

    def _pin(self, tensor: Tensor) -> Tensor:
        self.pinned.append(tensor.untyped_storage())
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        at = tensor.untyped_storage().data_ptr()
        return any(at == each.data_ptr() for each in self.pinned)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def _tensors(nest: Any) -> Any:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, (list, tuple)):
        for each in nest:
            yield from _tensors(each)
    elif isinstance(nest, dict):
        yield from _tensors(list(nest.values()))
