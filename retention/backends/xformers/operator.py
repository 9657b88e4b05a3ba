"""Both forms as one opaque operator, so that torch.compile sees one node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators import differentiable, gradients, outputs, packed_backward, packed_forward
from ..packing import ask_for_huge_pages, clear_outside
from . import chunkwise, parallel

__all__ = ["block_sparse"]


@torch.library.custom_op("retention::block_sparse", mutates_args=())
@packed_forward
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
    """Return out (B, H, T, V) and the last state, (0,) without return_state. Shapes: as in `Backend.__call__`.

    grid is () for none; grid and eps are for the parallel form only.
    """
    out, final = outputs(q, k, v, cu_seqlens, return_state, out_dtype)
    ask_for_huge_pages(out)
    if form == "chunkwise":
        if return_state:
            _begin(final, state)
        chunks = chunkwise.Plan(q, log_decay, cu_seqlens, block_size, scale, causal)
        chunkwise.forward(chunks, q, k, v, out, state, final if return_state else None)
        clear_outside(chunks.borders, out)
    else:
        heads = parallel.Plan(q, k, log_decay, cu_seqlens, block_size, scale, causal, grid, eps)
        parallel.forward(heads, q, k, v, out)
        clear_outside(heads.borders, out)
    return out, final


@torch.library.custom_op("retention::block_sparse_backward", mutates_args=())
@packed_backward
def _block_sparse_backward(
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
    """Return the gradients of q, k, v, log_decay (0 unless decay_grad) and state ((0,) without a state)."""
    dq, dk, dv, dlog_decay, dstate = gradients(q, k, v, log_decay, state)
    tensors, grads = (q, k, v, dout), (dq, dk, dv)
    ask_for_huge_pages(*grads)
    if form == "chunkwise":
        if state is not None:
            _begin(dstate, dfinal)
        chunks = chunkwise.Plan(q, log_decay, cu_seqlens, block_size, scale, causal)
        ends = (dfinal, None if state is None else dstate)
        dlog_decay += chunkwise.backward(chunks, tensors, grads, state, *ends, decay_grad)
        clear_outside(chunks.borders, *grads)
    else:
        heads = parallel.Plan(q, k, log_decay, cu_seqlens, block_size, scale, causal, grid, eps)
        dlog_decay += parallel.backward(heads, tensors, grads, decay_grad)
        clear_outside(heads.borders, *grads)
    return dq, dk, dv, dlog_decay, dstate


differentiable(block_sparse, _block_sparse_backward)


def _begin(end: Tensor, start: Tensor | None) -> None:
    """Write the state before a segment as the state after it, which holds for a segment without tokens."""
    if start is None:
        end.zero_()
    else:
        end.copy_(start)
