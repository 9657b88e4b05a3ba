"""How torch sees the two opaque operators of a backend, forward and backward: fake outputs, gradients, packed rows.

    out, final = forward(q, k, v, log_decay, state, mask, cu_seqlens, *options, return_state, out_dtype)
    dq, dk, dv, dlog_decay, dstate = backward(
        dout, dfinal, q, k, v, log_decay, state, mask, cu_seqlens, *options, decay_grad
    )

Shapes: as in `Backend.__call__`; final is the state after the last token, dfinal its gradient. An operator returns
    tensors only, so an absent result is an empty tensor: final without return_state, and dstate without a state.
    dlog_decay is 0 unless decay_grad.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from ..state import state_dtype
from .packing import borders, empty, pack, unpack

__all__ = ["differentiable", "gradients", "outputs", "packed_backward", "packed_forward"]

_TENSORS = 7  # inputs before the options


def outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, return_state: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Allocate the outputs of forward: out (B, H, T, V), and final (B or N, H, K, V), (0,) without return_state."""
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, q.shape[1], q.shape[3], v.shape[3]) if return_state else (0,)
    return empty(q, (*q.shape[:3], v.shape[3]), out_dtype), q.new_empty(shape, dtype=state_dtype(q.dtype))


def gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the outputs of backward: dq, dk, dv, dlog_decay (all 0) and dstate, which is (0,) without a state."""
    dq, dk, dv = (empty(x, x.shape, x.dtype) for x in (q, k, v))
    dstate = q.new_empty(0 if state is None else state.shape, dtype=state_dtype(q.dtype))
    return dq, dk, dv, torch.zeros_like(log_decay), dstate


def packed_forward(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wrap `run`, the function of a forward operator: rows with a mask reach it as packed segments without a mask."""

    @wraps(run)
    def of_any(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        if mask is None or bool(mask.all()):
            return run(q, k, v, log_decay, state, None, cu_seqlens, *options)
        out, final = run(*pack(mask, q, k, v), log_decay, state, None, borders(mask), *options)
        return unpack(mask, out), final

    return _with_types(of_any, run)


def packed_backward(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Wrap `run`, the function of a backward operator, as `packed_forward` does."""

    @wraps(run)
    def of_any(
        dout: Tensor,
        dfinal: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        if mask is None or bool(mask.all()):
            return run(dout, dfinal, q, k, v, log_decay, state, None, cu_seqlens, *options)
        dout, q, k, v = pack(mask, dout, q, k, v)
        dq, dk, dv, *others = run(dout, dfinal, q, k, v, log_decay, state, None, borders(mask), *options)
        return *(unpack(mask, x) for x in (dq, dk, dv)), *others

    return _with_types(of_any, run)


def _with_types(wrapper: Any, run: Any) -> Any:
    """Give the wrapper the types of `run`, from which torch reads the schema of an operator."""
    wrapper.__signature__ = inspect.signature(run, eval_str=True)
    return wrapper


def differentiable(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Register fake outputs, with which torch traces both operators, and `backward` as the gradient of `forward`."""

    @forward.register_fake
    def _(q, k, v, log_decay, state, mask, cu_seqlens, *options):  # type: ignore[no-untyped-def]
        return outputs(q, k, v, cu_seqlens, *options[-2:])

    @backward.register_fake
    def _(dout, dfinal, q, k, v, log_decay, state, *_):  # type: ignore[no-untyped-def]
        return gradients(q, k, v, log_decay, state)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.options, ctx.return_state = inputs[_TENSORS:-2], inputs[-2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.out = output[0].shape, output[0].dtype

    def autograd(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad  # read once: gradient checkpointing recomputes them
        if dout is None:
            dout = tensors[0].new_zeros(ctx.out[0], dtype=ctx.out[1])
        if not ctx.return_state:  # the second output was an empty tensor, not a state
            dfinal = None
        grads = backward(dout, dfinal, *tensors, *ctx.options, needed[3])
        used = [grad if wanted else None for grad, wanted in zip(grads, needed, strict=False)]
        return *used, *[None] * (len(needed) - len(used))

    forward.register_autograd(autograd, setup_context=setup_context)
