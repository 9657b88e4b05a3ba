"""The chunkwise form: what happens inside chunks on a block-diagonal matrix, the rest through the state.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 7. Differs: several chunks at a time, of all heads, in one block-sparse
product each. For chunk i of n tokens, with the state B before it and A after it, and q scaled already:

    out = ((q kᵀ) ∘ D) v + (read ∘ q) B          D_jm = gamma^(j-m)    read_j = gamma^(j+1)
    A   = gamma^n B + (write ∘ k)ᵀ v             write_j = gamma^(n-1-j)

The backward pass is the same recurrence against time: dB = gamma^n dA + (read ∘ q)ᵀ dout. Bidirectional retention adds
the mirror image for what lies in later chunks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...state import state_dtype
from ..packing import segment_borders
from .blocks import Alignment, Blocks, Piece, block_size

BLOCKS_AT_ONCE = {"cpu": 32}  # chunks times heads, so that they stay in the processor's cache
BLOCKS_ELSEWHERE = 1024


@functools.lru_cache(maxsize=64)
def _diagonal(blocks: int, size: int, device: torch.device) -> Blocks:
    with torch.inference_mode(False):  # it outlives the call
        return Blocks(torch.eye(blocks, dtype=torch.bool, device=device), size)


class Walk:
    """What both directions share. Rows of the batch and heads are one dimension R; states are (segments, R, K, V)."""

    def __init__(self, q: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None, size: int, scale: float, causal: bool):
        self.dtype = state_dtype(q.dtype)
        self.rows, self.heads, length = q.shape[:3]
        self.scale, self.directions = scale, (False,) if causal else (False, True)
        self.rate = log_decay.to(self.dtype).repeat(self.rows)[:, None, None]
        self.borders = [0, length] if cu_seqlens is None else segment_borders(cu_seqlens, length)
        self.size = block_size(size, self.borders)
        self.index = torch.arange(self.size, device=q.device, dtype=self.dtype)
        self.distance = (self.index[:, None] - self.index).abs()
        inner = (self.rate * self.distance).exp()[:, None]
        self.inner = inner.tril() if causal else inner
        alignment = Alignment(self.borders, self.size, q.device)
        at_once = BLOCKS_AT_ONCE.get(q.device.type, BLOCKS_ELSEWHERE)
        blocks = max(1, at_once // max(1, len(self.rate)))
        self.pieces = list(alignment.pieces(blocks)) if self.rows else []

    def states(self, state: Tensor | None) -> Tensor | None:
        """(B or N, H, K, V) as (segments, R, K, V)."""
        return state if state is None or self.rows == 1 else state.flatten(0, 1)[None]

    def load(self, piece: Piece, x: Tensor) -> Tensor:
        return piece.load(x, self.heads, self.dtype)

    def chunks(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.size))

    def diagonal(self, piece: Piece) -> Blocks:
        return _diagonal(len(piece.counts), self.size, self.index.device)

    def order(self, reverse: bool) -> list[Piece]:
        return self.pieces[::-1] if reverse else self.pieces

    def ages(self, piece: Piece, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Exponents of gamma in reading and writing (1 or n, C, 1) and carrying (n, 1, 1)."""
        counts = torch.tensor(piece.counts, dtype=self.dtype).to(self.index.device)[:, None, None]
        index = self.index[:, None]
        if reverse:
            return (counts - index).clamp(min=0), index[None], counts
        return index[None] + 1, (counts - 1 - index).clamp(min=0), counts

    def factors(self, piece: Piece, reverse: bool) -> tuple[Tensor, ...]:
        """gamma to the power of these ages, for each row: (R, 1 or n, C or 1, 1)."""
        return tuple((self.rate[..., None] * age).exp() for age in self.ages(piece, reverse))


class Scan:
    """x <- added + carry x, chunk by chunk, from `start` of each segment to its `end`; both (segments, R, K, V)."""

    def __init__(self, reverse: bool, start: Tensor | None = None, end: Tensor | None = None):
        self.reverse, self.start, self.end, self.segment, self.x = reverse, start, end, -1, torch.empty(0)

    def __call__(self, added: Tensor, carry: Tensor, segments: list[int]) -> Tensor:
        """The x that each chunk finds; added (R, n, K, V)."""
        found = torch.empty_like(added)
        order = range(len(segments))
        for i in reversed(order) if self.reverse else order:
            if segments[i] != self.segment:
                self.leave()
                self.segment = segments[i]
                self.x = added.new_zeros(()) if self.start is None else self.start[self.segment]
            found[:, i] = self.x
            self.x = torch.addcmul(added[:, i], found[:, i], carry[:, i])
        return found

    def leave(self) -> None:
        if self.end is not None and self.segment >= 0:
            self.end[self.segment] = self.x


