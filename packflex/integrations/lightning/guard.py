"""`NonFiniteLossGuard`: a loss of NaN or infinity stops the run, with its batch saved and its documents named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from packflex.integrations.lightning.module import CausalLMModule
from packflex.integrations.lightning.ranks import gathered
from packflex.integrations.transformers import transformers_models
from packflex.layout import PackedLayout
from packflex.parallel.layout import ShardedLayout

_CAUSES = "Common causes: a learning rate that is too high, float16 without a scaler, broken documents"
_NAMED = 8  # documents in the message; the file holds them all


class NonFiniteLossError(RuntimeError):
    """A loss or weights that are no finite numbers; of training, with the batch's documents and where it was saved."""


class NonFiniteLossGuard(L.Callback):
    """Look at every batch's loss before its backward, and stop at the first that is not finite.

    On a GPU the loss looked at is the one before, so that the host runs ahead by a batch and need not wait. What stops
    is therefore at most one optimizer step late. Several ranks stop together, all with the message of the one whose
    loss it is.

    The last optimizer step has no loss after it: as training ends, the weights that are trained are looked at, and the
    loss of the last batch once more; that of a `CausalLMModule` with its own `training_step` and a batch with `labels`.
    Checkpoints that were written after the step that spoiled the weights hold them so, and may have replaced an earlier
    one.

    The batch goes to `nonfinite_batch.pt`: `torch.load(path)` gives its tensors, and `lengths`, those of the documents
    of each row. Documents whose own logits are not finite are named; all of the batch's when it cannot be told, since
    the weights themselves are not finite or the module holds no transformers model.

    Args:
        dirpath: folder of the file; the trainer's `default_root_dir` when None.
        name_document: how to name document `d` of a packed row, given the row's `input_ids` (without padding), the
            lengths of its documents and `d`: by default its place in the batch and its first tokens.

    Raises:
        NonFiniteLossError: from the hook, which ends `trainer.fit`.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        name_document: Callable[[list[int], list[int], int], str] | None = None,
    ) -> None:
        self.dirpath = dirpath
        self.name_document = name_document
        self._batch: Any = None
        self._waiting: _Waiting | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the batch of a run before."""
        self._batch = self._waiting = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Look at this batch's loss, or at the one before on a GPU; at those of all ranks."""
        bad = (~loss.detach().isfinite()).float()
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        now = (self._batch, loss.detach(), bad, trainer.global_step)
        if loss.device.type == "cpu":
            self._check(trainer, pl_module, now)
            return
        before, self._waiting = self._waiting, now
        if before is not None:
            self._check(trainer, pl_module, before)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the last one, and at what the last step made of the weights."""
        before, self._waiting = self._waiting, None
        if before is not None:
            self._check(trainer, pl_module, before)
        self._check_end(trainer, pl_module)

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule, item: _Waiting) -> None:
        """Stop if any rank's loss is not finite: all ranks do, with the message of those whose own is not."""
        batch, loss, bad, step = item
        if not float(bad):
            return
        weights_fine = _weights_are_finite(trainer, pl_module)
        # on every rank, for a sharded model's forward passes wait for one another
        culprits = _culprits(trainer, pl_module, batch) if weights_fine else []
        value = float(loss)
        whose = f"the loss of rank {trainer.global_rank}" if trainer.world_size > 1 else "the loss"
        what = f"{whose} is {value} after {step} optimizer steps"
        own = None if value - value == 0 else self._message(trainer, batch, what, culprits)
        found = "; also ".join(filter(None, gathered(own, trainer.world_size)))
        state = "" if weights_fine else " Weights are not finite either: go on from a checkpoint of an earlier step."
        raise NonFiniteLossError(f"{found}.{state} {_CAUSES}")

    def _check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop all ranks if the last step left weights of any that cannot be used."""
        batch, weights_fine = self._batch, _weights_are_finite(trainer, pl_module)
        value = _loss_again(trainer, pl_module, batch) if weights_fine and batch is not None else 0.0
        loss_fine = value - value == 0
        if weights_fine and all(gathered(loss_fine, trainer.world_size)):
            return
        culprits = _culprits(trainer, pl_module, batch) if weights_fine else []
        whose = f"the last batch of rank {trainer.global_rank}" if trainer.world_size > 1 else "the last batch"
        found = "not finite" if not weights_fine else f"finite, but give {whose} a loss of {value}"
        own = f"the weights are {found} after {trainer.global_step} optimizer steps"
        if batch is not None:
            own = self._message(trainer, batch, own, culprits)
        others = gathered(None if weights_fine and loss_fine else own, trainer.world_size)
        found = "; also ".join(filter(None, others))
        raise NonFiniteLossError(f"{found}. Go on from a checkpoint of an earlier step, if one is left. {_CAUSES}")

    def _message(self, trainer: L.Trainer, batch: Any, what: str, culprits: list[_Place]) -> str:
        folder = Path(trainer.default_root_dir if self.dirpath is None else self.dirpath)
        folder.mkdir(parents=True, exist_ok=True)
        many = trainer.world_size > 1
        path = folder / f"nonfinite_batch{f'_rank{trainer.global_rank}' if many else ''}.pt"
        torch.save(_plain(batch), path)
        packed = batch.get("packed") if isinstance(batch, Mapping) else None
        named = culprits or _places(packed)
        about = "documents whose logits are not finite" if culprits else "documents of the batch"
        names = "; ".join(self._name(batch, packed, place) for place in named[:_NAMED])
        more = f"; and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        return f"{what}. Saved the batch to {path}; {about}: {names}{more}"

    def _name(self, batch: Any, packed: Any, place: _Place) -> str:
        row = batch["input_ids"][place.row]
        if self.name_document is not None and isinstance(packed, PackedLayout):
            lengths = list(packed.lengths[place.row])
            return self.name_document(row[: sum(lengths)].tolist(), lengths, place.document)
        first = " ".join(map(str, row[place.start : place.start + min(6, place.length)].tolist()))
        where = f"of row {place.row}" if isinstance(packed, PackedLayout) else "of the shared batch"
        return f"document {place.document} {where} ({place.length} tokens: {first} ...)"


class _Place(NamedTuple):
    """Where a document, or a rank's piece of one, lies in a batch."""

    row: int
    document: int
    start: int
    length: int


