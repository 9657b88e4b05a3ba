"""Decoding with any model that takes a prompt in one pass and then a token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from .arguments import check_mask, check_token_ids
from .errors import ShapeError
from .options import check_is, check_whole, number, shown

State = TypeVar("State")


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
    Raises: ShapeError, ValueError or TypeError that names the argument, before the first token is asked for.
    """
    for name, function in (("prompt", prompt), ("step", step)):
        check_is(name, function, Callable, "a function")
    check_token_ids(tokens)
    if tokens.shape[1] == 0:
        raise ShapeError(f"tokens must be (batch, length) with at least one token; got tokens {tuple(tokens.shape)}")
    check_whole("max_new_tokens", max_new_tokens, 0)
    if not 0 <= number(temperature) < math.inf:
        raise ValueError(f"temperature must be finite and at least 0; got temperature {shown(temperature)}")
    check_whole("top_k", top_k, optional=True)
    check_is("generator", generator, torch.Generator | None, "a torch.Generator, or None")
    if mask is not None:
        check_mask(mask, tokens.shape[0], tokens.shape[1], tokens.device)
        if not mask[:, -1].all():
            raise ValueError("the last column of mask must be real tokens; got padding there; pad prompts on the left")
    return _stream(prompt, step, tokens, max_new_tokens, temperature, top_k, mask, generator)


@torch.inference_mode()
def _stream(
    prompt: Callable[[Tensor, Tensor | None], tuple[Tensor, State]],
    step: Callable[[Tensor, State], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
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
