"""Checks for your own tests: that a loader resumes exactly, wherever it is saved.

    from siftloader.testing import assert_resumes_exactly

    def test_my_loader_resumes():
        assert_resumes_exactly(lambda: MyLoader(folder, seed=0), epochs=2)

A run is a list of events: a batch, or the end of an epoch. A place is an event after which a state was
taken; -1 is before the first one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor


# A clock, and marks of torchdata's that tell how it got there: equal streams differ in them.
UNCOMPARED = frozenset(
    {
        "seconds_scoring",
        "seconds_auditing",
        "scoring_cost",
        "fetcher_ended",
        "_base_seed",
        "num_yielded",
    }
)
UNSEEDED = (
    "Two loaders built the same way must hand out the same: seed it, from something that a new process "
    "knows, too; or does state_dict() move it?"
)
_END: Final = object()  # the event of an epoch that ended


class Resumable(Protocol):
    """What can be checked: TokenShards, SiftingDataLoader, StatefulDataLoader, torchdata's Loader, ..."""

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch, or of the rest of the one that was restored."""

    def state_dict(self) -> Any:
        """Where the loader stands."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Stand there."""


def assert_resumes_exactly(
    loader_factory: Callable[[], Resumable],
    *,
    batches: int | None = None,
    epochs: int = 2,
    positions: int | None = 24,
    same: Callable[[Any, Any], bool] | None = None,
    set_epoch: bool = False,
    uncompared: Collection[str] = UNCOMPARED,
) -> None:
    """Raise AssertionError unless a loader restored anywhere goes on, to the bit, as if never stopped.

    assert_resumes_exactly(lambda: TokenShards("shards/demo"), batches=200)

    ``loader_factory()`` builds the loader as a new process would. One runs straight through ``epochs``
    epochs, or the first ``batches`` batches of them; another one, which must hand out the same, is saved on
    its way. Fresh ones are then restored from each state, and every later batch is compared, the ends of
    epochs too. Once more, with restarts in a row: restored, saved, restored again, on to the next place.

    * Places: before the first batch, after a batch, after the end of an epoch; about ``positions`` of
      them, evenly spread, ends of epochs among them; None: every one. The run is kept in memory, and iterated
      about ``positions / 2`` times: bound long loaders with ``batches``.
    * A state goes through JSON where JSON gives it back as it was, else through pickle, as a checkpoint
      would. Beside it, again like a checkpoint, the global random streams of torch, CUDA, NumPy
      and ``random`` are saved, and put back after ``load_state_dict``. Yours are left as they were.
    * States of a restored loader must equal those of the unbroken one, but for entries named in ``uncompared``.
    * ``same(found, expected)`` replaces the comparison of batches: nested mappings, sequences and
      dataclasses of tensors, arrays, strings and numbers, types, dtypes and bits.
    * ``set_epoch=True`` calls ``loader.set_epoch(epoch)`` before every epoch, a resumed one too.

    After the last batch of an epoch both an empty rest and the next epoch are right; after its end, only
    the next epoch is. The message names the place, the batch and what is different about it.
    """
    if epochs < 1 or (batches is not None and batches < 1):
        raise ValueError(
            f"need at least 1 epoch and 1 batch, got epochs={epochs}, batches={batches}"
        )
    if positions is not None and positions < 1:
        raise ValueError(f"positions must be at least 1, or None for every one, got {positions}")
    __tracebackhide__ = True  # pytest shows the caller's line
    before = _streams()
    check = _Check(
        loader_factory, epochs, batches, same or _alike, set_epoch, frozenset(uncompared)
    )
    try:
        check.run(positions)
    finally:
        _set_streams(before)


@dataclass(frozen=True)
class _Saved:
    """A checkpoint: a state as bytes or text, and the global random streams beside it."""

    state: bytes | str
    streams: Any

    @classmethod
    def of(cls, loader: Resumable) -> _Saved:
        state = loader.state_dict()
        try:
            text = json.dumps(state)
            faithful = _difference(json.loads(text), state) is None
        except (TypeError, ValueError):
            faithful = False
        return cls(text if faithful else pickle.dumps(state), _streams())

    @property
    def loaded(self) -> Any:
        return json.loads(self.state) if isinstance(self.state, str) else pickle.loads(self.state)

    @property
    def way(self) -> str:
        return "JSON" if isinstance(self.state, str) else "pickle"


