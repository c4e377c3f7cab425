"""In which precision to score: the loop's, given or learned from its first forward."""

from __future__ import annotations

import functools
import gc
import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


WATCHES = 256  # batches handed out without a forward of the model before one stops watching for it


@final
class Precision:
    """The autocast dtype of the loop; None for the model's own precision.

    Precision(torch.bfloat16)      # given
    Precision(None)                # that of the context scoring is called in, or learned with ``watch``
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = self._given = dtype
        self._left = WATCHES
        self.seen = False  # whether a forward in training mode was
        self._look: _Look | None = None

    @property
    def name(self) -> str | None:
        """The dtype given or learned, as JSON has it."""
        return None if self._dtype is None else str(self._dtype).removeprefix("torch.")

    @name.setter
    def name(self, name: str | None) -> None:
        if name is not None and self._given is None:  # an option weighs more than a saved state
            self._dtype = getattr(torch, name)

    def dtype(self, device: torch.device) -> torch.dtype | None:
        """That of autocast here and now; None where there is none."""
        if self._dtype is None and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self._dtype

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """To score in, as ``scoring_in`` of the dtype of now."""
        return scoring_in(self.dtype(device), device)

    def settle(self) -> None:
        """Watch no more: an earlier run knew."""
        self._left = 0

    @property
    def watches(self) -> bool:
        """Whether there is still something to learn, and patience for it."""
        return self._dtype is None and self._left > 0

    def watch(self, model: nn.Module, device: torch.device) -> None:
        """Learn from the next forward of ``model`` in training mode, once.

        By a hook on the model as it was given, gone after that forward or with ``unwatch``. A compiled
        graph does not see it: for models compiled in place, or given without the wrapper of
        ``torch.compile`` that the loop calls, the dtype must be given.
        """
        if self.watches:
            _heed_the_collector()
            self._left -= 1
            self._look = _Look(self, model, device.type)
            self._look.hook = model.register_forward_pre_hook(self._look)

    def learn(self, kind: str) -> None:
        """Learn from the autocast of now for devices of this kind, and watch no longer."""
        if torch.is_autocast_enabled(kind):
            self._dtype = torch.get_autocast_dtype(kind)
        self._left, self.seen = 0, True
        self.unwatch()

    def unwatch(self) -> None:
        """Take the hook off, whether or not it saw a forward.

        Where the collector of garbage ends an iterator, only the next forward takes it off: torch may be in the
        midst of walking the hooks.
        """
        if self._look is not None:
            self._look.end()
            self._look = None


def scoring_in(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast without its cache: casts made in it, without gradients, must not be found by the training step."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)


@final
class _Look:
    """The hook that looks. It keeps nobody alive, and its copy in a copied or saved model is blind."""

    def __init__(self, precision: Precision, model: nn.Module, kind: str) -> None:
        self._precision, self._model = weakref.ref(precision), weakref.ref(model)
        self._kind, self._over = kind, False
        self.hook: RemovableHandle | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        # Shells carry copies of hooks.
        if torch.compiler.is_compiling() or module is not self._model():
            return
        precision = self._precision()
        if self._over or precision is None:
            self.end()  # of those that torch calls now it has a list of its own
        elif module.training:
            precision.learn(self._kind)

    def end(self) -> None:
        """Look no more, and go as soon as that is safe."""
        self._over = True
        if self.hook is not None and not _COLLECTS:
            self.hook.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_blind,)


def _blind(module: nn.Module, args: Any) -> None:
    pass


_COLLECTS: list[bool] = []  # not empty while garbage is collected, in whatever thread


@functools.cache
def _heed_the_collector() -> None:
    def heed(phase: str, info: Any) -> None:
        _COLLECTS[:] = [True] if phase == "start" else []

    gc.callbacks.append(heed)
