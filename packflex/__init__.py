"""packflex: sequence packing for fine-tuning, with document-masked batches on a fused flex-attention kernel."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from packflex import masks
from packflex.attention import flex_attention
from packflex.layout import PackedLayout
from packflex.masks import BlockMask, create_block_mask, document_mask

if TYPE_CHECKING:
    from packflex import packing
    from packflex.data.pack import pack_dataset

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "PackedLayout",
    "__version__",
    "create_block_mask",
    "document_mask",
    "flex_attention",
    "masks",
    "pack_dataset",
    "packing",
]


def __getattr__(name: str) -> Any:
    """Import on first use what the core does not need: `datasets` costs a second that attention alone must not pay."""
    if name == "pack_dataset":
        return import_module("packflex.data.pack").pack_dataset
    if name == "packing":
        return import_module("packflex.packing")
    raise AttributeError(f"module 'packflex' has no attribute {name!r}")
