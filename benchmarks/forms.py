"""Which form and backend is fastest at which length: what form="auto" and backend="auto" go by."""

from __future__ import annotations

import torch

from benchmarks.measure import ratio, show, take_turns
from retention import retain
from retention.decay import log_decays

WAYS = {"chunkwise": "chunked", "parallel": "eager", "recurrent": "eager"}


def forms(rounds: int = 15) -> None:
    """Forward time of each form relative to what "auto" takes, by length; fp32, B1 H8 K64 V128."""
    log_decay, rows = torch.tensor(log_decays("paper", 8)), []
    for length in (1, 4, 16, 64, 256, 1024):
        q, k, v = torch.randn(1, 8, length, 64), torch.randn(1, 8, length, 64), torch.randn(1, 8, length, 128)

        def run(form: str, inputs: tuple = (q, k, v)) -> object:
            return retain(*inputs, log_decay, form=form)

        sides = {form: lambda form=form, run=run: run(form) for form in ("auto", *WAYS)}
        seconds = take_turns(sides, rounds if length < 1024 else 5)
        cells = [ratio(seconds[form], seconds["auto"])[0] for form in WAYS]
        rows.append([str(length), f"{1e6 * min(seconds['auto']):.0f}", *(f"{cell:.2f}" for cell in cells)])
    columns = ["tokens", "auto, us", *(f"{form} ({backend}) / auto" for form, backend in WAYS.items())]
    show("Forms by length", columns, rows)
