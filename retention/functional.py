"""Retention as a function: chooses a backend, runs it, applies the paper's normalisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from .arguments import describe
from .call import Call
from .errors import ShapeError
from .normalisers import ScoreNorm, score_divisor, total_decay
from .options import check_device, check_dtype, check_flags, check_whole
from .scores import scores as retention_scores
from .state import RetentionState, state_dtype
from .times import counts


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
        decay_norm=decay_norm,
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
    if state is None:  # which for `retain` is the beginning
        raise TypeError("state must be a RetentionState; got NoneType; `initial_state` makes an empty one")
    options: dict[str, Any] = dict(
        scale=scale, mask=mask, decay_norm=decay_norm, score_norm=score_norm, out_dtype=out_dtype
    )
    call = describe(q, k, v, log_decay, state=state, form="recurrent", in_place=True, **options)
    if call.length != 1:
        raise ShapeError(f"step takes one token, q (batch, heads, 1, key_dim); got q {tuple(q.shape)}; use retain")
    if call.needs_grad:
        raise ValueError("step overwrites the state and has no gradient; call it under torch.no_grad(), or use retain")
    return stepped(call, backend, q, k, v, log_decay, state, mask, decay_norm, score_norm)


def stepped(
    call: Call,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: RetentionState,
    mask: Tensor | None,
    decay_norm: bool,
    score_norm: ScoreNorm,
) -> Tensor:
    """`step` for arguments that have been checked, and described in `call`."""
    out, _ = _run(call, backend, q, k, v, log_decay, state, mask, None, decay_norm, score_norm)
    state.time += 1 if mask is None else counts(call, mask, None, q.device)
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
    options: dict[str, Any] = dict(scale=scale, mask=mask, causal=causal, grid=grid, decay_norm=decay_norm)
    call = describe(q, k, k, log_decay, score_norm=score_norm, form="parallel", **options)
    found = retention_scores(q, k, log_decay, scale=call.scale, causal=causal, mask=mask, grid=call.grid)
    if decay_norm:
        found = found / total_decay(call, log_decay, None, mask, None).sqrt()[..., None]
    if score_norm:
        found = found / score_divisor(
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
    """The state before the first token: all zero. dtype: of q; the state is float32 at least.

    Raises: ValueError or TypeError that names the argument.
    """
    check_whole("rows", rows, 0)
    for name, size in (("heads", heads), ("key_dim", key_dim), ("value_dim", value_dim)):
        check_whole(name, size)
    check_flags(score_norm=score_norm)
    check_dtype(dtype)
    check_device(device)
    wide = state_dtype(dtype or torch.get_default_dtype())
    kv = torch.zeros(rows, heads, key_dim, value_dim, device=device, dtype=wide)
    time = torch.zeros(rows, device=device, dtype=torch.long)
    return RetentionState(kv, time, torch.zeros_like(kv[..., 0]) if score_norm else None)


def explain(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, backend: str = "auto", **options: Any) -> str:
    """Which forms and backends can run `retain` with these arguments, which one is chosen, and why not the others."""
    if "in_place" in options:
        raise TypeError("explain() takes the arguments of `retain`; got in_place")
    return backends.explain(describe(q, k, v, log_decay, **options), backend)


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
        scores = retention_scores(q, k, log_decay, scale=call.scale, causal=call.causal, mask=mask, grid=call.grid)
        mass = scores.detach().abs().sum(-1, keepdim=True)
    elif score_norm:  # sum_i R_ni is retention with values of 1
        before = None if state is None or state.k_sum is None else state.k_sum[..., None]
        mass, k_sum = run(torch.ones_like(v[..., :1]), before)

    decay = total_decay(call, log_decay, state, mask, cu_seqlens).sqrt()[..., None] if decay_norm else None
    if mass is not None:
        out = out / score_divisor(mass if decay is None else mass / decay, score_norm)
    if decay is not None:
        out = out / decay
    if out.dtype != out_dtype:
        out = out.to(out_dtype)
    if not call.return_state or kv is None:
        return out, None
    time = counts(call, mask, cu_seqlens, q.device)
    time = time if state is None else state.time + time
    return out, RetentionState(kv, time, None if k_sum is None else k_sum[..., 0])
