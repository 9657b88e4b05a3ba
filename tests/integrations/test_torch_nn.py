"""Retention in torch's own attention layers."""

import copy

import pytest
import torch
from torch import nn

from retention.integrations.swap import Swapped, plan_replacement, replace_attention, restore_attention

T = 12
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)
CLOSE = dict(rtol=1e-5, atol=1e-5)


def attention(**options):
    torch.manual_seed(0)
    return nn.MultiheadAttention(32, 4, **{"batch_first": True, **options}).eval()


def formula(layer, x, causal, real=None):
    """x (B, T, dim): scores of features above 0, times the decay of the distance, over their sum."""
    retention = layer.retention
    projected = nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    q, k, v = (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in projected.chunk(3, -1))
    q, k = (torch.cat([z, -z], -1).softmax(-1) for z in (2.5 * q / 8**0.25, 2.5 * k / 8**0.25))
    n = torch.arange(x.shape[1])
    decay = (retention.decay(x.device).view(4, 2, 1, 1) * (n[:, None] - n).abs()).exp().sum(1)
    scores = q @ k.mT * (decay.tril() if causal else decay)
    if real is not None:
        scores = scores * real[:, None, None]
    y = scores / scores.sum(-1, keepdim=True) @ v
    return layer.out_proj(y.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_its_formula_in_both_directions_or_one(bias):
    layer, x = attention(bias=bias), torch.randn(2, T, 32)
    replace_attention(layer)
    y, weights = layer(x, x, x)
    assert weights is None
    torch.testing.assert_close(y, formula(layer, x, causal=False), **CLOSE)
    for mask in ({"is_causal": True, "attn_mask": CAUSAL}, {"attn_mask": CAUSAL}, {"attn_mask": CAUSAL < 0}):
        torch.testing.assert_close(layer(x, x, x, **mask)[0], formula(layer, x, causal=True), **CLOSE)


@torch.no_grad()
def test_every_layout_gives_the_same():
    x = torch.randn(2, T, 32)
    first = attention()
    other = attention(batch_first=False)
    for layer in (first, other):
        replace_attention(layer)
    want = first(x, x, x)[0]
    along = x.transpose(0, 1)
    torch.testing.assert_close(other(along, along, along)[0].transpose(0, 1), want, **CLOSE)
    row = x[0]
    for layer in (first, other):
        torch.testing.assert_close(layer(row, row, row)[0], want[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float])
def test_padding_is_not_seen(dtype):
    layer, x = attention(), torch.randn(2, T, 32)
    replace_attention(layer)
    padding = torch.arange(T) >= torch.tensor([[T], [7]])
    given = padding if dtype == torch.bool else torch.zeros(2, T).masked_fill(padding, -torch.inf)
    y = layer(x, x, x, key_padding_mask=given)[0]
    torch.testing.assert_close(y[~padding], formula(layer, x, False, ~padding)[~padding], **CLOSE)
    row = x[1]
    alone = layer(row, row, row, key_padding_mask=given[1])[0]
    torch.testing.assert_close(y[1, :7], alone[:7], **CLOSE)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("grad", [True, False])  # without, torch has a fast path of its own, around the layer
def test_an_encoder_runs_retention_on_each_of_its_paths(grad):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, padding = torch.randn(2, T, 32), torch.arange(T) >= torch.tensor([[T], [7]])
    before = encoder(x), encoder(x, src_key_padding_mask=padding)
    replace_attention(encoder)
    replace_attention(encoder)
    with torch.set_grad_enabled(grad):
        plain, padded = encoder(x), encoder(x, src_key_padding_mask=padding)
        causal = encoder(x, CAUSAL, is_causal=True)
    by_hand = x
    for layer in encoder.layers:
        by_hand = layer.norm1(by_hand + formula(layer.self_attn, by_hand, False))
        by_hand = layer.norm2(by_hand + layer._ff_block(by_hand))
    torch.testing.assert_close(plain, by_hand, **CLOSE)
    torch.testing.assert_close(padded[1, :7], encoder(x[1:, :7])[0], **CLOSE)
    torch.testing.assert_close(causal[:, :5], encoder(x[:, :5], CAUSAL[:5, :5], is_causal=True), **CLOSE)
    restore_attention(encoder)
    assert torch.equal(encoder(x), before[0])
    assert torch.equal(encoder(x, src_key_padding_mask=padding), before[1])
    assert encoder.use_nested_tensor


def test_a_decoder_keeps_its_cross_attention():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2).eval()
    with pytest.raises(ValueError, match=r"layers.0.multihead_attn: is cross-attention"):
        replace_attention(decoder)
    own = lambda name, module: name.endswith("self_attn")  # noqa: E731
    assert replace_attention(decoder, where=own).replaced == ["layers.0.self_attn", "layers.1.self_attn"]
    x, memory = torch.randn(2, T, 32), torch.randn(2, 5, 32)
    y = decoder(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True)
    shorter = decoder(x[:, :5], memory, tgt_mask=CAUSAL[:5, :5], tgt_is_causal=True)
    torch.testing.assert_close(y[:, :5], shorter, **CLOSE)
    assert not torch.allclose(y, decoder(x, memory.flip(0), tgt_mask=CAUSAL, tgt_is_causal=True), atol=1e-3)


def test_what_cannot_be_is_refused():
    assert plan_replacement(attention()).replaced == [""]
    with pytest.raises(ValueError, match="is cross-attention"):
        replace_attention(attention(kdim=16))
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(ValueError, match="adds a key of its own"):
            replace_attention(attention(**{option: True}))
    layer, x = attention(), torch.randn(2, T, 32)
    replace_attention(layer)
    with pytest.raises(ValueError, match="key and value must be the query itself"):
        layer(x, x.clone(), x)
    with pytest.raises(ValueError, match="attn_mask must be the causal mask"):
        layer(x, x, x, attn_mask=torch.eye(T, dtype=torch.bool))


def test_every_parameter_learns_and_fresh_ones_are_new():
    layer, x = attention(), torch.randn(2, T, 32)
    weights = copy.deepcopy(layer.state_dict())
    replace_attention(layer, init="fresh", gate="silu")
    assert isinstance(layer, Swapped)
    assert not torch.equal(layer.in_proj_weight, weights["in_proj_weight"])
    assert not torch.equal(layer.out_proj.weight, weights["out_proj.weight"])
    layer(x, x, x)[0].square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
