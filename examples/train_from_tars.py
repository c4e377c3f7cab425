"""python examples/train_from_tars.py ['text/{000..127}.tar' TOKENIZER.json] [--steps 100]

A GPT from tars of text as others wrote them, packed as they are read; by default a book, cut into four.
"""

import argparse
import lzma
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel
from webdataset import ShardWriter

from siftloader import SiftingDataLoader
from siftloader.tars import webdataset


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tars", nargs="?", help="a path, braces, a glob, a folder or a URL")
    parser.add_argument("tokenizer", nargs="?", default=DEMO / "bpe-2048.json")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        train(given.tars or cut_a_book(folder), given.tokenizer, given.steps)


def train(tars: str, tokenizer: str | Path, steps: int) -> None:
    torch.manual_seed(0)
    text = {"tokenizer": tokenizer, "seq_len": 64, "objective": "clm"}
    stream = webdataset(tars, batch_size=8, batches_per_epoch=2 * steps, **text)
    ids = {"vocab_size": stream.tokenizer.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_positions=64, n_layer=2, n_embd=64, n_head=2, **ids))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    inner = DataLoader(stream, batch_size=None, num_workers=2)
    loader = SiftingDataLoader.wrap(inner, model=model, warmup_steps=0)
    for step, batch in enumerate(loader):
        (loss := model(**batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f} nats on the half that was kept")


def cut_a_book(folder: str) -> str:
    with lzma.open(DEMO / "embedded_pd.txt.xz", "rt", encoding="utf-8") as stream:
        paragraphs = stream.read(1_000_000).split("\n\n")
    with ShardWriter(f"{folder}/%d.tar", maxcount=len(paragraphs) // 4, verbose=0) as writer:
        for number, paragraph in enumerate(paragraphs):
            writer.write({"__key__": f"{number}", "txt": paragraph})
    return folder


if __name__ == "__main__":
    main()
