"""What torch is told of a backend's two opaque operators, forward and backward: their outputs, and how gradients go.

forward(q, k, v, log_decay, state, mask, cu_seqlens, *options, return_state, out_dtype) -> out, last state
backward(dout, dfinal, q, k, v, log_decay, state, mask, cu_seqlens, *options, decay_grad) -> gradients of the first five

Shapes as in `Backend.__call__`. An operator gives tensors only, so that the last state is empty unless return_state,
and the gradient of the state empty if there is none; that of log_decay is 0 unless decay_grad.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from ..state import state_dtype
from .packing import empty

TENSORS = 7  # inputs before the options


def outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, return_state: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What forward gives, not filled yet."""
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, q.shape[1], q.shape[3], v.shape[3]) if return_state else (0,)
    return empty(q, (*q.shape[:3], v.shape[3]), out_dtype), q.new_empty(shape, dtype=state_dtype(q.dtype))


def gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What backward gives, not filled yet but for log_decay's, which is 0."""
    dq, dk, dv = (empty(x, x.shape, x.dtype) for x in (q, k, v))
    dstate = q.new_empty(0 if state is None else state.shape, dtype=state_dtype(q.dtype))
    return dq, dk, dv, torch.zeros_like(log_decay), dstate


def differentiable(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Let torch trace both, and differentiate the one by the other."""

    @forward.register_fake
    def _(q, k, v, log_decay, state, mask, cu_seqlens, *options):  # type: ignore[no-untyped-def]
        return outputs(q, k, v, cu_seqlens, *options[-2:])

    @backward.register_fake
    def _(dout, dfinal, q, k, v, log_decay, state, *_):  # type: ignore[no-untyped-def]
        return gradients(q, k, v, log_decay, state)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.options, ctx.return_state = inputs[TENSORS:-2], inputs[-2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS])
        ctx.out = output[0].shape, output[0].dtype

    def autograd(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad  # once: gradient checkpointing computes them anew
        if dout is None:
            dout = tensors[0].new_zeros(ctx.out[0], dtype=ctx.out[1])
        if not ctx.return_state:  # an empty tensor then, not a state
            dfinal = None
        grads = backward(dout, dfinal, *tensors, *ctx.options, needed[3])
        used = [grad if wanted else None for grad, wanted in zip(grads, needed, strict=False)]
        return *used, *[None] * (len(needed) - len(used))

    forward.register_autograd(autograd, setup_context=setup_context)
