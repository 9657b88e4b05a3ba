"""The chunkwise form in torch operations: linear in length, lean, the fast path on CPU and the portable one everywhere.

Source: Sun et al. 2023, arXiv:2307.08621, Eq. 7. Differs: any length and chunk size; the last chunk is simply shorter.

A chunk of C tokens does the parallel form inside and talks to all others through one state per head:

    out_i  = scale sum_j<=i gamma^(i-j) (q_i . k_j) v_j  +  scale gamma^(i+1) q_i S        inner + read from S
    S     <- gamma^C S + sum_j gamma^(C-1-j) k_j v_j^T                                     carry  + write to S

Bidirectional retention adds the same with time reversed, for what lies in later chunks. The gradients are retentions
too: that of q runs forward through the states S, those of k and v backward through the states' gradients dS. So the
backward pass walks the sequence once each way, computes every S anew, and no state of a chunk is ever stored.

Each step is a handful of batched matrix products on views of the inputs; what it touches besides (scores, scaled q and
k, S) has the size of a chunk and stays in the processor's cache. The walk is an opaque operator, so that
torch.compile and torch.export see one node, not one per chunk.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..state import state_dtype

if TYPE_CHECKING:
    from . import Call

HEADS_AT_ONCE = 32
CHUNK_SIZE = 64  # the fastest of 16 to 256 on CPU; `python -m benchmarks floor --chunks` measures it


class Chunked:
    def why_not(self, call: Call) -> list[str]:
        reasons = []
        if call.form != "chunkwise":
            reasons.append(f"has the form chunkwise, not {call.form}")
        if call.in_place:
            reasons.append("does not overwrite a state")
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
        options = (call.scale, call.causal, call.chunk_size or CHUNK_SIZE, call.return_state)
        out, final = chunkwise(q, k, v, log_decay, state, mask, cu_seqlens, *options)
        return out, final if call.return_state else None


backend = Chunked()

_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None  # Linux only


@torch.library.custom_op("retention::chunkwise", mutates_args=())
def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    chunk_size: int,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `Backend.__call__`. Returns: out (B, H, T, V); the last state, empty unless return_state."""
    if mask is not None and not mask.all():
        real = mask.nonzero(as_tuple=True)
        packed = [_pack(x, real) for x in (q, k, v)]
        out, final = chunkwise(
            *packed, log_decay, state, None, _cu_seqlens(mask), scale, causal, chunk_size, return_state
        )
        return _unpack(out, real, mask), final

    out, final = _outputs(q, k, v, cu_seqlens, return_state)
    _ask_for_huge_pages(out)
    decays = _Decays(log_decay, min(chunk_size, q.shape[2]), scale, causal, state_dtype(q.dtype))
    for rows, tokens, states in _pieces(q, cu_seqlens):
        before = None if state is None else state[states].clone()
        parts = [x[rows, :, tokens] for x in (q, k, v, out)]
        after = _forward(*parts, state=before, decays=decays, return_state=return_state)
        if after is not None:
            final[states] = after
    return out, final


