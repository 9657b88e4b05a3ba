"""Both forms as one opaque operator, so that torch.compile sees one node and not what is in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators import differentiable, gradients, outputs
from ..packing import ask_for_huge_pages, borders, clear_outside, pack, unpack
from . import chunkwise, parallel


@torch.library.custom_op("retention::block_sparse", mutates_args=())
def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
    block_size: int,
    scale: float,
    causal: bool,
    grid: Sequence[int],
    eps: float,
    return_state: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `Backend.__call__`; grid () for none. grid and eps are of the parallel form only.

    Returns: out (B, H, T, V); the last state, empty unless return_state.
    """
    options = (form, block_size, scale, causal, grid, eps)
    if mask is not None and not mask.all():
        rest = (log_decay, state, None, borders(mask), *options, return_state, out_dtype)
        out, final = block_sparse(*pack(mask, q, k, v), *rest)
        return unpack(mask, out), final
    out, final = outputs(q, k, v, cu_seqlens, return_state, out_dtype)
    ask_for_huge_pages(out)
    if form == "chunkwise":
        if return_state:
            _begin(final, state)
        walk = chunkwise.Walk(q, log_decay, cu_seqlens, block_size, scale, causal)
        chunkwise.forward(walk, q, k, v, out, state, final if return_state else None)
        clear_outside(walk.borders, out)
    else:
        heads = parallel.Walk(q, k, log_decay, cu_seqlens, block_size, scale, causal, grid, eps)
        parallel.forward(heads, q, k, v, out)
        clear_outside(heads.borders, out)
    return out, final


@torch.library.custom_op("retention::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
    block_size: int,
    scale: float,
    causal: bool,
    grid: Sequence[int],
    eps: float,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns: the gradients of q, k, v, log_decay (0 unless decay_grad) and state (empty if there is none)."""
    options = (form, block_size, scale, causal, grid, eps)
    if mask is not None and not mask.all():
        dout, q, k, v = pack(mask, dout, q, k, v)
        rest = (log_decay, state, None, borders(mask), *options, decay_grad)
        dq, dk, dv, dlog_decay, dstate = block_sparse_backward(dout, dfinal, q, k, v, *rest)
        return *(unpack(mask, x) for x in (dq, dk, dv)), dlog_decay, dstate
    dq, dk, dv, dlog_decay, dstate = gradients(q, k, v, log_decay, state)
    tensors, grads = (q, k, v, dout), (dq, dk, dv)
    ask_for_huge_pages(*grads)
    if form == "chunkwise":
        if state is not None:
            _begin(dstate, dfinal)
        walk = chunkwise.Walk(q, log_decay, cu_seqlens, block_size, scale, causal)
        ends = (dfinal, None if state is None else dstate)
        dlog_decay += chunkwise.backward(walk, tensors, grads, state, *ends, decay_grad)
        clear_outside(walk.borders, *grads)
    else:
        heads = parallel.Walk(q, k, log_decay, cu_seqlens, block_size, scale, causal, grid, eps)
        dlog_decay += parallel.backward(heads, tensors, grads, decay_grad)
        clear_outside(heads.borders, *grads)
    return dq, dk, dv, dlog_decay, dstate


differentiable(block_sparse, block_sparse_backward)


def _begin(end: Tensor, start: Tensor | None) -> None:
    """What a segment without tokens ends with is what it starts with."""
    if start is None:
        end.zero_()
    else:
        end.copy_(start)
