"""The recurrent state: it summarises all tokens so far in a size that does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .errors import ShapeError
from .options import check_device, check_is, is_whole

__all__ = ["RetentionState", "state_dtype"]


@dataclass
class RetentionState:
    """The state after a sequence, from which any form on any backend can go on with the next tokens.

    B is the batch size, or the number of segments of a packed call. `torch.save` takes a state as it is, and so does
    `torch.load(weights_only=True)` once `retention` is imported.

    Attributes:
        kv: (B, H, K, V) sum over m of gamma^(t - t_m) k_m v_m^T after the last token, without scale; float32, or
            float64 for float64 inputs.
        time: (B,) int64, the number of real tokens so far.
        k_sum: (B, H, K) sum over m of gamma^(t - t_m) k_m, in the dtype of kv; None unless score_norm is on.
    Source: Sun et al. 2023, arXiv:2307.08621, Eq. 6.
    Examples:
        >>> import retention
        >>> state = retention.initial_state(2, 4, 8, 16)
        >>> state[[0, 0, 1]].kv.shape  # row 0 twice, as in beam search
        torch.Size([3, 4, 8, 16])
    """

    kv: Tensor
    time: Tensor
    k_sum: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> RetentionState:
        """Return a new state whose tensors are `function` of the tensors of this one."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{name: function(x) for name, x in tensors if x is not None})

    def __getitem__(self, rows: int | slice | list[int] | Tensor) -> RetentionState:
        """Copy rows of the batch, in the given order and with repetitions: `state[beam_indices]` serves beam search.

        Raises: TypeError unless rows is an integer, a slice, a list or a tensor.
        """
        if is_whole(rows):
            rows = [rows]  # keeps the batch dimension
        check_is("rows", rows, slice | list | Tensor, "an integer, a slice, a list or a tensor")
        return self.map(lambda x: x[rows].clone())  # a slice is a view: without a copy `step` would change both states

    def __len__(self) -> int:
        """Return the number of rows, B."""
        return self.kv.shape[0]

    def to(self, device: torch.device | str) -> RetentionState:
        """Return the state on `device`. Raises: ValueError unless torch knows the device."""
        check_device(device, optional=False)
        return self.map(lambda x: x.to(device))

    def clone(self) -> RetentionState:
        """Return a copy that shares no memory with this state."""
        return self.map(torch.clone)

    def copy_(self, other: RetentionState) -> RetentionState:
        """Overwrite the tensors with those of `other` and return this state.

        Raises: TypeError or ShapeError, before any change, unless both states have the same tensors of the same shapes.
        """
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
        """Cut the state from the autograd graph, as between the parts of a sequence in truncated backpropagation."""
        return self.map(torch.detach)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, decays and states for inputs of `dtype`: float32, or float64 for float64."""
    return dtype if dtype == torch.float64 else torch.float32


torch.serialization.add_safe_globals([RetentionState])
torch.export.register_dataclass(RetentionState, serialized_type_name="retention.RetentionState")
