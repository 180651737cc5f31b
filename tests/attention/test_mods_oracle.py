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
