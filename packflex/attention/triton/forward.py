"""Forward kernel: one tile of (position, query head) rows against the interval of keys that its positions see.

Prefixes of names: `i_` index, `o_` offsets, `m_` mask, `p_` pointers, `b_` block values. Scores are in base 2 inside
the kernel (`exp2` is one instruction); `lse` leaves it in base e.

Because both bounds of the intervals only grow along a row, the interval of a tile needs four scalar loads: the bounds
of its first and last position. Blocks of keys start at the tile's own first key, so a short document costs no block
that begins in its neighbour.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(b_s, softcap):
    """softcap * tanh(s / softcap), in fp32 from one exp2."""
    return softcap * (1 - 2 / (1 + tl.exp2(b_s * (2 * LOG2_E / softcap))))


@triton.jit
def tile_rows(i_tile, i_head, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, length):
    """Positions and query heads of a tile's rows, and which exist: row r is position r // HEADS, head r % HEADS."""
    o_r = tl.arange(0, BLOCK_M)
    o_pos = i_tile * (BLOCK_M // HEADS) + o_r // HEADS  # [BLOCK_M]
    o_head = i_head * HEADS + o_r % HEADS  # [BLOCK_M]
    return o_pos, o_head, o_pos < length


@triton.jit
def load_tile(p, m_rows, m_columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile of rows of a tensor, 0 where masked; masks that are not needed cost nothing."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(p, mask=m_rows[:, None] & m_columns[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(p, mask=m_rows[:, None], other=0.0)
    elif MASK_COLUMNS:
        return tl.load(p, mask=m_columns[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def _forward_blocks(
    b_acc, b_m, b_l, b_q, p_k, p_v, stride_ks, stride_vs, b_lo, b_hi,
    first_key, end_key, full_begin, full_end, blocks, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over the partly (MASKED) or the wholly visible blocks of keys, the first at first_key."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    # the masked loop walks the blocks before and after the full ones, so that its loads run ahead over both
    steps = blocks - (full_end - full_begin) if MASKED else full_end - full_begin
    for step in range(steps):
        i = step + tl.where(step < full_begin, 0, full_end - full_begin) if MASKED else step + full_begin
        o_k = first_key + i * BLOCK_N + o_n
        p_kn = p_k + (first_key + i * BLOCK_N).to(tl.int64) * stride_ks
        p_vn = p_v + (first_key + i * BLOCK_N).to(tl.int64) * stride_vs
        m_k = o_k < end_key
        b_k = load_tile(
            p_kn + o_n[:, None] * stride_ks + o_d[None, :], m_k, o_d < HEAD_DIM, MASKED, HEAD_DIM != BLOCK_D
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if SOFTCAP:
            b_s = capped(b_s * scale, softcap) * LOG2_E
        else:
            b_s = b_s * (scale * LOG2_E)
        if MASKED:
            m_s = (o_k[None, :] >= b_lo[:, None]) & (o_k[None, :] < b_hi[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        if MASKED:  # a row that has seen nothing yet has maximum -inf; shifting by 0 keeps exp2 at 0 instead of NaN
            b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
        else:
            b_shift = b_m_new
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_alpha = tl.exp2(b_m - b_shift)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        b_v = load_tile(p_vn + o_n[:, None] * stride_vs + o_dv[None, :], m_k, o_dv < V_DIM, MASKED, V_DIM != BLOCK_DV)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_m = b_m_new
    return b_acc, b_m, b_l


@triton.jit
def _flex_fwd_kernel(
    Q, K, V, SINKS, KV_LO, KV_HI, OUT, LSE,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_ib, stride_is,
    q_len, num_heads, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SINKS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and lse of one tile: BLOCK_M // HEADS positions of HEADS query heads that share a KV head."""
    # last tiles first: under causal masks they are the longest
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head = tl.program_id(1)  # in units of HEADS query heads
    i_b = tl.program_id(2).to(tl.int64)
    i_kv = (i_head * HEADS // GROUP).to(tl.int64)
    o_pos, o_head, m_row = tile_rows(i_tile, i_head, HEADS, BLOCK_M, q_len)

    first_pos = i_tile * (BLOCK_M // HEADS)
    last_pos = tl.minimum(first_pos + BLOCK_M // HEADS, q_len) - 1
    p_lo = KV_LO + i_b * stride_ib
    p_hi = KV_HI + i_b * stride_ib
    first_key = tl.load(p_lo + first_pos * stride_is)
    end_key = tl.load(p_hi + last_pos * stride_is)
    full_begin_key = tl.load(p_lo + last_pos * stride_is)
    full_end_key = tl.load(p_hi + first_pos * stride_is)
    blocks = tl.cdiv(tl.maximum(end_key - first_key, 0), BLOCK_N)
    full_begin = tl.minimum(tl.cdiv(full_begin_key - first_key, BLOCK_N), blocks)
    full_end = tl.maximum((full_end_key - first_key) // BLOCK_N, full_begin)

    b_lo = tl.load(p_lo + o_pos * stride_is, mask=m_row, other=0)
    b_hi = tl.load(p_hi + o_pos * stride_is, mask=m_row, other=0)
    o_d = tl.arange(0, BLOCK_D)
    p_q = Q + i_b * stride_qb + o_head.to(tl.int64)[:, None] * stride_qh + o_pos.to(tl.int64)[:, None] * stride_qs
    b_q = tl.load(p_q + o_d[None, :], mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    p_k = K + i_b * stride_kb + i_kv * stride_kh
    p_v = V + i_b * stride_vb + i_kv * stride_vh

    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_acc, b_m, b_l = _forward_blocks(
        b_acc, b_m, b_l, b_q, p_k, p_v, stride_ks, stride_vs, b_lo, b_hi,
        first_key, end_key, full_begin, full_end, blocks, scale, softcap,
        True, SOFTCAP, PRECISION, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N,
    )  # fmt: skip
    b_acc, b_m, b_l = _forward_blocks(
        b_acc, b_m, b_l, b_q, p_k, p_v, stride_ks, stride_vs, b_lo, b_hi,
        first_key, end_key, full_begin, full_end, blocks, scale, softcap,
        False, SOFTCAP, PRECISION, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N,
    )  # fmt: skip

    m_seen = b_l > 0
    if HAS_SINKS:
        b_sink = tl.load(SINKS + o_head).to(tl.float32) * LOG2_E
        b_top = tl.maximum(b_m, b_sink)
        b_fade = tl.where(m_seen, tl.exp2(b_m - b_top), 0.0)
        b_l = tl.where(m_seen, b_l * b_fade + tl.exp2(b_sink - b_top), 0.0)
        b_acc = b_acc * b_fade[:, None]
        b_m = b_top
    b_total = tl.where(m_seen, b_l, 1.0)
    b_lse = tl.where(m_seen, (b_m + tl.log2(b_total)) * LN_2, float("-inf"))
    b_out = b_acc / b_total[:, None]
    o_dv = tl.arange(0, BLOCK_DV)
    p_out = OUT + i_b * stride_ob + o_head.to(tl.int64)[:, None] * stride_oh + o_pos.to(tl.int64)[:, None] * stride_os
    tl.store(p_out + o_dv[None, :], b_out.to(OUT.dtype.element_ty), mask=m_row[:, None] & (o_dv < V_DIM)[None, :])
    p_lse = LSE + (i_b * num_heads + o_head) * q_len + o_pos
    tl.store(p_lse, b_lse, mask=m_row)
