"""Backward in Gluon for Hopper: one pass over tiles of keys, five products, dQ by TMA reductions in fp32.

A tile is CONSUMERS * 64 keys of one KV head. It walks blocks of 64 (position, query head) rows, of all the query
heads of its group, so that dK and dV stay in registers until they are whole. With P = exp(score - lse) and delta =
sum(dO * O) - dlse: dV = P^T dO, dS = P * (dO V^T - delta), dK = scale dS^T Q, dQ = scale dS K. Scores are held
transposed (keys by queries), so that P and dS feed dV and dK from registers. dS also goes through shared memory to both
consumers: each makes its share of the columns of dQ over all the keys of the tile, which is added to global memory once
a block.

What is loaded never lies in a padded tail, as in the forward: the last block of queries and the last tile of keys are
moved back so that they end with what is visible, and what they hold of their neighbours is masked. So padding may hold
NaN.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from packflex.attention.hopper.deal import take_next, told_next
from packflex.attention.hopper.forward import _half, _near_and_far, _work_of
from packflex.attention.hopper.order import (
    COUNTER,
    HEADER,
    KV_HEADS,
    KV_LEN,
    Q_LEN,
    SECTION,
    STRIDE_COPY,
    STRIDE_KB,
    STRIDE_QB,
    TILES,
    TOTAL,
)
from packflex.attention.hopper.prepare import STATS_BEFORE
from packflex.attention.hopper.shim import tma_add, tma_load, tma_store

# Rows before those of dQ's sums: a block moved back before the first row of all adds its zeros there. TMA reductions
# take no negative coordinates ("illegal instruction"), though loads do.
SUMS_BEFORE = gl.constexpr(64)


@gluon.jit
def _tile_start(key, KV_HI, i_b, stride_ib, q_len, KEYS: gl.constexpr):
    """First key that a tile loads, maybe negative, and the end of the keys that anything sees."""
    end_key = gl.load(KV_HI + i_b * stride_ib + q_len - 1)
    return gl.minimum(key, end_key - KEYS), end_key


@gluon.jit
def _stat_coordinate(row, stride_copy, HEADS: gl.constexpr):
    """Where a box of lse or delta from `row` on starts, in the copy that has it at a multiple of 4 elements.

    TMA takes boxes of rank 1 that start at a multiple of 16 bytes only; blocks start at any position.
    """
    if HEADS % 4 == 0:
        at = row
    else:
        at = row - (row & 3) + (row & 3) // HEADS * stride_copy
    return at + STATS_BEFORE


@gluon.jit
def _bwd_producer(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, PLAN, KV_HI,
    q_s, do_s, k_s, v_s, lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, o_full, o_empty,
    item_s, item_full,
    HEADS: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    COUNTED: gl.constexpr,
):  # fmt: skip
    """Loads: K and V of each tile, then its blocks of Q, dO, lse and delta, one subgroup of heads after the other."""
    PART: gl.constexpr = 64 // HEADS
    UNITS: gl.constexpr = GROUP // HEADS
    c = 0
    j = 0
    item = gl.program_id(0)
    total = gl.load(PLAN + TOTAL)
    while item < total:
        kv_heads = gl.load(PLAN + KV_HEADS)
        i_b, i_kv, at = _work_of(item, gl.load(PLAN + TILES), kv_heads, gl.load(PLAN + SECTION))
        p_record = PLAN + HEADER + at * 4
        q_len = gl.load(PLAN + Q_LEN)
        key, _ = _tile_start(gl.load(p_record), KV_HI, i_b, gl.load(PLAN + STRIDE_KB), q_len, CONSUMERS * 64)
        first = gl.load(p_record + 1)
        blocks = gl.maximum(gl.load(p_record + 2), 1)
        last = gl.load(p_record + 3)
        copy = gl.load(PLAN + STRIDE_COPY)
        mbarrier.wait(kv_empty, (j & 1) ^ 1)
        mbarrier.expect(kv_full, 2 * CONSUMERS * k_desc.block_type.nbytes)
        for g in gl.static_range(CONSUMERS):
            tma_load(k_desc, [i_b, key + g * 64, i_kv, 0], kv_full, k_s.index(g))
            tma_load(v_desc, [i_b, key + g * 64, i_kv, 0], kv_full, v_s.index(g))
        for u in range(UNITS):
            head = i_kv * GROUP + u * HEADS
            row = ((i_b * kv_heads + i_kv) * UNITS + u) * (q_len * HEADS)
            for i in range(blocks):
                stage = c % STAGES
                phase = ((c // STAGES) & 1) ^ 1
                pos = gl.minimum(first + i * PART, last)
                q_bytes: gl.constexpr = q_desc.block_type.nbytes
                at_stat = _stat_coordinate(row + pos * HEADS, copy, HEADS)
                mbarrier.wait(q_empty.index(stage), phase)
                mbarrier.expect(q_full.index(stage), q_bytes + lse_desc.block_type.nbytes)
                tma_load(q_desc, [i_b, pos, head, 0], q_full.index(stage), q_s.index(stage))
                tma_load(lse_desc, [at_stat], q_full.index(stage), lse_s.index(stage))
                mbarrier.wait(o_empty.index(stage), phase)
                mbarrier.expect(o_full.index(stage), q_bytes + delta_desc.block_type.nbytes)
                tma_load(do_desc, [i_b, pos, head, 0], o_full.index(stage), do_s.index(stage))
                tma_load(delta_desc, [at_stat], o_full.index(stage), delta_s.index(stage))
                c += 1
        item = take_next(PLAN + COUNTER, item_s, item_full, j, COUNTED)
        j += 1


@gluon.jit
def _dq_products(
    ds_s, k_s, c, column, CONSUMERS: gl.constexpr, D: gl.constexpr, COLUMNS: gl.constexpr,
    lh: gl.constexpr,
):  # fmt: skip
    """COLUMNS columns of dQ of block c, over the keys of all consumers; in flight."""
    dq_t = gl.zeros([64, COLUMNS], gl.float32, lh)
    for x in gl.static_range(CONSUMERS):
        k = k_s.index(x).reshape([64, D]).slice(column, COLUMNS, 1)
        ds = ds_s.index((c % 2) * CONSUMERS + x).permute((1, 0))
        dq_t = warpgroup_mma(ds, k, dq_t, use_acc=x > 0, is_async=True)
    return dq_t


@gluon.jit
def _dq_add(
    dq_desc, dq_s, b_dq, slot: gl.constexpr, pos, row, column: gl.constexpr, FIRST: gl.constexpr,
    COLUMNS: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """Add columns of a block of dQ to global memory, through this consumer's own buffer."""
    if FIRST:
        tma.store_wait(0)  # the block before has left the buffers
    dq_s.index(slot).reshape([64, COLUMNS]).store(b_dq)
    fence_async_shared()
    tma_add(dq_desc, [row + pos * HEADS, column], dq_s.index(slot))


