"""Lightning: the loader that train_dataloader() returns is another one; all else is as it was.

    python examples/lightning_module.py --epochs 2 --folder runs/lightning
    python examples/lightning_module.py --epochs 4 --folder runs/lightning --resume runs/lightning/last.ckpt

Under ``devices=2`` every rank reads its own share of the shards. Lightning gives no ``DistributedSampler`` to a
sifting loader: over map-style data pass one as ``sampler=``. Lightning ends every epoch where the first one ended, so
of epochs that a cool-down makes longer it leaves out the rest; and it draws one batch ahead of a loader without a
length (``wrap`` of an iterable that has none), which a checkpoint then counts as trained.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from siftloader import SiftingDataLoader, TokenShards


class Bert(lightning.LightningModule):
    def __init__(self, shards: Path) -> None:
        super().__init__()
        self.shards = TokenShards(shards)
        config = BertConfig(
            vocab_size=self.shards.vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
        self.model = BertForMaskedLM(config)
        self.loader_state: dict[str, Any] | None = None

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)

    def train_dataloader(self) -> SiftingDataLoader:
        self.loader = SiftingDataLoader(self.shards, 32, model=self.model, warmup_steps=5)
        if self.loader_state is not None:
            self.loader.load_state_dict(self.loader_state)
        return self.loader

    # By itself Lightning restores a loader inside an epoch only: between epochs a warm-up would begin anew. And it
    # restores none where configure_optimizers asks for trainer.estimated_stepping_batches.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loader"] = self.loader.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loader_state = checkpoint["loader"]


def main(arguments: list[str] | None = None) -> Bert:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path)
    options = parser.parse_args(arguments)
    lightning.seed_everything(0)
    module = Bert(options.shards)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        accumulate_grad_batches=3,
        callbacks=[ModelCheckpoint(options.folder, save_last=True, every_n_train_steps=2)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=options.resume)
    stats = module.loader.stats
    print(f"{stats['steps']} batches, {stats['candidates']} candidates, {stats['kept']} kept")
    return module


if __name__ == "__main__":
    main()
