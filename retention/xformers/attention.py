"""Softmax attention by xformers' `memory_efficient_attention` where it accepts a call, else by torch's SDPA.

Each call says which of the two ran it. The operators of xformers are asked with the tensors of the call; the version of
xformers decides nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ShapeError
from . import library
from .probe import attention_operators, expect, require, trouble

__all__ = ["SDPA", "Choice", "attend", "check", "choose", "why_not"]

SDPA = "sdpa"


class Choice(NamedTuple):
    """The code that runs a call.

    Attributes:
        label: "sdpa", or "xformers" and the name of its operator.
        why: the reason against xformers; empty if it is chosen.
    """

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
    """Return softmax(scale q k^T + mask) v, and the label of the code that ran it.

    Shapes: q (B, H, T, K); k (B, Hkv, S, K); v (B, Hkv, S, V), H a multiple of Hkv; mask broadcasts to (B, H, T, S).
        Returns out (B, H, T, V), which is (B, T, H, V) in memory if xformers ran.
    Dtypes: q, k and v alike, or cast by autocast; out as v.
    Args:
        causal: query n sees the keys up to n + S - T, as when the first S - T keys come from a cache; needs T <= S.
        scale: default 1 / sqrt(K).
        mask: bool, True = seen, or floats that are added to the scores; not with causal. For a query that sees no key
            the output is finite, and differs between xformers and SDPA.
        dropout: rate of dropout of the attention weights.
    Returns: the pair (out, label).
    Raises: ShapeError or ValueError for arguments that do not fit.
    Examples:
        >>> import torch
        >>> from retention.xformers.attention import attend
        >>> out, label = attend(*torch.ones(3, 1, 2, 4, 8, dtype=torch.float64), causal=True)
        >>> out.shape, label  # xformers has no operator for float64
        (torch.Size([1, 2, 4, 8]), 'sdpa')
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
    """Return which code would run this call of `attend`, and why xformers would not. Arguments and errors as there."""
    _check(q, k, v, causal, mask)
    q, k, v = _of_one_dtype(q, k, v)
    return _plan(q, k, v, causal, scale, mask, dropout)[0]


def check(device: str) -> None:
    """Check that the attention operators which take a plain call on `device` work. Raises: BackendError if not."""
    require("xformers' attention", device, _trial)


@functools.cache
def why_not(device: str) -> str | None:
    """Return the reason why xformers' attention cannot run any call on `device`; None if there is none."""
    broken = trouble(device, _trial)
    return broken if broken or attention_operators(device) else f"xformers has no attention operator for {device}"


def _plan(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, mask: Tensor | None, dropout: float
) -> tuple[Choice, Any]:
    """Return the choice, and the `Inputs` of xformers if it is chosen."""
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
    except NotImplementedError as refusal:  # its message has the reason of each operator
        return Choice(SDPA, str(refusal)), None


def _operator(inputs: Any) -> str:
    """Return the name of xformers' forward operator. Raises: NotImplementedError if one is missing, or its gradient."""
    fmha, learning = library.attention(), _learning(inputs.query, inputs.key, inputs.value)
    if learning:
        fmha._dispatch_bw(inputs, None)
    return fmha._dispatch_fw(inputs, learning).NAME


def _efficient(inputs: Any) -> Tensor:
    """Run xformers and return out (B, H, T, V)."""
    options = dict(attn_bias=inputs.attn_bias, p=inputs.p, scale=inputs.scale)
    out = library.attention().memory_efficient_attention(inputs.query, inputs.key, inputs.value, **options)
    return out.flatten(2, -2).transpose(1, 2)


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, mask: Tensor | None, dropout: float
) -> Any:
    """Return the call as the `Inputs` of xformers, with tensors (B, T, H, K).

    In inference without a mask, shared heads become a fifth dimension, (B, T, Hkv, H / Hkv, K). Otherwise they are
    copied, since fewer forward operators and no backward operator take five dimensions.
    """
    bias = _causal(q, k) if causal else None if mask is None else _aligned(mask, q, k)
    shared, learning = q.shape[1] // k.shape[1], _learning(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if shared > 1 and (learning or mask is not None):
        k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    elif shared > 1:
        q = q.unflatten(2, (-1, shared))
        k, v = (x[:, :, :, None].expand(-1, -1, -1, shared, -1) for x in (k, v))
    return library.attention().Inputs(q, k, v, attn_bias=bias, p=dropout, scale=scale)


def _causal(q: Tensor, k: Tensor) -> Any:
    if q.shape[2] == 1:
        return None
    masks = library.attention().attn_bias
    return masks.LowerTriangularMask() if q.shape[2] == k.shape[2] else masks.LowerTriangularFromBottomRightMask()


def _aligned(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return the mask as xformers takes it: added to the scores, (B, H, T, S) in q's dtype, rows aligned to 16 bytes.

    A pair that is not seen gets the least finite number, since a softmax over -inf alone is NaN.
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
    """Run torch's SDPA; a causal call with more keys than queries gets a mask."""
    length, keys = q.shape[2], k.shape[2]
    if causal and 1 < length < keys:  # torch's is_causal puts the first query at the first key
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    options: dict[str, Any] = dict(scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal and length == keys, **options)


def _learning(*tensors: Tensor) -> bool:
    """Return whether xformers stores tensors for the gradients, which it does in every grad mode."""
    return any(x.requires_grad for x in tensors)


def _of_one_dtype(*tensors: Tensor) -> Any:
    """Cast the tensors to the dtype of autocast, if it is on, since xformers does not know autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [x.to(torch.get_autocast_dtype(device)) for x in tensors]


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> None:
    """Check the shapes of a call. Raises: ShapeError or ValueError."""
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
    """Compare outputs and gradients with the formula, if an operator takes a plain call."""
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
