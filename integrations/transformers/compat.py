"""What moves between releases of transformers: names of arguments and outputs, and helpers deep inside its packages.

All that the other files need of it, they take from here. A release that renames something changes this file alone.
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
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
)
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
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, ProgressCallback, TrainerState
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple

__all__ = [
    "CACHE",
    "CACHE_NAMES",
    "HARMLESS",
    "INPUT",
    "LAYER_ARGUMENTS",
    "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING",
    "OTHER_TOKENS",
    "STATIC_LAYER_TYPE_MAPPING",
    "TESTED",
    "TRAINER_STATE_NAME",
    "AttentionMaskInterface",
    "BaseModelOutputWithPast",
    "CacheLayerMixin",
    "CausalLMOutputWithPast",
    "ExportableState",
    "GenericForSequenceClassification",
    "GenericForTokenClassification",
    "GradientCheckpointingLayer",
    "LinearAttentionCacheLayerMixin",
    "ProgressCallback",
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
    "sdpa_mask",
    "swap_cache",
    "versions",
    "warn_if_untested",
]

TESTED = ("5.16", "5.23", "5.24")  # minor releases; pyproject.toml ends below the next one

# The installed release's name of the cache, as an argument and as an output: "cache" from 5.24 on.
CACHE = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))
CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # all names that some release or model has for it
_OLD_NAME = None if CACHE == "past_key_values" else "past_key_values"  # deprecated in the installed release

# What may come to the `forward` of any model: what transformers has for attention and losses; what `generate`, the
# Trainer, older code and other models' tokenizers add. Models that have no use for one of these ignore it.
_KEYWORDS = {
    *TransformersKwargs.__optional_keys__,
    *("tokenizer", "assistant_tokenizer", "shift_labels", "cache_position", "token_type_ids"),
}

INPUT = "hidden_states"  # the first argument of a layer's forward: its tokens
OTHER_TOKENS = (  # arguments of a layer's forward that bring other tokens, to which its own attend
    "key_value_states",
    "encoder_hidden_states",
    "cross_attention_states",
    "encoder_attention_mask",
)
# Keywords that reach every attention function and change nothing of what retention computes from q, k, v and the mask.
HARMLESS = frozenset(
    {
        *TransformersKwargs.__annotations__,
        "cache_position",
        "deterministic",  # how flash attention sums
        "dropout",
        "return_dict",
        "shift_labels",
        "token_type_ids",
        "use_cache",
    }
)
# Arguments of a layer's forward that are known: with what they do to q, k and v, to the mask or to the cache.
LAYER_ARGUMENTS = frozenset(
    {INPUT, "attention_mask", "position_embeddings", "position_ids", *OTHER_TOKENS, *CACHE_NAMES, *HARMLESS}
)

F = TypeVar("F", bound=Callable[..., Any])


def versions() -> str:
    """The installed release and the tested ones, for errors and warnings."""
    return f"transformers {transformers.__version__}; tested: {', '.join(TESTED)}"


def warn_if_untested() -> None:
    """Warn if the installed release is newer than every tested one."""
    installed, newest = Version(transformers.__version__), Version(TESTED[-1])
    if installed.release[:2] > newest.release[:2]:
        warnings.warn(
            f"transformers {transformers.__version__} is newer than the versions that were tested "
            f"({', '.join(TESTED)}); if something fails, install transformers {TESTED[-1]}",
            stacklevel=2,
        )


def cache_of(output: Any) -> Cache | None:
    """The cache in what a model returned."""
    return getattr(output, CACHE, None)


def as_output(cache: Cache | None) -> dict[str, Any]:
    """The keyword argument by which an output takes the cache."""
    return {CACHE: cache}


def call_with_cache(model: Any, tokens: Any, cache: Cache | None = None, **options: Any) -> Any:
    """`model(tokens)` that continues from `cache`, default: a new one, and updates it."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return model(tokens, **{CACHE: cache}, use_cache=True, **options)


def cache_by_any_name(forward: F) -> F:
    """Let a `forward` with an argument `cache` take it under every name, and show the installed release's."""
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
    """Refuse keyword arguments of a `forward` that no model of transformers has. Raises: TypeError that names them."""
    unknown = sorted(set(given) - _KEYWORDS)
    if unknown:
        raise TypeError(f"{type(model).__name__}.forward() got unexpected keyword arguments: {', '.join(unknown)}")


def swap_cache(
    args: tuple[Any, ...], kwargs: dict[str, Any], other: Any
) -> tuple[tuple[Any, ...], dict[str, Any], Cache | None]:
    """The arguments of a call with `other` in the place of the cache, and the cache, whatever its name, or None.

    Raises: TypeError for something that has the name of a cache and is none.
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
