"""pack_dataset and the collators: tokens, labels and layouts against a plain computation, and what is refused."""

import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from packflex import pack_dataset
from packflex.data.collate import PackedCollator, PaddedCollator
from packflex.data.errors import DataError
from packflex.data.pack import plan_dataset, unsupervised_documents
from packflex.data.supervision import documents_cut_bare, supervised_in_pieces
from packflex.packing import best_fit


def documents_of(lengths, **columns):
    start = np.cumsum([0, *lengths])
    ids = [list(range(int(a), int(a) + n)) for a, n in zip(start, lengths, strict=False)]
    return Dataset.from_dict({"input_ids": ids, **{k: [f(x) for x in ids] for k, f in columns.items()}})


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=30),
    st.sampled_from(["best_fit", "next_fit", "wrapped"]),
    st.sampled_from([None, "labels", "loss_mask"]),
    st.integers(1, 3),
)
def test_rows_hold_every_token_with_its_label(lengths, strategy, supervision, chunks):
    makers = {
        None: {},
        "labels": {"labels": lambda ids: [-100 if i % 3 == 0 else i + 1000 for i in ids]},
        "loss_mask": {"loss_mask": lambda ids: [i % 3 != 0 for i in ids]},
    }
    documents = documents_of(lengths, **makers[supervision])
    parts = [documents.select(range(i, len(lengths), chunks)) for i in range(min(chunks, len(lengths)))]
    documents = concatenate_datasets(parts)  # several Arrow chunks, and an indices mapping
    packed = pack_dataset(documents, seq_len=16, strategy=strategy, seed=1)
    plan = plan_dataset(documents, seq_len=16, strategy=strategy, seed=1)
    assert sorted(i for row in packed["input_ids"] for i in row) == list(range(sum(lengths)))
    for r, row in enumerate(packed):
        assert row["lengths"] == plan.row_lengths(r).tolist()
        starts = set(np.cumsum([0, *row["lengths"][:-1]]).tolist())
        expected = []
        for at, i in enumerate(row["input_ids"]):
            shown = supervision is None or i % 3 != 0
            label = i + 1000 if supervision == "labels" else i
            expected.append(label if shown and at not in starts else -100)
        assert row["labels"] == expected
    assert set(packed.column_names) == {"input_ids", "labels", "lengths"}


def test_a_given_plan_is_used():
    documents = documents_of([3, 4, 7])
    plan = plan_dataset(documents, 8, seed=None)
    assert pack_dataset(documents, plan=plan)["lengths"][:] == [[7], [4, 3]]
    with pytest.raises(ValueError, match="the plan is for 3 documents; the data set has 2"):
        pack_dataset(documents.select([0, 1]), plan=plan)


def test_losses_are_reported(caplog):
    pack_dataset(documents_of([3, 40]), 8, overflow="truncate")
    assert "1 documents lost 32 tokens to truncation" in caplog.text
    pack_dataset(documents_of([3, 40]), 8, overflow="drop")
    assert "1 documents with 40 tokens were dropped" in caplog.text


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (
            Dataset.from_dict({"text": ["a"]}),
            ValueError,
            "no column 'input_ids' (its columns are text); tokenise it first",
        ),
        (Dataset.from_dict({"input_ids": []}), ValueError, "no documents"),
        (Dataset.from_dict({"input_ids": [[1], []]}), ValueError, "document 1 is empty"),
        (Dataset.from_dict({"input_ids": [[1], None]}), ValueError, "document 1: 'input_ids' is missing"),
        (Dataset.from_dict({"input_ids": [1, 2]}), TypeError, "must hold lists of integers; it holds int32"),
        (Dataset.from_dict({"input_ids": [["a"]]}), TypeError, "it holds lists of string"),
        (Dataset.from_dict({"input_ids": [[1.5]]}), TypeError, "it holds lists of double"),
        (
            Dataset.from_dict({"input_ids": [[1], [1, 2]], "labels": [[1], [1]]}),
            ValueError,
            "document 1: input_ids has 2 tokens and labels 1",
        ),
        (
            Dataset.from_dict({"input_ids": [[1]], "labels": [[1]], "loss_mask": [[1]]}),
            ValueError,
            "labels and loss_mask: keep the one",
        ),
    ],
)
def test_bad_data(dataset, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pack_dataset(dataset, 8)


def test_packed_batch():
    packed = pack_dataset(documents_of([3, 4, 7]), 8, seed=None)
    batch = PackedCollator(8, pad_token_id=99)([packed[1], packed[0], {"input_ids": [], "labels": [], "lengths": []}])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 0, 1, 2, 99], [7, 8, 9, 10, 11, 12, 13, 99], [99] * 8]
    masked = [[-100, 4, 5, 6, -100, 1, 2, -100], [-100, 8, 9, 10, 11, 12, 13, -100], [-100] * 8]
    assert batch["labels"].tolist() == masked
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 0], [0] * 8]
    assert batch["packed"].lengths == ((4, 3), (7,), ())
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids"))
    with pytest.raises(ValueError, match="row 0 of the batch: lengths add up to 3, input_ids has 2"):
        PackedCollator(8)([{"input_ids": [1, 2], "labels": [1, 2], "lengths": [3]}])
    with pytest.raises(ValueError, match="row 0 holds 9 tokens"):
        PackedCollator(8)([{"input_ids": [1] * 9, "labels": [1] * 9, "lengths": [9]}])