@torch.library.custom_op("retention::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    chunk_size: int,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns: the gradients of q, k, v, log_decay (0 unless decay_grad) and state (empty if there is none)."""
    if mask is not None and not mask.all():
        real = mask.nonzero(as_tuple=True)
        dout, q, k, v = (_pack(x, real) for x in (dout, q, k, v))
        rest = (log_decay, state, None, _cu_seqlens(mask), scale, causal, chunk_size, decay_grad)
        dq, dk, dv, dlog_decay, dstate = chunkwise_backward(dout, dfinal, q, k, v, *rest)
        dq, dk, dv = (_unpack(x, real, mask) for x in (dq, dk, dv))
        return dq, dk, dv, dlog_decay, dstate

    dq, dk, dv, dlog_decay, dstate = _gradients(q, k, v, log_decay, state)
    _ask_for_huge_pages(dq, dk, dv)
    decays = _Decays(log_decay, min(chunk_size, q.shape[2]), scale, causal, state_dtype(q.dtype))
    for rows, tokens, states in _pieces(q, cu_seqlens):
        parts = [x[rows, :, tokens] for x in (q, k, v, dout, dq, dk, dv)]
        before, dafter = (None if x is None else x[states].clone() for x in (state, dfinal))
        dbefore, ddecay = _backward(*parts, state=before, dfinal=dafter, decays=decays, decay_grad=decay_grad)
        if dbefore is not None:
            dstate[states] = dbefore
        dlog_decay += ddecay
    return dq, dk, dv, dlog_decay, dstate


@chunkwise.register_fake
def _(q, k, v, log_decay, state, mask, cu_seqlens, scale, causal, chunk_size, return_state):  # type: ignore[no-untyped-def]
    return _outputs(q, k, v, cu_seqlens, return_state)


@chunkwise_backward.register_fake
def _(dout, dfinal, q, k, v, log_decay, state, *_):  # type: ignore[no-untyped-def]
    return _gradients(q, k, v, log_decay, state)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tensors, ctx.options, ctx.return_state = inputs[:7], inputs[7:10], inputs[10]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.out_shape = output[0].shape


def _autograd(ctx, dout, dfinal):  # type: ignore[no-untyped-def]
    q = ctx.saved_tensors[0]
    if dout is None:
        dout = q.new_zeros(ctx.out_shape)
    if not ctx.return_state:  # an empty tensor then, not a state
        dfinal = None
    grads = chunkwise_backward(dout, dfinal, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[3])
    used = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return *used, *[None] * 6


chunkwise.register_autograd(_autograd, setup_context=_setup_context)


def _empty(x: Tensor, width: int) -> Tensor:
    """(B, H, T, width) that lies as (B, T, H, width) in memory, which is how layers go on with it."""
    batch, heads, length, _ = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _outputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, return_state: bool) -> tuple[Tensor, Tensor]:
    out = _empty(q, v.shape[-1])
    if not return_state:
        return out, q.new_empty(0, dtype=state_dtype(q.dtype))
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return out, q.new_empty(rows, q.shape[1], q.shape[3], v.shape[3], dtype=state_dtype(q.dtype))


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dstate = q.new_empty(0, dtype=state_dtype(q.dtype)) if state is None else torch.empty_like(state)
    dq, dk, dv = (_empty(x, x.shape[-1]) for x in (q, k, v))
    return dq, dk, dv, torch.zeros_like(log_decay), dstate


def _ask_for_huge_pages(*tensors: Tensor) -> None:
    """Let Linux map large CPU memory 2 MB at a time: by 4 kB, to touch an output first can cost more than computing it.

    Below 32 MB glibc hands out memory that was touched before.
    """
    for x in tensors:
        if x.device.type == "cpu" and _madvise is not None and x.untyped_storage().nbytes() >= 32 * 2**20:
            start = -(-x.untyped_storage().data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            size = x.untyped_storage().data_ptr() + x.untyped_storage().nbytes() - start
            _madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE
            )  # advice: a refusal does no harm


def _pack(x: Tensor, real: tuple[Tensor, ...]) -> Tensor:
    """The real tokens of (B, H, T, D) one after another, (1, H, N, D)."""
    return x.transpose(1, 2)[real].transpose(0, 1)[None]


def _unpack(x: Tensor, real: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """The opposite of `_pack`, 0 at padding."""
    batch, length = mask.shape
    out = x.new_zeros(batch, length, x.shape[1], x.shape[3])
    out[real] = x[0].transpose(0, 1)
    return out.transpose(1, 2)


def _cu_seqlens(mask: Tensor) -> Tensor:
    return torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))


