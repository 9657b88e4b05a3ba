"""Reads transformers' attention masks: padding, borders of packed sequences, and causality."""

from __future__ import annotations

import torch
from torch import Tensor

from retention.errors import ShapeError

__all__ = ["as_one_row", "borders_of", "real_tokens", "refuse_other_masks"]

# Masks add less than this to the scores of hidden tokens, in every dtype; position biases add more.
_HIDDEN_BELOW = -1e4


def real_tokens(attention_mask: Tensor, x: Tensor, columns: Tensor | None) -> Tensor:
    """Return which tokens of x are real, (B, T) bool: those that the mask lets attend to themselves.

    Args:
        attention_mask: (B, keys), or (B, 1, T, keys), bool or added to the scores.
        x: (B, T, dim), the layer's input.
        columns: number of tokens that the cache has seen; None without a cache.
    Raises: ShapeError unless the mask is a tensor of 2 or 4 dimensions.
    """
    length = x.shape[1]
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ShapeError(f"attention_mask must be a tensor of 2 or 4 dimensions; got {got}")
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool()
    return _allowed(attention_mask, _own_keys(attention_mask, length, columns)).expand(x.shape[0], -1)


def borders_of(attention_mask: Tensor | None, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the borders of packed sequences, (N + 1,) int32, or None if the mask has none.

    A border lies where a real token may not attend to the real token before it.

    Args:
        attention_mask: (B, 1, T, keys); masks of two dimensions have no borders.
        mask: (B, T), its `real_tokens`.
        x: (B, T, dim), the layer's input.
    Raises: ValueError if the mask has both padding and packed sequences.
    """
    length = x.shape[1]
    if attention_mask is None or mask is None or not _can_look(attention_mask, length):
        return None
    before = _allowed(attention_mask, torch.arange(length, device=x.device) - 1).expand(x.shape[0], -1)
    starts = mask & mask.roll(1, dims=1) & ~before
    starts[:, 0] = False
    if not starts.any():
        return None
    if not mask.all():
        raise ValueError("a batch may have padding or packed sequences; got both; pack without padding")
    starts[:, 0] = True
    ends = starts.flatten().nonzero()[:, 0]
    return torch.cat([ends, ends.new_tensor([starts.numel()])]).int()


def as_one_row(borders: Tensor | None, x: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
    """Concatenate the rows of x (B, T, dim) and of `heads` (B, H, T, D) into a batch of one, if there are borders."""
    if borders is None:
        return x, *heads
    return x.flatten(0, 1)[None], *(z.transpose(0, 1).flatten(1, 2)[None] for z in heads)


def refuse_other_masks(
    attention_mask: Tensor | None, mask: Tensor | None, causal: bool | None, columns: Tensor | None
) -> None:
    """Refuse a mask of four dimensions that retention cannot follow.

    Nothing is refused for a single token, which sees no other new token, nor in compiled code, which cannot read masks.

    Args:
        attention_mask: the mask of the call, or None.
        mask: (B, T), its `real_tokens`.
        causal: whether retention is causal; None: the user passed causal=True, which overrides the mask.
        columns: number of tokens that the cache has seen; None without a cache.
    Raises: ValueError if the mask differs by heads, adds a bias to the scores, shows later tokens to causal retention,
        or hides them from retention that sees both ways.
    """
    if attention_mask is None or mask is None or not _can_look(attention_mask, mask.shape[1]):
        return
    if attention_mask.shape[1] != 1:
        raise ValueError(
            f"the attention mask differs by heads, {tuple(attention_mask.shape)}, and retention has one for all of "
            "them; leave this layer out"
        )
    own = _own_keys(attention_mask, mask.shape[1], columns)
    both = mask[:, 1:] & mask[:, :-1]
    ahead, behind = _allowed(attention_mask, own + 1), _allowed(attention_mask, own - 1)
    biased = (attention_mask != 0) & (attention_mask > _HIDDEN_BELOW) & (attention_mask.dtype != torch.bool)
    flags = [biased.any(), (ahead[:, :-1] & both).any(), (behind[:, 1:] & both).any()]
    has_bias, sees_ahead, sees_behind = torch.stack(flags).tolist()
    if has_bias:
        raise ValueError(
            "the attention mask adds a bias to the scores, such as one of positions, which retention cannot; leave "
            "this layer out"
        )
    if causal and sees_ahead:
        raise ValueError(
            "the attention mask lets tokens see those after them, and the layer looks back only; leave this layer "
            "out, or pass causal=True to replace_attention if it shall look back only"
        )
    if causal is False and sees_behind and not sees_ahead:
        raise ValueError(
            "the attention mask hides from each token those after it, and the layer says that it looks both ways; "
            "pass causal=True to replace_attention"
        )


def _can_look(attention_mask: Tensor, length: int) -> bool:
    """Tell whether the mask has pairs of tokens, and whether the code may read it."""
    return attention_mask.dim() == 4 and length > 1 and not torch.compiler.is_compiling()


def _own_keys(attention_mask: Tensor, length: int, columns: Tensor | None) -> Tensor:
    """Return the index of the key of each of the T tokens in the mask, (T,)."""
    own = torch.arange(length, device=attention_mask.device)
    if columns is None:
        return own
    # The mask of a sliding window holds fewer keys than the cache has seen.
    return own + columns.clamp(max=attention_mask.shape[-1] - length)


def _allowed(attention_mask: Tensor, keys: Tensor) -> Tensor:
    """Tell whether each query may attend to the key with its index in `keys` (T,), (B, T); indices are clamped."""
    seen = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0
    seen = seen.expand(-1, keys.shape[0], -1)  # a padding mask has one row for all queries
    keys = keys.clamp(0, seen.shape[-1] - 1)
    return seen.gather(-1, keys[None, :, None].expand(seen.shape[0], -1, 1))[..., 0]
