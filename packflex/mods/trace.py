"""Trace a mod into a `Program`: `make_fx` over 0-d fake tensors, then the same graph differentiated.

Two passes. The first runs the user's function once and records every operation, with the user's line. Captured tensors
are the user's own objects there; an operation between captured tensors alone (`torch.sigmoid(gate)[h]`) runs on the
real tensors instead, under autograd, and its result is what the kernel reads. The second pass replays the recorded
graph with each read replaced by an input, under `torch.func.vjp`, which yields d(score) and what each read sends back:
the scatter into a captured tensor is then the kernel's business alone.

Values are float32 inside a kernel; float16, bfloat16 and float64 captured tensors are converted as they are read.
"""

from __future__ import annotations

import inspect
import operator
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from packflex.layout import is_on
from packflex.mods.aten import (
    IDENTITIES,
    decompositions,
    differentiable,
    is_bitwise,
    is_supported,
    kernel_dtype,
    mark_exact,
    to_nodes,
)
from packflex.mods.errors import (
    AS_BOOL,
    AS_BOUND,
    AS_FLOAT,
    AS_INDEX,
    AS_INT,
    AS_ITEM,
    MADE_INSIDE,
    ON_THE_HOST,
    ModError,
    ModIndexError,
    ModTypeError,
    located,
    name_of,
    without_derivative,
    without_elements,
    without_kernel,
)
from packflex.mods.nodes import INDICES, Builder, CapturedGradient, Layout, Node, Program

_HERE = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_SETTERS = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__",
            "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "set_", "resize_"}  # fmt: skip
_OF_KIND = {"size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "__len__", "get_device", "type",
            "__hash__", "result_type", "broadcast_shapes"}  # fmt: skip
_OF_ALL = {"sum", "mean", "prod", "max", "min", "all", "any", "norm", "std", "var", "median", "argmax", "argmin", "dot"}
_MAKERS = {torch.tensor, torch.as_tensor, torch.scalar_tensor}
_ASKED = {
    "__bool__": AS_BOOL, "is_nonzero": AS_BOOL, "__contains__": AS_BOOL, "__float__": AS_FLOAT, "__complex__": AS_FLOAT,
    "__int__": AS_INT, "__index__": AS_INDEX, "item": AS_ITEM, "tolist": AS_ITEM,
}  # fmt: skip
aten = torch.ops.aten


@dataclass(frozen=True)
class TapeEntry:
    """An operation between captured tensors, done on the real ones before the kernel: `result = function(...)`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass
class Traced:
    """A program with what it captured when it was traced.

    `held` are the slots of scalars that are the values of 0-d tensors on the host, whose value is read at each launch.
    The trace is not `lasting` where the mod itself read a value, as `.item()` and `if flag` do: another may be there.
    """

    program: Program
    captures: list[Tensor]
    held: dict[int, Tensor]
    tape: list[TapeEntry] = field(default_factory=list)
    lasting: bool = True


def trace(mod: Callable[..., Any], kind: str, device: torch.device, hold_numbers: bool = True) -> Traced:
    """Trace `mod`.

    Args:
        mod: `score_mod(score, b, h, q_idx, kv_idx)` or `mask_mod(b, h, q_idx, kv_idx)`.
        kind: "score" or "mask".
        device: where the kernel runs and the captured tensors must be (0-d tensors may be on the CPU).
        hold_numbers: whether 0-d tensors on the host become numbers of the launch; they are read as others are if not.

    Raises:
        ModError: a mod that cannot become a kernel; names the function, its line, the operation and the remedy.
    """
    _check_signature(mod, kind)
    recorder = _Recorder(mod)
    with _one_at_a_time, apart_from_the_caller(), _outside_transforms():
        graph = _record(mod, kind, device, recorder)
        first = _FirstGraph(graph, mod, kind, device, hold_numbers)
        program, held = _second_pass(first, mod, kind)
    return Traced(program, first.captures, held, recorder.tape, not recorder.read_values)


# torch.fx's patches and anomaly mode, which a trace turns off, are the whole process's
_one_at_a_time = threading.RLock()


def _outside_transforms() -> AbstractContextManager[Any]:
    """Outside torch.func's transforms, under which every new tensor is another class and has no value."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return temporarily_clear_interpreter_stack()


