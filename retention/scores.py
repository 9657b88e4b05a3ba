"""The definition of the retention scores, R = scale (q k^T) * D, which every form of every backend computes."""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import decay_matrix
from .state import state_dtype

__all__ = ["grid_decays", "grid_scores", "repeated_heads", "scores"]


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
    """Return R = scale (q k^T) * D, the retention scores of the parallel form, for arguments that have been checked.

    Shapes: q (B, H, T, K); k (B, Hkv, T, K); log_decay (H,); mask (B, T) bool, True = real token; grid (rows, columns)
        with rows * columns = T. Returns (B, H, T, T).
    Dtypes: any float; R is float32, or float64 for float64 inputs.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5.
    """
    wide = state_dtype(q.dtype)
    k = repeated_heads(k, q.shape[1])
    if grid is not None:
        return grid_scores(q.to(wide) * scale, k.to(wide), *grid_decays(log_decay.to(wide), grid))
    log_decay = log_decay.to(wide)
    products = (q.to(wide) * scale) @ k.to(wide).mT  # scale q_n . k_m, (B, H, T, T)
    if mask is None:
        return products * decay_matrix(log_decay, q.shape[2], causal)
    time = mask.cumsum(1).to(wide)  # (B, T); padding does not advance it
    distance = (time[:, :, None] - time[:, None, :]).abs()  # |t_n - t_m|, (B, T, T)
    seen = mask[:, None, :] & mask[:, :, None]  # both are real tokens, (B, T, T)
    seen = seen.tril() if causal else seen
    # R_nm = scale (q_n . k_m) gamma^|t_n - t_m| where n sees m, else 0
    return torch.where(seen[:, None], products * (log_decay[:, None, None] * distance[:, None]).exp(), 0)


def grid_scores(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the scores of the queries of n grid rows with all keys: D is a product of a row and a column factor.

    Shapes: q (B, H, n * columns, K), scaled; k (B, H, rows * columns, K); rows (H, n, rows); columns (H, columns,
        columns). Returns (B, H, n * columns, rows * columns).
    """
    size = columns.shape[1]
    found = (q @ k.mT).unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, H, n, columns, rows, columns)
    # D_nm = gamma^|row_n - row_m| gamma^|column_n - column_m|
    return (found * rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(4).flatten(2, 3)


def grid_decays(log_decay: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return gamma^distance between grid rows, (H, rows, rows), and between columns, (H, columns, columns)."""
    indices = (torch.arange(n, device=log_decay.device) for n in grid)
    return tuple((log_decay[:, None, None] * (x[:, None] - x).abs()).exp() for x in indices)


def repeated_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat the key/value heads of x (B, Hkv, T, D) for `heads` query heads, (B, heads, T, D)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
