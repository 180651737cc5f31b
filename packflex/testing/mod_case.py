"""`ModCase`: attention under a score_mod and a mask_mod, its inputs, its fp64 oracle, and its check against it.

The oracle runs the same Python function as eager torch, over float64 scores and int64 index vectors of the visible
elements alone, with every captured tensor in float64; a case may give a formula of its own instead. Gradients are
autograd's. Nothing here is shared with the tracer, the printers or the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from packflex.attention import flex_attention
from packflex.layout import PackedLayout
from packflex.masks import BlockMask, create_block_mask
from packflex.testing.tolerances import (
    RELATIVE,
    assert_close_to_oracle,
    assert_lse_close,
    captured_tolerance,
    relative_error,
)

SMALL_TILES = {
    "forward_block_m": 64, "forward_block_n": 32, "dkdv_block_m": 32, "dkdv_block_n": 64, "dq_block_m": 64,
    "dq_block_n": 32,
}  # fmt: skip


@dataclass
class Mods:
    """What a case's factory makes for one device.

    Attributes:
        score_mod, mask_mod: what a user writes.
        captured: the tensors that get a gradient, by name.
        block_mask: makes the mask where `create_block_mask(mask_mod)` does not.
        formula: the score by hand, which the oracle takes instead of `score_mod`.
        seen: the mask by hand, bool that broadcasts to [B, H, Q, KV], instead of `mask_mod`.
        per_row, per_head: whether the mask differs by the row of the batch, by the head.
    """

    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    captured: dict[str, Tensor] = field(default_factory=dict)
    block_mask: Callable[[], BlockMask] | None = None
    formula: Callable[..., Any] | None = None
    seen: Tensor | None = None
    per_row: bool = False
    per_head: bool = False


@dataclass(frozen=True)
class ModCase:
    """One mod and the problem that it is tried on.

    Attributes:
        make: the mods on the device of a `Maker`.
        rows: document lengths, for the mods that know documents.
        q_len, kv_len: lengths; kv_len None for q_len.
        block_size: of the mask's lists.
        softcap, sinks: of `flex_attention`, beside the mods.
        still: results whose gradient is 0 by the nature of the mod: of "dq", "dk", "dv".
    """

    name: str
    make: Callable[[Maker], Mods]
    rows: tuple[tuple[int, ...], ...] = ((3, 40, 17), (57,))
    q_len: int = 63
    kv_len: int | None = None
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    block_size: int | tuple[int, int] = 32
    softcap: float | None = None
    sinks: bool = False
    still: frozenset[str] = frozenset()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Q_LEN, KV_LEN)."""
        return len(self.rows), self.heads, self.q_len, self.q_len if self.kv_len is None else self.kv_len

    def mods(self, device: torch.device | str = "cpu", seed: int = 0) -> Mods:
        """The mods as a user has them on `device`."""
        return self.make(Maker(self, torch.device(device), False, seed))

    def exact_mods(self, seed: int = 0) -> Mods:
        """The same mods with captured tensors of the same values in float64, on the host."""
        with float64_by_default():
            return self.make(Maker(self, torch.device("cpu"), True, seed))

    def block_mask(self, mods: Mods, device: torch.device | str = "cpu") -> BlockMask | None:
        """The block mask of mods that this case made on `device`."""
        if mods.block_mask is not None:
            return mods.block_mask()
        if mods.mask_mod is None:
            return None
        batch, heads, q_len, kv_len = self.shape
        rows, planes = batch if mods.per_row else None, heads if mods.per_head else None
        return create_block_mask(mods.mask_mod, rows, planes, q_len, kv_len, device, self.block_size)

    def __str__(self) -> str:
        return self.name