@contextmanager
def apart_from_the_caller() -> Iterator[None]:
    """Without the caller's hooks on saved tensors (of checkpoints, of `save_on_cpu`) and dispatch modes.

    `torch.func` refuses such hooks. A checkpoint counts what its function saves and runs, while a mod may be traced in
    its forward and replayed when it is run again: so neither is seen, and what is computed of captured tensors is kept.
    """
    hooks = []
    try:
        while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            hooks.append(top)
        with _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext():
            yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


# First pass


def _check_signature(mod: Callable[..., Any], kind: str) -> None:
    count = 5 if kind == "score" else 4
    wanted = ("score, " if kind == "score" else "") + "b, h, q_idx, kv_idx"
    if not callable(mod):
        raise ModTypeError(f"{kind}_mod must be a function of ({wanted}); got {mod!r}")
    try:
        signature = inspect.signature(mod)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        raise ModTypeError(
            f"{kind}_mod {name_of(mod)} takes {signature}, and is called with {count} positional arguments "
            f"({wanted}): {error}"
        ) from None


class _Recorder(TorchFunctionMode):
    """Notes the user's line of each operation, reads captured tensors, and runs what needs no trace for real."""

    def __init__(self, mod: Callable[..., Any]) -> None:
        super().__init__()
        self.mod = mod
        self.tape: list[TapeEntry] = []
        self.read_values = False  # of captured tensors, on the host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled and not args[0]:
            raise ModError(
                f"{_at(_user_line(), self.mod)}: a kernel has no torch.no_grad(); write .detach() on what gets no "
                "gradient"
            )
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        traced = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
            raise ModError(
                f"{_at(_user_line(), self.mod)}: torch.func (grad, vmap, ...) does not reach what a mod captures; "
                "write torch.autograd.grad or .backward()"
            )
        name = getattr(func, "__name__", "")
        asked = tensors if name == "__contains__" else tensors[:1]
        if name in _ASKED and any(isinstance(x, FakeTensor) and x.constant is None for x in asked):
            raise ModError(f"{_at(_user_line(), self.mod)}: {_ASKED[name]}")
        if any(isinstance(bound, FakeTensor) for leaf in leaves for bound in _bounds(leaf)):
            raise ModError(f"{_at(_user_line(), self.mod)}: {AS_BOUND}")
        writes = name in _SETTERS or (name.endswith("_") and not name.startswith("_")) or kwargs.get("inplace") is True
        if (writes and tensors and (not isinstance(tensors[0], FakeTensor) or name == "__setitem__")) or (
            kwargs.get("out") is not None
        ):
            raise ModError(
                f"{_at(_user_line(), self.mod)}: {name.strip('_') or name} changes a captured tensor in place; a mod "
                "only reads: compute a new value instead"
            )
        if not traced and (tensors or func in _MAKERS):
            return self._for_real(func, args, kwargs)
        if traced:
            self._check_tables(name, tensors)
        with _noting(_user_line(), name):
            if func is Tensor.__getitem__:
                return self._read(*args)
            return func(*args, **kwargs)

    def _check_tables(self, name: str, tensors: list[Tensor]) -> None:
        """Refuse what torch itself refuses, in words of its own, of captured tensors and traced numbers together."""
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor) and tensor.layout != torch.strided:
                raise ModError(
                    f"{_at(_user_line(), self.mod)}: a captured tensor of {tensor.layout}; kernels read dense ones: "
                    "capture it as .to_dense()"
                )
        if name == "take" and not isinstance(tensors[0], FakeTensor):
            raise ModError(
                f"{_at(_user_line(), self.mod)}: take is not pointwise: it takes a whole captured tensor of shape "
                f"{tuple(tensors[0].shape)}; read one element as table[i, j], or as table.flatten()[i]"
            )

    def _for_real(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        versions = [x._version for x in given if not x.is_inference()]
        with _disable_current_modes(), torch.enable_grad() if _wants_grad() else torch.no_grad():
            result = func(*args, **kwargs)
        if versions != [x._version for x in given if not x.is_inference()]:
            name = getattr(func, "__name__", "an operation")
            raise ModError(
                f"{_at(_user_line(), self.mod)}: {name} has changed a captured tensor in place; a mod only reads: "
                "compute a new value instead"
            )
        made = torch.utils._pytree.tree_leaves(result)
        if any(isinstance(x, Tensor) for x in made):
            self.tape.append(TapeEntry(func, args, kwargs, result))
        told = given and any(not isinstance(x, Tensor) for x in made) and not _tells_kind(func)
        if told or any(map(_cuts_at_a_tensor, torch.utils._pytree.tree_leaves((args, kwargs)))):
            self.read_values = True
        return result

    def _read(self, table: Tensor, index: Any) -> Any:
        """`table[index]` where an index is traced: basic indices first, then one `aten.index` over the others."""
        items = list(index) if isinstance(index, tuple) else [index]
        taken = sum(1 for item in items if item is not None and item is not Ellipsis)
        if taken > table.dim():
            raise ModIndexError(
                f"{_at(_user_line(), self.mod)}: {taken} indices into a tensor of shape {tuple(table.shape)}; "
                f"it takes {table.dim()}, one for each axis"
            )
        if Ellipsis in [item for item in items if not isinstance(item, Tensor)]:
            at = next(i for i, item in enumerate(items) if item is Ellipsis)
            items[at : at + 1] = [slice(None)] * (table.dim() - taken)
        basic = tuple(slice(None) if isinstance(item, Tensor) else item for item in items)
        if any(not (isinstance(item, slice) and item == slice(None)) for item in basic):
            table = (
                table[basic]
                if isinstance(table, FakeTensor)
                else self._for_real(Tensor.__getitem__, (table, basic), {})
            )
        kept = [item if isinstance(item, Tensor) else None for item in items if not isinstance(item, int)]
        if all(item is None for item in kept):
            return table
        for item in kept:
            if item is not None and (item.dim() or item.dtype not in (torch.int32, torch.int64)):
                raise ModError(
                    f"{_at(_user_line(), self.mod)}: a captured tensor is read with an index of {item.dtype} "
                    f"{tuple(item.shape)}; indices are single integers: convert with .int(), or use torch.where"
                )
        return aten.index.Tensor(table, kept)


def _tells_kind(func: Any) -> bool:
    """Whether a function tells of a tensor what is the same for all of its kind, and no value."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in ("grad", "_grad", "_version")
    return name in _OF_KIND or (name.startswith("is_") and name != "is_nonzero")


def _cuts_at_a_tensor(x: Any) -> bool:
    """Whether a slice has a tensor for a bound, whose value is then read, and which no tape can exchange."""
    return any(isinstance(bound, Tensor) for bound in _bounds(x))


def _bounds(x: Any) -> tuple[Any, ...]:
    return (x.start, x.stop, x.step) if isinstance(x, slice) else ()


_grad_wanted = [False]


def _wants_grad() -> bool:
    return _grad_wanted[0]


@contextmanager
def _noting(line: str, function: str = "") -> Iterator[None]:
    """Give the nodes that are made the user's line, and the function that the user calls there."""
    noted = {"stack_trace": line, "torch_fn": function}
    with fx_traceback.preserve_node_meta():
        meta = fx_traceback.current_meta
        before = {key: meta[key] for key in noted if key in meta}
        meta.update(noted)
        try:
            yield
        finally:
            for key in noted:
                del meta[key]
            meta.update(before)


_given_line = [""]


@contextmanager
def at_line(line: str) -> Iterator[None]:
    """Say which line of the user's the operations come from, where no frame of the stack does."""
    before, _given_line[0] = _given_line[0], line
    try:
        yield
    finally:
        _given_line[0] = before


def _user_line() -> str:
    """`file:line` of the innermost frame that is neither torch's nor the tracer's."""
    if _given_line[0]:
        return _given_line[0]
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_HERE, _TORCH)) and "<" not in name[:1]:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _at(line: str, mod: Callable[..., Any]) -> str:
    return located(name_of(mod), line)


