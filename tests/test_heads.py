"""Exit heads trained on the side: features up to an exit, the head, and both as an exit of a Sifter."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from effort import examples
from hypothesis import given, strategies as st
from models import HIDDEN, VOCAB, bert, candidates, classifier, gpt2, trace
from torch import nn
from torch.nn import functional

from siftloader import EarlyExit
from siftloader.errors import ScoringError, StateError
from siftloader.features import Features
from siftloader.heads import ExitHead, ProbeExit
from siftloader.pool import Pool
from siftloader.predictions import Predictions
from siftloader.scores import Loss
from siftloader.stack import find_stages
from siftloader.targets import Stride, Targets


WIDTHS = (8, 16, 32, 64)


class BasicBlock(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or into != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        short = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + short)


class ResNet(nn.Module):
    def __init__(self, classes: int = 10, blocks: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        into = WIDTHS[0]
        for number, width in enumerate(WIDTHS, 1):
            stage = [BasicBlock(into, width, 1 if number == 1 else 2)]
            stage += [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*stage))
            into = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(into, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def images(samples: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, 28, 28, generator=draw)
    labels = torch.randint(0, 10, (samples,), generator=draw)
    labels[3] = -100
    return {"x": x, "labels": labels}


def targets_of(batch, shift: bool = False, **options) -> Targets:
    return Targets.of(batch["labels"], torch.device("cpu"), shift, **options)


@pytest.fixture
def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResNet().train()


# ---- features


@pytest.mark.parametrize(
    "layer", [1, 2, 3, 4, "layer3", "layer2:1", "layer2.0.conv1", "bn1", "fc"]
)
def test_features_are_those_of_a_copy_in_eval_mode_and_nothing_is_touched(resnet, layer):
    batch = images()
    targets = targets_of(batch)
    path = {"layer2:1": "layer2.0"}.get(
        layer, layer if isinstance(layer, str) else f"layer{layer}"
    )
    seen = []
    copied = copy.deepcopy(resnet).eval()
    copied.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        copied(batch["x"])
    expected = seen[0] if seen[0].ndim == 2 else seen[0].mean((2, 3))
    expected = expected[batch["labels"] != -100]

    before = trace(resnet)
    features = Features(resnet, layer)
    with torch.no_grad():
        for _ in range(3):
            found = features(batch, targets)
            torch.testing.assert_close(found, expected)
            assert not found.requires_grad
    assert trace(resnet) == before


def test_what_comes_after_the_exit_never_runs(resnet):
    calls = []
    for path in ("layer1", "layer2", "layer3", "layer4", "avgpool", "fc"):
        resnet.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: calls.append(path)
        )
    batch = images()
    with torch.no_grad():
        Features(resnet, 2)(batch, targets_of(batch))
    assert calls == ["layer1", "layer2"]


def test_a_hook_on_the_whole_model_does_not_see_its_middle(resnet):
    def reads_logits(module, args, output):
        assert output.shape[-1] == 10

    resnet.register_forward_hook(reads_logits)
    batch = images()
    with torch.no_grad():
        assert Features(resnet, 1)(batch, targets_of(batch)).shape == (11, 8)


def test_features_follow_the_live_weights_and_replaced_modules(resnet):
    batch = images()
    features, targets = Features(resnet, 3), targets_of(batch)
    with torch.no_grad():
        first = features(batch, targets)
        resnet.layer1[0].conv1.weight.mul_(2)
        second = features(batch, targets)
        resnet.layer3 = nn.Sequential(nn.Conv2d(16, 24, 1))
        third = features(batch, targets)
        resnet.layer3[0].bias.add_(1)
        torch.testing.assert_close(features(batch, targets), third + 1)
    assert not torch.allclose(first, second)
    assert third.shape == (11, 24)


def test_running_statistics_are_read_and_not_written(resnet):
    batch = images()
    statistics = resnet.layer1[0].bn1.running_mean
    with torch.no_grad():
        for _ in range(3):
            Features(resnet, 4)(batch, targets_of(batch))
    assert statistics.abs().max() == 0
    resnet(batch["x"])
    assert statistics.abs().max() > 0


class Says(nn.Module):
    def __init__(self, output, *inside: nn.Module) -> None:
        super().__init__()
        self.output = output
        self.inside = nn.ModuleList(inside)

    def forward(self, x):
        return self.output


class Around(nn.Module):
    def __init__(self, output, *inside: nn.Module) -> None:
        super().__init__()
        self.part = Says(output, *inside)
        self.head = nn.Linear(3, 3)

    def forward(self, x, attention_mask=None):
        try:
            return self.head(self.part(x))
        except Exception:  # a model may: the exit must come through
            return x


X = torch.arange(4 * 5 * 6 * 7.0).reshape(4, 5, 6, 7)
SHAPES = {
    "maps": (X, [nn.Conv2d(1, 1, 1)], X.mean((2, 3))),
    "maps of a ConvNeXt": (X, [nn.Conv2d(1, 1, 1), nn.Linear(1, 1)], X.mean((2, 3))),
    "maps of a pooling layer": (X, [nn.MaxPool2d(2)], X.mean((2, 3))),
    "maps of a Swin": (X, [nn.Linear(1, 1)], X.mean((1, 2))),
    "a sequence": (X[..., 0], [nn.Linear(1, 1)], X[..., 0].mean(1)),
    "a sequence of a Mamba": (X[..., 0], [nn.Conv1d(1, 1, 1), nn.Linear(1, 1)], X[..., 0].mean(1)),
    "a signal": (X[..., 0], [nn.Conv1d(1, 1, 1)], X[..., 0].mean(2)),
    "a volume": (X[..., None], [nn.Conv3d(1, 1, 1)], X.mean((2, 3))),
    "a vector": (X[:, :, 0, 0], [], X[:, :, 0, 0]),
    "a tuple": ((torch.zeros(4, dtype=torch.long), X[:, :, 0, 0], X), [], X[:, :, 0, 0]),
    "a dict": ({"state": None, "out": (X[:, :, 0, 0],)}, [], X[:, :, 0, 0]),
    "half precision": (X.half(), [nn.Conv2d(1, 1, 1)], X.half().mean((2, 3))),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_becomes_vectors(name):
    output, inside, expected = SHAPES[name]
    batch = {"x": torch.zeros(4, 3), "labels": torch.tensor([1, 0, -100, 2])}
    with torch.no_grad():
        found = Features(Around(output, *inside), "part")(batch, targets_of(batch))
    torch.testing.assert_close(found, expected[[0, 1, 3]])


def test_padding_does_not_change_the_mean_of_a_sequence():
    hidden = X[..., 0]
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[0, 2:] = 0
    batch = {"x": torch.zeros(4, 3), "labels": torch.arange(4), "attention_mask": mask}
    found = Features(Around(hidden), "part")(batch, targets_of(batch))
    torch.testing.assert_close(found[0], hidden[0, :2].mean(0))
    torch.testing.assert_close(found[1:], hidden[1:].mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("length", [None, 6])
def test_the_padding_that_torchs_encoder_drops(length):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(8, 10)

        def forward(self, x, mask):
            return self.head(self.encoder(x, src_key_padding_mask=mask))

    model = Padded().eval()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 3:] = True
    x = torch.randn(4, 6, 8)
    labels = torch.arange(4) if length is None else torch.arange(24).reshape(4, 6) % 10
    batch = {"x": x, "mask": mask, "labels": labels}
    alone = {"x": x[:1, :3], "mask": mask[:1, :3], "labels": labels[:1]}
    if length:
        batch["labels"] = labels.masked_fill(mask, -100)
        alone["labels"] = labels[:1, :3]
    features = Features(model, "encoder.layers.0")
    with torch.no_grad():
        few = features(alone, targets_of(alone))
        found = features(batch, targets_of(batch))[: len(few)]
    torch.testing.assert_close(found, few)


@pytest.mark.parametrize(("family", "make"), [("bert", bert), ("gpt2", gpt2)])
@pytest.mark.parametrize("layer", [1, 3])
def test_of_a_transformer_the_layers_output_at_the_labels(family, make, layer):
    model, batch = make(), candidates(family)
    targets = targets_of(batch, shift=family == "gpt2")
    kept = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        copied = copy.deepcopy(model).eval()
        states = copied(**kept, output_hidden_states=True).hidden_states[layer]
        before = trace(model)
        found = Features(model, layer)(batch, targets)
        assert trace(model) == before
    torch.testing.assert_close(found, states.reshape(-1, HIDDEN)[targets.positions])


NOWHERE = [
    (0, ScoringError, r"1\.\.4"),
    (5, ScoringError, r"1\.\.4"),
    ("layer2:3", ScoringError, r"1\.\.2"),
    ("layer9", ScoringError, "no module 'layer9'.*conv1, bn1"),
    ("full", ValueError, "place within"),
    ("", ValueError, "place within"),
    ("layer2:x", ValueError, "path:j"),
    (True, TypeError, "int or a str"),
    (1.0, TypeError, "int or a str"),
]


@pytest.mark.parametrize(("layer", "error", "message"), NOWHERE)
def test_places_that_do_not_exist(resnet, layer, error, message):
    with pytest.raises(error, match=message):
        Features(resnet, layer)


def test_a_module_that_is_not_called_is_said_so(resnet):
    resnet.spare = nn.Linear(2, 2)
    batch = images()
    with pytest.raises(ScoringError, match="without calling 'spare'"):
        Features(resnet, "spare")(batch, targets_of(batch))
    with pytest.raises(ScoringError, match=r"4 samples .* got \(5, 4"):
        few = {"x": torch.zeros(4, 3), "labels": torch.arange(4)}
        Features(Around(X.transpose(0, 1)), "part")(few, targets_of(few))
    with pytest.raises(ScoringError, match="each of 9 labels"):
        few = {"x": torch.zeros(4, 3), "labels": torch.ones(4, 9, dtype=torch.long)}
        Features(Around(X[..., 0]), "part")(few, targets_of(few))


# ---- the head


def planted(samples: int, width: int = 6, classes: int = 4, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randn(width, classes, generator=torch.Generator().manual_seed(99))
    features = torch.randn(samples, width, generator=draw)
    return features, (features @ truth).argmax(1)


def of_labels(labels) -> Targets:
    return Targets.of(labels, torch.device("cpu"), False)


def test_a_head_learns_a_planted_problem():
    head, rng = ExitHead(4, lr=0.02), torch.get_rng_state()
    features, labels = planted(512, 32, seed=1)
    assert head.logits_at(features).abs().max() == 0  # every class alike
    for step in range(150):
        seen, wanted = planted(64, 32, seed=step + 2)
        with torch.no_grad():
            head.step(seen, of_labels(wanted))
    right = (head.logits_at(features).argmax(1) == labels).float().mean()
    assert right > 0.85
    assert functional.cross_entropy(head.logits_at(features), labels) < 0.6
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_step_is_one_of_adamw_on_the_mean_cross_entropy():
    features, labels = planted(40)
    head = ExitHead(4, lr=0.01)
    own = nn.Linear(6, 4)
    nn.init.zeros_(own.weight), nn.init.zeros_(own.bias)
    optimizer = torch.optim.AdamW(own.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(own(functional.layer_norm(features, (6,))), labels).backward()
        optimizer.step()
        head.step(features, of_labels(labels))
    state = head.state_dict()["module"]
    torch.testing.assert_close(state["weight"], own.weight.detach())
    torch.testing.assert_close(state["bias"], own.bias.detach())


def test_the_memory_of_a_step_is_bounded_and_the_step_the_same(monkeypatch):
    features, labels = planted(40)
    whole, chunked = ExitHead(4), ExitHead(4)
    whole.step(features, of_labels(labels))
    monkeypatch.setattr("siftloader.twin.CHUNK_ELEMENTS", 4 * 7)
    chunked.step(features, of_labels(labels))
    for name in ("weight", "bias"):
        torch.testing.assert_close(
            chunked.state_dict()["module"][name], whole.state_dict()["module"][name]
        )


def test_positions_that_do_not_count_teach_nothing():
    features, labels = planted(40)
    real = torch.arange(40) < 25
    targets = Targets(
        torch.arange(40), labels.masked_fill(~real, -100), list(range(41)), 1, real.long(), real
    )
    head, other = ExitHead(4), ExitHead(4)
    head.step(features, targets)
    other.step(features[:25], of_labels(labels[:25]))
    torch.testing.assert_close(head.state_dict()["module"], other.state_dict()["module"])


def test_soft_labels_teach_like_hard_ones():
    features, labels = planted(40)
    soft = functional.one_hot(labels, 4).float()
    soft[30:] = 0  # rows without label
    head, other = ExitHead(4), ExitHead(4)
    head.step(features, Targets.of(soft, torch.device("cpu"), False))
    other.step(features[:30], of_labels(labels[:30]))
    torch.testing.assert_close(head.state_dict()["module"], other.state_dict()["module"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_do_not_get_in(bad):
    features, labels = planted(40)
    features[7, 2] = bad
    head, other = ExitHead(4), ExitHead(4)
    rest = torch.arange(40) != 7
    for _ in range(2):
        head.step(features, of_labels(labels))
        other.step(features[rest], of_labels(labels[rest]))
    torch.testing.assert_close(head.state_dict()["module"], other.state_dict()["module"])
    assert not head.logits_at(features)[7].isfinite().all()  # it ranks last, and is counted


def test_a_broken_gradient_counts_as_none():
    soft = torch.full((8, 4), 0.25)
    soft[2, 1] = float("nan")
    features, labels = planted(40)
    head = ExitHead(4)
    head.step(features, of_labels(labels))
    real = Targets(
        torch.arange(8), soft, list(range(9)), 1, torch.ones(8), torch.ones(8, dtype=torch.bool)
    )
    head.step(features[:8], real)
    assert all(each.isfinite().all() for each in head.state_dict()["module"].values())


def test_no_labels_no_step():
    head = ExitHead(4)
    head.step(torch.zeros(0, 6), of_labels(torch.full((3,), -100)))
    assert head.state_dict()["optimizer"] == {}


@pytest.mark.parametrize("context", ["no_grad", "inference", "autocast"])
def test_the_callers_contexts_change_nothing(context):
    features, labels = planted(40)
    plain, other = ExitHead(4), ExitHead(4)
    within = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }[context]
    for _ in range(2):
        plain.step(features, of_labels(labels))
        with within():
            other.step(features + 0, of_labels(labels + 0))
            assert other.logits_at(features).dtype == torch.float32
    assert other.digest() == plain.digest()


def test_low_precision_features_meet_float32_weights():
    features, labels = planted(40)
    head = ExitHead(4)
    head.step(features.bfloat16(), of_labels(labels))
    assert head.logits_at(features.bfloat16()).dtype == torch.float32
    assert {each.dtype for each in head.state_dict()["module"].values()} == {torch.float32}


def test_torchs_defaults_of_the_moment_do_not_matter():
    features, labels = planted(40)
    plain, other = ExitHead(4), ExitHead(4)
    plain.step(features, of_labels(labels))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            other.step(features, of_labels(labels))
    finally:
        torch.set_default_dtype(torch.float32)
    assert str(other.state_dict()["module"]) == str(plain.state_dict()["module"])


# ---- state


@given(before=st.integers(0, 4), after=st.integers(1, 4), used=st.booleans())
@examples(12)
def test_a_state_continues_as_if_nothing_had_happened(before, after, used):
    batches = [planted(16, seed=step) for step in range(before + after)]
    unbroken = ExitHead(4)
    for features, labels in batches[:before]:
        unbroken.step(features, of_labels(labels))
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    digest = unbroken.digest()
    file.seek(0)
    resumed = ExitHead()  # V is in the state
    if used:
        resumed.classes = 4
        resumed.step(planted(8, seed=77)[0], of_labels(planted(8, seed=77)[1]))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    if before == 0:
        resumed.classes = 4
    assert resumed.digest() == digest and bool(digest) == (before > 0)
    for features, labels in batches[before:]:
        assert torch.equal(resumed.logits_at(features), unbroken.logits_at(features))
        resumed.step(features, of_labels(labels))
        unbroken.step(features, of_labels(labels))
    assert resumed.digest() == unbroken.digest() != digest


def test_a_state_is_a_copy_and_its_digest_sees_every_tensor():
    head, (features, labels) = ExitHead(4), planted(16)
    head.step(features, of_labels(labels))
    state, digest = head.state_dict(), head.digest()
    kept = copy.deepcopy(state)
    head.step(features, of_labels(labels))
    torch.testing.assert_close(state, kept, rtol=0, atol=0)
    assert head.digest() != digest
    for part in (
        ("module", "weight"),
        ("module", "bias"),
        *(
            ("optimizer", number, name)
            for number in "01"
            for name in ("exp_avg", "exp_avg_sq", "step")
        ),
    ):
        changed = copy.deepcopy(state)
        at = changed
        for name in part[:-1]:
            at = at[name]
        at[part[-1]] += 1e-3
        other = ExitHead()
        other.load_state_dict(changed)
        assert other.digest() != digest, part
    other = ExitHead()
    other.load_state_dict(state)
    other.step(features, of_labels(labels))  # and what was loaded is not the caller's
    torch.testing.assert_close(state, kept, rtol=0, atol=0)


def test_the_rate_is_the_constructors_not_the_states():
    slow, (features, labels) = ExitHead(4, lr=1e-9), planted(16)
    slow.step(features, of_labels(labels))
    fast = ExitHead(lr=0.1)
    fast.load_state_dict(slow.state_dict())
    fast.step(features, of_labels(labels))
    assert fast.state_dict()["module"]["weight"].abs().max() > 0.01


def test_states_of_something_else_are_refused():
    head, (features, labels) = ExitHead(4), planted(16)
    head.step(features, of_labels(labels))
    state = head.state_dict()
    with pytest.raises(StateError, match="4 classes, this one has 7"):
        ExitHead(7).load_state_dict(state)
    for broken in (
        {"module": {}},
        {"module": {"weight": 3}},
        {"x": 1},
        {"module": state["module"]},
    ):
        with pytest.raises(StateError, match="state_dict"):
            ExitHead().load_state_dict(broken)
    with pytest.raises(ScoringError, match="width 6, found 5"):
        head.logits_at(torch.zeros(3, 5))
    with pytest.raises(ScoringError, match="classes="):
        ExitHead().logits_at(features)


@pytest.mark.parametrize("options", [{"classes": 1}, {"classes": True}, {"classes": 2.0}])
def test_wrong_classes(options):
    with pytest.raises(ValueError, match="at least 2"):
        ExitHead(**options)


@pytest.mark.parametrize("lr", [0, -1.0, float("nan"), float("inf"), "fast", True])
def test_wrong_rates(lr):
    with pytest.raises(ValueError, match="positive number"):
        ExitHead(lr=lr)


# ---- both as an exit


def scores_of(probe: ProbeExit, batch, targets) -> torch.Tensor:
    def run(part, wanted, first):
        return probe.logits_at(part, wanted)

    with torch.no_grad():
        return Loss()(Predictions(targets, run, Pool(batch)))


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_a_resnet_is_scored_at_every_stage_and_not_touched(resnet, layer):
    batch, before = images(), trace(resnet)
    targets = targets_of(batch)
    probe = ProbeExit(resnet, layer)
    scores = scores_of(probe, batch, targets)
    assert scores[3].isnan()
    torch.testing.assert_close(scores[:3], torch.full((3,), 10.0).log())
    losses = []
    for _ in range(30):
        losses.append(scores_of(probe, batch, targets).nanmean())
        probe.learn(batch, targets)
    assert losses[-1] < losses[0] - 0.05
    assert probe.classes(batch, 1) == 10
    assert probe.head.state_dict()["module"]["weight"].shape == (10, WIDTHS[layer - 1])
    assert trace(resnet) == before
    assert probe.is_of(resnet) and not probe.is_of(ResNet())


def test_scores_come_from_the_weights_before_the_step(resnet):
    batch = images()
    targets = targets_of(batch)
    probe, head = ProbeExit(resnet, 2), ExitHead(10)
    features = Features(resnet, 2)
    for _ in range(3):
        with torch.no_grad():
            vectors = features(batch, targets)
            found = torch.cat(list(probe.logits_at(batch, targets)))
        assert torch.equal(found, head.logits_at(vectors))
        probe.learn(batch, targets)
        head.step(vectors, targets)
    assert probe.head.digest() == head.digest()


def test_features_of_a_pool_are_computed_once(resnet):
    calls = []
    resnet.layer1.register_forward_hook(lambda *_: calls.append(1))
    probe, batch = ProbeExit(resnet, 2, ExitHead(10)), images()
    targets = targets_of(batch)
    for expected in (1, 2):
        scores_of(probe, batch, targets)
        part = {name: value[:4] for name, value in batch.items()}
        probe.learn(batch, targets)
        assert len(calls) == expected
    scores_of(probe, batch, targets)
    scores_of(probe, part, targets.part(0, 4))  # some criteria look at a part as well
    probe.learn(batch, targets)
    assert len(calls) == 4
    probe.learn(batch, targets)  # nothing is kept for longer than that
    assert len(calls) == 5
    scores_of(probe, batch, targets)
    probe.forget()
    probe.learn(images(seed=1), targets_of(images(seed=1)))
    assert len(calls) == 7


def test_predictions_come_in_chunks(resnet, monkeypatch):
    batch = images()
    targets = targets_of(batch)
    probe = ProbeExit(resnet, 2)
    probe.learn(batch, targets)
    with torch.no_grad():
        whole = torch.cat(list(probe.logits_at(batch, targets)))
        monkeypatch.setattr("siftloader.twin.CHUNK_ELEMENTS", 40)
        parts = list(probe.logits_at(batch, targets))
    assert [len(each) for each in parts] == [4, 4, 3]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(("family", "make"), [("bert", bert), ("gpt2", gpt2)])
def test_a_transformer_may_have_one_too(family, make):
    model, batch = make(), candidates(family)
    before = trace(model)
    targets = targets_of(batch, shift=family == "gpt2")
    probe = ProbeExit(model, 1, ExitHead(lr=0.01))
    losses = []
    for _ in range(25):
        losses.append(scores_of(probe, batch, targets).nanmean())
        probe.learn(batch, targets)
    assert float(losses[0]) == pytest.approx(math.log(VOCAB), abs=1e-4)
    assert losses[-1] < 0.7 * losses[0]
    assert probe.classes(batch, targets.length) == VOCAB
    if family == "gpt2":
        assert probe.task(batch, "labels", batch["labels"]).shift is True
    assert trace(model) == before


def test_some_positions_only(resnet):
    model, batch = gpt2(), candidates("gpt2")
    targets = targets_of(batch, shift=True, positions=Stride(4))
    probe = ProbeExit(model, 2)
    scores = scores_of(probe, batch, targets)
    probe.learn(batch, targets)
    assert scores.isfinite().sum() == len(scores) - 1
    assert probe.head.digest()


def test_classes_that_cannot_be_seen_are_asked_for():
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x, labels=None):
            for block in self.blocks:
                x = block(x)
            return x.sum() if labels is None else (x - labels).square().sum()

    batch = {"x": torch.randn(6, 4), "labels": torch.randint(0, 3, (6,))}
    targets = targets_of(batch)
    with pytest.raises(ScoringError, match=r"pass ExitHead\(classes=\.\.\.\)"):
        ProbeExit(Silent(), 1).classes(batch, 1)
    probe = ProbeExit(Silent(), 1, ExitHead(3))
    assert len(scores_of(probe, batch, targets)) == 6
    assert not probe.takes_labels(batch)


def test_the_probe_keeps_planted_hard_samples_that_the_early_exit_of_a_classifier_keeps_too():
    """Half of the rows say their class plainly, the others are noise: those have the higher loss."""
    model = classifier()
    probe = ProbeExit(model, 2, ExitHead(lr=0.02))
    draw = torch.Generator().manual_seed(3)
    kept = []
    centers = 3 * torch.randn(10, 8, generator=draw)
    for step in range(120):
        labels = torch.randint(0, 10, (32,), generator=draw)
        x = centers[labels] + 0.1 * torch.randn(32, 8, generator=draw)
        hard = torch.rand(32, generator=draw) < 0.5
        x[hard] = centers[torch.randint(0, 10, (int(hard.sum()),), generator=draw)]
        batch = {"x": x, "labels": labels}
        targets = targets_of(batch)
        scores = scores_of(probe, batch, targets)
        probe.learn(batch, targets)
        if step >= 80:
            kept.append(hard[scores.topk(16).indices].float().mean())
    assert torch.stack(kept).mean() > 0.85  # a random half keeps 0.5


def test_stages_and_early_exits_agree_on_what_a_layer_is():
    model, batch = classifier(), candidates("classifier")
    assert find_stages(model) == [f"blocks.{number}" for number in range(4)]
    targets = targets_of(batch)
    with torch.no_grad():
        hidden = Features(model, 2)(batch, targets)
        expected = EarlyExit(model, 2).logits(batch)[targets.positions]
        torch.testing.assert_close(model.head(model.norm(hidden)), expected)
