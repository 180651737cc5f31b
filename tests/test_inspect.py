from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from packflex.inspect import summarise, text_histogram, view_row

ROWS = [
    {"input_ids": [7, 8, 9, 7, 8], "labels": [-100, -100, 9, -100, 8], "lengths": [3, 2]},
    {"input_ids": [5] * 8, "labels": [-100, *[5] * 7], "lengths": [8]},
    {"input_ids": [1], "labels": [-100], "lengths": [1]},
]


def test_summary_numbers():
    report = summarise(Dataset.from_list(ROWS), 8)
    assert (report.rows, report.documents, report.tokens, report.supervised_tokens) == (3, 4, 14, 9)
    assert report.efficiency == pytest.approx(14 / 24)
    assert report.padding == 10
    assert report.unsupervised_documents == 1
    assert report.document_lengths.tolist() == [3, 2, 8, 1]
    assert str(report.documents_per_row) == "1 / 1 / 1.3 / 2"
    assert str(report.supervised_per_row) == "0 / 2 / 3.0 / 7"
    assert str(report.pairs_per_row) == "1 / 9 / 15.3 / 36"


def test_summary_of_a_slice_and_of_many_batches():
    report = summarise(Dataset.from_list(ROWS * 900).select(range(1, 2400)), 8)
    assert report.tokens == 14 * 800 - 5
    assert report.supervised_tokens == 9 * 800 - 2
    assert report.unsupervised_documents == 800


def test_summary_refuses_rows_that_do_not_add_up():
    with pytest.raises(ValueError, match="row 1: 1 documents of 4 tokens together, 3 labels and seq_len=8"):
        summarise(Dataset.from_list([ROWS[0], {"input_ids": [1] * 3, "labels": [1] * 3, "lengths": [4]}]), 8)
    with pytest.raises(ValueError, match=r"row 1: 1 documents of 8 tokens .* seq_len=7"):
        summarise(Dataset.from_list(ROWS), 7)
    with pytest.raises(ValueError, match="has no row"):
        summarise(Dataset.from_dict({"labels": [], "lengths": []}), 7)


def test_histogram_lines():
    lines = text_histogram([1, 2, 3, 4, 7, 1000], width=8)
    assert lines[0] == "1          1  ████"
    assert lines[1] == "2-3        2  ████████"
    assert lines[2] == "4-7        2  ████████"
    assert lines[3] == "8-15       0"
    assert lines[-1] == "512-1,023  1  ████"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=50))
def test_histogram_counts_every_length_once(lengths):
    lines = text_histogram(lengths)
    counts = [int(line.split()[1].replace(",", "")) for line in lines]
    assert sum(counts) == len(lengths)
    assert counts[0] > 0
    assert counts[-1] > 0
    assert max(len(line) for line in lines) <= 40 + 60


def test_histogram_refuses_nothing():
    with pytest.raises(ValueError, match=r"got \[\]"):
        text_histogram(np.array([], int))
    with pytest.raises(ValueError, match=r"got \[0, 4\]"):
        text_histogram([0, 4])


def test_row_is_cut_at_documents_and_where_supervision_changes():
    first, second = view_row(ROWS[0], None)
    assert (first.start, first.end, first.supervised) == (0, 3, 1)
    assert (second.start, second.end, second.supervised) == (3, 5, 1)
    assert first.pieces == (("7 8 ", False), ("9 ", True))
    assert first.plain() == "7 8 ⟦9 ⟧"
    (only,) = view_row(ROWS[2], None)
    assert only.pieces == (("1 ", False),)
