"""What scoring some positions of a causal model costs, and what it loses: python tools/bench_positions.py

Trains a small GPT on shards with objective clm and stops twice, early and at the end. There, pools of
unseen text are scored at an exit layer with every setting of `positions=`, with and without the unigram
counts as a control variate, and compared with the scores at full depth and all positions:

* overlap   share of the top half (by the full model) that the setting also keeps; half of it is chance
* Spearman  rank correlation with the full model's scores, over a pool
* cost      median seconds of scoring a pool of P = 2 b, over those of a plain training step with b rows
            (forward, backward, AdamW), all measured interleaved

"all" at the exit layer shows what the early exit alone loses; "Rarity" is the surprise of the tokens under
the unigram counts, without any model.

The second table is about the slope of the control variate. `Stride` and `First` find it within the samples
of the pool; beside it stand the same estimates with a fixed slope, computed from all losses.

    python tools/bench_positions.py --steps 300 --batch-size 16 --pools 8
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import pretrain_bert
import pretrain_gpt
from bench_scoring import header
from demo import others_busy

from siftloader import EarlyExit, First, Rarity, Sifter, Stride, TokenShards
from siftloader.targets import Unigrams


ROOT = Path(__file__).resolve().parent.parent
Batch = dict[str, Tensor]
SLOPES = (0.0, 0.5, 1.0)
KINDS = {
    "Stride(2)": (Stride, 2),
    "Stride(4)": (Stride, 4),
    "Stride(8)": (Stride, 8),
    "Stride(16)": (Stride, 16),
    "First(32)": (First, 32),
    "First(16)": (First, 16),
}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.shards.is_dir():
        sys.exit(f"{options.shards} is not there yet; `make demo` prepares it first")
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    shards = TokenShards(options.shards, seed=options.seed)
    if shards.shard_set.objective != "clm":
        sys.exit(f"{options.shards} has objective {shards.shard_set.objective}, need clm")
    preset = pretrain_gpt.PRESETS[options.preset]
    model = pretrain_gpt.build_gpt(preset, shards).to(device).train()
    print(header(device))
    if (busy := others_busy()) > 0.2:
        print(f"Other work keeps {busy:.1f} cores busy: the seconds are too long, shares less so.")
    print(
        f"GPT {preset.layers} x {preset.hidden}, {shards.shard_set.layout.seq_len} tokens, "
        f"{shards.vocab_size:,} ids, batch {options.batch_size} of {2 * options.batch_size}, exit "
        f"{options.exit_layer}, loss, {options.pools} pools, seed {options.seed}"
    )
    batches = endless(shards, options.batch_size, device)
    early = max(1, options.steps // 10)
    for done in train(model, preset, options.steps, {early, options.steps}, batches):
        pools = [merge(next(batches), next(batches)) for _ in range(options.pools)]
        report(model, preset, shards, pools, done, options)


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
    add("--exit-layer", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
) -> None:
    counts, rows = shards.unigrams, options.batch_size
    full = Sifter(model, exit_layer=preset.layers)
    scorers: dict[str, Sifter] = {
        f"full depth, all {len(pools[0]['labels'][0]) - 1}": full,
        "all": Sifter(model, exit_layer=options.exit_layer),
    }
    for name, (kind, number) in KINDS.items():
        for control in (None, counts):
            said = name if control is None else f"{name}, control"
            scorers[said] = Sifter(
                model, exit_layer=options.exit_layer, positions=kind(number, control)
            )
    scorers["Rarity"] = Sifter(model, criterion=Rarity(counts))

    other = copy.deepcopy(model)  # steps are timed on it, so that all pools see one model
    optimizer = torch.optim.AdamW(pretrain_bert.parameter_groups(other), 1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in ("step", *scorers)}
    scores: dict[str, list[Tensor]] = {name: [] for name in scorers}
    for scorer in scorers.values():
        scorer.score(pools[0])  # the first pool of a scorer is looked at twice
    step(other, optimizer, {name: values[:rows] for name, values in pools[0].items()})
    for pool in pools:
        half = {name: values[:rows] for name, values in pool.items()}
        seconds["step"].append(timed(lambda half=half: step(other, optimizer, half))[0])
        for name, scorer in scorers.items():
            taken, found = timed(lambda scorer=scorer, pool=pool: scorer.score(pool))
            seconds[name].append(taken)
            scores[name].append(found)
    truth = next(iter(scores.values()))
    plain_step = statistics.median(seconds["step"])
    loss = torch.cat(truth).mean().item()
    print(f"\nafter {done} steps: loss {loss:.2f} nats, a plain step {plain_step:.3f} s")
    print(f"{'':<22}{'overlap':>8}{'spread':>8}{'Spearman':>10}{'seconds':>9}{'of a step':>11}")
    for name in scorers:
        hits = [overlap(a, b) for a, b in zip(scores[name], truth, strict=True)]
        alike = statistics.mean(spearman(a, b) for a, b in zip(scores[name], truth, strict=True))
        median = statistics.median(seconds[name])
        print(
            f"{name:<22}{statistics.mean(hits):>8.1%}{statistics.pstdev(hits):>8.1%}{alike:>10.3f}"
            f"{median:>9.3f}{median / plain_step:>11.1%}"
        )
    slopes(model, scores, truth, pools, Unigrams(counts), options)


def slopes(
    model: nn.Module,
    scores: dict[str, list[Tensor]],
    truth: list[Tensor],
    pools: list[Batch],
    surprise: Callable[[Tensor], Tensor],
    options: argparse.Namespace,
) -> None:
    """The control variate with a fixed slope, from the losses at all positions of the exit layer."""
    early = EarlyExit(model, options.exit_layer)
    losses, controls = [], []  # [P, T - 1] each
    for pool in pools:
        wanted = pool["labels"][:, 1:]
        logits = early.logits(pool)[:, :-1].float()
        losses.append(
            nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        )
        controls.append(surprise(wanted))
    print("\ncontrol variate: overlap by slope" + f"{'in the pool':>23}{'slope there':>13}")
    print(f"{'':<22}" + "".join(f"{slope:>8}" for slope in SLOPES))
    for name, (kind, number) in KINDS.items():
        rank = torch.arange(losses[0].shape[1], device=losses[0].device)[None]
        scored = kind(number).takes(rank)[0]
        plain = [values[:, scored].mean(1) for values in losses]
        off = [values.mean(1) - values[:, scored].mean(1) for values in controls]
        own = scores[f"{name}, control"]
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
        print(f"{row}{statistics.mean(hits):>10.1%}{middle:>13.2f}")


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


if __name__ == "__main__":
    main()
