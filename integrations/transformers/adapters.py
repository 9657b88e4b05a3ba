"""Retention in the attention layers of transformers' models.

Their classes differ in projections, norms, rotation and names, and are alike in one thing: they hand q, k and v to a
function that `config._attn_implementation` names. A replaced layer has a config of its own, which names ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from retention.errors import ShapeError

from ..swap import Adapter, Heads, register_adapter, replaced_by
from .cache import retention_layer
from .compat import swap_cache, versions
from .marks import update_marks

IMPLEMENTATION = "hosted_retention"


class TransformersAttention(Adapter):
    """Adapter for any attention class of transformers that goes by its `AttentionInterface`."""

    def heads(self, attention: Any) -> Heads:
        config = attention.config
        sizes = (getattr(attention, name, None) for name in ("head_dim", "head_size", "attention_head_size"))
        key_dim = next(size for size in sizes if size)
        num_heads = config.num_attention_heads
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        return Heads(config.hidden_size, num_heads, num_kv_heads, key_dim, key_dim)

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        if getattr(attention, "is_cross_attention", False):
            return ["is cross-attention, and decay needs an order between queries and keys"]
        return []

    def lost(self, attention: Any) -> list[str]:
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        cap = getattr(attention, "attn_logit_softcapping", None)
        lost = [f"the sliding window of {window} tokens"] if window else []
        return [*lost, f"the soft cap of {cap}"] if cap else lost

    def both_ways(self, attention: Any) -> bool:
        return not attention.is_causal

    def reset(self, attention: Any, model: nn.Module) -> None:
        owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if owner is None:
            raise ValueError(f'init="fresh" needs a PreTrainedModel, which knows how; got {type(model).__name__}')
        for module in attention.modules():
            owner._init_weights(module)

    def forward(self, attention: Any, host_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs, cache = swap_cache(args, kwargs, _PassThrough())
        x = args[0] if args else kwargs["hidden_states"]
        return host_forward(*args, **kwargs, hosted=(x, cache))

    def attach(self, model: nn.Module) -> None:
        replaced = replaced_by(self, model).values()
        for attention in replaced:
            if not hasattr(attention, "host_config"):
                attention.host_config, attention.config = attention.config, copy.copy(attention.config)
                attention.config._attn_implementation_internal = IMPLEMENTATION
        update_marks(model)

    def detach(self, model: nn.Module) -> None:
        for attention in replaced_by(self, model).values():
            attention.config = attention.host_config
            del attention.host_config
        update_marks(model)


def hosted_retention(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    hosted: tuple[Tensor, Cache | None],
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in the place of the softmax. hosted: the layer's input and the cache. -> (B, T, H, V)."""
    x, cache = hosted
    if k.shape[2] != x.shape[1]:
        raise ShapeError(
            f"{type(attention).__name__} must hand on the keys of its {x.shape[1]} tokens; got {k.shape[2]}, "
            f"so it keeps them in a cache that was not found among its arguments ({versions()})"
        )
    layer = None if cache is None else retention_layer(cache, attention.layer_idx)
    state = None if layer is None else layer.state
    columns = None if layer is None else layer.columns
    mask = None if attention_mask is None else real_tokens(attention_mask, x, columns)
    borders = borders_of(attention_mask, mask, x) if state is None else None
    y, after = attention.retention(
        *as_one_row(borders, x, q, k, v),
        scale=scaling,
        causal=attention.is_causal,
        mask=mask if borders is None else None,
        cu_seqlens=borders,
        state=state,
        return_state=layer is not None and borders is None,
    )
    if layer is not None and after is not None:
        layer.store(after, x.shape[1])
    return y.view(*x.shape[:2], *y.shape[2:]), None


def real_tokens(attention_mask: Tensor, x: Tensor, columns: Tensor | None) -> Tensor:
    """Which tokens of x are real, (B, T): those that may look at themselves.

    attention_mask: (B, T), or (B, 1, T, keys), bool or added to the scores. columns: how many tokens the cache saw.
    """
    length = x.shape[1]
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool()
    if attention_mask.dim() != 4:
        raise ShapeError(f"attention_mask must have 2 or 4 dimensions; got {tuple(attention_mask.shape)}")
    own = torch.arange(length, device=x.device)
    if columns is not None:  # a window's mask holds fewer keys than were seen
        own = own + columns.clamp(max=attention_mask.shape[-1] - length)
    return _allowed(attention_mask, own).expand(x.shape[0], -1)


def borders_of(attention_mask: Tensor | None, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Of packed sequences, (N + 1,) int32: where a real token may not look at the real one before it."""
    length = x.shape[1]
    if (
        attention_mask is None
        or mask is None
        or attention_mask.dim() != 4
        or length < 2
        or torch.compiler.is_compiling()
    ):
        return None
    before = _allowed(attention_mask, torch.arange(length, device=x.device).sub(1).clamp(min=0)).expand(x.shape[0], -1)
    starts = mask & mask.roll(1, dims=1) & ~before
    starts[:, 0] = False
    if not starts.any():
        return None
    if not mask.all():
        raise ValueError("a batch may have padding or packed sequences; got both; pack without padding")
    starts[:, 0] = True
    ends = starts.flatten().nonzero()[:, 0]
    return torch.cat([ends, ends.new_tensor([starts.numel()])]).int()


def _allowed(attention_mask: Tensor, keys: Tensor) -> Tensor:
    """Whether each query may look at the key that `keys` (T,) names for it, (B, T)."""
    seen = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0
    return seen.gather(-1, keys[None, :, None].expand(seen.shape[0], -1, 1))[..., 0]


def as_one_row(borders: Tensor | None, x: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
    """x (B, T, dim) and heads (B, H, T, D) as a batch of one, if they are packed."""
    if borders is None:
        return x, *heads
    return x.flatten(0, 1)[None], *(z.transpose(0, 1).flatten(1, 2)[None] for z in heads)


class _PassThrough:
    """In the place of a cache: a layer's own keys and values are all that its retention needs."""

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return k, v


AttentionInterface.register(IMPLEMENTATION, hosted_retention)
_adapter = TransformersAttention()
for _family, _class in {
    "bert": "BertSelfAttention",
    "gemma": "GemmaAttention",
    "gemma2": "Gemma2Attention",
    "gemma3": "Gemma3Attention",
    "gpt2": "GPT2Attention",
    "gpt_neox": "GPTNeoXAttention",
    "llama": "LlamaAttention",
    "mistral": "MistralAttention",
    "mixtral": "MixtralAttention",
    "opt": "OPTAttention",
    "phi": "PhiAttention",
    "qwen2": "Qwen2Attention",
    "qwen3": "Qwen3Attention",
}.items():
    register_adapter(f"transformers.models.{_family}.modeling_{_family}.{_class}", _adapter)
