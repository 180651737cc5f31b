"""Attention with any score_mod and any mask: from the user's functions to the op's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packflex.attention.mods.ops import blocks_of, mod_attention, mod_max_scores
from packflex.masks.block_mask import BlockMask
from packflex.mods.bounds import check_elements
from packflex.mods.lifted import Lifted, lift
from packflex.mods.nodes import EXACT_INDICES


def attention_with_mods(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    intervals: tuple[Tensor, Tensor] | None,
    score_mod: Callable[..., Any] | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    tiles: list[int],
    long_spans: bool,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out and lse through the printed kernels; `intervals` are those of the mask, or None when it holds lists.

    `backend` is "triton", or for masks of intervals "hopper" or "best", the faster of the two with the mod.
    """
    mask_mod, kv_blocks, q_blocks, tile, ragged = _walked(q, k, mask, intervals, backend)
    if torch.compiler.is_compiling():
        from packflex.attention.mods.compiled import compiled_attention_with_mods

        return compiled_attention_with_mods(
            q, k, v, kv_blocks, q_blocks, mask_mod, score_mod, sinks, tile, ragged, scale, softcap, tiles, long_spans,
            deterministic, backend,
        )  # fmt: skip
    captures, ints, floats, score_key, mask_key = _programs(q, k, mask_mod, score_mod)
    out, lse = mod_attention(
        q, k, v, kv_blocks, q_blocks, captures, sinks, ints, floats, score_key, mask_key, list(tile), ragged, scale,
        softcap, tiles, long_spans, deterministic, backend,
    )  # fmt: skip
    return out, lse


def max_scores_with_mods(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    intervals: tuple[Tensor, Tensor] | None,
    score_mod: Callable[..., Any] | None,
    scale: float,
    softcap: float,
    long_spans: bool,
) -> Tensor:
    """The largest score of each query through the printed portable kernels; arguments as `attention_with_mods`."""
    mask_mod, kv_blocks, _, tile, ragged = _walked(q, k, mask, intervals, "triton")
    captures, ints, floats, score_key, mask_key = _programs(q, k, mask_mod, score_mod)
    return mod_max_scores(
        q, k, v, kv_blocks, captures, ints, floats, score_key, mask_key, list(tile), ragged, scale, softcap, long_spans
    )


def _walked(
    q: Tensor, k: Tensor, mask: BlockMask | None, intervals: tuple[Tensor, Tensor] | None, backend: str
) -> tuple[Callable[..., Any] | None, list[Tensor], list[Tensor], tuple[int, int], bool]:
    """The mask_mod of list masks, what is walked from both sides, and the lists' tile and raggedness."""
    if max(q.shape[2], k.shape[2]) > EXACT_INDICES:
        raise NotImplementedError(
            f"mods take rows of up to {EXACT_INDICES} tokens; got {q.shape[2]} queries and {k.shape[2]} keys"
        )
    if intervals is not None:
        kv_blocks, q_blocks = (blocks_of(backend, x) for x in intervals)
        return None, kv_blocks, q_blocks, (0, 0), False
    assert mask is not None
    kv = [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices]
    queries = [mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices]
    kv_blocks, q_blocks = ([x.contiguous() for x in lists] for lists in (kv, queries))
    return mask.mask_mod, kv_blocks, q_blocks, mask.BLOCK_SIZE, mask.ragged


def _programs(
    q: Tensor, k: Tensor, mask_mod: Callable[..., Any] | None, score_mod: Callable[..., Any] | None
) -> tuple[list[Tensor], list[int], list[float], str, str]:
    """Captured tensors and numbers of the mask's program and then the score's, and the keys of score and mask."""
    masked = None if mask_mod is None else lift(mask_mod, "mask", q.device)
    scored = None if score_mod is None else lift(score_mod, "score", q.device)
    if score_mod is not None and scored is not None and q.numel() and k.numel():
        check_elements(score_mod, scored, q.device)
    captures: list[Tensor] = []
    ints: list[int] = []
    floats: list[float] = []
    for lifted in (masked, scored):
        if lifted is not None:
            captures += _on_device(lifted, q, learned=lifted is scored)
            for scalar, number in zip(lifted.program.scalars, lifted.numbers, strict=True):
                (floats if scalar.role == "float" else ints).append(number)  # type: ignore[arg-type]
    return captures, ints, floats, scored.key if scored else "", masked.key if masked else ""


def _on_device(lifted: Lifted, q: Tensor, learned: bool) -> list[Tensor]:
    """Captured tensors as the kernels take them: on the device, contiguous where they get a gradient.

    A mask is true or false, and sends none.
    """
    captures = []
    for slot, tensor in enumerate(lifted.captures):
        if tensor.requires_grad and not (learned and torch.is_grad_enabled()):
            tensor = tensor.detach()
        if tensor.device != q.device:
            tensor = tensor.to(q.device)  # a 0-d tensor; the tracer refuses others
        if tensor.requires_grad:
            tensor = tensor.contiguous()
        assert tensor.dim() == lifted.program.layouts[slot].rank
        captures.append(tensor)
    return captures
