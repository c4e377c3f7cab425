"""What frameworks ask of a loader beside its batches: a data set, and a sampler that is told the epoch.

    DataLoader.__init__(loader, Finished(loader), batch_size=None)
    loader.sampler = sampler_of(inner, Finished(loader), told=loader.set_epoch)

A framework that rebuilds a loader from its ``dataset`` keeps the sifted batches so; one that tells ``sampler``
the epoch tells the sampler inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from types import FrameType
from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
)

from siftloader.accelerated import begun_by
from siftloader.batches import Batch


class Finished(IterableDataset[Batch]):
    """The finished batches as a data set, so that a framework that rebuilds the loader keeps them.

    Its state is the loader's: some frameworks (Composer) ask the data set, and leave the loader alone.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __iter__(self) -> Iterator[Batch]:
        loader = begun_by(self)
        if loader is None:
            return iter(self._owner)
        if type(loader).__name__ != "SkipDataLoader":
            raise ValueError(
                f"accelerate made a {type(loader).__name__} of the data set of a SiftingDataLoader: ranks would "
                f"no longer have shares of their own, and no state would be saved; give accelerator.prepare() "
                f"the SiftingDataLoader itself"
            )
        rest: Iterator[Batch] = self._owner.without_first(loader.skip_batches)
        return rest

    def __len__(self) -> int:
        """Samples handed out per epoch."""
        return int(self._owner.epoch().samples)

    def state_dict(self, samples: int = 0, from_beginning: bool = True) -> dict[str, Any]:
        """That of the loader, which knows better than those who ask how many samples were drawn."""
        state: dict[str, Any] = self._owner.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self._owner.load_state_dict(state)


class _EpochTold(Sampler[None]):
    """What ``loader.sampler`` is for: loops that tell it the epoch, meant for the sampler inside."""

    def __init__(self, told: Callable[[int], None]) -> None:
        self.set_epoch = told

    def __iter__(self) -> Iterator[None]:
        return repeat(None)


class _InOrder(_EpochTold, SequentialSampler):  # type: ignore[misc]
    """The same over candidates that are not shuffled: frameworks ask for that type before they change anything."""

    def __init__(self, told: Callable[[int], None], batches: Finished) -> None:
        super().__init__(told)
        self.data_source = batches


class _Shared(_EpochTold, DistributedSampler[None]):
    """The same over candidates that a DistributedSampler deals out: Composer tells the epoch to that type alone."""

    def __init__(self, told: Callable[[int], None], sampler: DistributedSampler[Any]) -> None:
        self.__dict__.update(vars(sampler))
        super().__init__(told)


def sampler_of(inner: Any, batches: Finished, told: Callable[[int], None]) -> Sampler[None]:
    """What stands for the sampler of a loader over ``inner``, of the type that those who ask look for."""
    if isinstance(sampler := getattr(inner, "sampler", None), DistributedSampler):
        return _Shared(told, sampler)
    return _InOrder(told, batches) if _in_order(inner) else _EpochTold(told)


def _in_order(inner: Any) -> bool:
    if not isinstance(inner, DataLoader) or isinstance(inner.dataset, IterableDataset):
        return False
    sampler = getattr(inner.batch_sampler, "sampler", inner.batch_sampler or inner.sampler)
    return isinstance(sampler, SequentialSampler)


def kept_from(frame: FrameType | None) -> bool:
    """Whether a fit loop of Lightning among the callers keeps the state that a loader was to go on from.

    It gives states to the loaders that it sets up for a run, and to none that it has set up before it read them.
    """
    while frame is not None:
        # Of others not even the locals are looked at: Python then keeps what is in them for as long as they run.
        if frame.f_globals.get("__name__", "").endswith(
            ("pytorch.loops.fit_loop", "pytorch_lightning.loops.fit_loop")
        ):
            caller: Any = frame.f_locals.get("self")
            if states := getattr(caller, "_combined_loader_states_to_load", None):
                # One of before any batch, as lr_find restores, is no loss.
                done = [isinstance(each, dict) and each.get("stats", {}) for each in states]
                return bool(caller.restarting and any(each and each["samples"] for each in done))
        frame = frame.f_back
    return False