class _Check:
    """One loader under test: the run it makes when nothing happens, and its states on the way."""

    def __init__(
        self,
        factory: Callable[[], Resumable],
        epochs: int,
        batches: int | None,
        same: Callable[[Any, Any], bool],
        announces: bool,
        uncompared: frozenset[str],
    ) -> None:
        self.factory, self.epochs, self.batches = factory, epochs, batches
        self.same, self.announces, self.uncompared = same, announces, uncompared
        self.begin = _streams()
        self.events: list[Any] = []  # of an unbroken run: a batch, or _END
        self.states: dict[int, _Saved] = {}  # by place
        self.repeats = False  # whether a second loader did the same
        self.moved: str | None = None  # the first state that was not as it should be

    def run(self, positions: int | None) -> None:
        __tracebackhide__ = True
        self.events = self._straight()
        places = self._places(positions)
        story = "a second loader, built the same way and saved on its way"
        self._follow(self._built(), -1, len(self.events) - 1, story, saving=places)
        self.repeats = True
        for place in places:
            story = f"restored {self._name(place)}"
            self._follow(self._restored(self.states[place]), place, len(self.events) - 1, story)
        self._in_a_row(places)
        if self.moved:
            raise AssertionError(self.moved)

    def _in_a_row(self, places: list[int]) -> None:
        __tracebackhide__ = True
        saved = self.states[places[0]]
        for times, (place, stop) in enumerate(
            zip(places, [*places[1:], len(self.events) - 1], strict=True), 1
        ):
            story = f"restored {2 * times} times in a row, twice {self._name(place)}"
            again = _Saved(_Saved.of(self._restored(saved)).state, saved.streams)
            saved = self._follow(self._restored(again), place, stop, story)

    def _straight(self) -> list[Any]:
        __tracebackhide__ = True
        events: list[Any] = []
        handed = 0
        for event in self._events(self._built(), 0):
            events.append(event if event is _END else _copied(event))
            handed += event is not _END
            if handed == self.batches:
                break
        if not handed:
            raise AssertionError(
                f"the loader handed out no batch in {self.epochs} epochs: nothing to resume"
            )
        return events

    def _places(self, positions: int | None) -> list[int]:
        # Early ones cost most and find most; the ends of epochs are where most loaders are wrong.
        every = range(-1, len(self.events))
        if positions is None or positions >= len(every):
            return list(every)
        ends = [at for at in every[1:] if self.events[at] is _END]
        chosen = {near for at in ends for near in (at - 1, at) if near >= 0}
        spread = np.linspace(-1, len(self.events) - 1, positions).round().astype(int).tolist()
        return sorted(chosen.union(spread)) if len(chosen) <= positions else sorted(set(spread))

    def _built(self) -> Resumable:
        _set_streams(self.begin)
        return self.factory()

    def _restored(self, saved: _Saved) -> Resumable:
        loader = self._built()
        try:
            loader.load_state_dict(saved.loaded)
        except Exception as error:
            place = next((at for at, one in self.states.items() if one is saved), None)
            where = (
                "saved again right after it was restored" if place is None else self._name(place)
            )
            raise AssertionError(
                f"load_state_dict refused a state taken {where}, after it went through {saved.way}: "
                f"{type(error).__name__}: {error}"
            ) from error
        _set_streams(saved.streams)
        return loader

    def _events(self, loader: Resumable, epoch: int) -> Iterator[Any]:
        for number in range(epoch, self.epochs):
            if self.announces:
                loader.set_epoch(number)  # type: ignore[attr-defined]
            yield from loader
            yield _END

    def _follow(
        self,
        loader: Resumable,
        place: int,
        stop: int,
        story: str,
        saving: Sequence[int] = (),
    ) -> _Saved:
        """Compare events ``place + 1 .. stop`` of a loader; the checkpoint at ``stop``."""
        __tracebackhide__ = True
        if -1 in saving:
            self.states[-1] = _Saved.of(loader)
        saved = _Saved.of(loader) if place == stop else None
        found, at = self._events(loader, self._epoch(place)), place + 1
        while at <= stop:
            try:
                event = next(found, _END)
            except Exception as error:
                raise AssertionError(
                    f"{story}: {self._title(at)} should have come, but the loader raised "
                    f"{type(error).__name__}: {error}"
                ) from error
            if event is not _END and self._may_skip(place, at):
                at += 1  # the next epoch at once, not an empty rest first
                if at > stop:
                    break
            self._compare(event, at, place, story)
            if at in saving:
                self.states[at] = _Saved.of(loader)
            elif at in self.states:
                saved = _Saved.of(loader)
                self._compare_states(saved, at, story)
            at += 1
        return saved or _Saved.of(loader)

    def _may_skip(self, place: int, at: int) -> bool:
        return at == place + 1 and at > 0 and self.events[at] is _END is not self.events[place]

    def _compare(self, found: Any, at: int, place: int, story: str) -> None:
        __tracebackhide__ = True
        expected = self.events[at]
        if found is _END and expected is _END:
            return
        if found is _END:
            raise AssertionError(f"{story}: {self._too_early(at, place)}")
        if expected is _END:
            raise AssertionError(
                f"{story}: a batch came where {self._title(at)} should. {self._hint(found, at)}"
            )
        if complaint := self._complaint(found, expected):
            what = _difference(found, expected) or complaint
            raise AssertionError(
                f"{story}: {self._title(at)} differs from the unbroken run's: {what}. "
                f"{self._hint(found, at)}"
            )

    def _too_early(self, at: int, place: int) -> str:
        epoch = self._epoch(at - 1)
        if at == place + 1 and place >= 0 and self.events[place] is _END:
            return (
                f"epoch {epoch} is empty. A loop that counts its epochs would train one too few: "
                f"a state taken after the end of an epoch must go on with the next one"
            )
        lost = self._end_of(at) - at  # batches
        return (
            f"epoch {epoch} ended before {self._title(at)}, {lost} batches too early. "
            f"Does the state count batches that were read ahead, but not handed out?"
        )

    def _compare_states(self, found: _Saved, at: int, story: str) -> None:
        # Said at the end, if no batch was wrong: that tells more.
        what = _difference(found.loaded, self.states[at].loaded, "state", self.uncompared)
        if what and not self.moved:
            self.moved = (
                f"{story}: every batch is right, but the state at {self._title(at)} is not the unbroken "
                f"run's: {what}. If this only tells how the loader got there, name it in uncompared="
            )

    def _hint(self, found: Any, at: int) -> str:
        if not self.repeats:
            return UNSEEDED
        alike = [
            other
            for other, event in enumerate(self.events)
            if event is not _END and self._complaint(found, event) is None
        ]
        if not alike:
            return _unlike(found, self.events[at])
        epoch = self._epoch(at - 1)
        near = min(alike, key=lambda other: (self._epoch(other - 1) != epoch, abs(other - at)))
        what = f"What came is {self._title(near)}: "
        if self._epoch(near - 1) != epoch:
            return f"{what}is the epoch in the state?"
        if near > at:
            return (
                f"{what}{near - at} too far. Does the state count batches that were read ahead, but not "
                f"handed out?"
            )
        return f"{what}{at - near} too few were skipped. Is a batch counted only after it was handed out?"

    def _complaint(self, found: Any, expected: Any) -> str | None:
        try:
            return None if self.same(found, expected) else "not the same, says same()"
        except Exception as error:  # batches of other shapes, say
            return f"same() raised {type(error).__name__}: {error}"

    def _end_of(self, at: int) -> int:
        # The event that ends the epoch of this one.
        rest = range(at, len(self.events))
        return next((other for other in rest if self.events[other] is _END), len(self.events))

    def _epoch(self, place: int) -> int:
        # The epoch that the event after this place belongs to.
        return sum(event is _END for event in self.events[: place + 1])

    def _number(self, at: int) -> int:
        # Of a batch in its epoch, from 1.
        before = self.events[: at + 1]
        return next((n for n, event in enumerate(reversed(before)) if event is _END), len(before))

    def _title(self, at: int) -> str:
        epoch = self._epoch(at - 1)
        if self.events[at] is _END:
            return f"the end of epoch {epoch}"
        return f"batch {self._number(at)} of epoch {epoch}"

    def _name(self, place: int) -> str:
        if place < 0:
            return "before the first batch"
        return f"after {self._title(place)}"


