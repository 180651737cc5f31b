"""Every backend against the fp64 oracle: forward and all gradients, over masks, dtypes, dims, GQA, awkward lengths."""

import dataclasses
import math

import pytest
import torch

from packflex import document_mask, flex_attention
from packflex.testing.cases import AttentionCase, check_against_oracle, random_inputs, small_cases
from packflex.testing.oracle import attention_oracle, dense_document_mask
from packflex.testing.tolerances import assert_close_to_oracle, assert_lse_close, relative_error

CASES = {case.name: case for case in small_cases()}


@pytest.mark.parametrize("name", CASES)
def test_triton(name):
    check_against_oracle(CASES[name], "triton")


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    check_against_oracle(CASES[name], "reference")


@pytest.mark.parametrize("variant", [{}, {"causal": False}, {"window": 150}, {"prefix_lengths": (100, 63, 5)}], ids=str)
def test_large_tiles_whose_edges_are_walked_in_halves(variant):
    options = {"dkdv_block_m": 64, "dkdv_block_n": 128}
    case = AttentionCase("halves", ((300, 63, 17),), 391, kernel_options=options, **variant)
    check_against_oracle(case, "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "sinks-window-softcap", "bidirectional", "wide-values"])
def test_reference_in_other_dtypes(name, dtype):
    check_against_oracle(dataclasses.replace(CASES[name], dtype=dtype), "reference")


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", ["causal", "bidirectional", "sinks", "empty-row"])
def test_nan_in_padding_reaches_nothing(name, backend):
    check_against_oracle(CASES[name], backend, poison=math.nan)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", ["causal", "window", "bidirectional", "prefix", "sinks-window-softcap", "group-of-8"])
def test_torch_forward(name):
    """torch's own op has no backward on CPU; its forward must agree through our masks, softcap and sinks."""
    case = CASES[name]
    q, k, v, sinks = (None if x is None else x.detach() for x in random_inputs(case))
    mask = document_mask(case.layout, **case.mask_arguments)
    out, lse = flex_attention(
        q, k, v, block_mask=mask, enable_gqa=True, return_lse=True, backend="torch", softcap=case.softcap, sinks=sinks
    )
    seen = dense_document_mask(case.layout, **case.mask_arguments)
    expected, expected_lse = attention_oracle(q, k, v, seen, softcap=case.softcap, sinks=sinks)
    assert_close_to_oracle(out, expected, case.dtype, "out")
    assert_lse_close(lse, expected_lse, case.dtype)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_without_mask_and_with_other_key_length(backend):
    q = torch.randn(2, 4, 19, 16, requires_grad=True)
    k = torch.randn(2, 2, 45, 16, requires_grad=True)
    v = torch.randn(2, 2, 45, 24, requires_grad=True)
    out = flex_attention(q, k, v, enable_gqa=True, backend=backend, scale=0.3)
    expected, _ = attention_oracle(q, k, v, scale=0.3)
    assert_close_to_oracle(out, expected, torch.float32, "out")
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    for name, ours, theirs in zip("qkv", grads, torch.autograd.grad(expected, (q, k, v), grad.double()), strict=True):
        assert_close_to_oracle(ours, theirs, torch.float32, f"d{name}")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_one_mask_row_serves_the_batch(backend):
    case = dataclasses.replace(CASES["causal"], lengths=((70,), (70,)))
    q, k, v, _ = random_inputs(case)
    one_row = document_mask(dataclasses.replace(case, lengths=((70,),)).layout)
    shared = flex_attention(q, k, v, block_mask=one_row, enable_gqa=True, backend=backend)
    full = flex_attention(q, k, v, block_mask=document_mask(case.layout), enable_gqa=True, backend=backend)
    assert torch.equal(shared, full)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (shared, full)), strict=True):
        assert torch.equal(a, b)


def test_expanded_and_non_contiguous_gradients():
    """`out.sum()` hands back an expanded gradient, a transposed use a strided one."""
    case = CASES["causal"]
    q, k, v, _ = random_inputs(case)
    mask = document_mask(case.layout)
    results = []
    for backend in ("triton", "reference"):
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend=backend)
        results.append(torch.autograd.grad(out.sum() + (out.transpose(-1, -2) ** 2).sum(), (q, k, v)))
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) < 1e-5


def test_dense_masks_and_score_mods_in_the_reference():
    """A mask_mod and a score_mod without an interval form go through the dense reference, gradients by autograd."""
    from packflex import create_block_mask

    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], requires_grad=True)
    q, k, v = (torch.randn(2, heads, 37, 16, requires_grad=True) for heads in (4, 2, 2))

    def dilated(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & ((q_idx - kv_idx) % 3 == 0)

    def alibi(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    mask = create_block_mask(dilated, None, None, 37, 37, device="cpu", BLOCK_SIZE=16)
    out, lse = flex_attention(q, k, v, alibi, mask, enable_gqa=True, return_lse=True)
    i, j = torch.arange(37)[:, None], torch.arange(37)[None]
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double().repeat_interleave(2, 1)) / 4
    scores = scores + slopes.double()[:, None, None] * (j - i)
    scores = scores.masked_fill(~((i >= j) & ((i - j) % 3 == 0)), -torch.inf)
    expected = scores.softmax(-1) @ v.double().repeat_interleave(2, 1)
    assert_close_to_oracle(out, expected, torch.float32, "out")
    assert_lse_close(lse, scores.logsumexp(-1), torch.float32)
    grad = torch.randn_like(out)
    leaves = (q, k, v, slopes)
    ours = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(ours, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        assert_close_to_oracle(a, b, torch.float32, "gradient")
