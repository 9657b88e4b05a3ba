"""Draws the figures of "How retention works": `python docs/figures.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from retention.decay import SCHEDULES

PICTURES = Path(__file__).parent / "pages/pictures"
BLUE, ORANGE = "#0072B2", "#E69F00"
TOKENS, CHUNK, GAMMA = 8, 4, 0.8


def forms() -> Figure:
    """The pairs of tokens that each form computes, and the states that it keeps."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = (
        "parallel\nevery pair of tokens, weighted by γ^(n−m)",
        f"chunkwise\npairs inside chunks of {CHUNK}, and a state between chunks",
        "recurrent\none state, updated at each token",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xlim=(-0.7, TOKENS + 0.2), ylim=(TOKENS + 0.2, -0.9), aspect="equal")
        axes.set_xlabel("key and value m")
        axes.set_ylabel("query n")
        axes.set_xticks(np.arange(TOKENS) + 0.5, range(1, TOKENS + 1))
        axes.set_yticks(np.arange(TOKENS) + 0.5, range(1, TOKENS + 1))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize="medium")
    for n in range(TOKENS):
        for m in range(n + 1):
            _cell(panels[0], n, m)
            if n // CHUNK == m // CHUNK:
                _cell(panels[1], n, m)
    panels[1].add_patch(Rectangle((0, CHUNK), CHUNK, CHUNK, facecolor=ORANGE, alpha=0.35, edgecolor=ORANGE))
    panels[1].text(CHUNK / 2, CHUNK * 1.5, "state S", ha="center", va="center")
    for n in range(TOKENS):
        _cell(panels[2], n, n)
        if n:
            _state(panels[2], n)
    return figure


def _cell(axes: Axes, n: int, m: int) -> None:
    axes.add_patch(Rectangle((m, n), 1, 1, facecolor=BLUE, alpha=GAMMA ** (n - m), edgecolor="white"))


def _state(axes: Axes, n: int) -> None:
    """The state that token n reads: the one before it and the token before it flow into it."""
    axes.add_patch(Rectangle((n - 1, n), 1, 1, facecolor=ORANGE, alpha=0.5, edgecolor="white"))
    axes.text(n - 0.5, n + 0.62, "S", ha="center", va="center", fontsize="small")
    arrow = dict(arrowstyle="-|>", mutation_scale=8, color="black", linewidth=0.8)
    axes.add_patch(FancyArrowPatch((n - 0.5, n - 0.35), (n - 0.5, n + 0.4), **arrow))
    if n > 1:
        axes.add_patch(FancyArrowPatch((n - 1.3, n - 0.3), (n - 0.7, n + 0.4), **arrow))


def decays(heads: int = 8) -> Figure:
    """gamma^n against n for the heads of each schedule."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, len(SCHEDULES), sharey=True)
    distance = np.geomspace(1, 16384, 400)
    for axes, (name, schedule) in zip(panels, SCHEDULES.items(), strict=True):
        for head, log_decay in enumerate(schedule(heads)):
            shade = 0.25 + 0.75 * head / (heads - 1)
            axes.plot(distance, np.exp(log_decay * distance), color=BLUE, alpha=shade, linewidth=1.5)
        axes.set(xscale="log", xlabel="tokens back, n", title=f'decay="{name}"')
        axes.set_xticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1,000", "10,000"])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("weight γⁿ")
    figure.suptitle(f"Weight of a token by its distance, for each of {heads} heads (head 1: palest)", fontsize="medium")
    return figure


if __name__ == "__main__":
    for draw in (forms, decays):
        file = PICTURES / f"{draw.__name__}.png"
        draw().savefig(file, dpi=110)
        print(f"written: {file}")
