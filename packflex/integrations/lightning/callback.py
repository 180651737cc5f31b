"""`PackFlexCallback`: packed training for any LightningModule; thin over functions that know no Lightning."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from packflex.data.loader import PackedLoader
from packflex.data.stream import PackedStream
from packflex.integrations.lightning.datamodule import PackedDataModule
from packflex.integrations.lightning.ranks import gathered
from packflex.integrations.lightning.resume import LengthReader, loader_states, reopen_epoch
from packflex.integrations.lightning.shapes import attention_shape
from packflex.integrations.transformers import enable_packflex, transformers_models
from packflex.layout import PackedLayout
from packflex.masks import document_mask
from packflex.metrics import AttentionShape, Throughput, matmul_flops, peak_flops
from packflex.parallel.layout import ShardedLayout
from packflex.testing.leaks import check_leaks

LOGGED = (
    "packing/efficiency", "packing/documents", "throughput/tokens_per_second", "throughput/documents_per_second",
    "throughput/mfu",
)  # fmt: skip
OUT_OF_MEMORY = (
    "packflex: to need less memory, in this order: fewer rows a batch (batch_size) with more accumulate_grad_batches, "
    'gradient checkpointing, a loss that holds no logits (CausalLMModule(loss="chunked")), a lower seq_len'
)

_SHARED_TOKENS = 512  # different ones of a rank that others may need for the leak check


class PackFlexCallback(L.Callback):
    """Train on packed batches: `Trainer(callbacks=[PackFlexCallback()])` and a loader with `PackedCollator`.

    Works on a LightningModule that holds transformers models anywhere, and on one whose own layers call
    `packflex.flex_attention`. It switches the models' attention at `setup`, builds the masks of each batch once on the
    device for all layers, checks before the first training batch that documents do not leak, and logs throughput.

    Logs `packing/efficiency` of the optimizer step; summed over all ranks, `packing/documents` of the step,
    `throughput/tokens_per_second` (tokens of documents, not padding) and `throughput/documents_per_second`; and where
    the device's peak and the model's shape are known, `throughput/mfu`, from the exact FLOPs of each batch.

    Args:
        backend: of `packflex.flex_attention`: "hopper", "triton", "torch" or "reference"; the best for the device when
            None.
        leak_check: check that documents do not leak, once, and stop training with the finding if they do.
        forward: for modules without a transformers model, `forward(module, batch) -> logits` that the leak check
            runs; by default it calls the module with the batch's `input_ids`, `position_ids` and `packed`.
        window: steps that rates look back on.

    Raises:
        LeakError: before the first step, when a token of one document changes the logits of another.
        ValueError: a backend for a module without a transformers model, or a batch without `packed`.
    """

    def __init__(
        self,
        backend: str | None = None,
        leak_check: bool = True,
        *,
        forward: Callable[[L.LightningModule, dict[str, Any]], Any] | None = None,
        window: int = 20,
    ) -> None:
        self.backend = backend
        self.leak_check = leak_check
        self._forward = forward
        self._window = window
        self._throughput = Throughput(window)
        self._step = 0
        self._accumulated: list[tuple[int, float]] = []  # documents and efficiency of each batch since the last step
        self._model: torch.nn.Module | None = None
        self._windows: set[int | None] = {None}
        self._attention: AttentionShape | None = None
        self._token_flops = 0
        self._loader_states: list[dict[str, Any]] = []
        self._length_reader = LengthReader()
        self._loader: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Switch the attention of every transformers model inside the module."""
        models = transformers_models(pl_module)
        if models:
            enable_packflex(pl_module, self.backend)
        elif self.backend is not None:
            raise ValueError(
                f"PackFlexCallback(backend={self.backend!r}): {type(pl_module).__name__} holds no transformers model "
                "at setup; pass backend= to packflex.flex_attention in your own layers"
            )
        self._model = models[0] if len(models) == 1 else None
        self._attention = None if self._model is None else attention_shape(self._model)
        self._windows = {None} if self._attention is None else set(self._attention.windows)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on in the middle of an epoch that `max_steps` ended, instead of after it."""
        if trainer.state.fn == TrainerFn.FITTING:
            reopen_epoch(checkpoint, trainer.accumulate_grad_batches)
            self._loader_states = loader_states(checkpoint)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the weights, once they exist, and see to it that a resumed loader and Lightning count alike."""
        self._token_flops = matmul_flops(pl_module)
        self._step, self._accumulated = trainer.global_step, []
        self._loader = trainer.train_dataloader
        states, self._loader_states = self._loader_states, []
        resumable = isinstance(self._loader, PackedLoader | PackedStream) and not isinstance(
            getattr(trainer, "datamodule", None), PackedDataModule
        )
        if states and resumable and not trainer.fit_loop.restarting:  # Lightning gives no state between two epochs
            self._loader.load_state_dict(states[0])
            if isinstance(self._loader, PackedLoader):
                self._loader.leave_epoch()
        self._length_reader.ask(trainer, self._loader)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew with the rates."""
        self._throughput = Throughput(self._window)
        if self._length_reader.done() and trainer.train_dataloader is not self._loader:
            state, self._loader = self._loader.state_dict(), trainer.train_dataloader
            self._loader.load_state_dict(state)  # a train_dataloader hook made another loader

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the trainer as it was."""
        self._length_reader.done()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew with the rates: validation is no training time."""
        self._throughput = Throughput(self._window)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check for leaks before the first batch, then build the batch's masks."""
        self._prepare(batch)
        if self.leak_check:
            self.leak_check = False
            run = self._forward
            with trainer.precision_plugin.forward_context():
                check_leaks(
                    self._model or pl_module,
                    _with_tokens(_whole(batch), trainer.world_size),
                    forward=None if run is None else lambda probe: run(pl_module, probe),
                )
        if not self._throughput.started:
            self._throughput.update(time.perf_counter())

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Build the batch's masks."""
        self._prepare(batch)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Build the batch's masks."""
        self._prepare(batch)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Build the batch's masks."""
        self._prepare(batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log when the trainer logs."""
        packed = _packed(batch)
        flops = self._flops(packed)
        self._throughput.update(time.perf_counter(), packed.num_tokens, packed.num_documents, flops)
        many = trainer.world_size > 1
        documents, efficiency = self._of_step(trainer, packed)
        pl_module.log("packing/efficiency", efficiency, prog_bar=True, sync_dist=many)
        pl_module.log("packing/documents", float(documents), reduce_fx="sum", sync_dist=many)
        rates = self._throughput.rates()
        if rates is None:
            return
        tokens_rate, documents_rate, flops = rates
        pl_module.log("throughput/tokens_per_second", tokens_rate, prog_bar=True, reduce_fx="sum", sync_dist=many)
        pl_module.log("throughput/documents_per_second", documents_rate, reduce_fx="sum", sync_dist=many)
        peak = peak_flops(pl_module.device)
        if peak is not None and flops:
            pl_module.log("throughput/mfu", flops / peak, prog_bar=True, sync_dist=many)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Add to an out-of-memory error which settings to lower."""
        if is_out_of_memory(exception):
            exception.add_note(OUT_OF_MEMORY)

    def _prepare(self, batch: Any) -> PackedLayout | ShardedLayout:
        packed = _packed(batch)
        for window in self._windows:
            if isinstance(packed, ShardedLayout):
                packed.exchange(causal=True, window=window)
            else:
                document_mask(packed, causal=True, window=window)
        return packed

    def _of_step(self, trainer: L.Trainer, packed: PackedLayout | ShardedLayout) -> tuple[int, float]:
        """Documents of the accumulated batches and their efficiency, this one's included; the step's at its end."""
        self._accumulated.append((packed.num_documents, packed.efficiency))
        documents, efficiencies = zip(*self._accumulated, strict=True)
        if trainer.global_step != self._step:
            self._step, self._accumulated = trainer.global_step, []
        return sum(documents), fmean(efficiencies)

    def _flops(self, packed: PackedLayout | ShardedLayout) -> float:
        """Forward and backward FLOPs of a batch; 0 when the model's shape is not known."""
        if self._attention is None:
            return 0.0
        return float(self._token_flops * packed.num_tokens) + self._attention.flops(packed)


def _packed(batch: Any) -> PackedLayout | ShardedLayout:
    packed = batch.get("packed") if isinstance(batch, Mapping) else None
    if not isinstance(packed, PackedLayout | ShardedLayout):
        found = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"PackFlexCallback needs batches with a PackedLayout under 'packed'; this one has {found}. "
            "Collate packed rows with packflex.data.collate.PackedCollator"
        )
    return packed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left for what was asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _with_tokens(batch: Any, ranks: int) -> Any:
    """The batch, or on a rank whose first batch holds no documents to speak of, one with the tokens of all ranks.

    All ranks look for leaks together or none does: a sharded model's forward passes wait for one another.
    """
    if ranks == 1 or not torch.distributed.is_initialized():
        return batch
    ids, packed = batch["input_ids"], batch["packed"]
    own = ids[packed.document_ids.to(ids.device) >= 0].unique()[:_SHARED_TOKENS].tolist()
    everyone = gathered(own, ranks)
    if len(own) > 1:
        return batch
    tokens = torch.tensor(sorted(set().union(*everyone)), device=ids.device)[None]
    layout = PackedLayout.from_lengths([[max(1, tokens.shape[1])]]).to(ids.device)
    made = {"input_ids": tokens, "labels": tokens, "position_ids": layout.position_ids}
    return {name: made[name] for name in made if batch.get(name) is not None} | {"packed": layout}


def _whole(batch: Any) -> Any:
    """A batch that the leak check takes tokens from; its probe is a small packed batch on each rank alone."""
    packed = batch["packed"]
    if not isinstance(packed, ShardedLayout):
        return batch
    tokens = batch["input_ids"][:, : max(1, packed.num_tokens)]
    lengths = [[packed.num_tokens]] if packed.num_tokens else [[]]
    layout = PackedLayout.from_lengths(lengths, tokens.shape[1]).to(tokens.device)
    return {"input_ids": tokens, "position_ids": layout.position_ids, "packed": layout}
