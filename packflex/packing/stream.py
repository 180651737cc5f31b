"""`StreamPacker`: best fit over a bounded pool, for documents that come one by one and are never all known.

A row takes the oldest documents of the pool in turn until the next one does not fit, and ends with one or two that fill
it exactly; where there are none, its last documents give way to others that do, or it takes the longest that fit. So
every row begins with the oldest document and none waits for long, the mix of a row's lengths is that of the stream, and
only the last places of a row are chosen. With 1,000 documents to choose from that fills rows of
8,192 as well as sorting all documents does (99.9% and more); `scripts/bench_packing.py` measures it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from packflex.packing.length_set import LengthSet

D = TypeVar("D")
_Waiting = tuple[int, int, D]  # number of arrival, length, document
_GIVE_WAY = 4  # documents that may be put back to end a row exactly
_INT32_MAX = 2**31 - 1


class StreamPacker(Generic[D]):
    """Packs a stream of documents row by row.

    Args:
        seq_len: tokens of a row.
        pool: documents that wait, or as many more as a row holds where they are short; more fill rows better and mix
            the order more.

    Raises:
        ValueError: `seq_len` or `pool` below 1.

    Example:
        >>> packer = StreamPacker(seq_len=8, pool=3)
        >>> for name, length in (("a", 5), ("b", 6), ("c", 3)):
        ...     packer.add(name, length)
        >>> packer.is_full, packer.take_row(), packer.take_row(), len(packer)
        (True, ['a', 'c'], ['b'], 0)
    """

    def __init__(self, seq_len: int, pool: int = 1000) -> None:
        if not 1 <= seq_len <= _INT32_MAX:
            raise ValueError(f"seq_len must be from 1 to {_INT32_MAX}; got {seq_len}")
        if pool < 1:
            raise ValueError(f"pool must be at least 1 document; got {pool}")
        self.seq_len, self.pool = seq_len, pool
        self._documents: OrderedDict[int, _Waiting[D]] = OrderedDict()  # in order of arrival
        self._by_length: dict[int, deque[int]] = {}
        self._lengths = LengthSet(seq_len, [])
        self._arrived = 0
        self._tokens = 0  # that wait

    def __len__(self) -> int:
        """Documents that wait."""
        return len(self._documents)

    @property
    def is_full(self) -> bool:
        """Whether a row should be taken before the next document comes."""
        return len(self._documents) >= self.pool and self._tokens >= self.seq_len

    def add(self, document: D, length: int) -> None:
        """Put a document of `length` tokens into the pool.

        Raises:
            ValueError: a document that is empty or longer than a row: cut it first.
        """
        if not 1 <= length <= self.seq_len:
            raise ValueError(f"a document's length must be from 1 to seq_len={self.seq_len}; got {length}")
        waiting = self._by_length.get(length)
        if waiting is None:
            waiting = self._by_length[length] = deque()
            self._lengths.add(length)
        waiting.append(self._arrived)
        self._documents[self._arrived] = (self._arrived, length, document)
        self._arrived += 1
        self._tokens += length

    def take_row(self) -> list[D]:
        """The documents of the next row; empty when none waits."""
        row: list[_Waiting[D]] = []
        room = self._take_oldest(row, self.seq_len)
        ending = self._exact_ending(room)
        if room and not ending:
            room, ending = self._give_way(row, room)
        while ending or (room and (ending := self._longest(room))):
            for length in ending:
                row.append(self._take(length))
                room -= length
            ending = ()
        return [document for _, _, document in row]

    def _take_oldest(self, row: list[_Waiting[D]], room: int) -> int:
        """Take the oldest documents in turn until one does not fit; the room that is left."""
        while self._documents:
            length = next(iter(self._documents.values()))[1]
            if length > room:
                break
            row.append(self._take(length))
            room -= length
        return room

    def _exact_ending(self, room: int) -> tuple[int, ...]:
        """One length or two that fill `room` exactly; none where there are none."""
        if room <= self.seq_len and room in self._by_length:
            return (room,)
        return (self._lengths.pair(room, self._has_two) or ()) if room else ()

    def _give_way(self, row: list[_Waiting[D]], room: int) -> tuple[int, tuple[int, ...]]:
        """Put back as few of the last documents, never the first, as lets others end the row exactly."""
        for _ in range(min(_GIVE_WAY, len(row) - 1)):
            room += self._put_back(row.pop())
            if ending := self._exact_ending(room):
                return room, ending
        return self._take_oldest(row, room), ()

    def _longest(self, room: int) -> tuple[int, ...]:
        length = self._lengths.longest(room)
        return (length,) if length else ()

    def pending(self) -> list[tuple[D, int]]:
        """Documents that wait and their lengths, oldest first: adding them to a new packer gives the same rows."""
        return [(document, length) for _, length, document in self._documents.values()]

    def restore(self, pending: Sequence[tuple[D, int]]) -> None:
        """Put back what `pending` gave, in place of what waits."""
        self._documents.clear()
        self._by_length.clear()
        self._lengths, self._tokens = LengthSet(self.seq_len, []), 0
        for document, length in pending:
            self.add(document, length)

    def _has_two(self, length: int) -> bool:
        return len(self._by_length[length]) >= 2

    def _take(self, length: int) -> _Waiting[D]:
        """The oldest document of a length; the oldest of all is the oldest of its length."""
        waiting = self._by_length[length]
        number = waiting.popleft()
        self._tokens -= length
        if not waiting:
            del self._by_length[length]
            self._lengths.remove(length)
        return self._documents.pop(number)

    def _put_back(self, taken: _Waiting[D]) -> int:
        """Undo `_take` of a document that was the oldest; its length."""
        number, length, _ = taken
        self._tokens += length
        self._documents[number] = taken
        self._documents.move_to_end(number, last=False)
        if length not in self._by_length:
            self._by_length[length] = deque()
            self._lengths.add(length)
        self._by_length[length].appendleft(number)
        return length
