"""What scoring costs: python tools/bench_scoring.py

Trains BERT-base shapes (cut in batch size to what the machine bears) and measures, interleaved in one run:

* step     one plain training step: forward and backward of b rows with the head everywhere, AdamW
* ours     scoring P = b / keep candidates with `Sifter`: j layers, the head at the labelled positions
* naive    the same scores as one would write them first: the whole model with output_hidden_states,
           the head on all positions of hidden state j

and prints the shares seconds scoring / seconds stepping beside the floor: the FLOPs of scoring, j layers and
the head at the labelled positions, over the FLOPs of the step, both counted by formula (matrix products
only, backward twice the forward). Medians; the machine, the versions and the date stand on top.

    python tools/bench_scoring.py --exit-layers 1 2 6 12 --batch-size 4 --repeats 7
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor

import siftloader
from siftloader import Sifter


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    device = torch.device(args.device)
    print(header(device))
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            num_hidden_layers=args.depth,
            hidden_size=args.hidden,
            num_attention_heads=args.hidden // 64,
            intermediate_size=4 * args.hidden,
            max_position_embeddings=args.seq_len,
        )
    )
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pool = round(args.batch_size / args.keep)
    batch, candidates = make_batch(args.batch_size, args), make_batch(pool, args)
    print(
        f"BERT {args.depth} x {args.hidden}, {args.seq_len} tokens, {args.masked:.0%} masked, "
        f"batch {args.batch_size} of {pool}, {args.criterion}, float32, "
        f"{args.repeats} interleaved repeats\n"
    )
    layers = [j for j in args.exit_layers if j <= args.depth]
    sifters = {
        j: Sifter(model, exit_layer=j, criterion=args.criterion, keep=args.keep) for j in layers
    }
    on_device = {name: value.to(device) for name, value in candidates.items()}
    tasks = {"step": lambda: step(model, optimizer, batch, device)}
    for j in layers:
        tasks[f"ours {j}"] = lambda j=j: sifters[j].winners(
            on_device, candidates["labels"], args.batch_size
        )
        tasks[f"naive {j}"] = lambda j=j: naive(model, on_device, j, args.criterion)
    check_equal(sifters, model, candidates, on_device, args)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(args.repeats):
        for name, task in tasks.items():
            seconds[name].append(timed(task, device))
    report(layers, {name: statistics.median(s) for name, s in seconds.items()}, args, pool)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exit-layers", type=int, nargs="+", default=[1, 2, 6, 12], metavar="J")
    parser.add_argument("--batch-size", type=int, default=2, help="rows trained on (default: 2)")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12, help="layers of the model")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--masked", type=float, default=0.15, help="share of labelled positions")
    parser.add_argument("--criterion", choices=["loss", "entropy"], default="loss")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def header(device: torch.device) -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    machine = names[0] if names else platform.processor()
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    return (
        f"{machine}, {torch.get_num_threads()} threads | Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"siftloader {siftloader.__version__} | {datetime.date.today().isoformat()}"
    )


def make_batch(rows: int, args: argparse.Namespace) -> dict[str, Tensor]:
    ids = torch.randint(1000, 30522, (rows, args.seq_len))
    labels = ids.clone()
    labels[torch.rand(ids.shape) >= args.masked] = -100
    inputs = ids.masked_fill(labels != -100, 103)
    return {"input_ids": inputs, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model, optimizer, batch, device) -> None:
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def naive(model, batch, layer: int, criterion: str) -> Tensor:
    model.eval()
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = model(**inputs, output_hidden_states=True).hidden_states[layer]
        logits = model.cls(hidden).float()
        if criterion == "entropy":
            values = torch.distributions.Categorical(logits=logits).entropy()
        else:
            values = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch["labels"], reduction="none"
            )
        labelled = batch["labels"] != -100
        scores = (values * labelled).sum(1) / labelled.sum(1)
    model.train()
    return scores


def check_equal(sifters, model, candidates, on_device, args) -> None:
    # The two ways must agree before it means anything which is faster.
    for j, sifter in sifters.items():
        ours, theirs = sifter.score(candidates), naive(model, on_device, j, args.criterion)
        assert torch.allclose(ours, theirs, atol=1e-3), (j, ours, theirs)


def timed(task, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops(args: argparse.Namespace, rows: int, layers: int, head_share: float) -> float:
    """Matrix products of one forward: 24 H^2 + 4 T H a token and layer, 2 H (H + V) a head position."""
    tokens, hidden = rows * args.seq_len, args.hidden
    layer = 24 * hidden**2 + 4 * args.seq_len * hidden
    head = 2 * hidden * (hidden + 30522)
    return tokens * (layers * layer + head_share * head)


def report(layers, seconds: dict[str, float], args: argparse.Namespace, pool: int) -> None:
    whole = 3 * flops(args, args.batch_size, args.depth, 1.0)
    stepping = seconds["step"]
    print(f"plain step {stepping:.2f} s = {whole / stepping / 1e9:.0f} GFLOP/s\n")
    print("  j   floor    ours   ours/floor   naive   naive/ours   ours, s   naive, s")
    for j in layers:
        floor = flops(args, pool, j, args.masked) / whole
        ours, other = seconds[f"ours {j}"], seconds[f"naive {j}"]
        print(
            f"{j:3d}  {floor:6.1%}  {ours / stepping:6.1%}   {ours / stepping / floor:8.2f} x  "
            f"{other / stepping:6.1%}   {other / ours:8.1f} x   {ours:7.2f}   {other:8.2f}"
        )
    print(
        "\nfloor, ours, naive: of a plain step. AdamW and everything elementwise is in the step."
    )


if __name__ == "__main__":
    main()
