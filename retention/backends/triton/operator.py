"""The kernels as opaque operators, which torch.compile and torch.export take as one node. Imports no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import differentiable, gradients, outputs


def fused_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int | None,
    return_state: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return out (B, H, T, V) and the last state, (0,) without return_state. Shapes: as in `Backend.__call__`."""
    from . import launch

    out, final = outputs(q, k, v, cu_seqlens, return_state, out_dtype)
    inputs = launch.Inputs(q, k, v, log_decay, state, mask, cu_seqlens)
    launch.forward(inputs, out, final if return_state else None, scale, chunk_size)
    return out, final


fused = torch.library.custom_op("retention::triton", fused_now, mutates_args=())


@torch.library.custom_op("retention::triton_backward", mutates_args=())
def fused_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int | None,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_decay (0 unless decay_grad) and state ((0,) without a state)."""
    from . import launch

    dq, dk, dv, dlog_decay, dstate = gradients(q, k, v, log_decay, state)
    dtype = q.dtype
    if dtype == torch.float16 and dout.dtype != dtype:  # gradients of sums in float32 may not fit into float16
        q, k, v = q.float(), k.float(), v.float()
    grads = (dq, dk, dv) if q.dtype == dtype else tuple(torch.empty_like(x, dtype=q.dtype) for x in (dq, dk, dv))
    slope = launch.backward(
        launch.Inputs(q, k, v, log_decay, state, mask, cu_seqlens),
        dout.to(q.dtype),
        dfinal,
        grads,
        None if state is None else dstate,
        scale,
        chunk_size,
        decay_grad,
    )
    if q.dtype != dtype:
        for narrow, grad in zip((dq, dk, dv), grads, strict=True):
            narrow.copy_(grad)
    return dq, dk, dv, dlog_decay if slope is None else slope.to(log_decay.dtype), dstate


differentiable(fused, fused_backward)


def fused_step_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    mask: Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return out (B, H, 1, V) for one token, and overwrite state (B, H, K, V) with the state after it."""
    from . import launch

    out, _ = outputs(q, k, v, None, False, out_dtype)
    launch.step(launch.Inputs(q, k, v, log_decay, state, mask, None), out, scale)
    return out


fused_step = torch.library.custom_op("retention::triton_step", fused_step_now, mutates_args=("state",))


@fused_step.register_fake
def _(q, k, v, log_decay, state, mask, scale, out_dtype):  # type: ignore[no-untyped-def]
    return outputs(q, k, v, None, False, out_dtype)[0]
