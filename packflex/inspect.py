"""Reports on a packed data set: numbers, a histogram in text, a decoded row. Pure functions; the command line prints.

Rows are those of `packflex.pack_dataset`: `input_ids`, `labels` and `lengths` (documents of the row in order). Padding
is not stored; a row that does not fill `seq_len` is padded when a batch is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from packflex.data.labels import IGNORED

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Around what is supervised, for eyes and terminals without colour; code and prose hardly ever use them.
OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class Spread:
    """Smallest, median, mean and largest of some counts."""

    smallest: int
    median: float
    mean: float
    largest: int

    @staticmethod
    def of(counts: np.ndarray) -> Spread:
        """The spread of at least one count."""
        return Spread(int(counts.min()), float(np.median(counts)), float(counts.mean()), int(counts.max()))

    def __str__(self) -> str:
        return f"{self.smallest:,} / {self.median:,.0f} / {self.mean:,.1f} / {self.largest:,}"


@dataclass(frozen=True)
class PackedReport:
    """What is in a packed data set.

    Attributes:
        rows: packed rows.
        seq_len: tokens that a row can hold.
        documents: documents, or pieces of them where packing split one.
        tokens: tokens in documents.
        supervised_tokens: tokens with a label other than -100.
        unsupervised_documents: documents or pieces without a supervised token, as splitting and truncation can leave.
        efficiency: share of `rows * seq_len` that is documents, 0 to 1.
        padding: tokens of padding, `rows * seq_len - tokens`.
        documents_per_row, supervised_per_row: their spread over rows.
        pairs_per_row: spread of the causal pairs of tokens that attend, what a row's attention costs.
        document_lengths: tokens of each document, int64 [documents], in order.
    """

    rows: int
    seq_len: int
    documents: int
    tokens: int
    supervised_tokens: int
    unsupervised_documents: int
    efficiency: float
    padding: int
    documents_per_row: Spread
    supervised_per_row: Spread
    pairs_per_row: Spread
    document_lengths: np.ndarray


def summarise(packed: Dataset, seq_len: int) -> PackedReport:
    """Count what a packed data set holds.

    Args:
        packed: columns labels and lengths, at least one row.
        seq_len: tokens that a row can hold.

    Raises:
        ValueError: no row, or a row whose lengths do not add up to its tokens or exceed `seq_len`.
    """
    return summarise_tables(packed.select_columns(["labels", "lengths"]).with_format("arrow").iter(1000), seq_len)


def summarise_tables(tables: Iterable[pa.Table], seq_len: int) -> PackedReport:
    """As `summarise`, of Arrow tables with the columns labels and lengths, one after the other."""
    lengths, tokens, counts, supervised = [], [], [], []
    silent = 0
    for batch in tables:
        if not len(batch):
            continue
        per_row = batch["lengths"].combine_chunks()
        labels = batch["labels"].combine_chunks()
        offsets = labels.offsets.to_numpy() - labels.offsets[0].as_py()
        is_supervised = labels.flatten().to_numpy(zero_copy_only=False) != IGNORED
        sums = np.concatenate([[0], np.cumsum(is_supervised)])
        supervised.append(np.diff(sums[offsets]))
        tokens.append(np.diff(offsets))
        counts.append(np.diff(per_row.offsets.to_numpy()))
        sizes = per_row.flatten().to_numpy(zero_copy_only=False)
        lengths.append(sizes)
        # Clipped, because lengths that do not add up are reported below and not here.
        document_ends = np.minimum(np.concatenate([[0], np.cumsum(sizes)]), len(is_supervised))
        silent += int((np.diff(sums[document_ends]) == 0).sum())
    if not counts:
        raise ValueError("the packed data set has no row; pack at least one document")
    all_lengths, all_counts, all_tokens = (np.concatenate(x).astype(np.int64) for x in (lengths, counts, tokens))
    ends = np.concatenate([[0], np.cumsum(all_counts)])
    filled = np.diff(np.concatenate([[0], np.cumsum(all_lengths)])[ends])
    wrong = np.flatnonzero((filled != all_tokens) | (filled > seq_len))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"row {row}: {all_counts[row]} documents of {filled[row]} tokens together, {all_tokens[row]} labels and "
            f"seq_len={seq_len}; lengths must add up to the tokens and fit: pack the data set again"
        )
    per_row_supervised = np.concatenate(supervised)
    pairs = np.concatenate([[0], np.cumsum(all_lengths * (all_lengths + 1) // 2)])
    total = int(all_tokens.sum())
    return PackedReport(
        rows=len(all_counts),
        seq_len=seq_len,
        documents=len(all_lengths),
        tokens=total,
        supervised_tokens=int(per_row_supervised.sum()),
        unsupervised_documents=silent,
        efficiency=total / (len(all_counts) * seq_len),
        padding=len(all_counts) * seq_len - total,
        documents_per_row=Spread.of(all_counts),
        supervised_per_row=Spread.of(per_row_supervised),
        pairs_per_row=Spread.of(np.diff(pairs[ends])),
        document_lengths=all_lengths,
    )


def text_histogram(lengths: Sequence[int] | np.ndarray, width: int = 40) -> list[str]:
    """Histogram of lengths as lines of text; each bar covers a doubling.

    Example:
        >>> print("\\n".join(text_histogram([1, 3, 3, 5], width=4)))
        1    1  ██
        2-3  2  ████
        4-7  1  ██

    Raises:
        ValueError: no length, or one below 1.
    """
    values = np.asarray(lengths, dtype=np.int64)
    if not values.size or values.min() < 1:
        raise ValueError(f"lengths must be at least one number of at least 1; got {values[:8].tolist()}")
    powers = np.array([int(value).bit_length() - 1 for value in (values.min(), values.max())])
    bins = np.arange(powers[0], powers[1] + 1)
    counts = np.histogram(values, bins=np.append(2.0**bins, 2.0 ** (powers[1] + 1)))[0]
    names = [str(2**b) if b == 0 else f"{2**b:,}-{2 ** (b + 1) - 1:,}" for b in bins.tolist()]
    numbers = [f"{count:,}" for count in counts]
    wide, deep = max(map(len, names)), max(map(len, numbers))
    bars = [_bar(count / counts.max() * width) for count in counts]
    return [
        f"{name:<{wide}}  {number:>{deep}}  {bar}".rstrip()
        for name, number, bar in zip(names, numbers, bars, strict=True)
    ]


def _bar(cells: float) -> str:
    eighths = round(cells * 8)
    bar = "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
    return bar or ("▏" if cells > 0 else "")


@dataclass(frozen=True)
class DocumentView:
    """One document of a row, cut where supervision begins and ends.

    Attributes:
        index: which document of the row.
        start, end: its tokens in the row, end exclusive.
        supervised: how many of its tokens are supervised.
        pieces: text and whether it is supervised, in order.
    """

    index: int
    start: int
    end: int
    supervised: int
    pieces: tuple[tuple[str, bool], ...]

    def plain(self) -> str:
        """The text with marks around what is supervised."""
        return "".join(f"{OPEN}{text}{CLOSE}" if said else text for text, said in self.pieces)


def view_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> list[DocumentView]:
    """Documents of a packed row as text (or as token ids without a tokenizer), with what is supervised.

    Args:
        row: `input_ids`, `labels` and `lengths`.
        tokenizer: decodes; special tokens are shown.
    """
    views = []
    start = 0
    for index, length in enumerate(row["lengths"]):
        ids, labels = row["input_ids"][start : start + length], row["labels"][start : start + length]
        said = [label != IGNORED for label in labels]
        cuts = [0, *(i for i in range(1, length) if said[i] != said[i - 1]), length]
        pieces = tuple((_decode(ids[a:b], tokenizer), said[a]) for a, b in pairwise(cuts))
        views.append(DocumentView(index, start, start + length, sum(said), pieces))
        start += length
    return views


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids)) + " "
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
