"""Softmax attention with rotary positions, the layer and the model that retention is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retention.ffn import FeedForward
from retention.rotary import frequencies, rotate, rotation, rotation_table


class Attention(nn.Module):
    """Causal attention; `step` decodes with a cache of all keys and values, whose memory is allocated beforehand."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.freqs = frequencies("rope", dim // num_heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x, rotation_table(x.shape[1], self.freqs, x.device, x.dtype))
        return self._output(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def step(self, x: Tensor, cache: Tensor, position: int) -> Tensor:
        """Decode one token.

        Args:
            x: (B, 1, dim), the token.
            cache: (2, B, heads, length, head_dim), the keys and values of all tokens; the token writes its own.
            position: the index of the token.
        """
        q, k, v = self._project(x, rotation(torch.tensor([position], device=x.device), self.freqs, x.dtype))
        cache[0, :, :, position], cache[1, :, :, position] = k[:, :, 0], v[:, :, 0]
        return self._output(F.scaled_dot_product_attention(q, *cache[:, :, :, : position + 1]))

    def _project(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        return rotate(q, turns), rotate(k, turns), v

    def _output(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """RetNet with attention in each block, and a wider feed-forward, so that both have as many parameters."""

    def __init__(self, vocab_size: int, dim: int, num_layers: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.RMSNorm(dim),
                    Attention(dim, num_heads),
                    nn.RMSNorm(dim),
                    FeedForward(dim, ffn_dim, gated=True, dropout=0.0),
                ]
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, attention, ffn_norm, ffn in self.blocks:
            x = x + attention(norm(x))
            x = x + ffn(ffn_norm(x))
        return F.linear(self.norm(x), self.embedding.weight)
