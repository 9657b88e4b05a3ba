"""xformers' RMS norm, a Triton kernel for inference: it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import BackendError
from .probe import expect, require

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # it computes in float32, whatever comes


def takes(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernel gives what torch gives: not with gradients, under torch.compile or autocast, in float64."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type in DEVICES
        and x.dtype in DTYPES
        and (weight is None or weight.dtype == x.dtype)
        and not torch.is_autocast_enabled(x.device.type)
    )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (..., D) divided by the root of its mean square and eps, times weight (D,); for what `takes` says."""
    from xformers.ops.rmsnorm import rms_norm as compute

    return compute(x.contiguous(), weight, eps)


def check(device: torch.device) -> None:
    """Raises: BackendError, from its cause if it has one, if the kernel cannot be used on a device."""
    if device.type not in DEVICES:
        raise BackendError(f"xformers' rms_norm runs on {', '.join(DEVICES)}; got a model on {device}; move it there")
    require("xformers' rms_norm", str(device), _trial)


def _trial(device: str) -> None:
    """Rows that are no power of two long, with a weight and without, against torch's."""
    x = torch.arange(3 * 200.0, device=device).sin().view(3, 200)
    with torch.no_grad():
        for weight in (None, x[0].cos()):
            got, want = rms_norm(x, weight, 0.1), F.rms_norm(x, (200,), weight, 0.1)
            expect("its RMS norm is wrong", (got,), (want,))
