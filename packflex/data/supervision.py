"""What packing leaves of a document's supervision, counted here for all who pack: in memory, on disk, from a stream.

Packing takes supervised tokens away where it cuts: past the end of a row (`overflow="truncate"`), and at the start of a
piece, since nothing in its row predicts a piece's first token. A document that loses all of them so only fills room.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from packflex.packing import PackingPlan

_TOKENS_AT_ONCE = 1 << 22
# Whether each token is supervised, of the pieces (documents, starts, lengths), one piece after the other.
Supervised = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def supervised_in_pieces(is_supervised: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64, tokens of each piece that are trained on: the supervised ones but for a piece's first.

    Args:
        is_supervised: bool, of the tokens of all pieces one after the other.
        lengths: tokens of each piece, at least 1.

    Example:
        >>> supervised_in_pieces(np.array([True, True, True, True, False]), np.array([3, 2])).tolist()
        [2, 0]
    """
    if not len(lengths):
        return np.zeros(0, dtype=np.int64)
    begins = np.cumsum(lengths) - lengths
    counted = is_supervised.astype(np.int64)
    counted[begins] = 0
    return np.add.reduceat(counted, begins)


def documents_cut_bare(plan: PackingPlan, lengths: np.ndarray, is_supervised: Supervised) -> np.ndarray:
    """Documents of the plan, ascending, that had supervised tokens of which packing cut off every one.

    Only documents that the plan cuts are looked at, some millions of tokens at a time. Documents that it drops are not
    among them: they are in no row.
    """
    is_cut = plan.piece_lengths < lengths[plan.document_indices]
    pieces = (plan.document_indices[is_cut], plan.piece_starts[is_cut], plan.piece_lengths[is_cut])
    documents, place = np.unique(pieces[0], return_inverse=True)
    left = np.zeros(len(documents), dtype=np.int64)
    np.add.at(left, place, _counts(pieces, is_supervised))
    bare = documents[left == 0]
    whole = (bare, np.zeros(len(bare), dtype=np.int64), lengths[bare].astype(np.int64))
    return bare[_counts(whole, is_supervised) > 0]


def cut_bare_message(first: str, count: int, seq_len: int) -> str:
    """What to say of `count` documents whose supervised tokens were all cut off, of which `first` is the first."""
    return f"{first}: rows of {seq_len:,} tokens cut off every supervised token ({count:,} such documents)"


def _counts(pieces: tuple[np.ndarray, np.ndarray, np.ndarray], is_supervised: Supervised) -> np.ndarray:
    sizes = pieces[2]
    counts = np.zeros(len(sizes), dtype=np.int64)
    block = (np.cumsum(sizes) - sizes) // _TOKENS_AT_ONCE
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(block)) + 1, [len(sizes)]]) if len(sizes) else np.zeros(1, int)
    for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        part = (pieces[0][first:last], pieces[1][first:last], sizes[first:last])
        counts[first:last] = supervised_in_pieces(is_supervised(*part), part[2])
    return counts
