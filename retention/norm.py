"""Norms: of each head, and the RMS norm of a whole width, which also runs on xformers' kernel if that is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import check_input
from .backends.xformers import norm as xformers_norm
from .options import check_choice, check_device, check_dtype, check_eps, check_is, check_whole

BACKENDS = ("torch", "xformers")


class RMSNorm(nn.RMSNorm):
    """torch's; see `set_norm_backend`."""

    eps: float
    backend = "torch"

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim)."""
        return _rms_norm(x, self.weight, self.eps, self.backend)


class HeadNorm(nn.Module):
    """Normalise each head by itself, so that heads of slow decay, whose sums are larger, do not drown the others.

    kind: "group" takes off the mean and divides by the standard deviation (the paper's GroupNorm); "rms" divides by the
        root mean square (the authors' later code).
    affine: False; "shared", one weight of head_dim for all heads; "channel", one for every channel of every head.
    Raises: ValueError or TypeError that names the option.
    """

    backend = "torch"

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        kind: str,
        affine: bool | str,
        eps: float,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        check_whole("num_heads", num_heads)
        check_whole("head_dim", head_dim)
        check_choice("kind", kind, ("group", "rms"))
        check_choice("affine", affine, (False, "shared", "channel"))
        check_eps("eps", eps)
        check_device(device)
        check_dtype(dtype)
        self.head_dim, self.kind, self.affine, self.eps = head_dim, kind, affine, eps
        shape = (num_heads, head_dim) if affine == "channel" else (head_dim,)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if affine and kind == "group" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., heads, head_dim)."""
        check_input("x", x, self.head_dim, tokens=False)
        if self.kind == "rms":
            x = _rms_norm(x, None, self.eps, self.backend)
        else:
            x = F.layer_norm(x, (self.head_dim,), eps=self.eps)
        if self.weight is not None:
            x = x * self.weight
        return x if self.bias is None else x + self.bias

    def extra_repr(self) -> str:
        return f"{self.head_dim}, kind={self.kind!r}, affine={self.affine!r}, eps={self.eps}"


def set_norm_backend(model: nn.Module, backend: str) -> nn.Module:
    """Let the RMS norms in `model`, of heads too, run on "xformers", its Triton kernel, or again on "torch".

    The kernel is for inference on CUDA. It is tried first, on every device that the model is on. Where it cannot give
    what torch gives (with gradients, autocast or torch.compile, in float64, on a CPU), the norms go on in torch.
    Raises: ValueError for an unknown name, or a model that has no RMS norm; BackendError, from its cause, if xformers
        is missing or its kernel does not work on a device of the model.
    """
    check_is("model", model, nn.Module, "an nn.Module")
    check_choice("backend", backend, BACKENDS)
    norms = [m for m in model.modules() if isinstance(m, RMSNorm) or (isinstance(m, HeadNorm) and m.kind == "rms")]
    if not norms:
        raise ValueError(
            f"the model must have an RMS norm; got {type(model).__name__} without one; see the option norm"
        )
    if backend == "xformers":
        for device in {parameter.device for parameter in model.parameters()}:
            xformers_norm.check(device)
    for norm in norms:
        norm.backend = backend
    return model


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, backend: str) -> Tensor:
    if backend == "xformers" and xformers_norm.takes(x, weight):
        return xformers_norm.rms_norm(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)
