"""Softmax attention for what stays attention: xformers' `memory_efficient_attention` where it takes a call, else SDPA.

Which of the two is said for each call. xformers is asked with the very tensors of the call, by what its operators say
they take; its version says nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ShapeError
from .probe import attention_operators, expect, require, trouble

SDPA = "sdpa"


class Choice(NamedTuple):
    """label: "sdpa", or "xformers" and its operator. why: what stands against xformers, if it is not."""

    label: str
    why: str = ""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, str]:
    """softmax(scale q kᵀ + mask) v, and what has run it: the label of `choose`.

    Shapes: q (B, H, T, K); k (B, Hkv, S, K); v (B, Hkv, S, V), H a multiple of Hkv; out (B, H, T, V), in memory
        (B, T, H, V) if xformers ran.
    causal: the last query stands at the last key, as when the first keys come from a cache. scale: default 1 / sqrt(K).
    mask: broadcast to (B, H, T, S), bool, True = seen, or added to the scores; not with causal. A query that sees
        nothing gathers something finite, not the same from both.
    Raises: ShapeError or ValueError if the arguments do not fit.
    """
    _check(q, k, v, causal, mask)
    q, k, v = _of_one_dtype(q, k, v)
    choice, inputs = _plan(q, k, v, causal, scale, mask, dropout)
    if inputs is None:
        return _sdpa(q, k, v, causal, scale, mask, dropout), choice.label
    return _efficient(inputs), choice.label


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Choice:
    """What would run this call of `attend`, and why not xformers. Arguments and errors as there."""
    _check(q, k, v, causal, mask)
    q, k, v = _of_one_dtype(q, k, v)
    return _plan(q, k, v, causal, scale, mask, dropout)[0]


def check(device: str) -> None:
    """Raises: BackendError, from its cause, if xformers' attention cannot be asked. To have no operator is no error."""
    require("xformers' attention", device, _trial)


@functools.cache
def why_not(device: str) -> str | None:
    """What keeps xformers' attention from being asked at all on a device; None if nothing does."""
    broken = trouble(device, _trial)
    return broken if broken or attention_operators(device) else f"xformers has no attention operator for {device}"


def _plan(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, mask: Tensor | None, dropout: float
) -> tuple[Choice, Any]:
    """The choice, and xformers' `Inputs` if it is xformers."""
    if torch.compiler.is_compiling():
        return Choice(SDPA, "torch.compile cannot see through xformers' choice of an operator"), None
    if q.dtype == torch.float64:
        return Choice(SDPA, "xformers has no operator for torch.float64"), None
    if mask is not None and mask.requires_grad:
        return Choice(SDPA, "the mask needs a gradient"), None
    broken = why_not(str(q.device))
    if broken:
        return Choice(SDPA, broken), None
    inputs = _inputs(q, k, v, causal, scale, mask, dropout)
    try:
        return Choice(f"xformers {_operator(inputs)}"), inputs
    except NotImplementedError as refusal:  # which says why, for each operator
        return Choice(SDPA, str(refusal)), None


def _operator(inputs: Any) -> str:
    """The name of the one that xformers takes forward. Raises: NotImplementedError if it has none, there or back."""
    from xformers.ops import fmha

    learning = _learning(inputs.query, inputs.key, inputs.value)
    if learning:
        fmha._dispatch_bw(inputs, None)
    return fmha._dispatch_fw(inputs, learning).NAME


