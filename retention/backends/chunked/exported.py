"""The chunkwise form for exported programs: plain torch operations without a loop, for every length.

torch.export records one program for all lengths, and runtimes such as ONNX Runtime know no operator of ours. So the
tokens are padded to whole chunks, all chunks are computed side by side, and one matrix of decays between chunks stands
for the loop over them. With a the age of a token (the number of real tokens up to it), and start and end the ages
before and after a chunk c or c':

    M_c   = sum_j gamma^(end_c - a_j) k_j v_j^T
    S_c   = sum_c'<c gamma^(start_c - end_c') M_c'  +  gamma^start_c S
    out_i = scale sum_j<=i gamma^(a_i - a_j) (q_i . k_j) v_j  +  scale gamma^(a_i - start_c) q_i S_c

No exponent is negative, so nothing overflows. For N chunks of C tokens, time is O(T C (K + V) + T K V + N^2 K V) and
memory O(T (K + V + C) + N K V), for each head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...scores import grid_decays, repeated_heads
from ...state import state_dtype

__all__ = ["at_once", "on_grid_at_once"]


def at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    chunk_size: int,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute retention of all chunks side by side.

    Shapes: as in `Backend.__call__`. Returns out (B, H, T, V), and the last state if return_state.
    Dtypes: any float; the results are float32, or float64 for float64 inputs.
    """
    length, wide = q.shape[2], state_dtype(q.dtype)
    # A program for all lengths has no size that may be 1, and no difference of sizes. So one chunk more has padding
    # only, and tokens are gathered instead of padded and cut.
    chunks = torch.arange((length + chunk_size - 1) // chunk_size + 1, device=q.device)
    token = torch.arange(length, device=q.device)
    index = chunks[:, None] * chunk_size + torch.arange(chunk_size, device=q.device)  # (N, C)
    own, places = index < length, index.clamp(max=length - 1)
    real = own[None] if mask is None else mask[:, places] & own  # (B or 1, N, C)
    k, v = repeated_heads(k, q.shape[1]), repeated_heads(v, q.shape[1])
    # (B, H, N, C, D); padding may hold NaN, and 0 * NaN is NaN
    q, k, v = (x[:, :, places].to(wide).masked_fill(~real[:, None, ..., None], 0) for x in (q, k, v))
    q = q * scale
    age, count = real.cumsum(2), real.sum(2)
    end = count.cumsum(1)
    start = end - count  # (B or 1, N)
    age = start[..., None] + age  # (B or 1, N, C)
    rate = log_decay.to(wide)

    def power(exponent: Tensor) -> Tensor:
        """Return gamma^exponent, (B or 1, H, ...), for exponent (B or 1, ...)."""
        return (rate.view(-1, *[1] * (exponent.dim() - 1)) * exponent[:, None]).exp()

    near = age[:, :1] if mask is None else age  # without a mask all chunks are alike
    inner = power((near[..., :, None] - near[..., None, :]).abs())  # (B or 1, H, 1 or N, C, C)
    out = (q @ k.mT * (inner.tril() if causal else inner)) @ v  # (B, H, N, C, V)
    read, write = power(age - start[..., None])[..., None], power(end[..., None] - age)[..., None]
    # gamma^(start_c - end_c') for c' < c, else 0, (B or 1, H, N, N)
    between = power((start[:, :, None] - end[:, None, :]).clamp(min=0)).tril(-1)
    before = between @ ((k * write).mT @ v).flatten(3)  # S_c, (B, H, N, K V)
    if state is not None:
        before = before + power(start)[..., None] * state.flatten(2)[:, :, None]
    before = before.unflatten(3, (k.shape[4], v.shape[4]))
    out = out + (q * read) @ before
    if not causal:  # the same with time reversed, for chunks c' > c
        behind = between.mT @ ((k * read).mT @ v).flatten(3)
        out = out + (q * write) @ behind.unflatten(3, (k.shape[4], v.shape[4]))
    # The last chunk has padding only, so the state before it is the one after all tokens.
    return out.flatten(2, 3)[:, :, token], before[:, :, -1] if return_state else None


def on_grid_at_once(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    """Compute bidirectional retention on a grid: k v^T of each cell, summed along columns and then along rows.

        out_rc = scale q_rc sum_r' gamma^|r - r'| sum_c' gamma^|c - c'| k_r'c' v_r'c'^T

    Time is O(T (rows + columns) K V), memory O(T K V), for each head.

    Shapes: as in `on_grid`. Dtypes: any float; the result is float32, or float64 for float64 inputs.
    """
    wide = state_dtype(q.dtype)
    k, v = repeated_heads(k, q.shape[1]), repeated_heads(v, q.shape[1])
    q, k, v = (x.to(wide).unflatten(2, grid) for x in (q, k, v))
    rows, columns = grid_decays(log_decay.to(wide), grid)  # (H, rows, rows), (H, columns, columns)
    sums = (k[..., None] * v[..., None, :]).flatten(4)  # (B, H, rows, columns, K V)
    sums = columns[:, None] @ sums
    sums = (rows @ sums.flatten(3)).view_as(sums).unflatten(4, (k.shape[4], v.shape[4]))
    return (scale * q[..., None, :] @ sums).squeeze(-2).flatten(2, 3)
