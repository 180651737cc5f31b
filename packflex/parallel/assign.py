"""Which rank works on which part of which document: whole documents where they fit, long ones split in a zigzag."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A document is split when alone it makes this share of a rank's attention, or does not fit.
_SPLIT_SHARE = 0.5
_LEAST_PIECE = 16  # tokens; shorter pieces cost more to exchange than they save


@dataclass(frozen=True, order=True)
class Piece:
    """Tokens `start` to `end` of a document; documents are numbered through the batch."""

    document: int
    start: int
    end: int


def assign_pieces(lengths: Sequence[int], ranks: int, capacity: int) -> list[list[Piece]]:
    """Pieces of each rank, in order of document and position.

    Long documents are cut into two pieces a rank, the first with the last, the second with the last but one (zigzag):
    under a causal mask late tokens see more keys, and so every rank gets its share of early and late ones. All other
    documents stay whole, each with the rank that has least attention to do so far.

    Args:
        lengths: tokens of each document.
        ranks: how many share them.
        capacity: tokens that a rank can hold.

    Raises:
        ValueError: more tokens than the ranks can hold.

    Example: two ranks that hold 12 tokens each.
        >>> assign_pieces([16, 3, 4], 2, 12)[0]
        [Piece(document=0, start=0, end=4), Piece(document=0, start=12, end=16), Piece(document=2, start=0, end=4)]
    """
    if sum(lengths) > ranks * capacity:
        raise ValueError(f"{sum(lengths)} tokens do not fit {ranks} ranks of {capacity}")
    mean = sum(n * n for n in lengths) / ranks
    room, work = [capacity] * ranks, [0.0] * ranks
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]

    def give(rank: int, document: int, start: int, end: int) -> None:
        if end > start:
            pieces[rank].append(Piece(document, start, end))
            room[rank] -= end - start
            work[rank] += end * end - start * start

    whole = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        length = lengths[document]
        splits = length > capacity or length * length > _SPLIT_SHARE * mean
        if splits and ranks > 1 and length >= 2 * ranks * _LEAST_PIECE:
            _zigzag(document, length, ranks, room, give)
        else:
            whole.append(document)
    for document in whole:
        length = lengths[document]
        fitting = [rank for rank in range(ranks) if room[rank] >= length]
        if fitting:
            give(min(fitting, key=lambda rank: (work[rank], rank)), document, 0, length)
            continue
        start = 0  # room is left on several ranks only: one after the other
        for rank in sorted(range(ranks), key=lambda r: -room[r]):
            end = min(length, start + room[rank])
            give(rank, document, start, end)
            start = end
        assert start == length, "the tokens fit, so what is left of the room holds the document"
    return [sorted(part) for part in pieces]


def _zigzag(
    document: int, length: int, ranks: int, room: list[int], give: Callable[[int, int, int, int], None]
) -> None:
    """Two pieces a rank; the tokens that do not divide go to the ranks with most room."""
    share, over = divmod(length, ranks)
    sizes = [share] * ranks
    for rank in sorted(range(ranks), key=lambda r: -room[r])[:over]:
        sizes[rank] += 1
    early = [size // 2 for size in sizes]
    start = 0
    for rank in range(ranks):
        give(rank, document, start, start + early[rank])
        start += early[rank]
    for rank in reversed(range(ranks)):
        late = sizes[rank] - early[rank]
        give(rank, document, start, start + late)
        start += late
