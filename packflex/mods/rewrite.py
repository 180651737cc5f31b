"""Programs in the form that is cheapest for a tile of rows and columns: same values, fewer operations an element."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from packflex.mods.nodes import INDICES, Builder, Node, Program

LOG2_E = math.log2(math.e)
_LN_2 = math.log(2)
_HUGE = 1e30  # scores of that size hide an element, whatever their unit
_FAR = 1 << 30  # beyond every index, and far enough from overflow


@dataclass(frozen=True)
class TileMask:
    """A mask's program for a kernel that walks blocks of one index.

    `least` and `end` bound the walked index that a row (or column) of the tile can see, within the sequence; None for
    masks that say no such thing, which then do not hide what lies past the sequence either. The program is then the
    conjunction of `window`, the comparison with those bounds, and `rest`, if there is more.
    """

    program: Program
    least: Node | None = None
    end: Node | None = None
    window: Node | None = None
    rest: Node | None = None


def for_tiles(program: Program, walked: str) -> TileMask:
    """A mask for a kernel that walks blocks of the index `walked`, "kv" or "q", for a tile of the other.

    All comparisons that bound the walked index become one, with numbers that belong to the tile. `(q - kv) % d == n`
    becomes a comparison of `offset % d` with a number of the row and block; where the remainder is not compared, it is
    made of those of both. The walked index is the sum of "block", the block's first, and "offset", the number in it.
    These and "end" are inputs of the program.
    """
    tiles = _ForTiles(walked)
    out = tiles.conjunction(list(_conjuncts(program.out)), at_top=True)
    return TileMask(dataclasses.replace(program, out=out), *tiles.bounds, *tiles.parts)


class _ForTiles:
    def __init__(self, walked: str) -> None:
        self.walked = walked
        self.bounds: tuple[Node | None, Node | None] = (None, None)
        self.parts: tuple[Node | None, Node | None] = (None, None)
        self.builder = Builder()
        self._new: dict[int, Node] = {}
        self._halves: dict[int, tuple[Node, Node, Node]] = {}
        self._parts: dict[int, tuple[Node, Node]] = {}

    def of(self, node: Node) -> Node:
        if id(node) not in self._new:
            if node.op == "and" and node.dtype == torch.bool:
                made = self.conjunction(list(_conjuncts(node)))
            else:
                args = tuple(map(self.of, node.args))
                found = self._congruence(node, args) or self._remainder(node)
                made = found or _with_args(node, args)
            self._new[id(node)] = made
        return self._new[id(node)]

    def conjunction(self, parts: list[Node], at_top: bool = False) -> Node:
        """All of the parts, those that bound the walked index as one."""
        bounds = [(part, bound) for part in parts if (bound := self._bound(part)) is not None]
        rest = parts
        whole: list[Node] = []
        if len(bounds) > 1 or (bounds and at_top):
            low = [bound for _, (above, bound) in bounds if above]
            high = [bound for _, (above, bound) in bounds if not above]
            if at_top:
                high.append(self._make("input", value="end"))
            lowest = self._joined("max", [self._number(0), *low])
            end = self._joined("min", high or [self._number(_FAR)])
            end = self._make("max", end, lowest)
            block, offset = (self._make("input", value=name) for name in ("block", "offset"))
            args = (offset, self._make("sub", lowest, block), self._make("sub", end, block))
            whole.append(self.builder.make("in_range", args, torch.bool, where=bounds[0][0].where))
            merged = {id(part) for part, _ in bounds}
            rest = [part for part in parts if id(part) not in merged]
        left = [*map(self.of, rest)]
        if at_top and whole:
            self.bounds = (lowest, end)
            self.parts = (whole[0], self._joined("and", left) if left else None)
        return self._joined("and", [*whole, *left])

    def _joined(self, op: str, nodes: list[Node]) -> Node:
        joined = nodes[0]
        for node in nodes[1:]:
            joined = self.builder.make(op, (joined, node), node.dtype, where=node.where)
        return joined

    def _make(self, op: str, *args: Node, value: Any = None, where: str = "") -> Node:
        return self.builder.make(op, args, torch.int32, value, where)

    def _number(self, value: int) -> Node:
        return self.builder.constant(value, torch.int32)

    def _bound(self, node: Node) -> tuple[bool, Node] | None:
        """(True, least) or (False, end) for a comparison that bounds the walked index by a number of the tile."""
        if node.op not in _MIRRORED or any(arg.dtype != torch.int32 for arg in node.args):
            return None
        for op, (left, right) in ((node.op, node.args), (_MIRRORED[node.op], node.args[::-1])):
            if self.walked in right.deps:
                continue
            if self._is_walked(left):
                bound = right
            elif left.op == "sub" and self._is_walked(left.args[1]) and _is_index(left.args[0]):
                op, bound = _MIRRORED[op], self._make("sub", left.args[0], self._near(right))
            elif left.op == "sub" and self._is_walked(left.args[0]) and _is_index(left.args[1]):
                bound = self._make("add", left.args[1], self._near(right))
            else:
                continue
            if op in ("gt", "le"):  # of whole numbers: from the next one on, and before the next one
                bound = self._make("add", self._near(bound), self._number(1))
            return op in ("gt", "ge"), bound
        return None

    def _near(self, node: Node) -> Node:
        if node.op == "constant" or _is_index(node):
            return node
        return self._make("max", self._make("min", node, self._number(_FAR)), self._number(-_FAR))

    def _is_walked(self, node: Node) -> bool:
        return node.op == "input" and node.value == self.walked

    def _remainder(self, node: Node) -> Node | None:
        """x - x // d * d for x = a - b, one of them the walked index and the other another."""
        if node.op != "sub" or node.args[1].op != "mul" or node.args[1].args[0].op != "divided_by":
            return None
        x, product = node.args
        quotient, divisor = product.args
        if quotient.args[0] is not x or x.op != "sub" or not all(map(_is_index, x.args)):
            return None
        if sum(map(self._is_walked, x.args)) != 1:
            return None
        first, second = (self._left_over(a, quotient, divisor) for a in x.args)
        made = self._raised(self._make("sub", first, second, where=node.where), divisor)
        self._halves[id(made)] = (first, second, divisor)
        return made

    def _left_over(self, a: Node, quotient: Node, divisor: Node) -> Node:
        """a % d for an index."""
        if self._is_walked(a):
            parts = (self._make("input", value=name) for name in ("block", "offset"))
            first, second = (self._left_over(part, quotient, divisor) for part in parts)
            whole = self._lowered(self._make("add", first, second, where=quotient.where), divisor)
            self._parts[id(whole)] = (first, second)
            return whole
        whole = self._make("divided_by", a, *quotient.args[1:], where=quotient.where)
        return self._make("sub", a, self._make("mul", whole, divisor), where=quotient.where)

    def _raised(self, x: Node, divisor: Node) -> Node:
        below = self.builder.make("lt", (x, self._number(0)), torch.bool)
        return self._make("where", below, self._make("add", x, divisor), x)

    def _lowered(self, x: Node, divisor: Node) -> Node:
        above = self.builder.make("ge", (x, divisor), torch.bool)
        return self._make("where", above, self._make("sub", x, divisor), x)

    def _congruence(self, node: Node, args: tuple[Node, ...]) -> Node | None:
        """A remainder that was taken apart, compared with a number of the tile: the walked half compared with one."""
        if node.op not in ("eq", "ne"):
            return None
        for one, number in (args, args[::-1]):
            if id(one) not in self._halves or self.walked in number.deps or number.dtype != torch.int32:
                continue
            first, second, divisor = self._halves[id(one)]
            if "block" in second.deps:
                walked, wanted = second, self._raised(self._make("sub", first, number), divisor)
            else:
                walked, wanted = first, self._lowered(self._make("add", second, number), divisor)
            of_block, of_offset = self._parts[id(walked)]
            wanted = self._raised(self._make("sub", wanted, of_block), divisor)
            less = self.builder.make("lt", (number, divisor), torch.bool)
            possible = self.builder.make("and", (self.builder.make("ge", (number, self._number(0)), torch.bool), less),
                                         torch.bool)  # fmt: skip
            wanted = self._make("where", possible, wanted, self._number(-1))  # which no remainder is
            return self.builder.make(node.op, (of_offset, wanted), torch.bool, where=node.where)
        return None


