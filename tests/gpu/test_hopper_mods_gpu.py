"""Score mods in the Hopper kernels: every mod of the table under masks of intervals, against its float64 oracle."""

import dataclasses
import io

import pytest
import torch

from packflex import PackedLayout, document_mask, explain, flex_attention, score_mods
from packflex.attention.hopper.forward import _hopper_fwd_kernel
from packflex.testing.mod_case import check_mod_case, run_mod_case
from packflex.testing.mods import larger, mod_cases

pytestmark = pytest.mark.gpu


def _fits(case):
    mods = case.mods()
    if mods.score_mod is None or case.softcap is not None:
        return False
    mask = case.block_mask(mods)
    return mask is None or mask.kv_intervals is not None


CASES = {case.name: larger(case) for case in mod_cases() if _fits(case)}
SOME = ["alibi-learned", "t5-encoder", "three-captures", "minus-infinity-rows", "documents-of-a-mask", "head-gate"]


@pytest.fixture(autouse=True)
def _needs_hopper(_needs_gpu):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")


def test_the_table_is_what_it_says():
    assert len(CASES) >= 70
    assert set(SOME) <= set(CASES)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        (name, dim) for name in CASES for dim in (64, 128) if (name, dim) != ("trigonometric", 128)
    ],  # compiles for minutes
)
def test_bfloat16(name, dim):
    """Captured tensors get no gradient, so that forward and backward both run on these kernels."""
    case = dataclasses.replace(CASES[name], head_dim=dim)
    check_mod_case(case, "hopper", "cuda", torch.bfloat16, frozen=True)


@pytest.mark.parametrize(
    "tile",
    [{"consumers": 1, "max_heads": 4}, {"consumers": 2, "max_heads": 2}, {"consumers": 2, "max_heads": 1}],
    ids=str,
)
@pytest.mark.parametrize("name", SOME)
def test_backward_tiles(name, tile):
    case = dataclasses.replace(CASES[name], head_dim=128, heads=4, kv_heads=1)
    options = {f"backward_{key}": value for key, value in tile.items()}
    check_mod_case(case, "hopper", "cuda", torch.bfloat16, kernel_options=options, frozen=True)


@pytest.mark.parametrize("name", SOME)
def test_float16(name):
    check_mod_case(CASES[name], "hopper", "cuda", torch.float16, frozen=True)


@pytest.mark.parametrize("name", SOME)
def test_learned_captures(name):
    """The backward is then the portable kernels'."""
    check_mod_case(CASES[name], "hopper", "cuda", torch.bfloat16)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_groups(heads):
    case = dataclasses.replace(CASES["documents-of-a-mask"], heads=heads, kv_heads=1, head_dim=128)
    check_mod_case(case, "hopper", "cuda", torch.bfloat16, frozen=True)


def test_deterministic():
    case = dataclasses.replace(CASES["head-gate"], head_dim=128)
    runs = [run_mod_case(case, "hopper", "cuda", torch.bfloat16, True, frozen=True) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0].tensors(), other.tensors(), strict=True))


def test_a_changed_number_compiles_nothing():
    layout = PackedLayout.from_lengths([[300, 200, 12]], 512).to("cuda")
    mask = document_mask(layout)
    q, k, v = (torch.randn(1, 512, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    counts = []
    for strength, width in ((0.5, 7), (0.25, 16), (1.0, 1), (3.0, 32)):

        def mod(score, b, h, q_idx, kv_idx, strength=strength, width=width):
            return torch.where(q_idx - kv_idx < width, score * strength, score)

        named = flex_attention(q, k, v, score_mod=mod, block_mask=mask, backend="hopper")
        portable = flex_attention(q, k, v, score_mod=mod, block_mask=mask, backend="triton")
        torch.testing.assert_close(named, portable, rtol=2e-2, atol=2e-2)
        counts.append(sum(len(cache[0]) for cache in _hopper_fwd_kernel.device_caches.values()))
    assert len(set(counts[1:])) == 1, counts
    assert counts[0] > 0


def test_light_mods_run_here_by_default_and_others_on_the_portable_kernels():
    q, k, v = (torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = document_mask(PackedLayout.from_lengths([[300, 200, 12]], 512).to("cuda"))
    table = torch.randn(4, 512, 512, device="cuda")
    for mod, backend in (
        (score_mods.alibi(4, "cuda"), "hopper"),
        (lambda score, b, h, q_idx, kv_idx: score + table[h, q_idx, kv_idx], "triton"),
    ):
        compiled = torch.compile(
            lambda backend, mod=mod: flex_attention(q, k, v, score_mod=mod, block_mask=mask, backend=backend)
        )
        named = flex_attention(q, k, v, score_mod=mod, block_mask=mask, backend=backend)
        assert torch.equal(flex_attention(q, k, v, score_mod=mod, block_mask=mask), named)
        assert torch.equal(compiled(None), named)
        other = "hopper" if backend == "triton" else "triton"
        assert not torch.equal(named, flex_attention(q, k, v, score_mod=mod, block_mask=mask, backend=other))


def test_explain_shows_what_these_kernels_call():
    def explained(mod):
        stream = io.StringIO()
        explain(mod, file=stream)
        return stream.getvalue()

    table = torch.randn(64, 64, device="cuda")
    assert "def mod_backward(" in explained(score_mods.alibi(4, "cuda"))
    assert "def mod_backward(" not in explained(lambda score, b, h, q_idx, kv_idx: score + table[q_idx, kv_idx])


def test_softcaps_beside_mods_and_lists_are_refused_by_name():
    q = torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="no score_mod together with a softcap"):
        flex_attention(q, q, q, score_mod=score_mods.alibi(4, "cuda"), softcap=5.0, backend="hopper")
    out = flex_attention(q, q, q, score_mod=score_mods.alibi(4, "cuda"), softcap=5.0)
    assert out.isfinite().all()
