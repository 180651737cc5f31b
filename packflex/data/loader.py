"""`PackedLoader`: a sized, stateful loader of packed batches, equally many on every rank, that resumes exactly."""

from __future__ import annotations

import hashlib
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from packflex.data.labels import FILLER
from packflex.packing.order import EpochOrder, balanced_order, row_costs, row_order

logger = logging.getLogger(__name__)

_SAMPLED_ROWS = 64
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
        name: what the log calls the rows, such as "training".

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
        name: str = "",
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
        self.token_cost, self.name = token_cost, name
        self._costs = _costs(rows, token_cost) if order == "balanced" else None
        self._data: str | None = None
        self._group = batch_size * world_size  # rows of a step when the epoch began
        self._ranks: int | None = world_size  # that they were dealt out to; not known of older states
        self.epoch = 0
        self._consumed = 0  # rows of the epoch delivered, over all ranks
        self._delivered = 0  # batches of the epoch delivered to this rank
        self._begun = (0, 0)  # the two before, when this part of the epoch began
        self._started = False
        self._resuming = False
        self._told: int | None = None  # the length, when somebody asked for it

    @property
    def dataset(self) -> Any:
        """The rows."""
        return self.rows

    def __len__(self) -> int:
        """Batches of an epoch on each rank; in a resumed epoch, those before the resume and those after it."""
        self._told = self._length()
        return self._told

    @property
    def length_changes(self) -> bool:
        """Whether the epoch after this one has another length, as after a resume on another number of ranks."""
        return self._length() != self._steps_after(0)

    def __iter__(self) -> Iterator[Any]:
        """Batches of one epoch, or of what is left of it after `load_state_dict`."""
        if self._resuming:
            self._resuming = False
        else:
            if self._started:
                self.epoch += 1
            self._group, self._ranks = self.batch_size * self.world_size, self.world_size
            self._consumed = self._delivered = 0
        self._begun = (self._consumed, self._delivered)
        self._started = True
        left = EpochOrder(self._epoch_rows(), self.batch_size, self.world_size, self._consumed)
        if left.num_fillers and self.rank == 0:
            logger.info(
                "%d %srows, %d a step over %d ranks: the last step of epoch %d has %d rows without tokens, which count "
                "for nothing",
                len(self.rows), self.name and f"{self.name} ", left.rows_per_step, self.world_size, self.epoch,
                left.num_fillers,
            )  # fmt: skip
        loader: DataLoader[Any] = DataLoader(
            _WithFillers(self.rows),
            batch_sampler=left.rank_steps(self.rank).tolist(),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.seed),  # workers' seeds; the global one is left alone
            worker_init_fn=plain_signals,
        )
        for batch in loader:
            self._consumed = min(self._consumed + left.rows_per_step, len(self.rows))
            self._delivered += 1
            yield batch

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
            "ranks": self._ranks,
            **self._identity(),
            "started": self._started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch delivered when the state was taken.

        Raises:
            ValueError: a state of other rows, or of another order, seed or (balanced) token_cost; or a length that
                was read before and is another one now, as on another number of ranks.
        """
        for name, value in self._identity().items():
            if state.get(name, value) != value:  # older states have no token_cost and rows
                raise ValueError(
                    f"the checkpoint's loader had {name}={state[name]!r}, this one has {value!r}; resume with the same "
                    "data, packing, order and seed, or start a new run from the weights"
                )
        self.epoch, self._consumed, self._delivered = state["epoch"], state["consumed"], state["delivered"]
        self._group, self._ranks, self._started = state["group"], state.get("ranks"), state["started"]
        # an epoch that was over goes on with the next one
        self._resuming = self._started and self._consumed < len(self.rows)
        self._begun = (self._consumed, self._delivered) if self._resuming else (0, 0)
        if self._told not in (None, self._length()):
            raise ValueError(
                f"the resumed epoch has {self._length()} batches, {self._delivered} before and the rest on "
                f"{self.world_size} ranks of {self.batch_size} rows, but len() was read as {self._told} before the "
                "state was loaded, and whoever read it would end epochs early; load the state first: use "
                "PackedDataModule, or call packflex.integrations.lightning.resume_loader(loader, ckpt_path) before "
                "trainer.fit"
            )

    @property
    def is_within_epoch(self) -> bool:
        """Whether the next iteration gives what is left of an epoch."""
        return self._resuming

    def leave_epoch(self) -> None:
        """Go on with the next epoch after `load_state_dict`, whatever is left of this one."""
        self._resuming, self._begun = False, (0, 0)

    def _identity(self) -> dict[str, Any]:
        """What the order of an epoch follows from: another one would repeat rows and leave others out."""
        if self._data is None:
            self._data = rows_fingerprint(self.rows)
        mine = {"num_rows": len(self.rows), "order": self.order, "seed": self.seed, "rows": self._data}
        return mine | ({"token_cost": self.token_cost} if self._costs is not None else {})

    def _length(self) -> int:
        is_over = self._started and not self._resuming and self._consumed >= len(self.rows)
        consumed, delivered = (0, 0) if is_over else self._begun
        return delivered + self._steps_after(consumed)

    def _steps_after(self, consumed: int) -> int:
        return -(-(len(self.rows) - consumed) // (self.batch_size * self.world_size))

    def _epoch_rows(self) -> np.ndarray:
        if self.order == "sequential":
            return np.arange(len(self.rows))
        if self._costs is not None:
            return balanced_order(self._costs, self._group, self.seed, self.epoch, self._ranks)
        return row_order(len(self.rows), self.seed, self.epoch)


def rows_fingerprint(rows: Any) -> str:
    """What tells packed rows from others, in 16 hexadecimal digits.

    Of the lengths of all documents (of a `Dataset`, whose column is read in well under a second for a million rows),
    and of the tokens and labels of 64 rows spread over all of them: reading the rest would take as long as an epoch.
    """
    digest = hashlib.sha256(str(len(rows)).encode())
    if hasattr(rows, "with_format"):
        for part in _lengths(rows):
            digest.update(part.astype(np.int64).tobytes())
    for at in np.unique(np.linspace(0, len(rows) - 1, _SAMPLED_ROWS).astype(np.int64)).tolist():
        for name in ("lengths", "input_ids", "labels"):
            digest.update(np.asarray(rows[at][name], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def plain_signals(worker: int) -> None:
    """In a worker: leave Ctrl-C to the run, and end at SIGTERM, whatever handlers a fork has brought along.

    A handler of Python's runs when the interpreter gets to it: a worker that waits for a lock would outlive its run.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if callable(signal.getsignal(signal.SIGUSR2)):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class _WithFillers(Dataset[Any]):
    """The rows, and under index -1 a row without tokens."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> Any:
        return FILLER if index < 0 else self.rows[index]


def _lengths(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of all documents, and how many each row has; a `Dataset`'s are read as Arrow."""
    if hasattr(rows, "with_format"):
        column = rows.select_columns(["lengths"]).with_format("arrow")[:]["lengths"]
        lengths = column.combine_chunks() if hasattr(column, "combine_chunks") else column
        sizes = lengths.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        return sizes, lengths.value_lengths().to_numpy(zero_copy_only=False)
    of_rows = [np.asarray(row["lengths"], dtype=np.int64) for row in rows]
    return np.concatenate(of_rows), np.array([len(sizes) for sizes in of_rows])


def _costs(rows: Any, token_cost: float) -> np.ndarray:
    """Cost of each row."""
    sizes, counts = _lengths(rows)
    ends = np.concatenate([[0], np.cumsum(counts)])
    tokens, squares = (np.concatenate([[0], np.cumsum(x)])[ends] for x in (sizes, sizes * sizes))
    return row_costs(np.diff(tokens), np.diff(squares), token_cost)
