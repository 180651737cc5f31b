"""pack_dataset and the collators: tokens, labels and layouts against a plain computation, and what is refused."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from packflex import pack_dataset
from packflex.data.collate import PackedCollator, PaddedCollator
from packflex.data.pack import plan_dataset
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


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([[1, 2], [3, 2**31]], None, "document 1: input_ids holds 2147483648; token ids go from 0 to 2147483647"),
        ([[1, 2], [3, -1]], None, "document 1: input_ids holds -1; token ids go from 0"),
        ([[1, 2], [3, 4]], [[1, 2], [3, 2**40]], "document 1: labels holds 1099511627776"),
    ],
)
def test_numbers_that_are_no_token_ids(ids, labels, message):
    columns = {"input_ids": ids} | ({} if labels is None else {"labels": labels})
    with pytest.raises(ValueError, match=message):
        pack_dataset(Dataset.from_dict(columns), 8)


def test_missing_and_fractional_tokens():
    with pytest.raises(TypeError, match=r"document 1: 'input_ids' has a missing token \(null\)"):
        pack_dataset(Dataset.from_dict({"input_ids": [[1, 2], [3, None]]}), 8)
    with pytest.raises(TypeError, match=r"lists of double\. Look for documents with NaN .* dataset\.cast_column"):
        pack_dataset(Dataset.from_dict({"input_ids": [[1.0, float("nan")]]}), 8)
    whole = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 2**31]]})
    assert pack_dataset(whole.select(range(2)), 8, seed=None)["lengths"] == [[2, 2]], "the third is not among them"


def test_documents_whose_supervision_is_cut_off_are_reported(caplog):
    prompts = [[1, 2, 3, 4, 5, 6]] * 3
    labels = [[-100, 2, 3, 4, 5, 6], [-100] * 5 + [6], [-100] * 5 + [6]]
    documents = Dataset.from_dict({"input_ids": prompts, "labels": labels})
    with caplog.at_level("WARNING", logger="packflex.data.pack"):
        pack_dataset(documents, 4, overflow="truncate")
        assert "2 documents, or pieces of them, have no supervised token in their row, document 1 first" in caplog.text
        caplog.clear()
        pack_dataset(documents, 8)
        assert not caplog.text