def _record(mod: Callable[..., Any], kind: str, device: torch.device, recorder: _Recorder) -> Any:
    score = [torch.empty((), dtype=torch.float32, device=device)] if kind == "score" else []
    indices = [torch.empty((), dtype=torch.int32, device=device) for _ in INDICES]

    def run(*arguments: Tensor) -> Any:
        with recorder:
            out = mod(*arguments)
        if isinstance(out, bool | int | float):
            dtype = torch.bool if isinstance(out, bool) else torch.float32
            return torch.full((), out, dtype=dtype, device=device)
        if not isinstance(out, Tensor):
            raise ModTypeError(f"{kind}_mod {name_of(mod)} must return a tensor; it returned {type(out).__name__}")
        if not isinstance(out, FakeTensor) and out.dim():
            raise ModTypeError(f"{kind}_mod {name_of(mod)} must return one number; it returned a whole tensor")
        return out.clone() if not isinstance(out, FakeTensor) else out

    before, _grad_wanted[0] = _grad_wanted[0], torch.is_grad_enabled()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch's own look at a view or a result of captured tensors that require a gradient
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            return make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*score, *indices)
    except ModError:
        raise
    except Exception as error:
        raise _explained(error, mod, kind) from error
    finally:
        _grad_wanted[0] = before


