"""Checks of the arguments of a model of transformers inside of `retention.distributed.context_parallel`."""

from __future__ import annotations

import torch
from torch import Tensor

from retention.sharding import active, refuse

__all__ = ["check_parts"]


def check_parts(
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    packed_rows: int = 1,
) -> None:
    """Check that the arguments of a model belong to a contiguous part of a sequence; outside of a context do nothing.

    Shapes: position_ids (B or 1, T), the index of each token in the whole sequence; mask (B, T), True = real token.
    Args:
        position_ids, seq_idx, labels, mask: as in the model's call.
        packed_rows: the batch size of packed sequences.
    Raises: ValueError, before any communication.
    """
    shard = active()
    if shard is None:
        return
    if labels is not None:
        refuse("labels that the model shifts", "shift the labels of the whole sequence and pass shift_labels")
    if seq_idx is not None:
        refuse("seq_idx", "pass cu_seq_lens_q, the borders of the whole sequence")
    if packed_rows != 1:
        refuse(f"a packed batch of {packed_rows} rows", "pack all sequences into one row")
    if position_ids is None or torch.compiler.is_compiling():
        return
    expected = torch.arange(shard.start, shard.start + shard.length, device=position_ids.device)
    wrong = position_ids != expected if mask is None else (position_ids != expected) & mask
    if wrong.any():
        first = position_ids.flatten()[wrong.expand_as(position_ids).flatten()][0].item()
        raise ValueError(
            "inside context_parallel position_ids must count the tokens of the whole sequence, and each rank has "
            f"contiguous ones, here {shard.start} to {shard.start + shard.length - 1}; got {first} among them; pass "
            "packed sequences by cu_seq_lens_q, and switch off the balanced order of torch's own context_parallel"
        )
