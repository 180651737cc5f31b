"""What the printed attention kernels have in common: the request that they answer, their programs, and shared lines.

The portable kernels of `packflex.attention.triton` with a program printed into them, and two ways to walk the blocks.
"intervals" is theirs: each row sees one interval of keys. "lists" walks torch's index lists, partly visible blocks
first, and evaluates the printed mask in them. What a program computes of rows alone stands before the loops.

Names as in `packflex.attention.triton.forward`; the programs' names begin with `m` (mask) and `x` (score).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from packflex.mods.nodes import CapturedGradient, Node, Program, ordered
from packflex.mods.printer import Printer, Statement, device_imports
from packflex.mods.rewrite import TileMask, for_tiles, in_log2

HEADER = '''"""Printed by packflex: {what}."""

import triton
import triton.language as tl

from packflex.attention.triton.forward import LN_2, LOG2_E, capped, load_tile, tile_rows
{imports}
'''
CONSTANTS = (
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
        rising: whether the scale is above 0, so that the largest product is the largest score.
        maxima: whether the forward gives each row's largest score in the place of its lse.
    """

    score: Program | None
    mask: Program | None
    ragged: bool = False
    packed: bool = False
    gradients: bool = False
    softcap: bool = False
    rising: bool = True
    maxima: bool = False

    @property
    def lists(self) -> bool:
        """Whether blocks are walked by lists."""
        return self.mask is not None


def with_header(what: str, body: str) -> str:
    """A printed file: its imports before its kernel."""
    return HEADER.format(what=what, imports=device_imports(body)) + "\n" + body


class KernelText:
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
        self.tiled: TileMask | None = None
        if request.mask is not None:
            self.tiled = tiled = for_tiles(request.mask, walked)
            self.mask = Printer(tiled.program, "m")
            if tiled.least is not None and tiled.end is not None:
                self.bounds, self.skips = (tiled.least, tiled.end), True
            rows = "o_e // HEADS" if request.packed else "o_e"
            if walked == "kv":
                names = {"block": "block_key", "offset": "o_n[None, :]", "end": "kv_len"}
            else:
                names = {"block": "block_query", "offset": f"({rows})[None, :]", "end": "q_len"}
            self.mask.inputs = names

    def parameters(self) -> list[str]:
        """Parameters of the programs."""
        return [name for printer in (self.mask, self.score) if printer is not None for name in printer.parameters()]

    def reads_at(self, index: str) -> bool:
        """Whether a captured tensor is read at an index, which must then lie within the sequence."""
        printers = [printer for printer in (self.mask, self.score) if printer is not None]
        nodes = (node for printer in printers for node in ordered(printer.program.roots()))
        return any(node.op == "read" and index in node.deps for node in nodes)

    @property
    def hides_alone(self) -> bool:
        """Whether the mask is needed for nothing but to hide elements, and bounds what each row (column) sees."""
        return self.score is None and self.bounds is not None

    def hidden(self, name: str, value: str) -> list[str]:
        """Lines that put `value`, 0.0 or -inf, where an element of the tile `name` is not seen."""
        if not self.hides_alone:
            return [f"{name} = tl.where(m_s, {name}, {value})"]
        assert self.mask is not None
        assert self.tiled is not None
        assert self.tiled.window is not None
        rest = self.tiled.rest
        window = ", ".join(map(self.mask.text, self.tiled.window.args))
        if rest is None:
            return [f"{name} = in_range_or({name}, {window}, {value})"]
        if self._is_equality(rest):
            equal = ", ".join(map(self.mask.text, rest.args))
            return [f"{name} = in_range_or({name}, {window}, {value}, {equal})"]
        hide = f"{name} = tl.where({self.mask.text(rest)}, {name}, {value})"
        return [hide, f"{name} = in_range_or({name}, {window}, {value})"]

    def _is_equality(self, node: Node) -> bool:
        return node.op == "eq" and all(arg.dtype == torch.int32 for arg in node.args)

    def mask_statements(self) -> list[str]:
        """What `hidden`, or else m_s, needs of the mask in a partly visible block."""
        assert self.mask is not None
        if not self.hides_alone:
            return written(self.mask.statements([self.mask.program.out]))
        assert self.tiled is not None
        assert self.tiled.window is not None
        rest = self.tiled.rest
        parts = [] if rest is None else rest.args if self._is_equality(rest) else (rest,)
        return written(self.mask.statements([*parts, *self.tiled.window.args]))

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

    def modified(self, roots: list[Node], masked: bool) -> list[str]:
        """b_s, the modified score, from `score`."""
        if self.score is None:
            return ["b_s = score"]
        printer = self.score
        forward = [root for root in roots if "grad" not in root.deps]
        lines = written(printer.statements(forward, load_mask="m_s" if masked else ""))
        out = printer.program.out
        text = printer.text(out)
        lines.append(f"b_s = {text}" if "score" in out.deps else f"b_s = tl.zeros_like(score) + {text}")
        return lines

    def hoisted(self, roots: list[Node], allowed: str) -> list[str]:
        """What depends on the `allowed` inputs alone, before the loops."""
        lines: list[Statement] = []
        if self.mask is not None:
            lines += self.mask.statements([self.mask.program.out], within(allowed))
        if self.score is not None:
            lines += self.score.statements(roots, within(allowed))
        return written(lines)

    def snapshot(self) -> Callable[[], None]:
        """Forget, when called, what was printed since: the next loop prints its own."""
        kept = [(printer, dict(printer.names)) for printer in (self.mask, self.score) if printer is not None]

        def restore() -> None:
            for printer, names in kept:
                printer.names = dict(names)

        return restore

    def unseen_parts(self, rows: str, mask_size: str, size: str, parts: str, count: str) -> list[str]:
        """How many parts of the first and of the last partly visible block no row (column) of the tile can see."""
        if not self.skips or self.bounds is None or self.mask is None:
            return []
        least, end = map(self.mask.text, self.bounds)
        return [
            f"least_seen = tl.min(tl.zeros([{rows}], tl.int32) + ({least}))",
            f"end_seen = tl.max(tl.zeros([{rows}], tl.int32) + ({end}))",
            f"end_last = read_index(p_partial + tl.maximum({count} - 1, 0)) * {mask_size} + {mask_size}",
            f"skipped = tl.maximum(least_seen - read_index(p_partial) * {mask_size}, 0) // ({size})",
            f"skipped = tl.minimum(skipped, {parts} - 1)",
            f"left_out = tl.minimum(tl.maximum(end_last - end_seen, 0) // ({size}), {parts} - 1)",
        ]

    def scale(self) -> str:
        """The factor on a product, in the units of the scores."""
        return "(scale * LOG2_E)" if self.log2 else "scale"

    def weights(self) -> list[str]:
        """b_p from b_s."""
        lines = ["if SOFTCAP:", "    b_s = capped(b_s, softcap)", f"b_p = {self.power('b_s', self.less)}"]
        return lines

    def derivative(self, roots: list[Node], masked: bool, bounded: bool) -> list[str]:
        """From b_ds, the gradient of the capped score, to that of the score that came from the product."""
        lines = ["if SOFTCAP:", "    b_ds = b_ds * (1 - (b_s / softcap) * (b_s / softcap))"]
        if self.score is None:
            return lines
        program = self.score.program
        assert program.grad_score is not None
        lines.append("grad = b_ds")
        lines += written(self.score.statements(roots, load_mask="m_s" if masked else ""))
        text = self.score.text(program.grad_score)
        full = {"score", "grad"} & program.grad_score.deps
        lines.append(f"b_ds = {text}" if full else f"b_ds = tl.zeros_like(score) + {text}")
        if bounded and program.grad_score.op != "input":  # a derivative may be infinite where the weight is 0
            lines.append("b_ds = tl.where(m_s, b_ds, 0.0)")
        return lines

    def seen(self, value: Node, seen: str) -> str:
        """A node's tile with 0 where it is not `seen`."""
        assert self.score is not None
        return f"tl.where({seen}, {self.score.text(value)}, 0.0)"


