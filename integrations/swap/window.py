"""Exact attention to the newest and the first tokens, beside retention of all others, under one sum of scores.

    out_n = (sum_{m exact} exp(s q_n.k_m) v_m + w_n sum_{m other} R_nm v_m) / (the same sums without v_m)

The exact tokens are those of the window, which are the last W tokens up to and including token n, and the sinks, which
are the first S tokens of the sequence. A token that leaves the window becomes a sink if it is one of the first S; else
retention takes it. Here s is the scale, R_nm are the scores of retention, and their learnt weight w_n = exp(W x_n + b).

Sources: Zhang et al. 2024, arXiv:2410.10254 (LoLCATs), for the window. Differs: it slides by one token, and the weight
    of retention depends on the token. Xiao et al. 2023, arXiv:2309.17453 (StreamingLLM), for the sinks. Differs: keys
    keep the positions that the host gave them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from retention.constants import traced
from retention.sharding import Shard
from retention.state import RetentionState, state_dtype

__all__ = ["Rows", "Tiles", "WindowState", "around_part", "in_order", "real_last", "rows", "score_of", "tiles"]

_NONE = -1e6  # score of a key that counts for nothing: finite, since it is multiplied by 0
_TILE = 64  # tokens of a tile of packed sequences without a window


@dataclass(kw_only=True)
class WindowState(RetentionState):
    """The keys and values of the sinks and of the window, and the retention state of all other tokens.

    `time` counts all tokens.

    Shapes: keys (B, Hkv, S + W, K) and values (B, Hkv, S + W, V) of the first S tokens, then of the last W tokens, both
        with the newest last; kv and time as in `RetentionState`.
    """

    keys: Tensor
    values: Tensor


torch.serialization.add_safe_globals([WindowState])
torch.export.register_dataclass(WindowState, serialized_type_name="retention.WindowState")


@dataclass
class Rows:
    """The keys and values of a call: in each row, the sinks, the W tokens before the call, and its T tokens.

    The W + T tokens of a row are adjacent in its sequence.

    Shapes: keys (B, Hkv, S + W + T, K); values (B, Hkv, S + W + T, V); first (B or 1,), the position in its sequence of
        the first of the W + T tokens; positions before the beginning of the sequence are negative.
    """

    keys: Tensor
    values: Tensor
    first: Tensor
    window: int
    sinks: int

    @property
    def length(self) -> int:
        """The number T of the call's own tokens."""
        return self.keys.shape[2] - self.sinks - self.window

    def leaving(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the token that leaves the window at each of the T tokens, and whether retention takes it.

        Returns: keys (B, Hkv, T, K), values (B, Hkv, T, V), and a bool mask (B or 1, T), False where no token leaves or
            a sink does.
        """
        part = slice(self.sinks, self.sinks + self.length)
        position = self.first[:, None] + torch.arange(self.length, device=self.first.device)
        return self.keys[:, :, part], self.values[:, :, part], position >= self.sinks

    def state(self, after: RetentionState) -> WindowState:
        """Return the `WindowState` after the last token.

        Args:
            after: the retention state of the tokens that retention took. If it is a `WindowState`, it was updated in
                place, and its keys and values are updated in place too.
        """
        return _with(after, *(self._kept(x) for x in (self.keys, self.values)))

    def _kept(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :, : self.sinks], x[:, :, self.sinks + self.length :]], dim=2)

    def attend(self, q: Tensor, scale: float, other: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax attention of each of the T tokens to its window, to the sinks that have left it, and to one more key.

        The scores of the further key are given; it stands for all other tokens. The queries run in blocks of W, each of
        which sees S + 2 W keys, so time and memory are O(T (S + W)).

        Shapes: q (B, H, T, K); other (B, H, T, 1), the score of the further key for each query, finite. Returns the
            output (B, H, T, V) without the part of the further key, and the share of that key, (B, H, T, 1).
        Dtypes: both results are in `state_dtype`, float32 at least.
        """
        length, kv_heads, wide = self.length, self.keys.shape[1], state_dtype(q.dtype)
        block, count = self._cut()
        group = q.shape[1] // kv_heads
        with torch.autocast(q.device.type, enabled=False):
            # A channel is added: it holds `other` in the queries, 1 in the further key and value, 0 in all others.
            q = _in_blocks(torch.cat([scale * q.to(wide), other.to(wide)], dim=-1), block, block, count)
            q = rearrange(q, "b (n g) j k c -> (b j) n (g c) k", n=kv_heads)
            k, v = (self._blocks(F.pad(x.to(wide), (0, 1)), block, count) for x in (self.keys, self.values))
            seen = self._seen(block, count).expand(k.shape[0] // count, -1, group, -1, -1)
            seen = rearrange(seen, "b j g c l -> (b j) 1 (g c) l")
            y = F.scaled_dot_product_attention(q, k, v, seen, scale=1.0)
        y = rearrange(y, "(b j) n (g c) v -> b (n g) (j c) v", j=count, c=block)
        if torch.compiler.is_exporting():  # for a slice, the program would compare lengths
            y = y[:, :, torch.arange(length, device=y.device)]
        y, share = y[:, :, :length].split([y.shape[-1] - 1, 1], dim=-1)
        return y, share

    def _cut(self) -> tuple[int, int]:
        """Return the size and the number of the blocks of queries. Without a window, one block sees the sinks.

        A program that is exported for all lengths has blocks of one size, and at least two of them.
        """
        exported = torch.compiler.is_exporting() and self.length > 1
        if not self.window or not exported:
            block = max(1, min(self.window or self.length, self.length))
            return block, max(1, -(-self.length // block)) if self.window else 1
        return self.window, (self.length + self.window - 1) // self.window + 1

    def _blocks(self, x: Tensor, block: int, count: int) -> Tensor:
        """The keys or values that each block of queries can see, and the further one, (B J, Hkv, S + W + block + 1, D).

        Shapes: x (B, Hkv, S + W + T, D), whose last channel is 0; J is `count`.
        """
        near = x[:, :, self.sinks :]
        if self.window:
            near = rearrange(_in_blocks(near, self.window + block, block, count), "b n j d l -> b j n l d")
        else:
            near = near[:, None, :, :0]
        first = x[:, None, :, : self.sinks].expand(-1, near.shape[1], -1, -1, -1)
        further = F.pad(x.new_zeros(x.shape[3] - 1), (0, 1), value=1.0).expand(*near.shape[:3], 1, -1)
        return torch.cat([first, near, further], dim=3).flatten(0, 1)

    def _seen(self, block: int, count: int) -> Tensor:
        """Tell which keys of its block each query sees, (B or 1, blocks, 1, block, S + W + block + 1)."""
        index = _places(block, block, count, self.first.device)
        leaves = self.first[:, None, None] + index  # the position of the token that leaves the window at each query
        seen = torch.arange(self.sinks, device=index.device) <= leaves[..., None]
        if self.window:
            key = torch.arange(self.window + block, device=index.device)
            query = key[:block, None]
            near = (query < key) & (key <= query + self.window)
            exists = leaves[..., :1] + key >= 0
            seen = torch.cat([seen, near & exists[..., None, :]], dim=-1)
        return F.pad(seen, (0, 1), value=True)[:, :, None]


@dataclass
class Tiles:
    """The keys and values of packed sequences, cut into tiles of C adjacent tokens; each tile is a row of `Rows`.

    Shapes: queries (M, C), the index among the T tokens of each token of the M tiles; places (T,), the index of each
        token among the M C tokens of the tiles; keys (N, Hkv, S + W, K) and values (N, Hkv, S + W, V) of the states
        after the N sequences.
    """

    rows: Rows
    queries: Tensor
    places: Tensor
    keys: Tensor
    values: Tensor

    def leaving(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `Rows.leaving`, with B = 1 and the T tokens of all sequences."""
        keys, values, taken = self.rows.leaving()
        return self._joined(keys), self._joined(values), taken.flatten()[self.places][None]

    def state(self, after: RetentionState) -> WindowState:
        """Return the states after the last tokens of the sequences; `after` is as in `Rows.state`."""
        return _with(after, self.keys, self.values)

    def attend(self, q: Tensor, scale: float, other: Tensor) -> tuple[Tensor, Tensor]:
        """As `Rows.attend`, for q (1, H, T, K) and other (1, H, T, 1)."""
        q, other = (x[0][:, self.queries].transpose(0, 1) for x in (q, other))
        y, share = self.rows.attend(q, scale, other)
        return self._joined(y), self._joined(share)

    def _joined(self, x: Tensor) -> Tensor:
        """Join the tokens of tiles x (M, H, C, D) into a row (1, H, T, D)."""
        return x.transpose(0, 1).flatten(1, 2)[None, :, self.places]


def rows(
    k: Tensor, v: Tensor, window: int, sinks: int, mask: Tensor | None = None, state: WindowState | None = None
) -> Rows:
    """Build the `Rows` of a call from its keys and values and the state before it.

    Shapes: k (B, Hkv, T, K); v (B, Hkv, T, V).
    Args:
        window, sinks: the numbers of tokens W and S; 0 for none.
        mask: as in `retain`; in each row, padding must come before the real tokens.
        state: the state after the tokens before, or None.
    """
    length, device = k.shape[2], k.device
    begin = torch.zeros(1, dtype=torch.long, device=device) if state is None else state.time
    end = begin + (length if mask is None else mask.sum(1))
    padding = (begin + length - end)[:, None]
    near = torch.arange(window + length, device=device)
    near = torch.where(near < window + padding, (near - padding).clamp(min=0), near)  # padding, then what is adjacent
    first = _first(sinks, begin, end, sinks + window + padding - begin[:, None])

    def build(x: Tensor, before: Tensor | None) -> Tensor:
        if before is None:
            before = x.new_zeros(*x.shape[:2], sinks + window, x.shape[3])
        whole = torch.cat([before, x], dim=2)
        last = whole[:, :, sinks:]
        last = last if mask is None or state is None else in_order(last, near)
        return torch.cat([in_order(whole, first), last], dim=2) if sinks else last

    keys, values = build(k, None if state is None else state.keys), build(v, None if state is None else state.values)
    return Rows(keys, values, end - (window + length), window, sinks)


def tiles(k: Tensor, v: Tensor, window: int, sinks: int, cu_seqlens: Tensor, state: WindowState | None = None) -> Tiles:
    """Build the `Tiles` of a call from its keys and values and the states before its sequences.

    Tiles have C = W tokens, or as many as the longest sequence if that is shorter. Time and memory of `Tiles.attend`
    are O((T + N C) (S + W)).

    Shapes: k (1, Hkv, T, K); v (1, Hkv, T, V).
    Args:
        window, sinks: the numbers of tokens W and S; 0 for none.
        cu_seqlens: (N + 1,), as in `retain`.
        state: the states after the tokens before, with N rows, or None.
    """
    length, count, kept, device = k.shape[2], cu_seqlens.shape[0] - 1, sinks + window, k.device
    start, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    size = max(1, min(window or _TILE, length if traced() else int(lengths.max())))
    sequence, offset, places = _cut(cu_seqlens.long(), length, size)
    begin = torch.zeros_like(lengths) if state is None else state.time
    each, last = torch.arange(count, device=device), torch.arange(-window, size, device=device)
    own = (count * kept + start)[
        :, None
    ]  # the indices of tokens among the kept ones of all states and those of the call

    def near(sequence: Tensor, offset: Tensor) -> Tensor:
        found = torch.where(offset < 0, (sequence[:, None] + 1) * kept, own[sequence]) + offset
        return found.clamp(max=count * kept + length - 1)

    in_tiles, in_windows = near(sequence, offset[:, None] + last), near(each, lengths[:, None] + last[:window])
    first = _first(sinks, begin, begin + lengths, own - begin[:, None], each[:, None] * kept)

    def build(x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        if before is None:
            before = x.new_zeros(count, x.shape[1], kept, x.shape[3])
        whole = torch.cat([before.transpose(0, 1).flatten(1, 2), x[0]], dim=1)  # (Hkv, N (S + W) + T, D)
        of_tiles = whole[:, torch.cat([first[sequence], in_tiles], dim=1)]
        after = whole[:, torch.cat([first, in_windows], dim=1)]
        return of_tiles.transpose(0, 1), after.transpose(0, 1)

    keys, keys_after = build(k, None if state is None else state.keys)
    values, values_after = build(v, None if state is None else state.values)
    cut = Rows(keys, values, begin[sequence] + offset - window, window, sinks)
    queries = (start[sequence] + offset)[:, None] + torch.arange(size, device=device)
    return Tiles(cut, queries.clamp(max=length - 1), places, keys_after, values_after)


def around_part(
    shard: Shard, k: Tensor, v: Tensor, window: int, sinks: int, mask: Tensor | None
) -> tuple[WindowState, WindowState]:
    """Return the sinks and the window before the own part of a sequence, and after the whole sequence, without kv.

    Each process gives its first S and its last W tokens to all others, at any length of its part.

    Shapes: k (B, Hkv, T, K); v (B, Hkv, T, V); mask (B, T), the padding before the real tokens.
    Args:
        shard: the own part.
        window, sinks: the numbers of tokens W and S; 0 for none.
    Raises: ValueError on all processes if a part is empty.
    """
    if 0 in shard.lengths:
        raise ValueError(f"with a window or sinks each part must have a token; got lengths {list(shard.lengths)}")
    length, device, size = k.shape[2], k.device, sinks + window
    counts = None if mask is None else mask.sum(1)
    own = torch.tensor([length], device=device) if counts is None else counts
    ends = shard.ends(counts, device)  # (parts, B or 1)
    starts = F.pad(ends, (0, 0, 1, 0))[:-1]
    edges = F.pad(torch.cat([k, v], dim=-1), (0, 0, window, sinks))
    first = window + length - own[:, None] + torch.arange(sinks, device=device)
    edges = torch.cat([in_order(edges, first), edges[:, :, length : length + window]], dim=2)
    edges = shard.gathered_with_gradient(edges).movedim(0, 2).flatten(2, 3)  # (B, Hkv, parts * (S + W), K + V)

    def state(time: Tensor) -> WindowState:
        """The sinks and the window after `time` tokens of the sequence, (B or 1,)."""
        time = time[:, None]
        position = torch.cat([torch.arange(sinks, device=device).expand(len(time), -1), time - window + last], dim=1)
        part = (ends[..., None] <= position).sum(0).clamp(max=len(ends) - 1)
        to_end, to_start = (x.mT.gather(1, part) for x in (ends, starts))
        place = torch.cat([(position - to_start)[:, :sinks], (size + position - to_end)[:, sinks:]], dim=1)
        there = (position >= 0) & (position < time)
        found = in_order(edges, part * size + place.clamp(0, size - 1))
        found = found.masked_fill(~there[:, None, :, None], 0)
        keys, values = found.split([k.shape[3], v.shape[3]], dim=3)
        return WindowState(kv=k.new_zeros(0), time=time[:, 0].expand(len(k)), keys=keys, values=values)

    last = torch.arange(window, device=device)
    return state(starts[shard.rank]), state(ends[-1])


def _cut(cu_seqlens: Tensor, length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut packed sequences into M tiles of `size` tokens, of which the last of each sequence may be shorter.

    Returns: the sequence of each tile and its offset there, both (M,), and the index of each token among the tokens of
        all tiles, (length,). M depends on shapes only; tiles that are too many have offsets beyond their sequence.
    """
    count = cu_seqlens.shape[0] - 1
    ends = cu_seqlens.diff().add(size - 1).div(size, rounding_mode="floor").cumsum(0)  # in tiles
    first = F.pad(ends, (1, 0))[:-1]
    tile = torch.arange((length + count * (size - 1)) // size, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tile, right=True).clamp(max=count - 1)
    token = torch.arange(length, device=cu_seqlens.device)
    of_token = torch.bucketize(token, cu_seqlens[1:], right=True)
    return sequence, (tile - first[sequence]) * size, first[of_token] * size + token - cu_seqlens[of_token]


def _first(sinks: int, begin: Tensor, end: Tensor, own: Tensor, old: Tensor | int = 0) -> Tensor:
    """Return the indices of the sinks after a call, (N, S).

    Args:
        begin, end: the numbers of tokens before and after the call, (N,); the sinks between come from the call.
        own, old: added to the index of a sink that comes from the call, and of any other, (N, 1).
    """
    index = torch.arange(sinks, device=begin.device)
    new = (begin[:, None] <= index) & (index < end[:, None])
    return index + torch.where(new, own, old)


def _with(after: RetentionState, keys: Tensor, values: Tensor) -> WindowState:
    if isinstance(after, WindowState):
        after.keys.copy_(keys)
        after.values.copy_(values)
        return after
    return WindowState(kv=after.kv, time=after.time, keys=keys, values=values)


def _in_blocks(x: Tensor, size: int, step: int, count: int) -> Tensor:
    """Cut x (B, H, T, D) into `count` blocks of `size` tokens, one every `step`, (B, H, count, D, size).

    What a block has beyond the last token is without meaning.
    """
    if count > 1 and torch.compiler.is_exporting():  # views would compare lengths
        return x[:, :, _places(size, step, count, x.device).clamp(max=x.shape[2] - 1)].mT
    x = F.pad(x, (0, 0, 0, (count - 1) * step + size - x.shape[2]))
    return x.mT[:, :, None] if count == 1 else x.unfold(2, size, step)


def _places(size: int, step: int, count: int, device: torch.device) -> Tensor:
    """Return the indices of the tokens of blocks as `_in_blocks` cuts them, (count, size)."""
    return torch.arange(count, device=device)[:, None] * step + torch.arange(size, device=device)


def real_last(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order (B, T) of tokens that puts the padding of each row first, and the place of each token in it.

    mask: (B, T), True for real tokens.
    """
    padding = ~mask
    places = torch.where(mask, padding.sum(1, keepdim=True) + mask.cumsum(1), padding.cumsum(1)) - 1
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(places)
    return torch.empty_like(places).scatter(1, places, index), places


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Return x (B, H, T, D) with its tokens in the order (B or 1, T)."""
    return x.gather(2, order[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3]))


def score_of(total: Tensor, weight: Tensor) -> Tensor:
    """Return log(exp(weight) total), the score of one key that stands for all tokens of retention.

    Shapes: both (B, H, T, 1).
    Args:
        total: the sum of the scores of retention; 0 where it has no token.
        weight: logarithm of the factor of these scores.
    """
    tiny = torch.finfo(total.dtype).tiny
    return total.clamp(min=tiny).log().masked_fill(total <= 0, _NONE) + weight
