"""Order of rows: every row once an epoch, ranks equal, balanced steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packflex.packing import EpochOrder, balanced_order, rank_imbalance, row_costs, row_order


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.data())
def test_every_row_once_and_ranks_equal(num_rows, batch_size, world_size, balanced, data):
    group = batch_size * world_size
    costs = np.random.default_rng(0).lognormal(0, 1, num_rows)
    rows = balanced_order(costs, group, 1, 2) if balanced else row_order(num_rows, 1, 2)
    consumed = data.draw(st.integers(0, num_rows))
    order = EpochOrder(rows, batch_size, world_size, consumed)
    steps = [order.rank_steps(rank) for rank in range(world_size)]
    assert all(s.shape == (order.num_steps, batch_size) for s in steps)
    seen = np.concatenate(steps).ravel()
    assert sorted(seen[seen >= 0]) == sorted(rows[consumed:])
    assert (seen < 0).sum() == order.num_fillers < group
    fillers = [(s < 0).sum() for s in steps]
    assert max(fillers) - min(fillers) <= 1


def test_epochs_and_seeds_differ_and_repeat():
    for make in (lambda s, e: row_order(100, s, e), lambda s, e: balanced_order(np.arange(100.0), 4, s, e)):
        assert (make(0, 0) == make(0, 0)).all()
        assert (make(0, 0) != make(0, 1)).any()
        assert (make(0, 0) != make(1, 0)).any()


def test_balanced_steps_on_long_tailed_rows():
    """With 8 ranks, rows of code: the slowest rank is far off the mean at random, within 2% when balanced."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(2000):
        row, left = [], 32768
        while left > 0:
            row.append(min(left, int(np.clip(rng.lognormal(7.24, 1.29), 1, 32768))))
            left -= row[-1]
        rows.append(row)
    tokens = np.array([sum(row) for row in rows])
    squares = np.array([sum(n * n for n in row) for row in rows])
    costs = row_costs(tokens, squares, token_cost=4000.0)
    assert costs[0] == 4000.0 * tokens[0] + squares[0]

    def slowest(order):
        steps = costs[order].reshape(-1, 8)
        return (steps.max(1).sum()) / (steps.mean(1).sum())

    assert slowest(row_order(2000, 0, 0)) > 1.1
    assert slowest(balanced_order(costs, 8, 0, 0)) < 1.02
    steps = costs[balanced_order(costs, 8, 0, 0)].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1]) < 0.2, "steps must come in random order of cost"

    def imbalance(rows, batch_size=1):
        return rank_imbalance(costs, EpochOrder(rows, batch_size, 8))

    assert imbalance(row_order(2000, 0, 0)) == pytest.approx(slowest(row_order(2000, 0, 0)))
    for epoch in range(3):
        assert imbalance(balanced_order(costs, 8, 0, epoch)) < 1.02
        assert imbalance(balanced_order(costs, 32, 0, epoch), batch_size=4) < 1.02


def test_other_rows_meet_in_every_epoch_and_the_rest_is_balanced_too():
    """Also where groups divide the rows evenly, and without the cheapest and dearest rows together in the last step."""
    costs = np.linspace(1.0, 2.0, 4000)
    first, second = ({frozenset(g) for g in balanced_order(costs, 8, 0, e).reshape(-1, 8).tolist()} for e in (0, 1))
    assert len(first & second) < 0.1 * len(first)
    for epoch in range(20):
        rest = costs[balanced_order(costs[:-3], 8, 0, epoch)[-5:]]
        assert rest.max() - rest.min() < 0.03


def test_rank_imbalance_counts_whole_steps():
    costs = np.array([3.0, 1.0, 2.0, 2.0, 9.0])
    assert rank_imbalance(costs[:4], EpochOrder(np.arange(4), 1, 2)) == 1.25
    assert rank_imbalance(costs, EpochOrder(np.arange(5), 1, 2)) == 1.25, "the last step has a filler"
    assert rank_imbalance(costs, EpochOrder(np.arange(1), 1, 2)) == 1.0


def test_bad_arguments():
    with pytest.raises(ValueError, match="costs must be finite and at least 0; row 1 has nan"):
        balanced_order(np.array([1.0, np.nan]), 2, 0, 0)
    with pytest.raises(ValueError, match="group must be at least 1"):
        balanced_order(np.ones(3), 0, 0, 0)
    with pytest.raises(ValueError, match="rank must be from 0 to 1; got 2"):
        EpochOrder(np.arange(3), 1, 2).rank_steps(2)


def test_several_rows_a_rank_are_dealt_so_that_sums_are_alike():
    """858 rows of long-tailed documents in steps of 256: neighbours in cost are far apart, sums of four are not."""
    rng = np.random.default_rng(0)
    costs = np.exp(rng.normal(0, 0.5, 858))

    def imbalance(ranks):
        return rank_imbalance(costs, EpochOrder(balanced_order(costs, 256, 0, 0, ranks), 4, 64))

    assert imbalance(None) > 1.05
    assert imbalance(64) < 1.02
    order = balanced_order(costs, 256, 0, 0, 64)
    assert sorted(order.tolist()) == list(range(858))
    assert (balanced_order(costs, 64, 3, 1, 64) == balanced_order(costs, 64, 3, 1)).all(), "one row a rank: as before"
    most = [np.argmax(costs[order[step : step + 256]].reshape(4, 64).sum(0)) for step in (0, 256, 512)]
    assert len(set(most)) > 1, "not the same rank each time"
    with pytest.raises(ValueError, match="ranks must divide the 256 rows of a step; got 3"):
        balanced_order(costs, 256, 0, 0, 3)
