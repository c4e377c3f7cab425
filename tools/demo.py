"""python tools/demo.py [--criteria loss entropy] [--quick]

Does sifting pay here? A tiny BERT and a tiny GPT are trained from scratch on real text, each plainly, on a
random half of twice the samples, and on the half that SIFT selects: the same initial weights, the same
candidate stream, the same number of samples backpropagated, a learning rate that has decayed to zero.
About six minutes on two idle cores, then runs/demo/ holds table.txt, demo.png, a log per arm and the plain models.

    siftloader probe --model tools/demo.py:bert --shards shards/built/mlm-128 --batch-size 16

asks which layer would pay from where the plain one ended (`make probe` asks it of both).

The arms are runs of examples/pretrain_bert.py and examples/pretrain_gpt.py, on the shards that `make demo`
prepares. One seed decides nothing, and the words under the table say so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import transformers
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import pretrain_bert
import pretrain_gpt

from siftloader import TokenShards


ROOT = Path(__file__).resolve().parent.parent
# How far apart plain and random half, which differ by chance alone, have ended: the largest gap over
# three seeds and both models (tools/LOG.md), in nats.
CHANCE = 0.05
PLATEAU = (
    0.1  # nats below the unigram entropy from which on a model knows more than word frequencies
)
NAMES = {
    "none": "plain",
    "random": "random half",
    "loss": "SIFT, loss",
    "entropy": "SIFT, entropy",
}
COLOURS = {"none": "#333333", "random": "#9a9a9a", "loss": "#c8442b", "entropy": "#2b6cc8"}


@dataclass(frozen=True)
class Subject:
    """A model to train, and on what."""

    name: str
    main: Callable[[list[str]], None]
    build: Callable[[pretrain_bert.Preset, TokenShards], nn.Module]
    preset: pretrain_bert.Preset
    shards: Path

    @property
    def title(self) -> str:
        return f"{self.name} ({self.preset.layers} layers of {self.preset.hidden})"


@dataclass(frozen=True)
class Arm:
    """What one run logged: a curve on some held-out samples, the end on all of them."""

    sift: str
    curve: list[dict[str, Any]]
    end: dict[str, Any]

    @property
    def loss(self) -> float:
        return self.end["val_loss"]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    subjects = subjects_of(options)
    for subject in subjects:
        if not subject.shards.is_dir():
            sys.exit(f"{subject.shards} is not there yet; `make demo` prepares it first")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "table.txt").open("w") as file:

        def say(text: str = "") -> None:
            print(text, flush=True)
            print(text, file=file, flush=True)

        say(machine())
        found = []
        for subject in subjects:
            arms = [run(subject, sift, options) for sift in ("none", "random", *options.criteria)]
            unigram = unigram_entropy(subject.shards)
            found.append((subject, arms, unigram))
            say(table(subject, arms, unigram, options))
            say(words(subject, arms, unigram) + "\n")
        if options.quick:
            say("A quick run only shows that everything works; its losses mean nothing.")
    draw(found, options.out / "demo.png")
    print(
        f"{os.path.relpath(options.out / 'demo.png')}: held-out loss against samples and against seconds\n"
        f"`make probe`: which layers would pay from where the plain models ended?"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    built = ROOT / "shards" / "built"
    add = parser.add_argument
    add("--criteria", nargs="+", choices=["loss", "entropy"], default=["loss"])
    add("--quick", action="store_true", help="half a minute: a few steps, to see that it runs")
    add("--seed", type=int, default=0, help="another one gives another answer: try it")
    add("--bert", type=Path, default=built / "mlm-128", help="shards with objective mlm")
    add("--gpt", type=Path, default=built / "clm-128", help="shards with objective clm")
    add("--out", type=Path, default=ROOT / "runs" / "demo", help="folder for what it finds")
    return parser.parse_args(arguments)


def subjects_of(options: argparse.Namespace) -> list[Subject]:
    bert, gpt = pretrain_bert, pretrain_gpt
    return [
        Subject("BERT", bert.main, bert.build_bert, bert.PRESETS["tiny"], options.bert),
        Subject("GPT", gpt.main, gpt.build_gpt, gpt.PRESETS["tiny"], options.gpt),
    ]


def bert() -> nn.Module:
    options = parse([])
    return trained(subjects_of(options)[0], options.out)


def gpt() -> nn.Module:
    options = parse([])
    return trained(subjects_of(options)[1], options.out)


def trained(subject: Subject, out: Path) -> nn.Module:
    """The plain model as a run of the demo left it."""
    file = checkpoint(subject, out)
    if not file.is_file():
        sys.exit(f"{file} is not there yet; `make demo` trains it")
    model = subject.build(subject.preset, TokenShards(subject.shards))
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["model"])
    return model


def checkpoint(subject: Subject, out: Path) -> Path:
    return out / f"{subject.name.lower()}-none.pt"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name()]
    text = (
        f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, "
        f"{platform.system()}, python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, "
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}\n"
    )
    if (busy := others_busy()) > 0.2:
        text += (
            f"Other work keeps {busy:.1f} cores busy: the losses are right, the seconds are not.\n"
        )
    return text


def others_busy() -> float:
    """Cores busy for a second while this process sleeps; 0 where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0

    def idle() -> int:
        fields = stat.read_text().split()  # cpu user nice system idle iowait ...
        return int(fields[4]) + int(fields[5])

    before, since = idle(), time.perf_counter()
    time.sleep(1)
    ticks = (time.perf_counter() - since) * os.sysconf("SC_CLK_TCK")
    return max(0.0, (os.cpu_count() or 1) - (idle() - before) / ticks)


