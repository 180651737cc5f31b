"""What the benchmarks of two GPUs train on: the same work in what they compare."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

from packflex.packing.order import EpochOrder, balanced_order, rank_imbalance, row_order

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import bench_scaling
import learning_proof

SETTINGS = argparse.Namespace(seq_len=64, tokens=128, same_steps=False)


def corpus(count=120, seed=0):
    rng = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(rng.integers(4, 40, count)):
        ids = np.full(length, number)
        documents.append({"input_ids": ids, "labels": np.where(np.arange(length) < length // 3, -100, ids)})
    return learning_proof.Corpus(documents, documents[:4], count)


@pytest.mark.parametrize("epoch", [0, 1])
def test_packed_and_padded_epochs_hold_the_same_tokens_in_as_many_steps(epoch):
    whole = corpus()
    packed, padded = (learning_proof.make_steps(way, whole, SETTINGS, 3, epoch) for way in ("packed", "padded"))
    assert len(packed) == len(padded) > 10
    for steps in (packed, padded):
        labels = np.concatenate([batch["labels"].numpy().ravel() for step in steps for batch in step])
        numbers, counts = np.unique(labels[labels != -100], return_counts=True)
        assert dict(zip(numbers, counts, strict=True)) == {
            i: learning_proof.supervised([d]) for i, d in enumerate(whole.train)
        }, "each document once"
    each = [[sum(int((b["labels"] != -100).sum()) for b in step) for step in steps[:-1]] for steps in (packed, padded)]
    assert np.mean(each[0]) == pytest.approx(np.mean(each[1]), rel=0.02)
    assert max(batch["input_ids"].numel() for step in padded for batch in step) <= SETTINGS.tokens


def test_padded_steps_can_take_the_documents_of_packed_ones():
    same = argparse.Namespace(**vars(SETTINGS) | {"same_steps": True})
    packed, padded = (learning_proof.make_steps(way, corpus(), same, 3, 0) for way in ("packed", "padded"))
    assert len(packed) == len(padded) > 10

    def documents(step):
        return sorted({int(n) for batch in step for n in batch["labels"].unique() if n != -100})

    assert [documents(step) for step in packed] == [documents(step) for step in padded]
    assert documents(padded[0]) != documents(padded[1])


def test_seeds_and_epochs_have_their_own_order():
    whole = corpus()
    firsts = [
        learning_proof.make_steps("padded", whole, SETTINGS, seed, epoch)[0][0]["input_ids"].tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert firsts[0] != firsts[1] != firsts[2]


def test_long_tailed_rows_are_full_and_of_unlike_cost():
    lengths = bench_scaling.packed_lengths(bench_scaling.LONG_TAILED, 32768, 400, 0)
    assert len(lengths) == 400
    assert min(sum(row) for row in lengths) > 0.98 * 32768
    costs = bench_scaling.costs_of(lengths, 7785.0)
    shuffled, balanced = (
        rank_imbalance(costs, EpochOrder(order, 1, 2))
        for order in (row_order(400, 0, 0), balanced_order(costs, 2, 0, 0))
    )
    assert shuffled > 1.05
    assert balanced < 1.01
