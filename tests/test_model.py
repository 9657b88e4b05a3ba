"""RetNet: the same logits in every form, at every cut, and the sizes of the paper."""

from functools import partial

import pytest
import torch

from retention import RetNet, ShapeError
from retention.model import FORMER, PRESETS, RetNetBackbone

FORMS = ("parallel", "chunkwise", "recurrent")


def make(**options):
    return RetNet(50, 32, 2, 4, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("options", [{}, {"gated": False, "norm": "layer", "tie_embeddings": False}], ids=str)
@torch.no_grad()
def test_all_forms_and_all_cuts_give_the_same_logits(options):
    model, tokens = make(**options), torch.randint(50, (2, 13))
    want = model(tokens, form="parallel")
    for form in FORMS:
        torch.testing.assert_close(model(tokens, form=form), want)
        first, state = model(tokens[:, :5], form=form, return_state=True)
        rest = model(tokens[:, 5:], state=state)
        torch.testing.assert_close(torch.cat([first, rest], 1), want)
    steps = [model.step(tokens[:, n, None], state) for n in range(5, 13)]
    torch.testing.assert_close(torch.cat(steps, 1), want[:, 5:])


@torch.no_grad()
def test_padding_and_packing_leave_each_sequence_alone():
    model, tokens = make(), torch.randint(50, (1, 9))
    want = model(tokens)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], 1)
    mask = torch.arange(13)[None] >= 4
    torch.testing.assert_close(model(padded, mask=mask)[:, 4:], want)
    packed = model(torch.cat([tokens[:, :3], tokens], 1), cu_seqlens=torch.tensor([0, 3, 12]))
    torch.testing.assert_close(packed[:, 3:], want)


def test_every_parameter_gets_a_gradient():
    model = make(retention={"learnable_decay": True, "norm_affine": "channel", "bias": True})
    model(torch.randint(50, (2, 9))).logsumexp(-1).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_their_formula_says(name):
    model = RetNet.from_preset(name, device="meta")
    size = PRESETS[name]
    dim, layers, vocab = size["dim"], size["num_layers"], size.get("vocab_size", 256)
    retention = 2 * dim * dim + 2 * dim * 2 * dim + 2 * dim * dim  # q k, v g, out
    gated_width = {128: 176, 256: 352, 512: 688}  # 4/3 dim, rounded up to 16
    ffn = 3 * dim * gated_width[dim] if size.get("gated", True) else 2 * dim * 2 * dim
    norms = (2 * layers + 1) * dim * (2 if size.get("norm") == "layer" else 1)
    decays = layers * size["num_heads"] * size["retention"].get("learnable_decay", False)
    assert sum(p.numel() for p in model.parameters()) == vocab * dim + layers * (retention + ffn) + norms + decays


