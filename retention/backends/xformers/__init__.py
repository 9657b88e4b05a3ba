"""Retention on block-sparse matrices, multiplied by xformers (https://github.com/facebookresearch/xformers).

The chunkwise form computes the blocks on the diagonal and carries a state between them, so its cost is linear in the
length. The parallel form computes every block in which two tokens see each other, and may leave out blocks whose decay
is small.

xformers is imported at first use, and used only after a small test of its results and gradients on the device. The
functions used need no compiled library and run on every device.

Other parts of xformers, for the layers around retention, are in `retention.xformers`.
"""

from __future__ import annotations

from torch import Tensor

from ...call import Call
from ...xformers.probe import cause, found, trouble
from .blocks import SMALLEST
from .operator import block_sparse
from .trial import products

__all__ = ["XFormers", "backend"]


class XFormers:
    """The backend "xformers": the parallel and the chunkwise form; see `Backend`.

    To use an approximation, register it under a name of its own.

    Args:
        eps: the parallel form leaves out blocks in which no decay gamma^distance is above eps, at least 0 and below 1;
            0 is exact.
        block_size: tokens of a block, at least 16, and of a chunk unless the call gives chunk_size; default: the
            fastest size on CPU.
    Raises: ValueError that names the option.
    Examples:
        >>> import retention
        >>> from retention.backends.xformers import XFormers
        >>> retention.register("xformers-1e-4", XFormers(eps=1e-4))
    """

    def __init__(self, eps: float = 0.0, block_size: int | None = None):
        if not 0 <= eps < 1:
            raise ValueError(f"eps must be at least 0 and below 1, a decay that may be left out; got eps {eps!r}")
        if block_size is not None and block_size < SMALLEST:
            raise ValueError(f"block_size must be at least {SMALLEST}; got block_size {block_size!r}")
        self.eps, self.block_size = eps, block_size

    def why_not(self, call: Call) -> list[str]:
        reasons = []
        if call.form not in ("parallel", "chunkwise"):
            reasons.append(f"has the forms parallel and chunkwise, not {call.form}")
        if call.form == "chunkwise" and call.grid is not None:
            reasons.append("the chunkwise form has no decay on a grid; use parallel")
        if call.form == "parallel" and (call.has_state or call.return_state):
            reasons.append("the parallel form has no state; use chunkwise")
        if call.form == "chunkwise" and call.chunk_size is not None and call.chunk_size < SMALLEST:
            reasons.append(f"chunks have at least {SMALLEST} tokens, not {call.chunk_size}")
        if call.in_place:
            reasons.append("does not overwrite a state")
        if call.transformed:
            reasons.append("has no rule for torch.func transforms and forward-mode differentiation")
        broken = trouble("cpu" if call.device == "meta" else call.device, products)
        return reasons + ([broken] if broken else [])

    @property
    def cause(self) -> BaseException | None:
        """The exception that keeps xformers from running at all, or None."""
        return cause(products)

    def found(self, device: str) -> str | None:
        """Return a line on the xformers found, for people; None if it cannot be used."""
        return None if trouble(device, products) else found(device)

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
        options = (call.form, self._size(call), call.scale, call.causal, call.grid or (), self.eps, call.return_state)
        out, final = block_sparse(q, k, v, log_decay, state, mask, cu_seqlens, *options, call.out_dtype)
        return out, final if call.return_state else None

    def _size(self, call: Call) -> int:
        """Return the tokens of a block; `python -m benchmarks xformers --blocks` measures the default sizes."""
        if call.form == "chunkwise" and call.chunk_size is not None:
            return call.chunk_size
        whole = call.form == "parallel" and not (call.packed or call.masked)
        return self.block_size or ((128 if self.eps else 256) if whole else 64)


backend = XFormers()
