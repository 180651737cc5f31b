"""The kernels that evaluate a recognised mask's formula: one interval for each query, then one for each key.

Two launches and one allocation, whatever the mask, so that building it costs what launching costs.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from packflex.integers import ceil_div
from packflex.layout import DocumentOrigin
from packflex.masks.kernels import document_of, search_steps
from packflex.masks.recognise import Bound, DocumentBound, Formula, Joined
from packflex.mods import source
from packflex.mods.errors import short_name
from packflex.mods.lifted import PROGRAMS, Lifted
from packflex.mods.printer import Printer, arguments, device_imports

_BLOCK = 128
_HEADER = '''"""Printed by packflex: the interval of keys that each query sees under {what}."""

import triton
import triton.language as tl

from packflex.masks.interval_kernel import document_bounds
{imports}
'''


@triton.jit
def document_bounds(CU_SEQLENS, ROW_OFFSETS, steps, i_b, o_t, kv_len, REAL_ONLY: tl.constexpr):
    """First key and end of the keys of the document of each token, by binary search.

    Tokens of the padded tail get the empty interval at the row's real length, or without REAL_ONLY the tail.
    """
    first = tl.load(ROW_OFFSETS + i_b)
    last = tl.load(ROW_OFFSETS + i_b + 1)
    row_start = tl.load(CU_SEQLENS + first)
    real = tl.load(CU_SEQLENS + last) - row_start
    below = document_of(CU_SEQLENS, first, last, row_start, o_t, steps)
    m_real = o_t < real
    begin = tl.load(CU_SEQLENS + below, mask=m_real, other=0) - row_start
    end = tl.load(CU_SEQLENS + below + 1, mask=m_real, other=0) - row_start
    if REAL_ONLY:
        tail = real
    else:
        tail = tl.maximum(real, kv_len)
    return tl.where(m_real, begin, real), tl.where(m_real, end, tail)


@triton.jit(do_not_specialize=["q_len", "kv_len", "kv_plane", "q_plane", "steps"], do_not_specialize_on_alignment=["Q"])
def _transposed_intervals_kernel(KV, Q, q_len, kv_len, kv_plane, q_plane, steps, BLOCK: tl.constexpr):
    """The queries that see each key: those whose end is past it and whose first key is not, by binary search.

    Queries past the last that sees anything, a padded tail, are no key's, and keys that none sees end where that does.
    """
    i_b = tl.program_id(1)
    o_k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_lo = KV + i_b.to(tl.int64) * q_len
    p_hi = p_lo + kv_plane
    # the queries below `after_lo` have a first key at or before this one, those below `after_hi` an end at or before it
    after_lo = tl.zeros([BLOCK], tl.int32)
    after_hi = tl.zeros([BLOCK], tl.int32)
    end_lo = tl.zeros([BLOCK], tl.int32) + q_len
    end_hi = tl.zeros([BLOCK], tl.int32) + q_len
    for _ in range(steps):
        middle_lo = (after_lo + end_lo) // 2
        middle_hi = (after_hi + end_hi) // 2
        lo = tl.load(p_lo + middle_lo, mask=middle_lo < end_lo, other=2147483647)
        hi = tl.load(p_hi + middle_hi, mask=middle_hi < end_hi, other=2147483647)
        after_lo, end_lo = tl.where(lo <= o_k, middle_lo + 1, after_lo), tl.where(lo <= o_k, end_lo, middle_lo)
        after_hi, end_hi = tl.where(hi <= o_k, middle_hi + 1, after_hi), tl.where(hi <= o_k, end_hi, middle_hi)
    last = tl.load(p_hi + q_len - 1)  # from this key on none is seen; queries that begin there see nothing
    seeing = tl.zeros([], tl.int32)
    end = tl.zeros([], tl.int32) + q_len
    for _ in range(steps):
        middle = (seeing + end) // 2
        lo = tl.load(p_lo + middle, mask=middle < end, other=2147483647)
        seeing, end = tl.where(lo < last, middle + 1, seeing), tl.where(lo < last, end, middle)
    q_lo = tl.minimum(after_hi, seeing)
    p_out = Q + i_b.to(tl.int64) * kv_len + o_k
    tl.store(p_out, q_lo, mask=o_k < kv_len)
    tl.store(p_out + q_plane, tl.maximum(q_lo, tl.minimum(after_lo, seeing)), mask=o_k < kv_len)


def launch_intervals(
    lifted: Lifted,
    formula: Formula,
    documents: dict[int, DocumentOrigin],
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """int32 [2, B, Q_LEN] and [2, B, KV_LEN]: a formula's keys for each query, and queries for each key."""
    batch, _, q_len, kv_len = shape
    both = torch.empty(2 * batch * (q_len + kv_len), dtype=torch.int32, device=device)
    kv_plane, q_plane = batch * q_len, batch * kv_len
    kv_intervals, q_intervals = both[: 2 * kv_plane].view(2, batch, q_len), both[2 * kv_plane :].view(2, batch, kv_len)
    found: list[object] = []
    for origin in documents.values():
        found += [origin.cu_seqlens, origin.row_offsets, search_steps(origin.cu_seqlens.shape[0] - 1)]
    captures = [x.to(device) for x in lifted.captures]
    kernel = _module(lifted.key, formula, tuple(documents)).mask_intervals
    kernel[(ceil_div(q_len, _BLOCK), batch)](
        kv_intervals, q_len, kv_len, kv_plane, *found, *arguments(lifted.program, captures, lifted.numbers),
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    _transposed_intervals_kernel[(ceil_div(kv_len, _BLOCK), batch)](
        kv_intervals, q_intervals, q_len, kv_len, kv_plane, q_plane, q_len.bit_length(), BLOCK=_BLOCK, num_warps=4
    )
    return kv_intervals, q_intervals


@lru_cache(maxsize=1024)
def _module(key: str, formula: Formula, documents: tuple[int, ...]) -> ModuleType:
    return source.load(interval_kernel_text(key, formula, documents))


def interval_kernel_text(key: str, formula: Formula, documents: tuple[int, ...]) -> str:
    """The text of `mask_intervals` for a program of `PROGRAMS` and its formula."""
    program = PROGRAMS[key]
    printer = Printer(program, "m")
    extra = printer.parameters()
    given = [f"{name}{slot}" for slot in documents for name in ("CU_SEQLENS", "ROW_OFFSETS", "steps")]
    sizes = ["q_len", "kv_len", "plane"]
    loose = [*sizes, *(name for name in given if name.islower()),
             *(p for p in extra if "_stride" in p or "_size" in p or p[1] == "s")]  # fmt: skip
    unaligned = [name for name in given if name.isupper()]  # a layout may keep them in one tensor
    parameters = ", ".join(["OUT", *sizes, *given, *extra, "BLOCK: tl.constexpr"])
    lines = ["b = tl.program_id(1)", "q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)"]
    bounds = formula.bounds()
    nodes = [node for bound in bounds for _, node in getattr(bound, "rest", ())]
    lines += map(str, printer.statements(nodes))
    names: dict[Bound, str] = {}
    for bound in bounds:
        if isinstance(bound, DocumentBound):
            if bound in names:
                continue
            begin, end = (DocumentBound(bound.slot, side, bound.real_only) for side in (False, True))
            names[begin], names[end] = f"b{len(names)}", f"b{len(names) + 1}"
            lines.append(
                f"{names[begin]}, {names[end]} = document_bounds(CU_SEQLENS{bound.slot}, ROW_OFFSETS{bound.slot}, "
                f"steps{bound.slot}, b, q, kv_len, {bound.real_only})"
            )
            continue
        names[bound] = f"b{len(names)}"
        if isinstance(bound, Joined):
            text = f"tl.{bound.op}imum({names[bound.first]}, {names[bound.second]})"
        else:
            text = f"{bound.q} * q.to(tl.int64) + {bound.plus}"
            for sign, node in bound.rest:
                text += f" {'+' if sign > 0 else '-'} {printer.text(node)}"
        lines.append(f"{names[bound]} = {text}")
    hi = "kv_len" if formula.hi is None else names[formula.hi]
    lo = "0" if formula.lo is None else names[formula.lo]
    lines += [
        f"hi = q * 0 + tl.minimum(tl.maximum({hi}, 0), kv_len)",
        f"lo = tl.minimum(tl.maximum(q * 0 + {lo}, 0), hi)",
        "p_out = OUT + b.to(tl.int64) * q_len + q",
        "tl.store(p_out, lo.to(tl.int32), mask=q < q_len)",
        "tl.store(p_out + plane, hi.to(tl.int32), mask=q < q_len)",
    ]
    body = "\n".join(f"    {line}" for line in lines)
    header = _HEADER.format(what=short_name(program.name), imports=device_imports(body))
    return (
        f"{header}\n@triton.jit(do_not_specialize={loose!r}, do_not_specialize_on_alignment={unaligned!r})\n"
        f"def mask_intervals(\n    {parameters},\n):\n{body}\n"
    )