def _explained(error: Exception, mod: Callable[..., Any], kind: str) -> ModError:
    """What tracing raised, in the user's terms."""
    line = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith((_HERE, _TORCH)) and not frame.filename.startswith("<"):
            line = f"{frame.filename}:{frame.lineno}"
    name, text = type(error).__name__, str(error)
    at = _at(line, mod)
    if (
        "DataDependent" in name
        or "GuardOnDataDependent" in name
        or "_local_scalar_dense" in text
        or "is_nonzero" in text
    ):
        return ModError(f"{at}: {ON_THE_HOST}")
    outside = re.match(
        r"(?:select\(\): )?index (-?\d+) (?:is )?out of (?:bounds|range) for (?:dimension|tensor) .*", text
    )
    if isinstance(error, IndexError) and outside:
        size = re.search(r"with size (\d+)$", text)
        axis = f"an axis of {size[1]}" if size else "its axis"
        return ModIndexError(
            f"{at}: index {outside[1]} into {axis}; read an element that is there, or capture a larger tensor"
        )
    if ".numpy()" in text:
        return ModError(f"{at}: numpy cannot be traced; write torch's function of that name")
    if isinstance(error, TypeError | ValueError) and "device" not in text:
        return ModTypeError(f"{kind}_mod {at}: {name}: {text}")
    return ModError(f"{kind}_mod {at}: {name}: {text}")


@dataclass(frozen=True)
class _Read:
    """A read in the making: the captured tensor's slot, and for each axis its index or None."""

    slot: int
    indices: tuple[Any, ...]

    def filled(self, given: list[Any]) -> _Read:
        """The read with its open axes taken by `given`, in order; None leaves one open."""
        rest = iter(given)
        return _Read(self.slot, tuple(i if i is not None else next(rest, None) for i in self.indices))

    @property
    def whole(self) -> bool:
        return None not in self.indices


