"""Retentive models in timm's registry: timm's ways to build and run them, and what their mixers compute."""

import sys

import oracle
import pytest
import timm
import torch
from timm.models import create_feature_extractor, get_model_input_config
from torch import nn

import retention.integrations.timm
from retention.integrations.swap import HostedRetention, Swapped
from retention.integrations.timm import retention_layer
from retention.integrations.timm.__main__ import _main as run_script
from retention.integrations.timm.pyramid import CellHead, ManhattanAttention, Mixer

VITS = [f"vit_retention_{size}_patch16_224" for size in ("tiny", "small", "base")]
PYRAMIDS = [
    f"{family}_{size}" for family in ("pyramid_retention", "rmt") for size in ("tiny", "small", "base", "large")
]
TINY = ["vit_retention_tiny_patch16_224", "pyramid_retention_tiny", "rmt_tiny"]
MILLIONS = {"tiny": 14, "small": 27, "base": 54, "large": 95}


SMALL = dict(dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4), mlp_ratios=(2, 2, 2, 2))


def build(name, **options):
    size = {"img_size": 64} if name.startswith("vit") else {}
    return timm.create_model(name, **size, **options)


# --- what timm's tests ask --------------------------------------------------------------------------------------------


def test_all_are_in_the_registry():
    assert set(VITS + PYRAMIDS) <= set(timm.list_models())


def test_timm_lists_the_modules_of_the_models_under_names_of_their_own():
    assert {"vit_retention", "pyramid_retention", "rmt"} <= set(timm.list_modules())
    assert not {"models", "pyramid", "attention"} & set(timm.list_modules())
    assert set(timm.list_models(module=["vit_retention", "pyramid_retention", "rmt"])) == set(VITS + PYRAMIDS)


