"""`CausalLMModule`: a transformers causal language model trained on packed batches, with a token-exact loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from packflex.integrations._output_head import OutputHead, has_router_loss, output_head
from packflex.integrations.transformers import blind_models
from packflex.losses import WEIGHTINGS, linear_next_token_loss, next_token_loss, token_weights

LOSSES = ("logits", "chunked", "liger")
LOGGED = ("train/loss", "train/lr", "val/loss")


class CausalLMModule(L.LightningModule):
    """Fine-tunes a causal language model on batches of `PackedCollator`.

    The loss of an optimizer step is the sum over supervised tokens divided by their number, over all ranks and all
    accumulated batches, so every token weighs the same however it was packed. Micro-batches therefore back-propagate
    sums, and the gradients are divided once, when the number is known: before clipping and before the optimizer.

    Args:
        model: a transformers causal language model; `PackFlexCallback` switches its attention.
        optimizer: parameters to optimizer, such as `functools.partial(torch.optim.AdamW, lr=1e-3)`.
        scheduler: optimizer to learning-rate scheduler, stepped after every optimizer step; None for a constant rate.
        loss_weighting: of documents with n supervised tokens: "token" weighs them by n, "document" alike, "sqrt" by
            sqrt(n); see `packflex.losses.token_weights`. The sum of weights then takes the place of the count.
        loss: "logits" computes the model's logits as a whole; "chunked" goes from hidden states to loss and gradients
            in chunks of tokens and holds no logits (`packflex.losses.linear_next_token_loss`); "liger" does so in
            liger-kernel's fused kernel (`pip install packflex[liger]`, a GPU, token weighting).

    Logs `train/loss` and `train/lr` at each optimizer step and `val/loss` (mean over all supervised tokens, whatever
    the weighting) after validation.

    Raises:
        ValueError: an unknown weighting or loss, a model whose output head the loss cannot replace, or one that is
            asked for its routers' auxiliary loss.
        ImportError: `loss="liger"` without liger-kernel. And in training and validation,
        ValueError: a batch with `packed` and a model whose attention does not read it, without `PackFlexCallback`.
            Families of transformers that are known to go by `position_ids` are taken where no cache is kept
            (`use_cache=False`, or gradient checkpointing in training), with "eager", "sdpa" or "flex_attention".
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        loss_weighting: str = "token",
        loss: str = "logits",
    ) -> None:
        super().__init__()
        if loss_weighting not in WEIGHTINGS:
            raise ValueError(f"loss_weighting must be one of {', '.join(WEIGHTINGS)}; got {loss_weighting!r}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
        if has_router_loss(model):
            raise ValueError(
                "output_router_logits=True asks for the routers' auxiliary loss, which is no sum over tokens and would "
                "depend on how documents are packed and accumulated, so it is not trained on; set "
                "model.architecture.output_router_logits=false, or false in the config.json of a local model.path"
            )
        self.model = model
        self.loss_weighting = loss_weighting
        self._linear_loss = _linear_loss(loss, loss_weighting)
        if self._linear_loss is not None and isinstance(reason := output_head(model), str):
            raise ValueError(f'loss="{loss}" cannot be had with this model: {reason}; use loss="logits"')
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._unit = 0  # about the tokens of a batch: keeps the summed loss near 1, the same on every rank
        self._totals: list[tuple[Tensor, Tensor]] = []  # (loss sum, count) of each batch since the last step
        self._val_totals: list[tuple[Tensor, Tensor]] = []

    def forward(self, **batch: Any) -> Any:
        """The model's own forward."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The batch's summed loss in units of about its size."""
        total, count = self.batch_loss(batch, self.loss_weighting)
        self._unit = self._unit or self._common_unit(batch["labels"])
        self._totals.append((total.detach(), count))
        return total / self._unit

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the supervised tokens (or weights) behind them, and log the step's loss."""
        total, count = self._reduced(self._totals)
        self._totals.clear()
        # Lightning divided each batch's loss by accumulate_grad_batches, and the ranks' gradients were averaged
        shares = self.trainer.accumulate_grad_batches * self.trainer.world_size
        factor = shares * self._unit / max(count, 1.0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        if count:
            self.log("train/loss", total / count, prog_bar=True)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, fused optimizers in bf16 too: Lightning refuses those for fear of scaled gradients.

        Only fp16 scales gradients, and only there a fused optimizer undoes it after clipping would have to happen. A
        value of 0 or below clips nothing, as Lightning has it: torch would turn the gradients round.
        """
        if gradient_clip_val is None or not gradient_clip_val > 0:
            return
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if gradient_clip_algorithm in (None, "norm") and not scaled:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the batch to the sums."""
        total, count = self.batch_loss(batch)
        self._val_totals.append((total.detach(), count))

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over every supervised token of every rank."""
        total, count = self._reduced(self._val_totals)
        self._val_totals.clear()
        if not count:
            raise ValueError("the held-out documents have no supervised token; check the data's labels")
        self.log("val/loss", total / count, prog_bar=True, sync_dist=self.trainer.world_size > 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the weighting, which a run that goes on from here should share."""
        checkpoint["loss_weighting"] = self.loss_weighting

    def configure_optimizers(self) -> Any:
        """Optimizer over the parameters that are trained, and the scheduler by steps."""
        optimizer = self._make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self._make_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def batch_loss(self, batch: dict[str, Any], weighting: str = "token") -> tuple[Tensor, Tensor]:
        """Summed loss of a batch and the sum of its weights."""
        if batch.get("packed") is not None and (blind := blind_models(self.model, batch)):
            raise ValueError(
                f"the batch is packed, and {type(blind[0]).__name__} attends through "
                f"{blind[0].config._attn_implementation!r}, so its documents may see one another: give the trainer "
                "PackFlexCallback(), or call packflex.integrations.transformers.enable_packflex(model), with the text "
                "model alone where the whole one reads images or sound"
            )
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"]
        weights = token_weights(labels, batch.get("packed"), weighting)
        if self._linear_loss is None:
            return next_token_loss(self(**inputs).logits, labels, weights)
        head = output_head(self.model)
        assert isinstance(head, OutputHead)  # as in __init__
        hidden = head.decoder(**inputs).last_hidden_state
        return self._linear_loss(
            hidden, head.embedding.weight, labels, weights, bias=head.embedding.bias, softcap=head.softcap
        )

    def _common_unit(self, labels: Tensor) -> int:
        """The tokens of the largest rank's batch as the next power of two, which rounds nothing when divided by."""
        size = torch.tensor(float(labels.numel()), device=labels.device)
        largest = int(self.trainer.strategy.reduce(size, reduce_op="max"))
        return 1 << (largest - 1).bit_length()

    def _reduced(self, totals: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Sum and count over the batches and over all ranks."""
        if not totals:
            return 0.0, 0.0
        both = torch.stack([torch.stack([total.double(), count.double()]) for total, count in totals]).sum(0)
        reduced = self.trainer.strategy.reduce(both, reduce_op="sum")
        total, count = reduced.tolist()
        return total, count


def _linear_loss(loss: str, weighting: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function that goes from hidden states to the loss, None for the way by logits."""
    if loss == "logits":
        return None
    if loss == "chunked":
        return linear_next_token_loss
    if weighting != "token":
        raise ValueError(f'loss="liger" weighs tokens alike; for loss_weighting="{weighting}" use loss="chunked"')
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise ImportError('loss="liger" needs `pip install packflex[liger]`; loss="chunked" needs nothing') from error

    def liger(
        hidden: Tensor, weight: Tensor, labels: Tensor, weights: None, *, bias: Tensor | None, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        targets = labels[:, 1:].flatten()
        flat = hidden[:, :-1].flatten(0, 1)
        total = liger_fused_linear_cross_entropy(
            flat, weight.to(flat.dtype), targets, bias=bias, reduction="sum", softcap=softcap, accum_dtype=torch.float32
        )
        return total, (targets != -100).sum()

    return liger
