"""The recurrent state: all that retention remembers of the tokens so far, always of the same size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .errors import ShapeError
from .options import check_device, check_is, is_whole


@dataclass
class RetentionState:
    """What follows a sequence, so that the next tokens can be added by any form on any backend.

    kv (B, H, K, V):  sum over m of gamma^(t - t_m) k_m v_m^T after the last token, unscaled, in `state_dtype`.
    time (B,):        how many real tokens there were, int64.
    k_sum (B, H, K):  sum over m of gamma^(t - t_m) k_m; only with `score_norm`, which needs it.

    B is the batch, or the number of segments of a packed call. `torch.save` and `torch.load(weights_only=True)` take a
    state as it is (once `retention` is imported).
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 6.
    """

    kv: Tensor
    time: Tensor
    k_sum: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> RetentionState:
        """A new state of `function` of each tensor."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{name: function(x) for name, x in tensors if x is not None})

    def __getitem__(self, rows: int | slice | list[int] | Tensor) -> RetentionState:
        """Rows of the batch, as many as asked for and in that order: `state[beam_indices]` serves beam search."""
        if is_whole(rows):
            rows = [rows]  # keeps the batch dimension
        check_is("rows", rows, slice | list | Tensor, "an integer, a slice, a list or a tensor")
        return self.map(lambda x: x[rows].clone())  # also of a slice: a step must not reach into another state

    def __len__(self) -> int:
        return self.kv.shape[0]

    def to(self, device: torch.device | str) -> RetentionState:
        check_device(device, optional=False)
        return self.map(lambda x: x.to(device))

    def clone(self) -> RetentionState:
        return self.map(torch.clone)

    def copy_(self, other: RetentionState) -> RetentionState:
        """Overwrite the tensors with those of `other`. Raises: TypeError or ShapeError unless they are alike."""
        check_is("other", other, type(self), f"a {type(self).__name__}")
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        for name, mine, theirs in pairs:
            if (mine is None) != (theirs is None) or (mine is not None and mine.shape != theirs.shape):
                mine, theirs = (x if x is None else tuple(x.shape) for x in (mine, theirs))
                raise ShapeError(f"other.{name} must be {mine}, as in this state; got other.{name} {theirs}")
        for _, mine, theirs in pairs:
            if mine is not None:
                mine.copy_(theirs)
        return self

    def detach(self) -> RetentionState:
        """Cut from the graph: between the parts of a sequence in truncated backpropagation."""
        return self.map(torch.detach)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, decays and states for inputs of `dtype`: float32, or float64 for float64."""
    return dtype if dtype == torch.float64 else torch.float32


torch.serialization.add_safe_globals([RetentionState])
torch.export.register_dataclass(RetentionState, serialized_type_name="retention.RetentionState")
