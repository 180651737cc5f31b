"""TMA descriptors of tensors, and their boxes in shared memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._layouts import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from packflex.attention.memory import new_bshd

GLUON_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


def box_layout(block: list[int], dtype: torch.dtype, swizzle: int = -1) -> Any:
    """Layout of a box in shared memory; `swizzle` in bytes, -1 for the widest that fits."""
    return _box_layout(tuple(block), dtype, swizzle)


@lru_cache(maxsize=256)
def _box_layout(block: tuple[int, ...], dtype: torch.dtype, swizzle: int) -> Any:
    if swizzle < 0:
        return NVMMASharedLayout.get_default_for(list(block), GLUON_TYPES[dtype])
    return NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * dtype.itemsize, rank=len(block))


class _Descriptor(TensorDescriptor):
    """A TensorDescriptor without the checks of its making, which cost more time than all else about it.

    What they check, `tma_readable` and the tables of boxes see to.
    """

    def __init__(self, base: Tensor, view: DescriptorView) -> None:
        self.base = base
        self.shape = view.shape
        self.strides = view.strides
        self.block_shape = view.block
        self.layout = view.layout
        self.padding = "zero"


class DescriptorView:
    """Makes descriptors of tensors that all have one shape and strides, in boxes of shape `block`."""

    def __init__(
        self, shape: list[int], strides: list[int], block: list[int], dtype: torch.dtype, swizzle: int = -1
    ) -> None:
        self.shape = shape
        self.strides = strides
        self.block = block
        self.layout = box_layout(block, dtype, swizzle)

    def __call__(self, x: Tensor) -> Any:
        """The descriptor of `x`."""
        return _Descriptor(x, self)


def bhsd_view(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, block: list[int], swizzle: int = -1
) -> DescriptorView:
    """View of tensors [B, H, S, D] of these strides, which `tma_readable` leaves, as [B, S, H, D]."""
    batch, heads, length, head_dim = shape
    # the stride of an axis of one element may be anything; TMA wants multiples of 16 bytes
    of_bshd = [
        strides[0] if batch > 1 else head_dim,
        strides[2] if length > 1 else head_dim,
        strides[1] if heads > 1 else head_dim,
        1,
    ]
    return DescriptorView([batch, length, heads, head_dim], of_bshd, block, dtype, swizzle)


def dense_bhsd_view(shape: tuple[int, ...], dtype: torch.dtype, block: list[int], swizzle: int = -1) -> DescriptorView:
    """As `bhsd_view`, of what `new_bshd` makes."""
    _, heads, length, head_dim = shape
    return bhsd_view(shape, (length * heads * head_dim, head_dim, heads * head_dim, 1), dtype, block, swizzle)


def tma_readable(x: Tensor) -> Tensor:
    """`x` itself when TMA can address it (16-byte aligned rows and strides, none of them 0); otherwise a copy."""
    step = 16 // x.element_size()
    aligned = x.stride(3) == 1 and x.data_ptr() % 16 == 0
    for stride, count in zip(x.stride()[:3], x.shape, strict=False):
        aligned = aligned and (count == 1 or (stride > 0 and stride % step == 0))
    return x if aligned else new_bshd(x).copy_(x)
