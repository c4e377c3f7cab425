"""Tars that others wrote: which there are, what is known of each, and their samples, whole or an error.

    tars = find_tars("data/train-{000000..000127}.tar")     # [Tar("data/train-000000.tar", 1000, ...), ...]
    for sample in checked_tars(tars): ...       # {"__key__": "a/1", "__url__": "data/...", "jpg": b"...", "cls": b"7"}
    record_tars("data/")                        # counts and hashes, once, for all who read them later

Stock webdataset takes a damaged header, or a download that was cut, for the end of a tar.
"""

from __future__ import annotations

import glob
import itertools
import json
import operator
import os
import re
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from siftloader.errors import CorpusError, CorruptShard, FetchError, ShardError
from siftloader.files import File, Reading, is_url, kind_of, open_file
from siftloader.shards import Tokenizer, write_atomically


Sample: TypeAlias = dict[
    str, Any
]  # "__key__", "__url__", and the fields: bytes, then what they mean
Urls: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

TRIES, PAUSE = 4, 1.0  # how often a URL is asked for; seconds to wait at first, then twice as long


@dataclass(frozen=True)
class Tar:
    """A tar, and what is known of it before it is opened."""

    url: str
    samples: int | None = None
    sha256: str | None = None
    by: str = "its record"  # who says so

    @property
    def stem(self) -> str:
        """``000001`` of ``folder/000001.tar.gz``."""
        return _stem(self.url)

    def fault(self, kind: type[ShardError], why: str, byte: int | None = None) -> ShardError:
        """An error that names this tar."""
        return kind(f"{self.url}: {why}", shard=self.stem, byte=byte)


def find_tars(
    urls: Urls, sizes: Mapping[str, int] | None = None, pipes: bool = False
) -> tuple[Tar, ...]:
    """The tars of paths, braces, globs, folders and URLs, in order, with what is recorded of each.

    ``sizes`` maps URLs, names or stems to numbers of samples; else they are looked for in ``manifest.jsonl``,
    ``sizes.json`` and wids' ``dataset.json`` beside the tars. ShardError where a tar is not there.
    """
    given = [urls] if isinstance(urls, (str, os.PathLike)) else list(urls)
    found = [url for each in given for url in _expanded(os.fspath(each))]
    if not found:
        raise ValueError("no tars: give at least one path, glob, folder or URL")
    if twice := [url for url, times in Counter(found).items() if times > 1]:
        raise ValueError(f"{twice[0]}: given twice, and its samples would count double")
    for url in found:
        _check_pipes(url, pipes)
    missing = [url for url in found if not _is_remote(url) and not Path(url).is_file()]
    if missing:
        raise ShardError(
            f"{len(missing)} of {len(found)} tars are not there: {', '.join(missing[:3])}"
            f"{', ...' * (len(missing) > 3)} (looked from {Path.cwd()}; braces count as in "
            f"train-{{000000..000127}}.tar)"
        )
    if sizes is None:
        beside = {folder: _beside(folder) for folder in {Path(url).parent for url in found}}
        return tuple(Tar(url, *beside[Path(url).parent].get(_stem(url), ())) for url in found)
    names = {name: url for url in found for name in (_stem(url), url.rpartition("/")[2], url)}
    if unknown := [name for name in sizes if name not in names]:
        raise ValueError(
            f"sizes= knows {unknown[0]!r}, which is none of the {len(found)} tars ({found[0]} is one)"
        )
    counts = {names[name]: operator.index(count) for name, count in sizes.items()}
    return tuple(Tar(url, counts.get(url), None, "sizes=") for url in found)


def _expanded(url: str) -> Iterator[str]:
    from webdataset.shardlists import expand_urls

    there = os.path.exists(url)  # noqa: PTH110 - a Path raises for a name that is too long
    try:
        expanded = [url] if there else expand_urls(url)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"{url}: {error}; braces count as in train-{{000000..000127}}.tar, and ${{NAME}} needs WDS_NAME "
            f"in the environment"
        ) from error
    for each in expanded:
        path = re.sub("^file:(//)?", "", each)
        if _is_remote(path):
            yield path
        elif Path(path).is_dir():
            inside = [file for file in Path(path).iterdir() if file.is_file()]
            tars = [str(file) for file in inside if (kind_of(file.name) or ("",))[0] == "tar"]
            if not tars:
                raise ShardError(f"{path}: no tar in this folder; for folders below give a glob")
            yield from sorted(tars)
        elif glob.has_magic(path) and not Path(path).exists():
            matching = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - Path's has other rules
            if not matching:
                raise ShardError(f"{path}: no file matches (looked from {Path.cwd()})")
            yield from matching
        else:
            yield path


def _is_remote(url: str) -> bool:
    return is_url(url) or url.startswith("pipe:")


