"""Masks: what a query may see, as block masks (`BlockMask`) and as element-wise functions (`mask_mod`)."""

from packflex.masks.block_mask import BlockMask
from packflex.masks.from_layout import document_mask
from packflex.masks.from_mask_mod import create_block_mask
from packflex.masks.mods import (
    and_masks,
    causal,
    dilated_window,
    document,
    global_tokens,
    natten_2d,
    or_masks,
    per_document,
    prefix_lm,
    sliding_window,
    strided,
)

__all__ = [
    "BlockMask",
    "and_masks",
    "causal",
    "create_block_mask",
    "dilated_window",
    "document",
    "document_mask",
    "global_tokens",
    "natten_2d",
    "or_masks",
    "per_document",
    "prefix_lm",
    "sliding_window",
    "strided",
]