def test_the_first_label_of_a_document_is_masked_whatever_the_rows_say():
    batch = PackedCollator(4)([{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "lengths": [2, 1]}])
    assert batch["labels"].tolist() == [[-100, 6, -100, -100]]


def test_padded_batch():
    documents = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8]}]
    batch = PaddedCollator(pad_token_id=9)(documents)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert PaddedCollator(pad_to=5)(documents)["input_ids"].shape == (2, 5)
    with pytest.raises(ValueError, match="3 tokens, more than pad_to=2"):
        PaddedCollator(pad_to=2)(documents)
    with pytest.raises(ValueError, match="input_ids has 1 tokens, labels 2"):
        PaddedCollator()([{"input_ids": [1], "labels": [1, 2]}])


def test_a_plan_for_other_lengths_is_refused():
    documents = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5], [6]]})
    for lengths in ([3, 3, 1], [2, 2, 1], [2, 3, 9]):
        with pytest.raises(ValueError, match=r"document|row|piece"):
            pack_dataset(documents, plan=best_fit(lengths, 16, seed=None))


def test_padded_documents_are_refused():
    padded = {"input_ids": [[1, 2], [1, 2, 3, 0, 0]], "attention_mask": [[1, 1], [1, 1, 1, 0, 0]]}
    with pytest.raises(ValueError, match=r"document 1 is padded \(its attention_mask has zeros\)"):
        pack_dataset(Dataset.from_dict(padded), 8)
    whole = padded | {"attention_mask": [[1, 1], [1] * 5]}
    assert pack_dataset(Dataset.from_dict(whole), 8, seed=None)["lengths"] == [[5, 2]]


UNSIGNED = Dataset(pa.table({"input_ids": pa.array([[1], [2**63 + 5]], pa.list_(pa.uint64()))}))


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (
            Dataset.from_dict({"input_ids": [[1.0, 2.0], [3.0, 4.5]]}),
            TypeError,
            "document 1: 'input_ids' holds 4.5 at place 1 .*lists of double\\); tokenise again, or cast",
        ),
        (
            Dataset.from_dict({"input_ids": [[1.0], [2.0, float("nan")]], "source": ["a.jsonl:1", "a.jsonl:2"]}),
            TypeError,
            "a.jsonl:2: 'input_ids' holds nan at place 1 .*tokenise again",
        ),
        (
            Dataset.from_dict({"input_ids": [[1.0, 2.0]]}),
            TypeError,
            "document 0: 'input_ids' holds 1.0 at place 0 .*cast the column to int32",
        ),
        (
            Dataset.from_dict({"input_ids": [[1], [2, 3], [4, None]]}),
            TypeError,
            "document 2: 'input_ids' holds null at place 1 .*int32 with nulls\\); tokenise again",
        ),
        (
            Dataset.from_dict({"input_ids": [[[1], [2, 3]]]}),
            TypeError,
            "document 0: 'input_ids' holds \\[1\\] at place 0 .*tokenise again",
        ),
        (Dataset.from_dict({"input_ids": [7, 8]}), TypeError, "document 0: 'input_ids' must be a list .*got 7 "),
        (
            Dataset.from_dict({"input_ids": [[1, 2], [3, 2**31]]}),
            ValueError,
            "document 1: 'input_ids' holds 2147483648, and tokens are from 0 to 2147483647 .int32.; tokenise again",
        ),
        (
            Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2**40], [3, 4]]}),
            ValueError,
            "document 0: 'labels' holds 1099511627776, .*or -100 where the loss passes over; tokenise again",
        ),
        (
            Dataset.from_dict({"input_ids": [[1], [2, -1]], "source": ["a.jsonl:3", "a.jsonl:9"]}),
            ValueError,
            "a.jsonl:9: 'input_ids' holds -1, and tokens are from 0",
        ),
        (
            Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, -1]]}),
            ValueError,
            "document 0: 'labels' holds -1, .*or -100 where",
        ),
        (UNSIGNED, ValueError, "document 1: .* holds 9223372036854775813, "),
    ],
)
def test_bad_tokens_are_named_with_the_remedy(dataset, error, message):
    with pytest.raises(error, match=message):
        pack_dataset(dataset, 8, seed=None)


