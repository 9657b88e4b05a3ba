"""The kernel of the parallel form: all pairs of tokens, in one launch forward and one backward, for short inputs.

The output and the three gradients are one sum over tokens, with D_ij = scale gamma^|i - j|, and 0 for what is not seen:

    z_i = sum_j D_ij (x_i . u_j) y_j

    result  x   u   y   sees, if causal
    out     q   k   v   j <= i
    dq      do  v   k   j <= i
    dk      v   do  q   j >= i
    dv      k   q   do  j >= i
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import SIZES, _cells, _load, _pointers, _rate, _real, _rounded, _segment, _start, _store, _tokens

__all__ = ["parallel"]


@triton.jit(do_not_specialize=SIZES)
def parallel(
    q,
    k,
    v,
    do,
    out,
    dq,
    dk,
    dv,
    log_decay,
    slopes,
    places,
    scale,
    heads,
    groups,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEXED: tl.constexpr,
    TABLED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BACKWARD: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """Compute C rows and a block of columns of out; or, if BACKWARD, of dq, dk or dv.

    chunks: blocks of C tokens of the longest row. slopes: the part of each program of the gradient of log_decay, which
    is sum_i q_i . (sum_j |i - j| D_ij (do_i . v_j) k_j).
    """
    KEYS: tl.constexpr = (K + BN - 1) // BN if BACKWARD else 0
    MOST: tl.constexpr = V if BACKWARD and V > K else K
    parts = 2 * KEYS + (V + BN - 1) // BN
    part = tl.program_id(0) % parts
    tile = (tl.program_id(0) // parts) % chunks
    place = tl.program_id(0) // (parts * chunks)
    row, head = place // heads, place % heads
    _, first, size = _segment(row, places, INDEXED, TABLED)
    rate = _rate(log_decay, head)
    q_start, k_start, v_start = _start(q, row, head), _start(k, row, head // groups), _start(v, row, head // groups)
    if BACKWARD:
        do_start = _start(do, row, head)
        back = part >= KEYS
        keys = part < 2 * KEYS
        block = part - KEYS * (back.to(tl.int32) + (part >= 2 * KEYS).to(tl.int32))
        height, width = V if keys else K, K if keys else V
        x, x_stride = (v_start if back else do_start), (v[3] if back else do[3])
        u, u_stride = (do_start if back else v_start), (do[3] if back else v[3])
        y, y_stride = (q_start if back else k_start), (q[3] if back else k[3])
        z, z_stride = _start(dq, row, head), dq[3]
        if back:
            z, z_stride = _start(dk, row, head), dk[3]
        if part >= 2 * KEYS:
            x, x_stride, u, u_stride, y, y_stride = k_start, k[3], q_start, q[3], do_start, do[3]
            z, z_stride = _start(dv, row, head), dv[3]
    else:
        back, block, height, width = False, part, K, V
        x, x_stride, u, u_stride, y, y_stride = q_start, q[3], k_start, k[3], v_start, v[3]
        z, z_stride = _start(out, row, head), out[3]
    n = block * BN + tl.arange(0, BN)
    i = tl.arange(0, C)
    there = tile * C + i < size
    base, tokens = _tokens(places, row, first + tile * C, i, there, INDEXED)
    z_i = tl.zeros([C, BN], tl.float32)
    late = tl.zeros([C, BN], tl.float32)
    begin, end = 0, tl.cdiv(size, C)
    if CAUSAL:
        begin = tile if back else 0
        end = end if back else tl.minimum(tile + 1, end)
    for other in range(begin, end):
        there_j = other * C + i < size
        base_j, tokens_j = _tokens(places, row, first + other * C, i, there_j, INDEXED)
        pairs = tl.zeros([C, C], tl.float32)
        for piece in tl.static_range((MOST + BM - 1) // BM):
            m = piece * BM + tl.arange(0, BM)
            x_i = _load(_pointers(x, x_stride, base, tokens, m), _real(there, m, height, False))
            u_j = _load(_pointers(u, u_stride, base_j, tokens_j, m), _real(there_j, m, height, False))
            pairs = tl.dot(x_i, tl.trans(u_j), pairs, input_precision=PRECISION)
        distance = (tile - other) * C + i[:, None] - i[None, :]
        if CAUSAL:
            pairs = tl.where((distance <= 0) if back else (distance >= 0), pairs, 0.0)
        distance = tl.abs(distance).to(tl.float32)
        pairs *= tl.exp2(rate * distance) * scale
        y_j = _load(_pointers(y, y_stride, base_j, tokens_j, n), _real(there_j, n, width, False))
        z_i = tl.dot(_rounded(pairs, DTYPE), y_j, z_i, input_precision=PRECISION)
        if SLOPES:
            late = tl.dot(_rounded(pairs * distance, DTYPE), y_j, late, input_precision=PRECISION)
    _store(_pointers(z, z_stride, base, tokens, n), z_i, _real(there, n, width, False))
    if SLOPES:
        mine = _cells(there & (part < KEYS), n, K, BN)
        q_i = _load(_pointers(q_start, q[3], base, tokens, n), mine).to(tl.float32)
        tl.store(slopes + tl.program_id(0), tl.sum(tl.sum(late * q_i, 1), 0))
