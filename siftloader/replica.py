"""Copies of live tensors on another device, or apart from them on the same one, made anew when that is asked for.

    replica = Replica(torch.device("cuda:1"))
    weight = replica.of(model.head.weight)       # [V, H] there; a tied weight is one tensor there, too
    ...                                          # the model trains on; the copy stays as it is
    replica.fetch()                              # the weights of now

Letters: H hidden size, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from siftloader.errors import ScoringError
from siftloader.sharded import is_spread


PLAIN = {Tensor, nn.Parameter, nn.Buffer} if hasattr(nn, "Buffer") else {Tensor, nn.Parameter}


@final
class Replica:
    """Copies on ``device``, each made when its live tensor is first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # By the id of the live tensor, which is the same one while it lives.
        self._pairs: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._arriving: list[torch.cuda.Event] = []

    @property
    def bytes(self) -> int:
        """What the copies take."""
        return sum(copy.numel() * copy.element_size() for _, copy in self._pairs.values())

    def of(self, live: Tensor) -> Tensor:
        """The copy of a live tensor: of ``live`` as it was at the last fetch, or now if it is new."""
        known, copy = self._pairs.get(id(live), (None, None))
        if known is None or known() is not live or not _fits(cast(Tensor, copy), live):
            copy = self._room(live)
            self._pairs[id(live)] = weakref.ref(live), copy
            self._fill([(live, copy)])
        return cast(Tensor, copy)

    def placed(self, value: Any) -> Any:
        """``value`` with the copies of what tensors it holds; itself where it holds none."""
        if isinstance(value, Tensor):
            return self.of(value)
        if type(value) in (list, tuple) and _any_tensor(value):
            return type(value)(map(self.placed, value))
        if type(value) is dict and _any_tensor(value.values()):
            return {name: self.placed(each) for name, each in value.items()}
        return value

    def fetch(self, weights: bool = True, others: bool = True) -> None:
        """Copy the live tensors of now over the copies: parameters, and buffers and the like.

        From a GPU without waiting, on its stream of now: what that stream, or one that waits for it, does
        later may write to the live tensors. From the host they are read when this returns.
        """
        self._pairs = {
            key: (known, copy) for key, (known, copy) in self._pairs.items() if known() is not None
        }
        live = [(cast(Tensor, known()), copy) for known, copy in self._pairs.values()]
        self._fill(
            [
                (each, copy)
                for each, copy in live
                if _fits(copy, each) and (weights if isinstance(each, nn.Parameter) else others)
            ]
        )

    def wait(self) -> None:
        """Until what was fetched is there, where copies lie on the host; streams wait by themselves."""
        for event in self._arriving:
            event.synchronize()
        self._arriving.clear()

    def _room(self, live: Tensor) -> Tensor:
        if type(live) not in PLAIN:
            raise ScoringError(
                f"a weight is a {type(live).__name__}, of which no copy can be made to score on {self.device}; "
                f"score with the live model, without scorer_device="
            )
        # Pages that stay where they are: only to those a GPU copies while the host goes on.
        pinned = self.device.type == "cpu" and live.device.type == "cuda"
        with torch.no_grad():
            room = torch.empty_like(live, device=self.device, pin_memory=pinned)
        return nn.Parameter(room, requires_grad=False) if isinstance(live, nn.Parameter) else room

    def _fill(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for live, copy in pairs:
                copy.copy_(live, non_blocking=True)
        if self.device.type == "cpu":
            sources = {live.device for live, _ in pairs if live.device.type == "cuda"}
            self._arriving += [torch.cuda.current_stream(each).record_event() for each in sources]


def check_copyable(modules: Iterable[nn.Module]) -> None:
    """Raise ScoringError where weights lie on several ranks: each would copy its own part alone."""
    if any(map(is_spread, modules)):
        raise ScoringError(
            "the weights lie on several ranks (FSDP or tensor parallelism), so no rank could copy the model by "
            "itself; score with the live model, without scorer_device="
        )


def _fits(copy: Tensor, live: Tensor) -> bool:
    return copy.shape == live.shape and copy.dtype == live.dtype


def _any_tensor(values: Iterable[Any]) -> bool:
    # By the types, of which there are few: a vocabulary is a dict, too. Tensors may lie one list deeper.
    held = {type(each) for each in values}
    return any(issubclass(each, (Tensor, list, tuple, dict)) for each in held)
