"""Plots of losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .choosing import LayerCosts

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
except ImportError as error:
    raise ImportError('the plot of the losses needs matplotlib; pip install "multiscale-retention[cli]"') from error

from .saving import written_whole

__all__ = ["History", "draw", "draw_layers", "draw_recovery", "smooth"]

History = Sequence[dict[str, Any]]  # the log of a transformers Trainer

_TRAINING, _VALIDATION = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, which any colour vision tells apart


def draw(history: History, tokens_per_step: int, unit: str, file: Path, title: str = "") -> None:
    """Plot training and validation loss against the number of tokens seen, as a PNG.

    Args:
        history: the log of a transformers Trainer.
        tokens_per_step: tokens or bytes per optimiser step.
        unit: "tokens" or "bytes".
        file: the file to write.
        title: the model and its size.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    _training(axes, [history], tokens_per_step)
    _validation(axes, [history], tokens_per_step)
    _finish(axes, unit, title, f"loss, nats per {unit.removesuffix('s')}")
    _save(figure, file)


def draw_recovery(
    parts: Mapping[str, tuple[History, History]], tokens_per_step: int, unit: str, file: Path, title: str = ""
) -> None:
    """Plot the losses of both stages of a replacement against the number of tokens seen, as a PNG.

    The parts follow each other along the axis, as they do in time.

    Args:
        parts: the logs of the Trainers of both stages, by the name of a part of the training; a log may be empty.
        tokens_per_step, unit, file, title: as in `draw`.
    """
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    figure.suptitle(title)
    fit, divergence, quality = figure.subplots(1, 3)
    transfers, tunings = ([part[stage] for part in parts.values()] for stage in (0, 1))
    nats = f"nats per {unit.removesuffix('s')}"

    _training(fit, transfers, tokens_per_step)
    _validation(fit, transfers, tokens_per_step)
    _finish(fit, unit, "first stage: each layer against its attention", "relative squared error", log=True)

    _training(divergence, tunings, tokens_per_step)
    _finish(divergence, unit, "second stage: divergence from the teacher", f"training loss, {nats}", log=True)

    _validation(quality, tunings, tokens_per_step)
    _finish(quality, unit, "second stage: loss on the validation text", f"cross-entropy, {nats}")
    for axes, histories in ((fit, transfers), (divergence, tunings), (quality, tunings)):
        _name_parts(axes, list(parts), histories, tokens_per_step)
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


def _training(axes: Axes, histories: Sequence[History], tokens_per_step: int) -> None:
    for seen, losses in _curves(histories, "loss", tokens_per_step):
        marker = "o" if len(losses) == 1 else ""  # a line of one point would not be seen
        axes.plot(seen, losses, color=_TRAINING, alpha=0.25, linewidth=1)
        axes.plot(seen, smooth(losses), marker=marker, color=_TRAINING, label="training, smoothed")


def _validation(axes: Axes, histories: Sequence[History], tokens_per_step: int) -> None:
    for seen, losses in _curves(histories, "eval_loss", tokens_per_step):
        axes.plot(seen, losses, "s--", color=_VALIDATION, markersize=5, label="validation")


def _finish(axes: Axes, unit: str, title: str, loss: str, *, log: bool = False) -> None:
    """Set title, units, ticks and legend; loss: the label of the vertical axis."""
    axes.set(title=title, xlabel=f"{unit} seen", ylabel=loss)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center")
        axes.set(xticks=[], yticks=[])
        return
    axes.grid(alpha=0.3)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter())
    if log and any(y > 0 for line in axes.lines for y in np.asarray(line.get_ydata())):  # rounding may leave none
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    named = {str(line.get_label()): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    axes.legend(named.values(), named, loc="upper right")  # losses fall; names of parts are below


def _name_parts(axes: Axes, names: Sequence[str], histories: Sequence[History], tokens_per_step: int) -> None:
    if len(histories) < 2 or not axes.lines:
        return
    for name, begin in zip(names, _begins(histories), strict=True):
        seen = begin * tokens_per_step
        axes.axvline(seen, color="grey", linewidth=0.8, linestyle=":")
        place = axes.get_xaxis_transform()
        axes.text(seen, 0.02, f" {name}", transform=place, color="dimgrey", fontsize="small")


def _save(figure: Figure, file: Path) -> None:
    with written_whole(file.parent, file.name) as folder:
        figure.savefig(folder / file.name, dpi=120)


def smooth(values: Sequence[float]) -> list[float]:
    """Return each value's mean with its neighbours, as many before as after, so that the curve has no lag."""
    width = len(values) // 25
    reach = (min(i, len(values) - 1 - i, width) for i in range(len(values)))
    return [fmean(values[i - n : i + n + 1]) for i, n in enumerate(reach)]


def _begins(histories: Sequence[History]) -> list[int]:
    """Return the step at which each history begins, if each begins where the one before it ends."""
    lengths = [max((entry["step"] for entry in history), default=0) for history in histories]
    return list(accumulate(lengths[:-1], initial=0))


def _curves(histories: Sequence[History], name: str, tokens_per_step: int) -> list[tuple[list[int], list[float]]]:
    """Return tokens seen and finite losses of each history that has any."""
    curves = []
    for begin, history in zip(_begins(histories), histories, strict=True):
        points = [((begin + entry["step"]) * tokens_per_step, float(entry[name])) for entry in history if name in entry]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            curves.append(([seen for seen, _ in points], [loss for _, loss in points]))
    return curves
