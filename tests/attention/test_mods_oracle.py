"""Every mod of the table against its float64 oracle: forward, lse, and gradients of q, k, v and captured tensors."""

import dataclasses

import pytest
import torch

from packflex.testing.mod_case import SMALL_TILES, check_mod_case, run_mod_case
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


@pytest.mark.parametrize("name", ["alibi", "alibi-learned", "mask-dilated", "mask-per-head"])
def test_six_heads_of_a_group(name):
    """Tiles hold several heads of a group, unless captured gradients or a mask of their own for each head forbid it."""
    case = dataclasses.replace(CASES[name], heads=6, kv_heads=1, q_len=37, kv_len=None, rows=((20, 5),), block_size=32)
    check_mod_case(case, "triton", kernel_options={"forward_block_m": 64, "dkdv_block_n": 16, "dq_block_m": 16})
