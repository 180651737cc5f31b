"""A mod as what a kernel is launched with: its program, its captured tensors and its numbers, traced once and kept.

Programs are interned by structure: two mods that differ in numbers, or in tensors of the same kind, are one program, so
that no kernel is printed or compiled for the second.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from packflex.mods.fingerprint import Fingerprint, UnknownValueError
from packflex.mods.nodes import Program, ordered
from packflex.mods.trace import TapeEntry, Traced, apart_from_the_caller, trace

_MOST_TRACES = 512
PROGRAMS: dict[str, Program] = {}
_traces: OrderedDict[Any, _Recipe] = OrderedDict()


@dataclass(frozen=True)
class Lifted:
    """A mod ready to launch.

    Attributes:
        key: of its program in `PROGRAMS`.
        captures: captured tensors by slot.
        numbers: the kernel's scalars by slot.
    """

    key: str
    captures: list[Tensor]
    numbers: list[float | int]

    @property
    def program(self) -> Program:
        """Its program."""
        return PROGRAMS[self.key]


@dataclass(frozen=True)
class Described(Lifted):
    """A mod with a program of its own, whose names and lines are its own too: interned ones keep the first mod's."""

    own: Program

    @property
    def program(self) -> Program:
        """Its own program."""
        return self.own


def describe(mod: Callable[..., Any], kind: str, device: torch.device) -> Described:
    """As `lift`, traced afresh: for what is told to the user."""
    traced = trace(mod, kind, device)
    finished = _finished(traced)
    return Described(finished.key, finished.captures, finished.numbers, traced.program)


def lift(mod: Callable[..., Any], kind: str, device: torch.device) -> Lifted:
    """The program of a mod and its arguments; traces it unless a mod like it has been traced before.

    Arguments and errors as `packflex.mods.trace.trace`.
    """
    if isinstance(device, torch.device) and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        fingerprint = Fingerprint(mod)
        # tensors made while tracing carry a gradient only where gradients are on; a mod may ask for the others
        modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
        key = (kind, device, modes, fingerprint.key)
        known = _traces.get(key)
    except (UnknownValueError, TypeError, ValueError):
        return _finished(trace(mod, kind, device))
    if known is not None:
        _traces.move_to_end(key)
        lifted = known.lifted(fingerprint.tensors)
        if lifted is not None:
            return lifted
    traced = trace(mod, kind, device)
    recipe = _Recipe.of(traced, fingerprint)
    if recipe is not None:
        _traces[key] = recipe
        if len(_traces) > _MOST_TRACES:
            _traces.popitem(last=False)
    return _finished(traced)


def _finished(traced: Traced) -> Lifted:
    numbers = [scalar.argument() for scalar in traced.program.scalars]
    return Lifted(intern(traced.program), traced.captures, numbers)


def intern(program: Program) -> str:
    """The key of the program's structure, which its kernels' text follows from; keeps the first such program."""
    order = ordered(program.roots())
    place = {id(node): i for i, node in enumerate(order)}
    lines = [f"{node.op} {node.value!r} {node.dtype} {[place[id(arg)] for arg in node.args]}" for node in order]
    ends = [place[id(root)] for root in program.roots()]
    shape = [(g.slot, len(g.indices)) for g in program.gradients]
    roles = [scalar.role for scalar in program.scalars]
    text = "\n".join([program.kind, *lines, f"{ends} {shape} {program.layouts} {roles}"])
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    PROGRAMS.setdefault(key, program)
    return key


@dataclass(frozen=True)
class _Recipe:
    """How to find a trace's tensors again among those that another mod of the same key reaches; holds none of them."""

    key: str
    numbers: list[float | int]
    captures: list[Any]
    held: list[tuple[int, Any]]
    tape: list[TapeEntry]  # with the forms of its results
    kept: list[Any]

    @staticmethod
    def of(traced: Traced, fingerprint: Fingerprint) -> _Recipe | None:
        """None where it used a value, or a tensor that the fingerprint has not seen: it may be another next time."""
        if not traced.lasting:
            return None
        places: dict[int, _Place] = {id(x): _Place("reached", i) for i, x in enumerate(fingerprint.tensors)}
        tape = []
        for number, entry in enumerate(traced.tape):
            args, kwargs = tree_map(lambda x: places.get(id(x), x), (entry.args, entry.kwargs))
            made = tree_leaves(entry.result)
            tape.append(TapeEntry(entry.function, args, kwargs, [_form(x) for x in made]))
            for leaf, value in enumerate(made):
                places.setdefault(id(value), _Place("made", number, leaf))
        captures = [places.get(id(x), x) for x in traced.captures]
        held = [(slot, places.get(id(x), x)) for slot, x in traced.held.items()]
        numbers = [scalar.argument() for scalar in traced.program.scalars]
        given = tree_leaves([[entry.args, entry.kwargs] for entry in tape])
        if any(isinstance(x, Tensor) for x in [*captures, *(x for _, x in held), *given]):
            return None
        return _Recipe(intern(traced.program), numbers, captures, held, tape, fingerprint.kept)

    def lifted(self, reached: list[Tensor]) -> Lifted | None:
        """None where a result has another form than when it was traced: the mod may have used its size."""
        made: list[list[Any]] = []

        def found(x: Any) -> Any:
            if not isinstance(x, _Place):
                return x
            return reached[x.number] if x.kind == "reached" else made[x.number][x.leaf]

        with apart_from_the_caller():
            for entry in self.tape:
                args, kwargs = tree_map(found, (entry.args, entry.kwargs))
                made.append(tree_leaves(entry.function(*args, **kwargs)))
                if [_form(x) for x in made[-1]] != entry.result:
                    return None
        numbers = list(self.numbers)
        for slot, x in self.held:
            value = found(x).item()
            numbers[slot] = float(value) if isinstance(numbers[slot], float) else int(value)
        return Lifted(self.key, [found(x) for x in self.captures], numbers)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is found: the n-th that the fingerprint reached, or a result on the tape."""

    kind: str
    number: int
    leaf: int = 0


def _form(x: Any) -> Any:
    """All that a mod knows of a tensor without reading its values."""
    if not isinstance(x, Tensor):
        return None
    return x.shape, x.stride() if x.layout == torch.strided else x.layout, x.dtype, x.device, x.requires_grad