def test_what_lies_outside_a_slice_does_not_count():
    table = pa.table({"input_ids": pa.array([[1, 2], [3, None], [4, 5, 6], [7]], pa.list_(pa.int64()))})
    documents = Dataset(table.slice(2))
    assert pack_dataset(documents, 8, seed=None).to_list() == [
        {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, -100], "lengths": [3, 1]}
    ]
    with pytest.raises(TypeError, match="document 0: 'input_ids' holds null at place 1"):
        pack_dataset(Dataset(table.slice(1)), 8)


def test_lists_of_fixed_size():
    kind = pa.list_(pa.int64(), 2)
    ones = pa.array([[1, 1]] * 4, pa.list_(pa.int8(), 2))
    ids = pa.array([[1, 2], [3, 4], [5, 6], [7, 8]], kind)
    labels = pa.array([[-100, 2], [-100, -100], [-100, 6], [-100, 8]], kind)
    columns = {"input_ids": ids, "labels": labels, "attention_mask": ones}
    documents = Dataset(pa.table(columns).slice(1))
    assert pack_dataset(documents.select([2, 1, 0]), 4, seed=None).to_list() == [
        {"input_ids": [7, 8, 5, 6], "labels": [-100, 8, -100, 6], "lengths": [2, 2]},
        {"input_ids": [3, 4], "labels": [-100, -100], "lengths": [2]},
    ]
    assert pack_dataset(documents, 4, seed=None)["input_ids"][:] == [[3, 4, 5, 6], [7, 8]]
    for wrong, error, message in (
        (pa.array([[1, 2], None], kind), ValueError, "document 1: 'input_ids' is missing"),
        (pa.array([[1, 2], [3, None]], kind), TypeError, "document 1: 'input_ids' holds null at place 1"),
        (pa.array([[1.0, 2.5]], pa.list_(pa.float32(), 2)), TypeError, "document 0: 'input_ids' holds 2.5 at place 1"),
        (pa.array([[]], pa.list_(pa.int32(), 0)), ValueError, "document 0 is empty"),
    ):
        with pytest.raises(error, match=message):
            pack_dataset(Dataset(pa.table({"input_ids": wrong})), 4)


def test_too_long_documents_are_named():
    documents = Dataset.from_dict({"input_ids": [[1], [2] * 9, [3] * 12], "source": ["a:1", "a:5", "a:6"]})
    with pytest.raises(DataError, match=r"a:5: 9 tokens, more than seq_len=8 \(2 such documents\); choose"):
        plan_dataset(documents, 8, overflow="error")
    with pytest.raises(DataError, match=r"document 1: 9 tokens"):
        pack_dataset(documents.remove_columns("source"), 8, overflow="error")
    assert pack_dataset(documents.select([0]), 8, overflow="error")["lengths"][:] == [[1]]


def test_documents_whose_supervision_is_all_cut_are_reported(caplog):
    labels = [[-100] * 8 + [9, 9], [-100, 2, 3], [-100] * 7 + [5] + [-100] * 3, [-100] * 10, [-100] * 8 + [9, -100]]
    columns = {"input_ids": [[7] * len(given) for given in labels], "labels": labels}
    documents = Dataset.from_dict({**columns, "source": [f"a.jsonl:{i + 1}" for i in range(5)]})
    pack_dataset(documents, 8, overflow="truncate")
    assert "a.jsonl:1: rows of 8 tokens cut off every supervised token (2 such documents)" in caplog.text
    assert 'raise seq_len, choose overflow="split"' in caplog.text
    caplog.clear()
    packed = pack_dataset(documents, 8, overflow="split")  # the token of the last becomes a piece's first
    assert "a.jsonl:5: rows of 8 tokens cut off every supervised token" in caplog.text
    assert any(9 in labels for labels in packed["labels"])
    caplog.clear()
    pack_dataset(documents.select([1, 2, 3]), 8, overflow="truncate")
    pack_dataset(documents, 8, overflow="drop")
    assert "supervised" not in caplog.text, "nothing was cut off, or the document is not there any more"


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(["best_fit", "next_fit", "wrapped"]), st.booleans())
def test_cut_supervision_is_what_a_plain_count_finds(data, strategy, truncate):
    labels = data.draw(st.lists(st.lists(st.sampled_from([-100, 5]), min_size=1, max_size=14), min_size=1, max_size=9))
    labels = [[-100, *row[1:]] for row in labels]
    documents = Dataset.from_dict({"input_ids": [[7] * len(row) for row in labels], "labels": labels})
    overflow = "truncate" if truncate and strategy != "wrapped" else "split"
    plan = plan_dataset(documents, 4, strategy, overflow)
    left = dict.fromkeys(range(len(labels)), 0)
    for i, start, size in zip(plan.document_indices, plan.piece_starts, plan.piece_lengths, strict=True):
        left[int(i)] += sum(label != -100 for label in labels[i][start + 1 : start + size])
    expected = [i for i, count in left.items() if not count and any(label != -100 for label in labels[i])]
    assert unsupervised_documents(documents, plan).tolist() == expected