def _conjuncts(node: Node) -> Iterator[Node]:
    if node.op == "and" and node.dtype == torch.bool:
        for arg in node.args:
            yield from _conjuncts(arg)
    else:
        yield node


_MIRRORED = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge"}


def _with_args(node: Node, args: tuple[Node, ...]) -> Node:
    """The node of other args that depend on the same; itself where they are its own."""
    same = all(a is b for a, b in zip(args, node.args, strict=True))
    return node if same else dataclasses.replace(node, args=args)


def _is_index(node: Node) -> bool:
    return node.op == "input" and node.value in INDICES


def in_log2(program: Program, less: bool = False) -> Program | None:
    """A score mod that adds to the score, for scores given and wanted in units of log(2); None for other mods.

    The softmax takes powers of two, so that a product's factor for it and the scale are one. The factor of what is
    added goes to a row, a column or a number where there is one. With `less`, the input "lse" is taken away from the
    sum before the score joins it: each term is then one multiplication with addition.
    """
    if any("score" in root.deps for root in program.roots() if root is not program.out):
        return None
    terms = _added(program.out)
    if not terms:
        return None
    builder = Builder()

    def make(op: str, first: Node, second: Node) -> Node:
        return builder.make(op, (first, second), program.out.dtype, where=program.out.where)

    score = builder.make("input", (), program.out.dtype, value="score")
    log2_e = builder.constant(LOG2_E, program.out.dtype)
    scaled = [(sign, _times(term, log2_e, builder)) for sign, term in terms]
    if less:
        scaled.append((-1, builder.make("input", (), program.out.dtype, value="lse")))
    scaled.sort(key=lambda pair: -pair[0])
    sign, total = scaled[0]
    for other, term in scaled[1:]:
        total = make("add" if other == sign else "sub", total, term)
    return dataclasses.replace(program, out=make("add" if sign > 0 else "sub", score, total))


