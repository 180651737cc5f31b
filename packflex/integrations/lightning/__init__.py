"""Lightning: a callback that makes any LightningModule train on packed batches, and what the recipe is made of."""

from packflex.integrations.lightning.callback import PackFlexCallback
from packflex.integrations.lightning.datamodule import PackedDataModule
from packflex.integrations.lightning.module import CausalLMModule

__all__ = ["CausalLMModule", "PackFlexCallback", "PackedDataModule"]
