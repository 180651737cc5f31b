"""Device functions that printed kernels call, and their like for Triton's interpreter.

The interpreter has no libdevice; there numpy stands in for it.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """tanh in float32 from one exp2 and one reciprocal; its error is absolute, 2e-7."""
    return 1 - fast_divide(2.0, 1 + tl.exp2(x * (2 * LOG2_E)))


@triton.jit
def _sigmoid(x):
    return fast_divide(1.0, 1 + tl.exp2(-x * LOG2_E))


@triton.jit
def natural_log(x):
    """log in float32 from one instruction; its error is absolute, 3e-7."""
    return fast_log2(x) * LN_2


@triton.jit
def _read_elements(p, mask, MASKED: tl.constexpr):
    """What lies at pointers [M, N] that differ from element to element; 0 where not `mask`.

    Written in PTX because Triton pipelines a load that feeds a product: it would copy each element into shared memory,
    stages ahead, at several times the cost of reading it. Types of less than 32 bits are never pipelined.
    """
    kind: tl.constexpr = p.dtype.element_ty
    if kind.primitive_bitwidth == 32:
        if MASKED:
            bits = tl.inline_asm_elementwise(
                "{ .reg .pred seen; setp.ne.s32 seen, $2, 0; mov.b32 $0, 0; @seen ld.global.nc.b32 $0, [$1]; }",
                "=r,l,r",
                [p.to(tl.int64), mask.to(tl.int32)],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            bits = tl.inline_asm_elementwise(
                "ld.global.nc.b32 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
            )
        return bits.to(kind, bitcast=True)
    elif MASKED:
        return tl.load(p, mask=mask, other=0)
    else:
        return tl.load(p)


@triton.jit
def _read_index(p):
    """The int32 at a scalar pointer, in PTX: a pipelined load would make all others of its loop wait for it."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.b32 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def floordiv(x, y):
    """floor(x / y) of integers, as in Python."""
    quotient = x // y
    return tl.where((x % y != 0) & ((x < 0) != (y < 0)), quotient - 1, quotient)


@triton.jit
def remainder(x, y):
    """x - y * floor(x / y), of integers or floats."""
    if x.dtype.is_floating():
        left = _fmod(x, y)
    else:
        left = x % y
    return tl.where((left != 0) & ((left < 0) != (y < 0)), left + y, left)


@triton.jit
def fmod(x, y):
    """C's remainder, with the sign of x."""
    if x.dtype.is_floating():
        return _fmod(x, y)
    else:
        return x % y


@triton.jit
def divided_by(x, divisor, magic, shift):
    """floor(x / divisor) of an int32 and a positive divisor known at launch: one multiplication, one shift."""
    sign = x >> 31  # all ones below 0: floor(x / d) is ~(~x // d) there
    n = (x ^ sign).to(tl.uint32, bitcast=True)
    high = tl.umulhi(n, (n * 0 + magic.to(tl.uint32, bitcast=True)))
    return ((high + n) >> shift.to(tl.uint32)).to(tl.int32, bitcast=True) ^ sign


