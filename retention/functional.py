"""Retention as a function: checks the arguments, chooses a backend, runs it, applies the paper's normalisers."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from . import backends
from .backends import FORMS, Call, eager
from .decay import geometric_sum
from .errors import ShapeError
from .state import RetentionState, state_dtype

ScoreNorm = bool | Literal["absolute"]


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
    decay_norm: bool = False,
    score_norm: ScoreNorm = False,
    chunk_size: int | None = None,
    backend: str = "auto",
    form: str = "auto",
    return_state: bool = False,
) -> Tensor | tuple[Tensor, RetentionState]:
    """Retention of every token with the tokens before it; the shapes are those of `scaled_dot_product_attention`.

        R_nm = scale (q_n . k_m) D_nm,    D_nm = gamma^(t_n - t_m) for m <= n, else 0,    out = R v

    Shapes: q (B, H, T, K); k (B, Hkv, T, K); v (B, Hkv, T, V), where Hkv divides H and each key/value head serves
        H / Hkv query heads in a row; log_decay (H,). Returns out (B, H, T, V), and the state with return_state.
    Dtypes: q, k, v alike, any float; log_decay float32 or float64; sums in float32 at least; out as v.
    Args:
        log_decay: log(gamma) per head, natural logarithm per token, at most 0.
        state: what an earlier call returned, whatever its form or backend: this call continues the sequence.
        scale: factor of q . k; default 1 / sqrt(K).
        mask: (B, T) bool, True = real token. Padding may stand anywhere; time stands still over it, its output is 0.
        cu_seqlens: (N + 1,) int32, the borders 0 = c_0 <= ... <= c_N = T of N sequences packed into one row (B = 1).
            Nothing crosses a border; states then have N rows.
        causal: False gives D_nm = gamma^|t_n - t_m| for all m; no state then.
        decay_norm: divide D_nm by sqrt(sum_i D_ni).
        score_norm: divide R_nm by max(|sum_i R_ni|, 1). "absolute" takes min(max(sum_i |R_ni|, 1), 5e4) without
            gradient, as torchscale does; it cannot be had from a state, so form "parallel" only.
        chunk_size: tokens per chunk of the chunkwise form; default: the backend's.
        backend: "auto" or a registered name; see `explain`. A named backend never falls back.
        form: "auto", "parallel", "chunkwise" or "recurrent". The result is the same.
    Cost: O(T^2 (K + V)) parallel, O(T (C + K) (K + V)) chunkwise, O(T K V) recurrent; for each head.
    Raises: ShapeError, ValueError or TypeError for arguments that do not fit; BackendError if no backend can.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5 to 7; normalisers from its Section 2.1. Differs: the normalisers
        are off, since the norm that follows in a layer cancels them.
    """
    call = _describe(
        q,
        k,
        v,
        log_decay,
        state=state,
        scale=scale,
        mask=mask,
        cu_seqlens=cu_seqlens,
        causal=causal,
        score_norm=score_norm,
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
    options: dict[str, Any] = dict(scale=scale, mask=mask, score_norm=score_norm, form="recurrent", return_state=True)
    call = _describe(q, k, v, log_decay, state=state, in_place=True, **options)
    if call.length != 1:
        raise ShapeError(f"step takes one token, q (batch, heads, 1, key_dim); got q {tuple(q.shape)}; use retain")
    if call.needs_grad:
        raise ValueError("step overwrites the state and has no gradient; call it under torch.no_grad(), or use retain")
    out, _ = _run(call, backend, q, k, v, log_decay, state, mask, None, decay_norm, score_norm)
    state.time += _counts(call, mask, None, q.device)
    return out


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
    return backends.explain(_describe(q, k, v, log_decay, **options), backend)


def token_times(
    batch: int,
    length: int,
    device: torch.device,
    state: RetentionState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """How many tokens of its own sequence stand before each token: (B, T) int64, or (1, T) where all rows agree."""
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
    backend, call = backends.choose(call, name)

    def run(values: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not torch.amp.is_autocast_available(call.device) or not torch.is_autocast_enabled(call.device):
            return backend(call, q, k, values, log_decay, before, mask, cu_seqlens)
        with torch.autocast(call.device, enabled=False):  # sums stay float32
            return backend(call, q, k, values, log_decay, before, mask, cu_seqlens)

    out, kv = run(v, None if state is None else state.kv)
    mass = k_sum = None
    if score_norm == "absolute":
        scores = eager.scores(q, k, log_decay, scale=call.scale, causal=call.causal, mask=mask)
        mass = scores.detach().abs().sum(-1, keepdim=True)
    elif score_norm:  # sum_i R_ni is retention with values of 1
        before = None if state is None or state.k_sum is None else state.k_sum[..., None]
        mass, k_sum = run(torch.ones_like(v[..., :1]), before)

    decay = _total_decay(call, log_decay, state, mask, cu_seqlens).sqrt()[..., None] if decay_norm else None
    if mass is not None:
        mass = mass.abs() if decay is None else mass.abs() / decay
        out = out / mass.clamp(1, 5e4 if score_norm == "absolute" else None)
    if decay is not None:
        out = out / decay
    out = out.to(v.dtype)
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


def _counts(call: Call, mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """How many real tokens of each row or segment the call holds, int64."""
    if cu_seqlens is not None:
        return cu_seqlens.diff().long()
    if mask is not None:
        return mask.sum(1)
    return torch.full((call.batch,), call.length, device=device)


def _describe(
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
    score_norm: ScoreNorm = False,
    chunk_size: int | None = None,
    form: str = "auto",
    return_state: bool = False,
    in_place: bool = False,
) -> Call:
    """Check the arguments of `retain` and put down what a backend needs to know of them."""
    _check_tensors(q, k, v, log_decay)
    if form != "auto" and form not in FORMS:
        raise ValueError(f"form must be 'auto' or one of {', '.join(map(repr, FORMS))}; got form {form!r}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be an integer of at least 1, or None; got chunk_size {chunk_size!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got scale {scale}")
    if not causal and (state is not None or return_state):
        raise ValueError("a state needs causal=True; got causal=False with state or return_state; leave both out")
    _check_mask(q, mask)
    _check_cu_seqlens(q, cu_seqlens, mask)
    if state is not None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_state(q, v, state, rows, score_norm)
    if score_norm == "absolute":
        if form not in ("auto", "parallel") or state is not None or return_state or cu_seqlens is not None:
            raise ValueError(
                "score_norm 'absolute' exists only in the parallel form, without state and cu_seqlens; "
                f"got form {form!r}; use score_norm=True for the one that every form has"
            )
        form = "parallel"
    elif not isinstance(score_norm, bool):
        raise ValueError(f"score_norm must be False, True or 'absolute'; got score_norm {score_norm!r}")
    inputs = (q, k, v, log_decay) if state is None else (q, k, v, log_decay, state.kv)
    return Call(
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        length=q.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        dtype=q.dtype,
        device=q.device.type,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        form=form,
        causal=causal,
        masked=mask is not None,
        packed=cu_seqlens is not None,
        has_state=state is not None,
        return_state=return_state,
        in_place=in_place,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        chunk_size=chunk_size,
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    tensors = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; got {name} {type(x).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ShapeError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim); got {name} {tuple(x.shape)}"
            )
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ShapeError(f"q and k must agree in (batch, length, key_dim); {shapes}")
    if k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"k and v must agree in (batch, heads, length); {shapes}")
    if 0 in (q.shape[1], k.shape[1], q.shape[3], v.shape[3]) or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"heads and head dims must be at least 1, and the heads of q a multiple of those of k and v; {shapes}"
        )
    if log_decay.shape != q.shape[1:2]:
        raise ShapeError(
            f"log_decay must have one value per head of q, ({q.shape[1]},); got log_decay {tuple(log_decay.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(f"q, k and v must have one floating-point dtype; got q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"log_decay must be float32 or float64, half precision rounds slow decays to none; got {log_decay.dtype}"
        )
    if len({x.device for x in tensors.values()}) > 1:
        devices = ", ".join(f"{name} {x.device}" for name, x in tensors.items())
        raise ValueError(f"q, k, v and log_decay must be on one device; got {devices}")
    _require(log_decay <= 0, "log_decay must be at most 0; got log_decay {}; pass log(gamma), not gamma", log_decay)


def _check_mask(q: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True = real token; got mask {got}; use mask.bool()")
    if mask.shape != (q.shape[0], q.shape[2]) or mask.device != q.device:
        want = f"({q.shape[0]}, {q.shape[2]}) on {q.device}"
        raise ShapeError(f"mask must be (batch, length) {want}; got mask {tuple(mask.shape)} on {mask.device}")


def _check_cu_seqlens(q: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 tensor; got cu_seqlens {got}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.device != q.device:
        want = f"(segments + 1,) on {q.device}"
        raise ShapeError(f"cu_seqlens must be {want}; got cu_seqlens {tuple(cu_seqlens.shape)} on {cu_seqlens.device}")
    if mask is not None:
        raise ValueError("mask and cu_seqlens exclude each other; got both; leave padding out of a packed batch")
    if q.shape[0] != 1:
        raise ShapeError(f"packed segments need a batch of 1; got q {tuple(q.shape)}; join the rows to one")
    length = q.shape[2]
    sound = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length) & (cu_seqlens.diff() >= 0)
    _require(
        sound, f"cu_seqlens must start at 0, not fall, and end at the length {length}; got cu_seqlens {{}}", cu_seqlens
    )


def _check_state(q: Tensor, v: Tensor, state: RetentionState, rows: int, score_norm: ScoreNorm) -> None:
    if not isinstance(state, RetentionState):
        raise TypeError(
            f"state must be a RetentionState; got {type(state).__name__}; `retain(..., return_state=True)` makes one"
        )
    shape = (rows, q.shape[1], q.shape[3], v.shape[3])
    if state.kv.shape != shape:
        raise ShapeError(
            f"state.kv must be (rows, heads, key_dim, value_dim) {shape}; got state.kv {tuple(state.kv.shape)}"
        )
    if state.time.shape != (rows,):
        raise ShapeError(f"state.time must be (rows,) ({rows},); got state.time {tuple(state.time.shape)}")
    wide = state_dtype(q.dtype)
    if state.kv.dtype != wide or state.kv.device != q.device:
        raise TypeError(f"state.kv must be {wide} on {q.device}; got state.kv {state.kv.dtype} on {state.kv.device}")
    if (state.k_sum is not None) != bool(score_norm):
        has = "no k_sum" if state.k_sum is None else "a k_sum"
        raise ValueError(
            f"a state has a k_sum exactly if score_norm is on; got a state with {has}, score_norm {score_norm}"
        )
    if state.k_sum is not None and state.k_sum.shape != shape[:3]:
        raise ShapeError(
            f"state.k_sum must be (rows, heads, key_dim) {shape[:3]}; got state.k_sum {tuple(state.k_sum.shape)}"
        )


def _require(condition: Tensor, message: str, value: Tensor) -> None:
    """Check values, not only sizes. An accelerator checks when it gets there, since to ask it would stop the queue."""
    if torch.compiler.is_compiling() or condition.device.type == "meta":
        return
    if condition.device.type != "cpu":
        torch._assert_async(condition.all(), message.format("other values"))
    elif not condition.all():
        raise ValueError(message.format(value.tolist()))
