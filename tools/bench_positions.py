"""What scoring some positions of a causal model costs, and what it loses: python tools/bench_positions.py

Trains a small GPT on shards with objective clm and stops twice, early and at the end. There, pools of
unseen text are scored at the exit layers with every setting of `positions=`, with and without the unigram
counts as a control variate, and compared with the scores at full depth and all positions:

* overlap   share of the top half (by the full model) that the setting also keeps; half of it is chance
* Spearman  rank correlation with the full model's scores, over a pool
* of a step median seconds of scoring a pool of P = 2 b, from the host on, over those of a plain training
            step with b rows (forward, backward, AdamW), all measured interleaved
* floor     the FLOPs of that scoring over those of that step (matrix products, by formula)

"all" at the exit layer shows what the early exit alone loses; "Rarity" is the surprise of the tokens under
the unigram counts, without any model.

The second table is about the slope of the control variate. `Stride` and `First` find it within the samples
of the pool; beside it stand the same estimates with a fixed slope, computed from all losses.

    python tools/bench_positions.py --steps 300 --batch-size 16 --pools 8
    python tools/bench_positions.py --draw runs/bench_positions/bench_positions.json    # measured elsewhere

The tables, their figures (JSON) and a picture of the frontier (PNG, where matplotlib is installed) go to --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # siftloader may not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import pretrain_bert
import pretrain_gpt
from bench_scoring import Shape, floor, header
from demo import others_busy

from siftloader import EarlyExit, First, Rarity, Sifter, Stride, TokenShards
from siftloader.targets import Unigrams


ROOT = Path(__file__).resolve().parent.parent
Batch = dict[str, Tensor]
SLOPES = (0.0, 0.5, 1.0)
CONTROL = ", control"
KINDS = {
    "Stride(2)": (Stride, 2),
    "Stride(4)": (Stride, 4),
    "Stride(8)": (Stride, 8),
    "Stride(16)": (Stride, 16),
    "First(32)": (First, 32),
    "First(16)": (First, 16),
}


@dataclass
class Row:
    """One setting at one exit layer: means over the pools, and shares of a plain step."""

    way: str
    layer: int
    controlled: bool
    overlap: float
    spread: float
    spearman: float
    seconds: float
    cost: float
    floor: float | None  # none where no model runs


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.draw:
        draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png"))
        return
    if not options.shards.is_dir():
        sys.exit(f"{options.shards} is not there yet; `make demo` prepares it first")
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    shards = TokenShards(options.shards, seed=options.seed)
    if shards.shard_set.objective != "clm":
        sys.exit(f"{options.shards} has objective {shards.shard_set.objective}, need clm")
    preset = pretrain_gpt.PRESETS[options.preset]
    model = pretrain_gpt.build_gpt(preset, shards).to(device).train()
    about = (
        f"GPT {preset.layers} x {preset.hidden}, {shards.shard_set.layout.seq_len} tokens, "
        f"{shards.vocab_size:,} ids, batch {options.batch_size} of {2 * options.batch_size}, "
        f"loss, {options.pools} pools, seed {options.seed}"
    )
    found: dict[str, Any] = {"machine": header(device), "about": about, "moments": []}
    text = found["machine"]
    if (busy := others_busy()) > 0.2:
        text += (
            f"\nOther work keeps {busy:.1f} cores busy: the seconds are too long, shares less so."
        )
    text += f"\n{about}\n"
    print(text, flush=True)
    batches = endless(shards, options.batch_size, torch.device("cpu"))
    early = max(1, options.steps // 10)
    moved = (on(device, batch) for batch in batches)  # of the same stream
    options.out.mkdir(parents=True, exist_ok=True)
    for done in train(model, preset, options.steps, {early, options.steps}, moved):
        pools = [merge(next(batches), next(batches)) for _ in range(options.pools)]
        if device.type == "cuda":
            pools = [{name: field.pin_memory() for name, field in each.items()} for each in pools]
        told, moment = report(model, preset, shards, pools, done, options)
        print(told, flush=True)
        text += "\n" + told
        found["moments"].append(moment)
        (options.out / "bench_positions.json").write_text(json.dumps(found, indent=1))
        (options.out / "bench_positions.txt").write_text(text)
    draw(found, options.out / "bench_positions.png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shards", type=Path, default=ROOT / "shards" / "built" / "clm-128")
    add("--preset", choices=pretrain_gpt.PRESETS, default="tiny")
    add("--steps", type=int, default=300, help="measured after a tenth of them and at the end")
    add("--batch-size", type=int, default=16, help="rows trained on; pools are twice as large")
    add("--pools", type=int, default=8, help="pools to score, each setting once on each (8)")
    add("--exit-layers", type=int, nargs="+", default=[1, 2], help="(1 2)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=ROOT / "runs" / "bench_positions")
    add("--draw", type=Path, metavar="JSON", help="only draw what was measured")
    return parser.parse_args(arguments)


def endless(shards: TokenShards, rows: int, device: torch.device) -> Iterator[Batch]:
    epoch = 0
    while True:
        for batch in shards.read_batches(rows, epoch):
            if len(batch["labels"]) == rows:
                yield {name: values.to(device) for name, values in batch.items()}
        epoch += 1


def merge(one: Batch, other: Batch) -> Batch:
    return {name: torch.cat([one[name], other[name]]) for name in one}


def on(device: torch.device, batch: Batch) -> Batch:
    return {name: field.to(device, non_blocking=True) for name, field in batch.items()}


def train(
    model: nn.Module,
    preset: pretrain_bert.Preset,
    steps: int,
    stops: set[int],
    batches: Iterator[Batch],
) -> Iterator[int]:
    optimizer = torch.optim.AdamW(pretrain_bert.parameter_groups(model), preset.lr)
    warmup = max(1, round(preset.lr_warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    for done in range(1, steps + 1):
        step(model, optimizer, next(batches))
        schedule.step()
        if done in stops:
            yield done


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    model(**batch).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), pretrain_bert.CLIP)
    optimizer.step()
    optimizer.zero_grad()


def report(
    model: nn.Module,
    preset: pretrain_bert.Preset,
    shards: TokenShards,
    pools: list[Batch],
    done: int,
    options: argparse.Namespace,
) -> tuple[str, dict[str, Any]]:
    """Both tables, and what is in the first one."""
    counts, rows = shards.unigrams, options.batch_size
    length = shards.shard_set.layout.seq_len
    shape = Shape(
        "gpt2",
        preset.layers,
        preset.hidden,
        preset.heads,
        preset.heads,
        4 * preset.hidden,
        shards.vocab_size,
        length,
        rows,
        1.0,
    )
    layers = [layer for layer in options.exit_layers if layer <= preset.layers]
    all_depth = f"full depth, all {length - 1}"
    scorers: dict[tuple[str, int], Sifter] = {
        (all_depth, preset.layers): Sifter(model, exit_layer=preset.layers)
    }
    floors: dict[tuple[str, int], float | None] = {
        (all_depth, preset.layers): floor(shape, preset.layers, 0.5)
    }
    for layer in layers:
        scorers["all", layer] = Sifter(model, exit_layer=layer)
        floors["all", layer] = floor(shape, layer, 0.5)
        for name, (kind, number) in KINDS.items():
            for control in (None, counts):
                key = (name if control is None else f"{name}{CONTROL}", layer)
                positions = kind(number, control)
                scorers[key] = Sifter(model, exit_layer=layer, positions=positions)
                floors[key] = floor(shape, layer, 0.5, positions)
    scorers["Rarity", 0], floors["Rarity", 0] = Sifter(model, criterion=Rarity(counts)), None

    other = copy.deepcopy(model)  # steps are timed on it, so that all pools see one model
    optimizer = torch.optim.AdamW(pretrain_bert.parameter_groups(other), 1e-4)
    plain: list[float] = []
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in scorers}
    scores: dict[tuple[str, int], list[Tensor]] = {key: [] for key in scorers}
    for scorer in scorers.values():
        scorer.score(pools[0])  # the first pool of a scorer is looked at twice
    halves = [
        {name: values[:rows].to(options.device) for name, values in pool.items()} for pool in pools
    ]
    step(other, optimizer, halves[0])
    for pool, half in zip(pools, halves, strict=True):
        plain.append(timed(lambda half=half: step(other, optimizer, half))[0])
        for key, scorer in scorers.items():
            taken, found = timed(lambda scorer=scorer, pool=pool: scorer.score(pool))
            seconds[key].append(taken)
            scores[key].append(found.cpu())
    truth, plain_step = scores[all_depth, preset.layers], statistics.median(plain)
    table = []
    for (name, layer), own in scores.items():
        hits = [overlap(a, b) for a, b in zip(own, truth, strict=True)]
        alike = statistics.mean(spearman(a, b) for a, b in zip(own, truth, strict=True))
        median = statistics.median(seconds[name, layer])
        share, below = median / plain_step, floors[name, layer]
        spread, controlled = statistics.pstdev(hits), name.endswith(CONTROL)
        mean = statistics.mean(hits)
        table.append(Row(name, layer, controlled, mean, spread, alike, median, share, below))
    loss = torch.cat(truth).mean().item()
    lines = [
        f"after {done} steps: loss {loss:.2f} nats, a plain step {plain_step:.3f} s",
        f"{'j':>3} {'':<21}{'overlap':>8}{'spread':>8}{'Spearman':>10}{'seconds':>9}"
        f"{'of a step':>11}{'floor':>8}{'x floor':>9}",
        *map(line, table),
        *slopes(model, scores, truth, pools, Unigrams(counts), layers[0], options.device),
    ]
    moment = {"step": done, "loss": loss, "plain": plain_step, "rows": [asdict(r) for r in table]}
    return "\n".join(lines) + "\n", moment


def line(row: Row) -> str:
    text = (
        f"{row.layer or '-':>3} {row.way:<21}{row.overlap:>8.1%}{row.spread:>8.1%}{row.spearman:>10.3f}"
        f"{row.seconds:>9.3f}{row.cost:>11.1%}"
    )
    if row.floor is None:
        return text + f"{'-':>8}{'-':>9}"
    return text + f"{row.floor:>8.1%}{row.cost / row.floor:>9.2f}"


def slopes(
    model: nn.Module,
    scores: dict[tuple[str, int], list[Tensor]],
    truth: list[Tensor],
    pools: list[Batch],
    surprise: Callable[[Tensor], Tensor],
    layer: int,
    device: str,
) -> Iterator[str]:
    """The control variate with a fixed slope, from the losses at all positions of the exit layer."""
    early = EarlyExit(model, layer)
    losses, controls = [], []  # [P, T - 1] each
    for pool in pools:
        moved = on(torch.device(device), pool)
        logits = early.logits(moved)[:, :-1].float()
        wanted = moved["labels"][:, 1:]
        values = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        losses.append(values.cpu())
        controls.append(surprise(pool["labels"][:, 1:]))
    yield f"\ncontrol variate, j = {layer}: overlap by slope{'in the pool':>17}{'slope there':>13}"
    yield f"{'':<22}" + "".join(f"{slope:>8}" for slope in SLOPES)
    for name, (kind, number) in KINDS.items():
        rank = torch.arange(losses[0].shape[1])[None]
        scored = kind(number).takes(rank)[0]
        plain = [values[:, scored].mean(1) for values in losses]
        off = [values.mean(1) - values[:, scored].mean(1) for values in controls]
        own = scores[f"{name}{CONTROL}", layer]
        found = [
            ((a - b) * c).sum() / c.square().sum() for a, b, c in zip(own, plain, off, strict=True)
        ]
        row = f"{name:<22}"
        for slope in SLOPES:
            estimates = [a + slope * c for a, c in zip(plain, off, strict=True)]
            hits = [overlap(a, b) for a, b in zip(estimates, truth, strict=True)]
            row += f"{statistics.mean(hits):>8.1%}"
        hits = [overlap(a, b) for a, b in zip(own, truth, strict=True)]
        middle = torch.stack(found).mean().item()
        yield f"{row}{statistics.mean(hits):>10.1%}{middle:>13.2f}"


def timed(task: Callable[[], Tensor | None]) -> tuple[float, Tensor]:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    since = time.perf_counter()
    found = task()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - since, found


def overlap(scores: Tensor, truth: Tensor) -> float:
    """The share of the top half by ``truth`` [P] that is in the top half by ``scores`` [P]."""
    half = len(truth) // 2
    kept = set(scores.topk(half).indices.tolist())
    return len(kept & set(truth.topk(half).indices.tolist())) / half


def spearman(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return torch.corrcoef(ranks)[0, 1].item()


def draw(found: dict[str, Any], file: Path) -> None:
    """Overlap with full depth against cost, a panel per moment; a line leads from a cost to its floor."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(
            f"matplotlib is not installed: --draw {file.with_suffix('.json')} draws it elsewhere"
        )
        return
    moments = found["moments"]
    figure = Figure(figsize=(1.0 + 5.6 * len(moments), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(moments), squeeze=False, sharex=True, sharey=True)[0]
    for axes, moment in zip(grid, moments, strict=True):
        panel(axes, moment)
    grid[0].set_ylabel("share of the full model's top half that is kept")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    said = f"{found['about']}\n{found['machine']}"
    figure.suptitle(said, x=0.01, ha="left", fontsize=8, color="#666666")
    figure.savefig(file, dpi=150, format="png")
    print(f"{file}: the same as a picture")


COLORS = {(1, False): "#c98b2b", (1, True): "#1f4e8c", (2, False): "#e0bd85", (2, True): "#7fb0e6"}


def panel(axes: Any, moment: dict[str, Any]) -> None:
    rows = [Row(**row) for row in moment["rows"]]
    full, rarity = rows[0], rows[-1]
    series: dict[tuple[int, bool], list[Row]] = {}
    for row in rows[1:-1]:
        for controlled in {row.controlled} | ({True, False} if row.way == "all" else set()):
            series.setdefault((row.layer, controlled), []).append(row)
    order = [layer for layer, _ in series]  # colours go by place, whatever the layers are
    places = {layer: min(2, place + 1) for place, layer in enumerate(dict.fromkeys(order))}
    for (layer, controlled), every in series.items():
        color = COLORS[places[layer], controlled]
        label = f"j = {layer}, {'with' if controlled else 'without'} control variate"
        strides = sorted(
            (r for r in every if not r.way.startswith("First")), key=lambda r: r.floor
        )
        axes.plot(
            [100 * row.cost for row in strides],
            [100 * row.overlap for row in strides],
            "o-",
            color=color,
            label=label,
            linewidth=1.6,
            markersize=5,
        )
        for row in every:
            assert row.floor is not None
            height = 100 * row.overlap
            ends = [100 * row.floor, 100 * row.cost]
            axes.plot(ends, [height] * 2, color=color, linewidth=0.8, alpha=0.6)
            axes.plot(ends[:1], [height], "|", color=color, markersize=6)
            if row.way.startswith("First"):
                axes.plot(ends[1:], [height], "s", color=color, markersize=4, fillstyle="none")
            if controlled and places[layer] == 1:
                axes.annotate(
                    row.way.removesuffix(CONTROL),
                    (ends[1], height),
                    (4, -9),
                    textcoords="offset points",
                    fontsize=7,
                    color=color,
                )
    axes.plot([100 * full.cost], [100], "D", color="k", markersize=5, label="full depth")
    axes.axhline(
        100 * rarity.overlap, color="#888888", linestyle=":", label="Rarity: counts, no model"
    )
    axes.plot([], [], "|", color="#555555", label="floor: FLOPs")
    axes.plot([], [], "s", color="#555555", fillstyle="none", markersize=4, label="First(n)")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.xaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else ""
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.set_xlabel("cost of scoring, share of a plain step")
    axes.set_title(f"after {moment['step']} steps", loc="left", fontweight="bold")
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
