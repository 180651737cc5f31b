"""The torch.library op under attention with traced mods: schema, fakes and autograd.

Programs are named by their key in `packflex.mods.lifted.PROGRAMS`; what they capture and the numbers they hold are
arguments of the op, so that captured tensors get gradients and a changed number changes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from packflex.attention import reference
from packflex.attention.memory import new_bshd
from packflex.mods.lifted import PROGRAMS
from packflex.mods.nodes import Program


def blocks_of(backend: str, intervals: Tensor) -> list[Tensor]:
    """Intervals in one tensor as a backend's op takes them."""
    return [intervals[0], intervals[1]] if backend == "triton" else [intervals]


def _on_hopper(backend: str, score_key: str) -> bool:
    if backend == "best":
        from packflex.attention.hopper.mods import is_light

        return is_light(PROGRAMS[score_key])
    return backend == "hopper"


def _call(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
    score_key: str, mask_key: str, scale: float, softcap: float, tiles: list[int], long_spans: bool,
) -> Any:  # fmt: skip
    from packflex.attention.mods.launch import Call, Given

    tensors, whole, real = list(captures), list(ints), list(floats)
    given: list[Given | None] = []
    for key in (mask_key, score_key):
        if not key:
            given.append(None)
            continue
        program = PROGRAMS[key]
        count = len(program.layouts)
        mine, tensors = tensors[:count], tensors[count:]
        given.append(Given(program, mine, _taken(program, whole, real)))
    return Call(q, k, v, given[1], given[0], scale, softcap, tiles, long_spans)


