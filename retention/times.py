"""When tokens stand: how many real tokens of its own sequence come before each one. Padding does not count."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .state import RetentionState


def token_times(
    batch: int,
    length: int,
    device: torch.device,
    state: RetentionState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """How many tokens of its own sequence stand before each token: (B, T) int64, or (1, T) where all rows agree."""
    if length == 1 and state is not None and cu_seqlens is None:  # decoding: nothing but the state tells
        return state.time.unsqueeze(1)
    index = torch.arange(length, device=device)[None]
    if cu_seqlens is not None:
        segment = torch.searchsorted(cu_seqlens[1:], index[0], right=True)
        index = index - cu_seqlens[segment]
        return index if state is None else index + state.time[segment]
    if mask is not None:
        index = (mask.cumsum(1) - 1).clamp(min=0)
    return index if state is None else index + state.time[:, None]


def counts(call: Call, mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """How many real tokens of each row or segment the call holds, int64."""
    if cu_seqlens is not None:
        return cu_seqlens.diff().long()
    if mask is not None:
        return mask.sum(1)
    return torch.full((call.batch,), call.length, device=device)
