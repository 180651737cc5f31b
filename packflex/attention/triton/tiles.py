"""Tile sizes of the portable kernels: a frozen record chosen by a pure function of dtype, head dim and architecture.

No tile of the tables spills registers or serialises wgmma (`scripts/aot_check.py`). Those of Hopper for 16-bit types
and head dims up to 128 are the fastest such tiles over the attention workloads on an H200 (`scripts/tune_tiles.py`,
Triton 3.6.0, 2026-11-23); the others have not been timed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: `block_m` rows of queries, `block_n` keys, warps, software pipeline stages.

    Rows are (position, query head) pairs; up to `max_heads` query heads of a KV group share a tile. With 4 heads a tile
    of 128 rows covers 32 positions: on short documents less of it lies outside a document, and K and V are read once
    for the four heads.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_heads: int = 4


@dataclass(frozen=True)
class KernelTiles:
    """Tiles of the three kernels."""

    forward: Tile
    dkdv: Tile
    dq: Tile

    def to_list(self) -> list[int]:
        """All the integers in order, as a torch.library op takes them."""
        return [n for tile in (self.forward, self.dkdv, self.dq) for n in dataclasses.astuple(tile)]


def _tiles(*numbers: int) -> KernelTiles:
    size = len(numbers) // 3
    return KernelTiles(*(Tile(*numbers[i * size : (i + 1) * size]) for i in range(3)))


# fmt: off
_EXACT = {  # float32 without tensor cores: what the registers hold
    (4, 64):  _tiles(64, 32, 8, 1,   32, 32, 8, 1,   32, 32, 4, 1),
    (4, 128): _tiles(32, 32, 8, 1,   16, 16, 8, 1,   16, 16, 4, 1),
    (4, 256): _tiles(32, 16, 8, 1,   16, 16, 4, 1,   16, 16, 8, 1),
}
_HOPPER = _EXACT | {  # forward      dK/dV           dQ
    (2, 64):  _tiles(64, 64, 4, 3,   32, 64, 4, 3,   64, 64, 4, 3),
    (2, 128): _tiles(64, 32, 4, 3,   32, 64, 4, 3,   64, 32, 4, 3),
    (2, 256): _tiles(128, 32, 8, 2,  32, 32, 8, 1,   32, 64, 8, 1),
}
# A softcap's tanh and the masks of a head dim that is no power of two take registers that those tiles cannot spare.
_HOPPER_TIGHT = _HOPPER | {
    (2, 128): _tiles(64, 32, 4, 3,   32, 64, 8, 2,   64, 32, 4, 3),
}
# Where a query sees thousands of keys, larger tiles do less work for each byte.
_HOPPER_LONG = {
    (2, 128): _tiles(128, 64, 8, 3,  64, 128, 8, 2,  128, 64, 8, 3),
}
_AMPERE = _EXACT | {  # within 99 KiB of shared memory, which sm_86, sm_89 and sm_120 have
    (2, 64):  _tiles(128, 64, 8, 3,  64, 64, 4, 2,   128, 64, 8, 2),
    (2, 128): _tiles(128, 32, 8, 3,  64, 64, 8, 2,   64, 64, 8, 2),
    (2, 256): _tiles(64, 32, 8, 2,   32, 32, 8, 1,   32, 32, 8, 1),
}
_AMPERE_TIGHT = _AMPERE | {
    (2, 64):  _tiles(128, 64, 8, 3,  32, 64, 4, 2,   128, 64, 8, 2),
}
# fmt: on


def default_tiles(
    dtype: torch.dtype, head_dim: int, capability: int, softcap: bool = False, long: bool = False
) -> KernelTiles:
    """The table's tiles.

    Args:
        dtype: of q, k and v.
        head_dim: the larger of D and Dv, up to 256.
        capability: compute capability times ten, such as 80 or 90. Cards with the shared memory of Hopper (9.x,
            10.x) take its table; all others the one that fits in 99 KiB.
        softcap: whether there is one.
        long: whether queries see thousands of keys; see `BlockMask.long_spans`.
    """
    tight = softcap or head_dim & (head_dim - 1) != 0
    key = (4 if dtype == torch.float32 else 2, 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256)
    if capability // 10 not in (9, 10):
        return (_AMPERE_TIGHT if tight else _AMPERE)[key]
    if tight:
        return _HOPPER_TIGHT[key]
    return (_HOPPER_LONG if long and key in _HOPPER_LONG else _HOPPER)[key]


OPTIONS = tuple(f"{kernel}_{f.name}" for kernel in ("forward", "dkdv", "dq") for f in dataclasses.fields(Tile))


def tile_list(kernel_options: dict[str, int] | None) -> list[int]:
    """`kernel_options` as the op's list of integers: empty for the table, else every one of `OPTIONS`, 0 if not given.

    Raises:
        ValueError: an option that is not in `OPTIONS`, or a value that is no positive integer.
    """
    if not kernel_options:
        return []
    for name, value in kernel_options.items():
        if name not in OPTIONS:
            raise ValueError(f"kernel_options has no {name!r}; the Triton tiles are {', '.join(OPTIONS)}")
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"kernel_options[{name!r}] must be a positive integer; got {value!r}")
    return [kernel_options.get(name, 0) for name in OPTIONS]


def resolve_tiles(
    tiles: list[int], dtype: torch.dtype, head_dim: int, capability: int, softcap: bool = False, long: bool = False
) -> KernelTiles:
    """The table's tiles with the non-zero entries of an op's tile list in their place."""
    chosen = default_tiles(dtype, head_dim, capability, softcap, long)
    if not tiles:
        return chosen
    return _tiles(*(given or default for given, default in zip(tiles, chosen.to_list(), strict=True)))


def heads_per_tile(group: int, tile: Tile) -> int:
    """Query heads of a KV group packed into a tile's rows: the largest power of two that divides the group.

    At least 8 positions are left to a tile. A group of 3 or 9 heads, no multiple of two, gets one head a tile.
    """
    heads = 1
    while heads * 2 <= min(tile.max_heads, tile.block_m // 8) and group % (heads * 2) == 0:
        heads *= 2
    return heads


def edge_rows(dkdv: Tile) -> int:
    """Rows at a time of the partly visible blocks in dK/dV: half of a large tile, whose masks would spill registers."""
    return dkdv.block_m // 2 if dkdv.block_m * dkdv.block_n > 4096 else dkdv.block_m
