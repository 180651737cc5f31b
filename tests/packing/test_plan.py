"""Plans: every token once, no row over, round trips, the same plan for the same seed, and what is refused."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
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


def one_row(lengths, seq_len):
    """A row of best fit by its definition, from a list: the longest that fits, then two that end it exactly."""
    row, free = [], sorted(lengths, reverse=True)
    while (fitting := next((n for n in free if n <= seq_len - sum(row)), None)) is not None:
        free.remove(fitting)
        row.append(fitting)
    for given_up in range(1, 5):
        if sum(row) == seq_len or given_up > len(row):
            break
        kept, back = row[:-given_up], row[-given_up:]
        free_now = sorted(free + back)
        room = seq_len - sum(kept)
        pairs = [(a, b) for i, a in enumerate(free_now) for b in free_now[i + 1 :] if a + b == room]
        if pairs:
            return sorted([*kept, *max(pairs)], reverse=True)
    return row


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(40, 90))
@example([4, 13, 22, 22, 28, 28, 33, 36, 36], 86)
def test_patterns_are_best_fit_repeated_while_their_lengths_last(lengths, seq_len):
    patterns, repeats = best_fit_patterns(np.bincount(lengths, minlength=seq_len + 1), seq_len)
    left = list(lengths)
    for pattern, repeat in zip(patterns, repeats, strict=True):
        row = pattern.tolist()
        assert row == one_row(left, seq_len)
        assert repeat == min(left.count(n) // row.count(n) for n in row)
        for n in row * repeat:
            left.remove(n)
    assert not left


def test_a_row_is_ended_exactly_where_the_longest_first_would_leave_room():
    assert best_fit([20, 29, 30], 49, seed=None).document_indices.tolist() == [1, 0, 2], "30 alone would leave 19 empty"
    # as in dialogues: 27 documents of 302 would leave 38, and none is that short
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(310, 100, 50_000), 49, 820).astype(int)
    assert best_fit(lengths, 8192).efficiency > 0.9995


def test_repeats_are_many_and_patterns_few():
    patterns, repeats = best_fit_patterns(np.array([0, 0, 0, 1000, 0, 0, 0, 0, 0]), 8)
    assert [p.tolist() for p in patterns] == [[3, 3]]
    assert repeats.tolist() == [500]


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
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.npz is no packing plan, or is cut short"):
            PackingPlan.load(tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    with pytest.raises(ValueError, match=r"other\.npz is no packing plan"):
        PackingPlan.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        PackingPlan.load(tmp_path / "none.npz")


def test_a_plan_cannot_be_changed_and_leaves_its_arguments_alone():
    offsets = np.array([0, 1])
    plan = PackingPlan(np.array([0]), np.array([0]), np.array([3], np.int32), offsets, 8, "best_fit", "split", 0, 1)
    with pytest.raises(ValueError, match="read-only"):
        plan.piece_lengths[0] = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.seq_len = 9
    offsets[0] = 0  # still writable
    assert plan.piece_lengths.dtype == np.int64
    with pytest.raises(
        TypeError, match=r"piece_lengths must be a one-dimensional array of integers; got float64 \(1,\)"
    ):
        dataclasses.replace(plan, piece_lengths=np.array([3.0]))
    for row in (-1, 1):
        with pytest.raises(IndexError, match=f"row {row} of a plan with rows 0 to 0"):
            plan.row_lengths(row)


def test_no_documents_make_an_empty_plan():
    for strategy in (best_fit, next_fit, wrapped):
        plan = strategy([], 8)
        plan.validate([])
        assert (plan.num_rows, plan.num_tokens, plan.efficiency) == (0, 0, 1.0)


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
        ({"row_offsets": np.array([0, 0, 3])}, "row_offsets must rise from 0 to the 3 pieces, with no empty row"),
        ({"piece_starts": np.array([0, 0])}, "one index, start and length for each piece"),
        ({"num_dropped": 1}, "0 documents are in no row and 0 lack their end; the plan counts 1 dropped"),
        ({"num_documents": 4}, "the plan is for 4 documents; got 3 lengths"),
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
        (lambda: wrapped([[1]], 8), "one-dimensional array of integers; got int64 (1, 1)"),
        (lambda: wrapped([3], 0), "seq_len must be at least 1; got 0"),
        (lambda: best_fit([3], 2**31), "seq_len must be at most 16777216 tokens; got 2147483648"),
        (lambda: best_fit([3, 2**62], 8), "document 1 has 4611686018427387904 tokens; at most 2147483647"),
        (lambda: best_fit(np.array([3, 2**63 + 5], np.uint64), 8), "document 1 has 9223372036854775813 tokens"),
        (lambda: best_fit([3], 8, seed=-1), "seed must be at least 0, or None for the documents' own order; got -1"),
        (lambda: best_fit_patterns([0, float("nan"), 2], 2), "of at most 64 bits; got nan of length 1 (float64"),
        (lambda: best_fit_patterns([0, 2.0, 1.5], 2), "of at most 64 bits; got 1.5 of length 2"),
        (lambda: best_fit_patterns([0, 1.0], 1), "of at most 64 bits; got 0.0 of length 0 (float64)"),
        (lambda: best_fit_patterns([0, float("inf")], 1), "of at most 64 bits; got inf of length 1"),
        (lambda: best_fit_patterns([0, None], 1), "of at most 64 bits; got None of length 1"),
        (lambda: best_fit_patterns([0, "2"], 1), "of at most 64 bits; got '0' of length 0"),
        (lambda: best_fit_patterns([0, 2**70], 1), f"of at most 64 bits; got {2**70} of length 1"),
        (lambda: best_fit_patterns(np.array([0, 2**63], np.uint64), 1), f"of at most 64 bits; got {2**63} of length 1"),
        (lambda: best_fit_patterns([], 1), "got none"),
        (lambda: best_fit_patterns([[0, 1]], 1), "one-dimensional array of integers; got the shape (1, 2)"),
        (lambda: best_fit_patterns([0, 1], 1.0), "seq_len must be an integer; got 1.0"),
        (lambda: best_fit([3], 8.5), "seq_len must be an integer; got 8.5"),
        (lambda: next_fit([3], float("nan")), "seq_len must be an integer; got nan"),
        (lambda: wrapped([3], "8"), "seq_len must be an integer; got '8'"),
        (lambda: best_fit_patterns([0, -2], 1), "counts must not be negative; got -2 of length 1"),
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
