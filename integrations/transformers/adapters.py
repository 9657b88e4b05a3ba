"""Adapters for the attention layers of transformers' models.

These layers pass q, k and v to the attention function that `config._attn_implementation` names. A replaced layer gets a
copy of its config, which names `hosted_retention`.
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

__all__ = ["RecognisedAttention", "TransformersAttention"]

_IMPLEMENTATION = "hosted_retention"


class TransformersAttention(Adapter):
    """Adapter for attention classes of transformers that call a function of `AttentionInterface`.

    Such classes are recognised automatically, and refused if they do something that is not known to be harmless.
    Register this adapter for a refused class if q, k and v come from the layer's own input, one per token, and if
    nothing but the softmax stands between them and the output. Images are treated as sequences along their rows.

    Example:
        register_adapter(MyModelAttention, TransformersAttention())
    """

    def heads(self, attention: Any) -> Heads:
        """Return the sizes of the heads, read from the widths of the projections.

        Raises: UnreadableError if the layer does not tell them.
        """
        return read_heads(attention)

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        """List position biases, cross-attention, unknown layer types, shared keys and unreadable heads."""
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
        """List the layer's sliding window and the soft cap of its scores."""
        window, cap = window_of(attention), cap_of(attention)
        lost = [f"the sliding window of {window} tokens"] if window else []
        return [*lost, f"the soft cap of {cap}"] if cap else lost

    def both_ways(self, attention: Any) -> bool:
        """Tell whether the layer says that it is not causal."""
        return not getattr(attention, "is_causal", True)

    def reset(self, attention: Any, model: nn.Module) -> None:
        """Draw new weights with the `_init_weights` of the first PreTrainedModel in `model`.

        Raises: ValueError if `model` contains no PreTrainedModel.
        """
        owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if owner is None:
            raise ValueError(f'init="fresh" needs a PreTrainedModel, which knows how; got {type(model).__name__}')
        for module in attention.modules():
            owner._init_weights(module)

    def forward(self, attention: Any, host_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward with retention as its attention function.

        Raises: ValueError or ShapeError if the call asks for something that retention cannot do.
        """
        args, kwargs, call = hosted_call(args, kwargs)
        return host_forward(*args, **kwargs, hosted=call)

    def attach(self, model: nn.Module) -> None:
        """Let the configs of the layers name retention, and those of the models list the replaced layers."""
        replaced = replaced_by(self, model).values()
        for attention in replaced:
            if not hasattr(attention, "host_config"):
                attention.host_config, attention.config = attention.config, copy.copy(attention.config)
                attention.config._attn_implementation_internal = _IMPLEMENTATION
        update_marks(model)

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`: give the layers their configs back."""
        for attention in replaced_by(self, model).values():
            attention.config = attention.host_config
            del attention.host_config
        update_marks(model)


class RecognisedAttention(TransformersAttention):
    """Adapter for unregistered classes: refuses a layer with any part or argument that is not known."""

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        """List the reasons of `TransformersAttention` and all unknown parts and arguments."""
        kind = type(attention)
        doubts = [*doubts_of_class(kind), *doubts_of_layer(attention)]
        hint = f"if it is harmless, register_adapter({kind.__name__}, TransformersAttention()) says so"
        return [*super().why_not(attention, model), *doubts, *([hint] if doubts else [])]


AttentionInterface.register(_IMPLEMENTATION, hosted_retention)
_recognised = RecognisedAttention()
register_recogniser(lambda kind: _recognised if goes_by_interface(kind) else None)
