"""Vision transformers with retention in all layers, registered with timm.

Each is timm's VisionTransformer with two-dimensional retention, a head norm and a gate in each layer, no class token,
and the mean of the patches as pooling. There are no pretrained weights.

Example:
    import retention.integrations.timm
    model = timm.create_model("vit_retention_tiny_patch16_224", num_classes=10)
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from .attention import retention_layer

__all__ = ["default_cfgs"]  # and the models, which register_model adds

_SIZES = {
    "vit_retention_tiny_patch16_224": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_retention_small_patch16_224": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_retention_base_patch16_224": dict(embed_dim=768, depth=12, num_heads=12),
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": IMAGENET_INCEPTION_MEAN,
            "std": IMAGENET_INCEPTION_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
        }
        for name in _SIZES
    }
)


def _build(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    out_indices = kwargs.pop("out_indices", 3)
    own = dict(class_token=False, global_pool="avg", attn_layer=retention_layer(features=False, gate="silu"))
    return build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **{**own, **_SIZES[name], **kwargs},
    )


@register_model
def vit_retention_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The tiny size for images of 224 x 224: 192 channels, 12 layers, 3 heads; kwargs as in `VisionTransformer`."""
    return _build("vit_retention_tiny_patch16_224", pretrained, **kwargs)


@register_model
def vit_retention_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The small size for images of 224 x 224: 384 channels, 12 layers, 6 heads; kwargs as in `VisionTransformer`."""
    return _build("vit_retention_small_patch16_224", pretrained, **kwargs)


@register_model
def vit_retention_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The base size for images of 224 x 224: 768 channels, 12 layers, 12 heads; kwargs as in `VisionTransformer`."""
    return _build("vit_retention_base_patch16_224", pretrained, **kwargs)
