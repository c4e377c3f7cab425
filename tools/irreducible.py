"""Irreducible losses for RHO-LOSS: python tools/irreducible.py shards/demo

What a model that never saw a sample still cannot predict of it (noise, typos, random strings) is not worth
learning. A small model is trained on the held-out split alone, then every sample of the training split is
scored by it, at full depth. The file, irreducible.parquet beside the shards unless --out says otherwise, has
a row per sample, ordered by id:

    id     int64     the sample's global number, as TokenShards(with_ids=True) gives it
    loss   float32   mean loss over its labelled positions, in nats

and what it was made of in its metadata: model, steps, fingerprint of the shards. Then:

    file, shards = "shards/demo/irreducible.parquet", TokenShards("shards/demo", with_ids=True)
    loader = SiftingDataLoader(shards, 32, model=model, criterion=Reducible.read(file))

A held-out split is small; a model that learned it by heart knows little about other text (that of
shards/demo, 98 samples, is too small for more than a try). The tool prints how often each held-out sample
was trained on, and says so where its losses are worse than token counts alone. Preparing with a larger
--val-fraction helps more than steps.

Masked language models are scored at the masks of epoch 0, so the loss is that of these masked tokens, an
estimate for the ones that later epochs mask. A sample that has no masked token there gets the mean loss of
all, and the tool says how many did. (Mindermann et al., "Prioritized Training", 2022.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import pretrain_bert
import pretrain_gpt

import siftloader
from siftloader import Rarity, Sifter, SiftError, TokenShards, World


EVERYTHING = World()  # whatever launched this: all samples, not those of one rank
CLIP = 1.0  # the largest norm of a gradient


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.out is None:
        options.out = options.shards / "irreducible.parquet"
    elif options.out.is_dir() or not options.out.absolute().parent.is_dir():
        sys.exit(f"--out must be a file in a folder that exists, got {options.out}")
    try:
        run(options)
    except (SiftError, ValueError) as error:
        sys.exit(f"irreducible: {error}")


def run(options: argparse.Namespace) -> None:
    shards = TokenShards(options.shards, seed=options.seed, with_ids=True, world=EVERYTHING)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.model is None:
        examples = pretrain_bert if is_masked(shards) else pretrain_gpt
        preset = examples.PRESETS[options.preset]
        steps = options.steps or max(1, preset.steps * preset.batch_size // options.batch_size)
        build = pretrain_bert.build_bert if is_masked(shards) else pretrain_gpt.build_gpt
        model = build(preset, shards).to(device)
        train(model, preset, steps, options)
        name = f"{type(model).__name__}, {preset.layers} layers of {preset.hidden}"
    else:
        model, steps, name = load(options.model, shards).to(device), 0, str(options.model)

    ids, losses, rarity = score(model, shards, options.batch_size)
    unlabelled = ~np.isfinite(losses)
    if unlabelled.all():
        sys.exit("no sample of the training split has a finite loss; nothing is written")
    losses[unlabelled] = losses[~unlabelled].mean()
    metadata = {
        "model": name,
        "steps": str(steps),
        "fingerprint": shards.fingerprint,
        "seed": str(options.seed),
        "masks": "epoch 0" if is_masked(shards) else "none",
        "siftloader": siftloader.__version__,
    }
    write(options.out, ids, losses, metadata)
    without = f" ({unlabelled.sum():,} had no label: the mean)" if unlabelled.any() else ""
    print(
        f"{options.out}: {len(ids):,} samples, irreducible loss {losses.mean():.3f} nats, "
        f"{np.quantile(losses, 0.05):.3f} to {np.quantile(losses, 0.95):.3f} for nine in ten{without}"
    )
    print(verdict(float(losses.mean()), rarity))


def verdict(loss: float, rarity: float) -> str:
    """What a mean irreducible loss is worth, beside the mean surprise under token counts."""
    if loss < rarity:
        return f"token counts alone: {rarity:.3f} nats"
    return (
        f"token counts alone: {rarity:.3f} nats, which is better: this model tells nothing about what "
        f"can be learned; hold out more text (--val-fraction) or train otherwise (--steps, --model)"
    )


def is_masked(shards: TokenShards) -> bool:
    return shards.shard_set.objective.startswith("mlm")


def load(folder: Path, shards: TokenShards) -> nn.Module:
    import transformers

    kind = (
        transformers.AutoModelForMaskedLM
        if is_masked(shards)
        else transformers.AutoModelForCausalLM
    )
    return kind.from_pretrained(folder)


def train(
    model: nn.Module, preset: pretrain_bert.Preset, steps: int, options: argparse.Namespace
) -> None:
    """AdamW as in the examples, on the held-out split alone."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(pretrain_bert.parameter_groups(model), preset.lr)
    warmup = max(1, round(preset.lr_warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    batches = held_out(options.shards, options.seed, options.batch_size)
    seen, bar = 0, tqdm(range(steps), desc="training", unit="step", disable=None, leave=False)
    model.train()
    for _ in bar:
        batch = {field: values.to(device) for field, values in next(batches).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += len(batch["input_ids"])
    samples = TokenShards(options.shards, split="val", world=EVERYTHING).total
    print(
        f"trained on {seen:,} samples, each of the {samples:,} held out {seen / samples:.1f} times"
    )


def held_out(folder: Path, seed: int, rows: int) -> Iterator[dict[str, Tensor]]:
    """The held-out split again and again, with other masks each time."""
    # Its masks are the same in every epoch, for evaluation; here they follow the seed instead.
    turn = 0
    while True:
        yield from TokenShards(
            folder, split="val", seed=seed + turn, verify=turn == 0, world=EVERYTHING
        ).batches(rows)
        turn += 1


def score(
    model: nn.Module, shards: TokenShards, rows: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], float]:
    """Ids [N], rising, mean losses [N] of the training split, and its mean unigram surprise, nats."""
    gpu = next(model.parameters()).device.type == "cuda"
    sifter = Sifter(model, exit_layer="full", autocast=torch.bfloat16 if gpu else None)
    counting = Sifter(model, criterion=Rarity(shards.unigrams), exit_layer="full")
    bar = tqdm(total=shards.total, desc="scoring", unit="sample", disable=None, leave=False)
    ids, losses, rarity = [], [], []
    with bar:
        for batch in shards.read_batches(rows, epoch=0):
            ids.append(batch["id"].numpy())
            losses.append(sifter.score(batch).cpu().numpy())
            rarity.append(counting.score(batch).cpu().numpy())
            bar.update(len(ids[-1]))
    found, values, counted = (np.concatenate(parts) for parts in (ids, losses, rarity))
    order = np.argsort(found)
    return found[order], values[order], float(counted[np.isfinite(counted)].mean())


def write(
    file: Path, ids: NDArray[np.int64], losses: NDArray[np.float32], metadata: dict[str, str]
) -> None:
    """The whole file or none: under another name until it is complete."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"id": ids, "loss": losses}).replace_schema_metadata(metadata)
    unfinished = file.with_name(f"{file.name}.tmp")
    try:
        parquet.write_table(table, unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", type=Path, help="folder of token shards, objective mlm or clm")
    add(
        "--out",
        type=Path,
        metavar="FILE.parquet",
        help="what to write (default: irreducible.parquet beside the shards)",
    )
    add(
        "--preset",
        choices=pretrain_bert.PRESETS,
        default="tiny",
        help="size of the model, as in examples/ (tiny)",
    )
    add("--steps", type=positive, help="updates (default: as many samples as the preset takes)")
    add("--batch-size", type=positive, default=64, help="rows at once, both ways (64)")
    add("--seed", type=int, default=0, help="initial weights and masks; that of your run (0)")
    add(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="score by this Hugging Face model as it is, instead of training one",
    )
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


if __name__ == "__main__":
    main()
