"""Launchers of the printed kernels: which kernel, which tiles, which grid, and its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from packflex.attention.memory import new_bshd
from packflex.attention.mods.column_kernel import dkdv_text
from packflex.attention.mods.kernel_text import Request, shares_heads, with_header
from packflex.attention.mods.row_kernels import dq_text, forward_text
from packflex.attention.triton.launch import (
    _PRECISION,
    _capability,
    _check_runnable,
    _dims,
    _last_axis_contiguous,
    interpreted,
    launch_statistics,
)
from packflex.attention.triton.tiles import KernelTiles, Tile, default_tiles, edge_rows, heads_per_tile
from packflex.integers import ceil_div
from packflex.mods import source
from packflex.mods.errors import short_name
from packflex.mods.nodes import Program, ordered
from packflex.mods.printer import arguments

# Between the tables' tiles for long spans and those for short ones, on Hopper: as many keys, fewer queries at a time
_LEAN_DKDV, _LEAN_DQ = Tile(32, 128, 8, 3), Tile(128, 32, 8, 3)
_LEAN_AMPERE = KernelTiles(Tile(64, 64, 8, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2))
# Where a mod computes this many nodes for each element, 4 warps of 64 rows are faster than 8 of 128
_BUSY, _BUSY_FORWARD = 3, Tile(64, 64, 4, 3)
# Masks in list form are evaluated for each element: the fewer tiles, the less is repeated for each
_LISTS_DQ = Tile(128, 64, 8, 3)
# Registers a thread may spill in a tile that is taken all the same; more of them in tiles that were measured with them
_FEW_SPILLS, _SOME_SPILLS = 8, 64
_WORTH_SPILLS = {Tile(32, 64, 4, 3), _LEAN_DKDV, _BUSY_FORWARD}
# Bits that a 64-bit sum of a deterministic backward has for one contribution and all that are added to it
_SUM_BITS = 62


@dataclass
class Given:
    """A program with what it is launched on: captured tensors and numbers, in the order of its slots."""

    program: Program
    captures: list[Tensor]
    numbers: list[float | int]

    def arguments(self) -> list[Any]:
        """The kernel's arguments."""
        return arguments(self.program, self.captures, self.numbers)


@dataclass
class Blocks:
    """Which blocks are visited: intervals, or torch's lists of one direction.

    Attributes:
        tensors: (lo, hi) int32 [B, S] each, or (num_blocks, indices, full_num_blocks, full_indices).
        tile: (rows, columns) of the mask's own tiles in list form.
        ragged: see `kernel_text.Request`.
    """

    tensors: tuple[Tensor, ...]
    tile: tuple[int, int] = (0, 0)
    ragged: bool = False

    @property
    def lists(self) -> bool:
        """Whether they are lists."""
        return len(self.tensors) == 4

    def numbers(self) -> list[int]:
        """The strides that the kernels take."""
        if not self.lists:
            return list(self.tensors[0].stride())
        num, indices = self.tensors[:2]
        batch, heads, tiles = num.shape
        return [heads * tiles if batch > 1 else 0, tiles if heads > 1 else 0, indices.shape[3]]