class _FirstGraph:
    """The recorded graph with its captured tensors and reads found and every operation checked."""

    def __init__(
        self, traced: Any, mod: Callable[..., Any], kind: str, device: torch.device, hold_numbers: bool
    ) -> None:
        self.mod, self.kind, self.device, self.hold_numbers = mod, kind, device, hold_numbers
        self.captures: list[Tensor] = []
        self.slots: dict[int, int] = {}
        self.reads: list[tuple[Any, _Read]] = []  # (the node of the read, what it reads)
        self.fixed: dict[Any, Tensor] = {}  # get_attr nodes of single numbers on the host
        self.partial: dict[Any, _Read] = {}
        traced.graph.eliminate_dead_code()
        self.nodes = list(traced.graph.nodes)
        for node in self.nodes:
            if node.op == "get_attr":
                self._capture(node, _attribute(traced, node.target))
            elif node.op == "call_function":
                self._operation(node)
        self.out = self.nodes[-1].args[0]
        self._check_result()

    def _fail(self, node: Any, text: str, kind: type[ModError] = ModError) -> ModError:
        return kind(f"{_at(_line_of(node) or _line_of(_user(node)), self.mod)}: {text}")

    def _capture(self, node: Any, tensor: Tensor) -> None:
        if isinstance(tensor, FakeTensor):
            constant = getattr(tensor, "constant", None)
            if constant is None:
                raise self._fail(node, f"a tensor made inside the mod is used as a table; {MADE_INSIDE}")
            tensor = constant
        if tensor.dtype.is_complex:
            raise self._fail(
                _user(node), f"a captured tensor of {tensor.dtype}; kernels take bool, integers and floats"
            )
        if self.hold_numbers and tensor.dim() == 0 and tensor.device.type == "cpu" and not tensor.requires_grad:
            self.fixed[node] = tensor
            return
        if not (is_on(tensor.device, self.device) or (tensor.dim() == 0 and tensor.device.type == "cpu")):
            raise self._fail(
                _user(node),
                f"a captured tensor of shape {tuple(tensor.shape)} is on {tensor.device}, query on {self.device}: "
                f"move it with .to({str(self.device)!r}) before the mod captures it",
            )
        if id(tensor) not in self.slots:
            self.slots[id(tensor)] = len(self.captures)
            self.captures.append(tensor)
        read = _Read(self.slots[id(tensor)], (None,) * tensor.dim())
        self._note(node, read)

    def _note(self, node: Any, read: _Read) -> None:
        if read.whole:
            shape = tuple(self.captures[read.slot].shape)
            if 0 in shape and self.kind == "mask":  # scores may have no queries or no keys, and then read nothing
                raise self._fail(node, without_elements(shape), ModIndexError)
            self.reads.append((node, read))
        else:
            self.partial[node] = read

    def _operation(self, node: Any) -> None:
        target = node.target
        if target is aten.index.Tensor and node.args[0] in self.partial:
            self._note(node, self.partial[node.args[0]].filled(list(node.args[1])))
            return
        if target is aten.select.int and node.args[0] in self.partial:
            read = self.partial[node.args[0]]
            axes = [i for i, index in enumerate(read.indices) if index is None]
            indices = list(read.indices)
            indices[axes[node.args[1]]] = int(node.args[2])
            self._note(node, _Read(read.slot, tuple(indices)))
            return
        schema = getattr(target, "_schema", None)
        if schema is not None and schema.is_mutable and node.args and node.args[0] in self.partial:
            raise self._fail(node, f"{_op_name(target)} changes a captured tensor in place; a mod only reads")
        if target is operator.getitem:
            return
        if target is aten._local_scalar_dense.default:
            raise self._fail(node, ON_THE_HOST)
        for argument in node.all_input_nodes:
            if argument in self.partial:
                if _op_name(target).startswith("lift_fresh"):  # what torch does with new tensors
                    raise self._fail(node, f"a tensor made inside the mod is used as a table; {MADE_INSIDE}")
                raise self._fail(
                    node,
                    f"{_called(node)} is not pointwise: it takes a whole captured tensor, or a row of one, of shape "
                    f"{tuple(argument.meta['val'].shape) if 'val' in argument.meta else '?'}; read one element as "
                    "table[i, j], or compute the result before and capture that",
                )
        values = node.meta.get("val")
        if isinstance(values, Tensor) and values.dim():
            remedy = (
                "a mod works on single numbers: combine them by pairs, as in torch.maximum(a, b)"
                if node.all_input_nodes
                else MADE_INSIDE
            )
            raise self._fail(node, f"{_called(node)} makes a tensor of shape {tuple(values.shape)}; {remedy}")
        if isinstance(values, Tensor) and values.dtype.is_complex:
            raise self._fail(node, f"{_called(node)} gives {values.dtype}; kernels take bool, integers and floats")
        if not is_supported(target):
            alike = [other.target for other in self.nodes if _called(other) == _called(node)]
            random = any(torch.Tag.nondeterministic_seeded in getattr(other, "tags", ()) for other in alike)
            raise self._fail(node, without_kernel(_called(node), random, _is_of_many(target)))
        given = [self.dtype_of(x) for x in node.all_input_nodes] if is_bitwise(target) else []
        floats = [dtype for dtype in given if dtype.is_floating_point]
        if floats:
            raise self._fail(
                node,
                f"{_called(node)} of {floats[0]}; it is of the bits of integers and bools: convert with "
                ".int(), or compare first",
            )

    def dtype_of(self, node: Any) -> torch.dtype:
        """The type of a node's value."""
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return value.dtype
        if node in self.fixed:
            return self.fixed[node].dtype
        return next((self.captures[read.slot].dtype for other, read in self.reads if other is node), torch.bool)

    def _check_result(self) -> None:
        value = self.out.meta.get("val") if hasattr(self.out, "meta") else None
        if self.out in self.partial:
            raise ModTypeError(
                f"{self.kind}_mod {name_of(self.mod)} must return one number; it returned a whole tensor"
            )
        dtype = value.dtype if value is not None else self.captures[self.reads[-1][1].slot].dtype
        if self.kind == "mask" and dtype != torch.bool:
            raise ModTypeError(
                f"mask_mod {name_of(self.mod)} must return a bool tensor; it returned {dtype}: compare, as in x != 0"
            )
        if self.kind == "score" and not dtype.is_floating_point:
            raise ModTypeError(
                f"score_mod {name_of(self.mod)} must return a float tensor, the modified score; it returned {dtype}"
            )


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _line_of(node: Any) -> str:
    line = node.meta.get("stack_trace") or ""
    return line if "\n" not in line else ""  # a whole stack is that of a trace around this one


