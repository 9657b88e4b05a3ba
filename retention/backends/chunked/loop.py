"""The loop over the chunks of a part of a batch: retention and its gradients, one chunk at a time.

Shapes: R rows, H heads, n tokens of a chunk, K and V channels. Rows and heads are one dimension R H, as `torch.bmm`
    takes it: q_i, k_i (R H, n, K); v_i (R H, n, V); the state S (R H, K, V).
Source: Sun et al. 2023, arXiv:2307.08621, Eq. 7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from math import isqrt

import torch
from torch import Tensor

from ...decay import decay_matrix
from ...state import state_dtype

__all__ = ["Decays", "Factors", "backward", "forward"]


class Factors:
    """The powers of gamma that multiply a chunk of n tokens in R rows, for one direction of time, made at first use.

    An age is an exponent of gamma, in tokens. Forward in time, token i reads the state at age i + 1 and is written to
    it at age n - 1 - i; backward in time, these are n - i and i.
    """

    def __init__(self, decays: Decays, n: int, reverse: bool, rows: int):
        self.log_decay, self.rate, self.scale, self.causal = decays.log_decay, decays.rate, decays.scale, decays.causal
        self.n, self.reverse, self.rows = n, reverse, rows
        self.index = torch.arange(n, device=self.rate.device, dtype=self.rate.dtype)

    @cached_property
    def distance(self) -> Tensor:
        """|i - j|, (n, n)."""
        return (self.index[:, None] - self.index).abs()

    @cached_property
    def inner(self) -> Tensor:
        """scale gamma^|i - j| for tokens i and j of the chunk, (H, n, n); 0 for j > i if causal."""
        return decay_matrix(self.log_decay, self.n, self.causal) * self.scale

    @cached_property
    def read_age(self) -> Tensor:
        """The age i + 1, or n - i backward, (n, 1)."""
        return (self.n - self.index if self.reverse else self.index + 1)[:, None]

    @cached_property
    def write_age(self) -> Tensor:
        """The age n - 1 - i, or i backward, (n, 1)."""
        return (self.index if self.reverse else self.n - 1 - self.index)[:, None]

    @cached_property
    def read(self) -> Tensor:
        """scale gamma^read_age, (R H, n, 1)."""
        return self._power(self.read_age) * self.scale

    @cached_property
    def write(self) -> Tensor:
        """gamma^write_age, (R H, n, 1)."""
        return self._power(self.write_age)

    @cached_property
    def carry(self) -> Tensor:
        """gamma^n, (R H, 1, 1)."""
        return (self.rate * self.n).exp().repeat(self.rows, 1, 1)

    def _power(self, age: Tensor) -> Tensor:
        return (self.rate * age).exp().repeat(self.rows, 1, 1)


class Decays:
    """The `Factors` of all chunks of a call; full chunks share one, and a shorter last chunk has another."""

    def __init__(self, log_decay: Tensor, size: int, scale: float, causal: bool, dtype: torch.dtype):
        self.log_decay, self.size, self.scale, self.causal = log_decay.to(dtype), size, scale, causal
        self.rate = self.log_decay[:, None, None]
        self.known: dict[tuple[int, bool, int], Factors] = {}

    def directions(self) -> tuple[bool, ...]:
        """Return the values of `reverse` to loop with: without causality also backward in time, for later tokens."""
        return (False,) if self.causal else (False, True)

    def factors(self, n: int, reverse: bool, rows: int) -> Factors:
        key = n, reverse, rows
        if key not in self.known:
            self.known[key] = Factors(self, *key)
        return self.known[key]


class _Chunks:
    """A tensor (R, H or Hkv, T, D) as a list of chunks (R H, n, D) in float32, or in float64 for float64.

    A chunk is a view where strides, dtype and heads allow, else a copy that is made when it is asked for.
    """

    def __init__(self, x: Tensor, heads: int, size: int):
        self.groups, self.wide = heads // x.shape[1], state_dtype(x.dtype)
        mergeable = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
        self.direct = self.groups == 1 and x.dtype == self.wide and mergeable
        self.parts = (x.flatten(0, 1) if self.direct else x).split(size, -2) if x.shape[2] else ()

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Tensor:
        if self.direct:
            return self.parts[i]
        return self.parts[i].to(self.wide)[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(0, 2)


class _Target:
    """An output (R, H or Hkv, T, D), written by chunks (R H, n, D); heads that share a key/value head are summed."""

    def __init__(self, x: Tensor, heads: int, size: int):
        self.rows, self.groups = x.shape[0], heads // x.shape[1]
        self.parts = x.split(size, 2) if x.shape[2] else ()

    def clear(self, i: int) -> None:
        """Set chunk i to 0."""
        self.parts[i].zero_()

    def put(self, i: int, value: Tensor, add: bool = False) -> None:
        """Write `value` (R H, n, D) to chunk i, or add it."""
        value = value.unflatten(0, (self.rows, -1))
        if self.groups > 1:
            value = value.unflatten(1, (-1, self.groups)).sum(2)
        if add:
            self.parts[i].add_(value)
        else:
            self.parts[i].copy_(value)


def _order(chunks: _Chunks, reverse: bool) -> list[int]:
    """Return the numbers of the chunks in the order of time, or in reverse."""
    order = list(range(len(chunks)))
    return order[::-1] if reverse else order


def _decayed(scores: Tensor, inner: Tensor) -> Tensor:
    """Multiply scores (R H, n, n) by inner (H, n, n), in place."""
    scores.view(-1, *inner.shape).mul_(inner)
    return scores


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return total + a b, in place if there is a total."""
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


