"""The program of a mod: a graph of pointwise operations on single numbers, as the printers take it.

A node stands for one number of each (b, h, q, kv). `deps` says which of those it depends on, so that what belongs to a
row is computed once a row and what belongs to no index once a tile. All floating-point values are float32 here,
whatever the captured tensors hold; integers keep their width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

INDICES = ("b", "h", "q", "kv")
EXACT_INDICES = 1 << 24  # float32 holds every integer up to here
_FOLDABLE = {"add", "sub", "mul", "neg", "cast", "div", "abs"}


@dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Attributes:
        op: "input" (`value` is its name: an index, "score" or "grad"), "scalar" (`value` is its slot), "constant"
            (`value` is the number), "read" (`value` is the slot of the captured tensor, `args` its indices), or the
            name of an operation of `packflex.mods.printer`.
        args: what it is computed from.
        dtype: bool, an integer type, or float32.
        deps: the indices it varies with, "score" and "grad" among them.
        where: the user's file and line, empty when it has none.
    """

    op: str
    args: tuple[Node, ...]
    dtype: torch.dtype
    deps: frozenset[str]
    value: Any = None
    where: str = ""

    @property
    def is_float(self) -> bool:
        """Whether it is float32."""
        return self.dtype.is_floating_point

    @property
    def is_full(self) -> bool:
        """Whether it differs from element to element of a tile."""
        return self.deps >= {"q", "kv"} or bool(self.deps & {"score", "grad"})


@dataclass(frozen=True)
class Scalar:
    """A number that the mod holds, given to the kernel when it is launched: a changed value recompiles nothing.

    `role` is "float", "int", or for a positive divisor "magic" and "shift": what division by multiplication needs
    (Granlund and Montgomery, PLDI 1994).
    """

    value: float | int
    role: str

    def argument(self) -> float | int:
        """The number as the kernel takes it."""
        if self.role in ("float", "int"):
            return float(self.value) if self.role == "float" else int(self.value)
        divisor = int(self.value)
        shift = (divisor - 1).bit_length()
        if self.role == "shift":
            return shift
        magic = ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1
        return magic - (1 << 32) if magic >= 1 << 31 else magic


_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}


class Builder:
    """Makes nodes, each only once, and folds what is constant."""

    def __init__(self) -> None:
        self._made: dict[Any, Node] = {}
        self.scalars: list[Scalar] = []

    def make(self, op: str, args: Iterable[Node], dtype: torch.dtype, value: Any = None, where: str = "") -> Node:
        """The node of an operation."""
        args = tuple(args)
        if op in _FOLDABLE and args and all(arg.op == "constant" for arg in args):
            return self.constant(_folded(op, [arg.value for arg in args], dtype), dtype)
        if dtype == torch.bool and (simpler := self._simpler(op, args)) is not None:
            return simpler
        key = (op, tuple(map(id, args)), dtype, value)
        if key not in self._made:
            deps = frozenset[str]().union(*(arg.deps for arg in args)) if args else frozenset[str]()
            if op == "input":
                deps = frozenset([value])
            self._made[key] = Node(op, args, dtype, deps, value, where)
        return self._made[key]

    def _simpler(self, op: str, args: tuple[Node, ...]) -> Node | None:
        """A truth without what decides nothing: torch's `and_masks` begins with True, `where(x, True, False)` is x."""
        if op in ("and", "or") and any(arg.dtype != torch.bool for arg in args):
            return None
        if op in ("and", "or"):
            for one, other in (args, args[::-1]):
                if one.op == "constant":
                    return other if one.value == (op == "and") else one
        if op == "not" and args[0].op == "constant":
            return self.constant(not args[0].value, torch.bool)
        if op == "not" and args[0].op == "not" and args[0].args[0].dtype == torch.bool:
            return args[0].args[0]
        if op == "not" and args[0].op in _OPPOSITE and not any(arg.is_float for arg in args[0].args):
            return self.make(_OPPOSITE[args[0].op], args[0].args, torch.bool, where=args[0].where)
        if op == "where" and all(arg.op == "constant" for arg in args[1:]) and args[1].value != args[2].value:
            return args[0] if args[1].value else self.make("not", args[:1], torch.bool)
        return None

    def constant(self, value: float | int | bool, dtype: torch.dtype) -> Node:
        """A number that is part of the kernel."""
        value = bool(value) if dtype == torch.bool else float(value) if dtype.is_floating_point else int(value)
        key = ("constant", repr(value), dtype)
        if key not in self._made:
            self._made[key] = Node("constant", (), dtype, frozenset(), value)
        return self._made[key]

    def scalar(self, value: float | int, dtype: torch.dtype, role: str | None = None) -> Node:
        """A number given at each launch, in a slot of its own."""
        self.scalars.append(Scalar(value, role or ("float" if dtype.is_floating_point else "int")))
        return Node("scalar", (), dtype, frozenset(), len(self.scalars) - 1)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """The node in another type; itself when it has it.

        A distance of two indices becomes float32 before it is taken: a subtraction of two rows of floats in place of
        one of integers and a conversion for each element. It is exact for indices below `EXACT_INDICES`.
        """
        if node.dtype == dtype:
            return node
        if dtype == torch.float32 and _is_distance(node):
            return self.make(node.op, [self.cast(arg, dtype) for arg in node.args], dtype, where=node.where)
        return self.make("cast", (node,), dtype, where=node.where)


