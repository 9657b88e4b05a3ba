"""RMT: the models compute the published function, which is written down here, and load its files."""

import math
from dataclasses import dataclass

import pytest
import timm
import torch
from timm.models import load_checkpoint
from torch.nn import functional as F

from retention.integrations.timm.pyramid import ManhattanAttention
from retention.integrations.timm.rmt import checkpoint_filter_fn


@dataclass
class Size:
    dims: tuple
    depths: tuple
    heads: tuple
    ratios: tuple
    ranges: tuple
    axes: tuple  # stages that attend by axis
    scaled: tuple
    drop_path: float


NO, LATE = (False,) * 4, (False, False, True, True)
PUBLISHED = {
    "tiny": Size((64, 128, 256, 512), (2, 2, 8, 2), (4, 4, 8, 16), (3, 3, 3, 3), (4, 4, 6, 6), (0, 1), NO, 0.1),
    "small": Size((64, 128, 256, 512), (3, 4, 18, 4), (4, 4, 8, 16), (4, 4, 3, 3), (4, 4, 6, 6), (0, 1, 2), NO, 0.15),
    "base": Size((80, 160, 320, 512), (4, 8, 25, 8), (5, 5, 10, 16), (4, 4, 3, 3), (5, 5, 6, 6), (0, 1, 2), LATE, 0.4),
    "large": Size(
        (112, 224, 448, 640), (4, 8, 25, 8), (7, 7, 14, 20), (4, 4, 3, 3), (6, 6, 6, 6), (0, 1, 2), LATE, 0.5
    ),
}
SMALL = Size((16, 16, 32, 32), (1, 1, 2, 1), (2, 2, 4, 4), (2, 2, 2, 2), (4, 4, 6, 6), (0, 1), LATE, 0.1)
OF_SMALL = dict(
    dims=SMALL.dims,
    depths=SMALL.depths,
    num_heads=SMALL.heads,
    mlp_ratios=SMALL.ratios,
    scaled=SMALL.scaled,
    by_axis=(True, True, False, False),
)


# --- the published files and function ---------------------------------------------------------------------------------


