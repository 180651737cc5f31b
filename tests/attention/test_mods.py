"""Every mod of the table against its float64 oracle: forward, lse, and gradients of q, k, v and captured tensors."""

import dataclasses

import pytest
import torch

from packflex.testing.mod_case import SMALL_TILES, check_mod_case, oracle_results, run_mod_case
from packflex.testing.mods import mod_cases

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["t5-encoder", "three-captures", "mask-dilated-learned", "one-tensor-thrice"])
def test_half_types(name, dtype):
    check_mod_case(CASES[name], "triton", dtype=dtype, kernel_options=SMALL_TILES)


@pytest.mark.parametrize(
    "name", ["t5-decoder", "three-captures", "mask-per-head-learned", "exp-log", "capture-float64"]
)
def test_reference_in_float64(name):
    """float64 inputs are computed in float64, so that the reference itself can be judged to 12 digits."""
    case = dataclasses.replace(CASES[name])
    check_mod_case(case, "reference", dtype=torch.float64)


# a gradient of every place that sums have (rows, columns, elements), alone and several into one tensor, and lists
DETERMINISTIC = [
    "alibi-learned", "t5-encoder", "softcap-learned", "bias-k", "bias-hqk", "three-captures", "one-tensor-twice",
    "one-tensor-thrice", "index-arithmetic", "capture-bfloat16", "minus-infinity-rows", "mask-dilated-learned",
    "mask-random",
]  # fmt: skip


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic(name):
    case = CASES[name]
    first = check_mod_case(case, "triton", deterministic=True, kernel_options=SMALL_TILES)
    second = run_mod_case(case, "triton", deterministic=True, kernel_options=SMALL_TILES)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


@pytest.mark.parametrize(
    "options", [{"forward_block_m": 16, "dkdv_block_n": 16, "dq_block_m": 64}, SMALL_TILES], ids=str
)
@pytest.mark.parametrize("name", ["alibi-learned", "head-gate", "mask-dilated-learned", "mask-per-head-learned"])
def test_a_query_head_group_in_one_tile_or_not(name, options):
    """Eight query heads of one key head, with gradients of captured tensors and without."""
    case = dataclasses.replace(CASES[name], heads=8, kv_heads=1, q_len=37, rows=((20, 5), (30,)))
    check_mod_case(case, "triton", kernel_options=options)
    found = run_mod_case(case, "triton", kernel_options=options, seed=1)
    exact = oracle_results(case, torch.float32, 1)
    torch.testing.assert_close(found.out, exact.out.float(), rtol=1e-4, atol=1e-5)
