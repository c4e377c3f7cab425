"""The vision example: its models, its data, its loop, its table."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from siftloader import EarlyExit
from siftloader.stack import find_stack, find_stages


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import vision


def test_it_prints_a_table_for_both_models(capsys):
    vision.main(["--quick", "--data=digits", "--threads=1"])
    said = capsys.readouterr().out
    assert "6 steps of 8 images of scikit-learn's digits (1,400 to train on, 100 to test)" in said
    for arm in (
        "plain ",
        "random half ",
        "sifted, a head on stage 2 ",
        "sifted, its own head, layer 1 ",
        "sifted, a head on layer 1 ",
    ):
        assert f"\n{arm}" in said
    assert said.count("same images") == 2 and f"torch {torch.__version__}" in said


def test_the_models_are_what_their_names_promise():
    images = torch.randn(2, 1, 28, 28)
    resnet, vit = vision.ResNet(64).eval(), vision.ViT(64).eval()
    # torchvision's resnet18 has 11,689,512: less a stem of 3 x 7 x 7, more one of 1 x 3 x 3; 10 classes.
    expected = 11_689_512 - 64 * 3 * 7 * 7 + 64 * 3 * 3 - 513 * 1000 + 513 * 10
    assert sum(p.numel() for p in resnet.parameters()) == expected
    assert find_stages(resnet) == [f"layer{stage}" for stage in range(1, 5)]
    assert find_stack(vit) == "blocks"
    with torch.no_grad():
        assert resnet(images).shape == vit(images).shape == (2, 10)
        torch.testing.assert_close(EarlyExit(vit, 6).logits((images, None)), vit(images))
        shape = vit.patch_embed(images).shape
    assert shape == (2, 49, 64)


def loader(arm, model, steps=30, seed=0):
    return vision.make_loader(arm, vision.load("digits", 10).train, 8, model, steps, seed)


def test_arms_draw_the_same_images():
    """The first pool of an arm that sifts is the first two batches of the plain one."""
    model = vision.ViT(8).train()
    plain = iter(loader({}, model))
    first = torch.cat([next(plain)[0], next(plain)[0]])
    sifted = iter(loader({"exit_layer": 1}, model, steps=0))
    kept = next(sifted)[0]
    assert len(kept) == 8 and all((first == each).flatten(1).all(1).any() for each in kept)


def test_an_untrained_model_does_not_choose():
    sifting = loader({"exit_layer": 1}, vision.ViT(8).train(), steps=30)
    batches = iter(sifting)
    for _ in range(3):
        next(batches)
    assert sifting.stats["candidates"] == 0
    next(batches)
    assert sifting.stats["candidates"] == 16


def test_the_loop_learns_and_ends():
    data = vision.load("digits", None)
    torch.manual_seed(0)
    model = vision.ResNet(4)
    order = torch.Generator().manual_seed(0)
    batches = torch.utils.data.DataLoader(data.train, 32, shuffle=True, generator=order)
    before = vision.accuracy(model, data.test)
    assert len(list(vision.train(model, batches, 50, 3e-3))) == 50  # more than an epoch
    assert vision.accuracy(model, data.test) > max(0.5, before + 0.2)


def test_the_table_pairs_the_seeds():
    random = vision.Result(10.0, 90, [0.5, 0.7], [0.5, 0.7])
    sifted = vision.Result(20.0, 50, [0.6, 0.8], [0.4, 0.7])
    lines = vision.table({"random half": random, "sifted": sifted}).splitlines()
    assert "70.0 % ± 14.1  +10.0 ± 0.0" in lines[2]
    assert "55.0 % ± 21.2  -5.0 ± 5.0" in lines[2]
    assert lines[2].endswith("50         20")
    alone = vision.table({"random half": vision.Result(1.0, 9, [0.5], [0.5])})
    assert "±" not in alone and "50.0 %" in alone


def written(folder: Path, name: str, values: np.ndarray) -> None:
    head = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">i4").tobytes()
    (folder / name).write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))


def test_the_four_files_are_read(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (7, 28, 28)), rng.integers(0, 10, 7)
    for part, images, labels in (("train", x[:5], y[:5]), ("t10k", x[5:], y[5:])):
        written(tmp_path, f"{part}-images-idx3-ubyte.gz", images)
        written(tmp_path, f"{part}-labels-idx1-ubyte.gz", labels)
    data = vision.load(str(tmp_path), None)
    images, labels = data.train.tensors
    expected = torch.tensor(x[:5, None] - x[:5].mean(), dtype=torch.float32) / x[:5].std(ddof=1)
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == y[:5].tolist() and len(data.test) == 2
    written(tmp_path, "t10k-labels-idx1-ubyte.gz", x)
    with pytest.raises(SystemExit, match="not an IDX file of bytes in 1 dimensions"):
        vision.load(str(tmp_path), None)


def test_missing_data_say_where_to_get_them(tmp_path):
    with pytest.raises(SystemExit, match=r"apt install dataset-fashion-mnist.*--data digits"):
        vision.load(str(tmp_path), None)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        vision.main(["--help"])
    said = capsys.readouterr().out
    assert "random half" in said and "--data digits" in said
    with pytest.raises(SystemExit):
        vision.main(["--steps=0"])
