"""The arguments of `retain`: each is checked before any computation, then a `Call` describes them for the backends."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .call import FORMS, Call, Inputs, Options, ScoreNorm
from .constants import is_constant, traced
from .errors import ShapeError
from .options import DTYPES, check_flags, check_whole, is_whole, number, shown
from .sharding import whole_length
from .state import RetentionState, state_dtype

__all__ = [
    "check_contents",
    "check_form",
    "check_input",
    "check_mask",
    "check_places",
    "check_state",
    "check_token_ids",
    "describe",
    "described",
    "refuse_torchscript",
    "weight_of",
]


def describe(inputs: Inputs, options: Options) -> Call:
    """Check the arguments of `retain` and describe them in a `Call`.

    Raises: ShapeError, ValueError or TypeError that names the argument, its value and the values allowed.
    """
    q, k, v, log_decay, state, mask, cu_seqlens = inputs
    _check_tensors(q, k, v, log_decay)
    batch, heads, length, key_dim = q.shape
    causal, grid, form, score_norm = options.causal, options.grid, options.form, options.score_norm
    check_form(form)
    if options.chunk_size is not None:
        check_whole("chunk_size", options.chunk_size, optional=True)
    if options.scale is not None and not abs(number(options.scale)) < math.inf:
        raise ValueError(f"scale must be a finite number, or None; got scale {shown(options.scale)}")
    if not (type(causal) is type(options.decay_norm) is type(options.return_state) is bool):
        check_flags(causal=causal, decay_norm=options.decay_norm, return_state=options.return_state)
    _check_score_norm(score_norm)
    if mask is not None or cu_seqlens is not None or grid is not None:
        check_places(batch, length, q.device, mask=mask, cu_seqlens=cu_seqlens, grid=grid, causal=causal)
        check_contents(length, mask, cu_seqlens)
    if not causal and (state is not None or options.return_state):
        raise ValueError("a state needs causal=True; got causal=False with state or return_state; leave both out")
    if options.out_dtype not in (None, v.dtype, state_dtype(v.dtype)):
        wide = state_dtype(v.dtype)
        raise ValueError(f"out_dtype must be {v.dtype}, as v, or {wide}; got out_dtype {shown(options.out_dtype)}")
    if state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_state(state, (rows, heads, key_dim, v.shape[3]), q.dtype, q.device, score_norm)
    if score_norm == "absolute":
        if form not in ("auto", "parallel") or state is not None or options.return_state or cu_seqlens is not None:
            raise ValueError(
                "score_norm 'absolute' exists only in the parallel form, without state and cu_seqlens; "
                f"got form {form!r}; use score_norm=True for the one that every form has"
            )
        options = options._replace(form="parallel")
    return described(inputs, options)


def described(inputs: Inputs, options: Options) -> Call:
    """Make the `Call` of arguments that have been checked."""
    q, k, v, log_decay, state, mask, cu_seqlens = inputs
    batch, heads, length, key_dim = q.shape
    learnt = (q, k, v, log_decay) if state is None else (q, k, v, log_decay, state.kv)
    return Call(
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        length=length,
        key_dim=key_dim,
        value_dim=v.shape[3],
        dtype=q.dtype,
        device=q.device.type,
        scale=key_dim**-0.5 if options.scale is None else float(options.scale),
        out_dtype=v.dtype if options.out_dtype is None else options.out_dtype,
        form=options.form,
        causal=options.causal,
        masked=mask is not None,
        packed=cu_seqlens is not None,
        has_state=state is not None,
        return_state=options.return_state,
        in_place=options.in_place,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in learnt),
        transformed=_transformed(),
        chunk_size=options.chunk_size,
        grid=None if options.grid is None else (options.grid[0], options.grid[1]),
    )


def refuse_torchscript() -> NoReturn:
    """Raises: TypeError that names what takes the place of TorchScript."""
    raise TypeError(
        "TorchScript cannot hold retention, whose program depends on lengths; got torch.jit.script or torch.jit.trace; "
        "use torch.export.export, or torch.onnx.export with dynamo=True"
    )


def check_form(form: object) -> None:
    """Check that form is "auto" or one of FORMS. Raises: ValueError if not."""
    if not isinstance(form, str) or (form != "auto" and form not in FORMS):
        raise ValueError(f"form must be 'auto' or one of {', '.join(map(repr, FORMS))}; got form {shown(form)}")


def _check_score_norm(score_norm: object) -> None:
    """Check that score_norm is False, True or "absolute". Raises: ValueError if not."""
    if not (isinstance(score_norm, bool) or (isinstance(score_norm, str) and score_norm == "absolute")):
        raise ValueError(f"score_norm must be False, True or 'absolute'; got score_norm {shown(score_norm)}")


def weight_of(linear: Any) -> Tensor | None:
    """Return the weight that multiplies a layer's input; None if another module or a hook may change the input."""
    return linear.weight if type(linear) is torch.nn.Linear and "forward" not in vars(linear) else None


