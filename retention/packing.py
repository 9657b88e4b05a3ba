"""Rows with padding as one row of packed segments, and back; and how the outputs of a call lie in memory.

For the inside of an operator: the shapes depend on the values of the mask.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None  # Linux only


def pack(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The real tokens of tensors (B, H, T, D) one after another, (1, H, N, D); mask (B, T) bool, True = real token."""
    real = mask.nonzero(as_tuple=True)
    return [x.transpose(1, 2)[real].transpose(0, 1)[None] for x in tensors]


def unpack(mask: Tensor, x: Tensor) -> Tensor:
    """The reverse for one tensor, 0 at padding."""
    out = x.new_zeros(*mask.shape, x.shape[1], x.shape[3])
    out[mask] = x[0].transpose(0, 1)
    return out.transpose(1, 2)


def borders(mask: Tensor) -> Tensor:
    """The cu_seqlens of the packed row, (B + 1,) int64."""
    return torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))


def empty(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(B, H, T, width) for x (B, H, T, D); in memory it is (B, T, H, width), which is how layers go on with it."""
    batch, heads, length, _ = x.shape
    return x.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)


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
