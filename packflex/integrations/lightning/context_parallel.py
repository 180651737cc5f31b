"""`ContextParallel`: ranks that share packed rows know one another."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch.distributed as dist

from packflex.parallel.layout import ShardedLayout


class ContextParallel(L.Callback):
    """Give each sharded batch the process group of the ranks that share it.

    Use it with `PackedDataModule(context_parallel_size=size)` and DDP: ranks 0 to size - 1 share the first rows, the
    next `size` ranks others. Gradients are averaged over all ranks as ever, and `CausalLMModule` divides by the
    supervised tokens of all of them.

    Args:
        size: ranks that share a batch.

    Raises:
        ValueError: a size that does not divide the number of ranks, or batches that are not sharded.
    """

    def __init__(self, size: int) -> None:
        if size < 2:
            raise ValueError(f"context parallelism needs at least 2 ranks that share a batch; got {size}")
        self.size = size
        self._group: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the groups, once; every rank takes part in making all of them."""
        if self._group is not None:
            return
        if trainer.world_size % self.size:
            raise ValueError(f"context_parallel_size={self.size} must divide the number of ranks, {trainer.world_size}")
        for first in range(0, trainer.world_size, self.size):
            ranks = list(range(first, first + self.size))
            group = dist.new_group(ranks)
            if trainer.global_rank in ranks:
                self._group = group

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Bind the batch."""
        self._bind(batch)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Bind the batch."""
        self._bind(batch)

    def _bind(self, batch: Any) -> None:
        packed = batch["packed"]
        if not isinstance(packed, ShardedLayout):
            raise ValueError(
                "ContextParallel got a batch that is not sharded; give the data module "
                f"context_parallel_size={self.size}"
            )
        if packed.ranks != self.size:
            raise ValueError(f"the batch is shared by {packed.ranks} ranks, and ContextParallel by {self.size}")
        packed.group = self._group
