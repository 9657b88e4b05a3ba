"""RetNet: the same logits in every form, at every cut, and the sizes of the paper."""

import pytest
import torch

from retention import RetNet, ShapeError
from retention.model import PRESETS

FORMS = ("parallel", "chunkwise", "recurrent")


def make(**options):
    return RetNet(50, 32, 2, 4, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("options", [{}, {"use_glu": False, "norm": "layer", "tie_embeddings": False}], ids=str)
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


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_their_formula_says(name):
    model = RetNet.from_preset(name, device="meta")
    size = PRESETS[name]
    dim, layers, vocab = size["dim"], size["num_layers"], size.get("vocab_size", 256)
    retention = 2 * dim * dim + 2 * dim * 2 * dim + 2 * dim * dim  # q k, v g, out
    gated_width = {128: 176, 256: 352, 512: 688}  # 4/3 dim, rounded up to 16
    ffn = 3 * dim * gated_width[dim] if size.get("use_glu", True) else 2 * dim * 2 * dim
    norms = (2 * layers + 1) * dim * (2 if size.get("norm") == "layer" else 1)
    decays = layers * size["num_heads"] * size["retention"].get("learnable_decay", False)
    assert sum(p.numel() for p in model.parameters()) == vocab * dim + layers * (retention + ffn) + norms + decays


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
    with pytest.raises(ValueError, match="top_k must be at least 1; got top_k 0"):
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
