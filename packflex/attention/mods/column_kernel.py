"""The text of the kernel that holds a tile of keys and walks blocks of queries: dK and dV."""

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
    within,
    written,
)
from packflex.mods.nodes import CapturedGradient, Node

_COLUMNS = """
    i_tile = tl.program_id(0)  # under causal masks the first tiles are the longest
    i_kv = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(1) * GROUP
    o_k = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = o_k < kv_len
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_m = tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, EDGE_M)
    first_key = i_tile * BLOCK_N
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
    b = tl.program_id(2)
    kv = tl.minimum(o_k, kv_len - 1)[:, None]
"""

_COLUMN_INTERVALS = """
    POSITIONS: tl.constexpr = BLOCK_M // HEADS
    EDGES: tl.constexpr = BLOCK_M // EDGE_M
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
"""


def _column_loop(kernel: KernelText, masked: bool, body: list[str]) -> str:
    if kernel.request.lists:
        count, pointer = ("partial_blocks", "p_partial") if masked else ("full_blocks", "p_full")
        size, parts = ("EDGE_M", "EDGE_PARTS") if masked else ("BLOCK_M", "PARTS")
        some = f"{count} * {parts}"
        if masked and kernel.skips:
            some = f"skipped, {some} - left_out"
        begin = [
            f"for step in range({some}):",
            f"    block_query = read_index({pointer} + step // {parts}) * MASK_M + step % {parts} * ({size} // HEADS)",
        ]
    elif masked:
        begin = [
            "for step in range(edge_blocks - (full_end - full_begin) * EDGES):",
            "    i = step + tl.where(step < full_begin * EDGES, 0, (full_end - full_begin) * EDGES)",
            "    block_query = first_query + i * (EDGE_M // HEADS)",
        ]
    else:
        begin = [
            "for step in range(full_end - full_begin):",
            "    block_query = first_query + (step + full_begin) * POSITIONS",
        ]
    return indent(begin, 8) + "\n" + indent(body, 12)


def dkdv_text(request: Request) -> str:
    """`mod_dkdv`: dK and dV of a tile of keys, and what each key sends to captured tensors."""
    kernel = KernelText(request, "q", "b_lse[None, :]")
    lists = request.lists
    score = kernel.program
    sums = kernel.gradients("columns")
    slots = sorted({gradient.slot for _, gradient in sums})
    roots: list[Node] = []
    if score is not None:
        assert score.grad_score is not None
        roots = [score.out, score.grad_score, *(node for _, g in sums for node in (*g.indices, g.value))]
    fixed = (
        f"Q, K, V, GRAD_OUT, LSE2, DELTA, {walk_parameters(lists, 'Q')} GRAD_K, GRAD_V,\n"
        "    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,\n"
        "    stride_gb, stride_gh, stride_gs, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,\n"
        f"    {walk_numbers(lists)} q_len, kv_len, scale, softcap,"
    )
    constants = CONSTANTS + " EDGE_M: tl.constexpr, GRAD_MODE: tl.constexpr," + (LIST_CONSTANTS if lists else "")
    text = definition("mod_dkdv", fixed, kernel, slots, constants) + _COLUMNS
    if lists:
        text += "    PARTS: tl.constexpr = MASK_M // (BLOCK_M // HEADS)\n"
        text += "    EDGE_PARTS: tl.constexpr = MASK_M // (EDGE_M // HEADS)\n"
    else:
        text += _COLUMN_INTERVALS
    text += indent(factors(slots), 4)
    text += """
    for i_group in range(GROUP // HEADS):
        i_head = (tl.program_id(1) * GROUP + i_group * HEADS).to(tl.int32)
"""
    if lists:
        walk = (
            LISTS.format(head="i_head", tile="first_key // MASK_N")
            .replace(" * PARTS", "")
            .replace("\n    ", "\n        ")
        )
        text += walk.lstrip("\n")
    text += indent([f"b_sum{n} = tl.zeros([BLOCK_N], tl.float32)" for n, _ in sums], 8) + "\n"
    early = "b kv offset end" if request.packed else "b h kv offset end"
    if kernel.bounds is not None and not all(map(within(early), kernel.bounds)):
        kernel.skips = False  # a bound of each head, where a tile holds several
    text += (
        indent([] if request.packed else ["h = i_head"], 8)
        + "\n"
        + indent(
            kernel.hoisted(roots, early)
            + kernel.unseen_parts("BLOCK_N, 1", "MASK_M", "EDGE_M // HEADS", "EDGE_PARTS", "partial_blocks"),
            8,
        )
        + "\n"
    )
    restore = kernel.snapshot()
    for masked in (True, False):
        restore()
        text += _column_loop(kernel, masked, _column_body(kernel, masked, roots, sums)) + "\n"
    restore()
    for n, gradient in sums:
        assert kernel.score is not None
        indices = written(kernel.score.statements(gradient.indices))
        offset = kernel.score.offset(gradient.slot, gradient.indices)
        text += indent(indices, 8) + "\n"
        text += (
            f"        scatter(x_sum{gradient.slot}, {offset}, b_sum{n}[:, None], m_k[:, None], "
            f"b_factor{gradient.slot}, GRAD_MODE)\n"
        )
    return (
        text
        + """
    p_dk = GRAD_K + i_b * stride_dkb + i_kv * stride_dkh + o_k64 * stride_dks + o_d[None, :]
    p_dv = GRAD_V + i_b * stride_dvb + i_kv * stride_dvh + o_k64 * stride_dvs + o_dv[None, :]
"""
        + ("" if lists else "    m_seen = (b_lo < b_hi)[:, None]  # exact 0 for keys that nothing sees\n"
           "    b_dk = tl.where(m_seen, b_dk, 0.0)\n    b_dv = tl.where(m_seen, b_dv, 0.0)\n")
        + """    tl.store(p_dk, (b_dk * scale).to(GRAD_K.dtype.element_ty), mask=m_kd)
    tl.store(p_dv, b_dv.to(GRAD_V.dtype.element_ty), mask=m_kdv)
"""
    )  # fmt: skip


