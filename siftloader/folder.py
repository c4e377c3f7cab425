"""The folder of a preparation: what it holds, whose it is, and one writer at a time.

    with claimed(out, recipe, hashes) as finished:
        if finished is None: ...       # write; (out / WORK) has what a run before this one made

A folder is empty, unfinished (``.work`` with its recipe), finished (a manifest and a recipe) or not ours.
What we did not write is never removed, and nothing is written beside it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from siftloader.bigrams import BIGRAMS, SEAL
from siftloader.errors import CorpusError, ShardError
from siftloader.shards import DESCRIPTION, MANIFEST, UNIGRAMS, ShardSet, write_atomically


RECIPE = "prepare.json"  # marks a folder as ours, and says what it was asked to hold
WORK = ".work"  # in the folder, until it is finished

_SHARD = r"(train|val)-\d{6}"
_FILES = (RECIPE, MANIFEST, DESCRIPTION, UNIGRAMS, BIGRAMS, SEAL)
_OURS = re.compile(
    rf"({re.escape(WORK)}|({'|'.join(map(re.escape, _FILES))}"
    rf"|{_SHARD}\.(tar|sources\.npy))(\.part)?)"
)
_MADE = re.compile(
    rf"({re.escape(RECIPE)}|\d{{8}}-[0-9a-f]{{16}}\.run|{_SHARD}\.[0-9a-f]{{16}}\.json)(\.part)?"
)


@contextmanager
def claimed(
    out: Path, recipe: Mapping[str, Any], hashes: Callable[[], Sequence[str]]
) -> Iterator[ShardSet | None]:
    """Hold the folder alone, ready to begin or to continue; or the set, finished and intact.

    ``recipe`` is all that decides the bytes but the text, whose ``hashes`` (by source) are asked for
    where the shards are finished. Raises CorpusError where the folder is somebody else's, or of a job
    with another recipe.
    """
    handle = None
    try:
        _check(out, recipe)  # before anything is made
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
        _lock(handle, out)
        _check(out, recipe)  # another run may have been faster
        finished = _finished(out, recipe, hashes)
        if finished is None:
            _check_foreign(out)
            # The manifest first: from here on, whatever happens, the folder is unfinished.
            (out / MANIFEST).unlink(missing_ok=True)
            if _read(out / WORK / RECIPE) != recipe:  # none, or of a job that made nothing
                remove_work(out)
                (out / WORK).mkdir()
                write_atomically(out / WORK / RECIPE, written(recipe))
        else:
            remove_work(out)
        yield finished
    except (BrokenPipeError, ConnectionError):
        raise
    except OSError as error:
        raise CorpusError(
            f"{out}: cannot be written ({error}); once it can, run the same again"
        ) from error
    finally:
        if handle is not None:
            os.close(handle)


def close(out: Path, recipe: Mapping[str, Any], hashes: Sequence[str], stems: set[str]) -> None:
    """Make the folder hold the shards ``stems`` and no others of ours; note what was asked for.

    The manifest is written after this, and the work removed after that.
    """
    for entry in sorted(out.iterdir()):
        ours = _OURS.fullmatch(entry.name) and entry.name != WORK
        # Left by a run before this one, of text that changed since, or half-written.
        if ours and (entry.name.split(".")[0] not in stems or entry.name.endswith(".part")):
            entry.unlink()
    write_atomically(out / RECIPE, written(_with_hashes(recipe, hashes)))


def written(recipe: Mapping[str, Any]) -> bytes:
    """The bytes of a recipe's file."""
    return (json.dumps(recipe, indent=2) + "\n").encode()


def remove_work(out: Path) -> None:
    """Remove what was made on the way, if it is there."""
    if (out / WORK).exists():
        shutil.rmtree(out / WORK)


