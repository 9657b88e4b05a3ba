"""Allocate the tensors between the kernels, and launch the kernels as the plan says. Imports Triton."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import kernels, pairs, places
from .plan import Launch, Plan, Sizes, backward_plan, forward_plan, parallel_plan, power

__all__ = ["Inputs", "Options", "backward", "forward", "kernel_of", "start", "step"]

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_INTERPRETED = 4, 90  # multiprocessors, so few that short sequences are split too, and capability
# A tensor of the arguments, and the flag of a kernel that says whether it is there.
_FLAGS = {"before": "BEFORE", "after": "AFTER", "dbefore": "DBEFORE", "dafter": "DAFTER"}
_FLAGS |= {"scores": "SCORES", "states": "STATES", "slopes": "SLOPES", "do": "BACKWARD", "mask": "MASKED"}


class Inputs(NamedTuple):
    """The tensors of a call, with shapes as in `Backend.__call__`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    state: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None


class Options(NamedTuple):
    """The options of a call; the parallel form has no states and no packed rows, the other form is causal."""

    parallel: bool
    causal: bool
    scale: float
    chunk_size: int | None


def forward(x: Inputs, out: Tensor, final: Tensor | None, options: Options) -> None:
    """Write the output and, if `final` is given, the state after the last token."""
    if out.numel() == 0:
        _keep(x.state, final)
        return
    sizes = _sizes(x, options.chunk_size, return_state=final is not None)
    plan = parallel_plan(sizes, backward=False) if options.parallel else forward_plan(sizes)
    arguments = _arguments(x, plan, options)
    if x.mask is not None:
        out.zero_()
    arguments.update(out=_strided(out), before=_contiguous(x.state), after=final)
    if plan.split:
        arguments["states"] = _states(x, plan)
    if plan.launches[-1].kernel == "core":
        arguments["scores"] = _scores(x, plan, 1)
    for launch in plan.launches:
        _run(launch, arguments)
        if launch.kernel == "join":
            arguments.update(before=arguments["states"], after=None)


def backward(
    x: Inputs,
    dout: Tensor,
    dfinal: Tensor | None,
    grads: tuple[Tensor, ...],
    dstate: Tensor | None,
    options: Options,
    decay_grad: bool,
) -> Tensor | None:
    """Write the gradients of q, k, v and of the state before; return that of log_decay if `decay_grad`."""
    if dout.numel() == 0:
        _keep(dfinal, dstate)
        return None
    sizes = _sizes(x, options.chunk_size, has_grad=dfinal is not None, decay_grad=decay_grad)
    plan = parallel_plan(sizes, backward=True) if options.parallel else backward_plan(sizes)
    arguments = _arguments(x, plan, options)
    if x.mask is not None:
        for grad in grads:
            grad.zero_()
    heads, groups = x.q.shape[1], x.q.shape[1] // x.k.shape[1]
    # Query heads that share a key and a value write their parts side by side.
    parts = grads if groups == 1 else (grads[0], *(_per_head(grad, heads, x.mask) for grad in grads[1:]))
    arguments.update(zip(("dq", "dk", "dv"), map(_strided, parts), strict=True))
    arguments.update(do=_strided(dout), scores=None if options.parallel else _scores(x, plan, 3))
    arguments.update(before=_contiguous(x.state), dafter=_contiguous(dfinal), dbefore=dstate)
    if plan.split:
        arguments.update(states=_states(x, plan), dstates=_states(x, plan))
    slopes = []
    for launch in plan.launches:
        if decay_grad and launch.kernel in ("prepare", "slope", "parallel"):
            # A number of each program, or of each chunk.
            each = plan.chunks if launch.kernel == "prepare" else launch.programs // (plan.segments * heads)
            slopes.append(x.q.new_empty(plan.segments, heads, each, dtype=torch.float32))
        arguments["slopes"] = slopes[-1] if slopes else None
        _run(launch, arguments)
        if launch.kernel == "join":
            arguments.update(before=arguments["states"], dafter=arguments["dstates"], dbefore=None)
    if groups > 1:
        for grad, part in zip(grads[1:], parts[1:], strict=True):
            torch.sum(part.unflatten(1, (-1, groups)), 2, out=grad)
    return torch.cat(slopes, 2).sum((0, 2)) if slopes else None