_Waiting = tuple[Any, Tensor, Tensor, int]  # batch, loss, whether any rank's is not finite, steps


def _weights_are_finite(trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
    """Whether those that are trained are on all ranks; of sharded weights each looks at its part.

    Frozen ones are as they came, which may be infinite on purpose, or of a type that `isfinite` does not take.
    """
    return all(gathered(all(_is_finite(p) for p in pl_module.parameters() if p.requires_grad), trainer.world_size))


def _is_finite(parameter: Tensor) -> bool:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return bool(local.isfinite().all())


@torch.no_grad()
def _loss_again(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> float:
    """A batch's loss with the weights as they are, without dropout; 0 from a module that cannot be asked for it.

    One with a `training_step` of its own may make other batches of those it gets.
    """
    if not isinstance(pl_module, CausalLMModule) or type(pl_module).training_step is not CausalLMModule.training_step:
        return 0.0
    if not isinstance(batch, Mapping) or batch.get("labels") is None:
        return 0.0
    modes = [(part, part.training) for part in pl_module.modules()]
    pl_module.eval()
    with trainer.precision_plugin.forward_context():
        total, _ = pl_module.batch_loss(dict(batch))
    for part, training in modes:
        part.training = training
    return float(total)


def _plain(batch: Any) -> Any:
    """The batch on the CPU, of types that `torch.load` reads without trusting the file."""
    if isinstance(batch, Tensor):
        return batch.detach().cpu()
    if isinstance(batch, Mapping):
        layouts = (PackedLayout, ShardedLayout)
        plain = {str(name): _plain(value) for name, value in batch.items() if not isinstance(value, layouts)}
        for packed in batch.values():
            if isinstance(packed, PackedLayout):
                plain["lengths"] = [list(row) for row in packed.lengths]
            elif isinstance(packed, ShardedLayout):
                plain["lengths"] = list(packed.lengths)
                plain["pieces"] = [[piece.document, piece.start, piece.end] for piece in packed.mine]
        return plain
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return [_plain(value) for value in batch]
    return batch if isinstance(batch, int | float | str | bool | None) else repr(batch)


def _places(packed: Any) -> list[_Place]:
    """The documents of a batch, in order; of one that ranks share, the pieces on this one."""
    places = []
    if isinstance(packed, ShardedLayout):
        start = 0
        for piece in packed.mine:
            places.append(_Place(0, piece.document, start, piece.end - piece.start))
            start += piece.end - piece.start
    elif isinstance(packed, PackedLayout):
        for row, lengths in enumerate(packed.lengths):
            start = 0
            for document, length in enumerate(lengths):
                places.append(_Place(row, document, start, length))
                start += length
    return places


@torch.no_grad()
def _culprits(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> list[_Place]:
    """The documents whose logits are not finite; empty when no transformers model can be asked."""
    models = transformers_models(pl_module)
    if len(models) != 1 or not isinstance(batch, Mapping) or not isinstance(batch.get("packed"), PackedLayout):
        return []
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with trainer.precision_plugin.forward_context():
        logits = models[0](**inputs).logits
    bad = (~logits.isfinite()).any(-1).cpu()
    return [p for p in _places(batch["packed"]) if bad[p.row, p.start : p.start + p.length].any()]
