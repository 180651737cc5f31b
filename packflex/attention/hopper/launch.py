"""Launchers of the Hopper kernels: descriptors and results. What does not change from call to call is in `cases`."""

from __future__ import annotations

import torch
from torch import Tensor

from packflex.attention.hopper.backward import SUMS_BEFORE
from packflex.attention.hopper.cases import backward_case, forward_case
from packflex.attention.hopper.descriptors import tma_readable
from packflex.attention.hopper.forward import LOG2_E
from packflex.attention.hopper.mods import BoundMod
from packflex.attention.hopper.prepare import STATS_BEFORE
from packflex.attention.memory import new_bshd

_LOG2_E = LOG2_E.value
_BEFORE_SUMS, _BEFORE_STATS = SUMS_BEFORE.value, STATS_BEFORE.value


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
    q, k, v = tma_readable(q), tma_readable(k), tma_readable(v)
    if kv_intervals.stride(2) != 1:  # the one interval of "every query sees every key", expanded
        kv_intervals = kv_intervals.contiguous()
    case = forward_case(
        q.device, q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.stride(), kv_intervals.stride(),
        kv_intervals.dtype, None if sinks is None else sinks.dtype, softcap > 0, tuple(tile_list), long_spans,
        mod.functions if mod else None,
    )  # fmt: skip
    out = new_bshd(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    plan = case.order(kv_intervals)
    kv_lo, kv_hi = kv_intervals.unbind()
    # Triton specialises on what is in a mod's tuple of arguments
    launch = case.launch if mod is None else case.launch.looked_up
    launch(
        case.q(q), case.k(k), case.v(v), case.out(out), lse, lse if sinks is None else sinks, kv_lo, kv_hi, plan,
        *case.sizes, *(score_factors(scale, softcap) if mod is None else mod.factors(scale)),
        mod.arguments if mod else (0,),
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
    q, k, v, grad_out = tma_readable(q), tma_readable(k), tma_readable(v), tma_readable(grad_out)
    kv_intervals, q_intervals = (x if x.stride(2) == 1 else x.contiguous() for x in (kv_intervals, q_intervals))
    given_lse = lse if grad_lse is None else grad_lse
    case = backward_case(
        q.device, q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.stride(), out.stride(), grad_out.stride(),
        None if grad_lse is None else grad_lse.stride(), q_intervals.stride(), kv_intervals.stride(),
        (grad_out.dtype, out.dtype, lse.dtype, given_lse.dtype, q_intervals.dtype, kv_intervals.dtype),
        (out.data_ptr() % 16, lse.data_ptr() % 16, given_lse.data_ptr() % 16), softcap > 0, tuple(tile_list),
        long_spans, mod.functions if mod else None,
    )  # fmt: skip
    all_sums = torch.empty(case.sums_shape, dtype=torch.float32, device=q.device)
    sums = all_sums[_BEFORE_SUMS:]
    grad_q, grad_k, grad_v = new_bshd(q), new_bshd(k), new_bshd(v)
    lse_2, delta = torch.empty((2, case.stats), dtype=torch.float32, device=q.device).unbind()

    case.prepare(out, grad_out, given_lse, lse, lse_2, delta, sums, *case.prepared)
    plan = case.order(q_intervals)
    q_lo, q_hi = q_intervals.unbind()
    launch = case.launch if mod is None else case.launch.looked_up
    launch(
        case.q(q), case.grad_out(grad_out), case.k(k), case.v(v), case.stat(lse_2), case.stat(delta),
        case.sums(all_sums), case.grad_k(grad_k), case.grad_v(grad_v), grad_k, grad_v, q_lo, q_hi, kv_intervals[1],
        plan, scale, *(score_factors(scale, softcap) if mod is None else mod.factors(scale)),
        mod.arguments if mod else (0,),
    )  # fmt: skip
    case.cast(sums, grad_q, q.shape[2], q.shape[1], scale)
    if not want_delta:
        return grad_q, grad_k, grad_v, None
    batch, units, q_len, packed = case.rows_shape
    rows = delta[_BEFORE_STATS:][: batch * units * q_len * packed].view(case.rows_shape)
    return grad_q, grad_k, grad_v, rows.transpose(2, 3).reshape(batch, units * packed, q_len)


def score_factors(scale: float, softcap: float) -> tuple[float, float, float]:
    """Factors that bring scores to base 2: `sm` on the (capped) product, `cap_in` and `cap_out` around the tanh."""
    if softcap:
        return 1.0, 2 * _LOG2_E * scale / softcap, softcap * _LOG2_E
    return scale * _LOG2_E, 0.0, 0.0