def step(x: Inputs, out: Tensor, scale: float) -> None:
    """Overwrite x.state with the state after one token, and write the output."""
    if out.numel() == 0 or x.state is None:
        return
    arguments = _names(x, scale)
    arguments.update(out=_strided(out), state=x.state.contiguous(), mask=_contiguous(x.mask))
    keys, values = power(x.q.shape[3]), power(x.v.shape[3])
    block = min(values, max(16, 8192 // keys))
    programs = x.q.shape[0] * x.q.shape[1] * -(-x.v.shape[3] // block)
    _run(Launch("step", programs, {"BK": keys, "BV": block}, 4, 1, 0), arguments)
    if arguments["state"] is not x.state:
        x.state.copy_(arguments["state"])


def _run(launch: Launch, arguments: dict[str, Any]) -> None:
    """Launch a kernel with those of the arguments that it takes."""
    flags = {flag: arguments.get(name) is not None for name, flag in _FLAGS.items()}
    given = {**arguments, **flags, **launch.blocks}
    start(launch, {name: given[name] for name in _parameters(launch.kernel)})


def start(launch: Launch, arguments: dict[str, Any]) -> None:
    """Start the programs of a launch. `python -m benchmarks gpu-compile` takes the place of this function."""
    kernel = kernel_of(launch.kernel)
    with torch.cuda.device_of(arguments["log_decay"]):  # Triton launches on the current device
        kernel[(launch.programs,)](**arguments, num_warps=launch.warps, num_stages=launch.stages)


def kernel_of(name: str) -> Any:
    """Return the kernel of a name."""
    return pairs.parallel if name == "parallel" else getattr(kernels, name)


@functools.cache
def _parameters(kernel: str) -> tuple[str, ...]:
    return tuple(inspect.signature(kernel_of(kernel).fn).parameters)


def _names(x: Inputs, scale: float) -> dict[str, Any]:
    """Return the arguments that all kernels share."""
    return {
        **{name: _strided(t) for name, t in zip(("q", "k", "v"), x[:3], strict=True)},
        **dict.fromkeys(("out", "do", "dq", "dk", "dv", "scores", "states", "dstates", "slopes")),
        **dict.fromkeys(("before", "after", "dbefore", "dafter")),
        "log_decay": x.log_decay.contiguous(),
        "scale": float(scale),
        "heads": x.q.shape[1],
        "groups": x.q.shape[1] // x.k.shape[1],
        "K": x.q.shape[3],
        "V": x.v.shape[3],
        "CELLS": x.q.shape[3] * x.v.shape[3],
        "DTYPE": _TYPES[x.q.dtype],
        "PRECISION": "tf32x3" if x.q.dtype == torch.float32 else "tf32",
    }


def _arguments(x: Inputs, plan: Plan, options: Options) -> dict[str, Any]:
    """Return the arguments of the kernels that walk over tokens."""
    table, index, borders = places.of(x.q, x.mask, x.cu_seqlens, plan)
    return {
        **_names(x, options.scale),
        "CAUSAL": options.causal,
        "places": (table, index, x.q.shape[2], plan.per_sequence, plan.tokens),
        "borders": borders,
        "chunks": plan.chunks,
        "matrices": plan.segments * x.q.shape[1] * plan.chunks * plan.chunk**2,
        "C": plan.chunk,
        "INDEXED": index is not None,
        "TABLED": table is not None,
    }


def _sizes(x: Inputs, chunk_size: int | None, **options: bool) -> Sizes:
    multiprocessors, capability = _device(x.q.device)
    batch, heads, length, key_dim = x.q.shape
    return Sizes(
        sequences=batch if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1,
        heads=heads,
        length=length,
        key_dim=key_dim,
        value_dim=x.v.shape[3],
        item=x.q.element_size(),
        masked=x.mask is not None,
        mixed=x.q.dtype == torch.float16,
        multiprocessors=multiprocessors,
        capability=capability,
        packed=x.cu_seqlens is not None,
        chunk_size=chunk_size,
        has_state=x.state is not None,
        **options,
    )


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors of a device, and its capability as 90."""
    if device.type != "cuda":
        return _INTERPRETED
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, 10 * found.major + found.minor


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return a tensor (B, H, T, D) with contiguous channels, and its strides of rows, heads and tokens."""
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1), x.stride(2)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _states(x: Inputs, plan: Plan) -> Tensor:
    """Allocate a state for each segment, in the dtype in which the kernels multiply it."""
    dtype = torch.float32 if x.q.dtype == torch.float32 else torch.bfloat16
    return x.q.new_empty(plan.segments, x.q.shape[1], x.q.shape[3], x.v.shape[3], dtype=dtype)


def _scores(x: Inputs, plan: Plan, kinds: int) -> Tensor:
    """Allocate matrices of each kind for each chunk."""
    return x.q.new_empty(kinds, plan.segments, x.q.shape[1], plan.chunks, plan.chunk, plan.chunk)


def _per_head(grad: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Allocate a gradient for each query head, 0 where padding stays."""
    make = grad.new_empty if mask is None else grad.new_zeros
    return make(grad.shape[0], heads, *grad.shape[2:])


def _keep(before: Tensor | None, after: Tensor | None) -> None:
    """Write the state, or its gradient, on the other side of no tokens."""
    if after is None:
        return
    if before is None:
        after.zero_()
    else:
        after.copy_(before)
