"""Retention as a function: chooses a backend, runs it, applies the paper's normalisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from .arguments import ScoreNorm, describe
from .backends import Call, eager
from .decay import geometric_sum
from .errors import ShapeError
from .state import RetentionState, state_dtype


def retain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: RetentionState | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    grid: tuple[int, int] | None = None,
    decay_norm: bool = False,
    score_norm: ScoreNorm = False,
    out_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    form: str = "auto",
    return_state: bool = False,
) -> Tensor | tuple[Tensor, RetentionState]:
    """Retention of every token with the tokens before it; the shapes are those of `scaled_dot_product_attention`.

        R_nm = scale (q_n . k_m) D_nm,    D_nm = gamma^(t_n - t_m) for m <= n, else 0,    out = R v

    Shapes: q (B, H, T, K); k (B, Hkv, T, K); v (B, Hkv, T, V), where Hkv divides H and each key/value head serves
        H / Hkv query heads in a row; log_decay (H,). Returns out (B, H, T, V), and the state with return_state.
    Dtypes: q, k, v alike, any float; log_decay float32 or float64; sums in float32 at least; out as v, or out_dtype.
    Args:
        log_decay: log(gamma) per head, natural logarithm per token, at most 0.
        state: what an earlier call returned, whatever its form or backend: this call continues the sequence.
        scale: factor of q . k; default 1 / sqrt(K).
        mask: (B, T) bool, True = real token. Padding may stand anywhere; time stands still over it, its output is 0.
        cu_seqlens: (N + 1,) int32, the borders 0 = c_0 <= ... <= c_N = T of N sequences packed into one row (B = 1).
            Nothing crosses a border; states then have N rows.
        causal: False gives D_nm = gamma^|t_n - t_m| for all m; no state then.
        grid: (rows, columns) of an image whose cells are the tokens, row by row, T = rows * columns; with causal=False
            D_nm = gamma^(|row_n - row_m| + |column_n - column_m|). No mask or cu_seqlens.
        decay_norm: divide D_nm by sqrt(sum_i D_ni).
        score_norm: divide R_nm by max(|sum_i R_ni|, 1). Where the scores cancel, rounding errors grow by
            sum_i |R_ni| / max(|sum_i R_ni|, 1): 2e-5 was seen in float32. "absolute" takes
            min(max(sum_i |R_ni|, 1), 5e4) without gradient, as torchscale does; it cannot be had from a state, so form
            "parallel" only.
        out_dtype: of out; default: that of v. float32 keeps sums of half precision, which may leave its range: take it
            where a norm or a division follows.
        chunk_size: tokens per chunk of the chunkwise form, on a grid cells per tile; default: the backend's.
        backend: "auto" or a registered name; see `explain`. A named backend never falls back.
        form: "auto", "parallel", "chunkwise" or "recurrent". The result is the same.
    Cost: O(T^2 (K + V)) parallel, O(T (C + K) (K + V)) chunkwise, O(T K V) recurrent; for each head. On a grid the
        chunkwise form is linear in T too.
    Raises: ShapeError, ValueError or TypeError for arguments that do not fit; BackendError if no backend can.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5 to 7; normalisers from its Section 2.2. Differs: the normalisers
        are off, since the norm that follows in a layer cancels them.
    """
    call = describe(
        q,
        k,
        v,
        log_decay,
        state=state,
        scale=scale,
        mask=mask,
        cu_seqlens=cu_seqlens,
        causal=causal,
        grid=grid,
        score_norm=score_norm,
        out_dtype=out_dtype,
        chunk_size=chunk_size,
        form=form,
        return_state=return_state,
    )
    out, new = _run(call, backend, q, k, v, log_decay, state, mask, cu_seqlens, decay_norm, score_norm)
    return out if new is None else (out, new)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: RetentionState,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    decay_norm: bool = False,
    score_norm: ScoreNorm = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """One more token for each row; `state` is updated in place. The same result as `retain`, for decoding.

    Shapes: q (B, H, 1, K); k (B, Hkv, 1, K); v (B, Hkv, 1, V); mask (B, 1). Returns out (B, H, 1, V).
    Cost: O(K V) for each head, at any position; allocates nothing that lasts. No gradients.
    Raises: as `retain`; ValueError if a gradient would be needed.
    """
    if not isinstance(state, RetentionState):
        raise TypeError(
            f"state must be a RetentionState; got {type(state).__name__}; `initial_state` makes an empty one"
        )
    options: dict[str, Any] = dict(scale=scale, mask=mask, score_norm=score_norm, out_dtype=out_dtype, form="recurrent")
    call = describe(q, k, v, log_decay, state=state, in_place=True, **options)
    if call.length != 1:
        raise ShapeError(f"step takes one token, q (batch, heads, 1, key_dim); got q {tuple(q.shape)}; use retain")
    if call.needs_grad:
        raise ValueError("step overwrites the state and has no gradient; call it under torch.no_grad(), or use retain")
    out, _ = _run(call, backend, q, k, v, log_decay, state, mask, None, decay_norm, score_norm)
    state.time += 1 if mask is None else _counts(call, mask, None, q.device)
    return out


def scores(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    grid: tuple[int, int] | None = None,
    decay_norm: bool = False,
    score_norm: ScoreNorm = False,
) -> Tensor:
    """The retention scores R of the parallel form, (B, H, T, T): `retain` is R v. Arguments and source as there."""
    options: dict[str, Any] = dict(scale=scale, mask=mask, causal=causal, grid=grid)
    call = describe(q, k, k, log_decay, score_norm=score_norm, form="parallel", **options)
    found = eager.scores(q, k, log_decay, scale=call.scale, causal=causal, mask=mask, grid=call.grid)
    if decay_norm:
        found = found / _total_decay(call, log_decay, None, mask, None).sqrt()[..., None]
    if score_norm:
        found = found / _clamped(
            found.abs().sum(-1, True) if score_norm == "absolute" else found.sum(-1, True), score_norm
        )
    return found


def initial_state(
    rows: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    score_norm: bool = False,
    device: Any = None,
    dtype: Any = None,
) -> RetentionState:
    """The state before the first token: all zero. dtype: of q; the state is float32 at least."""
    wide = state_dtype(dtype or torch.get_default_dtype())
    kv = torch.zeros(rows, heads, key_dim, value_dim, device=device, dtype=wide)
    time = torch.zeros(rows, device=device, dtype=torch.long)
    return RetentionState(kv, time, torch.zeros_like(kv[..., 0]) if score_norm else None)


def explain(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, backend: str = "auto", **options: Any) -> str:
    """Which forms and backends can run `retain` with these arguments, which one is chosen, and why not the others."""
    options.pop("decay_norm", None)  # any backend can
    return backends.explain(describe(q, k, v, log_decay, **options), backend)


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


def _run(
    call: Call,
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: RetentionState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_norm: bool,
    score_norm: ScoreNorm,
) -> tuple[Tensor, RetentionState | None]:
    out_dtype = call.out_dtype
    if decay_norm or score_norm:  # a sum may be too large for half precision, its mean is not
        call = call._replace(out_dtype=state_dtype(call.dtype))
    backend, call = backends.choose(call, name)

    def run(values: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if call.device == "meta" or not torch.is_autocast_enabled(call.device):
            return backend(call, q, k, values, log_decay, before, mask, cu_seqlens)
        with torch.autocast(call.device, enabled=False):  # sums stay float32
            return backend(call, q, k, values, log_decay, before, mask, cu_seqlens)

    out, kv = run(v, None if state is None else state.kv)
    mass = k_sum = None
    if score_norm == "absolute":
        scores = eager.scores(q, k, log_decay, scale=call.scale, causal=call.causal, mask=mask, grid=call.grid)
        mass = scores.detach().abs().sum(-1, keepdim=True)
    elif score_norm:  # sum_i R_ni is retention with values of 1
        before = None if state is None or state.k_sum is None else state.k_sum[..., None]
        mass, k_sum = run(torch.ones_like(v[..., :1]), before)

    decay = _total_decay(call, log_decay, state, mask, cu_seqlens).sqrt()[..., None] if decay_norm else None
    if mass is not None:
        out = out / _clamped(mass if decay is None else mass / decay, score_norm)
    if decay is not None:
        out = out / decay
    if out.dtype != out_dtype:
        out = out.to(out_dtype)
    if not call.return_state or kv is None:
        return out, None
    time = _counts(call, mask, cu_seqlens, q.device)
    time = time if state is None else state.time + time
    return out, RetentionState(kv, time, None if k_sum is None else k_sum[..., 0])


def _total_decay(
    call: Call, log_decay: Tensor, state: RetentionState | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """sum_i D_ni of each token, (B or 1, H, T)."""
    wide = state_dtype(call.dtype)
    if call.grid is not None:  # a sum over rows times a sum over columns
        sides = (call._replace(batch=1, length=n, grid=None) for n in call.grid)
        rows, columns = (_total_decay(side, log_decay, None, None, None) for side in sides)
        return (rows[..., :, None] * columns[..., None, :]).flatten(2)
    times = token_times(call.batch, call.length, log_decay.device, state, mask, cu_seqlens)
    rate = log_decay.to(wide)[:, None]
    behind = geometric_sum(rate, (times + 1)[:, None].to(wide))
    if call.causal:
        return behind
    lengths = _counts(call, mask, cu_seqlens, log_decay.device)[:, None]
    if cu_seqlens is not None:
        lengths = lengths.repeat_interleave(lengths[:, 0], output_size=call.length).view(1, -1)
    ahead = geometric_sum(rate, (lengths - times).clamp(min=1)[:, None].to(wide))
    return behind + ahead - 1


def _clamped(mass: Tensor, score_norm: ScoreNorm) -> Tensor:
    return mass.abs().clamp(1, 5e4 if score_norm == "absolute" else None)


def _counts(call: Call, mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """How many real tokens of each row or segment the call holds, int64."""
    if cu_seqlens is not None:
        return cu_seqlens.diff().long()
    if mask is not None:
        return mask.sum(1)
    return torch.full((call.batch,), call.length, device=device)
