"""Whole numbers that reach a Gluon kernel inside a tuple."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def whole_number(low, high):
    """A whole number of 32 bits from its halves as floats; `low` itself where it is no float."""
    return low.to(gl.int32) + (high.to(gl.int32) << 16) if low.dtype.is_floating() else low
