"""Constants as tensors, made once for each device and dtype.

Layers hold their constants as Python numbers and get the tensors here, instead of from a buffer. So `.to(bfloat16)`, a
checkpoint or initialisation on the meta device cannot spoil them. No code may write to such a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_tensor", "is_constant", "kept", "traced"]

_kept: dict[Hashable, Tensor] = {}
_by_id: dict[int, Tensor] = {}  # these tensors are never freed, so no other tensor gets their ids


def as_tensor(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `values` as a tensor, the same one each time; inside a trace or a transform a new one.

    While a CUDA graph is captured, a constant that was made before is returned, and none is kept.
    """
    if traced():
        return torch.tensor(values, dtype=dtype, device=device)
    key = values, device, dtype
    found = _kept.get(key)
    if found is not None:
        return found
    if _captured():
        return torch.tensor(values, dtype=dtype, device=device)
    return _keep(key, *key)


def is_constant(x: Tensor) -> bool:
    """Return whether `as_tensor` made x and keeps it."""
    return id(x) in _by_id


def kept(number: int, longest: int | None = None) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a decorator by which a function of a constant keeps its last `number` results.

    The function takes a tensor first. If `longest` is given, its second argument is the length of the result, and
    longer results are not kept.
    """

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @lru_cache(maxsize=number)
        @torch.inference_mode(False)  # an inference tensor would break the next training step
        def of_constant(constant: int, *rest: Hashable) -> Tensor:
            return make(_by_id[constant], *rest)

        @wraps(make)
        def of_any(x: Tensor, *rest: Any) -> Tensor:
            if traced() or _captured() or not is_constant(x) or (longest is not None and rest[0] > longest):
                return make(x, *rest)
            return of_constant(id(x), *rest)

        return of_any

    return decorate


def traced() -> bool:
    """Return whether a tensor made now belongs to a tracer or a transform, so that it must not be kept."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _captured() -> bool:
    """Return whether a CUDA graph is being captured: memory of a tensor made now belongs to the graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@torch.inference_mode(False)
def _keep(key: Hashable, values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    made = torch.tensor(values, dtype=dtype, device=device)
    _kept[key] = made
    _by_id[id(made)] = made
    return made
