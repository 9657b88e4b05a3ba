"""What the kernels of the triton backend compile to: registers, spills, shared memory, tensor-core instructions.

It needs Triton, whose compiler comes with an assembler for NVIDIA's GPUs, and no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer

SHARED = {80: 163, 90: 227, 100: 227}  # KiB that one block may have
TENSOR_CORES = r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)"
DIMS = ((24, 40), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Compiled(NamedTuple):
    """A kernel for one chip: registers of a thread, bytes spilled, KiB of shared memory, use of tensor cores."""

    kernel: str
    capability: int
    blocks: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: float
    tensor_cores: bool

    def faults(self) -> list[str]:
        """Return what is wrong with it."""
        products = self.kernel not in ("join", "step")
        return [
            *([f"{self.spilled} bytes spilled"] if self.spilled else []),
            *([f"{self.shared:.0f} KiB of shared memory"] if self.shared > SHARED[self.capability] else []),
            *(["no tensor cores"] if products and not self.tensor_cores else []),
        ]


def gpu_compile(
    capability: Annotated[list[int] | None, typer.Option(help="80, 90 or 100. [default: all]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Of q, k and v. [default: bfloat16, float32]")] = None,
    dims: Annotated[list[str] | None, typer.Option(help="Head dims as 128x256. [default: six pairs]")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Names of kernels. [default: all]")] = None,
) -> None:
    """Compile every configuration of the triton backend, and fail if one spills registers or does not fit a chip."""
    pairs = DIMS if dims is None else tuple(tuple(map(int, pair.split("x"))) for pair in dims)
    broken = 0
    for chip in capability or SHARED:
        for name in dtype or ("bfloat16", "float32"):
            for key_dim, value_dim in pairs:
                for found in compiled(chip, DTYPES[name], key_dim, value_dim, kernel):
                    faults = found.faults()
                    broken += bool(faults)
                    typer.echo(
                        f"sm_{chip} {name:<8} {key_dim:>3}/{value_dim:<3} {found.kernel:<8} {found.blocks:<46} "
                        f"warps {found.warps} stages {found.stages}: {found.registers:>3} registers, "
                        f"{found.shared:>5.1f} KiB shared{''.join(f', {fault.upper()}' for fault in faults)}"
                    )
    if broken:
        typer.echo(f"{broken} configurations are broken")
        raise typer.Exit(1)


def compiled(
    capability: int, dtype: torch.dtype, key_dim: int, value_dim: int, only: list[str] | None = None
) -> Iterator[Compiled]:
    """Yield the kernels of a call of each kind: short and long, forward and backward, and a token."""
    seen = set()
    for launch, arguments in launches(capability, dtype, key_dim, value_dim):
        if only and launch.kernel not in only:
            continue
        flags = tuple((name, value) for name, value in sorted(arguments.items()) if isinstance(value, bool))
        if (launch.kernel, launch.warps, flags) in seen:
            continue
        seen.add((launch.kernel, launch.warps, flags))
        yield _compile(capability, launch, arguments)


def launches(capability: int, dtype: torch.dtype, key_dim: int, value_dim: int) -> list[tuple[Any, dict[str, Any]]]:
    """Return the launches, with their arguments, of a long and a short call with all options, and of a step."""
    from retention.backends.triton import launch

    found: list[tuple[Any, dict[str, Any]]] = []
    chunkwise, parallel = launch.Options(False, True, 1.0, None), launch.Options(True, False, 1.0, None)
    with (
        mock.patch.object(launch, "start", lambda *started: found.append(started)),
        mock.patch.object(launch, "_device", return_value=(132, capability)),
    ):
        for heads, length in ((1, 2048), (512, 64)):  # split into segments, and not
            q, k, v = (
                torch.empty(1, length, heads, d, dtype=dtype).transpose(1, 2) for d in (key_dim, key_dim, value_dim)
            )
            state, out = torch.empty(1, heads, key_dim, value_dim), torch.empty_like(v)
            grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
            borders = torch.tensor([0, length])
            for mask, cu_seqlens in ((None, None), (torch.ones(1, length, dtype=torch.bool), None), (None, borders)):
                inputs = launch.Inputs(q, k, v, torch.zeros(heads), state, mask, cu_seqlens)
                launch.forward(inputs, out, state, chunkwise)
                launch.backward(inputs, out, state, grads, state, chunkwise, True)
        plain = launch.Inputs(q, k, v, torch.zeros(heads), None, None, None)
        launch.forward(plain, out, None, parallel)
        launch.backward(plain, out, None, grads, None, parallel, True)
        one = launch.Inputs(q[:, :, :1], k[:, :, :1], v[:, :, :1], torch.zeros(heads), state, None, None)
        launch.step(one, torch.empty_like(one.v), 1.0)
    return found


def _compile(capability: int, launch: Any, arguments: dict[str, Any]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from retention.backends.triton.launch import kernel_of

    kernel, target = kernel_of(launch.kernel), GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    settings = {"num_warps": launch.warps, "num_stages": launch.stages}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, options = binder(**arguments, **settings, debug=False)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {**settings, "debug": False}, bound, special, options
    )
    made = triton.compile(ASTSource(kernel, signature, constants, attributes), target, options.__dict__)
    registers, spilled = _assembled(made.asm["ptx"], capability)
    names = [name for name in ("BK", "BV", "BM", "BN", "C", "BLOCK") if name in arguments]
    flags = [name.lower() for name in ("BACKWARD", "INDEXED", "TABLED") if arguments.get(name)]
    shown = " ".join([*(f"{name}={arguments[name]}" for name in names), *flags])
    cores = re.search(TENSOR_CORES, made.asm["ptx"]) is not None
    shared = made.metadata.shared / 1024
    return Compiled(launch.kernel, capability, shown, launch.warps, launch.stages, registers, spilled, shared, cores)


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Return the registers of a thread and the bytes that it spills, by NVIDIA's assembler."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    chip = re.search(r"\.target (\w+)", ptx)[1]  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [tool.path, "-v", f"-arch={chip}", "kernel.ptx", "-o", os.devnull]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)[1]  # type: ignore[index]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return int(registers), sum(map(int, spills))