def forward(
    walk: Walk, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: Tensor | None, final: Tensor | None
) -> None:
    """Fill `out` and `final`."""
    for reverse in walk.directions:
        scan = Scan(reverse, walk.states(state), walk.states(final))
        for piece in walk.order(reverse):
            q_, k_, v_ = (walk.load(piece, x) for x in (q, k, v))
            q_ = q_ * walk.scale
            read, write, carry = walk.factors(piece, reverse)
            found = scan((walk.chunks(k_) * write).mT @ walk.chunks(v_), carry, piece.segments)
            y = ((walk.chunks(q_) * read) @ found).flatten(1, 2)
            if not reverse:
                diagonal = walk.diagonal(piece)
                y += diagonal.times(diagonal.product(q_, k_).mul_(walk.inner), v_)
            piece.store(out, y, add=reverse)
        scan.leave()


def backward(
    walk: Walk,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    state: Tensor | None,
    dfinal: Tensor | None,
    dstate: Tensor | None,
    decay_grad: bool,
) -> Tensor:
    """Fill the gradients of q, k, v and state; return that of log_decay, (H,). tensors: q, k, v, dout."""
    ddecay = walk.rate.new_zeros(len(walk.rate))
    for reverse in walk.directions:
        befores = _befores(walk, tensors[1], tensors[2], state, reverse)
        scan = Scan(not reverse, walk.states(dfinal), walk.states(dstate))
        for piece in walk.order(not reverse):
            q_, k_, v_, dy = (walk.load(piece, x) for x in tensors)
            q_ = q_ * walk.scale
            q_i, k_i, v_i, dy_i = (walk.chunks(x) for x in (q_, k_, v_, dy))
            read, write, carry = walk.factors(piece, reverse)
            before, after = befores.pop(), scan((q_i * read).mT @ dy_i, carry, piece.segments)
            dq_i, dk_i, dv_i = (dy_i @ before.mT) * read, (v_i @ after.mT) * write, (k_i * write) @ after
            if decay_grad:
                read_age, write_age, count = walk.ages(piece, reverse)
                ddecay += (q_i * dq_i * read_age + k_i * dk_i * write_age).sum((1, 2, 3))
                ddecay += (before * after * (carry * count)).sum((1, 2, 3))
            dq, dk, dv = (x.flatten(1, 2) for x in (dq_i, dk_i, dv_i))
            if not reverse:
                ddecay += _inner(walk, piece, (q_, k_, v_, dy), (dq, dk, dv), decay_grad)
            for grad, part in zip(grads, (dq * walk.scale, dk, dv), strict=True):
                piece.store(grad, part, add=reverse)
        scan.leave()
    return ddecay.view(walk.rows, walk.heads).sum(0)


def _inner(
    walk: Walk, piece: Piece, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...], decay_grad: bool
) -> Tensor:
    """What the pairs inside chunks add to the gradients of q, k and v, in place, and to that of log_decay, (R,)."""
    q, k, v, dy = tensors
    dq, dk, dv = grads
    diagonal = walk.diagonal(piece)
    scores = diagonal.product(q, k)
    dscores = diagonal.product(dy, v).mul_(walk.inner)
    ddecay = (scores * dscores * walk.distance).sum((1, 2, 3)) if decay_grad else walk.rate.new_zeros(len(q))
    dq += diagonal.times(dscores, k)
    dk += diagonal.transposed_times(dscores, q)
    dv += diagonal.transposed_times(scores.mul_(walk.inner), dy)
    return ddecay


def _befores(walk: Walk, k: Tensor, v: Tensor, state: Tensor | None, reverse: bool) -> list[Tensor]:
    """The states that the chunks of each piece find."""
    scan, found = Scan(reverse, walk.states(state)), []
    for piece in walk.order(reverse):
        k_, v_ = (walk.load(piece, x) for x in (k, v))
        _, write, carry = walk.factors(piece, reverse)
        found.append(scan((walk.chunks(k_) * write).mT @ walk.chunks(v_), carry, piece.segments))
    return found
