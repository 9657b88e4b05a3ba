"""The Triton kernels: retention and its gradients over segments of chunks.

A segment is a run of tokens of one sequence, and consists of chunks of C tokens, of which the last may be shorter. With
i = 0 ... n - 1 the tokens of a chunk, a_i = gamma^(i + 1) and w_i = gamma^(n - 1 - i), all four results are one loop:

    y_i = r_i (x_i S) + (A y)_i,    S <- gamma^n S + sum_j u_j^T (f_j y_j)

    result  x   u   y   A           time      r          f
    out     q   k   v   scores      forward   scale a    w
    dq      do  v   k   dscores     forward   scale a    w
    dk      v   do  q   dscores^T   backward  w          scale a
    dv      k   q   do  scores^T    backward  w          scale a

with scores_ij = scale gamma^(i - j) q_i . k_j and dscores_ij = scale gamma^(i - j) do_i . v_j for j <= i. A program
owns all channels of x and u and a block of those of y, so that no sums of programs meet and results do not depend on
the order of execution. `prepare` computes the scores and the state that each segment adds, `join` adds these from
segment to segment, and `core` runs the loop. `one_pass` computes its scores itself.

Arguments: a tensor comes as (pointer, stride of row, stride of head, stride of token), its channels are contiguous;
    `places` says where segments lie, see `_segment`. Products of float32 have the precision PRECISION. Products with a
    state in a call in float16 are computed in bfloat16, since a sum of many tokens may exceed the range of float16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

__all__ = ["SIZES", "core", "join", "one_pass", "prepare", "slope", "step"]

# The interpreter multiplies the bits of bfloat16 and cuts instead of rounding, so tiles are float32 there.
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
SIZES = [
    "places",
    "scale",
    "heads",
    "groups",
    "chunks",
]  # no kernel of its own for a size that is 1 or a multiple of 16
_LOG2_E = tl.constexpr(1.4426950408889634)
_SLOWEST = tl.constexpr(-1e4)  # decays faster than exp(-1e4) are 0 after one token, and -inf * 0 would be NaN


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """Return x as an operand of a product in DTYPE."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def _with_state(x, DTYPE: tl.constexpr):
    """Return x as an operand of a product with a state."""
    if DTYPE == tl.float16:
        return _rounded(x, tl.bfloat16)
    else:
        return _rounded(x, DTYPE)


@triton.jit
def _load(pointers, there):
    """Load numbers, 0 where there is none."""
    x = tl.load(pointers, mask=there, other=0.0)
    if _INTERPRETED and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _store(pointers, x, there):
    """Store numbers in the dtype of the memory."""
    DTYPE: tl.constexpr = pointers.dtype.element_ty
    tl.store(pointers, _rounded(x, DTYPE).to(DTYPE), mask=there)


@triton.jit
def _segment(segment, places, INDEXED: tl.constexpr, TABLED: tl.constexpr):
    """Return the row of a segment, its first token, and the number of its tokens.

    places: (table, index, length, per sequence, tokens). Segments of equal size cut each row; with TABLED, the table
    (segments, 3) has the three numbers. With INDEXED, tokens are places in the row of an index (rows, length).
    """
    if TABLED:
        row = tl.load(places[0] + 3 * segment)
        first = tl.load(places[0] + 3 * segment + 1)
        size = tl.load(places[0] + 3 * segment + 2)
    else:
        row = segment // places[3]
        first = (segment % places[3]) * places[4]
        size = tl.minimum(places[2] - first, places[4])
    return row, first, size


@triton.jit
def _start(x, row, head):
    """Return the pointer to the first token of a row and head."""
    return x[0] + row.to(tl.int64) * x[1] + head.to(tl.int64) * x[2]


@triton.jit
def _tokens(places, row, first, i, there, INDEXED: tl.constexpr):
    """Return the places of tokens first + i in their row, as a number for all and one for each."""
    if INDEXED:
        index = places[1] + row.to(tl.int64) * places[2] + first
        return tl.zeros([], tl.int64), tl.load(index + i, mask=there, other=0).to(tl.int64)
    else:
        return first.to(tl.int64), i


@triton.jit
def _pointers(start, stride, base, tokens, columns):
    """Return pointers (tokens, columns)."""
    return (start + base * stride) + (tokens * stride)[:, None] + columns[None, :]


