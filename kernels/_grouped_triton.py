"""Device code that `grouped_logsumexp` has of its own; its heavy loops are the loss's.

Rows and columns are sorted by group, so a row's own group is an interval of columns, which
`log_sums` and `pair_gradient` mask out. These kernels walk just that interval in small tiles, add
its weighted terms and the partial results of the column splits. All logarithms are to base 2.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels._contrastive_triton import (
    _SIZES,
    DEAD,
    LN_2,
    NOTHING,
    _exponent_scale,
    _load_halves,
    _log2_add,
    _log2_add_tile,
    _log2_of_splits,
    _similarity,
    _store_halves,
    _weighted,
    _zero_halves,
)


@triton.jit
def _log_weight(log_weight, p_table, o_from, o_place, m_pair, C, HAS_TABLE: tl.constexpr):
    """log2 of the weight of each pair inside a group; NOTHING for all others."""
    if HAS_TABLE:
        m_in = m_pair & (o_place < C)
        b_weight = tl.load(p_table + o_from.to(tl.int64) * C + o_place, mask=m_in, other=0.0)
        b_log = tl.log2(tl.where(m_in & (b_weight != 0.0), b_weight, 1.0))
        return tl.where(m_in & (b_weight != 0.0), b_log, NOTHING)
    return tl.where(m_pair, log_weight, NOTHING)


@triton.jit(do_not_specialize=_SIZES)
def finish_grouped_rows(
    # pointers
    p_rows, p_columns, p_first, p_end, p_itself, p_forth, p_temperature, p_sum, p_peak, p_log,
    # sizes
    N, C, SPLITS,
    # scalars
    temperature, log_weight,
    # constexpr
    D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, FIXED: tl.constexpr, LEARNED: tl.constexpr,
    HAS_TABLE: tl.constexpr, HAS_SELF: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums over other groups and the row's own group -> log-sum-exp; NOTHING if empty."""
    i_tile = tl.program_id(0)
    scale = _exponent_scale(p_temperature, temperature, LEARNED)
    o_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < N
    b_row0, b_row1 = _load_halves(p_rows, o_row, m_row, D0, D1)
    b_first = tl.load(p_first + o_row, mask=m_row, other=0)
    b_end = tl.load(p_end + o_row, mask=m_row, other=0)
    b_itself = b_first - 1
    if HAS_SELF:
        b_itself = tl.load(p_itself + o_row, mask=m_row, other=0)
    b_own = tl.full((BLOCK_N,), NOTHING, dtype=tl.float32)
    start = tl.load(p_first + i_tile * BLOCK_N)
    stop = tl.load(p_end + tl.minimum(i_tile * BLOCK_N + BLOCK_N, N) - 1)
    for first in tl.range(start, stop, BLOCK_M, num_stages=1):
        o_col = first + tl.arange(0, BLOCK_M)
        m_col = o_col < stop
        b_col0, b_col1 = _load_halves(p_columns, o_col, m_col, D0, D1)
        b_sim = _similarity(b_row0, b_row1, b_col0, b_col1, D1, WIDEN, PRECISION)
        m_pair = (o_col[None, :] >= b_first[:, None]) & (o_col[None, :] < b_end[:, None])
        m_pair &= o_col[None, :] != b_itself[:, None]
        b_weight = _log_weight(
            log_weight, p_forth, o_row[:, None], o_col[None, :] - b_first[:, None], m_pair, C,
            HAS_TABLE,
        )  # fmt: skip
        b_log = tl.where(b_weight == NOTHING, NOTHING, b_sim * scale + b_weight)
        b_own = _log2_add_tile(b_own, b_log)
    b_far = _log2_of_splits(p_sum, p_peak, o_row, m_row, N, SPLITS, scale, FIXED)
    b_both = _log2_add(b_far, b_own)
    tl.store(p_log + o_row, tl.where(b_both < 0.5 * NOTHING, NOTHING, b_both), mask=m_row)


