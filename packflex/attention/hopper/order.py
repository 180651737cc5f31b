"""Work order: the tiles of each row of a batch, longest first, made on the device in one small kernel.

The record of a tile is four int32: first row, first column, blocks, last column start. A tile visits `blocks` blocks of
columns from its first column on. No block starts past the last column start: the last block of a row is moved back so
that it ends with the row's last visible column, and what it holds of its neighbour is masked. So tokens that nothing
sees, a padded tail, are never read, and may hold NaN. The start of a moved block may be negative; TMA fills with zeros
there.

Rows of 8 tokens, all one causal document of 6, tiles of 2 rows and blocks of 2 columns::

    (4, 0, 3, 4), (2, 0, 2, 4), (0, 0, 1, 4), (6, 6, 0, 4)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from packflex.attention.hopper.fixed import FixedLaunch
from packflex.integers import ceil_div

RECORD = 4
# Where a plan's header keeps the sizes of a problem: kernels load them tile by tile, to spare registers.
HEADER = tl.constexpr(12)
TOTAL, TILES, SECTION, KV_HEADS, Q_LEN, KV_LEN, STRIDE_QB, STRIDE_KB, STRIDE_COPY = (tl.constexpr(i) for i in range(9))
COUNTER = tl.constexpr(9)  # of tiles that persistent programs have taken beyond their first
_TILES = 64  # tiles ranked by one program, and compared with at a time


@triton.jit
def _blocks_of(LO, HI, o_tile, tiles, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First column and number of blocks of tiles; tiles that do not exist have -1 blocks."""
    m = o_tile < tiles
    lo = tl.load(LO + o_tile * ROWS, mask=m, other=0)
    hi = tl.load(HI + tl.minimum(o_tile * ROWS + ROWS, length) - 1, mask=m, other=0)
    return lo, tl.where(m, (tl.maximum(hi - lo, 0) + COLUMNS - 1) // COLUMNS, -1)


@triton.jit(
    do_not_specialize=["stride_plane", "stride_b", "tiles", "length", *(f"s{i}" for i in range(9))],
    do_not_specialize_on_alignment=["INTERVALS", "PLAN"],
)
def _work_order_kernel(
    INTERVALS, PLAN, stride_plane, stride_b, tiles, length, s0, s1, s2, s3, s4, s5, s6, s7, s8,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Records of TILES tiles of a row of the batch, each written at its rank among all tiles of the row.

    The first program writes the header, s0 to s8 and a counter at 0, before them.
    """
    i_b = tl.program_id(1)
    p_lo = INTERVALS + i_b.to(tl.int64) * stride_b
    p_hi = p_lo + stride_plane
    o_tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    lo, blocks = _blocks_of(p_lo, p_hi, o_tile, tiles, length, ROWS, COLUMNS)
    rank = tl.zeros([TILES], tl.int32)
    for start in range(0, tiles, TILES):
        o_other = start + tl.arange(0, TILES)
        _, other = _blocks_of(p_lo, p_hi, o_other, tiles, length, ROWS, COLUMNS)
        # Ties go to the later tile: neighbours of one document stay together, and share K and V in the L2.
        ahead = (other[None, :] > blocks[:, None]) | (
            (other[None, :] == blocks[:, None]) & (o_other[None, :] > o_tile[:, None])
        )
        rank += tl.sum(ahead.to(tl.int32), 1)
    m = o_tile < tiles
    p = PLAN + HEADER + (i_b.to(tl.int64) * tiles + rank) * 4
    last = tl.load(p_hi + length - 1) - COLUMNS
    tl.store(p, o_tile * ROWS, mask=m)
    tl.store(p + 1, lo, mask=m)
    tl.store(p + 2, blocks, mask=m)
    tl.store(p + 3, tl.zeros([TILES], tl.int32) + last, mask=m)
    if (tl.program_id(0) == 0) & (i_b == 0):
        tl.store(PLAN, s0)
        tl.store(PLAN + 1, s1)
        tl.store(PLAN + 2, s2)
        tl.store(PLAN + 3, s3)
        tl.store(PLAN + 4, s4)
        tl.store(PLAN + 5, s5)
        tl.store(PLAN + 6, s6)
        tl.store(PLAN + 7, s7)
        tl.store(PLAN + 8, s8)
        tl.store(PLAN + COUNTER, 0)


def tiles_of(length: int, rows: int) -> int:
    """Tiles of a row of the batch."""
    return ceil_div(length, rows)


class WorkOrder:
    """Makes plans for intervals int32 [2, B, S] of one shape and strides, with a contiguous last axis.

    The intervals hold first column and end of the columns of each row. A plan is int32 [HEADER + B * T * 4]: sizes,
    then records of every tile, in each batch row by falling blocks.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        rows: int,
        columns: int,
        sizes: tuple[int, ...] = (0,) * 9,
    ) -> None:
        """
        Args:
            shape: of the intervals.
            strides: of the intervals.
            rows: rows of a tile (positions, for queries).
            columns: columns of a block.
            sizes: total, tiles, section, kv_heads, q_len, kv_len and three strides, for kernels that read the header.
        """
        _, batch, length = shape
        tiles = tiles_of(length, rows)
        self.length = HEADER.value + batch * tiles * RECORD
        self.sizes = (strides[0], strides[1], tiles, length, *sizes)
        constants = {"ROWS": rows, "COLUMNS": columns, "TILES": _TILES}
        self.launch = FixedLaunch(_work_order_kernel, (ceil_div(tiles, _TILES), batch, 1), constants, num_warps=4)

    def __call__(self, intervals: Tensor) -> Tensor:
        """The plan of these intervals."""
        plan = torch.empty(self.length, dtype=torch.int32, device=intervals.device)
        self.launch(intervals, plan, *self.sizes)
        return plan


def units_per_section(kv_heads: int, kv_len: int, head_dim: int, group_tiles: int, budget: int = 16 << 20) -> int:
    """How many (KV head, head subgroup) units of a batch row are worked on side by side.

    All the tiles of a section come before those of the next, so that the K and V that are in use at a time stay
    within `budget` bytes of the L2. A divisor of `kv_heads` times `group_tiles`.
    """
    wanted = max(1, budget // (kv_len * head_dim * 4))
    section = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= wanted)
    return section * group_tiles
