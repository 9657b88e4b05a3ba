"""Where the segments of a call lie: tables made on the device, so that the host never waits for masks and borders."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .plan import Plan

__all__ = ["of"]

_Tables = tuple[Tensor | None, Tensor | None, Tensor | None]


def of(q: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, plan: Plan) -> _Tables:
    """Return the table (segments, 3), the index of real tokens (rows, length), and the first segment of each sequence.

    A row of the table is the row of the batch, the first token and the number of tokens; all tensors are int32. Without
    mask and borders there are no tables: segments of equal size cut each row.
    """
    if mask is not None:
        return _of_mask(mask, plan)
    if cu_seqlens is not None:
        return _of_borders(cu_seqlens.clamp(0, q.shape[2]).cummax(0).values, plan)
    return None, None, None


def _of_mask(mask: Tensor, plan: Plan) -> _Tables:
    """Place the real tokens of each row before its padding; segments cut the real tokens."""
    sizes = mask.sum(1, keepdim=True)  # real tokens, (rows, 1)
    rows, length = mask.shape
    place = torch.where(mask, mask.cumsum(1) - 1, sizes + (~mask).cumsum(1) - 1)
    tokens = torch.arange(length, device=mask.device, dtype=torch.int32).expand(rows, length)
    index = torch.empty_like(mask, dtype=torch.int32).scatter_(1, place, tokens)
    first = torch.arange(plan.per_sequence, device=mask.device) * plan.tokens  # (per sequence,)
    size = (sizes - first).clamp(0, plan.tokens)
    row = torch.arange(rows, device=mask.device)[:, None].expand_as(size)
    table = torch.stack([row, first.expand_as(size), size], 2).int()
    borders = torch.arange(rows + 1, device=mask.device, dtype=torch.int32) * plan.per_sequence
    return table, index, borders


def _of_borders(cu_seqlens: Tensor, plan: Plan) -> _Tables:
    """Cut each sequence of a packed row; segments that are left over have no tokens."""
    cu_seqlens = cu_seqlens.long()
    sizes = cu_seqlens.diff()
    if not plan.split:
        return torch.stack([torch.zeros_like(sizes), cu_seqlens[:-1], sizes], 1).int(), None, None
    borders = pad(((sizes + plan.tokens - 1) // plan.tokens).cumsum(0), (1, 0))
    segment = torch.arange(plan.segments, device=cu_seqlens.device)
    owner = torch.searchsorted(borders[1:], segment, right=True).clamp(max=len(sizes) - 1)
    first = (segment - borders[owner]) * plan.tokens
    size = (sizes[owner] - first).clamp(0, plan.tokens)
    table = torch.stack([torch.zeros_like(first), cu_seqlens[owner] + first, size], 1).int()
    return table, None, borders.int()
