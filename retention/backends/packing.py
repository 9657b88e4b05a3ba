"""Pack rows with padding into one row of segments and unpack them; allocate the outputs of a call.

The packing functions belong inside an operator, since their shapes depend on the values of the mask.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ask_for_huge_pages", "borders", "clear_outside", "empty", "pack", "segment_borders", "unpack"]

_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None  # Linux only


def pack(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Join the real tokens of all rows of each tensor (B, H, T, D) into one row (1, H, N, D).

    mask: (B, T) bool, True = real token; N is the number of real tokens.
    """
    real = mask.nonzero(as_tuple=True)
    return [x.transpose(1, 2)[real].transpose(0, 1)[None] for x in tensors]


def unpack(mask: Tensor, x: Tensor) -> Tensor:
    """Distribute x (1, H, N, D), as `pack` returns it, to the rows of the mask: (B, H, T, D), 0 at padding."""
    out = empty(x, (mask.shape[0], x.shape[1], mask.shape[1], x.shape[3]), x.dtype).zero_()
    out.transpose(1, 2)[mask] = x[0].transpose(0, 1)
    return out


def borders(mask: Tensor) -> Tensor:
    """Return the cu_seqlens of the packed row, (B + 1,) int64, for mask (B, T)."""
    return torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))


def segment_borders(cu_seqlens: Tensor, length: int) -> list[int]:
    """Return cu_seqlens as integers from 0 to length that do not fall, which a compiled call has not checked."""
    return cu_seqlens.clamp(0, length).cummax(0).values.tolist()


def clear_outside(segments: Sequence[int], *tensors: Tensor) -> None:
    """Set the tokens of tensors (B, H, T, D) that belong to no segment to 0."""
    for x in tensors:
        x[:, :, : segments[0]] = 0
        x[:, :, segments[-1] :] = 0


def empty(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate a tensor (B, H, T, D) on the device of x, in memory (B, T, H, D), the order in which layers read it.

    It is not a view of another tensor: autograd forbids writing in place to a view that a custom operator returned.
    """
    _, heads, length, width = shape
    return x.new_empty_strided(shape, (length * heads * width, width, heads * width, 1), dtype=dtype)


def ask_for_huge_pages(*tensors: Tensor) -> None:
    """Let Linux map large CPU tensors 2 MB at a time: first writes to pages of 4 kB can cost more than the computation.

    Tensors below 32 MB are left out, since glibc reuses memory for them that is mapped already.
    """
    for x in tensors:
        memory = x.untyped_storage()
        if _madvise is None or memory.device.type != "cpu" or memory.nbytes() < 32 * 2**20:
            continue
        start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = memory.data_ptr() + memory.nbytes() - start
        # The call only advises the kernel, so its result is ignored.
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
