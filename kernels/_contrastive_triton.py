"""Device code of the loss and nothing else; kernels/triton_launch.py decides sizes and calls it.

Cosines are scaled by beta * log2(e), so everything is a power of two. FIXED subtracts the largest
possible exponent from each, which needs unit rows and a temperature of at least 0.03; without it a
running maximum is kept. Pairs inside an image never stand in the heavy loops: there they are
masked, and the `finish_*` kernels, which see only a row's own image, add them with their weights.
What a newcomer gets wrong: jaxtyping's import hook must not touch this file (it breaks compilation
on a GPU), and in the interpreter `tl.dot` on bfloat16 is silently wrong, hence WIDEN.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1.0e30)
DEAD = tl.constexpr(1.0e30)
SHORTEST = tl.constexpr(1.0e-12)

_SIZES = ["N", "M", "OFFSET", "C", "SPLITS", "STRIDE", "B", "B_STRIDE", "TOTAL"]


@triton.jit
def _exponent_scale(p_temperature, temperature, LEARNED: tl.constexpr):
    if LEARNED:
        # Below its bound a fixed exponent would lose the sums: no number, rather than a wrong one.
        learned = tl.load(p_temperature).to(tl.float32)
        return LOG2_E / tl.where(learned >= temperature * 0.999999, learned, float("nan"))
    return LOG2_E / temperature


@triton.jit
def _load_halves(p_table, o_row, m_row, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of a table as two blocks of D0 and D1 coordinates; the first one twice if D1 is 0."""
    p_row = p_table + o_row.to(tl.int64)[:, None] * (D0 + D1)
    b_half0 = tl.load(p_row + tl.arange(0, D0)[None, :], mask=m_row[:, None], other=0.0)
    b_half1 = b_half0
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)
        b_half1 = tl.load(p_row + o_d1[None, :], mask=m_row[:, None], other=0.0)
    return b_half0, b_half1


@triton.jit
def _store_halves(
    p_table, o_row, m_row, b_half0, b_half1, D0: tl.constexpr, D1: tl.constexpr, PART: tl.constexpr
):
    """The opposite of `_load_halves`, in the table's element type; PART 1 or 2: that half only."""
    p_row = p_table + o_row.to(tl.int64)[:, None] * (D0 + D1)
    kind: tl.constexpr = p_table.dtype.element_ty
    if PART != 2:
        tl.store(p_row + tl.arange(0, D0)[None, :], b_half0.to(kind), mask=m_row[:, None])
    if (D1 > 0) & (PART != 1):
        o_d1 = D0 + tl.arange(0, D1)
        tl.store(p_row + o_d1[None, :], b_half1.to(kind), mask=m_row[:, None])


