"""The time of a token: the number of real tokens before it in its own sequence. Padding does not count."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call, Inputs
from .state import RetentionState

__all__ = ["counts", "token_times"]


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
    """
    if length == 1 and state is not None and cu_seqlens is None:  # decoding: the state alone determines the time
        return state.time.unsqueeze(1)
    index = torch.arange(length, device=device)[None]
    if cu_seqlens is not None:
        segment = torch.searchsorted(cu_seqlens[1:], index[0], right=True)
        index = index - cu_seqlens[segment]
        return index if state is None else index + state.time[segment]
    if mask is not None:
        index = (mask.cumsum(1) - 1).clamp(min=0)
    return index if state is None else index + state.time[:, None]


def counts(call: Call, inputs: Inputs) -> Tensor:
    """Return the number of real tokens in each row or segment of the call, (B,) or (N,) int64."""
    if inputs.cu_seqlens is not None:
        return inputs.cu_seqlens.diff().long()
    if inputs.mask is not None:
        return inputs.mask.sum(1)
    return torch.full((call.batch,), call.length, device=inputs.q.device)
