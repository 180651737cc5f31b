"""Forward in Gluon for Hopper: query heads of a KV group as rows of a tile, one producer warp, 1 to 3 consumers.

A tile is POSITIONS consecutive queries times HEADS query heads, CONSUMERS * 64 rows; row r is position r // HEADS, head
r % HEADS. The producer loads the queries, and K and V in blocks of BLOCK_N keys, by TMA; each consumer warpgroup works
on 64 rows, with QK of block i + 1 in flight beside PV of block i and its weights in registers. Loops over masked and
unmasked blocks are apart, and a consumer skips the blocks that only its neighbour needs. Scores are in base 2 inside.

Triton 3.6 miscompiles a loop-carried value whose only uses are bounds of inner loops: it keeps its first value.
Whatever bounds an inner loop is loaded in the iteration that uses it; see `_work_of`. The long streams of
`tests/gpu/test_hopper_gpu.py` would show it.
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
from packflex.attention.hopper.order import COUNTER, HEADER
from packflex.attention.hopper.shim import tma_load, tma_store

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _work_of(t, tiles, units, section):
    """Batch row, head unit and record of work item t: sections of heads one after the other, longest tiles first."""
    in_row = t % (tiles * units)
    in_section = in_row % (section * tiles)
    i_b = t // (tiles * units)
    unit = in_row // (section * tiles) * section + in_section % section
    return i_b, unit, i_b * tiles + in_section // section


@gluon.jit
def _half(x, dtype: gl.constexpr):
    """fp32 to a half type, two elements an instruction; `.to` takes a PRMT more for each element (Triton 3.6)."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, PLAN, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    item_s, item_full, tiles, units, section, total,
    HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, COUNTED: gl.constexpr,
):  # fmt: skip
    """Loads: the queries of each tile, then its blocks of K and V."""
    PART: gl.constexpr = 64 // HEADS  # positions of one consumer
    c = 0  # blocks loaded so far, over all the tiles of this program
    j = 0
    item = gl.program_id(0)
    records = PLAN + HEADER
    while item < total:
        i_b, unit, at = _work_of(item, tiles, units, section)
        pos = gl.load(records + at * 4)
        first = gl.load(records + at * 4 + 1)
        blocks = gl.maximum(gl.load(records + at * 4 + 2), 1)
        last = gl.load(records + at * 4 + 3)
        head = unit * HEADS
        i_kv = head // GROUP
        for g in gl.static_range(CONSUMERS):
            b = (j % Q_STAGES) * CONSUMERS + g
            mbarrier.wait(q_empty.index(b), ((j // Q_STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(b), q_desc.block_type.nbytes)
            tma_load(q_desc, [i_b, pos + g * PART, head, 0], q_full.index(b), q_s.index(b))
        for i in range(blocks):
            if i == gl.maximum(blocks - STAGES, 0):
                item = take_next(PLAN + COUNTER, item_s, item_full, j, COUNTED)
            stage = c % STAGES
            phase = ((c // STAGES) & 1) ^ 1
            key = gl.minimum(first + i * BLOCK_N, last)
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [i_b, key, i_kv, 0], k_full.index(stage), k_s.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [i_b, key, i_kv, 0], v_full.index(stage), v_s.index(stage))
            c += 1
        j += 1


@gluon.jit
def _take_turn(turn, c, g: gl.constexpr, PING_PONG: gl.constexpr):
    """Wait until the other consumer has issued its products of the block before (consumer 1: of this block)."""
    if PING_PONG:
        mbarrier.wait(turn.index(g), (c & 1) ^ (1 - g))


@gluon.jit
def _pass_turn(turn, g: gl.constexpr, PING_PONG: gl.constexpr):
    if PING_PONG:
        mbarrier.arrive(turn.index(1 - g), count=1)


@gluon.jit
def _skip(
    k_full, k_empty, v_full, v_empty, turn, c, g: gl.constexpr, PING_PONG: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Release a block that only another consumer needs, once it is there: earlier would count for the round before."""
    stage = c % STAGES
    phase = (c // STAGES) & 1
    mbarrier.wait(k_full.index(stage), phase)
    mbarrier.arrive(k_empty.index(stage), count=1)
    _take_turn(turn, c, g, PING_PONG)
    _pass_turn(turn, g, PING_PONG)
    mbarrier.wait(v_full.index(stage), phase)
    mbarrier.arrive(v_empty.index(stage), count=1)


@gluon.jit
def _near_and_far(start, columns, HEADS: gl.constexpr):
    """start + columns // HEADS in float as a sum: what all columns of a thread share, and what is its own known number.

    A thread of a wgmma's accumulator holds columns 8 i and 8 i + 1 from an even one below 8 on.
    """
    near = start + (columns & 6) // HEADS
    return near.to(gl.float32), ((columns & ~6) // HEADS).to(gl.float32)


@gluon.jit
def _scores(
    s, lo, hi, block, last, cap_in, cap_out, place, mod_args,
    MASK: gl.constexpr, SOFTCAP: gl.constexpr, MOD: gl.constexpr, BLOCK_N: gl.constexpr, ls: gl.constexpr,
):  # fmt: skip
    """Mod, softcap and mask. MASK 0: all visible. 1: rows end inside the block. 2: rows start or end inside it.

    `place` is (i_b, head, query) of the rows, and what the mod computes of them alone; `cap_in` is then the mod's unit.
    """
    if MOD is not None:
        o_n = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(0, ls)), 0)
        at = gl.minimum(block, last) + o_n
        near, far = _near_and_far(gl.minimum(block, last), o_n, 1)
        if MASK > 0:  # a block that was moved back before the first key of all holds zeros there
            at = gl.maximum(at, 0)
        s = MOD(s, place[0], place[1], place[2], at, near, far, place[3], cap_in, mod_args)
    elif SOFTCAP:
        s = cap_out * (1 - 2 / (1 + gl.exp2(s * cap_in)))
    if MASK > 0:
        key = gl.minimum(block, last)
        o_n = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(0, ls)), 0)
        m = o_n < gl.expand_dims(hi - key, 1)
        if MASK == 2:
            m = m & (o_n >= gl.expand_dims(gl.maximum(lo, block) - key, 1))
        else:  # a block that was moved back holds keys of the block before it
            m = m & (o_n >= block - key)
        s = gl.where(m, s, -float("inf"))
    return s


@gluon.jit
def _step(
    q, k_s, v_s, k_full, k_empty, v_full, v_empty, turn, c, block, last, b_p, b_acc, b_m, b_l, lo, hi,
    sm, cap_in, cap_out, place, mod_args, g: gl.constexpr,
    MASK: gl.constexpr, SOFTCAP: gl.constexpr, MOD: gl.constexpr, PING_PONG: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, ls: gl.constexpr, lo_: gl.constexpr, lp: gl.constexpr,
):  # fmt: skip
    """Scores of block c in flight beside P V of block c - 1; then the softmax of block c."""
    stage = c % STAGES
    before = (c - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (c // STAGES) & 1)
    _take_turn(turn, c, g, PING_PONG)
    k = k_s.index(stage).reshape([BLOCK_N, k_s.shape[4]])
    s_t = warpgroup_mma(q, k.permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, ls), use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((c - 1) // STAGES) & 1)
    v = v_s.index(before).reshape([BLOCK_N, v_s.shape[4]])
    acc_t = warpgroup_mma(b_p, v, b_acc, is_async=True)
    _pass_turn(turn, g, PING_PONG)
    b_s = warpgroup_mma_wait(1, deps=[s_t])
    mbarrier.arrive(k_empty.index(stage), count=1)
    b_s = _scores(b_s, lo, hi, block, last, cap_in, cap_out, place, mod_args, MASK, SOFTCAP, MOD, BLOCK_N, ls)
    m_new = gl.maximum(b_m, gl.max(b_s, 1) * sm)
    b_e = gl.exp2(b_s * sm - gl.expand_dims(m_new, 1))
    fade = gl.exp2(b_m - m_new)
    b_l = b_l * fade + gl.sum(b_e, 1)
    b_acc = warpgroup_mma_wait(0, deps=[acc_t])
    mbarrier.arrive(v_empty.index(before), count=1)
    b_acc = b_acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, lo_)), 1)
    b_p = gl.convert_layout(_half(b_e, k_s.dtype), lp)
    return b_p, b_acc, m_new, b_l


@gluon.jit
def _consumer(
    g: gl.constexpr, o_desc, LSE, SINKS, KV_LO, KV_HI, PLAN,
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, item_s, item_full,
    stride_ib, q_len, tiles, units, section, total, sm, cap_in, cap_out, mod_args,
    HEADS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, PING_PONG: gl.constexpr, SOFTCAP: gl.constexpr, MOD: gl.constexpr, MOD_ROWS: gl.constexpr,
    HAS_SINKS: gl.constexpr, COUNTED: gl.constexpr,
):  # fmt: skip
    """64 rows of each tile: consumer g of CONSUMERS."""
    PART: gl.constexpr = 64 // HEADS
    ls: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    lo_: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    lp: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=lo_, k_width=2)
    rows: gl.constexpr = gl.SliceLayout(1, ls)
    o_r = gl.arange(0, 64, rows)
    base = 0  # K/V blocks of the tiles before this one
    j = 0
    item = gl.program_id(0)
    records = PLAN + HEADER
    while item < total:
        i_b, unit, at = _work_of(item, tiles, units, section)
        pos = gl.load(records + at * 4)
        first = gl.load(records + at * 4 + 1)
        blocks = gl.maximum(gl.load(records + at * 4 + 2), 1)
        last = gl.load(records + at * 4 + 3)
        p_lo = KV_LO + i_b * stride_ib
        p_hi = KV_HI + i_b * stride_ib
        c0 = pos + g * PART
        # The bounds of this consumer's first and last position give its blocks, those between full_lo and full_hi
        # without a mask. Every consumer takes one block at least, all masked where its rows see nothing.
        top = gl.minimum(c0, q_len - 1)
        bottom = gl.minimum(c0 + PART, q_len) - 1
        bottom = gl.maximum(bottom, top)
        top_lo = gl.load(p_lo + top)
        top_hi = gl.load(p_hi + top)
        bottom_lo = gl.load(p_lo + bottom)
        bottom_hi = gl.load(p_hi + bottom)
        o_pos = c0 + o_r // HEADS
        lo = gl.load(p_lo + o_pos, mask=o_pos < q_len, other=0)
        hi = gl.load(p_hi + o_pos, mask=o_pos < q_len, other=0)
        begin = gl.minimum((top_lo - first) // BLOCK_N, blocks - 1)
        end = gl.maximum((gl.maximum(bottom_hi - first, 0) + BLOCK_N - 1) // BLOCK_N, begin + 1)
        full_lo = gl.minimum((bottom_lo - first + BLOCK_N - 1) // BLOCK_N, end)
        full_lo = gl.maximum(full_lo, begin + 1)
        full_hi = gl.minimum(gl.maximum(top_hi - first, 0) // BLOCK_N, end)
        full_hi = gl.maximum(full_hi, full_lo)
        if CONSUMERS > 1:
            for i in range(0, begin):
                _skip(k_full, k_empty, v_full, v_empty, turn, base + i, g, PING_PONG, STAGES)
        b = (j % Q_STAGES) * CONSUMERS + g
        mbarrier.wait(q_full.index(b), (j // Q_STAGES) & 1)
        q = q_s.index(b).reshape([64, D])

        c = base + begin
        stage = c % STAGES
        mbarrier.wait(k_full.index(stage), (c // STAGES) & 1)
        _take_turn(turn, c, g, PING_PONG)
        k = k_s.index(stage).reshape([BLOCK_N, D])
        s_t = warpgroup_mma(q, k.permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, ls), use_acc=False, is_async=True)
        _pass_turn(turn, g, PING_PONG)
        if Q_STAGES > 1:  # the output of the tile before has left its buffer by now: give that back to the producer
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(((j + Q_STAGES - 1) % Q_STAGES) * CONSUMERS + g), count=1, pred=j > 0)
        b_s = warpgroup_mma_wait(0, deps=[s_t])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if MOD is not None:
            row_head = gl.expand_dims(unit * HEADS + o_r % HEADS, 1)
            row_query = gl.expand_dims(gl.minimum(o_pos, q_len - 1), 1)
            place = (i_b, row_head, row_query, MOD_ROWS(i_b, row_head, row_query, cap_in, mod_args))
        else:
            place = (i_b, 0, 0, (0,))
        b_s = _scores(
            b_s, lo, hi, first + begin * BLOCK_N, last, cap_in, cap_out, place, mod_args, 2, SOFTCAP, MOD, BLOCK_N, ls
        )  # fmt: skip
        # finite, so that a row without a visible key in its first blocks stays clear of inf - inf
        b_m = gl.maximum(gl.full([64], -1e30, gl.float32, rows), gl.max(b_s, 1) * sm)
        b_e = gl.exp2(b_s * sm - gl.expand_dims(b_m, 1))
        b_l = gl.sum(b_e, 1)
        b_p = gl.convert_layout(_half(b_e, k_s.dtype), lp)
        b_acc = gl.zeros([64, D], gl.float32, lo_)
        for i in range(begin + 1, full_lo):
            b_p, b_acc, b_m, b_l = _step(
                q, k_s, v_s, k_full, k_empty, v_full, v_empty, turn, base + i, first + i * BLOCK_N, last, b_p, b_acc,
                b_m, b_l, lo, hi, sm, cap_in, cap_out, place, mod_args, g, 2, SOFTCAP, MOD, PING_PONG, BLOCK_N,
                STAGES, ls, lo_, lp,
            )  # fmt: skip
        for i in range(full_lo, full_hi):
            b_p, b_acc, b_m, b_l = _step(
                q, k_s, v_s, k_full, k_empty, v_full, v_empty, turn, base + i, first + i * BLOCK_N, last, b_p, b_acc,
                b_m, b_l, lo, hi, sm, cap_in, cap_out, place, mod_args, g, 0, SOFTCAP, MOD, PING_PONG, BLOCK_N,
                STAGES, ls, lo_, lp,
            )  # fmt: skip
        for i in range(full_hi, end):
            b_p, b_acc, b_m, b_l = _step(
                q, k_s, v_s, k_full, k_empty, v_full, v_empty, turn, base + i, first + i * BLOCK_N, last, b_p, b_acc,
                b_m, b_l, lo, hi, sm, cap_in, cap_out, place, mod_args, g, 1, SOFTCAP, MOD, PING_PONG, BLOCK_N,
                STAGES, ls, lo_, lp,
            )  # fmt: skip
        c = base + end - 1
        stage = c % STAGES
        mbarrier.wait(v_full.index(stage), (c // STAGES) & 1)
        acc_t = warpgroup_mma(b_p, v_s.index(stage).reshape([BLOCK_N, D]), b_acc, is_async=True)
        seen = b_l > 0
        head = unit * HEADS + o_r % HEADS
        fade = gl.full([64], 1.0, gl.float32, rows)
        if HAS_SINKS:
            sink = gl.load(SINKS + head).to(gl.float32) * LOG2_E
            m_new = gl.maximum(b_m, sink)
            fade = gl.exp2(b_m - m_new)
            b_l = b_l * fade + gl.exp2(sink - m_new)
            b_m = m_new
        b_l = gl.where(seen, b_l, 1.0)
        fade = gl.where(seen, fade / b_l, 0.0)
        p_lse = LSE + (i_b * (units * HEADS) + head).to(gl.int64) * q_len + o_pos
        gl.store(p_lse, gl.where(seen, (b_m + gl.log2(b_l)) * LN_2, -float("inf")), mask=o_pos < q_len)
        b_acc = warpgroup_mma_wait(0, deps=[acc_t])
        mbarrier.arrive(v_empty.index(stage), count=1)
        b_o = b_acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, lo_)), 1)
        q.store(_half(b_o, k_s.dtype))  # the output leaves through the buffer of the queries, free by now
        fence_async_shared()
        tma_store(o_desc, [i_b, c0, unit * HEADS, 0], q_s.index(b))
        if CONSUMERS > 1:
            for i in range(end, blocks):
                _skip(k_full, k_empty, v_full, v_empty, turn, base + i, g, PING_PONG, STAGES)
        base += blocks
        if Q_STAGES == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(b), count=1)
        item = told_next(item_s, item_full, j, COUNTED)
        j += 1
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["stride_ib", "q_len", "tiles", "units", "section", "total", "mod_args"],
    do_not_specialize_on_alignment=["LSE", "SINKS", "KV_LO", "KV_HI", "PLAN", "mod_args"],
)
def _hopper_fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, LSE, SINKS, KV_LO, KV_HI, PLAN,
    stride_ib, q_len, tiles, units, section, total, sm, cap_in, cap_out, mod_args,
    HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, PING_PONG: gl.constexpr, SOFTCAP: gl.constexpr, MOD: gl.constexpr,
    MOD_ROWS: gl.constexpr, HAS_SINKS: gl.constexpr, COUNTED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """As many programs as work items, or persistent ones, which get the next as `deal` says.

    Descriptors: q, out [B, S, Hq, D] in boxes [1, 64 // HEADS, HEADS, D]; k, v [B, KV_LEN, Hkv, D] in boxes
    [1, BLOCK_N, 1, D]. LSE fp32 [B, Hq, S]; KV_LO, KV_HI int32 [B, S]; PLAN as `order.WorkOrder`.
    """
    PART: gl.constexpr = 64 // HEADS
    q_s = gl.allocate_shared_memory(q_desc.dtype, [Q_STAGES * CONSUMERS, 1, PART, HEADS, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 1, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_s = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(2):
        mbarrier.init(turn.index(g), count=1)
        mbarrier.init(item_full.index(g), count=1)
    for x in gl.static_range(Q_STAGES * CONSUMERS):
        mbarrier.init(q_full.index(x), count=1)
        mbarrier.init(q_empty.index(x), count=1)
    for x in gl.static_range(STAGES):
        mbarrier.init(k_full.index(x), count=1)
        mbarrier.init(v_full.index(x), count=1)
        mbarrier.init(k_empty.index(x), count=CONSUMERS)
        mbarrier.init(v_empty.index(x), count=CONSUMERS)
    fence_async_shared()
    # The argument tuples are written in place: bound to a name, their constexprs become tensors.
    if CONSUMERS == 3:
        gl.warp_specialize([
            (_consumer, (
                0, o_desc, LSE, SINKS, KV_LO, KV_HI, PLAN, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, turn, item_s, item_full, stride_ib, q_len, tiles, units, section, total, sm, cap_in, cap_out,
                mod_args, HEADS, BLOCK_N, D, CONSUMERS, STAGES, Q_STAGES, PING_PONG, SOFTCAP, MOD, MOD_ROWS, HAS_SINKS,
                COUNTED,
            )),
            (_consumer, (
                1, o_desc, LSE, SINKS, KV_LO, KV_HI, PLAN, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, turn, item_s, item_full, stride_ib, q_len, tiles, units, section, total, sm, cap_in, cap_out,
                mod_args, HEADS, BLOCK_N, D, CONSUMERS, STAGES, Q_STAGES, PING_PONG, SOFTCAP, MOD, MOD_ROWS, HAS_SINKS,
                COUNTED,
            )),
            (_consumer, (
                2, o_desc, LSE, SINKS, KV_LO, KV_HI, PLAN, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, turn, item_s, item_full, stride_ib, q_len, tiles, units, section, total, sm, cap_in, cap_out,
                mod_args, HEADS, BLOCK_N, D, CONSUMERS, STAGES, Q_STAGES, PING_PONG, SOFTCAP, MOD, MOD_ROWS, HAS_SINKS,
                COUNTED,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, PLAN, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                item_s, item_full, tiles, units, section, total, HEADS, GROUP, BLOCK_N, CONSUMERS, STAGES, Q_STAGES,
                COUNTED,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize([
            (_consumer, (
                0, o_desc, LSE, SINKS, KV_LO, KV_HI, PLAN, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, turn, item_s, item_full, stride_ib, q_len, tiles, units, section, total, sm, cap_in, cap_out,
                mod_args, HEADS, BLOCK_N, D, CONSUMERS, STAGES, Q_STAGES, PING_PONG, SOFTCAP, MOD, MOD_ROWS, HAS_SINKS,
                COUNTED,
            )),
            (_consumer, (
                1, o_desc, LSE, SINKS, KV_LO, KV_HI, PLAN, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, turn, item_s, item_full, stride_ib, q_len, tiles, units, section, total, sm, cap_in, cap_out,
                mod_args, HEADS, BLOCK_N, D, CONSUMERS, STAGES, Q_STAGES, PING_PONG, SOFTCAP, MOD, MOD_ROWS, HAS_SINKS,
                COUNTED,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, PLAN, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                item_s, item_full, tiles, units, section, total, HEADS, GROUP, BLOCK_N, CONSUMERS, STAGES, Q_STAGES,
                COUNTED,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (
                0, o_desc, LSE, SINKS, KV_LO, KV_HI, PLAN, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, turn, item_s, item_full, stride_ib, q_len, tiles, units, section, total, sm, cap_in, cap_out,
                mod_args, HEADS, BLOCK_N, D, CONSUMERS, STAGES, Q_STAGES, PING_PONG, SOFTCAP, MOD, MOD_ROWS, HAS_SINKS,
                COUNTED,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, PLAN, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                item_s, item_full, tiles, units, section, total, HEADS, GROUP, BLOCK_N, CONSUMERS, STAGES, Q_STAGES,
                COUNTED,
            )),
        ], [1], [24])  # fmt: skip
