"""Retention in the attention of nanoGPT, and of the many models that have a copy of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .swap import Adapter, Heads


class NanoGPTAttention(Adapter):
    """Adapter for a causal attention with a fused `c_attn`, a `c_proj`, `n_head` and `n_embd`; forward(x) -> y.

    Such a class stands in a file of yours, so say which it is: `register_adapter(CausalSelfAttention,
    NanoGPTAttention())`. Dropout of the weights has no counterpart; `resid_dropout` stays.
    """

    def heads(self, attention: Any) -> Heads:
        heads, size = attention.n_head, attention.n_embd // attention.n_head
        return Heads(attention.n_embd, heads, heads, size, size)

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        missing = [name for name in ("c_attn", "c_proj", "n_head", "n_embd") if not hasattr(attention, name)]
        return [f"has no {', '.join(missing)}, as nanoGPT's attention does"] if missing else []

    def forward(self, attention: Any, host_forward: Callable[..., Any], x: Tensor) -> Tensor:
        q, k, v = (
            z.unflatten(-1, (attention.n_head, -1)).transpose(1, 2) for z in attention.c_attn(x).chunk(3, dim=-1)
        )
        y, _ = attention.retention(x, q, k, v, scale=q.shape[-1] ** -0.5)
        y = attention.c_proj(y.flatten(2))
        return attention.resid_dropout(y) if hasattr(attention, "resid_dropout") else y
