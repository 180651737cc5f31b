"""A traced score_mod as functions that the Hopper kernels call: printed, as for the portable kernels, by one printer.

The kernels hold scores as [rows, keys] forward and as [keys, rows] backward. What a mod computes of the tile's own side
alone, queries or keys, stands before the loops over blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

from torch import Tensor

from packflex.attention.hopper.forward import LOG2_E
from packflex.attention.mods.kernel_text import within
from packflex.mods import source
from packflex.mods.errors import short_name
from packflex.mods.nodes import Node, Program, ordered
from packflex.mods.printer import Printer, arguments, device_imports
from packflex.mods.rewrite import in_product_units, with_split_distances

_BUSY = 12  # nodes of each element
_HEAVY = {  # each of many instructions; sines of each element compile for minutes in these kernels
    "read", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh", "erf",
    "erfc", "lgamma", "digamma", "pow", "expm1", "log1p", "hypot", "remainder", "fmod",
}  # fmt: skip

_HEADER = '''"""Printed by packflex: {what}, for the Hopper kernels."""

from triton.experimental import gluon
from triton.experimental.gluon import language as tl

{imports}
'''


@dataclass(frozen=True)
class ModFunctions:
    """The printed functions of a score_mod.

    Attributes:
        forward: `(score, b, h, q, kv, near, far, rows, unit, args) -> score`; `near` and `far` add up to `kv` in float,
            and `rows` is what `rows(b, h, q, unit, args)` gives. It takes the bare product of query and key, and gives
            the score over the scale, or the score.
        rows: what depends on the queries alone.
        backward: as `forward`, with `near` and `far` of `q`, and `columns`, what `columns(b, kv, unit, args)` gives, in
            the place of `rows`.
        columns: what depends on the keys alone.
        gradient: `(grad, score, b, h, q, kv, near, far, columns, unit, args) -> grad` of the score, as `backward`; None
            where it is `grad`.
        products: whether results are scores over the scale, and `unit` is one over the scale; or `unit` is the scale.
        busy: whether it takes registers for much that it computes of each element, or for reads there.
    """

    forward: Any
    rows: Any
    backward: Any
    columns: Any
    gradient: Any
    products: bool
    busy: bool


@dataclass(frozen=True)
class BoundMod:
    """A score_mod with its captured tensors and numbers, as the launchers take it."""

    functions: ModFunctions
    arguments: tuple[Any, ...]

    def factors(self, scale: float) -> tuple[float, float, float]:
        """As `launch.score_factors`: `sm` from the mod's result to base 2, and in the place of `cap_in` its `unit`."""
        log2_e: float = LOG2_E.value
        return (scale * log2_e, 1 / scale, 0.0) if self.functions.products else (log2_e, scale, 0.0)


def bound_mod(program: Program, captures: list[Tensor], numbers: list[float | int]) -> BoundMod:
    """The mod of a program."""
    values: list[object] = []
    for value in arguments(program, captures, numbers):
        values += _halves(value) if isinstance(value, int) else [value]
    return BoundMod(mod_functions(program), tuple(values) or (0,))


def _halves(value: int) -> list[float | int]:
    """A whole number as two floats, its low and its high 16 bits; one past 32 bits as itself and 0.

    Triton compiles anew for the integers of a tuple that are 1 or multiples of 16, whatever `do_not_specialize` says,
    and for no float.
    """
    return [float(value & 0xFFFF), float(value >> 16)] if -(1 << 31) <= value < 1 << 31 else [value, 0]


@lru_cache(maxsize=256)
def mod_functions(program: Program) -> ModFunctions:
    """The functions of a program, loaded from their file."""
    module = functions_module(program)
    products = in_product_units(program) is not None
    gradient = getattr(module, "mod_gradient", None)
    return ModFunctions(
        module.mod_forward, module.mod_rows, module.mod_backward, module.mod_columns, gradient, products,
        not is_light(program),
    )  # fmt: skip


