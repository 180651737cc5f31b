"""`StreamDataModule`: training batches packed from a stream, and packed rows for validation."""

from __future__ import annotations

from typing import Any

import lightning as L

from packflex.data.collate import PackedCollator
from packflex.data.loader import PackedLoader
from packflex.data.stream import PackedStream


class StreamDataModule(L.LightningDataModule):
    """A `PackedStream` for training, whose place Lightning's checkpoints keep, and held-out rows for validation.

    Args:
        source: tokenised documents as `PackedStream` takes them; a `fingerprint` of theirs names them in checkpoints.
        heldout: packed rows for validation, or None.
        seq_len: tokens of a row.
        batch_size: rows of a batch on each rank.
        num_batches: batches of the run on each rank: optimizer steps times accumulated batches.
        pad_token_id: fills rows up to `seq_len`.
        pool: documents that wait; see `PackedStream`.
        overflow: of documents longer than a row: "split", "truncate", "drop" or "error".
        num_workers: processes that read, tokenise and pack.
        pin_memory: page-locked batches, for a GPU.
    """

    def __init__(
        self,
        source: Any,
        heldout: Any = None,
        *,
        seq_len: int,
        batch_size: int,
        num_batches: int,
        pad_token_id: int = 0,
        pool: int = 1000,
        overflow: str = "split",
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.heldout = source, heldout
        self.collate = PackedCollator(seq_len, pad_token_id)
        self.batch_size = batch_size
        self._options: dict[str, Any] = {
            "seq_len": seq_len, "num_batches": num_batches, "pool": pool, "overflow": overflow,
            "num_workers": num_workers, "pin_memory": pin_memory,
        }  # fmt: skip
        self.stream: PackedStream | None = None
        if heldout is None:  # Lightning validates wherever val_dataloader is overridden
            self.__dict__["val_dataloader"] = super().val_dataloader

    def train_dataloader(self) -> PackedStream:
        """This rank's training batches; one stream for the run."""
        if self.stream is None:
            rank, ranks = self._place()
            self.stream = PackedStream(
                self.source, self.collate, self.batch_size, rank=rank, world_size=ranks,
                fingerprint=getattr(self.source, "fingerprint", None), **self._options,
            )  # fmt: skip
        return self.stream

    def val_dataloader(self) -> PackedLoader:
        """This rank's validation batches, in order."""
        rank, ranks = self._place()
        return PackedLoader(
            self.heldout,
            self.collate,
            self.batch_size,
            order="sequential",
            rank=rank,
            world_size=ranks,
            name="held-out",
        )

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
