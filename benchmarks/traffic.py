"""Counts the bytes that a process gives to the collectives of torch.distributed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The argument of each operator that holds what a process sends.
_SENT = {
    "_allgather_base_": "input_tensor",
    "allgather_": "input_tensors",
    "send": "tensors",
    "allreduce_": "tensors",
    "broadcast_": "tensors",
    "_reduce_scatter_base_": "input_tensor",
}


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes that this process gives to each kind of them, forward and backward.

    Attributes:
        calls, bytes: by the name of the operator of torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "c10d" and name in _SENT:
            names = [argument.name for argument in func._schema.arguments]
            sent = {**dict(zip(names, args, strict=False)), **(kwargs or {})}[_SENT[name]]
            self.calls[name] += 1
            self.bytes[name] += sum(x.nbytes for x in ([sent] if isinstance(sent, Tensor) else sent))
        return func(*args, **(kwargs or {}))
