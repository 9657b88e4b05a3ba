"""One sequence in parts, each on one process: how the states of the parts are joined.

Each process computes its part of the sequence from a zero state. A state is linear in what came before, so the states
of all parts are joined in closed form, with one exchange of H * K * V numbers per process, at any length:

    S_r = sum_{s < r} gamma^(tokens between parts s and r) M_s
    out_n = (retention inside the part) + scale gamma^(tokens of part r up to n) q_n S_r

M_s is the state after part s alone and S_r the state before part r. Retention that looks both ways adds the same with
time reversed. The backward pass mirrors this: the gradients of the S_r are exchanged, and their sum, with the same
weights, is the gradient of M_s. Either exchange runs while the backend computes the part itself.

`retention.distributed.context_parallel` sets the active `Shard`, which `retention.functional` and `retention.times` ask
for.
Source: Sun et al. 2025, arXiv:2502.07563 (LASP-2), one all-gather of states. Differs: the decay, padding, borders of
    packed sequences, both directions, and parts of different lengths.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .call import Call, Inputs
from .errors import ShapeError
from .scores import repeated_heads
from .state import state_dtype

__all__ = ["Shard", "activate", "active", "alone", "check_part", "in_parts", "refuse", "token_indices", "whole_length"]

_TOKENS_AT_ONCE = 4096  # tokens whose scaled keys or queries exist at once
_NEVER = -1  # the exponent of a weight of 0

_active: Shard | None = None


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of a sequence that this process holds.

    Attributes:
        lengths: the number of tokens of each part, in the order of the sequence, padding included.
        rank: the index of the part of this process.
        group: the processes, one for each part.
        tolerance: where gamma^length of every part is at most this, only neighbours exchange states.
    """

    lengths: tuple[int, ...]
    rank: int
    group: Any
    tolerance: float = 0.0

    @property
    def length(self) -> int:
        """The number of tokens of the own part."""
        return self.lengths[self.rank]

    @property
    def start(self) -> int:
        """The index of the first token of the own part in the sequence."""
        return sum(self.lengths[: self.rank])

    @property
    def total(self) -> int:
        """The number of tokens of the sequence."""
        return sum(self.lengths)

    def check_length(self, length: int) -> None:
        """Check that a call has the tokens of the own part. Raises: ShapeError if not."""
        if length != self.length:
            raise ShapeError(
                "inside context_parallel each call has the tokens of its own part, with the lengths "
                f"{list(self.lengths)} on ranks 0 to {len(self.lengths) - 1}; got length {length} on rank {self.rank}; "
                "enter a new context for another sequence"
            )

    def gathered(self, x: Tensor) -> Tensor:
        """Return x of all processes, (parts, *x.shape)."""
        return _Exchange.of_all(self, x).wait()

    def gathered_with_gradient(self, x: Tensor) -> Tensor:
        """Return x of all processes, (parts, *x.shape), through which gradients come back from all of them."""
        return _Gather.apply(x, self)

    def ends(self, counts: Tensor | None, device: torch.device) -> Tensor:
        """Return the number of real tokens up to the end of each part, (parts, B or 1).

        counts: the number of real tokens of the own part, (B,), if it has padding; all parts have it then.
        """
        if counts is None:
            return torch.tensor(self.lengths, device=device)[:, None].cumsum(0)
        return self.gathered(counts).cumsum(0)

    def local_borders(self, cu_seqlens: Tensor) -> Tensor:
        """Return the borders (N + 1,) of the sequence inside the own part; sequences outside of it get length 0."""
        return (cu_seqlens - self.start).clamp(0, self.length)


def active() -> Shard | None:
    """Return the part of this process inside of `context_parallel`; None outside.

    It is one for all threads, since autograd may run checkpointed forwards in a thread of its own.
    """
    return _active


def activate(shard: Shard | None) -> Shard | None:
    """Make `shard` the active one and return the one before."""
    global _active
    before, _active = _active, shard
    return before


