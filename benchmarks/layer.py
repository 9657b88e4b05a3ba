"""Time and memory of the layer beside those of an attention layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from benchmarks.baselines import Attention
from benchmarks.measure import Measured, Run, Side, race, ratio
from benchmarks.record import Device, Lengths, Limit, Quick, add_case, duration, megabytes, show, spread
from retention import MultiScaleRetention, backends

PASSES = ("forward", "forward+backward")
DIM, HEADS = 512, 8


@dataclass(frozen=True)
class Layer:
    """A layer to be timed.

    Attributes:
        make: returns, for T tokens, the function of x (1, T, 512) and the module that holds its weights.
        longest: largest number of tokens to try.
    """

    make: Callable[[int], tuple[Callable[[Tensor], Tensor], nn.Module]]
    longest: int = 2**20

    def side(self, way: str, length: int, device: str) -> Side:
        long = "" if length <= self.longest else f"not tried beyond {self.longest:,} tokens"
        return Side(lambda: self._prepared(way, length, device), why_not=long)

    def _prepared(self, way: str, length: int, device: str) -> Run:
        function, module = self.make(length)
        module.to(device)
        x = torch.randn(1, length, DIM, device=device, requires_grad=way != "forward")
        if way == "forward":
            return torch.no_grad()(lambda: function(x))
        dy, inputs = torch.randn(1, length, DIM, device=device), (x, *module.parameters())
        return lambda: torch.autograd.grad(function(x), inputs, dy)


Found = dict[tuple[str, int], dict[str, Measured]]  # by pass and length, then by side


def layer(
    length: Lengths = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend to time; repeat the option for several. Default: all.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Also time the layers under torch.compile.")] = False,
    device: Device = "cpu",
    limit: Limit = 5.0,
    quick: Quick = False,
) -> None:
    """Time MultiScaleRetention(512, 8 heads) on every backend beside an attention layer of that width, by length."""
    layers = {f"retention, {name}": retention(backend=name, form=_form(name)) for name in backend or backends.names()}
    if compiled:
        layers |= {"retention, compiled": retention(compiled=True), "attention, compiled": attention(compiled=True)}
    layers |= {"attention": attention(), "projections": projections()}
    found = measure(layers, length or ([64, 1024] if quick else [64, 512, 2048, 8192]), device, 0.5 if quick else limit)
    show_layers("Layers of width 512, 8 heads; retention has values of 1024", found)


def _form(backend: str) -> str:
    return "parallel" if backend == "eager" else "chunkwise"


def retention(value_dim: int = 2 * DIM, compiled: bool = False, **options: str) -> Layer:
    def make(_: int) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        module = MultiScaleRetention(DIM, HEADS, value_dim=value_dim, **options)
        return torch.compile(module) if compiled else module, module

    backends.check_name(options.get("backend", "auto"))
    return Layer(make, 2048 if options.get("form") == "parallel" else 2**20)


def attention(compiled: bool = False) -> Layer:
    def make(_: int) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        module = Attention(DIM, HEADS)
        return torch.compile(module) if compiled else module, module

    return Layer(make)


def projections() -> Layer:
    """Return a layer that computes the matrix products of retention's five projections and nothing else."""

    def make(_: int) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        module = MultiScaleRetention(DIM, HEADS)
        q, k, v, g, out = (
            x.weight for x in (module.q_proj, module.k_proj, module.v_proj, module.g_proj, module.out_proj)
        )

        def function(x: Tensor) -> Tensor:
            return F.linear(Products.apply(x, q, k, v, g), out)

        return function, module

    return Layer(make)


class Products(torch.autograd.Function):
    """Multiply x by four matrices and return the third product; the backward pass computes all eight products."""

    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        outputs = [F.linear(x, weight) for weight in weights]
        ctx.save_for_backward(x, *weights, *outputs)
        return outputs[2]

    @staticmethod
    def backward(ctx, dv: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        x, *rest = ctx.saved_tensors
        weights, grads = rest[:4], [*rest[4:6], dv, rest[7]]  # the gradients of unused products may hold any numbers
        dx = sum(grad @ weight for grad, weight in zip(grads, weights, strict=True))
        return dx, *(grad.flatten(0, 1).T @ x.flatten(0, 1) for grad in grads)


def measure(layers: Mapping[str, Layer], lengths: Iterable[int], device: str, limit: float) -> Found:
    found: Found = {}
    for way, length in (bar := tqdm(list(product(PASSES, lengths)), leave=False)):
        bar.set_description(f"{way}, {length} tokens")
        sides = {name: layer.side(way, length, device) for name, layer in layers.items()}
        found[way, length] = race(sides, limit, device)
        case = {"way": way, "length": length, "dim": DIM, "heads": HEADS, "device": device}
        add_case(case, found[way, length], "attention")
    return found


def show_layers(title: str, found: Found) -> None:
    """Show the times relative to those of `attention`, and to those of `projections`, a lower bound."""
    rows, refused = [], []
    for (way, length), sides in found.items():
        for name, one in sides.items():
            if not one.seconds:
                refused.append([name, way, f"{length:,}", one.failure])
                continue
            cells = [
                spread(ratio(sides["attention"].seconds, one.seconds)) if name != "attention" else "",
                spread(ratio(one.seconds, sides["projections"].seconds)) if name != "projections" else "",
            ]
            rows.append([way, f"{length:,}", name, duration(one.median), *cells, megabytes(one.memory)])
    show(title, ["", "tokens", "", "time", "attention / its time", "its time / projections", "memory"], rows)
    if refused:
        show("Not measured", ["", "", "tokens", "why"], refused)
