"""Every Python block of the README runs, in order, in one namespace: pytest tests/test_readme.py"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

from siftloader import TokenShards


README = Path("README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 4


@pytest.mark.filterwarnings("ignore:the epoch ended inside the warm-up")
def test_the_blocks_run():
    shards = TokenShards("shards/demo")
    config = transformers.BertConfig(
        vocab_size=shards.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    model = transformers.BertForMaskedLM(config).train()
    dataset = [row for row, _ in zip(shards, range(64), strict=False)]
    optimizer = torch.optim.AdamW(model.parameters())
    names = {"torch": torch, "dataset": dataset, "model": model, "optimizer": optimizer}
    quiet = transformers.TrainingArguments(report_to="none", use_cpu=True, output_dir="unused")
    names["trainer"] = transformers.Trainer(model, quiet, train_dataset=dataset)
    names["get_batch"], names["wrapped"] = (lambda: names["batch"]), model
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert names["updates"] == names["loader"].total_batches(3) or names["updates"] > 0
    assert len(names["half"]["input_ids"]) == 16
    assert names["logits"].shape == (32, 128, shards.vocab_size)
    assert names["batch"]["input_ids"].shape == (256, 128)


def test_every_file_of_the_tree_is_there_and_every_room_is_in_the_tree():
    tree = README.split("## The tree")[1]
    rooms = {path.name for path in Path("siftloader").glob("*.py")} - {"__init__.py"}
    assert {name for name in rooms if f"  {name} " in tree} == rooms
    assert set(re.findall(r"^  (\w+\.py) ", tree, flags=re.MULTILINE)) == rooms


def test_the_tree_stands_in_the_order_of_the_layers():
    tree = re.findall(r"^  (\w+)\.py ", README.split("## The tree")[1], flags=re.MULTILINE)
    layers = re.findall(r'^    "(\w+)",$', Path("pyproject.toml").read_text(), flags=re.MULTILINE)
    assert [name for name in reversed(layers) if name in tree] == tree


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert Path(target).exists(), target
