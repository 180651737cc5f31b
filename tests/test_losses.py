"""Losses against their definition: weights by document, and the chunked linear cross-entropy against plain logits."""

import pytest
import torch

from packflex import PackedLayout
from packflex.losses import IGNORED, linear_next_token_loss, next_token_loss, token_weights

LAYOUT = PackedLayout.from_lengths([[5, 3, 1], [2, 6]], seq_len=10)


def batch(vocab=13, dim=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(2, 10, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (2, 10))
    labels[LAYOUT.position_ids == 0] = IGNORED
    labels[LAYOUT.document_ids < 0] = IGNORED
    labels[0, 2] = labels[1, 4] = IGNORED  # a prompt
    return hidden, weight, labels


@pytest.mark.parametrize(("weighting", "power"), [("token", 0.0), ("sqrt", 0.5), ("document", 1.0)])
def test_weights_by_document(weighting, power):
    hidden, weight, labels = batch()
    logits = hidden @ weight.T
    total, norm = next_token_loss(logits, labels, token_weights(labels, LAYOUT, weighting))
    expected, expected_norm = 0.0, 0.0
    logs = logits.log_softmax(-1)
    for document in range(LAYOUT.num_documents):
        b, at = torch.nonzero((LAYOUT.document_ids == document) & (labels != IGNORED), as_tuple=True)
        if len(at):
            expected -= logs[b, at - 1, labels[b, at]].sum() / len(at) ** power
            expected_norm += len(at) ** (1 - power)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert norm.item() == pytest.approx(expected_norm, rel=1e-6)


def test_a_document_without_supervised_tokens_counts_for_nothing():
    _, _, labels = batch()
    labels[LAYOUT.document_ids == 1] = IGNORED
    weights = token_weights(labels, LAYOUT, "document")
    assert weights.isfinite().all()
    assert weights.sum().item() == pytest.approx(3)  # of five documents one has a single token, one is all prompt


@pytest.mark.parametrize("weighting", ["token", "document"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_chunks_give_loss_and_gradients_of_the_logits(weighting, softcap, with_bias, chunk):
    hidden, weight, labels = batch()
    bias = torch.randn(13, dtype=torch.float64, requires_grad=True) if with_bias else None
    weights = token_weights(labels, LAYOUT, weighting)
    inputs = [x for x in (hidden, weight, bias) if x is not None]

    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    exact, count = next_token_loss(logits, labels, weights)
    expected = torch.autograd.grad(exact * 0.3, inputs)
    total, same_count = linear_next_token_loss(hidden, weight, labels, weights, bias=bias, softcap=softcap, chunk=chunk)
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)
    assert same_count.item() == count.item()
    for ours, theirs in zip(torch.autograd.grad(total * 0.3, inputs), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_autocast_and_frozen_output_embedding():
    hidden, weight, labels = batch(dtype=torch.float32)
    weight = weight.detach()
    exact, _ = next_token_loss(hidden @ weight.T, labels)
    (expected,) = torch.autograd.grad(exact, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_next_token_loss(hidden, weight, labels)
    (ours,) = torch.autograd.grad(total, hidden)
    assert ours.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=2e-2)
    assert (ours - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("weighting", ["token", "document", "sqrt"])
@pytest.mark.parametrize("lengths", [[2048], [2000, 40, 8]])
def test_fp16_is_as_exact_as_by_logits(weighting, lengths):
    """Of a loss scaled as by a `GradScaler`; the weights of long documents are near the least that fp16 holds."""
    torch.manual_seed(0)
    layout = PackedLayout.from_lengths([lengths], seq_len=2048)
    labels = torch.randint(0, 8192, (1, 2048))
    labels[layout.position_ids == 0] = IGNORED
    weights = token_weights(labels, layout, weighting)
    inputs = [torch.randn(1, 2048, 8), 0.04 * torch.randn(8192, 8), 0.1 * torch.randn(8192)]
    inputs = [x.half().requires_grad_() for x in inputs]
    scale = 2.0**16 / 2048

    def logits(hidden, weight, bias):
        return next_token_loss(hidden @ weight.T + bias, labels, weights)[0]

    def chunked(hidden, weight, bias):
        return linear_next_token_loss(hidden, weight, labels, weights, bias=bias, chunk=500)[0]

    def gradients(loss, inputs):
        return [g.double() for g in torch.autograd.grad(loss(*inputs) * scale, inputs)]

    exact = gradients(logits, [x.detach().double().requires_grad_() for x in inputs])
    for expected, ours, theirs in zip(exact, gradients(chunked, inputs), gradients(logits, inputs), strict=True):
        error, theirs_error = ((g - expected).norm() / expected.norm() for g in (ours, theirs))
        assert error < theirs_error + 5e-4, f"{error:.1e} for {theirs_error:.1e} by logits"


@pytest.mark.parametrize("share", [None, 1 / 256])
def test_sums_over_tokens_stay_finite_in_fp16(share):
    """Where hidden states have one dimension of large values and many tokens have one target."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 8192, 16)
    hidden[..., 3] = 60
    labels = torch.randint(0, 64, (1, 8192))
    labels[0, torch.rand(8192) < 0.3] = 7
    weights = None if share is None else torch.full((1, 8192), share)
    weight = 0.02 * torch.randn(64, 16)
    exact, half = (weight.clone().requires_grad_() for _ in range(2))
    total = next_token_loss(hidden @ exact.T, labels, weights)[0] / 8192
    (expected,) = torch.autograd.grad(total, exact)
    with torch.autocast("cpu", torch.float16):
        total = linear_next_token_loss(hidden, half, labels, weights)[0] / 8192
    (found,) = torch.autograd.grad(total, half)
    assert found.isfinite().all()
    assert ((found - expected).norm() / expected.norm()) < 3e-3


def test_a_scale_beyond_fp16_is_no_infinite_gradient():
    hidden, weight, labels = batch(dtype=torch.float32)
    hidden, weight = hidden.detach().half().requires_grad_(), weight.detach().half()
    weights = 1e-4 * (labels != IGNORED).float()
    (ours,) = torch.autograd.grad(linear_next_token_loss(hidden, weight, labels, weights)[0] * 2.0**17, hidden)
    (expected,) = torch.autograd.grad(next_token_loss(hidden @ weight.T, labels, weights)[0] * 2.0**17, hidden)
    assert torch.allclose(ours, expected, rtol=1e-2, atol=1e-2)


def test_no_supervised_token_gives_zero_and_no_gradient():
    hidden, weight, labels = batch()
    total, count = linear_next_token_loss(hidden, weight, torch.full_like(labels, IGNORED))
    assert (total.item(), count.item()) == (0.0, 0)
    assert torch.autograd.grad(total, hidden)[0].abs().max() == 0


def test_bad_arguments():
    hidden, weight, labels = batch()
    with pytest.raises(ValueError, match="must be one of token, document, sqrt; got 'mean'"):
        token_weights(labels, LAYOUT, "mean")
    with pytest.raises(ValueError, match="needs the batch's layout"):
        token_weights(labels, None, "sqrt")
    with pytest.raises(ValueError, match=r"expected hidden \[B, S, D\].*\(2, 10, 8\), \(13, 8\) and \(2, 9\)"):
        linear_next_token_loss(hidden, weight, labels[:, 1:])
