"""Collators: packed rows to a batch with its layout, and documents to a padded batch for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from packflex.data.labels import IGNORED
from packflex.layout import PackedLayout


@dataclass(frozen=True)
class PackedCollator:
    """Packed rows to `dict(input_ids, labels, position_ids, packed)`.

    Attributes:
        seq_len: tokens of a row of the batch; shorter rows get a padded tail. The same for every batch, so that
            compiled models keep their shapes.
        pad_token_id: what fills the tail of `input_ids`; nothing attends to it.
    """

    seq_len: int
    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of B rows.

        Args:
            rows: with `input_ids`, `labels` and `lengths` as `pack_dataset` makes them. A row without documents is
                all padding.

        Returns:
            `input_ids`, `labels` (-100 in padding and at each document's first token) and `position_ids` (from 0 in
            each document), int64 [B, seq_len], and `packed`, their `PackedLayout`.

        Raises:
            ValueError: a row longer than `seq_len`, or lengths that do not add up to its tokens.
        """
        layout = PackedLayout.from_lengths([list(row["lengths"]) for row in rows], self.seq_len)
        input_ids = np.full((len(rows), self.seq_len), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(rows), self.seq_len), IGNORED, dtype=np.int64)
        for b, (row, lengths) in enumerate(zip(rows, layout.lengths, strict=True)):
            total = sum(lengths)
            for name, target in (("input_ids", input_ids), ("labels", labels)):
                if len(row[name]) != total:
                    raise ValueError(f"row {b} of the batch: lengths add up to {total}, {name} has {len(row[name])}")
                target[b, :total] = row[name]
            if lengths:
                labels[b, np.cumsum([0, *lengths[:-1]])] = IGNORED
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": layout.position_ids,
            "packed": layout,
        }


@dataclass(frozen=True)
class PaddedCollator:
    """Documents to a padded batch, one a row: what packing is compared with.

    Attributes:
        pad_token_id: what fills rows up to the longest document.
        pad_to: pad to this length instead.
    """

    pad_token_id: int = 0
    pad_to: int | None = None

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of documents with `input_ids` and `labels` (all of `input_ids` by default).

        Returns:
            `input_ids`, `labels` (-100 in padding and at the first token), `attention_mask` (1 for tokens), int64
            [B, longest].

        Raises:
            ValueError: a document longer than `pad_to`, or labels of another length.
        """
        longest = max(len(document["input_ids"]) for document in documents)
        width = longest if self.pad_to is None else self.pad_to
        if longest > width:
            raise ValueError(f"a document has {longest} tokens, more than pad_to={width}")
        input_ids = np.full((len(documents), width), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(documents), width), IGNORED, dtype=np.int64)
        attention_mask = np.zeros((len(documents), width), dtype=np.int64)
        for b, document in enumerate(documents):
            ids = document["input_ids"]
            given = document.get("labels", ids)
            if len(given) != len(ids):
                raise ValueError(f"document {b} of the batch: input_ids has {len(ids)} tokens, labels {len(given)}")
            input_ids[b, : len(ids)] = ids
            labels[b, 1 : len(ids)] = given[1:]
            attention_mask[b, : len(ids)] = 1
        arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
