"""What rows are made of besides tokens, in one place: the label a loss passes over, columns of masks, an empty row."""

from __future__ import annotations

from collections.abc import Mapping

IGNORED = -100  # what Hugging Face losses leave out
# Columns of 0 and 1 that say which tokens are supervised, under the names that others give them.
MASK_COLUMNS = ("loss_mask", "completion_mask", "assistant_masks")
# A row without tokens: where a step has room for more rows than there are.
FILLER: Mapping[str, list[int]] = {"input_ids": [], "labels": [], "lengths": []}
