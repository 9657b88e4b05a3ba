"""A short window of exact attention, before which retention stands for the rest: under one sum of scores.

Source: Zhang et al. 2024, arXiv:2410.10254 (LoLCATs). Differs: the window slides by one token, and the weight of the
rest depends on the token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from retention.state import RetentionState, state_dtype

_NONE = -1  # the sequence of what is no token


@dataclass(kw_only=True)
class WindowState(RetentionState):
    """The state of what has left the window, and what is in it; `time` counts both.

    keys, values (B, Hkv, W, K or V): of the last W tokens, the newest last.
    """

    keys: Tensor
    values: Tensor


torch.serialization.add_safe_globals([WindowState])
torch.export.register_dataclass(WindowState, serialized_type_name="retention.WindowState")


@dataclass
class Span:
    """The tokens of a call, behind the last W before it.

    keys, values (B, Hkv, W + T, K or V); sequence (B or 1, W + T): the one that each token is of, -1 where none is.
    """

    keys: Tensor
    values: Tensor
    sequence: Tensor
    window: int

    @property
    def length(self) -> int:
        """T."""
        return self.keys.shape[2] - self.window

    def leaving(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the token that each of the T pushes out of its window, and whether there is one."""
        one, other = self.sequence[:, : self.length], self.sequence[:, self.window :]
        there = (one == other) & (one != _NONE)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length], there

    def state(self, rest: RetentionState) -> WindowState:
        """After the last token. rest: of those that were `leaving`; a `WindowState` was stepped in place, and is."""
        keys, values = (x[:, :, self.length :] for x in (self.keys, self.values))
        if isinstance(rest, WindowState):
            rest.keys.copy_(keys)
            rest.values.copy_(values)
            return rest
        return WindowState(kv=rest.kv, time=rest.time, keys=keys.clone(), values=values.clone())


def span(
    k: Tensor, v: Tensor, window: int, mask: Tensor | None, cu_seqlens: Tensor | None, state: WindowState | None
) -> Span:
    """k, v (B, Hkv, T, K or V). mask, cu_seqlens: as `retain`; what is masked comes before what is not."""
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
    """The order (B, T) in which padding comes first."""
    return mask.long().argsort(dim=1, stable=True)


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, T, D) with its tokens in the order (B, T)."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def attend(q: Tensor, span: Span, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each of the T tokens to the last W, itself among them.

    q (B, H, T, K). Returns (B, H, T, V) and the logarithm of the sum of the scores, (B, H, T, 1), both in
    `state_dtype`. In blocks of W queries, which see 2 W keys: O(T W) in time and memory.
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
    """Which of the keys of its block each query sees, (B or 1, 1, 1, blocks, block, W + block)."""
    sequence = F.pad(span.sequence, (0, missing), value=_NONE)
    of_keys = sequence.unfold(1, span.window + block, block)
    of_queries = of_keys[:, :, span.window :]
    key = torch.arange(span.window + block, device=sequence.device)
    query = key[:block, None]
    near = (query < key) & (key <= query + span.window)
    return ((of_queries[..., None] == of_keys[..., None, :]) & near)[:, None, None]


def join(near: Tensor, mass: Tensor, rest: Tensor, total: Tensor, weight: Tensor) -> Tensor:
    """What two parts gather under one sum of scores, (B, H, T, V), from what each gathers under its own.

    mass (B, H, T, 1): the logarithm of the sum of the scores of `near`; total: the sum of those of the rest, 0 if there
    is nothing; weight: the logarithm of what they are multiplied by.
    """
    total = total.to(mass.dtype)
    of_rest = total.clamp(min=torch.finfo(total.dtype).tiny).log().masked_fill(total <= 0, -torch.inf)
    share = torch.sigmoid(mass - of_rest - weight)
    return share * near + (1 - share) * rest
