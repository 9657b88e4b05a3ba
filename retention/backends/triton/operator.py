"""The kernels as opaque operators, which torch.compile and torch.export take as one node. Imports no Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..operators import differentiable, gradients, outputs

__all__ = ["fused", "fused_backward", "fused_now", "fused_step", "fused_step_now"]


def fused_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    parallel: bool,
    causal: bool,
    scale: float,
    chunk_size: int | None,
    return_state: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return out (B, H, T, V) and the last state, (0,) without return_state. Shapes: as in `Backend.__call__`."""
    from . import launch

    options = launch.Options(parallel, causal, scale, chunk_size)
    out, final = outputs(q, k, v, cu_seqlens, return_state, out_dtype)
    if _odd(q, v):
        wide = _even(q), _even(k), _even(v), log_decay, _even_state(state), mask, cu_seqlens
        wide_out, wide_final = fused_now(*wide, *options, return_state, out_dtype)
        out.copy_(wide_out[..., : v.shape[3]])
        return out, final.copy_(wide_final[..., : q.shape[3], : v.shape[3]]) if return_state else final
    inputs = launch.Inputs(q, k, v, log_decay, state, mask, cu_seqlens)
    launch.forward(inputs, out, final if return_state else None, options)
    return out, final


fused = torch.library.custom_op("retention::triton", fused_now, mutates_args=())


def _odd(q: Tensor, v: Tensor) -> bool:
    """Return whether a head dim is odd in half precision: Triton has compiled loads of such rows to wrong addresses."""
    return q.element_size() == 2 and (q.shape[3] % 2 == 1 or v.shape[3] % 2 == 1)


def _even(x: Tensor) -> Tensor:
    """Return x (..., D) with 0 to 7 channels of zeros, so that D is a multiple of 8."""
    return pad(x, (0, -x.shape[-1] % 8))


def _even_state(x: Tensor | None) -> Tensor | None:
    """Return a state (..., K, V) with zeros so that K and V are multiples of 8."""
    return None if x is None else pad(x, (0, -x.shape[-1] % 8, 0, -x.shape[-2] % 8))


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
    parallel: bool,
    causal: bool,
    scale: float,
    chunk_size: int | None,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_decay (0 unless decay_grad) and state ((0,) without a state)."""
    from . import launch

    options = launch.Options(parallel, causal, scale, chunk_size)
    dq, dk, dv, dlog_decay, dstate = gradients(q, k, v, log_decay, state)
    if _odd(q, v):
        wide = _even(dout), _even_state(dfinal), _even(q), _even(k), _even(v), log_decay, _even_state(state)
        found = fused_backward(*wide, mask, cu_seqlens, *options, decay_grad)
        for grad, x in zip((dq, dk, dv), found, strict=False):
            grad.copy_(x[..., : grad.shape[3]])
        dstate = dstate if state is None else dstate.copy_(found[4][..., : q.shape[3], : v.shape[3]])
        return dq, dk, dv, found[3], dstate
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
        options,
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
