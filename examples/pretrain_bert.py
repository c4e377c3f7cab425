"""python examples/pretrain_bert.py --shards shards/built/mlm-128 --sift loss --log runs/loss.jsonl

Pretrain BERT on prepared shards, in a plain PyTorch loop: masked language modelling, and next-sentence
prediction where the shards hold pairs (objective mlm-nsp); AdamW, linear warm-up and decay to zero, gradient
clipping, checkpoints, exact resume, evaluation on held-out text. The loop (``train``) does not know what
made its loader: all of SIFT is the one expression in ``make_loader`` that builds a SiftingDataLoader where
torch's DataLoader was.

    --sift none       every sample is trained on, in the order of the shards
    --sift loss       of twice the samples, the half with the highest loss after --exit-layer layers
    --sift entropy    of twice the samples, the half whose prediction there is least certain
    --sift random     of twice the samples, a random half: the control that the others must beat

Samples are scored by their masked tokens alone, never by the next sentence.

The log has a line about the run, then one JSON line per evaluation: train_loss is what was minimised since the
line before (with pairs, the sum of both losses), val_loss and val_accuracy are of masked tokens, whose
masks are always the same, val_nsp_accuracy is of pairs. Seconds leave evaluation out; scoring is part of training.

A killed run goes on where it was, to the bit: with --checkpoint runs/bert.pt --continue the same command
begins, continues, and does nothing when all is done. On several GPUs (or, slowly, processes on a CPU) each
rank trains on samples of its own, --batch-size of them:

    torchrun --nproc-per-node 8 examples/pretrain_bert.py --preset base --shards shards/wikibooks \\
        --sift entropy --log-file runs/entropy.jsonl --checkpoint runs/entropy.pt --continue

That is the paper's run (Das et al., 2024, section 7 and appendix F), on shards of 512 tokens with pairs;
clipping the gradient, and no weight decay for biases and normalisation, are not in the paper but BERT's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pretraining import (
    Average,
    Checkpoint,
    Clock,
    Log,
    over_ranks,
    process_group,
    surroundings,
    unwrapped,
    wrapped,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

from siftloader import SiftingDataLoader, TokenShards, World


CLIP = 1.0  # the largest norm of a gradient
EVALUATION_BATCH = 32
# torch's fused attention is slow backwards on a CPU: a third of a step at 128 tokens.
ATTENTION = "sdpa" if torch.cuda.is_available() else "eager"


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
# The paper's BERT-base, on 8 GPUs and shards of 512 tokens with pairs; nothing is sifted for 20,000 steps.
BASE = Preset(
    12, 768, 12, 32, 800_000, lr=1e-4, lr_warmup=0.002, sift_warmup=20_000 / 800_000, cooldown=0
)
PRESETS = {"tiny": TINY, "small": SMALL, "base": BASE}


def main(arguments: list[str] | None = None) -> None:
    pretrain(arguments, __doc__, PRESETS, build_bert)


def build_bert(preset: Preset, shards: TokenShards) -> nn.Module:
    objective, special_ids = shards.shard_set.objective, shards.shard_set.tokenizer.special_ids
    if not objective.startswith("mlm"):
        raise SystemExit(
            f"{shards.shard_set.folder} has objective {objective!r}, BERT needs mlm or mlm-nsp; prepare "
            f"the text with --objective mlm, or train a GPT on it with examples/pretrain_gpt.py"
        )
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
        pad_token_id=special_ids["pad"],
        attn_implementation=ATTENTION,
    )
    return (BertOfPairs if objective == "mlm-nsp" else Bert)(config)


class Bert(BertForMaskedLM):
    """BERT as first published: where there are labels, the head runs at the masked positions only.

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


