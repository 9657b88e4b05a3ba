"""RetNet as a transformers model, and retention in transformers' attention layers.

It needs transformers, which `pip install "multiscale-retention[transformers]"` installs. The import registers RetNet
with the Auto classes.
"""

try:
    import transformers as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        'retention.integrations.transformers needs transformers; pip install "multiscale-retention[transformers]"'
    ) from error

from . import families  # noqa: F401
from .adapters import TransformersAttention
from .cache import RetentionCacheLayer
from .compat import warn_if_untested
from .configuration import RetNetConfig
from .interface import attention_ran, register_attn_implementation, register_xformers_attention
from .loading import load_swapped
from .modeling import (
    RetNetForCausalLM,
    RetNetForSequenceClassification,
    RetNetForTokenClassification,
    RetNetModel,
)

warn_if_untested()

__all__ = [
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetNetForSequenceClassification",
    "RetNetForTokenClassification",
    "RetNetModel",
    "RetentionCacheLayer",
    "TransformersAttention",
    "attention_ran",
    "load_swapped",
    "register_attn_implementation",
    "register_xformers_attention",
]
