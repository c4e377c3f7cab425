"""In which precision to score: the loop's, given or learned from its first forward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
        self._dtype = dtype
        self._left = WATCHES
        self._hook: RemovableHandle | None = None

    @property
    def name(self) -> str | None:
        """The dtype given or learned, as JSON has it."""
        return None if self._dtype is None else str(self._dtype).removeprefix("torch.")

    @name.setter
    def name(self, name: str | None) -> None:
        if name is not None:
            self._dtype = getattr(torch, name)

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """To score in; without autocast's cache.

        Casts made in it, without gradients, must not be found by the training step.
        """
        dtype = self._dtype
        if dtype is None and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype, cache_enabled=False)

    def watch(self, model: nn.Module, device: torch.device) -> None:
        """Learn from the next forward of ``model`` in training mode, once.

        By a hook on the model as it was given, gone after that forward or with ``unwatch``. A compiled
        graph does not see it: for models compiled in place, or given without the wrapper of
        ``torch.compile`` that the loop calls, the dtype must be given.
        """
        if self._dtype is not None or not self._left:
            return
        self._left -= 1

        def look(module: nn.Module, args: Any) -> None:
            # Shells carry copies of hooks.
            if torch.compiler.is_compiling() or module is not model or not module.training:
                return
            if torch.is_autocast_enabled(device.type):
                self._dtype = torch.get_autocast_dtype(device.type)
            self._left = 0
            self.unwatch()

        self._hook = model.register_forward_pre_hook(look)

    def unwatch(self) -> None:
        """Take the hook off, whether or not it saw a forward."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
