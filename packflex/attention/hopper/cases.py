"""What launches of the Hopper kernels need that the shapes, strides and types of their tensors determine."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from packflex.attention.hopper.backward import SUMS_BEFORE, _hopper_bwd_kernel
from packflex.attention.hopper.descriptors import DescriptorView, bhsd_view, dense_bhsd_view
from packflex.attention.hopper.fixed import FixedLaunch
from packflex.attention.hopper.forward import _hopper_fwd_kernel
from packflex.attention.hopper.mods import ModFunctions
from packflex.attention.hopper.order import WorkOrder, tiles_of, units_per_section
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
from packflex.integers import ceil_div

Ints = tuple[int, ...]
_CASES = 1024  # of each kind, the last used ones


class ForwardCase:
    """Tile, grid, work order and descriptors of a forward."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        q_shape: Ints,
        q_strides: Ints,
        k_shape: Ints,
        k_strides: Ints,
        v_strides: Ints,
        intervals_strides: Ints,
        intervals_dtype: torch.dtype,
        sinks_dtype: torch.dtype | None,
        softcap: bool,
        tiles: Ints,
        long_spans: bool,
        functions: ModFunctions | None,
    ) -> None:
        batch, heads, q_len, head_dim = q_shape
        kv_heads, kv_len = k_shape[1], k_shape[2]
        group = heads // kv_heads
        tight = softcap or (functions is not None and functions.busy)
        tile = resolve_forward_tile(list(tiles), head_dim, group, long_spans, tight)
        packed, positions = tile.heads(group), tile.positions(group)
        count, units = tiles_of(q_len, positions), heads // packed
        total = batch * units * count
        section = units_per_section(kv_heads, kv_len, head_dim, group // packed, tile.section_mib << 20)
        rows = [1, ROWS // packed, packed, head_dim]
        keys = [1, tile.block_n, 1, head_dim]
        self.q = bhsd_view(q_shape, q_strides, dtype, rows)
        self.k = bhsd_view(k_shape, k_strides, dtype, keys)
        self.v = bhsd_view(k_shape, v_strides, dtype, keys)
        self.out = dense_bhsd_view(q_shape, dtype, rows)
        self.order = WorkOrder((2, batch, q_len), intervals_strides, positions, tile.block_n)
        self.sizes = (intervals_strides[1], q_len, count, units, section, total)
        programs = programs_of(tile, total, device)
        constants = forward_constants(tile, head_dim, group, softcap, sinks_dtype is not None, functions)
        self.launch = FixedLaunch(_hopper_fwd_kernel, (programs, 1, 1), constants, **launch_options(tile))


class BackwardCase:
    """Tile, grids, work order and descriptors of a backward."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        q_shape: Ints,
        q_strides: Ints,
        k_shape: Ints,
        k_strides: Ints,
        v_strides: Ints,
        out_strides: Ints,
        grad_out_strides: Ints,
        grad_lse_strides: Ints | None,
        q_intervals_strides: Ints,
        kv_intervals_strides: Ints,
        dtypes: tuple[torch.dtype, ...],
        alignment: Ints,
        softcap: bool,
        tiles: Ints,
        long_spans: bool,
        functions: ModFunctions | None,
    ) -> None:
        """`dtypes`: of grad_out, out, lse, grad_lse and the intervals.

        `alignment`: what is left of the addresses of out, lse and grad_lse by 16. Triton specialises on both.
        """
        batch, heads, q_len, head_dim = q_shape
        kv_heads, kv_len = k_shape[1], k_shape[2]
        group = heads // kv_heads
        tile = resolve_backward_tile(list(tiles), head_dim, long_spans and functions is None, softcap)
        packed = tile.heads(group)
        rows = batch * heads * q_len
        copies = stat_copies(packed)
        stride_copy = STATS_BEFORE.value + ceil_div(rows, 4) * 4
        self.stats = copies * stride_copy
        # dQ / scale as [B, Hq / packed, S, packed, D]: the rows of a block side by side
        self.sums_shape = (SUMS_BEFORE.value + rows, head_dim)
        self.rows_shape = (batch, heads // packed, q_len, packed)

        boxes = backward_boxes(tile, head_dim, group)
        self.q = bhsd_view(q_shape, q_strides, dtype, *boxes["q_desc"])
        self.grad_out = bhsd_view(q_shape, grad_out_strides, dtypes[0], *boxes["do_desc"])
        self.k = bhsd_view(k_shape, k_strides, dtype, *boxes["k_desc"])
        self.v = bhsd_view(k_shape, v_strides, dtype, *boxes["v_desc"])
        self.grad_k = dense_bhsd_view(k_shape, dtype, *boxes["gk_desc"])
        self.grad_v = dense_bhsd_view(k_shape, dtype, *boxes["gv_desc"])
        self.stat = DescriptorView([self.stats], [1], boxes["lse_desc"][0], torch.float32)
        box, swizzle = boxes["dq_desc"]
        self.sums = DescriptorView([*self.sums_shape], [head_dim, 1], box, torch.float32, swizzle)

        count = tiles_of(kv_len, tile.consumers * ROWS)
        total = batch * kv_heads * count
        # Q and dO of the whole group, and dQ in fp32, where the forward has K and V of one head
        section = units_per_section(kv_heads, 2 * group * q_len, head_dim, 1, tile.section_mib << 20)
        strides = (q_intervals_strides[1], kv_intervals_strides[1], stride_copy)
        sizes = (total, count, section, kv_heads, q_len, kv_len, *strides)
        shape = (2, batch, kv_len)
        self.order = WorkOrder(shape, q_intervals_strides, tile.consumers * ROWS, ROWS // packed, sizes)

        positions = (ceil_div(q_len, PREPARED_ROWS), heads, batch)
        constants: dict[str, Any] = {"HEADS": packed, "D": head_dim, "BLOCK_M": PREPARED_ROWS}
        self.cast = FixedLaunch(_hopper_bwd_cast_kernel, positions, constants, num_warps=4)
        constants = {**constants, "COPIES": copies, "HAS_GRAD_LSE": grad_lse_strides is not None}
        self.prepare = FixedLaunch(_hopper_bwd_prepare_kernel, positions, constants, num_warps=4)
        of_rows = (*out_strides[:3], *grad_out_strides[:3], *(grad_lse_strides or (0, 0, 0)))
        self.prepared = (*of_rows, q_len, heads, stride_copy)
        programs = programs_of(tile, total, device)
        constants = backward_constants(tile, head_dim, group, softcap, functions)
        self.launch = FixedLaunch(_hopper_bwd_kernel, (programs, 1, 1), constants, **launch_options(tile))


forward_case = lru_cache(maxsize=_CASES)(ForwardCase)
backward_case = lru_cache(maxsize=_CASES)(BackwardCase)


def forward_constants(
    tile: ForwardTile, head_dim: int, group: int, softcap: bool, sinks: bool, functions: ModFunctions | None = None
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
        "MOD": functions.forward if functions else None,
        "MOD_ROWS": functions.rows if functions else None,
        "HAS_SINKS": sinks,
        "COUNTED": tile.persistent == 2,
        "REGISTERS": tile.consumer_registers,
    }


def backward_constants(
    tile: BackwardTile, head_dim: int, group: int, softcap: bool, functions: ModFunctions | None = None
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
        "MOD": functions.backward if functions else None,
        "MOD_COLUMNS": functions.columns if functions else None,
        "MOD_GRAD": functions.gradient if functions else None,
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


def programs_of(tile: ForwardTile | BackwardTile, total: int, device: torch.device) -> int:
    """Programs for `total` work items: one each, or as many persistent ones as run at a time."""
    return min(total, multiprocessors(device) * tile.per_sm) if tile.persistent else total


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a card."""
    return torch.cuda.get_device_properties(device).multi_processor_count
