"""A loader's saved state, looked at field by field before anything of it is believed.

    state = checked(json.load(file), own=loader.state_dict())

A state that is cut short, edited by hand or of another kind of loader would otherwise go on somewhere else
without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from siftloader.errors import StateError


def checked(state: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """The state, sound in itself; StateError that names the field where it is not.

    ``own`` is the state of the loader that is to go on; whether they belong together is not looked at.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"a state is a dict as state_dict() gives, found {type(state).__name__}")
    state = {**SINCE_1, **state} if state.get("version") == 1 else state
    missing = own.keys() - state.keys()
    if missing:
        raise StateError(
            f"the state lacks {sorted(missing)}; it needs all that state_dict() gives"
        )
    version = state["version"]
    if not _positive(version) or version > own["version"]:
        raise StateError(
            f"found a state of version {version!r}, this siftloader reads up to {own['version']}; "
            f"upgrade siftloader, or start afresh without the state"
        )
    for name, fits in FIELDS.items():
        _check(name, state[name], fits(state[name]))
    for name, value in own["stats"].items():
        if name not in state["stats"]:
            raise StateError(f"the state is damaged: its stats lack {name!r}")
        found = state["stats"][name]
        fits = _seconds if isinstance(value, float) else _counted
        _check(f"stats.{name}", found, fits(found))
    started = state["stats"]["samples"] > 0
    for name in ("batch_size", "inner"):
        known = own[name] is not None and started
        _check(name, state[name], _positive(state[name]) or (state[name] is None and not known))
    _check("cursor", state["cursor"], bool(state["cursor"]) or not started)
    return dict(state)


def _check(name: str, value: Any, fits: bool) -> None:
    if not fits:
        raise StateError(
            f"the state is damaged: {name} {value!r} found, which state_dict() never gives; take another "
            f"one, or start afresh without it"
        )


def _counted(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _positive(value: Any) -> bool:
    return _counted(value) and value > 0


def _seconds(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _share(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_from_step, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _from_step(pair: Any) -> bool:
    # A share, and the step from which on it holds.
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    return _counted(pair[0]) and not isinstance(pair[1], (list, tuple)) and _share(pair[1])


def _texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values())


def _reading(value: Any) -> bool:
    # How labels are shifted, what is ignored, whether the loss is listened to.
    return value is None or (isinstance(value, (list, tuple)) and len(value) == 3)


# What a state of version 1 did not say.
SINCE_1 = {"count": "batches", "updates": 0, "scope": "rank"}

FIELDS: dict[str, Callable[[Any], bool]] = {
    "epoch": _counted,
    "epoch_step": _counted,
    "cursor": lambda value: isinstance(value, Mapping),
    "keep": _share,
    "ranks": _positive,
    "pools": _counted,
    "count": lambda value: value in ("batches", "optimizer"),
    "updates": _counted,
    "scope": lambda value: value in ("rank", "global"),
    "precision": lambda value: value in (None, "float32", "float16", "bfloat16", "float64"),
    "reading": _reading,
    "learned": _texts,
    "set_epoch": lambda value: value is None or _counted(value),
    "stats": lambda value: isinstance(value, Mapping),
}
