"""Decoding with any model that reads a prompt in one pass and then one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from .arguments import check_mask, check_token_ids
from .errors import ShapeError
from .options import check_is, check_whole, number, shown

__all__ = ["stream"]

_State = TypeVar("_State")


def stream(
    prompt: Callable[[Tensor, Tensor | None], tuple[Tensor, _State]],
    step: Callable[[Tensor, _State], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens (B, 1) that follow `tokens`: the prompt is read in one pass, then one token is drawn at a time.

    Shapes: tokens (B, T), T at least 1; mask (B, T); each result (B, 1) int64.
    Args:
        prompt: a function of tokens (B, T) and mask that returns the logits of the last token, (B, 1, vocab_size), and
            the state after it.
        step: a function of tokens (B, 1) and the state that returns logits (B, 1, vocab_size) and updates the state in
            place.
        tokens: int32 or int64 indices.
        max_new_tokens: tokens to yield for each row.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only; default: among all.
        mask: bool, True = real token, for padded prompts; the last column must be real, so pad on the left.
        generator: source of the random numbers; default: torch's.
    Raises: ShapeError, ValueError or TypeError that names the argument, before the first token is drawn.
    Examples:
        >>> import torch
        >>> from retention.decoding import stream
        >>> after = lambda tokens, _: torch.eye(5)[(tokens[:, -1:] + 1) % 5]  # the next index is the likeliest
        >>> new = stream(lambda tokens, mask: (after(tokens, mask), None), after, torch.tensor([[2]]), 3, temperature=0)
        >>> [token.item() for token in new]
        [3, 4, 0]
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
    prompt: Callable[[Tensor, Tensor | None], tuple[Tensor, _State]],
    step: Callable[[Tensor, _State], Tensor],
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
    """Draw one token (B, 1) from logits (B, vocab_size)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
