"""Decodes token by token with any language model of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from retention import decoding

from .compat import cache_of, call_with_cache

__all__ = ["stream"]


def stream(model: PreTrainedModel, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
    """Yield the tokens (B, 1) that follow input_ids (B, T), one at a time, without padding support.

    Args:
        model: a language model of transformers.
        input_ids: (B, T) int64, the prompt.
        max_new_tokens: number of tokens to yield.
        options: temperature, top_k and generator, as in `retention.decoding.stream`; use `generate` for other options.
    """

    def prompt(tokens: Tensor, _: Tensor | None) -> tuple[Tensor, Any]:
        out = call_with_cache(model, tokens, logits_to_keep=1)
        return out.logits, cache_of(out)

    def step(token: Tensor, cache: Cache) -> Tensor:
        return call_with_cache(model, token, cache).logits

    return decoding.stream(prompt, step, input_ids, max_new_tokens, **options)
