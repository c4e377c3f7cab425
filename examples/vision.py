"""python examples/vision.py --seeds 1

Train a ResNet-18 and a small ViT on Fashion-MNIST, plain and sifted, and print what it was worth: test
accuracy after the same number of backpropagated images, and after the same time with scoring charged.

    plain        every image is trained on, in a shuffled order
    random half  of twice the images, a random half: the control that the others must beat
    sifted       of twice the images, the half with the highest loss, by
                 * the model's own head on its first layers (ViT: all its layers are alike)
                 * a small head of its own on a stage's features, trained on the side (ResNet: its
                   stages differ in width, so that its own head fits none of them but the last)

All arms of a seed begin with the same weights and draw the same images in the same order. Every learning
rate decays to zero over the steps of its run: an arm that is charged for scoring takes fewer steps. The
training loop (``train``) is a plain one; what differs is the expression that makes its loader.

The data are the four files of the Debian package dataset-fashion-mnist:

    sudo apt install dataset-fashion-mnist        # puts them into /usr/share/datasets/fashion-mnist
    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DIR
                                                  # without root: --data DIR/usr/share/datasets/fashion-mnist
    python examples/vision.py --data digits       # or scikit-learn's 1,797 small digits: no download
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from siftloader import SiftingDataLoader


FASHION = Path("/usr/share/datasets/fashion-mnist")
SIZE, CLASSES = 28, 10
ROUNDS = 8  # of the measurement of costs, at most


# ---- models: those of torchvision and timm in their own conventions, for images [P, 1, 28, 28]


class BasicBlock(nn.Module):
    """Two convolutions and a short cut around them."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or into != out:
            short = nn.Conv2d(into, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(short, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + short)


class ResNet(nn.Module):
    """He et al., 2016; ResNet-18 has a width of 64. The stem is for small images: 3 x 3, no pooling."""

    def __init__(self, width: int, blocks: tuple[int, ...] = (2, 2, 2, 2)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks[0], 1)
        self.layer2 = self._stage(width, 2 * width, blocks[1], 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks[2], 2)
        self.layer4 = self._stage(4 * width, 8 * width, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, CLASSES)

    @staticmethod
    def _stage(into: int, out: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(out, out, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(into, out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class PatchEmbed(nn.Module):
    """Squares of the image as vectors."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Every patch looks at every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, width = x.shape
        qkv = self.qkv(x).view(samples, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(samples, length, width))


class Block(nn.Module):
    """Attention and a layer of neurons, each with a short cut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Dosovitskiy et al., 2021, with a class token; patches of 4 x 4 are 49 positions."""

    def __init__(self, width: int, layers: int = 6, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (SIZE // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


# ---- data


@dataclass(frozen=True)
class Images:
    """Standardised images [N, 1, 28, 28] and their classes [N]."""

    name: str
    train: TensorDataset
    test: TensorDataset


def load(source: str, tested: int | None) -> Images:
    if source == "digits":
        name, (x, y, x_test, y_test) = "scikit-learn's digits", _digits()
    else:
        name, (x, y, x_test, y_test) = "Fashion-MNIST", _fashion(Path(source))
    mean, scale = x.mean(), x.std()
    x, x_test = (x - mean) / scale, (x_test - mean) / scale
    return Images(name, TensorDataset(x, y), TensorDataset(x_test[:tested], y_test[:tested]))


def _digits() -> tuple[Tensor, ...]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("--data digits needs scikit-learn: pip install scikit-learn")
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None]
    x = functional.interpolate(x, (SIZE, SIZE), mode="bilinear")
    y = torch.tensor(found.target, dtype=torch.long)
    return x[:1400], y[:1400], x[1400:], y[1400:]


def _fashion(folder: Path) -> tuple[Tensor, ...]:
    parts = []
    for part in ("train", "t10k"):
        images = _idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
        parts += [images[:, None].float(), _idx(folder / f"{part}-labels-idx1-ubyte.gz", 1).long()]
    return tuple(parts)


def _idx(path: Path, dimensions: int) -> Tensor:
    # Two zero bytes, the type (8: bytes), the number of dimensions, their sizes, the data.
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        sys.exit(
            f"no {path}; get the data with `sudo apt install dataset-fashion-mnist`, or without root: "
            f"`apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DIR` "
            f"and --data DIR/usr/share/datasets/fashion-mnist; or use --data digits"
        )
    if raw[:4] != bytes((0, 0, 8, dimensions)):
        sys.exit(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    sizes = np.frombuffer(raw, ">i4", dimensions, 4)
    return torch.from_numpy(
        np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(sizes).copy()
    )


# ---- training


@dataclass(frozen=True)
class Study:
    """A model, how it is trained, and the arms that are compared: what the loader is given, by name."""

    title: str
    build: type[nn.Module]
    width: int
    lr: float
    arms: dict[str, dict[str, Any]]


RANDOM = {"criterion": "random"}


def studies(arguments: argparse.Namespace) -> list[Study]:
    stage, layer = arguments.stage, arguments.layer
    return [
        Study(
            f"ResNet-18 of width {arguments.resnet_width}",
            ResNet,
            arguments.resnet_width,
            3e-3,
            {
                "plain": {},
                "random half": RANDOM,
                f"sifted, a head on stage {stage}": {"exit_head": "probe", "exit_layer": stage},
            },
        ),
        Study(
            f"ViT of width {arguments.vit_width}",
            ViT,
            arguments.vit_width,
            1e-3,
            {
                "plain": {},
                "random half": RANDOM,
                f"sifted, its own head, layer {layer}": {"exit_layer": layer},
                f"sifted, a head on layer {layer}": {"exit_head": "probe", "exit_layer": layer},
            },
        ),
    ]


def make_loader(
    arm: dict[str, Any],
    data: TensorDataset,
    batch_size: int,
    model: nn.Module,
    steps: int,
    seed: int,
) -> Iterable[list[Tensor]]:
    """torch's loader for the plain arm, ours for the others: the one expression that differs."""
    order = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"shuffle": True, "drop_last": True, "generator": order}
    if not arm:
        return DataLoader(data, batch_size, **options)
    # What an untrained model (or head) finds hard means nothing yet.
    return SiftingDataLoader(
        data, batch_size, model=model, warmup_steps=steps // 10, **arm, **options
    )


def train(
    model: nn.Module, loader: Iterable[list[Tensor]], steps: int, lr: float
) -> Iterator[float]:
    """A plain loop of ``steps`` steps; yields the seconds of each, drawing and scoring included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    ramp = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / ramp, 1 - step / steps)
    )
    model.train()
    done, began = 0, time.perf_counter()
    while done < steps:
        for images, labels in loader:
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            yield time.perf_counter() - began
            began = time.perf_counter()
            if done == steps:
                break


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in DataLoader(data, 500):
            right += int((model(images).argmax(1) == labels).sum())
    return right / len(data)


def fresh(study: Study, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return study.build(study.width)


def costs(study: Study, data: Images, batch_size: int, rounds: int) -> dict[str, float]:
    """Seconds of a step of each arm: medians of steps that take turns, so that a busy machine hits all."""
    runs = {}
    for name, arm in study.arms.items():
        model = fresh(study, 0)
        loader = make_loader(
            arm, data.train, batch_size, model, 0, 0
        )  # no warm-up: it sifts at once
        runs[name] = train(model, loader, rounds + 2, study.lr)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            began = time.perf_counter()
            next(run)
            if turn > 1:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


@dataclass(frozen=True)
class Result:
    """Test accuracies by seed: after as many steps as the plain arm, and after as much time."""

    step_ms: float
    timed_steps: int
    same_samples: list[float]
    same_time: list[float]


def compare(
    study: Study, data: Images, steps: int, batch_size: int, seeds: int, quiet: bool
) -> dict[str, Result]:
    cost = costs(study, data, batch_size, min(steps, ROUNDS))
    timed = {name: min(steps, round(steps * cost["plain"] / each)) for name, each in cost.items()}
    lengths = {name: sorted({steps, timed[name]}) for name in study.arms}
    total = seeds * sum(map(sum, lengths.values()))
    found: dict[tuple[str, int], list[float]] = {}
    with tqdm(total=total, unit="step", disable=quiet) as bar:
        for seed in range(seeds):
            for name, arm in study.arms.items():
                for length in lengths[name]:
                    bar.set_description(f"{study.title}: {name}, seed {seed}")
                    model = fresh(study, seed)
                    loader = make_loader(arm, data.train, batch_size, model, length, seed)
                    for _ in train(model, loader, length, study.lr):
                        bar.update()
                    found.setdefault((name, length), []).append(accuracy(model, data.test))
    return {
        name: Result(1000 * cost[name], timed[name], found[name, steps], found[name, timed[name]])
        for name in study.arms
    }


# ---- the table


def table(results: dict[str, Result]) -> str:
    """Accuracies in percent, mean and standard deviation over seeds; differences from the random half."""
    lines = [
        ["", "same images", "- random", "same time", "- random", "steps", "ms a step"],
    ]
    control = results["random half"]
    for name, each in results.items():
        own = name == "random half"
        lines.append(
            [
                name,
                _percent(each.same_samples),
                "" if own else _points(each.same_samples, control.same_samples),
                _percent(each.same_time),
                "" if own else _points(each.same_time, control.same_time),
                str(each.timed_steps),
                f"{each.step_ms:.0f}",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _percent(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f} %{spread}"


def _points(values: list[float], control: list[float]) -> str:
    # Seeds are paired: the same weights at first, the same images.
    apart = [100 * (one - other) for one, other in zip(values, control, strict=True)]
    error = f" ± {statistics.stdev(apart) / math.sqrt(len(apart)):.1f}" if len(apart) > 1 else ""
    return f"{statistics.mean(apart):+.1f}{error}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default=str(FASHION), metavar="FOLDER", help='the four files, or "digits"')
    add("--steps", type=int, default=400, help="steps of the plain arm (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images a step (default: %(default)s)")
    add("--seeds", type=int, default=1, help="how often all is repeated (default: %(default)s)")
    add("--stage", type=int, default=2, help="the ResNet's exit, 1..4 (default: %(default)s)")
    add("--layer", type=int, default=1, help="the ViT's exit, 1..6 (default: %(default)s)")
    add(
        "--resnet-width",
        type=int,
        default=16,
        help="64 for a full ResNet-18 (default: %(default)s)",
    )
    add("--vit-width", type=int, default=64, help="a multiple of 4 (default: %(default)s)")
    add("--models", nargs="+", choices=("resnet", "vit"), default=["resnet", "vit"])
    add("--test", type=int, metavar="N", help="test on the first N images only")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    add("--quick", action="store_true", help="see it run: tiny models, six steps, no result")
    given = parser.parse_args(arguments)
    if given.quick:
        given.steps, given.batch_size, given.test = 6, 8, 100
        given.resnet_width, given.vit_width = 4, 8
    if given.steps < 2 or given.seeds < 1 or given.batch_size < 2:
        parser.error("--steps and --batch-size must be 2 or more, --seeds 1 or more")
    if given.threads:
        torch.set_num_threads(given.threads)
    data = load(given.data, given.test)
    quiet = not sys.stderr.isatty()
    for study in studies(given):
        if study.build.__name__.lower() not in given.models:
            continue
        print(
            f"{study.title}: {given.steps} steps of {given.batch_size} images of {data.name} "
            f"({len(data.train):,} to train on, {len(data.test):,} to test), "
            f"{given.seeds} seed{'s' * (given.seeds > 1)}",
            flush=True,
        )
        found = compare(study, data, given.steps, given.batch_size, given.seeds, quiet)
        print(table(found), end="\n\n", flush=True)
    print(
        f"{datetime.date.today()}, {_processor()}, threads: {torch.get_num_threads()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}. Accuracy on held-out images, "
        f"± standard deviation over seeds; - random: paired differences in points, ± standard error."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores of {name}"


if __name__ == "__main__":
    main()