@triton.jit
def _zero_halves(BLOCK_N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    b_half0 = tl.zeros((BLOCK_N, D0), dtype=tl.float32)
    b_half1 = b_half0
    if D1 > 0:
        b_half1 = tl.zeros((BLOCK_N, D1), dtype=tl.float32)
    return b_half0, b_half1


@triton.jit
def _similarity(b_row0, b_row1, b_col0, b_col1, D1: tl.constexpr, WIDEN: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    if WIDEN:
        b_sim = tl.dot(b_row0.to(tl.float32), tl.trans(b_col0).to(tl.float32))
        if D1 > 0:
            b_sim = tl.dot(b_row1.to(tl.float32), tl.trans(b_col1).to(tl.float32), b_sim)
        return b_sim
    b_sim = tl.dot(b_row0, tl.trans(b_col0), input_precision=PRECISION)
    if D1 > 0:
        b_sim = tl.dot(b_row1, tl.trans(b_col1), b_sim, input_precision=PRECISION)
    return b_sim


@triton.jit
def _similarity_by_halves(b_row0, b_row1, b_col0, b_col1, scale, D1: tl.constexpr,
                          PART: tl.constexpr, WIDEN: tl.constexpr,
                          PRECISION: tl.constexpr):  # fmt: skip
    """Cosines, and what they have to be multiplied by to be exponents.

    In parts, the halves are scaled before they are added: the compiler makes a plain sum one
    product that accumulates on the other, lays eight warps out over 128 rows of a tile of 64, and
    waits for each instruction (decision 0110).
    """
    if (PART == 0) | WIDEN:
        return _similarity(b_row0, b_row1, b_col0, b_col1, D1, WIDEN, PRECISION), scale
    b_left = tl.dot(b_row0, tl.trans(b_col0), input_precision=PRECISION)
    b_right = tl.dot(b_row1, tl.trans(b_col1), input_precision=PRECISION)
    return b_left * scale + b_right * scale, 1.0


@triton.jit
def _weighted(b_weight, b_col, b_acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    if WIDEN:
        b_rounded = b_weight.to(b_col.dtype).to(tl.float32)
        return tl.dot(b_rounded, b_col.to(tl.float32), b_acc)
    return tl.dot(b_weight.to(b_col.dtype), b_col, b_acc, input_precision=PRECISION)


@triton.jit
def _own_tiles(i_tile, p_first, p_end, N, OFFSET, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """First column tile that shows an image of the row tile, and the first one after them."""
    o_last = tl.minimum(i_tile * BLOCK_N + BLOCK_N, N) - 1
    first = OFFSET + tl.load(p_first + i_tile * BLOCK_N)
    end = OFFSET + tl.load(p_end + o_last)
    return first // BLOCK_M, (end + BLOCK_M - 1) // BLOCK_M


@triton.jit
def _without_own(b_sim, o_col, b_first, b_end, M):
    """NOTHING for columns of the row's own image and for those beyond the last."""
    m_own = (o_col[None, :] >= b_first[:, None]) & (o_col[None, :] < b_end[:, None])
    return tl.where(m_own | (o_col[None, :] >= M), NOTHING, b_sim)


@triton.jit
def _sum_of_any(b_sum, b_peak, scale):
    """The sum of a row, and 0 where every column was masked, each of which counted as 2^0.

    The peak is then NOTHING, or what a warm temperature's scale makes of it. A row of NaN has no
    peak either, and its sum stays NaN.
    """
    m_none = b_peak < 0.5 * NOTHING * tl.minimum(scale, 1.0)
    # Not 0.0, which would need a test for NaN and spill over the limit in fp16 at D = 384 (sm_90).
    return tl.where(m_none, 0.0 * b_sum, b_sum)


@triton.jit(do_not_specialize=_SIZES)
def log_sums(
    # pointers
    p_rows, p_columns, p_first, p_end, p_temperature, p_sum, p_peak,
    # sizes
    N, M, OFFSET,
    # scalars
    temperature,
    # constexpr
    D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, FIXED: tl.constexpr, LEARNED: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each row over the columns of other images, as one partial sum per split."""
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    scale = _exponent_scale(p_temperature, temperature, LEARNED)
    o_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < N
    b_row0, b_row1 = _load_halves(p_rows, o_row, m_row, D0, D1)
    own, own_end = _own_tiles(i_tile, p_first, p_end, N, OFFSET, BLOCK_N, BLOCK_M)
    tiles = (M + BLOCK_M - 1) // BLOCK_M
    start = tiles * i_split // tl.num_programs(1)
    stop = tiles * (i_split + 1) // tl.num_programs(1)
    o_col = tl.arange(0, BLOCK_M)
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_peak = tl.full((BLOCK_N,), NOTHING, dtype=tl.float32)
    b_first = OFFSET + tl.load(p_first + o_row, mask=m_row, other=0)
    b_end = OFFSET + tl.load(p_end + o_row, mask=m_row, other=0)
    for t in tl.range(start, stop, num_stages=STAGES):
        o_here = t * BLOCK_M + o_col
        m_col = o_here < M
        b_col0, b_col1 = _load_halves(p_columns, o_here, m_col, D0, D1)
        b_sim = _similarity(b_row0, b_row1, b_col0, b_col1, D1, WIDEN, PRECISION)
        if ((t >= own) & (t < own_end)) | (t == tiles - 1):
            b_sim = _without_own(b_sim, o_here, b_first, b_end, M)
        if FIXED:
            b_sum += tl.sum(tl.exp2(b_sim * scale - scale), 1)
        else:
            b_new = tl.maximum(b_peak, tl.max(b_sim, 1) * scale)
            b_exp = tl.exp2(b_sim * scale - b_new[:, None])
            b_sum = b_sum * tl.exp2(b_peak - b_new) + tl.sum(b_exp, 1)
            b_peak = b_new
    if not FIXED:
        b_sum = _sum_of_any(b_sum, b_peak, scale)
    o_out = i_split.to(tl.int64) * N + o_row
    tl.store(p_sum + o_out, b_sum, mask=m_row)
    if not FIXED:
        tl.store(p_peak + o_out, b_peak, mask=m_row)


@triton.jit(do_not_specialize=_SIZES)
def symmetric_sums(
    # pointers
    p_rows, p_first, p_end, p_temperature, p_sum,
    # sizes
    N, SPLITS,
    # scalars
    temperature,
    # constexpr
    D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, LEARNED: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """FIXED `log_sums` of rows among themselves; a tile serves its rows and its columns.

    Row tiles stand in a circle; each meets itself and the half of the circle behind it, so that all
    walk equally far. Partial sums: one for each split, then one for each distance on the circle,
    which one program writes. Where two tiles are opposite, both meet, and serve their rows only.
    """
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    EACH: tl.constexpr = BLOCK_N // BLOCK_M
    scale = _exponent_scale(p_temperature, temperature, LEARNED)
    o_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < N
    b_row0, b_row1 = _load_halves(p_rows, o_row, m_row, D0, D1)
    own, own_end = _own_tiles(i_tile, p_first, p_end, N, 0, BLOCK_N, BLOCK_M)
    circle = (N + BLOCK_N - 1) // BLOCK_N
    shared = (circle - 1) // 2
    steps = (circle // 2 + 1) * EACH
    start = steps * i_split // SPLITS
    stop = steps * (i_split + 1) // SPLITS
    o_col = tl.arange(0, BLOCK_M)
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_first = tl.load(p_first + o_row, mask=m_row, other=0)
    b_end = tl.load(p_end + o_row, mask=m_row, other=0)
    for step in tl.range(start, stop, num_stages=STAGES):
        i_other = i_tile + step // EACH
        distance = i_other - i_tile
        i_other = tl.where(i_other >= circle, i_other - circle, i_other)
        t = i_other * EACH + step % EACH
        o_here = t * BLOCK_M + o_col
        m_col = o_here < N
        b_col0, b_col1 = _load_halves(p_rows, o_here, m_col, D0, D1)
        b_sim = _similarity(b_row0, b_row1, b_col0, b_col1, D1, WIDEN, PRECISION)
        is_last = (i_other == circle - 1) | (i_tile == circle - 1)
        if ((t >= own) & (t < own_end)) | is_last:
            b_sim = _without_own(b_sim, o_here, b_first, b_end, N)
            b_sim = tl.where(m_row[:, None], b_sim, NOTHING)
        b_exp = tl.exp2(b_sim * scale - scale)
        b_sum += tl.sum(b_exp, 1)
        m_shared = o_here < tl.where((distance > 0) & (distance <= shared), N, 0)
        p_out = p_sum + (SPLITS + distance - 1).to(tl.int64) * N + o_here
        tl.store(p_out, tl.sum(b_exp, 0), mask=m_shared)
    tl.store(p_sum + i_split.to(tl.int64) * N + o_row, b_sum, mask=m_row)


@triton.jit(do_not_specialize=_SIZES)
def mean_columns(
    # pointers
    p_rows, p_columns, p_first, p_end, p_temperature, p_sum, p_peak, p_partial,
    # sizes
    N, M, OFFSET,
    # scalars
    temperature, boost,
    # constexpr
    D0: tl.constexpr, D1: tl.constexpr, PART: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, FIXED: tl.constexpr, LEARNED: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`log_sums` that also sums the columns with their shares: the teacher's gradient, forward.

    PART 1 sums their first D0 coordinates only, 2 the others; 0 all of them.
    """
    # Beside wide accumulators, adding over a row in the loop makes the compiler wait (0110).
    WIDE: tl.constexpr = D0 >= 512
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    scale = _exponent_scale(p_temperature, temperature, LEARNED)
    o_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < N
    b_row0, b_row1 = _load_halves(p_rows, o_row, m_row, D0, D1)
    b_acc0, b_acc1 = _zero_halves(BLOCK_N, D0, D1)
    own, own_end = _own_tiles(i_tile, p_first, p_end, N, OFFSET, BLOCK_N, BLOCK_M)
    tiles = (M + BLOCK_M - 1) // BLOCK_M
    start = tiles * i_split // tl.num_programs(1)
    stop = tiles * (i_split + 1) // tl.num_programs(1)
    o_col = tl.arange(0, BLOCK_M)
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if WIDE:
        b_sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    b_peak = tl.full((BLOCK_N,), NOTHING, dtype=tl.float32)
    b_first = OFFSET + tl.load(p_first + o_row, mask=m_row, other=0)
    b_end = OFFSET + tl.load(p_end + o_row, mask=m_row, other=0)
    for t in tl.range(start, stop, num_stages=STAGES):
        o_here = t * BLOCK_M + o_col
        m_col = o_here < M
        b_col0, b_col1 = _load_halves(p_columns, o_here, m_col, D0, D1)
        b_sim, unit = _similarity_by_halves(
            b_row0, b_row1, b_col0, b_col1, scale, D1, PART, WIDEN, PRECISION
        )
        if ((t >= own) & (t < own_end)) | (t == tiles - 1):
            b_sim = _without_own(b_sim, o_here, b_first, b_end, M)
        if FIXED:
            b_exp = tl.exp2(b_sim * unit - scale)
            if WIDE:
                b_sums += b_exp
            else:
                b_sum += tl.sum(b_exp, 1)
        else:
            b_new = tl.maximum(b_peak, tl.max(b_sim, 1) * unit)
            b_exp = tl.exp2(b_sim * unit - b_new[:, None])
            b_keep = tl.exp2(b_peak - b_new)
            b_sum = b_sum * b_keep + tl.sum(b_exp, 1)
            b_peak = b_new
            if PART != 2:
                b_acc0 *= b_keep[:, None]
            if (D1 > 0) & (PART != 1):
                b_acc1 *= b_keep[:, None]
        if not FIXED:
            b_exp *= boost
        if PART != 2:
            b_acc0 = _weighted(b_exp, b_col0, b_acc0, WIDEN, PRECISION)
        if (D1 > 0) & (PART != 1):
            b_acc1 = _weighted(b_exp, b_col1, b_acc1, WIDEN, PRECISION)
    if WIDE & FIXED:
        b_sum = tl.sum(b_sums, 1)
    # Where there was no column, `finish_gradient` drops b_acc.
    if not FIXED:
        b_sum = _sum_of_any(b_sum, b_peak, scale)
    o_out = i_split.to(tl.int64) * N + o_row
    if PART != 2:
        tl.store(p_sum + o_out, b_sum, mask=m_row)
        if not FIXED:
            tl.store(p_peak + o_out, b_peak, mask=m_row)
    _store_halves(p_partial, o_out, m_row, b_acc0, b_acc1, D0, D1, PART)


@triton.jit(do_not_specialize=_SIZES)
def pair_gradient(
    # pointers
    p_rows, p_columns, p_first, p_end, p_temperature, p_row_log, p_row_scale, p_column_log,
    p_column_scale, p_partial,
    # sizes
    N, M, OFFSET,
    # scalars
    temperature,
    # constexpr
    D0: tl.constexpr, D1: tl.constexpr, PART: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, FIXED: tl.constexpr, LEARNED: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Student gradient over other images, in both roles of a row: two products per tile.

    With FIXED one exponential serves both roles: e^l (u_row + u_column), u = g e^-L. PART as in
    `mean_columns`.
    """
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    scale = _exponent_scale(p_temperature, temperature, LEARNED)
    o_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < N
    # Beyond the end the last row stands in: zeros would be far more alike to a cold column than
    # that column's own denominator allows for, and overflow half precision.
    o_read = tl.minimum(o_row, N - 1)
    b_row0, b_row1 = _load_halves(p_rows, o_read, o_read < N, D0, D1)
    b_acc0, b_acc1 = _zero_halves(BLOCK_N, D0, D1)
    b_row_scale = tl.load(p_row_scale + o_row, mask=m_row, other=0.0)
    b_row_log = b_row_scale
    if not FIXED:
        b_row_log = tl.load(p_row_log + o_row, mask=m_row, other=DEAD)
    own, own_end = _own_tiles(i_tile, p_first, p_end, N, OFFSET, BLOCK_N, BLOCK_M)
    tiles = (M + BLOCK_M - 1) // BLOCK_M
    start = tiles * i_split // tl.num_programs(1)
    stop = tiles * (i_split + 1) // tl.num_programs(1)
    o_col = tl.arange(0, BLOCK_M)
    b_first = OFFSET + tl.load(p_first + o_read)
    b_end = OFFSET + tl.load(p_end + o_read)
    for t in tl.range(start, stop, num_stages=STAGES):
        o_here = t * BLOCK_M + o_col
        m_col = o_here < M
        b_col0, b_col1 = _load_halves(p_columns, o_here, m_col, D0, D1)
        b_sim, unit = _similarity_by_halves(
            b_row0, b_row1, b_col0, b_col1, scale, D1, PART, WIDEN, PRECISION
        )
        if ((t >= own) & (t < own_end)) | (t == tiles - 1):
            b_sim = _without_own(b_sim, o_here, b_first, b_end, M)
        b_col_scale = tl.load(p_column_scale + o_here, mask=m_col, other=0.0)
        if FIXED:
            b_pair = tl.exp2(b_sim * unit - scale) * (b_row_scale[:, None] + b_col_scale[None, :])
        else:
            b_col_log = tl.load(p_column_log + o_here, mask=m_col, other=DEAD)
            b_pair = tl.exp2(b_sim * unit - b_row_log[:, None]) * b_row_scale[:, None]
            b_pair += tl.exp2(b_sim * unit - b_col_log[None, :]) * b_col_scale[None, :]
        if PART != 2:
            b_acc0 = _weighted(b_pair, b_col0, b_acc0, WIDEN, PRECISION)
        if (D1 > 0) & (PART != 1):
            b_acc1 = _weighted(b_pair, b_col1, b_acc1, WIDEN, PRECISION)
    o_out = i_split.to(tl.int64) * N + o_row
    _store_halves(p_partial, o_out, m_row, b_acc0, b_acc1, D0, D1, PART)


@triton.jit
def _log2_add(b_left, b_right):
    """log2(2^left + 2^right); NOTHING is an empty sum, NaN stays NaN."""
    b_peak = tl.maximum(b_left, b_right)
    return b_peak + tl.log2(tl.exp2(b_left - b_peak) + tl.exp2(b_right - b_peak))


@triton.jit
def _log2_add_tile(b_sum, b_log):
    """log2 of 2^b_sum + sum 2^b_log over the second axis; NOTHING: empty, NaN stays NaN."""
    b_new = tl.maximum(b_sum, tl.max(b_log, 1))
    b_exp = tl.where(b_log == NOTHING, 0.0, tl.exp2(b_log - b_new[:, None]))
    b_here = tl.sum(b_exp, 1) + tl.exp2(b_sum - b_new)
    # With nothing yet and nothing here, exp2(NOTHING - NOTHING) counted a column of its own. Where
    # everything is NaN there is no peak either, and the sum is to stay NaN.
    m_empty = (b_new == NOTHING) & (b_here == b_here)
    return tl.where(m_empty, NOTHING, b_new + tl.log2(b_here))


@triton.jit
def _log2_of_splits(p_sum, p_peak, o_row, m_row, N, SPLITS, scale, FIXED: tl.constexpr):
    """Partial sums of the column splits, in their order -> log2 of the whole; NOTHING if empty."""
    b_total = tl.zeros_like(o_row).to(tl.float32)
    b_peak = b_total + scale
    if not FIXED:
        b_peak = tl.zeros_like(b_total) + NOTHING
        for i_split in tl.range(0, SPLITS):
            b_part = tl.load(p_peak + i_split * N.to(tl.int64) + o_row, mask=m_row, other=NOTHING)
            b_peak = tl.maximum(b_peak, b_part)
        for i_split in tl.range(0, SPLITS):
            o_part = i_split * N.to(tl.int64) + o_row
            b_part = tl.load(p_sum + o_part, mask=m_row, other=0.0)
            b_part *= tl.exp2(tl.load(p_peak + o_part, mask=m_row, other=NOTHING) - b_peak)
            b_total += b_part
    else:
        # Many at once: `symmetric_sums` leaves one partial sum for each distance.
        for first in tl.range(0, SPLITS, 16):
            o_split = first + tl.arange(0, 16)
            o_part = o_split.to(tl.int64)[:, None] * N + o_row[None, :]
            m_part = (o_split < SPLITS)[:, None] & m_row[None, :]
            b_total += tl.sum(tl.load(p_sum + o_part, mask=m_part, other=0.0), 0)
    b_log = b_peak + tl.log2(tl.where(b_total == 0.0, 1.0, b_total))
    return tl.where(b_total == 0.0, NOTHING, b_log)


@triton.jit
def _row_weight(weight, b_first, b_end, BALANCED: tl.constexpr):
    """w_A of each row: one number, or `balanced`, which grows where an image has few crops."""
    b_weight = tl.zeros_like(b_first).to(tl.float32) + weight
    if BALANCED:
        b_size = (b_end - b_first).to(tl.float32)
        b_weight *= b_size / tl.maximum(b_size - 1.0, 1.0)
    return b_weight


@triton.jit
def _own_log_weight(b_weight, p_overlap, o_from, o_place, m_pair, C, HAS_OVERLAP: tl.constexpr):
    """log2 of w_A (1 - IoU) for pairs inside an image; NOTHING for all others."""
    b_pair = b_weight
    if HAS_OVERLAP:
        p_pair = p_overlap + o_from.to(tl.int64) * C + o_place
        b_iou = tl.load(p_pair, mask=m_pair & (o_place < C), other=0.0)
        # Not tl.maximum, which would make a 0 of NaN.
        b_pair = b_weight * tl.where(b_iou > 1.0, 0.0, 1.0 - b_iou)
    b_log = tl.log2(tl.where(m_pair & (b_pair != 0.0), b_pair, 1.0))
    return tl.where(m_pair & (b_pair != 0.0), b_log, NOTHING)


@triton.jit(do_not_specialize=_SIZES)
def finish_rows(
    # pointers
    p_rows, p_columns, p_hubs, p_image, p_first, p_end, p_overlap, p_temperature, p_sum, p_peak,
    p_length, p_stats,
    # sizes
    N, OFFSET, C, SPLITS, STRIDE,
    # scalars
    temperature, boost, weight,
    # constexpr
    D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, FIXED: tl.constexpr, LEARNED: tl.constexpr,
    HAS_OVERLAP: tl.constexpr, INCLUDE_POSITIVE: tl.constexpr, BALANCED: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums, the row's own image and its hub -> the figures of each row.

    In order: loss (nats), intra share, cosine to the hub, sum of cosines inside the image, log2 of
    the whole denominator, pull of the hub (1 - its share), scale of the row in `pair_gradient`, the
    row's length, and a 0 for d loss / d temperature. Columns from N to STRIDE become 0.
    """
    i_tile = tl.program_id(0)
    scale = _exponent_scale(p_temperature, temperature, LEARNED)
    o_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < N
    b_image = tl.load(p_image + o_row, mask=m_row, other=0)
    b_row0, b_row1 = _load_halves(p_rows, o_row, m_row, D0, D1)
    b_hub0, b_hub1 = _load_halves(p_hubs, b_image, m_row, D0, D1)
    b_positive = tl.sum(b_row0.to(tl.float32) * b_hub0.to(tl.float32), 1)
    if D1 > 0:
        b_positive += tl.sum(b_row1.to(tl.float32) * b_hub1.to(tl.float32), 1)
    b_first = tl.load(p_first + o_row, mask=m_row, other=0)
    b_end = tl.load(p_end + o_row, mask=m_row, other=0)
    b_weight = _row_weight(weight, b_first, b_end, BALANCED)
    b_intra = tl.full((BLOCK_N,), NOTHING, dtype=tl.float32)
    b_cosines = tl.zeros((BLOCK_N,), dtype=tl.float32)
    start = tl.load(p_first + i_tile * BLOCK_N)
    stop = tl.load(p_end + tl.minimum(i_tile * BLOCK_N + BLOCK_N, N) - 1)
    for first in tl.range(start, stop, BLOCK_M, num_stages=1):
        o_col = first + tl.arange(0, BLOCK_M)
        m_col = o_col < stop
        b_col0, b_col1 = _load_halves(p_columns, OFFSET + o_col, m_col, D0, D1)
        b_sim = _similarity(b_row0, b_row1, b_col0, b_col1, D1, WIDEN, PRECISION)
        m_pair = (o_col[None, :] >= b_first[:, None]) & (o_col[None, :] < b_end[:, None])
        m_pair &= o_col[None, :] != o_row[:, None]
        b_log_weight = _own_log_weight(
            b_weight[:, None] + tl.zeros_like(b_sim), p_overlap, o_row[:, None],
            o_col[None, :] - b_first[:, None], m_pair, C, HAS_OVERLAP,
        )  # fmt: skip
        b_log = tl.where(b_log_weight == NOTHING, NOTHING, b_sim * scale + b_log_weight)
        b_intra = _log2_add_tile(b_intra, b_log)
        b_cosines += tl.sum(tl.where(m_pair, b_sim, 0.0), 1)
    b_inter = _log2_of_splits(p_sum, p_peak, o_row, m_row, N, SPLITS, scale, FIXED)
    b_negative = _log2_add(b_inter, b_intra)
    b_log = b_negative
    if INCLUDE_POSITIVE:
        b_log = _log2_add(b_negative, b_positive * scale)
    m_dead = b_log < 0.5 * NOTHING
    b_loss = (tl.where(m_dead, 0.0, b_log) - b_positive * scale) * LN_2
    b_log = tl.where(m_dead, DEAD, b_log)
    b_pull = tl.full((BLOCK_N,), 1.0, dtype=tl.float32)
    if INCLUDE_POSITIVE:
        b_pull = tl.exp2(b_negative - b_log)
    b_scale = tl.full((BLOCK_N,), 1.0, dtype=tl.float32) * boost
    if FIXED:
        b_scale = boost * tl.exp2(scale - b_log)
    b_length = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if NORMALIZE:
        b_length = tl.load(p_length + o_row, mask=m_row, other=0.0)
    p_out = p_stats + o_row
    m_out = o_row < STRIDE
    size = STRIDE.to(tl.int64)
    tl.store(p_out, tl.where(m_row, b_loss, 0.0), mask=m_out)
    tl.store(p_out + size, tl.where(m_row, tl.exp2(b_intra - b_log), 0.0), mask=m_out)
    tl.store(p_out + 2 * size, tl.where(m_row, b_positive, 0.0), mask=m_out)
    tl.store(p_out + 3 * size, tl.where(m_row, b_cosines, 0.0), mask=m_out)
    tl.store(p_out + 4 * size, tl.where(m_row, b_log, 0.0), mask=m_out)
    tl.store(p_out + 5 * size, tl.where(m_row, b_pull, 0.0), mask=m_out)
    tl.store(p_out + 6 * size, tl.where(m_row, b_scale, 0.0), mask=m_out)
    tl.store(p_out + 7 * size, b_length, mask=m_out)
    tl.store(p_out + 8 * size, tl.zeros_like(b_length), mask=m_out)


@triton.jit(do_not_specialize=_SIZES)
def finish_gradient(
    # pointers
    p_rows, p_columns, p_hubs, p_image, p_first, p_end, p_overlap, p_temperature, p_log, p_pull,
    p_partial, p_peak, p_far_factor, p_own_factor, p_length, p_d_rows, p_d_tau,
    # sizes
    N, OFFSET, C, SPLITS,
    # scalars
    temperature, boost, weight,
    # constexpr
    D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STUDENT: tl.constexpr, FIXED: tl.constexpr,
    LEARNED: tl.constexpr, HAS_OVERLAP: tl.constexpr, NORMALIZE: tl.constexpr,
    BALANCED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial gradients, the row's own image, its hub and the normalisation -> d_rows, d_tau.

    STUDENT rows also receive what they owe as columns of their own image. A teacher's partials
    are relative to their peaks, or with FIXED to the largest exponent, and the upstream factors are
    read as 1.
    """
    i_tile = tl.program_id(0)
    scale = _exponent_scale(p_temperature, temperature, LEARNED)
    beta = scale * LN_2
    o_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < N
    b_row0, b_row1 = _load_halves(p_rows, o_row, m_row, D0, D1)
    b_log = tl.load(p_log + o_row, mask=m_row, other=DEAD)
    far_factor = 1.0
    own_factor = 1.0
    if STUDENT:
        far_factor = tl.load(p_far_factor).to(tl.float32)
        own_factor = tl.load(p_own_factor).to(tl.float32)
    b_acc0, b_acc1 = _zero_halves(BLOCK_N, D0, D1)
    b_first = tl.load(p_first + o_row, mask=m_row, other=0)
    b_end = tl.load(p_end + o_row, mask=m_row, other=0)
    start = tl.load(p_first + i_tile * BLOCK_N)
    stop = tl.load(p_end + tl.minimum(i_tile * BLOCK_N + BLOCK_N, N) - 1)
    for first in tl.range(start, stop, BLOCK_M, num_stages=1):
        o_col = first + tl.arange(0, BLOCK_M)
        m_col = o_col < stop
        b_col0, b_col1 = _load_halves(p_columns, OFFSET + o_col, m_col, D0, D1)
        b_sim = _similarity(b_row0, b_row1, b_col0, b_col1, D1, WIDEN, PRECISION)
        m_pair = (o_col[None, :] >= b_first[:, None]) & (o_col[None, :] < b_end[:, None])
        m_pair &= o_col[None, :] != o_row[:, None]
        b_weight = _row_weight(weight, b_first, b_end, BALANCED)
        b_both = b_weight[:, None] + tl.zeros_like(b_sim)
        b_forth = _own_log_weight(
            b_both, p_overlap, o_row[:, None], o_col[None, :] - b_first[:, None], m_pair, C,
            HAS_OVERLAP,
        )  # fmt: skip
        b_pair = boost * tl.exp2(b_sim * scale + b_forth - b_log[:, None])
        if STUDENT:
            b_col_log = tl.load(p_log + o_col, mask=m_col, other=DEAD)
            b_back = _own_log_weight(
                b_both, p_overlap, o_col[None, :], o_row[:, None] - b_first[:, None], m_pair, C,
                HAS_OVERLAP,
            )  # fmt: skip
            b_pair += boost * tl.exp2(b_sim * scale + b_back - b_col_log[None, :])
        b_acc0 = _weighted(b_pair, b_col0, b_acc0, WIDEN, PRECISION)
        if D1 > 0:
            b_acc1 = _weighted(b_pair, b_col1, b_acc1, WIDEN, PRECISION)
    b_acc0 *= own_factor
    if D1 > 0:
        b_acc1 *= own_factor
    for i_split in tl.range(0, SPLITS):
        b_share = tl.zeros((BLOCK_N,), dtype=tl.float32) + far_factor
        o_part = i_split * N.to(tl.int64) + o_row
        if (not STUDENT) & FIXED:
            b_share = tl.exp2(scale - b_log)
        elif not STUDENT:
            b_share = tl.exp2(tl.load(p_peak + o_part, mask=m_row, other=NOTHING) - b_log)
        b_part0, b_part1 = _load_halves(p_partial, o_part, m_row, D0, D1)
        b_acc0 += b_part0 * b_share[:, None]
        if D1 > 0:
            b_acc1 += b_part1 * b_share[:, None]
    step = beta / boost
    b_image = tl.load(p_image + o_row, mask=m_row, other=0)
    b_pull = tl.load(p_pull + o_row, mask=m_row, other=0.0) * own_factor
    b_half0, b_half1 = _load_halves(p_hubs, b_image, m_row, D0, D1)
    b_hub0 = b_half0.to(tl.float32)
    b_z0 = b_row0.to(tl.float32)
    b_acc0 *= step
    b_negative = tl.sum(b_acc0 * b_z0, 1)
    b_positive = tl.sum(b_hub0 * b_z0, 1)
    b_acc0 -= beta * b_pull[:, None] * b_hub0
    b_along = tl.sum(b_acc0 * b_z0, 1)
    if D1 > 0:
        b_hub1 = b_half1.to(tl.float32)
        b_z1 = b_row1.to(tl.float32)
        b_acc1 *= step
        b_negative += tl.sum(b_acc1 * b_z1, 1)
        b_positive += tl.sum(b_hub1 * b_z1, 1)
        b_acc1 -= beta * b_pull[:, None] * b_hub1
        b_along += tl.sum(b_acc1 * b_z1, 1)
    # Each pair of a symmetric matrix is met twice, once from either row.
    times: tl.constexpr = 0.5 if STUDENT else 1.0
    # -d beta / temperature^2, beta being 1 / temperature.
    b_d_tau = beta * (beta * b_pull * b_positive - times * b_negative)
    tl.store(p_d_tau + o_row, b_d_tau, mask=m_row)
    if NORMALIZE:
        b_length = tl.load(p_length + o_row, mask=m_row, other=1.0)
        # A row of zeros has no direction to turn to, and dividing by its length would blow up.
        b_length = tl.where(b_length > SHORTEST, b_length, float("inf"))
        b_acc0 = (b_acc0 - b_z0 * b_along[:, None]) / b_length[:, None]
        if D1 > 0:
            b_acc1 = (b_acc1 - b_z1 * b_along[:, None]) / b_length[:, None]
    _store_halves(p_d_rows, o_row, m_row, b_acc0, b_acc1, D0, D1, 0)


@triton.jit
def hub_gradient(
    # pointers
    p_rows, p_hubs, p_starts, p_pull, p_temperature, p_factor, p_length, p_d_hubs,
    # scalars
    temperature,
    # constexpr
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, NORMALIZE: tl.constexpr,
    LEARNED: tl.constexpr,
):  # fmt: skip
    """Gradient by each hub: the pulled sum of its image's rows, in row order."""
    i_image = tl.program_id(0)
    beta = _exponent_scale(p_temperature, temperature, LEARNED) * LN_2
    factor = tl.load(p_factor).to(tl.float32)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    start, stop = tl.load(p_starts + i_image), tl.load(p_starts + i_image + 1)
    b_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in tl.range(start, stop, BLOCK_N, num_stages=1):
        o_row = first + tl.arange(0, BLOCK_N)
        m_row = o_row < stop
        b_pull = tl.load(p_pull + o_row, mask=m_row, other=0.0)
        p_row = p_rows + o_row.to(tl.int64)[:, None] * D + o_d[None, :]
        b_row = tl.load(p_row, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_sum += tl.sum(b_row * b_pull[:, None], 0)
    b_sum *= -beta * factor
    o_hub = i_image.to(tl.int64) * D + o_d
    if NORMALIZE:
        b_hub = tl.load(p_hubs + o_hub, mask=m_d, other=0.0).to(tl.float32)
        length = tl.load(p_length + i_image)
        length = tl.where(length > SHORTEST, length, float("inf"))
        b_sum = (b_sum - b_hub * tl.sum(b_hub * b_sum, 0)) / length
    tl.store(p_d_hubs + o_hub, b_sum.to(p_d_hubs.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=_SIZES)
def normalize_rows(
    # pointers
    p_in, p_out, p_length,
    # sizes
    N,
    # constexpr
    D: tl.constexpr, D_OUT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each row divided by its length and padded with zeros to D_OUT, and the lengths."""
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_row < N
    o_wide = o_row.to(tl.int64)[:, None]
    m_in = m_row[:, None] & (o_d < D)[None, :]
    b_in = tl.load(p_in + o_wide * D + o_d[None, :], mask=m_in, other=0.0).to(tl.float32)
    b_length = tl.maximum(tl.sqrt(tl.sum(b_in * b_in, 1)), SHORTEST)
    b_out = (b_in / b_length[:, None]).to(p_out.dtype.element_ty)
    m_out = m_row[:, None] & (o_d < D_OUT)[None, :]
    tl.store(p_out + o_wide * D_OUT + o_d[None, :], b_out, mask=m_out)
    tl.store(p_length + o_row, b_length, mask=m_row)


@triton.jit(do_not_specialize=_SIZES)
def find_images(
    # pointers
    p_group, p_starts, p_image, p_first, p_end,
    # sizes
    N, B, STRIDE, B_STRIDE,
    # constexpr
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Runs of equal values as intervals: starts of the B images, and each row's image and ends.

    One program: a batch's group is short, and launches cost more than its length. What lies between
    N and STRIDE, and behind the starts, becomes 0 or N.
    """
    o = tl.arange(0, BLOCK)
    runs = 0
    for first in tl.range(0, N, BLOCK, num_stages=1):
        o_row = first + o
        m_row = o_row < N
        b_group = tl.load(p_group + o_row, mask=m_row, other=0)
        b_before = tl.load(p_group + o_row - 1, mask=m_row & (o_row > 0), other=0)
        b_new = (m_row & ((b_group != b_before) | (o_row == 0))).to(tl.int32)
        b_image = runs + tl.cumsum(b_new, 0) - 1
        b_kept = tl.where(m_row, tl.minimum(b_image, B - 1), 0)
        tl.store(p_image + o_row, b_kept, mask=o_row < STRIDE)
        tl.store(p_starts + b_image, o_row, mask=(b_new > 0) & (b_image <= B))
        runs += tl.sum(b_new)
    for first in tl.range(0, B_STRIDE, BLOCK, num_stages=1):
        o_image = first + o
        m_empty = (o_image >= tl.minimum(runs, B + 1)) & (o_image < B_STRIDE)
        tl.store(p_starts + o_image, tl.zeros_like(o_image) + N, mask=m_empty)
    # What other threads of this program stored is read from here on.
    tl.debug_barrier()
    for first in tl.range(0, N, BLOCK, num_stages=1):
        o_row = first + o
        m_row = o_row < N
        b_image = tl.load(p_image + o_row, mask=m_row, other=0)
        b_first = tl.load(p_starts + b_image, mask=m_row, other=0)
        b_end = tl.load(p_starts + b_image + 1, mask=m_row, other=0)
        tl.store(p_first + o_row, b_first, mask=o_row < STRIDE)
        tl.store(p_end + o_row, b_end, mask=o_row < STRIDE)


@triton.jit(do_not_specialize=_SIZES)
def sum_figures(
    # pointers
    p_stats, p_first, p_end, p_sums, p_loss, p_figures,
    # sizes
    N, STRIDE, TOTAL,
    # constexpr
    BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Sums of the first four figures and of pairs inside images, in one order; WHOLE: the means."""
    o = tl.arange(0, BLOCK)
    size = STRIDE.to(tl.int64)
    b_loss = tl.zeros((BLOCK,), dtype=tl.float32)
    b_share = tl.zeros((BLOCK,), dtype=tl.float32)
    b_positive = tl.zeros((BLOCK,), dtype=tl.float32)
    b_cosines = tl.zeros((BLOCK,), dtype=tl.float32)
    b_pairs = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in tl.range(0, N, BLOCK, num_stages=1):
        o_row = first + o
        m_row = o_row < N
        b_loss += tl.load(p_stats + o_row, mask=m_row, other=0.0)
        b_share += tl.load(p_stats + size + o_row, mask=m_row, other=0.0)
        b_positive += tl.load(p_stats + 2 * size + o_row, mask=m_row, other=0.0)
        b_cosines += tl.load(p_stats + 3 * size + o_row, mask=m_row, other=0.0)
        b_first = tl.load(p_first + o_row, mask=m_row, other=0)
        b_end = tl.load(p_end + o_row, mask=m_row, other=1)
        b_pairs += tl.where(m_row, (b_end - b_first - 1).to(tl.float32), 0.0)
    loss, share, positive = tl.sum(b_loss), tl.sum(b_share), tl.sum(b_positive)
    cosines, pairs = tl.sum(b_cosines), tl.sum(b_pairs)
    if WHOLE:
        total = TOTAL.to(tl.float32)
        tl.store(p_loss, loss / total)
        tl.store(p_figures, share / total)
        tl.store(p_figures + 1, positive / total)
        tl.store(p_figures + 2, cosines / tl.maximum(pairs, 1.0))
    else:
        tl.store(p_sums, loss)
        tl.store(p_sums + 1, share)
        tl.store(p_sums + 2, positive)
        tl.store(p_sums + 3, cosines)
        tl.store(p_sums + 4, pairs)
