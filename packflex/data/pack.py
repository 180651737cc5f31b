"""`pack_dataset`: tokenised documents to packed rows, by way of a `PackingPlan`.

Works on Arrow buffers: only lengths are read to plan, and the tokens of some rows at a time are gathered from the
(memory-mapped) columns with numpy, never through Python lists.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from packflex.data.labels import IGNORED, MASK_COLUMNS
from packflex.packing import PackingPlan, plan_rows

logger = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 1 << 22


def pack_dataset(
    dataset: Dataset,
    seq_len: int = 8192,
    strategy: str = "best_fit",
    overflow: str = "split",
    seed: int | None = 0,
    *,
    plan: PackingPlan | None = None,
) -> Dataset:
    """Pack tokenised documents into rows of at most `seq_len` tokens.

    Args:
        dataset: column `input_ids`, one document a row. Supervision comes from `labels` (-100 where the loss passes
            over), or from a column of 0 and 1 named `loss_mask`, `completion_mask` or `assistant_masks`; without any,
            every token is supervised.
        seq_len: tokens of a row.
        strategy: "best_fit", "next_fit" or "wrapped"; see `packflex.packing`.
        overflow: "split", "truncate", "drop" or "error" for documents longer than a row. What is cut or dropped is
            logged as a warning with its counts, and is in the plan (`plan_dataset`).
        seed: of the order; None keeps the documents' own.
        plan: a plan of `plan_dataset` for these documents, in place of the four arguments before.

    Returns:
        A `Dataset` of rows: `input_ids` and `labels` (int32 lists without padding) and `lengths` (int32, tokens of each
        document of the row). The label of a document's first token is -100: nothing in the row predicts it.

    Raises:
        ValueError: no `input_ids`, no documents, an empty or padded document, labels or masks of another length, a plan
            for documents of other lengths; all with the number of the offending document.
        TypeError: a column that does not hold lists of integers.

    Example:
        >>> documents = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6, 7], [8] * 7]})
        >>> pack_dataset(documents, seq_len=8, seed=None)["lengths"]
        [[7], [4, 3]]
    """
    tokens = _TokenColumn(dataset, "input_ids")
    _refuse_padding(dataset)
    supervision = _supervision_column(dataset)
    marks = None if supervision is None else _TokenColumn(dataset, supervision)
    if marks is not None:
        _require_same_lengths(tokens, marks)
    if plan is None:
        plan = _plan(tokens.lengths, seq_len, strategy, overflow, seed)
    elif plan.num_documents != len(tokens.lengths):
        raise ValueError(f"the plan is for {plan.num_documents} documents; the data set has {len(tokens.lengths)}")
    else:
        plan.validate(tokens.lengths)  # as many documents of other lengths would be mixed up
    unsupervised: list[np.ndarray] = []
    tables = list(_tables(plan, tokens, marks, supervision in MASK_COLUMNS, unsupervised))
    packed = Dataset(pa.concat_tables(tables), info=datasets.DatasetInfo(features=_FEATURES))
    _report(plan, np.concatenate(unsupervised) if unsupervised else np.zeros(0, np.int64))
    return packed


def plan_dataset(
    dataset: Dataset, seq_len: int = 8192, strategy: str = "best_fit", overflow: str = "split", seed: int | None = 0
) -> PackingPlan:
    """The plan by which `pack_dataset` would pack these documents; arguments and errors as there."""
    return _plan(_TokenColumn(dataset, "input_ids").lengths, seq_len, strategy, overflow, seed)


_FEATURES = datasets.Features(
    {name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels", "lengths")}
)


def _plan(lengths: np.ndarray, seq_len: int, strategy: str, overflow: str, seed: int | None) -> PackingPlan:
    if not len(lengths):
        raise ValueError("the data set has no documents to pack")
    return plan_rows(lengths, seq_len, strategy, overflow=overflow, seed=seed)


def _report(plan: PackingPlan, unsupervised: np.ndarray) -> None:
    logger.info("%r", plan)
    if len(unsupervised):
        logger.warning(
            "%d documents, or pieces of them, have no supervised token in their row, document %d first: they take room "
            "and train nothing. Raise seq_len, or leave them out",
            len(unsupervised), unsupervised.min(),
        )  # fmt: skip
    if plan.num_truncated:
        logger.warning("%d documents lost %d tokens to truncation", plan.num_truncated, plan.truncated_tokens)
    if plan.num_dropped:
        logger.warning("%d documents with %d tokens were dropped", plan.num_dropped, plan.dropped_tokens)


class _TokenColumn:
    """A column of integer lists as numpy views of its chunks, gathered by (document, start, length)."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        if name not in dataset.column_names:
            raise ValueError(
                f"the data set has no column {name!r} (its columns are {', '.join(dataset.column_names)}); "
                "tokenise it first"
            )
        self.name = name
        column = dataset.select_columns([name]).with_format("arrow")[:][name]
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        self.values: list[np.ndarray] = []
        self.starts: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        first = 0
        for chunk in chunks:
            self._require_integer_lists(chunk, first)
            offsets = chunk.offsets.to_numpy()
            values = chunk.values
            self.values.append(values.to_numpy(zero_copy_only=False))
            self._require_int32(self.values[-1], offsets, first)
            self.starts.append(offsets[:-1].astype(np.int64))
            lengths.append(np.diff(offsets).astype(np.int64))
            first += len(chunk)
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        self.chunk_ends = np.cumsum([len(part) for part in lengths])
        if name == "input_ids" and (self.lengths == 0).any():
            raise ValueError(f"document {int(np.argmax(self.lengths == 0))} is empty; remove empty documents first")

    def _require_int32(self, values: np.ndarray, offsets: np.ndarray, first: int) -> None:
        least = 0 if self.name == "input_ids" else -(2**31)
        inside = values[offsets[0] : offsets[-1]]  # a slice's values lie in those of the whole
        if not len(inside) or inside.dtype == bool or (inside.min() >= least and inside.max() < 2**31):
            return
        at = int(np.argmax((inside < least) | (inside >= 2**31)))
        document = first + int(np.searchsorted(offsets, at + offsets[0], side="right")) - 1
        raise ValueError(
            f"document {document}: {self.name} holds {inside[at]}; token ids go from 0 to 2147483647: check how the "
            "documents were tokenised"
        )

    def _require_integer_lists(self, chunk: Any, first: int) -> None:
        kind = chunk.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise TypeError(f"column {self.name!r} must hold lists of integers; it holds {kind}")
        if chunk.null_count:
            at = first + int(np.argmax(pc.is_null(chunk).to_numpy(zero_copy_only=False)))
            raise ValueError(f"document {at}: {self.name!r} is missing (null)")
        inner = kind.value_type
        if not (pa.types.is_integer(inner) or pa.types.is_boolean(inner)):
            raise TypeError(
                f"column {self.name!r} must hold lists of integers; it holds lists of {inner}. Look for documents with "
                f"NaN or missing tokens, and cast the rest: dataset.cast_column({self.name!r}, "
                "datasets.List(datasets.Value('int32')))"
            )
        values = chunk.flatten()  # without what a slice leaves out
        if values.null_count:
            at = int(np.argmax(pc.is_null(values).to_numpy(zero_copy_only=False)))
            ends = np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))
            document = first + int(np.searchsorted(ends, at, side="right"))
            raise TypeError(f"document {document}: {self.name!r} has a missing token (null); leave it out or mend it")

    def gather(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int64 tokens of the pieces, one after the other."""
        out = np.empty(int(lengths.sum()), dtype=np.int64)
        ends = np.cumsum(lengths)
        chunk_of = np.searchsorted(self.chunk_ends, documents, side="right")
        for chunk in np.unique(chunk_of):
            here = np.flatnonzero(chunk_of == chunk)
            first = self.chunk_ends[chunk - 1] if chunk else 0
            source = self.starts[chunk][documents[here] - first] + starts[here]
            sizes = lengths[here]
            ramp = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            target = np.repeat(ends[here] - sizes, sizes) + ramp
            out[target] = self.values[chunk][np.repeat(source, sizes) + ramp]
        return out


def _refuse_padding(dataset: Dataset) -> None:
    """Padding is no text: it would be trained on, and packed as if it were."""
    if "attention_mask" not in dataset.column_names:
        return
    document = 0
    for batch in dataset.select_columns(["attention_mask"]).with_format("arrow").iter(10_000):
        for chunk in batch["attention_mask"].chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            if len(values) and not values.all():
                ends = np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))
                at = document + int(np.searchsorted(ends, int(np.argmin(values != 0)), side="right"))
                raise ValueError(
                    f"document {at} is padded (its attention_mask has zeros): tokenise without padding, packing needs "
                    "none"
                )
            document += len(chunk)


def _supervision_column(dataset: Dataset) -> str | None:
    found = [name for name in ("labels", *MASK_COLUMNS) if name in dataset.column_names]
    if len(found) > 1:
        raise ValueError(f"the data set has {' and '.join(found)}: keep the one that says what is supervised")
    return found[0] if found else None


def _require_same_lengths(tokens: _TokenColumn, marks: _TokenColumn) -> None:
    wrong = np.flatnonzero(tokens.lengths != marks.lengths)
    if len(wrong):
        at = wrong[0]
        raise ValueError(
            f"document {at}: input_ids has {tokens.lengths[at]} tokens and {marks.name} {marks.lengths[at]}; "
            "they must be equally long"
        )


def _tables(
    plan: PackingPlan,
    tokens: _TokenColumn,
    marks: _TokenColumn | None,
    is_mask: bool,
    unsupervised: list[np.ndarray],
) -> Iterator[pa.Table]:
    """Tables of consecutive rows, some millions of tokens each; documents without supervision go to `unsupervised`."""
    rows_at_once = max(1, _TOKENS_AT_ONCE // plan.seq_len)
    for first in range(0, plan.num_rows, rows_at_once):
        offsets = plan.row_offsets[first : first + rows_at_once + 1]
        at = slice(offsets[0], offsets[-1])
        pieces = (plan.document_indices[at], plan.piece_starts[at], plan.piece_lengths[at])
        sizes = pieces[2]
        ids = tokens.gather(*pieces)
        labels = ids.copy()
        if marks is not None:
            given = marks.gather(*pieces)
            labels = np.where(given != 0, ids, IGNORED) if is_mask else given
        begins = np.cumsum(sizes) - sizes
        labels[begins] = IGNORED
        if marks is not None and len(begins):
            unsupervised.append(pieces[0][~np.logical_or.reduceat(labels != IGNORED, begins)])
        ends = np.concatenate([[0], np.cumsum(sizes)])[offsets - offsets[0]]
        columns = [_lists(ids, ends), _lists(labels, ends), _lists(sizes, offsets - offsets[0])]
        yield pa.Table.from_arrays(columns, schema=_FEATURES.arrow_schema)


def _lists(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))
