"""Packing strategies: document lengths to a `PackingPlan`, the same plan for the same seed.

- `best_fit`: fill each row with the longest piece that still fits, and end it with two that fit exactly where that
  leaves room. Works on counts of lengths, so its time follows the number of different lengths and not that of documents
  (histogram packing, Krell et al., arXiv 2107.02027; best-fit packing, Ding et al., arXiv 2404.10830).
- `next_fit`: take documents in order and open a row when the next does not fit. Keeps the order, wastes most.
- `wrapped`: one long stream, cut at every row. Wastes nothing, cuts documents anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from packflex.packing.length_set import LengthSet
from packflex.packing.plan import PackingPlan

OVERFLOWS = ("split", "truncate", "drop", "error")
_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1
MOST_TOKENS = 1 << 24  # of a row: what attention's kernels count exactly in float32, and a table of lengths holds
_GIVE_WAY = 4  # lengths that may be put back to end a row exactly


def best_fit(lengths: Any, seq_len: int, *, overflow: str = "split", seed: int | None = 0) -> PackingPlan:
    """Plan rows so that each takes the longest piece that still fits; `best_fit_patterns` says how.

    Args:
        lengths: [N] integers, tokens of each document, at least 1.
        seq_len: tokens of a row.
        overflow: what becomes of documents longer than a row: "split" into pieces, "truncate" to the row's length,
            "drop", or "error".
        seed: shuffles which documents of a length share a row, and the rows. None keeps both in order.

    Raises:
        ValueError: lengths below 1, an unknown overflow, or with "error" a document that is too long.

    Example:
        >>> best_fit([3, 4, 7], 8, seed=None).document_indices.tolist()
        [2, 1, 0]
    """
    pieces = _Pieces(lengths, seq_len, overflow)
    counts = np.bincount(pieces.lengths, minlength=seq_len + 1)
    rows, repeats = best_fit_patterns(counts, seq_len)
    flat_lengths = np.concatenate([np.tile(row, k) for row, k in zip(rows, repeats, strict=True)] or [_none()])
    row_sizes = np.repeat([len(row) for row in rows], repeats).astype(np.int64)
    # piece of each slot: the slots of a length, in order, take the pieces of that length, in (shuffled) order
    key = np.int16 if seq_len < 2**15 else np.int64  # numpy sorts 16-bit keys by radix
    shuffled = _generator(seed).permutation(len(pieces.lengths)) if seed is not None else np.arange(len(pieces.lengths))
    by_length = shuffled[np.argsort(pieces.lengths[shuffled].astype(key), kind="stable")]
    chosen = np.empty(len(pieces.lengths), dtype=np.int64)
    chosen[np.argsort(flat_lengths.astype(key), kind="stable")] = by_length
    return pieces.plan("best_fit", seed, chosen, row_sizes)


def best_fit_patterns(counts: Any, seq_len: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Best fit on counts alone: which lengths fill a row, and how many rows are filled so.

    A row takes the longest length that still fits until none does. Where room is left, its last lengths give way to two
    that fill the row exactly, if there are such two: without that, lengths that are all alike (dialogues of 49 to 820
    tokens) lose 0.1% of the room to remainders shorter than any document.

    The row's pattern is repeated for as long as no length in it runs short. That at least halves the count of some
    length each time, so a length of c documents ends at most log2(c) + 1 patterns. Time and memory follow the number of
    different lengths, whatever the number of documents.

    Args:
        counts: [seq_len + 1] integers, pieces of each length; `counts[0]` must be 0.
        seq_len: tokens of a row.

    Returns:
        The lengths of each pattern's row, longest first, and int64 [patterns] repeats.

    Raises:
        ValueError: counts of another size, negative ones or none that are integers, or pieces of length 0.

    Example: rows of 10 for one document of 6 and two of 5. Nothing goes with the 6, which gives way to the 5s.
        >>> patterns, repeats = best_fit_patterns([0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0], 10)
        >>> [pattern.tolist() for pattern in patterns], repeats.tolist()
        ([[5, 5], [6]], [1, 1])
    """
    _require_row_length(seq_len)
    left = _integers(counts)
    if len(left) != seq_len + 1 or left[0]:
        raise ValueError(
            f"counts must be {seq_len + 1} integers, none of length 0; got {len(left)}, {left[0]} of length 0"
        )
    if min(left) < 0:
        at = left.index(min(left))
        raise ValueError(f"counts must not be negative; got {left[at]} of length {at}")
    present = LengthSet(seq_len, [length for length, count in enumerate(left) if count])
    rows: list[np.ndarray] = []
    repeats: list[int] = []
    while present.bits:
        pattern = _fill_row(present, left)
        repeat = min(left[length] // times for length, times in pattern.items())
        for length, times in pattern.items():
            left[length] -= repeat * times
            if not left[length]:
                present.remove(length)
        lengths = sorted(pattern, reverse=True)
        rows.append(np.repeat(lengths, [pattern[length] for length in lengths]).astype(np.int64))
        repeats.append(repeat)
    return rows, np.array(repeats, dtype=np.int64)


def _integers(counts: Any) -> list[int]:
    table = np.asarray(counts)
    if table.ndim != 1:
        raise ValueError(f"counts must be a one-dimensional array of integers; got the shape {table.shape}")
    values = table.tolist()
    if not np.issubdtype(table.dtype, np.integer) or max(values, default=0) > _INT64_MAX:
        whole = [isinstance(n, int | float) and n == n // 1 and abs(n) <= _INT64_MAX for n in values]
        at = whole.index(False) if False in whole else 0
        shown = f"{values[at]!r} of length {at}" if values else "none"
        raise ValueError(f"counts must be integers of at most 64 bits; got {shown} ({table.dtype})")
    return values


def _fill_row(present: LengthSet, left: list[int]) -> dict[int, int]:
    """Lengths of one row and how often it takes each, of `left[n]` pieces of length n."""
    room, free, pattern = present.seq_len, present.copy(), {}
    while room and (length := free.longest(room)):
        times = min(room // length, left[length])
        pattern[length] = times
        room -= times * length
        if times == left[length]:
            free.remove(length)
    if room:
        _close_row(pattern, room, free, left)
    return pattern


def _close_row(pattern: dict[int, int], room: int, free: LengthSet, left: list[int]) -> None:
    """Put two lengths that fill the row exactly in place of as few of its last ones as will do."""
    taken = dict(pattern)
    for _ in range(_GIVE_WAY):
        if not taken:
            return
        last = next(reversed(taken))
        free.add(last)
        room += last
        taken[last] -= 1
        if not taken[last]:
            del taken[last]
        pair = free.pair(room, lambda length: left[length] - taken.get(length, 0) >= 2)
        if pair is not None:
            for length in pair:
                taken[length] = taken.get(length, 0) + 1
            pattern.clear()
            pattern.update(taken)
            return


def next_fit(lengths: Any, seq_len: int, *, overflow: str = "split", seed: int | None = 0) -> PackingPlan:
    """Take documents in order (shuffled by `seed`) and open a row when the next does not fit; see `best_fit`."""
    pieces = _Pieces(lengths, seq_len, overflow)
    chosen = pieces.in_document_order(seed)
    ends = np.concatenate([[0], np.cumsum(pieces.lengths[chosen])])
    # the row that begins with piece p ends before piece next_row[p]
    next_row = (np.searchsorted(ends, ends[:-1] + seq_len, side="right") - 1).tolist()
    bounds = [0]
    while bounds[-1] < len(chosen):
        bounds.append(next_row[bounds[-1]])
    return pieces.plan("next_fit", seed, chosen, np.diff(np.array(bounds, dtype=np.int64)))


def wrapped(lengths: Any, seq_len: int, *, overflow: str = "split", seed: int | None = 0) -> PackingPlan:
    """Join documents in order (shuffled by `seed`) and cut at every row's end; see `best_fit`.

    Only `overflow="split"` has a meaning here, since every document may be cut.
    """
    if overflow != "split":
        raise ValueError(f'strategy "wrapped" cuts documents anywhere: overflow must be "split"; got {overflow!r}')
    whole = _Pieces(lengths, seq_len, overflow, whole=True)
    order = whole.in_document_order(seed)
    ends = np.concatenate([[0], np.cumsum(whole.lengths[order])])
    row_cuts = np.arange(0, ends[-1], seq_len)
    place = np.searchsorted(ends, row_cuts)
    new = ends[place] != row_cuts  # a row's end that falls on a document's end cuts nothing
    cuts = np.insert(ends, place[new], row_cuts[new])
    is_end = np.insert(np.ones(len(ends), dtype=bool), place[new], False)
    document = np.cumsum(is_end)[:-1] - 1
    sizes = np.diff(cuts)
    pieces = whole.recut(order[document], cuts[:-1] - ends[document], sizes)
    row_sizes = np.bincount(cuts[:-1] // seq_len) if len(sizes) else np.zeros(0, dtype=np.int64)
    return pieces.plan("wrapped", seed, np.arange(len(sizes)), row_sizes)


STRATEGIES: dict[str, Callable[..., PackingPlan]] = {"best_fit": best_fit, "next_fit": next_fit, "wrapped": wrapped}


def plan_rows(
    lengths: Any, seq_len: int, strategy: str = "best_fit", *, overflow: str = "split", seed: int | None = 0
) -> PackingPlan:
    """Plan rows by the name of a strategy: "best_fit", "next_fit" or "wrapped".

    Raises:
        ValueError: an unknown strategy, and what the strategy raises.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    return STRATEGIES[strategy](lengths, seq_len, overflow=overflow, seed=seed)


class _Pieces:
    """Documents after overflow: arrays of pieces, and the counts of what was cut or left out.

    With `whole`, documents longer than a row are left as they are: the strategy cuts them.
    """

    def __init__(self, lengths: Any, seq_len: int, overflow: str, whole: bool = False) -> None:
        raw = np.asarray(lengths)
        if raw.ndim != 1 or (raw.size and not np.issubdtype(raw.dtype, np.integer)):
            raise ValueError(f"lengths must be a one-dimensional array of integers; got {raw.dtype} {raw.shape}")
        _require_row_length(seq_len)
        if overflow not in OVERFLOWS:
            raise ValueError(f"overflow must be one of {', '.join(OVERFLOWS)}; got {overflow!r}")
        if raw.size and int(raw.max()) > _INT32_MAX:
            raise ValueError(
                f"document {int(np.argmax(raw))} has {int(raw.max())} tokens; at most {_INT32_MAX} are possible: "
                "split it"
            )
        sizes = raw.astype(np.int64)
        if (sizes < 1).any():
            at = int(np.argmax(sizes < 1))
            raise ValueError(f"document {at} has length {sizes[at]}; remove empty documents before packing")
        self.seq_len, self.overflow, self.num_documents = seq_len, overflow, len(sizes)
        self.num_split = self.num_truncated = self.truncated_tokens = self.num_dropped = self.dropped_tokens = 0
        self.documents = np.arange(len(sizes))
        self.starts = np.zeros(len(sizes), dtype=np.int64)
        self.lengths = sizes
        too_long = sizes > seq_len
        if too_long.any() and not whole:
            getattr(self, f"_{overflow}")(too_long)

    def _error(self, too_long: np.ndarray) -> None:
        at = int(np.argmax(too_long))
        raise ValueError(
            f"{int(too_long.sum())} documents are longer than seq_len={self.seq_len}, the first is document {at} with "
            f'{self.lengths[at]} tokens; use overflow="split", "truncate" or "drop", or longer rows'
        )

    def _truncate(self, too_long: np.ndarray) -> None:
        self.num_truncated = int(too_long.sum())
        self.truncated_tokens = int((self.lengths[too_long] - self.seq_len).sum())
        self.lengths = np.minimum(self.lengths, self.seq_len)

    def _drop(self, too_long: np.ndarray) -> None:
        self.num_dropped = int(too_long.sum())
        self.dropped_tokens = int(self.lengths[too_long].sum())
        self.documents, self.starts, self.lengths = (x[~too_long] for x in (self.documents, self.starts, self.lengths))

    def _split(self, too_long: np.ndarray) -> None:
        self.num_split = int(too_long.sum())
        parts = -(-self.lengths // self.seq_len)
        first = np.cumsum(parts) - parts
        self.documents = np.repeat(self.documents, parts)
        self.starts = (np.arange(parts.sum()) - np.repeat(first, parts)) * self.seq_len
        self.lengths = np.minimum(np.repeat(self.lengths, parts) - self.starts, self.seq_len)

    def in_document_order(self, seed: int | None) -> np.ndarray:
        """Indices of pieces, documents in their own order or shuffled, pieces of a document in turn."""
        if seed is None:
            return np.arange(len(self.lengths))
        rank = _generator(seed).permutation(self.num_documents)
        return np.argsort(rank[self.documents], kind="stable")

    def recut(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> _Pieces:
        """The same documents cut into other pieces."""
        self.documents, self.starts, self.lengths = documents, starts, lengths
        self.num_split = int((np.bincount(documents, minlength=self.num_documents) > 1).sum())
        return self

    def plan(self, strategy: str, seed: int | None, chosen: np.ndarray, row_sizes: np.ndarray) -> PackingPlan:
        """The plan whose rows hold `row_sizes` of the `chosen` pieces each, rows shuffled by `seed`."""
        offsets = np.concatenate([[0], np.cumsum(row_sizes)]).astype(np.int64)
        if seed is not None:
            order = _generator(seed, 1).permutation(len(row_sizes))
            sizes = row_sizes[order]
            shuffled = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
            chosen = chosen[np.repeat(offsets[order] - shuffled[:-1], sizes) + np.arange(len(chosen))]
            offsets = shuffled
        return PackingPlan(
            self.documents[chosen], self.starts[chosen], self.lengths[chosen], offsets,
            self.seq_len, strategy, self.overflow, seed, self.num_documents,
            self.num_split, self.num_truncated, self.truncated_tokens, self.num_dropped, self.dropped_tokens,
        )  # fmt: skip


def _require_row_length(seq_len: int) -> None:
    if not isinstance(seq_len, (int, np.integer)):
        raise ValueError(f"seq_len must be an integer; got {seq_len!r}")
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1; got {seq_len}")
    if seq_len > MOST_TOKENS:
        raise ValueError(f"seq_len must be at most {MOST_TOKENS} tokens; got {seq_len}")


def _generator(seed: int, stream: int = 0) -> np.random.Generator:
    if seed < 0:
        raise ValueError(f"seed must be at least 0, or None for the documents' own order; got {seed}")
    return np.random.default_rng([stream, seed])


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)
