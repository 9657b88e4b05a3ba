"""Retention as functions: check the arguments, choose a backend, run it, and apply the paper's normalisers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import backends
from .arguments import describe, refuse_torchscript
from .call import Call, Inputs, Options, ScoreNorm
from .errors import ShapeError
from .normalisers import score_divisor, total_decay
from .options import check_device, check_dtype, check_flags, check_whole
from .scores import scores as retention_scores
from .sharding import active, alone, check_part, in_parts, refuse
from .state import RetentionState, state_dtype
from .times import counts

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .call import RetainOptions

__all__ = ["explain", "initial_state", "retain", "scores", "step", "stepped"]


@overload
def retain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    return_state: Literal[False] = False,
    **options: Unpack[RetainOptions],
) -> Tensor: ...
@overload
def retain(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, return_state: Literal[True], **options: Unpack[RetainOptions]
) -> tuple[Tensor, RetentionState]: ...
@overload
def retain(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, return_state: bool, **options: Unpack[RetainOptions]
) -> Tensor | tuple[Tensor, RetentionState]: ...
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
    """Compute retention of every token with the tokens before it. Shapes are as in `scaled_dot_product_attention`.

        R_nm = scale (q_n . k_m) D_nm,    D_nm = gamma^(t_n - t_m) for m <= n, else 0,    out = R v

    The time t_n is the number of real tokens before token n in its sequence.

    Shapes: q (B, H, T, K); k (B, Hkv, T, K); v (B, Hkv, T, V), where Hkv divides H and each key/value head serves H /
        Hkv consecutive query heads; log_decay (H,); out (B, H, T, V).
    Dtypes: q, k and v share one dtype, float16, bfloat16, float32 or float64; log_decay is float32 or float64. Sums are
        computed in float32, or in float64 for float64 inputs. out has the dtype of v, or out_dtype.
    Args:
        q: queries.
        k: keys.
        v: values.
        log_decay: log(gamma) per head, natural logarithm per token, at most 0.
        state: the state that an earlier call returned, from any form and backend; this call continues its sequence.
            Default: the beginning of a sequence.
        scale: factor of q . k; default 1 / sqrt(K).
        mask: (B, T) bool, True = real token. Padding may stand anywhere. Padding does not advance the time, and its
            output is 0.
        cu_seqlens: (N + 1,) int32, the borders 0 = c_0 <= ... <= c_N = T of N sequences packed into one row (B = 1).
            Tokens see only their own sequence; a state then has N rows.
        causal: False gives D_nm = gamma^|t_n - t_m| for all m, and allows no state.
        grid: (rows, columns) of an image whose cells are the tokens, row by row, with T = rows * columns. It needs
            causal=False, gives D_nm = gamma^(|row_n - row_m| + |column_n - column_m|), and excludes mask and
            cu_seqlens.
        decay_norm: divide D_nm by sqrt(sum_i D_ni).
        score_norm: divide R_nm by max(|sum_i R_ni|, 1). Where the scores cancel, rounding errors grow by the factor
            sum_i |R_ni| / max(|sum_i R_ni|, 1); errors of 2e-5 were measured in float32. "absolute" divides by
            min(max(sum_i |R_ni|, 1), 5e4) without gradient, as torchscale does; a state does not hold this sum, so it
            needs form "parallel".
        out_dtype: dtype of out: that of v (default), or float32 (float64 for float64). The sums may exceed the range of
            half precision; take float32 where a norm or a division follows.
        chunk_size: tokens per chunk of the chunkwise form, on a grid cells per tile; default: the choice of the
            backend.
        backend: "auto" or a registered name; see `explain`. A named backend never falls back to another.
        form: "auto", "parallel", "chunkwise" or "recurrent". All forms give the same result.
        return_state: return the state after the last token too.
    Returns: out; with return_state, the pair (out, state).
    Cost: O(T^2 (K + V)) parallel, O(T (C + K) (K + V)) chunkwise with chunks of C tokens, O(T K V) recurrent; for each
        head. On a grid the chunkwise form is linear in T too.
    Raises: ShapeError, ValueError or TypeError for arguments that do not fit; BackendError if no backend can run the
        call.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5 to 7; normalisers from its Section 2.2. Differs: the normalisers
        are off by default, since the norm that follows in a layer cancels them.
    Examples:
        >>> import torch, retention
        >>> x = torch.ones(1, 1, 3, 1)  # one row, one head, three tokens, one channel
        >>> retention.retain(x, x, x, torch.tensor([0.5]).log())
        tensor([[[[1.0000],
                  [1.5000],
                  [1.7500]]]])
    """
    inputs = Inputs(q, k, v, log_decay, state, mask, cu_seqlens)
    options = Options(
        scale=scale,
        causal=causal,
        grid=grid,
        decay_norm=decay_norm,
        score_norm=score_norm,
        out_dtype=out_dtype,
        chunk_size=chunk_size,
        backend=backend,
        form=form,
        return_state=return_state,
    )
    call = describe(inputs, options)
    check_part(call, score_norm == "absolute")
    out, new = _run(call, inputs, options)
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
    """Compute retention of one more token for each row and update `state` in place. The result equals that of `retain`.

    Shapes: q (B, H, 1, K); k (B, Hkv, 1, K); v (B, Hkv, 1, V); log_decay (H,); out (B, H, 1, V).
    Dtypes: as `retain`.
    Args:
        q: the query of one token.
        k: its key.
        v: its value.
        log_decay: log(gamma) per head, natural logarithm per token, at most 0.
        state: the state before the token, from `retain` or `initial_state`; it is overwritten.
        scale: factor of q . k; default 1 / sqrt(K).
        mask: (B, 1) bool, True = real token. A row with padding keeps its state.
        decay_norm: as in `retain`.
        score_norm: as in `retain`, without "absolute"; the state must have been made with score_norm too.
        out_dtype: as in `retain`.
        backend: as in `retain`.
    Returns: out.
    Cost: O(K V) for each head, at any position. No gradients.
    Raises: the errors of `retain`; ShapeError for more than one token; ValueError if a gradient would be needed.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 6.
    Examples:
        >>> import torch, retention
        >>> x, state = torch.ones(1, 1, 1, 1), retention.initial_state(1, 1, 1, 1)
        >>> [retention.step(x, x, x, torch.tensor([0.5]).log(), state).item() for _ in range(3)]
        [1.0, 1.5, 1.75]
    """
    if state is None:  # `retain` takes None for the beginning of a sequence
        raise TypeError("state must be a RetentionState; got NoneType; `initial_state` makes an empty one")
    inputs = Inputs(q, k, v, log_decay, state, mask)
    options = Options(
        scale=scale,
        decay_norm=decay_norm,
        score_norm=score_norm,
        out_dtype=out_dtype,
        backend=backend,
        form="recurrent",
        in_place=True,
    )
    call = describe(inputs, options)
    if call.length != 1:
        raise ShapeError(f"step takes one token, q (batch, heads, 1, key_dim); got q {tuple(q.shape)}; use retain")
    if call.needs_grad:
        raise ValueError("step overwrites the state and has no gradient; call it under torch.no_grad(), or use retain")
    return stepped(call, inputs, options)


def stepped(call: Call, inputs: Inputs, options: Options) -> Tensor:
    """Run `step` for arguments that have been checked and are described in `call`."""
    refuse("a step of one token", "leave the context to decode")
    out, _ = _run(call, inputs, options)
    if inputs.state is not None:
        inputs.state.time += 1 if inputs.mask is None else counts(call, inputs)
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
    """Compute the retention scores R of the parallel form; `retain` returns R v.

    Shapes: q (B, H, T, K); k (B, Hkv, T, K); log_decay (H,). Returns R (B, H, T, T).
    Dtypes: as `retain`; R is float32, or float64 for float64 inputs.
    Args:
        q, k, log_decay: as in `retain`.
        scale, mask, causal, grid, decay_norm, score_norm: as in `retain`.
    Cost: O(T^2 K) for each head, and memory for all T^2 scores.
    Raises: ShapeError, ValueError or TypeError for arguments that do not fit.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5; normalisers from its Section 2.2.
    Examples:
        >>> import torch
        >>> from retention.functional import scores
        >>> x = torch.ones(1, 1, 3, 1)
        >>> scores(x, x, torch.tensor([0.5]).log())[0, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 1.0000, 0.0000],
                [0.2500, 0.5000, 1.0000]])
    """
    refuse("the matrix of all scores", "leave the context, or do not ask for scores")
    inputs = Inputs(q, k, k, log_decay, mask=mask)
    options = Options(
        scale=scale, causal=causal, grid=grid, decay_norm=decay_norm, score_norm=score_norm, form="parallel"
    )
    call = describe(inputs, options)
    found = _scores(call, inputs)
    if decay_norm:
        found = found / total_decay(call, inputs).sqrt()[..., None]
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
    """Make the state before the first token, which is all zero.

    Args:
        rows: number of sequences: the batch size, or the segments of a packed call.
        heads: number of query heads.
        key_dim: channels of q per head.
        value_dim: channels of v per head.
        score_norm: whether the state is for calls with score_norm=True; it then holds k_sum.
        device: default: torch's default device.
        dtype: dtype of q, default torch's default dtype; the state is float32, or float64 for float64.
    Returns: a `RetentionState` with kv (rows, heads, key_dim, value_dim) and time (rows,).
    Raises: ValueError or TypeError that names the argument.
    Examples:
        >>> import retention
        >>> retention.initial_state(2, 4, 8, 16).kv.shape
        torch.Size([2, 4, 8, 16])
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
    """Say which forms and backends can run `retain` with these arguments, which is chosen, and why the others cannot.

    Args:
        q: as in `retain`.
        k: as in `retain`.
        v: as in `retain`.
        log_decay: as in `retain`.
        backend: as in `retain`.
        options: the further arguments of `retain`, by name.
    Returns: text with one line for the call, one for each form and backend in order of preference, and one for each
        outside library that a backend found.
    Raises: ShapeError, ValueError or TypeError for arguments that `retain` refuses.
    Examples:
        >>> import torch, retention
        >>> x = torch.ones(1, 1, 100, 8)
        >>> print(retention.explain(x, x, x, torch.tensor([-0.1])).splitlines()[2])
          chunkwise  chunked    can, and is chosen
    """
    tensors = {name: options.pop(name) for name in ("state", "mask", "cu_seqlens") if name in options}
    if unknown := [name for name in options if name == "in_place" or name not in Options._fields]:
        raise TypeError(f"explain() takes the arguments of `retain`; got {', '.join(unknown)}")
    call = describe(Inputs(q, k, v, log_decay, **tensors), Options(**options))
    return backends.explain(call, backend)


