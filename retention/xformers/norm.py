"""The RMS norm of xformers, a Triton kernel for inference without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BackendError
from . import library
from .probe import expect, require

__all__ = ["DEVICES", "DTYPES", "check", "rms_norm", "takes"]

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # the kernel computes in float32 for each of them


def takes(x: Tensor, weight: Tensor | None) -> bool:
    """Return whether the kernel gives torch's result: on CUDA, not with gradients, torch.compile, autocast, float64."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type in DEVICES
        and x.dtype in DTYPES
        and (weight is None or weight.dtype == x.dtype)
        and not torch.is_autocast_enabled(x.device.type)
    )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, for inputs that `takes` accepts.

    Shapes: x (..., D); weight (D,) or None. Returns (..., D).
    """
    return library.rms_norm()(x.contiguous(), weight, eps)


def check(device: torch.device) -> None:
    """Check that the kernel runs on `device`. Raises: BackendError, from its cause, if it does not."""
    if device.type not in DEVICES:
        raise BackendError(f"xformers' rms_norm runs on {', '.join(DEVICES)}; got a model on {device}; move it there")
    require("xformers' rms_norm", str(device), _trial)


def _trial(device: str) -> None:
    """Compare rows whose length is no power of two, with and without a weight, with torch's norm."""
    x = torch.arange(3 * 200.0, device=device).sin().view(3, 200)
    with torch.no_grad():
        for weight in (None, x[0].cos()):
            got, want = rms_norm(x, weight, 0.1), F.rms_norm(x, (200,), weight, 0.1)
            expect("its RMS norm is wrong", (got,), (want,))
