"""`LengthSet`: which lengths are left, as the bits of one integer."""

from __future__ import annotations

from collections.abc import Callable


class LengthSet:
    """A set of lengths as the bits of an integer, and mirrored, so that one AND finds all pairs with a given sum."""

    def __init__(self, seq_len: int, lengths: list[int]) -> None:
        self.seq_len, self.bits, self.mirrored = seq_len, 0, 0
        for length in lengths:
            self.add(length)

    def copy(self) -> LengthSet:
        """The same lengths, to be changed apart."""
        other = LengthSet(self.seq_len, [])
        other.bits, other.mirrored = self.bits, self.mirrored
        return other

    def add(self, length: int) -> None:
        """Put `length` in."""
        self.bits |= 1 << length
        self.mirrored |= 1 << (self.seq_len - length)

    def remove(self, length: int) -> None:
        """Take out a length that is in."""
        self.bits ^= 1 << length
        self.mirrored ^= 1 << (self.seq_len - length)

    def longest(self, room: int) -> int:
        """The longest length of at most `room`, 0 when there is none."""
        return max(0, (self.bits & ((1 << (room + 1)) - 1)).bit_length() - 1)

    def pair(self, total: int, has_two: Callable[[int], bool]) -> tuple[int, int] | None:
        """Two lengths that add up to `total`, the most alike ones: the shortest are kept for the ends of other rows."""
        # bit n of the shifted mirror: `total - n` is in
        pairs = self.bits & (self.mirrored >> (self.seq_len - total)) & ((1 << (total // 2 + 1)) - 1)
        if total % 2 == 0 and pairs >> (total // 2) and not has_two(total // 2):
            pairs ^= 1 << (total // 2)
        shorter = pairs.bit_length() - 1
        return (total - shorter, shorter) if shorter > 0 else None
