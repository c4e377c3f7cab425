"""python examples/own_criterion.py [SHARDS] [--steps 40]

A criterion of your own: a function of the early predictions that returns one score per sample, higher is kept.

This one looks at the hardest quarter of a sample's labelled tokens, where `Loss()` takes the mean of all: one
surprising sentence in a dull text is enough. It is compared with `Loss()` on the same pools.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from siftloader import Loss, Predictions, SiftingDataLoader, TokenShards


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"


def hardest_quarter(early: Predictions) -> Tensor:
    """Early predictions of P samples -> [P]: the mean loss of the quarter of tokens with the highest."""
    losses = early.each(
        lambda logits, labels: -logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    )
    starts = early.targets.starts  # those of sample p lie at starts[p] to starts[p + 1]
    samples = [losses[a:b] for a, b in pairwise(starts)]
    return torch.stack([each.topk(-(-len(each) // 4)).values.mean() for each in samples])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="?", default=DEMO)
    parser.add_argument("--steps", type=int, default=40)
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

    agree = []

    def criterion(early: Predictions) -> Tensor:
        scores = hardest_quarter(early)
        half = len(scores) // 2
        mean = Loss()(early).topk(half).indices
        agree.append(torch.isin(scores.topk(half).indices, mean).float().mean().item())
        return scores

    loader = SiftingDataLoader(shards, 8, model=model, criterion=criterion, warmup_steps=0)
    for step, batch in enumerate(loader, 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == given.steps:
            break
    share = sum(agree) / len(agree)
    print(
        f"step {step}: loss {loss.item():.3f}; {share:.0%} of what it kept, Loss() would have kept too"
    )


if __name__ == "__main__":
    main()
