"""The heads of a layer, divided among processes with torch.distributed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from .decay import HeadDecay
from .errors import ShapeError
from .layer import MultiScaleRetention
from .norm import HeadNorm

__all__ = ["check_heads", "divide_heads", "divide_parameter"]


def check_heads(processes: int, **counts: int) -> None:
    """Raises: ShapeError that names a number of heads which the processes do not divide."""
    for name, count in counts.items():
        if count % processes:
            raise ShapeError(f"the number of processes must divide {name}; got {count} heads, {processes} processes")


def divide_heads(module: nn.Module, mesh: DeviceMesh) -> None:
    """Leave a layer or its decay the own heads, in place; other modules stay as they are. Parameters are not touched.

    Raises: ShapeError for heads that cannot be divided.
    """
    size, rank = mesh.size(), mesh.get_local_rank()
    if isinstance(module, MultiScaleRetention):
        check_heads(size, num_heads=module.num_heads, num_kv_heads=module.num_kv_heads)
        for name in ("num_heads", "num_kv_heads", "key_dim", "value_dim"):
            setattr(module, name, getattr(module, name) // size)
    elif isinstance(module, HeadDecay):
        check_heads(size, num_heads=len(module.values))
        count = len(module.values) // size
        own = slice(rank * count, (rank + 1) * count)
        module.values, module.log_gaps = module.values[own], module.log_gaps[own]


def divide_parameter(module: nn.Module, name: str, mesh: DeviceMesh, **options: Any) -> None:
    """Make a parameter a DTensor that is divided by its first dimension, the heads; or whole, if all heads share it.

    options: of `distribute_tensor`.
    """
    parameter = module.get_parameter(name)
    shared = isinstance(module, HeadNorm) and module.affine != "channel"
    divided = distribute_tensor(parameter, mesh, [Replicate() if shared else Shard(0)], **options)
    setattr(module, name, nn.Parameter(divided, parameter.requires_grad))
