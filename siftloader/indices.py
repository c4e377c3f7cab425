"""The order of a torch DataLoader, recorded and taken up again without fetching what was used.

order = recorded_order(loader)                   # JSON: the generators its samplers will draw from
batches = without_first(loader, 40, order)       # the 41st batch of that epoch, and on

"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from siftloader.batches import Batch
from siftloader.errors import StateError


REPEATING = {SequentialSampler, DistributedSampler, BatchSampler}  # nothing drawn from a stream
DRAWING = {RandomSampler, SubsetRandomSampler, WeightedRandomSampler}  # from torch's generators
PLAIN = {bool, int, float, str, type(None)}  # what JSON gives back as it was
TAGGED = [
    *({tag} for tag in ("bytes", "tuple", "dict")),
    *({tag, "dtype", "shape"} for tag in ("tensor", "array", "scalar")),
]


def is_indexed(loader: Any) -> bool:
    """Whether this is a DataLoader over a map-style data set that iterates as torch's own does."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader).__iter__ is DataLoader.__iter__
    )


def recorded_order(loader: DataLoader[Any]) -> dict[str, Any]:
    """What the samplers will draw their permutation from: enough to draw it again."""
    if {type(each) for each in _samplers(loader)} <= REPEATING:
        return {}
    own = [encoded(each.get_state()) for each in _generators(loader)]
    return {"rng": encoded(torch.get_rng_state()), **({"generators": own} if own else {})}


def check_recorded(loader: DataLoader[Any], order: Mapping[str, Any]) -> None:
    """Raise StateError unless what was recorded could be drawn from here."""
    for name, own in recorded_order(loader).items():
        try:
            found, here = decoded(order.get(name)), decoded(own)
            both = (found, here) if isinstance(here, list) else ([found], [here])
            sound = len(both[0]) == len(both[1]) and all(map(_alike, *both))
        except (KeyError, TypeError, ValueError, RuntimeError):
            sound = False
        if not sound:
            raise StateError(
                f"the state is damaged: cursor.{name} is not what the random streams of this loader can "
                f"be set to; take another one, or start afresh without it"
            )


def _alike(found: Any, here: torch.Tensor) -> bool:
    return (
        isinstance(found, torch.Tensor) and found.dtype == here.dtype and found.shape == here.shape
    )


def unknown_samplers(loader: DataLoader[Any]) -> list[str]:
    """Names of the samplers whose draws we may not have recorded."""
    kinds = {type(each) for each in _samplers(loader)} - REPEATING - DRAWING
    return sorted(kind.__name__ for kind in kinds)


def without_first(loader: DataLoader[Any], batches: int, order: dict[str, Any]) -> Iterator[Batch]:
    """The batches of an epoch after its first ones, in the order that was recorded.

    Only the order comes from the generators as they were in the saved run; what fetching and collating
    draw comes from the streams as the caller has them now, and those are left alone.
    """
    if not batches and ("rng" not in order or _is_now(order["rng"])):
        # Between epochs, with the caller's stream restored: drawn from it, as the unbroken run did.
        _restore(loader, order)
        return iter(loader)
    skip = _After(loader.batch_sampler or loader.sampler, batches)
    sampled: dict[str, Any] = (
        {"batch_size": None, "sampler": skip}
        if loader.batch_sampler is None
        else {"batch_sampler": skip}
    )
    rest: DataLoader[Any] = DataLoader(
        loader.dataset,
        **sampled,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )
    here = torch.get_rng_state()
    try:
        if "rng" in order:
            torch.set_rng_state(decoded(order["rng"]))
        _restore(loader, order)
        source = iter(rest)
        skip.prime()
    finally:
        torch.set_rng_state(here)
    return source


def _restore(loader: DataLoader[Any], order: dict[str, Any]) -> None:
    for own, state in zip(_generators(loader), order.get("generators", ()), strict=False):
        own.set_state(decoded(state))


def _is_now(state: Any) -> bool:
    return torch.equal(torch.get_rng_state(), decoded(state))


def _samplers(loader: Any) -> list[Any]:
    found = [loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None), loader.sampler]
    return [each for each in found if each is not None]


def _generators(loader: Any) -> list[torch.Generator]:
    found = [getattr(each, "generator", None) for each in (loader, *_samplers(loader))]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def encoded(state: Any) -> Any:
    """A copy of a state that JSON takes and ``decoded`` turns back into what it was.

    Tensors, arrays, bytes and tuples become tagged dicts, as does a dict that JSON would change or that
    looks like a tagged one. Anything else that JSON does not know stays as it is.
    """
    if isinstance(state, torch.Tensor):
        data = state.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        kind = str(state.dtype).removeprefix("torch.")
        return {"tensor": _text(data.tobytes()), "dtype": kind, "shape": list(state.shape)}
    if isinstance(state, (np.ndarray, np.generic)) and state.dtype.kind not in "OV":
        tag = "array" if isinstance(state, np.ndarray) else "scalar"
        return {tag: _text(state.tobytes()), "dtype": state.dtype.str, "shape": list(state.shape)}
    if isinstance(state, bytes):
        return {"bytes": _text(state)}
    if isinstance(state, dict):
        if state.keys() in TAGGED or not all(isinstance(name, str) for name in state):
            return {"dict": [[encoded(name), encoded(value)] for name, value in state.items()]}
        return {name: encoded(value) for name, value in state.items()}
    if isinstance(state, list):
        # The generators of Python and numpy hold 600 numbers, and this runs for every inner batch.
        return [*state] if {*map(type, state)} <= PLAIN else [encoded(value) for value in state]
    return {"tuple": encoded([*state])} if isinstance(state, tuple) else state


def decoded(state: Any) -> Any:
    """The state that ``encoded`` was given, sharing nothing with it; named tuples are tuples."""
    if isinstance(state, list):
        return [decoded(value) for value in state]
    if not isinstance(state, dict):
        return state
    if state.keys() not in TAGGED:
        return {name: decoded(value) for name, value in state.items()}
    tag = next(name for name in state if name not in ("dtype", "shape"))
    value = state[tag]
    if tag == "tuple":
        return tuple(decoded(value))
    if tag == "dict":
        return {decoded(name): decoded(each) for name, each in value}
    data = base64.b64decode(value)
    if tag == "bytes":
        return data
    if tag == "tensor":
        kind = getattr(torch, state["dtype"])
        flat = (
            torch.frombuffer(bytearray(data), dtype=kind) if data else torch.empty(0, dtype=kind)
        )
        return flat.reshape(state["shape"])
    array: Any = np.ndarray(state["shape"], state["dtype"], bytearray(data))
    return array if tag == "array" else array[()]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class _After:
    """A sampler without its first entries: indices are skipped, nothing is fetched for them."""

    def __init__(self, sampler: Iterable[Any], first: int) -> None:
        self._sampler, self._first = sampler, first
        self._rest: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.prime())

    def prime(self) -> Iterator[Any]:
        """Skip, and take the first entry that counts: by then the sampler has drawn its seed."""
        if self._rest is None:
            source = iter(self._sampler)
            skipped = sum(1 for _ in islice(source, self._first))
            if skipped < self._first:
                raise too_short(skipped, self._first)
            self._rest = chain(list(islice(source, 1)), source)
        return self._rest


def too_short(found: int, batches: int) -> StateError:
    """The error of a state that stands further into an epoch than the epoch goes."""
    return StateError(
        f"the state is {batches} batches into an epoch, the inner loader has only {found}; it is "
        f"not the one the state was saved with"
    )
