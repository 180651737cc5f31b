"""Masks: what a query may see, as block masks (`BlockMask`) and as element-wise functions (`mask_mod`)."""

from packflex.masks.block_mask import BlockMask
from packflex.masks.from_layout import document_mask
from packflex.masks.from_mask_mod import create_block_mask
from packflex.masks.mods import and_masks, causal, document, or_masks, prefix_lm, sliding_window

__all__ = [
    "BlockMask",
    "and_masks",
    "causal",
    "create_block_mask",
    "document",
    "document_mask",
    "or_masks",
    "prefix_lm",
    "sliding_window",
]