@triton.jit(do_not_specialize=_SIZES)
def finish_grouped_gradient(
    # pointers
    p_rows, p_columns, p_first, p_end, p_itself, p_place, p_forth, p_back, p_temperature,
    p_row_log, p_row_weight, p_column_log, p_column_weight, p_factor, p_partial, p_d_rows,
    # sizes
    N, C, SPLITS,
    # scalars
    temperature, log_weight, boost,
    # constexpr
    D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, AS_ROW: tl.constexpr, AS_COLUMN: tl.constexpr,
    LEARNED: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_SELF: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial gradients and the row's own group -> gradient by the row, in its roles.

    AS_ROW: through its own log-sum-exp; AS_COLUMN: through those of the columns, which compare
    themselves with it. Upstream weights are relative to the factor.
    """
    i_tile = tl.program_id(0)
    scale = _exponent_scale(p_temperature, temperature, LEARNED)
    o_row = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < N
    b_row0, b_row1 = _load_halves(p_rows, o_row, m_row, D0, D1)
    b_acc0, b_acc1 = _zero_halves(BLOCK_N, D0, D1)
    b_first = tl.load(p_first + o_row, mask=m_row, other=0)
    b_end = tl.load(p_end + o_row, mask=m_row, other=0)
    b_itself = b_first - 1
    if HAS_SELF:
        b_itself = tl.load(p_itself + o_row, mask=m_row, other=0)
    start = tl.load(p_first + i_tile * BLOCK_N)
    stop = tl.load(p_end + tl.minimum(i_tile * BLOCK_N + BLOCK_N, N) - 1)
    for first in tl.range(start, stop, BLOCK_M, num_stages=1):
        o_col = first + tl.arange(0, BLOCK_M)
        m_col = o_col < stop
        b_col0, b_col1 = _load_halves(p_columns, o_col, m_col, D0, D1)
        b_sim = _similarity(b_row0, b_row1, b_col0, b_col1, D1, WIDEN, PRECISION)
        m_pair = (o_col[None, :] >= b_first[:, None]) & (o_col[None, :] < b_end[:, None])
        m_pair &= o_col[None, :] != b_itself[:, None]
        b_pair = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        if AS_ROW:
            b_row_log = tl.load(p_row_log + o_row, mask=m_row, other=DEAD)
            b_row_weight = boost * tl.load(p_row_weight + o_row, mask=m_row, other=0.0)
            b_forth = _log_weight(
                log_weight, p_forth, o_row[:, None], o_col[None, :] - b_first[:, None], m_pair, C,
                HAS_TABLE,
            )  # fmt: skip
            b_pair += b_row_weight[:, None] * tl.exp2(b_sim * scale + b_forth - b_row_log[:, None])
        if AS_COLUMN:
            b_place = tl.load(p_place + o_row, mask=m_row, other=0)
            b_col_log = tl.load(p_column_log + o_col, mask=m_col, other=DEAD)
            b_col_weight = boost * tl.load(p_column_weight + o_col, mask=m_col, other=0.0)
            b_back = _log_weight(
                log_weight, p_back, o_col[None, :], b_place[:, None], m_pair, C, HAS_TABLE
            )
            b_pair += b_col_weight[None, :] * tl.exp2(b_sim * scale + b_back - b_col_log[None, :])
        b_acc0 = _weighted(b_pair, b_col0, b_acc0, WIDEN, PRECISION)
        if D1 > 0:
            b_acc1 = _weighted(b_pair, b_col1, b_acc1, WIDEN, PRECISION)
    for i_split in tl.range(0, SPLITS):
        o_part = i_split * N.to(tl.int64) + o_row
        b_part0, b_part1 = _load_halves(p_partial, o_part, m_row, D0, D1)
        b_acc0 += b_part0
        if D1 > 0:
            b_acc1 += b_part1
    # d l / d cosine = 1 / temperature.
    step = tl.load(p_factor).to(tl.float32) * scale * LN_2 / boost
    _store_halves(p_d_rows, o_row, m_row, b_acc0 * step, b_acc1 * step, D0, D1, 0)