def check_input(name: str, x: object, dim: int, weight: Tensor | None = None, *, tokens: bool = True) -> None:
    """Check the input x of a layer: (batch, length, dim), or (..., dim) if `tokens` is False.

    weight: the weight that multiplies x, if it is known; x must have its device, and its dtype unless autocast is on.
    Raises: TypeError, ShapeError, or ValueError for another device.
    """
    if torch.jit.is_tracing():
        refuse_torchscript()
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {name} {shown(x)}")
    shape = f"(batch, length, dim {dim})" if tokens else f"(..., dim {dim})"
    if x.is_nested or x.dim() == 0 or (tokens and x.dim() != 3) or x.shape[-1] != dim:
        raise ShapeError(f"{name} must be {shape}; got {name} {'nested' if x.is_nested else tuple(x.shape)}")
    if x.dtype not in DTYPES or x.layout is not torch.strided:
        raise TypeError(f"{name} must be dense and of a floating dtype, {shape}; got {name} {x.dtype}, {x.layout}")
    if weight is None or (x.dtype == weight.dtype and x.device == weight.device) or weight.device.type == "meta":
        return
    if x.device != weight.device:
        raise ValueError(f"{name} must be on the device of the weights, {weight.device}; got {name} on {x.device}")
    if not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} must be {weight.dtype}, as the weights are; got {name} {x.dtype}; use .to or autocast")


def check_token_ids(tokens: object, vocab_size: int | None = None, name: str = "tokens") -> None:
    """Check that tokens are (batch, length) int32 or int64, at least 0 and below `vocab_size`.

    Values are checked on the CPU only, since reading those of an accelerator would stop its queue; there the embedding
    checks them.
    Raises: TypeError, ShapeError or ValueError.
    """
    if torch.jit.is_tracing():
        refuse_torchscript()
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int64 or int32 tensor (batch, length); got {name} {shown(tokens)}")
    if tokens.dim() != 2:
        raise ShapeError(f"{name} must be (batch, length); got {name} {tuple(tokens.shape)}")
    if vocab_size is None or traced() or tokens.device.type != "cpu" or not tokens.numel():
        return  # an accelerator checks the indices when the embedding looks them up
    low, high = (x.item() for x in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} must be at least 0 and below vocab_size {vocab_size}; got {name} from {low} to {high}"
        )


def check_places(
    batch: int,
    length: int,
    device: torch.device,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    causal: bool = True,
) -> None:
    """Check the types and shapes of the arguments that place tokens in time: mask, cu_seqlens and grid.

    Shapes: mask (batch, length) bool; cu_seqlens (N + 1,) with batch 1; grid (rows, columns), rows * columns = length.
    Raises: ShapeError, ValueError or TypeError.
    """
    if mask is not None:
        check_mask(mask, batch, length, device)
    if cu_seqlens is not None:
        _check_cu_seqlens(batch, length, device, cu_seqlens, mask)
    if grid is not None:
        _check_grid(length, grid, causal, mask is not None or cu_seqlens is not None)


def check_contents(length: int, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Check the values of a mask or of borders that have passed `check_places`. Raises: ValueError.

    The borders are those of the whole sequence, also where a call has a part of it, inside of `context_parallel`.
    """
    if mask is not None and not traced() and mask.shape[0] == length > 2:
        _refuse_pairs(mask)
    if cu_seqlens is not None:
        length = whole_length(length)
        borders = _values(cu_seqlens)
        sound = ((borders[..., 0] == 0) & (borders[..., -1] == length) & (borders.diff() >= 0).all(-1)).all()
        message = f"cu_seqlens must start at 0, not fall, and end at the length {length}; got cu_seqlens {{}}"
        _require(sound, message, cu_seqlens)


def _transformed() -> bool:
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    if torch.jit.is_tracing():
        refuse_torchscript()
    for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; got {name} {type(x).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense tensor; got {name} {'nested' if x.is_nested else x.layout}")
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
        devices = f"q {q.device}, k {k.device}, v {v.device}, log_decay {log_decay.device}"
        raise ValueError(f"q, k, v and log_decay must be on one device; got {devices}")
    _check_log_decay(log_decay)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_log_decay(log_decay: Tensor) -> None:
    if is_constant(log_decay):  # the decay of a layer is checked when the layer is built
        return
    low, high = _values(log_decay).aminmax()
    sound = (low > -math.inf) & (high <= 0)
    _require(sound, "log_decay must be finite and at most 0; got log_decay {}; pass log(gamma), not gamma", log_decay)


def check_mask(mask: object, batch: int, length: int, device: torch.device) -> None:
    """Check that mask is (batch, length) bool on `device`. Raises: TypeError or ShapeError if not."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True = real token; got mask {got}; use mask.bool()")
    if mask.shape != (batch, length) or mask.device != device:
        want = f"({batch}, {length}) on {device}"
        raise ShapeError(f"mask must be (batch, length) {want}; got mask {tuple(mask.shape)} on {mask.device}")