def _user(node: Any) -> Any:
    return next(iter(node.users), node)


def _op_name(target: Any) -> str:
    return getattr(target, "__name__", str(target)).split(".")[0].removeprefix("_")


def _called(node: Any) -> str:
    """The operation of a node, by the name that the user calls it by."""
    return (node.meta.get("torch_fn") or "").strip("_") or _op_name(node.target)


def _is_of_many(target: Any) -> bool:
    """Whether an operation takes an axis, or all elements."""
    schema = getattr(target, "_schema", None)
    takes = {argument.name for argument in schema.arguments} if schema is not None else set()
    return not takes.isdisjoint({"dim", "dims", "mat2", "correction"}) or _op_name(target) in _OF_ALL


# Second pass


def _second_pass(first: _FirstGraph, mod: Callable[..., Any], kind: str) -> tuple[Program, dict[int, Tensor]]:
    reads = first.reads
    wanted = [
        i for i, (_, read) in enumerate(reads)
        if kind == "score" and first.captures[read.slot].requires_grad
    ]  # fmt: skip
    examples = [torch.zeros((), dtype=kernel_dtype(first.captures[read.slot].dtype)) for _, read in reads]
    numbers = [torch.zeros((), dtype=kernel_dtype(tensor.dtype)) for tensor in first.fixed.values()]
    inputs = [torch.zeros((), dtype=torch.float32) for _ in range(2 if kind == "score" else 0)]
    inputs += [torch.zeros((), dtype=torch.int32) for _ in INDICES]
    flat_indices = [index for _, read in reads for index in read.indices]

    def replay(score: Tensor | None, indices: Any, values: Any, fixed: Any) -> tuple[Tensor, list[Tensor]]:
        env: dict[Any, Any] = {}
        heads = iter([*([score] if score is not None else []), *indices])
        read_values = {node: value for (node, _), value in zip(reads, values, strict=True)}
        fixed_values = dict(zip(first.fixed, fixed, strict=True))
        for node in first.nodes[:-1]:
            if node.op == "placeholder":
                env[node] = next(heads)
            elif node in read_values:
                env[node] = read_values[node]
            elif node in fixed_values:
                env[node] = fixed_values[node]
            elif node.op == "call_function" and node not in first.partial:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
                with _noting(_line_of(node), node.meta.get("torch_fn") or ""):
                    env[node] = _call(node.target, args, kwargs)
        where = [env[index] if isinstance(index, torch.fx.Node) else None for index in flat_indices]
        return env[first.out], [x for x in where if x is not None]

    def joint(*arguments: Tensor) -> Any:
        given = list(arguments)
        if kind == "mask":
            indices, rest = given[:4], given[4:]
            return replay(None, indices, rest[: len(reads)], rest[len(reads) :])
        score, grad, *indices = given[:6]
        values, fixed = given[6 : 6 + len(reads)], given[6 + len(reads) :]

        def forward(score: Tensor, *chosen: Tensor) -> tuple[Tensor, list[Tensor]]:
            mine = list(values)
            for i, value in zip(wanted, chosen, strict=True):
                mine[i] = value
            out, where = replay(score, indices, mine, fixed)
            return out.to(torch.float32).clone(), where

        out, vjp, where = torch.func.vjp(  # type: ignore[misc]  # three results with has_aux
            forward, score, *[values[i] for i in wanted], has_aux=True
        )
        return (out, where, *vjp(grad))

    try:
        with torch.autograd.set_detect_anomaly(False, torch.is_anomaly_check_nan_enabled()), torch.enable_grad():
            graph = make_fx(joint, tracing_mode="fake", decomposition_table=decompositions())(
                *inputs, *examples, *numbers
            )
    except ModError:
        raise
    except Exception as error:
        missing = re.findall(r"^derivative for aten::_*(\w+) is not implemented", str(error))
        for node in first.nodes:
            if node.op == "call_function" and _op_name(node.target) in missing:
                raise ModError(f"{_at(_line_of(node), mod)}: {without_derivative(_called(node))}") from error
        raise ModError(
            f"{kind}_mod {name_of(mod)} could not be differentiated: {type(error).__name__}: {error}"
        ) from error
    graph.graph.eliminate_dead_code()
    return _program(graph, first, wanted, kind, mod)


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    if target in (aten.detach.default, aten.detach_.default):
        # an operation of its own: autograd's rules are full of plain detach, which means nothing here
        return aten.detach_copy.default(args[0].detach())
    name = _op_name(target)
    if name in IDENTITIES and not kwargs.get("dtype"):
        return args[0]
    kwargs = {
        key: value for key, value in kwargs.items() if key not in ("device", "layout", "pin_memory", "memory_format")
    }
    if isinstance(kwargs.get("dtype"), torch.dtype):
        kwargs["dtype"] = kernel_dtype(kwargs["dtype"])
    args = [kernel_dtype(arg) if isinstance(arg, torch.dtype) else arg for arg in args]
    target, args, more = differentiable(target, args)
    kwargs.update(more)
    schema = getattr(target, "_schema", None)
    if schema is not None and schema.is_mutable:
        # the trace rebinds the name; out of place is the same function of the values
        packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"))
        return packet(*args, **kwargs)
    return target(*args, **kwargs)


