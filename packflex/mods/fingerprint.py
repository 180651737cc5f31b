"""What a mod depends on, without running it: its code and the values that it can reach, so that a trace is made once.

Two mods with the same key trace to the same program, with the tensors of one in the places of the other's. Reached are
closures, defaults, partials, methods, globals, classes, and attributes whose names occur in any code that is reached.
What cannot be compared, or may be found by other ways than its name, raises `UnknownValueError`, and the mod is then
traced at each call.
"""

from __future__ import annotations

import collections
import dataclasses
import dis
import enum
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum, np.generic, slice)
_EXACT = {type(None), bool, int, str, bytes}  # equal values of one such type are one value
_BY_IDENTITY = (types.MethodDescriptorType, types.WrapperDescriptorType)
_PLAIN_BASES = (object, tuple, list, dict, typing.Generic, typing.Protocol)  # which add no state that is not looked at
_LIBRARIES = {"torch", "math", "numpy", "operator", "functools", "builtins", "typing", "itertools"}
# Ways to a value that its name does not tell
_BY_OTHER_WAYS = {"getattr", "vars", "eval", "exec", "globals", "locals", "dir", "__dict__", "__getattribute__",
                  "attrgetter", "methodcaller", "getattr_static", "getmembers"}  # fmt: skip
_MAKES = {"__init__", "__new__", "__post_init__"}  # run where the mod makes an object, not where it has one
_NOT_RUN = {"__init_subclass__", "__repr__", "__str__", "__del__", "__reduce__", "__reduce_ex__", "__getstate__",
            "__setstate__", "__copy__", "__deepcopy__", "__setattr__", "__delattr__", "__class_getitem__",
            "__replace__"}  # fmt: skip
# Modules whose functions give another value each time
_VARYING = {"random", "_random", "numpy.random", "numpy.random.mtrand", "time", "datetime", "secrets", "uuid"}
# Ways from a module to what its code does not name
_FROM_MODULES = {"children", "named_children", "modules", "named_modules", "get_submodule", "apply", "state_dict",
                 "parameters", "named_parameters", "get_parameter", "buffers", "named_buffers",
                 "get_buffer"}  # fmt: skip
_CALLS = {"__call__", "_call_impl", "_wrapped_call_impl"}  # which run `forward`
_MOST = 4000
_TupleGetter: Any = type(vars(collections.namedtuple("_Named", "x"))["x"])


class UnknownValueError(Exception):
    """A value that a mod reaches and whose changes could not be noticed."""


