"""tools/irreducible.py: pytest tests/test_irreducible.py"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pyarrow import parquet

from siftloader import Reducible, Sifter, SiftingDataLoader, TokenShards
from siftloader.shards import Layout, Source, Tokenizer, verify, write_dataset, write_shard


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import irreducible


DEMO = Path(__file__).resolve().parent.parent / "shards" / "demo"
T, V, TRAIN, VAL = 16, 40, 200, 24
EASY = 7  # the only letter of the held-out text, and of half of the training text
SPECIAL = {"pad": 0, "cls": 2, "sep": 3, "mask": 4, "eos": 3}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training samples of even number are like the held-out ones, those of odd number random."""
    rng, layout = np.random.default_rng(0), Layout.for_vocabulary(T, V)
    train = rng.integers(EASY + 1, V, (TRAIN, T))
    train[::2] = EASY
    train[3] = SPECIAL["sep"]  # never masked: without a label
    folders = {}
    for objective in ("mlm", "clm"):
        folder = folders[objective] = tmp_path_factory.mktemp(objective)
        parts = {"train-000000": train[:150], "train-000001": train[150:]}
        parts["val-000000"] = np.full((VAL, T), EASY)
        written = [
            write_shard(folder, stem, rows, np.zeros(len(rows), np.uint8), layout)
            for stem, rows in parts.items()
        ]
        write_dataset(
            folder,
            written,
            layout=layout,
            objective=objective,
            tokenizer=Tokenizer("letters", "0" * 64, V, SPECIAL),
            sources=[Source("letters", "0" * 64, 1)],
            unigrams=np.bincount(train.reshape(-1), minlength=V),
            seed=0,
        )
    return folders


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_what_is_like_the_held_out_text_is_not_irreducible(
    letters: dict[str, Path],
    objective: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as under torchrun: all samples all the same
    monkeypatch.setenv("RANK", "1")
    out = tmp_path / "irreducible.parquet"
    irreducible.main([str(letters[objective]), f"--out={out}", "--steps=25", "--batch-size=16"])
    table = parquet.read_table(out)
    assert table.column_names == ["id", "loss"]
    assert [str(kind) for kind in table.schema.types] == ["int64", "float"]
    assert table["id"].to_pylist() == list(range(TRAIN))
    losses = table["loss"].to_numpy()
    assert np.isfinite(losses).all()
    shards = TokenShards(letters[objective], with_ids=True, world=irreducible.EVERYTHING)
    (everything,) = shards.read_batches(TRAIN, epoch=0)
    labelled = np.zeros(TRAIN, bool)
    labelled[everything["id"]] = (everything["labels"] != -100).any(1)
    easy = np.arange(TRAIN) % 2 == 0
    assert losses[labelled & easy].max() < 1 < losses[labelled & ~easy].min()
    assert np.allclose(losses[~labelled], losses[labelled].mean(), atol=1e-5)
    told = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert told["fingerprint"] == shards.fingerprint and told["steps"] == "25"
    assert "2 layers of 128" in told["model"] or "4 layers of 128" in told["model"]
    said = capsys.readouterr().out
    assert "each of the 24 held out 1" in said and "200 samples" in said
    assert "token counts alone" in said and "which is better" in said  # half of the text is random
    if objective == "mlm":
        assert labelled.mean() < 0.99 and not labelled[3]
        assert f"({(~labelled).sum()} had no label: the mean)" in said
    assert [file.name for file in tmp_path.iterdir()] == [out.name]

    monkeypatch.undo()
    # The loader keeps what loss minus irreducible loss says, told here by hand.
    model = bert(None, V) if objective == "mlm" else gpt()
    loader = SiftingDataLoader(
        TokenShards(letters[objective], with_ids=True),
        8,
        model=model,
        criterion=Reducible.read(out),
        warmup_steps=0,
    )
    batch = next(shards.read_batches(16, epoch=0))
    reducible = Sifter(model).score(batch) - torch.tensor(losses[batch["id"]])
    best = sorted(reducible.topk(8).indices.tolist())
    assert torch.equal(next(iter(loader))["input_ids"], batch["input_ids"][best])


def bert(folder: Path | None, vocabulary: int, length: int = T) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=length,
            initializer_range=0.5,
        )
    )
    if folder is not None:
        model.save_pretrained(folder)
    return model