@pytest.mark.parametrize(("former", "name"), [("models", VITS[0]), ("pyramid", PYRAMIDS[0]), ("pyramid", PYRAMIDS[-1])])
def test_the_former_modules_have_the_models_with_a_warning(former, name):
    module = getattr(retention.integrations.timm, former)
    with pytest.warns(DeprecationWarning, match=f"{name} is deprecated .* use retention.integrations.timm.*{name}"):
        assert getattr(module, name) is timm.model_entrypoint(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", VITS + PYRAMIDS)
def test_default_cfg_names_what_is_there(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    state, cfg = model.state_dict(), model.default_cfg
    assert cfg["classifier"] + ".weight" in state
    assert cfg["first_conv"] + ".weight" in state
    assert (cfg["num_classes"], cfg["input_size"]) == (1000, (3, 224, 224))
    assert model.get_classifier().out_features == 1000
    softmax = name.startswith("rmt")
    assert any(isinstance(module, HostedRetention) for module in model.modules()) != softmax
    assert any(isinstance(module, ManhattanAttention) for module in model.modules()) == softmax


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_forward(name):
    model = build(name).eval()
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 1000)
    assert out.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_reaches_every_parameter(name, checkpointing):
    model = build(name, num_classes=42, drop_path_rate=0.1).train()
    model.set_grad_checkpointing(checkpointing)
    model(torch.randn(2, 3, 64, 64)).mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_classifiers_come_and_go(name):
    model, x = build(name).eval(), torch.randn(1, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape[-1] == model.num_features
    model.reset_classifier(0)
    assert model(x).shape == (1, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(x).shape[1:-1] == features.shape[1:-1]
    model.reset_classifier(5, "avg")
    assert model(x).shape == (1, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_features(name):
    model, x = build(name, features_only=True).eval(), torch.randn(1, 3, 64, 64)
    outs = model(x)
    assert [out.shape[1] for out in outs] == model.feature_info.channels()
    assert [out.shape[2] for out in outs] == [64 // n for n in model.feature_info.reduction()]
    if not name.startswith("vit"):
        assert model.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_intermediates_are_those_on_the_way(name):
    model, x = build(name).eval(), torch.randn(1, 3, 64, 64)
    final, parts = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    some = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(some[0], parts[1])
    assert model.prune_intermediate_layers([1]) == [1]
    again = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    torch.testing.assert_close(again[0], parts[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_fx_and_compile(name):
    node, few = "head", {"depth": 2}
    if not name.startswith("vit"):
        node, few = "head.fc", {"depths": (1, 1, 1, 1), "drop_path_rate": 0.0}
    model, x = build(name, **few).eval(), torch.randn(1, 3, 64, 64)
    want = model(x)
    torch.testing.assert_close(create_feature_extractor(model, [node])(x)[node], want)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_parameters_group_by_depth(name):
    from timm.optim import create_optimizer_v2

    optimiser = create_optimizer_v2(build(name), "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    assert len({group["lr_scale"] for group in optimiser.param_groups}) > 4


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("more", [{}, {"conv_head": True, "use_aux_head": True, "feature_norms": True}], ids=len)
def test_device_and_dtype_reach_every_parameter_and_buffer(name, more):
    if name.startswith("vit"):
        more = {"attn_layer": retention_layer(gate="silu")} if more else {}
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16, **more)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert {x.device.type for x in tensors.values()} == {"meta"}
    assert {x.dtype for n, x in tensors.items() if not n.endswith("num_batches_tracked")} == {torch.bfloat16}


@pytest.mark.parametrize("name", TINY)
def test_img_size_is_what_timm_reports_and_other_sizes_still_work(name):
    model = timm.create_model(name, device="meta", img_size=(64, 96)).eval()
    assert get_model_input_config(model)["input_size"] == (3, 64, 96)
    assert model(torch.empty(1, 3, 64, 96, device="meta")).shape == (1, 1000)
    if name.startswith("vit"):
        return
    assert model(torch.empty(1, 3, 96, 32, device="meta")).shape == (1, 1000)
    square = timm.create_model(name, device="meta", img_size=64)
    assert get_model_input_config(square)["input_size"] == (3, 64, 64)


@pytest.mark.parametrize("name", TINY)
def test_proj_drop_rate_is_dropout_after_the_linear_layers_of_a_block(name):
    model = timm.create_model(name, device="meta", proj_drop_rate=0.25)
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and "blocks.0." in n and m.p}
    first = "blocks.0." if name.startswith("vit") else "stages.0.blocks.0."
    parts = ("attn.proj_drop", "mlp.drop1", "mlp.drop2") if name.startswith("vit") else ("mixer.proj_drop", "mlp.drop")
    assert {n: p for n, p in rates.items() if n.startswith(first)} == {first + part: 0.25 for part in parts}


def test_dropout_drops_where_it_stands():
    mixer = Mixer(8, 2, ManhattanAttention([-0.1, -0.2], True), proj_drop=0.5)
    y = mixer(torch.randn(1, 8, 8, 8))
    assert 0.2 < (y == 0).double().mean() < 0.8
    assert not (mixer.eval()(torch.randn(1, 8, 8, 8)) == 0).any()
    model = timm.create_model("rmt_tiny", proj_drop_rate=0.5, **SMALL)
    dropped = []
    model.stages[0].blocks[0].mlp.drop.register_forward_hook(lambda *call: dropped.append((call[2] == 0).any().item()))
    model.train()(torch.randn(2, 3, 32, 32))
    assert dropped == [True, True]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("option", ["not_an_option", "attn_drop_rates", "num_decays", "decay"])
def test_an_unknown_option_is_refused_by_its_name(name, option):
    with pytest.raises(TypeError, match=rf"\b{option}\b") as error:
        timm.create_model(name, device="meta", **{option: 1})
    if not name.startswith("vit"):
        assert f"a Pyramid has no option {option}; its options are softmax, by_axis, dims" in str(error.value)
        assert ("those of its retention are" in str(error.value)) == name.startswith("pyramid")


def test_options_of_rmts_attention_need_it():
    with pytest.raises(TypeError, match="by_axis is for RMT's attention, softmax=True; got by_axis"):
        timm.create_model("pyramid_retention_tiny", by_axis=(True,) * 4, device="meta")
    with pytest.raises(ValueError, match="by_axis must be True or False for each of the four stages; got by_axis"):
        timm.create_model("rmt_tiny", by_axis=(True,) * 3, device="meta")


def test_the_published_classifier_is_an_option_of_both():
    for name in ("pyramid_retention_tiny", "rmt_tiny"):
        for conv_head in (False, True):
            model = timm.create_model(name, conv_head=conv_head, **SMALL)
            assert isinstance(model.head, CellHead) == conv_head
    assert isinstance(timm.create_model("rmt_tiny", **SMALL).head, CellHead)
    assert not isinstance(timm.create_model("pyramid_retention_tiny", **SMALL).head, CellHead)


# --- timm's scripts ---------------------------------------------------------------------------------------------------


def test_a_script_of_timm_runs_with_the_models_and_its_own_options(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("NAME = 'rmt_tiny'\n")
    script = tmp_path / "validate.py"
    script.write_text(
        "import pathlib, sys, beside, timm\n"
        "assert __name__ == '__main__' and timm.is_model(beside.NAME)\n"
        "pathlib.Path('seen').write_text(repr(sys.argv))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unchanged"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    run_script([str(script), "--model", "rmt_tiny", "-b", "2"])
    assert (tmp_path / "seen").read_text() == repr([str(script), "--model", "rmt_tiny", "-b", "2"])


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [None, 64])
def test_the_scripts_way_to_build_a_model(name, size):
    """What timm's validate.py and inference.py do with --img-size."""
    given = dict(pretrained=False, num_classes=None, global_pool=None, scriptable=False)
    options = timm.models.resolve_model_input_args(name, {"img_size": size}, **given)
    model = timm.create_model(**options, device="meta").eval()
    size = timm.data.resolve_input_data_config(model, {"img_size": size}, use_test_size=True)["input_size"]
    assert model(torch.empty(1, *size, device="meta")).shape == (1, 1000)


def test_the_runner_of_scripts_asks_for_a_script(capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script(["none.py", "--model", "rmt_tiny"])
    assert "script must be a file, such as timm's validate.py; got 'none.py'" in capsys.readouterr().err


# --- what they are ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PYRAMIDS)
def test_sizes_are_those_of_rmt(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(MILLIONS[name.rpartition("_")[2]], rel=0.03)


def test_the_vits_have_retention_with_gate_and_norm_in_each_layer():
    model = build("vit_retention_tiny_patch16_224")
    layers = [module for module in model.modules() if isinstance(module, Swapped)]
    assert len(layers) == 12
    assert all(layer.retention.gate is not None and layer.retention.norm.kind == "rms" for layer in layers)
    assert all(layer.retention.options["grid_decay"] for layer in layers)
    assert model.num_prefix_tokens == 0


@pytest.mark.parametrize("by_axis", [False, True])
def test_manhattan_attention_is_a_softmax_with_a_bias(by_axis):
    q, k, v = torch.randn(3, 2, 2, 15, 4, dtype=torch.float64)
    decay = [-0.1, -0.7]
    got, _ = ManhattanAttention(decay, by_axis)(q, q, k, v, scale=0.5, causal=False, grid=(3, 5))
    distances = torch.tensor([[oracle.distance(n, m, (3, 5)) for m in range(15)] for n in range(15)])
    bias = torch.tensor(decay, dtype=torch.float64)[:, None, None] * distances
    if by_axis:
        cells = torch.cartesian_prod(torch.arange(3), torch.arange(5))
        for axis in (0, 1):  # each row, then each column
            same = cells[:, None, axis] == cells[:, axis]
            v = (q @ k.mT * 0.5 + bias).masked_fill(~same, -torch.inf).softmax(-1) @ v
    else:
        v = (q @ k.mT * 0.5 + bias).softmax(-1) @ v
    torch.testing.assert_close(got.transpose(1, 2), v, rtol=1e-10, atol=1e-12)


def test_a_mixer_is_retention_on_the_grid_and_a_convolution_of_the_values():
    class Probe(nn.Module):
        def forward(self, x, q, k, v, *, scale, causal, grid):
            self.seen = q, k, v, scale, causal, grid
            return torch.zeros_like(v).transpose(1, 2), None

    mixer = Mixer(8, 2, Probe()).double()
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    y = mixer(x)
    q, k, v, scale, causal, grid = mixer.gather.seen
    assert (scale, causal, grid) == (0.5, False, (3, 5))
    values = mixer.qkv(x)[..., 16:]
    torch.testing.assert_close(v.transpose(1, 2).reshape(2, 3, 5, 8), values)
    torch.testing.assert_close(q.square().sum(-1), mixer.qkv(x)[..., :8].reshape(2, 15, 2, 4).square().sum(-1).mT)
    torch.testing.assert_close(k[:, :, 0], mixer.qkv(x)[:, 0, 0, 8:16].reshape(2, 2, 4))  # the first is not turned
    near = torch.nn.functional.pad(values, (0, 0, 2, 2, 2, 2)).unfold(1, 5, 1).unfold(2, 5, 1)
    local = (near * mixer.local.weight[:, 0]).sum((-1, -2)) + mixer.local.bias
    torch.testing.assert_close(y, mixer.proj(local))


@pytest.mark.slow
def test_images_of_any_size_and_shape():
    model = build("pyramid_retention_tiny", num_classes=3).eval()
    for size in ((64, 64), (96, 160), (70, 33)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 3)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW'; got output_fmt 'NLC'"):
        model.forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")


@pytest.mark.slow
def test_options_of_retention_are_for_retention():
    assert build("pyramid_retention_tiny", gate="silu").stages[0].blocks[0].mixer.gather.gate is not None
    with pytest.raises(TypeError, match="RMT's attention has no options of retention; got gate"):
        build("rmt_tiny", gate="silu")
    with pytest.raises(TypeError, match="gates"):
        build("pyramid_retention_tiny", gates="silu")
