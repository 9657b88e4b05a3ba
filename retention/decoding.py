"""Decoding with any model that takes a prompt in one pass and then a token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from .errors import ShapeError

State = TypeVar("State")


@torch.inference_mode()
def stream(
    prompt: Callable[[Tensor, Tensor | None], tuple[Tensor, State]],
    step: Callable[[Tensor, State], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens (B, 1) that follow `tokens` (B, T): the prompt in one pass, then one token at a time.

    prompt: tokens (B, T) and mask to the last token's logits (B, 1, vocab_size) and the state.
    step: tokens (B, 1) and state, to be updated in place, to logits (B, 1, vocab_size).
    temperature: 0 takes the likeliest token. top_k: draw among the likeliest k only. mask: (B, T), for padded prompts,
    whose last column must be real. generator: where the chance comes from.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ShapeError(f"tokens must be (batch, length) with at least one token; got tokens {tuple(tokens.shape)}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0; got temperature {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; got top_k {top_k}")
    if mask is not None and not mask[:, -1].all():
        raise ValueError("the last column of mask must be real tokens; got padding there; pad prompts on the left")
    logits, state = prompt(tokens, mask)
    for n in range(max_new_tokens):
        new = _pick(logits[:, -1], temperature, top_k, generator)
        yield new
        if n + 1 < max_new_tokens:
            logits = step(new, state)


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token (B, 1) from logits (B, vocab_size)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
