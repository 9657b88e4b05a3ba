"""Attention implementations for `model.set_attn_implementation`: "retention" and "xformers"."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from retention.decay import check_decay
from retention.options import check_is
from retention.xformers import attention as xformers_attention

from ..swap import Heads, HostedRetention
from .compat import AttentionMaskInterface, sdpa_mask
from .masks import as_one_row, borders_of, real_tokens

__all__ = ["attention_ran", "register_attn_implementation", "register_xformers_attention"]


def register_attn_implementation(name: str = "retention", *, decay: Any = "short") -> None:
    """Let `model.set_attn_implementation(name)` compute retention in all attention layers of a transformers model.

    This is meant for quick experiments. The result is that of `replace_attention` before training, without a gate;
    feature maps, gain and decays are fixed, and no parameters are added. The model keeps all keys and values and runs
    over all of them for each new token. Sliding windows, static caches and assisted generation are not supported; with
    `replace_attention`, only assisted generation is not.

    Args:
        name: the name of the implementation. Default "retention".
        decay: as in `MultiScaleRetention`. Default "short".
    Raises: TypeError or ValueError for a wrong name or decay.
    Example:
        register_attn_implementation()
        model.set_attn_implementation("retention")
    """
    check_is("name", name, str, "a string")
    check_decay(decay)

    @cache
    def retention_for(heads: Heads, device: torch.device, dtype: torch.dtype) -> HostedRetention:
        made = HostedRetention(heads, decay=decay, learnable_decay=False, gate=None, device=device, dtype=dtype)
        return made.requires_grad_(False)

    def retain_by_name(
        attention: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if sliding_window is not None:
            raise ValueError(f"retention has no sliding window; got one of {sliding_window} tokens; pass None")
        heads = Heads(q.shape[1] * q.shape[3], q.shape[1], k.shape[1], q.shape[3], v.shape[3])
        before = k.shape[2] - q.shape[2]
        q = F.pad(q, (0, 0, before, 0))  # earlier queries do not affect later outputs, so zeros stand for them
        x = q[:, 0]
        mask = _real_keys(attention_mask, x, before)
        borders = None if before else borders_of(attention_mask, mask, x)
        y, _ = retention_for(heads, q.device, q.dtype)(
            *as_one_row(borders, x, q, k, v),
            scale=scaling,
            causal=attention.is_causal,
            mask=mask if borders is None else None,
            cu_seqlens=borders,
        )
        return y.view(q.shape[0], q.shape[2], *y.shape[2:])[:, before:], None

    AttentionInterface.register(name, retain_by_name)
    AttentionMaskInterface.register(name, sdpa_mask)


def register_xformers_attention(name: str = "xformers") -> None:
    """Let `model.set_attn_implementation(name)` run softmax attention on xformers' `memory_efficient_attention`.

    In a model with replaced layers, it changes the layers that still compute attention. A call for which xformers has
    no operator runs on torch's `scaled_dot_product_attention`; `attention_ran` tells which one ran. Masks are those of
    "sdpa".

    Args:
        name: the name of the implementation. Default "xformers".
    Raises: BackendError, with its cause, if xformers is missing or does not work; TypeError if `name` is not a string.
    Example:
        register_xformers_attention()
        model.set_attn_implementation("xformers")
    """
    check_is("name", name, str, "a string")
    xformers_attention.check("cpu")
    AttentionInterface.register(name, _attend_by_name)
    AttentionMaskInterface.register(name, sdpa_mask)


def _attend_by_name(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute softmax attention on xformers or torch; transformers calls it as its attention function.

    The operator that ran is stored in `attention.ran`.

    Shapes: q (B, H, T, K); k, v (B, Hkv, S, K). Returns (B, T, H, K), and None for the attention weights.
    Raises: ValueError for a soft cap, a position bias, attention sinks or a cache.
    """
    wanted = [name for name in ("softcap", "position_bias", "s_aux", "cache") if others.get(name) is not None]
    if wanted:
        raise ValueError(f"this attention has no {', '.join(wanted)}; got them; use the implementation 'eager'")
    causal = getattr(attention, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and q.shape[2] > 1
    if causal:  # without a mask the queries are the first tokens, and later keys are free slots of a static cache
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    out, attention.ran = xformers_attention.attend(
        q, k, v, causal=causal, scale=scaling, mask=attention_mask, dropout=dropout
    )
    return out.transpose(1, 2).contiguous(), None


def attention_ran(model: nn.Module) -> dict[str, str]:
    """Return the operator that ran the last call of each layer under `register_xformers_attention`, by layer name.

    The operator is "sdpa", or "xformers" with the name of its operator.
    Raises: TypeError if `model` is not a module.
    """
    check_is("model", model, nn.Module, "an nn.Module")
    return {name: module.ran for name, module in model.named_modules() if isinstance(getattr(module, "ran", None), str)}


def _real_keys(attention_mask: Tensor | None, x: Tensor, before: int) -> Tensor | None:
    """Return which keys are real, (B, T); `before` is the number of keys before the first query."""
    if attention_mask is None or before == 0:
        return None if attention_mask is None else real_tokens(attention_mask, x, None)
    last = attention_mask[:, 0, -1]
    mask = (last if last.dtype == torch.bool else last == 0).expand(x.shape[0], -1)
    if not mask[:, -1].all():
        raise ValueError("the last key must be that of the last token; use no static cache, or replace_attention")
    return mask
