"""Backward kernels: delta; dK and dV of a tile of keys; dQ of a tile of queries. No atomics: the same bits each run.

With P = exp(score - lse) and delta = sum(dO * O) - dlse: dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K,
dK = scale dS^T Q. The dK/dV kernel holds its tiles transposed (keys by queries) so that P and dS feed the second
product from registers, and takes the query heads of a KV group as rows of one tile instead of one after the other.
Naming and intervals as in `forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from packflex.attention.triton.forward import LOG2_E, capped, load_tile, tile_rows


@triton.jit
def _flex_bwd_delta_kernel(
    OUT, GRAD_OUT, GRAD_LSE, LSE, DELTA, LSE2,
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs, stride_lb, stride_lh, stride_ls,
    q_len, num_heads,
    V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """delta = sum(grad_out * out) - grad_lse of BLOCK_M positions of one head, and lse in units of log(2).

    The lse of rows that see nothing becomes +inf: whatever their score, its weight is 0.
    """
    o_pos = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_dv = tl.arange(0, BLOCK_DV)
    m_row = o_pos < q_len
    m_tile = m_row[:, None] & (o_dv < V_DIM)[None, :]
    p_o = OUT + i_b * stride_ob + i_h * stride_oh + o_pos.to(tl.int64)[:, None] * stride_os + o_dv[None, :]
    p_g = GRAD_OUT + i_b * stride_gb + i_h * stride_gh + o_pos.to(tl.int64)[:, None] * stride_gs + o_dv[None, :]
    b_o = tl.load(p_o, mask=m_tile, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
    b_g = tl.load(p_g, mask=m_tile, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_o * b_g, 1)
    if HAS_GRAD_LSE:
        p_l = GRAD_LSE + i_b * stride_lb + i_h * stride_lh + o_pos.to(tl.int64) * stride_ls
        b_delta -= tl.load(p_l, mask=m_row, other=0.0).to(tl.float32)
    o_stat = (i_b * num_heads + i_h) * q_len + o_pos
    tl.store(DELTA + o_stat, b_delta, mask=m_row)
    b_lse = tl.load(LSE + o_stat, mask=m_row, other=0.0)
    tl.store(LSE2 + o_stat, tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2_E), mask=m_row)


@triton.jit
def _dkdv_blocks(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, stride_qh, stride_qs, stride_gh, stride_gs,
    b_lo, b_hi, i_group, first_query, end_query, full_begin, full_end, blocks, q_len, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dK and dV from the partly (MASKED) or the wholly visible blocks of queries, each BLOCK_M // HEADS positions."""
    o_r = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_head = i_group * HEADS + o_r % HEADS  # [BLOCK_M] within the KV group
    # the masked loop walks the blocks before and after the full ones, so that its loads run ahead over both
    steps = blocks - (full_end - full_begin) if MASKED else full_end - full_begin
    for step in range(steps):
        i = step + tl.where(step < full_begin, 0, full_end - full_begin) if MASKED else step + full_begin
        block_query = first_query + i * (BLOCK_M // HEADS)
        o_q = block_query + o_r // HEADS  # [BLOCK_M]
        m_q = o_q < end_query  # what lies past the documents of this tile may hold anything, NaN included
        p_qm = p_q + block_query.to(tl.int64) * stride_qs
        p_dom = p_do + block_query.to(tl.int64) * stride_gs
        o_qm = o_head * stride_qh + (o_r // HEADS) * stride_qs
        o_dom = o_head * stride_gh + (o_r // HEADS) * stride_gs
        b_q = load_tile(p_qm + o_qm[:, None] + o_d[None, :], m_q, o_d < HEAD_DIM, MASKED, HEAD_DIM != BLOCK_D)
        if MASKED:
            b_lse = tl.load(p_lse + o_head * q_len + o_q, mask=m_q, other=float("inf"))
        else:
            b_lse = tl.load(p_lse + o_head * q_len + o_q)
        b_st = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if SOFTCAP:
            b_cap = capped(b_st * scale, softcap)
            b_pt = tl.exp2(b_cap * LOG2_E - b_lse[None, :])
        else:
            b_pt = tl.exp2(b_st * (scale * LOG2_E) - b_lse[None, :])
        if MASKED:
            m_s = (o_q[None, :] >= b_lo[:, None]) & (o_q[None, :] < b_hi[:, None])
            b_pt = tl.where(m_s, b_pt, 0.0)
        b_do = load_tile(p_dom + o_dom[:, None] + o_dv[None, :], m_q, o_dv < V_DIM, MASKED, V_DIM != BLOCK_DV)
        b_dv = tl.dot(b_pt.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        if MASKED:
            b_delta = tl.load(p_delta + o_head * q_len + o_q, mask=m_q, other=0.0)
        else:
            b_delta = tl.load(p_delta + o_head * q_len + o_q)
        b_dpt = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        if SOFTCAP:
            b_dst = b_dst * (1 - (b_cap / softcap) * (b_cap / softcap))
        b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def _flex_bwd_dkdv_kernel(
    Q, K, V, GRAD_OUT, LSE2, DELTA, Q_LO, Q_HI, GRAD_K, GRAD_V,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_ib, stride_is, q_len, kv_len, num_heads, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE_M: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one KV head, over all query heads of its group.

    Masks take registers: what is partly visible is walked EDGE_M rows at a time, what is wholly visible BLOCK_M.
    """
    i_tile = tl.program_id(0)  # first tiles first: under causal masks they are the longest
    i_kv = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_k = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = o_k < kv_len
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    POSITIONS: tl.constexpr = BLOCK_M // HEADS

    first_key = i_tile * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, kv_len) - 1
    p_lo = Q_LO + i_b * stride_ib
    p_hi = Q_HI + i_b * stride_ib
    first_query = tl.load(p_lo + first_key * stride_is)
    end_query = tl.load(p_hi + last_key * stride_is)
    full_begin_query = tl.load(p_lo + last_key * stride_is)
    full_end_query = tl.load(p_hi + first_key * stride_is)
    blocks = tl.cdiv(tl.maximum(end_query - first_query, 0), POSITIONS)
    full_begin = tl.minimum(tl.cdiv(full_begin_query - first_query, POSITIONS), blocks)
    full_end = tl.maximum((full_end_query - first_query) // POSITIONS, full_begin)
    edge_blocks = tl.cdiv(tl.maximum(end_query - first_query, 0), EDGE_M // HEADS)

    b_lo = tl.load(p_lo + o_k * stride_is, mask=m_k, other=0)
    b_hi = tl.load(p_hi + o_k * stride_is, mask=m_k, other=0)
    m_kd = m_k[:, None] & (o_d < HEAD_DIM)[None, :]
    m_kdv = m_k[:, None] & (o_dv < V_DIM)[None, :]
    o_k64 = o_k.to(tl.int64)[:, None]
    b_k = tl.load(K + i_b * stride_kb + i_kv * stride_kh + o_k64 * stride_ks + o_d[None, :], mask=m_kd, other=0.0)
    b_v = tl.load(V + i_b * stride_vb + i_kv * stride_vh + o_k64 * stride_vs + o_dv[None, :], mask=m_kdv, other=0.0)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    p_q = Q + i_b * stride_qb + i_kv * GROUP * stride_qh
    p_do = GRAD_OUT + i_b * stride_gb + i_kv * GROUP * stride_gh
    p_lse = LSE2 + (i_b * num_heads + i_kv * GROUP) * q_len
    p_delta = DELTA + (i_b * num_heads + i_kv * GROUP) * q_len
    for i_group in range(GROUP // HEADS):
        b_dk, b_dv = _dkdv_blocks(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, stride_qh, stride_qs, stride_gh, stride_gs,
            b_lo, b_hi, i_group, first_query, end_query,
            full_begin * (BLOCK_M // EDGE_M), full_end * (BLOCK_M // EDGE_M), edge_blocks, q_len, scale, softcap,
            True, SOFTCAP, PRECISION, HEADS, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, EDGE_M,
        )  # fmt: skip
        b_dk, b_dv = _dkdv_blocks(
            b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, stride_qh, stride_qs, stride_gh, stride_gs,
            b_lo, b_hi, i_group, first_query, end_query, full_begin, full_end, blocks, q_len, scale, softcap,
            False, SOFTCAP, PRECISION, HEADS, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M,
        )  # fmt: skip
    p_dk = GRAD_K + i_b * stride_dkb + i_kv * stride_dkh + o_k64 * stride_dks + o_d[None, :]
    p_dv = GRAD_V + i_b * stride_dvb + i_kv * stride_dvh + o_k64 * stride_dvs + o_dv[None, :]
    # a key that nothing sees gets exactly 0, whatever (NaN included) the padding holds
    m_seen = (b_lo < b_hi)[:, None]
    b_dk = tl.where(m_seen, b_dk * scale, 0.0)
    b_dv = tl.where(m_seen, b_dv, 0.0)
    tl.store(p_dk, b_dk.to(GRAD_K.dtype.element_ty), mask=m_kd)
    tl.store(p_dv, b_dv.to(GRAD_V.dtype.element_ty), mask=m_kdv)


@triton.jit
def _dq_blocks(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs, b_lo, b_hi,
    first_key, end_key, full_begin, full_end, blocks, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ from the partly (MASKED) or the wholly visible blocks of keys, the first at first_key."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    # the masked loop walks the blocks before and after the full ones, so that its loads run ahead over both
    steps = blocks - (full_end - full_begin) if MASKED else full_end - full_begin
    for step in range(steps):
        i = step + tl.where(step < full_begin, 0, full_end - full_begin) if MASKED else step + full_begin
        o_k = first_key + i * BLOCK_N + o_n
        m_k = o_k < end_key
        p_kn = p_k + (first_key + i * BLOCK_N).to(tl.int64) * stride_ks
        p_vn = p_v + (first_key + i * BLOCK_N).to(tl.int64) * stride_vs
        b_k = load_tile(
            p_kn + o_n[:, None] * stride_ks + o_d[None, :], m_k, o_d < HEAD_DIM, MASKED, HEAD_DIM != BLOCK_D
        )
        b_v = load_tile(p_vn + o_n[:, None] * stride_vs + o_dv[None, :], m_k, o_dv < V_DIM, MASKED, V_DIM != BLOCK_DV)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if SOFTCAP:
            b_cap = capped(b_s * scale, softcap)
            b_p = tl.exp2(b_cap * LOG2_E - b_lse[:, None])
        else:
            b_p = tl.exp2(b_s * (scale * LOG2_E) - b_lse[:, None])
        if MASKED:
            m_s = (o_k[None, :] >= b_lo[:, None]) & (o_k[None, :] < b_hi[:, None])
            b_p = tl.where(m_s, b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        b_ds = b_p * (b_dp - b_delta[:, None])
        if SOFTCAP:
            b_ds = b_ds * (1 - (b_cap / softcap) * (b_cap / softcap))
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit
def _flex_bwd_dq_kernel(
    Q, K, V, GRAD_OUT, LSE2, DELTA, KV_LO, KV_HI, GRAD_Q,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_dqb, stride_dqh, stride_dqs, stride_ib, stride_is,
    q_len, num_heads, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile: BLOCK_M // HEADS positions of HEADS query heads that share a KV head."""
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head = tl.program_id(1)
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
    o_dv = tl.arange(0, BLOCK_DV)
    m_qd = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
    o_pos64 = o_pos.to(tl.int64)[:, None]
    o_head64 = o_head.to(tl.int64)[:, None]
    b_q = tl.load(Q + i_b * stride_qb + o_head64 * stride_qh + o_pos64 * stride_qs + o_d[None, :], mask=m_qd, other=0.0)
    p_do = GRAD_OUT + i_b * stride_gb + o_head64 * stride_gh + o_pos64 * stride_gs + o_dv[None, :]
    b_do = tl.load(p_do, mask=m_row[:, None] & (o_dv < V_DIM)[None, :], other=0.0)
    o_stat = (i_b * num_heads + o_head) * q_len + o_pos
    b_lse = tl.load(LSE2 + o_stat, mask=m_row, other=float("inf"))
    b_delta = tl.load(DELTA + o_stat, mask=m_row, other=0.0)
    p_k = K + i_b * stride_kb + i_kv * stride_kh
    p_v = V + i_b * stride_vb + i_kv * stride_vh

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dq = _dq_blocks(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs, b_lo, b_hi,
        first_key, end_key, full_begin, full_end, blocks, scale, softcap,
        True, SOFTCAP, PRECISION, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N,
    )  # fmt: skip
    b_dq = _dq_blocks(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs, b_lo, b_hi,
        first_key, end_key, full_begin, full_end, blocks, scale, softcap,
        False, SOFTCAP, PRECISION, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N,
    )  # fmt: skip
    p_dq = GRAD_Q + i_b * stride_dqb + o_head64 * stride_dqh + o_pos64 * stride_dqs + o_d[None, :]
    b_dq = tl.where((b_lo < b_hi)[:, None], b_dq * scale, 0.0)  # as in dK: exact 0 in the padding
    tl.store(p_dq, b_dq.to(GRAD_Q.dtype.element_ty), mask=m_qd)
