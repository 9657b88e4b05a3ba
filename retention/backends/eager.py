"""The paper's parallel and recurrent forms, to be read: any device and float dtype, differentiable any number of times.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5 (parallel) and Eq. 6 (recurrent). Differs: the normalisers of the
paper's Section 2.2 are applied by the caller; half precision is computed in float32.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..call import Call
from ..decay import decay_factors
from ..scores import grid_decays, grid_scores, repeated_heads, scores
from ..state import state_dtype

SCORES_AT_ONCE = 2**22  # on a grid; larger leaves the cache


class Eager:
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
        if mask is not None:  # 0 * NaN is NaN: what stands in the padding must not count
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
        """Each segment as a call of its own."""
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
    out = scores(q, k, log_decay, causal=causal, mask=mask) @ v
    if state is None and not return_state:
        return out, None
    age = torch.ones_like(q[:, 0, :, 0], dtype=torch.long) if mask is None else mask.long()
    age = age.cumsum(1)[:, None]  # (B, 1, T): real tokens since the state, the own one included
    count = age[..., -1:] if q.shape[2] else age.new_zeros(len(age), 1, 1)
    rate = log_decay[:, None]
    final = (k * (rate * (count - age)).exp()[..., None]).mT @ v
    if state is not None:
        out = out + (q * (rate * age).exp()[..., None]) @ state
        final = final + (rate * count).exp()[..., None] * state
    return out, final


def _on_grid(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, grid: tuple[int, int]) -> Tensor:
    """Some rows of queries at a time: the scores of all of them need not be there at once."""
    rows, columns = grid_decays(log_decay, grid)
    at_once = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * grid[1] * q.shape[2]))
    blocks = zip(q.split(at_once * grid[1], dim=2), rows.split(at_once, dim=1), strict=True)
    return torch.cat([grid_scores(q_i, k, rows_i, columns) @ v for q_i, rows_i in blocks], dim=2)


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    decay = decay_factors(log_decay)
    kv = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state.clone()
    out = [v[:, :, :0]]
    for n in range(q.shape[2]):
        q_n, k_n, v_n = (x[:, :, n, None] for x in (q, k, v))
        new = decay * kv + k_n.mT * v_n
        kv = new if mask is None else torch.where(mask[:, n, None, None, None], new, kv)
        out.append(q_n @ kv)
    return torch.cat(out, dim=2), kv


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token; `state` is overwritten."""
    decay = decay_factors(log_decay)
    if mask is not None:
        decay = torch.where(mask[:, None, :, None], decay, 1)  # k is 0 there already
    state.mul_(decay).addcmul_(k.mT, v)
    return q @ state, state


backend = Eager()