def _column_body(
    kernel: KernelText, masked: bool, roots: list[Node], sums: list[tuple[int, CapturedGradient]]
) -> list[str]:
    request = kernel.request
    lists = request.lists
    rows = "o_e" if masked else "o_m"
    bounded = masked or request.ragged
    end = "q_len" if lists else "end_query"
    stat = ", mask=m_q, other=float('inf')" if bounded else ""
    delta = ", mask=m_q, other=0.0" if bounded else ""
    # within the KV group; with one head a tile its offset is one number, which leaves registers free
    head, position = (f"i_group * HEADS + {rows} % HEADS", f"{rows} // HEADS") if request.packed else ("i_group", rows)
    body = [
        f"o_head = {head}",
        f"o_q = block_query + {position}",
        f"m_q = o_q < {end}",
    ]
    if masked and kernel.bounds is not None:
        # the mask hides what lies past the last query: that query is loaded in its place, cheaper than masks of loads
        body += [f"o_r = tl.minimum({position}, q_len - 1 - block_query)", "o_s = block_query + o_r"]
        position, place, stat, delta, tail = "o_r", "o_s", "", "", False
    else:
        place, tail = "o_q", bounded
    body += [
        f"b_lse = tl.load(p_lse + o_head * q_len + {place}{stat})",
        f"b_q = load_tile(p_q + block_query.to(tl.int64) * stride_qs + (o_head * stride_qh + ({position}) * "
        f"stride_qs)[:, None] + o_d[None, :], m_q, o_d < HEAD_DIM, {tail}, HEAD_DIM != BLOCK_D)",
        f"score = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * {kernel.scale()}  # [BLOCK_N, rows]",
        "q = tl.minimum(o_q, q_len - 1)[None, :]" if bounded and kernel.reads_at("q") else "q = o_q[None, :]",
        "h = (i_head + o_head - i_group * HEADS)[None, :]" if request.packed else "",
    ]
    body = [line for line in body if line]
    if masked and kernel.mask is not None:
        body += kernel.mask_statements()
        if not kernel.hides_alone:
            within = (
                []
                if kernel.score is None
                else ["m_k[:, None]", *([] if kernel.bounds is not None else ["m_q[None, :]"])]
            )
            body.append(f"m_s = {' & '.join([*within, f'({kernel.mask.text(kernel.mask.program.out)})'])}")
    elif masked:
        body.append("m_s = (o_q[None, :] >= b_lo[:, None]) & (o_q[None, :] < b_hi[:, None])")
    elif request.ragged:
        body.append("m_s = m_k[:, None] & m_q[None, :]")
    body += kernel.modified(roots, masked)
    body += kernel.weights()
    if masked:
        body += kernel.hidden("b_p", "0.0")
    elif request.ragged:
        body.append("b_p = tl.where(m_s, b_p, 0.0)")
    body += [
        f"b_do = load_tile(p_do + block_query.to(tl.int64) * stride_gs + (o_head * stride_gh + ({position}) * "
        f"stride_gs)[:, None] + o_dv[None, :], m_q, o_dv < V_DIM, {tail}, V_DIM != BLOCK_DV)",
        "b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)",
        f"b_delta = tl.load(p_delta + o_head * q_len + {place}{delta})",
        "b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BLOCK_N, rows]",
        "b_ds = b_p * (b_dp - b_delta[None, :])",
    ]
    body += kernel.derivative(roots, masked, bounded)
    seen = "m_s" if bounded else "(m_k[:, None] & (o_q >= 0)[None, :])"
    body += [f"b_sum{n} += tl.sum({kernel.seen(g.value, seen)}, 1)" for n, g in sums]
    body.append("b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)")
    return body