def _updated(s: Tensor | None, carry: Tensor, a: Tensor, factor: Tensor, b: Tensor) -> Tensor:
    """Return carry S + (factor a)^T b, in place if there is an S: a state, or its gradient, after a chunk."""
    return _add_product(None if s is None else s.mul_(carry), (a * factor).transpose(1, 2), b)


def _written(k: _Chunks, v: _Chunks, decays: Decays, reverse: bool, rows: int, s: Tensor | None, i: int) -> Tensor:
    """Return the state after chunk i, gamma^n S + (write * k_i)^T v_i, and overwrite S, the state before it."""
    k_i = k[i]
    f = decays.factors(k_i.shape[1], reverse, rows)
    return _updated(s, f.carry, k_i, f.write, v[i])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    state: Tensor | None,
    decays: Decays,
    return_state: bool,
) -> Tensor | None:
    """Compute retention into `out`, and return the state after the last token if return_state. `state` is overwritten.

        y_i = ((q_i k_i^T) * inner) v_i + (read * q_i) S
        S  <- gamma^n S + (write * k_i)^T v_i

    Without causality a second loop, backward in time, adds (read * q_i) S for the tokens of later chunks.

    Shapes: q (R, H, T, K); k (R, Hkv, T, K); v (R, Hkv, T, V); out (R, H, T, V); state (R, H, K, V) or None.
    """
    rows, heads = q.shape[:2]
    q_, k_, v_ = (_Chunks(x, heads, decays.size) for x in (q, k, v))
    out_ = _Target(out, heads, decays.size)
    s = None
    for reverse in decays.directions():
        s = None if state is None else state.flatten(0, 1)  # S, (R H, K, V); None is 0
        order = _order(q_, reverse)
        for i in order:
            q_i, k_i, v_i = q_[i], k_[i], v_[i]  # (R H, n, K), (R H, n, K), (R H, n, V)
            f = decays.factors(q_i.shape[1], reverse, rows)
            # y_i = ((q_i k_i^T) * inner) v_i, (R H, n, V)
            y = None if reverse else torch.bmm(_decayed(torch.bmm(q_i, k_i.transpose(1, 2)), f.inner), v_i)
            if s is not None:
                y = _add_product(y, q_i * f.read, s)  # + (read * q_i) S
            if y is not None:
                out_.put(i, y, add=reverse)
            if return_state or i != order[-1]:
                s = _updated(s, f.carry, k_i, f.write, v_i)  # S <- gamma^n S + (write * k_i)^T v_i
    if not return_state:
        return None
    if s is None:
        return q.new_zeros(rows, heads, q.shape[3], v.shape[3], dtype=state_dtype(q.dtype))
    return s.unflatten(0, (rows, heads))


