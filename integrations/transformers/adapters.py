"""Retention in the attention layers of transformers' models.

They hand q, k and v to a function that `config._attn_implementation` names. A replaced layer has a config of its own,
which names ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from ..swap import Adapter, Heads, register_recogniser, replaced_by
from .hosting import hosted_call, hosted_retention
from .marks import update_marks
from .recognise import (
    UnreadableError,
    added_to_scores,
    cap_of,
    doubts_of_class,
    doubts_of_layer,
    goes_by_interface,
    is_cross_attention,
    odd_layer_type,
    read_heads,
    shares_keys,
    window_of,
)

IMPLEMENTATION = "hosted_retention"


class TransformersAttention(Adapter):
    """Adapter for an attention class of transformers that goes by its `AttentionInterface`.

    Classes that do are recognised, and refused where they do something that is not known to be harmless.
    `register_adapter(CLASS, TransformersAttention())` is for one of them of which you know that it is: that q, k and v
    come from the layer's own input, one for each of its tokens, and that nothing but the softmax stands between them
    and the output. Images are taken as sequences, along their rows.
    """

    def heads(self, attention: Any) -> Heads:
        return read_heads(attention)

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        reasons = [f"has {what}, which retention has not" for what in added_to_scores(attention)]
        if is_cross_attention(attention, model):
            reasons.append("is cross-attention, and decay needs an order between queries and keys")
        if kind := odd_layer_type(attention):
            reasons.append(f"is of the type {kind!r} in the layers of its config, for which retention cannot stand")
        if shares_keys(attention):
            reasons.append("shares its keys and values with other layers")
        try:
            self.heads(attention)
        except UnreadableError as error:
            reasons.append(str(error))
        return reasons

    def lost(self, attention: Any) -> list[str]:
        window, cap = window_of(attention), cap_of(attention)
        lost = [f"the sliding window of {window} tokens"] if window else []
        return [*lost, f"the soft cap of {cap}"] if cap else lost

    def both_ways(self, attention: Any) -> bool:
        return not getattr(attention, "is_causal", True)

    def reset(self, attention: Any, model: nn.Module) -> None:
        owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if owner is None:
            raise ValueError(f'init="fresh" needs a PreTrainedModel, which knows how; got {type(model).__name__}')
        for module in attention.modules():
            owner._init_weights(module)

    def forward(self, attention: Any, host_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs, call = hosted_call(args, kwargs)
        return host_forward(*args, **kwargs, hosted=call)

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


class RecognisedAttention(TransformersAttention):
    """Adapter for classes that nobody has registered: what is not known of them counts against them."""

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        kind = type(attention)
        doubts = [*doubts_of_class(kind), *doubts_of_layer(attention)]
        hint = f"if it is harmless, register_adapter({kind.__name__}, TransformersAttention()) says so"
        return [*super().why_not(attention, model), *doubts, *([hint] if doubts else [])]


AttentionInterface.register(IMPLEMENTATION, hosted_retention)
_recognised = RecognisedAttention()
register_recogniser(lambda kind: _recognised if goes_by_interface(kind) else None)
