"""Bounds on time and memory of the operation."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from benchmarks import op
from benchmarks.layer import DIM, HEADS
from benchmarks.measure import Run, extra_memory, ratio, take_turns
from benchmarks.record import Result, show, show_results, spread
from retention import MultiScaleRetention, backends, retain
from retention.arguments import describe
from retention.backends.chunked import CHUNK_SIZE
from retention.call import Inputs, Options


def floor(
    chunks: Annotated[bool, typer.Option(help="Also compare chunk sizes.")] = False,
    rounds: Annotated[int, typer.Option(help="Number of rounds; each side runs once per round.")] = 9,
) -> None:
    """Check bounds of the backend `chunked`: its time beside SDPA, a matrix product and shorter calls, and its memory.

    float32, batch 1, 8 heads, key dim 64, value dim 128.
    """
    results = [
        *_against_attention(rounds),
        _against_matmul(rounds),
        *_against_length(rounds),
        _memory(),
        *_decoding(rounds),
    ]
    kept = show_results("Floor of the chunked backend", results)
    kept = (
        show_results("Checks and dispatch of a short call, in microseconds", [_overhead(n) for n in (1, 16, 64)])
        and kept
    )
    if chunks:
        _chunk_sizes(rounds)
    if not kept:
        raise typer.Exit(1)


def chunked(way: str, length: int) -> Run:
    return op.retention(op.Case(way, length), "chunked", "chunkwise")


def _against_attention(rounds: int) -> list[Result]:
    results = []
    for way, bound in zip(op.PASSES, (9, 6), strict=True):
        seconds = take_turns({"attention": op.attention(op.Case(way, 8192)), "retention": chunked(way, 8192)}, rounds)
        value = ratio(seconds["attention"], seconds["retention"])
        results.append(Result(f"SDPA (head dim 64) / retention, {way}, 8192 tokens", value, ">=", bound))
    return results


def _against_matmul(rounds: int) -> Result:
    side, case = 2048, op.Case("forward", 8192)
    a, b = torch.randn(2, side, side).unbind()
    seconds = take_turns({"matmul": lambda: a @ b, "retention": chunked("forward", 8192)}, rounds)
    ideal = [spent * case.work()[0] / (2 * side**3) for spent in seconds["matmul"]]
    return Result(
        "retention / its operations at the rate of a 2048^3 product", ratio(seconds["retention"], ideal), "<=", 2.2
    )


def _against_length(rounds: int) -> list[Result]:
    results = []
    for way in op.PASSES:
        seconds = take_turns({str(length): chunked(way, length) for length in (2048, 32768)}, rounds)
        value = ratio([spent / 16 for spent in seconds["32768"]], seconds["2048"])
        results.append(Result(f"time per token at 32768 / at 2048, {way}", value, "<=", 1.15))
    return results


def _memory() -> Result:
    case = op.Case("forward+backward", 32768)
    size = case.heads * case.length * (2 * case.key_dim + case.value_dim) * 4
    share = extra_memory(chunked(case.way, case.length)) / size
    return Result("peak extra memory of forward+backward / q + k + v, 32768 tokens", (share, share, share), "<=", 6)


def steps(batch: int, positions: tuple[int, ...]) -> list[Run]:
    """Return a decoding step of the layer for each position."""
    layer, x = MultiScaleRetention(DIM, HEADS).eval(), torch.randn(batch, 1, DIM)

    def at(position: int) -> Run:
        state = layer.initial_state(batch)
        state.kv.normal_()
        state.time += position
        return torch.inference_mode()(lambda: layer.step(x, state))

    return [at(position) for position in positions]


def _decoding(rounds: int) -> list[Result]:
    results = []
    for batch in (1, 16):
        near, far = steps(batch, (10, 100_000))
        seconds = take_turns({"near": near, "far": far}, 3 * rounds)
        name = f"one more token for the layer at position 100 000 / at 10, batch {batch}"
        results.append(Result(name, ratio(seconds["far"], seconds["near"]), "<=", 1.15))
    return results


def _overhead(length: int) -> Result:
    """Return the time of `retain` minus that of the backend that it calls, in microseconds."""
    case = op.Case("forward", length)
    tensors, log_decay = case.tensors(), case.log_decay()
    backend, call = backends.choose(describe(Inputs(*tensors, log_decay), Options()))
    sides = {
        "retain": lambda: retain(*tensors, log_decay),
        "backend": lambda: backend(call, *tensors, log_decay, None, None, None),
    }
    with torch.inference_mode():
        seconds = take_turns(sides, 31)
    over = sorted(1e6 * (a - b) for a, b in zip(seconds["retain"], seconds["backend"], strict=True))
    return Result(f"retain - backend, {length} tokens", (over[15], over[7], over[23]), "<=", 30)


def _chunk_sizes(rounds: int) -> None:
    sizes = (16, 32, 64, 96, 128, 192, 256)
    times = [take_turns({str(size): _in_chunks(way, size) for size in sizes}, rounds) for way in op.PASSES]
    rows = [
        [str(size), *(spread(ratio(seconds[str(size)], seconds[str(CHUNK_SIZE)])) for seconds in times)]
        for size in sizes
    ]
    show(f"Time relative to chunks of {CHUNK_SIZE}, 8192 tokens", ["chunk size", *op.PASSES], rows)


def _in_chunks(way: str, size: int) -> Run:
    case = op.Case(way, 8192)
    tensors, log_decay = case.tensors(), case.log_decay()
    return op.timed(case, tensors, lambda: retain(*tensors, log_decay, backend="chunked", chunk_size=size))
