"""Fully sharded training (FSDP2): what `trainer=fsdp` adds to `CausalLMModule`, and weights made whole again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from packflex.integrations.lightning import CausalLMModule
from packflex.parallel.fsdp import shard_model


class FullyShardedStrategy(ModelParallelStrategy):
    """One data-parallel group of all devices; what Lightning calls "auto" is the number of nodes.

    Args:
        save_distributed_checkpoint: checkpoints are folders that every rank writes its part of, not one file.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        """Count the devices, which are known by now."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write beside, then rename: a run that is killed meanwhile leaves a whole checkpoint, see `whole_copy`."""
        path = Path(self.broadcast(filepath))
        aside, old = (path.with_name(f".{path.name}.{what}") for what in ("writing", "old"))
        if self.is_global_zero:
            copy = whole_copy(path)
            if copy is not None:  # an earlier run was killed between the two names
                copy.rename(path)
            _remove(aside)
            _remove(old)
        self.barrier()
        super().save_checkpoint(checkpoint, aside, storage_options)
        self.barrier()
        if self.is_global_zero:
            if path.exists():
                path.rename(old)
            aside.rename(path)
            _remove(old)
        self.barrier()


def whole_copy(path: Path) -> Path | None:
    """Where a checkpoint is that a kill kept from its name; None when it has it, or there is none."""
    if path.exists():
        return None
    new, old = (path.with_name(f".{path.name}.{what}") for what in ("writing", "old"))
    if not old.exists():
        return None  # nothing was replaced, and the new one may be half written
    return new if new.exists() else old


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class ShardedCausalLMModule(CausalLMModule):
    """`CausalLMModule` for `ModelParallelStrategy`: each decoder layer is one unit that is gathered when it runs.

    Raises:
        ValueError: a loss other than "logits".
    """

    model: Any

    def __init__(self, *arguments: Any, loss: str = "logits", **options: Any) -> None:
        if loss != "logits":
            raise ValueError(
                f"module.loss={loss} reads the output embedding beside the model, whose weights trainer=fsdp shards: "
                "use module.loss=logits, or trainer=ddp"
            )
        super().__init__(*arguments, loss=loss, **options)

    def configure_model(self) -> None:
        """Shard the model over the data-parallel ranks, once; it computes in the trainer's dtype."""
        if isinstance(self.model, FSDPModule):
            return
        dtype = torch.bfloat16 if str(self.trainer.precision).startswith("bf16") else None
        shard_model(self.model, self.device_mesh["data_parallel"], dtype)  # type: ignore[index]


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU; of a sharded model on rank 0 alone, where every rank must call this."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
