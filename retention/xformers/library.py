"""Every import of xformers. Each function imports one part, at first use, and raises whatever xformers raises."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

__all__ = ["attention", "package", "rms_norm", "sparse", "swiglu"]


def package() -> Any:
    """Import xformers itself."""
    import xformers

    return xformers


@functools.cache
def sparse() -> SimpleNamespace:
    """Import masked_matmul and BlockSparseTensor."""
    from xformers.ops import masked_matmul
    from xformers.sparse import BlockSparseTensor

    return SimpleNamespace(masked_matmul=masked_matmul, BlockSparseTensor=BlockSparseTensor)


def attention() -> Any:
    """Import the module of memory-efficient attention."""
    from xformers.ops import fmha

    return fmha


def rms_norm() -> Any:
    """Import the function rms_norm."""
    from xformers.ops.rmsnorm import rms_norm

    return rms_norm


def swiglu() -> tuple[Any, Any]:
    """Import the function swiglu, and its operator that consists of torch operations."""
    from xformers.ops import SwiGLUEagerOp, swiglu

    return swiglu, SwiGLUEagerOp
