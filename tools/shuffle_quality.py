"""How well an order is shuffled: ours, buffers of other loaders, and what a uniform permutation gives.

    python tools/shuffle_quality.py [--samples 262144] [--shards 128] [--epochs 8] [--seed 0]

No file is read: an order is where on disk the samples of an epoch lie, in the order in which they come.
Each figure is relative to a uniform permutation, whose expectation is 1.00:

* moved: how far samples come from their place on disk. Permuting shards is enough for 1.
* parted: how far apart in the stream two samples come that are neighbours on disk.
* adjacent: pairs in a row that were neighbours on disk, in either order; 0 would be as odd as 9.
* same shard: pairs in a row from one shard.
* mix, sorted: how much the shares of 8 sources vary from batch to batch (256), over what drawing lots
  gives, where the disk holds one source after the other. 256 would be one source in every batch.
* mix, prepared: the same where all samples were shuffled before they were written, as `siftloader shard`
  does. Then every reader's batches are mixed; what is left to the reader is another order in each epoch.

webdataset: shards through a buffer of 100, samples through ``.shuffle(n)``, which starts to hand out when 100
are in it. datasets: shards permuted, up to 10 read in turn, then a buffer of which a random half goes out when
it is full (as in 5.2). "8 readers": each with its share of the shards, their batches joined a sample of
each in turn; ours with ``lanes=8`` reads them that way, with one lane 8 readers share every window.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from siftloader.order import Order


BATCH, SOURCES, READERS = 256, 8, 8
SHARD_BUFFER, INITIAL, AT_ONCE = 100, 100, 10  # of webdataset, of webdataset, of datasets
COLUMNS = ("moved", "parted", "adjacent", "same shard", "mix, sorted", "mix, prepared")

Item = TypeVar("Item")
Places = NDArray[np.int64]  # [N]: where on disk the n-th sample of the stream lies


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    print(
        f"python {platform.python_version()}, numpy {np.__version__}, "
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}\n"
        f"{options.samples:,} samples in {options.shards} shards, batches of {BATCH}, {SOURCES} "
        f"sources, mean of {options.epochs} epochs; 1.00 is a uniform permutation\n"
    )
    print(f"{'':<38}" + "".join(f"{column:>15}" for column in COLUMNS))
    for name, order in orders(options.samples, options.shards, options.seed).items():
        found = [measure(order(epoch), options.shards, epoch) for epoch in range(options.epochs)]
        means = {column: float(np.mean([each[column] for each in found])) for column in COLUMNS}
        print(f"{name:<38}" + "".join(f"{means[column]:>15.2f}" for column in COLUMNS), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=262_144, help="default: %(default)s")
    parser.add_argument("--shards", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.samples % options.shards or options.shards % READERS:
        parser.error(
            f"--samples must be a multiple of --shards, and --shards one of {READERS}, got "
            f"{options.samples} and {options.shards}"
        )
    if options.samples // BATCH < 2 or options.epochs < 1:
        parser.error(f"at least {2 * BATCH} samples and 1 epoch are needed")
    return options


def orders(samples: int, shards: int, seed: int) -> dict[str, Callable[[int], Places]]:
    """By name: an epoch's order, from its number."""
    rows = samples // shards

    def ours(window: int, lanes: int) -> Callable[[int], Places]:
        def order(epoch: int) -> Places:
            made = Order(np.full(shards, rows), seed=seed, epoch=epoch, window=window, lanes=lanes)
            shard, row = made.locate(np.arange(samples))
            return shard * rows + row

        return order

    def joined(read: Callable[[list[int], int, int], Iterable[int]], readers: int) -> Callable:
        def order(epoch: int) -> Places:
            rng = random.Random(f"{seed}/{epoch}")
            numbers = rng.sample(range(shards), shards)
            streams = [
                np.fromiter(read(numbers[reader::readers], rows, rng.getrandbits(32)), np.int64)
                for reader in range(readers)
            ]
            return np.stack(streams, axis=1).ravel()

        return order

    def of_webdataset(size: int) -> Callable[[list[int], int, int], Iterator[int]]:
        return lambda numbers, rows, key: webdataset_buffer(
            samples_of(webdataset_buffer(numbers, SHARD_BUFFER, random.Random(key)), rows),
            size,
            random.Random(key + 1),
        )

    def of_datasets(size: int) -> Callable[[list[int], int, int], Iterator[int]]:
        return lambda numbers, rows, key: datasets_buffer(
            in_turn(numbers, rows), size, np.random.default_rng(key)
        )

    return {
        "uniform": lambda epoch: np.random.default_rng([seed, epoch]).permutation(samples),
        "as on disk": lambda epoch: np.arange(samples),
        "siftloader, window 1": ours(1, 1),
        "siftloader, window 8 (default)": ours(8, 1),
        "siftloader, window 32": ours(32, 1),
        "webdataset, .shuffle(1000)": joined(of_webdataset(1000), 1),
        "webdataset, .shuffle(10000)": joined(of_webdataset(10_000), 1),
        "datasets, .shuffle(), 1000": joined(of_datasets(1000), 1),
        "datasets, .shuffle(), 10000": joined(of_datasets(10_000), 1),
        f"{READERS} readers: siftloader, {READERS} lanes": ours(8, READERS),
        f"{READERS} readers: webdataset, 1000 each": joined(of_webdataset(1000), READERS),
        f"{READERS} readers: datasets, 1000 each": joined(of_datasets(1000), READERS),
    }


