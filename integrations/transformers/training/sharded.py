"""Weights and states of the optimiser that are divided among processes: how they are divided, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..modeling import RetNetForCausalLM

__all__ = ["is_sharded", "load_optimizer", "load_weights", "reshard", "save_optimizer", "shard", "whole_weights"]

_OPTIMIZER = "optimizer"  # folder in a checkpoint


def shard(model: RetNetForCausalLM, mesh: DeviceMesh) -> None:
    """Shard the parameters among the processes of a mesh by FSDP2, block by block, in place."""
    for block in model.model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether parameters are divided among processes, by FSDP2 or by heads."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Let each process hold its own shards again, after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Return the state dict with whole weights on the CPU of the first process, an empty one on the others."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_weights(model: Any, folder: str | Path) -> None:
    """Load the weights that `save_pretrained` wrote; each process keeps its shards."""
    whole = type(model).from_pretrained(folder).state_dict()
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))


def save_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: str | Path) -> None:
    """Write the shards of all processes to a folder of the checkpoint."""
    state = {_OPTIMIZER: get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=Path(checkpoint, _OPTIMIZER))


def load_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: str | Path) -> None:
    """Read what `save_optimizer` wrote, with any number of processes."""
    state = {_OPTIMIZER: get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=Path(checkpoint, _OPTIMIZER))
    set_optimizer_state_dict(model, optimizer, state[_OPTIMIZER])
