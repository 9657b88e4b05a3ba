"""Retention in timm's vision transformers: the softmax is replaced by the formula, and timm's doors stay open."""

import copy
import pkgutil

import oracle
import pytest
import timm
import torch
from timm.models import create_feature_extractor, load_checkpoint
from torch.nn import functional as F

from retention import ShapeError
from retention.integrations.swap import Heads, HostedRetention, plan_replacement, replace_attention, restore_attention
from retention.integrations.swap.adapter import find_adapter
from retention.integrations.timm import RetentionAttention, classify_strips, refusals, retention_layer

SIZES = dict(img_size=(48, 80), depth=2, num_classes=7)  # a grid of 3 x 5
SMALL = dict(embed_dim=32, num_heads=2, mlp_ratio=1)
# Model, options, tokens before the image.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", SMALL, 1),
    "siglip": ("vit_base_patch16_siglip_224", SMALL, 0),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL, 2),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"patch_size": 16}, 5),
    "dynamic": ("vit_tiny_patch16_224", SMALL | {"dynamic_img_size": True}, 1),
    "hybrid": ("vit_tiny_r_s16_p8_224", SMALL | {"img_size": (96, 160)}, 1),
    "eva": ("eva02_tiny_patch14_224", SMALL | {"patch_size": 16}, 1),
    "rope": ("vit_small_patch16_rope_224", SMALL, 1),
    "naflex": ("naflexvit_base_patch16_gap", {k: v for k, v in SMALL.items() if k != "img_size"}, 4),
    "qwen": ("qwen3_vit_88m_enc", SMALL | {"patch_size": 16}, 0),
    "deepseek": ("deepseek_vit_412m_enc", SMALL | {"patch_size": 16}, 0),
    "grouped": ("vit_small_patch16_rope_224", SMALL | {"num_kv_heads": 1, "qkv_fused": False}, 1),
}


DECAY = [-0.1, -0.7, -0.3, -0.05]  # the first scale of two heads, then the second


def build(family="vit", **options):
    name, more, _ = FAMILIES[family]
    return awake(timm.create_model(name, **{**SIZES, **more, **options}).eval())


def awake(model):
    """Weights at which the layers matter; timm begins with almost nothing in them."""
    for name, p in model.named_parameters():
        if "norm" not in name and "retention" not in name:
            torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else torch.nn.init.normal_(p, 0.5, 0.1)
    return model


def images(model, rows=3, columns=5):
    scale = 32 if getattr(model, "default_cfg", {}).get("architecture", "").endswith("r_s16_p8_224") else 16
    return torch.randn(2, 3, rows * scale, columns * scale)


def distances(prefix, rows, columns, grid=True):
    """Between all tokens; 0 where one of them has no place."""
    cells, size = range(rows * columns), (rows, columns) if grid else None
    inside = torch.tensor([[oracle.distance(n, m, size) for m in cells] for n in cells])
    return F.pad(inside, (prefix, 0, prefix, 0))


