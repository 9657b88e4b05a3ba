"""Does retention see as well as attention does, and what do large images cost? timm's ViT with either."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange

from benchmarks.floor import Result, holds
from benchmarks.measure import peak_memory, ratio, show, take_turns
from retention import retain
from retention.integrations.swap import replace_attention
from retention.integrations.timm import retention_layer

SIZES = (224, 384, 512, 768, 1024)
# As the retentive models have it, without the gate, so that the rest is the same.
SIDES: dict[str, dict[str, Any]] = {
    "attention": {},
    "1-D retention": {"attn_layer": retention_layer(features=False, gate=None, grid=False)},
    "2-D retention": {"attn_layer": retention_layer(features=False, gate=None)},
}
TUNED = 0.2  # of the epochs, after the swap


def vision(
    digits: Annotated[bool, typer.Option(help="Accuracies on scikit-learn's digits.")] = True,
    images: Annotated[bool, typer.Option(help="Time and memory by the size of the image.")] = True,
    grids: Annotated[bool, typer.Option(help="Which form of 2-D decay is faster, by the size of the grid.")] = True,
    epochs: int = 60,
    seeds: int = 3,
    rounds: Annotated[int, typer.Option(help="Turns of each side.")] = 5,
    plot: Annotated[Path, typer.Option(help="Where the plot of time and memory goes.")] = Path("vision.png"),
) -> None:
    """A ViT with attention, with retention from scratch, and with attention that was replaced; fp32."""
    if digits:
        _digits(epochs, seeds)
    if images:
        _images(rounds, plot)
    if grids:
        _grids(rounds)


# --- digits -----------------------------------------------------------------------------------------------------------

Digits = tuple[Tensor, Tensor, Tensor, Tensor]  # images and classes to learn, images and classes to be tested with


def _digits(epochs: int, seeds: int) -> None:
    """The same images, order, optimiser and number of epochs for all; another split and other weights for each seed."""
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
    """Accuracy in percent."""
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


def _inference(side: str, size: int) -> Callable[[], object]:
    model, x = _vit(side, size)

    def run() -> object:
        with torch.inference_mode():
            return model(x)

    return run


def _training(side: str, size: int) -> Callable[[], object]:
    model, x = _vit(side, size)

    def run() -> object:
        model.zero_grad()
        return model(x).sum().backward()

    return run


Seconds = dict[tuple[str, str, int], list[float]]  # by side, way and size
WAYS = {"forward": _inference, "forward + backward": _training}


def _images(rounds: int, plot: Path) -> None:
    seconds: Seconds = {}
    memory: dict[tuple[str, int], int] = {}
    for size in SIZES:
        for way, make in WAYS.items():
            for side, spent in take_turns({side: make(side, size) for side in SIDES}, rounds).items():
                seconds[side, way, size] = spent
        memory |= {(side, size): peak_memory(_training, side, size) for side in SIDES}
    for way in WAYS:
        rows = [[f"{size}²", *(_cell(seconds, side, way, size) for side in SIDES)] for size in SIZES]
        show(f"ViT-tiny/16, {way}: seconds, and attention's time / its own", ["", *SIDES], rows)
    rows = [[f"{size}²", *(f"{memory[side, size] / 2**20:.0f}" for side in SIDES)] for size in SIZES]
    show("Peak extra memory of forward + backward, MB", ["", *SIDES], rows)
    results = [result for way in WAYS for result in _verdicts(seconds, way)]
    rows = [
        [
            name,
            f"{x[0]:.2f} ({x[1]:.2f} to {x[2]:.2f})",
            f"{sign} {bound}",
            "met" if holds(x[0], sign, bound) else "MISSED",
        ]
        for name, x, sign, bound in results
    ]
    show("1-D retention on large images", ["ratio", "median (quartiles)", "target", ""], rows)
    _draw(seconds, memory, plot)
    typer.echo(f"plotted in {plot}")


def _cell(seconds: Seconds, side: str, way: str, size: int) -> str:
    own = seconds[side, way, size]
    return "{:.3f}, {:.2f} ({:.2f} to {:.2f})".format(
        statistics.median(own), *ratio(seconds["attention", way, size], own)
    )


def _verdicts(seconds: Seconds, way: str) -> list[Result]:
    attention, own = ({size: seconds[side, way, size] for size in SIZES} for side in ("attention", "1-D retention"))
    faster: list[Result] = [
        (f"attention / 1-D, {way}, {size}²", ratio(attention[size], own[size]), ">=", 1.0)
        for size in SIZES
        if size >= 512
    ]
    middle, low, high = ratio(own[1024], own[512])
    return [*faster, (f"1-D, a pixel of 1024² / of 512², {way}", (middle / 4, low / 4, high / 4), "<=", 1.15)]


def _draw(seconds: Seconds, memory: dict[tuple[str, int], int], file: Path) -> None:
    figure = Figure(figsize=(14, 5), layout="constrained")
    curves = {
        **{f"{way}, seconds": {(s, n): statistics.median(seconds[s, way, n]) for s, n in memory} for way in WAYS},
        "forward + backward, peak extra MB": {key: value / 2**20 for key, value in memory.items()},
    }
    for axes, (title, values) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for side in SIDES:
            axes.plot(SIZES, [values[side, size] for size in SIZES], marker="o", label=side)
        axes.set(title=title, xlabel="pixels a side", xscale="log", yscale="log", xticks=SIZES, xticklabels=SIZES)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


# --- forms on a grid --------------------------------------------------------------------------------------------------


def _grids(rounds: int) -> None:
    """What form="auto" goes by, and the size of the tiles."""
    ways: dict[str, dict[str, Any]] = {
        "chunkwise": dict(form="chunkwise"),
        "parallel": dict(form="parallel"),
        "tiles of 8 x 8": dict(form="chunkwise", chunk_size=8**2),
        "tiles of 24 x 24": dict(form="chunkwise", chunk_size=24**2),
    }
    rows = []
    for side in (8, 14, 20, 24, 28, 32, 48, 64):
        batch = max(1, 1024 // side**2)
        q, k, v = (torch.randn(batch, 6, side * side, 64, requires_grad=True) for _ in range(3))
        inputs = q, k, v, torch.linspace(-0.5, -0.01, 6).requires_grad_()
        times = rounds if side < 48 else 3
        forward = take_turns({way: _grid(inputs, side, False, **options) for way, options in ways.items()}, times)
        both = take_turns({way: _grid(inputs, side, True, **options) for way, options in ways.items()}, times)
        compared = (ratio(spent[way], spent["chunkwise"]) for way in list(ways)[1:] for spent in (forward, both))
        rows.append([f"{side}², batch {batch}", *("{:.2f} ({:.2f} to {:.2f})".format(*x) for x in compared)])
    columns = ["grid", *(f"{way}, {what}" for way in list(ways)[1:] for what in ("forward", "and backward"))]
    show("2-D decay, time relative to the chunkwise form; 6 heads of 64", columns, rows)


def _grid(inputs: tuple[Tensor, ...], side: int, backward: bool, **options: Any) -> Callable[[], object]:
    def run() -> object:
        with torch.set_grad_enabled(backward):
            out = retain(*inputs, causal=False, grid=(side, side), **options)
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out.sum(), inputs) if backward else out

    return run