@triton.jit
def _cells(there, columns, N: tl.constexpr, BN: tl.constexpr):
    """Return which of the cells (tokens, columns) exist; blocks of BN columns that fill N need no mask of columns."""
    if N % BN == 0:
        return there[:, None]
    else:
        return there[:, None] & (columns < N)[None, :]


@triton.jit
def _rate(log_decay, head):
    """Return log2(gamma) of a head."""
    return tl.maximum(tl.load(log_decay + head).to(tl.float32), _SLOWEST) * _LOG2_E


@triton.jit
def _read(rate, scale, i):
    """Return scale gamma^(i + 1)."""
    return tl.exp2(rate * (i + 1)) * scale


@triton.jit
def _write(rate, size, i):
    """Return gamma^(size - 1 - i), and 0 after the end."""
    return tl.where(i < size, tl.exp2(rate * tl.maximum(size - 1 - i, 0)), 0.0)


@triton.jit
def _inner(rate, scale, i):
    """Return scale gamma^(i - j) for j <= i, else 0, (C, C)."""
    age = rate * i
    decay = tl.exp2(tl.minimum(age[:, None] - age[None, :], 0.0))
    return tl.where(i[:, None] >= i[None, :], decay * scale, 0.0)


@triton.jit(do_not_specialize=SIZES)
def one_pass(
    q,
    k,
    v,
    out,
    log_decay,
    before,
    after,
    places,
    scale,
    heads,
    groups,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEXED: tl.constexpr,
    TABLED: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
):
    """Compute out for a segment and a block of V, from the state before; write the state after if AFTER.

    before, after: (segments, heads, K, V).
    """
    BLOCKS: tl.constexpr = (V + BN - 1) // BN
    block = tl.program_id(0) % BLOCKS
    place = tl.program_id(0) // BLOCKS
    segment, head = place // heads, place % heads
    row, first, size = _segment(segment, places, INDEXED, TABLED)
    rate = _rate(log_decay, head)
    q_start, k_start = _start(q, row, head), _start(k, row, head // groups)
    v_start, out_start = _start(v, row, head // groups), _start(out, row, head)
    keys, values = tl.arange(0, BK), block * BN + tl.arange(0, BN)
    i = tl.arange(0, C)
    cell = place.to(tl.int64) * (K * V) + keys[:, None] * V + values[None, :]
    real = (keys < K)[:, None] & (values < V)[None, :]
    s = tl.zeros([BK, BN], tl.float32)
    if BEFORE:
        s = _load(before + cell, real).to(tl.float32)
    for c in range(tl.cdiv(size, C)):
        there = c * C + i < size
        n = tl.minimum(size - c * C, C)
        base, tokens = _tokens(places, row, first + c * C, i, there, INDEXED)
        q_i = _load(_pointers(q_start, q[3], base, tokens, keys), _cells(there, keys, K, BK))
        k_i = _load(_pointers(k_start, k[3], base, tokens, keys), _cells(there, keys, K, BK))
        v_i = _load(_pointers(v_start, v[3], base, tokens, values), _cells(there, values, V, BN))
        # Adding 0, which depends on the chunk, keeps the compiler from holding these factors through the loop.
        scores = tl.dot(q_i, tl.trans(k_i), input_precision=PRECISION) * _inner(rate, scale, i + tl.minimum(n, 0))
        scores = _rounded(scores, DTYPE)
        y = tl.dot(_with_state(q_i, DTYPE), _with_state(s, DTYPE), input_precision=PRECISION)
        y = tl.dot(scores, v_i, y * _read(rate, scale, i)[:, None], input_precision=PRECISION)
        _store(_pointers(out_start, out[3], base, tokens, values), y, _cells(there, values, V, BN))
        v_i = _rounded(v_i * _write(rate, n, i)[:, None], DTYPE)
        s = tl.dot(tl.trans(k_i), v_i, s * tl.exp2(rate * n), input_precision=PRECISION)
    if AFTER:
        _store(after + cell, s, real)


@triton.jit(do_not_specialize=SIZES)
def prepare(
    q,
    k,
    v,
    do,
    log_decay,
    scores,
    states,
    dstates,
    slopes,
    places,
    scale,
    heads,
    groups,
    chunks,
    matrices,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEXED: tl.constexpr,
    TABLED: tl.constexpr,
    SCORES: tl.constexpr,
    STATES: tl.constexpr,
    BACKWARD: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """Compute, for a chunk, its scores; or, for a block of K and of V, the state that a segment adds.

    SCORES and STATES say which of the two is wanted, BACKWARD whether dscores and dstates are, and SLOPES whether the
    part of the gradient of the decay is that comes from tokens of one chunk.

    scores: (segments, heads, chunks, C, C) in the dtype of q; with BACKWARD (3, ...) for dscores, dscores^T and
    scores^T, each of `matrices` numbers. states, dstates: (segments, heads, K, V); slopes: (segments, heads, chunks)
    float32. chunks: number of chunks of a segment.
    """
    BLOCKS: tl.constexpr = ((K + BK - 1) // BK) * ((V + BV - 1) // BV) if STATES else 0
    parts = BLOCKS
    if SCORES:
        parts += chunks
    part = tl.program_id(0) % parts
    place = tl.program_id(0) // parts
    segment, head = place // heads, place % heads
    row, first, size = _segment(segment, places, INDEXED, TABLED)
    rate = _rate(log_decay, head)
    q_start, k_start = _start(q, row, head), _start(k, row, head // groups)
    v_start, do_start = _start(v, row, head // groups), q_start
    if BACKWARD:
        do_start = _start(do, row, head)
    i = tl.arange(0, C)
    if part < BLOCKS:
        if STATES:
            keys = (part // ((V + BV - 1) // BV)) * BK + tl.arange(0, BK)
            values = (part % ((V + BV - 1) // BV)) * BV + tl.arange(0, BV)
            s = tl.zeros([BK, BV], tl.float32)
            ds = tl.zeros([BK, BV], tl.float32)
            for c in range(tl.cdiv(size, C)):
                there = c * C + i < size
                base, tokens = _tokens(places, row, first + c * C, i, there, INDEXED)
                k_i = _load(_pointers(k_start, k[3], base, tokens, keys), _cells(there, keys, K, BK))
                v_i = _load(_pointers(v_start, v[3], base, tokens, values), _cells(there, values, V, BV))
                v_i = _rounded(v_i * _write(rate, size, c * C + i)[:, None], DTYPE)
                s = tl.dot(tl.trans(k_i), v_i, s, input_precision=PRECISION)
                if BACKWARD:
                    q_i = _load(_pointers(q_start, q[3], base, tokens, keys), _cells(there, keys, K, BK))
                    do_i = _load(_pointers(do_start, do[3], base, tokens, values), _cells(there, values, V, BV))
                    do_i = _rounded(do_i * _read(rate, scale, c * C + i)[:, None], DTYPE)
                    ds = tl.dot(tl.trans(q_i), do_i, ds, input_precision=PRECISION)
            cell = place.to(tl.int64) * (K * V) + keys[:, None] * V + values[None, :]
            real = (keys < K)[:, None] & (values < V)[None, :]
            _store(states + cell, s, real)
            if BACKWARD:
                _store(dstates + cell, ds, real)
    else:
        if SCORES:
            c = part - BLOCKS
            there = c * C + i < size
            base, tokens = _tokens(places, row, first + c * C, i, there, INDEXED)
            found = tl.zeros([C, C], tl.float32)
            for block in tl.static_range((K + BK - 1) // BK):
                keys = block * BK + tl.arange(0, BK)
                q_i = _load(_pointers(q_start, q[3], base, tokens, keys), _cells(there, keys, K, BK))
                k_i = _load(_pointers(k_start, k[3], base, tokens, keys), _cells(there, keys, K, BK))
                found = tl.dot(q_i, tl.trans(k_i), found, input_precision=PRECISION)
            inner = _inner(rate, scale, i)
            tile = place.to(tl.int64) * chunks + c
            straight = tile * (C * C) + i[:, None] * C + i[None, :]
            everywhere = (i >= 0)[:, None] & (i >= 0)[None, :]
            if not BACKWARD:
                _store(scores + straight, found * inner, everywhere)
            else:
                dfound = tl.zeros([C, C], tl.float32)
                for block in tl.static_range((V + BV - 1) // BV):
                    values = block * BV + tl.arange(0, BV)
                    v_i = _load(_pointers(v_start, v[3], base, tokens, values), _cells(there, values, V, BV))
                    do_i = _load(_pointers(do_start, do[3], base, tokens, values), _cells(there, values, V, BV))
                    dfound = tl.dot(do_i, tl.trans(v_i), dfound, input_precision=PRECISION)
                dfound *= inner
                turned = tile * (C * C) + i[None, :] * C + i[:, None]
                _store(scores + straight, dfound, everywhere)
                _store(scores + matrices + turned, dfound, everywhere)
                _store(scores + 2 * matrices + turned, found * inner, everywhere)
                if SLOPES:
                    distance = (i[:, None] - i[None, :]).to(tl.float32)
                    tl.store(slopes + tile, tl.sum(tl.sum(found * dfound * distance, 1), 0))


@triton.jit(do_not_specialize=SIZES)
def join(
    states,
    dstates,
    log_decay,
    before,
    after,
    dbefore,
    dafter,
    borders,
    places,
    heads,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEXED: tl.constexpr,
    TABLED: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BACKWARD: tl.constexpr,
    DBEFORE: tl.constexpr,
    DAFTER: tl.constexpr,
):
    """Turn the state that each segment adds into the state before it; with BACKWARD also gradients, of those after it.

    states, dstates: (segments, heads, K, V), overwritten, and K V = CELLS. before, after: of sequences, (sequences,
    heads, K, V); dbefore, dafter: their gradients. borders: the first segment of each sequence and the end, if TABLED.
    """
    BLOCKS: tl.constexpr = (CELLS + BLOCK - 1) // BLOCK
    place = tl.program_id(0)
    back = place % 2 if BACKWARD else 0
    place = place // 2 if BACKWARD else place
    block = place % BLOCKS
    place = place // BLOCKS
    sequence, head = place // heads, place % heads
    if TABLED:
        start, end = tl.load(borders + sequence), tl.load(borders + sequence + 1)
    else:
        start = sequence * places[3]
        end = start + places[3]
    rate = _rate(log_decay, head)
    cells = block * BLOCK + tl.arange(0, BLOCK)
    real = cells < CELLS
    mine = place.to(tl.int64) * CELLS + cells
    stride = heads.to(tl.int64) * CELLS
    if back == 0:
        s = tl.zeros([BLOCK], tl.float32)
        if BEFORE:
            s = _load(before + mine, real).to(tl.float32)
        for segment in range(start, end):
            _, _, size = _segment(segment, places, INDEXED, TABLED)
            cell = segment * stride + head * CELLS + cells
            added = _load(states + cell, real).to(tl.float32)
            _store(states + cell, s, real)
            s = s * tl.exp2(rate * size) + added
        if AFTER:
            _store(after + mine, s, real)
    else:
        if BACKWARD:
            ds = tl.zeros([BLOCK], tl.float32)
            if DAFTER:
                ds = _load(dafter + mine, real).to(tl.float32)
            for number in range(start, end):
                segment = end - 1 - (number - start)
                _, _, size = _segment(segment, places, INDEXED, TABLED)
                cell = segment * stride + head * CELLS + cells
                added = _load(dstates + cell, real).to(tl.float32)
                _store(dstates + cell, ds, real)
                ds = ds * tl.exp2(rate * size) + added
            if DBEFORE:
                _store(dbefore + mine, ds, real)


@triton.jit
def _real(there, columns, width, EVEN: tl.constexpr):
    """Return which of the cells (tokens, columns) exist; if EVEN, all columns do."""
    if EVEN:
        return there[:, None]
    else:
        return there[:, None] & (columns < width)[None, :]


@triton.jit
def _read_piece(z, x, stride, base, tokens, there, m, width, s, EVEN: tl.constexpr, DTYPE, PRECISION: tl.constexpr):
    """Return z + x S for a piece m of the channels of x."""
    x_i = _load(_pointers(x, stride, base, tokens, m), _real(there, m, width, EVEN))
    return tl.dot(_with_state(x_i, DTYPE), _with_state(s, DTYPE), z, input_precision=PRECISION)


@triton.jit
def _write_piece(s, carry, x, stride, base, tokens, there, m, width, y, EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """Return carry S + u^T y for a piece m of the channels of u."""
    u_i = _load(_pointers(x, stride, base, tokens, m), _real(there, m, width, EVEN))
    return tl.dot(tl.trans(u_i), y, s * carry, input_precision=PRECISION)


@triton.jit
def _load_piece(state, m, n, m_stride, n_stride, height, width, given):
    """Load the cells (m, n) of a state."""
    there = (m < height)[:, None] & (n < width)[None, :] & given
    return _load(state + m[:, None] * m_stride + n[None, :] * n_stride, there).to(tl.float32)


@triton.jit
def _store_piece(state, m, n, width, height, s):
    """Store the cells (m, n) of a state whose rows have `width` cells."""
    _store(state + m[:, None] * width + n[None, :], s, (m < height)[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=SIZES)
def core(
    q,
    k,
    v,
    do,
    out,
    dq,
    dk,
    dv,
    log_decay,
    scores,
    before,
    after,
    dbefore,
    dafter,
    places,
    scale,
    heads,
    groups,
    chunks,
    matrices,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEXED: tl.constexpr,
    TABLED: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BACKWARD: tl.constexpr,
    DBEFORE: tl.constexpr,
    DAFTER: tl.constexpr,
):
    """Run the loop of this file over a segment, for a block of out; or, if BACKWARD, for a block of dq, dk or dv.

    BM: channels of x and u in a piece, of which there are 1, 2 or 4; BN: channels of y in a block. scores: as `prepare`
    makes them, `matrices` numbers for each kind. before, after, dbefore, dafter: (segments, heads, K, V), the states
    before and after each segment and their gradients. Forward reads before and writes after; backward reads before and
    dafter and writes dbefore.
    """
    MOST: tl.constexpr = V if BACKWARD and V > K else K
    PIECES: tl.constexpr = 4 if MOST > 2 * BM else 2 if MOST > BM else 1
    EVEN: tl.constexpr = (K == V or not BACKWARD) and MOST % (PIECES * BM) == 0
    KEYS: tl.constexpr = (K + BN - 1) // BN if BACKWARD else 0
    parts = 2 * KEYS + (V + BN - 1) // BN
    part = tl.program_id(0) % parts
    place = tl.program_id(0) // parts
    segment, head = place // heads, place % heads
    row, first, size = _segment(segment, places, INDEXED, TABLED)
    rate = _rate(log_decay, head)
    q_start, k_start, v_start = _start(q, row, head), _start(k, row, head // groups), _start(v, row, head // groups)
    tiles = scores + place.to(tl.int64) * chunks * (C * C)
    cells = place.to(tl.int64) * (K * V)
    if BACKWARD:
        do_start = _start(do, row, head)
        back = part >= KEYS  # dk and dv go backward in time
        keys = part < 2 * KEYS  # dq and dk have the channels of a key, dv those of a value
        block = part - KEYS * (back.to(tl.int32) + (part >= 2 * KEYS).to(tl.int32))
        tiles += matrices * (back.to(tl.int64) + (part >= 2 * KEYS).to(tl.int64))
        height, width = V if keys else K, K if keys else V
        m_stride, n_stride = 1 if keys else V, V if keys else 1
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
        back, block, height, width, m_stride, n_stride = False, part, K, V, V, 1
        x, x_stride, u, u_stride, y, y_stride = q_start, q[3], k_start, k[3], v_start, v[3]
        z, z_stride = _start(out, row, head), out[3]
    m = tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    EVEN_N: tl.constexpr = V % BN == 0 and (K % BN == 0 or not BACKWARD)
    i = tl.arange(0, C)
    s0 = tl.zeros([BM, BN], tl.float32)
    s1, s2, s3 = s0, s0, s0
    if BEFORE or DAFTER:
        state, given = before, True
        if BACKWARD and DAFTER:
            state, given = dafter, back
            if BEFORE:
                state, given = dafter if back else before, True
        elif BACKWARD:
            given = part < KEYS
        s0 = _load_piece(state + cells, m, n, m_stride, n_stride, height, width, given)
        if PIECES > 1:
            s1 = _load_piece(state + cells, BM + m, n, m_stride, n_stride, height, width, given)
        if PIECES > 2:
            s2 = _load_piece(state + cells, 2 * BM + m, n, m_stride, n_stride, height, width, given)
            s3 = _load_piece(state + cells, 3 * BM + m, n, m_stride, n_stride, height, width, given)
    count = tl.cdiv(size, C)
    # fmt: off
    for number in range(count):
        c = count - 1 - number if back else number
        there = c * C + i < size
        tokens_here = tl.minimum(size - c * C, C)
        base, tokens = _tokens(places, row, first + c * C, i, there, INDEXED)
        r, f = _read(rate, scale, i), _write(rate, tokens_here, i)
        if BACKWARD:
            r, f = tl.where(back, f, r), tl.where(back, r, f)
        y_i = _load(_pointers(y, y_stride, base, tokens, n), _real(there, n, width, EVEN_N))
        a = tl.load(tiles + c * (C * C) + i[:, None] * C + i[None, :])
        if _INTERPRETED and DTYPE == tl.bfloat16:
            a = a.to(tl.float32)
        z_i = tl.zeros([C, BN], tl.float32)
        z_i = _read_piece(z_i, x, x_stride, base, tokens, there, m, height, s0, EVEN, DTYPE, PRECISION)
        if PIECES > 1:
            z_i = _read_piece(z_i, x, x_stride, base, tokens, there, BM + m, height, s1, EVEN, DTYPE, PRECISION)
        if PIECES > 2:
            z_i = _read_piece(z_i, x, x_stride, base, tokens, there, 2 * BM + m, height, s2, EVEN, DTYPE, PRECISION)
            z_i = _read_piece(z_i, x, x_stride, base, tokens, there, 3 * BM + m, height, s3, EVEN, DTYPE, PRECISION)
        z_i = tl.dot(a, y_i, z_i * r[:, None], input_precision=PRECISION)
        _store(_pointers(z, z_stride, base, tokens, n), z_i, _real(there, n, width, EVEN_N))
        y_i = _rounded(y_i * f[:, None], DTYPE)
        carry = tl.exp2(rate * tokens_here)
        s0 = _write_piece(s0, carry, u, u_stride, base, tokens, there, m, height, y_i, EVEN, PRECISION)
        if PIECES > 1:
            s1 = _write_piece(s1, carry, u, u_stride, base, tokens, there, BM + m, height, y_i, EVEN, PRECISION)
        if PIECES > 2:
            s2 = _write_piece(s2, carry, u, u_stride, base, tokens, there, 2 * BM + m, height, y_i, EVEN, PRECISION)
            s3 = _write_piece(s3, carry, u, u_stride, base, tokens, there, 3 * BM + m, height, y_i, EVEN, PRECISION)
    # fmt: on
    if AFTER or DBEFORE:
        end = after
        if BACKWARD:
            end = dbefore
            height = K if part >= 2 * KEYS else 0  # only dv holds the gradient of a state in its own layout
        _store_piece(end + cells, m, n, V, height, s0)
        if PIECES > 1:
            _store_piece(end + cells, BM + m, n, V, height, s1)
        if PIECES > 2:
            _store_piece(end + cells, 2 * BM + m, n, V, height, s2)
            _store_piece(end + cells, 3 * BM + m, n, V, height, s3)


@triton.jit(do_not_specialize=SIZES)
def slope(
    q,
    k,
    v,
    do,
    log_decay,
    before,
    dafter,
    slopes,
    places,
    scale,
    heads,
    groups,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEXED: tl.constexpr,
    TABLED: tl.constexpr,
    BEFORE: tl.constexpr,
    DAFTER: tl.constexpr,
):
    """Compute the gradient of log_decay that comes from the states in a segment, for a block of K and of V.

    With S' the derivative of S by log_decay, which is 0 at the beginning of the segment:

        slope = sum_i scale a_i do_i . (q_i ((i + 1) S + S')) + <S' after the segment, dafter>
        S' <- gamma^n (S' + n S) + sum_j (n - 1 - j) w_j k_j^T v_j

    All terms are exponents of one segment and none is a difference of large sums. slopes: (segments, heads, blocks).
    """
    BLOCKS: tl.constexpr = ((K + BK - 1) // BK) * ((V + BV - 1) // BV)
    part = tl.program_id(0) % BLOCKS
    place = tl.program_id(0) // BLOCKS
    segment, head = place // heads, place % heads
    row, first, size = _segment(segment, places, INDEXED, TABLED)
    rate = _rate(log_decay, head)
    q_start, k_start = _start(q, row, head), _start(k, row, head // groups)
    v_start, do_start = _start(v, row, head // groups), _start(do, row, head)
    keys = (part // ((V + BV - 1) // BV)) * BK + tl.arange(0, BK)
    values = (part % ((V + BV - 1) // BV)) * BV + tl.arange(0, BV)
    real = (keys < K)[:, None] & (values < V)[None, :]
    i = tl.arange(0, C)
    cell = place.to(tl.int64) * (K * V) + keys[:, None] * V + values[None, :]
    s = tl.zeros([BK, BV], tl.float32)
    if BEFORE:
        s = _load(before + cell, real).to(tl.float32)
    derivative = tl.zeros([BK, BV], tl.float32)
    found = tl.zeros([C], tl.float32)
    for c in range(tl.cdiv(size, C)):
        there = c * C + i < size
        n = tl.minimum(size - c * C, C)
        base, tokens = _tokens(places, row, first + c * C, i, there, INDEXED)
        q_i = _load(_pointers(q_start, q[3], base, tokens, keys), _cells(there, keys, K, BK))
        k_i = _load(_pointers(k_start, k[3], base, tokens, keys), _cells(there, keys, K, BK))
        v_i = _load(_pointers(v_start, v[3], base, tokens, values), _cells(there, values, V, BV))
        do_i = _load(_pointers(do_start, do[3], base, tokens, values), _cells(there, values, V, BV))
        x = _with_state(q_i, DTYPE)
        y = tl.dot(x, _with_state(s, DTYPE), input_precision=PRECISION) * (i + 1).to(tl.float32)[:, None]
        y = tl.dot(x, _with_state(derivative, DTYPE), y, input_precision=PRECISION)
        found += tl.sum(y * do_i.to(tl.float32), 1) * _read(rate, scale, i)
        carry = tl.exp2(rate * n)
        w = _write(rate, n, i)
        late = _rounded(v_i * (w * tl.maximum(n - 1 - i, 0).to(tl.float32))[:, None], DTYPE)
        derivative = tl.dot(tl.trans(k_i), late, (derivative + s * n) * carry, input_precision=PRECISION)
        s = tl.dot(tl.trans(k_i), _rounded(v_i * w[:, None], DTYPE), s * carry, input_precision=PRECISION)
    total = tl.sum(found, 0)
    if DAFTER:
        total += tl.sum(tl.sum(derivative * _load(dafter + cell, real).to(tl.float32), 1), 0)
    tl.store(slopes + tl.program_id(0), total)


@triton.jit(do_not_specialize=SIZES)
def step(
    q,
    k,
    v,
    out,
    log_decay,
    state,
    mask,
    scale,
    heads,
    groups,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Compute S <- gamma S + k^T v and out = scale q S for one token and a block of V; `state` is overwritten.

    state: (rows, heads, K, V); mask: (rows,), False keeps the state and makes out 0.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    block = tl.program_id(0) % BLOCKS
    place = tl.program_id(0) // BLOCKS
    row, head = place // heads, place % heads
    keys, values = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    real_keys, real_values = keys < K, values < V
    real = real_keys[:, None] & real_values[None, :]
    token = row >= 0
    if MASKED:
        token = tl.load(mask + row) != 0
    q_i = _load(_start(q, row, head) + keys, real_keys & token).to(tl.float32)
    k_i = _load(_start(k, row, head // groups) + keys, real_keys & token).to(tl.float32)
    v_i = _load(_start(v, row, head // groups) + values, real_values & token).to(tl.float32)
    cell = place.to(tl.int64) * (K * V) + keys[:, None] * V + values[None, :]
    s = _load(state + cell, real & token)
    s = s * tl.exp2(_rate(log_decay, head)) + k_i[:, None] * v_i[None, :]
    _store(state + cell, s, real & token)
    _store(_start(out, row, head) + values, tl.sum(q_i[:, None] * s, 0) * scale, real_values)
