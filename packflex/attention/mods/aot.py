"""Ahead-of-time compilation of printed kernels for a named architecture, without a GPU: what it says of each tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from packflex.attention.mods.kernel_text import Request, shares_heads
from packflex.attention.mods.launch import _SOME_SPILLS, _WORTH_SPILLS, candidate_tiles, fitted_tile, kernel_module
from packflex.attention.triton.aot import Compiled, compile_for
from packflex.attention.triton.launch import _PRECISION, _dims
from packflex.attention.triton.tiles import Tile, edge_rows, heads_per_tile
from packflex.mods.lifted import lift
from packflex.mods.nodes import Program

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.bool: "*u8",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip


def compile_mod_kernels(
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    *,
    group: int = 4,
    long: bool = False,
    softcap: bool = False,
    block_size: tuple[int, int] = (128, 128),
    deterministic: bool = False,
) -> list[tuple[Tile, Compiled]]:
    """Compile the printed forward, dK/dV and dQ, each with its candidate tiles in order up to the first that is clean.

    Args:
        capability: 80 for A100, 90 for H100 and H200.
        dtype: of q, k and v.
        head_dim: D, and Dv.
        score_mod, mask_mod: with captured tensors on the CPU; without a `mask_mod` the mask is made of intervals.
        group: query heads on a KV head.
        long: take the table's tiles for long spans first.
        softcap: compile with a softcap.
        block_size: of a mask in list form.
        deterministic: compile the second pass of the deterministic sums.

    Returns:
        For each kernel the first clean tile, or the one with the fewest spills, and its report.
    """
    device = torch.device("cpu")
    score = None if score_mod is None else lift(score_mod, "score", device).program
    mask = None if mask_mod is None else lift(mask_mod, "mask", device).program
    reports = []
    for name in ("forward", "dkdv", "dq"):
        gradients = name != "forward" and score is not None and bool(score.gradients)
        tiles = candidate_tiles(name, dtype, head_dim, capability, softcap, long, score, mask is not None)
        found: list[tuple[Tile, Compiled]] = []
        for tile in tiles:
            alone = gradients and score is not None and not shares_heads(name, score)
            heads = 1 if alone else heads_per_tile(group, tile)
            fitted = tile if mask is None else fitted_tile(tile, heads, block_size)
            request = Request(score, mask, packed=heads > 1, gradients=gradients, softcap=softcap)
            report = _compile(
                name, request, capability, dtype, head_dim, group, heads, fitted, softcap, block_size, deterministic
            )
            found.append((fitted, report))
            # the report counts bytes, stored and loaded: eight for a register
            if report.clean or (tile in _WORTH_SPILLS and report.spills <= 8 * _SOME_SPILLS):
                break
        reports.append(min(found, key=lambda pair: pair[1].spills))
    return reports


def compile_mask_tiles(
    capability: int, mask_mod: Callable[..., Any], block_size: tuple[int, int] = (128, 128)
) -> Compiled:
    """Compile the printed kernel that classifies the tiles of a `mask_mod`; arguments as above."""
    from packflex.masks.tile_kernel import tile_constants, tile_kernel_module

    lifted = lift(mask_mod, "mask", torch.device("cpu"))
    kernel = tile_kernel_module(lifted.key).mask_tiles
    types = mod_types("m", lifted.program, False) | {"STATE": "*i8"}
    return compile_for(kernel, capability, torch.float32, tile_constants(lifted.program, block_size), 4, 1, types)


def _compile(
    name: str, request: Request, capability: int, dtype: torch.dtype, head_dim: int, group: int, heads: int,
    tile: Tile, softcap: bool, block_size: tuple[int, int], deterministic: bool,
) -> Compiled:  # fmt: skip
    kernel_name = "mod_forward" if name == "forward" else f"mod_{name}"
    kernel = getattr(kernel_module(kernel_name, request), kernel_name)
    constants: dict[str, Any] = dict(
        GROUP=group, HEADS=heads, **_dims(head_dim, head_dim), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        SOFTCAP=softcap, PRECISION=_PRECISION,
    )  # fmt: skip
    if request.lists:
        constants |= {"MASK_M": block_size[0], "MASK_N": block_size[1]}
    if name == "forward":
        constants |= {"HAS_SINKS": False}
    else:
        constants |= {"GRAD_MODE": 2 if deterministic else 0}
    if name == "dkdv":
        constants |= {"EDGE_M": max(edge_rows(tile), 16)}
    types: dict[str, str] = {}
    for prefix, program in (("m", request.mask), ("x", request.score)):
        if program is not None:
            types |= mod_types(prefix, program, deterministic)
    return compile_for(kernel, capability, dtype, constants, tile.num_warps, tile.num_stages, types)


def mod_types(prefix: str, program: Program, deterministic: bool) -> dict[str, str]:
    """The types of the parameters that a program adds to a kernel."""
    types = {}
    for slot, layout in enumerate(program.layouts):
        types[f"{prefix}c{slot}"] = _POINTERS[layout.dtype]
        types[f"{prefix}_sum{slot}"] = "*i64" if deterministic else "*fp32"
        types[f"{prefix}_factor{slot}"] = "*fp32"
    for slot, scalar in enumerate(program.scalars):
        types[f"{prefix}s{slot}"] = "fp32" if scalar.role == "float" else "i32"
    return types