def _hopper_mod(score_key: str, captures: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Any:
    from packflex.attention.hopper.mods import bound_mod

    program = PROGRAMS[score_key]
    return bound_mod(program, list(captures), _taken(program, list(ints), list(floats)))


def _taken(program: Program, ints: list[int], floats: list[float]) -> list[float | int]:
    """A program's numbers by slot, taken from the front of those of all programs."""
    return [floats.pop(0) if scalar.role == "float" else ints.pop(0) for scalar in program.scalars]


def _blocks(tensors: Sequence[Tensor], mask_tile: Sequence[int], ragged: bool) -> Any:
    from packflex.attention.mods.launch import Blocks

    return Blocks(tuple(tensors), (mask_tile[0], mask_tile[1]), ragged)


@torch.library.custom_op("packflex::mod_attention", mutates_args=())
def mod_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_blocks: Sequence[Tensor],
    q_blocks: Sequence[Tensor],
    captures: Sequence[Tensor],
    sinks: Tensor | None,
    ints: Sequence[int],
    floats: Sequence[float],
    score_key: str,
    mask_key: str,
    mask_tile: Sequence[int],
    ragged: bool,
    scale: float,
    softcap: float,
    tiles: Sequence[int],
    long_spans: bool,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention with traced mods: out [B, Hq, S, Dv] and lse float32 [B, Hq, S].

    `kv_blocks` are the intervals (lo, hi) or the lists of `BlockMask`, `q_blocks` the same from the keys' side;
    `captures`, `ints` and `floats` those of the mask's program, then of the score's. `backend` is "triton", "hopper" or
    "best", the one of the two that is faster with the mod. But with "triton" the blocks are intervals in one tensor.
    With "hopper" the backward runs on its kernels unless captured tensors get gradients.
    """
    if _on_hopper(backend, score_key):
        from packflex.attention.hopper.launch import launch_forward as launch_hopper_forward

        mod = _hopper_mod(score_key, captures, ints, floats)
        return launch_hopper_forward(q, k, v, kv_blocks[0], sinks, scale, softcap, list(tiles), long_spans, mod)
    if backend == "best":
        kv_blocks = [*kv_blocks[0]]
    from packflex.attention.mods.launch import launch_forward

    call = _call(q, k, v, captures, ints, floats, score_key, mask_key, scale, softcap, list(tiles), long_spans)
    return launch_forward(call, _blocks(kv_blocks, mask_tile, ragged), sinks)


@mod_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, kv_blocks: Any, q_blocks: Any, captures: Any, sinks: Any, ints: Any, floats: Any,
    score_key: str, mask_key: str, mask_tile: Any, ragged: bool, scale: float, softcap: float, tiles: Any,
    long_spans: bool, deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return new_bshd(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.no_grad()
def mod_max_scores(
    q: Tensor, k: Tensor, v: Tensor, kv_blocks: Sequence[Tensor], captures: Sequence[Tensor], ints: Sequence[int],
    floats: Sequence[float], score_key: str, mask_key: str, mask_tile: Sequence[int], ragged: bool, scale: float,
    softcap: float, long_spans: bool,
) -> Tensor:  # fmt: skip
    """The largest score of each query, float32 [B, Hq, S]: a forward of its own; arguments as `mod_attention`."""
    from packflex.attention.mods.launch import launch_forward

    call = _call(q, k, v, captures, ints, floats, score_key, mask_key, scale, softcap, [], long_spans)
    call.maxima = True
    return launch_forward(call, _blocks(kv_blocks, mask_tile, ragged), None)[1]


@torch.library.custom_op("packflex::mod_attention_backward", mutates_args=())
def mod_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: Sequence[int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_blocks: Sequence[Tensor],
    q_blocks: Sequence[Tensor],
    captures: Sequence[Tensor],
    sinks: Tensor | None,
    ints: Sequence[int],
    floats: Sequence[float],
    score_key: str,
    mask_key: str,
    mask_tile: Sequence[int],
    ragged: bool,
    scale: float,
    softcap: float,
    tiles: Sequence[int],
    long_spans: bool,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients to q, k, v, the sinks (of size 0 without) and the captured tensors `wanted` (places in `captures`)."""
    if not wanted and not deterministic and _on_hopper(backend, score_key):
        from packflex.attention.hopper.launch import launch_backward as launch_hopper_backward

        grad_q, grad_k, grad_v, delta_or_none = launch_hopper_backward(
            grad_out, grad_lse, q, k, v, out, lse, kv_blocks[0], q_blocks[0], scale, softcap, list(tiles), long_spans,
            sinks is not None, _hopper_mod(score_key, captures, ints, floats),
        )  # fmt: skip
        grad_sinks = None if delta_or_none is None else reference.sink_gradient(sinks, lse, delta_or_none)
        return grad_q, grad_k, grad_v, q.new_empty(0) if grad_sinks is None else grad_sinks, []
    if backend != "triton":
        kv_blocks, q_blocks, tiles = [*kv_blocks[0]], [*q_blocks[0]], []
    from packflex.attention.mods.launch import launch_backward

    call = _call(q, k, v, captures, ints, floats, score_key, mask_key, scale, softcap, list(tiles), long_spans)
    first = len(captures) - (len(call.score.captures) if call.score is not None else 0)
    tile = tuple(mask_tile)
    grad_q, grad_k, grad_v, delta, found = launch_backward(
        call, _blocks(kv_blocks, tile, ragged), _blocks(q_blocks, tile, ragged), grad_out, grad_lse, out, lse,
        tuple(place - first for place in wanted), deterministic,
    )  # fmt: skip
    grad_sinks = reference.sink_gradient(sinks, lse, delta)
    captured = [x for x in (found[place - first] for place in wanted) if x is not None]
    return grad_q, grad_k, grad_v, q.new_empty(0) if grad_sinks is None else grad_sinks, captured


@mod_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Any, out: Tensor, lse: Tensor, wanted: Any, q: Tensor, k: Tensor, v: Tensor,
    kv_blocks: Any, q_blocks: Any, captures: Any, sinks: Any, ints: Any, floats: Any, score_key: str, mask_key: str,
    mask_tile: Any, ragged: bool, scale: float, softcap: float, tiles: Any, long_spans: bool, deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    grad_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    captured = [torch.empty_like(captures[place], memory_format=torch.contiguous_format) for place in wanted]
    return new_bshd(q), new_bshd(k), new_bshd(v), grad_sinks, captured


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_blocks, q_blocks, captures, sinks, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.counts = (len(kv_blocks), len(q_blocks), len(captures))
    ctx.wanted = [place for place, x in enumerate(captures) if x.requires_grad]
    ctx.save_for_backward(q, k, v, *output, sinks, *kv_blocks, *q_blocks, *captures)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, sinks, *rest = ctx.saved_tensors
    n_kv, n_q, n_captures = ctx.counts
    kv_blocks, q_blocks, captures = rest[:n_kv], rest[n_kv : n_kv + n_q], rest[n_kv + n_q :]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_q, grad_k, grad_v, grad_sinks, captured = mod_attention_backward(
        grad_out, grad_lse, out, lse, ctx.wanted, q, k, v, kv_blocks, q_blocks, captures, sinks, *ctx.options
    )
    places = dict(zip(ctx.wanted, captured, strict=True))
    grads = [places.get(place) for place in range(n_captures)]
    return (
        grad_q, grad_k, grad_v, [None] * n_kv, [None] * n_q, grads, grad_sinks if sinks is not None else None,
        *([] if isinstance(option, list | tuple) and not option else None for option in ctx.options),
    )  # fmt: skip


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        'packflex.flex_attention has no second derivative (double backward) with its kernels; backend="reference" has'
    )


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


mod_attention.register_autograd(_backward, setup_context=_setup_context)
mod_attention_backward.register_autograd(_no_double_backward, setup_context=_setup_nothing)
