"""What a mod depends on, without running it: its code and the values that it can reach, so that a trace is made once.

Two mods with the same key trace to the same program, with the tensors of one in the places of the other's. Reached are
closures, defaults, partials, methods, globals, and attributes whose names occur in the code. What cannot be compared
raises `UnknownValueError`, and the mod is then traced at each call.
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum, np.generic, slice)
_EXACT = {type(None), bool, int, str, bytes}  # equal values of one such type are one value
_BY_IDENTITY = (type, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_LIBRARIES = {"torch", "math", "numpy", "operator", "functools", "builtins", "typing", "itertools"}
_MOST = 4000


class UnknownValueError(Exception):
    """A value that a mod reaches and whose changes could not be noticed."""


class Fingerprint:
    """Key of a mod, and the tensors that it reaches, in a fixed order.

    Attributes:
        key: hashable; equal for mods that trace alike.
        tensors: what they reach; their places are part of the key, their values are not.
    """

    def __init__(self, mod: Any) -> None:
        self.tensors: list[Tensor] = []
        self.kept: list[Any] = []  # so that no identity in the key is taken by another object
        self._seen: dict[int, int] = {}
        self._count = 0
        self.key = self._walk(mod, frozenset())

    def _walk(self, value: Any, names: frozenset[str]) -> Any:
        self._count += 1
        if self._count > _MOST:
            raise UnknownValueError("too many values")
        if type(value) in _EXACT:
            return (type(value), value)
        if isinstance(value, _PLAIN):
            return (type(value), repr(value) if isinstance(value, float | complex | np.generic) else str(value))
        if id(value) in self._seen:
            return ("again", self._seen[id(value)])
        self._seen[id(value)] = len(self._seen)
        self.kept.append(value)
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return (
                "tensor", value.dtype, tuple(value.shape), value.stride(), value.device, value.requires_grad,
                type(value), getattr(value, "packflex_documents", None) is not None,
            )  # fmt: skip
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            inner = _names(value.__func__.__code__) if hasattr(value.__func__, "__code__") else names
            return ("method", self._walk(value.__func__, inner), self._walk(value.__self__, inner))
        if isinstance(value, functools.partial):
            return ("partial", *self._all((value.func, value.args, value.keywords), names))
        if isinstance(value, tuple | list):
            return (type(value), *self._all(value, names))
        if isinstance(value, dict):
            return ("dict", *self._all([x for pair in value.items() for x in pair], names))
        if isinstance(value, types.ModuleType):
            return self._module(value, names)
        if isinstance(value, _BY_IDENTITY) or type(value).__module__.split(".")[0] in ("builtins", "torch._ops"):
            if isinstance(value, _BY_IDENTITY) or callable(value):
                return ("id", id(value))
            raise UnknownValueError(type(value).__name__)
        if type(value).__module__.startswith("torch._ops"):
            return ("id", id(value))
        return self._object(value, names)

    def _all(self, values: Iterable[Any], names: frozenset[str]) -> list[Any]:
        return [self._walk(value, names) for value in values]

    def _function(self, function: types.FunctionType) -> Any:
        code = function.__code__
        if function.__module__ is not None and function.__module__.split(".")[0] in _LIBRARIES:
            return ("id", id(function))
        names = _names(code)
        cells = [cell.cell_contents if _filled(cell) else None for cell in function.__closure__ or ()]
        reached = [function.__globals__[name] for name in _names_in_order(code) if name in function.__globals__]
        defaults = (function.__defaults__, function.__kwdefaults__)
        return ("function", code, *self._all((*defaults, *cells, *reached), names))

    def _module(self, module: types.ModuleType, names: frozenset[str]) -> Any:
        if module.__name__.split(".")[0] in _LIBRARIES:
            return ("module", module.__name__)
        reached = [getattr(module, name) for name in sorted(names) if name in vars(module)]
        return ("module", module.__name__, *self._all(reached, names))

    def _object(self, value: Any, names: frozenset[str]) -> Any:
        if not hasattr(value, "__dict__"):
            raise UnknownValueError(type(value).__name__)
        call = type(value).__call__ if callable(value) else None
        if isinstance(value, torch.nn.Module):
            call = type(value).forward
        if call is not None and hasattr(call, "__code__"):
            names = names | _names(call.__code__)
        parts: list[Any] = []
        every = isinstance(value, torch.nn.ParameterList | torch.nn.ModuleList | torch.nn.ParameterDict)
        held = dict(value.__dict__)
        if isinstance(value, torch.nn.Module):
            held = {**value._buffers, **value._parameters, **value._modules, "training": value.training} | {
                name: x for name, x in held.items() if not name.startswith("_")
            }
        for name in sorted(held):
            if name in names or every:
                parts += [name, held[name]]
        for name in sorted(names - held.keys()):
            found = inspect.getattr_static(type(value), name, None)
            if isinstance(found, property):
                found = found.fget
            if isinstance(found, types.FunctionType) and type(value).__module__.split(".")[0] not in _LIBRARIES:
                names = names | _names(found.__code__)
                parts += [name, found]
        key = ("object", id(type(value)), *self._all(parts, names))
        if call is not None and isinstance(call, types.FunctionType):
            key += (self._walk(call, names),)
        return key


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


@functools.lru_cache(maxsize=4096)
def _names_in_order(code: types.CodeType) -> list[str]:
    return sorted(_names(code))


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