def _program(
    graph: Any, first: _FirstGraph, wanted: list[int], kind: str, mod: Callable[..., Any]
) -> tuple[Program, dict[int, Tensor]]:
    builder = Builder()
    held: dict[int, Tensor] = {}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    names = (["score", "grad"] if kind == "score" else []) + list(INDICES)
    env: dict[Any, Node] = {}
    for node, name in zip(placeholders, names, strict=False):
        env[node] = builder.make("input", (), torch.float32 if name in ("score", "grad") else torch.int32, name)
    rest = placeholders[len(names) :]
    for node, tensor in zip(rest[len(first.reads) :], first.fixed.values(), strict=True):
        number = tensor.item()
        dtype = kernel_dtype(tensor.dtype)
        held[len(builder.scalars)] = tensor
        env[node] = builder.cast(builder.scalar(number, torch.int64 if dtype == torch.bool else dtype), dtype)

    mark_exact(graph.graph)
    output = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    where_nodes = list(output[1])
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    # reads become nodes as soon as their indices are; operations between come in the graph's order
    pending = list(zip(first.reads, rest[: len(first.reads)], strict=True))
    cursor = 0
    addresses: list[tuple[Node, ...]] = []
    for (_read_node, read), placeholder in pending:
        indices = []
        for index in read.indices:
            if not isinstance(index, torch.fx.Node):
                indices.append(
                    builder.constant(index, torch.int32) if index >= 0 else builder.scalar(index, torch.int32)
                )
                continue
            source = where_nodes[cursor]
            cursor += 1
            _convert_until(source, env, graph, builder, position, first)
            indices.append(env[source])
        layout = Layout.of(first.captures[read.slot])
        dtype = kernel_dtype(layout.dtype)
        addresses.append(tuple(indices))
        env[placeholder] = builder.make("read", indices, dtype, read.slot, _line_of(_read_node))
    for root in [output[0], *output[2:]] if kind == "score" else [output[0]]:
        _convert_until(root, env, graph, builder, position, first)
    gradients = []
    for i, value in zip(wanted, output[3:], strict=True):
        node = env[value] if isinstance(value, torch.fx.Node) else None
        if node is not None and not (node.op == "constant" and node.value == 0):
            gradients.append(CapturedGradient(first.reads[i][1].slot, addresses[i], node))
    program = Program(
        kind=kind,
        name=name_of(mod),
        out=env[output[0]],
        grad_score=env[output[2]] if kind == "score" else None,
        gradients=tuple(gradients),
        layouts=tuple(Layout.of(tensor) for tensor in first.captures),
        scalars=tuple(builder.scalars),
    )
    return program, held


