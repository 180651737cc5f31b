"""Attention with mods inside `torch.compile`: dynamo traces the user's functions, and our tracer what dynamo recorded.

Dynamo cannot run our tracer, but it can record a function into a subgraph and lift what it captures, parameters with
gradients among them, to arguments. `_ModAttention` is the operator that it does this for. When AOTAutograd then
runs the operator, the subgraph is cut in two: what depends on no index runs outside, as part of the model (so that
autograd sees it), and the rest becomes a program of `packflex.mods`, as an eager mod would. What remains in the
compiled graph is one `packflex::mod_attention`.

Of torch's internals this takes `BaseHOP`, its variable in dynamo, and the mode with which torch's own flex_attention
records reads at traced indices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import DispatchKey
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._dynamo.variables.higher_order_ops import BaseHOPVariable, _hop_name_to_variable_class
from torch._higher_order_ops.base_hop import BaseHOP
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from packflex.attention.memory import new_bshd
from packflex.attention.mods.ops import mod_attention
from packflex.mods.errors import ModError
from packflex.mods.lifted import intern
from packflex.mods.trace import at_line, trace

_USER_LINE = re.compile(r'File "([^"]+)", line (\d+)')


@torch.library.custom_op("packflex::mod_attention_call", mutates_args=())
def mod_attention_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_blocks: Sequence[Tensor],
    q_blocks: Sequence[Tensor],
    sinks: Tensor | None,
    inputs: Sequence[Tensor],
    score: Tensor | None,
    mask: Tensor | None,
    mask_tile: Sequence[int],
    ragged: bool,
    scale: float,
    softcap: float,
    tiles: Sequence[int],
    long_spans: bool,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The attention in a recorded subgraph, where `score` and `mask` are the mods' results on `inputs`; never runs."""
    raise AssertionError("a recorded attention is replaced before it runs")


