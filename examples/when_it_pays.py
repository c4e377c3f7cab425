"""python examples/when_it_pays.py [SHARDS] [--steps 30]

Does sifting pay, at which layer, until when? Asked three ways, cheapest first: a probe of the model as it is, audits
while it trains, and a gate that trains copies both ways every so often and sifts while that lowers held-out loss.
"""

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from siftloader import SiftingDataLoader, TokenShards, TrialGate, probe


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("shards", nargs="?", default=DEMO)
    parser.add_argument("--steps", type=int, default=30)
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

    loader = SiftingDataLoader(
        shards,
        batch_size=4,
        model=model,
        exit_layer=1,
        warmup_steps=10,
        audit_every=5,
        # A real run takes the defaults, gate="trial": 1 % of the steps, here half of them.
        gate=TrialGate(steps=2, repeats=2, share=0.5, held_out_rows=8),
    )
    model.train()
    step = 0
    while step < given.steps:
        for batch in loader:  # an epoch of the demo's few samples
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == given.steps:
                break

    print(
        "audits: step, loss of all candidates, rho, overlap with the whole model's choice, sigma"
    )
    for each in loader.audits:
        print(
            f"{each['step']:4} {each['population_loss']:8.3f} {each['rho']:6.3f} {each['overlap']:6.0%} "
            f"{each['sigma']:6.3f}"
        )
    for each in loader.trials:
        says = "sift from here" if each["open"] else "do not sift"
        print(
            f"trial at step {each['step']}: {each['gain']:+.4f} ± {each['half_width']:.4f} nats: {says}"
        )
    seen = loader.stats
    print(f"kept {seen['kept']} of {seen['candidates']} candidates in {seen['steps']} steps\n")

    print(probe(model, shards, batch_size=2, pools=2).advice())


if __name__ == "__main__":
    main()
