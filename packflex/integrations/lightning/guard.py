"""`NonFiniteLossGuard`: a loss of NaN or infinity stops the run, with its batch saved and its documents named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from packflex.integrations.transformers import transformers_models
from packflex.layout import PackedLayout

_NAMED = 8  # documents in the message; the file holds them all


class NonFiniteLossError(RuntimeError):
    """A training loss that is no finite number; says which documents were in the batch and where it was saved."""


class NonFiniteLossGuard(L.Callback):
    """Look at every batch's loss before its backward, and stop at the first that is not finite.

    On a GPU the loss looked at is the one before, so that the host runs ahead by a batch and need not wait. What stops
    is therefore at most one optimizer step late; checkpoints are from before.

    The batch goes to `nonfinite_batch.pt`: `torch.load(path)` gives its tensors, and `lengths`, those of the documents
    of each row. Documents whose own logits are not finite are named; all of the batch's when it cannot be told, since
    the weights themselves are not finite or the module holds no transformers model.

    Args:
        dirpath: folder of the file; the trainer's `default_root_dir` when None.
        name_document: how to name document `d` of a packed row, given the row's `input_ids` (without padding) and `d`:
            by default its place in the batch and its first tokens.

    Raises:
        NonFiniteLossError: from the hook, which ends `trainer.fit`.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        name_document: Callable[[list[int], int], str] | None = None,
    ) -> None:
        self.dirpath = dirpath
        self.name_document = name_document
        self._batch: Any = None
        self._waiting: tuple[Any, Tensor, int] | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Look at this batch's loss, or at the one before on a GPU."""
        now = (self._batch, loss.detach(), trainer.global_step)
        if loss.device.type == "cpu":
            self._check(trainer, pl_module, now)
            return
        before, self._waiting = self._waiting, now
        if before is not None:
            self._check(trainer, pl_module, before)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the last one."""
        before, self._waiting = self._waiting, None
        if before is not None:
            self._check(trainer, pl_module, before)

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule, item: tuple[Any, Tensor, int]) -> None:
        batch, loss, step = item
        value = float(loss)
        if value - value == 0:  # finite
            return
        folder = Path(trainer.default_root_dir if self.dirpath is None else self.dirpath)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"_rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = folder / f"nonfinite_batch{rank}.pt"
        torch.save(_plain(batch), path)
        weights_fine = all(bool(p.isfinite().all()) for p in pl_module.parameters())
        culprits = _culprits(trainer, pl_module, batch) if weights_fine else []
        packed = batch.get("packed") if isinstance(batch, Mapping) else None
        named = culprits or _all_documents(packed)
        about = "documents whose logits are not finite" if culprits else "documents of the batch"
        names = "; ".join(self._name(batch, packed, b, d) for b, d in named[:_NAMED])
        more = f"; and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        state = "" if weights_fine else " Weights are not finite either: go on from a checkpoint."
        raise NonFiniteLossError(
            f"the loss is {value} after {step} optimizer steps. Saved the batch to {path}; {about}: {names}{more}."
            f"{state} Common causes: a learning rate that is too high, float16 without a scaler, broken documents"
        )

    def _name(self, batch: Any, packed: PackedLayout | None, b: int, d: int) -> str:
        if packed is None:
            return f"row {b}"
        start = sum(packed.lengths[b][:d])
        ids = batch["input_ids"][b, : sum(packed.lengths[b])].tolist()
        if self.name_document is not None:
            return self.name_document(ids, d)
        first = " ".join(map(str, ids[start : start + min(6, packed.lengths[b][d])]))
        return f"document {d} of row {b} ({packed.lengths[b][d]} tokens: {first} ...)"


def _plain(batch: Any) -> Any:
    """The batch on the CPU, of types that `torch.load` reads without trusting the file."""
    if isinstance(batch, Tensor):
        return batch.detach().cpu()
    if isinstance(batch, Mapping):
        plain = {str(name): _plain(value) for name, value in batch.items() if not isinstance(value, PackedLayout)}
        layouts = [value for value in batch.values() if isinstance(value, PackedLayout)]
        return plain | ({"lengths": [list(row) for row in layouts[0].lengths]} if layouts else {})
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return [_plain(value) for value in batch]
    return batch if isinstance(batch, int | float | str | bool | None) else repr(batch)


def _all_documents(packed: PackedLayout | None) -> list[tuple[int, int]]:
    if packed is None:
        return []
    return [(b, d) for b, row in enumerate(packed.lengths) for d in range(len(row))]


@torch.no_grad()
def _culprits(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> list[tuple[int, int]]:
    """(row, document) of the documents whose logits are not finite; empty when no transformers model can be asked."""
    models = transformers_models(pl_module)
    if len(models) != 1 or not isinstance(batch, Mapping) or not isinstance(batch.get("packed"), PackedLayout):
        return []
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with trainer.precision_plugin.forward_context():
        logits = models[0](**inputs).logits
    bad = (~logits.isfinite()).any(-1).cpu()
    packed: PackedLayout = batch["packed"]
    found = []
    for b, d in _all_documents(packed):
        start = sum(packed.lengths[b][:d])
        if bad[b, start : start + packed.lengths[b][d]].any():
            found.append((b, d))
    return found