def in_product_units(program: Program) -> Program | None:
    """A score mod for the bare product of query and key, given and wanted; None for mods that are not homogeneous.

    Homogeneous is what multiplies the score by what does not depend on it, and adds such terms. The input "unit" is one
    over the scale, above 0: terms are multiplied by it, and the softmax turns the sum into scores as it would the
    product.
    """
    if program.grad_score is None or "score" in program.grad_score.deps or "score" not in program.out.deps:
        return None
    unit = Node("input", (), program.out.dtype, frozenset(), "unit")
    out = _Homogeneous(unit).of(program.out)
    return None if out is None else dataclasses.replace(program, out=out)


def with_split_distances(program: Program, walked: str) -> Program:
    """The same score mod with distances of q and kv from two parts of the walked index, "near" and "far".

    Both are float32 inputs, and their sum is that index. Where all elements of a thread share "near", and "far" is
    known when the kernel is compiled, a distance is one subtraction for each element, with no work for each column.
    """
    builder = Builder()
    near, far = (Node("input", (), torch.float32, frozenset([walked]), name) for name in ("near", "far"))
    made: dict[int, Node] = {}

    def of(node: Node) -> Node:
        if id(node) not in made:
            args = tuple(map(of, node.args))
            indices = [arg.args[0].value if arg.op == "cast" and _is_index(arg.args[0]) else None for arg in node.args]
            if node.op == "sub" and node.is_float and set(indices) == {"q", "kv"}:
                first, second = (near if index == walked else arg for index, arg in zip(indices, args, strict=True))
                part = builder.make("sub", (first, second), node.dtype, where=node.where)
                made[id(node)] = builder.make(
                    "add" if first is near else "sub", (part, far), node.dtype, where=node.where
                )
            else:
                made[id(node)] = _with_args(node, args)
        return made[id(node)]

    grad = None if program.grad_score is None else of(program.grad_score)
    return dataclasses.replace(program, out=of(program.out), grad_score=grad)