def published_weights(size, classes=7, dtype=torch.float64):
    """Random weights under the published names."""
    found = {}

    def linear(name, out, inside):
        found[f"{name}.weight"] = torch.randn(out, inside, dtype=dtype) * inside**-0.5
        found[f"{name}.bias"] = torch.randn(out, dtype=dtype) * 0.1

    def conv(name, out, inside, side):
        found[f"{name}.weight"] = torch.randn(out, inside, side, side, dtype=dtype) / side * inside**-0.5
        found[f"{name}.bias"] = torch.randn(out, dtype=dtype) * 0.1

    def norm(name, dim, running=False):
        found[f"{name}.weight"] = torch.rand(dim, dtype=dtype) + 0.5
        found[f"{name}.bias"] = torch.randn(dim, dtype=dtype) * 0.1
        if running:
            found[f"{name}.running_mean"] = torch.randn(dim, dtype=dtype) * 0.1
            found[f"{name}.running_var"] = torch.rand(dim, dtype=dtype) + 0.5
            found[f"{name}.num_batches_tracked"] = torch.tensor(3)

    first = size.dims[0]
    for i, (inside, out) in enumerate([(3, first // 2), (first // 2, first // 2), (first // 2, first), (first, first)]):
        conv(f"patch_embed.proj.{3 * i}", out, inside, 3)
        norm(f"patch_embed.proj.{3 * i + 1}", out, running=True)
    for i, dim in enumerate(size.dims):
        found[f"layers.{i}.Relpos.angle"] = torch.zeros(dim // size.heads[i], dtype=dtype)
        found[f"layers.{i}.Relpos.decay"] = published_decay(size, i).float()
        for j in range(size.depths[i]):
            block, hidden = f"layers.{i}.blocks.{j}", int(size.ratios[i] * dim)
            for part in ("q", "k", "v", "out"):
                linear(f"{block}.retention.{part}_proj", dim, dim)
            conv(f"{block}.retention.lepe.conv", dim, 1, 5)
            norm(f"{block}.retention_layer_norm", dim)
            norm(f"{block}.final_layer_norm", dim)
            linear(f"{block}.ffn.fc1", hidden, dim)
            linear(f"{block}.ffn.fc2", dim, hidden)
            conv(f"{block}.ffn.dwconv.conv", hidden, 1, 3)
            conv(f"{block}.pos.conv", dim, 1, 3)
            if size.scaled[i]:
                for n in (1, 2):
                    found[f"{block}.gamma_{n}"] = torch.rand(1, 1, 1, dim, dtype=dtype)
        if i < 3:
            conv(f"layers.{i}.downsample.reduction", size.dims[i + 1], dim, 3)
            norm(f"layers.{i}.downsample.norm", size.dims[i + 1], running=True)
    linear("proj", 1024, size.dims[-1])
    norm("norm", 1024, running=True)
    linear("head", classes, 1024)
    return found


def with_aux_head(weights, classes=7):
    dim = weights["proj.weight"].shape[1]
    aux = {"aux_head.weight": torch.randn(classes, dim).double(), "aux_head.bias": torch.randn(classes).double()}
    return weights | aux


def of_detector(weights, size):
    """A detector's backbone: norms of the levels instead of the classifier."""
    found = {name: x for name, x in weights.items() if not name.startswith(("proj.", "norm.", "head."))}
    for i, dim in enumerate(size.dims):
        found |= {
            f"extra_norms.{i}.weight": torch.rand(dim).double(),
            f"extra_norms.{i}.bias": torch.rand(dim).double(),
        }
    return found


def published_decay(size, stage):
    heads = size.heads[stage]
    decay = [math.log(1 - 2 ** (-2 - size.ranges[stage] * h / heads)) for h in range(heads)]
    return torch.tensor(decay, dtype=torch.float64)


class Published:
    """The published function, of weights under the published names."""

    def __init__(self, weights, size):
        self.w, self.size = weights, size

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def conv(self, name, x, stride=1):
        weight = self.w[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride, weight.shape[-1] // 2, groups=groups)

    def cells(self, name, x):
        """A convolution of x (B, rows, columns, dim)."""
        return self.conv(name, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def layer_norm(self, name, x, eps=1e-6):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def batch_norm(self, name, x):
        mean, var, weight, bias = (
            self.w[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def turned(self, x):
        """Rotate pairs of channels of x (B, H, rows, columns, D) by angles that grow along the flattened cells."""
        rows, columns, dim = x.shape[2:]
        angles = 10000 ** -torch.linspace(0, 1, dim // 2, dtype=x.dtype)
        turn = torch.polar(torch.ones((), dtype=x.dtype), torch.arange(rows * columns)[:, None] * angles)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn.view(rows, columns, -1)).flatten(-2)

    def attention(self, name, x, stage):
        heads = self.size.heads[stage]
        q, k, v = (self.linear(f"{name}.{part}_proj", x) for part in "qkv")
        local = self.cells(f"{name}.lepe.conv", v)
        rate = published_decay(self.size, stage).to(x.dtype)
        q, k, v = (
            z.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4) for z in (q, k * (q.shape[-1] // heads) ** -0.5, v)
        )
        q, k = self.turned(q), self.turned(k)
        rows, columns = x.shape[1:3]
        far = [(torch.arange(n)[:, None] - torch.arange(n)).abs() for n in (rows, columns)]
        if stage in self.size.axes:
            scores = torch.einsum("bhrcd,bhred->bhrce", q, k) + rate[:, None, None, None] * far[1]
            v = torch.einsum("bhrce,bhred->bhrcd", scores.softmax(-1), v)
            scores = torch.einsum("bhrcd,bhscd->bhcrs", q, k) + rate[:, None, None, None] * far[0]
            y = torch.einsum("bhcrs,bhscd->bhrcd", scores.softmax(-1), v)
        else:
            distance = far[0][:, None, :, None] + far[1][None, :, None, :]
            scores = torch.einsum("bhrcd,bhsed->bhrcse", q, k) + rate[:, None, None, None, None] * distance
            y = torch.einsum("bhrcse,bhsed->bhrcd", scores.flatten(-2).softmax(-1).view_as(scores), v)
        return self.linear(f"{name}.out_proj", y.permute(0, 2, 3, 1, 4).flatten(3) + local)

    def block(self, name, x, stage):
        gammas = (self.w.get(f"{name}.gamma_{n}", 1) for n in (1, 2))
        x = x + self.cells(f"{name}.pos.conv", x)
        x = x + next(gammas) * self.attention(
            f"{name}.retention", self.layer_norm(f"{name}.retention_layer_norm", x), stage
        )
        hidden = F.gelu(self.linear(f"{name}.ffn.fc1", self.layer_norm(f"{name}.final_layer_norm", x)))
        return x + next(gammas) * self.linear(f"{name}.ffn.fc2", hidden + self.cells(f"{name}.ffn.dwconv.conv", hidden))

    def levels(self, x):
        """The output of each stage, (B, rows, columns, dim)."""
        for i in range(4):
            x = self.conv(f"patch_embed.proj.{3 * i}", x, stride=2 - i % 2)
            x = self.batch_norm(f"patch_embed.proj.{3 * i + 1}", x)
            x = F.gelu(x) if i < 3 else x
        x = x.permute(0, 2, 3, 1)
        for i, depth in enumerate(self.size.depths):
            for j in range(depth):
                x = self.block(f"layers.{i}.blocks.{j}", x, i)
            yield x
            if i < 3:
                x = self.conv(f"layers.{i}.downsample.reduction", x.permute(0, 3, 1, 2), stride=2)
                x = self.batch_norm(f"layers.{i}.downsample.norm", x).permute(0, 2, 3, 1)

    def logits(self, x):
        *_, x = self.levels(x)
        hidden = self.batch_norm("norm", self.linear("proj", x).permute(0, 3, 1, 2))
        logits = self.linear("head", (hidden * hidden.sigmoid()).mean((2, 3)))
        if "aux_head.weight" not in self.w:
            return logits
        return logits + 0.5 * self.linear("aux_head", x.flatten(1, 2)).max(1)[0]

    def features(self, x):
        return [self.layer_norm(f"extra_norms.{i}", y, 1e-5).permute(0, 3, 1, 2) for i, y in enumerate(self.levels(x))]


# --- parity -----------------------------------------------------------------------------------------------------------


def loaded(name, weights, **options):
    """The model with published weights, by timm's own door."""
    overlay = dict(state_dict=dict(weights), num_classes=7)
    options = dict(num_classes=7, dtype=torch.float64) | options
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


def images(rows, columns):
    return torch.randn(2, 3, rows, columns, dtype=torch.float64)


def agree(got, want, bound=1e-10):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= bound * want.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_weights_give_the_published_logits(name):
    size = PUBLISHED[name]
    weights = published_weights(size)
    model, published = loaded(f"rmt_{name}", weights), Published(weights, size)
    for rows, columns in ((48, 48), (32, 70)):
        x = images(rows, columns)[:1]
        want = published.logits(x)
        agree(model(x), want)
    agree(model.float()(x.float()), want, 1e-5)


@torch.no_grad()
def test_each_part_of_a_published_file_has_its_place():
    weights = published_weights(SMALL)
    for rows, columns in ((64, 64), (32, 75)):
        x = images(rows, columns)
        agree(loaded("rmt_tiny", weights, **OF_SMALL)(x), Published(weights, SMALL).logits(x))


@torch.no_grad()
def test_a_file_of_token_labelling_adds_its_second_classifier():
    weights, x = with_aux_head(published_weights(SMALL)), images(64, 96)
    model = loaded("rmt_tiny", weights, use_aux_head=True, **OF_SMALL)
    want = Published(weights, SMALL).logits(x)
    agree(model(x), want)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 1024)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.aux_head.out_features == 5
    other = loaded("rmt_tiny", weights | {"head.weight": torch.zeros(7, 1024)}, use_aux_head=True, **OF_SMALL)
    assert not torch.allclose(other(x), want)


@torch.no_grad()
@pytest.mark.parametrize("classes", [0, 4])
def test_another_number_of_classes_leaves_out_both_classifiers(classes):
    weights, x = with_aux_head(published_weights(SMALL)), images(64, 64)
    model = loaded("rmt_tiny", weights, num_classes=classes, use_aux_head=True, **OF_SMALL)
    assert model(x).shape == (2, classes or 1024)
    *_, want = Published(weights, SMALL).levels(x)
    agree(model.forward_features(x), want)


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_detectors_file_gives_the_norm_of_each_level(wrapped):
    weights, x = of_detector(published_weights(SMALL), SMALL), images(64, 96)
    want = Published(weights, SMALL).features(x)
    if wrapped:
        inside = {f"backbone.{name}": y for name, y in weights.items()}
        weights = {"state_dict": inside | {"neck.conv.weight": torch.zeros(1)}, "meta": {}}
    model = loaded("rmt_tiny", weights, features_only=True, feature_norms=True, **OF_SMALL)
    for got, level in zip(model(x), want, strict=True):
        agree(got, level)
    some = loaded("rmt_tiny", weights, features_only=True, feature_norms=True, out_indices=(1, 3), **OF_SMALL)
    for got, level in zip(some(x), want[1::2], strict=True):
        agree(got, level)
    names = {name for name, _ in some.named_parameters() if "feature_norms" in name}
    assert names == {f"model.feature_norms.{i}.{part}" for i in (1, 3) for part in ("weight", "bias")}


@torch.no_grad()
def test_weights_of_a_model_here_load_as_they_are(tmp_path):
    model = loaded("rmt_tiny", published_weights(SMALL), **OF_SMALL)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ours.pth")
    x = images(32, 64)
    file = dict(file=str(tmp_path / "ours.pth"), num_classes=7)
    options = dict(num_classes=7, dtype=torch.float64, **OF_SMALL)
    again = timm.create_model("rmt_tiny", pretrained=True, pretrained_cfg_overlay=file, **options).eval()
    assert torch.equal(again(x), model(x))
    plain = timm.create_model("rmt_tiny", **options).eval()
    load_checkpoint(plain, tmp_path / "ours.pth")
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (with_aux_head, {}, "the file has aux_head.bias, which the model lacks; build it with use_aux_head=True"),
        (
            lambda weights: of_detector(weights, SMALL),
            {},
            "the file has feature_norms.0.bias, which the model lacks; build it with feature_norms=True",
        ),
        (lambda weights: weights, {"conv_head": False}, "the file has head.pre_logits.norm.* conv_head=True"),
        (lambda weights: weights, {"depths": (1, 1, 1, 1)}, "another size.*: the model lacks stages.2.blocks.1"),
        (lambda weights: weights, {"depths": (1, 2, 2, 1)}, "another size.*: the file lacks stages.1.blocks.1"),
        (lambda weights: weights, {"spans": (4, 4, 5, 6)}, "stage 2 of the file has the log-decays"),
        (lambda weights: {"conv1.weight": 0}, {}, "must hold weights of RMT or of a Pyramid; got conv1.weight"),
    ],
)
@pytest.mark.parametrize("features_only", [False, True])
def test_a_file_that_does_not_fit_is_refused_with_the_option_that_would(file, options, message, features_only):
    with pytest.raises(ValueError, match=message):
        loaded("rmt_tiny", file(published_weights(SMALL)), features_only=features_only, **{**OF_SMALL, **options})


# --- what the models are ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_have_the_published_options(name):
    size, model = PUBLISHED[name], timm.create_model(f"rmt_{name}", device="meta")
    for i, stage in enumerate(model.stages):
        found = [module for module in stage.modules() if isinstance(module, ManhattanAttention)]
        assert len(found) == size.depths[i]
        assert {attention.by_axis for attention in found} == {i in size.axes}
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, size.drop_path, len(rates)).tolist())
    weights = published_weights(size, classes=1000, dtype=torch.float32)
    renamed = checkpoint_filter_fn(weights, model)
    assert {name: x.shape for name, x in renamed.items()} == {name: x.shape for name, x in model.state_dict().items()}
