"""Common `mask_mod`s and their combination, with torch's signature `mask_mod(b, h, q_idx, kv_idx) -> bool`."""

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


def document(layout: PackedLayout) -> MaskMod:
    """A query sees every key of its own document; tokens of a padded tail see nothing.

    For attention inside documents prefer `packflex.document_mask`, which needs no tiles to be evaluated.
    """
    ids = layout.document_ids

    def document_id_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (ids[b, q_idx] == ids[b, kv_idx]) & (ids[b, q_idx] >= 0)

    return document_id_mask


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
