"""python examples/pretrain_bert.py --shards shards/built/mlm-128 --sift loss --log runs/loss.jsonl

Pretrain BERT by masked language modelling on prepared shards, in a plain PyTorch loop: AdamW, linear
warm-up and decay to zero, gradient clipping, bfloat16 on a GPU, checkpoints, exact resume, evaluation on
held-out text. The loop (``train``) does not know what made its loader: all of SIFT is the one expression
in ``make_loader`` that builds a SiftingDataLoader where torch's DataLoader was.

    --sift none       every sample is trained on, in the order of the shards
    --sift loss       of twice the samples, the half with the highest loss after --exit-layer layers
    --sift entropy    of twice the samples, the half whose prediction there is least certain
    --sift random     of twice the samples, a random half: the control that the others must beat

The log has one JSON line per evaluation. Seconds leave evaluation out; scoring is part of training.
With --checkpoint runs/bert.pt a killed run goes on where it was: the same command, and --resume
runs/bert.pt. The paper's run is --preset base on shards of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from siftloader import SiftingDataLoader, TokenShards


CLIP = 1.0  # the largest norm of a gradient
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Preset:
    """A model and how long and how fast it learns; fractions are of ``steps``."""

    layers: int
    hidden: int
    heads: int
    batch_size: int
    steps: int
    lr: float
    lr_warmup: float
    sift_warmup: float = 0.025  # no sifting before: what a new model finds hard means nothing
    cooldown: float = 0.2  # no sifting after: the last steps see the text as it is
    dropout: float = 0.1
    init: float = 0.02  # standard deviation of the initial weights


# Two CPU cores, a minute: two layers only, weights as large as their width allows and a high learning
# rate shorten the plateau at which every BERT begins (four layers do not leave it in that time).
TINY = Preset(2, 128, 4, 16, 450, lr=3e-3, lr_warmup=0.1, sift_warmup=0.05, dropout=0, init=0.06)
# A size for one GPU.
SMALL = Preset(8, 512, 8, 128, 40_000, lr=5e-4, lr_warmup=0.02)
# The paper's BERT-base, on shards of 512 tokens.
BASE = Preset(12, 768, 12, 32, 800_000, lr=1e-4, lr_warmup=0.002, cooldown=0)
PRESETS = {"tiny": TINY, "small": SMALL, "base": BASE}


def main(arguments: list[str] | None = None) -> None:
    pretrain(arguments, __doc__, PRESETS, build_bert)


def build_bert(preset: Preset, shards: TokenShards) -> nn.Module:
    config = BertConfig(
        vocab_size=shards.vocab_size,
        max_position_embeddings=shards.shard_set.layout.seq_len,
        num_hidden_layers=preset.layers,
        hidden_size=preset.hidden,
        intermediate_size=4 * preset.hidden,
        num_attention_heads=preset.heads,
        hidden_dropout_prob=preset.dropout,
        attention_probs_dropout_prob=preset.dropout,
        initializer_range=preset.init,
        pad_token_id=shards.shard_set.tokenizer.special_ids["pad"],
    )
    return MaskedHeadBertForMaskedLM(config)


class MaskedHeadBertForMaskedLM(BertForMaskedLM):
    """BERT as first published: in training the head runs at the masked positions only.

    Hugging Face's runs it everywhere, which for a small model is most of the work. On a GPU, finding the
    masked positions waits for it once per step, and is still a gain.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> MaskedLMOutput:
        if labels is None:
            return super().forward(input_ids, attention_mask)
        hidden = self.bert(input_ids, attention_mask).last_hidden_state  # [n, T, H]
        masked = labels != -100  # [n, T]
        logits = self.cls(hidden[masked])  # [M, V]
        return MaskedLMOutput(nn.functional.cross_entropy(logits, labels[masked]), logits)


def make_loader(
    options: argparse.Namespace, preset: Preset, shards: TokenShards, model: nn.Module
) -> Iterable[dict[str, Tensor]]:
    if options.sift == "none":
        return DataLoader(shards, preset.batch_size, drop_last=True)
    return SiftingDataLoader(
        shards,
        preset.batch_size,
        drop_last=True,
        model=model,
        exit_layer=options.exit_layer,
        criterion=options.sift,
        warmup_steps=options.warmup_steps,
        cooldown_steps=preset.cooldown,
        total_steps=preset.steps,
        autocast=torch.bfloat16 if torch.cuda.is_available() else None,
    )


