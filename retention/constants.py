"""Constants as tensors, made once for each device and dtype.

Layers hold their constants as numbers and ask here, instead of in a buffer: neither `.to(bfloat16)` nor a checkpoint
nor initialisation on the meta device can spoil them. Nobody may write to such a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

_by_id: dict[int, Tensor] = {}  # no other tensor can have these ids, for these are never freed


def as_tensor(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor of `values`."""
    return torch.tensor(values, dtype=dtype, device=device) if traced() else _made(values, device, dtype)


def is_constant(x: Tensor) -> bool:
    """Whether x comes from `as_tensor`."""
    return id(x) in _by_id


def kept(number: int, longest: int | None = None) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Let a function keep what it made of constants, the last `number` of them.

    The function's first argument is a tensor, its second the length of what it makes, if there is a `longest` to keep.
    """

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @lru_cache(maxsize=number)
        @torch.inference_mode(False)  # an inference tensor would break the next training step
        def of_constant(constant: int, *rest: Hashable) -> Tensor:
            return make(_by_id[constant], *rest)

        @wraps(make)
        def of_any(x: Tensor, *rest: Any) -> Tensor:
            if traced() or not is_constant(x) or (longest is not None and rest[0] > longest):
                return make(x, *rest)
            return of_constant(id(x), *rest)

        return of_any

    return decorate


def traced() -> bool:
    """Whether tensors made now belong to a tracer or a transform, and are of no use after it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@cache
@torch.inference_mode(False)
def _made(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    made = torch.tensor(values, dtype=dtype, device=device)
    _by_id[id(made)] = made
    return made
