"""`document_mask`: the block mask of a packed batch, straight from its layout."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from packflex.layout import PackedLayout
from packflex.masks.block_mask import BlockMask
from packflex.masks.intervals import document_intervals


def document_mask(
    layout: PackedLayout,
    causal: bool = True,
    window: int | None = None,
    prefix_lengths: Sequence[int] | Tensor | None = None,
) -> BlockMask:
    """Mask under which tokens of a packed batch see only their own document.

    Built in closed form on the layout's device with no sync. Without `prefix_lengths` the result is remembered on the
    layout, so that every layer of a model can ask for it and only the first pays.

    Args:
        layout: the packed batch, B rows of S tokens.
        causal: a query sees itself and what comes before it in its document; otherwise the whole document.
        window: a query sees keys less than `window` tokens away (`q_idx - kv_idx < window`, and when not causal
            `kv_idx - q_idx < window` too). None for no limit.
        prefix_lengths: for each document its first tokens that every query of the document sees (prefix LM), [N]
            integers; causal only. A tensor on a device is not checked against the lengths: longer prefixes end with
            their document.

    Returns:
        A `BlockMask` of shape (B, 1, S, S). Tokens of a padded tail see nothing and are seen by nothing.

    Raises:
        ValueError: a window below 1, prefixes with `causal=False`, or prefixes that do not match the documents.

    Example:
        >>> mask = document_mask(PackedLayout.from_lengths([[3, 4]], seq_len=8))
        >>> mask.kv_intervals[:, 0, 4].tolist()  # token 4 sees keys 3 and 4
        [3, 5]
    """
    if window is not None:
        window = operator.index(window)
        if window < 1:
            raise ValueError(f"window must be at least 1 (a query always sees itself) or None; got {window}")
        if window >= layout.seq_len:
            window = None
    prefixes = None
    if prefix_lengths is not None:
        if not causal:
            raise ValueError("prefix_lengths need causal=True: without it every query sees its whole document already")
        prefixes = _checked_prefixes(layout, prefix_lengths)
    key = (causal, window)
    if prefixes is None and key in layout._block_masks:
        return layout._block_masks[key]
    # remembered for training too, where it is asked for in inference mode
    with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
        intervals = document_intervals(
            layout.cu_seqlens, layout.row_offsets, prefixes, layout.seq_len, causal, 0 if window is None else window
        )
        mask = BlockMask.from_intervals(intervals[:2], intervals[2:], long_spans=_long_spans(layout, causal, window))
    # A compiled graph must not keep its own tensors in a cache that outlives it.
    if prefixes is None and not torch.compiler.is_compiling():
        layout._block_masks[key] = mask
    return mask


def _long_spans(layout: PackedLayout, causal: bool, window: int | None) -> bool:
    """Whether the average token sees 1024 keys or more: half its document when causal, no more than the window."""
    if torch.compiler.is_compiling() or not layout.num_tokens:  # host numbers in a graph would be guarded
        return False
    span = layout.sum_squared_lengths / layout.num_tokens / (2 if causal else 1)
    return (span if window is None else min(span, window / 2)) >= 1024


def _checked_prefixes(layout: PackedLayout, prefix_lengths: Sequence[int] | Tensor) -> Tensor:
    if isinstance(prefix_lengths, Tensor):
        if prefix_lengths.shape != (layout.num_documents,) or prefix_lengths.is_floating_point():
            raise ValueError(
                f"prefix_lengths must be {layout.num_documents} integers, one for each document; "
                f"got {prefix_lengths.dtype} {tuple(prefix_lengths.shape)}"
            )
        return prefix_lengths.to(layout.device, torch.int32)
    prefixes = [operator.index(prefix) for prefix in prefix_lengths]
    lengths = [length for row in layout.lengths for length in row]
    if len(prefixes) != len(lengths):
        raise ValueError(f"prefix_lengths must be {len(lengths)} integers, one for each document; got {len(prefixes)}")
    for document, (prefix, length) in enumerate(zip(prefixes, lengths, strict=True)):
        if not 0 <= prefix <= length:
            raise ValueError(f"prefix_lengths[{document}]={prefix} must be from 0 to the document's length, {length}")
    return torch.tensor(prefixes, dtype=torch.int32).to(layout.device)
