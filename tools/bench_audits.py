"""What an audit and a trial cost, in plain training steps: python tools/bench_audits.py

    python tools/bench_audits.py --hidden 512 --batch-size 16 --audits 8

A BERT of --layers x --hidden trains on shards, masked language modelling: first plainly, then with audits every few
steps, then with a gate that makes trials. An audit scores one pool at the exit and by the whole model, so in
theory it takes (2 + 2 j / N) / 3 plain steps where half of a pool is kept; a trial says how many steps it was worth
(``loader.trials``), which is held against the clock. Medians; beside other work nothing of this means anything.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # siftloader may not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_scoring import header

from siftloader import SiftingDataLoader, TokenShards, TrialGate


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"
WARM_UP = 5  # steps that are not timed


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(header(device))
    plain = seconds_of(options, device, options.steps, warmup_steps=10**9, audit_every=0)[0]
    every = 4
    _, loader = seconds_of(options, device, every * options.audits + 9, audit_every=every)
    found = loader.stats
    audits = found["audited"] / (2 * options.batch_size)
    audit = found["seconds_auditing"] / audits / plain
    gate = TrialGate(
        steps=options.trial_steps, repeats=2, share=1.0, cost=found["scoring_cost"] or 0.0
    )
    _, loader = seconds_of(options, device, WARM_UP + 3, gate=gate, warmup_steps=WARM_UP)
    (trial,) = loader.trials
    told, took = trial["steps_spent"], loader.stats["seconds_trials"] / plain
    floor = (2 + 2 / options.layers) / 3
    print(
        f"BERT of {options.layers} layers of {options.hidden}, {options.batch_size} of "
        f"{2 * options.batch_size} rows, exit 1\n"
        f"  a plain step                  {1000 * plain:9.1f} ms\n"
        f"  scoring a pool at the exit    {found['scoring_cost'] or 0:9.3f} plain steps\n"
        f"  an audit                      {audit:9.3f} plain steps (in theory {floor:.3f}); "
        f"every 500: {audit / 5:.2f} % of the time\n"
        f"  a trial of {options.trial_steps} x 2             {took:9.1f} plain steps; it says {told:.1f}"
    )
    return {"audit": audit, "floor": floor, "trial": took, "told": told}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shards", type=Path, default=DEMO, help="folder of masked language modelling shards")
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=128)
    add("--batch-size", type=int, default=4, help="rows of a batch; a pool has twice as many")
    add("--steps", type=int, default=16, help="plain steps that are timed")
    add("--audits", type=int, default=4)
    add("--trial-steps", type=int, default=4)
    return parser.parse_args(arguments)


def seconds_of(
    options: argparse.Namespace, device: torch.device, steps: int, **sifting: Any
) -> tuple[float, SiftingDataLoader]:
    """Seconds of a step of the loop, and the loader it drew from."""
    torch.manual_seed(0)
    shards = TokenShards(options.shards, seed=0)
    config = BertConfig(
        vocab_size=shards.vocab_size,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        max_position_embeddings=shards.layout.seq_len,
    )
    model = BertForMaskedLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    settings = {"warmup_steps": 0, **sifting}
    loader = SiftingDataLoader(shards, options.batch_size, model=model, **settings)
    taken, step = [], 0
    while step < steps + WARM_UP:
        for batch in loader:  # as many epochs as it takes
            begun = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
            step += 1
            if step == steps + WARM_UP:
                break
    return median(taken[WARM_UP:]), loader


if __name__ == "__main__":
    main()
