"""Calibration: one batch scales each new head to the output size of the attention that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retention.state import RetentionState

from .retention import HostedRetention


@torch.no_grad()
def calibrate(model: nn.Module, layers: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """Set the gains of replaced layers so that each head has the root mean square of its attention's output.

    The model runs the batch once, in evaluation mode and with attention still in effect. Padding does not count.

    Args:
        model: the model, or the part of it, that takes the batch.
        layers: the replaced layers by name.
        batch: the calibration batch, as keyword arguments of `model`.
    Raises: ValueError if the batch does not reach a layer, or leads to values in a layer that are not finite.
    """
    probes = {name: _Probe(layer.retention) for name, layer in layers.items()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, layer in layers.items():
            layer.retention = probes[name]
        model.eval()
        model(**batch)
    finally:
        for module, mode in modes:
            module.training = mode
        for name, layer in layers.items():
            layer.retention = probes[name].measured
    gains = {name: probe.gain(name) for name, probe in probes.items()}
    for name, layer in layers.items():
        layer.retention.gain.copy_(gains[name][:, None].expand_as(layer.retention.gain))


class _Probe(nn.Module):
    """Stands in for a layer's retention: returns the output of attention and measures the size of both outputs."""

    def __init__(self, retention: HostedRetention):
        super().__init__()
        self.measured, self.causal = retention, retention.causal
        self.squares: list[Tensor] = []  # per call, (2, H): sums of squares of retention's and of attention's output

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool = True,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, RetentionState | None]:
        options: dict[str, Any] = dict(scale=scale, causal=causal, mask=mask, cu_seqlens=cu_seqlens)
        y, state = self.measured.gather(x, q, k, v, **options, **others)
        causal = causal or self.measured.causal is True
        wanted = _attend(q, k, v, scale, causal, mask, cu_seqlens)
        if mask is not None:
            y, wanted = (z.masked_fill(~mask[:, :, None, None], 0) for z in (y, wanted))
        self.squares.append(torch.stack([z.double().square().sum(dim=(0, 1, 3)) for z in (y, wanted)]))
        return wanted, state

    def gain(self, name: str) -> Tensor:
        """Return the gain of each head, (H,); `name` is the layer's name for errors."""
        if not self.squares:
            raise ValueError(f"calibrate_on did not reach {name}; pass a batch that runs every layer to be replaced")
        have, want = torch.stack(self.squares).sum(0)
        if not (have.isfinite().all() and want.isfinite().all()):
            raise ValueError(f"calibrate_on gives values in {name} that are not finite; look for NaN or infinity in it")
        return (want / have.clamp(min=1e-30)).sqrt()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Softmax attention over the same q, k and v, (B, T, H, V); arguments as in `HostedRetention.forward`."""
    length = q.shape[2]
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    if cu_seqlens is not None:
        segment = torch.bucketize(torch.arange(length, device=q.device), cu_seqlens, right=True)
        seen = seen & (segment[:, None] == segment)
    y = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return y.transpose(1, 2)