for _function in (retain, step, scores):
    _function.__prepare_scriptable__ = refuse_torchscript  # type: ignore[union-attr] # torch.jit.script asks for it


def _run(call: Call, inputs: Inputs, options: Options) -> tuple[Tensor, RetentionState | None]:
    """Choose a backend, run it outside of autocast, apply the normalisers and make the new state."""
    q, k, v, log_decay, state, mask, cu_seqlens = inputs
    decay_norm, score_norm, out_dtype = options.decay_norm, options.score_norm, call.out_dtype
    shard = active()
    if decay_norm or score_norm or shard is not None:  # sums may exceed half precision until they are final
        call = call._replace(out_dtype=state_dtype(call.dtype))
    borders = cu_seqlens if shard is None or cu_seqlens is None else shard.local_borders(cu_seqlens)
    backend, part = backends.choose(call if shard is None else alone(call), options.backend)

    def run(values: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if call.device == "meta" or not torch.is_autocast_enabled(call.device):
            return backend(part, q, k, values, log_decay, before, mask, borders)
        with torch.autocast(call.device, enabled=False):  # the sums stay float32
            return backend(part, q, k, values, log_decay, before, mask, borders)

    sums = [(v, None if state is None else state.kv)]
    if score_norm is True:  # sum_i R_ni is the retention of values that are all 1
        before = None if state is None or state.k_sum is None else state.k_sum[..., None]
        sums.append((torch.ones_like(v[..., :1]), before))
    if shard is None:
        results = [run(values, before) for values, before in sums]
    else:
        results = in_parts(shard, call, inputs, run, sums)
    (out, kv), (mass, k_sum) = results[0], results[-1] if score_norm is True else (None, None)
    if score_norm == "absolute":
        mass = _scores(call, inputs).detach().abs().sum(-1, keepdim=True)

    decay = total_decay(call, inputs).sqrt()[..., None] if decay_norm else None
    if mass is not None:
        out = out / score_divisor(mass if decay is None else mass / decay, score_norm)
    if decay is not None:
        out = out / decay
    if out.dtype != out_dtype:
        out = out.to(out_dtype)
    if not call.return_state or kv is None:
        return out, None
    time = counts(call, inputs)
    time = time if state is None else state.time + time
    return out, RetentionState(kv, time, None if k_sum is None else k_sum[..., 0])


def _scores(call: Call, inputs: Inputs) -> Tensor:
    q, k, _, log_decay, _, mask, _ = inputs
    return retention_scores(q, k, log_decay, scale=call.scale, causal=call.causal, mask=mask, grid=call.grid)
