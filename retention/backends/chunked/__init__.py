"""The chunkwise form in torch operations: linear in length, with little memory, on every device.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 7. Differs: any length and chunk size, since the last chunk may be
    shorter.

A chunk of C tokens, i = 0 ... C - 1, runs the parallel form inside and meets all other chunks in one state S per head:

    out_i  = scale sum_j<=i gamma^(i-j) (q_i . k_j) v_j  +  scale gamma^(i+1) q_i S        inner + read from S
    S     <- gamma^C S + sum_j gamma^(C-1-j) k_j v_j^T                                     carry  + write to S

Bidirectional retention adds the same with time reversed, for the tokens of later chunks. The gradients are retentions
too. That of q runs forward through the states S; those of k and v run backward through the gradients dS of the states.
So the backward pass visits the chunks once in each direction and computes every S again; the state of a chunk is never
stored.

Each step consists of a few batched matrix products on views of the inputs. Its other tensors (scores, scaled q and k,
S) have the size of a chunk and stay in the processor's cache. The loop over the chunks is an opaque operator, so that
torch.compile sees one node instead of one per chunk. Retention on a grid is in the file `grid`. torch.export records
the plain operations of the file `exported`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import isqrt

import torch
from torch import Tensor

from ...call import Call
from ...state import state_dtype
from ..operators import differentiable, gradients, outputs
from ..packing import ask_for_huge_pages, segment_borders
from .exported import at_once, on_grid_at_once
from .grid import on_grid, on_grid_anew
from .loop import Decays, backward, forward

__all__ = ["CHUNK_SIZE", "Chunked", "backend", "chunkwise", "chunkwise_backward"]

CHUNK_SIZE = 64  # on CPU as fast as all sizes from 16 to 256, by `python -m benchmarks floor --chunks`
_GRID_CHUNK_SIZE = 256  # tiles of 16 x 16, by `python -m benchmarks vision`
_HEADS_AT_ONCE = 32  # rows times heads; on CPU more do not fit the cache, and fewer leave threads idle

_Segment = tuple[int, slice | Tensor]  # a row, and the tokens of a sequence there: adjacent ones, or their numbers


class Chunked:
    """The backend "chunked": the chunkwise form; see `Backend`."""

    def why_not(self, call: Call) -> list[str]:
        reasons = []
        if call.form != "chunkwise":
            reasons.append(f"has the form chunkwise, not {call.form}")
        if call.in_place:
            reasons.append("does not overwrite a state")
        if call.transformed:
            reasons.append("has no rule for torch.func transforms and forward-mode differentiation")
        return reasons

    def __call__(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        if torch.compiler.is_exporting() and cu_seqlens is None:
            return self._exported(call, q, k, v, log_decay, state, mask)
        if call.grid is not None:
            compute = on_grid_anew if call.needs_grad else on_grid
            side = isqrt(call.chunk_size or _GRID_CHUNK_SIZE)
            return compute(q, k, v, log_decay, grid=call.grid, scale=call.scale, side=side).to(call.out_dtype), None
        options = (call.scale, call.causal, call.chunk_size or CHUNK_SIZE, call.return_state, call.out_dtype)
        # For a short call the operator costs as much as the computation, and without gradients it is not needed.
        plain = type(q) is Tensor and not torch.compiler.is_compiling() and call.device != "meta"
        run = _chunkwise if plain and not call.needs_grad else chunkwise
        out, final = run(q, k, v, log_decay, state, mask, cu_seqlens, *options)
        return out, final if call.return_state else None

    def _exported(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if call.grid is not None:
            return on_grid_at_once(q, k, v, log_decay, call.grid, call.scale).to(call.out_dtype), None
        options = (call.scale, call.causal, call.chunk_size or CHUNK_SIZE, call.return_state)
        out, final = at_once(q, k, v, log_decay, state, mask, *options)
        return out.to(call.out_dtype), final


backend = Chunked()


def _chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    chunk_size: int,
    return_state: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return out (B, H, T, V) and the last state, (0,) without return_state. Shapes: as in `Backend.__call__`."""
    out, final = outputs(q, k, v, cu_seqlens, return_state, out_dtype)
    ask_for_huge_pages(out)
    decays = Decays(log_decay, min(chunk_size, q.shape[2]), scale, causal, state_dtype(q.dtype))
    segments = _segments(mask, cu_seqlens, q.shape[2])
    for rows, tokens, states in _pieces(q, segments):
        before = None if state is None else state[states].clone()
        parts = [x[rows, :, tokens] for x in (q, k, v, out)]
        after = forward(*parts, state=before, decays=decays, return_state=return_state)
        if isinstance(tokens, Tensor):  # the parts are copies
            out[rows, :, tokens] = parts[3]
        if after is not None:
            final[states] = after
    _clear_padding(segments, out)
    return out, final