def _unlike(found: Any, expected: Any) -> str:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        equal = [
            str(name)
            for name, value in found.items()
            if name in expected and _difference(value, expected[name]) is None
        ]
        if equal and len(equal) < len(found):
            return (
                f"Equal: {', '.join(equal)}. If these tell the samples, what is drawn for them (masks, "
                f"noise) hangs on more than the state; key it by seed, epoch and sample"
            )
    return (
        "No batch of the unbroken run is like it: is there a shuffle buffer, a random generator or a "
        "half-used batch that the state does not hold?"
    )


def _streams() -> Any:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    # The global streams are what is meant: a checkpoint saves them, too.
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()  # noqa: NPY002


def _set_streams(streams: Any) -> None:
    host, cuda, numpy, python = streams
    torch.set_rng_state(host)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    np.random.set_state(numpy)  # noqa: NPY002
    random.setstate(python)


def _copied(batch: Any) -> Any:
    # A loader may hand out one buffer again and again.
    return copy.deepcopy(batch)


def _alike(found: Any, expected: Any) -> bool:
    return _difference(found, expected) is None


def _difference(
    found: Any, expected: Any, path: str = "batch", unless: Collection[str] = ()
) -> str | None:
    """Where two nests differ first, and how; None if they are the same to the bit."""
    if type(found) is not type(expected):
        return f"{path} is {_short(found)} of type {_kind(found)}, not {_short(expected)} of type {_kind(expected)}"
    if isinstance(expected, Tensor):
        return _tensors_differ(found, expected, path)
    if isinstance(expected, np.ndarray) and expected.dtype != object:
        return _arrays_differ(found, expected, path)
    if isinstance(expected, np.ndarray):
        return _difference(found.tolist(), expected.tolist(), path, unless)
    if isinstance(expected, Mapping):
        return _mappings_differ(found, expected, path, unless)
    if isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            return f"{path} has {len(found)} entries, not {len(expected)}"
        pairs = enumerate(zip(found, expected, strict=True))
        return _first(_difference(a, b, f"{path}[{at}]", unless) for at, (a, b) in pairs)
    if dataclasses.is_dataclass(expected) and not isinstance(expected, type):
        names = [field.name for field in dataclasses.fields(expected) if field.name not in unless]
        return _first(
            _difference(getattr(found, name), getattr(expected, name), f"{path}.{name}", unless)
            for name in names
        )
    return (
        None if _equal(found, expected) else f"{path} is {_short(found)}, not {_short(expected)}"
    )