class Maker:
    """Makes a case's captured tensors: the same values for every device, in float64 where `exact`."""

    def __init__(self, case: ModCase, device: torch.device, exact: bool, seed: int) -> None:
        self.batch, self.heads, self.q_len, self.kv_len = case.shape
        self.layout = PackedLayout.from_lengths(case.rows, self.q_len).to(device)
        self.device = device
        self.exact = exact
        self._generator = torch.Generator().manual_seed(seed + 100)

    def floats(
        self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, size: float = 1.0, host: bool = False
    ) -> Tensor:
        """Normal numbers with a deviation of `size`; on the host where `host`."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float32) * size
        values = values.to(dtype).double() if self.exact else values.to(dtype)
        return values.to("cpu" if host else self.device).requires_grad_(grad)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers of low .. high - 1."""
        return torch.randint(low, high, shape, generator=self._generator).to(self.device, dtype)

    def bools(self, *shape: int, share: float = 0.5) -> Tensor:
        """True with probability `share`."""
        return (torch.rand(shape, generator=self._generator, dtype=torch.float32) < share).to(self.device)


@contextmanager
def float64_by_default() -> Iterator[None]:
    """torch's default dtype, which a quotient of integers has, is float64 inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def index_grids(shape: tuple[int, ...]) -> list[Tensor]:
    """b, h, q_idx and kv_idx as int64 that broadcast to [B, H, Q, KV]."""
    return [torch.arange(n).view([-1 if axis == i else 1 for axis in range(4)]) for i, n in enumerate(shape)]


def dense_mask(case: ModCase, mods: Mods) -> Tensor:
    """bool [B, H, Q, KV] of mods made by `exact_mods`."""
    if mods.seen is not None:
        return mods.seen.expand(case.shape)
    if mods.mask_mod is None:
        return torch.ones(case.shape, dtype=torch.bool)
    return mods.mask_mod(*index_grids(case.shape)).expand(case.shape)


def modified_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, score: Callable[..., Any] | None, softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse in float64 of q [B, Hq, Q, D], k and v [B, Hkv, KV, D] under bool [B, Hq, Q, KV] and a score_mod."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[3] ** -0.5
    visible = seen.nonzero(as_tuple=True)  # a mod may give anything, NaN included, for what no query sees
    values = scores[visible]
    if score is not None:
        values = score(values, *visible).expand(values.shape)
    if softcap is not None:
        values = softcap * torch.tanh(values / softcap)
    scores = torch.full_like(scores, -torch.inf).index_put(visible, values)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : v.shape[2]]
    out = torch.einsum("bhij,bhjd->bhid", weights, v).masked_fill(blind, 0.0)
    return out, torch.logsumexp(scores, -1).masked_fill(blind[..., 0], -torch.inf)


@dataclass(frozen=True)
class Results:
    """out, lse, and gradients by name, of one run or of the oracle."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.out, self.lse, *self.grads.values()]


