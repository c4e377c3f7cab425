"""What scoring costs, beside its floor: python tools/bench_scoring.py

For a BERT-base, a GPT-2 and a Llama of 1B parameters, at exit layers j, measured in turn in one run:

* scoring alone   seconds to score P = b / keep candidates from pinned memory, over those of a plain step
* sifted step     seconds of a step drawn from ``SiftingDataLoader.wrap`` over batches in pinned memory, less
                  those of a plain step over the same batches, over those of the plain step: the cost
* peak, syncs     memory at the peak of that loop over that of the plain one; waits of the host per step

beside the *floor*: the FLOPs of scoring (j layers, the head where it is needed) over the FLOPs of that very
plain step (head everywhere, as the model has it), of matrix products, by formula; and beside three rivals:

* head everywhere   a model cut to j layers, its head at all positions
* naive             the whole model with output_hidden_states, the head on all of hidden state j
* full depth        the whole model and its head, as one scores without an early exit

The other rows switch one option each, at j = 1. A plain step is forward and backward of b rows and fused
AdamW, under autocast. Every sifted step has a plain one of its own beside it; told are the medians of the
shares, and the least and the most.

    python tools/bench_scoring.py                                                # cut in width on a CPU
    python tools/bench_scoring.py --shape bert-base --size full --batch-size 2 --exit-layers 1 2 N \\
        --only ours naive full                                                   # the real width there
    python tools/bench_scoring.py --draw runs/bench_scoring/bench_scoring.json   # measured elsewhere

Table, figures of every round (JSON) and picture (PNG, where matplotlib is installed) go to --out.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import inspect
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor, nn


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # siftloader may not be installed

import siftloader
from siftloader import EarlyExit, Sifter, SiftingDataLoader, Stride
from siftloader.targets import Positions


IGNORED = -100
WARM = 1  # steps before the clock starts, in every window
WARM_FIRST, WARM_COMPILED = (
    2,
    4,
)  # where a loop or a sifter is new; what compiles does so at the third pool
LEAST_ROUNDS = 3
BATCHES = 4  # that exist; a loop goes round them
STRIDE = 8
Batch = dict[str, Tensor]


# ---- what is trained


@dataclass(frozen=True)
class Shape:
    """A model, the rows it learns from, and the FLOPs of both: matrix products, backward twice the forward."""

    family: str  # "bert", "gpt2" or "llama"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int  # width of the feed-forward layers
    vocabulary: int
    tokens: int
    batch_size: int
    labelled: float  # share of the positions of a row

    @property
    def labels(self) -> int:
        """Labelled positions of a row; a causal model predicts nothing at the last one."""
        return self.tokens - 1 if self.is_causal else round(self.labelled * self.tokens)

    @property
    def is_causal(self) -> bool:
        """Whether the label of a position is the next token."""
        return self.family != "bert"

    @property
    def layer(self) -> int:
        """FLOPs of a layer's forward, per token; attention looks at all T positions, masked or not."""
        keys = self.hidden // self.heads * self.kv_heads
        projections = 2 * self.hidden * (2 * self.hidden + 2 * keys)
        forward = (3 if self.family == "llama" else 2) * 2 * self.hidden * self.inner
        return projections + forward + 4 * self.tokens * self.hidden

    @property
    def head(self) -> int:
        """FLOPs of the head, per position; BERT's has a layer of its own before the vocabulary."""
        before = self.hidden if self.family == "bert" else 0
        return 2 * self.hidden * (before + self.vocabulary)

    def step_flops(self, rows: int, sparse: bool = False) -> int:
        """Of a plain step; ``sparse`` is a loop whose model runs its head at the labelled positions only."""
        heads = self.labels if sparse else self.tokens
        return 3 * rows * (self.tokens * self.layers * self.layer + heads * self.head)

    def scoring_flops(self, rows: int, layer: int, positions: Positions | None = None) -> int:
        """Of scoring ``rows`` candidates at exit layer j, at all labelled positions or some of them."""
        scored = self.labels if positions is None else positions.most(self.labels)
        return rows * (self.tokens * layer * self.layer + scored * self.head)

    def about(self) -> str:
        """For people."""
        labelled = "all labelled" if self.is_causal else f"{self.labelled:.0%} labelled"
        return (
            f"{self.family} {self.layers} x {self.hidden}, {self.heads} heads, {self.vocabulary:,} ids, "
            f"{self.tokens:,} tokens, {labelled}"
        )


