"""Scores of the next pool while the training step runs: one step stale, and ordered against the optimizer.

    overlap = Overlap(lambda: model)
    overlap.start(job, device)       # reads the weights of now, beside what the loop does next
    ...                              # the loop trains; its optimizer waits before it writes
    scores = overlap.result()        # None where something else wrote meanwhile

On a GPU the job is put on a stream of its own, ordered after all that was put on the loop's stream so far:
after the writes of the step before. On the host it runs in a thread. The optimizers of the model wait, by torch's
own hook before a step, until the job has read the weights; those of other models never do. Writes that no optimizer
of torch makes (weights swapped for an evaluation, updates by hand) are seen by the versions of the weights, and the
result is then not to be used. Writes through ``.data`` cannot be seen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


Result = TypeVar("Result")
# What a job gets, and calls when it has read the weights for good; returning does as well.
HasRead = Callable[[], None]


@final
class _Pending(Generic[Result]):
    """A job under way."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._weights: list[Tensor] = list(model.parameters())
        self._ids = frozenset(map(id, self._weights))
        self._before = _versions(self._weights)
        self._ordered = (
            False  # an optimizer waited: what it writes now, and others after it, does no harm
        )
        self._spoiled = False
        self._read = threading.Event()  # the weights are read, or the GPU was told to
        self._read_on_gpu: torch.cuda.Event | None = None
        self._done_on_gpu: torch.cuda.Event | None = None
        self._future: Future[Result] = Future()

    def result(self) -> Result | None:
        """What the job returned, or raises; None where the weights were written while it may have read them."""
        self.wait()
        self._look()
        return None if self._spoiled else self._future.result()

    def wait(self) -> None:
        """Until the job is done: the host, or on a GPU the stream of now."""
        self._future.exception()
        if self._done_on_gpu is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done_on_gpu)

    def hold(self) -> None:
        """Before weights are written: until the job has read them."""
        self._look()
        self._read.wait()
        self._ordered = True  # not before: who interrupts the wait may go on to write
        if (
            self._read_on_gpu is not None
        ):  # on the stream that is to write, of which there may be several
            torch.cuda.current_stream(self._device).wait_event(self._read_on_gpu)

    def is_written_by(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` has one of the weights."""
        groups = optimizer.param_groups
        return any(id(each) in self._ids for group in groups for each in group["params"])

    def run(self, job: Callable[[HasRead], Result], stream: torch.cuda.Stream | None) -> None:
        """Do it, in this thread; on a GPU that is to put it on ``stream``.

        Whatever happens, nobody waits for it afterwards. Interrupts are raised here, too.
        """
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                try:
                    found = job(self._has_read)
                finally:
                    if stream is not None:
                        self._done_on_gpu = stream.record_event()
        except BaseException as error:
            self._release()
            self._future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._release()
            self._future.set_result(found)

    def _look(self) -> None:
        if not self._ordered:  # at the parameters of now, of which some may be other ones
            self._spoiled |= _versions(self._model.parameters()) != self._before

    def _has_read(self) -> None:
        if self._device.type == "cuda" and not self._read.is_set():
            self._read_on_gpu = torch.cuda.current_stream(self._device).record_event()
        self._read.set()

    def _release(self) -> None:
        if not self._read.is_set():
            self._read_on_gpu = self._done_on_gpu
            self._read.set()


@final
class Overlap:
    """Run one job at a time beside the training step of the model that ``find`` returns.

    ``in_thread`` says that the job occupies the host though the weights lie on a GPU: scoring on the CPU by a copy.
    Listens to the optimizers of the process from the first job until ``close``.
    """

    def __init__(self, find: Callable[[], nn.Module], in_thread: bool = False) -> None:
        self._find, self._in_thread = find, in_thread
        self._pending: _Pending[Any] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._handle: RemovableHandle | None = None

    def start(
        self, job: Callable[[HasRead], Any], device: torch.device, reads: Iterable[Tensor] = ()
    ) -> None:
        """Begin; the job before it is waited for. ``device`` is that of the weights.

        ``reads`` are the job's own inputs: their memory is not used again before it is done with them.
        """
        self.drop()
        self._listen()
        pending = self._pending = _Pending(self._find(), device)
        try:
            stream = self._stream(device) if device.type == "cuda" else None
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(device))
                for tensor in reads:
                    if tensor.device.type == "cuda":
                        tensor.record_stream(stream)
            if stream is not None and not self._in_thread:
                pending.run(job, stream)
            else:
                if self._threads is None:
                    # One, and always the same: a thread that begins builds its own team of workers.
                    self._threads = ThreadPoolExecutor(1, "siftloader-scoring")
                self._threads.submit(pending.run, job, stream)
        except BaseException:
            # An interrupt, or no further thread can be had: it is over, or never begins. Nobody may wait for it.
            self._end_thread()
            self._pending = None
            raise

    @property
    def runs(self) -> bool:
        """Whether there is a job whose result nobody has asked for."""
        return self._pending is not None

    def result(self) -> Any:
        """What the job under way returned, or raises; None if the weights were written while it may have read them."""
        pending = self._pending
        assert pending is not None
        pending.wait()
        self._pending = None  # not before: an interrupt of the wait leaves it under way
        return pending.result()

    def drop(self) -> None:
        """Wait for the job under way, if there is one, and forget it."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def close(self) -> None:
        """Wait for the job under way and listen to no optimizer any more; a further ``start`` begins anew."""
        self.drop()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._end_thread()

    def before(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""
        if self._pending is not None and self._pending.is_written_by(optimizer):
            self._pending.hold()

    def _end_thread(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def _listen(self) -> None:
        while _GONE:
            _GONE.pop().remove()
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(_Listener(self))
            # Not taken off by the collector of garbage, which may run while torch walks its hooks.
            weakref.finalize(self, _GONE.append, self._handle).atexit = False

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


_GONE: list[RemovableHandle] = []  # hooks of what was never closed; those hear nothing


@final
class _Listener:
    # Holds nobody alive: torch keeps this hook for the whole process.
    def __init__(self, overlap: Overlap) -> None:
        self._overlap = weakref.ref(overlap)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (overlap := self._overlap()) is not None:
            overlap.before(optimizer)


def _versions(weights: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    return [
        (id(each), 0 if each.is_inference() else each._version, each.data_ptr())
        for each in weights
    ]
