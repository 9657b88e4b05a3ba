"""What one process holds of a parameter that torch.distributed has divided."""

from __future__ import annotations

from torch import Tensor

__all__ = ["local"]


def local(parameter: Tensor) -> Tensor:
    """Return the part of a DTensor that this process holds; any other parameter as it is.

    Where all processes hold the same, each uses it for its own heads, so that their gradients are added up.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return parameter
    from torch.distributed.tensor import Partial

    grads = [Partial() if placement.is_replicate() else placement for placement in placements]
    return parameter.to_local(grad_placements=grads)  # type: ignore[attr-defined]