def _pieces(q: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, slice, slice]]:
    """What is walked over at once: rows of the batch, tokens, and the rows of the state that belong to them."""
    if cu_seqlens is not None:
        for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            yield slice(0, 1), slice(start, end), slice(i, i + 1)
        return
    batch, heads = q.shape[:2]
    # On CPU, few heads at a time stay in cache, and the heads of one row can be a view where those of two cannot.
    step = max(1, HEADS_AT_ONCE // heads) if q.device.type == "cpu" else max(1, batch)
    for row in range(0, batch, step):
        yield slice(row, row + step), slice(None), slice(row, row + step)


class _Factors(NamedTuple):
    """What a chunk of n tokens multiplies with, in one direction of time. Ages are exponents of gamma, in tokens."""

    inner: Tensor  # (H, n, n)    scale gamma^distance between the chunk's tokens; 0 in the future
    distance: Tensor  # (n, n)
    read: Tensor  # (R H, n, 1)  scale gamma^age of what a token reads from the state
    write: Tensor  # (R H, n, 1)  gamma^age of what a token writes into it
    carry: Tensor  # (R H, 1, 1)  gamma^n
    read_age: Tensor  # (n, 1)
    write_age: Tensor  # (n, 1)


class _Decays:
    """The factors of all chunks of a call: all but a shorter last one have the same."""

    def __init__(self, log_decay: Tensor, size: int, scale: float, causal: bool, dtype: torch.dtype):
        self.rate, self.size, self.scale, self.causal = log_decay.to(dtype)[:, None, None], size, scale, causal
        self.known: dict[tuple[int, bool, int], _Factors] = {}

    def directions(self) -> tuple[bool, ...]:
        """The values of `reverse` to walk in: back in time for what lies ahead."""
        return (False,) if self.causal else (False, True)

    def factors(self, n: int, reverse: bool, rows: int) -> _Factors:
        """For a chunk of n tokens in `rows` rows."""
        key = n, reverse, rows
        if key not in self.known:
            self.known[key] = self._factors(*key)
        return self.known[key]

    def _factors(self, n: int, reverse: bool, rows: int) -> _Factors:
        """Looking back, token i reads at age i + 1 and writes at age n - 1 - i; looking ahead is the mirror image."""
        index = torch.arange(n, device=self.rate.device, dtype=self.rate.dtype)
        read_age, write_age = index[:, None] + 1, n - 1 - index[:, None]
        if reverse:
            read_age, write_age = read_age.flip(0), write_age.flip(0)
        distance = (index[:, None] - index).abs()
        inner = (self.rate * distance).exp() * self.scale
        inner = inner.tril() if self.causal else inner
        read, write, carry = (
            (self.rate * age).exp().repeat(rows, 1, 1) for age in (read_age, write_age, index[:1] + n)
        )
        return _Factors(inner, distance, read * self.scale, write, carry, read_age, write_age)


class _Chunks:
    """One (R, heads, T, D) tensor as a list of chunks (R H, n, D) in the wide dtype.

    A chunk is a view where strides, dtype and grouping allow, else a copy when it is asked for.
    """

    def __init__(self, x: Tensor, heads: int, size: int):
        self.groups, self.wide = heads // x.shape[1], state_dtype(x.dtype)
        mergeable = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
        self.direct = self.groups == 1 and x.dtype == self.wide and mergeable
        self.parts = (x.flatten(0, 1) if self.direct else x).split(size, -2) if x.shape[2] else ()

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Tensor:
        return self.parts[i] if self.direct else self._repeated(self.parts[i]).to(self.wide).flatten(0, 1)

    def _repeated(self, x: Tensor) -> Tensor:
        return x if self.groups == 1 else x.repeat_interleave(self.groups, dim=1)


class _Target:
    """One (R, heads, T, D) tensor to be filled, or added to, by chunks (R H, n, D); grouped heads are summed."""

    def __init__(self, x: Tensor, heads: int, size: int):
        self.rows, self.groups = x.shape[0], heads // x.shape[1]
        self.parts = x.split(size, 2) if x.shape[2] else ()

    def clear(self, i: int) -> None:
        self.parts[i].zero_()

    def put(self, i: int, value: Tensor, add: bool = False) -> None:
        value = value.unflatten(0, (self.rows, -1))
        if self.groups > 1:
            value = value.unflatten(1, (-1, self.groups)).sum(2)
        if add:
            self.parts[i].add_(value)
        else:
            self.parts[i].copy_(value)


def _walk(chunks: _Chunks, reverse: bool) -> list[int]:
    """The numbers of the chunks, in the order of time."""
    order = list(range(len(chunks)))
    return order[::-1] if reverse else order


def _decayed(scores: Tensor, inner: Tensor) -> Tensor:
    """scores (R H, n, n) times inner (H, n, n), in place."""
    scores.view(-1, *inner.shape).mul_(inner)
    return scores


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in place if there is a total."""
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


def _updated(s: Tensor | None, carry: Tensor, a: Tensor, factor: Tensor, b: Tensor) -> Tensor:
    """carry s + (factor a)^T b, in place if there is an s: how a state, or its gradient, moves on by a chunk."""
    return _add_product(None if s is None else s.mul_(carry), (a * factor).transpose(1, 2), b)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    state: Tensor | None,
    decays: _Decays,
    return_state: bool,
) -> Tensor | None:
    """Fill `out`; return the last state. `state` (R, H, K, V) is overwritten."""
    rows, heads = q.shape[:2]
    q_, k_, v_ = (_Chunks(x, heads, decays.size) for x in (q, k, v))
    out_ = _Target(out, heads, decays.size)
    s = None
    for reverse in decays.directions():
        s = None if state is None else state.flatten(0, 1)
        order = _walk(q_, reverse)
        for i in order:
            q_i, k_i, v_i = q_[i], k_[i], v_[i]
            f = decays.factors(q_i.shape[1], reverse, rows)
            y = None if reverse else torch.bmm(_decayed(torch.bmm(q_i, k_i.transpose(1, 2)), f.inner), v_i)
            if s is not None:
                y = _add_product(y, q_i * f.read, s)
            if y is not None:
                out_.put(i, y, add=reverse)
            if return_state or i != order[-1]:
                s = _updated(s, f.carry, k_i, f.write, v_i)
    if not return_state:
        return None
    if s is None:
        return q.new_zeros(rows, heads, q.shape[3], v.shape[3], dtype=state_dtype(q.dtype))
    return s.unflatten(0, (rows, heads))


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    state: Tensor | None,
    dfinal: Tensor | None,
    decays: _Decays,
    decay_grad: bool,
) -> tuple[Tensor | None, Tensor]:
    """Fill dq, dk, dv; return the gradients of state and log_decay. `state` and `dfinal` are overwritten.

    The gradient of log_decay weighs every product with the exponent it has gamma in. What a chunk carries over counts
    n <gamma^n S, dS'>, with S before and the gradient dS' after the chunk, which are never there at once. But
    <S, dS> changes from chunk to chunk by what is read and written in between, q . dq and k . dk.
    """
    rows, heads = q.shape[:2]
    q_, k_, v_, dout_ = (_Chunks(x, heads, decays.size) for x in (q, k, v, dout))
    dq_, dk_, dv_ = (_Target(x, heads, decays.size) for x in (dq, dk, dv))
    none = decays.rate.new_zeros(rows * heads)  # one number for each row and head
    ddecay, ds = none, None
    for reverse in decays.directions():
        order = _walk(q_, reverse)
        s = None if state is None else state.flatten(0, 1)
        reads = []
        for i in order:  # with the states S: what queries read
            k_i, v_i, dy = k_[i], v_[i], dout_[i]
            f = decays.factors(dy.shape[1], reverse, rows)
            read = none
            if s is not None:
                dq_i = torch.bmm(dy, s.transpose(1, 2)).mul_(f.read)
                dq_.put(i, dq_i, add=reverse)
                if decay_grad:
                    read, aged = _products(q_[i], dq_i, f.read_age)
                    ddecay = ddecay + aged
            elif not reverse:
                dq_.clear(i)
            reads.append(read)
            if i != order[-1] or (decay_grad and dfinal is not None):
                s = _updated(s, f.carry, k_i, f.write, v_i)

        ds = None if dfinal is None else dfinal.flatten(0, 1)
        overlap = none if s is None or ds is None else (s * ds).sum((1, 2))  # <S, dS> after the chunk
        for i in reversed(order):  # against time, with their gradients dS: what keys and values wrote
            q_i, k_i, v_i, dy = q_[i], k_[i], v_[i], dout_[i]
            n = dy.shape[1]
            f = decays.factors(n, reverse, rows)
            dk_i = dv_i = None
            if ds is not None:
                dk_i = torch.bmm(v_i, ds.transpose(1, 2)).mul_(f.write)
                dv_i = torch.bmm(k_i * f.write, ds)
                if decay_grad:
                    written, aged = _products(k_i, dk_i, f.write_age)
                    overlap = overlap - written
                    ddecay = ddecay + aged + n * overlap
            overlap = overlap + reads.pop()
            if not reverse:
                scores = torch.bmm(q_i, k_i.transpose(1, 2))
                dscores = _decayed(torch.bmm(dy, v_i.transpose(1, 2)), f.inner)
                if decay_grad:
                    ddecay = ddecay + (scores * dscores * f.distance).sum((1, 2))
                dq_.put(i, torch.bmm(dscores, k_i), add=True)
                dk_i = _add_product(dk_i, dscores.transpose(1, 2), q_i)
                dv_i = _add_product(dv_i, _decayed(scores, f.inner).transpose(1, 2), dy)
            if dk_i is not None and dv_i is not None:
                dk_.put(i, dk_i, add=reverse)
                dv_.put(i, dv_i, add=reverse)
            if i != order[0] or state is not None:
                ds = _updated(ds, f.carry, q_i, f.read, dy)
    ddecay = ddecay.view(rows, heads).sum(0)
    if state is None:
        return None, ddecay
    return torch.zeros_like(state) if ds is None else ds.unflatten(0, (rows, heads)), ddecay


def _products(x: Tensor, dx: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
    """sum of x . dx over the tokens, and the same weighed by age; for each row and head."""
    products = (x * dx).sum(2, keepdim=True)
    return products.sum((1, 2)), (products * age).sum((1, 2))
