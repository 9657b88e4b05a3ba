"""The paper's two normalisers of the scores. Each is a sum that a state can continue, so every form has both.

decay_norm divides D_nm by sqrt(sum_i D_ni); score_norm divides R_nm by max(|sum_i R_ni|, 1).
Source: Sun et al. 2023, arXiv:2307.08621, Section 2.2.
"""

from __future__ import annotations

from torch import Tensor

from .call import Call, Inputs, ScoreNorm
from .decay import geometric_sum
from .sharding import token_indices
from .state import state_dtype
from .times import counts, segments, token_times

__all__ = ["score_divisor", "total_decay"]


def total_decay(call: Call, inputs: Inputs) -> Tensor:
    """Return the divisor of decay_norm before its square root, sum_i D_ni of each token n, (B, H, T) or (1, H, T).

    With t tokens before n and, without causality, L tokens in all: sum_{i=0}^{t} gamma^i + sum_{i=1}^{L-1-t} gamma^i.

    """
    _, _, _, log_decay, state, mask, cu_seqlens = inputs
    wide = state_dtype(call.dtype)
    if call.grid is not None:  # sum_i D_ni is the sum over rows times the sum over columns
        sides = (call._replace(batch=1, length=n, grid=None) for n in call.grid)
        rows, columns = (total_decay(side, inputs) for side in sides)
        return (rows[..., :, None] * columns[..., None, :]).flatten(2)
    times = token_times(call.batch, call.length, log_decay.device, state, mask, cu_seqlens)
    rate = log_decay.to(wide)[:, None]
    behind = geometric_sum(rate, (times + 1)[:, None].to(wide))  # (B or 1, H, T): token n and those before it
    if call.causal:
        return behind
    lengths = counts(call, inputs)[:, None]
    if cu_seqlens is not None:
        lengths = lengths[segments(cu_seqlens, token_indices(call.length, lengths.device))].view(1, -1)
    ahead = geometric_sum(rate, (lengths - times).clamp(min=1)[:, None].to(wide))  # token n and those after it
    return behind + ahead - 1  # token n itself is in both


def score_divisor(total: Tensor, score_norm: ScoreNorm) -> Tensor:
    """Return max(|total|, 1), the divisor of the scores of a token; "absolute" has torchscale's upper bound 5e4 too."""
    return total.abs().clamp(1.0, 5e4 if score_norm == "absolute" else None)
