"""Matrices of which only some blocks are there, multiplied by xformers; and tokens laid out so that blocks fit them.

A block-sparse (L, L) matrix is n by n blocks of C tokens, L = n C; its values (R, blocks there, C, C) are in the order
of the rows. `xformers.ops.masked_matmul` computes the blocks that are there and no others, and a `BlockSparseTensor`
multiplies a dense matrix. Both run in plain torch on every device, without xformers' compiled library.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 16  # tokens of a block: what a BlockSparseTensor takes


@functools.cache
def library() -> SimpleNamespace:
    """What is used of xformers, imported at first use. Raises whatever xformers raises."""
    import xformers
    from xformers.ops import masked_matmul
    from xformers.sparse import BlockSparseTensor

    return SimpleNamespace(package=xformers, masked_matmul=masked_matmul, BlockSparseTensor=BlockSparseTensor)


class Blocks:
    """Which blocks are there: layout (n, n) bool, blocks of `size` tokens."""

    def __init__(self, layout: Tensor, size: int):
        self.layout = layout[None]
        row, column = layout.nonzero(as_tuple=True)
        turned = (column * len(layout) + row).argsort()  # the blocks in the order of the columns
        self.turned = None if bool((turned.diff() == 1).all()) else turned
        nothing = torch.empty((), device=layout.device).expand(1, len(row), size, size)
        self.mask = library().BlockSparseTensor(nothing, self.layout)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The values of a bᵀ; a, b (R, L, D)."""
        return library().masked_matmul(a[:, None], b.contiguous()[:, None].mT, self.mask).values()

    def times(self, values: Tensor, x: Tensor) -> Tensor:
        """The matrix times x (R, L, D)."""
        return (library().BlockSparseTensor(values, self.layout) @ x[:, None])[:, 0]

    def transposed_times(self, values: Tensor, x: Tensor) -> Tensor:
        """The transposed matrix times x (R, L, D)."""
        values = (values if self.turned is None else values[:, self.turned]).mT
        return (library().BlockSparseTensor(values, self.layout.mT) @ x[:, None])[:, 0]


class Piece(NamedTuple):
    """Blocks in a row: the tokens that stand in them, and where. places None: they fill all places."""

    segments: list[int]  # of each block
    counts: list[int]  # tokens of each block
    size: int
    tokens: slice
    places: Tensor | None

    def load(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """Its tokens of x (B, H', T, D), heads repeated to `heads`: (B heads, L, D), 0 where no token stands."""
        part = x[:, :, self.tokens].to(dtype)
        if heads > x.shape[1]:
            part = part.repeat_interleave(heads // x.shape[1], dim=1)
        part = part.flatten(0, 1)
        if self.places is None:
            return part.contiguous()
        full = part.new_zeros(part.shape[0], len(self.counts) * self.size, part.shape[2])
        return full.index_copy_(1, self.places, part)

    def store(self, x: Tensor, value: Tensor, add: bool = False) -> None:
        """The reverse: put value (B heads, L, D) into x (B, H', T, D), repeated heads summed."""
        part = value if self.places is None else value.index_select(1, self.places)
        part = part.unflatten(0, (x.shape[0], x.shape[1], -1)).sum(2) if len(part) > len(x) * x.shape[1] else part
        place = x[:, :, self.tokens]
        part = part.view(place.shape)
        if add:
            place.add_(part)
        else:
            place.copy_(part)


class Alignment:
    """The tokens of one row, each of its segments beginning with a block of its own, so that no block holds two.

    borders: as in cu_seqlens.
    """

    def __init__(self, borders: Sequence[int], size: int, device: torch.device):
        lengths = [end - start for start, end in pairwise(borders)]
        blocks = [range(0, length, size) for length in lengths]
        self.size, self.device = size, device
        self.segments = [s for s, starts in enumerate(blocks) for _ in starts]
        self.counts = [min(size, length - i) for length, starts in zip(lengths, blocks, strict=True) for i in starts]
        self.offsets = list(accumulate(self.counts, initial=borders[0]))

    def piece(self, start: int, end: int) -> Piece:
        counts = self.counts[start:end]
        places = None
        if any(count < self.size for count in counts):
            filled = torch.arange(self.size) < torch.tensor(counts)[:, None]
            places = filled.flatten().nonzero()[:, 0].to(self.device)
        tokens = slice(self.offsets[start], self.offsets[min(end, len(self.counts))])
        return Piece(self.segments[start:end], counts, self.size, tokens, places)

    def pieces(self, blocks: int) -> Iterator[Piece]:
        """All tokens, so many blocks at a time."""
        return (self.piece(i, i + blocks) for i in range(0, len(self.counts), blocks))


def block_size(size: int, borders: Sequence[int]) -> int:
    """`size`, or less where all segments are shorter: no more padding than the smallest blocks need."""
    longest = max(end - start for start, end in pairwise(borders))
    return min(size, max(SMALLEST, -(-longest // SMALLEST) * SMALLEST))
