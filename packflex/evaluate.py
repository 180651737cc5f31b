"""Loss and perplexity of each document, packed for speed and independent of the packing."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from packflex.data.collate import PackedCollator
from packflex.data.pack import pack_dataset, plan_dataset
from packflex.integrations.transformers import enable_packflex
from packflex.losses import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_CHUNK_BYTES = 2**28  # of float32 logits held at a time


@dataclass(frozen=True)
class DocumentLosses:
    """What a model makes of each document.

    Attributes:
        losses: float64 [N], summed negative log-likelihood of the document's supervised tokens, in nats.
        supervised: int64 [N], how many those are; the first token of a document never is.
        tokens: int64 [N], length of the document.
    """

    losses: np.ndarray
    supervised: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Mean over all supervised tokens, in nats."""
        return float(self.losses.sum() / self.supervised.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean over all supervised tokens: long documents count for more. Infinity beyond a loss of 709."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.loss))

    @property
    def not_finite(self) -> np.ndarray:
        """int64, the documents whose loss is NaN or infinite."""
        return np.flatnonzero(~np.isfinite(self.losses))

    @property
    def document_perplexities(self) -> np.ndarray:
        """float64 [N], exp of each document's own mean; NaN where nothing is supervised."""
        with np.errstate(invalid="ignore", over="ignore"):
            return np.exp(self.losses / np.where(self.supervised > 0, self.supervised, np.nan))

    def save(self, path: str | Path) -> None:
        """Write a CSV: document, tokens, supervised, loss (nats a token), perplexity."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("document", "tokens", "supervised", "loss", "perplexity"))
            perplexities = self.document_perplexities
            for i, (total, supervised, tokens) in enumerate(
                zip(self.losses, self.supervised, self.tokens, strict=True)
            ):
                mean = total / supervised if supervised else ""
                writer.writerow((i, tokens, supervised, mean, perplexities[i] if supervised else ""))


@torch.no_grad()
def document_losses(
    model: PreTrainedModel,
    documents: Dataset,
    *,
    seq_len: int = 8192,
    batch_size: int = 1,
    backend: str | None = None,
    autocast: torch.dtype | None = None,
) -> DocumentLosses:
    """Loss of each document, each in its own context alone.

    Documents are packed whole: rows are as long as the longest one where that is more than `seq_len`, since a split
    document would lose its context and its loss would depend on the split.

    Args:
        model: a causal language model that packflex supports, on its device. Its attention is switched to packflex;
            its training mode is put back afterwards.
        documents: with `input_ids`, and `labels` or a loss mask as in `pack_dataset`.
        seq_len: tokens of a packed row, at least.
        batch_size: rows at a time.
        backend: of `packflex.flex_attention`.
        autocast: dtype to compute in; the model's own when None. Losses are summed in float64.

    Raises:
        ValueError: no documents, or none with a supervised token.
    """
    longest = max((len(ids) for ids in documents["input_ids"]), default=0)
    if not longest:
        raise ValueError("there is no document to evaluate")
    seq_len = max(seq_len, -(-longest // 128) * 128)
    plan = plan_dataset(documents, seq_len, "best_fit", "error", None)
    rows = pack_dataset(documents, plan=plan)
    collate = PackedCollator(seq_len)
    enable_packflex(model, backend)
    training = model.training
    model.eval()
    losses = np.zeros(len(documents))
    supervised = np.zeros(len(documents), dtype=np.int64)
    try:
        for start in range(0, len(rows), batch_size):
            at = range(start, min(start + batch_size, len(rows)))
            batch = collate([rows[i] for i in at])
            sums, counts = _batch_losses(model, batch, autocast)
            first, end = int(plan.row_offsets[at.start]), int(plan.row_offsets[at.stop])
            which = np.asarray(plan.document_indices)[first:end]
            losses[which], supervised[which] = sums, counts
    finally:
        model.train(training)
    if not supervised.sum():
        raise ValueError("no document has a supervised token; check the labels")
    tokens = np.array([len(ids) for ids in documents["input_ids"]], dtype=np.int64)
    return DocumentLosses(losses, supervised, tokens)


def _batch_losses(
    model: PreTrainedModel, batch: dict[str, Any], autocast: torch.dtype | None
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and supervised tokens of each document of a batch, in the layout's order."""
    device = model.device
    packed = batch["packed"].to(device)
    inputs = {"input_ids": batch["input_ids"].to(device), "position_ids": batch["position_ids"].to(device)}
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(**inputs, packed=packed).logits
    targets = batch["labels"].to(device)[:, 1:].flatten()
    flat = logits[:, :-1].flatten(0, 1)
    each = torch.zeros(len(targets), dtype=torch.float64, device=device)
    chunk = max(1, _CHUNK_BYTES // (4 * flat.shape[1]))
    for start in range(0, len(targets), chunk):
        at = slice(start, start + chunk)
        each[at] = torch.nn.functional.cross_entropy(flat[at].float(), targets[at], reduction="none").double()
    documents = packed.document_ids[:, 1:].flatten().clamp(min=0).long()  # of the padded tail nothing is supervised
    sums = torch.zeros(packed.num_documents, dtype=torch.float64, device=device).scatter_add_(0, documents, each)
    counts = torch.zeros(packed.num_documents, dtype=torch.long, device=device)
    counts.scatter_add_(0, documents, (targets != IGNORED).long())
    return sums.cpu().numpy(), counts.cpu().numpy()
