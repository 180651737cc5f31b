"""The Triton kernels for real: fp64 oracle over dtypes, dims, masks and GQA, default tiles, int64 offsets, compile."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from packflex import PackedLayout, create_block_mask, document_mask, flex_attention, masks
from packflex.masks.intervals import document_intervals
from packflex.testing.cases import AttentionCase, check_against_oracle, random_inputs, small_cases
from packflex.testing.tolerances import relative_error

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MIXED = ((3, 400, 63, 111), (700,), (), (1,) * 300, (3,) * 230)
VARIANTS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 100},
    "prefix": {"prefix_lengths": (1, 100, 63, 0, 300) + (1,) * 530},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 90, "softcap": 2.0, "sinks": True},
    "fused": {"memory": "fused"},
}
SMALL = {case.name: case for case in small_cases()}


@pytest.mark.parametrize("tiles", ["default", "small"])
@pytest.mark.parametrize("name", SMALL)
def test_small_cases(name, tiles):
    case = SMALL[name]
    check_against_oracle(case if tiles == "small" else dataclasses.replace(case, kernel_options={}), "triton", "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_default_tiles(variant, dim, dtype):
    case = AttentionCase(variant, MIXED, 720, heads=8, kv_heads=2, head_dim=dim, dtype=dtype, **VARIANTS[variant])
    check_against_oracle(case, "triton", "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiles_for_long_spans(dtype):
    case = AttentionCase("long", ((2500, 63, 17),), 2600, heads=4, kv_heads=1, head_dim=128, dtype=dtype)
    assert document_mask(case.layout).long_spans
    check_against_oracle(case, "triton", "cuda")


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 3), (8, 1), (16, 2)], ids=str)
def test_head_groups(heads):
    case = AttentionCase("heads", MIXED, 720, *heads, head_dim=64, dtype=torch.bfloat16)
    check_against_oracle(case, "triton", "cuda")


@pytest.mark.parametrize("seed", range(100))
def test_random_layouts(seed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(rng.integers(1, 4)):
        row, left = [], 600
        while left > 20:
            row.append(int(min(left, rng.lognormal(rng.uniform(1, 5), 1.0) + 1)))
            left -= row[-1]
        rows.append(tuple(row))
    kv_heads = int(rng.choice([1, 2]))
    case = AttentionCase(
        f"random-{seed}",
        tuple(rows),
        int(rng.integers(600, 700)),
        heads=kv_heads * int(rng.choice([1, 2, 3, 4, 8])),
        kv_heads=kv_heads,
        head_dim=int(rng.choice([64, 128])),
        dtype=torch.bfloat16,
        causal=bool(rng.integers(2)),
        window=None if rng.integers(2) else int(rng.integers(1, 300)),
        sinks=bool(rng.integers(2)),
    )
    check_against_oracle(case, "triton", "cuda", seed)


@pytest.mark.parametrize("variant", ["causal", "bidirectional", "all"])
def test_nan_in_padding_reaches_nothing(variant):
    case = AttentionCase(variant, MIXED, 750, head_dim=64, dtype=torch.bfloat16, **VARIANTS[variant])
    check_against_oracle(case, "triton", "cuda", poison=math.nan)


def test_the_same_bits_over_100_runs():
    case = AttentionCase("repeat", MIXED, 720, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    q, k, v, _ = random_inputs(case, "cuda")
    mask = document_mask(case.layout.to("cuda"))
    grad = torch.randn_like(q)

    def run():
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend="triton")
        return (out, *torch.autograd.grad(out, (q, k, v), grad))

    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("variant", ["causal", "bidirectional", "window", "prefix"])
def test_interval_kernel_equals_the_host(variant):
    options = dict(VARIANTS[variant])
    prefixes = options.pop("prefix_lengths", None)
    prefixes = None if prefixes is None else torch.tensor(prefixes, dtype=torch.int32)
    layout = PackedLayout.from_lengths(MIXED, 720)
    arguments = (layout.seq_len, options.get("causal", True), options.get("window", 0))
    host = document_intervals(layout.cu_seqlens, layout.row_offsets, prefixes, *arguments)
    cuda = document_intervals(
        layout.cu_seqlens.cuda(), layout.row_offsets.cuda(), None if prefixes is None else prefixes.cuda(), *arguments
    )
    assert torch.equal(host, cuda.cpu())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_building_a_mask_does_not_sync():
    layout = PackedLayout.from_lengths(MIXED, 720).to("cuda")
    document_mask(layout, window=7)  # compiles the kernel
    try:
        torch.cuda.set_sync_debug_mode("error")
        document_mask(layout, window=9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_128k_row_and_offsets_past_int32():
    """One 128k document beside others; q as a slice of a projection so wide that offsets pass 2**31."""
    length, heads, dim = 131072, 4, 64
    layout = PackedLayout.from_lengths([[length - 1000, 900]], length).to("cuda")
    wide = torch.zeros(1, length, 128, dim * 3, device="cuda", dtype=torch.bfloat16)  # 6.4 GB: strides past 2**31
    assert wide.numel() > 2**31
    torch.manual_seed(0)
    wide[:, :, :heads, :dim].normal_()
    q = wide[..., :dim].transpose(1, 2)[:, :heads].requires_grad_()
    k, v = (torch.randn(1, 1, length, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    out = flex_attention(q, k, v, block_mask=document_mask(layout), enable_gqa=True, backend="triton")
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    tail = slice(length - 1000, length - 100)
    exact = [x.detach()[0, :, tail].double().requires_grad_() for x in (q, k, v)]
    qe, ke, ve = exact
    scores = (qe @ ke.transpose(-1, -2)) / math.sqrt(dim)
    index = torch.arange(900, device="cuda")
    expected = scores.masked_fill(index[:, None] < index[None], -torch.inf).softmax(-1) @ ve
    assert relative_error(out[0, :, tail], expected) < 1.2e-2
    for ours, theirs in zip(grads, torch.autograd.grad(expected, exact, grad[0, :, tail].double()), strict=True):
        assert relative_error(ours[0, :, tail], theirs) < 1.2e-2
    rows = [0, 1000, length // 2, length - 1001]
    scores = q.detach()[0, :, rows].double() @ k.detach()[0, 0].double().T / math.sqrt(dim)
    seen = torch.arange(length, device="cuda")[None] <= torch.tensor(rows, device="cuda")[:, None]
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.detach()[0, 0].double()
    assert relative_error(out[0, :, rows], expected) < 1.2e-2
    assert not out[0, :, length - 100 :].any()


def test_equals_torch_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention as torch_flex

    case = AttentionCase("torch", MIXED, 720, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    q, k, v, _ = random_inputs(case, "cuda")
    mask = document_mask(case.layout.to("cuda"))
    grad = torch.randn_like(q)
    theirs = torch.compile(torch_flex)(q, k, v, block_mask=mask.to_torch(), enable_gqa=True)
    ours = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend="triton")
    through_us = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend="torch")
    assert relative_error(ours, theirs) < 8e-3
    assert relative_error(through_us, theirs) < 1e-6
    pairs = zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (ours, theirs)), strict=True)
    assert all(relative_error(a, b) < 1.2e-2 for a, b in pairs)


def test_block_masks_equal_torch():
    from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask

    layout = PackedLayout.from_lengths(MIXED, 720).to("cuda")
    mod = masks.and_masks(masks.document(layout), masks.causal)
    theirs = torch_create_block_mask(mod, 5, None, 720, 720, device="cuda")
    for ours in (document_mask(layout), create_block_mask(mod, 5, None, 720, 720, device="cuda")):
        for axis in ("kv", "q"):
            for name in (f"{axis}_num_blocks", f"{axis}_indices", f"full_{axis}_num_blocks", f"full_{axis}_indices"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_compiles_once_over_changing_documents():
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def step(x, layout):
        q, k, v = (x * scale for scale in (1.0, 2.0, 3.0))
        return flex_attention(q, k, v, block_mask=document_mask(layout)).sum()

    x = torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for rows in ([[3, 200, 9], [30]], [[256], [256]], [[1] * 256, []], [[5, 5], [1, 2, 3]]):
        layout = PackedLayout.from_lengths(rows, 256).to("cuda")
        document_mask(layout)
        step(x, layout).backward()
        assert x.grad.isfinite().all()
    assert counter.frame_count == 1


def test_autocast():
    q, k, v = (torch.randn(2, 4, 256, 64, device="cuda", requires_grad=True) for _ in range(3))
    mask = document_mask(PackedLayout.from_lengths([[100, 120], [256]]).to("cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = flex_attention(q, k, v, block_mask=mask)
    assert out.dtype == torch.bfloat16
    exact = flex_attention(q, k, v, block_mask=mask, backend="reference")
    assert relative_error(out, exact) < 1.2e-2
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_cuda_graph_replays_with_new_documents():
    layout = PackedLayout.from_lengths([[100, 120], [256]]).to("cuda")
    cu_seqlens, row_offsets = layout.cu_seqlens.clone(), layout.row_offsets.clone()
    q, k, v = (torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def run():
        intervals = document_intervals(cu_seqlens, row_offsets, None, 256, True, 0)
        op = torch.ops.packflex.attention
        return op(q, k, v, intervals[:2], intervals[2:], None, 0.125, 0.0, "triton", [], False)[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    other = PackedLayout.from_lengths([[200, 20], [17]], 256).to("cuda")
    cu_seqlens.copy_(other.cu_seqlens)
    graph.replay()
    assert torch.equal(out, flex_attention(q, k, v, block_mask=document_mask(other), backend="triton", scale=0.125))