def formula(prefix, rows, columns, decay, grid=True):
    """What retention is at its start: features softmax(2.5 x, -2.5 x) and all decays, in the place of a softmax."""
    log_decay = torch.tensor(decay, dtype=torch.float64)[:, None, None]
    weights = (log_decay * distances(prefix, rows, columns, grid)).exp()

    def gather(q, k, v, **_):
        q, k = (torch.cat([x, -x], -1).softmax(-1) for x in (2.5 * z.double() * z.shape[-1] ** -0.25 for z in (q, k)))
        scores = q @ k.mT * weights.unflatten(0, (-1, q.shape[1])).sum(0)
        return (scores / scores.sum(-1, keepdim=True) @ v.double()).to(v.dtype)

    return gather


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("grid", [True, False])
def test_prefix_tokens_take_part_without_decay(prefix, kv_heads, grid):
    heads = Heads(dim=8, num_heads=2, num_kv_heads=kv_heads, key_dim=4, value_dim=4)
    retention = HostedRetention(
        heads, decay=DECAY, learnable_decay=False, gate=None, grid_decay=grid, dtype=torch.float64
    )
    q, k, v = (torch.randn(2, h, prefix + 15, 4, dtype=torch.float64) for h in (2, kv_heads, kv_heads))
    got, _ = retention(torch.empty(0), q, k, v, scale=0.5, causal=False, grid=(3, 5), prefix=prefix)
    k, v = (x.repeat_interleave(2 // kv_heads, dim=1) for x in (k, v))
    want = formula(prefix, 3, 5, DECAY, grid)(q, k, v)
    torch.testing.assert_close(got.transpose(1, 2), want, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replaced_model_is_the_model_with_the_formula_instead_of_the_softmax(family, monkeypatch):
    model, prefix = build(family), FAMILIES[family][2]
    x = images(model)  # and the features, for some models attend once more where they pool
    before = model.forward_features(x)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", formula(prefix, 3, 5, DECAY))
        want = model.forward_features(x)
    report = replace_attention(model, decay=DECAY)
    assert report.replaced == ["blocks.0.attn", "blocks.1.attn"]
    assert model.num_prefix_tokens == prefix
    torch.testing.assert_close(model.forward_features(x), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want, before, rtol=1e-2, atol=1e-3)
    restore_attention(model)
    assert torch.equal(model.forward_features(x), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_grid_is_that_of_the_image_at_hand(monkeypatch):
    model = build("dynamic")
    replace_attention(model, decay=DECAY)
    sized = build("vit", attn_layer=retention_layer(decay=DECAY))
    sized.set_input_size(img_size=(32, 112))
    assert sized.load_state_dict({**model.state_dict(), "pos_embed": sized.pos_embed})
    for each, rows, columns in ((model, 6, 2), (model, 2, 6), (sized, 2, 7)):
        x = images(each, rows, columns)
        got = each(x)
        plain = copy.deepcopy(each)
        restore_attention(plain)
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", formula(1, rows, columns, DECAY))
            torch.testing.assert_close(got, plain(x), rtol=1e-4, atol=1e-5)


def test_along_the_rows_if_the_grid_is_not_wanted(monkeypatch):
    model = build()
    x = images(model)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", formula(1, 3, 5, DECAY, grid=False))
        want = model(x)
    replace_attention(model, decay=DECAY, grid_decay=False)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "eva"])
def test_without_the_fused_kernel_it_is_the_same(family):
    model = build(family)
    for block in model.blocks:
        block.attn.fused_attn = False
    x = images(model)
    before = model(x)
    fused = copy.deepcopy(model)
    fused.blocks[0].attn.fused_attn = fused.blocks[1].attn.fused_attn = True
    for each in (model, fused):
        replace_attention(each)
    assert torch.equal(model(x), fused(x))
    restore_attention(model)
    assert torch.equal(model(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("strips", [(16, 16, 16), (32, 16), (48,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"features": False}, {"window": 4}], ids=str)
def test_a_causal_model_takes_an_image_strip_by_strip(strips, options):
    layer = retention_layer(causal=True, **options, gate="silu")
    model = build(attn_layer=layer, class_token=False, global_pool="avg")
    image = images(model)
    got = classify_strips(model, image.split(strips, dim=2))
    torch.testing.assert_close(got, model(image), rtol=1e-4, atol=1e-5)
    changed = image.clone()
    changed[:, :, 32:] = 0
    before, after = (model.forward_features(x)[:, :10] for x in (image, changed))
    torch.testing.assert_close(before, after)  # two rows of five patches, which see nothing of the third


def test_strips_need_a_causal_model_and_must_make_up_its_image():
    causal = dict(attn_layer=retention_layer(causal=True))
    patches = dict(class_token=False, global_pool="avg")
    for options, message in (
        (patches, r"needs replace_attention\(model, causal=True\); got VisionTransformer without"),
        (causal | {"global_pool": "avg"}, "needs class_token=False"),
        (causal | {"class_token": False, "global_pool": "max"}, "needs global_pool='avg'"),
    ):
        with pytest.raises(ValueError, match=message):
            classify_strips(build(**options), [])
    model = build(**causal, **patches)
    with pytest.raises(ValueError, match=r"needs model.eval\(\)"):
        classify_strips(model.train(), [])
    model.eval()
    x = images(model)
    for wrong, message in (
        ([x, x], r"an image of \(48, 80\); got a strip \(2, 3, 48, 80\)"),
        ([x[..., :64]], r"got a strip \(2, 3, 48, 64\)"),
        ([x[:, :, :16]], "an image of 15 patches; got 5"),
    ):
        with pytest.raises(ShapeError, match=message):
            classify_strips(model, wrong)
    assert model(x).shape == (2, 7), "a refused image leaves nothing behind"
    with pytest.raises(ValueError, match="no tokens without a place; got prefix 1; leave causal out"):
        build(**causal)(x)


def test_a_window_needs_a_causal_model():
    model = build(class_token=False, global_pool="avg")
    with pytest.raises(
        ValueError, match=r"blocks.0.attn: sees both ways, and window and sinks look back; leave them out"
    ):
        replace_attention(model, window=4)
    replace_attention(model, window=4, causal=True)
    other = build(attn_layer=retention_layer(window=4))
    with pytest.raises(ValueError, match="window and sinks need causal retention; got causal False"):
        other(images(other))


# --- timm's own doors -------------------------------------------------------------------------------------------------


def test_create_model_with_attn_layer_is_replacement(tmp_path):
    plain = build()
    model = timm.create_model(FAMILIES["vit"][0], **SIZES, **SMALL, attn_layer="retention").eval()
    assert str(model.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    x = images(model)
    want = model(x)
    replace_attention(plain)
    assert torch.equal(plain(x), want)
    assert model.state_dict().keys() == plain.state_dict().keys()
    restore_attention(model)
    assert type(model.blocks[0].attn) is timm.layers.Attention


def test_checkpoints_load(tmp_path):
    plain = build()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = build(attn_layer=retention_layer(gate="silu"))
    load_checkpoint(model, tmp_path / "plain.pth")
    model.blocks[0].attn.retention.gain.data.fill_(2.0)
    torch.save(model.state_dict(), tmp_path / "retention.pth")
    other = build()
    replace_attention(other, gate="silu")
    load_checkpoint(other, tmp_path / "retention.pth")
    x = images(model)
    assert torch.equal(other(x), model(x))
    state = model.state_dict()
    del state["blocks.0.attn.retention.gain"]
    with pytest.raises(RuntimeError, match="Missing key.*blocks.0.attn.retention.gain"):
        other.load_state_dict(state)


def test_a_gate_begins_open_whatever_timm_draws():
    gated, plain = (build(attn_layer=retention_layer(gate=gate)) for gate in ("silu", None))
    gated.load_state_dict(plain.state_dict(), strict=False)
    for block in gated.blocks:
        assert not block.attn.retention.gate.weight.any()
    x = images(plain)
    torch.testing.assert_close(gated(x), plain(x), rtol=1e-4, atol=1e-5)


def test_features_and_intermediates():
    model = build(attn_layer="retention")
    x = images(model)
    final, parts = model.forward_intermediates(x)
    assert [part.shape for part in parts] == [(2, 32, 3, 5)] * 2
    torch.testing.assert_close(model.forward_features(x), final)
    wrapped = timm.create_model(FAMILIES["vit"][0], **SIZES, **SMALL, features_only=True, out_indices=[0, 1])
    replace_attention(wrapped)
    assert [part.shape for part in wrapped(x)] == [(2, 32, 3, 5)] * 2
    alone = copy.deepcopy(model)
    alone.prune_intermediate_layers([0])
    torch.testing.assert_close(alone.forward_intermediates(x, indices=[0])[1][0], parts[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "rope"])
def test_gradient_checkpointing_changes_nothing(family):
    model = build(family)
    replace_attention(model)
    x = images(model)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model.train()(x).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any("retention.decay" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "dynamic", "eva"])
def test_compiles_to_one_graph(family):
    model = build(family)
    replace_attention(model)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_fx_takes_a_layer_as_one_node():
    model = build(attn_layer="retention")
    x = images(model)
    features = create_feature_extractor(model, ["blocks.0.attn", "head"])
    torch.testing.assert_close(features(x)["head"], model(x))
    assert features(x)["blocks.0.attn"].shape == (2, 16, 32)
    with pytest.raises(ShapeError, match="a graph of FX has one grid; build the model with dynamic_img_size=False"):
        create_feature_extractor(build("dynamic", attn_layer="retention"), ["head"])


def test_a_copy_has_a_grid_of_its_own():
    model = build("dynamic")
    replace_attention(model)
    twin = copy.deepcopy(model)
    twin(images(twin, 2, 6))
    model(images(model, 6, 2))
    assert tuple(twin.blocks[0].attn.tokens.grid) == (2, 6)
    assert twin.blocks[0].attn.tokens is twin.blocks[1].attn.tokens
    restore_attention(twin)
    assert model.patch_embed._forward_hooks


def test_half_precision_keeps_its_sums():
    model = build(attn_layer="retention")
    x, want = images(model), None
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), want, rtol=0.1, atol=0.1)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_patch_dropout_is_an_error_in_training_only():
    for family in ("vit", "rope"):
        model = build(family, patch_drop_rate=0.5)
        replace_attention(model)
        x = images(model)
        model(x)
        with pytest.raises(ShapeError, match=r"tokens must be 1 and a grid of 3 x 5; got 8 tokens; .*patch dropout"):
            model.train()(x)


def test_a_layer_without_its_model_has_no_grid():
    model = build(attn_layer="retention")
    with pytest.raises(ShapeError, match="grid of the image is not known; run the whole model"):
        model.blocks[0](torch.randn(2, 16, 32))
    with pytest.raises(ValueError, match="sees the whole image; got attn_mask or is_causal"):
        model(images(model), is_causal=True)
    alone = RetentionAttention(32, 2)
    with pytest.raises(ShapeError, match="grid of the image is not known"):
        alone(torch.randn(2, 16, 32))


def test_images_of_several_sizes_are_refused():
    model = build("naflex")
    replace_attention(model)
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(5)).expand(2, -1, -1)
    valid = torch.ones(2, 15, dtype=torch.bool)
    valid[1, 12:] = False
    with pytest.raises(ValueError, match="sees the whole image; got attn_mask"):
        model(torch.randn(2, 15, 768), patch_coord=coordinates, patch_valid=valid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "swin_tiny_patch4_window7_224",
            r"layers.0.blocks.0.attn: timm.models.swin_transformer.WindowAttention attends inside a window of 7 x 7",
        ),
        ("swinv2_tiny_window8_256", "timm.models.swin_transformer_v2.WindowAttention .*window of 8 x 8 tokens"),
        (
            "maxvit_tiny_tf_224",
            "attn_block: .*maxxvit.PartitionAttentionCl attends inside a window of 7 x 7",
        ),
        (
            "maxvit_tiny_tf_224",
            "attn_grid: .*maxxvit.PartitionAttentionCl attends over a grid of 7 x 7 tokens",
        ),
        ("hiera_tiny_224", "timm.models.hiera.MaskUnitAttention attends inside a window of 64 tokens"),
        ("hiera_tiny_224", "timm.models.hiera.MaskUnitAttention gets its tokens in the order of Hiera's windows"),
        ("pvt_v2_b0", "timm.models.pvt_v2.Attention reduces its keys"),
        ("tiny_vit_5m_224", "timm.models.tiny_vit.Attention attends inside a window of 7 x 7"),
        (
            "beit_base_patch16_224",
            "blocks.0.attn: timm.models.beit.Attention adds learnt terms",
        ),
        (
            "pit_ti_224",
            "timm.layers.attention.Attention stands in PoolingVisionTransformer, whose grid of tokens is not known",
        ),
        ("vit_base_patch16_xp_224", "blocks.0: timm.models.vision_transformer.ParallelScalingBlock computes .* inline"),
        (
            "convit_tiny",
            r"no attention of ConVit has an adapter; .*timm.models.convit.MHSA \(as blocks.10.attn\)\. ",
        ),
        ("cait_xxs24_224", r"timm.models.cait.TalkingHeadAttn \(as blocks.0.attn\)"),
    ],
)
def test_attention_that_cannot_be_replaced_is_refused(name, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        plan_replacement(model)


def test_every_class_that_is_refused_is_there_and_gives_its_reason():
    for name in refusals._REASONS:
        kind = pkgutil.resolve_name(f"timm.models.{name}")
        assert isinstance(find_adapter(kind), refusals.Refused)


def test_dropout_of_the_weights_does_not_stand_in_the_way():
    model = build(attn_drop_rate=0.1)
    assert replace_attention(model, layers=[0]).replaced == ["blocks.0.attn"]
