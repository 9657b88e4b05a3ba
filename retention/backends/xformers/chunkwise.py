"""The chunkwise form: a block-diagonal matrix for the pairs inside chunks, a state for all others.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 7. Differs: one block-sparse product computes several chunks of all
    heads.

For a chunk of n tokens, with q scaled already, the state B before it and the state A after it:

    out = ((q kᵀ) * D) v + (read * q) B          D_jm = gamma^(j-m)    read_j = gamma^(j+1)
    A   = gamma^n B + (write * k)ᵀ v             write_j = gamma^(n-1-j)

The backward pass is the same recurrence in the other direction: dB = gamma^n dA + (read * q)ᵀ dout. Bidirectional
retention adds the mirror image, for the tokens of later chunks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...state import state_dtype
from ..packing import segment_borders
from .blocks import Alignment, Blocks, Piece, block_size

__all__ = ["Plan", "backward", "forward"]

_BLOCKS_AT_ONCE = {"cpu": 32}  # chunks times heads that fit the processor's cache
_BLOCKS_ELSEWHERE = 1024


@functools.lru_cache(maxsize=64)
def _diagonal(blocks: int, size: int, device: torch.device) -> Blocks:
    """Make the block-diagonal matrix with this number of blocks; the last ones made are kept."""
    with torch.inference_mode(False):  # the cache keeps it for later calls, which may need gradients
        return Blocks(torch.eye(blocks, dtype=torch.bool, device=device), size)


class Plan:
    """The decays and pieces that `forward` and `backward` share.

    Rows of the batch and heads are one dimension R; a state is (segments, R, K, V). C is the size of a chunk.
    """

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
        at_once = _BLOCKS_AT_ONCE.get(q.device.type, _BLOCKS_ELSEWHERE)
        blocks = max(1, at_once // max(1, len(self.rate)))
        self.pieces = list(alignment.pieces(blocks)) if self.rows else []

    def states(self, state: Tensor | None) -> Tensor | None:
        """Reshape a state (B or N, H, K, V) to (segments, R, K, V)."""
        return state if state is None or self.rows == 1 else state.flatten(0, 1)[None]

    def load(self, piece: Piece, x: Tensor) -> Tensor:
        """Return the tokens of a piece in x (B, H or Hkv, T, D): (R, n C, D) for n chunks."""
        return piece.load(x, self.heads, self.dtype)

    def chunks(self, x: Tensor) -> Tensor:
        """Split x (R, n C, D) into chunks (R, n, C, D)."""
        return x.unflatten(1, (-1, self.size))

    def diagonal(self, piece: Piece) -> Blocks:
        """Return the block-diagonal matrix of the chunks of a piece."""
        return _diagonal(len(piece.counts), self.size, self.index.device)

    def order(self, reverse: bool) -> list[Piece]:
        """Return the pieces in the order of time, or in reverse."""
        return self.pieces[::-1] if reverse else self.pieces

    def ages(self, piece: Piece, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the exponents of gamma for reading and writing, (1 or n, C, 1), and for carrying, (n, 1, 1)."""
        counts = torch.tensor(piece.counts, dtype=self.dtype).to(self.index.device)[:, None, None]
        index = self.index[:, None]
        if reverse:
            return (counts - index).clamp(min=0), index[None], counts
        return index[None] + 1, (counts - 1 - index).clamp(min=0), counts

    def factors(self, piece: Piece, reverse: bool) -> tuple[Tensor, ...]:
        """Return gamma to the power of these ages, for each row: (R, 1 or n, C or 1, 1)."""
        return tuple((self.rate[..., None] * age).exp() for age in self.ages(piece, reverse))


class _Scan:
    """The recurrence x <- added + carry x, chunk by chunk, from `start` of each segment to its `end`.

    start and end are (segments, R, K, V), or None for 0 and for no output.
    """

    def __init__(self, reverse: bool, start: Tensor | None = None, end: Tensor | None = None):
        self.reverse, self.start, self.end, self.segment, self.x = reverse, start, end, -1, torch.empty(0)

    def __call__(self, added: Tensor, carry: Tensor, segments: list[int]) -> Tensor:
        """Return the x before each chunk, (R, n, K, V), for added (R, n, K, V)."""
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
        """Write x to the end of the segment that is left."""
        if self.end is not None and self.segment >= 0:
            self.end[self.segment] = self.x


def forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: Tensor | None, final: Tensor | None
) -> None:
    """Write the outputs to `out` and the states after the segments to `final`.

    Shapes: q (B, H, T, K); k (B, Hkv, T, K); v (B, Hkv, T, V); out (B, H, T, V); state, final (B or N, H, K, V) or
        None.
    """
    for reverse in plan.directions:
        scan = _Scan(reverse, plan.states(state), plan.states(final))
        for piece in plan.order(reverse):
            q_, k_, v_ = (plan.load(piece, x) for x in (q, k, v))  # (R, n C, K), (R, n C, K), (R, n C, V)
            q_ = q_ * plan.scale
            read, write, carry = plan.factors(piece, reverse)
            # A = gamma^n B + (write * k)ᵀ v; found is B of each chunk, (R, n, K, V)
            found = scan((plan.chunks(k_) * write).mT @ plan.chunks(v_), carry, piece.segments)
            y = ((plan.chunks(q_) * read) @ found).flatten(1, 2)  # (read * q) B, (R, n C, V)
            if not reverse:  # + ((q kᵀ) * D) v
                diagonal = plan.diagonal(piece)
                y += diagonal.times(diagonal.product(q_, k_).mul_(plan.inner), v_)
            piece.store(out, y, add=reverse)
        scan.leave()


def backward(
    plan: Plan,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    state: Tensor | None,
    dfinal: Tensor | None,
    dstate: Tensor | None,
    decay_grad: bool,
) -> Tensor:
    """Write the gradients of q, k, v and state; return that of log_decay, (H,).

        dq = (dout Bᵀ) * read    dk = (v dAᵀ) * write    dv = (write * k) dA    each plus the pairs inside chunks

    tensors: q, k, v, dout. grads: the outputs dq, dk, dv. dfinal, dstate: gradients of the states after and before, or
        None.
    """
    ddecay = plan.rate.new_zeros(len(plan.rate))
    for reverse in plan.directions:
        befores = _befores(plan, tensors[1], tensors[2], state, reverse)
        scan = _Scan(not reverse, plan.states(dfinal), plan.states(dstate))
        for piece in plan.order(not reverse):
            q_, k_, v_, dy = (plan.load(piece, x) for x in tensors)
            q_ = q_ * plan.scale
            q_i, k_i, v_i, dy_i = (plan.chunks(x) for x in (q_, k_, v_, dy))
            read, write, carry = plan.factors(piece, reverse)
            # B and dA of each chunk, (R, n, K, V); dB = gamma^n dA + (read * q)ᵀ dout
            before, after = befores.pop(), scan((q_i * read).mT @ dy_i, carry, piece.segments)
            dq_i, dk_i, dv_i = (dy_i @ before.mT) * read, (v_i @ after.mT) * write, (k_i * write) @ after
            if decay_grad:  # every product times its exponent of gamma
                read_age, write_age, count = plan.ages(piece, reverse)
                ddecay += (q_i * dq_i * read_age + k_i * dk_i * write_age).sum((1, 2, 3))
                ddecay += (before * after * (carry * count)).sum((1, 2, 3))
            dq, dk, dv = (x.flatten(1, 2) for x in (dq_i, dk_i, dv_i))
            if not reverse:
                ddecay += _inner(plan, piece, (q_, k_, v_, dy), (dq, dk, dv), decay_grad)
            for grad, part in zip(grads, (dq * plan.scale, dk, dv), strict=True):
                piece.store(grad, part, add=reverse)
        scan.leave()
    return ddecay.view(plan.rows, plan.heads).sum(0)


def _inner(
    plan: Plan, piece: Piece, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...], decay_grad: bool
) -> Tensor:
    """Add the pairs inside chunks to the gradients of q, k and v, in place; return their part of dlog_decay, (R,)."""
    q, k, v, dy = tensors
    dq, dk, dv = grads
    diagonal = plan.diagonal(piece)
    scores = diagonal.product(q, k)  # q kᵀ inside each chunk, (R, n, C, C)
    dscores = diagonal.product(dy, v).mul_(plan.inner)  # (dout vᵀ) * D
    ddecay = (scores * dscores * plan.distance).sum((1, 2, 3)) if decay_grad else plan.rate.new_zeros(len(q))
    dq += diagonal.times(dscores, k)
    dk += diagonal.transposed_times(dscores, q)
    dv += diagonal.transposed_times(scores.mul_(plan.inner), dy)
    return ddecay


def _befores(plan: Plan, k: Tensor, v: Tensor, state: Tensor | None, reverse: bool) -> list[Tensor]:
    """Return the states before the chunks of each piece, (R, n, K, V) each."""
    scan, found = _Scan(reverse, plan.states(state)), []
    for piece in plan.order(reverse):
        k_, v_ = (plan.load(piece, x) for x in (k, v))
        _, write, carry = plan.factors(piece, reverse)
        found.append(scan((plan.chunks(k_) * write).mT @ plan.chunks(v_), carry, piece.segments))
    return found
