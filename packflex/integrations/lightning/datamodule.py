"""`PackedDataModule`: packed data sets as loaders that shard, order and resume by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from packflex.data.collate import PackedCollator
from packflex.data.loader import PackedLoader
from packflex.integrations.lightning.resume import LengthReader
from packflex.parallel.layout import shard_batch


class PackedDataModule(L.LightningDataModule):
    """Loaders of packed rows for training and validation.

    Every rank gets its own rows and equally many batches, so Lightning must not add a sampler; it leaves loaders that
    are no torch `DataLoader` alone. The training loader's position is saved in Lightning's checkpoints, here as well:
    Lightning reads a loader's length before it gives the loader its state, and on another number of ranks, or with
    another batch size, the epoch that a run resumes in has another length.

    Args:
        train: packed rows, as `pack_dataset` returns them.
        heldout: packed rows for validation, or None.
        seq_len: tokens of a row.
        batch_size: rows of a batch on each rank.
        pad_token_id: fills rows up to `seq_len`.
        order: "shuffle", "balanced" or "sequential"; see `PackedLoader`.
        seed: of the order.
        token_cost: for "balanced"; see `packflex.packing.row_costs`.
        num_workers: processes that read and collate training rows. Held-out rows have none: they are few, in memory,
            and a process that is forked in the middle of training inherits the locks of its threads.
        pin_memory: page-locked batches, for a GPU.
        heldout_batch_size: rows of a validation batch; `batch_size` by default.
        context_parallel_size: ranks that share each batch; their documents are then split where they are long. Needs
            the `ContextParallel` callback.
    """

    def __init__(
        self,
        train: Any,
        heldout: Any = None,
        *,
        seq_len: int,
        batch_size: int,
        pad_token_id: int = 0,
        order: str = "shuffle",
        seed: int = 0,
        token_cost: float = 0.0,
        num_workers: int = 0,
        pin_memory: bool = False,
        heldout_batch_size: int | None = None,
        context_parallel_size: int = 1,
    ) -> None:
        super().__init__()
        self.train, self.heldout = train, heldout
        self.collate = PackedCollator(seq_len, pad_token_id)
        self.batch_size = batch_size
        self.heldout_batch_size = batch_size if heldout_batch_size is None else heldout_batch_size
        self._options: dict[str, Any] = {"seed": seed, "pin_memory": pin_memory}
        self._num_workers = num_workers
        self._order, self._token_cost = order, token_cost
        if context_parallel_size < 1:
            raise ValueError(f"context_parallel_size must be at least 1; got {context_parallel_size}")
        self._sharing = context_parallel_size
        self._train_loader: PackedLoader | None = None
        self._resumed: dict[str, Any] | None = None
        self._length_reader = LengthReader()
        if heldout is None:  # Lightning validates wherever val_dataloader is overridden
            self.__dict__["val_dataloader"] = super().val_dataloader

    def train_dataloader(self) -> PackedLoader:
        """This rank's training batches; within a run the same loader each time."""
        trainer: Any = self.trainer
        before = self._train_loader
        if trainer is not None and before is not None and trainer.train_dataloader is before:
            self._length_reader.done()
            if before.rows is self.train:
                return before
        loader = self._loader(
            self.train, self.batch_size, order=self._order, token_cost=self._token_cost,
            num_workers=self._num_workers, name="training",
        )  # fmt: skip
        resumed, self._resumed = self._resumed, None
        if resumed is not None and trainer is not None and trainer.ckpt_path is not None:
            loader.load_state_dict(resumed)
            if not trainer.fit_loop.restarting:  # Lightning begins with a next epoch
                self._leave_epoch(loader, trainer)
            self._length_reader.ask(trainer, loader)
        self._train_loader = loader
        return loader

    @staticmethod
    def _leave_epoch(loader: PackedLoader, trainer: L.Trainer) -> None:
        if loader.is_within_epoch and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            raise ValueError(
                f"{trainer.ckpt_path}: written after a run that max_steps ended in the middle of an epoch, which "
                "Lightning takes for whole, so the rest of its rows would be left out; add PackFlexCallback, which "
                "takes that back, or resume with max_steps"
            )
        loader.leave_epoch()

    def teardown(self, stage: str) -> None:
        """Leave the trainer as it was."""
        self._length_reader.done()

    def state_dict(self) -> dict[str, Any]:
        """The position of the training loader."""
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a position for the training loader of the run that begins."""
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._resumed = state_dict.get("train_loader")

    def val_dataloader(self) -> PackedLoader:
        """This rank's validation batches, in order."""
        return self._loader(self.heldout, self.heldout_batch_size, order="sequential", name="held-out")

    def _loader(self, rows: Any, batch_size: int, **options: Any) -> PackedLoader:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if ranks % self._sharing:
            raise ValueError(f"context_parallel_size={self._sharing} must divide the number of ranks, {ranks}")
        collate = self.collate if self._sharing == 1 else _Sharded(self.collate, self._sharing, rank % self._sharing)
        return PackedLoader(
            rows, collate, batch_size, rank=rank // self._sharing, world_size=ranks // self._sharing, **options,
            **self._options,
        )  # fmt: skip


@dataclass(frozen=True)
class _Sharded:
    """A collator of one rank's part of each batch; a class so that worker processes can have it."""

    collate: PackedCollator
    ranks: int
    rank: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return shard_batch(self.collate(rows), self.ranks, self.rank)
