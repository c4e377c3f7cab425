"""python examples/accelerate_loop.py [SHARDS] [--epochs 2]    # or: accelerate launch --num_processes 2 ...

A training loop of Hugging Face accelerate, as its own examples write it: prepare, accumulate, save_state,
skip_first_batches. All of SIFT is one expression; give the whole loader to prepare, nothing inside of it.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import BertConfig, BertForMaskedLM, get_scheduler

from siftloader import SiftingDataLoader, TokenShards


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="?", default=DEMO)
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--checkpoint", help="a folder: written in the middle of an epoch")
    parser.add_argument("--save-after", type=int, default=0, help="batches of the first epoch")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args(arguments)

    accelerator = Accelerator(gradient_accumulation_steps=given.accumulation)
    set_seed(0)
    data = TokenShards(given.shards, split=given.split)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config = BertConfig(vocab_size=data.vocab_size, num_hidden_layers=4, **sizes)
    model = BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    loader = SiftingDataLoader(
        data, batch_size=given.batch_size, model=model, exit_layer=1, warmup_steps=4
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # Now lengths are of this rank's share, and of half as many batches as plain ones, but for the warm-up.
    # Accelerate steps a scheduler once for every process.
    updates = -(-loader.total_batches(given.epochs) // given.accumulation)
    schedule = {"num_warmup_steps": 2, "num_training_steps": updates * accelerator.num_processes}
    scheduler = accelerator.prepare(get_scheduler("linear", optimizer, **schedule))
    if given.resume:
        accelerator.load_state(given.checkpoint)  # the loader's place and steps come with it

    losses = []
    for epoch in range(given.epochs):
        model.train()
        skipped = given.save_after if given.resume and epoch == 0 else 0
        active = accelerator.skip_first_batches(loader, skipped) if skipped else loader
        for number, batch in enumerate(active, 1 + skipped):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if epoch == 0 and number == given.save_after and not given.resume:
                accelerator.save_state(given.checkpoint)
        accelerator.print(f"epoch {epoch}: {number} batches, loss {loss.item():.3f}")
    if accelerator.is_main_process:
        seen = loader.stats
        print(f"kept {seen['kept']} of {seen['candidates']} candidates, scored at layer 1")
        kept, others = seen["score_kept"], seen["score_dropped"]  # of the last pool
        if others is not None:  # that of an epoch may be kept whole
            print(f"{kept:.3f} nats the kept, {others:.3f} the others")
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
