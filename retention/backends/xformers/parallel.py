"""The parallel form on the blocks that matter, of a triangle, a square, packed segments or a grid.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 5. Differs: blocks that are in the future, between two segments, or have
    no decay above `eps` are not computed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...state import state_dtype
from ..packing import segment_borders
from .blocks import SMALLEST, Alignment, Blocks, block_size

__all__ = ["SCORES_AT_ONCE", "Cache", "Pattern", "Plan", "backward", "forward", "patterns"]

_CACHE_BYTES = 64 * 2**20
SCORES_AT_ONCE = 4 * 2**20  # several heads are computed together up to this number of scores


class Pattern(NamedTuple):
    """The blocks that G heads compute, and their decays, which depend on the distance of two blocks only."""

    blocks: Blocks
    apart: Tensor  # (stored blocks,) index of their distance among the D distances of blocks
    distance: Tensor  # (D, C, C) exponents of gamma
    decay: Tensor  # (G, D, C, C) gamma^distance, 0 for pairs that do not see each other

    @property
    def nbytes(self) -> int:
        """The memory of the pattern."""
        return self.distance.nbytes + self.decay.nbytes + self.blocks.layout.nbytes + 3 * self.apart.nbytes


class Cache:
    """The patterns that were used last, up to `limit` bytes in all; safe for threads."""

    def __init__(self, limit: int):
        self.limit, self.kept, self.lock = limit, OrderedDict[Hashable, Pattern](), threading.Lock()

    def __call__(self, key: Hashable, make: Callable[[], Pattern]) -> Pattern:
        """Return the pattern of `key`; if it is not kept, make it."""
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        with torch.inference_mode(False):  # the cache keeps it for later calls, which may need gradients
            made = make()
        with self.lock:
            self.kept[key] = made
            while self.nbytes() > self.limit:
                self.kept.popitem(last=False)
        return made

    def nbytes(self) -> int:
        """Return the memory of all patterns."""
        return sum(pattern.nbytes for pattern in self.kept.values())


patterns = Cache(_CACHE_BYTES)


class Plan:
    """The heads of a call, G at a time; one at a time with eps, since each head then has blocks of its own.

    Rows of the batch and these heads are one dimension R. On a grid a block holds whole rows of the grid.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor,
        cu_seqlens: Tensor | None,
        size: int,
        scale: float,
        causal: bool,
        grid: Sequence[int],
        eps: float,
    ):
        self.dtype, self.device, length = state_dtype(q.dtype), q.device, q.shape[2]
        self.borders = (0, length) if cu_seqlens is None else tuple(segment_borders(cu_seqlens, length))
        self.columns = grid[1] if grid else 0
        self.scale, self.causal, self.eps = scale, causal, eps
        self.rates = log_decay.tolist()
        self.size = block_size(size, self.borders)
        if grid:
            self.size = self.columns * max(1, self.size // self.columns, -(-SMALLEST // self.columns))
        self.alignment = Alignment(self.borders, self.size, q.device)
        self.piece = self.alignment.piece(0, len(self.alignment.counts))
        self.groups = self._groups(q.shape[0], q.shape[1] // k.shape[1])

    def _groups(self, batch: int, sharing: int) -> list[range]:
        """Return the query heads to compute at a time: all that share a key, several such groups, or a part of one."""
        heads, scores = len(self.rates), batch * (len(self.alignment.counts) * self.size) ** 2
        if scores == 0:
            return []
        most = 1 if self.eps else min(heads, max(1, SCORES_AT_ONCE // scores))
        at_once = max(n for n in range(1, most + 1) if n % sharing == 0 or sharing % n == 0)
        return [range(start, min(start + at_once, heads)) for start in range(0, heads, at_once)]

    def load(self, x: Tensor, heads: range) -> Tensor:
        """Return the tokens of these query heads in x (B, H or Hkv, T, D): (R, L, D)."""
        return self.piece.load(self.part(x, heads), len(heads), self.dtype)

    def part(self, x: Tensor, heads: range) -> Tensor:
        """Return the heads of x (B, H or Hkv, T, D) that belong to these query heads."""
        first, last = (head * x.shape[1] // len(self.rates) for head in (heads[0], heads[-1]))
        return x[:, first : last + 1]

    def decays(self, pattern: Pattern, values: Tensor) -> Tensor:
        """Multiply values (R, stored blocks, C, C) by the decay of each pair, in place."""
        values.unflatten(0, (-1, len(pattern.decay))).mul_(pattern.decay[:, pattern.apart])
        return values

    def pattern(self, heads: range) -> Pattern:
        """Return the pattern of these heads, from the cache or new."""
        rates = tuple(self.rates[heads.start : heads.stop])
        key = (self.borders, self.columns, self.causal, self.eps, self.size, rates, self.dtype, self.device)
        return patterns(key, lambda: self._pattern(rates))

    def _pattern(self, rates: tuple[float, ...]) -> Pattern:
        """Make the pattern of heads with these log-decays: blocks whose largest decay is at most eps are left out."""
        segment = torch.tensor(self.alignment.segments, device=self.device)
        layout = segment[:, None] == segment
        layout = layout.tril() if self.causal else layout
        row, column = layout.nonzero(as_tuple=True)
        reach = int((row - column).max())  # the largest distance, in blocks
        behind = 0 if self.causal else reach
        distance, seen = self._distance(reach, behind)
        rate = torch.tensor(rates, dtype=self.dtype, device=self.device)[:, None, None, None]
        decay = (rate * distance).exp().masked_fill_(~seen, 0)
        apart = row - column + behind
        counts = (decay.amax((0, 2, 3)) > self.eps)[apart]
        layout = layout.index_put((row, column), counts)
        return Pattern(Blocks(layout, self.size), apart[counts], distance, decay)

    def _distance(self, reach: int, behind: int) -> tuple[Tensor, Tensor]:
        """Return the distances of tokens in blocks that are -behind to reach apart, and who sees whom, (D, C, C)."""
        index = torch.arange(self.size, device=self.device)
        first = torch.arange(behind + 1 + reach, device=self.device)[:, None, None] * self.size
        n, m = first + index[:, None], behind * self.size + index
        seen = n >= m if self.causal else torch.ones_like(n >= m)
        if not self.columns:
            return (n - m).abs().to(self.dtype), seen
        rows, columns = n // self.columns - m // self.columns, n % self.columns - m % self.columns
        return (rows.abs() + columns.abs()).to(self.dtype), seen


def forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Write out = ((scale q kᵀ) * D) v to `out`, for D on the blocks of the pattern."""
    for heads in plan.groups:
        q_, k_, v_ = (plan.load(x, heads) for x in (q, k, v))
        pattern = plan.pattern(heads)
        scores = plan.decays(pattern, pattern.blocks.product(q_ * plan.scale, k_))
        plan.piece.store(plan.part(out, heads), pattern.blocks.times(scores, v_))


def backward(
    plan: Plan,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    decay_grad: bool,
) -> Tensor:
    """Write the gradients of q, k and v; return that of log_decay, (H,).

        A = (dout vᵀ) * D,    dq = scale A k,    dk = Aᵀ (scale q),    dv = ((scale q kᵀ) * D)ᵀ dout

    tensors: q, k, v, dout. grads: the outputs dq, dk, dv.
    """
    ddecay = torch.zeros(len(plan.rates), dtype=plan.dtype, device=plan.device)
    sums = [grad.new_zeros(grad.shape, dtype=plan.dtype) for grad in grads]  # several heads may share a key
    for heads in plan.groups:
        q_, k_, v_, dy = (plan.load(x, heads) for x in tensors)
        q_ = q_ * plan.scale
        pattern = plan.pattern(heads)
        blocks = pattern.blocks
        scores, dscores = blocks.product(q_, k_), plan.decays(pattern, blocks.product(dy, v_))
        if decay_grad:
            weights = (scores * dscores * pattern.distance[pattern.apart]).sum((1, 2, 3))
            ddecay[heads.start : heads.stop] = weights.view(-1, len(heads)).sum(0)
        plan.decays(pattern, scores)
        dq = blocks.times(dscores, k_) * plan.scale
        parts = dq, blocks.transposed_times(dscores, q_), blocks.transposed_times(scores, dy)
        for total, part in zip(sums, parts, strict=True):
            plan.piece.store(plan.part(total, heads), part, add=True)
    for grad, total in zip(grads, sums, strict=True):
        grad.copy_(total)
    return ddecay
