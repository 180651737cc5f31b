"""The Hopper kernels on a Hopper card: fp64 oracle over masks, lengths and strides, long streams, repeats, poison."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from packflex import PackedLayout, document_mask, flex_attention
from packflex.attention.hopper.tiles import BackwardTile, ForwardTile
from packflex.masks.intervals import document_intervals
from packflex.testing.cases import AttentionCase, check_against_oracle, small_cases
from packflex.testing.tolerances import relative_error

pytestmark = pytest.mark.gpu

HALF = [torch.bfloat16, torch.float16]
MIXED = ((3, 400, 63, 111), (700,), (), (1,) * 300, (3,) * 230)
VARIANTS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 100},
    "window-1": {"window": 1},
    "window-bidirectional": {"window": 77, "causal": False},
    "prefix": {"prefix_lengths": (1, 100, 63, 0, 300) + (1,) * 530},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 90, "softcap": 2.0, "sinks": True},
    "fused": {"memory": "fused"},
    "contiguous": {"memory": "bhsd"},
}
TILES = [
    ForwardTile(2, 64, 3, 1, persistent=1),
    ForwardTile(2, 64, 3, 2, ping_pong=1),
    ForwardTile(3, 64, 3, 2),
    ForwardTile(2, 128, 2, 2),
    ForwardTile(2, 128, 2, 1, max_heads=1, persistent=0),
    ForwardTile(1, 64, 2, 2, 2),
    BackwardTile(2, 2, max_heads=1),
    BackwardTile(2, 2, persistent=0, ahead=0),
    BackwardTile(1, 2, ahead=0),
    BackwardTile(1, 1, max_heads=2, persistent=0, ahead=0),
    BackwardTile(1, 2, persistent=1),
    BackwardTile(1, 2, persistent=2),
    BackwardTile(2, 2, persistent=2, ahead=0),
    BackwardTile(2, 2, persistent=2, held=1),
    BackwardTile(1, 2, ahead=0, held=1),
]


@pytest.fixture(autouse=True)
def _needs_hopper(_needs_gpu):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")


def options_of(tile):
    if tile is None:
        return None
    kernel = "forward" if isinstance(tile, ForwardTile) else "backward"
    return {f"{kernel}_{name}": value for name, value in dataclasses.asdict(tile).items()}


def poison_free_memory():
    """Fill what the allocator will hand out next with NaN, in blocks of many sizes."""
    torch.cuda.synchronize()
    blocks = [torch.full((1 << n,), math.nan, device="cuda") for n in range(8, 23) for _ in range(3)]
    del blocks


def check(case, seed=0, **rest):
    poison_free_memory()
    check_against_oracle(case, "hopper", "cuda", seed, **rest)


SMALL = {
    case.name: dataclasses.replace(
        case,
        head_dim=64,
        v_dim=None,
        kernel_options={},
        dtype=torch.bfloat16 if "fp16" not in case.name else case.dtype,
    )
    for case in small_cases()
    if not case.name.startswith(("dim-", "wide-"))
}


@pytest.mark.parametrize("name", SMALL)
def test_small_cases(name):
    check(SMALL[name])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("variant", VARIANTS)
def test_default_tiles(variant, dim, dtype):
    case = AttentionCase(variant, MIXED, 720, heads=8, kv_heads=2, head_dim=dim, dtype=dtype, **VARIANTS[variant])
    check(case)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 3), (8, 1), (16, 2)], ids=str)
def test_head_groups(heads):
    check(AttentionCase("heads", MIXED, 720, *heads, head_dim=64, dtype=torch.bfloat16))


@pytest.mark.parametrize("seed", range(200))
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
    check(case, seed)


@pytest.mark.parametrize("variant", ["causal", "bidirectional", "window", "all"])
@pytest.mark.parametrize("rows", [MIXED, ((360,), (3, 357), (50,) * 7)], ids=["mixed", "half-padding"])
def test_nan_in_padding_reaches_nothing(variant, rows):
    case = AttentionCase(variant, rows, 750, head_dim=64, dtype=torch.bfloat16, **VARIANTS[variant])
    check(case, poison=math.nan)


def long_stream(dim, lengths, heads=(16, 4), seq_len=None, seed=0):
    """Rows long enough that every program has many tiles: q, k, v, a gradient, and the layout."""
    torch.manual_seed(seed)
    layout = PackedLayout.from_lengths(lengths, seq_len)
    shape = (layout.batch_size, layout.seq_len)
    q, k, v, grad = (
        torch.randn(*shape, n, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    return *(x.requires_grad_() for x in (q, k, v)), grad, layout


def lognormal_rows(seed, rows, total, median=200):
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(rows):
        row = []
        while total - sum(row) > 0:
            row.append(int(min(total - sum(row), rng.lognormal(math.log(median), 1.2) + 1)))
        result.append(row)
    return result


def against_float64(q, k, v, grad, mask, options=None):
    """Errors of out, lse and gradients against the eager backend in float64, document by document."""
    poison_free_memory()
    out, lse = flex_attention(
        q, k, v, block_mask=mask, enable_gqa=True, return_lse=True, backend="hopper", kernel_options=options
    )
    grads = torch.autograd.grad(out, (q, k, v), grad)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = flex_attention(
        *exact, block_mask=mask, enable_gqa=True, return_lse=True, backend="reference"
    )
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    assert relative_error(out, expected) < 1.2e-2
    seen = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert (lse - expected_lse)[seen].abs().max() < 1.5e-2
    worst = ((out - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=0.05)).max().item()
    assert worst < 0.1, f"one row is wrong by {worst:.2f}"
    for name, ours, theirs in zip(("dq", "dk", "dv"), grads, expected_grads, strict=True):
        assert relative_error(ours, theirs) < 1.2e-2, name


@pytest.mark.parametrize("tile", [None, *TILES], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_many_tiles_a_program(dim, tile):
    q, k, v, grad, layout = long_stream(dim, lognormal_rows(0, 3, 8192), seq_len=8222)
    mask = document_mask(layout.to("cuda"))
    against_float64(q, k, v, grad, mask, options_of(tile))


@pytest.mark.parametrize("tile", [None, *TILES], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_a_long_document_beside_many_short_ones(dim, tile):
    lengths = [[50] * 60 + [6000] + [50] * 40 + [1] * 100, [63] * 100 + [3000]]
    q, k, v, grad, layout = long_stream(dim, lengths, heads=(8, 2), seq_len=11200)
    mask = document_mask(layout.to("cuda"))
    assert not mask.long_spans or dim in (64, 128)
    against_float64(q, k, v, grad, mask, options_of(tile))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("variant", ["causal", "bidirectional", "window"])
def test_tiles_of_long_documents(variant, dim):
    q, k, v, grad, layout = long_stream(dim, [[5000, 191], [3100]], heads=(4, 2), seq_len=5300)
    mask = document_mask(layout.to("cuda"), **({"window": 2500} if variant == "window" else VARIANTS[variant]))
    assert mask.long_spans
    against_float64(q, k, v, grad, mask)


def test_without_a_mask_and_with_other_numbers_of_keys():
    for q_len, kv_len in ((257, 257), (100, 700), (700, 100)):
        torch.manual_seed(0)
        leaves = [
            torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for n in (q_len, kv_len, kv_len)
        ]
        exact = [x.detach().double().requires_grad_() for x in leaves]
        poison_free_memory()
        out, lse = flex_attention(*leaves, return_lse=True, backend="hopper")
        expected, expected_lse = flex_attention(*exact, return_lse=True, backend="reference")
        assert relative_error(out, expected) < 1.2e-2
        assert (lse - expected_lse).abs().max() < 1.5e-2
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad)
        for ours, theirs in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
            assert relative_error(ours, theirs) < 1.2e-2


@pytest.mark.parametrize("tile", [None, *TILES[:6]], ids=str)
def test_the_same_bits_over_100_runs(tile):
    q, k, v, _, layout = long_stream(128, lognormal_rows(1, 2, 4096), heads=(8, 2), seq_len=4100)
    mask = document_mask(layout.to("cuda"))

    def run():
        with torch.no_grad():
            return flex_attention(
                q, k, v, block_mask=mask, enable_gqa=True, return_lse=True, backend="hopper",
                kernel_options=options_of(tile),
            )  # fmt: skip

    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("tile", [None, *TILES[6:]], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_gradients_over_100_runs(dim, tile):
    """dK and dV have the same bits, dQ the same values but for the order of its sums."""
    q, k, v, grad, layout = long_stream(dim, lognormal_rows(1, 2, 4096), heads=(8, 2), seq_len=4100)
    mask = document_mask(layout.to("cuda"))
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend="hopper", kernel_options=options_of(tile))

    def run():
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    first = run()
    for _ in range(99):
        grad_q, *others = run()
        assert all(torch.equal(a, b) for a, b in zip(first[1:], others, strict=True))
        assert ((grad_q - first[0]).float().norm() / first[0].float().norm()).item() < 1e-3


def test_deterministic_takes_the_portable_backward():
    q, k, v, grad, layout = long_stream(64, lognormal_rows(1, 2, 2048), heads=(8, 2))
    mask = document_mask(layout.to("cuda"))

    def run(backend, **rest):
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend=backend, **rest)
        return torch.autograd.grad(out, (q, k, v), grad)

    first = run("hopper", deterministic=True)
    assert all(relative_error(a, b) < 8e-3 for a, b in zip(first, run("triton"), strict=True))
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run("hopper", deterministic=True), strict=True))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("variant", ["causal", "bidirectional", "window"])
def test_nan_gradients_in_padding_reach_nothing(variant, dim):
    q, k, v, grad, layout = long_stream(dim, [[300, 200], [100, 7]], heads=(8, 2), seq_len=620)
    padded = (layout.document_ids < 0)[:, None, :, None].cuda()
    mask = document_mask(layout.to("cuda"), **VARIANTS[variant])
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend="hopper")
    clean = torch.autograd.grad(out, (q, k, v), grad.masked_fill(padded, 0), retain_graph=True)
    dirty = torch.autograd.grad(out, (q, k, v), grad.masked_fill(padded, math.nan))
    for a, b in zip(clean, dirty, strict=True):
        assert b.isfinite().all()
        assert relative_error(b, a) < 1e-3
        assert not b.masked_select(padded).any()


def test_a_head_group_of_its_own_and_strided_gradients():
    q, k, v, grad, layout = long_stream(64, [[300, 200], [400]], heads=(6, 6))
    mask = document_mask(layout.to("cuda"))
    against_float64(q, k, v, grad.transpose(1, 2).contiguous().transpose(1, 2), mask)
    against_float64(q, k, v, grad[:, :, :1, :1].expand_as(grad), mask)


def test_it_is_the_default_and_refuses_by_reason():
    q, k, v = (torch.randn(1, 2, 96, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = document_mask(PackedLayout.from_lengths([[96]]).to("cuda"))
    named = flex_attention(q, k, v, block_mask=mask, backend="hopper")
    portable = flex_attention(q, k, v, block_mask=mask, backend="triton")
    assert not torch.equal(named, portable), "the two must differ in some bit for what follows to prove anything"
    assert torch.equal(flex_attention(q, k, v, block_mask=mask), named)
    for x in (q, k, v):
        x.requires_grad_()
    assert torch.equal(flex_attention(q, k, v, block_mask=mask, backend="hopper"), named)
    compiled = torch.compile(lambda: flex_attention(q, k, v, block_mask=mask, backend="hopper"))
    assert torch.equal(compiled(), named)
    with pytest.raises(NotImplementedError, match=r"takes float16 and bfloat16; got torch\.float32"):
        flex_attention(q.float(), k.float(), v.float(), backend="hopper")
    with pytest.raises(NotImplementedError, match="head dims of 64 or 128; D is 32"):
        flex_attention(q[..., :32], k[..., :32], v[..., :32], backend="hopper")
    with pytest.raises(NotImplementedError, match="scale above 0"):
        flex_attention(q, k, v, scale=-1.0, backend="hopper")
    with pytest.raises(NotImplementedError, match="no score_mod together with a softcap"):
        flex_attention(q, k, v, score_mod=lambda s, *i: s, softcap=3.0, backend="hopper")
    portable = flex_attention(q[..., :32], k[..., :32], v[..., :32], block_mask=mask)
    assert torch.equal(
        portable, flex_attention(q[..., :32], k[..., :32], v[..., :32], block_mask=mask, backend="triton")
    )


def test_unaligned_and_expanded_inputs():
    torch.manual_seed(0)
    room = torch.randn(2, 200, 4 * 64 + 3, device="cuda", dtype=torch.bfloat16)
    q = room[..., 3:].unflatten(-1, (4, 64)).transpose(1, 2)
    k = torch.randn(2, 1, 200, 64, device="cuda", dtype=torch.bfloat16).expand(2, 4, 200, 64)
    v = torch.randn(1, 4, 200, 64, device="cuda", dtype=torch.bfloat16).expand(2, 4, 200, 64)
    mask = document_mask(PackedLayout.from_lengths([[150, 50], [63, 100]], 200).to("cuda"))
    out = flex_attention(q, k, v, block_mask=mask, backend="hopper")
    expected = flex_attention(*(x.double() for x in (q, k, v)), block_mask=mask, backend="reference")
    assert relative_error(out, expected) < 1.2e-2


def test_compiles_once_over_changing_documents():
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def step(x, layout):
        q, k, v = (x * scale for scale in (1.0, 2.0, 3.0))
        return flex_attention(q, k, v, block_mask=document_mask(layout), backend="hopper").sum()

    x = torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for rows in ([[3, 200, 9], [30]], [[256], [256]], [[1] * 256, []], [[5, 5], [1, 2, 3]]):
        layout = PackedLayout.from_lengths(rows, 256).to("cuda")
        document_mask(layout)
        step(x, layout).backward()
        assert x.grad.isfinite().all()
    assert counter.frame_count == 1


def test_cuda_graph_replays_with_new_documents():
    layout = PackedLayout.from_lengths([[100, 120], [256]]).to("cuda")
    cu_seqlens, row_offsets = layout.cu_seqlens.clone(), layout.row_offsets.clone()
    q, k, v = (torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def run():
        intervals = document_intervals(cu_seqlens, row_offsets, None, 256, True, 0)
        op = torch.ops.packflex.attention
        return op(q, k, v, intervals[:2], intervals[2:], None, 0.125, 0.0, "hopper", [], False)[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    other = PackedLayout.from_lengths([[200, 20], [17]], 256).to("cuda")
    cu_seqlens.copy_(other.cu_seqlens)
    graph.replay()
    assert torch.equal(out, flex_attention(q, k, v, block_mask=document_mask(other), backend="hopper", scale=0.125))


@pytest.mark.parametrize("rows", [1, 16, 32, 48, 128])
def test_work_order_is_a_permutation_by_falling_work(rows):
    from packflex.attention.hopper.order import HEADER, WorkOrder

    layout = PackedLayout.from_lengths(lognormal_rows(2, 3, 5000), 5100).to("cuda")
    intervals = document_mask(layout).kv_intervals
    plan = WorkOrder(intervals.shape, intervals.stride(), rows, 64, tuple(range(9)))(intervals).cpu()
    assert plan[:9].tolist() == list(range(9))
    records = plan[HEADER.value :].view(3, -1, 4)
    lo, hi = intervals.cpu()
    for b in range(3):
        assert sorted(records[b, :, 0].tolist()) == list(range(0, 5100, rows))
        blocks = records[b, :, 2].tolist()
        assert blocks == sorted(blocks, reverse=True)
        for first_row, first, count, last in records[b].tolist():
            end = int(hi[b, min(first_row + rows, 5100) - 1])
            assert first == int(lo[b, first_row])
            assert count == -(-max(end - first, 0) // 64)
            assert last == int(hi[b, -1]) - 64