def whole_length(length: int) -> int:
    """Return the length of the sequence of which a call has `length` tokens."""
    return length if _active is None else _active.total


def token_indices(length: int, device: torch.device) -> Tensor:
    """Return the index in its sequence of each token of a call, (length,)."""
    start = 0 if _active is None else _active.start
    return torch.arange(start, start + length, device=device)


def refuse(what: str, instead: str) -> None:
    """Refuse `what` where a sequence is in parts. Raises: ValueError inside of `context_parallel`."""
    if _active is not None:
        raise ValueError(f"{what} has no meaning for a sequence in parts, inside context_parallel; {instead}")


def check_part(call: Call, absolute: bool) -> None:
    """Check that a call can be a part of a sequence. Raises: ShapeError or ValueError, before any communication."""
    if _active is None:
        return
    _active.check_length(call.length)
    if call.grid is not None:
        refuse(f"a grid {call.grid}", "split the batch of images instead")
    if absolute:
        refuse("score_norm 'absolute', which needs all scores,", "use score_norm=True")
    if call.packed and (call.has_state or call.return_state):
        refuse("a state of packed sequences", "leave state, return_state or cu_seqlens out")
    if call.transformed:
        refuse("a transform of torch.func", "use torch.autograd")


def alone(call: Call) -> Call:
    """Return the call of a part from a zero state, as the backend runs it."""
    return call._replace(has_state=False, return_state=False)


def in_parts(
    shard: Shard,
    call: Call,
    inputs: Inputs,
    run: Callable[[Tensor, None], tuple[Tensor, Any]],
    sums: list[tuple[Tensor, Tensor | None]],
) -> list[tuple[Tensor, Tensor | None]]:
    """Compute retention of the own part with the whole sequence, for each of `sums`.

    Args:
        call, inputs: as in `retain`; cu_seqlens holds the borders of the whole sequence.
        run: computes the retention (B, H, T, V) of the part alone with the values of a sum, from no state.
        sums: values (B, Hkv, T, V), and the state (B, H, K, V) before the whole sequence, the same on all processes, or
            None.
    Returns: for each sum, the output (B, H, T, V) in `state_dtype`, and the state after the whole sequence if
        call.return_state, else None.
    Raises: ValueError on all processes if they ask for different options or sizes.
    """
    with torch.autocast(call.device, enabled=False):
        q, k, log_decay = inputs.q, inputs.k, inputs.log_decay.to(state_dtype(call.dtype))
        values, before = [v for v, _ in sums], [state for _, state in sums if state is not None]
        sizes = [v.shape[3] for v in values]
        places = _places(shard, call, inputs)
        joined = values[0] if len(values) == 1 else torch.cat(values, 3)
        mine = torch.stack([_Write.apply(k, joined, log_decay, *places.to_last)])
        if not call.causal:
            mine = torch.cat([mine, _Write.apply(k, joined, log_decay, *places.from_first)[None]])

        join = _Join(shard, call, places, log_decay, mine)
        parts = _Begin.apply(mine, join)
        outs = [run(v, None)[0] for v in values]  # while the states travel
        found = _Finish.apply(parts, log_decay, torch.cat(before, 3) if before else None, join)
        states = [list(state.split(sizes, 3)) for state in found]
        final = states.pop() if call.return_state else [None] * len(values)

        for of_values, (exponents, partial) in zip(states, (places.from_first, places.to_last), strict=False):
            exponents = torch.where(exponents < 0, _NEVER, exponents + 1)
            options = (log_decay, exponents, partial, call.scale, not call.needs_grad)
            outs = [_Read.apply(out, q, state, *options) for out, state in zip(outs, of_values, strict=True)]
    return list(zip(outs, final, strict=True))


