"""Decay on a grid in linear time: passes along its rows and columns, both ways.

gamma^(|rows| + |columns|) is a product. So what lies in other strips of rows comes into a strip as one state for each
column, which has decayed on its way over the rows and then spreads over the columns by the same gamma:

    S_c   <- gamma^n S_c + sum over n rows of gamma^(rows to the far edge) k v^T
    out_rc = scale sum_c' gamma^|c - c'| gamma^(rows to the near edge) q_rc S_c'  +  what lies in the strip itself

The strip itself is a grid too, taken in strips of columns, down to tiles in the parallel form. Nothing of the size of
all pairs is ever there, and the backward pass computes a piece of the batch anew before it differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...state import state_dtype

SPREAD = 64  # columns at a time
AT_ONCE = 4096  # cells of a batch whose states are kept at a time, on CPU


def on_grid(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, grid: tuple[int, int], scale: float, side: int
) -> Tensor:
    """Retention of the cells of a grid, bidirectional; side: cells a side of what is computed in parallel, at most.

    Shapes: q (B, H, T, K); k (B, Hkv, T, K); v (B, Hkv, T, V), T = rows * columns; log_decay (H,). Returns (B, H, T, V)
        in float32 at least.
    """
    wide, groups = state_dtype(q.dtype), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    q, k, v = (x.to(wide).unflatten(2, grid) for x in (q, k, v))
    return _along_rows(q * scale, k, v, log_decay.to(wide)[:, None], side).flatten(2, 3)


def on_grid_anew(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **options: Any) -> Tensor:
    """`on_grid`, of which nothing but the inputs is stored: the backward pass computes it anew, a part at a time."""
    rows = max(1, AT_ONCE // q.shape[2]) if q.device.type == "cpu" else max(1, len(q))
    run = partial(checkpoint, partial(on_grid, **options), use_reentrant=False, preserve_rng_state=False)
    parts = zip(*(x.split(rows) for x in (q, k, v)), strict=True)
    return torch.cat([run(*part, log_decay) for part in parts])


def _along_rows(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, side: int) -> Tensor:
    """q, k, v (B, H, rows, columns, D); rate (H, 1), the logarithm of gamma."""
    qs, ks, vs = (x.split(_even(x.shape[2], side), dim=2) for x in (q, k, v))
    outs = [_within(*strip, rate, side) for strip in zip(qs, ks, vs, strict=True)]

    def columns(i: int, decay: Tensor) -> Tensor:
        return (ks[i] * decay[..., None, None]).permute(0, 1, 3, 4, 2) @ vs[i].transpose(2, 3)

    for i, decay, state in _incoming([x.shape[2] for x in qs], rate, columns):
        read = (qs[i] * decay[..., None, None]).transpose(2, 3) @ _spread(state, rate)
        outs[i] = outs[i] + read.transpose(2, 3)
    return torch.cat(outs, dim=2)


def _within(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, side: int) -> Tensor:
    """A strip of few rows: strip by strip of its columns, or all pairs at once."""
    if q.shape[3] > side:
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))
        return _along_rows(q, k, v, rate, side).transpose(2, 3)
    size = q.shape[2:4]
    rows, columns = (_decay(rate, n) for n in size)
    decay = (rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    return ((q @ k.mT * decay) @ v).unflatten(2, size)


def _incoming(
    sizes: list[int], rate: Tensor, summary: Callable[[int, Tensor], Tensor]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What comes into each part of a line from all before it, then from all after it.

    summary: of a part, given its number and how its cells have decayed at the edge where it goes out, (H, n).
    Yields: the number of a part, how what comes in decays up to each of its cells, (H, n), and what comes in.
    """
    for step in (1, -1):
        state = None
        order = range(len(sizes))[::step]
        for i in order:
            index = torch.arange(sizes[i], device=rate.device, dtype=rate.dtype)
            there, back = (index, index.flip(0))[::step]  # cells to the edge where it comes in, and goes out
            if state is not None:
                yield i, (rate * (there + 1)).exp(), state
            if i != order[-1]:
                new = summary(i, (rate * back).exp())
                carry = (rate * sizes[i]).exp()
                state = new if state is None else new + carry.view(-1, *[1] * (new.dim() - 2)) * state


def _spread(state: Tensor, rate: Tensor) -> Tensor:
    """sum_c' gamma^|c - c'| state_c' of states (B, H, columns, K, V)."""
    parts = state.flatten(3).split(SPREAD, dim=2)
    outs = [_decay(rate, x.shape[2]) @ x for x in parts]
    for i, decay, before in _incoming([x.shape[2] for x in parts], rate, lambda i, decay: decay[:, None] @ parts[i]):
        outs[i] = outs[i] + decay[..., None] * before
    return torch.cat(outs, dim=2).view_as(state)


def _decay(rate: Tensor, n: int) -> Tensor:
    """gamma^distance of n cells in a line, (H, n, n)."""
    index = torch.arange(n, device=rate.device, dtype=rate.dtype)
    return (rate[..., None] * (index[:, None] - index).abs()).exp()


def _even(n: int, most: int) -> int:
    """The size of the fewest equal parts of n that are not larger than `most`."""
    return -(-n // -(-n // most))