@mod_attention_call.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, kv_blocks: Any, q_blocks: Any, sinks: Any, inputs: Any, score: Any, mask: Any,
    mask_tile: Any, ragged: bool, scale: float, softcap: float, tiles: Any, long_spans: bool, deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return new_bshd(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


class _ModAttention(BaseHOP):
    """Runs a recorded subgraph that ends in one `mod_attention_call`."""

    def __init__(self) -> None:
        super().__init__("packflex_mod_attention")

    def py_autograd_impl(self, fn: Any) -> Any:
        # with gradients or without, what runs is `mod_attention`, which has its own derivative: nothing lies below
        self.py_impl(DispatchKey.Autograd)(fn)
        return fn

    def _call_Autograd(  # noqa: N802  # BaseHOP's names
        self, subgraph: fx.GraphModule, *operands: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return _run(subgraph, operands)

    def _call_CompositeExplicitAutograd(  # noqa: N802
        self, subgraph: Any, *operands: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return _run(subgraph, operands)  # inference mode, where no autograd key is set


class _ModAttentionVariable(BaseHOPVariable):
    supports_aliasing = True  # q, k and v may be parts of one projection

    def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        with TransformGetItemToIndex():  # dynamo's fake tensors then read a table at a traced index
            return super()._call_function(tx, args, kwargs)


_mod_attention = _ModAttention()
_hop_name_to_variable_class["packflex_mod_attention"] = _ModAttentionVariable


def compiled_attention_with_mods(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_blocks: list[Tensor],
    q_blocks: list[Tensor],
    mask_mod: Callable[..., Any] | None,
    score_mod: Callable[..., Any] | None,
    sinks: Tensor | None,
    mask_tile: tuple[int, int],
    ragged: bool,
    scale: float,
    softcap: float,
    tiles: list[int],
    long_spans: bool,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out and lse; arguments as those of `mod_attention`, with the user's functions in place of programs."""

    def recorded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        score = torch.empty((), dtype=torch.float32, device=q.device)
        b, h, q_idx, kv_idx = [torch.empty((), dtype=torch.int32, device=q.device) for _ in range(4)]
        modified = None if score_mod is None else _as_tensor(score_mod(score, b, h, q_idx, kv_idx), score)
        seen = None if mask_mod is None else _as_tensor(mask_mod(b, h, q_idx, kv_idx), score)
        return torch.ops.packflex.mod_attention_call(
            q, k, v, kv_blocks, q_blocks, sinks, [score, b, h, q_idx, kv_idx], modified, seen, list(mask_tile), ragged,
            scale, softcap, tiles, long_spans, deterministic, backend,
        )  # fmt: skip

    out, lse = _mod_attention(recorded, q, k, v)
    return out, lse


def _as_tensor(result: Any, like: Tensor) -> Tensor:
    if isinstance(result, Tensor):
        return result
    dtype = torch.bool if isinstance(result, bool) else torch.float32
    return torch.full((), result, dtype=dtype, device=like.device)


def _run(subgraph: fx.GraphModule, operands: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    recorded = _Recorded(subgraph, operands)
    q, k, v, kv_blocks, q_blocks, sinks, _, score, mask, *options = recorded.call
    q, k, v, kv_blocks, q_blocks, sinks = recorded.values((q, k, v, kv_blocks, q_blocks, sinks))
    mask_tile, ragged, *rest = recorded.values(tuple(options))
    captures: list[Tensor] = []
    ints: list[int] = []
    floats: list[float] = []
    keys = []
    for kind, result in (("mask", mask), ("score", score)):
        if result is None:
            keys.append("")
            continue
        key, mine, numbers, roles = recorded.program(kind, result, q.device)
        keys.append(key)
        captures += mine
        for number, role in zip(numbers, roles, strict=True):
            (floats if role == "float" else ints).append(number)  # type: ignore[arg-type]
    out, lse = mod_attention(
        q, k, v, kv_blocks, q_blocks, captures, sinks, ints, floats, keys[1], keys[0], mask_tile, ragged, *rest
    )
    return out, lse


class _Recorded:
    """A recorded subgraph with its operands: runs what depends on no index, and makes programs of what does."""

    def __init__(self, subgraph: fx.GraphModule, operands: tuple[Any, ...]) -> None:
        self.module = subgraph
        nodes = list(subgraph.graph.nodes)
        target = torch.ops.packflex.mod_attention_call
        (self.end,) = [node for node in nodes if node.target in (target, target.default)]
        self.call = self.end.args
        self.inputs = list(self.end.args[6])
        self.inner = set(self.inputs)  # what varies with an index or the score
        for node in nodes:
            if any(arg in self.inner for arg in node.all_input_nodes):
                self.inner.add(node)
        self.outer: dict[fx.Node, Any] = {}
        for node, operand in zip((n for n in nodes if n.op == "placeholder"), operands, strict=True):
            self.outer[node] = operand

    def values(self, arguments: Any) -> Any:
        """The values of nodes that vary with no index, in any nesting."""
        return fx.node.map_arg(arguments, self._value)

    def _value(self, node: fx.Node) -> Any:
        if node not in self.outer:
            self.outer[node] = self._execute(node, self._value)
        return self.outer[node]

    def _execute(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        if node.op == "get_attr":
            found: Any = self.module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert node.op == "call_function"
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def program(
        self, kind: str, result: fx.Node, device: torch.device
    ) -> tuple[str, list[Tensor], list[float | int], list[str]]:
        """A mod's program by its key, its captured tensors, its numbers and their roles."""
        inner, crossing = self._needed(result)
        actual: dict[fx.Node, Tensor] = {}
        for node in crossing:
            value = self._value(node)
            if isinstance(value, Tensor):
                actual[node] = _placed(value, device, kind)
            elif isinstance(value, torch.SymInt):  # a number that changes between calls
                actual[node] = torch.scalar_tensor(value, dtype=torch.int64, device=device)  # type: ignore[arg-type]
            elif isinstance(value, torch.SymFloat):
                # by a product: torch makes tensors of the floats in arithmetic, and constants of all others
                actual[node] = torch.ones((), dtype=torch.float32, device=device) * value  # type: ignore[operator]
        with _disable_current_modes(), torch._guards.tracing(None):  # a trace of its own inside AOTAutograd's
            stand_ins = {node: _stand_in(tensor) for node, tensor in actual.items()}
            inputs = self.inputs if kind == "score" else self.inputs[1:]

            def mod(*arguments: Tensor) -> Any:
                known: dict[fx.Node, Any] = {**stand_ins, **dict(zip(inputs, arguments, strict=True))}
                for node in inner:
                    with at_line(_line(node)):
                        known[node] = self._execute(node, lambda n: known[n] if n in known else self._value(n))
                return known[result] if result in known else stand_ins[result]

            mod.packflex_name = _name(kind, inner)  # type: ignore[attr-defined]
            traced = trace(mod, kind, torch.device("cpu"), hold_numbers=False)
        found = {id(stand_ins[node]): tensor for node, tensor in actual.items()}
        for entry in traced.tape:  # views of captured tensors, such as table[0] in table[0, h]
            args, kwargs = torch.utils._pytree.tree_map(
                lambda x, found=found: found.get(id(x), x), (entry.args, entry.kwargs)
            )
            made = tree_leaves(entry.function(*args, **kwargs))
            found |= {id(leaf): x for leaf, x in zip(tree_leaves(entry.result), made, strict=True)}
        captures = [_contiguous_if_learned(found[id(x)]) for x in traced.captures]
        scalars = traced.program.scalars
        key = intern(traced.program)
        return key, captures, [scalar.argument() for scalar in scalars], [scalar.role for scalar in scalars]

    def _needed(self, result: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """The inner nodes that a result needs, in order, and the outer ones that they read."""
        needed: set[fx.Node] = set()
        stack = [result]
        while stack:
            node = stack.pop()
            if node in needed or node in self.inputs:
                continue
            needed.add(node)
            if node in self.inner:
                stack.extend(node.all_input_nodes)
        order = [node for node in self.module.graph.nodes if node in needed]
        return [n for n in order if n in self.inner], [n for n in order if n not in self.inner]


def _placed(tensor: Tensor, device: torch.device, kind: str) -> Tensor:
    if kind == "mask":  # true or false, and without a gradient
        tensor = tensor.detach()
    if tensor.device == device:
        return _contiguous_if_learned(tensor)
    if tensor.dim() == 0 and tensor.device.type == "cpu":
        return tensor.to(device)
    raise ModError(
        f"{kind}_mod: a captured tensor of shape {tuple(tensor.shape)} is on {tensor.device}, query on {device}: move "
        f"it with .to({str(device)!r}) before the mod captures it"
    )


def _contiguous_if_learned(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.requires_grad else tensor


def _stand_in(tensor: Tensor) -> Tensor:
    """A real tensor on the host of the same kind, whose memory is never touched."""
    sizes, strides = ([int(n) for n in numbers] for numbers in (tensor.shape, tensor.stride()))
    learned = tensor.requires_grad and tensor.is_floating_point()
    return torch.empty_strided(sizes, strides, dtype=tensor.dtype, device="cpu").requires_grad_(learned)


def _name(kind: str, inner: list[fx.Node]) -> str:
    lines = [line for node in reversed(inner) if (line := _line(node))]
    return f"{kind}_mod in torch.compile" + (f" ({lines[0]})" if lines else "")


def _line(node: fx.Node) -> str:
    """The innermost line of the user's that a node comes from, as `file:number`."""
    found = _USER_LINE.findall(node.meta.get("stack_trace") or "")
    return ":".join(found[-1]) if found else ""
