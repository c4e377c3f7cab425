"""`siftloader probe` finds model and data, says what it found, and what was wrong in one line."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from siftloader import Margin, TokenShards, Trial, forks
from siftloader.cli import main
from siftloader.probe_command import HEADS
from siftloader.shards import Layout, Source, Tokenizer, write_dataset, write_shard


T, V = 16, 90
SPECIAL = {"pad": 0, "cls": 2, "sep": 3, "mask": 4, "eos": 3}
BUILDS = """
from __future__ import annotations
from dataclasses import dataclass

import torch
from parts import WIDTH


@dataclass(frozen=True)
class Size:  # looks its module up by name
    vocabulary: int = 90


class Net(torch.nn.Module):
    def __init__(self, vocabulary=Size().vocabulary):
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, WIDTH)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = torch.nn.Linear(WIDTH, vocabulary)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        logits = self.head(x)
        if labels is None:
            return logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Out(loss=loss, logits=logits)


class Out(dict):
    __getattr__ = dict.__getitem__


def build():
    torch.manual_seed(0)
    return Net()


def small():
    return Net(vocabulary=80)


def nothing():
    return None


def broken():
    raise ValueError("weights are elsewhere")


def asking(size):
    return Net(size)
"""


def letters(folder: Path, objective: str = "mlm", splits: dict[str, int] | None = None) -> Path:
    rng, layout = np.random.default_rng(0), Layout.for_vocabulary(T, V)
    folder.mkdir()
    written = [
        write_shard(
            folder, f"{split}-000000", rng.integers(5, V, (n, T)), np.zeros(n, np.uint8), layout
        )
        for split, n in (splits or {"train": 300, "val": 16}).items()
    ]
    write_dataset(
        folder,
        written,
        layout=layout,
        objective=objective,
        tokenizer=Tokenizer("letters", "0" * 64, V, SPECIAL),
        sources=[Source("letters", "0" * 64, 1)],
        unigrams=np.bincount(rng.integers(5, V, 9000), minlength=V),
        seed=0,
    )
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return letters(tmp_path / "shards")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "parts.py").write_text("WIDTH = 8\n")
    (tmp_path / "net.py").write_text(BUILDS)
    return f"{tmp_path / 'net.py'}:build"


def config(**changed: int) -> transformers.BertConfig:
    sizes = {
        "vocab_size": V,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    return transformers.BertConfig(**{**sizes, **changed})


def few(*more: object) -> list[str]:
    return ["--batch-size", "8", "--pools", "3", *map(str, more)]


def test_a_model_of_a_file_gets_a_table_advice_and_a_picture(model, shards, tmp_path, capsys):
    picture = tmp_path / "probe.png"
    asked = ["probe", "--model", model, "--shards", str(shards), *few("--out", picture)]
    assert main(asked) == 0
    printed, complaints = capsys.readouterr()
    assert complaints == ""
    assert printed.startswith(
        "Net of 3 layers: 3 pools of 16 candidates, 8 kept; a plain step takes"
    )
    rows = [line.split()[:2] for line in printed.splitlines() if line[:4].strip().isdigit()]
    assert rows == [[str(layer), name] for layer in (1, 2, 3) for name in ("loss", "entropy")]
    assert "sift" in printed and printed.endswith(f"wrote {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_layers_criteria_and_share_are_those_that_were_asked_for_also_as_json(
    model, shards, capsys
):
    asked = ["probe", "--model", model, "--shards", str(shards), "--keep", "0.25", "--json"]
    asked += [*few("--layers", 1, "layers:2", "full"), "--criteria", "residual", "margin"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"] == 32 and found["trial"] is None and found["notes"] == []
    assert [each["layer"] for each in found["choices"][::2]] == [1, "layers:2", 3]
    assert {each["criterion"] for each in found["choices"]} == {"residual", "margin"}
    assert found["verdict"] in ("worth a trial", "do not sift") and found["advice"]


def test_a_folder_without_weights_is_an_untrained_model_and_said_so_first(
    shards, tmp_path, capsys
):
    folder = tmp_path / "bert"
    config().save_pretrained(folder)
    here = torch.get_rng_state()
    asked = ["probe", "--model", str(folder), "--shards", str(shards), *few()]
    assert main(asked) == 0
    assert torch.equal(torch.get_rng_state(), here)
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.startswith(f"UNTRAINED: {folder} holds a config.json and no weights")


def test_a_saved_model_is_loaded_and_what_it_lacks_is_named(tmp_path, shards, capsys):
    saved, trunk = tmp_path / "saved", tmp_path / "trunk"
    transformers.BertForMaskedLM(config()).save_pretrained(saved)
    transformers.BertModel(config()).save_pretrained(trunk)
    assert main(["probe", "--model", str(saved), "--shards", str(shards), *few()]) == 0
    assert capsys.readouterr().out.startswith("BertForMaskedLM of 2 layers")
    assert main(["probe", "--model", str(trunk), "--shards", str(shards), *few("--json")]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert len(notes) == 1 and notes[0].startswith(f"PARTLY UNTRAINED: {trunk} has no weights for")


@pytest.mark.parametrize(
    ("objective", "kind"), [("clm", "GPT2LMHeadModel"), ("mlm-nsp", "BertForPreTraining")]
)
def test_the_objective_of_the_shards_decides_which_head(objective, kind):
    head = getattr(transformers, HEADS[objective])
    small = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=V, n_positions=T)
    assert type(head.from_config(small if objective == "clm" else config())).__name__ == kind


def test_a_trial_is_printed_and_its_finding_is_the_advice(model, shards, capsys):
    asked = ["probe", "--model", model, "--shards", str(shards)]
    asked += few("--layers", 1, "--trial", 2, "--repeats", 2, "--lr", "1e-2", "--bf16")
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "trial: 2 plain steps against" in printed and "repeat 2" in printed
    assert (
        printed.split("\n\n")[-1]
        .replace("\n", " ")
        .startswith(("Sift,", "Do not sift", "Nothing can"))
    )
    assert "try again later" in printed.replace("\n", " ")


def test_a_trial_tries_what_was_found_as_it_was_asked_for(model, shards, capsys, monkeypatch):
    held = []

    def tried(forked, optimizer, pools, held_out, **options):
        held.append((optimizer, list(pools), held_out, options))
        return Trial(4, 4, 1.0, None, 5.0, (4.0, 4.0), (4.0, 4.1))

    monkeypatch.setattr(forks, "trial", tried)
    asked = ["probe", "--model", model, "--shards", str(shards), "--json", "--trial", "4"]
    more = ("--layers", 2, "--criteria", "margin", "--keep", "0.25", "--lr", "0.5", "--seed", "3")
    assert main([*asked, *few("--repeats", 2, *more, "--bf16")]) == 0
    (optimizer, pools, held_out, options) = held[0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert {len(each["input_ids"]) for each in pools[:-1]} == {32}
    expected = list(TokenShards(shards, seed=3).read_batches(32, 0))
    assert torch.equal(pools[0]["input_ids"], expected[0]["input_ids"])
    (val,) = TokenShards(shards, split="val").read_batches(32, 0)
    assert len(held_out) == 1 and torch.equal(held_out[0]["labels"], val["labels"])
    assert isinstance(options.pop("criterion"), Margin)
    assert options == {
        "steps": 4,
        "repeats": 2,
        "exit_layer": 2,
        "keep": 0.25,
        "seed": 3,
        "autocast": torch.bfloat16,
    }
    assert json.loads(capsys.readouterr().out)["trial"]["sifted"] == [4.0, 4.1]


def test_a_trial_draws_on_where_the_data_end_and_says_so(model, tmp_path, capsys):
    shards = letters(tmp_path / "short", splits={"train": 60, "val": 8})
    asked = ["probe", "--model", model, "--shards", str(shards), "--json", "--trial", "4"]
    with pytest.warns(UserWarning, match="the pools ended after 3 of 8 and begin anew"):
        assert main([*asked, *few("--layers", 1, "--repeats", 2)]) == 0
    tried = json.loads(capsys.readouterr().out)["trial"]
    assert tried["steps"] == 4 and len(tried["gains"]) == 2


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        (
            {"--model": "nowhere/at-all"},
            1,
            "--model: no model for shards of objective mlm at 'nowhere",
        ),
        ({"--model": "{tmp}/gone.py:build"}, 1, "--model: there is no file"),
        ({"--model": "{tmp}/net.py:bild"}, 2, "has no function 'bild'"),
        ({"--model": "{tmp}/net.py:nothing"}, 2, "nothing of .* returns NoneType, need a torch"),
        (
            {"--model": "{tmp}/net.py:broken"},
            1,
            r"broken of .*net.py raised ValueError: weights are elsewhere \(.*net.py, line 53\)",
        ),
        ({"--model": "{tmp}/net.py:asking"}, 1, "asking of .*net.py raised TypeError: .*'size'"),
        ({"--model": "{tmp}/parts.txt:build"}, 1, "no model for shards"),
        ({"--model": "{tmp}/net.py"}, 2, r"net.py names no function; give .*net.py:FUNCTION"),
        ({"--model": "{tmp}/torn.py:build"}, 1, r"torn.py cannot be imported: ZeroDivisionError"),
        ({"--device": "abacus"}, 2, "--device: .*abacus"),
        ({"--device": "cuda:99"}, 2, "--device: .*cuda:99"),
        ({"--trial": "0"}, 2, "--trial needs at least 1 step, got 0"),
        ({"--trial": "4", "--repeats": "1"}, 2, "--repeats must be at least 2, got 1"),
        ({"--trial": "4", "--lr": "-1"}, 2, "--lr must be above 0, got -1"),
        ({"--trial": "4", "--lr": "nan"}, 2, "--lr must be above 0, got nan"),
        ({"--model": "{tmp}/net.py:small"}, 2, "has 90 token ids, but the model embeds only 80"),
        (
            {"--model": "{tmp}/short"},
            2,
            "samples of 16 tokens, the model takes 8; prepare the text",
        ),
        ({"--model": "{tmp}/gpt"}, 1, "no model for shards of objective mlm"),
        ({"--shards": "{tmp}/gone"}, 1, "gone"),
        (
            {"--shards": "{tmp}/whole", "--trial": "2"},
            2,
            "has no val split; prepare the text again",
        ),
        ({"--pools": "40"}, 2, "too few samples: they fill 18 pools of 16 rows, 40 are wanted"),
        ({"--layers": "7"}, 1, "exit_layer must be in 1..3"),
        ({"--keep": "0.7"}, 2, "batch_size / keep must be whole"),
        ({"--out": "{tmp}/probe.svg"}, 2, "a plot is a PNG"),
        ({"--out": "{tmp}/gone/probe.png"}, 1, "no folder"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(given, status, message, model, shards, tmp_path, capsys):
    config(max_position_embeddings=8).save_pretrained(tmp_path / "short")
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=V).save_pretrained(
        tmp_path / "gpt"
    )
    letters(tmp_path / "whole", splits={"train": 60})
    (tmp_path / "torn.py").write_text("1 / 0\n")
    options = {"--model": model, "--shards": str(shards), "--batch-size": "8", "--pools": "3"}
    options |= {name: value.format(tmp=tmp_path) for name, value in given.items()}
    assert main(["probe", *(word for pair in options.items() for word in pair)]) == status
    printed, complaint = capsys.readouterr()
    lines = [line for line in complaint.splitlines() if line.startswith("siftloader: ")]
    assert printed == "" and len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


def test_what_a_trial_needs_is_asked_for_before_the_model_is_made(model, shards, capsys):
    asked = ["probe", "--model", "gone.py:build", "--shards", str(shards), "--trial", "0"]
    assert main(asked) == 2 and "--trial" in capsys.readouterr().err


def test_a_model_for_another_objective_is_said_so_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "bert"
    config().save_pretrained(folder)
    (tmp_path / "gpt.py").write_text(
        "import transformers\n"
        "def build():\n"
        "    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=90, n_positions=16)\n"
        "    return transformers.GPT2LMHeadModel(config)\n"
        "def bert():\n"
        f"    return transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained({str(folder)!r}))\n"
    )
    for objective, function, warned in (
        ("mlm", "build", True),
        ("clm", "build", False),
        ("clm", "bert", True),
        ("mlm", "bert", False),
    ):
        shards = tmp_path / f"{objective}-{function}"
        letters(shards, objective)
        asked = ["--model", f"{tmp_path / 'gpt.py'}:{function}", "--shards", str(shards)]
        assert main(["probe", *asked, *few("--layers", 1)]) == 0
        assert capsys.readouterr().out.startswith("ANOTHER OBJECTIVE") is warned


@pytest.mark.parametrize(
    ("package", "extra", "options"),
    [("matplotlib", "log", ["--out", "probe.png"]), ("transformers", "frameworks", [])],
)
def test_what_is_not_installed_is_named_with_its_extra(
    package, extra, options, shards, capsys, monkeypatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else found(n))
    monkeypatch.setitem(sys.modules, package, None)
    asked = ["probe", "--model", "some/name", "--shards", str(shards), *options]
    assert main(asked) == 1
    complaint = capsys.readouterr().err
    assert f"needs `{package}`; pip install 'siftloader[{extra}]'" in complaint


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as left:
        main(["probe", "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    for word in (
        "Nothing is trained",
        "do not sift",
        "noise",
        "--trial 200",
        "evidence",
        "FILE.py:FUNCTION",
    ):
        assert word in told
