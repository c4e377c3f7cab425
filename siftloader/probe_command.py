"""``siftloader probe``: will sifting help this model on these shards, and at which layer?

Imported by the command line, which prepares text where there is no torch: what needs it is imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from siftloader.errors import SiftError
from siftloader.inspection import check_plot, on_a_line, shown


if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from siftloader.forks import Trial
    from siftloader.probes import Probe
    from siftloader.stream import TokenShards


HELD_OUT = 512  # samples that a trial measures on, at most: every arm is measured whole, and they are many
HEADS = {
    "mlm": "AutoModelForMaskedLM",
    "mlm-nsp": "AutoModelForPreTraining",
    "clm": "AutoModelForCausalLM",
}
CRITERIA = [
    *("loss", "entropy", "margin", "least-confidence", "grad-norm"),
    *("residual", "rarity", "random"),
]


def add_probe(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """Add the command, for ``probed`` to run."""
    parser = commands.add_parser(
        "probe",
        help="say whether sifting may help a model, and at which layer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Score a few pools of candidates at every exit layer of a model and by the whole model, time that\n"
            "beside a training step, and say which layer and criterion to try, if any. Nothing is trained.\n\n"
            "Two things must hold for sifting to pay: an exit must rank candidates as the whole model does\n"
            "(overlap, p_j, sigma), and what it keeps must be worth what choosing costs (rho against cost).\n"
            "If either fails, do not sift. If both hold it may still not pay: high losses may be noise. So add\n"
            "--trial 200: a copy of the model is trained both ways for as long as 200 plain steps take, five\n"
            "times, and held-out loss is compared. That is evidence, the rest is arithmetic."
        ),
        epilog=(
            "example: siftloader probe --model bert-base-uncased --shards shards/wikibooks --out probe.png\n"
            "example: siftloader probe --model runs/checkpoint-5000 --shards shards/wikibooks --layers 1 2 6 \\\n"
            "             --trial 200 --lr 1e-4\n"
            "example: siftloader probe --model train.py:build_model --shards shards/code --criteria loss margin\n\n"
            "Probe a model that has been trained for a while: of a new one all losses are alike, and so are\n"
            "its layers. Exit status: 0 done, whatever it says; 1 model or data are not as they should be,\n"
            "2 the command is not, 130 interrupted."
        ),
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a folder or hub name of Hugging Face (with a config.json only: untrained), or FILE.py:FUNCTION, "
        "a function without arguments that returns the model",
    )
    parser.add_argument(
        "--shards", required=True, metavar="FOLDER", help="its data: a finished folder of shards"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=_layer,
        metavar="J",
        help="exit layers: numbers, path.to.stack:J, or full (default: all, a dozen of a deeper model)",
    )
    parser.add_argument(
        "--criteria",
        nargs="+",
        choices=CRITERIA,
        default=["loss", "entropy"],
        metavar="NAME",
        help=f"of {', '.join(CRITERIA)} (default: loss entropy, which share a pass)",
    )
    parser.add_argument(
        "--pools",
        type=int,
        default=8,
        metavar="N",
        help="more of them make narrower intervals (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="B",
        help="rows of a training step (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of a pool, which so has B / SHARE rows (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order of the data (default: %(default)s)"
    )
    parser.add_argument("--device", help="such as cuda:1 or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--bf16", action="store_true", help="under autocast to bfloat16, as in training"
    )
    parser.add_argument("--out", metavar="PNG", help="also draw the figures")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--trial",
        type=int,
        metavar="STEPS",
        help="also train copies plainly for so many steps, and sifted for as long; needs a val split",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="of the trial, on other samples each (default: %(default)s)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=1e-4,
        help="of the trial's AdamW, which is a new one; it falls to zero (default: %(default)s)",
    )
    return parser


def _layer(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def probed(arguments: argparse.Namespace) -> str:
    """Probe, and try; what was found, to be printed."""
    if arguments.out:
        check_plot(arguments.out)
        if importlib.util.find_spec("matplotlib") is None:  # not after a trial of an hour
            raise SiftError("--out needs `matplotlib`; pip install 'siftloader[log]'")
    _check_trial(arguments)
    import torch

    from siftloader.probe_figure import draw
    from siftloader.probes import probe
    from siftloader.sifter import Sifter
    from siftloader.stream import TokenShards

    shards = TokenShards(arguments.shards, seed=arguments.seed)
    held_out = _held_out(arguments) if arguments.trial is not None else None
    device = _device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, notes = _model(arguments.model, shards, arguments.seed)
    notes += _mismatch(model, shards.objective)
    _check_length(model, shards)
    shards.check_model(model)
    model = model.to(device).train()
    like = None
    if arguments.bf16:
        like = Sifter(model, exit_layer="full", autocast=torch.bfloat16)
    found = probe(
        model,
        shards,
        batch_size=arguments.batch_size,
        keep=arguments.keep,
        pools=arguments.pools,
        exit_layers=arguments.layers,
        criteria=arguments.criteria,
        like=like,
    )
    tried = None if held_out is None else _tried(model, shards, held_out, found, arguments)
    if arguments.out:
        draw(found, arguments.out, tried)
    advice = found.advice(tried)
    if arguments.json:
        told = {"trial": None if tried is None else tried.as_dict(), "notes": notes}
        return json.dumps({**found.as_dict(), "advice": advice, **told})
    width = min(112, shutil.get_terminal_size((100, 24)).columns)
    parts = [fill(shown(each), width, break_on_hyphens=False) for each in notes] + [found.table()]
    parts += [] if tried is None else [str(tried)]
    parts += [fill(advice, width, break_on_hyphens=False)] + (
        [shown(f"wrote {arguments.out}")] if arguments.out else []
    )
    return "\n\n".join(parts)


def _check_trial(arguments: argparse.Namespace) -> None:
    # Not after a probe that may take long.
    if arguments.trial is None:
        return
    if arguments.trial < 1:
        raise ValueError(f"--trial needs at least 1 step, got {arguments.trial}")
    if arguments.repeats < 2:
        raise ValueError(
            f"--repeats must be at least 2, got {arguments.repeats}: an interval needs them"
        )
    if not 0 < arguments.lr < math.inf:
        raise ValueError(f"--lr must be above 0, got {arguments.lr}")


def _device(name: str) -> torch.device:
    import torch

    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: there is no {name!r} here ({_first_line(error)})") from error


# ---- the model


def _model(name: str, shards: TokenShards, seed: int) -> tuple[nn.Module, list[str]]:
    """The model of that name, and what its user should know of it."""
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _built(Path(file), function), []
    if name.endswith(".py"):
        raise ValueError(f"--model: {name} names no function; give {name}:FUNCTION")
    return _of_hugging_face(name, shards.objective, seed)


def _built(file: Path, function: str) -> nn.Module:
    from torch import nn

    if not file.is_file():
        raise SiftError(f"--model: there is no file {file}; give FILE.py:FUNCTION")
    # By a name of its own: a file may be called as a package is. Dataclasses and others look their module up by it.
    name = f"_probed_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _imports_beside(file):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise SiftError(f"--model: {file} cannot be imported: {_raised(error)}") from error
        build = getattr(module, function, None)
        if not callable(build):
            raise ValueError(f"--model: {file} has no function {function!r}")
        try:
            model = build()
        except Exception as error:
            raise SiftError(f"--model: {function} of {file} raised {_raised(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"--model: {function} of {file} returns {type(model).__name__}, need a torch.nn.Module"
        )
    return model


def _raised(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_first_line(error)} ({where.filename}, line {where.lineno})"


@contextmanager
def _imports_beside(file: Path) -> Iterator[None]:
    # As `python FILE.py` finds what lies in its folder.
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _of_hugging_face(name: str, objective: str, seed: int) -> tuple[nn.Module, list[str]]:
    import torch

    try:
        import transformers
    except ImportError as error:
        raise SiftError(
            "--model: a name of Hugging Face needs `transformers`; pip install 'siftloader[frameworks]', or give "
            "FILE.py:FUNCTION"
        ) from error
    head = getattr(transformers, HEADS[objective])
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if Path(name).is_dir() and not _has_weights(Path(name)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = head.from_config(config)
            return model, [
                f"UNTRAINED: {name} holds a config.json and no weights, so this model is a new one. All it finds hard "
                f"is chance: probe it again once it has been trained for a while."
            ]
        model, loading = head.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise SiftError(
            f"--model: no model for shards of objective {objective} at {name!r} ({_first_line(error)}); give a folder "
            f"with a config.json, a name on the Hugging Face hub, or FILE.py:FUNCTION"
        ) from error
    missing = sorted(loading["missing_keys"])
    if not missing:
        return model, []
    return model, [
        f"PARTLY UNTRAINED: {name} has no weights for {len(missing)} tensors of {type(model).__name__} ({missing[0]}, "
        f"say), which are random: is it a model for shards of objective {objective}?"
    ]


def _has_weights(folder: Path) -> bool:
    names = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
    return any(True for pattern in names for _ in folder.glob(pattern))


def _first_line(error: Exception) -> str:
    return on_a_line((str(error) or repr(error)).strip().split("\n")[0])


def _mismatch(model: nn.Module, objective: str) -> list[str]:
    from siftloader.labels import is_causal

    causal = is_causal(model)
    if causal is None or causal == (objective == "clm"):
        return []
    return [
        f"ANOTHER OBJECTIVE: {type(model).__name__} predicts {'the next token' if causal else 'masked tokens'}, and "
        f"the shards were made for objective {objective}, so the losses below mean little."
    ]


def _check_length(model: nn.Module, shards: TokenShards) -> None:
    config = getattr(model, "config", None)
    room = getattr(
        config, "max_position_embeddings", None
    )  # of GPT-2, n_positions by another name
    if isinstance(room, int) and 0 < room < shards.layout.seq_len:
        raise ValueError(
            f"the shards have samples of {shards.layout.seq_len} tokens, the model takes {room}; prepare the text "
            f"again with --seq-len {room}"
        )


# ---- the trial


def _held_out(arguments: argparse.Namespace) -> list[dict[str, Tensor]]:
    from siftloader.stream import TokenShards

    if "val" not in TokenShards(arguments.shards).shard_set.splits:
        raise ValueError(
            f"--trial compares held-out loss, and {arguments.shards} has no val split; prepare the text again with "
            f"--val-fraction 0.005, or leave out --trial"
        )
    shards = TokenShards(arguments.shards, split="val")
    size = min(32, HELD_OUT)
    return list(islice(shards.read_batches(size, 0), HELD_OUT // size))


class _Pools:
    """Pools of ``size`` rows: an epoch at every iteration, and each time the next one."""

    def __init__(self, shards: TokenShards, size: int) -> None:
        self._shards, self._size, self._epoch = shards, size, -1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._epoch += 1
        return self._shards.read_batches(self._size, self._epoch)


def _tried(
    model: nn.Module,
    shards: TokenShards,
    held_out: list[dict[str, Tensor]],
    found: Probe,
    arguments: argparse.Namespace,
) -> Trial:
    import torch

    from siftloader.forks import trial
    from siftloader.scores import criterion_named

    choice = found.candidate
    return trial(
        model,
        torch.optim.AdamW(model.parameters(), arguments.lr),
        _Pools(shards, found.candidates),
        held_out,
        steps=arguments.trial,
        repeats=arguments.repeats,
        exit_layer=choice.layer,
        criterion=criterion_named(choice.criterion, lambda: shards.unigrams),
        keep=arguments.keep,
        autocast=torch.bfloat16 if arguments.bf16 else None,
        seed=arguments.seed,
    )
