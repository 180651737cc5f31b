"""`PackedLayout`: where each document starts in a packed batch.

The one value that the rest of packflex follows. A batch is B rows of S tokens; each row holds whole documents one after
the other and may end in padding that belongs to no document. Host numbers (longest document, sum of squared lengths)
are made once, when the layout is built at collate time, so that nothing later has to ask the device.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor
from torch.utils import _pytree as pytree

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class DocumentOrigin:
    """What a layout's own `document_ids` carry as `packflex_documents`: that their documents are contiguous, and where.

    `version` is the tensor's when it was made; one that was written to since is no layout's any more.
    """

    cu_seqlens: Tensor
    row_offsets: Tensor
    seq_len: int
    num_tokens: int
    sum_squared_lengths: int
    version: int


class PackedLayout:
    """Document boundaries of a packed batch: B rows of S tokens, documents per row, an optional padded tail.

    Build one with `from_lengths`, `from_cu_seqlens`, `from_document_ids` or `from_position_ids`. Immutable.

    Example:
        >>> layout = PackedLayout.from_lengths([[3, 4], [7]], seq_len=8)
        >>> layout.cu_seqlens.tolist()
        [0, 3, 7, 14]
        >>> layout.document_ids[0].tolist()
        [0, 0, 0, 1, 1, 1, 1, -1]

    Attributes:
        cu_seqlens: int32 [N + 1], cumulative document lengths over all rows. Padding is not in it: lengths
            [2, 4, 3] give [0, 2, 6, 9] whatever the row length is.
        row_offsets: int32 [B + 1]; row b holds the documents `row_offsets[b]:row_offsets[b + 1]`.
        lengths: host copy of the document lengths, a tuple of ints for each row.
        seq_len: S, the tokens of a row, padding included.
    """

    cu_seqlens: Tensor
    row_offsets: Tensor
    lengths: tuple[tuple[int, ...], ...]
    seq_len: int

    def __init__(
        self, cu_seqlens: Tensor, row_offsets: Tensor, lengths: tuple[tuple[int, ...], ...], seq_len: int
    ) -> None:
        """Take parts that agree with one another; the `from_` constructors check user input."""
        self.cu_seqlens = cu_seqlens
        self.row_offsets = row_offsets
        self.lengths = lengths
        self.seq_len = seq_len
        self._block_masks: dict[Hashable, Any] = {}
        if not torch.compiler.is_compiling():
            # The number of documents changes with every batch: a compiled model must not start with a graph for one.
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what defines the layout; masks and views are made again where they are used."""
        return PackedLayout, (self.cu_seqlens, self.row_offsets, self.lengths, self.seq_len)

    # Constructors

    @staticmethod
    def from_lengths(lengths: Sequence[Sequence[int]], seq_len: int | None = None) -> PackedLayout:
        """Layout from document lengths, one list for each row.

        Args:
            lengths: for each row, the lengths of its documents in order; each at least 1. A row may be empty.
            seq_len: tokens of a row; the longest row by default. What a row does not fill is its padded tail.

        Raises:
            ValueError: a length below 1, a row that does not fit in `seq_len`, or counts past int32.
            TypeError: a length that is not an integer.
        """
        rows = tuple(_checked_row(row, index) for index, row in enumerate(lengths))
        if not rows:
            raise ValueError("a layout needs at least one row; got an empty list of rows")
        totals = [sum(row) for row in rows]
        if seq_len is None:
            seq_len = max(totals)
        seq_len = operator.index(seq_len)
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1; got {seq_len}")
        for index, total in enumerate(totals):
            if total > seq_len:
                raise ValueError(
                    f"row {index} holds {total} tokens in {len(rows[index])} documents, more than seq_len={seq_len}"
                )
        if len(rows) * seq_len > _INT32_MAX:
            raise ValueError(
                f"{len(rows)} rows of {seq_len} tokens are {len(rows) * seq_len} tokens; "
                f"int32 offsets end at {_INT32_MAX}: use fewer rows in a batch"
            )
        flat = np.array([length for row in rows for length in row], dtype=np.int64)
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        return PackedLayout(_offsets(flat), _offsets(counts), rows, seq_len)

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens: Tensor | Sequence[int],
        seq_len: int | None = None,
        row_offsets: Tensor | Sequence[int] | None = None,
    ) -> PackedLayout:
        """Layout from cumulative document lengths.

        Args:
            cu_seqlens: [N + 1] integers, from 0 and strictly rising: [0, 2, 6, 9] for lengths [2, 4, 3].
            seq_len: tokens of a row. Without `row_offsets`, documents fill one row of this length.
            row_offsets: [B + 1] integers, documents before each row; one row by default.

        Raises:
            ValueError: boundaries that do not start at 0 or do not rise, or rows that do not fit.

        A tensor on a device is copied to the host, which waits for it: build layouts where batches are made.
        """
        bounds = _int_list(cu_seqlens, "cu_seqlens")
        if len(bounds) < 1 or bounds[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0; got {_excerpt(bounds)}")
        lengths = _differences(bounds, "cu_seqlens", at_least=1)
        if row_offsets is None:
            return PackedLayout.from_lengths([lengths], seq_len)
        offsets = _int_list(row_offsets, "row_offsets")
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(lengths):
            raise ValueError(
                f"row_offsets must run from 0 to the number of documents ({len(lengths)}); got {_excerpt(offsets)}"
            )
        _differences(offsets, "row_offsets", at_least=0)
        rows = [lengths[a:b] for a, b in itertools.pairwise(offsets)]
        return PackedLayout.from_lengths(rows, seq_len)

    @staticmethod
    def from_document_ids(document_ids: Tensor) -> PackedLayout:
        """Layout from an id for each token: [B, S] (or [S]) integers, -1 in a padded tail.

        Raises:
            ValueError: padding before a document, or an id that comes back after another document in the same row.
        """
        ids = _as_rows(document_ids, "document_ids")
        rows: list[list[int]] = []
        for b, row in enumerate(ids):
            real = int(np.count_nonzero(row >= 0))
            if (row[:real] < 0).any():
                at = int(np.argmax(row < 0))
                raise ValueError(
                    f"row {b}: padding (document id {row[at]}) at token {at} comes before a document; "
                    "padding may only end a row"
                )
            starts = np.flatnonzero(np.diff(row[:real], prepend=-1))
            seen, first_at = np.unique(row[starts], return_index=True)
            if len(seen) != len(starts):
                repeated = np.setdiff1d(np.arange(len(starts)), first_at)[0]
                raise ValueError(
                    f"row {b}: document id {row[starts[repeated]]} comes back at token {starts[repeated]} after "
                    "another document; tokens of a document must be contiguous"
                )
            rows.append(np.diff(starts, append=real).tolist())
        return PackedLayout.from_lengths(rows, ids.shape[1])

    @staticmethod
    def from_position_ids(position_ids: Tensor, num_tokens: Sequence[int] | Tensor | None = None) -> PackedLayout:
        """Layout from positions that restart at 0 in each document.

        Args:
            position_ids: [B, S] (or [S]) integers.
            num_tokens: real tokens of each row; what follows is padding. All of the row by default: zeros in
                padding look like documents of one token and cannot be told apart from the positions alone.

        Raises:
            ValueError: a row that does not start at 0, or a position that is neither 0 nor its predecessor plus 1.
        """
        ids = _as_rows(position_ids, "position_ids")
        batch, seq_len = ids.shape
        real = [seq_len] * batch if num_tokens is None else _int_list(num_tokens, "num_tokens")
        if len(real) != batch or not all(0 <= n <= seq_len for n in real):
            raise ValueError(f"num_tokens must be {batch} counts from 0 to {seq_len}; got {_excerpt(real)}")
        rows: list[list[int]] = []
        for b in range(batch):
            row = ids[b, : real[b]]
            starts = np.flatnonzero(row == 0)
            if len(row) and (not len(starts) or starts[0] != 0):
                raise ValueError(f"row {b}: position_ids must start at 0; got {row[0]}")
            wrong = np.flatnonzero((row[1:] != 0) & (row[1:] != row[:-1] + 1))
            if len(wrong):
                at = int(wrong[0]) + 1
                raise ValueError(
                    f"row {b}: position {row[at]} at token {at} follows {row[at - 1]}; expected {row[at - 1] + 1}, "
                    "or 0 for a new document"
                )
            rows.append(np.diff(starts, append=len(row)).tolist())
        return PackedLayout.from_lengths(rows, seq_len)

    # Host numbers

    @property
    def batch_size(self) -> int:
        """Rows of the batch, B."""
        return len(self.lengths)

    @cached_property
    def num_documents(self) -> int:
        """Documents over all rows, N."""
        return sum(len(row) for row in self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that belong to a document, over all rows."""
        return sum(sum(row) for row in self.lengths)

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest document; 0 when there is none."""
        return max((length for row in self.lengths for length in row), default=0)

    @cached_property
    def sum_squared_lengths(self) -> int:
        """Sum over documents of length squared: the pairs that bidirectional attention computes."""
        return sum(length * length for row in self.lengths for length in row)

    @property
    def efficiency(self) -> float:
        """Share of the batch's tokens that belong to a document, 0 to 1."""
        return self.num_tokens / (self.batch_size * self.seq_len)

    @property
    def device(self) -> torch.device:
        """Device of `cu_seqlens` and everything derived from it."""
        return self.cu_seqlens.device

    # Token-wise views

    @cached_property
    def document_ids(self) -> Tensor:
        """int32 [B, S]: the index into the documents (over all rows) that a token belongs to, -1 in a padded tail."""
        ids = np.full((self.batch_size, self.seq_len), -1, dtype=np.int32)
        first = 0
        for b, row in enumerate(self.lengths):
            ids[b, : sum(row)] = np.repeat(np.arange(first, first + len(row), dtype=np.int32), row)
            first += len(row)
        tensor = torch.from_numpy(ids).to(self.device)
        origin = DocumentOrigin(
            self.cu_seqlens, self.row_offsets, self.seq_len, self.num_tokens, self.sum_squared_lengths, tensor._version
        )
        tensor.packflex_documents = origin  # type: ignore[attr-defined]
        return tensor

    @cached_property
    def position_ids(self) -> Tensor:
        """int64 [B, S]: positions that restart at 0 in each document, 0 in a padded tail."""
        positions = np.zeros((self.batch_size, self.seq_len), dtype=np.int64)
        for b, row in enumerate(self.lengths):
            ends = np.cumsum(row, dtype=np.int64)
            total = int(ends[-1]) if len(row) else 0
            positions[b, :total] = np.arange(total) - np.repeat(ends - np.array(row, dtype=np.int64), row)
        return torch.from_numpy(positions).to(self.device)

    # Moving, comparing, showing

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLayout:
        """The same layout with its tensors on `device`; itself when they are there already."""
        if is_on(self.cu_seqlens.device, device):
            return self
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedLayout:
        """The same layout in page-locked host memory, so that `.to(device, non_blocking=True)` need not wait."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> PackedLayout:
        moved = PackedLayout(move(self.cu_seqlens), move(self.row_offsets), self.lengths, self.seq_len)
        for name in ("document_ids", "position_ids"):
            if name in self.__dict__:
                moved.__dict__[name] = move(self.__dict__[name])
        return moved

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedLayout):
            return NotImplemented
        return self.lengths == other.lengths and self.seq_len == other.seq_len

    def __hash__(self) -> int:
        return hash((self.lengths, self.seq_len))

    def __repr__(self) -> str:
        rows = [f"[{_excerpt(row)}]" for row in self.lengths[:4]]
        if len(self.lengths) > 4:
            rows.append(f"... {len(self.lengths) - 4} more rows")
        return (
            f"PackedLayout({self.batch_size} x {self.seq_len} tokens, {self.num_documents} documents, "
            f"longest {self.max_length}, {self.efficiency:.1%} full, {self.device}: {', '.join(rows)})"
        )


def _flatten(layout: PackedLayout) -> tuple[list[Tensor], tuple[Any, ...]]:
    return [layout.cu_seqlens, layout.row_offsets], (layout.lengths, layout.seq_len)


def _unflatten(tensors: Any, context: Any) -> PackedLayout:
    cu_seqlens, row_offsets = tensors
    return PackedLayout(cu_seqlens, row_offsets, *context)


pytree.register_pytree_node(PackedLayout, _flatten, _unflatten, serialized_type_name="packflex.PackedLayout")


def _offsets(counts: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def _checked_row(row: Sequence[int], index: int) -> tuple[int, ...]:
    try:
        lengths = tuple(map(operator.index, row))
    except TypeError as error:
        raise TypeError(
            f"row {index}: lengths must be integers, one list for each row such as [[3, 4], [7]]; got {row!r}"
        ) from error
    for at, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"row {index}: document {at} has length {length}; lengths must be at least 1")
    return lengths


def _int_list(values: Tensor | Sequence[int], name: str) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex():
            raise ValueError(
                f"{name} must be a one-dimensional integer tensor; got {values.dtype} {tuple(values.shape)}"
            )
        return values.tolist()
    return [operator.index(value) for value in values]


def _differences(bounds: list[int], name: str, at_least: int) -> list[int]:
    steps = [b - a for a, b in itertools.pairwise(bounds)]
    for at, step in enumerate(steps):
        if step < at_least:
            what = "rise" if at_least else "not fall"
            raise ValueError(f"{name} must {what}; {name}[{at}]={bounds[at]}, {name}[{at + 1}]={bounds[at + 1]}")
    return steps


def _as_rows(ids: Tensor, name: str) -> np.ndarray:
    if not isinstance(ids, Tensor) or ids.dim() not in (1, 2) or ids.is_floating_point():
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} must be an integer tensor [B, S] or [S]; got {got}")
    rows = ids.detach().cpu().numpy()
    rows = rows[None] if rows.ndim == 1 else rows
    if 0 in rows.shape:
        raise ValueError(f"{name} must hold at least one token; got shape {tuple(ids.shape)}")
    return rows.astype(np.int64)


def _excerpt(values: Sequence[int], shown: int = 8) -> str:
    text = ", ".join(map(str, values[:shown]))
    return text if len(values) <= shown else f"{text}, ... {len(values) - shown} more"


def is_on(device: torch.device, wanted: torch.device | str) -> bool:
    """Whether `device` is the one that is wanted; "cuda" means the current one, which tensors name by its number."""
    wanted = torch.device(wanted)
    if wanted.type != device.type or wanted.type != "cuda":
        return wanted.type == device.type
    return device.index == (torch.cuda.current_device() if wanted.index is None else wanted.index)
