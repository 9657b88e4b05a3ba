"""Time and memory of the operation by backend, form and length, beside SDPA and an estimate of the least time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from benchmarks.measure import Measured, Run, Side, race, rates, ratio
from benchmarks.record import Device, Lengths, Limit, Quick, add_case, duration, megabytes, show, spread
from retention import backends, retain
from retention.arguments import describe
from retention.backends.chunked import CHUNK_SIZE
from retention.call import Inputs, Options
from retention.decay import HeadDecay

PASSES = ("forward", "forward+backward")
BOUNDS = {"float64": 1e-10, "float32": 1e-4, "float16": 4e-3, "bfloat16": 4e-3}  # of the deviation


@dataclass(frozen=True)
class Case:
    """The sizes of a call that every side runs; `way` is one of PASSES."""

    way: str
    length: int
    dtype: str = "float32"
    batch: int = 1
    heads: int = 8
    key_dim: int = 64
    value_dim: int = 128
    device: str = "cpu"

    def tensors(self, value_dim: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        grad = self.way != "forward"
        widths = self.key_dim, self.key_dim, value_dim or self.value_dim
        dd: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "device": self.device}
        q, k, v = (torch.randn(self.batch, self.heads, self.length, n, **dd).requires_grad_(grad) for n in widths)
        return q, k, v

    def log_decay(self) -> Tensor:
        """Return the log-decays that a layer passes."""
        return HeadDecay("paper", self.heads)(torch.device(self.device))

    def work(self) -> tuple[float, float]:
        """Return operations of the chunkwise form, and bytes of inputs and outputs; backward counts 2.5 times."""
        tokens, times = self.batch * self.heads * self.length, 1.0 if self.way == "forward" else 3.5
        flops = tokens * (
            2 * min(CHUNK_SIZE, self.length) * (self.key_dim + self.value_dim) + 4 * self.key_dim * self.value_dim
        )
        moved = tokens * 2 * (self.key_dim + self.value_dim) * getattr(torch, self.dtype).itemsize
        return times * flops, times * moved


def op(
    length: Lengths = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Type of the inputs, float16 to float64; repeat the option for several.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; repeat the option for several.")] = None,
    head_dims: Annotated[
        list[str] | None,
        typer.Option(help="Width of a key and of a value, such as 64x128; repeat the option for several."),
    ] = None,
    heads: int = 8,
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend to time; repeat the option for several. Default: all.")
    ] = None,
    device: Device = "cpu",
    limit: Limit = 3.0,
    quick: Quick = False,
) -> None:
    """Time `retain` in every backend and form, and SDPA: forward and forward + backward, by length and size."""
    names = backend or list(backends.names())
    for name in names:
        backends.check_name(name)
    lengths = length or ([64, 1024] if quick else [1, 16, 64, 256, 1024, 4096, 16384])
    shapes = [tuple(map(int, text.split("x"))) for text in head_dims or ["64x128"]]
    groups = list(product(dtype or ["float32"], batch or [1], shapes))
    bar = tqdm(total=len(groups) * len(PASSES) * len(lengths), desc="op", leave=False)
    for kind, rows, (key_dim, value_dim) in groups:
        found, deviations, slow = {}, {}, {}
        for way, tokens in product(PASSES, sorted(lengths)):
            case = Case(way, tokens, kind, rows, heads, key_dim, value_dim, device)
            bar.set_postfix_str(f"{way}, {tokens} tokens")
            found[case] = race(sides(case, names, slow), 0.5 if quick else limit, device)
            slow |= too_slow(case, found[case])
            deviations[case] = check(case, found[case])
            add_case({**vars(case), "floor": floor(case)}, found[case], baseline(case), deviation=deviations[case])
            bar.update()
        show_cases(found, deviations)
    bar.close()


Slow = dict[tuple[str, str], str]  # by pass and side, why it is not tried with more tokens


def sides(case: Case, names: list[str], slow: Slow) -> dict[str, Side]:
    """Return one side per backend and form, and softmax attention."""
    ways = {f"{name}, {form}": (name, form) for form in backends.FORMS for name in names}
    able = {side: Side(partial(retention, case, *way), *obstacles(case, *way)) for side, way in ways.items()}
    able |= {baseline(case): Side(partial(attention, case))}
    return {name: replace(side, why_not=side.why_not or slow.get((case.way, name), "")) for name, side in able.items()}


def too_slow(case: Case, found: dict[str, Measured]) -> Slow:
    late = [name for name, one in found.items() if one.failure.startswith("TimeoutError")]
    return {(case.way, name): f"beyond the limit at {case.length:,} tokens already" for name in late}


def baseline(case: Case) -> str:
    return f"SDPA, head dim {case.key_dim}"


def obstacles(case: Case, name: str, form: str) -> tuple[float, str]:
    """Return the bytes that the form needs beyond a fixed number per token, and the reasons why it cannot run."""
    call = describe(Inputs(*case.tensors(), case.log_decay()), Options(form=form))
    copies = {"parallel": (5, 8), "chunkwise": (0, 0), "recurrent": (0, 2)}[form][case.way != "forward"]
    cells = case.length if form == "parallel" else case.key_dim * case.value_dim
    return 4.0 * copies * case.batch * case.heads * case.length * cells, "; ".join(backends.why_not(call, name))


def retention(case: Case, name: str, form: str) -> Run:
    tensors, log_decay = case.tensors(), case.log_decay()
    return timed(case, tensors, lambda: retain(*tensors, log_decay, backend=name, form=form))


def attention(case: Case) -> Run:
    """Return a run of softmax attention, whose values are as wide as its keys."""
    tensors = case.tensors(case.key_dim)
    return timed(case, tensors, lambda: F.scaled_dot_product_attention(*tensors, is_causal=True))


def timed(case: Case, tensors: tuple[Tensor, ...], run: Callable[[], Any]) -> Run:
    if case.way == "forward":
        return run
    dout = torch.randn_like(run())
    return lambda: torch.autograd.grad(run(), tensors, dout)


def check(case: Case, found: dict[str, Measured]) -> dict[str, float]:
    """Return the deviation of each side from float64; a side beyond the bound counts as failed."""
    torch.manual_seed(0)
    tensors, log_decay = replace(case, way="forward").tensors(), case.log_decay()
    short = case.length <= 1024
    want = retain(
        *(x.double() for x in tensors), log_decay, **(dict(backend="eager", form="parallel") if short else {})
    )
    deviations = {}
    for side, measured in found.items():
        if measured.failure or side == baseline(case):
            continue
        name, form = side.split(", ")
        error = retain(*tensors, log_decay, backend=name, form=form).double() - want
        half = case.dtype in ("float16", "bfloat16")
        deviations[side] = (error.norm() / want.norm() if half else error.abs().max() / want.abs().max()).item()
        if not deviations[side] <= BOUNDS[case.dtype]:
            measured.failure = f"deviates by {deviations[side]:.1e}"
    return deviations


def show_cases(cases: dict[Case, dict[str, Measured]], deviations: dict[Case, dict[str, float]]) -> None:
    """Show one table of cases that differ only in pass and length."""
    rows, refused = [], {}
    for case, found in cases.items():
        base = found[baseline(case)]
        for side, one in found.items():
            if not one.seconds or one.failure:
                refused[side, one.failure] = [*refused.get((side, one.failure), []), case.length]
                continue
            against = spread(ratio(base.seconds, one.seconds)) if base.seconds and one is not base else ""
            above = f"{one.median / floor(case):.2f}" if one is not base else ""
            far = deviations[case].get(side)
            cells = [duration(one.median), against, above, megabytes(one.memory), "" if far is None else f"{far:.0e}"]
            rows.append([case.way, f"{case.length:,}", side, *cells])
    case = next(iter(cases))
    columns = ["", "tokens", "", "time", "SDPA / its time", "its time / floor", "memory", "deviation"]
    show(f"{case.dtype}, batch {case.batch}, {case.heads} heads of {case.key_dim} x {case.value_dim}", columns, rows)
    if refused:
        rows = [[side, ", ".join(f"{n:,}" for n in dict.fromkeys(n)), why] for (side, why), n in refused.items()]
        show("Not measured", ["", "tokens", "why"], rows)


def floor(case: Case) -> float:
    """Return the least seconds, at the rates of a large matrix product and of a copy, measured in this run."""
    return rates(case.device, getattr(torch, case.dtype)).floor(*case.work())