@dataclass
class _Places:
    """Where the tokens of the own part and the parts themselves lie.

    A pair of exponents is (B or 1, T) int64, _NEVER where a token takes no part, and whether any is _NEVER.

    Attributes:
        from_first: the number of tokens from the first token of the part, in whose sequence the token is.
        to_last: the number of tokens to the last token of the part, in whose sequence the token is.
        counts: the number of real tokens of the own part, (B or 1,) int64.
        first, last: with cu_seqlens, the number of the sequence of the first and the last token of each part.
    """

    from_first: tuple[Tensor, bool]
    to_last: tuple[Tensor, bool]
    counts: Tensor
    first: Tensor | None = None
    last: Tensor | None = None


def _places(shard: Shard, call: Call, inputs: Inputs) -> _Places:
    mask, cu_seqlens, device = inputs.mask, inputs.cu_seqlens, inputs.q.device
    if mask is not None:
        age = mask.cumsum(1)
        count = mask.sum(1)
        return _Places(
            (torch.where(mask, age - 1, _NEVER), True),
            (torch.where(mask, count[:, None] - age, _NEVER), True),
            count,
        )
    index = torch.arange(call.length, device=device)[None]
    count = index.new_tensor([call.length])
    if cu_seqlens is None:
        return _Places((index, False), (call.length - 1 - index, False), count)
    ends, borders = shard.ends(None, device)[:, 0], cu_seqlens[1:]
    last = torch.searchsorted(borders, ends - 1, right=True)
    first = torch.searchsorted(borders, F.pad(ends, (1, 0))[:-1], right=True)
    own = torch.searchsorted(borders, token_indices(call.length, device), right=True)
    return _Places(
        (torch.where(own == first[shard.rank], index, _NEVER), True),
        (torch.where(own == last[shard.rank], call.length - 1 - index, _NEVER), True),
        count,
        first,
        last,
    )


