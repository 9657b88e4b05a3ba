"""Calibration: one batch scales each new head to the output size of the attention that it replaces."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .retention import HostedRetention

__all__ = ["Probe", "calibrate", "measured"]


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
    with measured(layers) as probes, _evaluation(model):
        model(**batch)
    gains = {name: probe.gain(name) for name, probe in probes.items()}
    for name, layer in layers.items():
        layer.retention.gain.copy_(gains[name][:, None].expand_as(layer.retention.gain))


@contextmanager
def measured(layers: Mapping[str, Any]) -> Iterator[dict[str, Probe]]:
    """Let replaced layers return the output of their attention, and measure it and that of retention.

    Compiled models run without compilation, which one batch does not repay.

    Args:
        layers: the replaced layers by name.
    """
    probes = {name: Probe(layer.retention) for name, layer in layers.items()}
    try:
        with torch.compiler.set_stance("force_eager"):
            yield probes
    finally:
        for probe in probes.values():
            probe.remove()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Probe:
    """Hooks on a layer's retention that replace its output by that of attention and measure the size of both."""

    def __init__(self, retention: HostedRetention):
        self.signature = inspect.signature(retention.forward)
        self.squares: list[Tensor] = []  # per call, (2, H): sums of squares of retention's and of attention's output
        self.y: Tensor | None = None  # the output of retention before gain and gate
        self.hooks = [
            retention.norm.register_forward_hook(self._keep),
            retention.register_forward_hook(self._measure, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def gain(self, name: str) -> Tensor:
        """Return the gain of each head, (H,); `name` is the layer's name for errors."""
        if not self.squares:
            raise ValueError(f"calibrate_on did not reach {name}; pass a batch that runs every layer to be replaced")
        have, want = torch.stack(self.squares).sum(0)
        if not (have.isfinite().all() and want.isfinite().all()):
            raise ValueError(f"calibrate_on gives values in {name} that are not finite; look for NaN or infinity in it")
        return (want / have.clamp(min=1e-30)).sqrt()

    def _keep(self, norm: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        self.y = y

    def _measure(self, retention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: tuple[Tensor, Any]) -> Any:
        call = self.signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        mask, y = given["mask"], self.y
        assert y is not None  # the norm runs in every call
        causal = given["causal"] or retention.causal is True
        wanted = _attend(given["q"], given["k"], given["v"], given["scale"], causal, mask, given["cu_seqlens"])
        if mask is not None:
            y, wanted = (z.masked_fill(~mask[:, :, None, None], 0) for z in (y, wanted))
        self.squares.append(torch.stack([z.double().square().sum(dim=(0, 1, 3)) for z in (y, wanted)]))
        return wanted, out[1]


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
