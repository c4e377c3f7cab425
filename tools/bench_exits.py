"""How well an early exit knows the full model's favourites, by its own head or a probe: tools/bench_exits.py

Trains a small GPT (or, with `--objective mlm`, a BERT) on shards, and beside it one probe per layer
(`exit_head="probe"`: layer norm and a linear layer on detached features, trained on the same batches). At a
tenth of the steps and at the end, pools of unseen text are scored at every exit layer, by the model's own
head (SIFT's early exit) and by the probe, with loss and with entropy, and compared with the scores at
full depth:

* overlap   share of the top half (by the full model) that the exit also keeps; half of it is chance
* Spearman  rank correlation with the full model's scores, over a pool
* cost      median seconds of scoring a pool of P = 2 b, over those of a plain training step with b rows; for
            a probe with its own training step on the pool

    python tools/bench_exits.py --steps 300 --layers 4
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import pretrain_bert
import pretrain_gpt
from bench_positions import Batch, endless, merge, overlap, spearman, step, timed, train
from bench_scoring import header

from siftloader import ExitHead, Sifter, TokenShards


ROOT = Path(__file__).resolve().parent.parent
CRITERIA = ("loss", "entropy")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    folder = options.shards or ROOT / "shards" / "built" / f"{options.objective}-128"
    if not folder.is_dir():
        sys.exit(f"{folder} is not there yet; `make demo` prepares it first")
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    shards = TokenShards(folder, seed=options.seed)
    causal = options.objective == "clm"
    module, build = (
        (pretrain_gpt, pretrain_gpt.build_gpt)
        if causal
        else (pretrain_bert, pretrain_bert.build_bert)
    )
    preset = dataclasses.replace(module.PRESETS["tiny"], layers=options.layers)
    model = build(preset, shards).to(device).train()
    print(header(device))
    print(
        f"{'GPT' if causal else 'BERT'} {preset.layers} x {preset.hidden}, "
        f"{shards.shard_set.layout.seq_len} tokens, {shards.vocab_size:,} ids, batch "
        f"{options.batch_size} of {2 * options.batch_size}, {options.pools} pools, seed {options.seed}"
    )
    depths = range(1, preset.layers + 1)
    heads = {j: ExitHead(lr=options.probe_lr) for j in depths}
    probes = {j: Sifter(model, exit_layer=j, exit_head=heads[j]) for j in depths}
    batches = taught(endless(shards, options.batch_size, device), probes)
    early = max(1, options.steps // 10)
    fresh = endless(shards, options.batch_size, device)
    for _ in range(options.steps + 2):  # text that neither the model nor the probes have seen
        next(fresh)
    for done in train(model, preset, options.steps, {early, options.steps}, batches):
        pools = [merge(next(fresh), next(fresh)) for _ in range(options.pools)]
        report(model, pools, done, heads, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shards", type=Path, help="default: what `make demo` prepares for the objective")
    add("--objective", choices=("clm", "mlm"), default="clm")
    add("--layers", type=int, default=4)
    add("--steps", type=int, default=300, help="measured after a tenth of them and at the end")
    add("--batch-size", type=int, default=16, help="rows trained on; pools are twice as large")
    add("--pools", type=int, default=8, help="pools to score, each exit once on each (8)")
    add("--probe-lr", type=float, default=3e-3, help="of the probes' AdamW (3e-3)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def taught(batches, probes):
    """The same batches; every probe learns from each before the model does."""
    for batch in batches:
        for probe in probes.values():
            probe.scorer.teach(batch, batch["labels"])
        yield batch


def report(
    model: nn.Module,
    pools: list[Batch],
    done: int,
    heads: dict[int, ExitHead],
    options: argparse.Namespace,
) -> None:
    rows, depth = options.batch_size, len(heads)
    other = copy.deepcopy(model)  # steps are timed on it, so that all pools see one model
    optimizer = torch.optim.AdamW(pretrain_bert.parameter_groups(other), 1e-4)
    step(other, optimizer, {name: values[:rows] for name, values in pools[0].items()})
    states = {j: head.state_dict() for j, head in heads.items()}
    for criterion in CRITERIA:
        scorers: dict[str, Sifter] = {
            f"exit {j}": Sifter(model, exit_layer=j, criterion=criterion) for j in heads
        }
        for j, state in states.items():  # copies: a pool teaches them
            head = ExitHead(lr=options.probe_lr)
            head.load_state_dict(state)
            scorers[f"probe {j}"] = Sifter(
                model, exit_layer=j, criterion=criterion, exit_head=head
            )
        seconds: dict[str, list[float]] = {name: [] for name in ("step", *scorers)}
        scores: dict[str, list[Tensor]] = {name: [] for name in scorers}
        for scorer in scorers.values():
            scorer.score(pools[0])  # the first pool of a scorer is looked at twice
        for pool in pools:
            half = {name: values[:rows] for name, values in pool.items()}
            seconds["step"].append(timed(lambda half=half: step(other, optimizer, half))[0])
            for name, scorer in scorers.items():
                taken, won = timed(lambda s=scorer, p=pool: s.winners(p, p["labels"], rows))
                seconds[name].append(taken)
                scores[name].append(won.scores)
        truth, plain = scores[f"exit {depth}"], statistics.median(seconds["step"])
        print(f"\nafter {done} steps, {criterion}; a plain step {plain:.3f} s")
        print(f"{'':<10}{'overlap':>9}{'spread':>8}{'Spearman':>10}{'of a step':>11}")
        for name in scorers:
            hits = [overlap(a, b) for a, b in zip(scores[name], truth, strict=True)]
            alike = statistics.mean(
                spearman(a, b) for a, b in zip(scores[name], truth, strict=True)
            )
            share = statistics.median(seconds[name]) / plain
            print(
                f"{name:<10}{statistics.mean(hits):>9.1%}{statistics.pstdev(hits):>8.1%}"
                f"{alike:>10.3f}{share:>11.1%}"
            )


if __name__ == "__main__":
    main()
