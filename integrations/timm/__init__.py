"""Retention in timm's vision transformers; needs timm.

The import registers attn_layer="retention", for models of timm that take an attn_layer, and the models of `models` and
`pyramid` (vit_retention_..., pyramid_retention_..., rmt_...). It also lets `replace_attention` replace the attention of
existing models.

Example:
    import retention.integrations.timm
    model = timm.create_model("vit_tiny_patch16_224", attn_layer="retention")
"""

try:
    import timm as _  # noqa: F401
except ImportError as error:
    raise ImportError('retention.integrations.timm needs timm; pip install "multiscale-retention[timm]"') from error

from . import models, pyramid
from .attention import RetentionAttention, TimmAttention, retention_layer
from .strips import classify_strips

__all__ = ["RetentionAttention", "TimmAttention", "classify_strips", "models", "pyramid", "retention_layer"]
