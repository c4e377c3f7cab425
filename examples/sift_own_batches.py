"""python examples/sift_own_batches.py [TEXT.txt[.xz]] [--steps 200]

For loops that draw their own batches: any PyTorch model, no DataLoader, no shards. ``get_batch`` draws
twice as much as before, and one line keeps the half worth a backward pass. The model here predicts the next
character of a text; anything that returns logits from a stack of equal layers will do.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import torch
from torch import Tensor, nn

from siftloader import Sifter


B, T = 16, 64  # samples per step, characters per sample
TEXT = Path(__file__).resolve().parent.parent / "shards" / "demo" / "embedded_pd.txt.xz"


class Model(nn.Module):
    def __init__(self, vocabulary: int, hidden: int = 96, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, hidden), nn.Embedding(T, hidden)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden, 4, 4 * hidden, 0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, vocabulary))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(T))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.places.weight  # [n, T, H]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        return self.head(hidden)  # [n, T, V]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="?", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    characters, vocabulary = read(options.text)
    model = Model(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    # y stands at the same place as the prediction of it, so there is nothing left to shift.
    sift = Sifter(model, exit_layer=1, criterion="loss", keep=0.5, shift_labels=False)

    for step in range(1, options.steps + 1):
        x, y = sift(get_batch(characters, 2 * B))  # was: x, y = get_batch(characters, B)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == options.steps:
            seen = sift.stats
            print(
                f"step {step}: loss {loss.item():.3f} nats on the kept half, which its first layer "
                f"scored {seen['score_kept']:.3f} (the other half {seen['score_dropped']:.3f})"
            )


def read(file: Path) -> tuple[Tensor, int]:
    opened = lzma.open if file.suffix == ".xz" else open
    with opened(file, "rt", encoding="utf-8") as stream:
        text = stream.read(2_000_000)
    codes = {character: code for code, character in enumerate(sorted(set(text)))}
    return torch.tensor([codes[character] for character in text]), len(codes)


def get_batch(characters: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(characters) - T, (samples, 1))
    places = starts + torch.arange(T)  # [n, T]
    return characters[places], characters[places + 1]


if __name__ == "__main__":
    main()