class BertOfPairs(BertForPreTraining):
    """The same, and whether the second segment follows the first in the text; the loss is the sum of both."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
    ) -> BertForPreTrainingOutput:
        if labels is None:
            return super().forward(input_ids, attention_mask, token_type_ids)
        hidden, pooled = self.bert(input_ids, attention_mask, token_type_ids)[
            :2
        ]  # [n, T, H], [n, H]
        masked = labels != -100  # [n, T]
        logits = self.cls.predictions(hidden[masked])  # [M, V]
        follows = self.cls.seq_relationship(pooled)  # [n, 2]
        loss = nn.functional.cross_entropy(logits, labels[masked])
        if next_sentence_label is not None:
            # The same as cross_entropy, which siftloader listens to once, to learn how this model reads its
            # labels: of a sample without a masked position it would hear nothing but this.
            chances = follows.log_softmax(-1).gather(1, next_sentence_label[:, None])
            loss = loss - chances.mean()
        return BertForPreTrainingOutput(loss, logits, follows)


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
        autocast=torch.bfloat16 if options.precision == "bf16" else None,
    )


def pretrain(
    arguments: list[str] | None,
    description: str,
    presets: dict[str, Preset],
    build: Callable[[Preset, TokenShards], nn.Module],
) -> None:
    """Command line to trained model, for any model that takes a batch and returns loss and logits."""
    options, preset = parse(arguments, description, presets)
    with process_group() as device:
        torch.manual_seed(options.seed)  # the same weights at first, whatever the loader
        train_shards = TokenShards(options.shards, seed=options.seed)
        val_shards = TokenShards(options.shards, split="val")
        if len(train_shards) < preset.batch_size:
            raise SystemExit(
                f"{options.shards} has {len(train_shards)} samples a rank, a batch is of "
                f"{preset.batch_size}; prepare more text or lower --batch-size"
            )
        model = wrapped(build(preset, train_shards).to(device), options.compile)
        if rank := World.detect().rank:
            torch.manual_seed(options.seed + rank)  # every rank drops out other neurons
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
    device, world, bare = next(model.parameters()).device, World.detect(), unwrapped(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(bare), preset.lr, betas=(0.9, 0.999), fused=True
    )
    warmup = max(1, round(preset.lr_warmup * preset.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (preset.steps - step) / (preset.steps - warmup + 1)),
    )
    # Whoever knows how much of the data was handed out; torch's DataLoader does not.
    place: Any = loader if hasattr(loader, "state_dict") else train_shards
    clock, average = Clock(device), Average(device)
    run = about(options, preset, bare, train_shards)
    checkpoint = Checkpoint(
        run,
        shared={"model": bare, "optimizer": optimizer, "schedule": schedule},
        own={"data": place, "average": average, "clock": clock},
    )
    done = checkpoint.load(options.resume) if options.resume else 0
    log = Log(options.log, {**run, **surroundings(), **options.header}, keep_until=done)
    bf16 = options.precision == "bf16"

    model.train()
    batches = clock.loading(endless(loader))
    progress = tqdm(
        range(done + 1, preset.steps + 1),
        desc=options.log.stem if options.log else None,
        initial=done,
        total=preset.steps,
        disable=True if world.rank else None,  # None: unless stderr is a terminal
        leave=False,
    )
    clock.start()
    for step in progress:
        batch = {name: field.to(device) for name, field in next(batches).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(bare.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.add(loss)

        last = step == preset.steps
        if last or step % options.eval_every == 0:
            clock.stop()
            # A GPU scores while the loop goes on; on a CPU, it is part of the wait for a batch.
            scoring = loader.stats["seconds_scoring"] if hasattr(loader, "stats") else 0.0
            record = {
                "step": step,
                "samples": step * preset.batch_size * world.ranks,
                "train_loss": average.take(),
                **evaluate(bare, val_shards, options.eval_samples, bf16),
                "learning_rate": schedule.get_last_lr()[0],
                "seconds_training": clock.training,
                "seconds_loading": max(0.0, clock.waiting - scoring),
                "seconds_scoring": scoring,
            }
            log.write(record)
            if last:
                final = evaluate(bare, val_shards, options.final_samples, bf16)
                log.write({**record, **final, "final": True})
            progress.set_postfix(val_loss=record["val_loss"])
            clock.start()
        if options.checkpoint and (last or step % options.checkpoint_every == 0):
            checkpoint.save(options.checkpoint, step)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    # Decay pulls weights together, not biases and normalisation.
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def endless(loader: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    while True:  # every iteration of the loader is the next epoch of the shards
        # It begins by drawing a random number; a resumed run begins once more, and must drop out as before.
        with torch.random.fork_rng(devices=[]):
            epoch = iter(loader)
        yield from epoch


@torch.no_grad()
def evaluate(
    model: nn.Module, shards: TokenShards, samples: int | None, bf16: bool = False
) -> dict[str, float]:
    """Means over the labelled tokens of the first ``samples`` held-out samples; None: of all.

    The held-out masks are always the same ones, so that runs can be compared. Under torchrun every rank
    takes its share of the samples, and all learn the result.
    """
    device, world = next(model.parameters()).device, World.detect()
    causal = not shards.shard_set.objective.startswith("mlm")
    samples = shards.total if samples is None else min(samples, shards.total)
    left = len(range(world.rank, samples, world.ranks))  # for this rank
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    model.eval()
    for batch in shards.batches(EVALUATION_BATCH):
        if left <= 0:
            break
        batch = {name: field[:left].to(device) for name, field in batch.items()}
        left -= EVALUATION_BATCH
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(**batch)
        wanted = batch["labels"][:, 1:] if causal else batch["labels"]  # [n, T]
        logits = output.logits if "logits" in output else output.prediction_logits
        if logits.ndim == 3:  # at all positions [n, T, V], not at the labelled ones only [M, V]
            logits = (logits[:, :-1] if causal else logits)[wanted != -100]
        wanted, logits = wanted[wanted != -100], logits.float()
        sums[0] += nn.functional.cross_entropy(logits, wanted, reduction="sum")
        sums[1] += (logits.argmax(-1) == wanted).sum()
        sums[2] += len(wanted)
        if (pairs := batch.get("next_sentence_label")) is not None:
            sums[3] += (output.seq_relationship_logits.argmax(-1) == pairs).sum()
            sums[4] += len(pairs)
    model.train()
    loss, right, tokens, pairs_right, pairs = over_ranks(sums).tolist()
    found = {"val_loss": loss / tokens, "val_accuracy": right / tokens}
    return found | ({"val_nsp_accuracy": pairs_right / pairs} if pairs else {})


def about(
    options: argparse.Namespace, preset: Preset, model: nn.Module, shards: TokenShards
) -> dict[str, Any]:
    """What makes a run this run: a checkpoint of another one is refused."""
    return {
        "model": type(model).__name__,
        "parameters": sum(each.numel() for each in model.parameters()),
        "preset": options.preset,
        **asdict(preset),
        "objective": shards.shard_set.objective,
        "shards": shards.fingerprint,
        "seed": options.seed,
        "sift": options.sift,
        "exit_layer": options.exit_layer,
        "warmup_steps": options.warmup_steps,
        "precision": options.precision,
        "compile": options.compile,
        "ranks": World.detect().ranks,
    }


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
    add("--exit-layer", type=count, default=1, help="layers that score a candidate (default 1)")
    add("--warmup-steps", type=int, help="steps before sifting begins (the preset's share)")
    add("--cooldown", type=float, help="share of the steps after sifting ends (the preset's)")
    add("--steps", type=count, help="updates of the model; the learning rate ends at zero there")
    add("--batch-size", type=count, help="samples per step and rank; sifting draws twice as many")
    add("--lr", type=float, help="highest learning rate")
    add("--seed", type=int, default=0, help="initial weights, order of the samples, masks")
    add(
        "--log",
        "--log-file",  # torchrun takes --log for an option of its own, even after the script
        type=Path,
        metavar="FILE.jsonl",
        help="write a line per evaluation here (under torchrun say --log-file)",
    )
    add("--eval-every", type=count, help="steps between evaluations (default: 20 evaluations)")
    add("--eval-samples", type=count, help="held-out samples for each of them (default all)")
    add("--final-samples", type=count, help="the same for the last one, logged as final")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of training and scoring; weights are fp32 (auto: bf16 on a GPU, fp32 on a CPU)",
    )
    add("--compile", action="store_true", help="torch.compile the training model: slow to begin")
    add("--checkpoint", type=Path, metavar="FILE", help="save everything here, at the end and")
    add("--checkpoint-every", type=count, default=1000, help="... every so many steps (1000)")
    restart = parser.add_mutually_exclusive_group()
    restart.add_argument(
        "--resume", type=Path, metavar="FILE", help="go on from there as if never interrupted"
    )
    restart.add_argument(
        "--continue",
        dest="continues",
        action="store_true",
        help="go on from --checkpoint if it exists, else begin: the same command continues",
    )
    options = parser.parse_args(arguments)
    if options.continues:
        if options.checkpoint is None:
            parser.error("--continue needs --checkpoint FILE: where to go on from, and to save to")
        options.resume = options.checkpoint if options.checkpoint.exists() else None
    if options.resume and not options.resume.exists():
        parser.error(
            f"--resume {options.resume}: no such file; give one that --checkpoint wrote, or use "
            f"--checkpoint {options.resume} --continue, which begins where there is none"
        )
    given = {name: getattr(options, name) for name in ("steps", "batch_size", "lr", "cooldown")}
    preset = replace(presets[options.preset], **{k: v for k, v in given.items() if v is not None})
    if options.eval_every is None:
        options.eval_every = max(1, preset.steps // 20)
    if options.warmup_steps is None:
        options.warmup_steps = round(preset.sift_warmup * preset.steps)
    if options.precision == "auto":
        options.precision = "bf16" if torch.cuda.is_available() else "fp32"
    options.header = {}  # for programs that call this one: more for the first line of the log
    return options, preset


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, needed is a whole number of at least 1")
    return int(text)


def preset_help(presets: dict[str, Preset]) -> str:
    return "; ".join(
        f"{name}: {p.layers} layers of {p.hidden}, {p.steps:,} steps of {p.batch_size} samples"
        for name, p in presets.items()
    )


if __name__ == "__main__":
    main()
