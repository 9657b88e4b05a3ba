"""Multiplications and parameters of our vision models and of timm's ViT, beside those of the RMT paper."""

from __future__ import annotations

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import retention.integrations.timm  # noqa: F401  registers the models
from benchmarks.record import show

# Billions of multiply-adds and millions of parameters, from Fan et al. 2024, arXiv:2309.11523.
PAPER = {"rmt_tiny": (2.5, 14), "rmt_small": (4.5, 27), "rmt_base": (9.7, 54), "rmt_large": (18.2, 95)}
_VITS = ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"]


def macs() -> None:
    """Count multiply-adds on an image of 224 x 224 and parameters of the vision models; it needs no weights."""
    names = [*timm.list_models(module=["vit_retention", "pyramid_retention", "rmt"]), *_VITS]
    columns = ["model", "GMACs", "of the paper", "million parameters", "of the paper"]
    show("Vision models, one image of 224 x 224", columns, [_row(name) for name in names])


def _row(name: str) -> list[str]:
    model = timm.create_model(name, device="meta").eval()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    operations, parameters = (str(x) for x in PAPER.get(name, ("", "")))
    return [name, f"{_operations(model) / 1e9:.2f}", operations, f"{count:.1f}", parameters]


@torch.no_grad()
def _operations(model: nn.Module, size: int = 224) -> int:
    """Count the multiply-adds of convolutions and matrix products on one image."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2
