"""Optimizer steps of one model, counted as they happen: what a step of the schedule may mean.

    updates = Updates(lambda: model)
    ...                               # the loop trains
    updates.steps                     # optimizer steps of this model so far

Loops that accumulate gradients take several batches to a step; a scaler may skip one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, final

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


@final
class Updates:
    """Count the steps of whichever optimizer owns a parameter of the model that ``find`` returns.

    Optimizers of other models do not count. Several that share the model (one for matrices, one for the
    rest; one inside another) count as one: a new step begins when one of them steps again.

    Nothing counts while ``counts`` is False: where torch's distributed checkpoints load an optimizer's state, they
    have it take a step of nothing.

    Listens to all optimizers of the process, for as long as this object lives, by one hook of torch's own.
    """

    def __init__(self, find: Callable[[], nn.Module]) -> None:
        self.steps, self.counts = 0, True
        self._find = find
        # That made the last step. Not all that ever did: a loop may go on with a new one, and keep the old one.
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        _LISTENING.add(self)
        _listen()

    def note(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        # Asked anew each time: wrapping a model, or freezing parts of it, changes whose parameters it has.
        if not self.counts or not owns(self._find(), optimizer):
            return
        if not self.optimizers or optimizer in self.optimizers:
            self.steps += 1
            self.optimizers.clear()
        self.optimizers.add(optimizer)


def owns(model: nn.Module, optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` writes a parameter of ``model``."""
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(each) in own for group in optimizer.param_groups for each in group["params"])


_LISTENING: weakref.WeakSet[Updates] = weakref.WeakSet()  # holds nobody alive


@functools.cache
def _listen() -> None:
    # One hook for the whole process, never taken off: a collector of garbage that took hooks off could do so while
    # torch walks them, in the midst of a step.
    register_optimizer_step_post_hook(_tell)


def _tell(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for updates in tuple(_LISTENING):
        updates.note(optimizer)
