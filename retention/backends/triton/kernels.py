"""The Triton kernels: retention and its gradients over segments of chunks.

A segment is a run of tokens of one sequence, and consists of chunks of C tokens, of which the last may be shorter. With
i = 0 ... n - 1 the tokens of a chunk, a_i = gamma^(i + 1) and w_i = gamma^(n - 1 - i), all four results are one loop:

    y_i = r_i (x_i S) + (A y)_i,    S <- gamma^n S + sum_j l_j^T (f_j y_j)

    result  x   l   y   A           time      r          f
    out     q   k   v   scores      forward   scale a    w
    dq      do  v   k   dscores     forward   scale a    w
    dk      v   do  q   dscores^T   backward  w          scale a
    dv      k   q   do  scores^T    backward  w          scale a

with scores_ij = scale gamma^(i - j) q_i . k_j and dscores_ij = scale gamma^(i - j) do_i . v_j for j <= i. A program owns
all channels of x and l and a block of those of y, so that no sums of programs meet and results do not depend on the
order of execution. `prepare` computes the scores and the state that each segment adds, `join` adds these from segment
to segment, and `core` runs the loop. `one_pass` computes its scores itself.

Arguments: a tensor comes as (pointer, stride of row, stride of head, stride of token), its channels are contiguous;
    `places` says where segments lie, see `_segment`. Products of float32 have the precision PRECISION. Products with a
    state in a call in float16 are computed in bfloat16, since a sum of many tokens may exceed the range of float16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter multiplies the bits of bfloat16 and cuts instead of rounding, so tiles are float32 there.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
SIZES = [
    "places",
    "scale",
    "heads",
    "groups",
    "chunks",
]  # no kernel of its own for a size that is 1 or a multiple of 16
LOG2_E = tl.constexpr(1.4426950408889634)
SLOWEST = tl.constexpr(-1e4)  # decays faster than exp(-1e4) are 0 after one token, and -inf * 0 would be NaN


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """Return x as an operand of a product in DTYPE."""
    if INTERPRETED and DTYPE == tl.bfloat16:
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
    if INTERPRETED and x.dtype == tl.bfloat16:
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
    return tl.maximum(tl.load(log_decay + head).to(tl.float32), SLOWEST) * LOG2_E


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
    distance = i[:, None] - i[None, :]
    return tl.where(distance >= 0, tl.exp2(rate * tl.maximum(distance, 0)) * scale, 0.0)


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
    BV: tl.constexpr,
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
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    block = tl.program_id(0) % BLOCKS
    place = tl.program_id(0) // BLOCKS
    segment, head = place // heads, place % heads
    row, first, size = _segment(segment, places, INDEXED, TABLED)
    rate = _rate(log_decay, head)
    q_start, k_start = _start(q, row, head), _start(k, row, head // groups)
    v_start, out_start = _start(v, row, head // groups), _start(out, row, head)
    keys, values = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    cell = place.to(tl.int64) * (K * V) + keys[:, None] * V + values[None, :]
    real = (keys < K)[:, None] & (values < V)[None, :]
    s = tl.zeros([BK, BV], tl.float32)
    if BEFORE:
        s = _load(before + cell, real).to(tl.float32)
    for c in range(tl.cdiv(size, C)):
        there = c * C + i < size
        n = tl.minimum(size - c * C, C)
        base, tokens = _tokens(places, row, first + c * C, i, there, INDEXED)
        q_i = _load(_pointers(q_start, q[3], base, tokens, keys), _cells(there, keys, K, BK))
        k_i = _load(_pointers(k_start, k[3], base, tokens, keys), _cells(there, keys, K, BK))
        v_i = _load(_pointers(v_start, v[3], base, tokens, values), _cells(there, values, V, BV))
        # c in the argument keeps the compiler from holding these factors in registers through the loop.
        scores = tl.dot(q_i, tl.trans(k_i), input_precision=PRECISION) * _inner(rate, scale, c * C + i)
        scores = _rounded(scores, DTYPE)
        y = tl.dot(_with_state(q_i, DTYPE), _with_state(s, DTYPE), input_precision=PRECISION)
        y = tl.dot(scores, v_i, y * _read(rate, scale, i)[:, None], input_precision=PRECISION)
        _store(_pointers(out_start, out[3], base, tokens, values), y, _cells(there, values, V, BV))
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
    dscores,
    states,
    dstates,
    slopes,
    places,
    scale,
    heads,
    groups,
    chunks,
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
    part of the decay's gradient is that comes from tokens of one chunk.

    scores, dscores: (segments, heads, chunks, C, C) in the dtype of q; states, dstates: (segments, heads, K, V);
    slopes: (segments, heads, chunks) float32. chunks: number of chunks of a segment.
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
            cell = tile * (C * C) + i[:, None] * C + i[None, :]
            everywhere = (i >= 0)[:, None] & (i >= 0)[None, :]
            _store(scores + cell, found * inner, everywhere)
            if BACKWARD:
                dfound = tl.zeros([C, C], tl.float32)
                for block in tl.static_range((V + BV - 1) // BV):
                    values = block * BV + tl.arange(0, BV)
                    v_i = _load(_pointers(v_start, v[3], base, tokens, values), _cells(there, values, V, BV))
                    do_i = _load(_pointers(do_start, do[3], base, tokens, values), _cells(there, values, V, BV))
                    dfound = tl.dot(do_i, tl.trans(v_i), dfound, input_precision=PRECISION)
                dfound *= inner
                _store(dscores + cell, dfound, everywhere)
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
            row, first, size = _segment(segment, places, INDEXED, TABLED)
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
                row, first, size = _segment(segment, places, INDEXED, TABLED)
                cell = segment * stride + head * CELLS + cells
                added = _load(dstates + cell, real).to(tl.float32)
                _store(dstates + cell, ds, real)
                ds = ds * tl.exp2(rate * size) + added
            if DBEFORE:
                _store(dbefore + mine, ds, real)


@triton.jit
def _piece(pointer, place, M: tl.constexpr, N: tl.constexpr, m, n, TRANSPOSED: tl.constexpr):
    """Return the pointers to cells (m, n) of a state (M, N), or of a state (N, M) if TRANSPOSED, and which exist."""
    if TRANSPOSED:
        cell = m[:, None] + n[None, :] * M
    else:
        cell = m[:, None] * N + n[None, :]
    return pointer + place.to(tl.int64) * (M * N) + cell, (m < M)[:, None] & (n < N)[None, :]


@triton.jit
def _read_piece(
    y,
    x_start,
    stride,
    base,
    tokens,
    there,
    m,
    s,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return y + x S for a piece m of the channels of x."""
    x = _load(_pointers(x_start, stride, base, tokens, m), _cells(there, m, M, WIDTH))
    return tl.dot(_with_state(x, DTYPE), _with_state(s, DTYPE), y, input_precision=PRECISION)