class Fingerprint:
    """Key of a mod, and the tensors that it reaches, in a fixed order.

    Attributes:
        key: hashable; equal for mods that trace alike.
        tensors: what they reach; their places are part of the key, their values are not.
        kept: the objects whose identity is in the key; while they live, no other object takes it.
    """

    def __init__(self, mod: Any) -> None:
        # An attribute may be read by code that is found only later, so a walk is repeated until it finds no new name.
        # Among the names are `_Bare` ones, and the classes of modules that the mod may call.
        start = getattr(mod, "__code__", type(mod))
        known: frozenset[Any] = _known_names.get(start, frozenset())
        while True:
            self.tensors: list[Tensor] = []
            self.kept: list[Any] = []
            self._seen: dict[int, int] = {}
            self._classes: dict[type, int] = {}
            self._alive: list[Any] = []  # values made by the walk itself, whose identity must last as long as it
            self._names = known
            self._found: set[Any] = set()
            self._count = 0
            self.key = self._walk(mod)
            if self._found <= known:
                break
            known = known | self._found
        if start not in _known_names and len(_known_names) > _MOST:
            _known_names.clear()
        _known_names[start] = known

    def _walk(self, value: Any, name: str | None = None) -> Any:
        """The key of a value, which the mod's code has by `name`, or by other ways."""
        self._count += 1
        if self._count > _MOST:
            raise UnknownValueError("too many values")
        kind = type(value)
        if kind in _EXACT:
            return (kind, value)
        if kind is types.FunctionType or kind is tuple:  # most of what is met: before the many kinds that follow
            place = self._place(value)
            if place is not None:
                return place
            return self._function(value) if kind is types.FunctionType else ("tuple", len(value), *self._all(value))
        if isinstance(value, _PLAIN):
            text = repr(value) if isinstance(value, float | complex | np.generic) else str(value)
            if kind.__module__ == "builtins" or _is_library(kind.__module__):
                return (kind, text)
            return (kind, text, self._class_of_object(kind), *self._named(getattr(value, "__dict__", {})))
        if isinstance(value, torch.nn.Module) and (name is None or _Bare(name) in self._names):
            self._found.add(kind)
        place = self._place(value)
        if place is not None:
            return place
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return (
                "tensor", value.dtype, tuple(value.shape), value.stride(), value.device, value.requires_grad,
                kind, getattr(value, "packflex_documents", None) is not None, *self._named(value.__dict__),
            )  # fmt: skip
        if isinstance(value, types.MethodType):
            by = None if _hands_on_its_object(value.__func__) else ""
            return ("method", self._walk(value.__func__), self._walk(value.__self__, by))
        if isinstance(value, staticmethod | classmethod):
            return (kind, self._walk(value.__func__))
        if isinstance(value, property):
            return (kind, self._walk(value.fget))
        if isinstance(value, functools.cached_property):
            return (kind, self._walk(value.func))
        if isinstance(value, functools.partial):
            return ("partial", *self._all((value.func, value.args, value.keywords)), *self._named(value.__dict__))
        if isinstance(value, tuple | list | dict):
            inner = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
            own: tuple[Any, ...] = ()
            if kind not in (list, dict, torch.Size):  # a named tuple has no attributes but its elements
                own = (self._object(value) if hasattr(value, "__dict__") else self._class_of_object(kind),)
            return (kind.__name__, len(value), *self._all(inner), *own)
        if kind is range or (kind in (set, frozenset) and all(type(x) in _EXACT for x in value)):
            return (kind.__name__, str(value) if kind is range else frozenset((type(x), x) for x in value))
        if isinstance(value, types.ModuleType):
            return self._module(value)
        if isinstance(value, type):
            return self._class(value, frozenset())
        if isinstance(value, types.BuiltinFunctionType):
            if value.__name__ in _BY_OTHER_WAYS:
                raise UnknownValueError(value.__name__)
            owner = value.__self__
            if _VARYING & {getattr(value, "__module__", None), type(owner).__module__}:
                raise UnknownValueError(value.__qualname__)
            of_module = owner is None or isinstance(owner, types.ModuleType)
            return self._identity(value) if of_module else ("bound", value.__name__, self._walk(owner))
        if isinstance(value, _BY_IDENTITY) or kind.__module__.startswith("torch._ops"):
            return self._identity(value)
        return self._object(value)

    def _place(self, value: Any) -> Any:
        """The key of a value that the walk has met before; None for a new one, which it has now."""
        place = self._seen.get(id(value))
        if place is not None:
            return ("again", place)
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        return None

    def _all(self, values: Iterable[Any]) -> list[Any]:
        return [self._walk(value) for value in values]

    def _by_names(self, names: Iterable[str], values: Iterable[Any]) -> list[Any]:
        return [self._walk(value, name) for name, value in zip(names, values, strict=True)]

    def _named(self, held: Mapping[str, Any]) -> list[Any]:
        """Those attributes whose names occur in the mod's code."""
        if not held:
            return []
        names = sorted(self._names & held.keys())
        return [*names, *self._by_names(names, [held[name] for name in names])]

    def _identity(self, value: Any) -> Any:
        self.kept.append(value)
        return ("id", id(value))

    def _function(self, function: types.FunctionType) -> Any:
        code = function.__code__
        module = function.__globals__.get("__name__")  # its `__module__` may be another's, by functools.wraps
        if module is not None and module.startswith("packflex.attention.") and not function.__closure__:
            return self._identity(function)  # what runs mods is none
        if _is_library(module):
            if not function.__closure__:
                return self._identity(function)
            # such as torch's and_masks of the user's masks
            cells = [cell.cell_contents if _filled(cell) else None for cell in function.__closure__]
            return ("library function", code, *self._all(cells))
        facts = _facts(code)
        if facts.other_ways:
            raise UnknownValueError(f"{function.__qualname__} finds values by {facts.other_ways}")
        if facts.imports:
            raise UnknownValueError(f"{function.__qualname__} imports")
        self._found |= facts.found
        cells = [cell.cell_contents if _filled(cell) else None for cell in function.__closure__ or ()]
        used = [name for name in facts.in_order if name in function.__globals__]
        reached = [
            *self._all((function.__defaults__, function.__kwdefaults__)),
            *self._by_names(code.co_freevars, cells),
            *self._by_names(used, [function.__globals__[name] for name in used]),
        ]
        return ("function", code, *reached, *self._named(function.__dict__))

    def _module(self, module: types.ModuleType) -> Any:
        if module.__name__ in _VARYING or (module is np and "random" in self._names):
            raise UnknownValueError(module.__name__)
        if _is_library(module.__name__):
            return ("module", module.__name__)
        if "__getattr__" in vars(module):
            raise UnknownValueError(f"{module.__name__}.__getattr__")
        return ("module", module.__name__, *self._named(vars(module)))

    def _class(self, kind: type, passed_over: frozenset[str]) -> Any:
        """A class by identity, with what its code reaches and the attributes that the mod may read.

        A module's `forward` is run where the mod calls the module, and not where the mod is a closure over it: the
        forward of attention itself reaches much that no mod does.
        """
        key = self._identity(kind)
        is_module = issubclass(kind, torch.nn.Module)
        may_call = is_module and (not passed_over or self._may_call(kind))
        for base in kind.__mro__:
            if _is_library(base.__module__):
                continue
            held = vars(base)
            for name in sorted(held):
                found = held[name]
                called = name.startswith("__") or (name == "forward" and may_call)
                special = called and isinstance(found, types.FunctionType)
                special = special and name not in _NOT_RUN and name not in passed_over
                if name in ("__getattr__", "__getattribute__"):
                    raise UnknownValueError(f"{base.__name__}.{name}")
                if name in self._names or special:
                    key += (name, self._walk(found, name))
                    if is_module and _hands_on_its_object(found):
                        self._found.add(kind)
        return key

    def _may_call(self, kind: type) -> bool:
        return kind in self._names or not _CALLS.isdisjoint(self._names)

    def _object(self, value: Any) -> Any:
        kind = type(value)
        # a slot, or an element of a named tuple, in its class
        if isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType | _TupleGetter):
            return self._identity(value)
        if not hasattr(value, "__dict__") or any(getattr(base, "__slots__", ()) for base in kind.__mro__):
            raise UnknownValueError(kind.__name__)
        held = value.__dict__
        if isinstance(value, torch.nn.Module):
            if (value._forward_hooks or value._forward_pre_hooks) and self._may_call(kind):
                raise UnknownValueError(f"hooks of {kind.__name__}")
            if not _FROM_MODULES.isdisjoint(self._names):
                raise UnknownValueError(f"{', '.join(_FROM_MODULES & self._names)} of {kind.__name__}")
            held = {**held, **value._buffers, **value._parameters, **value._modules}
            if _is_library(kind.__module__):  # its code is not looked at, so all that it holds may be read
                parts = [x for name in sorted(held) if not name.startswith("_") for x in (name, held[name])]
                return ("module object", *self._identity(kind), *self._all(parts))
        elif any(_is_library(base.__module__) and base not in _PLAIN_BASES for base in kind.__mro__):
            raise UnknownValueError(kind.__name__)
        return ("object", self._class_of_object(kind), *self._named(held))

    def _class_of_object(self, kind: type) -> Any:
        if kind in self._classes:
            return ("class again", self._classes[kind])
        self._classes[kind] = len(self._classes)
        return self._class(kind, frozenset(_MAKES))


