"""python examples/nanogpt_style.py [TEXT.txt[.xz]] [--steps 60] [--compile]
torchrun --nproc-per-node 2 examples/nanogpt_style.py

A loop in the style of nanoGPT: no DataLoader, `get_batch` draws at random whenever it is called, for training and
for evaluation; gradients are accumulated, the next batch is drawn before `backward`. One line sifts it.
"""

import argparse
import lzma
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from siftloader import sift_calls


B, T, ACCUMULATE = 8, 64, 2  # rows, characters of a row, batches to an update
TEXT = Path(__file__).resolve().parent.parent / "shards" / "demo" / "embedded_pd.txt.xz"


class GPT(nn.Module):
    """Next characters; the loss inside, as nanoGPT has it."""

    def __init__(self, vocabulary: int, hidden: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, hidden), nn.Embedding(T, hidden)
        shape = {"dim_feedforward": 4 * hidden, "dropout": 0.0, "batch_first": True}
        self.h = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, 4, norm_first=True, **shape) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(T))

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        hidden = self.tokens(x) + self.places.weight  # [n, T, H]
        for layer in self.h:
            hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        logits = self.head(self.norm(hidden))  # [n, T, V]
        return logits, None if y is None else nn.functional.cross_entropy(logits.mT, y)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args(arguments)

    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(1337)
    texts, vocabulary = read(given.text)
    model: nn.Module = GPT(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    torch.manual_seed(1337 + rank)  # every rank draws other rows

    def get_batch(split: str) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(texts[split]) - T, (B, 1))
        places = starts + torch.arange(T)  # [n, T]
        return texts[split][places], texts[split][places + 1]

    # The one line. It finds the model as it is when a batch is drawn: compiled, in DDP.
    get_batch = sift_calls(get_batch, model=lambda: model, exit_layer=1, warmup_steps=20)

    if given.compile:
        model = torch.compile(model)
    if ranks > 1:
        model = DistributedDataParallel(model)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        model.eval()
        found = {}
        for split in texts:
            losses = [model(*get_batch(split))[1] for _ in range(4)]
            found[split] = torch.stack(losses).mean().item()
        model.train()
        return found

    x, y = get_batch("train")
    for step in range(given.steps + 1):
        if step % 30 == 0 or step == given.steps:
            losses = evaluate()
            if rank == 0:
                print(f"step {step}: train {losses['train']:.3f}, val {losses['val']:.3f}")
        if step == given.steps:
            break
        for micro in range(ACCUMULATE):
            if ranks > 1:
                model.require_backward_grad_sync = micro == ACCUMULATE - 1
            _, loss = model(x, y)
            x, y = get_batch("train")
            (loss / ACCUMULATE).backward()
        optimizer.step()
        optimizer.zero_grad()

    if rank == 0:
        seen = get_batch.stats
        print(
            f"{seen['kept']} of {seen['candidates']} rows kept, at layer 1 {seen['score_kept']:.3f} nats"
            f" (the others {seen['score_dropped']:.3f})"
        )
    if ranks > 1:
        dist.destroy_process_group()


def read(file: Path) -> tuple[dict[str, Tensor], int]:
    opened = lzma.open if file.suffix == ".xz" else open
    with opened(file, "rt", encoding="utf-8") as stream:
        text = stream.read(1_000_000)
    codes = {character: code for code, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([codes[character] for character in text])
    return {"train": ids[: -len(ids) // 10], "val": ids[-len(ids) // 10 :]}, len(codes)


if __name__ == "__main__":
    main()
