"""Triton kernels that build masks on the GPU: no sync, a grid that depends on padded sizes alone, CUDA-graph safe."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from packflex.integers import ceil_div


@triton.jit
def document_of(CU_SEQLENS, first, last, row_start, o_t, steps):
    """The document of each token `o_t` of a row whose documents are `first` to `last`, by binary search."""
    # documents below[...] start at or before the token; the invariant holds from the row's first document on
    below = o_t * 0 + first
    above = o_t * 0 + tl.maximum(last, first + 1)
    for _ in range(steps):
        middle = (below + above) // 2
        starts = tl.load(CU_SEQLENS + middle, mask=middle < last, other=0)
        before = (starts - row_start <= o_t) & (middle < last)
        below = tl.where(before, middle, below)
        above = tl.where(before, above, tl.maximum(middle, below + 1))
    return below


def search_steps(documents: int) -> int:
    """Halvings of `document_of` over this many documents: a shape, known without asking the device."""
    return max(documents, 1).bit_length() + 1


@triton.jit
def _document_intervals_kernel(
    CU_SEQLENS, ROW_OFFSETS, PREFIX, OUT,
    seq_len, plane, window, steps,
    CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK tokens of a row: binary search of each token's document, then its four bounds."""
    i_b = tl.program_id(1)
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(ROW_OFFSETS + i_b)
    last = tl.load(ROW_OFFSETS + i_b + 1)
    row_start = tl.load(CU_SEQLENS + first)
    real = tl.load(CU_SEQLENS + last) - row_start

    below = document_of(CU_SEQLENS, first, last, row_start, o_t, steps)
    m_real = o_t < real
    start = tl.load(CU_SEQLENS + below, mask=m_real, other=0) - row_start
    end = tl.load(CU_SEQLENS + below + 1, mask=m_real, other=0) - row_start

    if CAUSAL:
        kv_lo, kv_hi, q_lo, q_hi = start, o_t + 1, o_t, end
        if HAS_PREFIX:
            prefix_end = tl.minimum(start + tl.load(PREFIX + below, mask=m_real, other=0), end)
            kv_hi = tl.maximum(kv_hi, prefix_end)
            q_lo = tl.where(o_t < prefix_end, start, o_t)
    else:
        kv_lo, kv_hi, q_lo, q_hi = start, end, start, end
    if HAS_WINDOW:
        kv_lo = tl.maximum(kv_lo, o_t - window + 1)
        q_hi = tl.minimum(q_hi, o_t + window)
        if not CAUSAL:
            kv_hi = tl.minimum(kv_hi, o_t + window)
            q_lo = tl.maximum(q_lo, o_t - window + 1)

    p_out = OUT + i_b * seq_len + o_t
    m_out = o_t < seq_len
    tl.store(p_out, tl.where(m_real, kv_lo, real), mask=m_out)
    tl.store(p_out + plane, tl.where(m_real, kv_hi, real), mask=m_out)
    tl.store(p_out + 2 * plane, tl.where(m_real, q_lo, real), mask=m_out)
    tl.store(p_out + 3 * plane, tl.where(m_real, q_hi, real), mask=m_out)


def launch_document_intervals(
    cu_seqlens: Tensor, row_offsets: Tensor, prefix_lengths: Tensor | None, seq_len: int, causal: bool, window: int
) -> Tensor:
    """The Triton twin of `packflex.masks.intervals.document_intervals`; same arguments and result."""
    batch = row_offsets.shape[0] - 1
    intervals = torch.empty((4, batch, seq_len), dtype=torch.int32, device=cu_seqlens.device)
    block = 128
    _document_intervals_kernel[(ceil_div(seq_len, block), batch)](
        cu_seqlens, row_offsets, prefix_lengths if prefix_lengths is not None else cu_seqlens, intervals,
        seq_len, batch * seq_len, window, search_steps(cu_seqlens.shape[0] - 1),
        CAUSAL=causal, HAS_PREFIX=prefix_lengths is not None, HAS_WINDOW=window > 0, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return intervals
