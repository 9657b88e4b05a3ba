"""A window of exact attention in front of retention, both divided by one sum of scores.

    out_n = (sum_{m in window} exp(s q_n.k_m) v_m + w_n sum_{m before} R_nm v_m) / (the same sums without v_m)

Here s is the scale, R_nm are the scores of retention and w_n is their learnt weight, exp(W x_n + b).

Source: Zhang et al. 2024, arXiv:2410.10254 (LoLCATs). Differs: the window slides by one token, and the weight of
    retention depends on the token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from retention.state import RetentionState, state_dtype

_NONE = -1  # the sequence number where there is no token


@dataclass(kw_only=True)
class WindowState(RetentionState):
    """The retention state of the tokens that have left the window, and the keys and values in the window.

    `time` counts the tokens of both.

    Shapes: keys (B, Hkv, W, K) and values (B, Hkv, W, V) of the last W tokens, newest last; kv and time as in
        `RetentionState`.
    """

    keys: Tensor
    values: Tensor


torch.serialization.add_safe_globals([WindowState])
torch.export.register_dataclass(WindowState, serialized_type_name="retention.WindowState")


@dataclass
class Span:
    """The keys and values of a call's T tokens, preceded by those of the last W tokens before them.

    Shapes: keys (B, Hkv, W + T, K); values (B, Hkv, W + T, V); sequence (B or 1, W + T), the number of the sequence to
        which each token belongs, or -1 where there is no token.
    """

    keys: Tensor
    values: Tensor
    sequence: Tensor
    window: int

    @property
    def length(self) -> int:
        """The number T of the call's own tokens."""
        return self.keys.shape[2] - self.window

    def leaving(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values that leave the window at each of the T tokens, and whether a token leaves at all.

        Returns: keys (B, Hkv, T, K), values (B, Hkv, T, V), and a bool mask (B or 1, T), False where no token leaves.
        """
        one, other = self.sequence[:, : self.length], self.sequence[:, self.window :]
        there = (one == other) & (one != _NONE)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length], there

    def state(self, rest: RetentionState) -> WindowState:
        """Return the `WindowState` after the last token.

        Args:
            rest: the retention state of the tokens that have left the window. If it is a `WindowState`, it was updated
                in place, and its keys and values are updated in place too.
        """
        keys, values = (x[:, :, self.length :] for x in (self.keys, self.values))
        if isinstance(rest, WindowState):
            rest.keys.copy_(keys)
            rest.values.copy_(values)
            return rest
        return WindowState(kv=rest.kv, time=rest.time, keys=keys.clone(), values=values.clone())


def span(
    k: Tensor, v: Tensor, window: int, mask: Tensor | None, cu_seqlens: Tensor | None, state: WindowState | None
) -> Span:
    """Build the `Span` of a call from its keys and values and the state before it.

    Shapes: k (B, Hkv, T, K); v (B, Hkv, T, V).
    Args:
        window: number of tokens W in the window.
        mask, cu_seqlens: as in `retain`; in each row, padding must come before the real tokens.
        state: the state after the tokens before, or None.
    """
    batch, length = k.shape[0], k.shape[2]
    index = torch.arange(length, device=k.device)
    if cu_seqlens is not None:
        own = torch.bucketize(index, cu_seqlens[1:], right=True)[None]
    elif mask is not None:
        own = torch.where(mask, 0, _NONE)
    else:
        own = torch.zeros_like(index)[None]
    if state is None:
        k, v = (F.pad(x, (0, 0, window, 0)) for x in (k, v))
        return Span(k, v, F.pad(own, (window, 0), value=_NONE), window)
    k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
    newest_first = torch.arange(window, 0, -1, device=k.device)
    before = torch.where(newest_first <= state.time[:, None], 0, _NONE)
    sequence = torch.cat([before, own.expand(batch, -1)], dim=1)
    if mask is None:
        return Span(k, v, sequence, window)
    order = real_last(sequence != _NONE)
    return Span(in_order(k, order), in_order(v, order), sequence.gather(1, order), window)


def real_last(mask: Tensor) -> Tensor:
    """Return the order (B, T) of tokens that puts the padding of each row first; mask is True for real tokens."""
    return mask.long().argsort(dim=1, stable=True)


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Return x (B, H, T, D) with its tokens in the order (B, T)."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def attend(q: Tensor, span: Span, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of each of the T tokens to the last W tokens, itself included.

    The queries run in blocks of W, each of which sees 2 W keys, so time and memory are O(T W).

    Shapes: q (B, H, T, K). Returns the output (B, H, T, V) and the logarithm of the sum of scores (B, H, T, 1).
    Dtypes: both results are in `state_dtype`, float32 at least.
    """
    window, length, kv_heads = span.window, span.length, span.keys.shape[1]
    block = min(window, length)
    missing = -length % block
    wide = state_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (F.pad(x.to(wide), (0, 0, 0, missing)) for x in (q, span.keys, span.values))
        q = rearrange(scale * q, "b (n g) (j c) k -> b n j (g c) k", n=kv_heads, c=block)
        k, v = (x.unfold(2, window + block, block) for x in (k, v))  # (B, Hkv, blocks, K or V, W + block)
        scores = rearrange(q @ k, "b n j (g c) l -> b n g j c l", c=block)
        scores = scores.masked_fill(~_seen(span, block, missing), -torch.inf)
        mass = scores.logsumexp(-1, keepdim=True)
        y = rearrange((scores - mass).exp(), "b n g j c l -> b n j (g c) l") @ v.mT
    y = rearrange(y, "b n j (g c) v -> b (n g) (j c) v", c=block)
    return y[:, :, :length], rearrange(mass, "b n g j c l -> b (n g) (j c) l")[:, :, :length]


def _seen(span: Span, block: int, missing: int) -> Tensor:
    """Tell which keys of its block each query sees, (B or 1, 1, 1, blocks, block, W + block)."""
    sequence = F.pad(span.sequence, (0, missing), value=_NONE)
    of_keys = sequence.unfold(1, span.window + block, block)
    of_queries = of_keys[:, :, span.window :]
    key = torch.arange(span.window + block, device=sequence.device)
    query = key[:block, None]
    near = (query < key) & (key <= query + span.window)
    return ((of_queries[..., None] == of_keys[..., None, :]) & near)[:, None, None]


def join(near: Tensor, mass: Tensor, rest: Tensor, total: Tensor, weight: Tensor) -> Tensor:
    """Combine the outputs of the window and of retention under one sum of scores.

        out = share near + (1 - share) rest,    share = exp(mass) / (exp(mass) + exp(weight) total)

    Shapes: near, rest (B, H, T, V); mass, total, weight (B, H, T, 1). Returns (B, H, T, V).
    Args:
        near: output of the window, divided by its own sum of scores.
        mass: logarithm of that sum.
        rest: output of retention, divided by its own sum of scores.
        total: that sum; 0 where no token has left the window.
        weight: logarithm of the factor of retention's scores.
    """
    total = total.to(mass.dtype)
    of_rest = total.clamp(min=torch.finfo(total.dtype).tiny).log().masked_fill(total <= 0, -torch.inf)
    share = torch.sigmoid(mass - of_rest - weight)
    return share * near + (1 - share) * rest
