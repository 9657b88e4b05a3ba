"""Images too large for memory: a vision transformer with causal retention takes them strip by strip."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from retention.errors import ShapeError
from retention.options import check_is, shown

from ..swap import Swapped


@torch.no_grad()
def classify_strips(model: VisionTransformer, strips: Iterable[Tensor]) -> Tensor:
    """What `model(image)` gives, from strips of the image one after another; no more than one is needed at a time.

    model: whose attention is causal retention, as `retention_layer(causal=True)`; no tokens before the image, pooled by
        their mean, in eval mode.
    strips: (B, in_chans, rows, columns) each, from the top; rows a multiple of the patch size, columns the model's.
    Returns: (B, num_classes). Raises: ValueError for another model; ShapeError unless the strips make up its image.
    """
    check_is("strips", strips, Iterable, "the strips of an image one after another")
    _check(model)
    embed: Any = model.patch_embed
    positions: Any = model.pos_embed
    first: Any = model.blocks[0]
    tokens = first.attn.tokens
    length, total, tokens.states = 0, torch.zeros(()), {}
    try:
        for strip in strips:
            if not isinstance(strip, Tensor) or strip.dim() != 4 or strip.shape[1] != embed.proj.in_channels:
                want = f"(batch, {embed.proj.in_channels}, rows, columns)"
                raise ShapeError(f"strips must be tensors {want}; got a strip {shown(strip)}")
            x = embed.norm(embed.proj(strip).flatten(2).mT)
            rest = positions[:, length : length + x.shape[1]]
            whole = strip.shape[2] % embed.patch_size[0] == 0 and strip.shape[3] == embed.img_size[1]
            if not whole or rest.shape[1] < x.shape[1]:
                raise ShapeError(f"strips must make up an image of {embed.img_size}; got a strip {tuple(strip.shape)}")
            length += x.shape[1]
            total = total + model.norm(model.blocks(model.norm_pre(x + rest))).sum(1)
    finally:
        tokens.states = None
    if length != embed.num_patches:
        raise ShapeError(f"strips must make up an image of {embed.num_patches} patches; got {length}")
    return model.head(model.fc_norm(total / length))


def _check(model: VisionTransformer) -> None:
    """Raises: ValueError for the first thing that is missing."""
    needs = {
        "a VisionTransformer": lambda: (
            isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbed)
        ),
        "replace_attention(model, causal=True)": lambda: all(_causal(block.attn) for block in model.blocks),
        "class_token=False": lambda: model.num_prefix_tokens == 0,
        "global_pool='avg'": lambda: model.global_pool == "avg",
        "pos_embed='learn'": lambda: model.pos_embed is not None,
        "model.eval()": lambda: not model.training,
    }
    for what, holds in needs.items():
        if not holds():
            raise ValueError(f"a model for strips needs {what}; got {type(model).__name__} without")


def _causal(attention: Any) -> bool:
    return isinstance(attention, Swapped) and attention.retention.causal is True
