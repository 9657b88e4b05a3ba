"""Retention over many processes with torch.distributed: a sequence in parts, and heads in parts.

Source: Sun et al. 2025, arXiv:2502.07563 (LASP-2), for the exchange of states; the interface is that of
    `torch.distributed.tensor.experimental.context_parallel`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from .decay import HeadDecay
from .ffn import FeedForward
from .heads import check_heads, divide_heads, divide_parameter
from .layer import MultiScaleRetention
from .model import RetNet
from .norm import HeadNorm
from .options import check_is, check_number, check_whole, number, shown
from .sharding import Shard, activate, active

__all__ = ["context_parallel", "tensor_parallel"]


@contextmanager
def context_parallel(
    mesh: DeviceMesh,
    *,
    length: int | None = None,
    buffers: Sequence[Tensor] | None = None,
    buffer_seq_dims: Sequence[int] | None = None,
    no_restore_buffers: set[Tensor] | None = None,
    tolerance: float = 0.0,
) -> Generator[Shard]:
    """Spread one sequence over the processes of a mesh: inside, every retention sees all parts of the sequence.

    Each process holds a contiguous part, in the order of the ranks, and calls `retain`, a layer or a model with it. The
    results are the parts of those that one process computes from the whole sequence. For each call of `retain` one
    exchange of H * K * V numbers per process runs forward, and one backward, at any length.

    Inside, cu_seqlens, `state` and the returned state belong to the whole sequence and are the same on all processes. A
    mask belongs to the own part; give one to all processes or to none. The gradients of what all processes share
    (weights, log_decay, `state`) are those of the own outputs; their sum over the processes is that of the whole
    sequence. Run the backward pass inside too.

    Args:
        mesh: a DeviceMesh of one dimension, such as `mesh["cp"]`.
        length: the number of tokens of the own part, padding included; parts may differ. Or give buffers.
        buffers: tensors of the whole sequence, equal on all processes. Inside the context each holds only its own part;
            the parts differ by one token at most.
        buffer_seq_dims: the dimension of the tokens of each buffer.
        no_restore_buffers: buffers that need not hold the whole sequence again afterwards.
        tolerance: where gamma^length of every inner part is at most this for every head, each process takes the states
            of its neighbours only, and the exchange no longer grows with the number of processes. The states that are
            left out count at most this fraction. With a mask or a returned state all are exchanged. Default 0: exact.
    Yields: the `Shard`: lengths, rank, start and total of the parts.
    Raises: ValueError or TypeError that names the argument. Inside: ValueError, before any communication, for what has
        no parts: a grid, `step`, score matrices, score_norm "absolute", a state of packed sequences, torch.func.
    Examples:
        >>> import torch, torch.distributed as dist
        >>> from retention import MultiScaleRetention, distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun does this for more
        >>> mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
        >>> layer, x = MultiScaleRetention(dim=16, num_heads=2), torch.ones(1, 8, 16)
        >>> with distributed.context_parallel(mesh["cp"], buffers=[x], buffer_seq_dims=[1]) as shard:
        ...     y = layer(x)  # of the tokens shard.start to shard.start + shard.length
        >>> y.shape
        torch.Size([1, 8, 16])
        >>> dist.destroy_process_group()
    """
    _check_mesh(mesh)
    if active() is not None:
        raise ValueError("context_parallel is active already; a sequence is spread once")
    check_number("tolerance", tolerance, 0 <= number(tolerance) < 1, "at least 0 and below 1")
    check_whole("length", length, 0, optional=True)
    group, rank, size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    buffers, dims = list(buffers or ()), list(buffer_seq_dims or ())
    kept = no_restore_buffers or set()
    total = _check_buffers(buffers, dims, kept, length)
    if length is None:
        lengths = tuple(total // size + (r < total % size) for r in range(size))
    else:
        lengths = _agreed(mesh, length, float(tolerance))
    shard = Shard(lengths, rank, group, float(tolerance))
    restored = [None if any(x is y for y in kept) else x.detach() for x in buffers]
    for x, dim in zip(buffers, dims, strict=True):
        _hold(x, x.narrow(dim, shard.start, shard.length).clone())
    before = activate(shard)
    try:
        yield shard
    finally:
        activate(before)
        for x, whole in zip(buffers, restored, strict=True):
            if whole is not None:
                _hold(x, whole)


def _hold(x: Tensor, content: Tensor) -> None:
    """Let x hold another content, in its memory; autograd notices the change."""
    x.set_(content)  # type: ignore[call-overload]


def _check_mesh(mesh: object) -> None:
    check_is("mesh", mesh, DeviceMesh, "a DeviceMesh of one dimension")
    if isinstance(mesh, DeviceMesh) and mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, such as mesh['cp']; got {mesh.ndim}, {mesh.mesh_dim_names}")


def _check_buffers(buffers: list[Tensor], dims: list[int], kept: set[Tensor], length: int | None) -> int:
    """Return the number of tokens of the buffers, 0 without any. Raises: ValueError or TypeError."""
    if bool(buffers) == (length is not None):
        raise ValueError(
            f"give the length of the own part, or buffers of the whole sequence; got length {length}, "
            f"{len(buffers)} buffers"
        )
    if len(buffers) != len(dims):
        raise ValueError(f"buffer_seq_dims must hold a dimension per buffer, {len(buffers)}; got {len(dims)}")
    for x, dim in zip(buffers, dims, strict=True):
        check_is("buffers", x, Tensor, "tensors")
        if x.requires_grad:
            raise ValueError("buffers are changed in place and have no gradient; got one that requires it; detach it")
        if type(dim) is not int or not -x.dim() <= dim < x.dim():
            raise ValueError(f"buffer_seq_dims must be dimensions of the buffers; got {shown(dim)} for {shown(x)}")
    if any(all(x is not y for y in buffers) for x in kept):
        raise ValueError("no_restore_buffers must be among buffers; got another tensor")
    totals = {x.shape[dim] for x, dim in zip(buffers, dims, strict=True)}
    if len(totals) > 1:
        raise ValueError(f"buffers must have one number of tokens; got {sorted(totals)}")
    return totals.pop() if totals else 0


def _agreed(mesh: DeviceMesh, length: int, tolerance: float) -> tuple[int, ...]:
    """Return the lengths of all parts. Raises: ValueError on all processes if their tolerances differ."""
    mine = torch.tensor([float(length), tolerance], dtype=torch.float64, device=mesh.device_type)
    found = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(found, mine, group=mesh.get_group())
    lengths, tolerances = torch.stack(found).unbind(1)
    if (tolerances != tolerance).any():
        raise ValueError(f"tolerance must be the same on all ranks; got {tolerances.tolist()}")
    return tuple(int(x) for x in lengths.tolist())


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Divide the heads and the hidden channels of a model among the processes of a mesh, and return the model.

    Each process computes some heads of every retention layer, with their decays, gates and norms, and some hidden
    channels of every feed-forward; a sum over the processes follows both. The rows of a `RetNet`'s embedding and of its
    head are divided too. Inputs, outputs and the other parameters are the same on all processes; states are those of
    the own heads. A feed-forward with a norm inside stays whole.

    Args:
        model: a module with retention layers, in place; it may be on the meta device.
        mesh: a DeviceMesh of one dimension, such as `mesh["tp"]`, whose size divides num_heads and num_kv_heads.
    Raises: TypeError or ValueError that names the argument, before any change; ShapeError for heads that cannot be
        divided.
    Source: Shoeybi et al. 2019, arXiv:1909.08053; the plan runs on torch's `parallelize_module`.
    Examples:
        >>> import torch.distributed as dist
        >>> import retention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun does this for more
        >>> mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        >>> model = retention.distributed.tensor_parallel(retention.RetNet(dim=16, num_layers=1), mesh["tp"])
        >>> model.backbone.blocks[0].retention.q_proj.weight.placements
        (Shard(dim=0),)
        >>> dist.destroy_process_group()
    """
    check_is("model", model, nn.Module, "an nn.Module")
    _check_mesh(mesh)
    layers = [module for module in model.modules() if isinstance(module, MultiScaleRetention)]
    if not layers:
        raise ValueError(
            f"the model must have a retention layer; got {type(model).__name__} without one; a model of transformers "
            "with replaced attention is divided by from_pretrained(folder, tp_plan='auto')"
        )
    for layer in layers:
        if isinstance(layer.q_proj.weight, DTensor):
            raise ValueError("the model is divided already; call tensor_parallel once, and before fully_shard")
        check_heads(mesh.size(), num_heads=layer.num_heads, num_kv_heads=layer.num_kv_heads)
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        styles = _styles(module)
        plan |= {f"{name}.{child}".strip("."): style for child, style in styles.items()}
    tied = isinstance(model, RetNet) and model.head.weight is model.embedding.weight
    parallelize_module(model, mesh, plan)
    if tied and isinstance(model, RetNet):
        model.head.weight = model.embedding.weight
    for layer in layers:
        for module in layer.modules():
            divide_heads(module, mesh)
            for name, _ in list(module.named_parameters(recurse=False)):
                if isinstance(module, HeadDecay | HeadNorm):
                    divide_parameter(module, name, mesh)
    return model


def _styles(module: nn.Module) -> dict[str, ParallelStyle]:
    """Return how the children of a module are divided."""
    if isinstance(module, MultiScaleRetention):
        inward, outward = (
            [name for name in ("q_proj", "k_proj", "v_proj", "g_proj") if getattr(module, name)],
            "out_proj",
        )
    elif isinstance(module, FeedForward) and module.backend == "torch" and isinstance(module.norm, nn.Identity):
        inward, outward = [name for name in ("fc1", "gate") if getattr(module, name)], "fc2"
    elif isinstance(module, RetNet):
        rows = RowwiseParallel(input_layouts=Replicate())
        return {"embedding": rows, "head": ColwiseParallel(output_layouts=Replicate())}
    else:
        return {}
    return {**{name: ColwiseParallel() for name in inward}, outward: RowwiseParallel()}
