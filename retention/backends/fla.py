"""Retention by flash-linear-attention (https://github.com/fla-org/flash-linear-attention), where it is installed.

Its linear attention with a constant decay for each head is retention. It has two routes: `chunk` stores the states of
all chunks and runs these side by side, `fused_chunk` walks through a sequence with the state in registers. The library
is imported at first use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..call import Call
from ..errors import BackendError
from ..scores import repeated_heads

__all__ = ["backend", "route"]

_TESTED = "0.6.0"
_INSTALL = f'pip install "flash-linear-attention=={_TESTED}"'
_MOST_KEYS = 256
_ENOUGH_HEADS = 128  # rows times heads that fill a GPU without parts of sequences side by side
_BLOCK = 128  # channels of v of one program of fused_chunk


class _Fla:
    """The backend "fla": the chunkwise form, on GPUs; see `Backend`."""

    def why_not(self, call: Call) -> list[str]:
        reasons = []
        if call.form != "chunkwise":
            reasons.append(f"has the form chunkwise, not {call.form}")
        if not call.causal:
            reasons.append("is causal")
        if call.masked:
            reasons.append("takes no mask; pack the rows, with cu_seqlens")
        if call.in_place:
            reasons.append("does not overwrite a state")
        if call.transformed:
            reasons.append("has no rule for torch.func transforms and forward-mode differentiation")
        if call.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"computes products of {call.dtype} less exactly than in it; use half precision")
        if call.out_dtype != call.dtype:
            reasons.append(f"returns {call.dtype}, not {call.out_dtype}")
        if call.key_dim > _MOST_KEYS or call.key_dim % 2 or call.value_dim % 2:
            reasons.append(
                f"has even head dims and key_dim up to {_MOST_KEYS}, not {call.key_dim} and {call.value_dim}"
            )
        if call.chunk_size is not None:
            reasons.append("chooses its chunks itself; leave chunk_size out")
        if call.device != "cuda":
            reasons.append(f"needs a GPU, not {call.device}")
        elif _missing():
            reasons.append(f"needs flash-linear-attention, which cannot be imported ({_missing()}): {_INSTALL}")
        return reasons

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
        if call.needs_grad and log_decay.requires_grad:
            raise BackendError("backend 'fla' has no gradient of log_decay; detach it, or use another backend")
        k, v = repeated_heads(k, call.heads), repeated_heads(v, call.heads)
        out, final = route(call)(
            *(x.transpose(1, 2) for x in (q, k, v)),
            g_gamma=log_decay.float(),
            scale=call.scale,
            initial_state=state,
            output_final_state=call.return_state,
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
        )
        return out.transpose(1, 2), final if call.return_state else None


backend = _Fla()


def route(call: Call) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the function that has fewer bytes to move: fused_chunk if heads fill the GPU without cutting sequences."""
    from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla

    filled = call.batch * call.heads * -(-call.value_dim // _BLOCK) >= _ENOUGH_HEADS
    return fused_chunk_simple_gla if filled and call.key_dim <= _BLOCK else chunk_simple_gla


@functools.cache
def _missing() -> str:
    """Return why flash-linear-attention cannot be imported, "" if it can."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla  # noqa: F401
    except Exception as error:  # a broken installation may fail in any way
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    return ""
