"""The fp64 oracle: attention written out over the whole score matrix, in float64, differentiated by autograd.

Shares no code with the backends it judges: a mask is a dense bool tensor made from document lengths by definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packflex.layout import PackedLayout


def dense_document_mask(
    layout: PackedLayout,
    causal: bool = True,
    window: int | None = None,
    prefix_lengths: Sequence[int] | None = None,
) -> Tensor:
    """bool [B, S, S]: which key (last axis) a query sees, by the definition of `packflex.document_mask`."""
    seen = torch.zeros(layout.batch_size, layout.seq_len, layout.seq_len, dtype=torch.bool)
    document = 0
    for b, row in enumerate(layout.lengths):
        start = 0
        for length in row:
            i = torch.arange(length)[:, None]
            j = torch.arange(length)[None, :]
            block = torch.ones(length, length, dtype=torch.bool)
            if causal:
                block = i >= j
                if prefix_lengths is not None:
                    block = block | (j < prefix_lengths[document])
            if window is not None:
                block = block & (i - j < window)
                if not causal:
                    block = block & (j - i < window)
            seen[b, start : start + length, start : start + length] = block
            start += length
            document += 1
    return seen


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse in float64, differentiable to q, k, v and sinks.

    Args:
        q: [B, Hq, S, D]; k: [B, Hkv, KV, D]; v: [B, Hkv, KV, Dv]; any float dtype, upcast.
        mask: bool [B, S, KV] or [B, H, S, KV]; None sees all. Queries that see nothing give out 0 and lse -inf.
        scale: 1 / sqrt(D) by default.
        softcap: `softcap * tanh(score / softcap)` when given.
        sinks: [Hq], a logit of each head without a value.
    """
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool)[None]
    mask = (mask[:, None] if mask.dim() == 3 else mask).expand_as(scores)
    blind = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask & ~blind, -torch.inf)  # blind rows keep finite scores and are zeroed at the end
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1)[..., : v.shape[2]]
    out = torch.einsum("bhij,bhjd->bhid", weights, v).masked_fill(blind, 0)
    return out, lse.masked_fill(blind[..., 0], -torch.inf)
