"""The order in which rows are seen: shuffled by seed and epoch, balanced by cost, the same number on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


def balanced_order(costs: np.ndarray, group: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [R], an order in which each run of `group` rows has similar cost, and the runs come in random order.

    A step takes `group` rows, `group / ranks` of them on each rank: when they cost about the same, no rank waits for
    another. Rows are sorted by cost and cut into groups at a random phase, so that the same rows do not meet in every
    epoch. The rows that fill no group come last, where a rank may lack rows anyway.

    Args:
        costs: [R], see `row_costs`.
        group: rows of a step over all ranks.
        seed: of the shuffle.
        epoch: of the shuffle.
    """
    if group < 1:
        raise ValueError(f"group must be at least 1 row a step; got {group}")
    rng = np.random.default_rng([seed, epoch])
    by_cost = rng.permutation(len(costs))
    by_cost = by_cost[np.argsort(np.asarray(costs)[by_cost], kind="stable")]
    whole = len(costs) // group
    phase = int(rng.integers(0, len(costs) - whole * group + 1))
    grouped = by_cost[phase : phase + whole * group].reshape(whole, group)
    rest = np.concatenate([by_cost[:phase], by_cost[phase + whole * group :]])
    grouped = rng.permuted(grouped[rng.permutation(whole)], axis=1)
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