class _Homogeneous:
    """Nodes in units in which the score is a product; None for what is not the same function of the score there."""

    def __init__(self, unit: Node) -> None:
        self.unit = unit
        self.builder = Builder()
        self._made: dict[int, Node | None] = {}

    def of(self, node: Node) -> Node | None:
        if id(node) not in self._made:
            self._made[id(node)] = self._make(node)
        return self._made[id(node)]

    def _make(self, node: Node) -> Node | None:
        if node.op == "input" and node.value == "score":
            return node
        if "score" not in node.deps:
            return _times(node, self.unit, self.builder)
        of_score = ["score" in arg.deps for arg in node.args]
        if node.op in ("add", "sub", "neg"):
            changes = [True] * len(node.args)
        elif node.op == "where" and not of_score[0]:
            changes = [False, True, True]
        elif (node.op == "mul" and sum(of_score) == 1) or (node.op in ("div", "div_exact") and not of_score[1]):
            changes = of_score
        else:
            return None
        args = [self.of(arg) if changed else arg for arg, changed in zip(node.args, changes, strict=True)]
        made = [arg for arg in args if arg is not None]
        return self.builder.make(node.op, made, node.dtype, node.value, node.where) if len(made) == len(args) else None


def _times(node: Node, factor: Node, builder: Builder) -> Node:
    """`node` times a number of the kernel's, with as little for each element of a tile as there can be.

    That number, a unit of scores, is some powers of two at most. A huge part for a row or column stays as it is: it may
    stand for minus infinity and be times 0 for what is seen, where minus infinity times 0 is no number.
    """
    node, factor = _to_base_2(node, factor, builder)
    if factor.op == "constant" and math.isclose(factor.value, 1.0, rel_tol=1e-12):
        return node
    if not node.is_full:
        if node.op == "constant":
            return builder.make("mul", (node, factor), node.dtype) if abs(node.value) < _HUGE else node
        size = builder.make("abs", (node,), node.dtype)
        huge = builder.make("gt", (size, builder.constant(_HUGE, node.dtype)), torch.bool)
        rest = builder.make("where", (huge, builder.constant(0, node.dtype), node), node.dtype)
        product = builder.make("mul", (rest, factor), node.dtype, where=node.where)
        return builder.make("where", (huge, node, product), node.dtype)
    if node.op == "neg":
        return builder.make("neg", (_times(node.args[0], factor, builder),), node.dtype, where=node.where)
    if node.op == "mul" and not all(arg.is_full for arg in node.args):
        part, whole = node.args if node.args[1].is_full else node.args[::-1]
        whole, factor = _to_base_2(whole, factor, builder)
        return builder.make("mul", (_times(part, factor, builder), whole), node.dtype, where=node.where)
    return builder.make("mul", (node, factor), node.dtype, where=node.where)


def _to_base_2(node: Node, factor: Node, builder: Builder) -> tuple[Node, Node]:
    """A logarithm as one of base 2, and the factor times what that takes from it; others as they are."""
    if node.op != "log":
        return node, factor
    factor = builder.make("mul", (factor, builder.constant(_LN_2, node.dtype)), node.dtype)
    return builder.make("log2", node.args, node.dtype, where=node.where), factor


def _added(node: Node) -> list[tuple[int, Node]] | None:
    """The terms of a sum beside the score, with their signs; None for what is no sum with the score in it once."""
    if node.op == "input" and node.value == "score":
        return []
    if node.op not in ("add", "sub"):
        return None
    first, second = node.args
    if node.op == "add" and "score" in second.deps:
        first, second = second, first
    if "score" in second.deps or (terms := _added(first)) is None:
        return None
    return [*terms, (1 if node.op == "add" else -1, second)]
