"""Next-token losses of packed batches: sums with the weight of each token, from logits or without ever holding them.

Every loss here is a pair: the weighted sum over supervised tokens, and the sum of their weights. Whoever trains divides
one total by the other over all batches of a step and all ranks, so the result does not depend on how documents were
packed, batched or sharded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packflex.layout import PackedLayout
from packflex.parallel.layout import ShardedLayout

IGNORED = -100
WEIGHTINGS = ("token", "document", "sqrt")
_CHUNK_BYTES = 2**28  # of float32 logits held at a time


def token_weights(
    labels: Tensor, layout: PackedLayout | ShardedLayout | None, weighting: str = "token"
) -> Tensor | None:
    """Weight of each label in the loss, so that documents count as their number of supervised tokens n, 1 or sqrt(n).

    Args:
        labels: [B, S] int64, -100 where nothing is to be predicted.
        layout: of the batch; needed for every weighting but "token". A document that packing split counts as many.
        weighting: "token" weighs every supervised token alike; "document" by 1 / n, which makes the loss the mean of
            the documents' own mean losses, as if each were a batch of its own; "sqrt" by 1 / sqrt(n), half-way.

    Returns:
        float32 [B, S], 0 where nothing is to be predicted; None for "token", where all weights are 1.

    Raises:
        ValueError: an unknown weighting, or none of the documents known.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"loss weighting must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}")
    if weighting == "token":
        return None
    if isinstance(layout, ShardedLayout):
        raise ValueError(
            f'loss weighting "{weighting}" counts the supervised tokens of whole documents, and context parallelism '
            'splits them over ranks; use "token"'
        )
    if layout is None:
        raise ValueError(f'loss weighting "{weighting}" needs the batch\'s layout: collate with PackedCollator')
    supervised = (labels != IGNORED).float()
    documents = layout.document_ids.clamp(min=0).long()  # what lies in a padded tail is not supervised
    counts = torch.zeros(max(layout.num_documents, 1), device=labels.device)
    counts.scatter_add_(0, documents.flatten(), supervised.flatten())
    scale = counts.clamp(min=1).reciprocal()
    return supervised * (scale if weighting == "document" else scale.sqrt())[documents]


def next_token_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy of the supervised tokens, and the sum of the weights.

    Args:
        logits: [B, S, V] any float dtype; the loss is computed in float32.
        labels: [B, S] int64, -100 where nothing is to be predicted. Position i is predicted from position i - 1; since
            a document's first label is -100, no document is asked to predict the next one.
        weights: [B, S] float32 as `token_weights` gives them, 1 for each when None.

    Returns:
        float32 sum, and the weights' sum: float32, or the int64 count without weights. Both are scalars.
    """
    targets = labels[:, 1:].flatten()
    flat = logits[:, :-1].flatten(0, 1).float()
    if weights is None:
        return torch.nn.functional.cross_entropy(flat, targets, reduction="sum"), (targets != IGNORED).sum()
    each = torch.nn.functional.cross_entropy(flat, targets, reduction="none")
    shifted = weights[:, 1:].flatten()
    return (each * shifted).sum(), shifted.sum()


def linear_next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`next_token_loss(hidden @ weight.T, ...)` without holding the logits: chunk by chunk, gradients on the way.

    The logits of a row of 8192 tokens with 128k words take 4 GiB in float32, and their gradient as much again. Here
    each chunk of tokens goes to its loss and on to its gradients at once (as in Liger kernels, arXiv 2410.10989).

    Args:
        hidden: [B, S, D], what the last layer gives.
        weight: [V, D], the output embedding.
        labels, weights: [B, S] as in `next_token_loss`.
        bias: [V] or None.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2), None for no cap.
        chunk: tokens at a time; by default as many as fit 256 MiB of float32 logits.

    Returns:
        As `next_token_loss`. Gradients flow to hidden, weight and bias; they are computed with the forward, and the
        result cannot be differentiated twice.

    Raises:
        ValueError: shapes that do not go together.
    """
    if hidden.dim() != 3 or weight.dim() != 2 or hidden.shape[2] != weight.shape[1] or hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"expected hidden [B, S, D], weight [V, D] and labels [B, S]; got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if chunk is None:
        chunk = max(64, _CHUNK_BYTES // (4 * weight.shape[0]))
    targets = labels[:, 1:].flatten()
    shifted = None if weights is None else weights[:, 1:].flatten().float()
    flat = hidden[:, :-1].flatten(0, 1)
    total = _LinearCrossEntropy.apply(flat, weight, bias, targets, shifted, softcap, chunk)
    return total, (targets != IGNORED).sum() if shifted is None else shifted.sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T + bias`; the backward only scales what the forward prepared.

    Gradients to the logits are softmax minus one-hot, without the weights of tokens: times 1 / n of a long document
    most of them would be below what fp16 can hold, and what a `GradScaler` multiplies with comes in the backward alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), chunk):
                at = slice(start, start + chunk)
                inputs, share = hidden[at], None if weights is None else weights[at]
                loss, exact = _chunk(inputs, weight, bias, targets[at], share, softcap)
                total += loss
                if grad_bias is not None:
                    grad_bias += exact.sum(0) if share is None else share @ exact
                gradient = exact.to(hidden.dtype)
                del exact
                if grad_hidden is not None:
                    grad_hidden[at] = gradient @ weight
                if grad_weight is not None:
                    inputs, unit = _in_units(inputs if share is None else inputs * share[:, None], hidden.dtype)
                    grad_weight += (gradient.T @ inputs).float() * unit
        grads = (grad_hidden, grad_weight, grad_bias)
        ctx.save_for_backward(weights, *grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, *saved = ctx.saved_tensors
        # float32 before the product: a scaled gradient may be more than fp16 can hold
        factors = (grad if weights is None else (weights * grad)[:, None], grad, grad)
        grads = [
            None if each is None else (each.to(torch.promote_types(each.dtype, torch.float32)) * factor).to(dtype)
            for each, factor, dtype in zip(saved, factors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None, None


def _in_units(inputs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """Inputs in a dtype, in fp16 over a power of two, and that: a sum over all, each at most once, is then in range."""
    if dtype != torch.float16:
        return inputs.to(dtype), 1.0
    largest = inputs.abs().amax().float() * len(inputs)
    unit = torch.exp2(torch.log2(largest / 2**15).clamp(min=-100).ceil())  # not 0 where all are
    return (inputs.float() / unit).to(dtype), unit


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    share: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Summed loss of one chunk with these weights, and float32 gradient to the logits [n, V] without them."""
    logits = (hidden @ weight.T).float()
    if bias is not None:
        logits += bias.float()
    if softcap is not None:
        tanh = (logits / softcap).tanh_()
        logits = tanh * softcap
    supervised = targets != IGNORED
    index = targets.clamp(min=0)[:, None]
    lse = logits.logsumexp(1)
    each = (lse - logits.gather(1, index)[:, 0]) * supervised
    loss = each.sum() if share is None else (each * share).sum()
    gradient = logits.sub_(lse[:, None]).exp_()
    gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
    if softcap is not None:
        gradient *= 1 - tanh * tanh
    return loss, gradient.mul_(supervised[:, None])
