"""Print a program as statements of a Triton kernel.

A kernel's template names the tile's `b`, `h`, `q`, `kv`, `score` and `grad` with shapes that broadcast against one
another: a scalar, [M, 1], [1, N] or [M, N]. Each statement then has the shape of what it depends on, so that what
belongs to a row is computed once a row. Plain Triton and Gluon share every name that is printed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from packflex.mods.nodes import Layout, Node, Program, ordered

TYPES = {
    torch.float32: "tl.float32", torch.int64: "tl.int64", torch.int32: "tl.int32", torch.int16: "tl.int16",
    torch.int8: "tl.int8", torch.uint8: "tl.uint8", torch.uint16: "tl.uint16", torch.uint32: "tl.uint32",
    torch.bool: "tl.int1",
}  # fmt: skip
_NARROW = {torch.int16, torch.int8, torch.uint8, torch.uint16}
_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
}  # fmt: skip
_CALLS = {
    "exp": "tl.exp", "exp2": "tl.exp2", "log": "natural_log", "log2": "fast_log2", "sqrt": "tl.sqrt",
    "rsqrt": "tl.rsqrt", "sin": "tl.sin", "cos": "tl.cos", "erf": "tl.erf", "floor": "tl.floor", "ceil": "tl.ceil",
    "abs": "tl.abs", "where": "tl.where", "round": "round_even", "pow": "power",
    "div_exact": "tl.div_rn", "sqrt_exact": "tl.sqrt_rn",
}  # fmt: skip
DEVICE = {
    "tanh", "sigmoid", "sign", "floordiv", "remainder", "fmod", "divided_by", "in_range", "isnan", "isinf", "log1p",
    "expm1", "log10", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erfc", "lgamma",
    "digamma", "trunc", "atan2", "hypot", "copysign",
}  # fmt: skip
_FROM_DEVICE = sorted({
    *DEVICE, "truth", "round_even", "power", "natural_log", "fast_log2", "read_elements", "read_index",
    "index_divided_by", "in_range_or", "scatter", "scatter_tile",
})  # fmt: skip


def device_imports(body: str) -> str:
    """The import of those functions of `packflex.mods.device` that a printed kernel calls; empty when it calls none."""
    used = [name for name in _FROM_DEVICE if re.search(rf"\b{name}\(", body)]
    return f"from packflex.mods.device import {', '.join(used)}\n" if used else ""


@dataclass(frozen=True)
class Statement:
    """One line of a kernel: `name = text  # comment`."""

    name: str
    text: str
    comment: str

    def __str__(self) -> str:
        return f"{self.name} = {self.text}" + (f"  # {self.comment}" if self.comment else "")


class Printer:
    """Prints the nodes of one program; each node once, wherever it is first asked for.

    Args:
        program: what to print.
        prefix: begins every name, so that a mask and a score live in one kernel.
    """

    def __init__(self, program: Program, prefix: str) -> None:
        self.program = program
        self.prefix = prefix
        self.names: dict[int, str] = {}
        self.inputs: dict[str, str] = {}  # other names for inputs, where a kernel's part has its own
        self._printed = 0

    def skip(self, count: int) -> None:
        """Give no name to come one of the first `count`, which another printer has given."""
        self._printed = max(self._printed, count)

    def parameters(self) -> list[str]:
        """The kernel's parameters for the captured tensors and scalars, in the order of `arguments`."""
        names = [f"{self.prefix}c{slot}" for slot in range(len(self.program.layouts))]
        for slot, layout in enumerate(self.program.layouts):
            names += [f"{self.prefix}c{slot}_stride{axis}" for axis in _strided_axes(layout)]
            names += [f"{self.prefix}c{slot}_size{axis}" for axis in range(layout.rank)]
        return names + [f"{self.prefix}s{slot}" for slot in range(len(self.program.scalars))]

    def statements(
        self, roots: Iterable[Node], when: Callable[[Node], bool] = lambda node: True, load_mask: str = ""
    ) -> list[Statement]:
        """The statements that compute `roots`, those nodes alone for which `when` holds and that have no name yet.

        `load_mask` is the name of a bool tile: reads that differ from element to element happen only where it is true.
        """
        lines = []
        for node in ordered(roots):
            if id(node) in self.names or not when(node):
                continue
            if node.op in ("input", "scalar", "constant"):
                continue
            if node.op == "detach":  # for autograd alone
                self.names[id(node)] = self.text(node.args[0])
                continue
            name = f"{self.prefix}{self._printed}"
            self._printed += 1
            text = self._expression(node, load_mask)
            if node.dtype == torch.bool and node.deps <= {"b", "h"} and any(arg.is_float for arg in node.args):
                text = f"truth({text})"
            lines.append(Statement(name, text, _comment(node)))
            self.names[id(node)] = name
        return lines

    def text(self, node: Node) -> str:
        """The name of a node that has been printed, or what an input, scalar or constant is written as."""
        if node.op == "input":
            return self.inputs.get(node.value, node.value)
        if node.op == "scalar":
            name = f"{self.prefix}s{node.value}"
            # the argument is 32 or 64 bits wide, and arithmetic with it would be too
            return f"{name}.to({TYPES[node.dtype]})" if node.dtype in _NARROW else name
        if node.op == "constant":
            return _constant(node)
        return self.names[id(node)]

    def offset(self, slot: int, indices: Iterable[Node]) -> str:
        """The offset of an element of a captured tensor, in elements."""
        layout = self.program.layouts[slot]
        terms = []
        for axis, index in enumerate(indices):
            text = self.text(index)
            if index.op != "constant" and not _not_negative(index):
                text = f"tl.where({text} < 0, {text} + {self.prefix}c{slot}_size{axis}, {text})"
            if layout.wide and index.op != "constant":
                text = f"({text}).to(tl.int64)"
            strided = axis in _strided_axes(layout)
            terms.append(f"{text} * {self.prefix}c{slot}_stride{axis}" if strided else text)
        return " + ".join(terms) if terms else "0"

    def _expression(self, node: Node, load_mask: str) -> str:
        if node.op == "read":
            return self._load(node, load_mask)
        args = [self.text(arg) for arg in node.args]
        if node.op in _INFIX:
            left, right = node.args
            if node.op in ("shl", "shr") or not (left.op == right.op == "constant"):
                return f"{args[0]} {_INFIX[node.op]} {args[1]}"
            return f"{_typed(left, args[0])} {_INFIX[node.op]} {args[1]}"
        if node.op == "cast":
            return _cast(node, args[0])
        if node.op == "neg":
            return f"-{args[0]}"
        if node.op == "not":
            return f"{args[0]} == 0" if node.dtype == torch.bool else f"~{args[0]}"
        if node.op in ("max", "min"):
            function = f"tl.{node.op}imum"
            return f"{function}({_typed(node.args[0], args[0])}, {args[1]})"
        if node.op == "truncdiv":
            return f"{args[0]} // {args[1]}"
        if node.op == "divided_by" and _not_negative(node.args[0]):
            return f"index_divided_by({args[0]}, {args[2]}, {args[3]})"
        function = node.op if node.op in DEVICE else _CALLS[node.op]
        if node.op == "where":
            return f"tl.where({_typed(node.args[0], args[0])}, {args[1]}, {args[2]})"
        if function == "in_range":
            return f"in_range({', '.join(map(_typed, node.args, args))})"
        return f"{function}({', '.join([_typed(node.args[0], args[0]), *args[1:]])})"

    def _load(self, node: Node, load_mask: str) -> str:
        layout = self.program.layouts[node.value]
        place = f"{self.prefix}c{node.value} + {self.offset(node.value, node.args)}"
        text = f"tl.load({place})"
        if node.is_full:
            text = f"read_elements({place}, {load_mask or None}, {bool(load_mask)})"
        if layout.dtype == torch.bool:
            return f"{text} != 0"
        return f"{text}.to(tl.float32)" if layout.dtype.is_floating_point and layout.dtype != torch.float32 else text


