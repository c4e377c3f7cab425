"""A loader's saved state, looked at field by field before anything of it is believed.

    state = checked(json.load(file), own=loader.state_dict())
    check_fits(state, own, elastic=True)

A state that is cut short, edited by hand or of another kind of loader would otherwise go on somewhere else
without a word.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from siftloader.errors import StateError


def checked(state: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """The state, sound in itself; StateError that names the field where it is not.

    ``own`` is the state of the loader that is to go on; whether they belong together is not looked at.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"a state is a dict as state_dict() gives, found {type(state).__name__}")
    version = state.get("version")
    since: dict[str, Any] = {}
    if type(version) is int:
        since = {1: SINCE_1 | SINCE_2 | SINCE_3, 2: SINCE_2 | SINCE_3, 3: SINCE_3}.get(version, {})
    state = {**since, **state}
    if since and isinstance(state.get("stats"), Mapping):
        state["stats"] = {**COUNTED_SINCE, **state["stats"]}
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


def check_fits(state: Mapping[str, Any], own: Mapping[str, Any], elastic: bool) -> None:
    """Raise StateError where a sound state was saved with other options than those of the loader of ``own``.

    ``elastic`` says that another number of ranks can go on with the candidates; that other ones are kept is warned
    about, once.
    """
    names, ranks = ["keep", "count", "scope", "batch_size"], own["ranks"]
    # Where all ranks select together, only the rows of all of them must stay as many.
    as_one = elastic and own["scope"] == state["scope"] == "global"
    if as_one and state["batch_size"] * state["ranks"] == own["batch_size"] * ranks:
        names.remove("batch_size")
    for name in names:
        if own[name] is not None and state[name] not in (None, own[name]):
            found, wanted = (repr(each).replace("'", '"') for each in (state[name], own[name]))
            raise StateError(
                f"the state was saved with {name} {found}, this loader has {wanted}; build "
                f"it with {name}={found}, or start afresh without the state"
            )
    if state["ranks"] == ranks or "batch_size" not in names:
        return
    if not elastic:
        raise StateError(
            f"the state was saved with {state['ranks']} ranks, {ranks} run now: what each had "
            f"read is not known; use TokenShards to change the number of ranks, or as many as then"
        )
    warnings.warn(
        f"resuming with {ranks} ranks what {state['ranks']} began: the candidates are those an "
        f"unbroken run would draw, which of them are kept depends on the number of ranks",
        stacklevel=4,
    )


def check_learned(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise StateError where tensors that were learned beside the model are not those of the state: by digest."""
    for name in {*found, *expected}:
        owner = "loader.exit_head" if name == "exit_head" else "the criterion"
        if name not in found or name not in expected:
            here, there = ("without", "with") if name in found else ("with", "without")
            raise StateError(
                f"the state was saved {here} something learned in {owner}, this loader is {there} "
                f"it; build the loader it was saved with, or begin without the state"
            )
        if found[name] != expected[name]:
            raise StateError(
                f"the state was saved beside other tensors of {owner}: load them too, with "
                f"load_state_dict(), or begin without the state"
            )


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
    return _number(value) and value >= 0


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


def _prescored(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping) or value.keys() != {"scores", "missing", "rank"}:
        return False
    scores, missing = value["scores"], value["missing"]
    return (
        isinstance(scores, list)
        and all(each is None or _is_float32(each) for each in scores)
        and isinstance(missing, list)
        and len(missing) == 3
        and all(map(_counted, missing))
        and _counted(value["rank"])
    )


def _is_float32(value: Any) -> bool:
    return type(value) in (int, float) and -3.5e38 < value < 3.5e38


def _room(value: Any) -> bool:
    if value is None:
        return True
    counts = value[:3] if isinstance(value, list) and len(value) == 4 else [None]
    return (
        _positive(counts[0])
        and all(each is None or _counted(each) for each in counts)
        and type(value[3]) is int
    )


def _audits(value: Any) -> bool:
    if not isinstance(value, Mapping) or value.keys() != {"history", "under_way"}:
        return False
    history, under_way = value["history"], value["under_way"]
    if not isinstance(history, list) or not all(map(_audit, history)):
        return False
    if under_way is None:
        return True
    if not isinstance(under_way, Mapping) or under_way.keys() != {"step", "rank", "found"}:
        return False
    found = under_way["found"]
    return (
        _positive(under_way["step"])
        and _counted(under_way["rank"])
        and (found is None or (isinstance(found, list) and all(map(_figure, found))))
    )


def _trials(value: Any) -> bool:
    if value is None:
        return True
    names = {"history", "open", "next", "short", "spent", "seconds"}
    if not isinstance(value, Mapping) or value.keys() != names:
        return False
    history = value["history"]
    return (
        isinstance(history, list)
        and all(isinstance(each, Mapping) and all(map(_told, each.values())) for each in history)
        and isinstance(value["open"], bool)
        and _counted(value["next"])
        and (value["short"] is None or _counted(value["short"]))
        and _seconds(value["spent"])
        and _seconds(value["seconds"])
    )


def _told(value: Any) -> bool:
    return isinstance(value, bool) or _figure(value)


def _audit(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and _positive(value.get("step"))
        and all(map(_told, value.values()))
    )


def _figure(value: Any) -> bool:
    return value is None or _number(value)


def _number(value: Any) -> bool:
    # Compared, not converted: a whole number may be too large for that.
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


# What a state of version 1 did not say, one of version 2, one of version 3; and its stats.
SINCE_1: dict[str, Any] = {"count": "batches", "updates": 0, "scope": "rank"}
SINCE_2: dict[str, Any] = {"ahead": None, "watched": False, "room": None}
SINCE_3: dict[str, Any] = {
    "audits": {"history": [], "under_way": None},
    "gate": None,
    "trials": None,
}
COUNTED_SINCE = {"capped": 0, "audited": 0, "seconds_auditing": 0.0}

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
    "watched": lambda value: isinstance(value, bool),
    "reading": _reading,
    "learned": _texts,
    "ahead": _prescored,
    "room": _room,
    "audits": _audits,
    "gate": lambda value: value is None or isinstance(value, bool),
    "trials": _trials,
    "set_epoch": lambda value: value is None or _counted(value),
    "stats": lambda value: isinstance(value, Mapping),
}
