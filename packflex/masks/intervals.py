"""The interval form of a mask: for each query the keys it sees, for each key the queries that see it, in closed form.

Causal, windowed, bidirectional and prefix attention inside documents all give each query one contiguous interval of
keys, and each key one contiguous interval of queries. Both bounds only grow along the row, so the interval of a whole
tile of queries follows from its first and its last row alone. That makes a mask of a few integers a token, made in one
pass over the tokens with a binary search in `cu_seqlens`: no S x S work, no index lists, no question to the device.

Worked example, one row of 8 with causal documents of 3 and 4 tokens (half-open intervals)::

    token            0      1      2      3      4      5      6      7 (padding)
    keys seen      [0,1)  [0,2)  [0,3)  [3,4)  [3,5)  [3,6)  [3,7)  [7,7)
    seen by        [0,3)  [1,3)  [2,3)  [3,7)  [4,7)  [5,7)  [6,7)  [7,7)
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("packflex::document_intervals", mutates_args=())
def document_intervals(
    cu_seqlens: Tensor,
    row_offsets: Tensor,
    prefix_lengths: Tensor | None,
    seq_len: int,
    causal: bool,
    window: int,
) -> Tensor:
    """Intervals of a packed batch.

    Args:
        cu_seqlens: int32 [N + 1] cumulative document lengths over all rows.
        row_offsets: int32 [B + 1] documents before each row.
        prefix_lengths: int32 [N], the first tokens of a document that all of it sees (causal only), or None.
        seq_len: S, tokens of a row.
        causal: a query sees itself and what comes before it in its document.
        window: a query sees keys less than this many tokens away; 0 for no window.

    Returns:
        int32 [4, B, S]: first key seen, end of the keys seen, first query that sees, end of the queries that see.
        In a padded tail all four are the row's real length, so that intervals there are empty and bounds still only
        grow.
    """
    if cu_seqlens.is_cuda:
        from packflex.masks.kernels import launch_document_intervals  # Triton only where it runs

        return launch_document_intervals(cu_seqlens, row_offsets, prefix_lengths, seq_len, causal, window)
    row_start = cu_seqlens[row_offsets.long()].long()  # [B + 1] real tokens before each row
    real = row_start.diff()[:, None]
    token = torch.arange(seq_len, device=cu_seqlens.device)[None]
    document = torch.searchsorted(cu_seqlens.long(), row_start[:-1, None] + token, right=True) - 1
    document = document.clamp(0, max(len(cu_seqlens) - 2, 0))
    if len(cu_seqlens) == 1:  # no documents at all
        start = end = torch.zeros_like(document)
    else:
        start = cu_seqlens[document] - row_start[:-1, None]
        end = cu_seqlens[document + 1] - row_start[:-1, None]

    if causal:
        kv_lo, kv_hi, q_lo, q_hi = start, token + 1, token, end
        if prefix_lengths is not None and len(cu_seqlens) > 1:
            prefix_end = torch.minimum(start + prefix_lengths[document], end)
            kv_hi = torch.maximum(kv_hi, prefix_end)
            q_lo = torch.where(token < prefix_end, start, token)
    else:
        kv_lo, kv_hi, q_lo, q_hi = start, end, start, end
    if window:
        kv_lo = torch.maximum(kv_lo, token - window + 1)
        q_hi = torch.minimum(q_hi, token + window)
        if not causal:
            kv_hi = torch.minimum(kv_hi, token + window)
            q_lo = torch.maximum(q_lo, token - window + 1)
    bounds = torch.stack([torch.broadcast_to(x, document.shape) for x in (kv_lo, kv_hi, q_lo, q_hi)])
    return torch.where(token < real, bounds, real).to(torch.int32)


@document_intervals.register_fake
def _(
    cu_seqlens: Tensor,
    row_offsets: Tensor,
    prefix_lengths: Tensor | None,
    seq_len: int,
    causal: bool,
    window: int,
) -> Tensor:
    return cu_seqlens.new_empty((4, row_offsets.shape[0] - 1, seq_len), dtype=torch.int32)


def tile_ranges(intervals: Tensor, rows_per_tile: int, columns_per_tile: int) -> Tensor:
    """Four integers for each tile of rows: which tiles of columns it must visit, and which of them need no mask.

    Args:
        intervals: int32 [2, B, S]: first column and end of the columns of each row; both only grow along S.
        rows_per_tile: rows of a tile; rows past S count as seeing nothing.
        columns_per_tile: columns of a tile.

    Returns:
        int32 [B, 1, T, 4]: `first, first_full, last_full, last`, half-open, in tiles of columns. Tiles
        `first:first_full` and `last_full:last` are partly visible, `first_full:last_full` wholly. With no wholly
        visible tile, both full bounds equal `last`.
    """
    lo, hi = intervals.long()
    seq_len = lo.shape[1]
    tiles = -(-seq_len // rows_per_tile)
    first_row = torch.arange(tiles, device=lo.device) * rows_per_tile
    last_row = (first_row + rows_per_tile - 1).clamp(max=seq_len - 1)
    whole = (first_row + rows_per_tile <= seq_len)[None]  # a ragged last tile has rows that see nothing
    begin, end = lo[:, first_row], hi[:, last_row]
    first = begin // columns_per_tile
    last = torch.where(end > begin, -(-end // columns_per_tile), first)
    full_first = -(-lo[:, last_row] // columns_per_tile)
    full_last = hi[:, first_row] // columns_per_tile
    has_full = whole & (full_last > full_first)
    full_first = torch.where(has_full, full_first, last)
    full_last = torch.where(has_full, full_last, last)
    return torch.stack([first, full_first, full_last, last], dim=-1)[:, None].to(torch.int32)


def visited_tiles(intervals: Tensor, rows_per_tile: int, columns_per_tile: int, columns: int) -> Tensor:
    """bool [B, 1, T, columns]: whether some row of a tile sees some column of a tile.

    `tile_ranges` takes a tile's first and last row for all of it, which visits too much where rows see nothing or where
    intervals of neighbours do not meet. Arguments as there, with the number of tiles of columns.
    """
    lo, hi = intervals.long()
    batch, seq_len = lo.shape
    tiles = -(-seq_len // rows_per_tile)
    first = lo // columns_per_tile
    end = torch.where(hi > lo, -(-hi // columns_per_tile), first)
    start = torch.arange(seq_len, device=lo.device) // rows_per_tile * (columns + 1)
    one = torch.ones_like(first, dtype=torch.int32)
    rows = torch.zeros(batch, tiles * (columns + 1), dtype=torch.int32, device=lo.device)
    rows.scatter_add_(1, start + first, one).scatter_add_(1, start + end, -one)
    counts = rows.view(batch, 1, tiles, columns + 1).cumsum(-1, dtype=torch.int32)
    return counts[..., :columns] > 0
