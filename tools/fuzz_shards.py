"""Random faults in real shards, read by us and by stock webdataset: python tools/fuzz_shards.py [--faults 2016]

Every fault damages the tars of a small data set in one of the ways that disks, copies, downloads and people
do; then each reader reads the data set to the end. Counted is what a training loop would be handed:

* siftloader: ``TokenShards.batches`` with its defaults. *found*: a ShardError that names the damaged shard,
  after right rows alone. *harmless*: every row came, once, as it was written. All else is WRONG.
* webdataset: ``WebDataset(urls).decode()``, stock, with the handlers that raise. *error*: after right samples
  alone; *late*: wrong samples first, an error then; *harmless*; *short*: it ends as if all were well,
  without some of the samples; *wrong*: it ends as if all were well, but some samples nobody wrote, or
  they came twice.
* siftloader.tars: the same files as tars of others, without our manifest; what stock webdataset knows.
* recorded: the same, after ``record_tars`` wrote down size and hash of each.

Faults that left the bytes as they were, a hole over zeros say, are left out. Neither format nor webdataset
promises to find all of this; the table says what happens where nothing else looks. One fault is repeated
with --seed and --only NUMBER.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import gzip
import io
import pickle
import platform
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from siftloader.errors import ShardError
from siftloader.shards import (
    BLOCK,
    END,
    Layout,
    Shard,
    Source,
    Tokenizer,
    encode,
    write_dataset,
    write_shard,
)
from siftloader.stream import TokenShards


VOCABULARY = 90
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
COUNTS = (
    6,
    6,
    9,
)  # samples of the train shards: two of one size, so that only the content differs
KINDS_OF_SETS = {
    "mlm": Layout(16),
    "clm": Layout(300, "<u4"),  # the ids of a sample fill several blocks
    "mlm-nsp": Layout(16, labels=True),
}
ERROR_PAGE = b"<!DOCTYPE html>\n<html><body><h1>503 Service Unavailable</h1></body></html>\n"


Sample = tuple[str, bytes | None, int | None]  # key, ids, label
Batches = Iterator[dict[str, Tensor]]


@dataclass(frozen=True)
class Sound:
    """A data set as it was written, and all that reading it gives."""

    folder: Path
    layout: Layout
    tars: Mapping[str, bytes]  # by stem, those of the train split
    strangers: Mapping[str, bytes]  # the same names and sizes in another data set
    rows: Mapping[str, NDArray[np.int64]]  # by field, row i is that of id i, as ours gives them
    samples: collections.Counter[Sample]  # as other readers give them
    plain: Path  # links to the tars, and nothing beside them
    recorded: Path  # the same, and what record_tars wrote of them


@dataclass(frozen=True)
class Fault:
    """What became of which tars: their bytes, or None where one is gone."""

    number: int
    kind: str
    tars: Mapping[str, bytes | None]


@dataclass(frozen=True)
class Reading:
    """What reading to the end, or to an error, came to, in a word and in detail."""

    verdict: str
    detail: str = ""


def write_sets(folder: Path) -> list[Sound]:
    """A small data set of every kind, written and read once while it is sound."""
    return [_write(folder / name, name, layout) for name, layout in KINDS_OF_SETS.items()]


def _write(folder: Path, objective: str, layout: Layout) -> Sound:
    folder.mkdir()
    rng = np.random.default_rng([7, *objective.encode()])
    shards: list[Shard] = []
    tokens, strangers, samples = [], {}, collections.Counter[Sample]()
    for number, count in enumerate(COUNTS):
        stem = f"train-{number:06d}"
        ids = _ids(rng, count, layout)
        labels = ids[:, 1] % 2 if layout.labels else None
        shards.append(write_shard(folder, stem, ids, _zeros(count), layout, labels))
        tokens.append(ids)
        others = _ids(rng, count, layout)
        strangers[stem] = b"".join(
            encode(stem, others, layout, others[:, 1] % 2 if layout.labels else None)
        )
        for row, sample in enumerate(ids.astype(layout.dtype)):
            label = None if labels is None else int(labels[row])
            samples[f"{stem}-{row:06d}", sample.tobytes(), label] += 1
    write_dataset(
        folder,
        shards,
        layout=layout,
        objective=objective,
        tokenizer=Tokenizer("random", "0" * 64, VOCABULARY, SPECIAL),
        sources=[Source("random", "0" * 64, sum(COUNTS))],
        unigrams=np.bincount(np.concatenate(tokens).ravel(), minlength=VOCABULARY),
        seed=0,
    )
    tars = {shard.shard: (folder / f"{shard.shard}.tar").read_bytes() for shard in shards}
    rows = _sound_rows(folder, np.concatenate(tokens))
    links = [folder.with_name(f"{folder.name}-{what}") for what in ("plain", "recorded")]
    for link in links:
        link.mkdir()
        for stem in tars:
            (link / f"{stem}.tar").symlink_to(folder / f"{stem}.tar")
    return Sound(folder, layout, tars, strangers, rows, samples, *links)


def _ids(rng: np.random.Generator, count: int, layout: Layout) -> NDArray[np.int64]:
    # [CLS] ... [SEP] ... [SEP], and in every third row padding: zeros, which holes may hit unseen
    ids = rng.integers(5, VOCABULARY, (count, layout.seq_len))
    ids[:, 0], ids[:, layout.seq_len // 2], ids[:, -1] = (
        SPECIAL[k] for k in ("cls", "sep", "sep")
    )
    ids[::3, layout.seq_len * 3 // 4 :] = SPECIAL["pad"]
    return ids


def _zeros(count: int) -> NDArray[np.uint8]:
    return np.zeros(count, np.uint8)


def _sound_rows(folder: Path, written: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    # All fields by id; that the unmasked ids are those that were written is checked, not believed.
    plain = _by_id(TokenShards(folder, masking=None, with_ids=True))
    assert np.array_equal(plain["input_ids"], written)
    return _by_id(TokenShards(folder, with_ids=True))


def _by_id(shards: TokenShards) -> dict[str, NDArray[np.int64]]:
    (batch,) = shards.batches(sum(COUNTS))
    order = batch["id"].argsort()
    return {name: values[order].numpy() for name, values in batch.items()}


def draw(sets: list[Sound], number: int, seed: int) -> tuple[Sound, Fault]:
    """Fault ``number`` of a seed, and the data set it happens to: all kinds in turn, the rest by chance."""
    rng = np.random.default_rng([seed, number])
    kind = list(KINDS)[number % len(KINDS)]
    able = [sound for sound in sets if sound.layout.labels or not kind.startswith("label")]
    sound = able[int(rng.integers(len(able)))]
    stem = str(rng.choice(list(sound.tars)))
    return sound, Fault(number, kind, KINDS[kind](rng, sound, stem))


Damage = Callable[[np.random.Generator, Sound, str], dict[str, bytes | None]]
KINDS: dict[str, Damage] = {}


def _flip(part: Callable[[Layout], range] | None) -> Damage:
    # One byte of a sample, or of the zeros after the last, changed to any other value.
    def damage(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
        data = bytearray(sound.tars[stem])
        if part is None:
            at = len(data) - 1 - int(rng.integers(len(END)))
        else:
            row = int(rng.integers(_count(data, sound)))
            at = row * sound.layout.stride + int(rng.choice(part(sound.layout)))
        data[at] ^= int(rng.integers(1, 256))
        return {stem: bytes(data)}

    return damage


def _cut(where: Callable[[np.random.Generator, Layout], int]) -> Damage:
    # The file ends so many bytes into a sample.
    def damage(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
        data = sound.tars[stem]
        row = int(rng.integers(1, _count(data, sound)))
        return {stem: data[: row * sound.layout.stride + where(rng, sound.layout)]}

    return damage


def _hole(size: int) -> Damage:
    # A block that a disk or a sparse copy filled with zeros.
    def damage(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
        data = bytearray(sound.tars[stem])
        at = int(rng.integers(-(-len(data) // size))) * size
        hole = min(size, len(data) - at)
        data[at : at + hole] = bytes(hole)
        return {stem: bytes(data)}

    return damage


def _bytes_lost(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
    data, size = sound.tars[stem], int(rng.integers(1, 2000))
    at = int(rng.integers(len(data) - size))
    return {stem: data[:at] + data[at + size :]}


def _bytes_inserted(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
    data = sound.tars[stem]
    at = int(rng.integers(len(data)))
    return {stem: data[:at] + rng.bytes(int(rng.integers(1, 2000))) + data[at:]}


def _exchanged(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
    other = str(rng.choice([name for name in sound.tars if name != stem]))
    return {stem: sound.tars[other], other: sound.tars[stem]}


def _spliced(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
    # The beginning of one shard and the end of its namesake, cut at a sample.
    data, other = sound.tars[stem], sound.strangers[stem]
    at = int(rng.integers(1, _count(data, sound))) * sound.layout.stride
    return {stem: data[:at] + other[at:]}


def _appended(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
    # As `cat a.tar b.tar` does, or as `tar --concatenate` does: over the zeros that end the first.
    data, other = sound.tars[stem], sound.tars[str(rng.choice(list(sound.tars)))]
    return {stem: (data if rng.integers(2) else data[: -len(END)]) + other}


def _on_rows(change: Callable[[np.random.Generator, list[bytes]], list[bytes]]) -> Damage:
    # What somebody does to the samples of a shard as wholes.
    def damage(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
        data, stride = sound.tars[stem], sound.layout.stride
        rows = [data[at : at + stride] for at in range(0, len(data) - len(END), stride)]
        return {stem: b"".join(change(rng, rows)) + END}

    return damage


def _twice(rng: np.random.Generator, rows: list[bytes]) -> list[bytes]:
    row = rows[int(rng.integers(len(rows)))]
    rows.insert(int(rng.integers(len(rows) + 1)), row)
    return rows


def _over(rng: np.random.Generator, rows: list[bytes]) -> list[bytes]:
    # A sample in the place of another: as many as before, so no count tells.
    one, other = rng.choice(len(rows), 2, replace=False).tolist()
    rows[one] = rows[other]
    return rows


def _removed(rng: np.random.Generator, rows: list[bytes]) -> list[bytes]:
    del rows[int(rng.integers(len(rows)))]
    return rows


def _swapped(rng: np.random.Generator, rows: list[bytes]) -> list[bytes]:
    one, other = rng.choice(len(rows), 2, replace=False).tolist()
    rows[one], rows[other] = rows[other], rows[one]
    return rows


def _contents_swapped(rng: np.random.Generator, rows: list[bytes]) -> list[bytes]:
    # Every header in its place, what follows it in another's.
    one, other = rng.choice(len(rows), 2, replace=False).tolist()
    rows[one], rows[other] = (
        rows[one][:BLOCK] + rows[other][BLOCK:],
        rows[other][:BLOCK] + rows[one][BLOCK:],
    )
    return rows


def _label_other(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
    # A label that is a label, but not this sample's.
    data = bytearray(sound.tars[stem])
    data[int(rng.integers(_count(data, sound))) * sound.layout.stride + sound.layout.label] ^= 1
    return {stem: bytes(data)}


def _label_lost(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
    data, layout = sound.tars[stem], sound.layout
    row = int(rng.integers(_count(data, sound))) * layout.stride
    return {stem: data[: row + layout.label_header] + data[row + layout.stride :]}


def _packed_again(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
    # The same members in a tar of today's making: no sample is damaged, the file is another.
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(sound.tars[stem])) as old,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in old:
            info = tarfile.TarInfo(member.name)
            info.size, info.mtime = member.size, 1.5 + int(rng.integers(9))
            new.addfile(info, old.extractfile(member))
    return {stem: out.getvalue()}


def _stranger(rng: np.random.Generator, sound: Sound, stem: str) -> dict[str, bytes | None]:
    # A member that no shard of ours has, before any sample or after the last.
    layout, data = sound.layout, sound.tars[stem]
    key = f"{stem}-{int(rng.integers(COUNTS[0])):06d}"
    kinds = {
        "symlink": (tarfile.SYMTYPE, f"{key}.input_ids.npy", b""),
        "folder": (tarfile.DIRTYPE, "folder", b""),
        "long name": (tarfile.REGTYPE, f"{'long/' * 40}{key}.txt", b"text"),
        "outside": (tarfile.REGTYPE, f"../../{key}.txt", b"text"),
        "pickle": (tarfile.REGTYPE, f"{key}.pyd", pickle.dumps({"harmless": 1})),
        "meta": (tarfile.REGTYPE, "__meta__.json", b"{}"),
    }
    kind, name, content = kinds[str(rng.choice(list(kinds)))]
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(content), "/etc/hostname" * (kind == b"2")
    member = info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK)
    at = int(rng.integers(_count(data, sound) + 1)) * layout.stride
    return {stem: data[:at] + member + data[at:]}


def _as(change: Callable[[np.random.Generator, bytes], bytes | None]) -> Damage:
    return lambda rng, sound, stem: {stem: change(rng, sound.tars[stem])}


def _count(data: bytes | bytearray, sound: Sound) -> int:
    return (len(data) - len(END)) // sound.layout.stride


KINDS |= {
    "byte flipped: tar header": _flip(lambda layout: range(BLOCK)),
    "byte flipped: npy header": _flip(lambda layout: range(BLOCK, layout.offset)),
    "byte flipped: token ids": _flip(
        lambda layout: range(layout.offset, layout.offset + layout.payload)
    ),
    "byte flipped: anywhere": _flip(lambda layout: range(layout.stride)),
    "byte flipped: closing zeros": _flip(None),
    "cut off: between samples": _cut(lambda rng, layout: 0),
    "cut off: in a header": _cut(lambda rng, layout: int(rng.integers(1, BLOCK))),
    "cut off: after a header": _cut(lambda rng, layout: BLOCK),
    "cut off: in the token ids": _cut(
        lambda rng, layout: layout.offset + int(rng.integers(1, layout.payload))
    ),
    "cut off: closing zeros": _as(lambda rng, data: data[: -int(rng.integers(1, len(END) + 1))]),
    "hole of zeros: 512 bytes": _hole(512),
    "hole of zeros: 4096 bytes": _hole(4096),
    "bytes lost within": _bytes_lost,
    "bytes inserted": _bytes_inserted,
    "garbage appended": _as(lambda rng, data: data + rng.bytes(int(rng.integers(1, 2000)))),
    "zeros appended": _as(lambda rng, data: data + bytes(int(rng.integers(1, 20)) * BLOCK)),
    "another tar appended": _appended,
    "two tars exchanged": _exchanged,
    "tar of another data set": lambda rng, sound, stem: {stem: sound.strangers[stem]},
    "half a tar of another data set": _spliced,
    "sample twice": _on_rows(_twice),
    "sample over another": _on_rows(_over),
    "sample removed": _on_rows(_removed),
    "samples exchanged": _on_rows(_swapped),
    "contents of samples exchanged": _on_rows(_contents_swapped),
    "label is another's": _label_other,
    "label removed": _label_lost,
    "stray member": _stranger,
    "packed again by tar": _packed_again,
    "gzip named .tar": _as(lambda rng, data: gzip.compress(data, mtime=0)),
    "bytes in reverse": _as(lambda rng, data: data[::-1]),
    "all zeros": _as(lambda rng, data: bytes(len(data))),
    "error page named .tar": _as(lambda rng, data: ERROR_PAGE),
    "error page, padded to size": _as(lambda rng, data: ERROR_PAGE.ljust(len(data), b"\n")),
    "empty file": _as(lambda rng, data: b""),
    "no file": _as(lambda rng, data: None),
}


@contextmanager
def inflicted(sound: Sound, fault: Fault) -> Iterator[bool]:
    """The fault on disk for as long as this lasts; tells whether it changed anything."""
    try:
        for stem, data in fault.tars.items():
            path = sound.folder / f"{stem}.tar"
            path.unlink()  # a new file: pages of the old one may still be mapped
            if data is not None:
                path.write_bytes(data)
        yield any(data != sound.tars[stem] for stem, data in fault.tars.items())
    finally:
        for stem in fault.tars:
            path = sound.folder / f"{stem}.tar"
            path.unlink(missing_ok=True)
            path.write_bytes(sound.tars[stem])


def read(
    sound: Sound, fault: Fault, reader: Callable[[], Batches] | None = None, again: bool = False
) -> Reading:
    """What ``TokenShards``, or another reader, hands out, compared with what was written.

    ``again``: a row may come twice, in the place of another.
    """
    total = sum(COUNTS)
    seen = np.zeros(total, int)
    try:
        for batch in reader() if reader else _default(sound, fault):
            ids = batch["id"].numpy()
            if batch.keys() != sound.rows.keys() or not ((ids >= 0) & (ids < total)).all():
                return Reading("WRONG", f"fields {list(batch)}, ids {ids.tolist()}")
            np.add.at(seen, ids, 1)
            for name, values in batch.items():
                if not np.array_equal(values.numpy(), sound.rows[name][ids]):
                    return Reading("WRONG", f"{name} of ids {ids.tolist()}")
            if not again and seen.max() > 1:
                return Reading("WRONG", f"ids {np.flatnonzero(seen > 1).tolist()} came twice")
    except ShardError as error:
        named = error.shard in fault.tars and str(error.shard) in str(error)
        return Reading("found" if named else "WRONG", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Reading("WRONG", f"{type(error).__name__}, no ShardError: {error}")
    if seen.sum() != total:
        return Reading("WRONG", f"ended after {seen.sum()} of {total} rows")
    return Reading("harmless" if seen.all() else "passed over")


def _default(sound: Sound, fault: Fault) -> Batches:
    return TokenShards(sound.folder, with_ids=True).batches(1 + fault.number % 7)


def read_stock(sound: Sound) -> Reading:
    """What stock webdataset hands out."""
    import webdataset

    urls = [str(sound.folder / f"{stem}.tar") for stem in sound.tars]
    raising = webdataset.handlers.reraise_exception
    reader = webdataset.WebDataset(urls, shardshuffle=False, handler=raising).decode(
        handler=raising
    )
    return _tally(sound, (_sample(sound, each) for each in reader))


def read_tars(sound: Sound, folder: Path) -> Reading:
    """What ``siftloader.tars`` makes of the same files, as tars of others."""
    from siftloader.tars import webdataset

    def samples() -> Iterator[Sample]:
        urls = [folder / f"{stem}.tar" for stem in sound.tars]
        stream = webdataset(urls, batch_size=3, shuffle=0, masking=None, with_keys=True)
        for batch in stream:
            for row in range(len(batch["__key__"])):
                each = {name: batch[name][row] for name in ("__key__", "cls") if name in batch}
                yield _sample(sound, each | {"input_ids.npy": batch["input_ids"][row].numpy()})

    return _tally(sound, samples())


def record(sets: list[Sound]) -> None:
    """Write down size and hash of the sound tars, for those that read them as tars of others."""
    from siftloader.tars import record_tars

    for sound in sets:
        record_tars(str(sound.recorded))


def _sample(sound: Sound, found: Mapping[str, Any]) -> Sample:
    ids, label = found.get("input_ids.npy"), found.get("cls")
    return (
        found["__key__"],
        None if ids is None else ids.astype(sound.layout.dtype).tobytes(),
        None if label is None else int(label),
    )


def _tally(sound: Sound, samples: Iterator[Sample]) -> Reading:
    # All right samples, some of them, others too; with an error or without.
    left, wrong = sound.samples.copy(), ""
    try:
        for sample in samples:
            if not left[sample] and not wrong:
                again = sample in sound.samples
                wrong = f"{sample[0]}: {'twice' if again else 'not as written'}"
            left[sample] -= 1
    except Exception as error:
        return Reading("late" if wrong else "error", f"{wrong} {type(error).__name__}: {error}")
    if wrong:
        return Reading("wrong", wrong)
    lost = left.total()
    return Reading("short", f"{lost} samples lost") if lost else Reading("harmless")


OTHERS: dict[str, Callable[[Sound], Reading]] = {
    "webdataset": read_stock,
    "siftloader.tars": lambda sound: read_tars(sound, sound.plain),
    "recorded": lambda sound: read_tars(sound, sound.recorded),
}
VERDICTS = ("error", "late", "harmless", "short", "wrong")


def main() -> None:
    options = _options()
    others = {} if options.alone else OTHERS
    _print_machine(options)
    tables = {who: collections.Counter[tuple[str, str]]() for who in ("siftloader", *others)}
    told, unchanged, begin = [], 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sets = write_sets(Path(folder))
        if others:
            record(sets)
        for number in range(options.faults) if options.only is None else [options.only]:
            sound, fault = draw(sets, number, options.seed)
            with inflicted(sound, fault) as changed:
                readings = {"siftloader": read(sound, fault)}
                readings |= {who: other(sound) for who, other in others.items() if changed}
            if not changed and readings["siftloader"].verdict == "harmless":
                unchanged += 1
                continue
            for who, reading in readings.items():
                tables[who][fault.kind, reading.verdict] += 1
                if reading.verdict == "WRONG" or options.only is not None:
                    line = f"fault {fault.number} ({fault.kind}, {sound.folder.name}): {who} "
                    told.append(f"{line}{reading.verdict} {reading.detail}")
    _print_table(tables)
    print(f"\n{unchanged} faults changed no byte; {time.perf_counter() - begin:.0f} s")
    for line in told:
        print(line)
    if any(verdict == "WRONG" for _, verdict in tables["siftloader"]):
        raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--faults", type=int, default=56 * len(KINDS), help="how many, of all kinds"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other faults")
    parser.add_argument("--only", type=int, help="this fault alone, and what came of it")
    parser.add_argument("--alone", action="store_true", help="read by TokenShards alone")
    return parser.parse_args()


def _print_machine(options: argparse.Namespace) -> None:
    versions = f"python {platform.python_version()}, numpy {np.__version__}"
    if not options.alone:
        import webdataset

        versions += f", webdataset {webdataset.__version__}"
    now = datetime.datetime.now(datetime.timezone.utc)
    print(f"{platform.platform()}, {versions}, {now:%Y-%m-%d}")
    print(f"{options.faults:,} faults, seed {options.seed}\n")


def _print_table(tables: Mapping[str, collections.Counter[tuple[str, str]]]) -> None:
    columns = dict.fromkeys(tables, VERDICTS) | {"siftloader": ("found", "harmless", "WRONG")}
    width = max(map(len, KINDS)) + 1
    heads = [f"  {who}".ljust(9 * len(columns[who])) for who in tables]
    print((" " * width + " |".join(heads)).rstrip())
    print(" " * width + " |".join("".join(f"{v:>9}" for v in columns[who]) for who in tables))
    for kind in [*KINDS, "all"]:
        parts = []
        for who, table in tables.items():
            counts = [_sum(table, kind, verdict) for verdict in columns[who]]
            parts.append("".join(f"{count or '-':>9}" for count in counts))
        if kind == "all" or any(kind == found for found, _ in tables["siftloader"]):
            print(f"{kind:<{width}}{' |'.join(parts)}")


def _sum(table: collections.Counter[tuple[str, str]], kind: str, verdict: str) -> int:
    return sum(n for (k, v), n in table.items() if v == verdict and kind in (k, "all"))


if __name__ == "__main__":
    warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves files open
    main()