@dataclasses.dataclass(frozen=True)
class _Bare:
    """A name whose value some code uses for more than to look up its attributes."""

    name: str


# By the code (or class) of a mod: the names that its walk found the last time; more of them do no harm
_known_names: dict[Any, frozenset[Any]] = {}


def _is_library(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """Names and strings that a function's code mentions, those of functions inside it too."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, types.CodeType):
            names |= _names(constant)
    return frozenset(names)


class _Facts(typing.NamedTuple):
    """What is looked at of a function's code at each walk; the hash of a code object takes as long as all of it."""

    found: frozenset[Any]  # its names, and the bare ones
    in_order: list[str]
    other_ways: str
    imports: bool


@functools.lru_cache(maxsize=4096)
def _facts(code: types.CodeType) -> _Facts:
    names = _names(code)
    return _Facts(names | _bare_names(code), sorted(names), ", ".join(names & _BY_OTHER_WAYS), _imports(code))


@functools.lru_cache(maxsize=4096)
def _bare_names(code: types.CodeType) -> frozenset[_Bare]:
    """The names that a function's code, or that of a function inside it, loads and does not take an attribute of next.

    `self.table[h]` loads self for its attribute, and table bare; `self.act(x)` loads act bare, and `f(self)` self.
    """
    names: set[str] = set()
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "NOP", "CACHE")]
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if "LOAD" not in step.opname or step.opname == "LOAD_CONST":
            continue
        loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)  # some load two
        attribute = following is not None and following.opname in ("LOAD_ATTR", "LOAD_METHOD")
        names.update(name for name in (loaded[:-1] if attribute else loaded) if isinstance(name, str))
    inner = [_bare_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(map(_Bare, names)).union(*inner)


def _hands_on_its_object(found: Any) -> bool:
    """Whether what a class holds may use the object that it is called on for more than its attributes."""
    found = found.fget if isinstance(found, property) else getattr(found, "func", found)
    if not isinstance(found, types.FunctionType):
        return not isinstance(found, staticmethod) and (callable(found) or hasattr(type(found), "__get__"))
    code = found.__code__
    return not code.co_argcount or _Bare(code.co_varnames[0]) in _bare_names(code)


@functools.lru_cache(maxsize=4096)
def _imports(code: types.CodeType) -> bool:
    """Whether a function's code, or that of a function inside it, imports."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return any(step.opname == "IMPORT_NAME" for step in dis.get_instructions(code)) or any(map(_imports, inner))


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
