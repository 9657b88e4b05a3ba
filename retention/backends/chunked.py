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
    if mask is not None:
        real = mask.nonzero(as_tuple=True)
        packed = [_pack(x, real) for x in (q, k, v)]
        out, final = chunkwise(
            *packed, log_decay, state, None, _cu_seqlens(mask), scale, causal, chunk_size, return_state
        )
        return _unpack(out, real, mask), final

    out, final = _outputs(q, k, v, state, mask, cu_seqlens, return_state)
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
    if mask is not None:
        real = mask.nonzero(as_tuple=True)
        dout, q, k, v = (_pack(x, real) for x in (dout, q, k, v))
        rest = (log_decay, state, None, _cu_seqlens(mask), scale, causal, chunk_size, decay_grad)
        dq, dk, dv, dlog_decay, dstate = chunkwise_backward(dout, dfinal, q, k, v, *rest)
        dq, dk, dv = (_unpack(x, real, mask) for x in (dq, dk, dv))
        return dq, dk, dv, dlog_decay, dstate

    dq, dk, dv, dlog_decay, dstate = _gradients(q, k, v, log_decay, state)
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
    return _outputs(q, k, v, state, mask, cu_seqlens, return_state)


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


def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
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

    read: Tensor  # (H, n, 1)  scale gamma^age of what a token reads from the state
    write: Tensor  # (H, n, 1)  gamma^age of what a token writes into it
    carry: Tensor  # (H, 1, 1)  gamma^n
    read_age: Tensor  # (n, 1)
    write_age: Tensor  # (n, 1)


class _Decays:
    """The powers of gamma for chunks of up to `size` tokens, computed once for all chunks of a call."""

    def __init__(self, log_decay: Tensor, size: int, scale: float, causal: bool, dtype: torch.dtype):
        rate = log_decay.to(dtype)[:, None, None]
        index = torch.arange(size, device=log_decay.device, dtype=dtype)
        self.size, self.causal = size, causal
        self.distance = (index[:, None] - index).abs()
        inner = (rate * self.distance).exp() * scale
        self.inner = inner.tril() if causal else inner  # (H, C, C)
        self.age = index[:, None] + 1
        self.power = (rate * self.age).exp()  # (H, C, 1)  gamma^1 ... gamma^C
        self.read = self.power * scale
        self.write = (rate * (size - self.age)).exp()

    def factors(self, n: int, reverse: bool) -> _Factors:
        """Looking back, token i reads at age i + 1 and writes at age n - 1 - i; looking ahead is the mirror image."""
        head, tail = slice(0, n), slice(self.size - n, self.size)
        ages = self.age[head], self.size - self.age[tail]
        carry = self.power[:, n - 1, None]
        if not reverse:
            return _Factors(self.read[:, head], self.write[:, tail], carry, *ages)
        return _Factors(self.read[:, head].flip(1), self.write[:, tail].flip(1), carry, *(x.flip(0) for x in ages))

    def chunks(self, length: int, reverse: bool) -> list[slice]:
        starts = range(0, length, max(self.size, 1))
        chunks = [slice(start, min(start + self.size, length)) for start in starts]
        return chunks[::-1] if reverse else chunks

    def directions(self) -> tuple[bool, ...]:
        """The values of `reverse` to walk in."""
        return (False,) if self.causal else (False, True)


class _Heads:
    """One (R, heads, T, D) tensor, loaded and stored a chunk at a time as (R H, n, D), in the wide dtype.

    A load is a view where strides, dtype and grouping allow, else a copy the size of a chunk.
    """

    def __init__(self, x: Tensor, heads: int):
        self.x, self.groups, self.wide = x, heads // x.shape[1], state_dtype(x.dtype)

    def load(self, tokens: slice) -> Tensor:
        x = self.x[:, :, tokens]
        if self.groups > 1:
            x = x.repeat_interleave(self.groups, dim=1)
        return x.to(self.wide).flatten(0, 1)

    def store(self, tokens: slice, value: Tensor | None, add: bool = False) -> None:
        target = self.x[:, :, tokens]
        if value is None:
            if not add:
                target.zero_()
            return
        value = value.unflatten(0, (target.shape[0], -1))
        if self.groups > 1:
            value = value.unflatten(1, (-1, self.groups)).sum(2)
        if add:
            target.add_(value)
        else:
            target.copy_(value)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x (R H, ...) times factor (H, ...)."""
    if x.shape[0] == factor.shape[0]:
        return x * factor
    return (x.unflatten(0, (-1, factor.shape[0])) * factor).flatten(0, 1)


def _scale_(x: Tensor, factor: Tensor) -> Tensor:
    x.unflatten(0, (-1, factor.shape[0])).mul_(factor)
    return x


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in place."""
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


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
    heads, length = q.shape[1:3]
    q_, k_, v_, out_ = (_Heads(x, heads) for x in (q, k, v, out))
    for reverse in decays.directions():
        s = None if state is None else state.flatten(0, 1)
        chunks = decays.chunks(length, reverse)
        for tokens in chunks:
            q_c, k_c, v_c = (x.load(tokens) for x in (q_, k_, v_))
            f = decays.factors(q_c.shape[1], reverse)
            y = None
            if not reverse:
                inner = decays.inner[:, : q_c.shape[1], : q_c.shape[1]]
                y = _scale_(q_c @ k_c.mT, inner) @ v_c
            if s is not None:
                y = _add_product(y, _scaled(q_c, f.read), s)
            out_.store(tokens, y, add=reverse)
            if return_state or tokens is not chunks[-1]:
                s = _write(s, k_c, v_c, f)
    if not return_state:
        return None
    if s is None:
        return q.new_zeros(q.shape[0], heads, q.shape[3], v.shape[3], dtype=state_dtype(q.dtype))
    return s.unflatten(0, (-1, heads))


