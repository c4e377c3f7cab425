"""python tools/bench_stream.py [--samples 16384] [--passes 5]

Samples per second of ``TokenShards.batches(256)`` beside stock webdataset, on the same shards: random
Zipf ids in uint16, 512 tokens a sample, written to a temporary folder. Both give int64 tensors of 256
rows. One process, one run; the passes are interleaved and the median of each kind is printed.

Bars: unmasked at least 20 x stock and about 100,000 samples/s; masked at least 6 x stock.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from siftloader.shards import Layout, Shard, Source, Tokenizer, write_dataset, write_shard
from siftloader.stream import TokenShards


BATCH, TOKENS, VOCABULARY = 256, 512, 30522
SPECIAL = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}


def main() -> None:
    options = _options()
    print(f"{_cpu()}, {torch.get_num_threads()} threads, {platform.platform()}")
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"webdataset {wds.__version__}, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    )
    print(f"{options.samples:,} samples of {TOKENS} uint16 ids, batches of {BATCH}\n")
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), options.samples, options.shards)
        _report(_measure(Path(folder), options.samples, options.passes))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=16384, help="samples written and read")
    parser.add_argument("--shards", type=int, default=8, help="shards they are spread over")
    parser.add_argument(
        "--passes", type=int, default=5, help="passes of each kind; the median counts"
    )
    return parser.parse_args()


def _write(folder: Path, samples: int, shards: int) -> None:
    rng = np.random.default_rng(0)
    layout = Layout.for_vocabulary(TOKENS, VOCABULARY)
    written: list[Shard] = []
    for number, part in enumerate(np.array_split(np.arange(samples), shards)):
        words = 999 + np.minimum(rng.zipf(1.2, (len(part), TOKENS)), VOCABULARY - 1000)
        words[:, 0], words[:, -1] = SPECIAL["cls"], SPECIAL["sep"]
        sources = np.zeros(len(part), np.uint8)
        written.append(write_shard(folder, f"train-{number:06d}", words, sources, layout))
    write_dataset(
        folder,
        written,
        layout=layout,
        objective="mlm",
        tokenizer=Tokenizer("random", "0" * 64, VOCABULARY, SPECIAL),
        sources=[Source("random", "0" * 64, samples)],
        unigrams=np.zeros(VOCABULARY, np.int64),
        seed=0,
    )


def _measure(folder: Path, samples: int, passes: int) -> dict[str, list[float]]:
    readers: dict[str, Callable[[], Iterator[Tensor]]] = {
        "stock webdataset": lambda: _stock(folder),
        "siftloader, first pass (verifying)": lambda: _ours(TokenShards(folder, masking=None)),
    }
    for name, masking in (("unmasked", None), ("masked", 0.15)):
        shards = TokenShards(folder, masking=masking)
        for _ in shards.batches(BATCH):  # verified from here on
            pass
        readers[f"siftloader, {name}"] = lambda shards=shards: _ours(shards)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(passes):
        for name, reader in readers.items():
            start = time.perf_counter()
            rows = sum(len(batch) for batch in reader())
            rates[name].append(samples / (time.perf_counter() - start))
            assert rows == samples, (name, rows)
    return rates


def _ours(shards: TokenShards) -> Iterator[Tensor]:
    for batch in shards.batches(BATCH):
        yield batch["input_ids"]


def _stock(folder: Path) -> Iterator[Tensor]:
    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    rows: list[np.ndarray] = []
    for sample in wds.WebDataset(urls, shardshuffle=False).decode():
        rows.append(sample["input_ids.npy"])
        if len(rows) == BATCH:
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
            rows = []
    if rows:
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def _report(rates: dict[str, list[float]]) -> None:
    median = {name: statistics.median(values) for name, values in rates.items()}
    stock = median["stock webdataset"]
    print(f"{'samples per second':<38}{'median':>10}{'least':>10}{'most':>10}{'x stock':>9}")
    for name, values in rates.items():
        print(
            f"{name:<38}{median[name]:>10,.0f}{min(values):>10,.0f}{max(values):>10,.0f}"
            f"{median[name] / stock:>9.1f}"
        )
    print()
    for name, bar in (("unmasked", 20), ("masked", 6)):
        ratio = median[f"siftloader, {name}"] / stock
        print(f"{name}: {ratio:.1f} x stock, bar {bar} x: {'met' if ratio >= bar else 'MISSED'}")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


if __name__ == "__main__":
    main()
