"""The parallel form on the blocks that count, of a triangle, a square, packed segments or a grid.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5. Differs: blocks that lie in the future, between two segments, or in
which no decay is above `eps` are not computed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...state import state_dtype
from .blocks import SMALLEST, Alignment, Blocks, block_size

CACHE_BYTES = 64 * 2**20


class Pattern(NamedTuple):
    """Which blocks one head computes, and what it multiplies them with: that depends on how far apart they are only."""

    blocks: Blocks
    apart: Tensor  # (blocks there,) which of the D that follow
    distance: Tensor  # (D, C, C) exponents of gamma
    decay: Tensor  # (D, C, C) 0 where nothing is seen

    @property
    def nbytes(self) -> int:
        return self.distance.nbytes + self.decay.nbytes + self.blocks.layout.nbytes + 3 * self.apart.nbytes


class Cache:
    """The patterns used last, of a bounded size in all."""

    def __init__(self, limit: int):
        self.limit, self.kept, self.lock = limit, OrderedDict[Hashable, Pattern](), threading.Lock()

    def __call__(self, key: Hashable, make: Callable[[], Pattern]) -> Pattern:
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        with torch.inference_mode(False):  # it outlives the call
            made = make()
        with self.lock:
            self.kept[key] = made
            while self.nbytes() > self.limit:
                self.kept.popitem(last=False)
        return made

    def nbytes(self) -> int:
        return sum(pattern.nbytes for pattern in self.kept.values())


patterns = Cache(CACHE_BYTES)


class Walk:
    """The heads of a call, one at a time. In grid (rows, columns) a block holds whole rows."""

    def __init__(
        self,
        q: Tensor,
        log_decay: Tensor,
        cu_seqlens: Tensor | None,
        size: int,
        scale: float,
        causal: bool,
        grid: Sequence[int],
        eps: float,
    ):
        self.dtype, self.device, length = state_dtype(q.dtype), q.device, q.shape[2]
        self.borders = (0, length) if cu_seqlens is None else tuple(cu_seqlens.tolist())
        self.columns = grid[1] if grid else 0
        self.scale, self.causal, self.eps = scale, causal, eps
        self.rates = log_decay.tolist()
        self.size = block_size(size, self.borders)
        if grid:
            self.size = self.columns * max(1, self.size // self.columns, -(-SMALLEST // self.columns))
        self.alignment = Alignment(self.borders, self.size, q.device)
        self.piece = self.alignment.piece(0, len(self.alignment.counts))
        self.heads = range(len(self.rates)) if self.alignment.counts else range(0)

    def load(self, x: Tensor, head: int) -> Tensor:
        """The tokens of query head `head` of x (B, H or fewer, T, D): (B, L, D)."""
        return self.piece.load(self.head(x, head), 1, self.dtype)

    def head(self, x: Tensor, head: int) -> Tensor:
        """(B, 1, T, D)"""
        head = head * x.shape[1] // len(self.rates)
        return x[:, head : head + 1]

    def pattern(self, head: int) -> Pattern:
        rate = self.rates[head]
        key = (self.borders, self.columns, self.causal, self.eps, self.size, rate, self.dtype, self.device)
        return patterns(key, lambda: self._pattern(rate))

    def _pattern(self, rate: float) -> Pattern:
        segment = torch.tensor(self.alignment.segments, device=self.device)
        layout = segment[:, None] == segment
        layout = layout.tril() if self.causal else layout
        row, column = layout.nonzero(as_tuple=True)
        reach = int((row - column).max())  # blocks that the farthest pair is apart
        behind = 0 if self.causal else reach
        distance, seen = self._distance(reach, behind)
        decay = (rate * distance).exp().masked_fill_(~seen, 0)
        apart = row - column + behind
        counts = (decay.amax((1, 2)) > self.eps)[apart]
        layout = layout.index_put((row, column), counts)
        return Pattern(Blocks(layout, self.size), apart[counts], distance, decay)

    def _distance(self, reach: int, behind: int) -> tuple[Tensor, Tensor]:
        """Between the tokens of blocks -behind to reach apart, (behind + 1 + reach, C, C); and who sees whom."""
        index = torch.arange(self.size, device=self.device)
        first = torch.arange(behind + 1 + reach, device=self.device)[:, None, None] * self.size
        n, m = first + index[:, None], behind * self.size + index
        seen = n >= m if self.causal else torch.ones_like(n >= m)
        if not self.columns:
            return (n - m).abs().to(self.dtype), seen
        rows, columns = n // self.columns - m // self.columns, n % self.columns - m % self.columns
        return (rows.abs() + columns.abs()).to(self.dtype), seen


def forward(walk: Walk, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Fill `out`."""
    for head in walk.heads:
        q_, k_, v_ = (walk.load(x, head) for x in (q, k, v))
        blocks, apart, _, decay = walk.pattern(head)
        scores = blocks.product(q_ * walk.scale, k_).mul_(decay[apart])
        walk.piece.store(walk.head(out, head), blocks.times(scores, v_))


def backward(
    walk: Walk,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    decay_grad: bool,
) -> Tensor:
    """Fill the gradients of q, k and v; return that of log_decay, (H,). tensors: q, k, v, dout."""
    ddecay = torch.zeros(len(walk.rates), dtype=walk.dtype, device=walk.device)
    sums = [grad.new_zeros(grad.shape, dtype=walk.dtype) for grad in grads]  # several heads may share a key
    for head in walk.heads:
        q_, k_, v_, dy = (walk.load(x, head) for x in tensors)
        q_ = q_ * walk.scale
        blocks, apart, distance, decay = walk.pattern(head)
        scores, dscores = blocks.product(q_, k_), blocks.product(dy, v_).mul_(decay[apart])
        if decay_grad:
            ddecay[head] = (scores * dscores * distance[apart]).sum()
        scores.mul_(decay[apart])
        dq = blocks.times(dscores, k_) * walk.scale
        parts = dq, blocks.transposed_times(dscores, q_), blocks.transposed_times(scores, dy)
        for total, part in zip(sums, parts, strict=True):
            walk.piece.store(walk.head(total, head), part, add=True)
    for grad, total in zip(grads, sums, strict=True):
        grad.copy_(total)
    return ddecay