def gpt() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_positions=T,
            n_layer=2,
            n_embd=8,
            n_head=1,
            initializer_range=0.5,
            bos_token_id=3,
            eos_token_id=3,
        )
    )


def test_a_model_of_ones_own_scores_the_demo_as_it_is(tmp_path: Path) -> None:
    model = bert(tmp_path / "model", 8192, 128)
    out = tmp_path / "irreducible.parquet"
    irreducible.main([str(DEMO), f"--out={out}", f"--model={tmp_path / 'model'}"])
    table = parquet.read_table(out)
    assert table.schema.metadata[b"steps"] == b"0"
    losses = dict(zip(table["id"].to_pylist(), table["loss"].to_pylist(), strict=True))
    shards = TokenShards(DEMO, with_ids=True)
    assert sorted(losses) == list(range(shards.total))
    batch = next(shards.read_batches(32, epoch=0))
    batch_ids, labels = batch.pop("id").tolist(), batch["labels"]
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], batch["attention_mask"]).logits.double()
    value = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    expected = value.sum(1) / (labels != -100).sum(1)
    found = torch.tensor([losses[i] for i in batch_ids]).double()
    assert torch.allclose(found, expected, atol=1e-4)
    assert found.std() > 0.01


def test_the_file_lies_beside_the_shards_unless_told_otherwise(
    letters: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(letters["mlm"], folder)
    bert(tmp_path / "model", V)
    irreducible.main([str(folder), f"--model={tmp_path / 'model'}"])
    assert len(Reducible.read(folder / "irreducible.parquet").ids) == TRAIN
    assert len(list(verify(folder))) == 3  # shards that are as they were, whatever lies beside


def test_other_masks_each_time_the_held_out_text_comes_round(letters: dict[str, Path]) -> None:
    batches = irreducible.held_out(letters["mlm"], 0, VAL)
    first, second = next(batches), next(batches)
    assert len(first["labels"]) == VAL and (first["labels"] != second["labels"]).any()
    assert set(first["labels"].unique().tolist()) == {-100, EASY}  # of the held-out split alone


def test_a_model_worse_than_token_counts_is_called_so() -> None:
    assert "which is better" in irreducible.verdict(7.15, 6.65)
    assert "which is better" not in irreducible.verdict(6.2, 6.65)
    assert "6.650 nats" in irreducible.verdict(6.2, 6.65)


def test_a_file_appears_whole_or_not_at_all(
    letters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "irreducible.parquet"
    out.write_bytes(b"an earlier one")

    def full(table: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(OSError, match="no space"):
        irreducible.write(out, np.arange(2), np.zeros(2, np.float32), {"model": "none"})
    assert out.read_bytes() == b"an earlier one"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere", "--out=x.parquet"], "nowhere: no such folder"),
        (["nowhere"], "nowhere: no such folder"),
        ([str(DEMO), "--out=no/such/folder/x.parquet"], "a folder that exists"),
        ([str(DEMO), "--out=."], "must be a file"),
    ],
    ids=["no shards", "no shards to write beside", "no folder", "a folder"],
)
def test_mistakes_are_told_before_any_work(arguments: list[str], text: str) -> None:
    with pytest.raises(SystemExit) as left:
        irreducible.main(arguments)
    assert text in str(left.value.code)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        irreducible.main(["--help"])
    said = capsys.readouterr().out
    for word in ("Reducible.read", "epoch 0", "--val-fraction", "nats", "held-out split alone"):
        assert word in said
