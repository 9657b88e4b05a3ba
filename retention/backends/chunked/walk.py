"""The walk over the chunks of one piece of a batch: retention and its gradients, a chunk at a time.

Shapes: R rows, H heads, n tokens of a chunk. Inside, rows and heads are one dimension, as `torch.bmm` wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from math import isqrt

import torch
from torch import Tensor

from ...decay import decay_matrix
from ...state import state_dtype


class Factors:
    """What a chunk of n tokens in R rows multiplies with, in one direction of time; made when it is asked for.

    Ages are exponents of gamma, in tokens. Looking back, token i reads at age i + 1 and writes at age n - 1 - i;
    looking ahead is the mirror image.
    """

    def __init__(self, decays: Decays, n: int, reverse: bool, rows: int):
        self.log_decay, self.rate, self.scale, self.causal = decays.log_decay, decays.rate, decays.scale, decays.causal
        self.n, self.reverse, self.rows = n, reverse, rows
        self.index = torch.arange(n, device=self.rate.device, dtype=self.rate.dtype)

    @cached_property
    def distance(self) -> Tensor:
        """(n, n)"""
        return (self.index[:, None] - self.index).abs()

    @cached_property
    def inner(self) -> Tensor:
        """(H, n, n), scale gamma^distance between the chunk's tokens; 0 in the future."""
        return decay_matrix(self.log_decay, self.n, self.causal) * self.scale

    @cached_property
    def read_age(self) -> Tensor:
        """(n, 1)"""
        return (self.n - self.index if self.reverse else self.index + 1)[:, None]

    @cached_property
    def write_age(self) -> Tensor:
        """(n, 1)"""
        return (self.index if self.reverse else self.n - 1 - self.index)[:, None]

    @cached_property
    def read(self) -> Tensor:
        """(R H, n, 1), scale gamma^age of what a token reads from the state."""
        return self._power(self.read_age) * self.scale

    @cached_property
    def write(self) -> Tensor:
        """(R H, n, 1), gamma^age of what a token writes into the state."""
        return self._power(self.write_age)

    @cached_property
    def carry(self) -> Tensor:
        """(R H, 1, 1), gamma^n."""
        return (self.rate * self.n).exp().repeat(self.rows, 1, 1)

    def _power(self, age: Tensor) -> Tensor:
        return (self.rate * age).exp().repeat(self.rows, 1, 1)


class Decays:
    """The factors of all chunks of a call: all but a shorter last one have the same."""

    def __init__(self, log_decay: Tensor, size: int, scale: float, causal: bool, dtype: torch.dtype):
        self.log_decay, self.size, self.scale, self.causal = log_decay.to(dtype), size, scale, causal
        self.rate = self.log_decay[:, None, None]
        self.known: dict[tuple[int, bool, int], Factors] = {}

    def directions(self) -> tuple[bool, ...]:
        """The values of `reverse` to walk in: back in time for what lies ahead."""
        return (False,) if self.causal else (False, True)

    def factors(self, n: int, reverse: bool, rows: int) -> Factors:
        key = n, reverse, rows
        if key not in self.known:
            self.known[key] = Factors(self, *key)
        return self.known[key]


class Chunks:
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


class Target:
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


def _walk(chunks: Chunks, reverse: bool) -> list[int]:
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


def _written(k: Chunks, v: Chunks, decays: Decays, reverse: bool, rows: int, s: Tensor | None, i: int) -> Tensor:
    """The state after chunk i, from the one before it, which is overwritten."""
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
    """Fill `out`; return the last state. `state` (R, H, K, V) is overwritten."""
    rows, heads = q.shape[:2]
    q_, k_, v_ = (Chunks(x, heads, decays.size) for x in (q, k, v))
    out_ = Target(out, heads, decays.size)
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
    """Fill dq, dk, dv; return the gradients of state and log_decay. `state` and `dfinal` are overwritten.

    The gradient of log_decay weighs every product with the exponent it has gamma in. What a chunk of n tokens carries
    over counts n <gamma^n S, dS'>, with S before and the gradient dS' after the chunk: see `Befores`.
    """
    rows, heads = q.shape[:2]
    q_, k_, v_, dout_ = (Chunks(x, heads, decays.size) for x in (q, k, v, dout))
    dq_, dk_, dv_ = (Target(x, heads, decays.size) for x in (dq, dk, dv))
    ddecay, ds = decays.rate.new_zeros(rows * heads), None  # one number for each row and head
    for reverse in decays.directions():
        order = _walk(q_, reverse)
        written = partial(_written, k_, v_, decays, reverse, rows)
        s = None if state is None else state.flatten(0, 1)
        befores = Befores(order, written) if decay_grad else None
        for i in order:  # with the states S: what queries read
            if befores is not None:
                befores.pass_by(i, s)
            if s is not None:
                dy = dout_[i]
                f = decays.factors(dy.shape[1], reverse, rows)
                dq_i = torch.bmm(dy, s.transpose(1, 2)).mul_(f.read)
                dq_.put(i, dq_i, add=reverse)
                if decay_grad:
                    ddecay = ddecay + (q_[i] * dq_i * f.read_age).sum((1, 2))
            elif not reverse:
                dq_.clear(i)
            if i != order[-1]:
                s = written(s, i)

        ds = None if dfinal is None else dfinal.flatten(0, 1)
        for i in reversed(order):  # against time, with their gradients dS: what keys and values wrote
            q_i, k_i, v_i, dy = q_[i], k_[i], v_[i], dout_[i]
            f = decays.factors(dy.shape[1], reverse, rows)
            dk_i = dv_i = None
            if ds is not None:
                dk_i = torch.bmm(v_i, ds.transpose(1, 2)).mul_(f.write)
                dv_i = torch.bmm(k_i * f.write, ds)
                if befores is not None:
                    ddecay = ddecay + (k_i * dk_i * f.write_age).sum((1, 2))
                    before = befores.of(i)
                    if before is not None:
                        ddecay = ddecay + dy.shape[1] * (before.mul_(f.carry) * ds).sum((1, 2))
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


class Befores:
    """The states S before the chunks, given back from the last to the first, of which few are ever there.

    On the way forward every m-th of N chunks leaves a copy, m = sqrt(N); on the way back the m states that follow a
    copy are computed once more.
    """

    def __init__(self, order: list[int], written: Callable[[Tensor | None, int], Tensor]):
        self.order, self.written, self.every = order, written, max(1, isqrt(len(order)))
        self.copies: list[Tensor | None] = []
        self.block: list[Tensor | None] = []

    def pass_by(self, i: int, s: Tensor | None) -> None:
        """On the way forward: s is the state before chunk i."""
        if self._place(i) % self.every == 0:
            self.copies.append(None if s is None else s.clone())

    def of(self, i: int) -> Tensor | None:
        """The state before chunk i, on the way back; it may be overwritten."""
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
