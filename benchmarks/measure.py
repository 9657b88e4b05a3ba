"""Time and memory on machines that are noisy: the sides of a comparison take turns in one process."""

from __future__ import annotations

import multiprocessing
import platform
import re
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

console = Console(width=None if sys.stdout.isatty() else 120)


def machine() -> str:
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def take_turns(sides: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one round to warm up. A row of one round was measured side by side."""
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()) for name, run in sides.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for warm in [False, *[True] * rounds]:
        for name, timer in timers.items():
            spent = timer.timeit(1).mean
            if warm:
                seconds[name].append(spent)
    return seconds


def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Median of the ratios of each round, and their quartiles."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def peak_memory(run: Callable[..., Callable[[], object]], *args: object) -> int:
    """Bytes by which `run(*args)()` raises the peak of a fresh process; `run` prepares and is not counted."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (run, *args))


def _peak_memory(run: Callable[..., Callable[[], object]], *args: object) -> int:
    prepared = run(*args)
    before = _peak()
    prepared()
    return _peak() - before


def _peak() -> int:
    """Bytes. From /proc where there is one: ru_maxrss of a child begins at that of its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(machine(), style="dim")
