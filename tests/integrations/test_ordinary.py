"""Attention without a layout: transformers' masks, against weights written out in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from packflex.integrations._ordinary import ordinary_attention
from packflex.integrations.transformers import packflex_mask


def dense(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention in fp64 with weights written out, blind queries 0."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.exp() * seen
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp().view(1, -1, 1, 1) * seen.any(-1, keepdim=True)
    return (weights / total.where(total > 0, 1) @ v).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("mask_kind", ["bool", "additive", "none", "window", "bidirectional"])
def test_ordinary_masks(mask_kind: str, with_sinks: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    layer = nn.Module()
    layer.num_key_value_groups = 2
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    sinks = torch.randn(4) if with_sinks else None
    distance = torch.arange(4, 9)[:, None] - torch.arange(9)
    mask, window, causal = None, None, True
    seen = (distance >= 0).expand(2, 1, 5, 9)
    if mask_kind in ("bool", "additive"):
        seen = torch.rand(2, 1, 5, 9) < 0.5
        seen[..., 0] = True
        if mask_kind == "bool":
            seen[1, 0, 2] = False  # sees nothing
        mask = seen if mask_kind == "bool" else torch.zeros(2, 1, 5, 9).masked_fill(~seen, -torch.inf)
    elif mask_kind == "window":
        window, seen = 3, seen & (distance < 3)
    elif mask_kind == "bidirectional":
        causal, seen = False, torch.ones(2, 1, 5, 9, dtype=torch.bool)
    out = ordinary_attention(layer, q, k, v, mask, 0.4, 0.0, window, softcap, sinks, causal)
    torch.testing.assert_close(out.double(), dense(q, k, v, seen, 0.4, softcap, sinks), rtol=0, atol=2e-6)
    if mask_kind == "bool":
        assert (out[1, 2] == 0).all()


def test_square_causal_without_a_mask() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 5, 8)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    for softcap in (None, 2.0):
        out = ordinary_attention(nn.Module(), q, q, q, None, None, 0.0, None, softcap, None, True)
        torch.testing.assert_close(out.double(), dense(q, q, q, seen, 8**-0.5, softcap, None), rtol=0, atol=2e-6)


def test_blind_queries_have_finite_gradients() -> None:
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True, True, False], [True] * 3])[None, None]
    for softcap in (None, 2.0):
        ordinary_attention(nn.Module(), q, q, q, mask, None, 0.0, None, softcap, None, True).sum().backward()
        assert q.grad is not None
        assert q.grad.isfinite().all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_of_ordinary_masks(softcap: float | None) -> None:
    q = torch.zeros(1, 1, 64, 8)
    v = torch.ones(1, 1, 64, 8)
    torch.manual_seed(0)
    out = ordinary_attention(nn.Module(), q, q, v, None, None, 0.5, None, softcap, None, False)
    assert out.std() > 0.01
    assert out.mean().item() == pytest.approx(1, abs=0.1)


def test_mask_function_never_leaves_the_pattern_to_flags() -> None:
    mask = packflex_mask(batch_size=1, q_length=3, kv_length=3, allow_is_causal_skip=True)
    assert mask is not None
    assert torch.equal(mask[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())