def shares_heads(name: str, score: Program) -> bool:
    """Whether a tile of "dkdv" or "dq" may hold several heads while it sums gradients of captured tensors.

    dK/dV sums over the rows of a tile, so that its reads must not depend on the head; dQ scatters elements of a tile.
    """
    for gradient in score.gradients:
        place = gradient.place
        if (name == "dkdv" and place == "columns" and "h" in gradient.deps) or (name == "dq" and place == "tile"):
            return False
    return True


def indent(lines: list[str], by: int) -> str:
    """The lines as text, `by` spaces further in."""
    return "\n".join(" " * by + line if line else "" for line in lines)


def written(statements: list[Statement]) -> list[str]:
    """Statements as lines."""
    return list(map(str, statements))


def within(allowed: str) -> Callable[[Node], bool]:
    """Whether a node depends on the `allowed` inputs alone."""
    names = set(allowed.split())
    return lambda node: node.deps <= names


def definition(name: str, fixed: str, kernel: KernelText, slots: list[int], constants: str) -> str:
    """The decorator and signature of a kernel; `slots` are the captured tensors whose gradient it sums."""
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


def walk_parameters(lists: bool, side: str) -> str:
    """Pointer parameters of the blocks: lists, or the intervals of "KV" or "Q"."""
    if lists:
        return "NUM_BLOCKS, INDICES, FULL_NUM_BLOCKS, FULL_INDICES,"
    return f"{side}_LO, {side}_HI,"


def walk_numbers(lists: bool) -> str:
    """Integer parameters of the blocks."""
    return "list_b, list_h, list_c," if lists else "stride_ib, stride_is,"


LIST_CONSTANTS = " MASK_M: tl.constexpr, MASK_N: tl.constexpr,"


LISTS = """
    o_list = (i_b * list_b + {head} * list_h + {tile}).to(tl.int64)
    p_partial = INDICES + o_list * list_c
    p_full = FULL_INDICES + o_list * list_c
    partial_blocks = tl.load(NUM_BLOCKS + o_list) * PARTS
    full_blocks = tl.load(FULL_NUM_BLOCKS + o_list) * PARTS
"""


def factors(slots: list[int]) -> list[str]:
    """Loads of the factors of captured gradients, see `scatter`."""
    return [f"b_factor{slot} = tl.load(x_factor{slot})" for slot in slots]
