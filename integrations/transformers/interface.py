"""Attention implementations by name: `model.set_attn_implementation("retention")`, or "xformers"."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from retention.backends.xformers import attention as xformers_attention
from retention.decay import check_decay
from retention.options import check_is

from ..swap import Heads, HostedRetention
from .compat import AttentionMaskInterface, sdpa_mask
from .masks import as_one_row, borders_of, real_tokens


def register_attn_implementation(name: str = "retention", *, decay: Any = "short") -> None:
    """Let `model.set_attn_implementation(name)` put retention into all layers of a model of transformers.

    For a quick look. It is what `replace_attention` gives before training, and has no parameters: features, gain and
    decays stay as they are.
    The model keeps all its keys and values and goes through them again for each new token; a sliding window, a static
    cache and assisted generation are no good with it. `replace_attention` has none of these limits but the last.

    decay: as `MultiScaleRetention`. Raises: ValueError if it is none.
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
        q = F.pad(q, (0, 0, before, 0))  # what was asked before does not matter for what is asked now
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

    For what stays attention: in a model with replaced layers it is the others that change. A call that xformers has no
    operator for runs on `scaled_dot_product_attention`; `attention_ran` says which it was. Masks are those of "sdpa".
    Raises: BackendError, from its cause, if xformers is missing or does not work.
    """
    check_is("name", name, str, "a string")
    xformers_attention.check("cpu")
    AttentionInterface.register(name, attend_by_name)
    AttentionMaskInterface.register(name, sdpa_mask)


def attend_by_name(
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
    """What transformers calls: q (B, H, T, K), k, v (B, Hkv, S, K) -> (B, T, H, K). Notes what ran in `attention`."""
    wanted = [name for name in ("softcap", "position_bias", "s_aux", "cache") if others.get(name) is not None]
    if wanted:
        raise ValueError(f"this attention has no {', '.join(wanted)}; got them; use the implementation 'eager'")
    causal = getattr(attention, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and q.shape[2] > 1
    if causal:  # without a mask the queries are the first tokens, and further keys are places of a static cache
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    out, attention.ran = xformers_attention.attend(
        q, k, v, causal=causal, scale=scaling, mask=attention_mask, dropout=dropout
    )
    return out.transpose(1, 2).contiguous(), None


def attention_ran(model: nn.Module) -> dict[str, str]:
    """What ran the last call of each attention layer under `register_xformers_attention`: "sdpa", or "xformers ..."."""
    check_is("model", model, nn.Module, "an nn.Module")
    return {name: module.ran for name, module in model.named_modules() if isinstance(getattr(module, "ran", None), str)}


def _real_keys(attention_mask: Tensor | None, x: Tensor, before: int) -> Tensor | None:
    """Which of the keys are real, (B, T). before: how many of them came before the queries."""
    if attention_mask is None or before == 0:
        return None if attention_mask is None else real_tokens(attention_mask, x, None)
    last = attention_mask[:, 0, -1]
    mask = (last if last.dtype == torch.bool else last == 0).expand(x.shape[0], -1)
    if not mask[:, -1].all():
        raise ValueError("the last key must be that of the last token; use no static cache, or replace_attention")
    return mask