def _check_pipes(url: str, pipes: bool) -> None:
    if url.startswith("pipe:") and not pipes:
        raise ValueError(f"{url}: pipe: runs a shell command; give pipes=True if you trust it")


def _stem(url: str) -> str:
    return re.sub(r"(\.tar(\.\w+)?|\.tgz)$", "", url.rpartition("/")[2])


def _beside(folder: Path) -> dict[str, tuple[int, str | None, str]]:
    # By stem, what a Tar has beside its URL. The manifest comes last, for it may have hashes.
    told: dict[str, tuple[int, str | None, str]] = {}
    for name in ("dataset.json", "sizes.json", "manifest.jsonl"):
        file = folder / name
        if file.is_file():
            for url, count, sha256 in _sidecar(file):
                told[_stem(url)] = count, sha256, name
    return told


def _sidecar(file: Path) -> list[tuple[str, int, str | None]]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            said = [(line["shard"], line["num_sequences"], line.get("sha256")) for line in lines]
        elif file.name == "sizes.json":
            said = [(name, count, None) for name, count in json.loads(text).items()]
        else:  # of wids; else it is somebody's own, and says nothing
            listed = json.loads(text).get("shardlist", [])
            said = [(each["url"], each["nsamples"], None) for each in listed if "nsamples" in each]
        return [(url, operator.index(count), sha256) for url, count, sha256 in said]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{file}: cannot be read as sizes of tars ({type(error).__name__}: {error}); needed is "
            f'{{"name.tar": samples, ...}}, or lines of {{"shard": "name", "num_sequences": samples}}; mend '
            f"or delete it"
        ) from error


def written_by_us(tars: Sequence[Tar]) -> tuple[str | None, Tokenizer | None]:
    """Objective and tokenizer of tars that siftloader wrote; (None, None) for others."""
    folders = {os.path.dirname(tar.url) for tar in tars}  # noqa: PTH120 - also of URLs
    file = Path(folders.pop(), "dataset.json")
    if folders or not file.is_file():
        return None, None
    about = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(about, dict) or "schema" not in about:
        return None, None
    if about["objective"] == "mlm-nsp":
        raise ValueError(f"{file.parent}: sentence pairs, which only TokenShards reads")
    return about["objective"], Tokenizer(**about["tokenizer"])


def record_tars(urls: Urls) -> list[Path]:
    """Read tars once and write ``manifest.jsonl`` beside them: samples, bytes and sha256 of each.

    record_tars("data/train-{000000..000127}.tar")      # [Path("data/manifest.jsonl")]

    From then on epochs are equal on all ranks, and every byte is checked whenever it is read. Lines of other
    tars of these folders stay. Tars behind URLs, or that siftloader wrote, are refused.
    """
    lines: dict[Path, dict[str, dict[str, Any]]] = {}
    for tar in find_tars(urls, sizes={}):
        if _is_remote(tar.url):
            raise ValueError(f"{tar.url}: nothing can be written beside a URL; give sizes=")
        if written_by_us([tar])[0]:
            raise ValueError(f"{tar.url}: siftloader wrote these shards, and their manifest")
        reading = Reading()
        samples = sum(1 for _ in _samples(Tar(tar.url), False, reading))
        lines.setdefault(Path(tar.url).parent, {})[tar.stem] = {
            "shard": tar.stem,
            "num_sequences": samples,
            "bytes": reading.bytes,
            "sha256": reading.hashes[0],
        }
    for folder, own in lines.items():
        manifest = folder / "manifest.jsonl"
        text = manifest.read_text(encoding="utf-8") if manifest.is_file() else ""
        before = [json.loads(line) for line in text.splitlines() if line.strip()]
        own = {**{line["shard"]: line for line in before}, **own}
        text = "".join(json.dumps(own[stem]) + "\n" for stem in sorted(own))
        write_atomically(manifest, text.encode())
    return [folder / "manifest.jsonl" for folder in lines]


def checked_tars(
    source: Iterable[Tar | Mapping[str, str] | str], pipes: bool = False
) -> Iterator[Sample]:
    """Samples of tars, undecoded: ``{"__key__", "__url__", extension: bytes, ...}``; whole tars or errors.

    list(checked_tars(["train-000000.tar"]))      # or {"url": ...}, as wds.SimpleShardList gives

    Refused, with tar and key: a damaged or missing header, an end that comes too early, anything behind the
    end, a sample or field that comes twice, fields that are not adjacent, links, and another number of
    samples or another hash than is recorded. Names without extension are passed over, as webdataset does.
    What comes from a URL is asked for again, and continued behind what was given already.
    """
    for each in source:
        url = each["url"] if isinstance(each, Mapping) else each
        tar = url if isinstance(url, Tar) else Tar(url)
        given = 0
        for attempt in range(1, TRIES + 1):
            try:
                for sample in itertools.islice(_samples(tar, pipes, Reading()), given, None):
                    given += 1
                    yield sample
                break
            except (FetchError, CorruptShard) as error:
                if not is_url(tar.url):
                    raise
                if attempt == TRIES:
                    why = f"{error}; asked for {TRIES} times"
                    raise type(error)(why, shard=tar.stem) from error
                time.sleep(PAUSE * 2 ** (attempt - 1))


