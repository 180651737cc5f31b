"""`create_block_mask`: the block mask of any `mask_mod`, one row of tiles at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from packflex.masks.block_mask import DEFAULT_BLOCK_SIZE, BlockMask, MaskMod, _tile_pair, lists_of_tiles


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str = "cuda",
    BLOCK_SIZE: int | tuple[int, int] = DEFAULT_BLOCK_SIZE,
) -> BlockMask:
    """Block mask of any `mask_mod(b, h, q_idx, kv_idx)`, torch's signature and meaning.

    One row of tiles is evaluated at a time, so memory grows with one row of tiles and with the number of tiles, never
    with Q_LEN x KV_LEN.

    Args:
        mask_mod: function of four integer tensors that returns a bool tensor; may read captured tensors.
        B: rows of the batch the mask is for; None for a mask that is the same for all.
        H: query heads the mask is for; None for a mask that is the same for all.
        Q_LEN: queries.
        KV_LEN: keys.
        device: where the mask lives, as the tensors that `mask_mod` reads must.
        BLOCK_SIZE: rows and columns of a tile.

    Raises:
        ValueError: sizes below 1.
        TypeError: a `mask_mod` that does not return bool.
    """
    batch, heads = (1 if n is None else n for n in (B, H))
    tile_q, tile_kv = _tile_pair(BLOCK_SIZE)
    for name, size in (("B", batch), ("H", heads), ("Q_LEN", Q_LEN), ("KV_LEN", KV_LEN)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    evaluate = over_indices(mask_mod)
    b, h = torch.arange(batch, device=device), torch.arange(heads, device=device)
    kv = torch.arange(KV_LEN, device=device)
    columns = -(-KV_LEN // tile_kv)
    padding = columns * tile_kv - KV_LEN
    partial, full = [], []
    for start in range(0, Q_LEN, tile_q):
        q = torch.arange(start, min(start + tile_q, Q_LEN), device=device)
        visible = evaluate(b, h, q, kv)
        if visible.dtype != torch.bool:
            name = getattr(mask_mod, "__name__", repr(mask_mod))
            raise TypeError(f"mask_mod {name} must return a bool tensor; it returned {visible.dtype}")
        visible = visible.expand(batch, heads, len(q), KV_LEN)
        counts = torch.nn.functional.pad(visible, (0, padding)).unflatten(-1, (columns, tile_kv)).sum((2, 4))
        full.append(counts == tile_q * tile_kv)
        partial.append((counts > 0) & (counts < tile_q * tile_kv))
    lists = lists_of_tiles(torch.stack(partial, 2), torch.stack(full, 2))
    return BlockMask((Q_LEN, KV_LEN), (tile_q, tile_kv), mask_mod, kv_lists=lists)


def over_indices(mod: Callable[..., Tensor], scored: bool = False) -> Callable[..., Tensor]:
    """A mod of single indices over index vectors: [B], [H], [Q], [KV] to [B, H, Q, KV].

    With `scored` the mod's first argument is a score, and the result takes scores [B, H, Q, KV] before the vectors.
    """
    over = mod
    for axis in (3, 2, 1, 0):
        in_dims = tuple(0 if i == axis else None for i in range(4))
        over = torch.vmap(over, in_dims=(0, *in_dims) if scored else in_dims)

    def evaluate(*arguments: Tensor) -> Tensor:
        with TransformGetItemToIndex():  # lets a captured tensor be read at a vmapped index, as torch's own does
            return over(*arguments)

    return evaluate
