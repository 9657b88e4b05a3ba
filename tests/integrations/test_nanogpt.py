"""Retention in an attention as nanoGPT has it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retention.integrations.nanogpt import NanoGPTAttention
from retention.integrations.swap import register_adapter, replace_attention, restore_attention


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd=32, n_head=4, dropout=0.1):
        super().__init__()
        self.n_head, self.n_embd = n_head, n_embd
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for z in self.c_attn(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class Other(CausalSelfAttention):
    def __init__(self):
        super().__init__()
        self.mix = self.c_attn
        del self.c_attn, self.n_embd


register_adapter(CausalSelfAttention, NanoGPTAttention())
register_adapter(Other, NanoGPTAttention())


def test_it_is_replaced_calibrated_and_restored():
    torch.manual_seed(0)
    model, x = nn.Sequential(CausalSelfAttention(), CausalSelfAttention()).eval(), torch.randn(2, 9, 32)
    want = model(x)
    report = replace_attention(model, calibrate_on={"input": x})
    assert report.replaced == ["0", "1"]
    y = model(x)
    torch.testing.assert_close(model(x[:, :5]), y[:, :5])  # causal
    first = model[0].retention
    q, k, v = (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in model[0].c_attn(x).chunk(3, -1))
    gathered, _ = first(x, q, k, v, scale=8**-0.5)
    torch.testing.assert_close(model[0](x), model[0].c_proj(gathered.flatten(2)))
    assert not torch.equal(model.train()(x), model(x))  # its own dropout stays
    model.eval()
    restore_attention(model)
    assert torch.equal(model(x), want)


def test_another_attention_is_refused():
    with pytest.raises(ValueError, match="has no c_attn, n_embd, as nanoGPT's attention does"):
        replace_attention(Other())
