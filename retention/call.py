"""A call of `retain`: its tensors, its options, their description for the backends, and the methods of a backend.

`retain` makes `Inputs` and `Options` from its arguments. `arguments.describe` checks them and makes a `Call`, by which
a backend is chosen and run.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from .state import RetentionState

__all__ = ["FORMS", "Backend", "Call", "Inputs", "Options", "RetainOptions", "ScoreNorm"]

FORMS = ("parallel", "chunkwise", "recurrent")
ScoreNorm = bool | Literal["absolute"]


class Inputs(NamedTuple):
    """The tensors of a call, as in `retain`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    state: RetentionState | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None


class Options(NamedTuple):  # made in each decoding step; a frozen dataclass takes several times as long
    """The options of a call, as in `retain`.

    Attributes:
        in_place: whether the state is to be overwritten, as in `step`.
    """

    scale: float | None = None
    causal: bool = True
    grid: tuple[int, int] | None = None
    decay_norm: bool = False
    score_norm: ScoreNorm = False
    out_dtype: torch.dtype | None = None
    chunk_size: int | None = None
    backend: str = "auto"
    form: str = "auto"
    return_state: bool = False
    in_place: bool = False


class RetainOptions(TypedDict, total=False):
    """The types of the arguments of `retain` that have a default, without return_state, which decides its result."""

    state: RetentionState | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    scale: float | None
    causal: bool
    grid: tuple[int, int] | None
    decay_norm: bool
    score_norm: ScoreNorm
    out_dtype: torch.dtype | None
    chunk_size: int | None
    backend: str
    form: str


class Call(NamedTuple):
    """The sizes and options of a call of `retain`: all that a backend decides by. It holds no values of tensors.

    So the choice of a backend can be tested without the device of the call.

    Attributes:
        batch, heads, kv_heads, length, key_dim, value_dim: B, H, Hkv, T, K and V of `retain`.
        dtype: of q, k and v.
        device: type of the device, as "cuda".
        scale: factor of q . k.
        out_dtype: dtype of the output; wider than dtype where a normaliser follows.
        form: one of FORMS, or "auto" before a backend is chosen.
        causal: whether tokens see no later ones.
        masked, packed, has_state: whether there is a mask, cu_seqlens, a state.
        return_state: whether the state after the last token is wanted.
        in_place: whether the state given is to be overwritten.
        needs_grad: whether a gradient of an input is wanted.
        transformed: whether the call is inside torch.func transforms or forward-mode differentiation.
        chunk_size: tokens per chunk; None leaves the choice to the backend.
        grid: (rows, columns) with rows * columns = length, or None; a call on a grid is never causal, masked or packed.
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
    """An object that computes one or more forms of retention.

    A backend that needs another library may have two more attributes, which are optional.

    Attributes:
        cause: the exception that keeps the backend from running at all, or None. Errors are raised from it.
        found: a method that takes the type of a device and returns a line on the library for people, or None; `explain`
            and `python -m retention` print it.
    """

    def why_not(self, call: Call) -> list[str]:
        """Return every reason why this backend cannot run `call`, whose form is concrete; an empty list if it can."""

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
        """Run `call`, for arguments that have been checked.

        Shapes: q (B, H, T, K); k (B, Hkv, T, K); v (B, Hkv, T, V); log_decay (H,); mask (B, T) bool, True = real token;
            cu_seqlens (N + 1,) with B = 1; state (B or N, H, K, V).
        Dtypes: q, k, v in call.dtype; log_decay float32 or float64; state in `state_dtype(call.dtype)`.
        Returns: the output (B, H, T, V) in call.out_dtype, 0 at padding; and the state after the last token if
            call.return_state, else None.
        """
