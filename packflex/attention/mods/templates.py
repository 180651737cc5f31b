"""The text of the attention kernels with a program printed into them: forward, dK/dV, dQ.

The portable kernels of `packflex.attention.triton` in natural units, with two ways to walk the blocks. "intervals" is
theirs: each row sees one interval of keys. "lists" walks torch's index lists, partly visible blocks first, and
evaluates the printed mask in them. What a program computes of rows alone stands before the loops.

Names as in `packflex.attention.triton.forward`; the programs' names begin with `m` (mask) and `x` (score).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from packflex.mods.nodes import CapturedGradient, Node, Program, ordered
from packflex.mods.printer import Printer, Statement, device_imports
from packflex.mods.rewrite import for_tiles, in_log2

HEADER = '''"""Printed by packflex: {what}."""

import triton
import triton.language as tl

from packflex.attention.triton.forward import LN_2, LOG2_E, capped, load_tile, tile_rows
{imports}
'''
_CONSTANTS = (
    "GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr,\n"
    "    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, "
    "PRECISION: tl.constexpr,"
)
# Integers that a new batch may change: Triton must not build a kernel for each of their divisibilities
_LOOSE = ("q_len", "kv_len", "scale", "softcap", "list_b", "list_h", "list_c", "stride_ib")
# Halves and quarters of one tensor, whose offset in it follows the lengths
_UNALIGNED = ("KV_LO", "KV_HI", "Q_LO", "Q_HI", "NUM_BLOCKS", "INDICES", "FULL_NUM_BLOCKS", "FULL_INDICES")


@dataclass(frozen=True)
class Request:
    """What a kernel's text depends on beside the programs.

    Attributes:
        score: the score_mod's program, or None.
        mask: the mask_mod's program in list form; None for intervals.
        ragged: in list form, whether wholly visible blocks may reach past the last key (another library's lists).
        packed: whether a tile holds several query heads.
        gradients: whether captured tensors get theirs.
        softcap: whether the modified score is capped.
    """

    score: Program | None
    mask: Program | None
    ragged: bool = False
    packed: bool = False
    gradients: bool = False
    softcap: bool = False

    @property
    def lists(self) -> bool:
        """Whether blocks are walked by lists."""
        return self.mask is not None


def with_header(what: str, body: str) -> str:
    """A printed file: its imports before its kernel."""
    return HEADER.format(what=what, imports=device_imports(body)) + "\n" + body


class _Kernel:
    """One kernel in the making: its printers and its lines."""

    def __init__(self, request: Request, walked: str, lse: str = "") -> None:
        self.request = request
        score = request.score
        scaled = None if score is None or request.softcap else in_log2(score, less=bool(lse))
        # whether scores are in units of log(2), not in natural ones
        self.log2 = scaled is not None or (score is None and not request.softcap)
        self.program = score if scaled is None else scaled
        self.less = "" if scaled is not None else lse  # what is still to be taken from the score
        self.score = None if self.program is None else Printer(self.program, "x")
        if self.score is not None:
            self.score.inputs = {"lse": lse}
        self.mask = None
        self.bounds: tuple[Node, Node] | None = None  # of what each row (column) sees; see `TileMask`
        self.skips = False  # whether parts of blocks that lie outside them are skipped
        if request.mask is not None:
            tiled = for_tiles(request.mask, walked)
            self.mask = Printer(tiled.program, "m")
            if tiled.least is not None and tiled.end is not None:
                self.bounds, self.skips = (tiled.least, tiled.end), True
            rows = "o_e // HEADS" if request.packed else "o_e"
            if walked == "kv":
                names = {"block": "block_key", "offset": "o_n[None, :]", "place": "o_k[None, :]", "end": "kv_len"}
            else:
                names = {
                    "block": "block_query",
                    "offset": f"({rows})[None, :]",
                    "place": "o_q[None, :]",
                    "end": "q_len",
                }
            self.mask.inputs = names

    def parameters(self) -> list[str]:
        """Parameters of the programs."""
        return [name for printer in (self.mask, self.score) if printer is not None for name in printer.parameters()]

    def reads_at(self, index: str) -> bool:
        """Whether a captured tensor is read at an index, which must then lie within the sequence."""
        printers = [printer for printer in (self.mask, self.score) if printer is not None]
        nodes = (node for printer in printers for node in ordered(printer.program.roots()))
        return any(node.op == "read" and index in node.deps for node in nodes)

    def power(self, score: str, less: str) -> str:
        """exp(score) over 2 to the power of `less`, which is in units of log(2); nothing where it is empty."""
        if not less:
            return f"tl.exp2({score})"
        return f"tl.exp2({score} - {less})" if self.log2 else f"tl.exp2({score} * LOG2_E - {less})"

    def gradient_slots(self) -> list[int]:
        """Captured tensors that get a gradient from some read."""
        if self.request.score is None or not self.request.gradients:
            return []
        return sorted({gradient.slot for gradient in self.request.score.gradients})

    def gradients(self, where: str) -> list[tuple[int, CapturedGradient]]:
        """The numbered reads whose gradient is summed over "rows" (per query or less), "columns", or as "tile"."""
        if self.request.score is None or not self.request.gradients:
            return []
        chosen = []
        for number, gradient in enumerate(self.request.score.gradients):
            if gradient.place == where:
                chosen.append((number, gradient))
        return chosen


def shares_heads(name: str, score: Program) -> bool:
    """Whether a tile of "dkdv" or "dq" may hold several heads while it sums gradients of captured tensors.

    dK/dV sums over the rows of a tile, so that its reads must not depend on the head; dQ scatters elements of a tile.
    """
    for gradient in score.gradients:
        place = gradient.place
        if (name == "dkdv" and place == "columns" and "h" in gradient.deps) or (name == "dq" and place == "tile"):
            return False
    return True


def _indent(lines: list[str], by: int) -> str:
    return "\n".join(" " * by + line if line else "" for line in lines)


def _written(statements: list[Statement]) -> list[str]:
    return list(map(str, statements))


def _within(allowed: str) -> Callable[[Node], bool]:
    names = set(allowed.split())
    return lambda node: node.deps <= names


def _definition(name: str, fixed: str, kernel: _Kernel, slots: list[int], constants: str) -> str:
    extra = kernel.parameters()
    gradients = [f"x_sum{slot}, x_factor{slot}" for slot in slots]
    loose = [*_LOOSE, *(p for p in extra if "_stride" in p or "_size" in p or p[1] == "s")]
    names = [part.strip() for part in fixed.replace("\n", " ").split(",") if part.strip()]
    loose = [n for n in loose if n in names or n in extra]
    unaligned = [n for n in _UNALIGNED if n in names]
    parameters = ",\n    ".join(", ".join(group) for group in (extra, gradients) if group)
    return (
        f"@triton.jit(do_not_specialize={loose!r}, do_not_specialize_on_alignment={unaligned!r})\n"
        f"def {name}(\n    {fixed}\n    {parameters + ',' if parameters else ''}\n    {constants}\n):"
    )


def _walk_parameters(lists: bool, side: str) -> str:
    if lists:
        return "NUM_BLOCKS, INDICES, FULL_NUM_BLOCKS, FULL_INDICES,"
    return f"{side}_LO, {side}_HI,"


def _walk_numbers(lists: bool) -> str:
    return "list_b, list_h, list_c," if lists else "stride_ib, stride_is,"


_LIST_CONSTANTS = " MASK_M: tl.constexpr, MASK_N: tl.constexpr,"


# Rows of queries against blocks of keys: forward and dQ

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

_LISTS = """
    o_list = (i_b * list_b + {head} * list_h + {tile}).to(tl.int64)
    p_partial = INDICES + o_list * list_c
    p_full = FULL_INDICES + o_list * list_c
    partial_blocks = tl.load(NUM_BLOCKS + o_list) * PARTS
    full_blocks = tl.load(FULL_NUM_BLOCKS + o_list) * PARTS
"""


def _unseen_parts(kernel: _Kernel, rows: str, mask_size: str, size: str, parts: str, count: str) -> list[str]:
    """How many parts of the first and of the last partly visible block no row (column) of the tile can see."""
    if not kernel.skips or kernel.bounds is None or kernel.mask is None:
        return []
    least, end = map(kernel.mask.text, kernel.bounds)
    return [
        f"least_seen = tl.min(tl.zeros([{rows}], tl.int32) + ({least}))",
        f"end_seen = tl.max(tl.zeros([{rows}], tl.int32) + ({end}))",
        f"end_last = read_index(p_partial + tl.maximum({count} - 1, 0)) * {mask_size} + {mask_size}",
        f"skipped = tl.maximum(least_seen - read_index(p_partial) * {mask_size}, 0) // ({size})",
        f"skipped = tl.minimum(skipped, {parts} - 1)",
        f"left_out = tl.minimum(tl.maximum(end_last - end_seen, 0) // ({size}), {parts} - 1)",
    ]


def _row_loop(kernel: _Kernel, masked: bool, body: list[str]) -> str:
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
    return _indent(begin, 4) + "\n" + _indent(body, 8)


def _row_scores(kernel: _Kernel, masked: bool, roots: list[Node]) -> list[str]:
    """From b_q and b_k to b_s, the modified score; m_s where masked."""
    request = kernel.request
    tail = masked or request.ragged
    end = "kv_len" if request.lists else "end_key"
    lines = [
        "o_k = block_key + o_n",
        f"m_k = o_k < {end}",
        "p_kn = p_k + block_key.to(tl.int64) * stride_ks",
        "p_vn = p_v + block_key.to(tl.int64) * stride_vs",
        f"b_k = load_tile(p_kn + o_n[:, None] * stride_ks + o_d[None, :], m_k, o_d < HEAD_DIM, {tail}, "
        "HEAD_DIM != BLOCK_D)",
        f"score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * {_scale(kernel)}",
        "kv = tl.minimum(o_k, kv_len - 1)[None, :]" if tail and kernel.reads_at("kv") else "kv = o_k[None, :]",
    ]
    if masked and kernel.mask is not None:
        lines += _written(kernel.mask.statements([kernel.mask.program.out]))
        # without a mod rows past the last hold zeros, and what comes of them is not stored
        within = [
            *(["m_row[:, None]"] if kernel.score is not None else []),
            *([] if kernel.bounds is not None else ["m_k[None, :]"]),
        ]
        lines.append(f"m_s = {' & '.join([*within, f'({kernel.mask.text(kernel.mask.program.out)})'])}")
    elif masked:
        lines.append("m_s = (o_k[None, :] >= b_lo[:, None]) & (o_k[None, :] < b_hi[:, None])")
    lines += _modified(kernel, roots, masked)
    return lines


def _modified(kernel: _Kernel, roots: list[Node], masked: bool) -> list[str]:
    if kernel.score is None:
        return ["b_s = score"]
    printer = kernel.score
    forward = [root for root in roots if "grad" not in root.deps]
    lines = _written(printer.statements(forward, load_mask="m_s" if masked else ""))
    out = printer.program.out
    text = printer.text(out)
    lines.append(f"b_s = {text}" if "score" in out.deps else f"b_s = tl.zeros_like(score) + {text}")
    return lines


def _hoisted(kernel: _Kernel, roots: list[Node], allowed: str) -> list[str]:
    lines: list[Statement] = []
    if kernel.mask is not None:
        lines += kernel.mask.statements([kernel.mask.program.out], _within(allowed))
    if kernel.score is not None:
        lines += kernel.score.statements(roots, _within(allowed))
    return _written(lines)


def _snapshot(kernel: _Kernel) -> Callable[[], None]:
    """Forget, when called, what was printed since: the next loop prints its own."""
    kept = [(printer, dict(printer.names)) for printer in (kernel.mask, kernel.score) if printer is not None]

    def restore() -> None:
        for printer, names in kept:
            printer.names = dict(names)

    return restore


def forward_text(request: Request) -> str:
    """`mod_forward`: out and lse of one tile of (position, query head) rows."""
    kernel = _Kernel(request, "kv")
    lists = request.lists
    roots = [] if kernel.program is None else [kernel.program.out]
    fixed = (
        f"Q, K, V, SINKS, {_walk_parameters(lists, 'KV')} OUT, LSE,\n"
        "    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,\n"
        f"    stride_ob, stride_oh, stride_os, {_walk_numbers(lists)} q_len, kv_len, scale, softcap,"
    )
    constants = _CONSTANTS + " HAS_SINKS: tl.constexpr," + (_LIST_CONSTANTS if lists else "")
    text = _definition("mod_forward", fixed, kernel, [], constants) + _ROWS
    text += _row_walk(lists)
    text += _indent(_hoisted(kernel, roots, "b h q offset end") + _unseen_rows(kernel), 4)
    text += """
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
"""
    restore = _snapshot(kernel)
    for masked in (True, False):
        restore()
        tail = masked or request.ragged
        body = _row_scores(kernel, masked, roots)
        body += ["if SOFTCAP:", "    b_s = capped(b_s, softcap)"]
        if masked:
            body.append('b_s = tl.where(m_s, b_s, float("-inf"))')
        elif request.ragged:
            body.append('b_s = tl.where(m_k[None, :], b_s, float("-inf"))')
        body.append("b_m_new = tl.maximum(b_m, tl.max(b_s, 1))")
        if masked or tail or (request.score is not None):  # a score of -inf everywhere: shift by 0 instead of NaN
            body.append('b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)')
        else:
            body.append("b_shift = b_m_new")
        if not kernel.log2:
            body.append("b_shift = b_shift * LOG2_E")
        body += [
            f"b_p = {kernel.power('b_s', 'b_shift[:, None]')}",
            f"b_alpha = {kernel.power('b_m', 'b_shift')}",
            "b_l = b_l * b_alpha + tl.sum(b_p, 1)",
            "b_acc = b_acc * b_alpha[:, None]",
            f"b_v = load_tile(p_vn + o_n[:, None] * stride_vs + o_dv[None, :], m_k, o_dv < V_DIM, {tail}, "
            "V_DIM != BLOCK_DV)",
        ]
        body += ["b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)", "b_m = b_m_new"]
        text += _row_loop(kernel, masked, body) + "\n"
    if kernel.log2:
        text += "    b_m = b_m * LN_2\n"
    return (
        text
        + """
    m_seen = b_l > 0
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
    tl.store(LSE + (i_b * num_heads + o_head) * q_len + o_pos, b_lse, mask=m_row)
"""
    )


def _unseen_rows(kernel: _Kernel) -> list[str]:
    return _unseen_parts(kernel, "BLOCK_M, 1", "MASK_N", "BLOCK_N", "PARTS", "partial_blocks // PARTS")


def _row_walk(lists: bool) -> str:
    if not lists:
        return _ROW_INTERVALS
    parts = "    PARTS: tl.constexpr = MASK_N // BLOCK_N  # blocks of the kernel in one of the mask\n"
    return parts.rstrip("\n") + _LISTS.format(head="(i_head * HEADS)", tile="first_pos // MASK_M")


def dq_text(request: Request) -> str:
    """`mod_dq`: dQ of one tile, and what its rows and elements send to captured tensors."""
    kernel = _Kernel(request, "kv", "b_lse[:, None]")
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
        f"Q, K, V, GRAD_OUT, LSE2, DELTA, {_walk_parameters(lists, 'KV')} GRAD_Q,\n"
        "    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,\n"
        "    stride_gb, stride_gh, stride_gs, stride_dqb, stride_dqh, stride_dqs,\n"
        f"    {_walk_numbers(lists)} q_len, kv_len, scale, softcap,"
    )
    constants = _CONSTANTS + " GRAD_MODE: tl.constexpr," + (_LIST_CONSTANTS if lists else "")
    text = _definition("mod_dq", fixed, kernel, slots, constants) + _ROWS
    text += _row_walk(lists)
    text += """
    p_do = GRAD_OUT + i_b * stride_gb + o_head64 * stride_gh + o_pos64 * stride_gs + o_dv[None, :]
    b_do = tl.load(p_do, mask=m_row[:, None] & (o_dv < V_DIM)[None, :], other=0.0)
    o_stat = (i_b * num_heads + o_head) * q_len + o_pos
    b_lse = tl.load(LSE2 + o_stat, mask=m_row, other=float("inf"))  # in units of log(2); rows that see nothing: inf
    b_delta = tl.load(DELTA + o_stat, mask=m_row, other=0.0)
"""
    text += _indent(_factors(slots) + _hoisted(kernel, roots, "b h q offset end") + _unseen_rows(kernel), 4)
    text += "\n    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)\n"
    text += "".join(f"    b_sum{n} = tl.zeros([BLOCK_M], tl.float32)\n" for n, _ in row_sums)
    restore = _snapshot(kernel)
    for masked in (True, False):
        restore()
        tail = masked or request.ragged
        body = _row_scores(kernel, masked, roots)
        if request.ragged and not masked:
            body.append("m_s = m_row[:, None] & m_k[None, :]")
        body += _weights(kernel, masked or request.ragged)
        body.append(
            f"b_v = load_tile(p_vn + o_n[:, None] * stride_vs + o_dv[None, :], m_k, o_dv < V_DIM, {tail}, "
            "V_DIM != BLOCK_DV)"
        )
        body.append("b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]")
        body.append("b_ds = b_p * (b_dp - b_delta[:, None])")
        body += _derivative(kernel, roots, masked, masked or request.ragged)
        seen = "m_s" if masked or request.ragged else "(m_row[:, None] & (o_k >= 0)[None, :])"
        for n, gradient in row_sums:
            body.append(f"b_sum{n} += tl.sum({_seen(kernel, gradient.value, seen)}, 1)")
        for _, gradient in tile_sums:
            assert kernel.score is not None
            offset = kernel.score.offset(gradient.slot, gradient.indices)
            value = _seen(kernel, gradient.value, seen)
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


def _factors(slots: list[int]) -> list[str]:
    return [f"b_factor{slot} = tl.load(x_factor{slot})" for slot in slots]


def _scale(kernel: _Kernel) -> str:
    return "(scale * LOG2_E)" if kernel.log2 else "scale"


def _weights(kernel: _Kernel, masked: bool) -> list[str]:
    """b_p from b_s."""
    lines = ["if SOFTCAP:", "    b_s = capped(b_s, softcap)", f"b_p = {kernel.power('b_s', kernel.less)}"]
    return [*lines, "b_p = tl.where(m_s, b_p, 0.0)"] if masked else lines


def _derivative(kernel: _Kernel, roots: list[Node], masked: bool, bounded: bool) -> list[str]:
    """From b_ds, the gradient of the capped score, to that of the score that came from the product."""
    lines = ["if SOFTCAP:", "    b_ds = b_ds * (1 - (b_s / softcap) * (b_s / softcap))"]
    if kernel.score is None:
        return lines
    program = kernel.score.program
    assert program.grad_score is not None
    lines.append("grad = b_ds")
    lines += _written(kernel.score.statements(roots, load_mask="m_s" if masked else ""))
    text = kernel.score.text(program.grad_score)
    full = {"score", "grad"} & program.grad_score.deps
    lines.append(f"b_ds = {text}" if full else f"b_ds = tl.zeros_like(score) + {text}")
    if bounded and program.grad_score.op != "input":  # a derivative may be infinite where the weight is 0
        lines.append("b_ds = tl.where(m_s, b_ds, 0.0)")
    return lines


def _seen(kernel: _Kernel, value: Node, seen: str) -> str:
    assert kernel.score is not None
    return f"tl.where({seen}, {kernel.score.text(value)}, 0.0)"


# Columns of keys against blocks of queries: dK and dV

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


def _column_loop(kernel: _Kernel, masked: bool, body: list[str]) -> str:
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
    return _indent(begin, 8) + "\n" + _indent(body, 12)


def dkdv_text(request: Request) -> str:
    """`mod_dkdv`: dK and dV of a tile of keys, and what each key sends to captured tensors."""
    kernel = _Kernel(request, "q", "b_lse[None, :]")
    lists = request.lists
    score = kernel.program
    sums = kernel.gradients("columns")
    slots = sorted({gradient.slot for _, gradient in sums})
    roots: list[Node] = []
    if score is not None:
        assert score.grad_score is not None
        roots = [score.out, score.grad_score, *(node for _, g in sums for node in (*g.indices, g.value))]
    fixed = (
        f"Q, K, V, GRAD_OUT, LSE2, DELTA, {_walk_parameters(lists, 'Q')} GRAD_K, GRAD_V,\n"
        "    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,\n"
        "    stride_gb, stride_gh, stride_gs, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,\n"
        f"    {_walk_numbers(lists)} q_len, kv_len, scale, softcap,"
    )
    constants = _CONSTANTS + " EDGE_M: tl.constexpr, GRAD_MODE: tl.constexpr," + (_LIST_CONSTANTS if lists else "")
    text = _definition("mod_dkdv", fixed, kernel, slots, constants) + _COLUMNS
    if lists:
        text += "    PARTS: tl.constexpr = MASK_M // (BLOCK_M // HEADS)\n"
        text += "    EDGE_PARTS: tl.constexpr = MASK_M // (EDGE_M // HEADS)\n"
    else:
        text += _COLUMN_INTERVALS
    text += _indent(_factors(slots), 4)
    text += """
    for i_group in range(GROUP // HEADS):
        i_head = (tl.program_id(1) * GROUP + i_group * HEADS).to(tl.int32)
"""
    if lists:
        walk = (
            _LISTS.format(head="i_head", tile="first_key // MASK_N")
            .replace(" * PARTS", "")
            .replace("\n    ", "\n        ")
        )
        text += walk.lstrip("\n")
    text += _indent([f"b_sum{n} = tl.zeros([BLOCK_N], tl.float32)" for n, _ in sums], 8) + "\n"
    early = "b kv offset end" if request.packed else "b h kv offset end"
    if kernel.bounds is not None and not all(map(_within(early), kernel.bounds)):
        kernel.skips = False  # a bound of each head, where a tile holds several
    text += (
        _indent([] if request.packed else ["h = i_head"], 8)
        + "\n"
        + _indent(
            _hoisted(kernel, roots, early)
            + _unseen_parts(kernel, "BLOCK_N, 1", "MASK_M", "EDGE_M // HEADS", "EDGE_PARTS", "partial_blocks"),
            8,
        )
        + "\n"
    )
    restore = _snapshot(kernel)
    for masked in (True, False):
        restore()
        text += _column_loop(kernel, masked, _column_body(kernel, masked, roots, sums)) + "\n"
    restore()
    for n, gradient in sums:
        assert kernel.score is not None
        indices = _written(kernel.score.statements(gradient.indices))
        offset = kernel.score.offset(gradient.slot, gradient.indices)
        text += _indent(indices, 8) + "\n"
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
    kernel: _Kernel, masked: bool, roots: list[Node], sums: list[tuple[int, CapturedGradient]]
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
        f"b_lse = tl.load(p_lse + o_head * q_len + o_q{stat})",
        f"b_q = load_tile(p_q + block_query.to(tl.int64) * stride_qs + (o_head * stride_qh + ({position}) * "
        f"stride_qs)[:, None] + o_d[None, :], m_q, o_d < HEAD_DIM, {bounded}, HEAD_DIM != BLOCK_D)",
        f"score = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * {_scale(kernel)}  # [BLOCK_N, rows]",
        "q = tl.minimum(o_q, q_len - 1)[None, :]" if bounded and kernel.reads_at("q") else "q = o_q[None, :]",
        "h = (i_head + o_head - i_group * HEADS)[None, :]" if request.packed else "",
    ]
    body = [line for line in body if line]
    if masked and kernel.mask is not None:
        body += _written(kernel.mask.statements([kernel.mask.program.out]))
        within = (
            [] if kernel.score is None else ["m_k[:, None]", *([] if kernel.bounds is not None else ["m_q[None, :]"])]
        )
        body.append(f"m_s = {' & '.join([*within, f'({kernel.mask.text(kernel.mask.program.out)})'])}")
    elif masked:
        body.append("m_s = (o_q[None, :] >= b_lo[:, None]) & (o_q[None, :] < b_hi[:, None])")
    elif request.ragged:
        body.append("m_s = m_k[:, None] & m_q[None, :]")
    body += _modified(kernel, roots, masked)
    body += _weights(kernel, bounded)
    body += [
        f"b_do = load_tile(p_do + block_query.to(tl.int64) * stride_gs + (o_head * stride_gh + ({position}) * "
        f"stride_gs)[:, None] + o_dv[None, :], m_q, o_dv < V_DIM, {bounded}, V_DIM != BLOCK_DV)",
        "b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)",
        f"b_delta = tl.load(p_delta + o_head * q_len + o_q{delta})",
        "b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BLOCK_N, rows]",
        "b_ds = b_p * (b_dp - b_delta[None, :])",
    ]
    body += _derivative(kernel, roots, masked, bounded)
    seen = "m_s" if bounded else "(m_k[:, None] & (o_q >= 0)[None, :])"
    body += [f"b_sum{n} += tl.sum({_seen(kernel, g.value, seen)}, 1)" for n, g in sums]
    body.append("b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)")
    return body
