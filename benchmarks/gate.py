"""The bounds that CI checks: ratios of times, which any machine keeps and which code of half the speed breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated

import torch
import typer
from tqdm.auto import tqdm

from benchmarks import op
from benchmarks.floor import steps
from benchmarks.measure import Run, extra_memory, ratio, take_turns
from benchmarks.record import Result, show_results
from retention import retain

Planted = Callable[[Run], Run]  # takes a run of ours and returns a slower one

ATTEMPTS = 3


def gate(
    plant: Annotated[
        int,
        typer.Option(
            help="Number of times that our side runs in place of once, to test the gate: with 2, every check must fail."
        ),
    ] = 1,
) -> None:
    """Check ratios against bounds that noise does not break, and code of half the speed does. Runs on one thread."""

    torch.set_num_threads(1)  # with more threads, another process slows the two sides differently

    def planted(run: Run) -> Run:
        return run if plant == 1 else lambda: [run() for _ in range(plant)]

    results = [attempt(check, planted) for check in tqdm(CHECKS, desc="gate", leave=False)]
    show_results("Gate", results)
    broken = [result.name for result in results if result.holds() == (plant > 1)]
    if broken:
        typer.echo(f"{'not noticed' if plant > 1 else 'missed'}: {'; '.join(broken)}")
        raise typer.Exit(1)


def attempt(check: Callable[[Planted], Result], planted: Planted) -> Result:
    """Repeat a check up to three times until it holds: another process seldom disturbs the same side each time."""
    for _ in range(ATTEMPTS):
        if (result := check(planted)).holds():
            break
    return result


def against_eager(planted: Planted) -> Result:
    case = op.Case("forward+backward", 1024)
    ours, theirs = (op.retention(case, *way) for way in (("chunked", "chunkwise"), ("eager", "parallel")))
    seconds = take_turns({"ours": planted(ours), "theirs": theirs}, 5)
    return Result(
        "eager, parallel / chunked, forward+backward, 1024 tokens", ratio(seconds["theirs"], seconds["ours"]), ">=", 3.8
    )


def against_attention(planted: Planted, way: str, bound: float) -> Result:
    case = op.Case(way, 4096)
    ours, theirs = op.retention(case, "chunked", "chunkwise"), op.attention(case)
    seconds = take_turns({"ours": planted(ours), "theirs": theirs}, 5)
    return Result(f"SDPA / chunked, {way}, 4096 tokens", ratio(seconds["theirs"], seconds["ours"]), ">=", bound)


def against_length(planted: Planted) -> Result:
    """Check that the time per token does not grow with the length."""
    short, long = (op.retention(op.Case("forward", length), "chunked", "chunkwise") for length in (1024, 8192))
    seconds = take_turns({"short": lambda: [short() for _ in range(8)], "long": planted(long)}, 5)
    return Result(
        "time per token at 8192 / at 1024 tokens, forward", ratio(seconds["long"], seconds["short"]), "<=", 1.5
    )


def decoding(planted: Planted) -> Result:
    near, far = steps(batch=1, positions=(10, 100_000))
    seconds = take_turns({"near": near, "far": planted(far)}, 15)
    return Result("a decoding step at position 100 000 / at 10", ratio(seconds["far"], seconds["near"]), "<=", 1.4)


def padded(planted: Planted) -> Result:
    """Compare rows with padding to a batch of as many real tokens without padding."""
    case = op.Case("forward+backward", 256, batch=16, heads=4)
    real = torch.arange(512) < torch.linspace(128, 384, 16)[:, None]  # 256 tokens a row on average
    tensors = replace(case, length=512).tensors()
    ours = op.timed(case, tensors, lambda: retain(*tensors, case.log_decay(), mask=real, backend="chunked"))
    seconds = take_turns({"ours": planted(ours), "dense": op.retention(case, "chunked", "chunkwise")}, 5)
    ratios = ratio(seconds["dense"], seconds["ours"])
    return Result("batch without padding / with padding, forward+backward", ratios, ">=", 0.57)


def memory(planted: Planted) -> Result:
    case = op.Case("forward+backward", 16384)
    size = case.heads * case.length * (2 * case.key_dim + case.value_dim) * 4
    share = extra_memory(planted(op.retention(case, "chunked", "chunkwise"))) / size
    return Result("extra memory of forward+backward / q + k + v, 16384 tokens", (share, share, share), "<=", 2)


CHECKS: tuple[Callable[[Planted], Result], ...] = (
    against_eager,
    partial(against_attention, way="forward", bound=5.6),
    partial(against_attention, way="forward+backward", bound=5.4),
    against_length,
    decoding,
    padded,
    memory,
)