def _mappings_differ(
    found: Mapping[Any, Any], expected: Mapping[Any, Any], path: str, unless: Collection[str]
) -> str | None:
    here, there = ([name for name in each if name not in unless] for each in (found, expected))
    if set(here) != set(there):
        return f"{path} has the fields {here}, not {there}"
    return _first(
        _difference(found[name], expected[name], f"{path}[{name!r}]", unless) for name in there
    )


def _tensors_differ(found: Tensor, expected: Tensor, path: str) -> str | None:
    if (found.device, found.layout) != (expected.device, expected.layout):
        return f"{path} is {found.layout} on {found.device}, not {expected.layout} on {expected.device}"
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"{path} is {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
    if found.layout != torch.strided or found.is_quantized:
        found, expected = (
            each.dequantize() if each.is_quantized else each.to_dense()
            for each in (found, expected)
        )
    one, two = (each.detach().cpu().resolve_conj().resolve_neg() for each in (found, expected))
    unequal = _unequal(*(_bytes_of(each) for each in (one, two)))
    return _describe(unequal, list(one.shape), one.reshape(-1), two.reshape(-1), path)


def _bytes_of(tensor: Tensor) -> Any:
    # [numel, itemsize] uint8: bits compare where NaN does not, and bfloat16 has no NumPy.
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8).numpy()


def _arrays_differ(found: Any, expected: Any, path: str) -> str | None:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"{path} is {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
    if not expected.dtype.itemsize:
        return None
    one, two = (np.ascontiguousarray(each).reshape(-1) for each in (found, expected))
    width = expected.dtype.itemsize
    unequal = _unequal(
        *(np.frombuffer(each.tobytes(), np.uint8).reshape(-1, width) for each in (one, two))
    )
    return _describe(unequal, list(found.shape), one, two, path)


def _unequal(one: Any, two: Any) -> Any:
    # [numel] bool
    return (one != two).any(axis=1)


def _describe(unequal: Any, shape: list[int], one: Any, two: Any, path: str) -> str | None:
    if not unequal.any():
        return None
    first = int(unequal.argmax())
    index = ", ".join(str(int(at)) for at in np.unravel_index(first, shape)) if shape else ""
    place = f"{path}[{index}]" if index else path
    many = f" ({int(unequal.sum())} of {len(unequal)} values differ)" if len(unequal) > 1 else ""
    return f"{place} is {_short(one[first].item())}, not {_short(two[first].item())}{many}"


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, float):  # NaN is itself, and zero has a sign
        return struct.pack("d", found) == struct.pack("d", expected)
    if isinstance(expected, torch.Generator):
        return torch.equal(found.get_state(), expected.get_state())
    try:
        if bool(found == expected):
            return True
    except (TypeError, ValueError, RuntimeError):  # == that gives no single answer
        pass
    # What defines no equality is equal where its content is.
    try:
        return pickle.dumps(found) == pickle.dumps(expected)
    except Exception:
        return False


def _first(found: Iterator[str | None]) -> str | None:
    return next((each for each in found if each is not None), None)


def _kind(value: Any) -> str:
    return type(value).__qualname__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
