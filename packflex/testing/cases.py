"""`AttentionCase`: one attention problem on packed rows, its random inputs, and its check against the fp64 oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from packflex.attention import flex_attention
from packflex.layout import PackedLayout
from packflex.masks import document_mask
from packflex.testing.oracle import attention_oracle, dense_document_mask
from packflex.testing.tolerances import assert_close_to_oracle, assert_lse_close


@dataclass(frozen=True)
class AttentionCase:
    """Shapes, mask and variant of one attention problem.

    Attributes:
        lengths: document lengths, one tuple for each row.
        seq_len: S.
        heads, kv_heads, head_dim, v_dim: Hq, Hkv, D and Dv (None for D).
        dtype: of q, k and v.
        causal, window, prefix_lengths: arguments of `document_mask`.
        softcap: of `flex_attention`.
        sinks: whether there are sinks.
        memory: "bshd" (as models hand them over), "bhsd" (contiguous) or "fused" (slices of one projection).
        kernel_options: tiles of a Triton or Hopper backend, to reach many blocks at small sizes.
    """

    name: str
    lengths: tuple[tuple[int, ...], ...]
    seq_len: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_dim: int | None = None
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: int | None = None
    prefix_lengths: tuple[int, ...] | None = None
    softcap: float | None = None
    sinks: bool = False
    memory: str = "bshd"
    kernel_options: dict[str, int] = field(default_factory=dict)

    @property
    def layout(self) -> PackedLayout:
        """The packed batch's layout, on the host."""
        return PackedLayout.from_lengths(self.lengths, self.seq_len)

    @property
    def mask_arguments(self) -> dict[str, Any]:
        """Arguments of `document_mask` beside the layout."""
        return {"causal": self.causal, "window": self.window, "prefix_lengths": self.prefix_lengths}

    def __str__(self) -> str:
        return self.name


