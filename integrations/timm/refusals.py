"""Classes of attention in timm's models that retention does not replace, and the reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..swap import Adapter, register_adapter
from ..swap.adapter import full_name

__all__ = ["Refused", "register_refusals"]

_Reason = str | Callable[[Any], str]


class Refused(Adapter):
    """Adapter that refuses a class of attention.

    Args:
        reason: what the attention does, after the name of its class; a text, or a function of the layer that returns
            one.
    """

    def __init__(self, reason: _Reason):
        self.reason = reason

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        """Return the reason with the full name of the class."""
        reason = self.reason if isinstance(self.reason, str) else self.reason(attention)
        return [f"{full_name(type(attention))} {reason}"]


def _window(size: Any) -> str:
    rows, columns = (size, size) if isinstance(size, int) else size
    return f"attends inside a window of {rows} x {columns} tokens, which is too small for retention to gain anything"


def _grid(size: Any) -> str:
    rows, columns = size
    return (
        f"attends over a grid of {rows} x {columns} tokens that are spread over the image, which is too small for "
        "retention to gain anything"
    )


def _partition(attention: Any) -> str:
    return (_window if attention.partition_block else _grid)(attention.partition_size)


def _mask_units(attention: Any) -> str:
    if not attention.use_mask_unit_attn:
        return "gets its tokens in the order of Hiera's windows, not row by row as retention on a grid needs them"
    return f"attends inside a window of {attention.window_size} tokens, too small for retention to gain anything"


_COARSE = "reduces its keys to fewer than its queries, so that they do not lie on one grid"
_BIAS = "adds learnt terms of the relative position to its scores, which retention does not have"

_REASONS: dict[str, _Reason] = {
    "swin_transformer.WindowAttention": lambda x: _window(x.window_size),
    "swin_transformer_v2.WindowAttention": lambda x: _window(x.window_size),
    "swin_transformer_v2_cr.WindowMultiHeadAttention": lambda x: _window(x.window_size),
    "davit.WindowAttention": lambda x: _window(x.window_size),
    "gcvit.WindowAttentionGlobal": lambda x: _window(x.window_size),
    "twins.LocallyGroupedAttn": lambda x: _window(x.ws),
    "tiny_vit.Attention": lambda x: _window(x.resolution),
    "efficientvit_msra.LocalWindowAttention": lambda x: _window(x.window_resolution),
    "maxxvit.PartitionAttentionCl": _partition,
    "maxxvit.PartitionAttention2d": _partition,
    "maxxvit.ParallelPartitionAttention": lambda x: f"{_window(x.partition_size)}, and {_grid(x.partition_size)}",
    "hiera.MaskUnitAttention": _mask_units,
    "pvt_v2.Attention": _COARSE,
    "mvitv2.MultiScaleAttention": _COARSE,
    "mvitv2.MultiScaleAttentionPoolFirst": _COARSE,
    "twins.GlobalSubSampleAttn": _COARSE,
    "nextvit.EfficientAttention": _COARSE,
    "beit.Attention": _BIAS,
    "vision_transformer_relpos.RelPosAttention": _BIAS,
    "vision_transformer_sam.Attention": _BIAS,
    "vision_transformer.ParallelScalingBlock": "computes its attention inline, there is no layer to replace",
}


def register_refusals() -> None:
    """Register an adapter for each refused class; `replace_attention` then gives the reason."""
    for name, reason in _REASONS.items():
        register_adapter(f"timm.models.{name}", Refused(reason))
