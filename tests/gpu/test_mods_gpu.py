"""The printed kernels for real: every mod of the table, torch's flex_attention on the same callables, block masks."""

import dataclasses
import gc

import pytest
import torch
import triton
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex

from packflex import PackedLayout, create_block_mask, document_mask, flex_attention, masks, score_mods
from packflex.mods import source
from packflex.mods.lifted import PROGRAMS
from packflex.testing.mod_case import Inputs, check_mod_case, run_mod_case
from packflex.testing.mods import larger, mod_cases
from packflex.testing.tolerances import relative_error

pytestmark = pytest.mark.gpu

FIELDS = [
    f"{full}{axis}_{what}" for full in ("", "full_") for axis in ("kv", "q") for what in ("num_blocks", "indices")
]


CASES = {case.name: larger(case) for case in mod_cases()}
OTHER_DTYPES = [
    "t5-encoder", "composed", "three-captures", "one-tensor-thrice", "negative-index", "small-integers-wrap", "exp-log",
    "integer-division", "minus-infinity-rows", "documents-of-a-mask", "mask-dilated-learned", "mask-per-head-learned",
]  # fmt: skip
DETERMINISTIC = [
    "alibi-learned", "bias-k", "three-captures", "one-tensor-thrice", "index-arithmetic", "mask-dilated-learned",
]  # fmt: skip
# torch cannot differentiate a tensor that is read twice; what is here it can
AGAINST_TORCH = [
    "alibi-learned", "t5-encoder", "softcap", "head-gate", "bias-qk", "two-tables", "where-both-branches",
    "index-arithmetic", "capture-bool", "documents-of-a-score", "mask-dilated", "mask-per-head",
    "mask-documents-dilated",
]  # fmt: skip
MASKED = [name for name, case in CASES.items() if case.mods().mask_mod is not None]


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name):
    check_mod_case(CASES[name], "triton", "cuda", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OTHER_DTYPES)
def test_other_dtypes(name, dtype):
    check_mod_case(CASES[name], "triton", "cuda", dtype)


@pytest.mark.parametrize("dim", [16, 80, 128, 256])
def test_head_dims(dim):
    case = dataclasses.replace(CASES["three-captures"], head_dim=dim)
    check_mod_case(case, "triton", "cuda", torch.bfloat16)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic(name):
    first = check_mod_case(CASES[name], "triton", "cuda", torch.bfloat16, deterministic=True)
    for _ in range(3):
        again = run_mod_case(CASES[name], "triton", "cuda", torch.bfloat16, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first.tensors(), again.tensors(), strict=True))


@pytest.mark.parametrize("name", AGAINST_TORCH)
def test_equals_torch_flex_attention(name):
    case = dataclasses.replace(CASES[name], q_len=384, kv_len=None, block_size=128)
    ours = run_mod_case(case, "triton", "cuda", torch.bfloat16)

    inputs = Inputs.of(case, torch.bfloat16, "cuda", 0)
    mods = case.mods("cuda")
    batch, heads, q_len, kv_len = case.shape
    mask = None
    if mods.mask_mod is not None:
        mask = torch_create_block_mask(mods.mask_mod, batch, heads, q_len, kv_len, device="cuda")
    arguments = [inputs.leaves[name] for name in ("dq", "dk", "dv")]
    torch._dynamo.reset()  # its limit of recompilations counts those of other cases
    compiled = torch.compile(torch_flex, dynamic=False, fullgraph=True)
    out, aux = compiled(
        *arguments, score_mod=mods.score_mod, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True),
        kernel_options={"num_stages": 1},  # torch's own choice needs more shared memory than an H100 has
    )  # fmt: skip
    leaves = inputs.leaves | mods.captured
    seen = aux.lse > -torch.inf
    theirs = torch.autograd.grad((out, aux.lse), list(leaves.values()), (inputs.grad_out, inputs.grad_lse * seen))

    assert torch.equal(ours.lse > -torch.inf, seen)
    assert relative_error(ours.out, out) < 8e-3
    assert (ours.lse - aux.lse)[seen].abs().max() < 1e-2
    for (key, grad), other in zip(ours.grads.items(), theirs, strict=True):
        assert other.norm() > 1e-2, key
        assert relative_error(grad, other) < 2.5e-2, key


# Block masks