def samples_of(numbers: Iterable[int], rows: int) -> Iterator[int]:
    return chain.from_iterable(range(number * rows, (number + 1) * rows) for number in numbers)


def webdataset_buffer(items: Iterable[Item], size: int, rng: random.Random) -> Iterator[Item]:
    """webdataset's ``_shuffle``: two come in for each that goes out, until the buffer is full."""
    coming = iter(items)
    held: list[Item] = []
    for item in coming:
        held.append(item)
        if len(held) < size:
            held.extend(another for another in [next(coming, None)] if another is not None)
        if len(held) >= min(INITIAL, size):
            yield picked(held, rng)
    while held:
        yield picked(held, rng)


def picked(held: list[Item], rng: random.Random) -> Item:
    at = rng.randint(0, len(held) - 1)
    held[at], held[-1] = held[-1], held[at]
    return held.pop()


def in_turn(numbers: Sequence[int], rows: int) -> Iterator[int]:
    """The samples of up to ten stretches of shards, one of each in turn."""
    parts = np.array_split(np.array(numbers), min(AT_ONCE, len(numbers)))
    streams = [samples_of(part.tolist(), rows) for part in parts]
    while streams:
        going = []
        for stream in streams:
            for item in stream:
                yield item
                going.append(stream)
                break
        streams = going


def datasets_buffer(items: Iterable[int], size: int, rng: np.random.Generator) -> Iterator[int]:
    """datasets' buffer since 5.x: shuffled when it is full, half of it handed out, half of it kept."""
    held: list[int] = []
    for item in items:
        held.append(item)
        if len(held) >= size:
            held = [held[at] for at in rng.permutation(len(held))]
            out = len(held) - size // 2
            yield from held[:out]
            held = held[out:]
    yield from (held[at] for at in rng.permutation(len(held)))


def measure(places: Places, shards: int, seed: int = 0) -> dict[str, float]:
    """The figures of one order, each over its expectation for a uniform permutation."""
    count = len(places)
    rows = count // shards
    apart = (count + 1) / 3  # expected distance of two places
    comes = np.empty(count, np.int64)
    comes[places] = np.arange(count)
    step = np.abs(np.diff(places))
    same = np.diff(places // rows) == 0
    sorted_on_disk = np.arange(count) * SOURCES // count
    prepared = np.random.default_rng([seed, 1]).permutation(sorted_on_disk)
    return {
        "moved": float(np.abs(places - np.arange(count)).mean()) / apart,
        "parted": float(np.abs(np.diff(comes)).mean()) / apart,
        "adjacent": float((step == 1).mean()) / (2 / count),
        "same shard": float(same.mean()) / ((rows - 1) / (count - 1)),
        "mix, sorted": mix(sorted_on_disk[places]),
        "mix, prepared": mix(prepared[places]),
    }


def mix(sources: Places) -> float:
    """Variance of the shares of sources over batches, over that of batches drawn without replacement."""
    batches = sources[: len(sources) // BATCH * BATCH].reshape(-1, BATCH)
    shares = np.stack([(batches == source).mean(axis=1) for source in range(SOURCES)])
    overall = np.bincount(sources, minlength=SOURCES)[:, None] / len(sources)
    left = (len(sources) - BATCH) / (len(sources) - 1)
    expected = overall * (1 - overall) / BATCH * left
    return float(np.mean((shares - overall) ** 2 / expected))


if __name__ == "__main__":
    main()
