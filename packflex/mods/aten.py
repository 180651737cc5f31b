"""aten's pointwise operations as nodes, with torch's type promotion."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes

from packflex.mods.nodes import Builder, Node

aten = torch.ops.aten
BOOL, FLOAT = torch.bool, torch.float32
_DEFAULT = ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT

# What changes neither value nor type
IDENTITIES = {
    "clone", "alias", "detach", "view", "_unsafe_view", "expand", "reshape", "lift_fresh_copy", "lift_fresh", "lift",
    "squeeze", "contiguous", "view_of",
}  # fmt: skip
_FLOAT_UNARY = {
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "sin", "cos", "tan", "asin", "acos",
    "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "sigmoid", "erf", "erfc", "reciprocal", "lgamma",
    "digamma",
}  # fmt: skip
_ROUNDING = {"floor", "ceil", "round", "trunc"}
_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge"}
_LOGICAL = {"logical_and": "and", "logical_or": "or", "logical_xor": "xor"}
_BITWISE = {
    "bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor", "__and__": "and", "__or__": "or", "__xor__": "xor",
    "bitwise_left_shift": "shl", "__lshift__": "shl", "bitwise_right_shift": "shr", "__rshift__": "shr",
}  # fmt: skip
_FLOAT_BINARY = {"atan2", "hypot", "copysign"}
_FILLS = {
    "full",
    "full_like",
    "zeros_like",
    "ones_like",
    "zeros",
    "ones",
    "scalar_tensor",
    "new_zeros",
    "new_ones",
    "new_full",
}
_OTHER = {
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "neg", "abs", "sign", "sgn",
    "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "where", "pow", "logical_not", "bitwise_not", "isnan",
    "isinf", "_to_copy", "convert_element_type", "relu", "square", "fill",
}  # fmt: skip
_KEPT = (
    IDENTITIES | _FLOAT_UNARY | _ROUNDING | _COMPARE | set(_LOGICAL) | set(_BITWISE) | _FLOAT_BINARY | _FILLS | _OTHER
)
# Pointwise functions that torch decomposes, and that not every version of it marks as pointwise
_UNMARKED = {
    "log_sigmoid_forward", "leaky_relu", "elu", "celu", "selu", "mish", "hardswish", "hardsigmoid", "hardtanh", "relu6",
    "prelu", "softshrink", "hardshrink", "threshold", "gelu", "silu", "softplus",
}  # fmt: skip
# pow with these exponents is a few multiplications, and part of the kernel's text
SMALL_POWERS = {-3: "", -2: "", -1: "", 0: "", 1: "", 2: "", 3: "", 4: "", 0.5: "sqrt", -0.5: "rsqrt"}


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a value has inside a kernel: float32 for all floats."""
    return FLOAT if dtype.is_floating_point else dtype


