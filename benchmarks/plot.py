"""Draws pictures of benchmarks: curves with quartiles, ticks with units, and a corner with machine and date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.measure import Quartiles

# Okabe and Ito's palette, whose colours are told apart with any colour vision; a marker for each, for print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555", "#8B5FBF")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PREFIXES = {"s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")), "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))}

Curve = Mapping[int, Quartiles]  # median and quartiles by x


@dataclass
class Panel:
    """Curves against x.

    Attributes:
        title, x, y: the title and the labels of the axes.
        unit: unit of y: "s", "B", "tokens/s" or "x".
        curves: the compared curves by name: median and quartiles by x.
        dashed: reference curves.
        linear: y starts at 0, for values that lie close together; otherwise both axes are logarithmic.
    """

    title: str
    x: str
    y: str
    unit: str
    curves: dict[str, dict[int, Quartiles]] = field(default_factory=dict)
    dashed: dict[str, dict[int, Quartiles]] = field(default_factory=dict)
    linear: bool = False


@dataclass
class Picture:
    """Rows of panels, with a title that names the compared sizes, and a corner with machine, versions and date."""

    title: str
    rows: Sequence[Sequence[Panel]]
    corner: str


def draw(picture: Picture, file: Path) -> None:
    """Write the picture as a PNG. A side has the same colour and marker in all panels."""
    count, height = max(map(len, picture.rows)), len(picture.rows)
    figure = Figure(figsize=(1 + 4.6 * count, 1.6 + 3.5 * height), layout="constrained")
    figure.suptitle(picture.title, fontsize="medium")
    panels = [panel for row in picture.rows for panel in row]
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    grid = figure.subplots(height, count, squeeze=False)
    for line, row in zip(grid, picture.rows, strict=True):
        for axes in line[len(row) :]:
            axes.set_axis_off()
        for axes, panel in zip(line, row, strict=False):
            _draw_panel(axes, panel, names)
    room = 0.25 / figure.get_figheight()  # for the corner's line of text, below the legend
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    below = dict(loc="outside lower center", borderaxespad=2, ncols=4, fontsize="small", frameon=False)
    figure.legend(*_handles(figure), **below)
    figure.text(0.995, 0.005, picture.corner, ha="right", va="bottom", fontsize=7, color="#555555")
    figure.savefig(file, dpi=110)


def _draw_panel(axes: Axes, panel: Panel, names: Sequence[str]) -> None:
    for name, curve in panel.curves.items():
        number = names.index(name)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        x, (middle, low, high) = list(curve), zip(*curve.values(), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, middle, marker=marker, markersize=4.5, linewidth=1.4, label=name, color=colour)
    for name, curve in panel.dashed.items():
        axes.plot(list(curve), [middle for middle, _, _ in curve.values()], "k--", linewidth=1, label=name)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, xscale="log")
    axes.title.set_fontsize("medium")
    ticks = sorted({x for curve in panel.curves.values() for x in curve})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks], rotation=30 if len(ticks) > 5 else 0)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: with_unit(y, panel.unit)))
    if panel.linear:
        axes.set_ylim(bottom=0)
    else:
        _logarithmic(axes)
    axes.grid(alpha=0.3)


def _logarithmic(axes: Axes) -> None:
    """Label 1, 2 and 5 times each power of ten, or fewer on a long axis and more on a short one."""
    label = axes.yaxis.get_major_formatter()
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    span = high / low
    steps = (1.0,) if span > 2e3 else (1.0, 2.0, 5.0) if span > 6 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.yaxis.set_major_formatter(label)
    axes.yaxis.set_minor_formatter(NullFormatter())


def with_unit(value: float, unit: str) -> str:
    """Return a value with its unit: "2 ms" for 0.002 s, "1.5x" for 1.5."""
    if unit not in PREFIXES:
        return f"{value:,.10g}{'' if unit == 'x' else ' '}{unit}"
    size, name = next(((size, name) for size, name in PREFIXES[unit] if value >= 0.9999 * size), PREFIXES[unit][-1])
    return f"{value / size:,.4g} {name}"


def _handles(figure: Figure) -> tuple[list, list]:
    """Return the legend entries of all panels, each once."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