def _efficient(inputs: Any) -> Tensor:
    """(B, H, T, V)."""
    from xformers.ops import fmha

    options = dict(attn_bias=inputs.attn_bias, p=inputs.p, scale=inputs.scale)
    out = fmha.memory_efficient_attention(inputs.query, inputs.key, inputs.value, **options)
    return out.flatten(2, -2).transpose(1, 2)


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, mask: Tensor | None, dropout: float
) -> Any:
    """The call as xformers takes it, (B, T, H, K).

    Shared heads are a fifth dimension, (B, T, Hkv, H / Hkv, K), in inference without a mask; else they are copied:
    fewer operators, and none backward, have five.
    """
    from xformers.ops import fmha

    bias = _causal(q, k) if causal else None if mask is None else _aligned(mask, q, k)
    shared, learning = q.shape[1] // k.shape[1], _learning(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if shared > 1 and (learning or mask is not None):
        k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    elif shared > 1:
        q = q.unflatten(2, (-1, shared))
        k, v = (x[:, :, :, None].expand(-1, -1, -1, shared, -1) for x in (k, v))
    return fmha.Inputs(q, k, v, attn_bias=bias, p=dropout, scale=scale)


def _causal(q: Tensor, k: Tensor) -> Any:
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask, LowerTriangularMask

    if q.shape[2] == 1:
        return None
    return LowerTriangularMask() if q.shape[2] == k.shape[2] else LowerTriangularFromBottomRightMask()


def _aligned(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as xformers takes it: added, in q's dtype, (B, H, T, S), rows that begin at multiples of 16 bytes.

    What is not seen is the least number and not -inf, of which a softmax over nothing makes NaN.
    """
    length, keys = q.shape[2], k.shape[2]
    mask = mask.expand(*mask.shape[:-2], length, keys)
    bias = q.new_zeros(*mask.shape[:-1], -(-keys // 8) * 8)[..., :keys]
    least = torch.finfo(q.dtype).min
    bias.masked_fill_(~mask, least) if mask.dtype == torch.bool else bias.copy_(mask.clamp(min=least))
    return bias.expand(q.shape[0], q.shape[1], length, keys)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, mask: Tensor | None, dropout: float
) -> Tensor:
    length, keys = q.shape[2], k.shape[2]
    if causal and 1 < length < keys:  # torch's is_causal puts the first query at the first key
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    options: dict[str, Any] = dict(scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal and length == keys, **options)


def _learning(*tensors: Tensor) -> bool:
    """Whether xformers keeps what the gradients need; it does not look at the grad mode."""
    return any(x.requires_grad for x in tensors)


def _of_one_dtype(*tensors: Tensor) -> Any:
    """As autocast makes them for torch's attention: xformers' it does not know."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [x.to(torch.get_autocast_dtype(device)) for x in tensors]


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape[:3] != v.shape[:3] or q.shape[1] % k.shape[1]:
        raise ShapeError(
            "q, k, v must be (batch, heads, length, head_dim), k and v alike but for head_dim, with heads that divide "
            f"those of q; {shapes}"
        )
    if causal and q.shape[2] > k.shape[2]:
        raise ShapeError(f"causal attention must have at least as many keys as queries; {shapes}")
    if causal and mask is not None:
        raise ValueError("mask and causal exclude each other; got both; leave causal out if the mask holds it")


def _trial(device: str) -> None:
    """If it takes a plain call: the output and its gradients, against the formula."""
    if not attention_operators(device):
        return
    x = torch.arange(3 * 32 * 2 * 64.0, device=device).sin().view(3, 1, 2, 32, 64)
    q, k, v = (z.half().requires_grad_() for z in x)
    inputs = _inputs(q, k, v, True, None, None, 0.0)
    exact = [z.detach().double().requires_grad_() for z in (q, k, v)]
    seen = torch.ones(32, 32, dtype=torch.bool, device=device).tril()
    want = ((exact[0] @ exact[1].mT) / 8).masked_fill(~seen, -torch.inf).softmax(-1) @ exact[2]
    got = _efficient(inputs)
    grads = (torch.autograd.grad(y.sum(), z) for y, z in ((got, (q, k, v)), (want, exact)))
    found, wanted = ((y.double(), *(g.double() for g in each)) for y, each in zip((got, want), grads, strict=True))
    expect("its attention, or its gradient, is wrong", found, wanted, within=1e-2)
