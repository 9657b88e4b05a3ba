"""The contract between `retain` and its backends: what a call is, and what a backend must be able to do."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FORMS = ("parallel", "chunkwise", "recurrent")


class Call(NamedTuple):  # made in a microsecond, which a frozen dataclass is not
    """All a backend may look at to decide: sizes and options, never values. So a choice can be tested without a GPU.

    chunk_size None leaves it to the backend. in_place: the state given is to be overwritten. transformed: inside
    torch.func transforms or forward-mode differentiation. out_dtype: of the output; wider than dtype where a normaliser
    follows. grid: (rows, columns) with rows * columns = length, never causal, masked or packed.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    scale: float
    out_dtype: torch.dtype
    form: str = "auto"
    causal: bool = True
    masked: bool = False
    packed: bool = False
    has_state: bool = False
    return_state: bool = False
    in_place: bool = False
    needs_grad: bool = False
    transformed: bool = False
    chunk_size: int | None = None
    grid: tuple[int, int] | None = None

    def __str__(self) -> str:
        options = ("causal", "masked", "packed", "has_state", "return_state", "in_place", "needs_grad", "transformed")
        words = [
            f"batch {self.batch}, heads {self.heads} (k, v: {self.kv_heads}), length {self.length}",
            f"key_dim {self.key_dim}, value_dim {self.value_dim}",
            f"{self.dtype} on {self.device}, form {self.form}",
            *(name for name in options if getattr(self, name)),
            *([] if self.grid is None else [f"grid {self.grid}"]),
            *([] if self.chunk_size is None else [f"chunk_size {self.chunk_size}"]),
        ]
        return f"retain({', '.join(words)})"


class Backend(Protocol):
    """A backend that leans on another library may also have

    cause: the exception that keeps it from running at all, or None; errors are raised from it.
    found(device): a line on what there is of that library, or None; `explain` and `python -m retention` print it.
    """

    def why_not(self, call: Call) -> list[str]:
        """Every reason this backend cannot run `call`, whose form is a concrete one. Empty means it can."""

    def __call__(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run `call`.

        Shapes: q (B, H, T, K); k (B, Hkv, T, K); v (B, Hkv, T, V); log_decay (H,); mask (B, T) bool;
            cu_seqlens (N + 1,) with B = 1; state (B or N, H, K, V) in `state_dtype(q.dtype)`. All valid already.
        Returns: out (B, H, T, V) in call.out_dtype; the state after the last token if call.return_state, else None.
        """