def run(subject: Subject, sift: str, options: argparse.Namespace) -> Arm:
    steps, evaluations, samples = (8, 4, 32) if options.quick else (subject.preset.steps, 10, 128)
    log = options.out / f"{subject.name.lower()}-{sift}.jsonl"
    command = {
        "shards": subject.shards,
        "sift": sift,
        "steps": steps,
        "seed": options.seed,
        "eval-every": steps // evaluations,
        "eval-samples": samples,
        "final-samples": samples if options.quick else 1_000_000,
        "log": log,
    }
    if sift == "none":
        command["checkpoint"] = checkpoint(subject, options.out)
    with contextlib.redirect_stdout(io.StringIO()):  # the same lines are in the log
        subject.main([f"--{name}={value}" for name, value in command.items()])
    _about, *curve, end = [json.loads(line) for line in log.read_text().splitlines()]
    print(
        f"{subject.name}, {NAMES[sift]}: held-out loss {end['val_loss']:.3f} after "
        f"{end['seconds_training']:.0f} s",
        flush=True,
    )
    return Arm(sift, curve, end)


def unigram_entropy(folder: Path) -> float:
    """Nats per held-out token of a model that knows only how often each token occurs."""
    counts = TokenShards(folder).unigrams + 1.0
    surprise = np.log(counts.sum() / counts)  # [V]
    batches = TokenShards(folder, split="val").batches(256)
    labels = np.concatenate([batch["labels"].numpy().reshape(-1) for batch in batches])
    return float(surprise[labels[labels != -100]].mean())