def random_inputs(
    case: AttentionCase, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v (and sinks) of a case with the memory order it asks for, standard normal, requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = len(case.lengths), case.seq_len
    v_dim = case.head_dim if case.v_dim is None else case.v_dim
    widths = [case.heads * case.head_dim, case.kv_heads * case.head_dim, case.kv_heads * v_dim]
    if case.memory == "fused":
        fused = torch.randn(batch, length, sum(widths), generator=generator).to(device, case.dtype)
        flat = list(fused.split(widths, -1))
    else:
        flat = [torch.randn(batch, length, width, generator=generator).to(device, case.dtype) for width in widths]
    dims = (case.head_dim, case.head_dim, v_dim)
    tensors = [x.unflatten(-1, (-1, dim)).transpose(1, 2) for x, dim in zip(flat, dims, strict=True)]
    if case.memory == "bhsd":
        tensors = [x.contiguous() for x in tensors]
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    if not case.sinks:
        return q, k, v, None
    sinks = torch.randn(case.heads, generator=generator).to(device)
    return q, k, v, (sinks.double() if case.dtype == torch.float64 else sinks).requires_grad_()


def check_against_oracle(
    case: AttentionCase, backend: str, device: torch.device | str = "cpu", seed: int = 0, poison: float | None = None
) -> None:
    """Forward and every gradient of a case within the dtype's tolerance of the fp64 oracle.

    Args:
        case: the problem.
        backend: of `flex_attention`.
        device: where it runs; the oracle runs on the host.
        seed: of the inputs.
        poison: a value, such as NaN, written into q, k and v at every padded position; outputs there must be 0 and
            no real position may notice.

    Raises:
        AssertionError: with the tensor and its error.
    """
    q, k, v, sinks = random_inputs(case, device, seed)
    layout = case.layout
    padded = (layout.document_ids < 0)[:, None, :, None]
    if poison is not None:
        q, k, v = (x.detach().masked_fill(padded.to(device), poison).requires_grad_() for x in (q, k, v))
    mask = document_mask(layout.to(device), **case.mask_arguments)
    options = case.kernel_options if backend in ("triton", "hopper") else None
    out, lse = flex_attention(
        q,
        k,
        v,
        block_mask=mask,
        enable_gqa=True,
        return_lse=True,
        kernel_options=options,
        softcap=case.softcap,
        sinks=sinks,
        backend=backend,
    )

    exact_q, exact_k, exact_v = (x.detach().cpu().masked_fill(padded, 0.0).double().requires_grad_() for x in (q, k, v))
    exact_sinks = None if sinks is None else sinks.detach().cpu().double().requires_grad_()
    seen = dense_document_mask(layout, **case.mask_arguments)
    expected, expected_lse = attention_oracle(exact_q, exact_k, exact_v, seen, softcap=case.softcap, sinks=exact_sinks)
    assert_close_to_oracle(out, expected, case.dtype, "out")
    assert_lse_close(lse, expected_lse, case.dtype)
    assert not out.masked_select(padded.to(device)).any(), "output in the padded tail is not 0"

    generator = torch.Generator().manual_seed(seed + 1)
    grad_out = torch.randn(out.shape, generator=generator)
    grad_lse = torch.randn(lse.shape, generator=generator)
    leaves = [x for x in (q, k, v, sinks) if x is not None]
    exact_leaves = [x for x in (exact_q, exact_k, exact_v, exact_sinks) if x is not None]
    # half types see the same rounded gradient as the oracle
    grad_out = grad_out.to(case.dtype)
    real = expected_lse > -torch.inf
    grads = torch.autograd.grad(
        (out, lse), leaves, (grad_out.to(device), grad_lse.masked_fill(~real, 0).to(device, lse.dtype))
    )
    loss = (expected * grad_out.double()).sum() + (expected_lse.masked_fill(~real, 0) * grad_lse).sum()
    expected_grads = torch.autograd.grad(loss, exact_leaves)
    for name, grad, expected_grad in zip(("dq", "dk", "dv", "dsinks"), grads, expected_grads, strict=False):
        assert_close_to_oracle(grad, expected_grad, case.dtype, name)


_SMALL_TILES = {
    "forward_block_m": 32, "forward_block_n": 16, "dkdv_block_m": 32, "dkdv_block_n": 16,
    "dq_block_m": 32, "dq_block_n": 16,
}  # fmt: skip
_MIXED = ((3, 40, 21, 11), (1, 63), (70,))


def small_cases() -> list[AttentionCase]:
    """Cases small enough for Triton's interpreter that between them reach every branch of the kernels."""

    def case(name: str, lengths: tuple[tuple[int, ...], ...] = _MIXED, seq_len: int = 80, **rest: Any) -> AttentionCase:
        return AttentionCase(name, lengths, seq_len, kernel_options=_SMALL_TILES, **rest)

    half: dict[str, Any] = {"dtype": torch.float16}
    return [
        case("causal"),
        case("causal-fp16", **half),
        case("bidirectional", causal=False),
        case("window", window=9),
        case("window-1", window=1),
        case("window-bidirectional", window=9, causal=False),
        case("prefix", prefix_lengths=(1, 10, 21, 0, 1, 40, 20)),
        case("prefix-window", prefix_lengths=(1, 10, 21, 0, 1, 40, 20), window=15),
        case("softcap", softcap=1.5),
        case("softcap-fp16", softcap=1.5, **half),
        case("sinks", sinks=True),
        case("sinks-window-softcap", sinks=True, window=9, softcap=2.0),
        case("one-token-documents", ((1,) * 20, (1,) * 7), 24),
        case("500-documents-of-3", ((3,) * 500,), 1504, heads=1, kv_heads=1),
        case("63-and-111", ((63, 111),), 174, heads=2, kv_heads=1),
        case("whole-row", ((96,),), 96),
        case("empty-row", ((), (20,)), 33),
        case("all-padding", ((),), 17),
        case("length-one", ((1,),), 1),
        case("mha", heads=2, kv_heads=2),
        case("group-of-3", heads=3, kv_heads=1),
        case("group-of-8", heads=8, kv_heads=1),
        case("group-of-6", heads=6, kv_heads=1, **half),
        case("dim-80", head_dim=80, heads=2, kv_heads=1, **half),
        case("dim-96", head_dim=96, heads=2, kv_heads=1),
        case("dim-256", head_dim=256, heads=2, kv_heads=1, **half),
        case("dim-17-and-8", head_dim=17, v_dim=8),
        case("wide-values", head_dim=16, v_dim=40),
        case("contiguous", memory="bhsd"),
        case("fused-projection", memory="fused"),
        case("fused-projection-fp16", memory="fused", window=30, **half),
    ]
