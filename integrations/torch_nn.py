"""Retention in torch's `nn.MultiheadAttention`, and so in `nn.TransformerEncoder` and its layers.

Example:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), num_layers=2)
    replace_attention(encoder)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retention.errors import ShapeError
from retention.options import shown

from .swap import Adapter, Heads, register_adapter, replaced_by

__all__ = ["MultiheadAttention"]


class MultiheadAttention(Adapter):
    """Adapter for `nn.MultiheadAttention` as self-attention.

    A call is causal if `is_causal` is set or `attn_mask` is the causal mask, else bidirectional; any other `attn_mask`
    is an error. There are no attention weights: with `need_weights`, None is returned in their place.
    """

    def heads(self, attention: Any) -> Heads:
        """Return the sizes of the heads, from the layer's attributes."""
        size = attention.head_dim
        return Heads(attention.embed_dim, attention.num_heads, attention.num_heads, size, size)

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        """Refuse cross-attention, and layers with an extra key (add_bias_kv or add_zero_attn)."""
        reasons = []
        layers = (module for module in model.modules() if isinstance(module, nn.TransformerDecoderLayer))
        crossing = any(layer.multihead_attn is attention for layer in layers)
        if crossing or not attention._qkv_same_embed_dim:
            reasons.append("is cross-attention, and decay needs an order between queries and keys")
        if attention.bias_k is not None or attention.add_zero_attn:
            reasons.append("adds a key of its own (add_bias_kv or add_zero_attn), which has no place in the order")
        return reasons

    def reset(self, attention: Any, model: nn.Module) -> None:
        """Draw new weights as torch's layer does."""
        attention.out_proj.reset_parameters()
        attention._reset_parameters()

    def forward(
        self,
        attention: Any,
        host_forward: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Run the layer's projections around retention; arguments as in `nn.MultiheadAttention.forward`.

        Shapes: query (B, T, dim) with batch_first, else (T, B, dim), or (T, dim); key_padding_mask (B, T), True or -inf
            = padding. Returns the shape of query, and None.
        Raises: ValueError for cross-attention or an attn_mask that is not causal; TypeError or ShapeError for a wrong
            input.
        """
        if query is not key or key is not value:
            raise ValueError(
                "key and value must be the query itself, as retention is in its order; got cross-attention"
            )
        if query.is_nested:
            raise ShapeError("nested tensors are not supported; call replace_attention on the whole encoder")
        if query.dim() not in (2, 3) or query.shape[-1] != attention.embed_dim:
            want = f"(batch, length, {attention.embed_dim}) in the order of batch_first, or without a batch"
            raise ShapeError(f"query must be {want}; got query {tuple(query.shape)}")
        x = query if query.dim() == 3 else query[None]
        if query.dim() == 3 and not attention.batch_first:
            x = x.transpose(0, 1)
        mask = None if key_padding_mask is None else _real("key_padding_mask", key_padding_mask)
        if mask is not None and mask.shape not in (x.shape[:2], *([x.shape[1:2]] if query.dim() == 2 else [])):
            raise ShapeError(f"key_padding_mask must be {tuple(x.shape[:2])}; got key_padding_mask {tuple(mask.shape)}")
        mask = None if mask is None else mask.view(x.shape[:2])
        causal = is_causal or _is_causal(attn_mask, x.shape[1])
        projected = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (z.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for z in projected.chunk(3, dim=-1))
        y, _ = attention.retention(x, q, k, v, scale=attention.head_dim**-0.5, causal=causal, mask=mask)
        y = attention.out_proj(y.flatten(2))
        if query.dim() == 2:
            return y[0], None
        return (y if attention.batch_first else y.transpose(0, 1)), None

    def attach(self, model: Any) -> None:
        """Turn off torch's fast paths around the replaced layers, which do not call them."""
        # Without gradients, nn.TransformerEncoder and its layers would else compute attention in a fused function.
        for attention in replaced_by(self, model).values():
            attention._qkv_same_embed_dim = False
        for module in model.modules():
            if getattr(module, "use_nested_tensor", False) and replaced_by(self, module):
                module.use_nested_tensor = None  # false, and `detach` sees that it was True

    def detach(self, model: Any) -> None:
        """Turn torch's fast paths on again."""
        for attention in replaced_by(self, model).values():
            attention._qkv_same_embed_dim = True
        for module in model.modules():
            if getattr(module, "use_nested_tensor", False) is None:
                module.use_nested_tensor = True


def _real(name: str, mask: Tensor) -> Tensor:
    """Return True where a token is real; torch's masks are True or -inf where it is not. Raises: TypeError."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(f"{name} must be a tensor of bool or a floating dtype, as torch takes it; got {shown(mask)}")
    return ~mask if mask.dtype == torch.bool else mask == 0


def _is_causal(attn_mask: Tensor | None, length: int) -> bool:
    """Tell whether a mask is causal. Raises: ValueError for a mask that is neither causal nor empty."""
    if attn_mask is None:
        return False
    seen = _real("attn_mask", attn_mask)
    if seen.dim() not in (2, 3) or seen.shape[-2:] != (length, length):
        raise ShapeError(f"attn_mask must be (length, length) ({length}, {length}); got attn_mask {tuple(seen.shape)}")
    if seen.all():
        return False
    if not torch.equal(seen.expand(*seen.shape[:-2], length, length), torch.ones_like(seen).tril()):
        raise ValueError(
            "attn_mask must be the causal mask or leave all open; retention sees what comes before, by decay"
        )
    return True


register_adapter(nn.MultiheadAttention, MultiheadAttention())
