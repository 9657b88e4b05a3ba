"""Retention in timm's vision transformers; needs timm.

The import registers attn_layer="retention", for models of timm that take an attn_layer, and the models of
`vit_retention`, `pyramid_retention` and `rmt`. It also lets `replace_attention` replace the attention of
existing models.

Example:
    import retention.integrations.timm
    model = timm.create_model("vit_tiny_patch16_224", attn_layer="retention")
"""

try:
    import timm as _  # noqa: F401
except ImportError as error:
    raise ImportError('retention.integrations.timm needs timm; pip install "multiscale-retention[timm]"') from error

from . import models, pyramid, pyramid_retention, rmt, vit_retention
from .attention import RetentionAttention, TimmAttention, retention_layer
from .strips import classify_strips

__all__ = [
    "RetentionAttention",
    "TimmAttention",
    "classify_strips",
    "models",
    "pyramid",
    "pyramid_retention",
    "retention_layer",
    "rmt",
    "vit_retention",
]
