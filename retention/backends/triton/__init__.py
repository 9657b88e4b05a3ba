"""Retention in fused Triton kernels (https://triton-lang.org), for NVIDIA GPUs: at most three launches a pass.

`kernels` are the kernels of the chunkwise form and of `step`, `pairs` that of the parallel form; `plan` decides how
they are launched, `launch` launches them, `places` says where the segments of masked and packed calls lie, `operator`
shows them to torch, and `probe` tests them at first use. Triton is imported at first use. CUDA builds of torch bring it
along.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...call import Call
from .operator import fused, fused_now, fused_step, fused_step_now
from .plan import CHUNKS, MOST_KEYS, MOST_VALUES
from .probe import cause, found, trouble

__all__ = ["Triton", "backend"]


class Triton:
    """The backend "triton": the parallel and the chunkwise form, and the recurrent one of `step`; see `Backend`."""

    def why_not(self, call: Call) -> list[str]:
        reasons = []
        if call.form == "recurrent" and not (call.in_place and call.length == 1):
            reasons.append("the recurrent form is for one token in place; use chunkwise")
        if call.form == "chunkwise" and not call.causal:
            reasons.append("the chunkwise form is causal; use parallel")
        if call.form == "parallel" and (call.packed or call.has_state or call.return_state):
            reasons.append("the parallel form has no states and packed rows; use chunkwise")
        if call.form != "recurrent" and call.in_place:
            reasons.append("overwrites a state only in the recurrent form")
        if call.grid is not None:
            reasons.append("has no decay on a grid")
        if call.dtype == torch.float64:
            reasons.append("computes in float32 and has no float64")
        if call.key_dim > MOST_KEYS or call.value_dim > MOST_VALUES:
            most = f"key_dim {MOST_KEYS} and value_dim {MOST_VALUES}"
            reasons.append(f"has at most {most}, not {call.key_dim} and {call.value_dim}")
        if call.chunk_size is not None and call.chunk_size < CHUNKS[0]:
            reasons.append(f"chunks have at least {CHUNKS[0]} tokens, not {call.chunk_size}")
        if call.transformed:
            reasons.append("has no rule for torch.func transforms and forward-mode differentiation")
        broken = trouble(call.device)
        return reasons + ([broken] if broken else [])

    @property
    def cause(self) -> BaseException | None:
        """The exception that keeps Triton from running at all, or None."""
        return cause()

    def found(self, device: str) -> str | None:
        """Return a line on the Triton found, for people; None if it cannot be used."""
        return found(device)

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
        # The operators cost more time than a short call takes, and without gradients they are not needed.
        plain = type(q) is Tensor and not torch.compiler.is_compiling() and not call.needs_grad
        if call.in_place and state is not None:
            step = fused_step_now if plain else fused_step
            return step(q, k, v, log_decay, state, mask, call.scale, call.out_dtype), state
        run = fused_now if plain else fused
        options = (call.form == "parallel", call.causal, call.scale, call.chunk_size, call.return_state, call.out_dtype)
        out, final = run(q, k, v, log_decay, state, mask, cu_seqlens, *options)
        return out, final if call.return_state else None


backend = Triton()
