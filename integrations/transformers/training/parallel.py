"""How the processes of a training share its work: the rows of a batch, the parts of a sequence, the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F
from transformers import TrainingArguments

from retention.distributed import context_parallel

__all__ = [
    "HEADS",
    "ROWS",
    "SEQUENCE",
    "SHARDS",
    "batch_per_process",
    "check_epochs",
    "meshes_of",
    "split_sequence",
]

# The dimensions of the meshes. The first three have accelerate's names: its data loader gives all processes along
# SEQUENCE and HEADS the same rows.
ROWS, SEQUENCE, HEADS, SHARDS = "dp_shard", "cp", "tp", "shards"


def meshes_of(args: TrainingArguments, sequence: int, heads: int, fsdp: bool) -> tuple[DeviceMesh, DeviceMesh] | None:
    """Return a mesh (ROWS, SEQUENCE, HEADS) and a mesh (SHARDS, HEADS) of all processes; None for one process.

    The first tells how the processes share a batch, the second how they share the weights.

    Args:
        sequence: number of processes that hold the parts of one sequence.
        heads: number of processes that hold the heads of one layer.
        fsdp: whether the weights are sharded among the others.
    Raises: ValueError if the number of processes does not allow this.
    """
    world, product = args.world_size, sequence * heads
    if world % product:
        raise ValueError(
            f"context_parallel times tensor_parallel must divide the number of processes; got context_parallel "
            f"{sequence}, tensor_parallel {heads}, {world} {'processes' if world > 1 else 'process'}; "
            f"start it with torchrun --nproc_per_node {product * math.ceil(world / product)}"
        )
    if fsdp and world == heads:
        raise ValueError(
            f"fsdp shards weights among the processes that tensor_parallel leaves over; got tensor_parallel {heads}, "
            f"{world} {'processes' if world > 1 else 'process'}; leave fsdp out, or start more processes"
        )
    if heads > 1 and world > heads and not fsdp:
        raise ValueError(
            f"tensor_parallel over some of the processes needs fsdp for the others; got tensor_parallel {heads}, "
            f"{world} processes; add --fsdp, or raise --tensor-parallel to {world}"
        )
    if world == 1:
        return None
    kind, shape = args.device.type, (world // product, sequence, heads)
    rows = init_device_mesh(kind, shape, mesh_dim_names=(ROWS, SEQUENCE, HEADS))
    return rows, init_device_mesh(kind, (world // heads, heads), mesh_dim_names=(SHARDS, HEADS))


def batch_per_process(batch: int, begun: int, now: int) -> int:
    """Return the number of sequences per process with which a resumed run has the batches that it began with.

    Args:
        batch: sequences per process when the run began.
        begun, now: numbers of processes with different rows, when the run began and now.
    Raises: ValueError if `now` processes cannot share the batch.
    """
    if batch * begun % now:
        allowed = [str(n) for n in range(1, batch * begun + 1) if batch * begun % n == 0]
        raise ValueError(
            f"a resumed run keeps its batch of {batch * begun} sequences, which the processes share alike; "
            f"got {now} processes; start it with {_either(allowed)}"
        )
    return batch * begun // now


def check_epochs(begun: int, now: int, rows: int, batch: int, passes: int) -> None:
    """Check that one process takes the same rows as several did, or several as one.

    Where the rows do not fill the last batch of an epoch, several processes fill it with rows of its beginning, and one
    does not.

    Args:
        begun, now: as in `batch_per_process`.
        rows: number of rows of an epoch.
        batch: number of rows of a batch, over all processes.
        passes: number of batches of the whole run.
    Raises: ValueError if a batch would differ.
    """
    if (begun == 1) == (now == 1) or rows % batch == 0 or passes * batch <= rows - rows % batch:
        return
    other = "one process" if begun == 1 else "several processes"
    raise ValueError(
        f"a run that {other} began cannot go on with {now}: the {rows} sequences do not fill the last batch of {batch} "
        f"in an epoch, and it would differ; start it with {begun if begun == 1 else 'at least 2'}"
    )


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def split_sequence(
    mesh: DeviceMesh, inputs: dict[str, Any]
) -> tuple[Callable[[], AbstractContextManager[Any]], dict[str, Any]]:
    """Return a context in which the inputs of a causal language model are the own part, and these inputs.

    Labels become `shift_labels`, and `position_ids` count the whole sequence. Neither padding nor packed sequences are
    supported.
    """
    tokens: Tensor = inputs["input_ids"]
    buffers = {
        "input_ids": tokens.clone(),
        "shift_labels": F.pad(inputs["labels"][:, 1:], (0, 1), value=-100),
        "position_ids": torch.arange(tokens.shape[1], device=tokens.device)[None],
    }
    tensors, dims = list(buffers.values()), [1] * len(buffers)
    return partial(context_parallel, mesh[SEQUENCE], buffers=tensors, buffer_seq_dims=dims), dict(buffers)
