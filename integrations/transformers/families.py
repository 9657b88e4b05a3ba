"""Adapters for the classes of transformers that do not go by its `AttentionInterface`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..swap import Adapter, Heads, full_name, register_adapter, register_recogniser
from .adapters import TransformersAttention
from .compat import apply_rotary_pos_emb
from .hosting import HostedCall, hosted_call, hosted_retention


class AttentionInMethod(TransformersAttention):
    """Adapter for classes whose softmax is in a method, `_attn`, of q, k, v (B, H, T, K) and the mask.

    scale: of the scores, from the size of a head.
    """

    def __init__(self, scale: Callable[[int], float]):
        self.scale = scale

    def forward(self, attention: Any, host_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs, call = hosted_call(args, kwargs)
        return attention.host.forward(_WithMethod(attention, call, self.scale(attention.head_dim)), *args, **kwargs)


class _WithMethod:
    """A layer as it is, but for its method `_attn`, which is retention."""

    def __init__(self, attention: Any, call: HostedCall, scale: float):
        self.attention, self.call, self.scale = attention, call, scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)

    def _attn(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        y, _ = hosted_retention(self.attention, q, k, v, attention_mask, hosted=self.call, scaling=self.scale)
        return y.transpose(1, 2), None


class GPTNeoAttention(AttentionInMethod):
    """Adapter for GPT-Neo. Its local layers look at a window, which is lost. Its scores are not scaled."""

    def __init__(self) -> None:
        super().__init__(lambda head_dim: 1.0)

    def lost(self, attention: Any) -> list[str]:
        local = attention.attention_type == "local"
        return [f"the sliding window of {attention.config.window_size} tokens"] if local else []


class FalconAttention(TransformersAttention):
    """Adapter for Falcon, without alibi."""

    def heads(self, attention: Any) -> Heads:
        size, heads = attention.head_dim, attention.num_heads
        return Heads(attention.hidden_size, heads, attention.num_kv_heads, size, size)

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        return [_ALIBI] if attention.config.alibi else []

    def forward(self, attention: Any, host_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs, call = hosted_call(args, kwargs)
        q, k, v = self._project(attention, call.x, kwargs["position_embeddings"])
        call.update(k, v, attention.layer_idx)
        scale = attention.head_dim**-0.5
        y, _ = hosted_retention(attention, q, k, v, kwargs["attention_mask"], hosted=call, scaling=scale)
        return attention.dense(y.flatten(2)), None

    def _project(self, attention: Any, x: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attention._split_heads(attention.query_key_value(x))
        if attention.new_decoder_architecture:  # which gives each head of q a copy of its k and v
            copies = attention.num_heads // attention.num_kv_heads
            k, v = k[:, :, ::copies], v[:, :, ::copies]
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return *apply_rotary_pos_emb(q, k, *turns), v


class Unsuitable(Adapter):
    """Adapter for classes that retention cannot stand for, to say why."""

    def __init__(self, reason: str):
        self.reason = reason

    def heads(self, attention: Any) -> Heads:
        raise ValueError(self.reason)

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        return [self.reason]


def _gptj(kind: type[nn.Module]) -> Adapter | None:
    """GPT-J's before transformers 5.24; from then on it goes by the interface, and that recogniser is asked first."""
    return _by_head_size if full_name(kind) == "transformers.models.gptj.modeling_gptj.GPTJAttention" else None


_ALIBI = "has alibi, a bias of positions that is added to the scores, which retention has not"
_by_head_size = AttentionInMethod(lambda head_dim: head_dim**-0.5)
register_recogniser(_gptj)
for _family, _class, _adapter in (
    ("bloom", "BloomAttention", Unsuitable(_ALIBI)),
    ("falcon", "FalconAttention", FalconAttention()),
    ("gpt_neo", "GPTNeoSelfAttention", GPTNeoAttention()),
    ("mpt", "MptAttention", Unsuitable(_ALIBI)),
):
    register_adapter(f"transformers.models.{_family}.modeling_{_family}.{_class}", _adapter)
