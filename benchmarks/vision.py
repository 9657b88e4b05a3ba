"""Accuracy on digits, and cost of large images, of timm's ViT with retention and with attention."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Annotated, Any

import timm
import torch
import typer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm, trange

from benchmarks.measure import Measured, Run, Side, race, ratio, take_turns
from benchmarks.record import Limit, Quick, Result, add_case, duration, megabytes, show, show_results, spread
from retention import retain
from retention.integrations.swap import replace_attention
from retention.integrations.timm import retention_layer

SIZES = (224, 384, 512, 768, 1024)
# Options of the retentive models, without the gate, so that all else equals the attention layer.
SIDES: dict[str, dict[str, Any]] = {
    "attention": {},
    "1-D retention": {"attn_layer": retention_layer(features=False, gate=None, grid_decay=False)},
    "2-D retention": {"attn_layer": retention_layer(features=False, gate=None)},
}
TUNED = 0.2  # of the epochs, after the swap


def vision(
    digits: Annotated[bool, typer.Option(help="Measure the accuracies on scikit-learn's digits.")] = True,
    images: Annotated[bool, typer.Option(help="Measure time and memory for images of several sizes.")] = True,
    grids: Annotated[bool, typer.Option(help="Compare the forms of 2-D decay for grids of several sizes.")] = True,
    epochs: Annotated[int, typer.Option(help="Number of epochs on the digits.")] = 60,
    seeds: Annotated[int, typer.Option(help="Number of seeds; the table shows each accuracy and the mean.")] = 3,
    limit: Limit = 10.0,
    quick: Quick = False,
) -> None:
    """Compare a ViT with attention, with retention from the start, and with replaced attention, in float32."""
    if digits:
        _digits(*((6, 1) if quick else (epochs, seeds)))
    if images:
        _images((224, 384) if quick else SIZES, 0.5 if quick else limit)
    if grids:
        _grids((8, 24) if quick else (8, 14, 20, 24, 28, 32, 48, 64), 3 if quick else 5)


# --- digits -----------------------------------------------------------------------------------------------------------

Digits = tuple[Tensor, Tensor, Tensor, Tensor]  # images and classes to learn, images and classes to be tested with


def _digits(epochs: int, seeds: int) -> None:
    """Train all models on the same images, in the same order; each seed has its own split and initial weights."""
    tuned = round(TUNED * epochs)
    accuracies: dict[str, list[float]] = {}
    for seed in range(seeds):
        data = _split(seed)

        def learn(name: str, model: nn.Module, epochs: int, seed: int = seed, data: Digits = data) -> float:
            return _learn(model, data, epochs, seed, f"{name}, seed {seed}")

        for name, options in {
            "attention": {},
            "retention from scratch": {"attn_layer": retention_layer(features=False, gate="silu")},
        }.items():
            accuracies.setdefault(name, []).append(learn(name, _small(seed, **options), epochs))
        name = f"attention, replaced for the last {tuned} epochs"
        model = _small(seed)
        learn(name, model, epochs - tuned)
        replace_attention(model)
        accuracies.setdefault(name, []).append(learn(name, model, tuned))

    def row(name: str, found: list[float]) -> list[str]:
        ahead = statistics.mean(found) - statistics.mean(accuracies["attention"])
        each = ", ".join(f"{x:.1f}" for x in found)
        return [name, f"{statistics.mean(found):.1f}", each, f"{ahead:+.1f}", "met" if ahead >= -1 else "MISSED"]

    columns = ["", "accuracy, %", "each seed", "to attention", "at least -1"]
    title = f"Digits: {seeds} seeds, {epochs} epochs, 500 of 1797 images to test with"
    show(title, columns, [row(name, found) for name, found in accuracies.items()])


def _split(seed: int) -> Digits:
    pixels, classes = load_digits(return_X_y=True)
    learnt, tested = train_test_split(range(len(pixels)), test_size=500, random_state=seed, stratify=classes)
    x, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes)
    return x[learnt], y[learnt], x[tested], y[tested]


def _small(seed: int, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2)
    return VisionTransformer(num_classes=10, **sizes, **options)


def _learn(model: nn.Module, data: Digits, epochs: int, seed: int, name: str) -> float:
    """Train a model and return its accuracy in percent."""
    x, y, tested, classes = data
    order, steps = torch.Generator().manual_seed(seed), len(x) // 64
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=epochs * steps, pct_start=0.1)
    model.train()
    for _ in trange(epochs, desc=name, leave=False):
        for chosen in torch.randperm(len(x), generator=order)[: steps * 64].split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen], label_smoothing=0.1).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        right = model.eval()(tested).argmax(1) == classes
    return 100 * right.double().mean().item()


# --- large images -----------------------------------------------------------------------------------------------------


def _vit(side: str, size: int) -> tuple[nn.Module, Tensor]:
    return timm.create_model("vit_tiny_patch16_224", img_size=size, **SIDES[side]), torch.randn(1, 3, size, size)


def _inference(side: str, size: int) -> Run:
    model, x = _vit(side, size)

    def run() -> object:
        with torch.inference_mode():
            return model(x)

    return run


def _training(side: str, size: int) -> Run:
    model, x = _vit(side, size)

    def run() -> object:
        model.zero_grad()
        return model(x).sum().backward()

    return run


Found = dict[tuple[str, int], dict[str, Measured]]  # by way and size, then by side
WAYS = {"forward": _inference, "forward+backward": _training}


def _images(sizes: Sequence[int], limit: float) -> None:
    found: Found = {}
    for (way, make), size in (bar := tqdm(list(product(WAYS.items(), sizes)), leave=False)):
        bar.set_description(f"{way}, {size} x {size}")
        found[way, size] = race({side: Side(partial(make, side, size)) for side in SIDES}, limit)
        add_case({"way": way, "size": size}, found[way, size], "attention")
    rows = []
    for (way, size), sides in found.items():
        for side, one in sides.items():
            faster = spread(ratio(sides["attention"].seconds, one.seconds)) if side != "attention" else ""
            rows.append([way, f"{size}²", side, duration(one.median), faster, megabytes(one.memory)])
    show("ViT-tiny/16", ["", "pixels", "", "time", "attention / its time", "memory"], rows)
    show_results("1-D retention on large images", [result for way in WAYS for result in _results(found, way, sizes)])


def _results(found: Found, way: str, sizes: Sequence[int]) -> list[Result]:
    large = [size for size in sizes if size >= 512]
    results = []
    for size in large:
        sides = found[way, size]
        value = ratio(sides["attention"].seconds, sides["1-D retention"].seconds)
        results.append(Result(f"attention / 1-D, {way}, {size}²", value, ">=", 1.0))
    if len(large) > 1:  # different races: no round has both
        near, far = (found[way, size]["1-D retention"] for size in (large[0], large[-1]))
        pixels = (large[-1] / large[0]) ** 2
        value = tuple(x / near.median / pixels for x in (far.median, min(far.seconds), max(far.seconds)))
        results.append(Result(f"1-D, a pixel of {large[-1]}² / of {large[0]}², {way}", value, "<=", 1.15))
    return results


# --- forms on a grid --------------------------------------------------------------------------------------------------


def _grids(sides: Sequence[int], rounds: int) -> None:
    """Show the times from which form="auto" and the size of the tiles were chosen."""
    ways: dict[str, dict[str, Any]] = {
        "chunkwise": dict(form="chunkwise"),
        "parallel": dict(form="parallel"),
        "tiles of 8 x 8": dict(form="chunkwise", chunk_size=8**2),
        "tiles of 24 x 24": dict(form="chunkwise", chunk_size=24**2),
    }
    rows = []
    for side in sides:
        batch = max(1, 1024 // side**2)
        q, k, v = (torch.randn(batch, 6, side * side, 64, requires_grad=True) for _ in range(3))
        inputs = q, k, v, torch.linspace(-0.5, -0.01, 6).requires_grad_()
        times = rounds if side < 48 else 3
        forward = take_turns({way: _grid(inputs, side, False, **options) for way, options in ways.items()}, times)
        both = take_turns({way: _grid(inputs, side, True, **options) for way, options in ways.items()}, times)
        compared = (ratio(spent[way], spent["chunkwise"]) for way in list(ways)[1:] for spent in (forward, both))
        rows.append([f"{side}², batch {batch}", *map(spread, compared)])
    columns = ["grid", *(f"{way}, {what}" for way in list(ways)[1:] for what in ("forward", "and backward"))]
    show("2-D decay, time relative to the chunkwise form; 6 heads of 64", columns, rows)


def _grid(inputs: tuple[Tensor, ...], side: int, backward: bool, **options: Any) -> Run:
    def run() -> object:
        with torch.set_grad_enabled(backward):
            out = retain(*inputs, causal=False, grid=(side, side), **options)
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out.sum(), inputs) if backward else out

    return run
