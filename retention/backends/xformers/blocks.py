"""Block-sparse matrices, multiplied by xformers, and a layout of tokens in which no block holds two segments.

A block-sparse (L, L) matrix consists of n by n blocks of C tokens, L = n C; its values (R, stored blocks, C, C) are in
the order of the rows. `xformers.ops.masked_matmul` computes the stored blocks only, and a `BlockSparseTensor`
multiplies a dense matrix. Both run in plain torch on every device, without the compiled library of xformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...xformers.library import sparse

__all__ = ["SMALLEST", "Alignment", "Blocks", "Piece", "block_size"]

SMALLEST = 16  # tokens: the smallest block of a BlockSparseTensor


class Blocks:
    """A block-sparse matrix without its values.

    Args:
        layout: (n, n) bool, True for a stored block.
        size: tokens of a block.
    """

    def __init__(self, layout: Tensor, size: int):
        self.layout = layout[None]
        row, column = layout.nonzero(as_tuple=True)
        turned = (column * len(layout) + row).argsort()  # order of the blocks in the transposed matrix
        self.turned = None if bool((turned.diff() == 1).all()) else turned
        nothing = torch.empty((), device=layout.device).expand(1, len(row), size, size)
        self.mask = sparse().BlockSparseTensor(nothing, self.layout)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the values of a bᵀ, (R, stored blocks, C, C), for a and b (R, L, D)."""
        return sparse().masked_matmul(a[:, None], b.contiguous()[:, None].mT, self.mask).values()

    def times(self, values: Tensor, x: Tensor) -> Tensor:
        """Return the matrix of `values` times x (R, L, D)."""
        return (sparse().BlockSparseTensor(values, self.layout) @ x[:, None])[:, 0]

    def transposed_times(self, values: Tensor, x: Tensor) -> Tensor:
        """Return the transposed matrix of `values` times x (R, L, D)."""
        values = (values if self.turned is None else values[:, self.turned]).mT
        return (sparse().BlockSparseTensor(values, self.layout.mT) @ x[:, None])[:, 0]


class Piece(NamedTuple):
    """Consecutive blocks, and the tokens in them."""

    segments: list[int]  # of each block
    counts: list[int]  # tokens of each block
    size: int  # places of a block, C
    tokens: slice  # of the row
    places: Tensor | None  # the places of the tokens among the L = n C; None: they fill all places

    def load(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """Return its tokens of x (B, H', T, D), heads repeated to `heads`: (B heads, L, D), 0 at empty places."""
        part = x[:, :, self.tokens].to(dtype)
        if heads > x.shape[1]:
            part = part.repeat_interleave(heads // x.shape[1], dim=1)
        part = part.flatten(0, 1)
        if self.places is None:
            return part.contiguous()
        full = part.new_zeros(part.shape[0], len(self.counts) * self.size, part.shape[2])
        return full.index_copy_(1, self.places, part)

    def store(self, x: Tensor, value: Tensor, add: bool = False) -> None:
        """Write value (B heads, L, D) to its tokens of x (B, H', T, D), or add it; repeated heads are summed."""
        part = value if self.places is None else value.index_select(1, self.places)
        part = part.unflatten(0, (x.shape[0], x.shape[1], -1)).sum(2) if len(part) > len(x) * x.shape[1] else part
        place = x[:, :, self.tokens]
        part = part.view(place.shape)
        if add:
            place.add_(part)
        else:
            place.copy_(part)


class Alignment:
    """The layout of the tokens of one row in blocks, where each segment begins with a new block.

    Args:
        borders: the borders of the segments, as in cu_seqlens.
        size: places of a block.
    """

    def __init__(self, borders: Sequence[int], size: int, device: torch.device):
        lengths = [end - start for start, end in pairwise(borders)]
        blocks = [range(0, length, size) for length in lengths]
        self.size, self.device = size, device
        self.segments = [s for s, starts in enumerate(blocks) for _ in starts]
        self.counts = [min(size, length - i) for length, starts in zip(lengths, blocks, strict=True) for i in starts]
        self.offsets = list(accumulate(self.counts, initial=borders[0]))

    def piece(self, start: int, end: int) -> Piece:
        """Return the blocks from start to end."""
        counts = self.counts[start:end]
        places = None
        if any(count < self.size for count in counts):
            filled = torch.arange(self.size) < torch.tensor(counts)[:, None]
            places = filled.flatten().nonzero()[:, 0].to(self.device)
        tokens = slice(self.offsets[start], self.offsets[min(end, len(self.counts))])
        return Piece(self.segments[start:end], counts, self.size, tokens, places)

    def pieces(self, blocks: int) -> Iterator[Piece]:
        """Return all tokens, `blocks` blocks at a time."""
        return (self.piece(i, i + blocks) for i in range(0, len(self.counts), blocks))


def block_size(size: int, borders: Sequence[int]) -> int:
    """Return `size`, or less if all segments are shorter, so that there is little padding."""
    longest = max(end - start for start, end in pairwise(borders))
    return min(size, max(SMALLEST, -(-longest // SMALLEST) * SMALLEST))
