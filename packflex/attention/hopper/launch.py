"""Launchers of the Hopper kernels: descriptors, grids and results."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._layouts import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from packflex.attention.hopper.backward import SUMS_BEFORE, _hopper_bwd_kernel
from packflex.attention.hopper.forward import LOG2_E, _hopper_fwd_kernel
from packflex.attention.hopper.mods import BoundMod
from packflex.attention.hopper.order import tiles_of, units_per_section, work_order
from packflex.attention.hopper.prepare import (
    PREPARED_ROWS,
    STATS_BEFORE,
    _hopper_bwd_cast_kernel,
    _hopper_bwd_prepare_kernel,
    stat_copies,
)
from packflex.attention.hopper.tiles import (
    ROWS,
    BackwardTile,
    ForwardTile,
    resolve_backward_tile,
    resolve_forward_tile,
)
from packflex.attention.memory import new_bshd
from packflex.integers import ceil_div

GLUON_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
_LOG2_E = LOG2_E.value


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_intervals: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    tile_list: list[int],
    long_spans: bool,
    mod: BoundMod | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, S, D] and lse [B, Hq, S]; arguments as the op `packflex::attention`, `tile_list` of `tiles`."""
    q, k, v = (tma_readable(x) for x in (q, k, v))
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = heads // kv_heads
    out = new_bshd(q)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    tight = softcap > 0 or (mod is not None and mod.functions.busy)
    tile = resolve_forward_tile(tile_list, head_dim, group, long_spans, tight)
    packed, positions = tile.heads(group), tile.positions(group)
    if kv_intervals.stride(2) != 1:  # the one interval of "every query sees every key", expanded
        kv_intervals = kv_intervals.contiguous()
    plan = work_order(kv_intervals, positions, tile.block_n)
    tiles, units = tiles_of(q_len, positions), heads // packed
    total = batch * units * tiles
    section = units_per_section(kv_heads, kv_len, head_dim, group // packed, tile.section_mib << 20)
    programs = min(total, multiprocessors(q.device) * tile.per_sm) if tile.persistent else total
    rows = [1, ROWS // packed, packed, head_dim]
    keys = [1, tile.block_n, 1, head_dim]
    _hopper_fwd_kernel[(programs,)](
        descriptor(q, rows), descriptor(k, keys), descriptor(v, keys), descriptor(out, rows),
        lse, lse if sinks is None else sinks, kv_intervals[0], kv_intervals[1], plan,
        kv_intervals.stride(1), q_len, tiles, units, section, total,
        *(score_factors(scale, softcap) if mod is None else mod.factors(scale)), mod.arguments if mod else (0,),
        **forward_constants(tile, head_dim, group, softcap > 0, sinks is not None, mod), **launch_options(tile),
    )  # fmt: skip
    return out, lse


def launch_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_intervals: Tensor,
    q_intervals: Tensor,
    scale: float,
    softcap: float,
    tile_list: list[int],
    long_spans: bool,
    want_delta: bool,
    mod: BoundMod | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients to q, k, v, and delta [B, Hq, S] if it is wanted; arguments as `packflex::attention_backward`."""
    q, k, v, grad_out = (tma_readable(x) for x in (q, k, v, grad_out))
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = heads // kv_heads
    tile = resolve_backward_tile(tile_list, head_dim, long_spans and mod is None, softcap > 0)
    packed = tile.heads(group)
    kv_intervals, q_intervals = (x if x.stride(2) == 1 else x.contiguous() for x in (kv_intervals, q_intervals))
    # dQ / scale as [B, Hq / packed, S, packed, D]: the rows of a block side by side
    before = SUMS_BEFORE.value
    sums = torch.empty((before + batch * heads * q_len, head_dim), dtype=torch.float32, device=q.device)
    grad_q, grad_k, grad_v = (new_bshd(x) for x in (q, k, v))
    copies = stat_copies(packed)
    stride_copy = STATS_BEFORE.value + ceil_div(batch * heads * q_len, 4) * 4
    lse_2, delta = (torch.empty(copies * stride_copy, dtype=torch.float32, device=q.device) for _ in range(2))

    _hopper_bwd_prepare_kernel[(ceil_div(q_len, PREPARED_ROWS), heads, batch)](
        out, grad_out, lse if grad_lse is None else grad_lse, lse, lse_2, delta, sums[before:],
        *out.stride()[:3], *grad_out.stride()[:3], *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
        q_len, heads, stride_copy,
        HEADS=packed, D=head_dim, BLOCK_M=PREPARED_ROWS, COPIES=copies, HAS_GRAD_LSE=grad_lse is not None, num_warps=4,
    )  # fmt: skip

    tiles = tiles_of(kv_len, tile.consumers * ROWS)
    total = batch * kv_heads * tiles
    # Q and dO of the whole group, and dQ in fp32, where the forward has K and V of one head
    section = units_per_section(kv_heads, 2 * group * q_len, head_dim, 1, tile.section_mib << 20)
    programs = min(total, multiprocessors(q.device) * tile.per_sm) if tile.persistent else total
    strides = (q_intervals.stride(1), kv_intervals.stride(1), stride_copy)
    sizes = (total, tiles, section, kv_heads, q_len, kv_len, *strides)
    plan = work_order(q_intervals, tile.consumers * ROWS, ROWS // packed, sizes)
    boxes = backward_boxes(tile, head_dim, group)
    box, _ = boxes["dq_desc"]
    sum_desc = _Descriptor(sums, list(sums.shape), [head_dim, 1], box, box_layout(box, torch.float32))
    stat_layout = box_layout([ROWS], torch.float32)
    _hopper_bwd_kernel[(programs,)](
        descriptor(q, *boxes["q_desc"]), descriptor(grad_out, *boxes["do_desc"]),
        descriptor(k, *boxes["k_desc"]), descriptor(v, *boxes["v_desc"]),
        *(_Descriptor(x, [x.shape[0]], [1], [ROWS], stat_layout) for x in (lse_2, delta)),
        sum_desc, descriptor(grad_k, *boxes["gk_desc"]), descriptor(grad_v, *boxes["gv_desc"]), grad_k, grad_v,
        q_intervals[0], q_intervals[1], kv_intervals[1], plan,
        scale, *(score_factors(scale, softcap) if mod is None else mod.factors(scale)), mod.arguments if mod else (0,),
        **backward_constants(tile, head_dim, group, softcap > 0, mod), **launch_options(tile),
    )  # fmt: skip
    _hopper_bwd_cast_kernel[(ceil_div(q_len, PREPARED_ROWS), heads, batch)](
        sums[before:], grad_q, q_len, heads, scale, HEADS=packed, D=head_dim, BLOCK_M=PREPARED_ROWS, num_warps=4,
    )  # fmt: skip
    if not want_delta:
        return grad_q, grad_k, grad_v, None
    rows = delta[STATS_BEFORE.value :][: batch * heads * q_len].view(batch, heads // packed, q_len, packed)
    return grad_q, grad_k, grad_v, rows.transpose(2, 3).reshape(batch, heads, q_len)


def score_factors(scale: float, softcap: float) -> tuple[float, float, float]:
    """Factors that bring scores to base 2: `sm` on the (capped) product, `cap_in` and `cap_out` around the tanh."""
    if softcap:
        return 1.0, 2 * _LOG2_E * scale / softcap, softcap * _LOG2_E
    return scale * _LOG2_E, 0.0, 0.0


def forward_constants(
    tile: ForwardTile, head_dim: int, group: int, softcap: bool, sinks: bool, mod: BoundMod | None = None
) -> dict[str, Any]:
    """The forward kernel's compile-time constants."""
    return {
        "HEADS": tile.heads(group),
        "GROUP": group,
        "BLOCK_N": tile.block_n,
        "D": head_dim,
        "CONSUMERS": tile.consumers,
        "STAGES": tile.stages,
        "Q_STAGES": tile.q_stages,
        "PING_PONG": tile.ping_pong > 0,
        "SOFTCAP": softcap,
        "MOD": mod.functions.forward if mod else None,
        "MOD_ROWS": mod.functions.rows if mod else None,
        "HAS_SINKS": sinks,
        "COUNTED": tile.persistent == 2,
        "REGISTERS": tile.consumer_registers,
    }


def backward_constants(
    tile: BackwardTile, head_dim: int, group: int, softcap: bool, mod: BoundMod | None = None
) -> dict[str, Any]:
    """The backward kernel's compile-time constants."""
    return {
        "HEADS": tile.heads(group),
        "GROUP": group,
        "D": head_dim,
        "CONSUMERS": tile.consumers,
        "STAGES": tile.stages,
        "COLUMNS": tile.columns(head_dim),
        "AHEAD": tile.ahead > 0,
        "SOFTCAP": softcap,
        "MOD": mod.functions.backward if mod else None,
        "MOD_COLUMNS": mod.functions.columns if mod else None,
        "MOD_GRAD": mod.functions.gradient if mod else None,
        "HELD": tile.held > 0,
        "COUNTED": tile.persistent == 2,
        "REGISTERS": 240,
    }


def backward_boxes(tile: BackwardTile, head_dim: int, group: int) -> dict[str, tuple[list[int], int]]:
    """Boxes of the backward kernel's descriptors, and the bytes of their swizzle (-1: the widest there is)."""
    packed, columns = tile.heads(group), tile.columns(head_dim)
    rows = [1, ROWS // packed, packed]
    # columns of dQ are cut out of K between two swizzle atoms, never within one
    key_swizzle = 64 if columns == 32 else -1
    return {
        "q_desc": ([*rows, head_dim], -1),
        "do_desc": ([*rows, head_dim], -1),
        "k_desc": ([1, ROWS, 1, head_dim], key_swizzle),
        "v_desc": ([1, ROWS, 1, head_dim], -1),
        "gk_desc": ([1, ROWS, 1, head_dim], -1),
        "gv_desc": ([1, ROWS, 1, head_dim], -1),
        "lse_desc": ([ROWS], -1),
        "delta_desc": ([ROWS], -1),
        "dq_desc": ([ROWS, columns], -1),
    }


def launch_options(tile: ForwardTile | BackwardTile) -> dict[str, int]:
    """A kernel's launch options."""
    return {"num_warps": 4} if tile.max_registers is None else {"num_warps": 4, "maxnreg": tile.max_registers}


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

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: Any) -> None:
        self.base = base
        self.shape = shape
        self.strides = strides
        self.block_shape = block_shape
        self.layout = layout
        self.padding = "zero"


def descriptor(x: Tensor, block: list[int], swizzle: int = -1) -> Any:
    """TMA descriptor of x [B, H, S, D] as [B, S, H, D], in boxes of shape `block`; x as `tma_readable` leaves it."""
    batch, heads, length, head_dim = x.shape
    stride_b, stride_h, stride_s, _ = x.stride()
    # the stride of an axis of one element may be anything; TMA wants multiples of 16 bytes
    strides = [
        stride_b if batch > 1 else head_dim,
        stride_s if length > 1 else head_dim,
        stride_h if heads > 1 else head_dim,
        1,
    ]
    return _Descriptor(x, [batch, length, heads, head_dim], strides, block, box_layout(block, x.dtype, swizzle))


def tma_readable(x: Tensor) -> Tensor:
    """`x` itself when TMA can address it (16-byte aligned rows and strides, none of them 0); otherwise a copy."""
    step = 16 // x.element_size()
    aligned = x.stride(3) == 1 and x.data_ptr() % 16 == 0
    for stride, count in zip(x.stride()[:3], x.shape, strict=False):
        aligned = aligned and (count == 1 or (stride > 0 and stride % step == 0))
    return x if aligned else new_bshd(x).copy_(x)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a card."""
    return torch.cuda.get_device_properties(device).multi_processor_count