def pretrain(
    arguments: list[str] | None,
    description: str,
    presets: dict[str, Preset],
    build: Callable[[Preset, TokenShards], nn.Module],
) -> None:
    """Command line to trained model, for any model that takes a batch and returns loss and logits."""
    options, preset = parse(arguments, description, presets)
    torch.manual_seed(options.seed)  # the same seed: the same initial weights, whatever the loader
    train_shards = TokenShards(options.shards, seed=options.seed)
    val_shards = TokenShards(options.shards, split="val")
    if len(train_shards) < preset.batch_size:
        raise SystemExit(f"{len(train_shards)} samples do not fill a batch of {preset.batch_size}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(preset, train_shards).to(device)
    loader = make_loader(options, preset, train_shards, model)
    train(options, preset, model, loader, train_shards, val_shards)


def train(
    options: argparse.Namespace,
    preset: Preset,
    model: nn.Module,
    loader: Iterable[dict[str, Tensor]],
    train_shards: TokenShards,
    val_shards: TokenShards,
) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model), preset.lr, betas=(0.9, 0.999))
    warmup = max(1, round(preset.lr_warmup * preset.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (preset.steps - step) / (preset.steps - warmup + 1)),
    )
    # Whoever knows how much of the data was handed out; torch's DataLoader does not.
    place: Any = loader if hasattr(loader, "state_dict") else train_shards
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "data": place}
    clock = Clock(device)
    done = resume(options.resume, parts, clock, device) if options.resume else 0
    log = Log(options.log, keep_until=done)

    model.train()
    batches = clock.loading(endless(loader))
    total, counted = torch.zeros((), device=device), 0  # of the loss, since the last log line
    progress = tqdm(
        range(done + 1, preset.steps + 1),
        desc=options.log.stem if options.log else None,
        initial=done,
        total=preset.steps,
        disable=None,  # unless stderr is a terminal
        leave=False,
    )
    clock.start()
    for step in progress:
        batch = {name: field.to(device) for name, field in next(batches).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total, counted = total + loss.detach(), counted + 1

        last = step == preset.steps
        if last or step % options.eval_every == 0:
            clock.stop()
            record = {
                "step": step,
                "samples": step * preset.batch_size,
                "train_loss": total.item() / counted,
                **evaluate(model, val_shards, options.eval_samples),
                "learning_rate": schedule.get_last_lr()[0],
                "seconds_training": clock.training,
                "seconds_loading": clock.waiting,
                "seconds_scoring": 0.0,
            }
            if hasattr(loader, "stats"):
                scoring = loader.stats["seconds_scoring"]  # inside next(), on a CPU
                record["seconds_loading"] = max(0.0, clock.waiting - scoring)
                record["seconds_scoring"] = scoring
            log.write(record)
            if last:
                final = evaluate(model, val_shards, options.final_samples)
                log.write({**record, **final, "final": True})
            progress.set_postfix(val_loss=record["val_loss"])
            total, counted = torch.zeros((), device=device), 0
            clock.start()
        if options.checkpoint and (last or step % options.checkpoint_every == 0):
            save(options.checkpoint, parts, clock, step)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    # Decay pulls weights together, not biases and normalisation.
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def endless(loader: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    while True:  # every iteration of the loader is the next epoch of the shards
        yield from loader


@torch.no_grad()
def evaluate(model: nn.Module, shards: TokenShards, samples: int | None) -> dict[str, float]:
    """Mean over the labelled tokens of the first ``samples`` held-out samples; None: of all.

    The held-out masks are always the same ones, so that runs can be compared.
    """
    device = next(model.parameters()).device
    causal = not shards.shard_set.objective.startswith("mlm")
    loss, right = torch.zeros((), device=device), torch.zeros((), device=device)
    tokens = seen = 0
    model.eval()
    for batch in shards.batches(EVALUATION_BATCH):
        wanted = batch["labels"][:, 1:] if causal else batch["labels"]  # [n, T]
        tokens += int((wanted != -100).sum())
        wanted = wanted.to(device)
        inputs = {name: field.to(device) for name, field in batch.items() if name != "labels"}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(**inputs).logits  # [n, T, V]
        logits = (logits[:, :-1] if causal else logits)[wanted != -100].float()
        wanted = wanted[wanted != -100]
        loss += nn.functional.cross_entropy(logits, wanted, reduction="sum")
        right += (logits.argmax(-1) == wanted).sum()
        seen += len(batch["labels"])
        if samples is not None and seen >= samples:
            break
    model.train()
    return {"val_loss": loss.item() / tokens, "val_accuracy": right.item() / tokens}


def save(file: Path, parts: dict[str, Any], clock: Clock, step: int) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": step, "clock": clock.state(), "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".tmp")
    torch.save(state, unfinished)
    unfinished.replace(file)  # killed while saving, the checkpoint before is still there


def resume(file: Path, parts: dict[str, Any], clock: Clock, device: torch.device) -> int:
    """Put everything back where it was; returns the number of steps done."""
    state = torch.load(file, map_location="cpu")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    clock.restore(state["clock"])
    torch.set_rng_state(state["rng"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"])
    return state["step"]


class Clock:
    """Seconds of training, evaluation left out, and those of them spent waiting for a batch."""

    def __init__(self, device: torch.device) -> None:
        self.training = self.waiting = self._since = 0.0
        self._gpu = device.type == "cuda"

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()
        self.training += time.perf_counter() - self._since

    def loading(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            since = time.perf_counter()
            batch = next(batches)
            self.waiting += time.perf_counter() - since
            yield batch

    def state(self) -> list[float]:
        self.stop()
        self.start()
        return [self.training, self.waiting]

    def restore(self, state: list[float]) -> None:
        self.training, self.waiting = state


class Log:
    """JSON lines; a resumed run drops those that it is about to write again."""

    def __init__(self, file: Path | None, keep_until: int) -> None:
        self._file = file
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        old = file.read_text().splitlines() if keep_until and file.exists() else []
        kept = [line for line in old if json.loads(line)["step"] <= keep_until]
        file.write_text("".join(line + "\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record)
        tqdm.write(line)
        if self._file is not None:
            with self._file.open("a") as stream:
                stream.write(line + "\n")


def parse(
    arguments: list[str] | None, description: str, presets: dict[str, Preset]
) -> tuple[argparse.Namespace, Preset]:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shards", required=True, help="folder written by tools/make_shards.py")
    add("--preset", choices=presets, default="tiny", help=preset_help(presets))
    add("--sift", choices=["none", "loss", "entropy", "random"], default="none")
    add("--exit-layer", type=int, default=1, help="layers that score a candidate (default 1)")
    add("--warmup-steps", type=int, help="steps before sifting begins (the preset's share)")
    add("--cooldown", type=float, help="share of the steps after sifting ends (the preset's)")
    add("--steps", type=int, help="updates of the model; the learning rate ends at zero there")
    add("--batch-size", type=int, help="samples trained on per step; sifting draws twice as many")
    add("--lr", type=float, help="highest learning rate")
    add("--seed", type=int, default=0, help="initial weights, order of the samples, masks")
    add("--log", type=Path, metavar="FILE.jsonl", help="write a line per evaluation here")
    add("--eval-every", type=int, help="steps between evaluations (default: 20 evaluations)")
    add("--eval-samples", type=int, help="held-out samples for each of them (default all)")
    add("--final-samples", type=int, help="the same for the last one, logged as final")
    add("--checkpoint", type=Path, metavar="FILE", help="save everything here, at the end and")
    add("--checkpoint-every", type=int, default=1000, help="... every so many steps (1000)")
    add("--resume", type=Path, metavar="FILE", help="go on from there as if never interrupted")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("steps", "batch_size", "lr", "cooldown")}
    preset = replace(presets[options.preset], **{k: v for k, v in given.items() if v is not None})
    if options.eval_every is None:
        options.eval_every = max(1, preset.steps // 20)
    if options.warmup_steps is None:
        options.warmup_steps = round(preset.sift_warmup * preset.steps)
    return options, preset


def preset_help(presets: dict[str, Preset]) -> str:
    return "; ".join(
        f"{name}: {p.layers} layers of {p.hidden}, {p.steps:,} steps of {p.batch_size} samples"
        for name, p in presets.items()
    )


if __name__ == "__main__":
    main()
