"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

Curve = Mapping[int, float]  # y by x


@dataclass
class Panel:
    """Curves against x on logarithmic axes; `floor`, which no curve can go below, is drawn dashed."""

    title: str
    x: str
    curves: dict[str, Curve] = field(default_factory=dict)
    floor: Curve = field(default_factory=dict)


def draw(panels: Sequence[Panel], file: Path) -> None:
    """As a PNG. A side has the same colour in all panels."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    figure = Figure(figsize=(5 * len(panels), 4.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, curve in panel.curves.items():
            axes.plot(
                list(curve), list(curve.values()), marker="o", markersize=4, label=name, color=_colour(names, name)
            )
        if panel.floor:
            axes.plot(list(panel.floor), list(panel.floor.values()), "k--", linewidth=1, label="floor")
        ticks = sorted({x for curve in panel.curves.values() for x in curve})
        axes.set(title=panel.title, xlabel=panel.x, xscale="log", yscale="log", xticks=ticks)
        axes.set_xticklabels(ticks, rotation=45 if len(ticks) > 5 else 0)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*_handles(figure), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(file, dpi=110)


def _colour(names: Sequence[str], name: str) -> str:
    return f"C{names.index(name) % 10}"


def _handles(figure: Figure) -> tuple[list, list]:
    """Of all panels, each once."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
