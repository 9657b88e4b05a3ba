"""Feature maps, which make the scores of retention positive like those of a softmax."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from retention.local import local

__all__ = ["FeatureMap"]

_SHARPNESS = 2.5  # factor of the initial identity; with 1 and with 5 the features approach the softmax more slowly
_MOST = 10.0  # of u . x: float16 holds exp(11)


class FeatureMap(nn.Module):
    """A learnable map of each head's q or k to positive features: the softmax of W x and -W x.

    Each head has `num_decays` matrices W, one for each of its decays. The softmax goes over the features of all decays,
    so a token can choose a decay. Each W starts as a multiple of the identity.

    The features of a token have the sum 1, so no key would count more than another, as keys do in a softmax. With
    `importance`, the features of each decay are multiplied by exp(u . x). The vector u is learnt and starts at 0.

    Shapes: x (B, H, T, K) -> (B, H, num_decays, T, 2 K); weight (H, num_decays, K, K); u (H, num_decays, K).
    Args:
        num_heads: heads H of the input.
        num_decays: number of decays of each head.
        key_dim: channels K of one head.
        importance: learn the vectors u; for keys.
        device, dtype: of the weights; default: those of torch.
    Source: Zhang et al. 2024, arXiv:2402.04347 (Hedgehog). Differs: one softmax goes over both signs and all decays,
        W starts larger, and keys have an importance.
    """

    def __init__(
        self,
        num_heads: int,
        num_decays: int,
        key_dim: int,
        *,
        importance: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_heads, num_decays, key_dim, key_dim, **dd))
        self.importance = nn.Parameter(torch.empty(num_heads, num_decays, key_dim, **dd)) if importance else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set each W to its initial multiple of the identity, and each u to 0."""
        self.weight.copy_(_SHARPNESS * torch.eye(self.weight.shape[-1]))
        if self.importance is not None:
            self.importance.zero_()

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """Map factor * x, x (B, H, T, K), to features (B, H, num_decays, T, 2 K)."""
        weight = rearrange(local(self.weight) * factor, "h s k c -> h k (s c)")  # one product
        y = rearrange(x @ weight, "b h t (s k) -> b h t s k", s=self.weight.shape[1])
        y = rearrange(torch.stack([y, -y], dim=-2).flatten(-3).softmax(-1), "b h t (s k) -> b h s t k", s=y.shape[3])
        if self.importance is None:
            return y
        importance = x @ (local(self.importance) * factor).mT  # (B, H, T, num_decays)
        return y * rearrange(importance.clamp(max=_MOST).exp(), "b h t s -> b h s t 1")