def _check(out: Path, recipe: Mapping[str, Any]) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise CorpusError(f"{out}: a file; give a folder for the shards")
    made = _names(out / WORK)
    foreign = [name for name in made if not _MADE.fullmatch(name)]
    if foreign or (out / WORK).is_symlink() or (out / WORK).is_file():
        raise CorpusError(
            f"{out}: its {WORK} is not of a preparation (it holds {_some(foreign or [WORK])}); give "
            f"another folder, or move that out"
        )
    finished, unfinished = _read(out / RECIPE), _read(out / WORK / RECIPE)
    if unfinished is None and any(name.endswith(".run") for name in made):
        raise CorpusError(
            f"{out}: holds an unfinished job whose {WORK}/{RECIPE} cannot be read, so nobody knows what "
            f"it was; remove {WORK} to begin again"
        )
    if unfinished is not None and any(name.endswith(".run") for name in made):
        _refuse_other(out, unfinished, recipe, "an unfinished job", "finish it as it was begun")
    if finished is not None:
        _refuse_other(out, _without_hashes(finished), recipe, "finished shards", "keep them")
    if finished is None and unfinished is None:
        names = [name for name in _names(out) if name != WORK]
        if names:
            raise CorpusError(
                f"{out}: holds {_some(names)}, and no {RECIPE} that would mark it as an earlier run; "
                f"give another folder, or empty this one"
            )
    elif not (out / MANIFEST).exists():  # beside finished shards others may put what they like
        _check_foreign(out)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _check_foreign(out: Path) -> None:
    foreign = [name for name in _names(out) if not _OURS.fullmatch(name)]
    if foreign:
        raise CorpusError(
            f"{out}: holds {_some(foreign)} besides an earlier run; move it out, or give another "
            f"folder"
        )


def _lock(handle: int, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such lock here: two runs into one folder are the user's to avoid
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CorpusError(
            f"{out}: another run is writing here; wait for it, or give another folder"
        ) from error


def _finished(
    out: Path, recipe: Mapping[str, Any], hashes: Callable[[], Sequence[str]]
) -> ShardSet | None:
    # The finished set, if it is the one asked for and every byte is as it was written.
    found = _read(out / RECIPE)
    if found is None or not (out / MANIFEST).exists():
        return None
    _refuse_other(out, found, _with_hashes(recipe, hashes()), "finished shards", "keep them")
    try:
        finished = ShardSet.open(out)
        _ = finished.unigrams
        for shard in finished.manifest:
            finished.read(shard)
            finished.read_sources(shard)
    except ShardError:
        return None  # to be made again, by the same command
    return finished


def _refuse_other(
    out: Path, found: Mapping[str, Any], asked: Mapping[str, Any], what: str, remedy: str
) -> None:
    different = [key for key in asked if found.get(key) != asked[key]]
    if different:
        named = ", ".join(_difference(key, found.get(key), asked[key]) for key in different)
        raise CorpusError(
            f"{out}: holds {what} of another job ({named}); {remedy}, give another folder, or remove "
            f"this one"
        )


def _difference(key: str, found: Any, asked: Any) -> str:
    if key == "tokenizer":
        return "another vocabulary"
    if key != "sources":
        return f"{key} {found!r} there, {asked!r} asked"
    before, now = (
        {source["name"]: source for source in sources} for sources in (found or [], asked)
    )
    if list(before) != list(now):
        return f"sources {', '.join(before)} there, {', '.join(now)} asked"
    changed = [name for name in now if before[name] != now[name]]
    weights = [name for name in changed if before[name].get("weight") != now[name].get("weight")]
    what = "the weight" if weights else "the text"
    return f"{what} of {', '.join(map(repr, weights or changed))} is another"


def _with_hashes(recipe: Mapping[str, Any], hashes: Sequence[str]) -> dict[str, Any]:
    sources = [
        {**source, "sha256": digest}
        for source, digest in zip(recipe["sources"], hashes, strict=True)
    ]
    return dict(recipe, sources=sources)


def _without_hashes(found: Mapping[str, Any]) -> dict[str, Any]:
    sources = [
        {key: value for key, value in source.items() if key != "sha256"}
        for source in found["sources"]
    ]
    return dict(found, sources=sources)


def _read(path: Path) -> dict[str, Any] | None:
    # A recipe of ours, or None.
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    keys = ("format", "method", "objective", "sources")
    return found if isinstance(found, dict) and all(key in found for key in keys) else None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
