"""What a mod that cannot become a kernel is told: which function, line and operation, and the way to write it."""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable
from typing import Any

MADE_INSIDE = "a mod works on single numbers: make it before the mod and capture it, then read table[i]"


_UNKNOWN = "on an index or a score, whose value is known only inside the kernel"
_SELECTED = (
    "write torch.where(condition, a, b), &, |, ~ between conditions, and torch.maximum(a, b), torch.minimum(a, b) or "
    ".clamp() for the larger and the smaller"
)
AS_BOOL = f"a Python `if`, `while`, `and`, `or`, `not`, `in`, max() or min() {_UNKNOWN}; {_SELECTED}"
AS_FLOAT = (
    f"float() or a function of Python's math {_UNKNOWN}; write .float(), and torch's function of that name: torch.exp "
    "for math.exp"
)
AS_INT = f"int() {_UNKNOWN}; write .int(), or .floor() and the like of a float"
AS_INDEX = (
    f"range(), a list's index or another use as an integer of Python's, {_UNKNOWN}; capture the list as a torch.tensor"
    ", read as table[h], and loop to the largest number with torch.where(i < h, a, b) inside"
)
AS_ITEM = f".item() or .tolist() {_UNKNOWN}; leave it out: torch's operations take the number as it is"
AS_BOUND = (
    f"a slice's bound {_UNKNOWN}; a mod reads single elements, as table[h, kv_idx], and leaves some out by "
    "torch.where(kv_idx >= q_idx, a, b): compute what is of whole slices before, and capture the result"
)
ON_THE_HOST = f"an argument that must be a number, or a Python `if`, {_UNKNOWN}; {_SELECTED}"


class ModError(ValueError):
    """A score_mod or mask_mod that cannot become a kernel."""


class ModTypeError(ModError, TypeError):
    """A mod with a wrong number of arguments, or one that returns another type than it must."""


class ModIndexError(ModError, IndexError):
    """A mod that reads a captured tensor out of bounds."""


def unwrapped(mod: Callable[..., Any]) -> Any:
    """The function inside partials, bound methods and callable objects, as far as it can be seen."""
    while isinstance(mod, functools.partial):
        mod = mod.func
    if callable(mod) and not hasattr(mod, "__code__") and hasattr(type(mod).__call__, "__code__"):
        mod = getattr(mod, "forward", None) or type(mod).__call__
    return getattr(mod, "__func__", mod)


def name_of(mod: Callable[..., Any]) -> str:
    """The mod's name and where it is defined, as in `alibi (model.py:12)`."""
    given = getattr(mod, "packflex_name", None)
    if given is not None:  # a function that stands for the user's
        return str(given)
    function = unwrapped(mod)
    name = getattr(function, "__qualname__", None) or repr(mod)
    name = name.rsplit(".<locals>.", 1)[-1]
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def located(name: str, line: str) -> str:
    """How an error begins: the mod, its line (`file:number`, or empty) and that line's text."""
    if not line:
        return name
    file, _, number = line.rpartition(":")
    text = linecache.getline(file, int(number)).strip()
    text = text if len(text) <= 120 else text[:117] + "..."
    return f"{name}, at {line}{f' `{text}`' if text else ''}"


def without_kernel(operation: str, random: bool, of_many: bool) -> str:
    """Why an operation has no kernel form, and how to do without it.

    Args:
        operation: as the user calls it.
        random: whether it draws random numbers.
        of_many: whether it takes a row of numbers, as sums and sorts do.
    """
    if random:
        return (
            f"{operation} draws random numbers, and kernels draw none: draw before the mod and read what was drawn, as "
            "in torch.where(keep[h, q_idx, kv_idx], score, -torch.inf)"
        )
    if of_many:
        return (
            f"{operation} is of many numbers, and a mod has one score at a time: of scores it cannot be written (the "
            "softmax comes after the mod); of captured tensors compute it before, and capture the result"
        )
    return (
        f"{operation} is not a pointwise operation that kernels have: write it with the operations that docs/masks.md "
        "lists"
    )


def without_derivative(operation: str) -> str:
    """What is told of an operation that torch or a kernel cannot differentiate."""
    return (
        f"{operation} has no derivative here, and it is of the score or of a captured tensor that requires a gradient: "
        "write .detach() on what it takes, where no gradient shall pass through it, or write it with other operations "
        "of docs/masks.md"
    )


def without_elements(shape: tuple[int, ...]) -> str:
    """What is told of a read where nothing can be read."""
    return f"a captured tensor of shape {shape} has no element to read; capture one with at least one along each axis"


def short_name(name: str) -> str:
    """A name of `name_of` without the file's folder."""
    function, _, place = name.rpartition(" (")
    return f"{function} ({place.rsplit('/', 1)[-1]}" if function else name
