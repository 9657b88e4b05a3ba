"""The gated feed-forward fc2(silu(fc1 x) * gate x) as the function `swiglu` of xformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import BackendError
from . import library
from .probe import expect, require

__all__ = ["check", "swiglu"]


def swiglu(x: Tensor, fc1: nn.Linear, gate: nn.Linear, fc2: nn.Linear) -> Tensor:
    """Return fc2(silu(fc1 x) * gate x), in the dtype that the three linear layers would give.

    xformers chooses its operator by the address of the weights, which torch.compile cannot trace. A compiled call is
    given the operator that consists of torch operations, so there is one graph.

    Shapes: x (..., dim) -> (..., out_features of fc2).
    Raises: BackendError if a layer is not a plain nn.Linear with a plain weight: xformers takes a weight and a bias,
        and would ignore what an adapter or a quantiser adds to them.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    for name, layer in (("fc1", fc1), ("gate", gate), ("fc2", fc2)):
        if type(layer) is not nn.Linear:
            raise BackendError(
                f"xformers' swiglu needs an nn.Linear for {name}; got {name} {type(layer).__name__}; "
                "use the backend 'torch' of the feed-forward"
            )
        if is_traceable_wrapper_subclass(layer.weight):
            raise BackendError(
                f"xformers' swiglu needs a plain weight for {name}; got a weight {type(layer.weight).__name__}, as "
                "when it is quantised; use the backend 'torch' of the feed-forward"
            )
    weights = (fc1.weight, fc1.bias, gate.weight, gate.bias, fc2.weight, fc2.bias)
    compute, in_torch = library.swiglu()
    return compute(x, *weights, op=in_torch if torch.compiler.is_compiling() else None)


def check() -> None:
    """Check that xformers' `swiglu` can be used. Raises: BackendError, from its cause, if it cannot."""
    require("xformers' swiglu", "cpu", _trial)


def _trial(device: str) -> None:
    """Compare outputs and gradients with the formula."""
    compute, in_torch = library.swiglu()
    index = torch.arange(12.0, device=device)
    x, w1, w2 = (((index + i).sin().view(3, 4)).requires_grad_() for i in range(3))
    w3, b = index.cos().view(4, 3).requires_grad_(), index[:3].cos().requires_grad_()
    inputs = x, w1, w2, w3, b
    want = F.linear(F.silu(F.linear(x, w1, b)) * F.linear(x, w2, b), w3)
    wanted = torch.autograd.grad(want.square().sum(), inputs)
    for op in (None, in_torch):
        got = compute(x, w1, b, w2, b, w3, None, op=op)
        grads = torch.autograd.grad(got.square().sum(), inputs)
        expect("its swiglu, or its gradient, is wrong", (got, *grads), (want, *wanted))
