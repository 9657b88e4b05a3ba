"""Feature maps, which make the scores of retention positive like those of a softmax."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["FeatureMap"]

_SHARPNESS = 2.5  # factor of the initial identity; with 1 and with 5 the features approach the softmax more slowly


class FeatureMap(nn.Module):
    """A learnable map of each head's q or k to positive features: the softmax of W x and -W x.

    Each head has `num_decays` matrices W, one for each of its decays. The softmax goes over the features of all decays,
    so a token can choose a decay. Each W starts as a multiple of the identity.

    Shapes: x (B, H, T, K) -> (B, H, num_decays, T, 2 K); weight (H, num_decays, K, K).
    Args:
        num_heads: heads H of the input.
        num_decays: number of decays of each head.
        key_dim: channels K of one head.
        device, dtype: of the weight; default: those of torch.
    Source: Zhang et al. 2024, arXiv:2402.04347 (Hedgehog). Differs: one softmax goes over both signs and all decays,
        and W starts larger.
    """

    def __init__(self, num_heads: int, num_decays: int, key_dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, num_decays, key_dim, key_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set each W to its initial multiple of the identity."""
        self.weight.copy_(_SHARPNESS * torch.eye(self.weight.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, H, T, K) to features (B, H, num_decays, T, 2 K)."""
        y = x[:, :, None] @ self.weight
        y = rearrange([y, -y], "sign b h s t k -> b h t (s sign k)").softmax(-1)
        return rearrange(y, "b h t (s k) -> b h s t k", s=self.weight.shape[1])
