"""Everything that differs between releases of transformers: names of arguments and outputs, and internal helpers.

All other files take these from here, so a release that renames something changes this file only.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, TypeVar

import torch
import transformers
from packaging.version import Version
from transformers import Cache, DynamicCache, EncoderDecoderCache, trainer
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
)
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.integrations import get_available_reporting_integrations
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    AttentionMaskInterface,
    create_recurrent_attention_mask,
    sdpa_mask,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, ProgressCallback, TrainerState
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple

__all__ = [
    "ALL_PARALLEL_STYLES",
    "CACHE",
    "CACHE_NAMES",
    "HARMLESS",
    "INPUT",
    "LAYER_ARGUMENTS",
    "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING",
    "MIXED_WEIGHTS",
    "OTHER_TOKENS",
    "SCHEDULER_NAME",
    "STATIC_LAYER_TYPE_MAPPING",
    "TESTED",
    "TRAINER_STATE_NAME",
    "AttentionMaskInterface",
    "BaseModelOutputWithPast",
    "CacheLayerMixin",
    "CausalLMOutputWithPast",
    "Conv1D",
    "ExportableState",
    "GenericForSequenceClassification",
    "GenericForTokenClassification",
    "GradientCheckpointingLayer",
    "LinearAttentionCacheLayerMixin",
    "ProgressCallback",
    "TensorParallelLayer",
    "TrainerState",
    "apply_rotary_pos_emb",
    "as_output",
    "cache_by_any_name",
    "cache_of",
    "call_with_cache",
    "can_return_tuple",
    "check_keywords",
    "create_recurrent_attention_mask",
    "get_available_reporting_integrations",
    "logging",
    "replace_cache",
    "sdpa_mask",
    "versions",
    "warn_if_untested",
]

TESTED = ("5.16", "5.23", "5.24")  # minor releases; pyproject.toml excludes the next one

# The cache's name, as an argument and as an output, in the installed release: "cache" from 5.24 on.
CACHE = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))
CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # all names in any release or model
_OLD_NAME = None if CACHE == "past_key_values" else "past_key_values"  # deprecated in the installed release

# Keywords that any model's `forward` may receive: those of transformers for attention and losses, and those that
# `generate`, the Trainer, older code and other models' tokenizers add. A model ignores those that it does not use.
_KEYWORDS = {
    *TransformersKwargs.__optional_keys__,
    *("tokenizer", "assistant_tokenizer", "shift_labels", "cache_position", "token_type_ids"),
}

# Whether the optimiser of the Trainer takes weights that are divided among processes beside whole ones.
MIXED_WEIGHTS = hasattr(trainer, "has_mixed_dtensor")

INPUT = "hidden_states"  # the first argument of a layer's forward: its tokens
OTHER_TOKENS = (  # arguments of a layer's forward that hold other tokens to attend to
    "key_value_states",
    "encoder_hidden_states",
    "cross_attention_states",
    "encoder_attention_mask",
)
# Keywords of attention functions that do not affect what retention computes from q, k, v and the mask.
HARMLESS = frozenset(
    {
        *TransformersKwargs.__annotations__,
        "cache_position",
        "deterministic",  # order of sums in flash attention
        "dropout",
        "return_dict",
        "shift_labels",
        "token_type_ids",
        "use_cache",
    }
)
# Arguments of a layer's forward whose effect on q, k, v, the mask and the cache is known.
LAYER_ARGUMENTS = frozenset(
    {INPUT, "attention_mask", "position_embeddings", "position_ids", *OTHER_TOKENS, *CACHE_NAMES, *HARMLESS}
)

_F = TypeVar("_F", bound=Callable[..., Any])


def versions() -> str:
    """Return the installed and the tested releases of transformers, for errors and warnings."""
    return f"transformers {transformers.__version__}; tested: {', '.join(TESTED)}"


def warn_if_untested() -> None:
    """Warn if the installed release of transformers is newer than all tested ones."""
    installed, newest = Version(transformers.__version__), Version(TESTED[-1])
    if installed.release[:2] > newest.release[:2]:
        warnings.warn(
            f"transformers {transformers.__version__} is newer than the versions that were tested "
            f"({', '.join(TESTED)}); if something fails, install transformers {TESTED[-1]}",
            stacklevel=2,
        )


def cache_of(output: Any) -> Cache | None:
    """Return the cache in a model's output, or None."""
    return getattr(output, CACHE, None)


def as_output(cache: Cache | None) -> dict[str, Any]:
    """Return the keyword argument that stores the cache in a model's output."""
    return {CACHE: cache}


def call_with_cache(model: Any, tokens: Any, cache: Cache | None = None, **options: Any) -> Any:
    """Call `model(tokens)` with a cache, which it continues and updates.

    Args:
        model: a language model of transformers.
        tokens: (B, T) int64.
        cache: Default: a new cache.
        options: further arguments of the model.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    return model(tokens, **{CACHE: cache}, use_cache=True, **options)


def cache_by_any_name(forward: _F) -> _F:
    """Decorate a `forward` with an argument `cache` so that it accepts every name of the cache.

    The signature shows the name that the installed release uses. The decorated function raises ValueError if the cache
    is given twice, TypeError if it is not a `transformers.Cache`, and warns of a deprecated name.
    """
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        given = [name for name in CACHE_NAMES if kwargs.get(name) is not None]
        if len(given) > 1:
            raise ValueError(f"the cache must be given once; got {' and '.join(given)}; pass {CACHE} alone")
        found = [kwargs.pop(name) for name in CACHE_NAMES if name in kwargs]
        if given:
            kwargs["cache"] = _checked(given[0], next(x for x in found if x is not None))
            if given[0] == _OLD_NAME and not torch.compiler.is_compiling():
                warnings.warn(f"`{_OLD_NAME}` is deprecated; use `{CACHE}` instead", FutureWarning, stacklevel=2)
        return forward(*args, **kwargs)

    shown = [p.replace(name=CACHE) if name == "cache" else p for name, p in signature.parameters.items()]
    renamed.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return renamed  # type: ignore[return-value]


def check_keywords(model: Any, given: Collection[str]) -> None:
    """Refuse keyword arguments that no `forward` of transformers takes.

    Args:
        model: named in the error.
        given: the keywords.
    Raises: TypeError that names the unknown keywords.
    """
    unknown = sorted(set(given) - _KEYWORDS)
    if unknown:
        raise TypeError(f"{type(model).__name__}.forward() got unexpected keyword arguments: {', '.join(unknown)}")


def replace_cache(
    args: tuple[Any, ...], kwargs: dict[str, Any], other: Any
) -> tuple[tuple[Any, ...], dict[str, Any], Cache | None]:
    """Replace the cache in the arguments of a call by `other`.

    Returns: the new positional arguments, the new keyword arguments, and the cache, or None if there was none. Of an
        `EncoderDecoderCache`, this is the cache of self-attention.
    Raises: TypeError if an argument has a cache's name but is not a `transformers.Cache`.
    """
    caches = [x for x in (*args, *kwargs.values()) if isinstance(x, Cache)]
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            _checked(name, kwargs[name])
    if not caches:
        return args, kwargs, None
    swapped = tuple(other if isinstance(x, Cache) else x for x in args)
    found = caches[0]
    if isinstance(found, EncoderDecoderCache):
        found = found.self_attention_cache
    return swapped, {name: other if isinstance(x, Cache) else x for name, x in kwargs.items()}, found


def _checked(name: str, cache: Any) -> Cache:
    if not isinstance(cache, Cache):
        raise TypeError(f"{name} must be a transformers.Cache; got {type(cache).__name__} ({versions()})")
    return cache
