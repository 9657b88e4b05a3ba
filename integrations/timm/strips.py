"""Classifies images that are too large for memory, strip by strip, with causal retention."""

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

__all__ = ["classify_strips"]


@torch.no_grad()
def classify_strips(model: VisionTransformer, strips: Iterable[Tensor]) -> Tensor:
    """Compute `model(image)` from strips of the image, of which only one is in memory at a time.

    Args:
        model: a timm VisionTransformer in evaluation mode with causal retention, such as that of
            `retention_layer(causal=True)`; without class token, with learnt positions and mean pooling.
        strips: tensors (B, in_chans, rows, columns) from top to bottom; rows is a multiple of the patch size, columns
            is the model's image width.
    Returns: logits (B, num_classes).
    Raises: ValueError for another model; ShapeError unless the strips make up an image of the model's size.
    Example:
        layer = retention_layer(causal=True)
        model = timm.create_model("vit_retention_tiny_patch16_224", attn_layer=layer).eval()
        logits = classify_strips(model, image.split(32, dim=2))  # image (B, 3, 224, 224)
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
    """Raises: ValueError that names the first property which the model lacks."""
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
