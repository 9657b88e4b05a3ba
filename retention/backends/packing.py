"""Rows with padding as one row of packed segments, and back; and how the outputs of a call lie in memory.

For the inside of an operator: the shapes depend on the values of the mask.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None  # Linux only


def pack(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The real tokens of tensors (B, H, T, D) one after another, (1, H, N, D); mask (B, T) bool, True = real token."""
    real = mask.nonzero(as_tuple=True)
    return [x.transpose(1, 2)[real].transpose(0, 1)[None] for x in tensors]


def unpack(mask: Tensor, x: Tensor) -> Tensor:
    """The reverse for one tensor, 0 at padding."""
    out = empty(x, (mask.shape[0], x.shape[1], mask.shape[1], x.shape[3]), x.dtype).zero_()
    out.transpose(1, 2)[mask] = x[0].transpose(0, 1)
    return out


def borders(mask: Tensor) -> Tensor:
    """The cu_seqlens of the packed row, (B + 1,) int64."""
    return torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))


def segment_borders(cu_seqlens: Tensor, length: int) -> list[int]:
    """cu_seqlens as numbers. In a compiled call nobody has checked them: here they cannot fall or leave 0 to length."""
    return cu_seqlens.clamp(0, length).cummax(0).values.tolist()


def clear_outside(segments: Sequence[int], *tensors: Tensor) -> None:
    """Zero the tokens of tensors (B, H, T, D) that are of no segment, which nothing else fills."""
    for x in tensors:
        x[:, :, : segments[0]] = 0
        x[:, :, segments[-1] :] = 0


def empty(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(B, H, T, D) on the device of x; in memory it is (B, T, H, D), which is how layers go on with it.

    Not a view of another tensor: autograd forbids to write in place to a view that a custom operator returned.
    """
    _, heads, length, width = shape
    return x.new_empty_strided(shape, (length * heads * width, width, heads * width, 1), dtype=dtype)


def ask_for_huge_pages(*tensors: Tensor) -> None:
    """Let Linux map large CPU memory 2 MB at a time: by 4 kB, to touch an output first can cost more than computing it.

    Below 32 MB glibc hands out memory that was touched before.
    """
    for x in tensors:
        memory = x.untyped_storage()
        if _madvise is None or memory.device.type != "cpu" or memory.nbytes() < 32 * 2**20:
            continue
        start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = memory.data_ptr() + memory.nbytes() - start
        # Advice only: what it returns does not matter.
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