def _samples(tar: Tar, pipes: bool, reading: Reading) -> Iterator[Sample]:
    count = 0
    with _opened(tar, pipes, reading) as stream:
        for sample in _grouped(tar, _members(tar, stream)):
            count += 1
            yield sample
    wrong = (
        tar.samples not in (None, count) and f"{count} samples found, {tar.by} says {tar.samples}"
    )
    if not wrong and tar.sha256 is not None and reading.hashes != [tar.sha256]:
        wrong = f"sha256 {', '.join(reading.hashes)} found, {tar.by} says {tar.sha256}"
    if wrong:
        raise tar.fault(
            CorruptShard, f"{wrong}; fetch the tar again, or bring {tar.by} up to date"
        )


@contextmanager
def _opened(tar: Tar, pipes: bool, reading: Reading) -> Iterator[BinaryIO]:
    _check_pipes(tar.url, pipes)
    if tar.url.startswith("pipe:"):
        with _piped(tar) as stream:
            yield stream
        return
    try:
        with open_file(File(tar.url, None, ""), reading) as stream:
            yield stream
            while stream.read(1 << 20):  # a compressed tar may be longer than what is in it
                pass
    except CorpusError as error:
        there = CorruptShard if Path(tar.url).is_file() else ShardError
        raise (FetchError if is_url(tar.url) else there)(str(error), shard=tar.stem) from error


@contextmanager
def _piped(tar: Tar) -> Iterator[Any]:
    # webdataset's own pipe lets the statuses 141 and 23 pass, which curl and head end with.
    command = subprocess.Popen(tar.url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE)
    with command:
        try:
            yield command.stdout
        except BaseException:
            command.terminate()  # nobody reads on
            raise
    if command.returncode:
        why = f"its command ended with status {command.returncode}, so what came may not be all; run it by hand"
        raise tar.fault(FetchError, why)


class _Header(tarfile.TarInfo):
    """The header of a member. tarfile takes a damaged one for the end of the tar, and says nothing."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        stream: Any = tar.fileobj
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            while chunk := stream.read(1 << 16):
                if chunk.strip(b"\0"):
                    raise tarfile.ReadError(
                        "something follows the end of the archive; if it is another tar, take the two apart"
                    ) from None
            raise
        except tarfile.HeaderError as error:
            what = "no end-of-archive mark" if str(error) == "empty header" else str(error)
            raise tarfile.ReadError(what) from None


def _members(tar: Tar, stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    place = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as members:
            while (member := members.next()) is not None:
                members.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                place = member.offset
                if member.isdir():
                    continue
                inside = members.extractfile(member) if member.isreg() else None
                if inside is None:
                    why = f"member {member.name!r} is a link or a device, which is never followed; write the files"
                    raise tar.fault(ShardError, why, place)
                yield member.name, inside.read()
    except (tarfile.TarError, EOFError) as error:
        why = f"damaged, cut short, or no tar ({error}; the last header read is at byte {place}); fetch it again"
        raise tar.fault(CorruptShard, why, place) from error


_META = re.compile(r"__[^/]*__($|/)|__meta__[.]")  # notes about the tar, no samples
_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")  # the key ends at the first dot of the last part


def _grouped(tar: Tar, members: Iterable[tuple[str, bytes]]) -> Iterator[Sample]:
    sample: Sample = {}
    seen: set[str] = set()
    passed: list[str] = []
    for name, data in members:
        match = _NAME.fullmatch(name)
        if match is None or _META.match(name):
            passed += [name] * (_META.match(name) is None)
            continue
        key, extension = match[1], match[2].lower()
        wrong = extension in sample and f"has {extension!r} twice"
        if key != sample.get("__key__"):
            if sample:
                yield sample
            wrong = key in seen and f"comes back at {name!r} after others"
            seen.add(key)
            sample = {"__key__": key, "__url__": tar.url}
        if wrong:
            raise tar.fault(
                ShardError,
                f"sample {key!r} {wrong}; the fields of a sample must be adjacent, and its key its own: write the "
                f"tar again, sorted",
            )
        sample[extension] = data
    if sample:
        yield sample
    elif passed:
        why = f"no samples among {len(passed)} members ({passed[0]!r} is one); names must be KEY.EXTENSION"
        raise tar.fault(ShardError, why)
