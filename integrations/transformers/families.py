"""Adapters for the attention classes of transformers that do not use its `AttentionInterface`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..swap import Adapter, Heads, full_name, register_adapter, register_recogniser
from .adapters import TransformersAttention
from .compat import apply_rotary_pos_emb
from .hosting import HostedCall, hosted_call, hosted_retention

__all__ = ["FalconAttention"]


class _AttentionInMethod(TransformersAttention):
    """Adapter for classes that compute the softmax in a method `_attn(q, k, v, attention_mask)`.

    Shapes: q, k, v of `_attn` are (B, H, T, K).
    Args:
        scale: computes the factor of q . k from the channels of a head.
    """

    def __init__(self, scale: Callable[[int], float]):
        self.scale = scale

    def forward(self, attention: Any, host_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward with retention in place of its method `_attn`."""
        args, kwargs, call = hosted_call(args, kwargs)
        return attention.host.forward(_WithMethod(attention, call, self.scale(attention.head_dim)), *args, **kwargs)


class _WithMethod:
    """Proxy of a layer whose method `_attn` computes retention."""

    def __init__(self, attention: Any, call: HostedCall, scale: float):
        self.attention, self.call, self.scale = attention, call, scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)

    def _attn(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        y, _ = hosted_retention(self.attention, q, k, v, attention_mask, hosted=self.call, scaling=self.scale)
        return y.transpose(1, 2), None


class _GPTNeoAttention(_AttentionInMethod):
    """Adapter for GPT-Neo, whose scores are not scaled. The sliding window of its local layers is lost."""

    def __init__(self) -> None:
        super().__init__(lambda head_dim: 1.0)

    def lost(self, attention: Any) -> list[str]:
        """List the sliding window of a local layer."""
        local = attention.attention_type == "local"
        return [f"the sliding window of {attention.config.window_size} tokens"] if local else []


class FalconAttention(TransformersAttention):
    """Adapter for Falcon without alibi."""

    def heads(self, attention: Any) -> Heads:
        """Return the sizes of the heads, from the layer's attributes."""
        size, heads = attention.head_dim, attention.num_heads
        return Heads(attention.hidden_size, heads, attention.num_kv_heads, size, size)

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        """Refuse layers with alibi."""
        return [_ALIBI] if attention.config.alibi else []

    def forward(self, attention: Any, host_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run Falcon's projections and rotation around retention."""
        args, kwargs, call = hosted_call(args, kwargs)
        q, k, v = self._project(attention, call.x, kwargs["position_embeddings"])
        call.update(k, v, attention.layer_idx)
        scale = attention.head_dim**-0.5
        y, _ = hosted_retention(attention, q, k, v, kwargs["attention_mask"], hosted=call, scaling=scale)
        return attention.dense(y.flatten(2)), None

    def _project(self, attention: Any, x: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attention._split_heads(attention.query_key_value(x))
        if attention.new_decoder_architecture:  # which repeats k and v for each query head
            copies = attention.num_heads // attention.num_kv_heads
            k, v = k[:, :, ::copies], v[:, :, ::copies]
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return *apply_rotary_pos_emb(q, k, *turns), v


class _Unsuitable(Adapter):
    """Adapter that refuses every layer of a class.

    Args:
        reason: why retention cannot replace the attention, for the error message.
    """

    def __init__(self, reason: str):
        self.reason = reason

    def heads(self, attention: Any) -> Heads:
        """Raises: ValueError with the reason."""
        raise ValueError(self.reason)

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        """Return the reason."""
        return [self.reason]


def _gptj(kind: type[nn.Module]) -> Adapter | None:
    """GPT-J before transformers 5.24; later releases use the interface, whose recogniser is asked first."""
    return _by_head_size if full_name(kind) == "transformers.models.gptj.modeling_gptj.GPTJAttention" else None


_ALIBI = "has alibi, a bias of positions that is added to the scores, which retention has not"
_by_head_size = _AttentionInMethod(lambda head_dim: head_dim**-0.5)
register_recogniser(_gptj)
for _family, _class, _adapter in (
    ("bloom", "BloomAttention", _Unsuitable(_ALIBI)),
    ("falcon", "FalconAttention", FalconAttention()),
    ("gpt_neo", "GPTNeoSelfAttention", _GPTNeoAttention()),
    ("mpt", "MptAttention", _Unsuitable(_ALIBI)),
):
    register_adapter(f"transformers.models.{_family}.modeling_{_family}.{_class}", _adapter)