@triton.jit
def _write_piece(
    s, carry, l_start, stride, base, tokens, there, m, y, M: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr
):
    """Return carry S + l^T y for a piece m of the channels of l."""
    x = _load(_pointers(l_start, stride, base, tokens, m), _cells(there, m, M, WIDTH))
    return tl.dot(tl.trans(x), y, s * carry, input_precision=PRECISION)


@triton.jit
def _walk(
    x_start,
    x_stride,
    l_start,
    l_stride,
    y_start,
    y_stride,
    z_start,
    z_stride,
    matrices,
    before,
    after,
    rate,
    scale,
    places,
    place,
    row,
    first,
    size,
    block,
    M: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEXED: tl.constexpr,
    BACK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
):
    """Run the loop of the file over the chunks of a segment, for a block of the N channels of y, and write z.

    matrices: A of the segment, transposed if BACK; before, after: states, (M, N), or (N, M) if TRANSPOSED. The M
    channels of x and l are 1, 2 or 4 pieces of BM.
    """
    PIECES: tl.constexpr = 4 if M > 2 * BM else 2 if M > BM else 1
    WIDTH: tl.constexpr = PIECES * BM
    m = tl.arange(0, BM)
    columns = block * BN + tl.arange(0, BN)
    i = tl.arange(0, C)
    s0 = tl.zeros([BM, BN], tl.float32)
    s1, s2, s3 = s0, s0, s0
    if BEFORE:
        pointers, mask = _piece(before, place, M, N, m, columns, TRANSPOSED)
        s0 = _load(pointers, mask).to(tl.float32)
        if PIECES > 1:
            pointers, mask = _piece(before, place, M, N, BM + m, columns, TRANSPOSED)
            s1 = _load(pointers, mask).to(tl.float32)
        if PIECES > 2:
            pointers, mask = _piece(before, place, M, N, 2 * BM + m, columns, TRANSPOSED)
            s2 = _load(pointers, mask).to(tl.float32)
            pointers, mask = _piece(before, place, M, N, 3 * BM + m, columns, TRANSPOSED)
            s3 = _load(pointers, mask).to(tl.float32)
    chunks = tl.cdiv(size, C)
    for step in range(chunks):
        c = step
        if BACK:
            c = chunks - 1 - step
        there = c * C + i < size
        n = tl.minimum(size - c * C, C)
        base, tokens = _tokens(places, row, first + c * C, i, there, INDEXED)
        y_i = _load(_pointers(y_start, y_stride, base, tokens, columns), _cells(there, columns, N, BN))
        if BACK:
            a = _load(matrices + c * (C * C) + i[:, None] + i[None, :] * C, there[:, None] & there[None, :])
            r = _write(rate, n, i)
            f = _read(rate, scale, i)
        else:
            a = _load(matrices + c * (C * C) + i[:, None] * C + i[None, :], there[:, None] & there[None, :])
            r = _read(rate, scale, i)
            f = _write(rate, n, i)
        z = tl.zeros([C, BN], tl.float32)
        z = _read_piece(z, x_start, x_stride, base, tokens, there, m, s0, M, WIDTH, DTYPE, PRECISION)
        if PIECES > 1:
            z = _read_piece(z, x_start, x_stride, base, tokens, there, BM + m, s1, M, WIDTH, DTYPE, PRECISION)
        if PIECES > 2:
            z = _read_piece(z, x_start, x_stride, base, tokens, there, 2 * BM + m, s2, M, WIDTH, DTYPE, PRECISION)
            z = _read_piece(z, x_start, x_stride, base, tokens, there, 3 * BM + m, s3, M, WIDTH, DTYPE, PRECISION)
        z = tl.dot(a, y_i, z * r[:, None], input_precision=PRECISION)
        _store(_pointers(z_start, z_stride, base, tokens, columns), z, _cells(there, columns, N, BN))
        y_i = _rounded(y_i * f[:, None], DTYPE)
        carry = tl.exp2(rate * n)
        s0 = _write_piece(s0, carry, l_start, l_stride, base, tokens, there, m, y_i, M, WIDTH, PRECISION)
        if PIECES > 1:
            s1 = _write_piece(s1, carry, l_start, l_stride, base, tokens, there, BM + m, y_i, M, WIDTH, PRECISION)
        if PIECES > 2:
            s2 = _write_piece(s2, carry, l_start, l_stride, base, tokens, there, 2 * BM + m, y_i, M, WIDTH, PRECISION)
            s3 = _write_piece(s3, carry, l_start, l_stride, base, tokens, there, 3 * BM + m, y_i, M, WIDTH, PRECISION)
    if AFTER:
        pointers, mask = _piece(after, place, M, N, m, columns, TRANSPOSED)
        _store(pointers, s0, mask)
        if PIECES > 1:
            pointers, mask = _piece(after, place, M, N, BM + m, columns, TRANSPOSED)
            _store(pointers, s1, mask)
        if PIECES > 2:
            pointers, mask = _piece(after, place, M, N, 2 * BM + m, columns, TRANSPOSED)
            _store(pointers, s2, mask)
            pointers, mask = _piece(after, place, M, N, 3 * BM + m, columns, TRANSPOSED)
            _store(pointers, s3, mask)


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
    dscores,
    before,
    after,
    dbefore,
    dafter,
    places,
    scale,
    heads,
    groups,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    PK: tl.constexpr,
    PV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
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
    """Compute a block of out for a segment; with BACKWARD, a block of dq, dk or dv.

    PK, PV: channels of a piece of K or V; BK, BV: channels of a block. scores and dscores as `prepare` makes them;
    before, after, dbefore, dafter: (segments, heads, K, V), the states before and after each segment and their
    gradients. Forward reads before and writes after; backward reads before and dafter and writes dbefore.
    """
    KEYS: tl.constexpr = (K + BK - 1) // BK if BACKWARD else 0
    VALUES: tl.constexpr = (V + BV - 1) // BV
    parts = 2 * KEYS + VALUES
    part = tl.program_id(0) % parts
    place = tl.program_id(0) // parts
    segment, head = place // heads, place % heads
    row, first, size = _segment(segment, places, INDEXED, TABLED)
    rate = _rate(log_decay, head)
    tiles = scores + place.to(tl.int64) * chunks * (C * C)
    q_start, k_start, v_start = _start(q, row, head), _start(k, row, head // groups), _start(v, row, head // groups)
    if BACKWARD:
        dtiles = dscores + place.to(tl.int64) * chunks * (C * C)
        do_start = _start(do, row, head)
        dq_start, dk_start, dv_start = _start(dq, row, head), _start(dk, row, head), _start(dv, row, head)
        # fmt: off
        if part < KEYS:
            _walk(
                do_start, do[3], v_start, v[3], k_start, k[3], dq_start, dq[3], dtiles, before, after, rate, scale,
                places, place, row, first, size, part,
                V, K, PV, BK, C, DTYPE, PRECISION, INDEXED, False, True, BEFORE, False,
            )
        elif part < 2 * KEYS:
            _walk(
                v_start, v[3], do_start, do[3], q_start, q[3], dk_start, dk[3], dtiles, dafter, dbefore, rate, scale,
                places, place, row, first, size, part - KEYS,
                V, K, PV, BK, C, DTYPE, PRECISION, INDEXED, True, True, DAFTER, False,
            )
        else:
            _walk(
                k_start, k[3], q_start, q[3], do_start, do[3], dv_start, dv[3], tiles, dafter, dbefore, rate, scale,
                places, place, row, first, size, part - 2 * KEYS,
                K, V, PK, BV, C, DTYPE, PRECISION, INDEXED, True, False, DAFTER, DBEFORE,
            )
    else:
        _walk(
            q_start,
            q[3],
            k_start,
            k[3],
            v_start,
            v[3],
            _start(out, row, head),
            out[3],
            tiles,
            before,
            after,
            rate,
            scale,
            places,
            place,
            row,
            first,
            size,
            part,
            K,
            V,
            PK,
            BV,
            C,
            DTYPE,
            PRECISION,
            INDEXED,
            False,
            False,
            BEFORE,
            AFTER,
        )
        # fmt: on


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
