"""Launcher of the Hopper forward: descriptors, grid and results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._layouts import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from packflex.attention.hopper.forward import LOG2_E, _hopper_fwd_kernel
from packflex.attention.hopper.order import units_per_section, work_order
from packflex.attention.hopper.tiles import ROWS, ForwardTile, resolve_forward_tile
from packflex.attention.memory import new_bshd

GLUON_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
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
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, S, D] and lse [B, Hq, S]; arguments as the op `packflex::attention`, `tile_list` of `tiles`."""
    q, k, v = (tma_readable(x) for x in (q, k, v))
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = heads // kv_heads
    out = new_bshd(q)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    tile = resolve_forward_tile(tile_list, head_dim, group, long_spans, softcap > 0)
    packed, positions = tile.heads(group), tile.positions(group)
    if kv_intervals.stride(2) != 1:  # the one interval of "every query sees every key", expanded
        kv_intervals = kv_intervals.contiguous()
    records = work_order(kv_intervals, positions, tile.block_n)
    tiles, units = records.shape[1], heads // packed
    total = batch * units * tiles
    section = units_per_section(kv_heads, kv_len, head_dim, group // packed, tile.section_mib << 20)
    programs = min(total, multiprocessors(q.device) * tile.per_sm) if tile.persistent else total
    rows = [1, ROWS // packed, packed, head_dim]
    keys = [1, tile.block_n, 1, head_dim]
    _hopper_fwd_kernel[(programs,)](
        descriptor(q, rows), descriptor(k, keys), descriptor(v, keys), descriptor(out, rows),
        lse, lse if sinks is None else sinks, kv_intervals[0], kv_intervals[1], records,
        kv_intervals.stride(1), q_len, tiles, units, section, total, *score_factors(scale, softcap),
        **forward_constants(tile, head_dim, group, softcap > 0, sinks is not None), **launch_options(tile),
    )  # fmt: skip
    return out, lse


def score_factors(scale: float, softcap: float) -> tuple[float, float, float]:
    """Factors that bring scores to base 2: `sm` on the (capped) product, `cap_in` and `cap_out` around the tanh."""
    if softcap:
        return 1.0, 2 * _LOG2_E * scale / softcap, softcap * _LOG2_E
    return scale * _LOG2_E, 0.0, 0.0


def forward_constants(tile: ForwardTile, head_dim: int, group: int, softcap: bool, sinks: bool) -> dict[str, Any]:
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
        "HAS_SINKS": sinks,
        "REGISTERS": tile.consumer_registers,
    }


def launch_options(tile: ForwardTile) -> dict[str, int]:
    """A kernel's launch options."""
    return {"num_warps": 4} if tile.max_registers is None else {"num_warps": 4, "maxnreg": tile.max_registers}


def box_layout(block: list[int], dtype: torch.dtype) -> Any:
    """Layout of a box in shared memory, with the widest swizzle that fits."""
    return NVMMASharedLayout.get_default_for(block, GLUON_TYPES[dtype])


def descriptor(x: Tensor, block: list[int]) -> Any:
    """TMA descriptor of x [B, H, S, D] as [B, S, H, D], in boxes of shape `block`."""
    view = x.transpose(1, 2)
    # the stride of an axis of one element may be anything; TMA wants multiples of 16 bytes
    strides = [s if n > 1 else view.shape[3] for s, n in zip(view.stride(), view.shape, strict=True)]
    strides[3] = 1
    return TensorDescriptor(view, list(view.shape), strides, block, box_layout(block, x.dtype))


def tma_readable(x: Tensor) -> Tensor:
    """`x` itself when TMA can address it (16-byte aligned rows and strides, none of them 0); otherwise a copy."""
    step = 16 // x.element_size()
    strides = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    if x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % step == 0 for s in strides):
        return x
    room = new_bshd(x)
    return room.copy_(x)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a card."""
    return torch.cuda.get_device_properties(device).multi_processor_count
