"""Deviation of every form and backend from the definition, over random calls."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from hypothesis import HealthCheck, given, settings

from benchmarks.record import show
from retention import retain
from tests import cases, oracle


def parity(examples: Annotated[int, typer.Option(help="Number of random calls.")] = 1000) -> None:
    """Measure the largest deviation from a float64 loop over the tokens, by form, backend and dtype."""
    worst: dict[tuple[str, str, torch.dtype], float] = {}
    counts: dict[tuple[str, str, torch.dtype], int] = {}

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(cases.calls())
    def look(case: tuple) -> None:
        args, options = case
        want = oracle.retain(*args, **options)
        for way in cases.runnable(args, options):
            got = retain(*args, **options, **way)
            key = way["form"], way["backend"], got.dtype
            worst[key] = max(worst.get(key, 0.0), cases.deviation(got, want))
            counts[key] = counts.get(key, 0) + 1

    look()
    rows = [
        [form, backend, str(dtype)[6:], str(counts[key]), f"{value:.1e}", f"{cases.BOUNDS[dtype]:.0e}"]
        for key, value in sorted(worst.items(), key=lambda item: (item[0][0], item[0][1], str(item[0][2])))
        for form, backend, dtype in [key]
    ]
    columns = ["form", "backend", "dtype", "calls", "largest deviation", "bound"]
    show("Deviation from the definition (half precision: RMS)", columns, rows)
    if any(value > cases.BOUNDS[dtype] for (_, _, dtype), value in worst.items()):
        raise typer.Exit(1)
