"""torchrun --nproc-per-node 2 examples/fsdp2_torchrun.py [--shards shards/demo] [--steps 40]

FSDP2 in bfloat16, the weights cut among the ranks: they are gathered once to score a pool (embedding, first
layer and head only) and put back before the training step begins. All ranks must draw the same number of
batches, which TokenShards sees to. Shard the model first, or later: the loader looks when it scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from ddp_torchrun import SHARDS, B, Model, begin, tell
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from siftloader import SiftingDataLoader, TokenShards


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, default=SHARDS)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)

    device = begin()
    shards = TokenShards(options.shards, seed=0)
    torch.manual_seed(0)
    model = Model(shards.vocab_size, shards.shard_set.layout.seq_len).to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    torch.manual_seed(1 + dist.get_rank())  # every rank drops out other neurons

    loader = SiftingDataLoader(
        shards, B, model=model, warmup_steps=10
    )  # was: DataLoader(shards, B)
    step = 0
    while step < options.steps:  # epochs
        for batch in loader:
            logits = model(batch["input_ids"], batch["attention_mask"])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            tell(step, loss, loader)
            if step == options.steps:
                break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
