"""The text of the kernels that hold a tile of queries and walk blocks of keys: forward and dQ."""

from __future__ import annotations

from packflex.attention.mods.kernel_text import (
    CONSTANTS,
    LIST_CONSTANTS,
    LISTS,
    KernelText,
    Request,
    definition,
    factors,
    indent,
    walk_numbers,
    walk_parameters,
)
from packflex.mods.nodes import Node

_ROWS = """
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)  # under causal masks the last tiles are the longest
    i_head = tl.program_id(1)  # in units of HEADS query heads
    i_b = tl.program_id(2).to(tl.int64)
    i_kv = (i_head * HEADS // GROUP).to(tl.int64)
    o_pos, o_head, m_row = tile_rows(i_tile, i_head, HEADS, BLOCK_M, q_len)
    first_pos = i_tile * (BLOCK_M // HEADS)
    num_heads = tl.num_programs(1) * HEADS
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_n = tl.arange(0, BLOCK_N)
    o_pos64 = o_pos.to(tl.int64)[:, None]
    o_head64 = o_head.to(tl.int64)[:, None]
    m_qd = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
    b_q = tl.load(Q + i_b * stride_qb + o_head64 * stride_qh + o_pos64 * stride_qs + o_d[None, :], mask=m_qd, other=0.0)
    p_k = K + i_b * stride_kb + i_kv * stride_kh
    p_v = V + i_b * stride_vb + i_kv * stride_vh
    b = tl.program_id(2)
    if HEADS > 1:
        h = o_head[:, None]
    else:
        h = i_head
    q = tl.minimum(o_pos, q_len - 1)[:, None]
"""

_ROW_INTERVALS = """
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
"""


def _row_loop(kernel: KernelText, masked: bool, body: list[str]) -> str:
    if kernel.request.lists:
        count, pointer = ("partial_blocks", "p_partial") if masked else ("full_blocks", "p_full")
        some = "skipped, partial_blocks - left_out" if masked and kernel.skips else count
        begin = [
            f"for step in range({some}):",
            f"    block_key = read_index({pointer} + step // PARTS) * MASK_N + step % PARTS * BLOCK_N",
        ]
    elif masked:
        begin = [
            "for step in range(blocks - (full_end - full_begin)):",
            "    i = step + tl.where(step < full_begin, 0, full_end - full_begin)",
            "    block_key = first_key + i * BLOCK_N",
        ]
    else:
        begin = [
            "for step in range(full_end - full_begin):",
            "    block_key = first_key + (step + full_begin) * BLOCK_N",
        ]
    return indent(begin, 4) + "\n" + indent(body, 8)


def _keys(kernel: KernelText, masked: bool) -> tuple[str, bool]:
    """Rows of K and V that a block loads, and whether those past the end are masked.

    Where the mask hides what lies past the last key, that key is loaded in its place: cheaper than masks of loads.
    """
    if masked and kernel.bounds is not None:
        return "o_r", False
    return "o_n", masked or kernel.request.ragged


def _row_scores(kernel: KernelText, masked: bool, roots: list[Node], raw: bool = False) -> list[str]:
    """From b_q and b_k to b_s, the modified score, or the product alone if `raw`; m_s where masked."""
    request = kernel.request
    rows, tail = _keys(kernel, masked)
    end = "kv_len" if request.lists else "end_key"
    lines = [
        "o_k = block_key + o_n",
        f"m_k = o_k < {end}",
        *(["o_r = tl.minimum(o_n, kv_len - 1 - block_key)"] if rows == "o_r" else []),
        "p_kn = p_k + block_key.to(tl.int64) * stride_ks",
        "p_vn = p_v + block_key.to(tl.int64) * stride_vs",
        f"b_k = load_tile(p_kn + {rows}[:, None] * stride_ks + o_d[None, :], m_k, o_d < HEAD_DIM, {tail}, "
        "HEAD_DIM != BLOCK_D)",
        f"score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION){'' if raw else f' * {kernel.scale()}'}",
        "kv = tl.minimum(o_k, kv_len - 1)[None, :]"
        if (masked or request.ragged) and kernel.reads_at("kv")
        else "kv = o_k[None, :]",
    ]
    if masked and kernel.mask is not None:
        lines += kernel.mask_statements()
        if not kernel.hides_alone:
            # without a mod rows past the last hold zeros, and what comes of them is not stored
            within = [
                *(["m_row[:, None]"] if kernel.score is not None else []),
                *([] if kernel.bounds is not None else ["m_k[None, :]"]),
            ]
            lines.append(f"m_s = {' & '.join([*within, f'({kernel.mask.text(kernel.mask.program.out)})'])}")
    elif masked:
        lines.append("m_s = (o_k[None, :] >= b_lo[:, None]) & (o_k[None, :] < b_hi[:, None])")
    lines += kernel.modified(roots, masked)
    return lines