def backward(
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
    decays: Decays,
    decay_grad: bool,
) -> tuple[Tensor | None, Tensor]:
    """Write the gradients of q, k and v; return those of state and log_decay. `state` and `dfinal` are overwritten.

    With dy_i the gradient of y_i, A = inner * (dy_i v_i^T), S the state before chunk i and dS' the gradient of the one
    after:

        dq_i = read * (dy_i S^T) + A k_i
        dk_i = write * (v_i dS'^T) + A^T q_i
        dv_i = (write * k_i) dS' + ((q_i k_i^T) * inner)^T dy_i
        dS   = gamma^n dS' + (read * q_i)^T dy_i

    The gradient of log_decay is the sum of all products, each times the exponent of gamma in it:

        dlog_decay = sum read_age * (q_i . [read * (dy_i S^T)]) + sum write_age * (k_i . [write * (v_i dS'^T)])
                   + sum |i - j| * (q_i k_i^T) * A + n <gamma^n S, dS'>

    The last term needs S and dS' of a chunk at once, which are computed in opposite directions: see `_Befores`.

    Shapes: as in `forward`; dout (R, H, T, V); dq, dk and dv as q, k and v; dfinal (R, H, K, V) or None. Returns dstate
        (R, H, K, V), None without a state, and dlog_decay (H,), 0 unless decay_grad.
    """
    rows, heads = q.shape[:2]
    q_, k_, v_, dout_ = (_Chunks(x, heads, decays.size) for x in (q, k, v, dout))
    dq_, dk_, dv_ = (_Target(x, heads, decays.size) for x in (dq, dk, dv))
    ddecay, ds = decays.rate.new_zeros(rows * heads), None  # one number for each row and head
    for reverse in decays.directions():
        order = _order(q_, reverse)
        written = partial(_written, k_, v_, decays, reverse, rows)
        s = None if state is None else state.flatten(0, 1)
        befores = _Befores(order, written) if decay_grad else None
        for i in order:  # in the direction of S: the part of dq that is read from the state
            if befores is not None:
                befores.pass_by(i, s)
            if s is not None:
                dy = dout_[i]  # (R H, n, V)
                f = decays.factors(dy.shape[1], reverse, rows)
                dq_i = torch.bmm(dy, s.transpose(1, 2)).mul_(f.read)  # read * (dy_i S^T), (R H, n, K)
                dq_.put(i, dq_i, add=reverse)
                if decay_grad:  # read_age * (q_i . dq_i)
                    ddecay = ddecay + (q_[i] * dq_i).sum(2) @ f.read_age[:, 0]
            elif not reverse:
                dq_.clear(i)
            if i != order[-1]:
                s = written(s, i)  # S <- gamma^n S + (write * k_i)^T v_i

        ds = None if dfinal is None else dfinal.flatten(0, 1)  # dS', (R H, K, V); None is 0
        for i in reversed(order):  # in the direction of dS: dk, dv and the products inside the chunk
            q_i, k_i, v_i, dy = q_[i], k_[i], v_[i], dout_[i]
            f = decays.factors(dy.shape[1], reverse, rows)
            dk_i = dv_i = None
            if ds is not None:
                dk_i = torch.bmm(v_i, ds.transpose(1, 2)).mul_(f.write)  # write * (v_i dS'^T), (R H, n, K)
                dv_i = torch.bmm(k_i * f.write, ds)  # (write * k_i) dS', (R H, n, V)
                if befores is not None:  # write_age * (k_i . dk_i)
                    ddecay = ddecay + (k_i * dk_i).sum(2) @ f.write_age[:, 0]
                    before = befores.of(i)
                    if before is not None:  # n <gamma^n S, dS'>
                        ddecay = ddecay + dy.shape[1] * f.carry[:, 0, 0] * before.mul_(ds).sum((1, 2))
            if not reverse:
                scores = torch.bmm(q_i, k_i.transpose(1, 2))  # q_i k_i^T, (R H, n, n)
                dscores = _decayed(torch.bmm(dy, v_i.transpose(1, 2)), f.inner)  # A = inner * (dy_i v_i^T)
                if decay_grad:  # |i - j| * (q_i k_i^T) * A
                    ddecay = ddecay + (scores * dscores).flatten(1) @ f.distance.flatten()
                dq_.put(i, torch.bmm(dscores, k_i), add=True)  # + A k_i
                dk_i = _add_product(dk_i, dscores.transpose(1, 2), q_i)  # + A^T q_i
                # + ((q_i k_i^T) * inner)^T dy_i
                dv_i = _add_product(dv_i, _decayed(scores, f.inner).transpose(1, 2), dy)
            if dk_i is not None and dv_i is not None:
                dk_.put(i, dk_i, add=reverse)
                dv_.put(i, dv_i, add=reverse)
            if i != order[0] or state is not None:
                ds = _updated(ds, f.carry, q_i, f.read, dy)  # dS = gamma^n dS' + (read * q_i)^T dy_i
    ddecay = ddecay.view(rows, heads).sum(0)
    if state is None:
        return None, ddecay
    return torch.zeros_like(state) if ds is None else ds.unflatten(0, (rows, heads)), ddecay


class _Befores:
    """The states S before the chunks, returned from the last chunk to the first, of which few exist at a time.

    In the direction of time, a copy of the state is kept before every m-th of N chunks, m = sqrt(N). In the other
    direction, the states between two copies are computed again.
    """

    def __init__(self, order: list[int], written: Callable[[Tensor | None, int], Tensor]):
        self.order, self.written, self.every = order, written, max(1, isqrt(len(order)))
        self.copies: list[Tensor | None] = []
        self.block: list[Tensor | None] = []

    def pass_by(self, i: int, s: Tensor | None) -> None:
        """Take s, the state before chunk i, in the direction of time."""
        if self._place(i) % self.every == 0:
            self.copies.append(None if s is None else s.clone())

    def of(self, i: int) -> Tensor | None:
        """Return the state before chunk i, in the other direction; the caller may overwrite it."""
        place = self._place(i)
        if not self.block:
            start = place - place % self.every
            self.block = [self.copies[start // self.every]]
            for before in self.order[start:place]:
                s = self.block[-1]
                self.block.append(self.written(None if s is None else s.clone(), before))
        return self.block.pop()

    def _place(self, i: int) -> int:
        return i if self.order[0] == 0 else len(self.order) - 1 - i
