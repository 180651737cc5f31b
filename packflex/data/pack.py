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

from packflex.data.errors import DataError, mask_message, too_long_message
from packflex.data.ids import RepeatedIds
from packflex.data.labels import IGNORED, MASK_COLUMNS
from packflex.data.supervision import cut_bare_message, documents_cut_bare
from packflex.packing import PackingPlan, plan_rows

logger = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 1 << 22
_INT32_MAX = 2**31 - 1


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
            every token is supervised. A column `source` names documents in errors; without it they are called
            "document 12". Documents that come twice are packed twice: compare ids before, as
            `packflex.data.sources.read_documents` does.
        seq_len: tokens of a row.
        strategy: "best_fit", "next_fit" or "wrapped"; see `packflex.packing`.
        overflow: "split", "truncate", "drop" or "error" for documents longer than a row. What is cut or dropped is
            logged as a warning with its counts, and is in the plan (`plan_dataset`). So are documents that stay in the
            rows although every supervised token of theirs was cut off (`unsupervised_documents` lists them).
        seed: of the order; None keeps the documents' own.
        plan: a plan of `plan_dataset` for these documents, in place of the four arguments before.

    Returns:
        A `Dataset` of rows: `input_ids` and `labels` (int32 lists without padding) and `lengths` (int32, tokens of each
        document of the row). The label of a document's first token is -100: nothing in the row predicts it.

    Raises:
        ValueError: no `input_ids`, no documents, an empty or padded document, labels or masks of another length, ids
            below 0 or beyond int32, a document too long for overflow="error", a plan for documents of other lengths;
            all with the name of the offending document.
        TypeError: what is no `Dataset`, or a column that does not hold lists of integers, with the document that shows
            it.

    Example:
        >>> documents = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6, 7], [8] * 7]})
        >>> pack_dataset(documents, seq_len=8, seed=None)["lengths"]
        [[7], [4, 3]]
    """
    tokens = _TokenColumn(dataset, "input_ids")
    _refuse_padding(dataset, tokens.lengths)
    supervision = _supervision_column(dataset)
    marks = None if supervision is None else _TokenColumn(dataset, supervision)
    if marks is not None:
        _require_same_lengths(tokens, marks)
    if plan is None:
        plan = _plan(dataset, tokens.lengths, seq_len, strategy, overflow, seed)
    elif plan.num_documents != len(tokens.lengths):
        raise ValueError(f"the plan is for {plan.num_documents} documents; the data set has {len(tokens.lengths)}")
    else:
        plan.validate(tokens.lengths)  # as many documents of other lengths would be mixed up
    if not plan.num_rows:
        raise ValueError(
            f"all {plan.num_dropped} documents are longer than seq_len={plan.seq_len} and dropped, so there is no row; "
            'use longer rows, or overflow="split"'
        )
    tables = list(_tables(plan, tokens, marks, is_mask=supervision in MASK_COLUMNS))
    packed = Dataset(pa.concat_tables(tables), info=datasets.DatasetInfo(features=_FEATURES))
    _report(plan)
    bare = documents_cut_bare(plan, tokens.lengths, _supervised(tokens, marks))
    if len(bare):
        said = cut_bare_message(name_of(dataset, int(bare[0])), len(bare), plan.seq_len)
        logger.warning('%s; raise seq_len, choose overflow="split", or leave such documents out', said)
    _report_repeats(dataset)
    return packed


def _report_repeats(dataset: Dataset) -> None:
    """Warn of documents whose `id` came before."""
    if "id" not in dataset.column_names:
        return
    ids = RepeatedIds()
    for value in dataset.with_format(None)["id"]:
        ids.add(value)
    count, pair = ids.found()
    if pair is not None:
        earlier, later = (name_of(dataset, number) for number in pair)
        logger.warning(
            "%d documents have an id that came before, and are packed all the same; the first is %s, after %s",
            count, later, earlier,
        )  # fmt: skip


def plan_dataset(
    dataset: Dataset, seq_len: int = 8192, strategy: str = "best_fit", overflow: str = "split", seed: int | None = 0
) -> PackingPlan:
    """The plan by which `pack_dataset` would pack these documents; arguments and errors as there."""
    return _plan(dataset, _TokenColumn(dataset, "input_ids").lengths, seq_len, strategy, overflow, seed)


def unsupervised_documents(dataset: Dataset, plan: PackingPlan) -> np.ndarray:
    """Documents, ascending, that had supervised tokens of which the plan cuts off every one.

    Args:
        dataset: as `pack_dataset` takes it.
        plan: of `plan_dataset` for it.

    Example:
        >>> documents = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "labels": [[-100, -100, 3], [-100, 5]]})
        >>> unsupervised_documents(documents, plan_dataset(documents, seq_len=2, overflow="truncate")).tolist()
        [0]
    """
    tokens = _TokenColumn(dataset, "input_ids")
    supervision = _supervision_column(dataset)
    marks = None if supervision is None else _TokenColumn(dataset, supervision)
    return documents_cut_bare(plan, tokens.lengths, _supervised(tokens, marks))


def name_of(dataset: Dataset, document: int) -> str:
    """What to call a document in a message: its `source` (a file and line) if the data set has it, else its number."""
    if "source" in dataset.column_names and isinstance(source := dataset[document]["source"], str):
        return source
    return f"document {document}"


_FEATURES = datasets.Features(
    {name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels", "lengths")}
)


def _plan(
    dataset: Dataset, lengths: np.ndarray, seq_len: int, strategy: str, overflow: str, seed: int | None
) -> PackingPlan:
    if not len(lengths):
        raise ValueError("the data set has no documents to pack")
    if overflow == "error" and strategy != "wrapped" and seq_len >= 1:
        too_long = np.flatnonzero(lengths > seq_len)
        if len(too_long):
            first = int(too_long[0])
            raise DataError(too_long_message(name_of(dataset, first), int(lengths[first]), len(too_long), seq_len))
    return plan_rows(lengths, seq_len, strategy, overflow=overflow, seed=seed)


def _report(plan: PackingPlan) -> None:
    logger.info("%r", plan)
    if plan.num_truncated:
        logger.warning("%d documents lost %d tokens to truncation", plan.num_truncated, plan.truncated_tokens)
    if plan.num_dropped:
        logger.warning("%d documents with %d tokens were dropped", plan.num_dropped, plan.dropped_tokens)


def _supervised(tokens: _TokenColumn, marks: _TokenColumn | None) -> Any:
    """Whether tokens are supervised, as `documents_cut_bare` asks."""
    if marks is None:
        return lambda documents, starts, lengths: np.ones(int(lengths.sum()), dtype=bool)
    passed_over = 0 if marks.name in MASK_COLUMNS else IGNORED
    return lambda documents, starts, lengths: marks.gather(documents, starts, lengths) != passed_over


def _instead(dataset: Any) -> str:
    """What to do with data of another kind."""
    if isinstance(dataset, datasets.DatasetDict):
        return f": choose one of its splits, {', '.join(dataset)}"
    if isinstance(dataset, datasets.IterableDataset):
        return ": pack a stream with packflex.data.stream.PackedStream"
    maker = "from_dict" if isinstance(dataset, dict) else "from_list"
    return f": make one with datasets.Dataset.{maker}(...)"


class _TokenColumn:
    """A column of integer lists as numpy views of its chunks, gathered by (document, start, length)."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"packing takes a datasets.Dataset; got {type(dataset).__name__}{_instead(dataset)}")
        if name not in dataset.column_names:
            raise ValueError(
                f"the data set has no column {name!r} (its columns are {', '.join(dataset.column_names)}); "
                "tokenise it first"
            )
        self.name, self.dataset = name, dataset
        column = dataset.select_columns([name]).with_format("arrow")[:][name]
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        self.values: list[np.ndarray] = []
        self.starts: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        first = 0
        for chunk in chunks:
            if pa.types.is_fixed_size_list(chunk.type):
                chunk = chunk.cast(pa.large_list(chunk.type.value_type))
            self._require_integer_lists(chunk, first)
            offsets = chunk.offsets.to_numpy().astype(np.int64)
            # of this chunk alone: a slice's buffer also holds the documents outside it
            self.values.append(chunk.flatten().to_numpy(zero_copy_only=False))
            self.starts.append(offsets[:-1] - offsets[0])
            lengths.append(np.diff(offsets))
            first += len(chunk)
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        self.chunk_ends = np.cumsum([len(part) for part in lengths])
        if name == "input_ids" and (self.lengths == 0).any():
            at = int(np.argmax(self.lengths == 0))
            raise ValueError(f"{name_of(dataset, at)} is empty; remove empty documents first")

    def _require_integer_lists(self, chunk: Any, first: int) -> None:
        kind = chunk.type
        name = lambda at: name_of(self.dataset, first + at)  # noqa: E731
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            shown = _shown(chunk[0].as_py()) if len(chunk) else "nothing"
            raise TypeError(
                f"{name(0)}: {self.name!r} must be a list of integers; got {shown} (the column must hold lists of "
                f"integers; it holds {kind}); tokenise again"
            )
        if chunk.null_count:
            at = int(np.argmax(pc.is_null(chunk).to_numpy(zero_copy_only=False)))
            raise ValueError(f"{name(at)}: {self.name!r} is missing (null); remove the document or tokenise it again")
        inner, values = kind.value_type, chunk.flatten()
        is_integer = pa.types.is_integer(inner) or pa.types.is_boolean(inner)
        if (is_integer and not values.null_count) or not len(values):
            return
        # the value that shows it best: a null or NaN, a fraction, else the first
        if values.null_count:
            wrong = pc.is_null(values).to_numpy(zero_copy_only=False)
        elif pa.types.is_floating(inner):
            numbers = values.to_numpy(zero_copy_only=False)
            wrong = numbers != np.floor(numbers)  # NaN is unlike itself
        else:
            wrong = np.ones(1, dtype=bool)
        place = int(np.argmax(wrong))
        ends = np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))
        at = int(np.searchsorted(ends, place, side="right"))
        raise TypeError(
            f"{name(at)}: {self.name!r} holds {_shown(values[place].as_py())} at place "
            f"{place - int(ends[at - 1] if at else 0)} (the column must hold lists of integers; it holds lists of "
            f"{inner}{' with nulls' if values.null_count else ''}); tokenise again, or cast the column to int32"
        )

    def gather(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int64 tokens of the pieces, one after the other; refuses those that no token or label can be."""
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
            values = self.values[chunk][np.repeat(source, sizes) + ramp]
            self._require_tokens(values, documents[here], sizes)
            out[target] = values
        return out

    def _require_tokens(self, values: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> None:
        if self.name in MASK_COLUMNS or not len(values) or (values.min() >= 0 and values.max() <= _INT32_MAX):
            return
        wrong = (values < 0) | (values > _INT32_MAX)
        if self.name == "labels":
            wrong &= values != IGNORED
        if wrong.any():
            at = int(np.argmax(wrong))
            document = int(np.repeat(documents, lengths)[at])
            passed_over = f", or {IGNORED} where the loss passes over" if self.name == "labels" else ""
            raise ValueError(
                f"{name_of(self.dataset, document)}: {self.name!r} holds {int(values[at])}, and tokens are from 0 to "
                f"{_INT32_MAX} (int32){passed_over}; tokenise again"
            )


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_padding(dataset: Dataset, lengths: np.ndarray) -> None:
    """Padding is no text: it would be trained on, and packed as if it were."""
    if "attention_mask" not in dataset.column_names or not len(dataset):
        return
    kind = dataset.data.schema.field("attention_mask").type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)):
        raise ValueError(
            f"{name_of(dataset, 0)}: 'attention_mask' must be a list of 0 and 1 for each token; the column is {kind}; "
            "tokenise again, or remove the column where nothing is padded"
        )
    document = 0
    for batch in dataset.select_columns(["attention_mask"]).with_format("arrow").iter(10_000):
        for chunk in batch["attention_mask"].chunks:
            found = pc.fill_null(chunk.value_lengths(), -1).to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(found != lengths[document : document + len(chunk)])
            if len(wrong) or chunk.flatten().null_count:
                at = document + (int(wrong[0]) if len(wrong) else 0)
                raise ValueError(
                    f"{name_of(dataset, at)}: 'attention_mask' must hold a number for each of the "
                    f"{lengths[at]} tokens{'' if len(wrong) else ', and some documents hold nulls in it'}; tokenise "
                    "again, or remove the column where nothing is padded"
                )
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            whole = values == 1
            if not whole.all():
                ends = np.cumsum(pc.fill_null(chunk.value_lengths(), 0).to_numpy(zero_copy_only=False))
                first = int(np.argmin(whole))
                at = document + int(np.searchsorted(ends, first, side="right"))
                raise ValueError(mask_message(name_of(dataset, at), int(values[first])))
            document += len(chunk)


def _supervision_column(dataset: Dataset) -> str | None:
    found = [name for name in ("labels", *MASK_COLUMNS) if name in dataset.column_names]
    if len(found) > 1:
        raise ValueError(f"the data set has {' and '.join(found)}: keep the one that says what is supervised")
    return found[0] if found else None


def _require_same_lengths(tokens: _TokenColumn, marks: _TokenColumn) -> None:
    wrong = np.flatnonzero(tokens.lengths != marks.lengths)
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{name_of(tokens.dataset, at)}: input_ids has {tokens.lengths[at]} tokens and {marks.name} "
            f"{marks.lengths[at]}; they must be equally long"
        )


def _tables(plan: PackingPlan, tokens: _TokenColumn, marks: _TokenColumn | None, is_mask: bool) -> Iterator[pa.Table]:
    """Tables of consecutive rows, some millions of tokens each."""
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
        labels[np.cumsum(sizes) - sizes] = IGNORED
        ends = np.concatenate([[0], np.cumsum(sizes)])[offsets - offsets[0]]
        columns = [_lists(ids, ends), _lists(labels, ends), _lists(sizes, offsets - offsets[0])]
        yield pa.Table.from_arrays(columns, schema=_FEATURES.arrow_schema)


def _lists(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))