def floor(
    shape: Shape,
    layer: int,
    keep: float,
    positions: Positions | None = None,
    *,
    sparse: bool = False,
) -> float:
    """The least that scoring can cost, as a share of a plain step."""
    return shape.scoring_flops(1, layer, positions) / keep / shape.step_flops(1, sparse)


SHAPES = {
    "bert-base": Shape("bert", 12, 768, 12, 12, 3072, 30522, 512, 32, 0.15),
    "gpt2": Shape("gpt2", 12, 768, 12, 12, 3072, 50257, 1024, 16, 1.0),
    "llama-1b": Shape("llama", 16, 2048, 32, 8, 8192, 128256, 1024, 8, 1.0),
}
# As deep, with a head as heavy beside a layer, and a step in a fraction of a second on two cores.
SMALL = {
    "bert-base": Shape("bert", 12, 192, 3, 3, 768, 7680, 128, 4, 0.15),
    "gpt2": Shape("gpt2", 12, 192, 3, 3, 768, 12544, 128, 2, 1.0),
    "llama-1b": Shape("llama", 16, 128, 4, 1, 512, 8016, 128, 2, 1.0),
}


def build(shape: Shape, device: str = "cpu") -> nn.Module:
    """The model as Hugging Face ships it, weights at random, in training mode."""
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.tokens,
    }
    with torch.device(device):
        if shape.family == "bert":
            config: Any = transformers.BertConfig(**sizes, intermediate_size=shape.inner)
            model: nn.Module = transformers.BertForMaskedLM(config)
        elif shape.family == "gpt2":
            config = transformers.GPT2Config(
                **sizes, n_inner=shape.inner, bos_token_id=0, eos_token_id=0
            )
            model = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.LlamaConfig(
                **sizes,
                intermediate_size=shape.inner,
                num_key_value_heads=shape.kv_heads,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
            )
            model = transformers.LlamaForCausalLM(config)
    if shape.family != "bert":
        model.loss_type = (
            "ForCausalLM"  # what it uses anyway, after a warning that it had to guess
        )
    return model.train()


def make_batch(shape: Shape, rows: int, pinned: bool = False) -> Batch:
    """Rows of random ids; as many labels in every row."""
    ids = torch.randint(0, shape.vocabulary, (rows, shape.tokens))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if not shape.is_causal:
        left_out = torch.rand(ids.shape).argsort(1) >= shape.labels
        batch["labels"] = ids.masked_fill(left_out, IGNORED)
        batch["input_ids"] = ids.masked_fill(~left_out, min(103, shape.vocabulary - 1))
        batch["attention_mask"] = torch.ones_like(ids)
    return {name: value.pin_memory() for name, value in batch.items()} if pinned else batch


# ---- ways to score


@dataclass(frozen=True)
class Way:
    """A loader's options, measured at one exit layer."""

    name: str
    layer: int
    options: dict[str, Any]
    scores: bool = True  # else there is no scoring to time alone

    # Those that switch a row on, where the loader has them.
    ALL_OPTIONS: ClassVar = ("overlap", "scorer_device", "score_batch_size", "compile")


