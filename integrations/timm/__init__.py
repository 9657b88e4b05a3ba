"""Retention in timm's vision transformers. Importing it lets `timm.create_model` know

    attn_layer="retention"      retention instead of attention, in models that take an attn_layer
    vit_retention_..., pyramid_retention_..., rmt_...      models of our own, see `models` and `pyramid`

and `replace_attention` the attention of models that exist.
"""

try:
    import timm as _  # noqa: F401
except ImportError as error:
    raise ImportError('retention.integrations.timm needs timm; pip install "multiscale-retention[timm]"') from error

from . import models, pyramid
from .attention import RetentionAttention, TimmAttention, retention_layer
from .strips import classify_strips

__all__ = ["RetentionAttention", "TimmAttention", "classify_strips", "models", "pyramid", "retention_layer"]
