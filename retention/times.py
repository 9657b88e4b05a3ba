"""The time of a token: the number of real tokens before it in its own sequence. Padding does not count."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call, Inputs
from .sharding import active, token_indices, whole_length
from .state import RetentionState

__all__ = ["counts", "segments", "token_times"]


def token_times(
    batch: int,
    length: int,
    device: torch.device,
    state: RetentionState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Return the time of each token, (B, T) int64, or (1, T) if all rows agree.

    Shapes: mask (B, T) bool, True = real token; cu_seqlens (N + 1,) with B = 1; state.time (B,), or (N,) with
        cu_seqlens.
    Args:
        batch, length: B and T.
        state: the state whose sequences the tokens continue; None at the beginning.
    Inside of `context_parallel` the tokens are a part of a sequence; cu_seqlens and state belong to the whole sequence.
    """
    shard = active()
    if shard is not None:
        shard.check_length(length)
    elif length == 1 and state is not None and cu_seqlens is None:  # decoding: the state alone determines the time
        return state.time.unsqueeze(1)
    index = token_indices(length, device)[None]
    if cu_seqlens is not None:
        segment = segments(cu_seqlens, index[0])
        index = index - cu_seqlens[segment]
        return index if state is None else index + state.time[segment]
    if mask is not None:
        index = (mask.cumsum(1) - 1).clamp(min=0)
        if shard is not None:
            index = index + shard.gathered(mask.sum(1))[: shard.rank].sum(0)[:, None]
    return index if state is None else index + state.time[:, None]


def segments(cu_seqlens: Tensor, index: Tensor) -> Tensor:
    """Return the number of the packed sequence to which each token belongs, for the tokens' `index` (T,)."""
    return torch.searchsorted(cu_seqlens[1:], index, right=True)


def counts(call: Call, inputs: Inputs) -> Tensor:
    """Return the number of real tokens in each row or segment of the whole sequence, (B,) or (N,) int64."""
    if inputs.cu_seqlens is not None:
        return inputs.cu_seqlens.diff().long()
    if inputs.mask is None:
        return torch.full((call.batch,), whole_length(call.length), device=inputs.q.device)
    shard, own = active(), inputs.mask.sum(1)
    return own if shard is None else shard.gathered(own).sum(0)
