"""Fabric, in the shape of litgpt: batches are bare tensors [B, T + 1], and the loop computes the loss.

    python examples/fabric_loop.py --steps 40 --folder runs/fabric      # the same command goes on from its checkpoint

A bare tensor does not tell what is to be predicted, so ``score_fn=`` takes the function that tells the loop, too.
Fabric saves the loader's state with the rest. Its wrapper has only what torch's DataLoader has: ask the loader
itself for ``stats``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from siftloader import SiftingDataLoader, TokenShards


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def main(arguments: list[str] | None = None) -> SiftingDataLoader:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/fabric"))
    options = parser.parse_args(arguments)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0)
    shards = TokenShards(options.shards, masking=None)
    rows = torch.cat([batch["input_ids"] for batch in shards.batches(256)])
    config = LlamaConfig(
        vocab_size=shards.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = fabric.setup(LlamaForCausalLM(config))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), 1e-3))
    sifting = SiftingDataLoader(
        rows, 8, shuffle=True, model=model, score_fn=loss_of, warmup_steps=10
    )
    loader = fabric.setup_dataloaders(sifting)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "step": 0}
    checkpoint = options.folder / "checkpoint.pt"
    if checkpoint.exists():
        fabric.load(checkpoint, state)
    while state["step"] < options.steps:
        for batch in loader:
            state["step"] += 1
            accumulating = state["step"] % 2 != 0
            with fabric.no_backward_sync(model, enabled=accumulating):
                fabric.backward(loss_of(model, batch) / 2)
            if not accumulating:
                optimizer.step()
                optimizer.zero_grad()
            if state["step"] == options.steps:
                break
    fabric.save(checkpoint, state)
    stats = sifting.stats
    print(f"{stats['steps']} batches, {stats['candidates']} candidates, {stats['kept']} kept")
    return sifting


if __name__ == "__main__":
    main()
