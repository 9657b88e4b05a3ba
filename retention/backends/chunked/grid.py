"""Retention on a grid in linear time: passes along its rows and columns, in both directions.

The decay gamma^(|rows| + |columns|) is a product. So a strip of rows receives the cells of all other strips as one
state for each column. This state decays on its way over the rows, and is then spread over the columns by the same
gamma. With S_c' the state of column c' that reaches a strip of n rows:

    out_rc = scale sum_c' gamma^|c - c'| gamma^(rows to the near edge) q_rc S_c'  +  the part from the strip itself
    S_c'  <- gamma^n S_c' + sum over the n rows of gamma^(rows to the far edge) k v^T

The strip itself is a grid too and is split into strips of columns, down to tiles in the parallel form. No tensor has
the size of all pairs of cells, and the backward pass computes each part of the batch again before it differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...state import state_dtype

__all__ = ["on_grid", "on_grid_anew"]

_SPREAD = 64  # columns over which a state is spread at a time
_AT_ONCE = 4096  # cells, of all rows of the batch together, that are differentiated at a time on CPU


def on_grid(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, grid: tuple[int, int], scale: float, side: int
) -> Tensor:
    """Compute bidirectional retention on a grid.

    Shapes: q (B, H, T, K); k (B, Hkv, T, K); v (B, Hkv, T, V), T = rows * columns; log_decay (H,). Returns (B, H, T,
        V).
    Dtypes: any float; the result is float32, or float64 for float64 inputs.
    Args:
        grid: (rows, columns).
        scale: factor of q . k.
        side: largest number of cells on a side of a tile, which the parallel form computes.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 7, with the decay of a grid.
    """
    wide, groups = state_dtype(q.dtype), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    q, k, v = (x.to(wide).unflatten(2, grid) for x in (q, k, v))
    return _along_rows(q * scale, k, v, log_decay.to(wide)[:, None], side).flatten(2, 3)


def on_grid_anew(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **options: Any) -> Tensor:
    """Run `on_grid` and store only its inputs: the backward pass computes it again, a part of the batch at a time."""
    rows = max(1, _AT_ONCE // q.shape[2]) if q.device.type == "cpu" else max(1, len(q))
    run = partial(checkpoint, partial(on_grid, **options), use_reentrant=False, preserve_rng_state=False)
    parts = zip(*(x.split(rows) for x in (q, k, v)), strict=True)
    return torch.cat([run(*part, log_decay) for part in parts])


def _along_rows(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, side: int) -> Tensor:
    """Compute retention by strips of rows: q, k (B, H, rows, columns, K); v (..., V); rate = log(gamma) (H, 1)."""
    qs, ks, vs = (x.split(_even(x.shape[2], side), dim=2) for x in (q, k, v))
    outs = [_within(*strip, rate, side) for strip in zip(qs, ks, vs, strict=True)]  # (B, H, n, columns, V) each

    def columns(i: int, decay: Tensor) -> Tensor:
        # sum over the n rows of gamma^(rows to the far edge) k^T v for each column, (B, H, columns, K, V)
        return (ks[i] * decay[..., None, None]).permute(0, 1, 3, 4, 2) @ vs[i].transpose(2, 3)

    for i, decay, state in _incoming([x.shape[2] for x in qs], rate, columns):
        # gamma^(rows to the near edge) q_rc sum_c' gamma^|c - c'| S_c', (B, H, columns, n, V)
        read = (qs[i] * decay[..., None, None]).transpose(2, 3) @ _spread(state, rate)
        outs[i] = outs[i] + read.transpose(2, 3)
    return torch.cat(outs, dim=2)


def _within(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, side: int) -> Tensor:
    """Compute retention inside a strip: by strips of its columns, or for few columns in the parallel form."""
    if q.shape[3] > side:
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))
        return _along_rows(q, k, v, rate, side).transpose(2, 3)
    size = q.shape[2:4]
    rows, columns = (_decay(rate, n) for n in size)  # (H, rows, rows), (H, columns, columns)
    # D = gamma^|row distance| gamma^|column distance|, (H, cells, cells)
    decay = (rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    return ((q @ k.mT * decay) @ v).unflatten(2, size)  # ((q k^T) * D) v


def _incoming(
    sizes: list[int], rate: Tensor, summary: Callable[[int, Tensor], Tensor]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the state that reaches each part of a line from all parts before it, then from all parts after it.

    summary: a function of the number of a part and the decay (H, n) of its cells at the edge where its state leaves,
        which returns the state of the part alone.
    Yields: the number of a part, the decay (H, n) of the incoming state at each of its cells, and the incoming state.
    """
    for step in (1, -1):
        state = None
        order = range(len(sizes))[::step]
        for i in order:
            index = torch.arange(sizes[i], device=rate.device, dtype=rate.dtype)
            there, back = (index, index.flip(0))[::step]  # cells to the edge where the state enters, and leaves
            if state is not None:
                yield i, (rate * (there + 1)).exp(), state
            if i != order[-1]:
                new = summary(i, (rate * back).exp())
                carry = (rate * sizes[i]).exp()
                # S <- gamma^n S + the state of the part
                state = new if state is None else new + carry.view(-1, *[1] * (new.dim() - 2)) * state


def _spread(state: Tensor, rate: Tensor) -> Tensor:
    """Return sum_c' gamma^|c - c'| S_c' for states S (B, H, columns, K, V)."""
    parts = state.flatten(3).split(_SPREAD, dim=2)
    outs = [_decay(rate, x.shape[2]) @ x for x in parts]
    for i, decay, before in _incoming([x.shape[2] for x in parts], rate, lambda i, decay: decay[:, None] @ parts[i]):
        outs[i] = outs[i] + decay[..., None] * before
    return torch.cat(outs, dim=2).view_as(state)


def _decay(rate: Tensor, n: int) -> Tensor:
    """Return gamma^distance of n cells in a line, (..., n, n), for rate (..., 1)."""
    index = torch.arange(n, device=rate.device, dtype=rate.dtype)
    return (rate[..., None] * (index[:, None] - index).abs()).exp()


def _even(n: int, most: int) -> int:
    """Return the size of the parts when n is split evenly into as few parts of at most `most` as possible."""
    return -(-n // -(-n // most))
