"""Feature maps: what makes the scores of retention positive, as those of a softmax are."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

_SHARPNESS = 2.5  # of the first features; 1 and 5 learn the softmax more slowly


class FeatureMap(nn.Module):
    """A learnable map of each head's q or k to features above 0: softmax of W x and -W x.

    Each of the `scales` of a head, which differ in decay, has a W; the softmax goes over all of them, so that a token
    chooses how far it looks. W starts as a multiple of the identity.

    Source: Zhang et al. 2024, arXiv:2402.04347 (Hedgehog). Differs: one softmax, over both signs and all scales; a
    sharper start.
    """

    def __init__(self, num_heads: int, scales: int, key_dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, scales, key_dim, key_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(_SHARPNESS * torch.eye(self.weight.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, T, K) -> (B, H, scales, T, 2 K)."""
        y = x[:, :, None] @ self.weight
        y = rearrange([y, -y], "sign b h s t k -> b h t (s sign k)").softmax(-1)
        return rearrange(y, "b h t (s k) -> b h s t k", s=self.weight.shape[1])