@triton.jit
def index_divided_by(x, magic, shift):
    """`divided_by` of an int32 that is 0 or more."""
    n = x.to(tl.uint32, bitcast=True)
    high = tl.umulhi(n, n * 0 + magic.to(tl.uint32, bitcast=True))
    return ((high + n) >> shift.to(tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def in_range(x, low, end):
    """Whether an int32 is from `low` up to and not including `end`, which is no less."""
    far, most = tl.cast(x - low, tl.int32), tl.cast(end - low, tl.int32)
    return far.to(tl.uint32, bitcast=True) < most.to(tl.uint32, bitcast=True)


@triton.jit
def _in_range_or(x, at, low, end, HIDDEN: tl.constexpr, left=None, right=None):
    """`x` where `in_range(at, low, end)`, and `left == right` if they are given, else `HIDDEN`, 0 or -inf.

    In PTX because LLVM gathers the outcomes of comparisons in bits of an integer, at 5 instructions each.
    """
    other: tl.constexpr = "0f00000000" if HIDDEN == 0 else "0fFF800000"
    if left is None:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 far; sub.u32 far, $2, $3; setp.lt.u32 p, far, $4; selp.f32 $0, $1, "
            + other
            + ", p; }",
            "=f,f,r,r,r",
            [x, at, tl.cast(low, tl.int32), tl.cast(end - low, tl.int32)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 far; sub.u32 far, $2, $3; setp.eq.s32 p, $5, $6; "
            "setp.lt.and.u32 p, far, $4, p; selp.f32 $0, $1, " + other + ", p; }",
            "=f,f,r,r,r,r,r",
            [x, at, tl.cast(low, tl.int32), tl.cast(end - low, tl.int32), left, right],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def isnan(x):
    """Whether a float is NaN."""
    return x != x


@triton.jit
def isinf(x):
    """Whether a float is infinite."""
    return tl.abs(x) == float("inf")


@triton.jit
def digamma(x):
    """The derivative of lgamma: an asymptotic series past 6, the recurrence up to there, and the reflection below 0."""
    y = tl.where(x > 0, x, 1 - x)
    steps = 1 / y + 1 / (y + 1) + 1 / (y + 2) + 1 / (y + 3) + 1 / (y + 4) + 1 / (y + 5)
    w = 1 / (y + 6)
    z = w * w
    series = z * (0.08333333333333333 - z * (0.008333333333333333 - z * (0.003968253968253968 - z / 240)))
    above = natural_log(y + 6) - 0.5 * w - series - steps
    turn = x - round_even(x)
    below = above - fast_divide(3.141592653589793, tan(turn * 3.141592653589793))
    return tl.where(x > 0, above, tl.where((turn == 0) & (x < 0), float("nan"), below))


@triton.jit
def scatter(p_sum, o, value, mask, scale, MODE: tl.constexpr):
    """Add `value` to a captured tensor's gradient at offsets `o`.

    MODE 0 adds float32 atomically. MODE 1 and 2 give the same bits in each run: the first pass (1) finds the largest
    magnitude, the second (2) adds 64-bit integers of that value's scale, whose sum depends on no order.
    """
    if MODE == 0:
        tl.atomic_add(p_sum + o, value, mask=mask, sem="relaxed")
    elif MODE == 1:
        size = tl.where(mask, tl.abs(value), 0.0).to(tl.int32, bitcast=True)
        tl.atomic_max(p_sum + o * 0, size, mask=mask, sem="relaxed")
    else:
        tl.atomic_add(p_sum + o, _nearest(value * scale), mask=mask, sem="relaxed")


@triton.jit
def scatter_tile(p_sum, o, value, mask, scale, MODE: tl.constexpr, NEAR: tl.constexpr):
    """`scatter` of a tile [M, N]: where its offsets span less than NEAR, each offset is summed in the tile first."""
    first = tl.min(tl.where(mask, o, 2147483647))
    last = tl.max(tl.where(mask, o, -2147483648))
    if last - first < NEAR:
        for at in range(first, last + 1):
            total = tl.sum(tl.where(mask & (o == at), value, 0.0))
            scatter(p_sum, at, total, tl.full([], 1, tl.int1), scale, MODE)
    else:
        scatter(p_sum, o, value, mask, scale, MODE)


def _read_simply(p, mask=None, MASKED=False):
    return tl.load(p, mask=mask, other=0) if MASKED else tl.load(p)


@triton.jit
def _select_in_range(x, at, low, end, HIDDEN: tl.constexpr, left=None, right=None):
    seen = in_range(at, low, end)
    if left is not None:
        seen = seen & (left == right)
    return tl.where(seen, x, HIDDEN)


def _by_numpy(function):
    from triton.runtime.interpreter import TensorHandle

    def call(*xs):
        arrays = [x.handle.data if isinstance(x, tl.tensor) else np.float32(x) for x in xs]
        with np.errstate(all="ignore"):
            data = np.asarray(function(*arrays), dtype=np.float32)
        shape = np.broadcast_shapes(*(x.shape for x in xs if isinstance(x, tl.tensor)))
        kind = tl.block_type(tl.float32, list(shape)) if shape else tl.float32
        return tl.tensor(TensorHandle(data, tl.float32), kind)

    return call


@triton.jit
def _same(x):
    return x


tanh, sigmoid, sign = _tanh, _sigmoid, _sign
if isinstance(_tanh, triton.JITFunction):
    truth = _same
    fast_divide, fast_log2 = libdevice.fast_dividef, libdevice.fast_log2f
    read_elements, read_index, in_range_or = _read_elements, _read_index, _in_range_or
    log1p, expm1, log10 = libdevice.log1p, libdevice.expm1, libdevice.log10
    tan, asin, acos, atan = libdevice.tan, libdevice.asin, libdevice.acos, libdevice.atan
    sinh, cosh, asinh, acosh, atanh = libdevice.sinh, libdevice.cosh, libdevice.asinh, libdevice.acosh, libdevice.atanh
    erfc, lgamma, trunc, round_even = libdevice.erfc, libdevice.lgamma, libdevice.trunc, libdevice.nearbyint
    power, atan2, hypot, copysign = libdevice.pow, libdevice.atan2, libdevice.hypot, libdevice.copysign
    _fmod, _nearest = libdevice.fmod, libdevice.llrint
else:
    import math

    def truth(x):
        """What a comparison of two single floats gives, as the truth value that the interpreter makes no number of."""
        from triton.runtime.interpreter import TensorHandle

        return x if x.type.is_block() else tl.tensor(TensorHandle(np.asarray(x.handle.data != 0), tl.int1), tl.int1)

    fast_divide, fast_log2 = _by_numpy(np.divide), _by_numpy(np.log2)
    read_elements, read_index, in_range_or = _read_simply, _read_simply, _select_in_range
    log1p, expm1, log10 = _by_numpy(np.log1p), _by_numpy(np.expm1), _by_numpy(np.log10)
    tan, asin, acos, atan = _by_numpy(np.tan), _by_numpy(np.arcsin), _by_numpy(np.arccos), _by_numpy(np.arctan)
    sinh, cosh, asinh, acosh, atanh = map(_by_numpy, (np.sinh, np.cosh, np.arcsinh, np.arccosh, np.arctanh))
    erfc, lgamma = _by_numpy(np.vectorize(math.erfc)), _by_numpy(np.vectorize(math.lgamma))
    trunc, round_even = _by_numpy(np.trunc), _by_numpy(np.rint)
    power, atan2, hypot, copysign = map(_by_numpy, (np.power, np.arctan2, np.hypot, np.copysign))
    _fmod = _by_numpy(np.fmod)

    def _nearest(x):
        from triton.runtime.interpreter import TensorHandle

        data = np.rint(x.handle.data.astype(np.float64)).astype(np.int64)
        kind = tl.block_type(tl.int64, x.shape) if x.type.is_block() else tl.int64
        return tl.tensor(TensorHandle(data, tl.int64), kind)
