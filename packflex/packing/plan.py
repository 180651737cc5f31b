"""`PackingPlan`: which piece of which document lies in which row."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

_ARRAYS = ("document_indices", "piece_starts", "piece_lengths", "row_offsets")


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Rows of pieces of documents; a piece is a whole document unless packing had to cut it.

    Example: documents of 3, 4 and 7 tokens in rows of 8 by best fit give two rows, one with the document of 7 and one
    with those of 4 and 3: `document_indices` [2, 1, 0], `row_offsets` [0, 1, 3], efficiency 14 / 16.

    The arrays cannot be written to.

    Attributes:
        document_indices: int64 [P], the document each piece comes from, row by row.
        piece_starts: int64 [P], the piece's first token within its document.
        piece_lengths: int64 [P], tokens of the piece, at least 1.
        row_offsets: int64 [R + 1]; row r holds the pieces `row_offsets[r]:row_offsets[r + 1]`.
        seq_len: tokens that a row has room for.
        strategy: the name of the strategy that made the plan.
        overflow: what was done with documents longer than a row: "split", "truncate", "drop" or "error".
        seed: seed of the order, or None for the documents' own order.
        num_documents: documents that were planned, dropped ones included.
        num_split: documents cut into several pieces.
        num_truncated: documents that lost their end, and with `truncated_tokens` how much.
        truncated_tokens: tokens lost by truncation.
        num_dropped: documents left out, and with `dropped_tokens` their tokens.
        dropped_tokens: tokens of documents left out.

    Raises:
        ValueError: arrays that do not belong together: pieces of different numbers, or offsets that do not end with
            them.
        TypeError: arrays that do not hold integers.
    """

    document_indices: np.ndarray
    piece_starts: np.ndarray
    piece_lengths: np.ndarray
    row_offsets: np.ndarray
    seq_len: int
    strategy: str
    overflow: str
    seed: int | None
    num_documents: int
    num_split: int = 0
    num_truncated: int = 0
    truncated_tokens: int = 0
    num_dropped: int = 0
    dropped_tokens: int = 0

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = np.asarray(getattr(self, name))
            if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
                raise TypeError(f"{name} must be a one-dimensional array of integers; got {array.dtype} {array.shape}")
            view = array.astype(np.int64, copy=False).view()
            view.flags.writeable = False  # of the view: the caller's array stays as it is
            object.__setattr__(self, name, view)
        sizes = {name: len(getattr(self, name)) for name in _ARRAYS[:3]}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"a plan needs one index, start and length for each piece; got {sizes}")
        offsets = self.row_offsets
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != self.num_pieces or (np.diff(offsets) < 1).any():
            raise ValueError(f"row_offsets must rise from 0 to the {self.num_pieces} pieces, with no empty row")

    @property
    def num_rows(self) -> int:
        """Rows, R."""
        return len(self.row_offsets) - 1

    @property
    def num_pieces(self) -> int:
        """Pieces over all rows, P."""
        return len(self.document_indices)

    @property
    def num_tokens(self) -> int:
        """Tokens over all rows."""
        return int(self.piece_lengths.sum())

    @property
    def efficiency(self) -> float:
        """Share of the rows' room that holds tokens, 0 to 1; 1 for a plan without rows."""
        return self.num_tokens / (self.num_rows * self.seq_len) if self.num_rows else 1.0

    @property
    def row_tokens(self) -> np.ndarray:
        """int64 [R], tokens of each row."""
        return _sums_by_row(self.piece_lengths, self.row_offsets)

    @property
    def row_sum_squares(self) -> np.ndarray:
        """int64 [R], sum of squared piece lengths of each row: what its attention costs."""
        return _sums_by_row(self.piece_lengths * self.piece_lengths, self.row_offsets)

    def row_lengths(self, row: int) -> np.ndarray:
        """Piece lengths of one row, in order; IndexError for a row that is not there."""
        return self.piece_lengths[self._row(row)]

    def row_documents(self, row: int) -> np.ndarray:
        """Document index of each piece of one row, in order; IndexError for a row that is not there."""
        return self.document_indices[self._row(row)]

    def _row(self, row: int) -> slice:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of a plan with rows 0 to {self.num_rows - 1}")
        return slice(int(self.row_offsets[row]), int(self.row_offsets[row + 1]))

    def validate(self, lengths: Any) -> None:
        """Check the plan against the documents it was made for.

        Args:
            lengths: [N] tokens of each document.

        Raises:
            ValueError: a row with more tokens than room, a piece outside its document, a token that is in no row or
                in two (unless truncation or dropping accounts for it), with the offending numbers.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if len(lengths) != self.num_documents:
            raise ValueError(f"the plan is for {self.num_documents} documents; got {len(lengths)} lengths")
        row_tokens = self.row_tokens
        over = np.flatnonzero(row_tokens > self.seq_len)
        if len(over):
            raise ValueError(f"row {over[0]} holds {row_tokens[over[0]]} tokens, more than seq_len={self.seq_len}")
        index, start, size = self.document_indices, self.piece_starts, self.piece_lengths
        if self.num_pieces and (index.min() < 0 or index.max() >= len(lengths)):
            raise ValueError(
                f"document indices must be from 0 to {len(lengths) - 1}; got {index.min()} to {index.max()}"
            )
        bad = np.flatnonzero((size < 1) | (start < 0) | (start + size > lengths[index]))
        if len(bad):
            p = bad[0]
            raise ValueError(
                f"piece {p} is tokens {start[p]} to {start[p] + size[p]} of document {index[p]}, which has "
                f"{lengths[index[p]]}"
            )
        by_document = np.lexsort((start, index))
        index, start, size = index[by_document], start[by_document], size[by_document]
        follows = np.concatenate([[False], index[1:] == index[:-1]]) if len(index) else np.zeros(0, bool)
        expected = np.where(follows, np.concatenate([[0], (start + size)[:-1]]) if len(index) else 0, 0)
        bad = np.flatnonzero(start != expected)
        if len(bad):
            p = bad[0]
            raise ValueError(f"document {index[p]}: a piece starts at token {start[p]}, expected {expected[p]}")
        covered = np.zeros(len(lengths), dtype=np.int64)
        np.add.at(covered, index, size)
        missing = lengths - covered
        lost = int(missing.sum())
        if lost != self.truncated_tokens + self.dropped_tokens:
            worst = int(np.argmax(missing))
            raise ValueError(
                f"{lost} tokens are in no row, but truncation and dropping account for "
                f"{self.truncated_tokens + self.dropped_tokens}; document {worst} misses {missing[worst]} tokens"
            )
        dropped, truncated = int((covered == 0).sum()), int(((missing > 0) & (covered > 0)).sum())
        if (dropped, truncated) != (self.num_dropped, self.num_truncated):
            raise ValueError(
                f"{dropped} documents are in no row and {truncated} lack their end; the plan counts {self.num_dropped} "
                f"dropped and {self.num_truncated} truncated"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as .npz; the file appears whole or not at all."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["seed"] = -1 if self.seed is None else self.seed
        try:
            with partial.open("wb") as file:
                np.savez(file, **values)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> PackingPlan:
        """Read a plan that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is no plan, or is cut short.
        """
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                values: dict[str, Any] = {f.name: file[f.name] for f in fields(PackingPlan)}
        except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is no packing plan, or is cut short ({error}); pack again") from error
        for name, value in values.items():
            if name not in _ARRAYS:
                values[name] = value.item()
        if values["seed"] < 0:
            values["seed"] = None
        return PackingPlan(**values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackingPlan):
            return NotImplemented
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        notes = [f"{self.num_split} split"] if self.num_split else []
        if self.num_truncated:
            notes.append(f"{self.num_truncated} truncated by {self.truncated_tokens} tokens")
        if self.num_dropped:
            notes.append(f"{self.num_dropped} dropped with {self.dropped_tokens} tokens")
        return (
            f"PackingPlan({self.strategy}: {self.num_documents} documents in {self.num_rows} rows of {self.seq_len}, "
            f"{self.efficiency:.2%} full{''.join(f', {note}' for note in notes)})"
        )


def _sums_by_row(values: np.ndarray, row_offsets: np.ndarray) -> np.ndarray:
    totals = np.concatenate([[0], np.cumsum(values)])
    return totals[row_offsets[1:]] - totals[row_offsets[:-1]]
