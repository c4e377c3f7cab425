"""python examples/resume.py CHECKPOINT.pt [SHARDS] [--steps 40] [--every 10]

A loop that may be killed at any moment: the same command goes on where it was, to the bit, also in the middle of
an epoch and of the warm-up. Besides model and optimizer, a checkpoint holds the loader's state and the random
streams (dropout draws from them).
"""

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from siftloader import SiftingDataLoader, TokenShards


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("shards", nargs="?", default=DEMO)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    shards = TokenShards(given.shards)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = BertForMaskedLM(BertConfig(vocab_size=shards.vocab_size, **sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    loader = SiftingDataLoader(shards, batch_size=8, model=model, warmup_steps=5)

    step, streams = 0, None
    if given.checkpoint.exists():
        saved = torch.load(given.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        step, streams = saved["step"], saved["streams"]

    while step < given.steps:
        batches = iter(loader)  # the first one continues, every other one is the next epoch
        if streams is not None:
            torch.set_rng_state(streams)
            streams = None
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            print(
                f"step {step}: loss {loss.item():.6f}, {loader.stats['samples']} samples",
                flush=True,
            )
            if step % given.every == 0 or step == given.steps:
                save(given.checkpoint, step, model, optimizer, loader)
            if step == given.steps:
                break


def save(
    file: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: SiftingDataLoader,
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "loader": loader.state_dict(),  # of this rank: on several, each saves its own
        "streams": torch.get_rng_state(),
    }
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)  # whole or not at all


if __name__ == "__main__":
    main()
