"""Every mod of the table against its float64 oracle: forward, lse, and gradients of q, k, v and captured tensors."""

import dataclasses

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

from packflex import BlockMask, create_block_mask, flex_attention, masks
from packflex.masks.block_mask import lists_of_tiles
from packflex.testing.mod_case import SMALL_TILES, check_mod_case, index_grids, modified_attention, run_mod_case
from packflex.testing.mods import mod_cases
from packflex.testing.tolerances import relative_error

CASES = {case.name: case for case in mod_cases()}
LEARNED = [name for name, case in CASES.items() if case.mods().captured]
# In the interpreter a NaN of hidden elements, which a GPU computes silently, comes with numpy's warnings
pytestmark = pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning:triton.runtime.interpreter"
)


def test_the_table_is_what_it_says():
    assert len(CASES) >= 80
    assert len(LEARNED) >= 50
    groups = {case.heads // case.kv_heads for case in CASES.values()}
    assert groups >= {1, 2, 3, 4}
    assert {case.q_len for case in CASES.values()} >= {1, 63, 77, 111}


@pytest.mark.parametrize("name", CASES)
def test_triton(name):
    check_mod_case(CASES[name], "triton", kernel_options=SMALL_TILES)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    check_mod_case(CASES[name], "reference")


# Triton's interpreter multiplies bfloat16 wrongly; tests/gpu has every case in it
@pytest.mark.parametrize("name", ["t5-encoder", "three-captures", "mask-dilated-learned", "one-tensor-thrice"])
def test_float16(name):
    check_mod_case(CASES[name], "triton", dtype=torch.float16, kernel_options=SMALL_TILES)


@pytest.mark.parametrize(
    "name", ["softcap", "distance-penalty", "float64-scalars", "mask-dilated", "capture-float64", "minus-infinity"]
)
def test_reference_in_float64(name):
    """float64 is computed in float64, so that the reference and the oracle judge one another to 12 digits."""
    check_mod_case(CASES[name], "reference", dtype=torch.float64)


# a gradient of every place that sums have (rows, columns, elements), alone and several into one tensor, and lists
DETERMINISTIC = [
    "alibi-learned", "t5-encoder", "softcap-learned", "bias-k", "bias-hqk", "three-captures", "one-tensor-twice",
    "one-tensor-thrice", "index-arithmetic", "capture-bfloat16", "minus-infinity-rows", "mask-dilated-learned",
    "mask-random",
]  # fmt: skip


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic(name):
    case = dataclasses.replace(CASES[name], rows=((20, 5),), q_len=37, kv_len=None)
    first = check_mod_case(case, "triton", deterministic=True, kernel_options=SMALL_TILES)
    second = run_mod_case(case, "triton", deterministic=True, kernel_options=SMALL_TILES)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


@pytest.mark.parametrize(
    ("name", "heads"),
    [("alibi", 6), ("alibi-learned", 8), ("bias-hqk", 8), ("one-tensor-thrice", 6), ("index-arithmetic", 8),
     ("mask-dilated", 6), ("mask-dilated-learned", 8), ("mask-per-head-learned", 6)],
)  # fmt: skip
def test_many_heads_of_a_group(name, heads):
    """Tiles hold two and eight heads of a group, unless a mask of its own for each head forbids it."""
    case = dataclasses.replace(CASES[name], heads=heads, kv_heads=1, q_len=37, kv_len=None, rows=((20, 5),))
    options = {"forward_block_m": 64, "dkdv_block_n": 16, "dq_block_m": 64}
    first = check_mod_case(case, "triton", kernel_options=options)
    if first.grads.keys() - {"dq", "dk", "dv"}:
        second = check_mod_case(case, "triton", deterministic=True, kernel_options=options)
        assert torch.equal(first.out, second.out)


@pytest.mark.parametrize("score_mod", [None, lambda score, b, h, q, kv: score - 0.1 * (q - kv).abs()], ids=["", "mod"])
def test_blocks_may_be_listed_in_any_order(score_mod):
    """The parts of the first and last listed blocks that a tile cannot see are skipped, whichever blocks those are."""
    length, tile = 230, 64
    mask_mod = masks.dilated_window(25, 3)
    ordered = create_block_mask(mask_mod, None, None, length, length, "cpu", tile)
    backwards = BlockMask.from_kv_blocks(
        ordered.kv_num_blocks, _reversed(ordered.kv_num_blocks, ordered.kv_indices),
        ordered.full_kv_num_blocks, _reversed(ordered.full_kv_num_blocks, ordered.full_kv_indices),
        tile, mask_mod, (length, length),
    )  # fmt: skip
    assert (backwards.kv_indices != ordered.kv_indices).any()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, length, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    results = []
    for mask, backend, options in (
        (ordered, "reference", None),
        (ordered, "triton", SMALL_TILES),
        (backwards, "triton", SMALL_TILES),
    ):
        out = flex_attention(
            *inputs, score_mod=score_mod, block_mask=mask, enable_gqa=True, backend=backend, kernel_options=options
        )
        results.append([out.detach(), *torch.autograd.grad((out * out).sum(), inputs)])
    for found in results[1:]:
        for ours, exact in zip(found, results[0], strict=True):
            assert relative_error(ours, exact) < 3e-6


LISTED = {
    "none": (None, False),
    "shows-more": (masks.sliding_window(70), False),
    "reads": (lambda b, h, q, kv: EVEN[kv], False),
    "hides-whole-tiles": (masks.dilated_window(9, 2), True),
}
EVEN = torch.arange(90) % 2 == 0


@pytest.mark.parametrize("score_mod", [None, "learned"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", LISTED)
def test_lists_say_what_is_seen_whatever_the_mask_mod_shows(name, batch, score_mod):
    """torch's block masks made of lists alone: in a partly visible tile its mask_mod decides, in no other tile."""
    q_len, kv_len, tile = 75, 90, 32
    generator = torch.Generator().manual_seed(0)
    mask_mod, whole = LISTED[name]
    chosen = torch.rand(batch, 4, 3, 3, generator=generator)
    partial, full = chosen < 0.4, (chosen > 0.8) & whole
    partial[:, :, 1], full[:, :, 1] = False, False  # queries that see nothing
    lists = lists_of_tiles(partial, full)
    mask = TorchBlockMask.from_kv_blocks(
        *(lists if whole else lists[:2]), BLOCK_SIZE=tile, mask_mod=mask_mod, seq_lengths=(q_len, kv_len)
    )
    grids = index_grids((batch, 4, q_len, kv_len))
    seen = torch.ones((), dtype=torch.bool) if mask_mod is None else mask_mod(*grids)
    partial, full = (x.repeat_interleave(tile, 2).repeat_interleave(tile, 3)[:, :, :q_len, :kv_len]
                     for x in (partial, full))  # fmt: skip
    seen = full | (partial & seen)
    assert (seen != (True if mask_mod is None else mask_mod(*grids))).any()

    bias = torch.randn(4, kv_len, generator=generator).requires_grad_()
    inputs = [torch.randn(2, heads, n, 16, generator=generator).requires_grad_()
              for heads, n in ((4, q_len), (2, kv_len), (2, kv_len))]  # fmt: skip
    leaves = [*inputs, bias] if score_mod else inputs
    exact = [x.detach().double().requires_grad_() for x in leaves]
    exact_mod = (lambda s, b, h, q, kv: s + exact[3][h, kv]) if score_mod else None
    seen = seen.expand(2, 4, q_len, kv_len)
    out, _ = modified_attention(*exact[:3], seen, exact_mod, None, None)
    scores = exact[0] @ exact[1].repeat_interleave(2, 1).mT / 4 + (exact[3][:, None] if score_mod else 0)
    top = scores.masked_fill(~seen, -torch.inf).amax(-1)
    expected = [out.detach(), top.detach(), *torch.autograd.grad((out * out).sum(), exact)]
    mod = (lambda s, b, h, q, kv: s + bias[h, kv]) if score_mod else None
    for backend in ("reference", "triton", None):
        out, aux = flex_attention(
            *inputs, score_mod=mod, block_mask=mask, enable_gqa=True, backend=backend,
            return_aux=AuxRequest(max_scores=True), kernel_options=SMALL_TILES if backend == "triton" else None,
        )  # fmt: skip
        found = [out.detach(), aux.max_scores, *torch.autograd.grad((out * out).sum(), leaves)]
        assert torch.equal(found[1].isfinite(), expected[1].isfinite())
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(*(x.nan_to_num(neginf=0) for x in (ours, theirs))) < 5e-6
    if batch == 1:
        together = torch.compile(flex_attention, backend="aot_eager")
        out = together(*inputs, score_mod=mod, block_mask=mask, enable_gqa=True, backend="reference")
        assert relative_error(out.detach(), expected[0]) < 5e-6


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, kv: torch.where((kv <= q) & (kv >= 3), s, LOWEST),
        lambda s, b, h, q, kv: (s * 1.1).masked_fill((kv > q) | (kv < 3), LOWEST),
        lambda s, b, h, q, kv: s + torch.where((kv <= q) & (kv >= 3), 0.0, LOWEST),
    ],
    ids=["where", "masked_fill", "added"],
)
def test_rows_of_the_lowest_number_see_nothing(mod):
    """What masks of other libraries put in the place of -inf: to base 2 it is -inf."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 16, generator=generator, requires_grad=True) for _ in range(3))
    out, lse = flex_attention(q, k, v, score_mod=mod, backend="triton", return_lse=True)
    mask = create_block_mask(lambda b, h, q, kv: (kv <= q) & (kv >= 3), None, None, 50, 50, "cpu", 16)
    scaled = (lambda s, *_: s * 1.1) if "masked_fill" in mod.__code__.co_names else None
    expected = flex_attention(q, k, v, score_mod=scaled, block_mask=mask, backend="reference")
    assert (lse[:, :, :3] == -torch.inf).all()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    found, exact = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


LOWEST_OF_HEADS = torch.tensor([torch.finfo(torch.float32).min, -2e38])


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, kv: s + (1.0 - (q >= kv).float()) * torch.finfo(torch.bfloat16).min,
        lambda s, b, h, q, kv: s + (q < kv) * torch.finfo(torch.float32).min,
        lambda s, b, h, q, kv: s - 3e38 * (q < kv),
        lambda s, b, h, q, kv: s + (q < kv) * LOWEST_OF_HEADS[h],
    ],
)
def test_a_mask_that_multiplies_the_lowest_number_hides_what_it_should(mod):
    """What is seen gets the number times 0, which must not become minus infinity before."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 16, generator=generator, requires_grad=True) for _ in range(3))
    out = flex_attention(q, k, v, score_mod=mod, backend="triton")
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 50, 50, "cpu", 16)
    expected = flex_attention(q, k, v, block_mask=mask, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    found, exact = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def _reversed(counts, indices):
    """Index lists with the listed ones backwards, the others behind them as they are."""
    flipped = indices.clone()
    for place in range(counts.numel()):
        count = int(counts.view(-1)[place])
        row = flipped.view(-1, flipped.shape[-1])[place]
        row[:count] = row[:count].flip(0)
    return flipped


def test_a_mask_may_read_what_the_score_learns():
    """Under an evaluated mask, which is true or false and sends no gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=generator, requires_grad=True) for _ in range(3))
    spans = torch.tensor([3.0, -2.0], requires_grad=True)
    mask = create_block_mask(lambda b, h, i, j: (i - j < spans[h] + 5) & (i >= j), None, 2, 64, 64, "cpu", 16)
    for mod in (None, lambda s, b, h, i, j: s * torch.sigmoid(spans[h])):
        wanted = (q, k, v) if mod is None else (q, k, v, spans)
        outs = [flex_attention(q, k, v, score_mod=mod, block_mask=mask, backend=x) for x in ("triton", "reference")]
        found = [torch.autograd.grad(out.sin().sum(), wanted) for out in outs]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        assert found[0][-1].abs().max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_turn_scores_around(scale):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 16, generator=generator, requires_grad=True) for _ in range(3))
    for mod in (masks.dilated_window(5, 3), lambda b, h, i, j: (i >= j) & (j % 3 != 1)):
        mask = create_block_mask(mod, None, None, 50, 50, "cpu", 16)
        outs = [flex_attention(q, k, v, block_mask=mask, scale=scale, backend=x) for x in ("triton", "reference")]
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            *(torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in outs), rtol=1e-4, atol=1e-5
        )
