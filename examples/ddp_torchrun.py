"""torchrun --nproc-per-node 2 examples/ddp_torchrun.py [--shards shards/demo] [--steps 40]

DistributedDataParallel: every rank draws its own share of the shards, scores it with its own copy of the
weights, and trains on the better half. One line differs from plain training. On GPUs where there are some.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from siftloader import SiftingDataLoader, TokenShards


B = 16  # samples per step and rank
SHARDS = Path(__file__).resolve().parent.parent / "shards" / "demo"


class Model(nn.Module):
    """A masked language model: any with a stack of equal layers will do."""

    def __init__(self, words: int, length: int, hidden: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(words, hidden), nn.Embedding(length, hidden)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, words)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.tokens(input_ids) + self.places.weight  # [n, T, H]
        padding = None if attention_mask is None else attention_mask == 0
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=padding)
        return self.head(self.norm(hidden)).float()  # [n, T, V], for the loss


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
    model = DistributedDataParallel(
        Model(shards.vocab_size, shards.shard_set.layout.seq_len).to(device)
    )
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


def begin() -> torch.device:
    """Join the other ranks; the device of this one."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def tell(step: int, loss: Tensor, loader: SiftingDataLoader) -> None:
    """On the first rank, now and then: reading the figures may wait for a GPU."""
    if step % 20 or dist.get_rank():
        return
    seen = loader.stats
    halves = "not sifted yet"
    if seen["score_dropped"] is not None:  # an epoch's last pool may be kept whole
        kept, others = seen["score_kept"], seen["score_dropped"]
        halves = f"the first layer scored the kept {kept:.3f}, the others {others:.3f}"
    elif seen["candidates"]:
        halves = "no others in the last pool"
    print(f"step {step}: loss {loss.item():.3f} nats; {halves}")


if __name__ == "__main__":
    main()