def _base(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return (schema.name if schema is not None else getattr(target, "__name__", str(target))).split("::")[-1]


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's decompositions into what `to_nodes` knows; what it knows is left whole."""
    table = {op: rule for op, rule in decomposition_table.items() if _base(op) not in _KEPT}

    def log_sigmoid_forward(x: Any) -> tuple[Any, Any]:
        buffer = torch.exp(-torch.abs(x))  # what the derivative's rule takes it for off CUDA
        return torch.clamp_max(x, 0) - torch.log1p(buffer), buffer

    def shrink_backward(grad: Any, x: Any, limit: float) -> Any:
        return torch.where((x >= -limit) & (x <= limit), 0.0, grad)

    table[aten.log_sigmoid_forward.default] = log_sigmoid_forward  # torch's makes a buffer of another shape on CUDA
    table[aten.hardshrink_backward.default] = shrink_backward
    table[aten.softshrink_backward.default] = shrink_backward
    return table


def differentiable(target: Any, args: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The call itself, or one of the same value that has the derivative which aten does not give it.

    A floor division has none, as in torch.div; of a step its value at 0 alone has one.
    """
    name = _base(target).removesuffix("_")
    if name in ("floor_divide", "remainder") and any(map(_is_float, args)):
        x, y = args
        if not isinstance(x, torch.Tensor):
            x = torch.full((), x, dtype=FLOAT, device=y.device)
        return (aten.remainder, (x, y), {}) if name == "remainder" else (aten.div, (x, y), {"rounding_mode": "floor"})
    if name == "heaviside":
        x, at_zero = args
        return aten.where.self, (x == 0, at_zero, (x > 0).to(x.dtype)), {}
    return target, args, {}


def is_bitwise(target: Any) -> bool:
    """Whether an operation is of the bits of integers and bools."""
    return _base(target).removesuffix("_") in {*_BITWISE, "bitwise_not"}


def _is_float(x: Any) -> bool:
    return x.is_floating_point() if isinstance(x, torch.Tensor) else isinstance(x, float)


@cache
def is_supported(target: Any) -> bool:
    """Whether an operation is pointwise and can be written in nodes, itself or decomposed."""
    name = _base(target)
    known = _KEPT | _UNMARKED
    return name in known or name.removesuffix("_") in known or torch.Tag.pointwise in getattr(target, "tags", ())


def mark_exact(graph: Any) -> None:
    """Mark the calls of an FX graph whose results reach a rounding, a comparison or a cast to integers.

    There a quotient that is off by its last bit changes the result by one.
    """
    for node in reversed(graph.nodes):
        node.meta["exact"] = any(user.meta["exact"] or _makes_steps(user) for user in node.users)


def _makes_steps(node: Any) -> bool:
    if node.op != "call_function":
        return False
    name = _base(node.target)
    if name in ("_to_copy", "convert_element_type", "where"):
        return not node.meta["val"].dtype.is_floating_point
    steps = _ROUNDING | _COMPARE | {"floor_divide", "remainder", "fmod"}
    return name in steps or bool(name == "div" and node.kwargs.get("rounding_mode"))


def to_nodes(node: Any, env: dict[Any, Node], builder: Builder, where: str) -> Node:
    """The node of an FX call whose arguments are in `env`; its graph has been through `mark_exact`."""
    name = _base(node.target)
    value = node.meta["val"]
    dtype = kernel_dtype(value.dtype)
    arguments, options = list(node.args), dict(node.kwargs)

    def make(op: str, *args: Node, of: torch.dtype = dtype) -> Node:
        return builder.make(op, args, of, where=where)

    def given(x: Any, of: torch.dtype) -> Node:
        """An argument in type `of`: a node cast, or the user's number as a scalar of the launch."""
        if isinstance(x, torch.fx.Node):
            return builder.cast(env[x], of)
        if isinstance(x, bool) or of == BOOL:
            return builder.constant(x, of)
        if isinstance(x, float) and (x != x or x in (float("inf"), float("-inf"))):
            return builder.constant(x, of)
        return builder.scalar(x, of)

    def common(*xs: Any, kind: Any = _DEFAULT) -> torch.dtype:
        values = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in xs]
        return kernel_dtype(elementwise_dtypes(*values, type_promotion_kind=kind)[0])

    def rounded(op: str, x: Node) -> str:
        """div or sqrt of x, in its exact form where that matters: not of scores, which no two kernels round alike."""
        return f"{op}_exact" if node.meta["exact"] and not {"score", "grad"} & x.deps else op

    def same(op: str, *xs: Any) -> Node:
        of = common(*xs)
        return builder.cast(make(op, *(given(x, of) for x in xs), of=of), dtype)

    if name in IDENTITIES:
        return builder.cast(env[arguments[0]], dtype)
    if name == "detach_copy":
        return make("detach", builder.cast(env[arguments[0]], dtype))
    if name == "copy_":  # torch's rules write into a tensor that they have just made; what follows reads the result
        return builder.cast(env[arguments[1]], dtype)
    if name in ("empty_permuted", "empty_strided", "empty_like", "empty"):
        return builder.constant(0, dtype)  # filled next
    if name == "_efficientzerotensor":
        return builder.constant(0, dtype)
    if name in _FILLS:
        return _fill(name, arguments, options, builder, dtype, env)
    if name in ("_to_copy", "convert_element_type"):
        return builder.cast(env[arguments[0]], dtype)
    if name == "fill":
        return given(arguments[1], dtype)
    if name in _FLOAT_UNARY:
        x = given(arguments[0], FLOAT)
        if name == "log1p" and _is_whole(x):  # 1 + x is exact then, and log much faster than log1p
            return make("log", make("add", x, builder.constant(1, FLOAT)))
        if name == "reciprocal":
            return make(rounded("div", x), builder.constant(1, FLOAT), x)
        return make(rounded("sqrt", x) if name == "sqrt" else name, x)
    if name in _ROUNDING:
        x = env[arguments[0]]
        if name == "round" and (arguments[1:] or options.get("decimals")):
            raise NotImplementedError("round(decimals=n) has no kernel form; write torch.round(x * 10**n) / 10**n")
        return make(name, x) if x.is_float else x
    if name in _COMPARE:
        of = common(*arguments[:2])
        return make(name, given(arguments[0], of), given(arguments[1], of))
    if name in _LOGICAL:
        return make(_LOGICAL[name], *(_truth(env[x], builder) for x in arguments[:2]))
    if name == "logical_not":
        return make("not", _truth(env[arguments[0]], builder))
    if name in _BITWISE:
        return same(_BITWISE[name], *arguments[:2])
    if name == "bitwise_not":
        return make("not", env[arguments[0]])
    if name in _FLOAT_BINARY:
        return make(name, *(given(x, FLOAT) for x in arguments[:2]))
    if name in ("add", "sub", "rsub"):
        first, second = arguments[:2] if name != "rsub" else (arguments[1], arguments[0])
        alpha = options.get("alpha", arguments[2] if len(arguments) > 2 else 1)
        of = common(first, second)
        if of == BOOL:
            return make("or", given(first, BOOL), given(second, BOOL))
        left, right = given(first, of), given(second, of)
        if alpha != 1:
            right = builder.make("mul", (right, builder.scalar(alpha, of)), of, where=where)
        return builder.cast(_plain(builder, "add" if name == "add" else "sub", left, right, of, where), dtype)
    if name == "mul":
        of = common(*arguments[:2])
        left, right = given(arguments[0], of), given(arguments[1], of)
        return (
            make("and", left, right)
            if of == BOOL
            else builder.cast(_plain(builder, "mul", left, right, of, where), dtype)
        )
    if name in ("div", "true_divide", "floor_divide"):
        mode = "floor" if name == "floor_divide" else options.get("rounding_mode")
        return _divided(mode, arguments, common, given, make, rounded, builder, dtype, where)
    if name in ("remainder", "fmod"):
        of = common(*arguments[:2])
        if name == "remainder" and not of.is_floating_point and (by := _by_a_number(arguments, given, of)) is not None:
            x, divisor = by
            quotient = _quotient(x, divisor, builder, of, where)
            return make("sub", x, make("mul", quotient, builder.scalar(divisor, of)))
        return builder.cast(make(name, given(arguments[0], of), given(arguments[1], of), of=of), dtype)
    if name in ("maximum", "minimum"):
        return same("max" if name == "maximum" else "min", *arguments[:2])
    if name in ("clamp", "clamp_min", "clamp_max"):
        low = options.get("min", arguments[1] if len(arguments) > 1 and name != "clamp_max" else None)
        high = options.get("max", arguments[2] if len(arguments) > 2 else arguments[1] if name == "clamp_max" else None)
        x = given(arguments[0], dtype)
        if low is not None:
            x = make("max", x, given(low, dtype))
        return x if high is None else make("min", x, given(high, dtype))
    if name == "relu":
        return make("max", env[arguments[0]], builder.constant(0, dtype))
    if name == "square":
        return make("mul", env[arguments[0]], env[arguments[0]])
    if name == "where":
        return make("where", _truth(env[arguments[0]], builder), given(arguments[1], dtype), given(arguments[2], dtype))
    if name == "pow":
        return _power(arguments, given, make, builder, dtype, common)
    if name in ("neg", "abs", "sign", "sgn"):
        return make("sign" if name == "sgn" else name, env[arguments[0]])
    if name in ("isnan", "isinf"):
        return make(name, given(arguments[0], FLOAT))
    raise NotImplementedError(f"{name} has no kernel form: write it with the operations that docs/masks.md lists")


def _fill(name: str, arguments: list[Any], options: Any, builder: Builder, dtype: torch.dtype, env: Any) -> Node:
    if name in ("full", "full_like", "new_full", "scalar_tensor"):
        at = 0 if name == "scalar_tensor" else 2 if name == "new_full" else 1
        number = options.get("fill_value", arguments[at] if len(arguments) > at else None)
        if isinstance(number, torch.fx.Node):
            return builder.cast(env[number], dtype)
        if (
            isinstance(number, bool)
            or number in (0, 1)
            or dtype == BOOL
            or number != number
            or abs(number) == float("inf")
        ):
            return builder.constant(number, dtype)
        return builder.scalar(number, dtype)
    return builder.constant(1 if "ones" in name else 0, dtype)


def _is_whole(node: Node) -> bool:
    """Whether a float is a whole number by its form."""
    if node.op == "cast":
        return not node.args[0].is_float
    return node.op in ("abs", "neg", "sub") and all(map(_is_whole, node.args))


def _truth(node: Node, builder: Builder) -> Node:
    return node if node.dtype == BOOL else builder.make("ne", (node, builder.constant(0, node.dtype)), BOOL)


def _plain(builder: Builder, op: str, left: Node, right: Node, of: torch.dtype, where: str) -> Node:
    """add, sub or mul without what a constant 0 or 1 of the derivative adds."""
    if right.op == "constant" and right.value == (1 if op == "mul" else 0):
        return left
    if op != "sub" and left.op == "constant" and left.value == (1 if op == "mul" else 0):
        return right
    return builder.make(op, (left, right), of, where=where)


def _by_a_number(arguments: list[Any], given: Any, of: torch.dtype) -> tuple[Node, int] | None:
    """(x, divisor) when an int32 is divided by a positive Python integer."""
    x, divisor = arguments[:2]
    if of != torch.int32 or not isinstance(x, torch.fx.Node) or type(divisor) is not int or not 0 < divisor < 2**31:
        return None
    return given(x, of), divisor


def _quotient(x: Node, divisor: int, builder: Builder, of: torch.dtype, where: str) -> Node:
    """floor(x / divisor) by a multiplication."""
    magic, shift = builder.scalar(divisor, of, "magic"), builder.scalar(divisor, of, "shift")
    return builder.make("divided_by", (x, builder.scalar(divisor, of), magic, shift), of, where=where)


def _divided(mode: str | None, arguments: list[Any], common: Any, given: Any, make: Any, rounded: Any,
             builder: Builder, dtype: torch.dtype, where: str) -> Node:  # fmt: skip
    if mode is None:
        x, divisor = given(arguments[0], FLOAT), arguments[1]
        op = rounded("div", x)
        if op == "div" and type(divisor) in (int, float) and 1e-30 < abs(divisor) < 1e30:
            return make("mul", x, builder.scalar(1.0 / divisor, FLOAT))  # within a unit of the last place, and cheap
        return make(op, x, given(divisor, FLOAT))
    of = common(*arguments[:2])
    if mode == "floor" and (by := _by_a_number(arguments, given, of)) is not None:
        return _quotient(*by, builder, of, where)
    x, y = given(arguments[0], of), given(arguments[1], of)
    if of.is_floating_point:
        return make("floor" if mode == "floor" else "trunc", make("div_exact", x, y))
    return builder.cast(make("floordiv" if mode == "floor" else "truncdiv", x, y, of=of), dtype)


def _power(arguments: list[Any], given: Any, make: Any, builder: Builder, dtype: torch.dtype, common: Any) -> Node:
    base, exponent = arguments[:2]
    number = exponent if isinstance(exponent, int | float) else None
    if number is not None and number in SMALL_POWERS:
        x = given(base, dtype)
        if number == 0:
            return builder.constant(1, dtype)
        if abs(number) == 0.5:
            return make("sqrt" if number > 0 else "rsqrt", x)
        product = x
        for _ in range(abs(int(number)) - 1):
            product = make("mul", product, x)
        return product if number > 0 else make("div", builder.constant(1, FLOAT), builder.cast(product, FLOAT))
    if not dtype.is_floating_point:
        raise NotImplementedError("an integer power of an integer has no kernel form for this exponent: use floats")
    return make("pow", given(base, FLOAT), given(exponent, FLOAT))
