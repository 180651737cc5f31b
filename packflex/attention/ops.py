"""The torch.library ops under `flex_attention`: schema, fakes and autograd, so that compiled models keep one graph.

`packflex::attention` takes masks as intervals. Lengths, offsets and boundaries are all inside its tensors, so a change
of document boundaries changes no shape and recompiles nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packflex.attention import reference
from packflex.attention.memory import new_bshd


@torch.library.custom_op("packflex::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_intervals: Tensor,
    q_intervals: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    backend: str,
    tiles: list[int],
    long_spans: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Interval attention: out [B, Hq, S, Dv] and lse [B, Hq, S]; arguments as `reference.reference_forward`.

    `backend` is "reference", "triton" or "hopper"; `tiles` that backend's tiles as its `tile_list` makes them, empty
    for the tables; `long_spans` a hint for the tables, see `BlockMask`. `deterministic` asks for a backward that gives
    the same bits in each run.
    """
    if backend == "reference":
        return reference.reference_forward(q, k, v, kv_intervals, sinks, scale, softcap)
    if backend == "hopper":
        from packflex.attention.hopper.launch import launch_forward as launch_hopper_forward

        return launch_hopper_forward(q, k, v, kv_intervals, sinks, scale, softcap, tiles, long_spans)
    from packflex.attention.triton.launch import launch_forward  # Triton only where it runs

    return launch_forward(q, k, v, kv_intervals, sinks, scale, softcap, tiles, long_spans)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_intervals: Tensor,
    q_intervals: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    backend: str,
    tiles: list[int],
    long_spans: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return new_bshd(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.custom_op("packflex::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_intervals: Tensor,
    q_intervals: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    backend: str,
    tiles: list[int],
    long_spans: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and the sinks (of size 0 without sinks) from those of out and lse."""
    if backend == "reference":
        grad_q, grad_k, grad_v, grad_sinks = reference.reference_backward(
            grad_out, grad_lse, q, k, v, out, lse, kv_intervals, sinks, scale, softcap
        )
    else:
        arguments = (grad_out, grad_lse, q, k, v, out, lse, kv_intervals, q_intervals, scale, softcap)
        if backend == "hopper" and not deterministic:
            from packflex.attention.hopper.launch import launch_backward as launch_hopper_backward

            grad_q, grad_k, grad_v, delta = launch_hopper_backward(*arguments, tiles, long_spans, sinks is not None)
        else:
            from packflex.attention.triton.launch import launch_backward  # Triton only where it runs

            if backend == "hopper":  # its backward adds up dQ in no fixed order; the portable one does not
                tiles = []
            grad_q, grad_k, grad_v, delta = launch_backward(*arguments, tiles, long_spans)
        grad_sinks = None if delta is None else reference.sink_gradient(sinks, lse, delta)
    return grad_q, grad_k, grad_v, q.new_empty(0) if grad_sinks is None else grad_sinks


@attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_intervals: Tensor,
    q_intervals: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    backend: str,
    tiles: list[int],
    long_spans: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return new_bshd(q), new_bshd(k), new_bshd(v), grad_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_intervals, q_intervals, sinks, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, kv_intervals, q_intervals, sinks)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, kv_intervals, q_intervals, sinks = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_q, grad_k, grad_v, grad_sinks = attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, kv_intervals, q_intervals, sinks, *ctx.options
    )
    nothing = (None,) * len(ctx.options)
    return grad_q, grad_k, grad_v, None, None, grad_sinks if sinks is not None else None, *nothing


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "packflex.flex_attention has no second derivative (double backward); for one, pass "
        'score_mod=lambda score, b, h, q, kv: score with backend="reference", which autograd differentiates'
    )


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


attention.register_autograd(_backward, setup_context=_setup_context)
attention_backward.register_autograd(_no_double_backward, setup_context=_setup_nothing)