chunkwise = torch.library.custom_op("retention::chunkwise", _chunkwise, mutates_args=())


@torch.library.custom_op("retention::chunkwise_backward", mutates_args=())
def chunkwise_backward(
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
    causal: bool,
    chunk_size: int,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_decay (0 unless decay_grad) and state ((0,) without a state)."""
    dq, dk, dv, dlog_decay, dstate = gradients(q, k, v, log_decay, state)
    ask_for_huge_pages(dq, dk, dv)
    decays = Decays(log_decay, min(chunk_size, q.shape[2]), scale, causal, state_dtype(q.dtype))
    segments = _segments(mask, cu_seqlens, q.shape[2])
    for rows, tokens, states in _pieces(q, segments):
        parts = [x[rows, :, tokens] for x in (q, k, v, dout, dq, dk, dv)]
        before, dafter = (None if x is None else x[states].clone() for x in (state, dfinal))
        dbefore, ddecay = backward(*parts, state=before, dfinal=dafter, decays=decays, decay_grad=decay_grad)
        if isinstance(tokens, Tensor):  # the parts are copies
            dq[rows, :, tokens], dk[rows, :, tokens], dv[rows, :, tokens] = parts[4:]
        if dbefore is not None:
            dstate[states] = dbefore
        dlog_decay += ddecay
    _clear_padding(segments, dq, dk, dv)
    return dq, dk, dv, dlog_decay, dstate


differentiable(chunkwise, chunkwise_backward)


def _segments(mask: Tensor | None, cu_seqlens: Tensor | None, length: int) -> list[_Segment] | None:
    """Return the sequences of packed or padded rows in order; None for rows of real tokens only."""
    if cu_seqlens is not None:
        return [(0, slice(*ends)) for ends in pairwise(segment_borders(cu_seqlens, length))]
    if mask is None or bool(mask.all()):
        return None
    return [(row, _real(of_row)) for row, of_row in enumerate(mask)]


def _real(mask: Tensor) -> slice | Tensor:
    """Return the real tokens of a row, mask (T,): a slice if they are adjacent, else their numbers."""
    numbers = mask.nonzero()[:, 0]
    if not len(numbers):
        return slice(0, 0)
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first == len(numbers) - 1 else numbers


def _pieces(q: Tensor, segments: list[_Segment] | None) -> Iterator[tuple[slice, slice | Tensor, slice]]:
    """Yield the parts that are computed at once: rows of the batch, their tokens, and the rows of their states."""
    if segments is not None:
        for i, (row, tokens) in enumerate(segments):
            yield slice(row, row + 1), tokens, slice(i, i + 1)
        return
    batch, heads = q.shape[:2]
    step = max(1, _HEADS_AT_ONCE // heads) if q.device.type == "cpu" else max(1, batch)
    for row in range(0, batch, step):
        yield slice(row, row + step), slice(None), slice(row, row + step)


def _clear_padding(segments: list[_Segment] | None, *tensors: Tensor) -> None:
    """Set the tokens of tensors (B, H, T, D) that belong to no segment to 0."""
    if segments is None:
        return
    for x in tensors:
        ends = [0] * len(x)
        for row, tokens in segments:
            if isinstance(tokens, slice):
                x[row, :, ends[row] : tokens.start] = 0
                ends[row] = tokens.stop
            else:
                ends[row] = x.shape[2]
                padding = torch.ones(x.shape[2], dtype=torch.bool, device=x.device).index_fill_(0, tokens, False)
                x[row, :, padding] = 0
        for row, end in enumerate(ends):
            x[row, :, end:] = 0
