"""`create_block_mask`: the block mask of any `mask_mod`, from its traced program."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from packflex.masks.block_mask import DEFAULT_BLOCK_SIZE, BlockLists, BlockMask, MaskMod, _tile_pair, lists_of_tiles
from packflex.masks.kept import kept
from packflex.masks.recognise import recognised_intervals
from packflex.mods.bounds import check_reads
from packflex.mods.errors import ModError
from packflex.mods.evaluate import evaluate
from packflex.mods.lifted import Lifted, lift
from packflex.mods.nodes import INDICES
from packflex.mods.vectorised import over_indices


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = DEFAULT_BLOCK_SIZE,
    _compile: bool | None = None,
    separate_full_blocks: bool = True,
    *,
    check_bounds: bool = False,
) -> BlockMask:
    """Block mask of any `mask_mod(b, h, q_idx, kv_idx)`, torch's signature and meaning.

    `mask_mod` is traced once. Where its program shows that each query sees one interval of keys (causal, windows,
    prefixes, the documents of a `PackedLayout`, and conjunctions of these), the mask is made of intervals in closed
    form. Otherwise, on a GPU, one kernel classifies each tile as empty, partly or wholly visible: from bounds of the
    program over the tile where they decide, else element by element. Memory grows with the number of tiles, never
    with Q_LEN x KV_LEN, and nothing waits for the device.

    Args:
        mask_mod: function of four int32 tensors that returns a bool tensor; pointwise, may read captured tensors.
        B: rows of the batch the mask is for; None for a mask that is the same for all.
        H: query heads the mask is for; None for a mask that is the same for all.
        Q_LEN: queries.
        KV_LEN: keys.
        device: where the mask lives, as the tensors that `mask_mod` reads must; None for the accelerator, or the CPU
            where there is none.
        BLOCK_SIZE: rows and columns of a tile.
        _compile: torch's, and without a meaning here: nothing is left to compile.
        separate_full_blocks: False lists wholly visible tiles among the partly visible ones, where kernels apply
            `mask_mod`.
        check_bounds: first evaluate every read of captured tensors and raise for one past the end, which a kernel would
            read unnoticed; takes time with Q_LEN x KV_LEN, for debugging.

    Raises:
        ValueError: sizes below 1, or a `mask_mod` that cannot become a kernel (`ModError`, with its line).
        TypeError: a `mask_mod` that does not return bool, or takes another number of arguments.
        IndexError: a `mask_mod` that reads past the end of a captured tensor (`ModIndexError`, with its line), where no
            kernel makes the mask.
    """
    batch, heads = (1 if n is None else n for n in (B, H))
    tile = _tile_pair(BLOCK_SIZE)
    for name, size in (("B", batch), ("H", heads), ("Q_LEN", Q_LEN), ("KV_LEN", KV_LEN)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    shape = (batch, heads, Q_LEN, KV_LEN)
    if torch.compiler.is_compiling():
        mask = _mask_of_lists(shape, tile, mask_mod, _tiles_by_rows(mask_mod, None, shape, tile, device))
    else:
        if check_bounds:
            check_reads(mask_mod, "mask", shape, device)
        try:
            mask = _created(mask_mod, shape, tile, device)
        except IndexError as error:
            if not isinstance(error, ModError):
                check_reads(mask_mod, "mask", shape, device)  # names the read
            raise
    return mask if separate_full_blocks else _all_partial(mask)


def _created(
    mask_mod: MaskMod, shape: tuple[int, int, int, int], tile: tuple[int, int], device: torch.device
) -> BlockMask:
    lifted = lift(mask_mod, "mask", device)
    found = recognised_intervals(lifted, shape, device)
    if found is not None:
        return BlockMask(
            shape[2:],
            tile,
            mask_mod,
            found.kv_intervals,
            found.q_intervals,
            long_spans=found.long_spans,
            heads=shape[1],
        )
    if _has_kernel(device):
        from packflex.masks.tile_kernel import launch_tile_lists  # Triton only where it runs

        kv_lists, q_lists = kept(
            lifted, device, ("lists", shape, tile), lambda: launch_tile_lists(lifted, shape, tile, device)
        )
        return BlockMask(shape[2:], tile, mask_mod, kv_lists=kv_lists, q_lists=q_lists)
    lists = kept(lifted, device, ("rows", shape, tile), lambda: _tiles_by_rows(mask_mod, lifted, shape, tile, device))
    return _mask_of_lists(shape, tile, mask_mod, lists)


@lru_cache
def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _mask_of_lists(
    shape: tuple[int, int, int, int], tile: tuple[int, int], mask_mod: MaskMod, lists: BlockLists
) -> BlockMask:
    return BlockMask(shape[2:], tile, mask_mod, kv_lists=lists)


def _all_partial(mask: BlockMask) -> BlockMask:
    """The mask with wholly visible tiles among the partly visible ones, in list form."""
    tiles = mask.to_dense().bool()
    lists = lists_of_tiles(tiles, torch.zeros_like(tiles))
    return BlockMask(mask.seq_lengths, mask.BLOCK_SIZE, mask.mask_mod, kv_lists=lists)


def _tiles_by_rows(
    mask_mod: MaskMod,
    lifted: Lifted | None,
    shape: tuple[int, int, int, int],
    tile: tuple[int, int],
    device: torch.device,
) -> BlockLists:
    """Lists from one row of tiles at a time: memory of a row of tiles."""
    batch, heads, q_len, kv_len = shape
    tile_q, tile_kv = tile
    vectors = [torch.arange(n, device=device, dtype=torch.int32) for n in shape]
    columns = -(-kv_len // tile_kv)
    padding = columns * tile_kv - kv_len
    partial, full = [], []
    for start in range(0, q_len, tile_q):
        q = vectors[2][start : start + tile_q]
        visible = _visible(mask_mod, lifted, [vectors[0], vectors[1], q, vectors[3]])
        visible = visible.expand(batch, heads, len(q), kv_len)
        counts = torch.nn.functional.pad(visible, (0, padding)).unflatten(-1, (columns, tile_kv)).sum((2, 4))
        full.append(counts == tile_q * tile_kv)
        partial.append((counts > 0) & (counts < tile_q * tile_kv))
    return lists_of_tiles(torch.stack(partial, 2), torch.stack(full, 2))


def _visible(mask_mod: MaskMod, lifted: Lifted | None, vectors: list[Tensor]) -> Tensor:
    if lifted is None:
        return over_indices(mask_mod)(*vectors)
    shapes = ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
    inputs = {name: x.view(shape) for name, x, shape in zip(INDICES, vectors, shapes, strict=True)}
    return evaluate([lifted.program.out], inputs, lifted.captures, lifted.numbers)[0]
