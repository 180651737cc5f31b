"""The kernel that makes index lists from a printed mask: each tile is empty, partly or wholly visible.

A program classifies some tiles of a row. Bounds of the rows and of each tile's columns bound all that follows in a few
operations on as many numbers as there are tiles: exactly where an operation keeps the order of one of them, by the
least and greatest of what the mask computes of rows alone, or of columns alone, elsewhere (what it reads from a tensor,
say). Where the bounds decide (a tile far from the diagonal, two ranges of documents that do not meet), no element is
looked at. Of the other tiles elements are, until both a visible and a hidden one are found. A second kernel turns the
states of the tiles into torch's lists, in both directions.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from packflex.integers import ceil_div, next_power_of_2
from packflex.masks.block_mask import BlockLists
from packflex.mods import source
from packflex.mods.errors import short_name
from packflex.mods.lifted import PROGRAMS, Lifted
from packflex.mods.nodes import Node, Program, ordered
from packflex.mods.printer import TYPES, Printer, arguments, device_imports

_LIST_BLOCK = 256
_MOST_ELEMENTS = 1024  # looked at together
_MOST_TILES, _MOST_READ = 16, 1024  # tiles of one program, and keys of all its tiles where it reads tensors for each
_HEADER = '''"""Printed by packflex: which tiles are visible under {what}."""

import triton
import triton.language as tl

{imports}
'''
_BEGIN = """
    i_q = tl.program_id(1) + first_row
    b = tl.program_id(2) // heads
    h = tl.program_id(2) % heads
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_tile = tl.arange(0, CHUNK)
    o_k = tl.program_id(0) * CHUNK + o_tile
    m_k = o_k < tiles_kv
    o_k = tl.minimum(o_k, tiles_kv - 1)
    q_low = i_q * tile_m
    q_high = tl.minimum(q_low + tile_m, q_len) - 1
    kv_low = o_k * tile_n
    kv_high = tl.minimum(kv_low + tile_n, kv_len) - 1
    q = tl.minimum(q_low + o_m, q_high)[:, None]
    kv = tl.minimum(kv_low[:, None] + o_n[None, :], kv_high[:, None])
    whole = (q_low + tile_m <= q_len) & (kv_low + tile_n <= kv_len)
