"""Lightning: a callback that makes any LightningModule train on packed batches, and what the recipe is made of."""

from packflex.integrations.lightning.callback import PackFlexCallback, is_out_of_memory
from packflex.integrations.lightning.checkpoint_io import AtomicCheckpointIO
from packflex.integrations.lightning.context_parallel import ContextParallel
from packflex.integrations.lightning.datamodule import PackedDataModule
from packflex.integrations.lightning.guard import NonFiniteLossError, NonFiniteLossGuard
from packflex.integrations.lightning.metrics_file import continue_metrics
from packflex.integrations.lightning.module import CausalLMModule
from packflex.integrations.lightning.profile import ProfileSteps
from packflex.integrations.lightning.random_state import KeepRandomState
from packflex.integrations.lightning.resume import resume_loader
from packflex.integrations.lightning.signals import SaveOnSignal
from packflex.integrations.lightning.stream_datamodule import StreamDataModule

__all__ = [
    "AtomicCheckpointIO",
    "CausalLMModule",
    "ContextParallel",
    "KeepRandomState",
    "NonFiniteLossError",
    "NonFiniteLossGuard",
    "PackFlexCallback",
    "PackedDataModule",
    "ProfileSteps",
    "SaveOnSignal",
    "StreamDataModule",
    "continue_metrics",
    "is_out_of_memory",
    "resume_loader",
]
