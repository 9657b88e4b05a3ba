"""The definition of the retention scores, R = scale (q k^T) * D: what every form of every backend computes."""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import decay_matrix
from .state import state_dtype


def scores(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = True,
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """R = scale (q k^T) * D, the retention scores (B, H, T, T) of Eq. 5, in float32 at least.

    Shapes: q (B, H, T, K); k (B, Hkv, T, K); log_decay (H,); mask (B, T), True = real token; grid (rows, columns) with
        rows * columns = T.
    """
    wide = state_dtype(q.dtype)
    k = repeated_heads(k, q.shape[1])
    if grid is not None:
        return grid_scores(q.to(wide) * scale, k.to(wide), *grid_decays(log_decay.to(wide), grid))
    log_decay = log_decay.to(wide)
    products = (q.to(wide) * scale) @ k.to(wide).mT
    if mask is None:
        return products * decay_matrix(log_decay, q.shape[2], causal)
    time = mask.cumsum(1).to(wide)  # padding does not advance it
    distance = (time[:, :, None] - time[:, None, :]).abs()
    seen = mask[:, None, :] & mask[:, :, None]
    seen = seen.tril() if causal else seen
    return torch.where(seen[:, None], products * (log_decay[:, None, None] * distance[:, None]).exp(), 0)


def grid_scores(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Scores of some rows of queries (B, H, n columns, K) with all keys: the decay of a pair is a product of two."""
    size = columns.shape[1]
    found = (q @ k.mT).unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, H, n, columns, rows, columns)
    return (found * rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(4).flatten(2, 3)


def grid_decays(log_decay: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
    """gamma^distance between rows, (H, rows, rows), and between columns."""
    indices = (torch.arange(n, device=log_decay.device) for n in grid)
    return tuple((log_decay[:, None, None] * (x[:, None] - x).abs()).exp() for x in indices)


def repeated_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