def ways(shape: Shape, last: int, options: argparse.Namespace) -> list[Way]:
    """Our own: at every exit layer as it comes, at the first with other options."""
    layers = exit_layers(last, options)
    first, known = layers[0], known_options()
    pool = round((options.batch_size or shape.batch_size) / options.keep)
    other = "entropy" if options.criterion == "loss" else "loss"
    found = [Way("ours", layer, {}) for layer in layers]
    found.append(Way("loader off (keep=1.0)", first, {"keep": 1.0}, scores=False))
    found.append(Way("random half", first, {"criterion": "random"}, scores=False))
    found.append(Way(f"ours, {other}", first, {"criterion": other}))
    if shape.is_causal:
        counts = np.ones(shape.vocabulary, np.int64)
        for name, control in ((f"Stride({STRIDE})", None), (f"Stride({STRIDE}), control", counts)):
            found.append(Way(name, first, {"positions": Stride(STRIDE, control)}))
    switched: list[tuple[str, Any]] = [("overlap", True)]
    if options.scorer_device:
        switched.append(("scorer_device", options.scorer_device))
    switched.append(("score_batch_size", max(1, pool // 4)))
    if options.compile:
        switched.append(("compile", True))
        if options.device.startswith("cuda"):
            switched.append(("compile", "reduce-overhead"))  # CUDA graphs
    found += [
        Way(f"{name}={value!r}", first, {name: value}) for name, value in switched if name in known
    ]
    if options.compile and {"overlap", "compile"} <= known:
        found.append(Way("overlap, compile", first, {"overlap": True, "compile": True}))
    return found


def exit_layers(last: int, options: argparse.Namespace) -> list[int]:
    wanted = {last if each == "N" else int(each) for each in options.exit_layers}
    return sorted(layer for layer in wanted if layer <= last)


def known_options() -> set[str]:
    """What the loader takes by name; anything else it would hand to torch's."""
    return {*inspect.signature(SiftingDataLoader.__init__).parameters}


def hidden_of(model: nn.Module, family: str, inputs: Batch, layer: int) -> Tensor:
    """[P, T, H], what the head would see after ``layer`` layers, from a run of the whole model."""
    found: Any = model(**inputs, output_hidden_states=True)
    hidden: Tensor = found.hidden_states[layer]
    if layer == len(found.hidden_states) - 1 or family == "bert":
        return hidden  # of the last layer it comes normed
    body: Any = model
    normed = body.transformer.ln_f if family == "gpt2" else body.model.norm
    return normed(hidden)  # type: ignore[no-any-return]


def naive(
    model: nn.Module, shape: Shape, batch: Batch, criterion: str, layer: int | EarlyExit | None
) -> Tensor:
    """Scores [P] as one would write them first, the whole model run: from hidden state j, or at full depth.

    Of an early exit in place of j nothing more than its layers is run, and the head everywhere.
    """
    body: Any = model
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    was = model.training
    with torch.no_grad():
        if isinstance(layer, EarlyExit):
            return score(layer.logits(batch), batch["labels"], shape, criterion)
        model.eval()
        if layer is None:
            logits = body(**inputs).logits
        else:
            hidden = hidden_of(model, shape.family, inputs, layer)
            logits = body.cls(hidden) if shape.family == "bert" else body.lm_head(hidden)
        model.train(was)
        return score(logits, batch["labels"], shape, criterion)


def score(logits: Tensor, labels: Tensor, shape: Shape, criterion: str) -> Tensor:
    if shape.is_causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labelled = labels != IGNORED
    if criterion == "entropy":
        values = torch.distributions.Categorical(logits=logits.float()).entropy()
    else:
        values = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, reduction="none"
        )
    return (values * labelled).sum(1) / labelled.sum(1)


def check_equal(
    model: nn.Module,
    shape: Shape,
    batch: Batch,
    layers: Iterable[int],
    criterion: str,
    dtype: torch.dtype,
) -> None:
    """The ways must agree before it means anything which is faster."""
    device = next(model.parameters()).device
    on_device = {name: value.to(device) for name, value in batch.items()}
    limit = 1e-3 if dtype == torch.float32 else 0.05
    for layer in layers:
        with autocast(device, dtype):
            ours = Sifter(model, exit_layer=layer, criterion=criterion).score(batch)
            full = [None] if layer == shape.layers else []
            for other in [EarlyExit(model, layer), layer, *full]:
                theirs = naive(model, shape, on_device, criterion, other)
                assert torch.allclose(ours, theirs, atol=limit), (layer, other, ours, theirs)


# ---- measuring


@dataclass
class Row:
    """One way at one exit layer: shares of a plain step, one a round."""

    way: str
    layer: int
    floor: float
    alone: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    peak: float | None = None  # bytes over the plain loop's
    peak_share: float | None = None  # of the plain loop's
    syncs: float | None = None  # of a step
    failed: str = ""


class Bench:
    """A model, its optimizer and its batches, and the clock."""

    def __init__(self, shape: Shape, options: argparse.Namespace) -> None:
        self.shape, self.options = shape, options
        self.device = torch.device(options.device)
        self.rows = options.batch_size or shape.batch_size
        self.dtype = getattr(torch, options.dtype)
        self.model = build(shape, options.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        on_gpu = self.device.type == "cuda"
        self.batches = [make_batch(shape, self.rows, on_gpu) for _ in range(BATCHES)]
        pool = round(self.rows / options.keep)
        self.candidates = make_batch(shape, pool, on_gpu)

    def step(self, batch: Batch) -> None:
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        with autocast(self.device, self.dtype):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def endless(self) -> list[Batch]:
        """As many batches as the longest window draws, and some to look ahead; the same few in turn."""
        draws = round(1 / self.options.keep) * (WARM_COMPILED + self.options.steps + 2)
        return [self.batches[number % BATCHES] for number in range(draws)]

    def loader(self, way: Way) -> Iterable[Batch]:
        precision = None if self.dtype == torch.float32 else self.dtype
        given = {"keep": self.options.keep, "criterion": self.options.criterion, **way.options}
        return SiftingDataLoader.wrap(
            self.endless(),
            model=self.model,
            exit_layer=way.layer,
            warmup_steps=0,
            autocast=precision,
            **given,
        )

    def sifter(self, way: Way) -> Callable[[], object]:
        """What scores the candidates, from the host on."""
        precision = None if self.dtype == torch.float32 else self.dtype
        known = inspect.signature(Sifter.__init__).parameters
        given = {"keep": self.options.keep, "criterion": self.options.criterion, **way.options}
        given = {name: value for name, value in given.items() if name in known}
        sifter = Sifter(self.model, exit_layer=way.layer, autocast=precision, **given)
        return lambda: sifter.score(self.candidates)

    def rival(self, layer: int | EarlyExit | None) -> Callable[[], object]:
        def task() -> None:
            moved = {name: value.to(self.device) for name, value in self.candidates.items()}
            with autocast(self.device, self.dtype):
                naive(self.model, self.shape, moved, self.options.criterion, layer)

        return task

    def seconds(self, task: Callable[[], object]) -> float:
        """Of one call, in a run of as many as a window has steps."""
        self.wait()
        since = time.perf_counter()
        for _ in range(self.options.steps):
            task()
        self.wait()
        return (time.perf_counter() - since) / self.options.steps

    def window(self, batches: Iterable[Batch], warm: int = WARM) -> float:
        """Seconds of a step in a run of steps that nothing waits for but its end."""
        since = 0.0
        for number, batch in enumerate(batches, start=1):
            self.step(batch)
            if number == warm:
                self.wait()
                since = time.perf_counter()
            if number == warm + self.options.steps:
                break
        self.wait()
        return (time.perf_counter() - since) / self.options.steps

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def at_rest(self) -> float:
        """Bytes of the GPU that are in use between two loops."""
        if self.device.type != "cuda":
            return 0.0
        gc.collect()
        self.wait()
        return float(torch.cuda.memory_allocated())

    def first_window(
        self, batches: Iterable[Batch], warm: int = WARM_FIRST
    ) -> tuple[float, float] | None:
        """Bytes at the peak of a loop that is under way, and how often the host waits in a step; of a GPU."""
        drawn = iter(batches)
        for _ in range(warm):
            self.step(next(drawn))
        if self.device.type != "cuda":
            return None  # a process holds on to memory, and what it holds tells little of what a loop needs
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(self.options.steps):
                    self.step(next(drawn))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = sum("called a synchronizing" in str(each.message) for each in told)
        return float(torch.cuda.max_memory_allocated()), waits / self.options.steps


def measure(name: str, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """All ways and rivals of one shape, in turn, until its share of the minutes is used up."""
    torch.manual_seed(0)
    begun = time.monotonic()
    bench = Bench(shape, options)
    shape = replace(shape, batch_size=bench.rows)
    layers = exit_layers(shape.layers, options)
    plain_batches = bench.endless()
    check_equal(bench.model, shape, bench.candidates, layers, options.criterion, bench.dtype)
    bench.window(plain_batches)  # the optimizer's state is there from here on
    rest = bench.at_rest()
    of_plain = bench.first_window(plain_batches)

    rows: list[Row] = []
    loops: list[tuple[Row, Iterable[Batch]]] = []
    alone: list[tuple[Row, Callable[[], object]]] = []
    for way in ways(shape, shape.layers, options):
        if not way.name.startswith(tuple(options.only)):
            continue
        below = floor(shape, way.layer, options.keep, way.options.get("positions"))
        row = Row(way.name, way.layer, below if way.scores else 0.0)
        rows.append(row)
        with telling(row):
            before = bench.at_rest() - rest  # what other loaders keep
            loader = bench.loader(way)
            warm = WARM_COMPILED if "compile" in way.options else WARM_FIRST
            of_loop = bench.first_window(loader, warm)
            if of_loop is not None and of_plain is not None:
                row.peak, row.syncs = of_loop[0] - before - of_plain[0], of_loop[1]
                row.peak_share = row.peak / of_plain[0]
            loops.append((row, loader))
            if way.scores and not {"overlap", "scorer_device"} & {*way.options}:
                alone.append((row, bench.sifter(way)))
                for _ in range(warm):
                    alone[-1][1]()
    rivals: list[tuple[str, int, int | EarlyExit | None]] = []
    for layer in layers:
        rivals.append(("j layers, head everywhere", layer, EarlyExit(bench.model, layer)))
        rivals.append(("naive", layer, layer))
    rivals.append(("full depth", shape.layers, None))
    for said, layer, how in rivals:
        if said.startswith(tuple(options.only)):
            row = Row(said, layer, floor(shape, layer, options.keep))
            rows.append(row)
            alone.append((row, bench.rival(how)))
            with telling(row):
                alone[-1][1]()
    plain: list[float] = []
    while len(plain) < LEAST_ROUNDS or (
        len(plain) < options.rounds
        and time.monotonic() - begun < 60 * options.minutes / len(options.shape)
    ):
        beside = []  # a plain step beside every loop, so that what disturbs one disturbs the other
        for row, loader in [each for each in loops if not each[0].failed]:
            beside.append(bench.window(plain_batches))
            with telling(row):
                row.cost.append(bench.window(loader) / beside[-1] - 1)
        plain.append(median(beside or [bench.window(plain_batches)]))
        for row, task in [each for each in alone if not each[0].failed]:
            with telling(row):
                row.alone.append(bench.seconds(task) / plain[-1])
    return {
        "name": name,
        "shape": asdict(shape),
        "keep": options.keep,
        "criterion": options.criterion,
        "dtype": options.dtype,
        "plain": plain,
        "of_plain": of_plain,  # bytes at the peak, and waits in a step
        "sparse_floor": floor(shape, 1, options.keep, sparse=True),
        "rows": [asdict(row) for row in rows],
    }


@contextmanager
def telling(row: Row) -> Iterator[None]:
    """What one way fails of is told in its row; the others go on."""
    try:
        yield
    except Exception as error:
        row.failed = f"{type(error).__name__}: {error}".splitlines()[0][:300]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---- telling


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.draw:
        draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png"))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": header(torch.device(options.device)), "shapes": []}
    text = found["machine"] + "\n"
    print(text, flush=True)
    for name in options.shape:
        shape = (SHAPES if options.size == "full" else SMALL)[name]
        found["shapes"].append(measure(name, shape, options))
        told_of = table(found["shapes"][-1])
        print(told_of, flush=True)
        text += "\n" + told_of
        # After every shape: what was measured stays, whatever befalls the next one.
        (options.out / "bench_scoring.json").write_text(json.dumps(found, indent=1))
        (options.out / "bench_scoring.txt").write_text(text)
        if options.device.startswith("cuda"):
            gc.collect()
            torch.cuda.empty_cache()
    draw(found, options.out / "bench_scoring.png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    add("--shape", nargs="+", choices=SHAPES, default=[*SHAPES], help="(all three)")
    add("--size", choices=["full", "small"], help="of the shapes (full on a GPU, else small)")
    add("--batch-size", type=int, help="b, rows trained on (the shape's)")
    add("--keep", type=float, default=0.5, help="P = b / keep candidates (0.5)")
    add("--exit-layers", nargs="+", default=[*"1236N"], metavar="J", help="(1 2 3 6 N)")
    add("--only", nargs="+", metavar="ROW", default=[""], help="rows whose names begin so (all)")
    add("--criterion", choices=["loss", "entropy"], default="loss")
    add("--dtype", choices=["float32", "bfloat16"], help="of autocast (bfloat16 on a GPU)")
    add("--minutes", type=float, default=5.0, help="for all shapes, roughly (5)")
    add("--rounds", type=int, default=30, help="at most; at least three (30)")
    add("--steps", type=int, help="of a round, one after the other (5 on a GPU, else 1)")
    add("--compile", action=argparse.BooleanOptionalAction, help="measure compile= (on a GPU)")
    add("--scorer-device", help='measure scorer_device= ("cuda:1" where there is one)')
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--out", type=Path, default=Path("runs/bench_scoring"), help="(runs/bench_scoring)")
    add("--draw", type=Path, metavar="JSON", help="only draw what was measured")
    options = parser.parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    options.size = options.size or ("full" if on_gpu else "small")
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.steps = options.steps or (5 if on_gpu else 1)
    options.compile = on_gpu if options.compile is None else options.compile
    if options.scorer_device is None:
        options.scorer_device = "cpu" if not on_gpu else ""
        if torch.cuda.device_count() > 1:
            options.scorer_device = "cuda:1"
    return options


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


def table(found: dict[str, Any]) -> str:
    """What was measured of a shape, for people."""
    shape, plain = Shape(**found["shape"]), found["plain"]
    rate = shape.step_flops(shape.batch_size) / median(plain)
    pool = round(shape.batch_size / found["keep"])
    peak, syncs = found["of_plain"] or (0.0, 0.0)
    of_gpu = f"peak {peak / 2**20:,.0f} MiB, {syncs:g} syncs, " if found["of_plain"] else ""
    lines = [
        f"{found['name']}: {shape.about()}, batch {shape.batch_size} of {pool}, {found['criterion']}, "
        f"{found['dtype']}",
        f"plain step {1000 * median(plain):.1f} ms ({1000 * min(plain):.1f} to {1000 * max(plain):.1f}) = "
        f"{rate / 1e12:.3g} TFLOP/s, {of_gpu}{len(plain)} rounds",
    ]
    if not shape.is_causal:
        lines.append(
            f"floor at j = 1 of a loop whose head runs at the labelled positions only: "
            f"{found['sparse_floor']:.1%}"
        )
    lines += [
        "",
        f"{'j':>3} {'':<27}{'floor':>6}  {'scoring alone':>24}{'x floor':>8}"
        f"{'cost of a sifted step':>27}{'x floor':>8}{'peak':>8}{'syncs':>6}",
    ]
    for row in (Row(**each) for each in found["rows"]):
        line = f"{row.layer:>3} {row.way:<27}{row.floor or float('nan'):>6.1%}"
        if row.failed:
            lines.append(f"{line}  {row.failed}")
            continue
        line += f"  {told(row.alone):>24}{times(row.alone, row.floor):>8}"
        line += f"{told(row.cost):>27}{times(row.cost, row.floor):>8}"
        line += f"{'-' if row.peak_share is None else f'{row.peak_share:+.1%}':>8}"
        lines.append(line + f"{'-' if row.syncs is None else f'{row.syncs:g}':>6}")
    return "\n".join(lines).replace("nan%", "   -") + "\n"


def told(values: list[float]) -> str:
    """Median, least and most, in percent."""
    if not values:
        return "-"
    return f"{median(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def times(values: list[float], below: float) -> str:
    return f"{median(values) / below:.2f}" if values and below else "-"


def draw(found: dict[str, Any], file: Path) -> None:
    """Cost against j, a panel per shape."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(
            f"matplotlib is not installed: --draw {file.with_suffix('.json')} draws it elsewhere"
        )
        return
    shapes = [(each, [Row(**row) for row in each["rows"]]) for each in found["shapes"]]
    figure = Figure(figsize=(max(8.4, 1.0 + 4.6 * len(shapes)), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    switched = [row.way for _, rows in shapes for row in rows if is_switched(row)]
    marks = dict(zip(dict.fromkeys(switched), MARKS, strict=False))
    grid = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    for axes, (shape, rows) in zip(grid, shapes, strict=True):
        size = Shape(**shape["shape"])
        name = f"{shape['name']}: {size.layers} x {size.hidden}, {size.tokens:,} tokens"
        panel(axes, name, rows, marks)
    grid[0].set_ylabel("share of a plain step")
    handles = {}
    for axes in grid:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        [*handles.values()],
        [*handles],
        loc="outside lower center",
        ncols=4 if len(shapes) > 1 else 2,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(found["machine"], x=0.01, ha="left", fontsize=8, color="#666666")
    figure.savefig(file, dpi=150, format="png")
    print(f"{file}: the same as a picture")


LINES = (
    ("naive", "alone", "#b5543c", "naive: whole model, head on all of hidden state j"),
    ("j layers, head everywhere", "alone", "#c98b2b", "j layers, head everywhere"),
    ("ours", "alone", "#7fb0e6", "ours, scoring alone"),
    ("ours", "cost", "#1f4e8c", "ours, the whole sifted step"),
)
MARKS = "sDv^<>phX*P8"


def is_switched(row: Row) -> bool:
    """Whether it scores with an option switched."""
    return bool(row.cost and row.floor) and row.way != "ours"


def panel(axes: Any, name: str, rows: list[Row], marks: dict[str, str]) -> None:
    """One shape; bars are the least and the most of all rounds."""
    ours = [row for row in rows if row.way == "ours"]
    below = [100 * row.floor for row in ours]
    lowest = 0.3 * min(row.floor for row in rows if row.floor)  # what is less stands at the edge
    places = {row.layer: place for place, row in enumerate(ours)}
    for way, what, color, label in LINES:
        chosen = [row for row in rows if row.way == way and getattr(row, what)]
        values = [[100 * max(lowest, each) for each in getattr(row, what)] for row in chosen]
        at = [places[row.layer] for row in chosen]
        middle = [median(each) for each in values]
        axes.plot(at, middle, "o-", color=color, label=label, linewidth=1.8, markersize=4)
        axes.vlines(
            at, [*map(min, values)], [*map(max, values)], color=color, linewidth=1, alpha=0.5
        )
    for row in rows:
        if row.way == "full depth" and row.alone:
            level = 100 * median(row.alone)
            axes.axhline(
                level, color="#888888", linestyle=":", label="full depth, head everywhere"
            )
    every = [*places.values()]
    axes.plot(every, below, "k--", label="floor: FLOPs", linewidth=1.2)
    limit = [1.15 * each for each in below]
    shade = {"color": "k", "alpha": 0.15, "linewidth": 0}
    axes.fill_between(every, below, limit, label="up to 1.15 x the floor", **shade)
    for number, row in enumerate(filter(is_switched, rows)):
        if row.way in marks:
            at = [places[row.layer] - 0.1 - 0.03 * number]  # side by side
            level = [100 * max(lowest, median(row.cost))]
            axes.plot(at, level, marks[row.way], color="#555555", markersize=5, label=row.way)
    axes.set_yscale("log")
    axes.set_xticks(every, [str(layer) for layer in places])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.yaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else ""
    )
    axes.set_xlabel("exit layer j")
    axes.set_title(name, loc="left", fontweight="bold")
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