@gluon.jit
def _start_scores(q_s, k, q_full, c, D: gl.constexpr, STAGES: gl.constexpr, ls: gl.constexpr):
    """Scores of block c, keys by rows; in flight."""
    stage = c % STAGES
    mbarrier.wait(q_full.index(stage), (c // STAGES) & 1)
    q = q_s.index(stage).reshape([64, D])
    return warpgroup_mma(k, q.permute((1, 0)), gl.zeros([64, 64], gl.float32, ls), use_acc=False, is_async=True)


@gluon.jit
def _bwd_block(
    dq_desc, q_s, do_s, k_s, k, v, lse_s, delta_s, ds_s, dq_s, ds_full, q_full, q_empty, o_full, o_empty,
    b_s, c, begin, block, last, row, b_dk, b_dv, lo, hi, sm, cap_in, cap_out, head, place, mod_args,
    g: gl.constexpr, MASK: gl.constexpr, AHEAD: gl.constexpr, NEXT: gl.constexpr, SOFTCAP: gl.constexpr,
    MOD: gl.constexpr, MOD_GRAD: gl.constexpr, LATE: gl.constexpr,
    HEADS: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    COLUMNS: gl.constexpr, ls: gl.constexpr, ld: gl.constexpr, lh: gl.constexpr, lp: gl.constexpr,
):  # fmt: skip
    """One block of 64 rows against this consumer's 64 keys, and its columns of dQ against all the tile's keys.

    `place` is (i_b, key) of the keys, and what the mod computes of them alone; `head` the first head of the block.
    k, v are this consumer's, in shared memory or registers. AHEAD: b_s are the block's scores; NEXT: make those of the
    next one beside this block's last products. LATE: make dQ of the block before instead of this block's, beside the
    weights; `begin` is the first block of all, which has none before it.
    """
    PARTS: gl.constexpr = D // (CONSUMERS * COLUMNS)
    MORE: gl.constexpr = 1 if NEXT else 0
    columns: gl.constexpr = gl.SliceLayout(0, ls)
    stage = c % STAGES
    pos = gl.minimum(block, last) if MASK > 0 else block  # blocks without a mask are none that was moved back
    q = q_s.index(stage).reshape([64, D])
    if LATE:
        mbarrier.wait(ds_full.index((c + 1) % 2), ((c - 1) // 2) & 1, pred=c > begin)
        dq_t = _dq_products(ds_s, k_s, c + 1, g * PARTS * COLUMNS, CONSUMERS, D, COLUMNS, lh)
    if not AHEAD:
        s_t = _start_scores(q_s, k, q_full, c, D, STAGES, ls)
    mbarrier.wait(o_full.index(stage), (c // STAGES) & 1)
    do = do_s.index(stage).reshape([64, D])
    dp_t = warpgroup_mma(v, do.permute((1, 0)), gl.zeros([64, 64], gl.float32, ls), use_acc=False, is_async=True)
    lse = gl.expand_dims(lse_s.index(stage).load(columns), 0)
    if not AHEAD:
        b_s = warpgroup_mma_wait(1, deps=[s_t])
    if MOD is not None:
        o_c = gl.arange(0, 64, columns)
        q_head = gl.expand_dims(head + o_c % HEADS, 0)
        q_at = gl.expand_dims(gl.maximum(pos + o_c // HEADS, 0), 0)
        near, far = _near_and_far(pos, gl.expand_dims(o_c, 0), HEADS)
        b_p = gl.exp2(MOD(b_s, place[0], q_head, q_at, place[1], near, far, place[2], cap_in, mod_args) * sm - lse)
    elif SOFTCAP:
        b_t = 1 - 2 / (1 + gl.exp2(b_s * cap_in))
        b_p = gl.exp2(b_t * cap_out - lse)
    else:
        b_p = gl.exp2(b_s * sm - lse)
    if MASK > 0:  # 1: keys that are seen no more, and rows of the block before; 2: keys not seen yet besides
        o_m = gl.expand_dims(pos + gl.arange(0, 64, columns) // HEADS, 0)
        if MASK == 2:
            m = (o_m >= gl.expand_dims(gl.maximum(lo, block), 1)) & (o_m < gl.expand_dims(hi, 1))
        else:
            m = (o_m >= block) & (o_m < gl.expand_dims(hi, 1))
        b_p = gl.where(m, b_p, 0.0)
    b_ph = gl.convert_layout(_half(b_p, q_s.dtype), lp)
    if SOFTCAP and MOD is None:
        b_p = b_p * (1 - b_t * b_t)
    if LATE:
        b_dq = warpgroup_mma_wait(1, deps=[dq_t])
        if c > begin:
            before = gl.minimum(block - 64 // HEADS, last)
            _dq_add(dq_desc, dq_s, b_dq, g * PARTS, before, row, g * PARTS * COLUMNS, True, COLUMNS, HEADS)
    b_dp = warpgroup_mma_wait(0, deps=[dp_t])
    dv_t = warpgroup_mma(b_ph, do, b_dv, is_async=True)
    delta = gl.expand_dims(delta_s.index(stage).load(columns), 0)
    b_ds = b_p * (b_dp - delta)
    if MOD_GRAD is not None:
        b_ds = MOD_GRAD(b_ds, b_s, place[0], q_head, q_at, place[1], near, far, place[2], cap_in, mod_args)
        if MASK > 0:  # a derivative may be infinite where the weight is 0
            b_ds = gl.where(m, b_ds, 0.0)
    b_ds = _half(b_ds, q_s.dtype)
    ds_s.index((c % 2) * CONSUMERS + g).store(b_ds)
    fence_async_shared()
    if CONSUMERS > 1:
        mbarrier.arrive(ds_full.index(c % 2), count=1)
    dk_t = warpgroup_mma(gl.convert_layout(b_ds, lp), q, b_dk, is_async=True)
    if not LATE:
        if CONSUMERS > 1:
            mbarrier.wait(ds_full.index(c % 2), (c // 2) & 1)
        dq_t = _dq_products(ds_s, k_s, c, g * PARTS * COLUMNS, CONSUMERS, D, COLUMNS, lh)
    if NEXT:
        s_t = _start_scores(q_s, k, q_full, c + 1, D, STAGES, ls)
    DQ: gl.constexpr = 0 if LATE else CONSUMERS
    b_dv = warpgroup_mma_wait(DQ + 1 + MORE, deps=[dv_t])
    mbarrier.arrive(o_empty.index(stage), count=1)
    b_dk = warpgroup_mma_wait(DQ + MORE, deps=[dk_t])
    mbarrier.arrive(q_empty.index(stage), count=1)
    if not LATE:
        b_dq = warpgroup_mma_wait(MORE, deps=[dq_t])
        _dq_add(dq_desc, dq_s, b_dq, g * PARTS, pos, row, g * PARTS * COLUMNS, True, COLUMNS, HEADS)
        for x in gl.static_range(1, PARTS):
            dq_t = _dq_products(ds_s, k_s, c, (g * PARTS + x) * COLUMNS, CONSUMERS, D, COLUMNS, lh)
            b_dq = warpgroup_mma_wait(0, deps=[dq_t])
            _dq_add(dq_desc, dq_s, b_dq, g * PARTS + x, pos, row, (g * PARTS + x) * COLUMNS, False, COLUMNS, HEADS)
    if NEXT:
        b_s = warpgroup_mma_wait(0, deps=[s_t])
    return b_s, b_dk, b_dv  # b_s means nothing unless NEXT


@gluon.jit
def _bwd_dq(
    dq_desc, k_s, ds_s, dq_s, ds_full, c, block, last, row,
    g: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, HEADS: gl.constexpr,
    lh: gl.constexpr,
):  # fmt: skip
    """This consumer's columns of dQ of a block, once every consumer's dS is there."""
    PARTS: gl.constexpr = D // (CONSUMERS * COLUMNS)
    mbarrier.wait(ds_full.index(c % 2), (c // 2) & 1)
    dq_t = _dq_products(ds_s, k_s, c, g * PARTS * COLUMNS, CONSUMERS, D, COLUMNS, lh)
    b_dq = warpgroup_mma_wait(0, deps=[dq_t])
    pos = gl.minimum(block, last)
    _dq_add(dq_desc, dq_s, b_dq, g * PARTS, pos, row, g * PARTS * COLUMNS, True, COLUMNS, HEADS)


@gluon.jit
def _bwd_idle(
    dq_desc, k_s, ds_s, dq_s, ds_full, q_full, q_empty, o_full, o_empty, c, block, last, row,
    g: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, COLUMNS: gl.constexpr,
    HEADS: gl.constexpr, ls: gl.constexpr, lh: gl.constexpr,
):  # fmt: skip
    """A block that only the other consumer sees: dS of zeros, and this consumer's columns of dQ."""
    stage = c % STAGES
    phase = (c // STAGES) & 1
    mbarrier.wait(q_full.index(stage), phase)
    mbarrier.arrive(q_empty.index(stage), count=1)
    mbarrier.wait(o_full.index(stage), phase)
    mbarrier.arrive(o_empty.index(stage), count=1)
    ds_s.index((c % 2) * CONSUMERS + g).store(gl.zeros([64, 64], ds_s.dtype, ls))
    fence_async_shared()
    mbarrier.arrive(ds_full.index(c % 2), count=1)
    _bwd_dq(dq_desc, k_s, ds_s, dq_s, ds_full, c, block, last, row, g, D, CONSUMERS, COLUMNS, HEADS, lh)


@gluon.jit
def _bwd_consumer(
    g: gl.constexpr, dq_desc, gk_desc, gv_desc, GRAD_K, GRAD_V, Q_LO, Q_HI, KV_HI, PLAN,
    q_s, do_s, k_s, v_s, lse_s, delta_s, ds_s, dq_s, kv_full, kv_empty, q_full, q_empty, o_full, o_empty, ds_full,
    item_s, item_full, scale, sm, cap_in, cap_out, mod_args,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, COLUMNS: gl.constexpr, AHEAD: gl.constexpr, SOFTCAP: gl.constexpr, MOD: gl.constexpr,
    MOD_COLUMNS: gl.constexpr, MOD_GRAD: gl.constexpr, HELD: gl.constexpr, COUNTED: gl.constexpr,
):  # fmt: skip
    """64 keys of each tile: consumer g of CONSUMERS."""
    PART: gl.constexpr = 64 // HEADS
    UNITS: gl.constexpr = GROUP // HEADS
    KEYS: gl.constexpr = CONSUMERS * 64
    LATE: gl.constexpr = CONSUMERS > 1 and COLUMNS * CONSUMERS == D and D == 64  # registers for dQ beside the scores
    ls: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    ld: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    lh: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    lp: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ld, k_width=2)
    keys: gl.constexpr = gl.SliceLayout(1, ls)
    base = 0  # blocks of the tiles before this one
    j = 0
    item = gl.program_id(0)
    while item < gl.load(PLAN + TOTAL):
        kv_heads = gl.load(PLAN + KV_HEADS)
        kv_len = gl.load(PLAN + KV_LEN)
        i_b, i_kv, at = _work_of(item, gl.load(PLAN + TILES), kv_heads, gl.load(PLAN + SECTION))
        p_record = PLAN + HEADER + at * 4
        key = gl.load(p_record)
        start, end_key = _tile_start(key, KV_HI, i_b, gl.load(PLAN + STRIDE_KB), gl.load(PLAN + Q_LEN), KEYS)
        first = gl.load(p_record + 1)
        blocks = gl.maximum(gl.load(p_record + 2), 1)
        last = gl.load(p_record + 3)
        stride_qb = gl.load(PLAN + STRIDE_QB)
        p_lo = Q_LO + i_b * stride_qb
        p_hi = Q_HI + i_b * stride_qb
        c0 = start + g * 64
        # Keys of this consumer that are the tile's own, top to bottom: their bounds give its blocks, those between
        # full_lo and full_hi without a mask. Every consumer takes one block at least, all masked where nothing sees
        # its keys. Working ahead, its last block is taken apart, with a mask.
        top = gl.maximum(c0, key)
        bottom = gl.minimum(c0 + 64, end_key) - 1
        some = bottom >= top
        whole = c0 >= key
        top = gl.minimum(top, kv_len - 1)
        bottom = gl.maximum(gl.minimum(bottom, kv_len - 1), 0)
        top_lo = gl.load(p_lo + top)
        top_hi = gl.load(p_hi + top)
        bottom_lo = gl.load(p_lo + bottom)
        bottom_hi = gl.load(p_hi + bottom)
        begin = gl.where(some, gl.minimum((top_lo - first) // PART, blocks - 1), 0)
        end = gl.where(some, (gl.maximum(bottom_hi - first, 0) + PART - 1) // PART, 0)
        end = gl.maximum(end, begin + 1)
        stop = end - 1 if AHEAD else end
        full_lo = gl.where(whole, gl.minimum((bottom_lo - first + PART - 1) // PART, stop), stop)
        full_lo = gl.maximum(full_lo, begin)
        full_hi = gl.where(whole, gl.minimum(gl.maximum(top_hi - first, 0) // PART, stop), stop)
        full_hi = gl.maximum(full_hi, full_lo)
        o_k = c0 + gl.arange(0, 64, keys)
        m_k = (o_k >= key) & (o_k < end_key)
        lo = gl.load(p_lo + o_k, mask=m_k, other=0)
        hi = gl.load(p_hi + o_k, mask=m_k, other=0)
        if MOD is not None:
            key_at = gl.expand_dims(gl.minimum(gl.maximum(o_k, 0), kv_len - 1), 1)
            place = (i_b, key_at, MOD_COLUMNS(i_b, key_at, cap_in, mod_args))
        else:
            place = (i_b, 0, (0,))
        mbarrier.wait(kv_full, j & 1)
        k = k_s.index(g).reshape([64, D])
        v = v_s.index(g).reshape([64, D])
        if HELD:
            k = k.load(gl.DotOperandLayout(operand_index=0, parent=ls, k_width=2))
            v = v.load(gl.DotOperandLayout(operand_index=0, parent=ls, k_width=2))
        b_dk = gl.zeros([64, D], gl.float32, ld)
        b_dv = gl.zeros([64, D], gl.float32, ld)
        for u in range(UNITS):
            row = SUMS_BEFORE + ((i_b * gl.load(PLAN + KV_HEADS) + i_kv) * UNITS + u) * (gl.load(PLAN + Q_LEN) * HEADS)
            if CONSUMERS > 1:
                for i in range(0, begin):
                    _bwd_idle(
                        dq_desc, k_s, ds_s, dq_s, ds_full, q_full, q_empty, o_full, o_empty, base + i,
                        first + i * PART, last, row, g, D, CONSUMERS, STAGES, COLUMNS, HEADS, ls, lh,
                    )  # fmt: skip
            b_s = gl.zeros([64, 64], gl.float32, ls)
            if AHEAD:
                s_t = _start_scores(q_s, k, q_full, base + begin, D, STAGES, ls)
                b_s = warpgroup_mma_wait(0, deps=[s_t])
            for i in range(begin, full_lo):
                b_n, b_dk, b_dv = _bwd_block(
                    dq_desc, q_s, do_s, k_s, k, v, lse_s, delta_s, ds_s, dq_s, ds_full, q_full, q_empty, o_full,
                    o_empty, b_s, base + i, base + begin, first + i * PART, last, row, b_dk, b_dv, lo, hi, sm, cap_in,
                    cap_out, i_kv * GROUP + u * HEADS, place, mod_args,
                    g, 2, AHEAD, AHEAD, SOFTCAP, MOD, MOD_GRAD, LATE, HEADS, D, CONSUMERS, STAGES, COLUMNS,
                    ls, ld, lh, lp,
                )  # fmt: skip
                if AHEAD:
                    b_s = b_n
            for i in range(full_lo, full_hi):
                b_n, b_dk, b_dv = _bwd_block(
                    dq_desc, q_s, do_s, k_s, k, v, lse_s, delta_s, ds_s, dq_s, ds_full, q_full, q_empty, o_full,
                    o_empty, b_s, base + i, base + begin, first + i * PART, last, row, b_dk, b_dv, lo, hi, sm, cap_in,
                    cap_out, i_kv * GROUP + u * HEADS, place, mod_args,
                    g, 0, AHEAD, AHEAD, SOFTCAP, MOD, MOD_GRAD, LATE, HEADS, D, CONSUMERS, STAGES, COLUMNS,
                    ls, ld, lh, lp,
                )  # fmt: skip
                if AHEAD:
                    b_s = b_n
            for i in range(full_hi, stop):
                b_n, b_dk, b_dv = _bwd_block(
                    dq_desc, q_s, do_s, k_s, k, v, lse_s, delta_s, ds_s, dq_s, ds_full, q_full, q_empty, o_full,
                    o_empty, b_s, base + i, base + begin, first + i * PART, last, row, b_dk, b_dv, lo, hi, sm, cap_in,
                    cap_out, i_kv * GROUP + u * HEADS, place, mod_args,
                    g, 1, AHEAD, AHEAD, SOFTCAP, MOD, MOD_GRAD, LATE, HEADS, D, CONSUMERS, STAGES, COLUMNS,
                    ls, ld, lh, lp,
                )  # fmt: skip
                if AHEAD:
                    b_s = b_n
            if AHEAD:
                _, b_dk, b_dv = _bwd_block(
                    dq_desc, q_s, do_s, k_s, k, v, lse_s, delta_s, ds_s, dq_s, ds_full, q_full, q_empty, o_full,
                    o_empty, b_s, base + stop, base + begin, first + stop * PART, last, row, b_dk, b_dv, lo, hi, sm,
                    cap_in, cap_out, i_kv * GROUP + u * HEADS, place, mod_args,
                    g, 2, AHEAD, False, SOFTCAP, MOD, MOD_GRAD, LATE, HEADS, D, CONSUMERS, STAGES, COLUMNS,
                    ls, ld, lh, lp,
                )  # fmt: skip
            if LATE:
                _bwd_dq(
                    dq_desc, k_s, ds_s, dq_s, ds_full, base + end - 1, first + (end - 1) * PART, last, row,
                    g, D, CONSUMERS, COLUMNS, HEADS, lh,
                )  # fmt: skip
            if CONSUMERS > 1:
                for i in range(end, blocks):
                    _bwd_idle(
                        dq_desc, k_s, ds_s, dq_s, ds_full, q_full, q_empty, o_full, o_empty, base + i,
                        first + i * PART, last, row, g, D, CONSUMERS, STAGES, COLUMNS, HEADS, ls, lh,
                    )  # fmt: skip
            base += blocks
        if CONSUMERS == 1:
            mbarrier.arrive(kv_empty, count=1)
        if start >= key:
            # They leave through the buffers of dQ's sums, which have left them. Of two consumers each has half of
            # those, for dK; its dV goes through its V.
            out_s = dq_s._reinterpret(q_s.dtype, [2, 1, 64, 1, D], gv_desc.layout)
            if CONSUMERS == 1:
                tma.store_wait(0)
                dv_s = out_s.index(1)
            else:
                dv_s = v_s.index(g)
            dv_s.reshape([64, D]).store(_half(b_dv, q_s.dtype))
            fence_async_shared()
            tma_store(gv_desc, [i_b, c0, i_kv, 0], dv_s)
            if CONSUMERS > 1:
                tma.store_wait(1)
            out_s.index(g).reshape([64, D]).store(_half(b_dk * scale, q_s.dtype))
            fence_async_shared()
            tma_store(gk_desc, [i_b, c0, i_kv, 0], out_s.index(g))
            tma.store_wait(1)
        else:
            # loaded again: the registers of a tile's block loops hold no more than they must
            kv_heads = gl.load(PLAN + KV_HEADS)
            kv_len = gl.load(PLAN + KV_LEN)
            o_r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, ld)), 1)
            o_d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, ld)), 0)
            o_row = c0 + o_r
            row = ((i_b * kv_len + o_row).to(gl.int64) * kv_heads + i_kv) * D
            m_row = (o_row >= key) & (o_row < end_key)
            gl.store(GRAD_K + row + o_d, _half(b_dk * scale, q_s.dtype), mask=m_row)
            gl.store(GRAD_V + row + o_d, _half(b_dv, q_s.dtype), mask=m_row)
            # keys of a padded tail, which the tile did not load
            o_row = key + g * 64 + o_r
            row = ((i_b * kv_len + o_row).to(gl.int64) * kv_heads + i_kv) * D
            m_row = (o_row >= end_key) & (o_row < kv_len)
            zero = gl.zeros([64, D], q_s.dtype, ld)
            gl.store(GRAD_K + row + o_d, zero, mask=m_row)
            gl.store(GRAD_V + row + o_d, zero, mask=m_row)
        if CONSUMERS > 1:
            mbarrier.arrive(kv_empty, count=1)
        item = told_next(item_s, item_full, j, COUNTED)
        j += 1
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["mod_args"],
    do_not_specialize_on_alignment=["Q_LO", "Q_HI", "KV_HI", "PLAN", "mod_args"],
)
def _hopper_bwd_kernel(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dq_desc, gk_desc, gv_desc,
    GRAD_K, GRAD_V, Q_LO, Q_HI, KV_HI, PLAN,
    scale, sm, cap_in, cap_out, mod_args,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, COLUMNS: gl.constexpr, AHEAD: gl.constexpr, SOFTCAP: gl.constexpr, MOD: gl.constexpr,
    MOD_COLUMNS: gl.constexpr, MOD_GRAD: gl.constexpr, HELD: gl.constexpr, COUNTED: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """As many programs as work items, or persistent ones, which get the next as `deal` says.

    Descriptors: q, dO [B, S, Hq, D] in boxes [1, 64 // HEADS, HEADS, D]; k, v and their gradients [B, KV_LEN, Hkv, D]
    in boxes [1, 64, 1, D]; lse (base 2) and delta fp32 [copies, STRIDE_COPY] in boxes [64], rows of a subgroup of heads
    side by side, as `prepare` writes them; the sums of dQ / scale fp32 [SUMS_BEFORE + rows as those, D] in boxes
    [64, COLUMNS]. GRAD_K, GRAD_V are the gradients again, dense, for tiles that must not write whole boxes. Q_LO, Q_HI
    int32 [B, KV_LEN] and KV_HI [B, S]; PLAN as `order.WorkOrder` of keys by queries, with the sizes of `order` before
    it.
    """
    PART: gl.constexpr = 64 // HEADS
    SLOTS: gl.constexpr = D // COLUMNS
    q_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, PART, HEADS, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, PART, HEADS, D], do_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 64, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 64, 1, D], v_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, 64], lse_desc.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, 64], delta_desc.layout)
    ds_s = gl.allocate_shared_memory(
        q_desc.dtype, [2 * CONSUMERS, 64, 64],
        gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
    )  # fmt: skip
    dq_s = gl.allocate_shared_memory(gl.float32, [SLOTS, 64, COLUMNS], dq_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    o_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    o_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_s = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=CONSUMERS)
    for x in gl.static_range(STAGES):
        mbarrier.init(q_full.index(x), count=1)
        mbarrier.init(o_full.index(x), count=1)
        mbarrier.init(q_empty.index(x), count=CONSUMERS)
        mbarrier.init(o_empty.index(x), count=CONSUMERS)
    for x in gl.static_range(2):
        mbarrier.init(ds_full.index(x), count=CONSUMERS)
        mbarrier.init(item_full.index(x), count=1)
    fence_async_shared()
    # The argument tuples are written in place: bound to a name, their constexprs become tensors.
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_bwd_consumer, (
                0, dq_desc, gk_desc, gv_desc, GRAD_K, GRAD_V, Q_LO, Q_HI, KV_HI, PLAN, q_s, do_s, k_s, v_s, lse_s,
                delta_s, ds_s, dq_s, kv_full, kv_empty, q_full, q_empty, o_full, o_empty, ds_full, item_s, item_full,
                scale, sm, cap_in, cap_out, mod_args, HEADS, GROUP, D, CONSUMERS, STAGES, COLUMNS, AHEAD, SOFTCAP, MOD,
                MOD_COLUMNS, MOD_GRAD, HELD, COUNTED,
            )),
            (_bwd_consumer, (
                1, dq_desc, gk_desc, gv_desc, GRAD_K, GRAD_V, Q_LO, Q_HI, KV_HI, PLAN, q_s, do_s, k_s, v_s, lse_s,
                delta_s, ds_s, dq_s, kv_full, kv_empty, q_full, q_empty, o_full, o_empty, ds_full, item_s, item_full,
                scale, sm, cap_in, cap_out, mod_args, HEADS, GROUP, D, CONSUMERS, STAGES, COLUMNS, AHEAD, SOFTCAP, MOD,
                MOD_COLUMNS, MOD_GRAD, HELD, COUNTED,
            )),
            (_bwd_producer, (
                q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, PLAN, KV_HI, q_s, do_s, k_s, v_s,
                lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, o_full, o_empty,
                item_s, item_full, HEADS, GROUP, CONSUMERS, STAGES, COUNTED,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_bwd_consumer, (
                0, dq_desc, gk_desc, gv_desc, GRAD_K, GRAD_V, Q_LO, Q_HI, KV_HI, PLAN, q_s, do_s, k_s, v_s, lse_s,
                delta_s, ds_s, dq_s, kv_full, kv_empty, q_full, q_empty, o_full, o_empty, ds_full, item_s, item_full,
                scale, sm, cap_in, cap_out, mod_args, HEADS, GROUP, D, CONSUMERS, STAGES, COLUMNS, AHEAD, SOFTCAP, MOD,
                MOD_COLUMNS, MOD_GRAD, HELD, COUNTED,
            )),
            (_bwd_producer, (
                q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, PLAN, KV_HI, q_s, do_s, k_s, v_s,
                lse_s, delta_s, kv_full, kv_empty, q_full, q_empty, o_full, o_empty,
                item_s, item_full, HEADS, GROUP, CONSUMERS, STAGES, COUNTED,
            )),
        ], [1], [24])  # fmt: skip
