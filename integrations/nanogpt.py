"""Retention in the attention of nanoGPT and of the many copies of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .swap import Adapter, Heads

__all__ = ["NanoGPTAttention"]


class NanoGPTAttention(Adapter):
    """Adapter for causal attention with `c_attn` for q, k and v, `c_proj`, `n_head` and `n_embd`; forward(x) -> y.

    Register it for the class in your own code. Dropout of the attention weights has no counterpart; `resid_dropout`
    stays.

    Example:
        register_adapter(CausalSelfAttention, NanoGPTAttention())
        replace_attention(model)
    """

    def heads(self, attention: Any) -> Heads:
        """Return the sizes of the heads, from n_head and n_embd."""
        heads, size = attention.n_head, attention.n_embd // attention.n_head
        return Heads(attention.n_embd, heads, heads, size, size)

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        """Refuse layers that lack one of nanoGPT's attributes."""
        missing = [name for name in ("c_attn", "c_proj", "n_head", "n_embd") if not hasattr(attention, name)]
        return [f"has no {', '.join(missing)}, as nanoGPT's attention does"] if missing else []

    def forward(self, attention: Any, host_forward: Callable[..., Any], x: Tensor) -> Tensor:
        """Map x (B, T, n_embd) to the same shape."""
        q, k, v = (
            z.unflatten(-1, (attention.n_head, -1)).transpose(1, 2) for z in attention.c_attn(x).chunk(3, dim=-1)
        )
        y, _ = attention.retention(x, q, k, v, scale=q.shape[-1] ** -0.5)
        y = attention.c_proj(y.flatten(2))
        return attention.resid_dropout(y) if hasattr(attention, "resid_dropout") else y
