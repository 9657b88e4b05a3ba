"""Time and memory of the backend xformers beside those of the other backends."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks import op
from benchmarks.measure import Run, extra_memory, ratio, take_turns
from benchmarks.record import Result, show, show_results, spread
from retention import register, retain
from retention.backends.xformers import XFormers, backend
from retention.decay import log_decays
from retention.ffn import FeedForward
from retention.xformers.attention import attend, choose

SIDES = {"xformers": "chunkwise", "chunked": "chunkwise", "eager": "parallel"}
ROUGH = 1e-4


def xformers(
    rounds: Annotated[int, typer.Option(help="Number of rounds; each side runs once per round.")] = 9,
    blocks: Annotated[bool, typer.Option(help="Also compare block sizes.")] = False,
) -> None:
    """Time the backend xformers beside chunked and eager, forward + backward.

    float32, batch 1, 8 heads, key dim 64, value dim 128.
    """
    typer.echo(backend.found("cpu"))
    show_results("The backend xformers, chunkwise", [*_memory(), *_dense(rounds), _packed(rounds)])
    _parallel(rounds)
    _feed_forward(rounds)
    if blocks:
        _block_sizes(rounds)


CASE = op.Case("forward+backward", 4096)


def both(length: int, decay: str = "paper", **options: Any) -> Run:
    """Return a forward and backward pass of `retain`."""
    case = replace(CASE, length=length)
    tensors, log_decay = case.tensors(), torch.tensor(log_decays(decay, case.heads))
    return op.timed(case, tensors, lambda: retain(*tensors, log_decay, **options))


def attention() -> tuple[str, Run]:
    """Return the implementation of softmax attention that takes the call, and a forward and backward pass of it."""
    tensors = CASE.tensors(CASE.key_dim)
    label = choose(*tensors, causal=True).label
    return label, op.timed(CASE, tensors, lambda: attend(*tensors, causal=True)[0])


def _dense(rounds: int) -> list[Result]:
    length = CASE.length
    sides = {name: both(length, backend=name, form=form) for name, form in SIDES.items()}
    name, attend = attention()
    eager = sides.pop("eager")
    seconds = take_turns({**sides, name: attend}, rounds)
    slow = take_turns({"eager": eager, "xformers": sides["xformers"]}, max(3, rounds // 3))
    mine = seconds["xformers"]
    return [
        Result(f"xformers / chunked, {length} tokens", ratio(mine, seconds["chunked"]), "<=", 2),
        Result(f"eager / xformers, {length} tokens", ratio(slow["eager"], slow["xformers"]), ">=", 3),
        Result(f"{name} (head dim 64) / xformers, {length} tokens", ratio(seconds[name], mine), ">=", 1),
    ]


def documents(count: int = 32, length: int = 16384) -> Tensor:
    """Return the cu_seqlens of `count` documents of random length with `length` tokens in all."""
    cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(0))[: count - 1] + 1
    return torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([length])]).int()


def _packed(rounds: int) -> Result:
    cu_seqlens = documents()
    sides = {name: both(16384, backend=name, cu_seqlens=cu_seqlens) for name in ("xformers", "chunked")}
    seconds = take_turns(sides, rounds)
    return Result(
        "xformers / chunked, 32 documents, 16384 tokens", ratio(seconds["xformers"], seconds["chunked"]), "<=", 2
    )


def _memory() -> list[Result]:
    """Measure the peak extra memory of forward + backward relative to the size of q, k and v."""
    row = 4 * CASE.heads * (2 * CASE.key_dim + CASE.value_dim)
    short, long = (extra_memory(both(length, backend="xformers")) / (row * length) for length in (8192, 32768))
    return [
        Result("peak extra memory / q + k + v, 32768 tokens", (long,) * 3, "<=", 6),
        Result("the same / that at 8192 tokens", (long / short,) * 3, "<=", 1.15),
    ]


def _parallel(rounds: int) -> None:
    """Show the times of the parallel form relative to those of eager."""
    register("rough", XFormers(eps=ROUGH))
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "causal, 1024 tokens": (1024, {}),
        "causal, 2048 tokens": (2048, {}),
        "bidirectional, 1024 tokens": (1024, {"causal": False}),
        "bidirectional, 2048 tokens": (2048, {"causal": False}),
        "grid 14 x 14": (196, {"causal": False, "grid": (14, 14)}),
        "grid 32 x 32": (1024, {"causal": False, "grid": (32, 32)}),
        "grid 32 x 32, fast decays": (1024, {"causal": False, "grid": (32, 32), "decay": "short"}),
        "grid 48 x 48": (2304, {"causal": False, "grid": (48, 48)}),
        "grid 48 x 48, fast decays": (2304, {"causal": False, "grid": (48, 48), "decay": "short"}),
        "32 documents, 4096 tokens": (4096, {"cu_seqlens": documents(length=4096)}),
    }
    rows = []
    for name, (length, options) in cases.items():
        sides = {
            side: both(length, backend=side, form="parallel", **options) for side in ("eager", "xformers", "rough")
        }
        sides["chunked"] = both(length, backend="chunked", **options)
        seconds = take_turns(sides, rounds if length < 2000 else max(3, rounds // 3))
        cells = (ratio(seconds["eager"], seconds[side]) for side in list(sides)[1:])
        rows.append([name, *map(spread, cells)])
    title = "How many times faster than eager's parallel form, forward + backward"
    show(title, ["", "xformers, parallel", f"xformers, eps {ROUGH:g}", "chunked, chunkwise"], rows)


def _feed_forward(rounds: int) -> None:
    """Show the times of xformers' swiglu relative to those of the same computation in torch."""
    rows = []
    for dim, tokens in ((256, 2048), (512, 1024), (512, 1)):
        sides = {
            name: FeedForward(dim, 8 * dim // 3, gated=True, activation="silu", backend=name)
            for name in ("torch", "xformers")
        }
        x = torch.randn(1, tokens, dim, requires_grad=True)

        def forward(module: nn.Module, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return module(x)

        def both(module: nn.Module, x: Tensor = x) -> object:
            return torch.autograd.grad(module(x).sum(), (x, *module.parameters()))

        cells = []
        for way in (forward, both):
            seconds = take_turns({name: partial(way, module) for name, module in sides.items()}, rounds)
            cells.append(spread(ratio(seconds["xformers"], seconds["torch"])))
        rows.append([f"width {dim}, {tokens} tokens", *cells])
    show("Gated feed-forward, xformers / torch", ["", *op.PASSES], rows)


def _block_sizes(rounds: int) -> None:
    sizes = (32, 64, 128, 256)
    for form in ("chunkwise", "parallel"):
        sides = {}
        for size in sizes:
            register(f"{form} {size}", XFormers(block_size=size))
            sides[str(size)] = both(2048, backend=f"{form} {size}", form=form)
        seconds = take_turns(sides, rounds)
        rows = [[size, spread(ratio(spent, seconds["64"]))] for size, spent in seconds.items()]
        show(f"Time relative to blocks of 64, {form}, 2048 tokens", ["block size", "forward + backward"], rows)