@dataclass(frozen=True)
class Inputs:
    """q, k, v (and sinks), and the gradients that come back to out and lse."""

    leaves: dict[str, Tensor]
    grad_out: Tensor
    grad_lse: Tensor

    @staticmethod
    def of(case: ModCase, dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
        """Standard normal; the same values for every device."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, of)

        batch, heads, q_len, kv_len = case.shape
        leaves = {
            name: normal(batch, length, count, case.head_dim).transpose(1, 2)
            for name, length, count in (
                ("dq", q_len, heads),
                ("dk", kv_len, case.kv_heads),
                ("dv", kv_len, case.kv_heads),
            )
        }
        grad_out = normal(batch, heads, q_len, case.head_dim)
        grad_lse = normal(batch, heads, q_len, of=torch.float32)
        if case.sinks:
            leaves["dsinks"] = normal(heads, of=torch.float32)
        return Inputs({name: x.requires_grad_() for name, x in leaves.items()}, grad_out, grad_lse)


@lru_cache(maxsize=4)
def oracle_results(case: ModCase, dtype: torch.dtype, seed: int = 0) -> Results:
    """The float64 results for inputs of `dtype`.

    Raises:
        AssertionError: a case that cannot fail: a mod that changes nothing, or a gradient of nearly 0.
    """
    inputs = Inputs.of(case, dtype, "cpu", seed)
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.leaves.items()}
    mods = case.exact_mods(seed)
    seen = dense_mask(case, mods)
    arguments = (leaves["dq"], leaves["dk"], leaves["dv"])
    with float64_by_default():
        score = mods.score_mod if mods.formula is None else mods.formula
        out, lse = modified_attention(*arguments, seen, score, case.softcap, leaves.get("dsinks"))
        plain, _ = modified_attention(*arguments, torch.ones_like(seen), None, case.softcap, leaves.get("dsinks"))
    assert relative_error(out, plain) > 1e-2, f"{case}: the mods hardly change the result"
    leaves |= mods.captured
    grad_lse = inputs.grad_lse.double().masked_fill(lse == -torch.inf, 0)
    loss = (out * inputs.grad_out.double()).sum() + (lse.masked_fill(lse == -torch.inf, 0) * grad_lse).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, found, strict=True)}
    for name, grad in grads.items():
        if name not in case.still:
            assert grad.abs().max() > 1e-3, f"{case}: {name} is nearly 0, and the case cannot fail"
    return Results(out.detach(), lse.detach(), grads)


def run_mod_case(
    case: ModCase,
    backend: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    deterministic: bool | None = None,
    seed: int = 0,
    kernel_options: dict[str, int] | None = None,
    frozen: bool = False,
) -> Results:
    """The results of `flex_attention` with gradients of everything that gets one; of no captured tensor if `frozen`."""
    inputs = Inputs.of(case, dtype, device, seed)
    mods = case.mods(device, seed)
    if frozen:
        for captured in mods.captured.values():
            captured.requires_grad_(False)
        mods.captured.clear()
    q, k, v = (inputs.leaves[name] for name in ("dq", "dk", "dv"))
    out, lse = flex_attention(
        q, k, v, score_mod=mods.score_mod, block_mask=case.block_mask(mods, device), enable_gqa=True, return_lse=True,
        softcap=case.softcap, sinks=inputs.leaves.get("dsinks"), backend=backend, deterministic=deterministic,
        kernel_options=kernel_options,
    )  # fmt: skip
    leaves = inputs.leaves | mods.captured
    given = [(out, inputs.grad_out), (lse, inputs.grad_lse.masked_fill(lse == -torch.inf, 0).to(lse.dtype))]
    given = [pair for pair in given if pair[0].requires_grad]  # of eager backends: not where a mod ignores all scores
    outputs, weights = zip(*given, strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves.values(), found, strict=True)]
    return Results(out.detach(), lse.detach(), dict(zip(leaves, grads, strict=True)))


def check_mod_case(
    case: ModCase,
    backend: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    deterministic: bool | None = None,
    seed: int = 0,
    kernel_options: dict[str, int] | None = None,
    frozen: bool = False,
) -> Results:
    """Forward, lse and every gradient within tolerance of the oracle; returns what came.

    Raises:
        AssertionError: with the tensor and its error.
    """
    found = run_mod_case(case, backend, device, dtype, deterministic, seed, kernel_options, frozen)
    exact = oracle_results(case, dtype, seed)
    assert_close_to_oracle(found.out, exact.out, dtype, "out")
    assert_lse_close(found.lse, exact.lse, dtype)
    assert frozen or found.grads.keys() == exact.grads.keys()
    for name, grad in found.grads.items():
        if name in ("dq", "dk", "dv"):
            limit = RELATIVE[dtype]
        else:
            limit = captured_tolerance(dtype, grad.dtype)
        error = relative_error(grad, exact.grads[name])
        assert grad.shape == exact.grads[name].shape, f"{name}: shape {tuple(grad.shape)}"
        assert error <= limit, f"{name}: relative error {error:.2e} above {limit:.0e} of {dtype}"
    return found
