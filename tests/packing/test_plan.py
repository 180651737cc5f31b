"""Plans: every token once, no row over, round trips, the same plan for the same seed, and what is refused."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packflex.packing import PackingPlan, best_fit, best_fit_patterns, next_fit, plan_rows, wrapped

lengths_lists = st.lists(st.integers(1, 70), min_size=1, max_size=60)


def tokens_of(plan):
    """(document, token) of every slot, by definition."""
    pieces = zip(plan.document_indices, plan.piece_starts, plan.piece_lengths, strict=True)
    return [(int(d), t) for d, s, n in pieces for t in range(int(s), int(s + n))]


@settings(deadline=None, max_examples=80)
@given(lengths_lists, st.integers(8, 40), st.sampled_from(["best_fit", "next_fit", "wrapped"]), st.integers(0, 3))
def test_every_token_once_and_no_row_over(lengths, seq_len, strategy, seed):
    plan = plan_rows(lengths, seq_len, strategy, seed=seed)
    plan.validate(lengths)
    assert sorted(tokens_of(plan)) == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    rows = [plan.row_lengths(r).sum() for r in range(plan.num_rows)]
    assert rows == plan.row_tokens.tolist()
    assert max(rows) <= seq_len
    assert min(rows) > 0
    assert plan.efficiency == pytest.approx(sum(lengths) / (len(rows) * seq_len))
    assert plan.row_sum_squares.tolist() == [(plan.row_lengths(r) ** 2).sum() for r in range(plan.num_rows)]
    assert plan == plan_rows(lengths, seq_len, strategy, seed=seed), "the same seed gives the same plan"


@settings(deadline=None, max_examples=40)
@given(lengths_lists, st.integers(8, 40), st.sampled_from(["truncate", "drop"]), st.sampled_from([best_fit, next_fit]))
def test_overflow_counts_what_it_loses(lengths, seq_len, overflow, strategy):
    plan = strategy(lengths, seq_len, overflow=overflow)
    plan.validate(lengths)
    long = [n for n in lengths if n > seq_len]
    if overflow == "truncate":
        assert (plan.num_truncated, plan.truncated_tokens) == (len(long), sum(long) - seq_len * len(long))
        expected = [(d, t) for d, n in enumerate(lengths) for t in range(min(n, seq_len))]
    else:
        assert (plan.num_dropped, plan.dropped_tokens) == (len(long), sum(long))
        expected = [(d, t) for d, n in enumerate(lengths) if n <= seq_len for t in range(n)]
    assert sorted(tokens_of(plan)) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 64))
def test_patterns_are_best_fit_row_by_row(lengths, seq_len):
    """Repeating patterns gives exactly what filling one row after another with the longest that fits would."""
    left, rows = sorted(lengths, reverse=True), []
    while left:
        row, room = [], seq_len
        while (fitting := next((n for n in left if n <= room), None)) is not None:
            left.remove(fitting)
            row.append(fitting)
            room -= fitting
        rows.append(row)
    patterns, repeats = best_fit_patterns(np.bincount(lengths, minlength=seq_len + 1), seq_len)
    assert [p.tolist() for p, k in zip(patterns, repeats, strict=True) for _ in range(k)] == rows


def test_a_billion_documents_by_counts():
    counts = np.zeros(8193, dtype=np.int64)
    counts[1:2001] = 500_000
    patterns, repeats = best_fit_patterns(counts, 8192)
    totals = np.zeros(8193, dtype=np.int64)
    for pattern, repeat in zip(patterns, repeats, strict=True):
        np.add.at(totals, pattern, repeat)
    assert (totals == counts).all()
    assert len(patterns) <= 2 * 2000
    assert (counts * np.arange(8193)).sum() / (repeats.sum() * 8192) > 0.9999


def test_long_tailed_lengths_fill_rows():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.9, 1.05, 100_000), 1, 8192).astype(int)
    assert best_fit(lengths, 8192).efficiency > 0.999
    assert next_fit(lengths, 8192).efficiency > 0.93
    assert wrapped(lengths, 8192).efficiency > 0.999


def test_next_fit_and_wrapped_keep_the_order_without_a_seed():
    assert next_fit([5, 4, 3, 9, 1], 10, seed=None).document_indices.tolist() == [0, 1, 2, 3, 4]
    plan = next_fit([5, 4, 3, 9, 1], 10, seed=None)
    assert plan.row_offsets.tolist() == [0, 2, 3, 5]
    plan = wrapped([5, 4, 3, 9, 1], 10, seed=None)
    assert plan.document_indices.tolist() == [0, 1, 2, 2, 3, 3, 4]
    assert plan.piece_starts.tolist() == [0, 0, 0, 1, 0, 8, 0]
    assert plan.piece_lengths.tolist() == [5, 4, 1, 2, 8, 1, 1]
    assert plan.num_split == 2


def test_seeds_differ():
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    for strategy in (best_fit, next_fit, wrapped):
        assert strategy(lengths, 512, seed=0) != strategy(lengths, 512, seed=1)


@pytest.mark.parametrize("seed", [None, 3])
def test_save_and_load(tmp_path, seed):
    plan = best_fit([3, 40, 7, 100], 32, overflow="truncate", seed=seed)
    plan.save(tmp_path / "plan.npz")
    assert PackingPlan.load(tmp_path / "plan.npz") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.npz"]
    whole = (tmp_path / "plan.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.npz is no packing plan, or is cut short"):
        PackingPlan.load(tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError):
        PackingPlan.load(tmp_path / "none.npz")


def test_repr():
    text = repr(best_fit([3, 40, 7, 100], 32, overflow="truncate"))
    assert text == "PackingPlan(best_fit: 4 documents in 3 rows of 32, 77.08% full, 2 truncated by 76 tokens)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 7}, "holds 8 tokens, more than seq_len=7"),
        ({"document_indices": np.array([9, 1, 0])}, "document indices must be from 0 to 2; got 0 to 9"),
        ({"piece_starts": np.array([1, 0, 0])}, "piece 0 is tokens 1 to 9 of document 2, which has 8"),
        ({"piece_lengths": np.array([7, 4, 3])}, "1 tokens are in no row"),
        ({"document_indices": np.array([2, 0, 0])}, "document 0"),
        ({"row_offsets": np.array([0, 1, 2])}, "row_offsets must rise from 0 to the 3 pieces"),
    ],
)
def test_validate_finds_what_is_wrong(change, message):
    plan = best_fit([3, 4, 8], 8, seed=None)
    plan.validate([3, 4, 8])
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(plan, **change).validate([3, 4, 8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_fit([3, 0], 8), "document 1 has length 0; remove empty documents"),
        (lambda: best_fit([1.5], 8), "one-dimensional array of integers; got float64"),
        (lambda: best_fit([3], 0), "seq_len must be at least 1; got 0"),
        (lambda: best_fit([3], 8, overflow="cut"), "overflow must be one of split, truncate, drop, error; got 'cut'"),
        (
            lambda: best_fit([3, 9, 10], 8, overflow="error"),
            "2 documents are longer than seq_len=8, the first is document 1",
        ),
        (lambda: wrapped([3], 8, overflow="drop"), "overflow must be \"split\"; got 'drop'"),
        (
            lambda: plan_rows([3], 8, "worst_fit"),
            "strategy must be one of best_fit, next_fit, wrapped; got 'worst_fit'",
        ),
        (lambda: best_fit_patterns([1, 1], 1), "none of length 0; got 2, 1 of length 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