class _Exchange:
    """Tensors of other processes, while they travel.

    Attributes:
        sources: the ranks from which they come, in order.
        buffer: (sources, *shape); its contents are there after `wait`.
    """

    def __init__(self, sources: range | list[int], buffer: Tensor, works: list[Any], sent: Tensor):
        self.sources, self.buffer, self.works = sources, buffer, works
        self.sent = sent  # must live until it has been sent

    @classmethod
    def of_all(cls, shard: Shard, x: Tensor) -> _Exchange:
        """Start to gather x from all processes."""
        x, size = x.detach().contiguous(), len(shard.lengths)
        buffer = x.new_empty(size, *x.shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name in newer releases
        work = gather(buffer.view(-1), x.view(-1), group=shard.group, async_op=True)
        return cls(range(size), buffer, [work], x)

    @classmethod
    def of_neighbours(cls, shard: Shard, x: Tensor, sources: list[int], targets: list[int]) -> _Exchange:
        """Start to send x to the ranks `targets` and to receive that of the ranks `sources`."""
        x = x.detach().contiguous()
        buffer = x.new_empty(len(sources), *x.shape)
        operations = [dist.P2POp(dist.irecv, buffer[i], group=shard.group, group_peer=s) for i, s in enumerate(sources)]
        operations += [dist.P2POp(dist.isend, x, group=shard.group, group_peer=t) for t in targets]
        return cls(sources, buffer, dist.batch_isend_irecv(operations) if operations else [], x)

    def wait(self) -> Tensor:
        """Wait until all tensors are there, and return the buffer."""
        for work in self.works:
            work.wait()
        self.works = []
        return self.buffer


class _Join:
    """One exchange of states, forward and backward, and the weights with which states are added.

    Shapes: mine (D, B, H, K, V), the states that the own part makes from zero, D = 1, or 2 without causality: after its
        last token, and before its first token with time reversed.
    Attributes:
        ends, starts: (parts, B or 1) int64, the number of real tokens up to the end and before the start of each part.
    """

    ends: Tensor
    starts: Tensor

    def __init__(self, shard: Shard, call: Call, places: _Places, log_decay: Tensor, mine: Tensor):
        self.shard, self.call, self.places, self.shape = shard, call, places, mine.shape
        self.log_decay = log_decay.detach()
        self.near = self._only_neighbours()
        self.travelling: _Exchange | None = None

    def _only_neighbours(self) -> bool:
        """Return whether gamma^length of each inner part is at most the tolerance, as all processes find alike."""
        inner, tolerance = self.shard.lengths[1:-1], self.shard.tolerance
        if not tolerance or not inner or self.call.masked or self.call.return_state:
            return False
        return bool((self.log_decay.max() * min(inner)).exp() <= tolerance)

    def start(self, mine: Tensor) -> Tensor:
        """Send the own states and return the buffer for those of the others."""
        flat = torch.cat([self._header().view(mine.dtype), mine.detach().flatten()])
        self.travelling = self._exchange(flat, onward=True, backward=not self.call.causal)
        return self.travelling.buffer

    def finish(self) -> tuple[Tensor, list[int]]:
        """Return the states (sources, D, B, H, K, V) of other parts, once they are there, and the ranks of these."""
        flat, sources = self._arrived()
        header = self._header()
        words = header.view(flat.dtype).numel()
        headers = flat[:, :words].contiguous().view(torch.long)
        self._check(headers[:, 0], header[0], sources)
        # Neighbours alone know no counts of other parts, but then no part has padding.
        self.ends = headers[:, 1:].cumsum(0) if self.call.masked else self.shard.ends(None, flat.device)
        self.starts = F.pad(self.ends, (0, 0, 1, 0))[:-1]
        return flat[:, words:].view(-1, *self.shape), sources

    def start_back(self, gradients: Tensor) -> None:
        """Send the gradients (S, B, H, K, V) of the S states that this process read."""
        self.travelling = self._exchange(gradients, onward=not self.call.causal, backward=True)

    def finish_back(self) -> tuple[Tensor, list[int]]:
        """Return the gradients (sources, S, B, H, K, V) of other parts, once they are there, and the ranks of these."""
        return self._arrived()

    def between(self, rank: int, ranks: list[int], *, later: bool) -> tuple[slice, Tensor]:
        """Return which of `ranks` are before `rank`, or after it if `later`, and the tokens between, (ranks, B or 1).

        The number is _NEVER if a sequence ends between the two parts.
        """
        place = sum(other <= rank if later else other < rank for other in ranks)
        there = slice(place, None) if later else slice(place)
        first, second = ([rank], ranks[there]) if later else (ranks[there], [rank])
        between = self.starts[second] - self.ends[first]
        if self.places.first is not None and self.places.last is not None:
            one = self.places.last[first] == self.places.first[second]
            between = torch.where(one[:, None], between, _NEVER)
        return there, between

    def weights(self, distance: Tensor) -> Tensor:
        """Return gamma^distance (..., H) for a distance (...), 0 where it is _NEVER."""
        return _decayed(self.log_decay, distance[..., None])

    def _exchange(self, x: Tensor, onward: bool, backward: bool) -> _Exchange:
        if not self.near:
            return _Exchange.of_all(self.shard, x)
        left, right = self.shard.rank - 1, self.shard.rank + 1
        left_there, right_there = left >= 0, right < len(self.shard.lengths)
        sources = [left] * (onward and left_there) + [right] * (backward and right_there)
        targets = [right] * (onward and right_there) + [left] * (backward and left_there)
        return _Exchange.of_neighbours(self.shard, x, sources, targets)

    def _arrived(self) -> tuple[Tensor, list[int]]:
        assert self.travelling is not None
        travelling, self.travelling = self.travelling, None  # the buffer refers to this object through its gradient
        return travelling.wait(), list(travelling.sources)

    def _header(self) -> Tensor:
        """Return what must agree on all processes, as one number, and the number of real tokens of each row."""
        asked = self.call._replace(length=0, kv_heads=0, form="", chunk_size=None)
        digest = zlib.crc32(repr((asked, self.shape)).encode())
        counts = self.places.counts.expand(self.call.batch)
        return torch.cat([torch.full_like(counts[:1] if len(counts) else counts.new_zeros(1), digest), counts])

    def _check(self, found: Tensor, own: Tensor, sources: list[int]) -> None:
        agree = (found == own).all()
        message = f"all ranks must ask for the same inside context_parallel; rank {self.shard.rank} calls {self.call}"
        if found.device.type != "cpu":
            torch._assert_async(agree, f"{message}, another rank something else")
        elif not agree:
            others = [source for source, x in zip(sources, found.tolist(), strict=True) if x != own.item()]
            raise ValueError(f"{message}, ranks {others} something else")


class _Begin(torch.autograd.Function):
    """Send the own states (D, B, H, K, V) and return the buffer for those of the others, which is filled later."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, join: _Join) -> Tensor:
        ctx.join = join
        return join.start(mine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        """Add up the gradients of all states that were made from the own ones."""
        join: _Join = ctx.join
        gradients, ranks = join.finish_back()  # (targets, S, B, H, K, V)
        rank, own = join.shard.rank, []
        for d in range(join.shape[0]):
            there, between = join.between(rank, ranks, later=d == 0)
            own.append(_sum(join.weights(between), gradients[there, d]))
        if join.call.return_state:
            weight = join.weights(join.ends[-1:] - join.ends[[rank]])
            own[0] = own[0] + _sum(weight.expand(len(ranks), -1, -1), gradients[:, -1])
        return torch.stack(own), None


class _Finish(torch.autograd.Function):
    """Wait for the states of the other parts and add them up.

    Returns: (S, B, H, K, V): the state before the own part; without causality also that after it, with time reversed;
        with call.return_state also the state after the whole sequence.
    """

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, log_decay: Tensor, state: Tensor | None, join: _Join) -> Tensor:
        ctx.join, ctx.buffer = join, (buffer.shape, buffer.dtype)
        parts, ranks = join.finish()
        rank, terms = join.shard.rank, []
        for d in range(join.shape[0]):
            there, between = join.between(rank, ranks, later=d == 1)
            terms.append((between, parts[there, d]))
        if join.call.return_state:
            terms.append((join.ends[-1:] - join.ends, parts[:, 0]))
        if state is not None:  # it comes before the first part
            ends = [join.starts[[rank]], join.ends[-1:]]
            terms = [
                (torch.cat([a, end]), torch.cat([x, state[None]])) for (a, x), end in zip(terms, ends, strict=False)
            ]
        weighed = [(join.weights(distance), distance, x) for distance, x in terms]
        slopes = [_sum(w * distance[..., None], x) for w, distance, x in weighed if ctx.needs_input_grad[1]]
        ctx.save_for_backward(torch.stack(slopes) if slopes else None)  # the derivative by log(gamma)
        return torch.stack([_sum(w, x) for w, _, x in weighed])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Send the gradients on their way; `_Begin` collects those of the others."""
        join: _Join = ctx.join
        join.start_back(gradients)
        (slopes,) = ctx.saved_tensors
        ddecay = dstate = None
        if slopes is not None:
            ddecay = (slopes * gradients).sum((0, 1, 3, 4))
        if ctx.needs_input_grad[2]:
            dstate = join.weights(join.starts[join.shard.rank])[..., None, None] * gradients[0]
            if join.call.return_state:
                dstate = dstate + join.weights(join.ends[-1])[..., None, None] * gradients[-1]
        shape, dtype = ctx.buffer
        return gradients.new_zeros((), dtype=dtype).expand(shape), ddecay, dstate, None


class _Gather(torch.autograd.Function):
    """x of all processes, (parts, *x.shape)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return shard.gathered(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.shard.group)
        return total[ctx.shard.rank], None


class _Write(torch.autograd.Function):
    """The state of keys and values, sum_m gamma^e_m k_m v_m^T, (B, H, K, V), for exponents e (B or 1, T)."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, log_decay: Tensor, exponents: Tensor, partial: bool) -> Tensor:
        ctx.save_for_backward(k, v, log_decay, exponents)
        ctx.partial = partial
        state = log_decay.new_zeros(k.shape[0], len(log_decay), k.shape[3], v.shape[3])
        for at in _blocks(k.shape[2]):
            k_i, v_i, weight = _block(at, k, v, log_decay, exponents, partial)
            state += (k_i * weight).mT @ v_i
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstate: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_decay, exponents = ctx.saved_tensors
        dk, dv, ddecay = torch.empty_like(k), torch.empty_like(v), torch.zeros_like(log_decay)
        for at in _blocks(k.shape[2]):
            k_i, v_i, weight = _block(at, k, v, log_decay, exponents, ctx.partial)
            dk_i = weight * (v_i @ dstate.mT)
            if ctx.needs_input_grad[2]:
                ddecay += (exponents[:, None, at] * (k_i * dk_i).sum(-1)).sum((0, 2))
            dk[:, :, at] = _by_kv_heads(dk_i, k.shape[1])
            dv[:, :, at] = _by_kv_heads((k_i * weight) @ dstate, v.shape[1])
        return dk, dv, ddecay, None, None


class _Read(torch.autograd.Function):
    """Add what the queries read from a state, out_n + scale gamma^e_n q_n S, for exponents e (B or 1, T)."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        q: Tensor,
        state: Tensor,
        log_decay: Tensor,
        exponents: Tensor,
        partial: bool,
        scale: float,
        in_place: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, state, log_decay, exponents)
        ctx.options = partial, scale
        if in_place:
            ctx.mark_dirty(out)
        else:
            out = out.clone()
        for at in _blocks(q.shape[2]):
            q_i, _, weight = _block(at, q, q, log_decay, exponents, partial)
            out[:, :, at] += (scale * weight * q_i) @ state
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, state, log_decay, exponents = ctx.saved_tensors
        partial, scale = ctx.options
        dq, dstate, ddecay = torch.empty_like(q), torch.zeros_like(state), torch.zeros_like(log_decay)
        for at in _blocks(q.shape[2]):
            q_i, _, weight = _block(at, q, q, log_decay, exponents, partial)
            dq_i = scale * weight * (dout[:, :, at] @ state.mT)
            dstate += (scale * weight * q_i).mT @ dout[:, :, at]
            if ctx.needs_input_grad[3]:
                ddecay += (exponents[:, None, at] * (q_i * dq_i).sum(-1)).sum((0, 2))
            dq[:, :, at] = dq_i
        return dout, dq, dstate, ddecay, None, None, None, None


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, start + _TOKENS_AT_ONCE) for start in range(0, length, _TOKENS_AT_ONCE))


def _block(
    at: slice, x: Tensor, y: Tensor, log_decay: Tensor, exponents: Tensor, partial: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return some tokens of x and y with all heads, in the dtype of the sums, and their weights (B or 1, H, n, 1)."""
    exponents, wide = exponents[:, at], log_decay.dtype
    heads = []
    for z in (x,) if x is y else (x, y):
        z = repeated_heads(z[:, :, at].to(wide), len(log_decay))
        heads.append(z.masked_fill((exponents < 0)[:, None, :, None], 0) if partial else z)  # padding may hold NaN
    return heads[0], heads[-1], _decayed(log_decay[:, None], exponents[:, None])[..., None]


def _by_kv_heads(x: Tensor, kv_heads: int) -> Tensor:
    """Add up the gradients (B, H, n, D) of the query heads that share a key head, (B, Hkv, n, D)."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


def _decayed(log_decay: Tensor, distance: Tensor) -> Tensor:
    """Return gamma^distance, 0 where the distance is _NEVER."""
    return torch.where(distance < 0, 0, (log_decay * distance).exp())


def _sum(weights: Tensor, states: Tensor) -> Tensor:
    """Add up states (n, B, H, K, V) with weights (n, B or 1, H)."""
    return torch.einsum("nbh,nbhkv->bhkv", weights.expand(*states.shape[:3]), states)
