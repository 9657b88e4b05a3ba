"""Norms: `HeadNorm` of each head, and `RMSNorm` of a whole width. Both can run an RMS norm on xformers' kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import check_input
from .local import local
from .options import check_choice, check_device, check_dtype, check_eps, check_is, check_whole
from .xformers import norm as xformers_norm

__all__ = ["BACKENDS", "HEAD_NORMS", "NORMS", "HeadNorm", "RMSNorm", "set_norm_backend"]

BACKENDS = ("torch", "xformers")
HEAD_NORMS = ("group", "rms")  # kinds of `HeadNorm`


class RMSNorm(nn.RMSNorm):
    """torch's RMS norm, x / sqrt(mean(x^2) + eps) * weight, which `set_norm_backend` can move to xformers' kernel.

    Shapes: x (..., dim) -> (..., dim).
    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in `torch.nn.RMSNorm`.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    Examples:
        >>> import torch
        >>> from retention.norm import RMSNorm
        >>> RMSNorm(2, eps=0.0)(torch.tensor([1.0, 7.0])).detach()
        tensor([0.2000, 1.4000])
    """

    eps: float
    backend = "torch"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim)."""
        return _rms_norm(x, self.weight, self.eps, self.backend)


NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": nn.LayerNorm}  # norms of a whole width


class HeadNorm(nn.Module):
    """Normalise each head by itself, so that heads with slow decay, whose sums are larger, do not dominate the others.

    Shapes: x (..., num_heads, head_dim) -> the same.
    Args:
        num_heads, head_dim: heads, and channels of each.
        kind: "group" subtracts the mean and divides by the standard deviation, as GroupNorm in the paper; "rms" divides
            by the root mean square, as in the authors' later code.
        affine: False: no weights; "shared": one weight of head_dim for all heads; "channel": a weight for every channel
            of every head. "group" has a bias of the same shape too.
        eps: added to the variance or the mean square, at least 0.
        device, dtype: of the weights.
    Raises: ValueError or TypeError that names the option.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 8 (GroupNorm).
    Examples:
        >>> import torch
        >>> from retention.norm import HeadNorm
        >>> HeadNorm(1, 2, "rms", affine=False, eps=0.0)(torch.tensor([[1.0, 7.0]]))
        tensor([[0.2000, 1.4000]])
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
        check_choice("kind", kind, HEAD_NORMS)
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
        """Set the weights to 1 and the biases to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., num_heads, head_dim). Raises: ShapeError or TypeError if x does not fit."""
        check_input("x", x, self.head_dim, tokens=False)
        if self.kind == "rms":
            x = _rms_norm(x, None, self.eps, self.backend)
        else:
            x = F.layer_norm(x, (self.head_dim,), eps=self.eps)
        if self.weight is not None:
            x = x * local(self.weight)
        return x if self.bias is None else x + local(self.bias)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, kind={self.kind!r}, affine={self.affine!r}, eps={self.eps}"


def set_norm_backend(model: nn.Module, backend: str) -> nn.Module:
    """Choose the code that runs the RMS norms in `model`, those of heads included, and return the model.

    The kernel of xformers is for inference on CUDA. It is first tried on every device of the model. For calls whose
    result would differ from torch's (with gradients, autocast or torch.compile, in float64, or on a CPU), the norms run
    in torch.

    Args:
        model: a module with at least one RMS norm; it is changed in place.
        backend: "xformers" for its Triton kernel, or "torch".
    Raises: TypeError unless model is an nn.Module; ValueError for an unknown name, or a model without an RMS norm;
        BackendError, from its cause, if xformers is missing or its kernel does not work on a device of the model.
    Examples:
        >>> import retention
        >>> model = retention.set_norm_backend(retention.RetNet(dim=16, num_layers=1), "torch")
        >>> model.backbone.norm.backend
        'torch'
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
