"""`PackedLoader`: a sized, stateful loader of packed batches, equally many on every rank, that resumes exactly."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from packflex.data.labels import FILLER
from packflex.packing.order import EpochOrder, balanced_order, row_costs, row_order

logger = logging.getLogger(__name__)

ORDERS = ("shuffle", "balanced", "sequential")


class PackedLoader:
    """Batches of packed rows for one rank.

    Every rank gets the same number of batches and no row is dropped: places of the last step that no row is left for
    are rows without tokens, which count for nothing. The state says how much of the epoch was *delivered*, whatever
    workers have prefetched, so a resumed run gets the batch that would have come next; with another number of ranks,
    the rest of the epoch is dealt out anew and every row is still seen once.

    Iterating gives one epoch; the next iteration gives the next epoch, in another order.

    Args:
        rows: sized, indexable: `rows[i]` has `input_ids`, `labels`, `lengths`.
        collate: list of rows to a batch, such as `PackedCollator`.
        batch_size: rows of a batch.
        rank: this process.
        world_size: processes.
        order: "shuffle" by seed and epoch; "balanced" too, with rows of similar cost in the same step, so that no rank
            waits for another; "sequential", the rows' own order in every epoch.
        seed: of the order.
        token_cost: for "balanced", see `packflex.packing.row_costs`.
        num_workers: processes that read and collate; 0 for none.
        pin_memory: copy batches into page-locked memory.

    Raises:
        ValueError: no rows, or arguments out of range.
    """

    def __init__(
        self,
        rows: Any,
        collate: Callable[[Sequence[Mapping[str, Any]]], Any],
        batch_size: int = 1,
        *,
        rank: int = 0,
        world_size: int = 1,
        order: str = "shuffle",
        seed: int = 0,
        token_cost: float = 0.0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if not len(rows):
            raise ValueError("a loader needs at least one row; the data set is empty")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1; got rank {rank} of {world_size}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
        self.rows, self.collate, self.batch_size = rows, collate, batch_size
        self.rank, self.world_size, self.order, self.seed = rank, world_size, order, seed
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self._costs = _costs(rows, token_cost) if order == "balanced" else None
        self._group = batch_size * world_size  # rows of a step when the epoch began
        self.epoch = 0  # that of the next batch
        self._consumed = 0  # rows of the epoch delivered, over all ranks
        self._delivered = 0  # batches of the epoch delivered to this rank
        self._begun = (0, 0)  # the two before, when this part of the epoch began
        self._started = False
        self._resuming = False
        self._digest_made: str | None = None

    @property
    def dataset(self) -> Any:
        """The rows."""
        return self.rows

    def __len__(self) -> int:
        """Batches of an epoch on each rank; in a resumed epoch, those before the resume and those after it."""
        if self._started and not self._resuming and self._consumed >= len(self.rows):
            return self._steps_after(0)  # that epoch is over, and this is the next one's length
        return self._begun[1] + self._steps_after(self._begun[0])

    def __iter__(self) -> Iterator[Any]:
        """Batches of one epoch, or of what is left of it after `load_state_dict`."""
        if self._resuming:
            self._resuming = False
        else:
            if self._started:
                self.epoch += 1
            self._group = self.batch_size * self.world_size
            self._consumed = self._delivered = 0
        self._begun = (self._consumed, self._delivered)
        self._started = True
        left = EpochOrder(self._epoch_rows(), self.batch_size, self.world_size, self._consumed)
        if left.num_fillers and self.rank == 0:
            logger.info(
                "%d rows, %d a step over %d ranks: the last step of epoch %d has %d rows without tokens, which count "
                "for nothing",
                len(self.rows), left.rows_per_step, self.world_size, self.epoch, left.num_fillers,
            )  # fmt: skip
        loader: DataLoader[Any] = DataLoader(
            _WithFillers(self.rows),
            batch_sampler=left.rank_steps(self.rank).tolist(),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.seed),  # workers' seeds; the global one is left alone
        )
        for batch in loader:
            self._consumed = min(self._consumed + left.rows_per_step, len(self.rows))
            self._delivered += 1
            yield batch

    @property
    def regrouped(self) -> bool:
        """Whether the epoch goes on with another number of rows a step, so that its length is one of its own."""
        return self._started and self._begun[1] > 0 and self._group != self.batch_size * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration the given epoch, unless a state was just loaded."""
        if not self._resuming:
            self.epoch, self._started = epoch, False

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands after the batches delivered so far."""
        return {
            "epoch": self.epoch,
            "consumed": self._consumed,
            "delivered": self._delivered,
            "group": self._group,
            "num_rows": len(self.rows),
            "rows": self._digest(),
            "order": self.order,
            "seed": self.seed,
            "started": self._started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch delivered when the state was taken.

        Raises:
            ValueError: a state of other rows, order, costs or seed: its rows would not be the ones left.
        """
        mine = {"num_rows": len(self.rows), "order": self.order, "seed": self.seed}
        if "rows" in state:  # not in those of before
            mine["rows"] = self._digest()
        for name, value in mine.items():
            if state[name] != value:
                raise ValueError(
                    f"the checkpoint's loader had {name}={state[name]!r}, this one has {value!r}; resume with the same "
                    "data, order and seed, or start a new run from the weights"
                )
        self.epoch, self._consumed, self._delivered = state["epoch"], state["consumed"], state["delivered"]
        self._group, self._started = state["group"], state["started"]
        # an epoch that was over goes on with the next one
        self._resuming = self._started and self._consumed < len(self.rows)
        if self._resuming:
            self._begun = (self._consumed, self._delivered)

    def _digest(self) -> str:
        """Of the rows' lengths, and where they decide the order of the rows' costs: other rows have another."""
        if self._digest_made is None:
            parts = [*_lengths(self.rows), *([] if self._costs is None else [self._costs])]
            self._digest_made = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]
        return self._digest_made

    def _steps_after(self, consumed: int) -> int:
        return -(-(len(self.rows) - consumed) // (self.batch_size * self.world_size))

    def _epoch_rows(self) -> np.ndarray:
        if self.order == "sequential":
            return np.arange(len(self.rows))
        if self._costs is not None:
            return balanced_order(self._costs, self._group, self.seed, self.epoch)
        return row_order(len(self.rows), self.seed, self.epoch)


class _WithFillers(Dataset[Any]):
    """The rows, and under index -1 a row without tokens."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> Any:
        return FILLER if index < 0 else self.rows[index]


def _lengths(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of all documents and where each row ends; a `Dataset`'s are read as Arrow, a million rows in a second."""
    if hasattr(rows, "with_format"):
        column = rows.select_columns(["lengths"]).with_format("arrow")[:]["lengths"]
        lengths = column.combine_chunks() if hasattr(column, "combine_chunks") else column
        sizes = lengths.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        return sizes, np.concatenate([[0], np.cumsum(lengths.value_lengths().to_numpy(zero_copy_only=False))])
    of_rows = [np.asarray(row["lengths"], dtype=np.int64) for row in rows]
    return np.concatenate(of_rows), np.cumsum([0, *map(len, of_rows)])


def _costs(rows: Any, token_cost: float) -> np.ndarray:
    """Cost of each row."""
    sizes, ends = _lengths(rows)
    tokens, squares = (np.concatenate([[0], np.cumsum(x)])[ends] for x in (sizes, sizes * sizes))
    return row_costs(np.diff(tokens), np.diff(squares), token_cost)
