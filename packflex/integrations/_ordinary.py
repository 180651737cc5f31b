"""Attention under transformers' ordinary masks: padded batches, decoding, KV caches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward


def ordinary_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Attention of a batch without a layout; torch's SDPA, or eager math where there is a softcap or sinks.

    Args:
        module: the attention layer, for its `num_key_value_groups`.
        query: [B, Hq, Q_LEN, D].
        key: [B, Hkv, KV_LEN, D].
        value: [B, Hkv, KV_LEN, Dv].
        attention_mask: [B, 1 or Hq, Q_LEN, KV_LEN], boolean (True is seen) or additive. Without one, the last query
            is aligned with the last key and `causal` and `sliding_window` decide.
        scaling: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping a weight.
        sliding_window: read only without a mask, which holds it already.
        softcap: `softcap * tanh(score / softcap)`.
        sinks: [Hq].
        causal: read only without a mask.

    Returns:
        [B, Q_LEN, Hq, Dv]. Queries that a boolean mask hides everything from (padding on the left) give 0.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    mask = attention_mask
    if mask is None and (sliding_window or (causal and 1 != q_len != kv_len)):
        mask = _aligned_mask(q_len, kv_len, sliding_window, causal, query.device)
    blind = None
    if mask is not None and mask.dtype == torch.bool:
        # softmax over nothing is NaN in some of SDPA's kernels and a mean in others: let them see, then discard
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind
    if softcap is None and sinks is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal
        )
    else:
        if mask is None and causal and q_len > 1:
            mask = _aligned_mask(q_len, kv_len, None, causal, query.device)
        out = _eager_attention(query, key, value, mask, scaling, dropout, softcap, sinks).transpose(1, 2)
    return out if blind is None else out.masked_fill(blind.transpose(1, 2), 0)


def _aligned_mask(q_len: int, kv_len: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    distance = torch.arange(kv_len - q_len, kv_len, device=device)[:, None] - torch.arange(kv_len, device=device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        seen = seen & (distance < window) & (distance > -window)
    return seen[None, None]


def _eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ repeat_kv(key, groups).transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    weights = nn.functional.dropout(weights, dropout)
    return weights.to(value.dtype) @ repeat_kv(value, groups)
