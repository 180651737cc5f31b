"""Documents whose id came before, known by 64 bits of a hash: 8 bytes a document."""

from __future__ import annotations

import hashlib
import json
from array import array
from typing import Any

import numpy as np


class RepeatedIds:
    """The ids of documents as they come; one that is missing or NaN repeats none."""

    def __init__(self) -> None:
        self._hashes, self._numbers = array("Q"), array("Q")
        self._seen = 0

    def add(self, value: Any) -> None:
        """The next document's id."""
        if value is not None and value == value:
            self._hashes.append(hash_of_id(value))
            self._numbers.append(self._seen)
        self._seen += 1

    def found(self) -> tuple[int, tuple[int, int] | None]:
        """How many ids came before, and the first such document's number after that of the document that it repeats.

        Example:
            >>> ids = RepeatedIds()
            >>> for value in ("a", None, "b", "a", None, "b"):
            ...     ids.add(value)
            >>> ids.found()
            (2, (0, 3))
        """
        hashes, numbers = (np.frombuffer(x, dtype=np.uint64) for x in (self._hashes, self._numbers))
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
        if not len(again):
            return 0, None
        first = again[np.argmin(order[again])]
        return len(again), (int(numbers[order[first - 1]]), int(numbers[order[first]]))


def hash_of_id(value: Any) -> int:
    """64 bits of an id of any JSON type."""
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