@dataclass
class Call:
    """What forward and backward share."""

    q: Tensor
    k: Tensor
    v: Tensor
    score: Given | None
    mask: Given | None
    scale: float
    softcap: float
    tiles: list[int]
    long_spans: bool
    maxima: bool = False
    request: Request = field(init=False)

    def __post_init__(self) -> None:
        _check_runnable(self.q, self.v)
        self.q, self.k, self.v = (_last_axis_contiguous(x) for x in (self.q, self.k, self.v))

    def strides(self) -> tuple[int, ...]:
        """Of q, k and v."""
        return (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3])

    def mod_arguments(self) -> list[Any]:
        """Of the mask's program and then the score's."""
        return [x for given in (self.mask, self.score) if given is not None for x in given.arguments()]

    def constants(self, tile: Tile, heads: int, blocks: Blocks) -> dict[str, Any]:
        """The constants of a kernel with this tile."""
        group = self.q.shape[1] // self.k.shape[1]
        found: dict[str, Any] = dict(
            GROUP=group, HEADS=heads, **_dims(self.q.shape[3], self.v.shape[3]),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SOFTCAP=self.softcap > 0, PRECISION=_PRECISION,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if blocks.lists:
            found |= {"MASK_M": blocks.tile[0], "MASK_N": blocks.tile[1]}
        return found


@lru_cache(maxsize=256)
def kernel_module(name: str, request: Request) -> ModuleType:
    """The module of a printed kernel: "mod_forward", "mod_dkdv" or "mod_dq"."""
    kernels = {"mod_forward": forward_text, "mod_dq": dq_text, "mod_dkdv": dkdv_text}
    named = " and ".join(short_name(p.name) for p in (request.mask, request.score) if p is not None)
    return source.load(with_header(f"{name} of {named}", kernels[name](request)))


def _heads(call: Call, name: str, tile: Tile, blocks: Blocks, gradients: bool) -> int:
    """Query heads of a group in a tile's rows: one where a list or the sum of a captured gradient differs by head."""
    if blocks.lists and blocks.tensors[0].shape[1] > 1:
        return 1
    if gradients and call.score is not None and not shares_heads(name, call.score.program):
        return 1
    return heads_per_tile(call.q.shape[1] // call.k.shape[1], tile)


def _fit(tile: Tile, heads: int, blocks: Blocks) -> Tile:
    return fitted_tile(tile, heads, blocks.tile) if blocks.lists else tile


def fitted_tile(tile: Tile, heads: int, mask_tile: tuple[int, int]) -> Tile:
    """The tile made small enough that it divides the tiles of a mask in list form."""
    rows, columns = mask_tile
    block_m, block_n = tile.block_m, tile.block_n
    while rows * heads % block_m:
        block_m //= 2
    while columns % block_n:
        block_n //= 2
    if min(block_m, block_n) < 16:
        raise NotImplementedError(
            f'backend="triton" walks masks whose BLOCK_SIZE is a multiple of 16; got {mask_tile}: build the mask '
            "with BLOCK_SIZE=128"
        )
    return Tile(block_m, block_n, tile.num_warps, tile.num_stages, tile.max_heads)


def candidate_tiles(
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: int,
    softcap: bool,
    long: bool,
    score: Program | None,
    lists: bool,
) -> list[Tile]:
    """Tiles of "forward", "dkdv" or "dq" to try in order: the tables', then leaner ones for mods of many registers."""
    kinds = ((softcap, long), (softcap, False), (True, False))
    tables = [default_tiles(dtype, head_dim, capability, *kind) for kind in kinds]
    tiles = list(dict.fromkeys(getattr(table, name) for table in tables))
    if dtype != torch.float32 and head_dim <= 128 and capability // 10 in (9, 10):
        if name == "forward" and head_dim > 64 and (lists or (long and _is_busy(score))):
            tiles.insert(0, _BUSY_FORWARD)
        if name == "dq" and head_dim > 64 and lists:
            tiles.insert(0, _LISTS_DQ)
        if name != "forward":
            tiles.insert(2, {"dkdv": _LEAN_DKDV, "dq": _LEAN_DQ}[name])
    elif dtype != torch.float32 and head_dim <= 64:
        tiles.append(getattr(_LEAN_AMPERE, name))
    return tiles


def _is_busy(score: Program | None) -> bool:
    """Whether a mod computes more than a little for each element."""
    if score is None:
        return False
    return sum(node.is_full and node.op != "input" for node in ordered([score.out])) >= _BUSY


def _resolved(call: Call, name: str) -> list[Tile]:
    dim, capability = max(call.q.shape[3], call.v.shape[3]), _capability(call.q.device)
    score = None if call.score is None else call.score.program
    lists = call.mask is not None
    tiles = candidate_tiles(name, call.q.dtype, dim, capability, call.softcap > 0, call.long_spans, score, lists)
    if call.tiles:
        at = {"forward": 0, "dkdv": 5, "dq": 10}[name]
        given = call.tiles[at : at + 5]
        default = tiles[0]
        own = (default.block_m, default.block_n, default.num_warps, default.num_stages, default.max_heads)
        if any(given):
            return [Tile(*(g or d for g, d in zip(given, own, strict=True)))]
    return tiles


_chosen: dict[Any, Tile] = {}


@dataclass(frozen=True)
class _Launch:
    """A printed kernel about to be launched: whose call, which blocks, and what depends on the tile."""

    call: Call
    name: str
    blocks: Blocks
    gradients: bool
    fixed: list[Any]
    grid: Callable[[Tile, int], tuple[int, int, int]]
    extra: Callable[[Tile, int], dict[str, Any]]

    def run(self) -> None:
        """Launch it with the first of its tiles that spills hardly any registers; on the interpreter, the last."""
        tiles = _resolved(self.call, self.name)
        if interpreted():
            tiles = tiles[-1:]
        call, blocks = self.call, self.blocks
        signature = (
            self.name, call.score and call.score.program, call.mask and call.mask.program, blocks.tile, blocks.ragged,
            self.gradients, tuple(tiles), call.q.dtype, call.q.shape[3], call.v.shape[3],
            call.q.shape[1] // call.k.shape[1], call.softcap > 0, call.q.device,
            blocks.lists and blocks.tensors[0].shape[1] > 1, call.maxima,
        )  # fmt: skip
        tile = _chosen.get(signature)
        if tile is None:
            tile = _chosen[signature] = self._leanest(tiles)
        kernel, grid, constants = self._prepared(tile)
        kernel[grid](*self.fixed, **constants)

    def _leanest(self, tiles: list[Tile]) -> Tile:
        """The first tile that spills few registers, or the one that spills the fewest."""
        spills: dict[Tile, int] = {}
        for tile in tiles if len(tiles) > 1 else []:
            kernel, grid, constants = self._prepared(tile)
            try:
                compiled = kernel.warmup(*self.fixed, grid=grid, **constants)
                compiled._init_handles()
            except triton.runtime.errors.OutOfResources:  # a mod's own tiles may take too much shared memory
                continue
            spills[tile] = compiled.n_spills
            if compiled.n_spills <= (_SOME_SPILLS if tile in _WORTH_SPILLS else _FEW_SPILLS):
                return tile
        return min(spills or tiles, key=lambda tile: spills.get(tile, 0))

    def _prepared(self, tile: Tile) -> tuple[Any, tuple[int, int, int], dict[str, Any]]:
        """The kernel, its grid and its constants."""
        call, blocks = self.call, self.blocks
        heads = _heads(call, self.name, tile, blocks, self.gradients)
        fitted = _fit(tile, heads, blocks)
        if (fewer := _heads(call, self.name, fitted, blocks, self.gradients)) != heads:
            heads, fitted = fewer, _fit(fitted, fewer, blocks)
        request = Request(
            None if call.score is None else call.score.program,
            None if call.mask is None else call.mask.program,
            blocks.ragged,
            heads > 1,
            self.gradients,
            call.softcap > 0,
            call.scale > 0,
            call.maxima,
        )
        kernel_name = f"mod_{self.name}"
        kernel = getattr(kernel_module(kernel_name, request), kernel_name)
        return kernel, self.grid(fitted, heads), call.constants(fitted, heads, blocks) | self.extra(fitted, heads)


def launch_forward(call: Call, blocks: Blocks, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """out [B, Hq, S, Dv] and lse float32 [B, Hq, S], or with the call's `maxima` the largest scores."""
    q, k, v = call.q, call.k, call.v
    batch, heads, q_len, _ = q.shape
    out = new_bshd(q, v.shape[3])
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    fixed = [
        q, k, v, q if sinks is None else sinks, *blocks.tensors, out, lse, *call.strides(), *out.stride()[:3],
        *blocks.numbers(), q_len, k.shape[2], call.scale, call.softcap, *call.mod_arguments(),
    ]  # fmt: skip

    def grid(tile: Tile, packed: int) -> tuple[int, int, int]:
        return (ceil_div(q_len * packed, tile.block_m), heads // packed, batch)

    _Launch(call, "forward", blocks, False, fixed, grid, lambda tile, packed: {"HAS_SINKS": sinks is not None}).run()
    return out, lse


def launch_backward(
    call: Call,
    kv_blocks: Blocks,
    q_blocks: Blocks,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: tuple[int, ...],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Gradients to q, k, v; delta [B, Hq, S]; and those of the score's captured tensors, None where not `wanted`."""
    q, k, v = call.q, call.k, call.v
    grad_out = _last_axis_contiguous(grad_out)
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    grad_q, grad_k, grad_v = (new_bshd(x) for x in (q, k, v))
    lse2, delta = launch_statistics(out, grad_out, grad_lse, lse)
    gradients = bool(wanted)
    captures = [] if call.score is None else call.score.captures
    one = torch.ones(1, dtype=torch.float32, device=q.device)

    def both(sums: dict[int, Tensor], factors: dict[int, Tensor], mode: int) -> None:
        mods = call.mod_arguments()

        def slots(*places: str) -> list[Tensor]:
            found = _slots(call, places) if gradients else []
            return [x for slot in found for x in (sums[slot], factors.get(slot, one))]

        shared = [q, k, v, grad_out, lse2, delta]
        fixed = [
            *shared, *q_blocks.tensors, grad_k, grad_v, *call.strides(), *grad_out.stride()[:3], *grad_k.stride()[:3],
            *grad_v.stride()[:3], *q_blocks.numbers(), q_len, kv_len, call.scale, call.softcap, *mods,
            *slots("columns"),
        ]  # fmt: skip
        _Launch(
            call, "dkdv", q_blocks, gradients, fixed,
            lambda tile, packed: (ceil_div(kv_len, tile.block_n), kv_heads, batch),
            lambda tile, packed: {"EDGE_M": max(edge_rows(tile), 16), "GRAD_MODE": mode},
        ).run()  # fmt: skip
        fixed = [
            *shared, *kv_blocks.tensors, grad_q, *call.strides(), *grad_out.stride()[:3], *grad_q.stride()[:3],
            *kv_blocks.numbers(), q_len, kv_len, call.scale, call.softcap, *mods, *slots("rows", "tile"),
        ]  # fmt: skip
        _Launch(
            call, "dq", kv_blocks, gradients, fixed,
            lambda tile, packed: (ceil_div(q_len * packed, tile.block_m), heads // packed, batch),
            lambda tile, packed: {"GRAD_MODE": mode},
        ).run()  # fmt: skip

    results: list[Tensor | None] = [None] * len(captures)
    if not gradients:
        both({}, {}, 0)
        return grad_q, grad_k, grad_v, delta, results
    every = _slots(call, ("rows", "tile", "columns"))
    if deterministic:
        largest = {slot: torch.zeros(1, dtype=torch.int32, device=q.device) for slot in every}
        both(largest, {}, 1)
        bits = _SUM_BITS - max(1, (batch * heads * q_len * kv_len - 1).bit_length())
        # a power of two: multiplying and dividing by it rounds nothing
        exponents = {slot: torch.frexp(size.view(torch.float32))[1] for slot, size in largest.items()}
        factors = {slot: torch.ldexp(one, (bits - e).clamp(-126, 126)) for slot, e in exponents.items()}
        sums = {slot: torch.zeros(captures[slot].shape, dtype=torch.int64, device=q.device) for slot in every}
        both(sums, factors, 2)
        totals = {slot: (sums[slot].double() / factors[slot].double()) for slot in every}
    else:
        totals = {slot: torch.zeros(captures[slot].shape, dtype=torch.float32, device=q.device) for slot in every}
        both(totals, {}, 0)
    for slot in wanted:
        # a captured tensor that the result does not depend on has a gradient of 0
        total = totals.get(slot)
        results[slot] = torch.zeros_like(captures[slot]) if total is None else total.to(captures[slot].dtype)
    return grad_q, grad_k, grad_v, delta, results


def _slots(call: Call, places: tuple[str, ...]) -> list[int]:
    """Captured tensors whose gradient is summed in these places, see `CapturedGradient.place`."""
    if call.score is None:
        return []
    found = set()
    for gradient in call.score.program.gradients:
        if gradient.place in places:
            found.add(gradient.slot)
    return sorted(found)
