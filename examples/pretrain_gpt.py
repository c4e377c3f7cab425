"""python examples/pretrain_gpt.py --shards shards/built/clm-128 --sift loss --log runs/loss.jsonl

Pretrain a GPT on prepared shards (objective clm), with the very loop of pretrain_bert.py: next-token
prediction differs in the model and in the shards, not in the loop, and not in the loader.

    --sift none       every sample is trained on, in the order of the shards
    --sift loss       of twice the samples, the half with the highest loss after --exit-layer layers
    --sift entropy    of twice the samples, the half whose prediction there is least certain
    --sift random     of twice the samples, a random half: the control that the others must beat

Checkpoints, --continue, torchrun and the log are those of pretrain_bert.py, whose --help tells of them.
"""

from __future__ import annotations

from pretrain_bert import ATTENTION, Preset, pretrain
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from siftloader import TokenShards


TINY = Preset(4, 128, 4, 8, 220, lr=3e-3, lr_warmup=0.1, sift_warmup=0.05, dropout=0, init=0.06)
SMALL = Preset(8, 512, 8, 128, 40_000, lr=5e-4, lr_warmup=0.02)
# As large as GPT-2; the paper trained no GPT, so the figures are customary ones.
BASE = Preset(12, 768, 12, 32, 800_000, lr=2.5e-4, lr_warmup=0.002)
PRESETS = {"tiny": TINY, "small": SMALL, "base": BASE}


def main(arguments: list[str] | None = None) -> None:
    pretrain(arguments, __doc__, PRESETS, build_gpt)


def build_gpt(preset: Preset, shards: TokenShards) -> nn.Module:
    objective, special_ids = shards.shard_set.objective, shards.shard_set.tokenizer.special_ids
    if objective != "clm":
        raise SystemExit(
            f"{shards.shard_set.folder} has objective {objective!r}, a GPT needs clm; prepare the text with "
            f"--objective clm, or train BERT on it with examples/pretrain_bert.py"
        )
    end_of_text = special_ids["eos"]
    config = GPT2Config(
        vocab_size=shards.vocab_size,
        n_positions=shards.shard_set.layout.seq_len,
        n_layer=preset.layers,
        n_embd=preset.hidden,
        n_head=preset.heads,
        embd_pdrop=preset.dropout,
        resid_pdrop=preset.dropout,
        attn_pdrop=preset.dropout,
        initializer_range=preset.init,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
        attn_implementation=ATTENTION,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it uses anyway, after a warning that it had to guess
    return model


if __name__ == "__main__":
    main()