"""
_ELEMENTS = """
    state = tl.where(sure_true > 0, tl.where(whole, 2, 1), tl.where(sure_false > 0, 0, 3))
    state = tl.where(m_k, state, 0)
    undecided = tl.sum((state == 3).to(tl.int32))
    while undecided > 0:
        i_tile = tl.min(tl.where(state == 3, o_tile, CHUNK))
        k_low = (tl.program_id(0) * CHUNK + i_tile) * tile_n
        k_high = tl.minimum(k_low + tile_n, kv_len) - 1
        kv_part = tl.minimum(k_low + o_n, k_high)[None, :]
        m_n = (k_low + o_n <= k_high)[None, :]
        seen = tl.zeros([], tl.int32)
        hidden = tl.zeros([], tl.int32)
        part = tl.zeros([], tl.int32)
        while (part < BLOCK_M // PART_M) & ((seen == 0) | (hidden == 0)):
            o_q = q_low + part + tl.arange(0, PART_M) * (BLOCK_M // PART_M)  # from all over the tile
            q_part = tl.minimum(o_q, q_high)[:, None]
            m_in = (o_q <= q_high)[:, None] & m_n
{elements}
            m_s = m_in & ({out})
            seen = tl.maximum(seen, tl.max(m_s.to(tl.int32)))
            hidden = tl.maximum(hidden, tl.max((m_in & (m_s == 0)).to(tl.int32)))
            part += 1
        all_seen = (hidden == 0) & (q_low + tile_m <= q_len) & (k_low + tile_n <= kv_len)
        found = tl.where(seen > 0, tl.where(all_seen, 2, 1), 0)
        state = tl.where(o_tile == i_tile, found, state)
        undecided -= 1
    p_state = STATE + (tl.program_id(2).to(tl.int64) * tiles_q + i_q) * tiles_kv + o_k
    tl.store(p_state, state.to(tl.int8), mask=m_k)
"""


def launch_tile_lists(
    lifted: Lifted, shape: tuple[int, int, int, int], tile: tuple[int, int], device: torch.device
) -> tuple[BlockLists, BlockLists]:
    """The lists of each row of tiles, and those of each column, for a mask over (B, H, Q_LEN, KV_LEN)."""
    batch, heads, q_len, kv_len = shape
    tiles_q, tiles_kv = ceil_div(q_len, tile[0]), ceil_div(kv_len, tile[1])
    state = torch.empty((batch, heads, tiles_q, tiles_kv), dtype=torch.int8, device=device)
    captures = [x.to(device) for x in lifted.captures]
    kernel = tile_kernel_module(lifted.key).mask_tiles
    constants = tile_constants(lifted.program, tile)
    rows_at_once = 65535  # of a grid's second axis
    for first_row in range(0, tiles_q, rows_at_once):
        grid = (ceil_div(tiles_kv, constants["CHUNK"]), min(tiles_q - first_row, rows_at_once), batch * heads)
        kernel[grid](
            state, first_row, q_len, kv_len, tiles_q, tiles_kv, heads, tile[0], tile[1],
            *arguments(lifted.program, captures, lifted.numbers), **constants, num_warps=4,
        )  # fmt: skip
    kv_lists, q_lists = (_empty_lists(state, *sizes) for sizes in ((tiles_q, tiles_kv), (tiles_kv, tiles_q)))
    _lists_kernel[(tiles_q + tiles_kv, batch * heads)](
        state, *kv_lists, *q_lists, tiles_q, tiles_kv, batch * heads, BLOCK=_LIST_BLOCK, num_warps=4
    )
    return _block_lists(*kv_lists), _block_lists(*q_lists)


def tile_constants(program: Program, tile: tuple[int, int]) -> dict[str, int]:
    """The constants of a program's `mask_tiles` for a mask's tile."""
    block_m, block_n = (max(16, next_power_of_2(size)) for size in tile)
    part_m = max(1, min(block_m, _MOST_ELEMENTS // block_n))
    chunk = max(1, min(_MOST_TILES, _MOST_READ // block_n)) if program.layouts else _MOST_TILES
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "PART_M": part_m, "CHUNK": chunk}


def _empty_lists(state: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Counts [2, B, H, rows] and indices [2, B, H, rows, columns]: of the partly visible tiles and of the others."""
    shape = (2, *state.shape[:2], rows)
    return (
        torch.empty(shape, dtype=torch.int32, device=state.device),
        torch.empty((*shape, columns), dtype=torch.int32, device=state.device),
    )


def _block_lists(counts: Tensor, indices: Tensor) -> BlockLists:
    return BlockLists(counts[0], indices[0], counts[1], indices[1])


@triton.jit(do_not_specialize=["tiles_q", "tiles_kv", "planes"])
def _lists_kernel(STATE, KV_COUNTS, KV_INDICES, Q_COUNTS, Q_INDICES, tiles_q, tiles_kv, planes, BLOCK: tl.constexpr):
    """The lists of one row of tiles, or of one column."""
    i = tl.program_id(0)
    p_state = STATE + tl.program_id(1).to(tl.int64) * tiles_q * tiles_kv
    if i < tiles_q:
        _listed(p_state, KV_COUNTS, KV_INDICES, i, tiles_kv, 1, tiles_q, tiles_kv, planes, BLOCK)
    else:
        _listed(p_state, Q_COUNTS, Q_INDICES, i - tiles_q, 1, tiles_kv, tiles_kv, tiles_q, planes, BLOCK)


@triton.jit
def _listed(p_state, COUNTS, INDICES, i_row, row_stride, column_stride, rows, columns, planes, BLOCK: tl.constexpr):
    """The tiles of one row in state 1, and those in state 2, listed first and in order; the others after them."""
    o_n = tl.arange(0, BLOCK)
    p_state += i_row.to(tl.int64) * row_stride
    o_list = tl.program_id(1).to(tl.int64) * rows + i_row
    both = planes.to(tl.int64) * rows
    b_partial = tl.zeros([BLOCK], tl.int32)
    b_full = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        o = start + o_n
        b_state = tl.load(p_state + o.to(tl.int64) * column_stride, mask=o < columns, other=0)
        b_partial += (b_state == 1).to(tl.int32)
        b_full += (b_state == 2).to(tl.int32)
    total_partial = tl.sum(b_partial)
    total_full = tl.sum(b_full)
    tl.store(COUNTS + o_list, total_partial)
    tl.store(COUNTS + both + o_list, total_full)
    partial = tl.zeros([], tl.int32)
    full = tl.zeros([], tl.int32)
    for start in range(0, columns, BLOCK):
        o = start + o_n
        m_o = o < columns
        b_state = tl.load(p_state + o.to(tl.int64) * column_stride, mask=m_o, other=0)
        is_partial = (b_state == 1).to(tl.int32)
        is_full = (b_state == 2).to(tl.int32)
        before_partial = partial + tl.cumsum(is_partial, 0) - is_partial
        before_full = full + tl.cumsum(is_full, 0) - is_full
        at_partial = tl.where(is_partial > 0, before_partial, total_partial + o - before_partial)
        at_full = tl.where(is_full > 0, before_full, total_full + o - before_full)
        tl.store(INDICES + o_list * columns + at_partial, o, mask=m_o)
        tl.store(INDICES + (both + o_list) * columns + at_full, o, mask=m_o)
        partial += tl.sum(is_partial)
        full += tl.sum(is_full)


@lru_cache(maxsize=256)
def tile_kernel_module(key: str) -> ModuleType:
    """The module of the printed `mask_tiles` of a program of `PROGRAMS`."""
    return source.load(tile_kernel_text(key))


def tile_kernel_text(key: str) -> str:
    """The text of `mask_tiles` for a program of `PROGRAMS`."""
    program = PROGRAMS[key]
    printer = Printer(program, "m")
    bounds = _Bounds(printer)
    extra = printer.parameters()
    sizes = ["first_row", "q_len", "kv_len", "tiles_q", "tiles_kv", "heads", "tile_m", "tile_n"]
    loose = [*sizes, *(p for p in extra if "_stride" in p or "_size" in p or p[1] == "s")]
    parameters = "".join(f" {name}," for name in extra)
    out = program.out
    text = (
        f"\n@triton.jit(do_not_specialize={loose!r})\n"
        f"def mask_tiles(\n    STATE, {', '.join(sizes)},\n   {parameters}\n"
        "    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART_M: tl.constexpr, CHUNK: tl.constexpr,\n):"
    )
    text += _BEGIN
    text += _block(printer.statements([out], lambda n: n.deps <= {"b", "h"}), 4)
    shared = dict(printer.names)
    text += _block(printer.statements([out], lambda n: n.deps <= {"b", "h", "q"}), 4)
    text += _block(bounds.of_axis(out, "q"), 4)
    text += _block(printer.statements([out], lambda n: n.deps <= {"b", "h", "kv"}), 4)
    text += _block(bounds.of_axis(out, "kv"), 4)
    text += _block(bounds.of_tile(out), 4)
    # of a part of one tile: all that differs between its elements is computed anew
    printer.names, printer.inputs = shared, {"q": "q_part", "kv": "kv_part"}
    elements = _block(printer.statements([out]), 12).rstrip("\n")
    text += _ELEMENTS.format(elements=elements, out=printer.text(out)).lstrip("\n")
    return _HEADER.format(what=short_name(program.name), imports=device_imports(text)) + text


def _block(lines: list, indent: int) -> str:
    return "".join(" " * indent + str(line) + "\n" for line in lines)


_BOOLS = {"and", "or", "not"}
_IN_ORDER = {"add", "sub", "neg", "mul", "max", "min", "divided_by", "cast", "lt", "le", "gt", "ge", "eq", "ne"}


class _Bounds:
    """Statements that bound each node over tiles: `lo` and `hi` of integers, `sure` and `never` of bools.

    What depends on columns has a bound for each of the program's tiles, [CHUNK]; all else is a number.

    Arithmetic wraps around where it leaves a type's range, and so may a bound: `possible` has what an integer node can
    be by its form, and where that is more than its type holds, the bound is made in 64 bits and looked at.
    """

    def __init__(self, printer: Printer) -> None:
        self.printer = printer
        self.known: dict[int, tuple[str, str] | None] = {}
        self.possible: dict[int, tuple[int, int]] = {}

    def note_possible(self, node: Node) -> bool:
        """Fill in `possible`; whether the node's arithmetic may wrap around."""
        if node.is_float or node.dtype == torch.bool:
            return False
        limits = torch.iinfo(node.dtype)
        found = _possible(node, [self.possible.get(id(arg)) for arg in node.args])
        fits = found is None or (limits.min <= found[0] and found[1] <= limits.max)
        self.possible[id(node)] = found if found is not None and fits else (limits.min, limits.max)
        return not fits

    def of_axis(self, out: Node, axis: str) -> list[str]:
        """Bounds of what varies with `axis` alone, as close as they can be where it is an integer."""
        lines: list[str] = []
        for node in ordered([out]):
            self.note_possible(node)
            if id(node) in self.known or not node.deps <= {"b", "h", axis}:
                continue
            if axis not in node.deps or self._keeps_order(node, axis):
                self.known[id(node)] = self._bounded(node, lines)
            if axis in node.deps and self.known.get(id(node)) is None and not node.is_float:
                self.known[id(node)] = self._reduced(node, axis, lines)
        return lines

    def _keeps_order(self, node: Node, axis: str) -> bool:
        """Whether bounds of the node's arguments give its own: those of the one that varies, or of two bools."""
        if node.op == "input":
            return True
        varying = sum(axis in arg.deps for arg in node.args)
        return node.op in _BOOLS or (node.op in _IN_ORDER and varying == 1)

    def _reduced(self, node: Node, axis: str, lines: list[str]) -> tuple[str, str]:
        name, text = f"r{len(self.known)}", self.printer.text(node)
        over = ", 1" if axis == "kv" else ""
        if node.dtype == torch.bool:
            lines += [
                f"{name}t = tl.min(({text}).to(tl.int32){over}) > 0",
                f"{name}f = tl.max(({text}).to(tl.int32){over}) == 0",
            ]
            return f"{name}t", f"{name}f"
        lines += [f"{name}l = tl.min({text}{over})", f"{name}h = tl.max({text}{over})"]
        return f"{name}l", f"{name}h"

    def of_tile(self, out: Node) -> list[str]:
        """Bounds of everything else, up to `sure_true` and `sure_false` of the mask itself."""
        lines: list[str] = []
        for node in ordered([out]):
            if id(node) not in self.known:
                self.known[id(node)] = self._bounded(node, lines)
        found = self.known[id(out)]
        if found is None:
            return [*lines, "sure_true = tl.zeros([], tl.int32)", "sure_false = tl.zeros([], tl.int32)"]
        return [*lines, f"sure_true = ({found[0]}).to(tl.int32)", f"sure_false = ({found[1]}).to(tl.int32)"]

    def _bounded(self, node: Node, lines: list[str]) -> tuple[str, str] | None:
        if node.is_float:
            return None
        if node.op == "input" and node.value in ("q", "kv"):
            return f"{node.value}_low", f"{node.value}_high"
        if node.deps <= {"b", "h"}:
            text = self.printer.text(node)
            return (f"({text})", f"({text} == 0)") if node.dtype == torch.bool else (text, text)
        args = [self.known.get(id(arg)) for arg in node.args]  # a float of one axis has none yet
        wraps = self.note_possible(node)
        if wraps:
            if node.dtype == torch.int64:
                return None
            args = [pair and (f"tl.cast({pair[0]}, tl.int64)", f"tl.cast({pair[1]}, tl.int64)") for pair in args]
        name = f"r{len(self.known)}"
        pair = _decided(node, args) if node.dtype == torch.bool else _ranged(node, args, self)
        if pair is None:
            return None
        if wraps:
            limits, kind = torch.iinfo(node.dtype), TYPES[node.dtype]
            fits = f"({pair[0]} >= {limits.min}) & ({pair[1]} <= {limits.max})"
            ends = zip(pair, (limits.min, limits.max), strict=True)
            pair = tuple(f"tl.where({fits}, {end}, {limit}).to({kind})" for end, limit in ends)  # type: ignore[assignment]
        first, second = ("t", "f") if node.dtype == torch.bool else ("l", "h")
        lines += [f"{name}{first} = {pair[0]}", f"{name}{second} = {pair[1]}"]
        return f"{name}{first}", f"{name}{second}"


def _possible(node: Node, args: list) -> tuple[int, int] | None:
    """The least and greatest that an integer node can be without wrapping around; None for all that its type holds."""
    if node.op == "input":
        return 0, 2**31 - 1
    if node.op == "constant":
        return int(node.value), int(node.value)
    if any(x is None for x in args):
        return None
    if node.op in ("add", "sub"):
        (al, ah), (bl, bh) = args
        return (al + bl, ah + bh) if node.op == "add" else (al - bh, ah - bl)
    if node.op == "mul":
        products = [x * y for x in args[0] for y in args[1]]
        return min(products), max(products)
    if node.op in ("neg", "abs"):
        low, high = args[0]
        return (-high, -low) if node.op == "neg" else (max(low, -high, 0), max(-low, high))
    if node.op in ("max", "min"):
        (al, ah), (bl, bh) = args
        pick = max if node.op == "max" else min
        return pick(al, bl), pick(ah, bh)
    if node.op == "where":
        (al, ah), (bl, bh) = args[1:]
        return min(al, bl), max(ah, bh)
    if node.op in ("cast", "divided_by"):
        return args[0]
    return None


def _decided(node: Node, args: list) -> tuple[str, str] | None:
    """(surely true, surely false) of a bool node."""
    if node.op == "and" and (args[0] or args[1]):
        (a, b) = ((x or ("(i_q < 0)", "(i_q < 0)")) for x in args)
        return f"{a[0]} & {b[0]}", f"{a[1]} | {b[1]}"
    if node.op == "or" and (args[0] or args[1]):
        (a, b) = ((x or ("(i_q < 0)", "(i_q < 0)")) for x in args)
        return f"{a[0]} | {b[0]}", f"{a[1]} & {b[1]}"
    if any(x is None for x in args):
        return None
    if node.op == "not":
        return args[0][1], args[0][0]
    if node.op == "xor":
        (a, b) = args
        return f"({a[0]} & {b[1]}) | ({a[1]} & {b[0]})", f"({a[0]} & {b[0]}) | ({a[1]} & {b[1]})"
    if node.op == "where":
        c, x, y = args
        return (
            f"({c[0]} & {x[0]}) | ({c[1]} & {y[0]}) | ({x[0]} & {y[0]})",
            f"({c[0]} & {x[1]}) | ({c[1]} & {y[1]}) | ({x[1]} & {y[1]})",
        )
    if node.op not in ("lt", "le", "gt", "ge", "eq", "ne") or any(arg.dtype == torch.bool for arg in node.args):
        return None
    (al, ah), (bl, bh) = args
    same, apart = f"({al} == {ah}) & ({bl} == {bh}) & ({al} == {bl})", f"({ah} < {bl}) | ({al} > {bh})"
    return {
        "lt": (f"{ah} < {bl}", f"{al} >= {bh}"), "le": (f"{ah} <= {bl}", f"{al} > {bh}"),
        "gt": (f"{al} > {bh}", f"{ah} <= {bl}"), "ge": (f"{al} >= {bh}", f"{ah} < {bl}"),
        "eq": (same, apart), "ne": (apart, same),
    }[node.op]  # fmt: skip


def _ranged(node: Node, args: list, bounds: _Bounds) -> tuple[str, str] | None:
    """(least, greatest) of an integer node."""
    if node.op == "sub" and (found := _remainder(node, bounds)) is not None:
        return found
    if any(x is None for x in args):
        return None
    if node.op in ("add", "sub"):
        (al, ah), (bl, bh) = args
        return (f"{al} + {bl}", f"{ah} + {bh}") if node.op == "add" else (f"{al} - {bh}", f"{ah} - {bl}")
    if node.op == "neg":
        return f"-{args[0][1]}", f"-{args[0][0]}"
    if node.op == "abs":
        low, high = args[0]
        return f"tl.maximum(tl.maximum({low}, -{high}), 0)", f"tl.maximum(-{low}, {high})"
    if node.op in ("max", "min"):
        (al, ah), (bl, bh) = args
        return f"tl.{node.op}imum({al}, {bl})", f"tl.{node.op}imum({ah}, {bh})"
    if node.op == "mul":
        (al, ah), (bl, bh) = args
        ends = [f"{x} * {y}" for x in (al, ah) for y in (bl, bh)]
        least, greatest = (
            f"tl.{f}imum(tl.{f}imum({ends[0]}, {ends[1]}), tl.{f}imum({ends[2]}, {ends[3]}))" for f in ("min", "max")
        )
        return least, greatest
    if node.op == "divided_by":
        rest = ", ".join(bounds.printer.text(arg) for arg in node.args[1:])
        return f"divided_by({args[0][0]}, {rest})", f"divided_by({args[0][1]}, {rest})"
    if node.op == "where":
        _, (al, ah), (bl, bh) = args
        return f"tl.minimum({al}, {bl})", f"tl.maximum({ah}, {bh})"
    if node.op == "cast" and node.args[0].dtype in (torch.int32, torch.int16, torch.int8) and node.dtype in (
        torch.int32, torch.int64,
    ):  # fmt: skip
        kind = "tl.int32" if node.dtype == torch.int32 else "tl.int64"
        return f"({args[0][0]}).to({kind})", f"({args[0][1]}).to({kind})"
    return None


def _remainder(node: Node, bounds: _Bounds) -> tuple[str, str] | None:
    """Bounds of `x - x // d * d`: exact where the quotient is one number over the tile."""
    product = node.args[1]
    if product.op != "mul" or product.args[0].op != "divided_by" or product.args[0].args[0] is not node.args[0]:
        return None
    x, quotient = bounds.known[id(node.args[0])], bounds.known[id(product.args[0])]
    if x is None or quotient is None:
        return None
    divisor = bounds.printer.text(product.args[1])
    one = f"{quotient[0]} == {quotient[1]}"
    offset = f"{quotient[0]} * {divisor}"
    return f"tl.where({one}, {x[0]} - {offset}, 0)", f"tl.where({one}, {x[1]} - {offset}, {divisor} - 1)"