def forward_text(request: Request) -> str:
    """`mod_forward`: out and lse of one tile of (position, query head) rows."""
    kernel = KernelText(request, "kv")
    lists = request.lists
    roots = [] if kernel.program is None else [kernel.program.out]
    fixed = (
        f"Q, K, V, SINKS, {walk_parameters(lists, 'KV')} OUT, LSE,\n"
        "    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,\n"
        f"    stride_ob, stride_oh, stride_os, {walk_numbers(lists)} q_len, kv_len, scale, softcap,"
    )
    constants = CONSTANTS + " HAS_SINKS: tl.constexpr," + (LIST_CONSTANTS if lists else "")
    text = definition("mod_forward", fixed, kernel, [], constants) + _ROWS
    text += _row_walk(lists)
    text += indent(kernel.hoisted(roots, "b h q offset end") + _unseen_rows(kernel), 4)
    text += """
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
"""
    # the products themselves are compared, and scaled where they are exponents: one operation less an element
    raw = request.score is None and not request.softcap and request.rising
    restore = kernel.snapshot()
    for masked in (True, False):
        restore()
        tail = masked or request.ragged
        body = _row_scores(kernel, masked, roots, raw)
        body += ["if SOFTCAP:", "    b_s = capped(b_s, softcap)"]
        if masked:
            body += kernel.hidden("b_s", 'float("-inf")')
        elif request.ragged:
            body.append('b_s = tl.where(m_k[None, :], b_s, float("-inf"))')
        body.append(f"b_m_new = tl.maximum(b_m, tl.max(b_s, 1){f' * {kernel.scale()}' if raw else ''})")
        body.append(f"b_shift = b_m_new{'' if kernel.log2 else ' * LOG2_E'}")
        # a score of -inf everywhere, or of one that is -inf to base 2: shift by 0 instead of NaN
        if masked or tail or request.score is not None:
            body.append('b_shift = tl.where(b_shift == float("-inf"), 0.0, b_shift)')
        rows, bounded = _keys(kernel, masked)
        body += [
            f"b_p = {kernel.power(f'b_s * {kernel.scale()}' if raw else 'b_s', 'b_shift[:, None]')}",
            f"b_alpha = {kernel.power('b_m', 'b_shift')}",
            "b_l = b_l * b_alpha + tl.sum(b_p, 1)",
            "b_acc = b_acc * b_alpha[:, None]",
            f"b_v = load_tile(p_vn + {rows}[:, None] * stride_vs + o_dv[None, :], m_k, o_dv < V_DIM, {bounded}, "
            "V_DIM != BLOCK_DV)",
        ]
        body += ["b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)", "b_m = b_m_new"]
        text += _row_loop(kernel, masked, body) + "\n"
    if kernel.log2:
        text += "    b_m = b_m * LN_2\n"
    statistic = "tl.where(m_seen, b_top, float('-inf'))" if request.maxima else "b_lse"
    return (
        text
        + """
    m_seen = b_l > 0
    b_top = b_m
    if HAS_SINKS:
        b_sink = tl.load(SINKS + o_head).to(tl.float32)
        b_top = tl.maximum(b_m, b_sink)
        b_fade = tl.where(m_seen, tl.exp2((b_m - b_top) * LOG2_E), 0.0)
        b_l = tl.where(m_seen, b_l * b_fade + tl.exp2((b_sink - b_top) * LOG2_E), 0.0)
        b_acc = b_acc * b_fade[:, None]
        b_m = b_top
    b_total = tl.where(m_seen, b_l, 1.0)
    b_lse = tl.where(m_seen, b_m + tl.log2(b_total) * LN_2, float("-inf"))
    b_out = b_acc / b_total[:, None]
    p_out = OUT + i_b * stride_ob + o_head64 * stride_oh + o_pos64 * stride_os
    tl.store(p_out + o_dv[None, :], b_out.to(OUT.dtype.element_ty), mask=m_row[:, None] & (o_dv < V_DIM)[None, :])
"""
        + f"    tl.store(LSE + (i_b * num_heads + o_head) * q_len + o_pos, {statistic}, mask=m_row)\n"
    )


def _unseen_rows(kernel: KernelText) -> list[str]:
    return kernel.unseen_parts("BLOCK_M, 1", "MASK_N", "BLOCK_N", "PARTS", "partial_blocks // PARTS")


def _row_walk(lists: bool) -> str:
    if not lists:
        return _ROW_INTERVALS
    parts = "    PARTS: tl.constexpr = MASK_N // BLOCK_N  # blocks of the kernel in one of the mask\n"
    return parts.rstrip("\n") + LISTS.format(head="(i_head * HEADS)", tile="first_pos // MASK_M")


