"""PackedLayout: constructors and round trips, host numbers, errors, moving, pytree, repr."""

import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from packflex import PackedLayout
from packflex.layout import is_on

rows_of_lengths = st.lists(st.lists(st.integers(1, 12), max_size=6), min_size=1, max_size=4).filter(any)


def test_worked_example():
    layout = PackedLayout.from_lengths([[2, 4, 3], [5]], seq_len=10)
    assert layout.cu_seqlens.tolist() == [0, 2, 6, 9, 14]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.row_offsets.tolist() == [0, 3, 4]
    assert layout.document_ids.tolist() == [[0, 0, 1, 1, 1, 1, 2, 2, 2, -1], [3] * 5 + [-1] * 5]
    assert layout.document_ids.dtype == torch.int32
    assert layout.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 0, 0, 0, 0]]
    assert layout.position_ids.dtype == torch.int64
    numbers = (layout.batch_size, layout.num_documents, layout.num_tokens, layout.max_length)
    assert numbers == (2, 4, 14, 5)
    assert layout.sum_squared_lengths == 4 + 16 + 9 + 25
    assert layout.efficiency == pytest.approx(14 / 20)


@settings(deadline=None, max_examples=50)
@given(rows_of_lengths, st.integers(0, 5))
def test_round_trips(rows, tail):
    seq_len = max(map(sum, rows)) + tail
    layout = PackedLayout.from_lengths(rows, seq_len)
    assert PackedLayout.from_document_ids(layout.document_ids) == layout
    assert PackedLayout.from_cu_seqlens(layout.cu_seqlens, seq_len, layout.row_offsets) == layout
    assert PackedLayout.from_position_ids(layout.position_ids, [sum(row) for row in rows]) == layout
    for b, row in enumerate(rows):
        ids = layout.document_ids[b]
        assert torch.bincount(ids[ids >= 0] - ids[0].clamp(min=0), minlength=len(row)).tolist() == row
    leaves, spec = pytree.tree_flatten({"packed": layout})
    assert [leaf.tolist() for leaf in leaves] == [layout.cu_seqlens.tolist(), layout.row_offsets.tolist()]
    assert pytree.tree_unflatten(leaves, spec)["packed"] == layout
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_equality_needs_the_same_rows_and_length():
    layout = PackedLayout.from_lengths([[3, 4]], 8)
    assert layout == PackedLayout.from_cu_seqlens([0, 3, 7], 8)
    assert hash(layout) == hash(PackedLayout.from_cu_seqlens([0, 3, 7], 8))
    assert layout != PackedLayout.from_lengths([[4, 3]], 8)
    assert layout != PackedLayout.from_lengths([[3, 4]], 9)
    assert layout != [[3, 4]]


def test_one_dimensional_ids_are_one_row():
    assert PackedLayout.from_document_ids(torch.tensor([7, 7, 2, -1])) == PackedLayout.from_lengths([[2, 1]], 4)
    assert PackedLayout.from_position_ids(torch.tensor([0, 1, 0])) == PackedLayout.from_lengths([[2, 1]], 3)


def test_to_moves_what_was_made():
    layout = PackedLayout.from_lengths([[3, 4]], 8)
    assert layout.to("cpu") is layout
    assert layout.position_ids.shape == (1, 8)
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    assert moved.position_ids.device.type == "meta"
    assert moved == layout
    assert moved.num_tokens == 7


def test_pickles_after_masks_were_built():
    from packflex import document_mask

    layout = PackedLayout.from_lengths([[3, 4]], 8)
    mask = document_mask(layout)
    copy = pickle.loads(pickle.dumps(layout))
    assert copy == layout
    assert document_mask(copy) is not mask
    assert torch.equal(document_mask(copy).kv_intervals, mask.kv_intervals)


def test_repr_says_what_matters():
    layout = PackedLayout.from_lengths([[3, 4], list(range(1, 13))], 80)
    assert repr(layout) == (
        "PackedLayout(2 x 80 tokens, 14 documents, longest 12, 53.1% full, cpu: "
        "[3, 4], [1, 2, 3, 4, 5, 6, 7, 8, ... 4 more])"
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PackedLayout.from_lengths([]), ValueError, "at least one row"),
        (lambda: PackedLayout.from_lengths([[3, 0]]), ValueError, "row 0: document 1 has length 0"),
        (lambda: PackedLayout.from_lengths([[3], [5, 4]], 8), ValueError, "row 1 holds 9 tokens in 2 documents"),
        (
            lambda: PackedLayout.from_lengths([3, 4]),
            TypeError,
            "row 0: lengths must be integers, one list for each row",
        ),
        (lambda: PackedLayout.from_lengths([[1.5]]), TypeError, "lengths must be integers"),
        (lambda: PackedLayout.from_lengths([[1]], 0), ValueError, "seq_len must be at least 1; got 0"),
        (lambda: PackedLayout.from_lengths([[1]] * 2, 2**30), ValueError, "2147483648 tokens; int32 offsets end at"),
        (lambda: PackedLayout.from_cu_seqlens([1, 3]), ValueError, "must start at 0; got 1, 3"),
        (lambda: PackedLayout.from_cu_seqlens([0, 5, 3]), ValueError, "must rise; cu_seqlens[1]=5, cu_seqlens[2]=3"),
        (lambda: PackedLayout.from_cu_seqlens([0, 9], 8), ValueError, "row 0 holds 9 tokens"),
        (lambda: PackedLayout.from_cu_seqlens(torch.zeros(2, 2)), ValueError, "got torch.float32 (2, 2)"),
        (
            lambda: PackedLayout.from_cu_seqlens([0, 3, 4], 8, [0, 1]),
            ValueError,
            "from 0 to the number of documents (2)",
        ),
        (lambda: PackedLayout.from_cu_seqlens([0, 3, 4], 8, [0, 2, 1, 2]), ValueError, "row_offsets must not fall"),
        (lambda: PackedLayout.from_document_ids(torch.tensor([0, 1, 0])), ValueError, "id 0 comes back at token 2"),
        (lambda: PackedLayout.from_document_ids(torch.tensor([0, -1, 0])), ValueError, "at token 1 comes before"),
        (lambda: PackedLayout.from_document_ids(torch.zeros(3)), ValueError, "integer tensor [B, S] or [S]"),
        (
            lambda: PackedLayout.from_position_ids(torch.tensor([0, 1, 3])),
            ValueError,
            "position 3 at token 2 follows 1",
        ),
        (lambda: PackedLayout.from_position_ids(torch.tensor([1, 2])), ValueError, "must start at 0; got 1"),
        (
            lambda: PackedLayout.from_position_ids(torch.tensor([[0, 1]]), [3]),
            ValueError,
            "1 counts from 0 to 2; got 3",
        ),
    ],
)
def test_errors_show_the_offending_numbers(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_a_device_by_another_name_is_the_same():
    layout = PackedLayout.from_lengths([[3]])
    assert layout.to("cpu:0") is layout
    assert is_on(torch.device("cpu"), "cpu:0")
    assert not is_on(torch.device("cpu"), "meta")
    assert is_on(torch.device("cuda:1"), "cuda:1")
    assert not is_on(torch.device("cuda:1"), "cuda:0")
