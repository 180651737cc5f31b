"""How far from the fp64 oracle a result may be, by dtype: the one place that says so."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative error ||x - oracle|| / ||oracle||: rounding of inputs, of P and dS to the dtype before the second product,
# and of the result. Measured errors of exact implementations are about a third of these.
RELATIVE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
LSE_ABSOLUTE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """||actual - oracle|| / ||oracle|| in float64; the norm of `actual` itself where the oracle is zero.

    NaN and infinity anywhere give NaN or infinity, which pass no comparison.
    """
    actual, oracle = actual.detach().double().cpu(), oracle.detach().double().cpu()
    size = oracle.norm().item()
    return (actual - oracle).norm().item() / (size if size > 0 else 1.0)


def assert_close_to_oracle(actual: Tensor, oracle: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise AssertionError unless `actual` is within the dtype's relative tolerance of the oracle."""
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, oracle {tuple(oracle.shape)}"
    error = relative_error(actual, oracle)
    assert error <= RELATIVE[dtype], f"{what}: relative error {error:.2e} above {RELATIVE[dtype]:.0e} of {dtype}"


def assert_lse_close(actual: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    """Raise AssertionError unless lse is -inf exactly where the oracle's is, and close elsewhere."""
    actual, oracle = actual.detach().double().cpu(), oracle.detach().double().cpu()
    assert not actual.isnan().any(), "lse holds NaN"
    assert torch.equal(actual == -torch.inf, oracle == -torch.inf), "lse is -inf in other places than the oracle's"
    seeing = oracle > -torch.inf
    error = (actual - oracle)[seeing].abs().max().item() if seeing.any() else 0.0
    assert error <= LSE_ABSOLUTE[dtype], f"lse: error {error:.2e} above {LSE_ABSOLUTE[dtype]:.0e} of {dtype}"


def captured_tolerance(dtype: torch.dtype, captured: torch.dtype) -> float:
    """Relative tolerance of the gradient to a captured tensor of dtype `captured` with q, k and v of `dtype`.

    Such a gradient is a sum over the score matrix whose terms cancel more than those of dQ do, then rounded once.
    """
    return 2 * RELATIVE[dtype] + torch.finfo(captured).eps
