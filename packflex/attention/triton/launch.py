"""Launchers of the portable kernels: what they take on this device, their grids and their results."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from packflex.attention.memory import new_bshd
from packflex.attention.triton.backward import _flex_bwd_delta_kernel, _flex_bwd_dkdv_kernel, _flex_bwd_dq_kernel
from packflex.attention.triton.forward import _flex_fwd_kernel
from packflex.attention.triton.tiles import edge_rows, heads_per_tile, resolve_tiles
from packflex.integers import ceil_div, next_power_of_2

MAX_HEAD_DIM = 256
DELTA_ROWS = 64
# tl.dot multiplies fp32 exactly, not through tf32; half types ignore it
_PRECISION = "ieee"


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
    """out [B, Hq, S, Dv] and lse [B, Hq, S]; arguments as the op `packflex::attention`."""
    _check_runnable(q, v)
    q, k, v = (_last_axis_contiguous(x) for x in (q, k, v))
    batch, heads, q_len, head_dim = q.shape
    kv_heads, v_dim = k.shape[1], v.shape[3]
    out = new_bshd(q, v_dim)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    tiles = resolve_tiles(tile_list, q.dtype, max(head_dim, v_dim), _capability(q.device), softcap > 0, long_spans)
    packed = heads_per_tile(heads // kv_heads, tiles.forward)
    grid = (ceil_div(q_len * packed, tiles.forward.block_m), heads // packed, batch)
    _flex_fwd_kernel[grid](
        q, k, v, q if sinks is None else sinks, kv_intervals[0], kv_intervals[1], out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *kv_intervals.stride()[1:],
        q_len, heads, scale, softcap,
        GROUP=heads // kv_heads, HEADS=packed, **_dims(head_dim, v_dim),
        BLOCK_M=tiles.forward.block_m, BLOCK_N=tiles.forward.block_n,
        HAS_SINKS=sinks is not None, SOFTCAP=softcap > 0,
        PRECISION=_PRECISION,
        num_warps=tiles.forward.num_warps, num_stages=tiles.forward.num_stages,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v, and delta [B, Hq, S] for that of the sinks; arguments as `packflex::attention_backward`."""
    grad_out, q, k, v = (_last_axis_contiguous(x) for x in (grad_out, q, k, v))
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    grad_q, grad_k, grad_v = (new_bshd(x) for x in (q, k, v))
    lse2, delta = launch_statistics(out, grad_out, grad_lse, lse)
    tiles = resolve_tiles(tile_list, q.dtype, max(head_dim, v_dim), _capability(q.device), softcap > 0, long_spans)
    dims = _dims(head_dim, v_dim)

    group = heads // kv_heads
    packed = heads_per_tile(group, tiles.dkdv)
    _flex_bwd_dkdv_kernel[(ceil_div(kv_len, tiles.dkdv.block_n), kv_heads, batch)](
        q, k, v, grad_out, lse2, delta, q_intervals[0], q_intervals[1], grad_k, grad_v,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3],
        *grad_k.stride()[:3], *grad_v.stride()[:3], *q_intervals.stride()[1:],
        q_len, kv_len, heads, scale, softcap,
        GROUP=group, HEADS=packed, **dims, BLOCK_M=tiles.dkdv.block_m, BLOCK_N=tiles.dkdv.block_n,
        EDGE_M=edge_rows(tiles.dkdv), SOFTCAP=softcap > 0, PRECISION=_PRECISION,
        num_warps=tiles.dkdv.num_warps, num_stages=tiles.dkdv.num_stages,
    )  # fmt: skip

    packed = heads_per_tile(group, tiles.dq)
    _flex_bwd_dq_kernel[(ceil_div(q_len * packed, tiles.dq.block_m), heads // packed, batch)](
        q, k, v, grad_out, lse2, delta, kv_intervals[0], kv_intervals[1], grad_q,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *grad_q.stride()[:3],
        *kv_intervals.stride()[1:], q_len, heads, scale, softcap,
        GROUP=group, HEADS=packed, **dims, BLOCK_M=tiles.dq.block_m, BLOCK_N=tiles.dq.block_n,
        SOFTCAP=softcap > 0, PRECISION=_PRECISION,
        num_warps=tiles.dq.num_warps, num_stages=tiles.dq.num_stages,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, delta


def launch_statistics(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What the backward kernels read of each row: lse in units of log(2), and delta; float32 [B, Hq, S] both."""
    batch, heads, q_len, v_dim = out.shape
    lse2, delta = torch.empty((2, batch, heads, q_len), dtype=torch.float32, device=out.device)
    _flex_bwd_delta_kernel[(ceil_div(q_len, DELTA_ROWS), heads, batch)](
        out, grad_out, out if grad_lse is None else grad_lse, lse, delta, lse2,
        *out.stride()[:3], *grad_out.stride()[:3], *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
        q_len, heads,
        V_DIM=v_dim, BLOCK_DV=_dims(v_dim, v_dim)["BLOCK_DV"], BLOCK_M=DELTA_ROWS, HAS_GRAD_LSE=grad_lse is not None,
        num_warps=4,
    )  # fmt: skip
    return lse2, delta


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (`TRITON_INTERPRET=1` when packflex was imported)."""
    return not isinstance(_flex_fwd_kernel, triton.JITFunction)


def _capability(device: torch.device) -> int:
    """Compute capability times ten; the interpreter follows the tables of sm_80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _check_runnable(q: Tensor, v: Tensor) -> None:
    other = 'use backend="reference"'
    if q.device.type != "cuda" and not interpreted():
        raise NotImplementedError(f'backend="triton" runs on CUDA devices; the tensors are on {q.device}: {other}')
    if _capability(q.device) < 80:
        raise NotImplementedError(
            f'backend="triton" needs compute capability 8.0 (A100) or later; {torch.cuda.get_device_name(q.device)} '
            f"has {torch.cuda.get_device_capability(q.device)}: {other}"
        )
    if q.dtype == torch.float64:
        raise NotImplementedError(f'backend="triton" takes float16, bfloat16 and float32; got {q.dtype}: {other}')
    if q.dtype == torch.bfloat16 and interpreted():
        raise NotImplementedError(
            f"Triton's interpreter multiplies bfloat16 wrongly; test float16 or float32, or {other}"
        )
    for name, dim in (("D", q.shape[3]), ("Dv", v.shape[3])):
        if dim > MAX_HEAD_DIM:
            raise NotImplementedError(
                f'backend="triton" takes head dims up to {MAX_HEAD_DIM}; {name} is {dim}: {other}'
            )


def _last_axis_contiguous(x: Tensor) -> Tensor:
    """`x` itself when its last axis is contiguous; autograd may hand over an expanded gradient, which is copied."""
    return x if x.stride(3) == 1 else x.contiguous()


def _dims(head_dim: int, v_dim: int) -> dict[str, int]:
    """Head dims and the powers of two that hold them; tl.dot needs at least 16."""
    block_d, block_dv = (max(16, next_power_of_2(dim)) for dim in (head_dim, v_dim))
    return {"HEAD_DIM": head_dim, "V_DIM": v_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv}
