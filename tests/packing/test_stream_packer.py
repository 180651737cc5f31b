"""StreamPacker: every document once, oldest first, rows full, the same rows after its state went somewhere else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packflex.packing.stream import StreamPacker


def rows_of(packer, documents):
    """Rows of (number, length) documents, all of them."""
    rows = []
    for number, length in documents:
        packer.add(number, length)
        if packer.is_full:
            rows.append(packer.take_row())
    while len(packer):
        rows.append(packer.take_row())
    return rows


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 60), st.integers(1, 20))
def test_every_document_once_no_row_over_and_the_oldest_first(lengths, seq_len, pool):
    rows = rows_of(StreamPacker(seq_len, pool), enumerate(lengths))
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    left = set(range(len(lengths)))
    for row in rows:
        assert 0 < sum(lengths[n] for n in row) <= seq_len
        assert min(left) in row, "every row takes the oldest document that waits"
        left -= set(row)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 59))
def test_waiting_documents_elsewhere_give_the_same_rows(lengths, pool, stop):
    whole = rows_of(StreamPacker(40, pool), enumerate(lengths))
    first, rows = StreamPacker(40, pool), []
    for number, length in enumerate(lengths[:stop]):
        first.add(number, length)
        if first.is_full:
            rows.append(first.take_row())
    second = StreamPacker(40, pool)
    second.add("left over", 3)
    second.restore(first.pending())
    rows += rows_of(second, list(enumerate(lengths))[stop:])
    assert rows == whole


@pytest.mark.parametrize(("mu", "sigma"), [(4.9, 1.05), (7.24, 1.29), (5.0, 0.35)])
def test_a_small_pool_fills_rows(mu, sigma):
    lengths = np.clip(np.random.default_rng(0).lognormal(mu, sigma, 20_000), 1, 8192).astype(int).tolist()
    packer, rows, tokens = StreamPacker(8192), 0, 0
    for number, length in enumerate(lengths):
        packer.add(number, length)
        if packer.is_full:
            rows, tokens = rows + 1, tokens + sum(lengths[n] for n in packer.take_row())
    assert rows > 20
    assert tokens / (rows * 8192) > 0.999


def test_bad_arguments():
    with pytest.raises(ValueError, match="seq_len must be from 1 to 2147483647; got 0"):
        StreamPacker(0)
    with pytest.raises(ValueError, match="pool must be at least 1 document; got 0"):
        StreamPacker(8, 0)
    for length in (0, 9):
        with pytest.raises(ValueError, match=f"length must be from 1 to seq_len=8; got {length}"):
            StreamPacker(8).add("a", length)
    assert StreamPacker(8).take_row() == []


def test_a_row_of_short_documents_waits_for_enough_of_them():
    """A row holds more documents than the pool when they are short."""
    lengths = [1, 2, 1, 1] * 200
    rows = rows_of(StreamPacker(100, pool=10), enumerate(lengths))
    assert [sum(lengths[number] for number in row) for row in rows] == [100] * 10
