"""Around the backward kernel: statistics of the rows and zeros for dQ before it, dQ in the half type after it."""

from __future__ import annotations

import triton
import triton.language as tl

from packflex.attention.triton.forward import LOG2_E

PREPARED_ROWS = 32
# Zeros before the rows of each copy of lse and delta: what a block moved back before the first row of all reads.
STATS_BEFORE = tl.constexpr(64)


def stat_copies(heads: int) -> int:
    """Copies of lse and delta for blocks of `heads` query heads: one for each remainder of a row by 4."""
    return max(1, 4 // heads)


@triton.jit
def _block_rows(o_pos, i_h, i_b, q_len, num_heads, HEADS: tl.constexpr):
    """Rows of [B, Hq / HEADS, S, HEADS], the order of a block's rows."""
    return ((i_b * (num_heads // HEADS) + i_h // HEADS) * q_len + o_pos) * HEADS + i_h % HEADS


@triton.jit(do_not_specialize=["q_len", "num_heads", "stride_copy"])
def _hopper_bwd_prepare_kernel(
    OUT, GRAD_OUT, GRAD_LSE, LSE, LSE_2, DELTA, SUMS,
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs, stride_lb, stride_lh, stride_ls,
    q_len, num_heads, stride_copy,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, COPIES: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta = sum(grad_out * out) - grad_lse of BLOCK_M positions of one head; zeros in dQ's sums.

    LSE_2, DELTA [COPIES, stride_copy] and SUMS [.., D], fp32, in the order of a block's rows. Copy i has row r at
    STATS_BEFORE + r - i * HEADS, so that every row lies at a multiple of 4 elements in one of them. Rows that see
    nothing get 0 for both: theirs are -inf and, where gradients of padding hold NaN, NaN.
    """
    o_pos = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, D)
    m_row = o_pos < q_len
    o_pos64 = o_pos.to(tl.int64)
    p_o = OUT + i_b * stride_ob + i_h * stride_oh + o_pos64[:, None] * stride_os + o_d[None, :]
    p_g = GRAD_OUT + i_b * stride_gb + i_h * stride_gh + o_pos64[:, None] * stride_gs + o_d[None, :]
    b_o = tl.load(p_o, mask=m_row[:, None], other=0.0).to(tl.float32)  # [BLOCK_M, D]
    b_g = tl.load(p_g, mask=m_row[:, None], other=0.0).to(tl.float32)
    b_delta = tl.sum(b_o * b_g, 1)
    if HAS_GRAD_LSE:
        p_l = GRAD_LSE + i_b * stride_lb + i_h * stride_lh + o_pos64 * stride_ls
        b_delta -= tl.load(p_l, mask=m_row, other=0.0).to(tl.float32)
    b_lse = tl.load(LSE + (i_b * num_heads + i_h) * q_len + o_pos, mask=m_row, other=float("-inf"))
    m_seen = b_lse > float("-inf")
    o_row = _block_rows(o_pos64, i_h, i_b, q_len, num_heads, HEADS)
    b_lse = tl.where(m_seen, b_lse * LOG2_E, 0.0)
    b_delta = tl.where(m_seen, b_delta, 0.0)
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0)
    for i in tl.static_range(COPIES):
        if first:  # before the rows, which another program may write there too: those of copy i that it lacks
            o_before = i * stride_copy + tl.arange(0, STATS_BEFORE)
            m_before = tl.arange(0, STATS_BEFORE) < STATS_BEFORE - i * HEADS
            tl.store(LSE_2 + o_before, tl.zeros([STATS_BEFORE], tl.float32), mask=m_before)
            tl.store(DELTA + o_before, tl.zeros([STATS_BEFORE], tl.float32), mask=m_before)
        o_stat = i * stride_copy + STATS_BEFORE + o_row - i * HEADS
        tl.store(LSE_2 + o_stat, b_lse, mask=m_row)
        tl.store(DELTA + o_stat, b_delta, mask=m_row)
    p_dq = SUMS + o_row[:, None] * D + o_d[None, :]
    tl.store(p_dq, tl.zeros([BLOCK_M, D], tl.float32), mask=m_row[:, None])


@triton.jit(do_not_specialize=["q_len", "num_heads"])
def _hopper_bwd_cast_kernel(
    SUMS, GRAD_Q, q_len, num_heads, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """GRAD_Q [B, S, Hq, D] = scale * SUMS [B, Hq / HEADS, S, HEADS, D], BLOCK_M positions of one head."""
    o_pos = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, D)
    m_row = (o_pos < q_len)[:, None]
    o_pos64 = o_pos.to(tl.int64)
    p_sum = SUMS + _block_rows(o_pos64, i_h, i_b, q_len, num_heads, HEADS)[:, None] * D + o_d[None, :]
    p_dq = GRAD_Q + ((i_b * q_len + o_pos64) * num_heads + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_dq, (tl.load(p_sum, mask=m_row) * scale).to(GRAD_Q.dtype.element_ty), mask=m_row)
