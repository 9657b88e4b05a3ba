"""Plots of losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .choosing import LayerCosts

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
except ImportError as error:
    raise ImportError('the plot of the losses needs matplotlib; pip install "multiscale-retention[cli]"') from error

from .saving import written_whole


def draw(history: Sequence[dict[str, Any]], tokens_per_step: int, unit: str, file: Path) -> None:
    """Plot training and validation loss against the number of tokens seen, as a PNG.

    Args:
        history: the log of a transformers Trainer.
        tokens_per_step: tokens or bytes per optimiser step.
        unit: "tokens" or "bytes".
        file: the file to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    seen, losses = _curve(history, "loss", tokens_per_step)
    axes.plot(seen, losses, color="C0", alpha=0.25, linewidth=1)
    axes.plot(seen, smooth(losses), color="C0", label="training, smoothed")
    seen, losses = _curve(history, "eval_loss", tokens_per_step)
    axes.plot(seen, losses, color="C1", marker="o", markersize=4, label="validation")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set(xlabel=f"{unit} seen", ylabel=f"loss, nats per {unit.removesuffix('s')}")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file)


def draw_recovery(
    parts: Sequence[tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]],
    tokens_per_step: int,
    unit: str,
    file: Path,
) -> None:
    """Plot the losses of both stages of a replacement against the number of tokens seen, as a PNG.

    Args:
        parts: for each part of the layers, the logs of the Trainers of both stages; a log may be empty.
        tokens_per_step, unit, file: as in `draw`.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("layers: relative squared error", f"model: nats per {unit.removesuffix('s')}")
    training = ("training", "divergence from the teacher")
    for stage, axes in enumerate(panels):
        for number, histories in enumerate(parts):
            part = f", part {number + 1}" if len(parts) > 1 else ""
            seen, losses = _curve(histories[stage], "loss", tokens_per_step)
            axes.plot(seen, smooth(losses), color=f"C{number}", label=training[stage] + part)
            seen, losses = _curve(histories[stage], "eval_loss", tokens_per_step)
            axes.plot(seen, losses, "o--", color=f"C{number}", markersize=4, label=f"validation{part}")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set(xlabel=f"{unit} seen", title=titles[stage], yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    _save(figure, file)


def draw_layers(costs: LayerCosts, file: Path) -> None:
    """Plot what each layer costs when it is replaced alone, as a PNG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    numbers = range(len(costs.names))
    for label, losses, colour in (("untrained", costs.untrained, "C7"), ("fitted", costs.fitted, "C0")):
        axes.plot(numbers, [loss - costs.original for loss in losses], "o-", color=colour, label=label, markersize=4)
    chosen = [costs.fitted[i] - costs.original for i in costs.chosen]
    axes.plot(costs.chosen, chosen, "o", color="C1", markersize=8, fillstyle="none", label="chosen")
    axes.set(xlabel="layer replaced alone", ylabel="nats per token above the original")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    with written_whole(file.parent, file.name) as folder:
        figure.savefig(folder / file.name, dpi=120)


def smooth(values: Sequence[float]) -> list[float]:
    """Return each value's mean with its neighbours, as many before as after, so that the curve has no lag."""
    width = len(values) // 25
    reach = (min(i, len(values) - 1 - i, width) for i in range(len(values)))
    return [fmean(values[i - n : i + n + 1]) for i, n in enumerate(reach)]


def _curve(history: Sequence[dict[str, Any]], name: str, tokens_per_step: int) -> tuple[list[int], list[float]]:
    points = [(entry["step"] * tokens_per_step, float(entry[name])) for entry in history if name in entry]
    points = [point for point in points if math.isfinite(point[1])]
    return [seen for seen, _ in points], [loss for _, loss in points]
