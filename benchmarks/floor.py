"""The speed and memory that the chunked backend must not fall below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import peak_memory, ratio, show, take_turns
from retention import retain
from retention.backends.chunked import CHUNK_SIZE
from retention.decay import log_decays

HEADS, KEY_DIM, VALUE_DIM = 8, 64, 128


def floor(
    chunks: Annotated[bool, typer.Option(help="Also compare chunk sizes.")] = False,
    rounds: Annotated[int, typer.Option(help="Turns of each side.")] = 9,
) -> None:
    """The chunked backend against SDPA, a matrix product, its own length and its memory; fp32, B1 H8 K64 V128."""
    results = [*_against_attention(rounds), _against_matmul(rounds), *_against_length(rounds), _memory()]
    rows = [
        [
            name,
            f"{value:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{sign} {bound}",
            "met" if holds(value, sign, bound) else "MISSED",
        ]
        for name, (value, low, high), sign, bound in results
    ]
    show("Floor of the chunked backend", ["ratio", "median", "quartiles", "target", ""], rows)
    if chunks:
        _chunk_sizes(rounds)


Result = tuple[str, tuple[float, float, float], str, float]


def holds(value: float, sign: str, bound: float) -> bool:
    return value >= bound if sign == ">=" else value <= bound


def inputs(length: int, value_dim: int = VALUE_DIM, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    widths = KEY_DIM, KEY_DIM, value_dim
    q, k, v = (torch.randn(1, HEADS, length, width, requires_grad=grad) for width in widths)
    return q, k, v


def forward(length: int, chunk_size: int | None = None) -> Callable[[], object]:
    q, k, v = inputs(length)
    log_decay = torch.tensor(log_decays("paper", HEADS))
    return lambda: retain(q, k, v, log_decay, backend="chunked", chunk_size=chunk_size)


def both(length: int, chunk_size: int | None = None) -> Callable[[], object]:
    """Forward and backward."""
    q, k, v = inputs(length, grad=True)
    log_decay, dout = torch.tensor(log_decays("paper", HEADS)), torch.randn(1, HEADS, length, VALUE_DIM)

    def run() -> object:
        out = retain(q, k, v, log_decay, backend="chunked", chunk_size=chunk_size)
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out, (q, k, v), dout)

    return run


def _against_attention(rounds: int) -> list[Result]:
    length = 8192
    q, k, v = inputs(length, value_dim=KEY_DIM, grad=True)
    dout = torch.randn_like(v)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    sides = {
        "attention": lambda: attend(q.detach(), k.detach(), v.detach()),
        "retention": forward(length),
        "attention, both": lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dout),
        "retention, both": both(length),
    }
    seconds = take_turns(sides, rounds)
    return [
        (
            "SDPA (head dim 64) / retention, forward, 8192 tokens",
            ratio(seconds["attention"], seconds["retention"]),
            ">=",
            9,
        ),
        ("the same, forward + backward", ratio(seconds["attention, both"], seconds["retention, both"]), ">=", 6),
    ]


def _against_matmul(rounds: int) -> Result:
    length, side = 8192, 2048
    a, b = torch.randn(2, side, side).unbind()
    seconds = take_turns({"matmul": lambda: a @ b, "retention": forward(length)}, rounds)
    operations = HEADS * length * (2 * CHUNK_SIZE * (KEY_DIM + VALUE_DIM) + 4 * KEY_DIM * VALUE_DIM)
    ideal = [spent * operations / (2 * side**3) for spent in seconds["matmul"]]
    return "retention / its operations at the rate of a 2048^3 product", ratio(seconds["retention"], ideal), "<=", 2.2


def _against_length(rounds: int) -> list[Result]:
    results: list[Result] = []
    for name, way in (("forward", forward), ("forward + backward", both)):
        seconds = take_turns({str(length): way(length) for length in (2048, 8192, 32768)}, rounds)
        long = [spent / 16 for spent in seconds["32768"]]
        results.append((f"time per token at 32768 / at 2048, {name}", ratio(long, seconds["2048"]), "<=", 1.15))
    return results


def _memory() -> Result:
    length = 32768
    extra = [peak_memory(both, length) for _ in range(3)]
    size = HEADS * length * (2 * KEY_DIM + VALUE_DIM) * 4
    low, middle, high = sorted(x / size for x in extra)
    return "peak extra memory of forward + backward / q + k + v, 32768 tokens", (middle, low, high), "<=", 6


def _chunk_sizes(rounds: int) -> None:
    sizes = (16, 32, 64, 96, 128, 192, 256)
    rows = []
    times = [take_turns({str(size): way(8192, size) for size in sizes}, rounds) for way in (forward, both)]
    for size in sizes:
        cells = [ratio(seconds[str(size)], seconds[str(CHUNK_SIZE)]) for seconds in times]
        rows.append([str(size), *(f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in cells)])
    show(f"Time relative to chunks of {CHUNK_SIZE}", ["chunk size", "forward", "forward + backward"], rows)
