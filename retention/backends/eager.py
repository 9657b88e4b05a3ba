"""The paper's parallel and recurrent forms, written to be read.

They run on any device and in any float dtype, and can be differentiated any number of times.
Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5 (parallel) and Eq. 6 (recurrent). Differs: the caller applies the
    normalisers of the paper's Section 2.2; half precision is computed in float32.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..call import Call
from ..decay import decay_factors
from ..scores import grid_decays, grid_scores, repeated_heads, scores
from ..state import state_dtype

__all__ = ["SCORES_AT_ONCE", "Eager", "backend"]

SCORES_AT_ONCE = 2**22  # scores of a grid; more do not fit the processor's cache


class Eager:
    """The backend "eager": the parallel and the recurrent form; see `Backend`."""

    def why_not(self, call: Call) -> list[str]:
        reasons = []
        if call.form not in ("parallel", "recurrent"):
            reasons.append(f"has the forms parallel and recurrent, not {call.form}")
        if call.form == "recurrent" and not call.causal:
            reasons.append("the recurrent form is causal; use parallel or chunkwise")
        if call.in_place and (call.form != "recurrent" or call.length != 1):
            reasons.append("overwrites a state only in the recurrent form, one token at a time")
        return reasons

    def __call__(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        if cu_seqlens is not None:
            return self._packed(call, q, k, v, log_decay, state, cu_seqlens)
        wide = state_dtype(call.dtype)
        if not call.dtype == log_decay.dtype == wide:
            q, k, v, log_decay = (x.to(wide) for x in (q, k, v, log_decay))
        q = q * call.scale
        k, v = repeated_heads(k, call.heads), repeated_heads(v, call.heads)
        if mask is not None:  # padding may hold NaN, and 0 * NaN is NaN
            q, k, v = (x.masked_fill(~mask[:, None, :, None], 0) for x in (q, k, v))
        if call.grid is not None:
            return _on_grid(q, k, v, log_decay, call.grid).to(call.out_dtype), None
        if call.form == "parallel":
            out, final = _parallel(q, k, v, log_decay, state, mask, call.causal, call.return_state)
        elif call.in_place and state is not None:
            out, final = _step(q, k, v, log_decay, state, mask)
        else:
            out, final = _recurrent(q, k, v, log_decay, state, mask)
        return out.to(call.out_dtype), final if call.return_state else None

    def _packed(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Run each segment as a call of its own."""
        outs, states = [], []
        for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            q_i, k_i, v_i = (x[:, :, start:end] for x in (q, k, v))
            out, after = self(call, q_i, k_i, v_i, log_decay, None if state is None else state[i, None], None, None)
            outs.append(out)
            states += [] if after is None else [after]
        return torch.cat(outs, dim=2), torch.cat(states) if call.return_state else None


def _parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute R v, and the state if there is one before or one is wanted after.

    q (B, H, T, K), scaled; k (B, H, T, K); v (B, H, T, V); log_decay (H,); state (B, H, K, V) or None; mask (B, T) or
    None. With age_n real tokens up to token n, itself included, and N real tokens in all:

        out_n = sum_m R_nm v_m + gamma^age_n q_n S
        S'    = sum_m gamma^(N - age_m) k_m^T v_m + gamma^N S
    """
    out = scores(q, k, log_decay, causal=causal, mask=mask) @ v  # R v, (B, H, T, V)
    if state is None and not return_state:
        return out, None
    age = torch.ones_like(q[:, 0, :, 0], dtype=torch.long) if mask is None else mask.long()
    age = age.cumsum(1)[:, None]  # (B, 1, T)
    count = age[..., -1:] if q.shape[2] else age.new_zeros(len(age), 1, 1)  # N, (B, 1, 1)
    rate = log_decay[:, None]  # log(gamma), (H, 1)
    final = (k * (rate * (count - age)).exp()[..., None]).mT @ v  # sum_m gamma^(N - age_m) k_m^T v_m, (B, H, K, V)
    if state is not None:
        out = out + (q * (rate * age).exp()[..., None]) @ state  # + gamma^age_n q_n S
        final = final + (rate * count).exp()[..., None] * state  # + gamma^N S
    return out, final


def _on_grid(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute R v for some grid rows of queries at a time, so that the scores of all queries never exist at once."""
    rows, columns = grid_decays(log_decay, grid)  # (H, rows, rows), (H, columns, columns)
    if torch.compiler.is_exporting():  # the number of parts would depend on the batch
        return grid_scores(q, k, rows, columns) @ v
    at_once = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * grid[1] * q.shape[2]))
    blocks = zip(q.split(at_once * grid[1], dim=2), rows.split(at_once, dim=1), strict=True)
    return torch.cat([grid_scores(q_i, k, rows_i, columns) @ v for q_i, rows_i in blocks], dim=2)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Update the state token by token: S_n = gamma S_(n-1) + k_n^T v_n, out_n = q_n S_n; padding keeps the state."""
    decay = decay_factors(log_decay)  # gamma, (H, 1, 1)
    kv = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state.clone()  # S, (B, H, K, V)
    out = [v[:, :, :0]]
    for n in range(q.shape[2]):
        q_n, k_n, v_n = (x[:, :, n, None] for x in (q, k, v))  # (B, H, 1, K), (B, H, 1, K), (B, H, 1, V)
        new = decay * kv + k_n.mT * v_n  # S_n = gamma S_(n-1) + k_n^T v_n
        kv = new if mask is None else torch.where(mask[:, n, None, None, None], new, kv)
        out.append(q_n @ kv)  # q_n S_n
    return torch.cat(out, dim=2), kv


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute S = gamma S + k^T v and out = q S for one token; `state` is overwritten."""
    decay = decay_factors(log_decay)  # (H, 1, 1)
    if mask is not None:
        decay = torch.where(mask[:, None, :, None], decay, 1)  # padding keeps the state; its k is 0 already
    state.mul_(decay).addcmul_(k.mT, v)  # (B, H, K, V)
    return q @ state, state


backend = Eager()
