"""Evaluate a program with torch over whole index vectors: the eager meaning of the nodes, for autograd too."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from packflex.mods.nodes import INDICES, Node, ordered

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "div_exact": operator.truediv, "sqrt_exact": torch.sqrt,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "shl": operator.lshift, "shr": operator.rshift,
    "abs": torch.abs, "max": torch.maximum, "min": torch.minimum, "where": torch.where, "sign": torch.sign,
    "floordiv": torch.floor_divide, "remainder": torch.remainder, "fmod": torch.fmod, "pow": torch.pow,
    "round": torch.round, "truncdiv": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "divided_by": lambda x, d, *_: torch.floor_divide(x, d),
    "in_range": lambda x, low, end: (x >= low) & (x < end),
    "detach": torch.detach,
    "not": lambda x: torch.logical_not(x) if x.dtype == torch.bool else torch.bitwise_not(x),
}  # fmt: skip


_SMALL = {torch.int32, torch.int16, torch.int8, torch.uint8}


class OutOfBoundsError(Exception):
    """A read past the end: its `node`, the `axis`, the `index` there, the axis's `size`, and at which element."""

    def __init__(self, node: Node, axis: int, index: int, size: int, element: dict[str, int]) -> None:
        super().__init__(f"index {index} into an axis of {size}")
        self.node, self.axis, self.index, self.size, self.element = node, axis, index, size, element

    def place(self) -> str:
        """The element, as in `at q_idx=3, kv_idx=0`."""
        names = {"b": "b", "h": "h", "q": "q_idx", "kv": "kv_idx"}
        return "at " + ", ".join(f"{names[name]}={value}" for name, value in self.element.items())


def evaluate(
    roots: Iterable[Node],
    inputs: Mapping[str, Tensor],
    captures: list[Tensor],
    numbers: list[float | int],
    dtype: torch.dtype = torch.float32,
    seen: Tensor | None = None,
) -> list[Tensor]:
    """The values of `roots`.

    Args:
        roots: nodes of one program.
        inputs: "b", "h", "q", "kv" (and "score", "grad") as tensors that broadcast against one another.
        captures: captured tensors by slot.
        numbers: scalars by slot.
        dtype: of all floating-point values.
        seen: bool, where given: reads that differ from element to element are checked where it is true and clamped
            elsewhere, others are checked everywhere.

    Raises:
        OutOfBoundsError: with `seen`, a read past the end.
    """
    roots = list(roots)
    values: dict[int, Any] = {}
    wide: set[int] = set()  # what holds a number that its type does not, as `q_idx - kv_idx < sys.maxsize` may
    device = next(iter(inputs.values())).device
    for node in ordered(roots):
        kind = dtype if node.is_float else node.dtype
        args = [values[id(arg)] for arg in node.args]
        if node.op == "input":
            values[id(node)] = inputs[node.value]
        elif node.op in ("constant", "scalar"):
            number = node.value if node.op == "constant" else numbers[node.value]
            if kind in _SMALL and not torch.iinfo(kind).min <= number <= torch.iinfo(kind).max:
                kind = torch.int64
                wide.add(id(node))
            values[id(node)] = torch.full((), number, dtype=kind, device=device)  # no copy from the host, which syncs
        elif node.op == "read":
            table = captures[node.value]
            table = table.to(kind) if table.requires_grad else table  # before, so that its gradient is summed in `kind`
            values[id(node)] = _read(node, table, args, seen, inputs).to(kind)
        elif node.op == "cast":
            values[id(node)] = args[0] != 0 if kind == torch.bool else args[0].to(kind)
        else:
            if any(id(arg) in wide for arg in node.args):
                args = [x.long() if x.dtype in _SMALL else x for x in args]
                wide.add(id(node))
            values[id(node)] = _FUNCTIONS.get(node.op, getattr(torch, node.op, None))(*args)  # type: ignore[misc]
    return [values[id(root)] for root in roots]


def _read(
    node: Node, table: Tensor, indices: list[Tensor], seen: Tensor | None, inputs: Mapping[str, Tensor]
) -> Tensor:
    if not indices:
        return table
    checked = []
    for axis, (index, size) in enumerate(zip(indices, table.shape, strict=True)):
        index = index.long()
        if seen is not None:
            outside = (index < -size) | (index >= size)
            if node.is_full:  # a kernel reads the others whatever is seen
                outside = outside & seen
            if bool(outside.any()):
                raise _out_of_bounds(node, axis, index, outside, size, inputs)
            index = index.clamp(-size, size - 1)
        checked.append(index)
    return table[tuple(torch.broadcast_tensors(*checked))]


def _out_of_bounds(
    node: Node, axis: int, index: Tensor, outside: Tensor, size: int, inputs: Mapping[str, Tensor]
) -> OutOfBoundsError:
    """The error for the first element where `outside` is true."""
    names = [name for name in INDICES if name in node.deps or "score" in node.deps]
    everything = torch.broadcast_tensors(outside, index, *(inputs[name] for name in names))
    first = tuple(everything[0].nonzero()[0].tolist())
    found = [int(x[first]) for x in everything[1:]]
    return OutOfBoundsError(node, axis, found[0], size, dict(zip(names, found[1:], strict=True)))
