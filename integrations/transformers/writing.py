"""Any language model of transformers writes token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from retention import decoding

from .compat import cache_of, call_with_cache


def stream(model: PreTrainedModel, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
    """Yield the tokens (B, 1) that follow input_ids (B, T), as they come. Rows without padding.

    options: temperature, top_k and generator, as `retention.decoding.stream`. For all else there is `generate`.
    """

    def prompt(tokens: Tensor, _: Tensor | None) -> tuple[Tensor, Any]:
        out = call_with_cache(model, tokens, logits_to_keep=1)
        return out.logits, cache_of(out)

    def step(token: Tensor, cache: Cache) -> Tensor:
        return call_with_cache(model, token, cache).logits

    return decoding.stream(prompt, step, input_ids, max_new_tokens, **options)
