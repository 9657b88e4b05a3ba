"""The cost of one more token, near the beginning and far out."""

from __future__ import annotations

import torch

from benchmarks.measure import ratio, show, take_turns
from retention import MultiScaleRetention


def decode(rounds: int = 51) -> None:
    """Time of `MultiScaleRetention.step` at position 100 000 relative to position 10; width 512, 8 heads, fp32."""
    layer = MultiScaleRetention(512, 8).eval()
    rows = []
    for batch in (1, 16):
        x = torch.randn(batch, 1, 512)
        states = {position: layer.initial_state(batch) for position in (10, 100_000)}
        for position, state in states.items():
            state.kv.normal_()
            state.time += position
        memory = [state.kv.data_ptr() for state in states.values()]

        def run(state: object, x: torch.Tensor = x) -> None:
            for _ in range(20):
                layer.step(x, state)

        sides = {str(position): lambda state=state, run=run: run(state) for position, state in states.items()}
        with torch.inference_mode():
            seconds = take_turns(sides, rounds)
        value, low, high = ratio(seconds["100000"], seconds["10"])
        moved = "no" if memory == [state.kv.data_ptr() for state in states.values()] else "YES"
        cost = f"{1e6 * min(seconds['10']) / 20:.0f}"
        rows.append([str(batch), cost, f"{value:.3f}", f"{low:.3f} to {high:.3f}", moved])
    columns = ["batch", "us a token", "position 100 000 / 10", "quartiles", "state moved in memory"]
    show("One decoding step of the layer", columns, rows)