def table(subject: Subject, arms: list[Arm], unigram: float, options: argparse.Namespace) -> str:
    preset = subject.preset
    lines = [
        f"\n{subject.title}, seed {options.seed}, {preset.batch_size} samples a step, chosen from "
        f"{2 * preset.batch_size} by its first layer",
        f"(as they come in the first {preset.sift_warmup:.0%} and the last {preset.cooldown:.0%} of "
        f"the steps)",
        f"{'':<15}{'samples':>9}{'held-out':>10}{'accuracy':>10}{'training':>10}{'scoring':>9}"
        f"{'scoring':>9}",
        f"{'':<15}{'backprop.':>9}{'nats':>10}{'':>10}{'seconds':>10}{'seconds':>9}{'share':>9}",
    ]
    for arm in arms:
        training, scoring = arm.end["seconds_training"], arm.end["seconds_scoring"]
        lines.append(
            f"{NAMES[arm.sift]:<15}{arm.end['samples']:>9,}{arm.loss:>10.3f}"
            f"{arm.end['val_accuracy']:>10.1%}{training:>10.1f}{scoring:>9.1f}"
            f"{scoring / training:>9.1%}"
        )
    loading = max(arm.end["seconds_loading"] for arm in arms)
    lines.append(f"{'unigrams alone':<15}{'':>9}{unigram:>10.3f}")
    lines.append(
        f"Scoring and loading (at most {loading:.1f} s) are part of training, evaluation is not. "
        f"The curves take fewer held-out samples than the table."
    )
    return "\n".join(lines)


def words(subject: Subject, arms: list[Arm], unigram: float) -> str:
    plain, random = arms[0], arms[1]
    below = unigram - plain.loss
    if below > PLATEAU:
        text = f"The plain {subject.name} ends {below:.2f} nats below the unigram entropy"
        text += ": it has left its plateau." if subject.name == "BERT" else "."
    else:
        text = (
            f"The plain {subject.name} is still on its plateau: {abs(below):.2f} nats "
            f"{'below' if below > 0 else 'above'} the unigram entropy, it has learned little but "
            f"word frequencies, and no arm can show much."
        )
    text += f"\nPlain and random half differ by chance alone: {abs(random.loss - plain.loss):.3f} nats."
    for arm in arms[2:]:
        text += (
            f"\n{NAMES[arm.sift]}: {against(arm, plain)}, {against(arm, random)}, for "
            f"{arm.end['seconds_training'] / plain.end['seconds_training'] - 1:+.0%} seconds. "
            f"{verdict(arm.loss - random.loss)}"
        )
    return text


def against(arm: Arm, other: Arm) -> str:
    gap = arm.loss - other.loss
    return f"{abs(gap):.3f} nats {'better' if gap < 0 else 'worse'} than {NAMES[other.sift]}"


def verdict(gap: float) -> str:
    """What a gap to the random half, in nats, is worth; negative is for sifting."""
    chance = f"arms that differ by chance alone have ended up to {CHANCE} nats apart"
    if abs(gap) < CHANCE:
        return f"Against that control a tie for one seed: {chance}."
    return (
        f"Against that control sifting {'won' if gap < 0 else 'lost'} here; {chance}, and this is "
        f"one seed: believe it after five paired ones."
    )


def draw(found: list[tuple[Subject, list[Arm], float]], file: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(found), 2, figsize=(10, 3.6 * len(found)), sharey="row", squeeze=False
    )
    axes_of = (
        ("samples", "samples backpropagated"),
        ("seconds_training", "training seconds, scoring included"),
    )
    for row, (subject, arms, unigram) in zip(grid, found, strict=True):
        for axes, (field, label) in zip(row, axes_of, strict=True):
            axes.axhline(unigram, color="#888888", linewidth=1, linestyle=":")
            for arm in arms:
                axes.plot(
                    [point[field] for point in arm.curve],
                    [point["val_loss"] for point in arm.curve],
                    color=COLOURS[arm.sift],
                    linewidth=1.8,
                    marker="o",
                    markersize=3.5,
                    label=NAMES[arm.sift],
                )
            axes.set_xlim(left=0)
            axes.set_xlabel(label)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].xaxis.set_major_formatter("{x:,.0f}")
        row[0].set_ylabel("held-out loss, nats per token")
        row[0].set_title(subject.title, loc="left", fontweight="bold")
        row[1].annotate(
            "unigrams alone",
            (1, unigram),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color="#666666",
            fontsize=9,
        )
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