def _write(s: Tensor | None, k: Tensor, v: Tensor, f: _Factors) -> Tensor:
    """carry s + sum of write k v^T, in place."""
    return _add_product(None if s is None else _scale_(s, f.carry), _scaled(k, f.write).mT, v)


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
) -> tuple[Tensor | None, Tensor | int]:
    """Fill dq, dk, dv; return the gradients of state and log_decay. `state` and `dfinal` are overwritten.

    The gradient of log_decay weighs every product with the exponent it has gamma in. What a chunk carries over counts
    n <gamma^n S, dS'>, with S before and the gradient dS' after the chunk, which are never there at once. But
    <S, dS> changes from chunk to chunk by what is read and written in between, q . dq and k . dk.
    """
    heads, length = q.shape[1:3]
    q_, k_, v_, dout_, dq_, dk_, dv_ = (_Heads(x, heads) for x in (q, k, v, dout, dq, dk, dv))
    ddecay: Tensor | int = 0
    ds = None
    for reverse in decays.directions():
        chunks = decays.chunks(length, reverse)
        s = None if state is None else state.flatten(0, 1)
        reads: list[Tensor] = []
        for tokens in chunks:
            k_c, v_c, dy = (x.load(tokens) for x in (k_, v_, dout_))
            f = decays.factors(k_c.shape[1], reverse)
            dq_c = None if s is None else _scale_(dy @ s.mT, f.read)
            dq_.store(tokens, dq_c, add=reverse)
            if decay_grad:
                read = torch.zeros_like(dy[..., :1]) if dq_c is None else (q_.load(tokens) * dq_c).sum(-1, keepdim=True)
                ddecay = ddecay + _total(read * f.read_age)
                reads.append(_total(read))
            if tokens is not chunks[-1] or (decay_grad and dfinal is not None):
                s = _write(s, k_c, v_c, f)

        ds = None if dfinal is None else dfinal.flatten(0, 1)
        overlap = 0 if s is None or ds is None else _total(s * ds)  # <S, dS> after the chunk
        for tokens in reversed(chunks):
            q_c, k_c, v_c, dy = (x.load(tokens) for x in (q_, k_, v_, dout_))
            n = q_c.shape[1]
            f = decays.factors(n, reverse)
            dk_c = dv_c = None
            if not reverse:
                inner = decays.inner[:, :n, :n]
                a, da = q_c @ k_c.mT, _scale_(dy @ v_c.mT, inner)
                if decay_grad:
                    ddecay = ddecay + _total(a * da * decays.distance[:n, :n])
                dq_.store(tokens, da @ k_c, add=True)
                dk_c, dv_c = da.mT @ q_c, _scale_(a, inner).mT @ dy
            if ds is not None:
                from_state = _scale_(v_c @ ds.mT, f.write)
                dv_c = _add_product(dv_c, _scaled(k_c, f.write), ds)
                if decay_grad:
                    written = (k_c * from_state).sum(-1, keepdim=True)
                    carried = overlap - _total(written)
                    ddecay = ddecay + _total(written * f.write_age) + n * carried
                    overlap = carried
                dk_c = from_state if dk_c is None else dk_c.add_(from_state)
            if decay_grad:
                overlap = overlap + reads.pop()
            dk_.store(tokens, dk_c, add=reverse)
            dv_.store(tokens, dv_c, add=reverse)
            if tokens is not chunks[0] or state is not None:
                ds = _add_product(None if ds is None else _scale_(ds, f.carry), _scaled(q_c, f.read).mT, dy)
    if isinstance(ddecay, Tensor):
        ddecay = ddecay.unflatten(0, (-1, heads)).sum(0)
    if state is None:
        return None, ddecay
    return torch.zeros_like(state) if ds is None else ds.unflatten(0, (-1, heads)), ddecay


def _total(x: Tensor) -> Tensor:
    """The sum for each row and head."""
    return x.flatten(1).sum(1)