def _convert_until(
    target: Any, env: dict[Any, Node], graph: Any, builder: Builder, position: Any, first: _FirstGraph
) -> None:
    """Convert what `target` needs, in the graph's order; everything it needs comes before it there."""
    if target in env:
        return
    needed: set[Any] = set()
    stack = [target]
    while stack:
        node = stack.pop()
        if node not in env and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in sorted(needed, key=position.__getitem__):
        if node.op == "get_attr":
            tensor = _attribute(graph, node.target)
            if isinstance(tensor, FakeTensor):
                tensor = tensor.constant
                assert tensor is not None  # a number that the trace made
            env[node] = builder.constant(tensor.item(), kernel_dtype(tensor.dtype))
        else:
            try:
                env[node] = to_nodes(node, env, builder, _line_of(node))
            except NotImplementedError as error:
                cause = _differentiated(node.target, first) if not _line_of(node) else None
                text = str(error) if cause is None else without_derivative(_called(cause))
                raise ModError(f"{_at(_line_of(cause or node), first.mod)}: {text}") from error


def _differentiated(target: Any, first: _FirstGraph) -> Any:
    """The user's operation whose derivative calls `target`; None when there is none."""
    for node in first.nodes:
        if node.op == "call_function" and node not in first.partial:
            try:
                if target in _called_by_derivative(node, first):
                    return node
            except Exception:  # it is not this one's derivative that failed
                continue
    return None


def _called_by_derivative(node: Any, first: _FirstGraph) -> set[Any]:
    given = node.all_input_nodes
    floats = [x for x in given if first.dtype_of(x).is_floating_point]

    def derivative(*numbers: Tensor) -> Any:
        env = dict(zip(given, numbers, strict=True))

        def forward(*chosen: Tensor) -> Tensor:
            mine = {**env, **dict(zip(floats, chosen, strict=True))}
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), mine.__getitem__)
            result: Tensor = _call(node.target, args, kwargs)
            return result

        out, vjp = torch.func.vjp(forward, *[env[x] for x in floats])  # type: ignore[misc]  # as above
        return vjp(torch.ones_like(out))

    examples = [torch.zeros((), dtype=kernel_dtype(first.dtype_of(x))) for x in given]
    with torch.enable_grad():
        graph = make_fx(derivative, tracing_mode="fake", decomposition_table=decompositions())(*examples)
    return {other.target for other in graph.graph.nodes}