def test_cut_supervision_in_blocks(monkeypatch):
    from packflex.data import supervision

    lengths = np.array([9, 30, 3, 11, 50])
    plan = best_fit(lengths, 8, overflow="truncate", seed=None)
    asked = []

    def is_supervised(documents, starts, sizes):
        asked.append(int(sizes.sum()))
        return np.concatenate([np.arange(a, a + n) > 8 + d for d, a, n in zip(documents, starts, sizes, strict=True)])

    for size in (1, 20, 1000):
        monkeypatch.setattr(supervision, "_TOKENS_AT_ONCE", size)
        asked.clear()
        assert documents_cut_bare(plan, lengths, is_supervised).tolist() == [1, 4]
        assert len(asked) == {1: 8, 20: 5, 1000: 2}[size]
    assert supervised_in_pieces(np.array([True] * 5), np.array([1, 3, 1])).tolist() == [0, 2, 0]


def test_documents_whose_id_came_before_are_reported(caplog):
    pack_dataset(Dataset.from_dict({"input_ids": [[1], [2], [3]], "id": ["a", "b", "a"]}), 8)
    assert (
        "1 documents have an id that came before, and are packed all the same; the first is document 2, after do"
        in (caplog.text)
    )
    caplog.clear()
    pack_dataset(Dataset.from_dict({"input_ids": [[1], [2], [3]], "id": ["a", None, None]}), 8)
    pack_dataset(Dataset.from_dict({"input_ids": [[1], [2]], "id": [float("nan"), float("nan")]}), 8)
    assert caplog.text == ""


def test_documents_that_are_all_dropped():
    with pytest.raises(
        ValueError, match="all 2 documents are longer than seq_len=8 and dropped, so there is no row; use"
    ):
        pack_dataset(documents_of([9, 10]), 8, overflow="drop")


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        ({"input_ids": [[1, 2]]}, r"got dict: make one with datasets.Dataset.from_dict"),
        ([{"input_ids": [1, 2]}], r"got list: make one with datasets.Dataset.from_list"),
        (
            DatasetDict(train=Dataset.from_dict({"input_ids": [[1]]})),
            "got DatasetDict: choose one of its splits, train",
        ),
        (Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset(), "got IterableDataset: pack a stream with"),
    ],
)
def test_what_is_no_dataset(data, remedy):
    with pytest.raises(TypeError, match=remedy):
        pack_dataset(data, seq_len=8)


@pytest.mark.parametrize("mask", [[[1, 1], None], [[1, 1], [1, 1]], [[1, 1], [1, 1, 1, 1]], [[1, 1], [1, None, 1]]])
def test_an_attention_mask_that_does_not_tell(mask):
    documents = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "attention_mask": mask})
    with pytest.raises(ValueError, match=r"document \d: 'attention_mask' must hold a number for each of the \d tokens"):
        pack_dataset(documents, seq_len=8)
    whole = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "attention_mask": [[1, 1], [1, 1, 1]]})
    assert len(pack_dataset(whole, seq_len=8)) == 1


@pytest.mark.parametrize(
    "mask",
    [
        [None, None],
        [1, 1],
        ["11", "111"],
        [["1", "0"], ["1"] * 3],
        [[1.0, float("nan")], [1.0] * 3],
        [[[1], [1]], [[1], [1], [1]]],
    ],
)
def test_an_attention_mask_of_another_type(mask):
    documents = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "attention_mask": mask})
    with pytest.raises(ValueError, match=r"'attention_mask' must be a list of 0 and 1 for each token; the column is "):
        pack_dataset(documents, seq_len=8)


def test_an_attention_mask_that_numbers_documents():
    mask = [[1, 1], [1, 2, 2]]
    documents = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]], "attention_mask": mask})
    with pytest.raises(ValueError, match=r"document 1: 'attention_mask' holds 2, .* split that into one record for"):
        pack_dataset(documents, seq_len=8)
