"""The steps of one run on a GPU: `python -m benchmarks.gpu.steps NAME FILE` appends what it finds to FILE."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import retention
from retention import retain

Row = dict[str, Any]
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-3}
# Rows, tokens, heads, key and value dim: those that flash-linear-attention publishes, and a wider one.
SHAPES = (
    (1, 8192, 96, 128, 128),
    (2, 16384, 16, 128, 128),
    (4, 2048, 16, 128, 128),
    (4, 4096, 64, 128, 128),
    (8, 2048, 32, 256, 256),
    (8, 1024, 8, 64, 64),
    (4, 4096, 8, 256, 512),
)
WORKERS = 8  # each compiles its own kernels
DEVICE, OURS = "cuda", "triton"  # tests have neither


class Case(NamedTuple):
    """A call to check, as in `retain`."""

    dtype: torch.dtype
    key_dim: int
    value_dim: int
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    length: int = 777
    kind: str = "plain"  # or masked, packed
    state: bool = True
    decays: tuple[float, ...] = (-0.003, -0.7)


def parity_cases() -> Iterator[Case]:
    """Yield the calls that are most used first, so that a time limit costs the rarest."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for dims in ((128, 128), (64, 64), (64, 128), (256, 256), (256, 512)):
            yield Case(dtype, *dims)
    for kind, dtype in product(("masked", "packed"), (torch.bfloat16, torch.float32)):
        yield Case(dtype, 64, 64, kind=kind)
        yield Case(dtype, 256, 256, kind=kind)
    yield Case(torch.bfloat16, 64, 64, heads=4, kv_heads=2, decays=(-0.003, -0.7, 0.0, -60.0))
    yield Case(torch.bfloat16, 128, 128, length=16384, batch=1)
    yield Case(torch.bfloat16, 128, 128, batch=64, heads=8, kv_heads=8, length=130, decays=(-0.1,) * 8)
    for dims in ((65, 33), (96, 200), (16, 1), (128, 384)):
        yield Case(torch.bfloat16, *dims)
        yield Case(torch.float32, *dims)


def device() -> Iterator[Row]:
    """Yield what the rest was measured on."""
    found = torch.cuda.get_device_properties(0)
    yield {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "GiB": found.total_memory / 2**30,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("torch", "triton", "flash-linear-attention")},
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "triton backend": "; ".join(retention.backends.why_not(_call(), "triton")) or "can run",
    }


def parity() -> Iterator[Row]:
    """Yield the errors of each case against float64, of the result and of every gradient."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(checked, case) for case in parity_cases()]):
            yield done.result()


def checked(case: Case) -> Row:
    """Return the errors of a case: RMS of the difference over RMS of what is right."""
    row = {**case._asdict(), "dtype": str(case.dtype)[6:], "decays": str(case.decays)}
    try:
        tensors, options = inputs(case)
        with_grad = [x.requires_grad_() for x in tensors]
        got = results(with_grad, options, OURS)
        wide = [x.detach().double().requires_grad_() for x in tensors]
        want = results(wide, options, "chunked")
        errors = {name: _error(got[name], want[name]) for name in want}
        bound = BOUNDS[case.dtype]
        # The gradient of a decay is one number of many terms, which may nearly cancel.
        sound = all(error <= (5 * bound if name == "dlog_decay" else bound) for name, error in errors.items())
        return {**row, **errors, "sound": sound}
    except Exception as error:  # any failure of a kernel is a result here
        return {**row, "sound": False, "failure": f"{type(error).__name__}: {error}"[:300]}


def inputs(case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """Return q, k, v, log_decay and perhaps a state, and the options of a case, on the GPU."""
    torch.manual_seed(0)
    batch = 1 if case.kind == "packed" else case.batch
    options: dict[str, Any] = {}
    rows = batch
    if case.kind == "masked":
        options["mask"] = torch.rand(batch, case.length, device=DEVICE) < 0.7
    if case.kind == "packed":
        borders = [0, 1, 1, case.length // 3, case.length]
        options["cu_seqlens"] = torch.tensor(borders, device=DEVICE, dtype=torch.int32)
        rows = len(borders) - 1

    def noise(heads: int, width: int) -> Tensor:
        return torch.randn(batch, case.length, heads, width, device=DEVICE).to(case.dtype).transpose(1, 2)

    tensors = [
        noise(case.heads, case.key_dim),
        noise(case.kv_heads, case.key_dim),
        noise(case.kv_heads, case.value_dim),
    ]
    tensors.append(torch.tensor(case.decays, device=DEVICE))
    if case.state:
        tensors.append(torch.randn(rows, case.heads, case.key_dim, case.value_dim, device=DEVICE))
    return tensors, options


def results(tensors: list[Tensor], options: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Return the output, the state after it and all gradients, by name."""
    q, k, v, log_decay, *states = tensors
    state = None
    if states:
        time = torch.zeros(len(states[0]), dtype=torch.long, device=q.device)
        state = retention.RetentionState(states[0], time)
    out, after = retain(
        q, k, v, log_decay, state=state, backend=backend, form="chunkwise", return_state=True, **options
    )
    generator = torch.Generator(q.device).manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=q.device)
    for x in (out, after.kv):
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        loss = loss + (x.double() * (noise + 0.5)).sum()
    grads = torch.autograd.grad(loss, tensors)
    names = ("dq", "dk", "dv", "dlog_decay", "dstate")
    return {"out": out.detach(), "state": after.kv.detach(), **dict(zip(names, grads, strict=False))}


