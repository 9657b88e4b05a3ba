"""A small test of the block-sparse products, by which the backend decides whether it can run on a device."""

from __future__ import annotations

import torch

from ...xformers.probe import expect
from .blocks import SMALLEST
from .operator import block_sparse

__all__ = ["products"]


def products(device: str) -> None:
    """Compare the block-sparse products of both forms, and their gradients, with the formula."""
    index = torch.arange(40.0, device=device)
    inputs = [(index[:, None] * (i + 1) + torch.arange(2.0, device=device)).sin()[None, None] for i in range(3)]
    inputs = [x.requires_grad_() for x in (*inputs, torch.tensor([-0.1], device=device))]
    q, k, v, log_decay = inputs
    decay = (log_decay * (index[:, None] - index).clamp(min=0)).exp().tril()
    want = ((q @ k.mT) * decay) @ v
    for form in ("chunkwise", "parallel"):
        got, _ = block_sparse(*inputs, None, None, None, form, SMALLEST, 1.0, True, (), 0.0, False, q.dtype)
        grads = [torch.autograd.grad(x.square().sum(), inputs, retain_graph=True) for x in (got, want)]
        expect("its block-sparse products, or their gradients, are wrong", (got, *grads[0]), (want, *grads[1]))