def _is_distance(node: Node) -> bool:
    """Whether an integer is a difference of two indices, with `abs`, `neg` and limits around it."""
    if node.op in ("abs", "neg"):
        return _is_distance(node.args[0])
    if node.op in ("max", "min"):
        return any(map(_is_distance, node.args)) and all(
            arg.op in ("scalar", "constant") or _is_distance(arg) for arg in node.args
        )
    return node.op == "sub" and all(arg.op == "input" and arg.value in INDICES for arg in node.args)


def _folded(op: str, values: list[Any], dtype: torch.dtype) -> Any:
    x, y = (*values, None)[:2]
    if op in ("cast", "neg", "abs"):
        return {"cast": x, "neg": -x, "abs": abs(x)}[op]
    if op == "div":
        return x / y if y else float("nan") if not x or x != x else float("inf") if x > 0 else float("-inf")
    return {"add": x + y, "sub": x - y, "mul": x * y}[op]


def ordered(roots: Iterable[Node]) -> list[Node]:
    """Every node that the roots need, arguments first."""
    seen: set[int] = set()
    order: list[Node] = []
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))
    return order


@dataclass(frozen=True)
class CapturedGradient:
    """The gradient that one read sends to a captured tensor, as a function of "grad", d(loss) / d(modified score)."""

    slot: int
    indices: tuple[Node, ...]
    value: Node

    @property
    def deps(self) -> frozenset[str]:
        """The indices that the address varies with."""
        return frozenset[str]().union(*(index.deps for index in self.indices))

    @property
    def place(self) -> str:
        """Where it is summed first: over each query's keys ("rows"), each key's queries ("columns"), or in a "tile"."""
        varies = self.deps
        if "score" in varies or {"q", "kv"} <= varies:  # a score is another one for each query and key
            return "tile"
        return "columns" if "kv" in varies else "rows"


@dataclass(frozen=True)
class Layout:
    """How a captured tensor lies in memory, as far as a kernel's text depends on it."""

    dtype: torch.dtype
    rank: int
    inner: bool  # the last axis is contiguous
    wide: bool  # offsets need 64 bits

    @staticmethod
    def of(tensor: torch.Tensor) -> Layout:
        """The layout of a tensor."""
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        inner = tensor.dim() > 0 and tensor.stride(-1) == 1
        return Layout(tensor.dtype, tensor.dim(), inner, span >= 2**31)


@dataclass(frozen=True)
class Program:
    """A traced mod.

    Attributes:
        kind: "score" or "mask".
        name: the user's function and where it is.
        out: the modified score (float32), or whether the key is seen (bool).
        grad_score: d(loss) / d(score) as a function of the input "grad"; None for masks.
        gradients: what the reads send to captured tensors that require a gradient.
        layouts: of the captured tensors, by slot.
        scalars: numbers that are given at each launch, by slot.
    """

    kind: str
    name: str
    out: Node
    grad_score: Node | None
    gradients: tuple[CapturedGradient, ...]
    layouts: tuple[Layout, ...]
    scalars: tuple[Scalar, ...]

    def roots(self) -> list[Node]:
        """All that the program computes."""
        gradients = [node for g in self.gradients for node in (*g.indices, g.value)]
        return [self.out, *([self.grad_score] if self.grad_score is not None else []), *gradients]

    def without_gradients(self) -> Program:
        """The same program when no captured tensor needs a gradient."""
        return dataclasses.replace(self, gradients=())