@lru_cache(maxsize=256)
def is_light(program: Program) -> bool:
    """Whether a score_mod computes little of each element and reads nothing there.

    The portable kernels are faster with others, or compile much sooner (docs/log.md).
    """
    full = [node for node in ordered([program.out]) if node.is_full and node.op != "input"]
    return len(full) < _BUSY and not any(node.op in _HEAVY for node in full)


def functions_module(program: Program) -> ModuleType:
    """The file of a score_mod's functions, as a module."""
    return source.load(mod_text(program))


def mod_text(program: Program) -> str:
    """The file of a score_mod's functions."""
    in_products = in_product_units(program)
    first = [] if in_products else ["score = score * unit"]
    walking_kv, walking_q = (with_split_distances(in_products or program, walked) for walked in ("kv", "q"))
    forward, backward = Printer(walking_kv, "x"), Printer(walking_q, "x")
    rows, given_rows = _hoisted("mod_rows", "b, h, q", forward, [walking_kv.out])
    columns, given_columns = _hoisted("mod_columns", "b, kv", backward, [walking_q.out])
    parts = [
        rows, _function("mod_forward", "score", first, given_rows, forward, walking_kv.out),
        columns, _function("mod_backward", "score", first, given_columns, backward, walking_q.out),
    ]  # fmt: skip
    grad = walking_q.grad_score
    assert grad is not None
    if grad.op != "input":
        again = Printer(walking_q, "x")
        again.names = {key: backward.names[key] for key in backward.names if backward.names[key] in given_columns}
        again.skip(len(backward.names))
        parts.append(_function("mod_gradient", "grad, score", first, given_columns, again, grad))
    body = "\n\n".join(parts)
    imports = device_imports(body)
    if "whole_number(" in body:
        imports = f"from packflex.attention.hopper.whole import whole_number\n{imports}"
    return _HEADER.format(what=short_name(program.name), imports=imports) + "\n" + body + "\n"


def _hoisted(name: str, indices: str, printer: Printer, roots: list[Node]) -> tuple[str, list[str]]:
    """The function of what depends on some indices alone, and the names of its results."""
    statements = printer.statements(roots, within(indices.replace(",", "")))
    names = [statement.name for statement in statements]
    lines = [*map(str, statements), f"return ({', '.join(names)},)" if names else "return (b,)"]
    return _defined(name, f"{indices}, unit, args", _unpacked(printer, lines) + lines), names


def _function(name: str, inputs: str, first: list[str], given: list[str], printer: Printer, root: Node) -> str:
    lines = [*first, *(f"{each} = given[{i}]" for i, each in enumerate(given))]
    lines += map(str, printer.statements([root]))
    text = printer.text(root)
    lines.append(f"return {text}" if {"score", "grad"} & root.deps else f"return score * 0 + {text}")
    return _defined(name, f"{inputs}, b, h, q, kv, near, far, given, unit, args", _unpacked(printer, lines) + lines)


def _unpacked(printer: Printer, lines: list[str]) -> list[str]:
    """The names of `args` that `lines` use: tensors, floats, and whole numbers as `_halves` leaves them."""
    program = printer.program
    used = set(re.findall(r"\w+", "\n".join(line.split("#")[0] for line in lines)))
    single = set(range(len(program.layouts)))
    first = len(printer.parameters()) - len(program.scalars)
    single |= {first + slot for slot, scalar in enumerate(program.scalars) if scalar.role == "float"}
    unpacked, at = [], 0
    for i, name in enumerate(printer.parameters()):
        given = f"args[{at}]" if i in single else f"whole_number(args[{at}], args[{at + 1}])"
        at += 1 if i in single else 2
        if name in used:
            unpacked.append(f"{name} = {given}")
    return unpacked


def _defined(name: str, parameters: str, lines: list[str]) -> str:
    body = "\n".join(f"    {line}" for line in lines)
    return f"@gluon.jit\ndef {name}({parameters}):\n{body}\n"