def arguments(program: Program, captures: list[torch.Tensor], numbers: list[float | int]) -> list[object]:
    """The kernel's arguments for `Printer.parameters`."""
    values: list[object] = [x.view(torch.uint8) if x.dtype == torch.bool else x for x in captures]
    for layout, tensor in zip(program.layouts, captures, strict=True):
        values += [tensor.stride(axis) for axis in _strided_axes(layout)]
        values += tensor.shape
    return values + list(numbers)


def _strided_axes(layout: Layout) -> range:
    return range(layout.rank - 1 if layout.inner else layout.rank)


def _comment(node: Node) -> str:
    line = f" at {node.where.rsplit('/', 1)[-1]}" if node.where else ""
    return f"{node.op}{line}"


def _constant(node: Node) -> str:
    value = node.value
    if node.dtype == torch.bool:
        return f"tl.full([], {int(value)}, tl.int1)"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value)


def _typed(node: Node, text: str) -> str:
    """A constant as a Triton scalar, where a bare Python number would not do."""
    if node.op != "constant" or node.dtype == torch.bool:
        return text
    return f"tl.full([], {text}, {TYPES[node.dtype]})"


def _cast(node: Node, text: str) -> str:
    source = node.args[0]
    text = _typed(source, text)
    if node.dtype == torch.bool:
        return f"{text} != 0"
    return f"{text}.to({TYPES[node.dtype]})" if " " not in text else f"({text}).to({TYPES[node.dtype]})"


def _not_negative(node: Node) -> bool:
    """Whether an integer is known to be 0 or more."""
    if (node.op == "input" and node.dtype == torch.int32) or node.dtype in (
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.bool,
    ):
        return True
    if node.op == "constant":
        return node.value >= 0
    if node.op in ("add", "mul", "and", "min", "where", "divided_by", "shr", "cast"):
        args = (
            node.args[1:]
            if node.op == "where"
            else node.args[:1]
            if node.op in ("divided_by", "shr", "cast")
            else node.args
        )
        return all(map(_not_negative, args)) and not (node.op == "cast" and node.args[0].is_float)
    if node.op == "max":
        return any(map(_not_negative, node.args))
    if node.op == "sub" and node.args[1].op == "mul" and node.args[1].args[0].op == "divided_by":
        return node.args[1].args[0].args[0] is node.args[0]  # x - x // d * d
    return node.op == "abs"
