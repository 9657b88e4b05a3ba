"""Four-stage vision models with retention and the sizes of RMT, registered with timm as pyramid_retention_{tiny,...}.

Retention is bidirectional on the grid and linear in the number of pixels. There are no pretrained weights.

Example:
    import retention.integrations.timm
    model = timm.create_model("pyramid_retention_tiny", num_classes=10)
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model

from .pyramid import SIZES, Pyramid, build_pyramid, pyramid_cfgs

__all__ = ["default_cfgs"]  # and the models, which register_model adds

default_cfgs = pyramid_cfgs("pyramid_retention")


def _build(name: str, pretrained: bool, **kwargs: Any) -> Pyramid:
    return build_pyramid(name, pretrained, SIZES[name.rpartition("_")[2]], **kwargs)


@register_model
def pyramid_retention_tiny(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """The tiny size with retention; kwargs as in `Pyramid`."""
    return _build("pyramid_retention_tiny", pretrained, **kwargs)


@register_model
def pyramid_retention_small(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """The small size with retention; kwargs as in `Pyramid`."""
    return _build("pyramid_retention_small", pretrained, **kwargs)


@register_model
def pyramid_retention_base(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """The base size with retention; kwargs as in `Pyramid`."""
    return _build("pyramid_retention_base", pretrained, **kwargs)


@register_model
def pyramid_retention_large(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """The large size with retention; kwargs as in `Pyramid`."""
    return _build("pyramid_retention_large", pretrained, **kwargs)
