"""The order in which rows are seen: shuffled by seed and epoch, balanced by cost, the same number on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BLUR = 0.005  # share by which costs vary between epochs when rows are grouped; ranks may differ by 2%


def row_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [num_rows], the rows of one epoch in random order, the same for the same seed and epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def row_costs(row_tokens: np.ndarray, row_sum_squares: np.ndarray, token_cost: float) -> np.ndarray:
    """float64 [R], work of each row up to a factor: `token_cost * tokens + sum of squared document lengths`.

    Args:
        row_tokens: [R], tokens of each row.
        row_sum_squares: [R], sum of squared document lengths.
        token_cost: work of a token outside attention over the work of a pair inside it. For a causal model with N
            parameters outside the embeddings, L layers and hidden size d it is about `N / (L * d)`: 6 N FLOPs a token
            against 12 L d / 2 a pair.
    """
    return token_cost * np.asarray(row_tokens, dtype=np.float64) + np.asarray(row_sum_squares, dtype=np.float64)


def balanced_order(costs: np.ndarray, group: int, seed: int, epoch: int, ranks: int | None = None) -> np.ndarray:
    """int64 [R], an order in which each run of `group` rows has similar cost, and the runs come in random order.

    A step takes `group` rows, `group / ranks` of them on each rank: when they cost about the same, no rank waits for
    another. Rows are sorted by cost and cut into groups. Costs are blurred by up to 0.5% first, so that the same rows
    do not meet in every epoch. The rows that fill no group are neighbours in cost too, and come last, where a rank may
    lack rows anyway.

    With several rows a rank they are dealt out from the cheapest up and back again, so that ranks differ by less than
    rows do. With one, ranks differ as rows do that are neighbours in cost: by well under 2% in steps of 8 rows out of
    a thousand, by more where an epoch has few steps (2.5% in 13 steps of 64 rows), and in single steps where the
    dearest rows stand alone. docs/log.md has figures.

    What it trades: the documents of one step are of similar length. Over an epoch the mix is that of any shuffle.

    Args:
        costs: [R] numbers of at least 0, see `row_costs`.
        group: rows of a step over all ranks.
        seed: of the shuffle.
        epoch: of the shuffle.
        ranks: that the rows of a step are dealt out to; None for a random one.

    Raises:
        ValueError: a group below 1 or that the ranks do not divide, or costs that are negative or not finite.
    """
    if group < 1:
        raise ValueError(f"group must be at least 1 row a step; got {group}")
    if ranks is not None and (ranks < 1 or group % ranks):
        raise ValueError(f"ranks must divide the {group} rows of a step; got {ranks}")
    costs = np.asarray(costs, dtype=np.float64)
    bad = np.flatnonzero(~((costs >= 0) & np.isfinite(costs)))
    if len(bad):
        raise ValueError(f"costs must be finite and at least 0; row {bad[0]} has {costs[bad[0]]}")
    rng = np.random.default_rng([seed, epoch])
    by_cost = np.argsort(costs * rng.uniform(1 - _BLUR, 1 + _BLUR, len(costs)), kind="stable")
    whole, over = divmod(len(costs), group)
    cut = int(rng.integers(0, whole + 1)) * group  # where the rows of no group are taken out
    rest = by_cost[cut : cut + over]
    grouped = np.delete(by_cost, np.s_[cut : cut + over]).reshape(whole, group)
    grouped = grouped[rng.permutation(whole)]
    if ranks is None or ranks == group:
        grouped = rng.permuted(grouped, axis=1)
    else:
        dealt = grouped.reshape(whole, group // ranks, ranks)
        dealt[:, 1::2] = dealt[:, 1::2, ::-1]
        which = rng.permuted(np.tile(np.arange(ranks), (whole, 1)), axis=1)  # the ranks take turns at being the dearest
        grouped = np.take_along_axis(dealt, which[:, None], axis=2)
    return np.concatenate([grouped.reshape(-1), rng.permutation(rest)])


@dataclass(frozen=True)
class EpochOrder:
    """The rows of one epoch in steps that give every rank equally many.

    Attributes:
        rows: int64 [R], the epoch's rows in order, over all ranks.
        batch_size: rows of one rank's batch.
        world_size: ranks.
        consumed: rows of the order already seen when this part of the epoch begins.
    """

    rows: np.ndarray
    batch_size: int
    world_size: int
    consumed: int = 0

    @property
    def rows_per_step(self) -> int:
        """Rows that one step takes over all ranks."""
        return self.batch_size * self.world_size

    @property
    def num_steps(self) -> int:
        """Steps that are left: enough for every row."""
        return -(-(len(self.rows) - self.consumed) // self.rows_per_step)

    @property
    def num_fillers(self) -> int:
        """Places of the last step that no row is left for."""
        return self.num_steps * self.rows_per_step - (len(self.rows) - self.consumed)

    def rank_steps(self, rank: int) -> np.ndarray:
        """int64 [num_steps, batch_size]: the rows of one rank, -1 for a filler row without tokens.

        Fillers are spread over the ranks of the last step, so that no rank has two more than another.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be from 0 to {self.world_size - 1}; got {rank}")
        left = self.rows[self.consumed :]
        padded = np.concatenate([left, np.full(self.num_fillers, -1, dtype=np.int64)])
        # place i of a step goes to rank i % world_size
        return padded.reshape(self.num_steps, self.batch_size, self.world_size)[:, :, rank]


def rank_imbalance(costs: np.ndarray, order: EpochOrder) -> float:
    """How much longer an epoch takes than if the ranks of each step shared its work evenly; 1 when they do.

    The work of each step's slowest rank over that of its mean rank, each summed over the steps. A last step with
    fillers is left out: no order can balance it.

    Args:
        costs: [R], see `row_costs`.
        order: of the epoch.

    Example: two ranks that get rows of cost 3 and 1, then of 2 and 2: slowest 3 + 2, mean 2 + 2.
        >>> rank_imbalance(np.array([3.0, 1.0, 2.0, 2.0]), EpochOrder(np.arange(4), batch_size=1, world_size=2))
        1.25
    """
    steps = order.num_steps - (order.num_fillers > 0)
    if not steps:
        return 1.0
    ranks = [np.asarray(costs)[order.rank_steps(rank)[:steps]].sum(axis=1) for rank in range(order.world_size)]
    by_rank = np.stack(ranks, axis=1)
    return float(by_rank.max(axis=1).sum() / by_rank.mean(axis=1).sum())