@pytest.mark.slow
@pytest.mark.parametrize(("name", "billions"), [("300m", 0.30), ("1.3b", 1.3), ("2.7b", 2.7), ("6.7b", 6.7)])
def test_paper_presets_have_the_size_in_their_name(name, billions):
    model = RetNet.from_preset(name, device="meta")
    blocks = sum(p.numel() for p in model.backbone.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert min(abs(n / 1e9 / billions - 1) for n in (blocks, total)) < 0.03
    retention = model.backbone.blocks[0].retention
    assert (retention.head_key_dim, retention.head_value_dim) == (256, 512)


def test_generate_greedily_is_the_argmax_of_the_full_forward():
    model, tokens = make(), torch.randint(50, (2, 6))
    out = model.generate(tokens, 7, temperature=0)
    assert out.shape == (2, 13)
    for n in range(6, 13):
        assert torch.equal(model(out[:, :n])[:, -1].argmax(-1), out[:, n])


def test_generate_ignores_left_padding():
    model, tokens = make(), torch.randint(50, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    out = model.generate(padded, 5, temperature=0, mask=torch.arange(9)[None] >= 3)
    assert torch.equal(out[:, 9:], model.generate(tokens, 5, temperature=0)[:, 6:])


def test_sampling_depends_on_the_generator_only_and_top_k_on_the_likeliest():
    model, tokens = make(), torch.randint(50, (1, 6))
    one, two = (model.generate(tokens, 9, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(model.generate(tokens, 9, top_k=1), model.generate(tokens, 9, temperature=0))


def test_bad_input_is_named():
    model = make()
    with pytest.raises(ShapeError, match=r"tokens must be \(batch, length\); got tokens \(5,\)"):
        model(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"at least one token; got tokens \(1, 0\)"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="temperature must be finite and at least 0; got temperature -1"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 3, temperature=-1)
    with pytest.raises(ValueError, match="top_k must be an integer of at least 1, or None; got top_k 0"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 3, top_k=0)
    with pytest.raises(ValueError, match="last column of mask must be real tokens"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 3, mask=torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="one RetentionState per block, 2; got 1"):
        model(torch.zeros(1, 3, dtype=torch.long), state=[None])
    with pytest.raises(ValueError, match="preset must be one of tiny, .*; got preset 'huge'"):
        RetNet.from_preset("huge")
    with pytest.raises(ValueError, match="norm must be one of 'rms', 'layer'; got norm 'batch'"):
        make(norm="batch")
    with pytest.raises(TypeError, match="num_head"):
        make(retention={"num_head": 3})


# --- options of the blocks --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_deepnorm_is_its_formula():
    model, x = RetNetBackbone(32, 3, 4, deepnorm=True, dtype=torch.float64), torch.randn(2, 7, 32).double()
    want = x
    for block in model.blocks:
        for layer, norm in ((block.retention, block.retention_norm), (block.ffn, block.ffn_norm)):
            want = norm(want * (2 * 3) ** 0.25 + layer(want))
    torch.testing.assert_close(model(x).hidden, want)
    bound, smaller = (6 / (32 + 64)) ** 0.5, (8 * 3) ** -0.25
    assert block.retention.v_proj.weight.abs().max().item() == pytest.approx(2**-2.5 * bound * smaller, rel=0.05)
    assert block.retention.q_proj.weight.abs().max().item() == pytest.approx(2**-2.5 * (6 / 64) ** 0.5, rel=0.05)


@torch.no_grad()
def test_embeddings_are_scaled_and_normalised():
    x = torch.randn(2, 7, 32).double()
    model = RetNetBackbone(32, 1, 4, scale_embedding=True, norm_embedding=True, norm="layer", dtype=torch.float64)
    want = torch.nn.functional.layer_norm(x * 32**0.5, (32,), eps=1e-6)
    torch.testing.assert_close(model(x, return_layers=True).layers[0], want)


@torch.no_grad()
def test_drop_path_leaves_branches_out_for_whole_sequences_and_more_so_in_later_blocks():
    model = RetNetBackbone(16, 3, 2, drop_path_rate=0.5).train()
    assert [block.drop_path.rate for block in model.blocks] == [0, 0.25, 0.5]
    y = model.blocks[2].drop_path(torch.ones(4000, 3, 2))
    assert set(y.unique().tolist()) == {0, 2}
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(model.eval().blocks[2].drop_path(y), y)


@torch.no_grad()
def test_every_nth_block_has_experts():
    model = RetNetBackbone(16, 4, 2, moe_every=2, moe_num_experts=3)
    assert [type(block.ffn).__name__ for block in model.blocks] == ["FeedForward", "MixtureOfExperts"] * 2
    x, losses = torch.randn(2, 9, 16), []
    for block in model.blocks[1::2]:
        block.ffn.register_forward_hook(lambda module, args, out: losses.append(out[1]))
    torch.testing.assert_close(model(x).aux_loss, torch.stack(losses).mean())


# Options under former names, and the same under today's.
IN_FORMER_WORDS = [
    ({"use_glu": False}, {"gated": False}),
    ({"activation_fn": "relu"}, {"activation": "relu"}),
    ({"layernorm_embedding": True}, {"norm_embedding": True}),
    ({"no_scale_embedding": False}, {"scale_embedding": True}),
    ({"no_scale_embedding": True}, {"scale_embedding": False}),
    ({"moe_freq": 1, "moe_expert_count": 2}, {"moe_every": 1, "moe_num_experts": 2}),
    (
        {"moe_freq": 1, "moe_expert_count": 2, "moe_top1_expert": True},
        {"moe_every": 1, "moe_num_experts": 2, "moe_top_k": 1},
    ),
    (
        {"moe_freq": 1, "moe_expert_count": 2, "moe_top1_expert": False},
        {"moe_every": 1, "moe_num_experts": 2, "moe_top_k": 2},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("make", [RetNetBackbone, RetNet, partial(RetNet.from_preset, "tiny")])
@pytest.mark.parametrize(("former", "new"), IN_FORMER_WORDS, ids=str)
def test_former_names_of_options_work_with_a_warning_that_points_to_the_caller(make, former, new):
    sizes = dict(dim=16, num_layers=1, num_heads=2)
    with pytest.warns(DeprecationWarning, match="will be removed in 0.2") as warned:
        made = make(**sizes, **former)
    wanted = make(**sizes, **new)
    assert {str(w.message) for w in warned} == {
        f"the option {name} is deprecated and will be removed in 0.2; use {FORMER[name]}" for name in former
    }
    assert {w.filename for w in warned} == {__file__}
    wanted.load_state_dict(made.state_dict())
    x = torch.randn(2, 5, 16) if isinstance(made, RetNetBackbone) else torch.randint(256, (2, 5))
    got, expected = made.eval()(x), wanted.eval()(x)
    hidden = (got.hidden, expected.hidden) if isinstance(made, RetNetBackbone) else (got, expected)
    assert torch.equal(*hidden)


@pytest.mark.parametrize("make", [partial(RetNetBackbone, 16, 1, 2), RetNet, partial(RetNet.from_preset, "300m")])
def test_an_option_under_both_its_names_is_an_error(make):
    with pytest.raises(TypeError, match="use_glu is a former name of gated; got both; leave use_glu out"):
        make(use_glu=True, gated=True)
    with pytest.raises(ValueError, match="no_scale_embedding must be True or False; got no_scale_embedding 'no'"):
        make(no_scale_embedding="no")


def test_a_preset_is_changed_by_former_names_too():
    with pytest.warns(DeprecationWarning, match="use gated"):
        model = RetNet.from_preset("300m", use_glu=True, dim=16, num_layers=1, device="meta")
    assert model.backbone.blocks[0].ffn.gate is not None


def test_bad_options_of_the_blocks_are_named():
    for options, message in (
        ({"deepnorm": True, "subln": "rms", "gated": False}, "deepnorm and subln exclude each other"),
        ({"subln": "rms"}, "subln is a norm in feed-forwards without a gate; pass gated=False"),
        ({"subln": 1}, "subln must be one of 'rms', 'layer', True, False; got subln 1"),
        (
            {"moe_every": 2},
            "moe_num_experts must be at least moe_top_k; got moe_every 2, moe_num_experts 0",
        ),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be a number, at least 0 and below 1; got drop_path_rate 1.0"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1; got num_layers 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RetNetBackbone(**{"dim": 16, "num_layers": 2, "num_heads": 2, **options})
