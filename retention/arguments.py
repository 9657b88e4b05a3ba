"""The arguments of `retain`: refused before any computation if they do not fit, else described for the backends."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import FORMS, Call
from .constants import is_constant
from .errors import ShapeError
from .state import RetentionState, state_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ScoreNorm = bool | Literal["absolute"]


def describe(
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
    score_norm: ScoreNorm = False,
    out_dtype: torch.dtype | None = None,
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
    if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number, or None; got scale {scale!r}")
    if not causal and (state is not None or return_state):
        raise ValueError("a state needs causal=True; got causal=False with state or return_state; leave both out")
    if out_dtype not in (None, v.dtype, state_dtype(v.dtype)):
        raise ValueError(f"out_dtype must be {v.dtype}, as v, or {state_dtype(v.dtype)}; got out_dtype {out_dtype!r}")
    _check_mask(q, mask)
    _check_cu_seqlens(q, cu_seqlens, mask)
    if grid is not None:
        _check_grid(q, grid, causal, mask is not None or cu_seqlens is not None)
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
        out_dtype=v.dtype if out_dtype is None else out_dtype,
        form=form,
        causal=causal,
        masked=mask is not None,
        packed=cu_seqlens is not None,
        has_state=state is not None,
        return_state=return_state,
        in_place=in_place,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        transformed=_transformed(),
        chunk_size=chunk_size,
        grid=None if grid is None else (grid[0], grid[1]),
    )


def _transformed() -> bool:
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


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
    (batch, heads, length, key_dim), (k_batch, kv_heads, k_length, k_dim), v_shape = q.shape, k.shape, v.shape
    if (batch, length, key_dim) != (k_batch, k_length, k_dim):
        raise ShapeError(f"q and k must agree in (batch, length, key_dim); {_shapes(q, k, v)}")
    if (k_batch, kv_heads, k_length) != v_shape[:3]:
        raise ShapeError(f"k and v must agree in (batch, heads, length); {_shapes(q, k, v)}")
    if not (heads and kv_heads and key_dim and v_shape[3]) or heads % kv_heads:
        raise ShapeError(
            "heads and head dims must be at least 1, and the heads of q a multiple of those of k and v; "
            + _shapes(q, k, v)
        )
    if log_decay.shape != (heads,):
        raise ShapeError(
            f"log_decay must have one value per head of q, ({heads},); got log_decay {tuple(log_decay.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"q, k and v must have one dtype of {allowed}; got q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"log_decay must be float32 or float64, half precision rounds slow decays to none; got {log_decay.dtype}"
        )
    if not q.device == k.device == v.device == log_decay.device:
        devices = ", ".join(f"{name} {x.device}" for name, x in tensors.items())
        raise ValueError(f"q, k, v and log_decay must be on one device; got {devices}")
    _check_log_decay(log_decay)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_log_decay(log_decay: Tensor) -> None:
    if is_constant(log_decay):  # a layer's was checked when the layer was built
        return
    low, high = _values(log_decay).aminmax()
    sound = (low > -math.inf) & (high <= 0)
    _require(sound, "log_decay must be finite and at most 0; got log_decay {}; pass log(gamma), not gamma", log_decay)


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
    borders = _values(cu_seqlens)
    sound = (borders[..., 0] == 0) & (borders[..., -1] == length) & (borders.diff() >= 0).all(-1)
    _require(
        sound, f"cu_seqlens must start at 0, not fall, and end at the length {length}; got cu_seqlens {{}}", cu_seqlens
    )


def _check_grid(q: Tensor, grid: tuple[int, int], causal: bool, parted: bool) -> None:
    if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(isinstance(n, int) and n >= 1 for n in grid):
        raise ValueError(f"grid must be (rows, columns), two integers of at least 1, or None; got grid {grid!r}")
    if grid[0] * grid[1] != q.shape[2]:
        raise ShapeError(f"grid must have rows * columns = length {q.shape[2]}; got grid {tuple(grid)}")
    if causal:
        raise ValueError(f"a grid has no past and needs causal=False; got causal=True, grid {tuple(grid)}")
    if parted:
        raise ValueError("mask or cu_seqlens and grid exclude each other; got both; batch images of one size")


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
    if state.time.shape != (rows,) or state.time.dtype != torch.long:
        got = f"{state.time.dtype} {tuple(state.time.shape)}"
        raise ShapeError(f"state.time must be torch.int64 (rows,) ({rows},); got state.time {got}")
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


def _values(x: Tensor) -> Tensor:
    """x without gradient, and out of the transforms of torch.func, under which no value may be asked for."""
    x = x.detach()
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _require(condition: Tensor, message: str, value: Tensor) -> None:
    """Check values, not only sizes. An accelerator checks when it gets there, since to ask it would stop the queue.

    So does a compiled call, on every device. condition: made of `_values`.
    """
    if type(condition) is not Tensor or condition.device.type == "meta":
        return  # a tracer's tensors have no values
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        torch._assert_async(condition.all(), message.format("of other values"))
    elif not condition.all():
        raise ValueError(message.format(_values(value).tolist()))


def number(value: object) -> float:
    """NaN, which no bound admits, for what is not a number."""
    return float(value) if isinstance(value, int | float) else math.nan


def check_number(name: str, value: object, sound: bool, allowed: str) -> None:
    """Raises: ValueError that names the option, unless it is sound."""
    if not sound:
        raise ValueError(f"{name} must be a number, {allowed}; got {name} {value!r}")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises: ValueError that names the option, unless it is one of those allowed; True is not 1 here."""
    if not any(value is x or (type(value) is type(x) and value == x) for x in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {name} {value!r}")
