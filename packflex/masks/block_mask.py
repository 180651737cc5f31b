"""`BlockMask`: which tiles of the score matrix exist, in torch's field names, as intervals or as index lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packflex.layout import is_on
from packflex.masks.intervals import tile_ranges, visited_tiles
from packflex.mods.errors import name_of
from packflex.mods.lifted import lift

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
DEFAULT_BLOCK_SIZE = 128


class BlockLists(NamedTuple):
    """The tiles that each tile of rows visits, as torch's BlockMask keeps them.

    num_blocks int32 [B, H, T] counts the partly visible tiles, indices int32 [B, H, T, C] lists them first; the
    `full_` pair does the same for wholly visible tiles.
    """

    num_blocks: Tensor
    indices: Tensor
    full_num_blocks: Tensor
    full_indices: Tensor


class BlockMask:
    """Block-sparse attention mask of shape (B, H, Q_LEN, KV_LEN).

    Two forms. The *interval* form (`kv_intervals`, `q_intervals`) holds two integers a token and serves any tile
    size; `document_mask` makes it. The *list* form holds torch's index lists with a `mask_mod` for the elements of
    partly visible tiles; `create_block_mask` and `from_torch` make it. torch's fields (`kv_num_blocks`,
    `kv_indices`, ...) can be read on both: an interval mask derives them when asked.

    Attributes:
        seq_lengths: (Q_LEN, KV_LEN).
        BLOCK_SIZE: (rows, columns) of a tile in the lists, the ranges and the picture.
        mask_mod: `mask_mod(b, h, q_idx, kv_idx) -> bool`, the mask of single elements.
        kv_intervals: int32 [2, B, Q_LEN]: for each query the first key it sees and the end of the keys it sees.
            None in list form.
        q_intervals: int32 [2, B, KV_LEN]: for each key the first query that sees it and the end of those. None in
            list form.
        ragged: whether wholly visible tiles of the lists may reach past the lengths, as another library's may.
        long_spans: a hint for the choice of tiles: whether the average query sees a thousand keys or more. A host
            bool, so that choosing asks no device and a compiled model has two graphs at most.
    """

    BLOCK_SIZE: tuple[int, int]
    kv_intervals: Tensor | None
    q_intervals: Tensor | None
    long_spans: bool
    ragged: bool

    def __init__(
        self,
        seq_lengths: tuple[int, int],
        BLOCK_SIZE: tuple[int, int],
        mask_mod: MaskMod,
        kv_intervals: Tensor | None = None,
        q_intervals: Tensor | None = None,
        kv_lists: BlockLists | None = None,
        q_lists: BlockLists | None = None,
        long_spans: bool = False,
        ragged: bool = False,
        heads: int = 1,
        listed: bool = False,
    ) -> None:
        """Take the parts of one form; use `from_intervals`, `from_kv_blocks` or `from_torch`.

        `listed` says that the lists were given, and may hide or show what `mask_mod` does not.
        """
        self._seq_lengths = seq_lengths
        self.BLOCK_SIZE = BLOCK_SIZE
        self._mask_mod = mask_mod
        self.kv_intervals = kv_intervals
        self.q_intervals = q_intervals
        self._known_kv_lists = kv_lists
        self.long_spans = long_spans
        self.ragged = ragged
        self._lists_follow = None if listed else mask_mod
        self._known_q_lists = q_lists
        self._heads = heads

    # Constructors

    @staticmethod
    def from_intervals(
        kv_intervals: Tensor,
        q_intervals: Tensor,
        BLOCK_SIZE: int | tuple[int, int] = DEFAULT_BLOCK_SIZE,
        long_spans: bool = False,
    ) -> BlockMask:
        """Mask from the interval of keys of each query and the interval of queries of each key.

        Args:
            kv_intervals: int32 [2, B, Q_LEN], half-open; both bounds must only grow along Q_LEN. Queries of a padded
                tail see nothing: both bounds are the end of the last key that is seen.
            q_intervals: int32 [2, B, KV_LEN], the same mask seen from the keys; for keys past the last that is seen
                both bounds are the end of the last query that sees one.
            BLOCK_SIZE: tile of the derived lists, ranges and picture; kernels choose their own.
            long_spans: see the class.
        """
        for name, intervals in (("kv_intervals", kv_intervals), ("q_intervals", q_intervals)):
            if intervals.dim() != 3 or intervals.shape[0] != 2 or intervals.dtype != torch.int32:
                raise ValueError(f"{name} must be int32 [2, B, S]; got {intervals.dtype} {tuple(intervals.shape)}")
        if kv_intervals.shape[1] != q_intervals.shape[1]:
            raise ValueError(
                f"kv_intervals are for {kv_intervals.shape[1]} rows and q_intervals for {q_intervals.shape[1]}"
            )

        lengths = (kv_intervals.shape[2], q_intervals.shape[2])
        mask_mod = _interval_mod(kv_intervals)
        return BlockMask(lengths, _tile_pair(BLOCK_SIZE), mask_mod, kv_intervals, q_intervals, long_spans=long_spans)

    @staticmethod
    def from_kv_blocks(
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        BLOCK_SIZE: int | tuple[int, int] = DEFAULT_BLOCK_SIZE,
        mask_mod: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
    ) -> BlockMask:
        """Mask from torch's index lists; see `BlockLists` for the shapes.

        Without a `mask_mod` listed tiles are seen whole; without lengths they are those of `kv_indices`' tiles.

        Raises:
            ValueError: lists whose shapes disagree with one another or with the lengths.
        """
        tile = _tile_pair(BLOCK_SIZE)
        if mask_mod is None:
            from torch.nn.attention.flex_attention import noop_mask

            mask_mod = noop_mask
        if seq_lengths is None:
            seq_lengths = (kv_indices.shape[-2] * tile[0], kv_indices.shape[-1] * tile[1])
        rows, columns = (-(-length // size) for length, size in zip(seq_lengths, tile, strict=True))
        if full_kv_num_blocks is None or full_kv_indices is None:
            full_kv_num_blocks = torch.zeros_like(kv_num_blocks)
            full_kv_indices = torch.zeros_like(kv_indices)
        lists = BlockLists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices)
        shape = kv_num_blocks.shape
        if len(shape) != 3 or shape[2] != rows or kv_indices.shape[:3] != shape or kv_indices.shape[3] > columns:
            raise ValueError(
                f"lengths {seq_lengths} in tiles of {tile} need kv_num_blocks [B, H, {rows}] and kv_indices "
                f"[B, H, {rows}, at most {columns}]; got {tuple(shape)} and {tuple(kv_indices.shape)}"
            )
        ragged = any(length % size for length, size in zip(seq_lengths, tile, strict=True))
        return BlockMask(seq_lengths, tile, mask_mod, kv_lists=lists, ragged=ragged, listed=True)

    @staticmethod
    def from_torch(block_mask: Any) -> BlockMask:
        """Mask from a `torch.nn.attention.flex_attention.BlockMask`, sharing its tensors."""
        return BlockMask.from_kv_blocks(
            block_mask.kv_num_blocks,
            block_mask.kv_indices,
            block_mask.full_kv_num_blocks,
            block_mask.full_kv_indices,
            block_mask.BLOCK_SIZE,
            block_mask.mask_mod,
            tuple(block_mask.seq_lengths),
        )

    def to_torch(self) -> Any:
        """The same mask as a `torch.nn.attention.flex_attention.BlockMask`."""
        from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

        return TorchBlockMask.from_kv_blocks(
            self.kv_num_blocks,
            self.kv_indices,
            self.full_kv_num_blocks,
            self.full_kv_indices,
            BLOCK_SIZE=self.BLOCK_SIZE,
            mask_mod=self.mask_mod,
            seq_lengths=self.seq_lengths,
        )

    def as_tuple(self, flatten: bool = True) -> tuple[Any, ...]:
        """torch's fields in torch's order; with `flatten` the lengths and the tile are two numbers each."""
        result: tuple[Any, ...] = self.to_torch().as_tuple(flatten)
        return result

    def __getitem__(self, index: int | slice | Tensor | tuple[int | slice | Tensor, ...]) -> BlockMask:
        """Rows of the batch, heads and tiles of queries, as torch's: `mask[:, :, 0:1]` is the first tile of queries.

        An integer keeps its axis. As on torch's mask, `seq_lengths` stay those of the whole, and `mask_mod` must be set
        anew, from that of the whole.
        """
        given = index if isinstance(index, tuple) else (index,)
        if len(given) > 3:
            raise IndexError(f"a BlockMask is sliced by rows, heads and tiles of queries; got {len(given)} indices")
        sizes = self.kv_num_blocks.shape
        place = tuple(
            slice(i % n, i % n + 1) if isinstance(i, int) and -n <= i < n else i
            for i, n in zip((*given, *[slice(None)] * 3)[:3], sizes, strict=True)
        )
        lists = BlockLists(*(x[place] for x in self._kv_lists))
        if lists.num_blocks.dim() != 3 or lists.indices.dim() != 4:
            raise IndexError(f"a slice of a BlockMask keeps its rows, heads and tiles of queries; got {index!r}")
        return BlockMask(self.seq_lengths, self.BLOCK_SIZE, _sliced_mod, kv_lists=lists, ragged=True, listed=True)

    # What may be set, as torch's recipes for slices do

    @property
    def mask_mod(self) -> MaskMod:
        """Which keys a query sees, element by element; in list form another one may be set.

        Raises:
            ValueError: set on a mask of intervals, which says by itself what is seen.
        """
        return self._mask_mod

    @mask_mod.setter
    def mask_mod(self, mask_mod: MaskMod) -> None:
        if self.kv_intervals is not None and mask_mod is not self._mask_mod:
            raise ValueError(
                "this block mask holds intervals, which its mask_mod does not change: make another one with "
                "create_block_mask, or slice it first"
            )
        self._mask_mod = mask_mod

    @property
    def seq_lengths(self) -> tuple[int, int]:
        """Q_LEN and KV_LEN; in list form others may be set.

        Raises:
            ValueError: set on a mask of intervals, which are for their own lengths.
        """
        return self._seq_lengths

    @seq_lengths.setter
    def seq_lengths(self, seq_lengths: tuple[int, int]) -> None:
        if tuple(seq_lengths) == self._seq_lengths:
            return
        if self.kv_intervals is not None:
            raise ValueError(
                f"this block mask holds the intervals of {self._seq_lengths} queries and keys, not of "
                f"{tuple(seq_lengths)}: make another one with create_block_mask, or slice it first"
            )
        self._seq_lengths = (seq_lengths[0], seq_lengths[1])
        self.ragged = True  # tiles that are listed as full may reach past the end now

    # Shape

    @property
    def listed_rows(self) -> int | None:
        """Tiles of queries that the lists are for; None in interval form."""
        if self.kv_intervals is not None or self._known_kv_lists is None:
            return None
        return self._known_kv_lists.num_blocks.shape[2]

    def numel(self) -> int:
        """B x H x Q_LEN x KV_LEN, seen or not."""
        return math.prod(self.shape)

    @property
    def element_mod(self) -> MaskMod:
        """The mask of single elements, of any row of a batch also where the mask is one for all.

        Under given lists, and under a `mask_mod` that was set later, an element is seen in a tile that is listed as
        wholly visible, and where `mask_mod` shows it in one that is listed as partly visible.
        """
        if self.kv_intervals is not None:
            return _interval_mod(self.kv_intervals)
        if self.mask_mod is self._lists_follow:
            return self.mask_mod
        if not torch.compiler.is_compiling():
            lift(self.mask_mod, "mask", self.device)  # refuses it by its own line, and not by that of what holds it
        return _listed_mod(self.mask_mod, *self._tiles, self.BLOCK_SIZE)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q_LEN, KV_LEN); B and H are 1 where the mask is the same for all."""
        if self.kv_intervals is not None:
            return (self.kv_intervals.shape[1], self._heads, *self.seq_lengths)
        assert self._known_kv_lists is not None
        batch, heads, _ = self._known_kv_lists.num_blocks.shape
        return (batch, heads, *self.seq_lengths)

    @property
    def device(self) -> torch.device:
        """Device of the mask's tensors."""
        return (self.kv_intervals if self.kv_intervals is not None else self.kv_num_blocks).device

    # Ranges and lists

    @property
    def kv_ranges(self) -> Tensor:
        """int32 [B, 1, T_q, 4]: `first, first_full, last_full, last` tile of keys for each tile of queries.

        Half-open: tiles first:last are visited, first_full:last_full need no mask. Interval form only.
        """
        if self.kv_intervals is None:
            raise ValueError("kv_ranges exist for interval masks (document_mask); this mask holds index lists")
        return tile_ranges(self.kv_intervals, *self.BLOCK_SIZE)

    @property
    def q_ranges(self) -> Tensor:
        """int32 [B, 1, T_kv, 4]: the same for each tile of keys, in tiles of queries. Interval form only."""
        if self.q_intervals is None:
            raise ValueError("q_ranges exist for interval masks (document_mask); this mask holds index lists")
        return tile_ranges(self.q_intervals, *reversed(self.BLOCK_SIZE))

    @property
    def _tiles(self) -> tuple[Tensor, Tensor]:
        """bool [B, H, T_q, T_kv] twice: partly visible tiles, wholly visible tiles."""
        columns = -(-self.seq_lengths[1] // self.BLOCK_SIZE[1])
        if self.kv_intervals is not None:
            _, full_first, full_last, _ = self.kv_ranges[..., None].unbind(-2)
            tile = torch.arange(columns, device=self.device)
            full = (tile >= full_first) & (tile < full_last)
            partial = visited_tiles(self.kv_intervals, *self.BLOCK_SIZE, columns) & ~full
            batch, _, *tiles = full.shape
            return partial.expand(batch, self._heads, *tiles), full.expand(batch, self._heads, *tiles)
        assert self._known_kv_lists is not None
        lists = self._known_kv_lists
        return (
            _listed(lists.num_blocks, lists.indices, columns),
            _listed(lists.full_num_blocks, lists.full_indices, columns),
        )

    # kept without cached_property, which takes a lock before Python 3.12 that torch.compile cannot trace
    @property
    def _kv_lists(self) -> BlockLists:
        if self._known_kv_lists is None:
            self._known_kv_lists = lists_of_tiles(*self._tiles)
        return self._known_kv_lists

    @property
    def _q_lists(self) -> BlockLists:
        if self._known_q_lists is None:
            partial, full = self._tiles
            self._known_q_lists = lists_of_tiles(partial.transpose(-1, -2), full.transpose(-1, -2))
        return self._known_q_lists

    @property
    def kv_num_blocks(self) -> Tensor:
        """int32 [B, H, T_q]: partly visible tiles of keys for each tile of queries."""
        return self._kv_lists.num_blocks

    @property
    def kv_indices(self) -> Tensor:
        """int32 [B, H, T_q, T_kv]: those tiles, the listed ones first."""
        return self._kv_lists.indices

    @property
    def full_kv_num_blocks(self) -> Tensor:
        """int32 [B, H, T_q]: wholly visible tiles of keys for each tile of queries."""
        return self._kv_lists.full_num_blocks

    @property
    def full_kv_indices(self) -> Tensor:
        """int32 [B, H, T_q, T_kv]: those tiles, the listed ones first."""
        return self._kv_lists.full_indices

    @property
    def q_num_blocks(self) -> Tensor:
        """int32 [B, H, T_kv]: partly visible tiles of queries for each tile of keys."""
        return self._q_lists.num_blocks

    @property
    def q_indices(self) -> Tensor:
        """int32 [B, H, T_kv, T_q]: those tiles, the listed ones first."""
        return self._q_lists.indices

    @property
    def full_q_num_blocks(self) -> Tensor:
        """int32 [B, H, T_kv]: wholly visible tiles of queries for each tile of keys."""
        return self._q_lists.full_num_blocks

    @property
    def full_q_indices(self) -> Tensor:
        """int32 [B, H, T_kv, T_q]: those tiles, the listed ones first."""
        return self._q_lists.full_indices

    # Statistics, moving, showing

    def to_dense(self) -> Tensor:
        """int32 [B, H, T_q, T_kv]: 1 for each tile that is visited, as torch's method of the same name."""
        partial, full = self._tiles
        return (partial | full).to(torch.int32)

    def sparsity(self) -> float:
        """Share of tiles that are never visited, in percent.

        torch's method of the same name, which counts a ragged edge tile by its elements, gives the same number where
        the tiles divide the lengths.
        """
        visited = self.to_dense()
        return 100.0 * (1.0 - visited.sum().item() / visited.numel())

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with its tensors on `device`.

        Raises:
            ValueError: for a list mask that would change device: its `mask_mod` may hold tensors of its own.
        """
        if is_on(self.device, device):
            return self
        if self.kv_intervals is None or self.q_intervals is None:
            raise ValueError(
                f"this mask's mask_mod may hold tensors on {self.device}; build the mask on {device} with "
                "create_block_mask(..., device=...)"
            )
        return BlockMask.from_intervals(
            self.kv_intervals.to(device), self.q_intervals.to(device), self.BLOCK_SIZE, self.long_spans
        )

    def to_string(self, batch: int = 0, head: int = 0, max_columns: int = 48) -> str:
        """Picture of one row's tiles: `█` wholly visible, `░` partly visible, `·` never visited.

        A mask of more than `max_columns` tiles is coarsened: a cell is full only when all its tiles are.
        """
        partial, full = (tiles[batch, head].float() for tiles in self._tiles)
        visited = partial + full
        step = max(1, -(-max(visited.shape) // max_columns))
        if step > 1:
            pool = torch.nn.functional.avg_pool2d
            visited, full = (pool(x[None], step, ceil_mode=True, count_include_pad=False)[0] for x in (visited, full))
        cells = torch.where(full == 1, 2, torch.where(visited > 0, 1, 0)).tolist()
        return "\n".join("".join("·░█"[cell] for cell in row) for row in cells)

    def __repr__(self) -> str:
        form = "intervals" if self.kv_intervals is not None else "lists"
        return (
            f"BlockMask(shape={self.shape}, {form}, BLOCK_SIZE={self.BLOCK_SIZE}, sparsity={self.sparsity():.2f}%, "
            f"{self.device})\n{self.to_string()}"
        )


def _sliced_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    raise RuntimeError(
        "a sliced BlockMask has no mask_mod, for it may count queries from elsewhere: set it from the whole mask's, as "
        "in sliced.mask_mod = block_mask.mask_mod, or a function that adds the offset to q_idx"
    )


def _interval_mod(kv_intervals: Tensor) -> MaskMod:
    """The mask of single elements under intervals; those of one row hold for every row of a batch."""
    lo, hi = kv_intervals[0], kv_intervals[1]
    if kv_intervals.shape[1] == 1:
        lo, hi = lo[0], hi[0]

        def row_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (kv_idx >= lo[q_idx]) & (kv_idx < hi[q_idx])

        return row_mask

    def interval_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx >= lo[b, q_idx]) & (kv_idx < hi[b, q_idx])

    return interval_mask


def _listed_mod(mask_mod: MaskMod, partial: Tensor, full: Tensor, tile: tuple[int, int]) -> MaskMod:
    """The mask of single elements under lists, whose tiles of one row or head hold for all."""
    kinds = torch.where(full, 2, partial.to(torch.int32)).to(torch.int32)
    rows, columns = tile
    of_row, of_head = (n > 1 for n in kinds.shape[:2])

    def listed_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kind = kinds[b if of_row else 0, h if of_head else 0, q_idx // rows, kv_idx // columns]
        return (kind == 2) | ((kind == 1) & mask_mod(b, h, q_idx, kv_idx))

    if not torch.compiler.is_compiling():
        listed_mask.packflex_name = name_of(mask_mod)  # type: ignore[attr-defined]
    return listed_mask


def lists_of_tiles(partial: Tensor, full: Tensor) -> BlockLists:
    """Index lists of bool [B, H, T, C] tiles, listed ones first and in order, the rest after them as torch does."""

    def counted(tiles: Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.argsort(tiles.to(torch.int32), dim=-1, descending=True, stable=True)
        return tiles.sum(-1, dtype=torch.int32), indices.to(torch.int32).contiguous()

    return BlockLists(*counted(partial), *counted(full))


def _listed(num_blocks: Tensor, indices: Tensor, columns: int) -> Tensor:
    tiles = torch.zeros((*num_blocks.shape, columns + 1), dtype=torch.bool, device=num_blocks.device)
    slot = torch.arange(indices.shape[-1], device=indices.device)
    kept = torch.where(slot < num_blocks[..., None], indices.long(), columns)
    return tiles.scatter_(-1, kept, True)[..., :columns]


def _tile_pair(BLOCK_SIZE: int | tuple[int, int]) -> tuple[int, int]:
    pair = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else tuple(BLOCK_SIZE)
    if len(pair) != 2 or not all(isinstance(size, int) and size >= 1 for size in pair):
        raise ValueError(f"BLOCK_SIZE must be one or two positive integers; got {BLOCK_SIZE!r}")
    return pair