def capture() -> Iterator[Row]:
    """Yield whether CUDA graphs of each kind of call give the same numbers for new inputs."""
    for name, case in {
        "plain": Case(torch.bfloat16, 128, 128, state=False),
        "masked": Case(torch.bfloat16, 64, 64, kind="masked", state=False),
        "long": Case(torch.bfloat16, 128, 128, batch=1, length=8192, state=False),
    }.items():
        tensors, options = inputs(case)
        yield {"call": name, **_captured(partial(_fused, tensors, options.get("mask")), tensors)}
    tensors, _ = inputs(Case(torch.bfloat16, 128, 128, length=1))
    yield {"call": "step", **_captured(partial(_step, tensors), tensors[:3])}


def _fused(tensors: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Run forward and backward by the operators, without the checks of `retain`."""
    from retention.backends.triton.operator import fused_backward, fused_now

    q, k, v, log_decay = tensors[:4]
    out, _ = fused_now(q, k, v, log_decay, None, mask, None, False, True, 0.1, None, False, q.dtype)
    return [out, *fused_backward(out, None, q, k, v, log_decay, None, mask, None, False, True, 0.1, None, True)[:4]]


def _step(tensors: list[Tensor]) -> list[Tensor]:
    from retention.backends.triton.operator import fused_step_now

    q, k, v, log_decay, state = tensors
    fresh = state.clone()
    return [fused_step_now(q, k, v, log_decay, fresh, None, 0.1, q.dtype), fresh]


def _captured(run: Callable[[], list[Tensor]], tensors: list[Tensor]) -> Row:
    """Capture a run, change its inputs, replay it, and compare with a plain run."""
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = run()
        for x in tensors[:3]:
            x.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        found = [x.clone() for x in replayed]
        return {"equal": all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))}
    except Exception as error:  # any failure is a result here
        return {"equal": False, "failure": f"{type(error).__name__}: {error}"[:300]}


def speed() -> Iterator[Row]:
    """Yield the milliseconds of each side for each shape, forward and with gradients, in bfloat16."""
    from triton.testing import do_bench

    for shape in SHAPES:
        for name, side in sides(*shape).items():
            row: Row = {"B,T,H,K,V": ",".join(map(str, shape)), "side": name}
            try:
                run, leaves = side()
                with torch.no_grad():
                    row["forward ms"] = do_bench(run, warmup=20, rep=80, return_mode="median")
                out = run()
                dout = torch.randn_like(out)

                def both(run: Callable[[], Tensor] = run, dout: Tensor = dout, leaves: list[Tensor] = leaves) -> None:
                    torch.autograd.grad(run(), leaves, dout)

                row["forward+backward ms"] = do_bench(both, warmup=20, rep=80, return_mode="median")
            except Exception as error:  # a side may lack memory or a library; the others are measured
                row["failure"] = f"{type(error).__name__}: {error}"[:200]
            yield row
            torch.cuda.empty_cache()


def sides(batch: int, length: int, heads: int, key_dim: int, value_dim: int) -> dict[str, Callable[[], Any]]:
    """Return, for each side by name, a function that makes its inputs and returns a run and the leaves of gradients."""
    log_decay = torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, device=DEVICE) % 8)))

    def leaves() -> list[Tensor]:
        shapes = (key_dim, key_dim, value_dim)
        return [
            torch.randn(batch, length, heads, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for d in shapes
        ]

    def ours(backend: str) -> Callable[[], Any]:
        def make() -> Any:
            x = leaves()
            q, k, v = (t.transpose(1, 2) for t in x)
            return lambda: retain(q, k, v, log_decay, backend=backend, form="chunkwise"), x

        return make

    def attention() -> Any:
        x = leaves()
        q, k, v = (t.transpose(1, 2) for t in x)
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), x

    def fla(name: str) -> Callable[[], Any]:
        def make() -> Any:
            from fla.ops import simple_gla

            x, function = leaves(), getattr(simple_gla, name)
            return lambda: function(*x, g_gamma=log_decay)[0], x

        return make

    return {
        "triton": ours("triton"),
        "fla, chunk": fla("chunk_simple_gla"),
        "fla, fused_chunk": fla("fused_chunk_simple_gla"),
        "SDPA, causal": attention,
        "chunked": ours("chunked"),
    }


def decode() -> Iterator[Row]:
    """Yield the microseconds of one token in a CUDA graph, and those of the bytes of the state alone."""
    from triton.testing import do_bench_cudagraph

    from retention.backends.triton.operator import fused_step_now

    for batch, heads, key_dim, value_dim in ((1, 16, 64, 64), (1, 16, 128, 128), (32, 16, 128, 128), (32, 8, 256, 512)):
        q, k, v = (
            torch.randn(batch, heads, 1, d, device=DEVICE, dtype=torch.bfloat16) for d in (key_dim, key_dim, value_dim)
        )
        state, log_decay = (
            torch.zeros(batch, heads, key_dim, value_dim, device=DEVICE),
            torch.zeros(heads, device=DEVICE),
        )

        def run(q: Tensor = q, k: Tensor = k, v: Tensor = v, g: Tensor = log_decay, s: Tensor = state) -> None:
            fused_step_now(q, k, v, g, s, None, 0.1, q.dtype)

        run()
        yield {
            "B,H,K,V": f"{batch},{heads},{key_dim},{value_dim}",
            "us": 1e3 * do_bench_cudagraph(run, rep=30, return_mode="median"),
            "MB of state": state.nbytes / 1e6,
        }


def sanitizer() -> Iterator[Row]:
    """Yield what compute-sanitizer says of a few calls, or that it is not here."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        yield {"found": "compute-sanitizer is not installed"}
        return
    code = (
        "import torch; from benchmarks.gpu.steps import Case, checked; "
        "print([checked(Case(torch.bfloat16, 65, 33, length=70, kind=kind)) for kind in ('plain', 'masked', 'packed')])"
    )
    done = subprocess.run(
        [tool, "--tool", "memcheck", sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    yield {"exit code": done.returncode, "said": done.stdout[-400:]}


STEPS: dict[str, Callable[[], Iterator[Row]]] = {
    step.__name__: step for step in (device, parity, capture, speed, decode, sanitizer)
}


def _call() -> retention.backends.Call:
    sizes = dict(batch=1, heads=1, kv_heads=1, length=64, key_dim=64, value_dim=64)
    types = dict(dtype=torch.bfloat16, out_dtype=torch.bfloat16, device=DEVICE)
    return retention.backends.Call(**sizes, **types, scale=1.0, form="chunkwise")  # type: ignore[arg-type]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _error(got: Tensor, want: Tensor) -> float:
    difference, size = (got.double() - want).square().mean().sqrt(), want.square().mean().sqrt()
    return float(difference / size.clamp(min=1e-30))


def main(name: str, file: Path) -> None:
    """Run a step and append each row to the file as soon as it is there."""
    with file.open("w") as lines:
        for row in STEPS[name]():
            print(json.dumps(row, default=str), file=lines, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
