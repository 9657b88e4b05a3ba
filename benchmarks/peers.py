"""Time of other implementations of the retention layer beside ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.baselines import Attention
from benchmarks.layer import DIM, HEADS, Found, Layer, attention, measure, projections, retention, show_layers
from benchmarks.measure import Measured, Side, race, ratio
from benchmarks.record import Device, Lengths, Limit, Quick, Result, add_case, duration, show, show_results, spread
from retention import MultiScaleRetention

CHUNK = 512  # chunk size of torchscale; in yet-another-retnet, the caller chooses it
STEP = "one more token"
LENGTHS = [16, 64, 512, 2048, 8192]

Function = Callable[[Tensor], Tensor]


def peers(length: Lengths = None, device: Device = "cpu", limit: Limit = 10.0, quick: Quick = False) -> None:
    """Time torchscale, yet-another-retnet and flash-linear-attention beside ours, by length, and check bounds.

    Install the first two with `pip install --no-deps -r tests/peers.txt`; the table names libraries that are missing.
    yet-another-retnet has values as wide as its keys, so it is compared with our layer of the same width.
    """
    layers = {
        "retention": retention(),
        "retention, values of 512": retention(value_dim=DIM),
        "torchscale, chunkwise": Layer(lambda length: torchscale(length, chunkwise=True)),
        "torchscale, parallel": Layer(lambda length: torchscale(length, chunkwise=False), 2048),
        "yet-another-retnet, parallel": Layer(lambda _: yet_another(chunkwise=False), 2048),
        "yet-another-retnet, chunkwise": Layer(lambda _: yet_another(chunkwise=True)),
        "flash-linear-attention": Layer(flash_linear_attention),
        "attention": attention(),
        "projections": projections(),
    }
    found = measure(layers, length or ([64, 1024] if quick else LENGTHS), device, 0.5 if quick else limit)
    show_layers("Layers of width 512, 8 heads, values of 1024 unless it says otherwise", found)
    found |= {(STEP, 1): one_token(device, 0.5 if quick else limit)}
    if not show_results("Floors of the layer", floors(found)) and not quick:
        raise typer.Exit(1)


def torchscale(length: int, chunkwise: bool) -> tuple[Function, nn.Module]:
    if chunkwise and length % CHUNK:
        raise ValueError(f"takes whole chunks of {CHUNK} tokens only")
    module, positions = _torchscale()

    def function(x: Tensor) -> Tensor:
        where = positions.to(x.device)(length, chunkwise_recurrent=chunkwise)
        return module(x, where, chunkwise_recurrent=chunkwise)

    return function, module


def _torchscale() -> tuple[nn.Module, nn.Module]:
    layers, architecture, config = (
        quietly(f"torchscale.{name}")
        for name in ("component.multiscale_retention", "architecture.retnet", "architecture.config")
    )
    sizes = dict(decoder_embed_dim=DIM, decoder_value_embed_dim=2 * DIM, decoder_retention_heads=HEADS)
    options = config.RetNetConfig(vocab_size=8, recurrent_chunk_size=CHUNK, **sizes)
    return layers.MultiScaleRetention(options, DIM, 2 * DIM, HEADS), architecture.RetNetRelPos(options)


def yet_another(chunkwise: bool) -> tuple[Function, nn.Module]:
    module = quietly("yet_another_retnet.retention").MultiScaleRetention(DIM, HEADS)

    def in_chunks(x: Tensor) -> Tensor:
        state, parts = None, []
        for start, part in zip(range(0, x.shape[1], CHUNK), x.split(CHUNK, dim=1), strict=True):
            y, state = module.forward_chunkwise(part, part, part, start, state)
            parts.append(y)
        return torch.cat(parts, dim=1)

    return in_chunks if chunkwise else lambda x: module.forward_parallel(x, x, x)[0], module


def flash_linear_attention(_: int) -> tuple[Function, nn.Module]:
    module = quietly("fla.layers").MultiScaleRetention(hidden_size=DIM, num_heads=HEADS)
    return lambda x: module(x)[0], module


def one_token(device: str, limit: float) -> dict[str, Measured]:
    """Time a decoding step of the recurrent forms, and of attention after 64 tokens."""
    x = torch.randn(1, 1, DIM, device=device)
    steps = {
        "retention": ours(2 * DIM),
        "retention, values of 512": ours(DIM),
        "torchscale, recurrent": torchscale_step,
        "yet-another-retnet, recurrent": yet_another_step,
        "attention": attention_step,
    }
    sides = {
        name: Side(lambda make=make: torch.inference_mode()(partial(make(device), x))) for name, make in steps.items()
    }
    found = race(sides, limit, device)
    add_case({"way": STEP, "length": 1, "dim": DIM, "heads": HEADS, "device": device}, found, "attention")
    first = found["retention"]
    rows = [
        [name, duration(one.median), spread(ratio(one.seconds, first.seconds)) if one.seconds else one.failure]
        for name, one in found.items()
    ]
    show("One more token", ["", "time", "its time / retention's"], rows)
    return found


def ours(value_dim: int) -> Callable[[str], Function]:
    def make(device: str) -> Function:
        module = MultiScaleRetention(DIM, HEADS, value_dim=value_dim, device=device)
        state = module.initial_state(1)
        return lambda x: module.step(x, state)

    return make


def torchscale_step(device: str) -> Function:
    module, positions = _torchscale()
    module, positions, memory = module.to(device), positions.to(device), {}
    return lambda x: module(x, positions(64, activate_recurrent=True), incremental_state=memory)


def yet_another_step(device: str) -> Function:
    module = quietly("yet_another_retnet.retention").MultiScaleRetention(DIM, HEADS).to(device)
    state = torch.zeros(1, HEADS, DIM // HEADS, DIM // HEADS, device=device)
    return lambda x: module.forward_recurrent(x[:, 0], x[:, 0], x[:, 0], 64, state)[0]


def attention_step(device: str) -> Function:
    module, cache = Attention(DIM, HEADS).to(device), torch.zeros(2, 1, HEADS, 65, DIM // HEADS, device=device)
    return lambda x: module.step(x, cache, 64)


def quietly(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers use deprecated functions
        return import_module(name)


def floors(found: Found) -> list[Result]:
    """Return the ratios of the measured sides that have a bound."""
    results = []

    def add(way: str, length: int, above: str, below: str, sign: str, bound: float) -> None:
        sides = found.get((way, length))
        if sides and sides[above].seconds and sides[below].seconds:
            value = ratio(sides[above].seconds, sides[below].seconds)
            results.append(Result(f"{above} / {below}, {way}, {length:,} tokens", value, sign, bound))

    add("forward", 8192, "torchscale, chunkwise", "retention", ">=", 2.5)
    add("forward", 8192, "attention", "retention", ">=", 1.7)
    add("forward", 8192, "retention", "projections", "<=", 1.35)
    add("forward+backward", 8192, "torchscale, chunkwise", "retention", ">=", 3)
    add("forward+backward", 8192, "attention", "retention", ">=", 3)
    for way in ("forward", "forward+backward"):
        for form in ("parallel", "chunkwise"):
            add(way, 2048, f"yet-another-retnet, {form}", "retention, values of 512", ">=", 1)
        for length in (16, 64):
            add(way, length, "torchscale, parallel", "retention", ">=", 1)
            add(way, length, "yet-another-retnet, parallel", "retention, values of 512", ">=", 1)
    add(STEP, 1, "torchscale, recurrent", "retention", ">=", 1)
    add(STEP, 1, "yet-another-retnet, recurrent", "retention, values of 512", ">=", 1)
    return results