def _refuse_pairs(mask: Tensor) -> None:
    """Refuse a (T, T) mask of pairs of tokens: the causal mask of attention or its inverse, if B = T."""
    mask = _values(mask)
    seen = torch.ones_like(mask).tril()
    message = (
        "mask must be (batch, length), True = real token; got a mask of pairs of tokens, (length, length), as causal "
        "attention takes; leave it out; if it is padding of rows of 1, 2, 3, ... tokens, put these in another order"
    )
    _require((mask != seen).any() & (mask == seen).any(), message, mask)


def _check_cu_seqlens(batch: int, length: int, device: torch.device, cu_seqlens: Tensor, mask: Tensor | None) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 tensor; got cu_seqlens {got}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.device != device:
        want = f"(segments + 1,) on {device}"
        raise ShapeError(f"cu_seqlens must be {want}; got cu_seqlens {tuple(cu_seqlens.shape)} on {cu_seqlens.device}")
    if mask is not None:
        raise ValueError("mask and cu_seqlens exclude each other; got both; leave padding out of a packed batch")
    if batch != 1:
        raise ShapeError(f"cu_seqlens are packed segments and need a batch of 1; got a batch of {batch}; join the rows")


def _check_grid(length: int, grid: tuple[int, int], causal: bool, parted: bool) -> None:
    if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(is_whole(n) and n >= 1 for n in grid):
        raise ValueError(f"grid must be (rows, columns), two integers of at least 1, or None; got grid {shown(grid)}")
    if grid[0] * grid[1] != length:
        raise ShapeError(f"grid must have rows * columns = length {length}; got grid {tuple(grid)}")
    if causal:
        raise ValueError(f"a grid has no past and needs causal=False; got causal=True, grid {tuple(grid)}")
    if parted:
        raise ValueError("mask or cu_seqlens and grid exclude each other; got both; batch images of one size")


def check_state(
    state: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None, score_norm: ScoreNorm
) -> None:
    """Check a state for inputs of `dtype` on `device`, where None is any device.

    shape: (rows, heads, key_dim, value_dim).
    Raises: ShapeError, ValueError or TypeError.
    """
    if not isinstance(state, RetentionState):
        raise TypeError(
            f"state must be a RetentionState; got {type(state).__name__}; `retain(..., return_state=True)` makes one, "
            "and `initial_state` an empty one"
        )
    kv, time, k_sum = state.kv, state.time, state.k_sum
    if not (isinstance(kv, Tensor) and isinstance(time, Tensor) and (k_sum is None or isinstance(k_sum, Tensor))):
        got = ", ".join(f"{name} {type(x).__name__}" for name, x in vars(state).items())
        raise TypeError(f"a state must hold tensors, but for a k_sum of None; got state with {got}")
    if kv.shape != shape:
        raise ShapeError(f"state.kv must be (rows, heads, key_dim, value_dim) {shape}; got state.kv {tuple(kv.shape)}")
    if time.shape != shape[:1] or time.dtype != torch.long:
        got = f"{time.dtype} {tuple(time.shape)}"
        raise ShapeError(f"state.time must be torch.int64 (rows,) ({shape[0]},); got state.time {got}")
    if (k_sum is not None) != bool(score_norm):
        has = "no k_sum" if k_sum is None else "a k_sum"
        raise ValueError(
            f"a state has a k_sum exactly if score_norm is on; got a state with {has}, score_norm {score_norm}"
        )
    if k_sum is not None and k_sum.shape != shape[:3]:
        raise ShapeError(
            f"state.k_sum must be (rows, heads, key_dim) {shape[:3]}; got state.k_sum {tuple(k_sum.shape)}"
        )
    wide, device = state_dtype(dtype), kv.device if device is None else device
    sums = (("kv", kv),) if k_sum is None else (("kv", kv), ("k_sum", k_sum))
    for name, x in sums:
        if x.dtype != wide or x.device != device:
            raise TypeError(f"state.{name} must be {wide} on {device}; got state.{name} {x.dtype} on {x.device}")
    if time.device != device:
        raise ValueError(f"state.time must be on {device}; got state.time on {time.device}")
    # Reading values of an accelerator at each decoded token would stop its queue.
    if type(time) is Tensor and device.type == "cpu" and not traced() and min(time.tolist(), default=0) < 0:
        raise ValueError(f"state.time must be at least 0, how many tokens there were; got state.time {time.tolist()}")


def _values(x: Tensor) -> Tensor:
    """Return x without gradient and without the wrappers of torch.func, under which no value can be read."""
    x = x.detach()
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _require(condition: Tensor, message: str, value: Tensor) -> None:
    """Raise `message` unless `condition` (), which is made from `_values`, is True.

    On an accelerator, and in a compiled call on every device, the check runs asynchronously, since waiting for its
    result would stop the queue.
    """
    if type(condition) is not Tensor or condition.device.type == "meta":
        return  # the tensors of a tracer have no values
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        torch._assert_async(condition, message.format("of other values"))
    elif not condition:
        raise ValueError(message.format(_values(value).tolist()))