@pytest.mark.parametrize("block_size", [128, (64, 32)], ids=str)
@pytest.mark.parametrize("name", MASKED)
def test_block_masks_equal_torch(name, block_size):
    case = CASES[name]
    mods = case.mods("cuda")
    batch, heads, q_len, kv_len = case.shape
    batch, heads = batch if mods.per_row else None, heads if mods.per_head else None
    shape = (batch, heads, q_len, kv_len)
    theirs = torch_create_block_mask(mods.mask_mod, *shape, device="cuda", BLOCK_SIZE=block_size)
    ours = create_block_mask(mods.mask_mod, *shape, device="cuda", BLOCK_SIZE=block_size)
    assert theirs.to_dense().any()
    for field in FIELDS:
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(
    "name", ["mask-causal", "distance-penalty-learned", "mask-dilated", "documents-of-a-mask", "documents-of-ids",
             "mask-per-head", "mask-prefix", "mask-random"],
)  # fmt: skip
def test_building_a_mask_does_not_sync(name):
    case = CASES[name]
    mods = case.mods("cuda")
    case.block_mask(mods, "cuda")  # traces, prints and compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        case.block_mask(mods, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_million_by_a_million_in_lists():
    """A window with holes: no interval form, 67 million tiles, five of a row visited."""
    size = 2**20
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = create_block_mask(masks.dilated_window(64, 8), None, None, size, size, device="cuda")
    tiles = size // 128
    assert mask.kv_intervals is None
    # a byte for the state of each tile and 4 integers of its place in four lists; S^2 bytes would be 1.1e12
    assert torch.cuda.max_memory_allocated() - before < 20 * tiles**2
    row = torch.arange(tiles, device="cuda", dtype=torch.int32)
    assert torch.equal(mask.kv_num_blocks[0, 0], row.clamp(max=4) + 1)
    assert torch.equal(mask.q_num_blocks[0, 0], row.flip(0).clamp(max=4) + 1)
    assert not mask.full_kv_num_blocks.any()
    assert not mask.full_q_num_blocks.any()
    for tile in (0, 3, 4, 5000, tiles - 1):
        first = max(tile - 4, 0)
        count = tile - first + 1
        assert mask.kv_indices[0, 0, tile, :count].tolist() == list(range(first, tile + 1))
        last = min(tile + 4, tiles - 1)
        assert mask.q_indices[0, 0, tile, : last - tile + 1].tolist() == list(range(tile, last + 1))


def test_a_million_by_a_million_in_intervals():
    size = 2**20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mask = create_block_mask(masks.sliding_window(1000), None, None, size, size, device="cuda")
    assert torch.cuda.max_memory_allocated() - before < 200 * size
    query = torch.arange(size, device="cuda", dtype=torch.int32)
    assert torch.equal(mask.kv_intervals[0, 0], (query - 999).clamp(min=0))
    assert torch.equal(mask.kv_intervals[1, 0], query + 1)


# Nothing is compiled again


def compiled_kernels():
    """How many binaries the printed kernels have, tile kernels among them."""
    kernels = [
        # by type: isinstance would look at every attribute that some library gives a warning for
        x
        for x in gc.get_objects()
        if type(x) is triton.JITFunction and x.module.startswith("packflex_mod_")
    ]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def counters():
    info = source.load.cache_info()
    return len(PROGRAMS), info.currsize, info.misses, compiled_kernels()


def run(q_len, score_mod, block_mask, batch=2):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, q_len, 64, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )
    out = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=True, backend="triton")
    out.float().square().sum().backward()
    return out.detach()


def test_changed_documents_scalars_and_lengths_compile_nothing():
    slopes = torch.rand(4, device="cuda", requires_grad=True)

    def step(rows, seq_len, cap, window, dilation):
        layout = PackedLayout.from_lengths(rows, seq_len).to("cuda")
        ids = layout.document_ids

        def mod(score, b, h, q_idx, kv_idx):
            return cap * torch.tanh(score / cap) - slopes[h] * (q_idx - kv_idx) * (ids[b, q_idx] + 1)

        dilated = masks.and_masks(masks.document(layout), masks.dilated_window(window, dilation))
        in_lists = create_block_mask(dilated, 2, None, seq_len, seq_len, device="cuda")
        assert in_lists.kv_intervals is None
        first = run(seq_len, mod, document_mask(layout))
        return first, run(seq_len, mod, in_lists)

    step([[3, 200, 9], [30]], 256, 2.0, 20, 3)
    before = counters()
    assert min(before) > 0
    results = [
        step([[100, 41], [256]], 256, 3.0, 20, 3),
        step([[3, 200, 9], [30]], 256, 7.0, 33, 5),
        step([[1] * 300, [301]], 301, 0.5, 9, 2),
        step([[5, 700], []], 1000, 2.0, 64, 8),
        step([[1], [2]], 17, 1.0, 1, 1),
    ]
    assert counters() == before
    assert all(out.isfinite().all() and out.any() for pair in results for out in pair)


def test_another_structure_is_compiled():
    """Guards the test above: the counters do count."""
    mask = create_block_mask(masks.dilated_window(20, 3), None, None, 256, 256, device="cuda")
    run(256, score_mods.softcap(2.0), mask)
    before = counters()
    run(256, lambda score, b, h, q_idx, kv_idx: score + 0.01 * (q_idx ^ kv_idx), mask)
    assert all(new > old for new, old in zip(counters(), before, strict=True))


def test_a_changed_number_changes_the_result():
    cap = torch.tensor(2.0)

    def mod(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap)

    before = run(128, mod, None)
    cap.fill_(0.5)
    after = run(128, mod, None)
    assert relative_error(after, run(128, score_mods.softcap(0.5), None)) < 1e-6
    assert relative_error(after, before) > 1e-2


def test_offsets_past_int32_in_a_captured_tensor():
    """A table of 2^31 elements and more is read with 64-bit offsets."""
    rows = 2**31 // 4096 + 64
    table = torch.zeros(rows, 4096, device="cuda", dtype=torch.float16)
    table[-300:, :300].normal_(generator=torch.Generator("cuda").manual_seed(0))
    tail = table[-300:, :300].clone()
    first = rows - 300
    far = run(300, lambda score, b, h, q_idx, kv_idx: score + table[first + q_idx, kv_idx], None)
    near = run(300, lambda score, b, h, q_idx, kv_idx: score + tail[q_idx, kv_idx], None)
    assert torch.equal(far, near)
    assert relative_error(far, run(300, None, None)) > 1e-2
