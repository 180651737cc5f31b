"""Common `mask_mod`s and their combination, with torch's signature `mask_mod(b, h, q_idx, kv_idx) -> bool`.

Masks speak of positions in a row. In packed rows, masks of distances alone (`causal`, `sliding_window`,
`dilated_window`, `strided`) become masks of documents by `and_masks(document(layout), mask)`; masks of positions
(`prefix_lm`, `global_tokens`, `natten_2d`) need `per_document(layout, mask)`, which counts from each document's start.
"""

from __future__ import annotations

from functools import reduce

from torch import Tensor

from packflex.layout import PackedLayout
from packflex.masks.block_mask import MaskMod


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A query sees itself and every key before it."""
    return q_idx >= kv_idx


def sliding_window(window: int) -> MaskMod:
    """A query sees itself and the `window - 1` keys before it (Mistral, arXiv 2310.06825)."""
    if window < 1:
        raise ValueError(f"window must be at least 1 (a query always sees itself); got {window}")

    def sliding_window_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < window)

    return sliding_window_mask


def prefix_lm(prefix_length: int | Tensor) -> MaskMod:
    """Causal, but all queries see the first `prefix_length` keys: one number, or [B] of them (T5, arXiv 1910.10683)."""

    def prefix_lm_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        prefix = prefix_length[b] if isinstance(prefix_length, Tensor) else prefix_length
        return (q_idx >= kv_idx) | (kv_idx < prefix)

    return prefix_lm_mask


def dilated_window(window: int, dilation: int) -> MaskMod:
    """A query sees itself and every `dilation`-th key before it, `window` keys in all (Longformer, arXiv 2004.05150).

    With window 3 and dilation 2 query 9 sees keys 9, 7 and 5. Dilation 1 is `sliding_window`.

    Raises:
        ValueError: a window or dilation below 1.
    """
    _require_count("window", window, "keys that a query sees, itself included")
    _require_count("dilation", dilation, "tokens from one visible key to the next")
    span = window * dilation

    def dilated_window_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = q_idx - kv_idx
        return (distance >= 0) & (distance < span) & (distance % dilation == 0)

    return dilated_window_mask


def strided(stride: int, local: int | None = None) -> MaskMod:
    """A query sees the `local` nearest keys up to itself and every `stride`-th key before (arXiv 1904.10509).

    With stride 4 and local 2 query 9 sees keys 9 and 8, and 5 and 1. The Sparse Transformer's strided pattern has
    `local` equal to `stride`, the default.

    Raises:
        ValueError: a stride or local window below 1.
    """
    near = stride if local is None else local
    _require_count("stride", stride, "tokens from one visible key to the next")
    _require_count("local", near, "keys of the local window, the query's own included")

    def strided_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = q_idx - kv_idx
        return (distance >= 0) & ((distance < near) | (distance % stride == 0))

    return strided_mask


def global_tokens(count: int) -> MaskMod:
    """The first `count` tokens see all tokens and are seen by all (Longformer, BigBird, arXiv 2007.14062).

    Alone it leaves the other tokens with those keys only: `or_masks(global_tokens(4), sliding_window(256))`; with
    `and_masks(causal, ...)` around it the first tokens see no later ones.

    Raises:
        ValueError: a count below 1.
    """
    _require_count("count", count, "global tokens at the start")

    def global_tokens_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx < count) | (kv_idx < count)

    return global_tokens_mask


def natten_2d(height: int, width: int, kernel: int | tuple[int, int]) -> MaskMod:
    """A pixel sees the `kernel` pixels around it in an image of `height` x `width` (NATTEN, arXiv 2204.07143).

    Tokens are pixels row by row: token i is at row `i // width` and column `i % width`. At the border the window
    moves inwards and keeps its size, so every pixel sees as many. Tokens past the image see nothing.

    Args:
        height, width: of the image, in tokens.
        kernel: odd rows and columns of the window, or one odd number for both; no larger than the image.

    Raises:
        ValueError: sizes below 1, and a kernel that is even or larger than the image.
    """
    _require_count("height", height, "rows of the image")
    _require_count("width", width, "columns of the image")
    pair = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    if len(pair) != 2 or not all(isinstance(k, int) and k > 0 and k % 2 for k in pair):
        raise ValueError(f"kernel must be one or two odd numbers, so that the query is in its middle; got {kernel!r}")
    if pair[0] > height or pair[1] > width:
        raise ValueError(f"a kernel of {pair[0]} x {pair[1]} does not fit in an image of {height} x {width}")
    rows, columns = pair[0] // 2, pair[1] // 2

    def natten_2d_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        middle_row = (q_idx // width).clamp(rows, height - 1 - rows)
        middle_column = (q_idx % width).clamp(columns, width - 1 - columns)
        near_rows = (kv_idx // width - middle_row).abs() <= rows
        near_columns = (kv_idx % width - middle_column).abs() <= columns
        return near_rows & near_columns & (q_idx < height * width)

    return natten_2d_mask


def document(layout: PackedLayout) -> MaskMod:
    """A query sees every key of its own document; tokens of a padded tail see nothing.

    For attention inside documents prefer `packflex.document_mask`, which needs no tiles to be evaluated.
    """
    ids = layout.document_ids

    def document_id_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (ids[b, q_idx] == ids[b, kv_idx]) & (ids[b, q_idx] >= 0)

    return document_id_mask


def per_document(layout: PackedLayout, mask_mod: MaskMod) -> MaskMod:
    """`mask_mod` inside each document, with positions counted from the document's first token.

    `per_document(layout, global_tokens(4))` makes the first four tokens of every document global in it. Where only
    the distance of query and key matters, `and_masks(document(layout), mask_mod)` means the same and reads less.

    Args:
        layout: of the batch, on the device that the mask is for.
        mask_mod: sees b, h and the positions of query and key in their document (int32).

    Raises:
        TypeError: a `mask_mod` that cannot be called.
    """
    _require_callables("per_document", (mask_mod,))
    same_document = document(layout)
    positions = layout.position_ids.int()

    def per_document_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return same_document(b, h, q_idx, kv_idx) & mask_mod(b, h, positions[b, q_idx], positions[b, kv_idx])

    return per_document_mask


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """A key is seen where every one of `mask_mods` lets it be."""
    _require_callables("and_masks", mask_mods)

    def and_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return reduce(
            lambda seen, mod: seen & mod(b, h, q_idx, kv_idx), mask_mods[1:], mask_mods[0](b, h, q_idx, kv_idx)
        )

    return and_mask


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """A key is seen where at least one of `mask_mods` lets it be."""
    _require_callables("or_masks", mask_mods)

    def or_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return reduce(
            lambda seen, mod: seen | mod(b, h, q_idx, kv_idx), mask_mods[1:], mask_mods[0](b, h, q_idx, kv_idx)
        )

    return or_mask


def _require_callables(name: str, mask_mods: tuple[MaskMod, ...]) -> None:
    if not mask_mods or not all(map(callable, mask_mods)):
        raise TypeError(f"{name} takes one or more mask_mods, functions of (b, h, q_idx, kv_idx); got {mask_mods!r}")


def _require_count(name: str, value: int, meaning: str) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1 ({meaning}); got {value!r}")