def dq_text(request: Request) -> str:
    """`mod_dq`: dQ of one tile, and what its rows and elements send to captured tensors."""
    kernel = KernelText(request, "kv", "b_lse[:, None]")
    lists = request.lists
    score = kernel.program
    row_sums, tile_sums = kernel.gradients("rows"), kernel.gradients("tile")
    slots = sorted({gradient.slot for _, gradient in (*row_sums, *tile_sums)})
    roots: list[Node] = []
    if score is not None:
        assert score.grad_score is not None
        sums = [node for _, g in (*row_sums, *tile_sums) for node in (*g.indices, g.value)]
        roots = [score.out, score.grad_score, *sums]
    fixed = (
        f"Q, K, V, GRAD_OUT, LSE2, DELTA, {walk_parameters(lists, 'KV')} GRAD_Q,\n"
        "    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,\n"
        "    stride_gb, stride_gh, stride_gs, stride_dqb, stride_dqh, stride_dqs,\n"
        f"    {walk_numbers(lists)} q_len, kv_len, scale, softcap,"
    )
    constants = CONSTANTS + " GRAD_MODE: tl.constexpr," + (LIST_CONSTANTS if lists else "")
    text = definition("mod_dq", fixed, kernel, slots, constants) + _ROWS
    text += _row_walk(lists)
    text += """
    p_do = GRAD_OUT + i_b * stride_gb + o_head64 * stride_gh + o_pos64 * stride_gs + o_dv[None, :]
    b_do = tl.load(p_do, mask=m_row[:, None] & (o_dv < V_DIM)[None, :], other=0.0)
    o_stat = (i_b * num_heads + o_head) * q_len + o_pos
    b_lse = tl.load(LSE2 + o_stat, mask=m_row, other=float("inf"))  # in units of log(2); rows that see nothing: inf
    b_delta = tl.load(DELTA + o_stat, mask=m_row, other=0.0)
"""
    text += indent(factors(slots) + kernel.hoisted(roots, "b h q offset end") + _unseen_rows(kernel), 4)
    text += "\n    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)\n"
    text += "".join(f"    b_sum{n} = tl.zeros([BLOCK_M], tl.float32)\n" for n, _ in row_sums)
    restore = kernel.snapshot()
    for masked in (True, False):
        restore()
        rows, tail = _keys(kernel, masked)
        body = _row_scores(kernel, masked, roots)
        body += kernel.weights()
        if masked:
            body += kernel.hidden("b_p", "0.0")
        elif request.ragged:
            body += ["m_s = m_row[:, None] & m_k[None, :]", "b_p = tl.where(m_s, b_p, 0.0)"]
        body.append(
            f"b_v = load_tile(p_vn + {rows}[:, None] * stride_vs + o_dv[None, :], m_k, o_dv < V_DIM, {tail}, "
            "V_DIM != BLOCK_DV)"
        )
        body.append("b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]")
        body.append("b_ds = b_p * (b_dp - b_delta[:, None])")
        body += kernel.derivative(roots, masked, masked or request.ragged)
        seen = "m_s" if masked or request.ragged else "(m_row[:, None] & (o_k >= 0)[None, :])"
        for n, gradient in row_sums:
            body.append(f"b_sum{n} += tl.sum({kernel.seen(gradient.value, seen)}, 1)")
        for _, gradient in tile_sums:
            assert kernel.score is not None
            offset = kernel.score.offset(gradient.slot, gradient.indices)
            value = kernel.seen(gradient.value, seen)
            body.append(
                f"scatter_tile(x_sum{gradient.slot}, {offset}, {value}, {seen}, b_factor{gradient.slot}, GRAD_MODE, 32)"
            )
        body.append("b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)")
        text += _row_loop(kernel, masked, body) + "\n"
    restore()
    text += """
    p_dq = GRAD_Q + i_b * stride_dqb + o_head64 * stride_dqh + o_pos64 * stride_dqs + o_d[None, :]
    b_dq = tl.where((b_lse < float("inf"))[:, None], b_dq * scale, 0.0)  # exact 0 in the padding
    tl.store(p_dq, b_dq.to(GRAD_Q.dtype.element_ty), mask=m_qd)
"""
    for n, gradient in row_sums:
        assert kernel.score is not None
        offset = kernel.score.offset(gradient.slot, gradient.indices)
        target, factor = f"x_sum{gradient.slot}, {offset}", f"b_factor{gradient.slot}, GRAD_MODE"
        if "q" in gradient.deps:
            text += f"    scatter({target}, b_sum{n}[:, None], m_row[:, None], {factor})\n"
        elif request.packed and "h" in gradient.deps:  # summed by head, and added for the rows of the first position
            text += (
                f"    b_heads = tl.sum(tl.reshape(b_sum{n}, [BLOCK_M // HEADS, HEADS]), 0)\n"
                "    b_heads = tl.reshape(tl.broadcast_to(b_heads[None, :], [BLOCK_M // HEADS, HEADS]), [BLOCK_M])\n"
                f"    scatter({target}, b_heads[:, None], (tl.arange(0, BLOCK_M) < HEADS)[:, None], {factor})\n"
            )
        else:
            text += f"    scatter({target}, tl.sum(b_sum{n}), tl.full([], 1, tl.int1), {factor})\n"
    return text
