"""python examples/hf_trainer.py [SHARDS] [--epochs 1] [--plain] [--resume]    # or: torchrun --nproc-per-node 2 ...

The Trainer of Hugging Face: ``attach`` is all of SIFT. Steps, schedule, logs and checkpoints are those of the sifted
loader; evaluation is not sifted, and its loss is what to compare with ``--plain``.
"""

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments, set_seed

from siftloader import TokenShards, World, attach


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"


def main(arguments: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="?", default=DEMO)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--save-every", type=int, default=20, help="updates")
    parser.add_argument("--out", default="runs/hf_trainer")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--plain", action="store_true", help="without siftloader, for comparison")
    given = parser.parse_args(arguments)

    set_seed(0)
    shards = TokenShards(given.shards)
    # A list is divided among the ranks by the Trainer; training shards divide themselves.
    held_out = list(TokenShards(given.shards, split="val", world=World()))
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=shards.vocab_size, num_hidden_layers=4, **sizes))
    options = TrainingArguments(
        output_dir=given.out,
        num_train_epochs=given.epochs,
        per_device_train_batch_size=given.batch_size,
        learning_rate=2e-3,
        logging_steps=10,
        eval_strategy="epoch",
        prediction_loss_only=True,
        save_steps=given.save_every,
        save_total_limit=2,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, options, train_dataset=shards, eval_dataset=held_out)
    if not given.plain:
        attach(trainer, exit_layer=1, warmup_steps=4)
    trainer.train(resume_from_checkpoint=given.resume)
    return trainer


if __name__ == "__main__":
    main()
