"""python examples/plain_loop.py [SHARDS] [--steps 60] [--plain]

A plain PyTorch loop, masked language modelling on prepared shards. All of SIFT is one expression.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

from siftloader import SiftingDataLoader, TokenShards


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="?", default=DEMO)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plain", action="store_true", help="torch's DataLoader, for comparison")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards = TokenShards(given.shards)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    model = BertForMaskedLM(BertConfig(vocab_size=shards.vocab_size, **sizes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)

    if given.plain:
        loader = DataLoader(shards, batch_size=8)
    else:
        loader = SiftingDataLoader(shards, batch_size=8, model=model, exit_layer=1, warmup_steps=5)

    model.train()
    for step, batch in enumerate(loader, 1):
        batch = {name: field.to(device) for name, field in batch.items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == given.steps:
            print(f"step {step}: loss {loss.item():.3f}")
        if step == given.steps:
            break
    if isinstance(loader, SiftingDataLoader):
        seen = loader.stats
        print(f"kept {seen['kept']} of {seen['candidates']} candidates, scored at layer 1")
        kept, others = seen["score_kept"], seen["score_dropped"]  # of the last pool
        if others is not None:  # that of an epoch may be kept whole
            print(f"{kept:.3f} nats the kept, {others:.3f} the others")


if __name__ == "__main__":
    main()
