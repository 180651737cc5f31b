"""packflex: sequence packing for fine-tuning, with document-masked batches on a fused flex-attention kernel."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, noop_mask

    from packflex import masks, packing, score_mods
    from packflex.attention import explain, flex_attention
    from packflex.data.pack import pack_dataset
    from packflex.layout import PackedLayout
    from packflex.masks import BlockMask, and_masks, create_block_mask, document_mask, or_masks

__version__ = "0.1.0"

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "PackedLayout",
    "__version__",
    "and_masks",
    "create_block_mask",
    "document_mask",
    "explain",
    "flex_attention",
    "masks",
    "noop_mask",
    "or_masks",
    "pack_dataset",
    "packing",
    "score_mods",
]


# Where each public name comes from. All are imported on first use: torch costs seconds that packing and the command
# line's help must not pay, and `datasets` one that attention must not.
_HOME = {
    "AuxOutput": "torch.nn.attention.flex_attention",
    "AuxRequest": "torch.nn.attention.flex_attention",
    "BlockMask": "packflex.masks",
    "PackedLayout": "packflex.layout",
    "and_masks": "packflex.masks",
    "create_block_mask": "packflex.masks",
    "document_mask": "packflex.masks",
    "explain": "packflex.attention",
    "flex_attention": "packflex.attention",
    "noop_mask": "torch.nn.attention.flex_attention",
    "or_masks": "packflex.masks",
    "pack_dataset": "packflex.data.pack",
}
_MODULES = ("attention", "layout", "masks", "metrics", "packing", "score_mods")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"packflex.{name}")
    raise AttributeError(f"module 'packflex' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
