"""Masks whose program shows that each query sees one interval of keys, and what that interval is.

Recognised are comparisons that are linear in `q_idx` and `kv_idx` (causal, windows, `abs` of a difference), bounds that
depend on the row of the batch alone (prefixes, lengths), equality of document ids, and conjunctions; disjunctions where
both sides begin at key 0 or both end at the last. Each bound grows along the queries by its form, which is what
`BlockMask`'s intervals need; document ids do so by their origin: the tensor must be a layout's own `document_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packflex.layout import DocumentOrigin
from packflex.masks.intervals import document_intervals
from packflex.mods.evaluate import evaluate
from packflex.mods.lifted import Lifted
from packflex.mods.nodes import Node

_FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq"}


@dataclass(frozen=True)
class Intervals:
    """int32 [2, B, Q_LEN] and [2, B, KV_LEN] as `BlockMask` takes them, and its hint for tiles."""

    kv_intervals: Tensor
    q_intervals: Tensor
    long_spans: bool


@dataclass(frozen=True)
class _Interval:
    """`lo <= kv < hi` for each [B, Q] (or what broadcasts to it); None for no bound."""

    lo: Tensor | None = None
    hi: Tensor | None = None


class _UnrecognisedError(Exception):
    pass


def recognised_intervals(lifted: Lifted, shape: tuple[int, int, int, int], device: torch.device) -> Intervals | None:
    """The intervals of a mask over (B, H, Q_LEN, KV_LEN), or None when its program does not show any."""
    out = lifted.program.out
    if not out.deps or "h" in out.deps:
        return None
    reader = _Reader(lifted, shape, device)
    try:
        interval = reader.interval(out)
    except _UnrecognisedError:
        return None
    batch, _, q_len, kv_len = shape
    zero = torch.zeros((batch, q_len), dtype=torch.int64, device=device)
    lo = zero if interval.lo is None else (zero + interval.lo).clamp(0, kv_len)
    hi = zero + kv_len if interval.hi is None else (zero + interval.hi).clamp(0, kv_len)
    lo = torch.minimum(lo, hi)  # rows that see nothing, in a padded tail above all, end where the last key does
    keys = torch.arange(kv_len, device=device).expand(batch, kv_len).contiguous()
    # both bounds grow: the queries that see a key are those whose `hi` is past it and whose `lo` is not
    q_lo = torch.searchsorted(hi.contiguous(), keys, right=True)
    q_hi = torch.searchsorted(lo.contiguous(), keys, right=True)
    long = reader.layout is None and interval.lo is None and kv_len >= 2048
    if reader.layout is not None and not torch.compiler.is_compiling() and reader.layout.num_tokens:
        long = reader.layout.sum_squared_lengths / reader.layout.num_tokens / 2 >= 1024
    q_intervals = torch.stack([q_lo, torch.maximum(q_lo, q_hi)]).to(torch.int32)
    return Intervals(torch.stack([lo, hi]).to(torch.int32), q_intervals, long)


class _Reader:
    """Reads intervals off a program's nodes."""

    def __init__(self, lifted: Lifted, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self.lifted = lifted
        self.shape = shape
        self.device = device
        self.layout: DocumentOrigin | None = None

    def interval(self, node: Node) -> _Interval:
        """The interval that a bool node stands for."""
        if node.op == "and":
            return self._conjunction(_terms(node))
        if node.op == "or":
            left, right = (self.interval(arg) for arg in node.args)
            if left.lo is None and right.lo is None:
                return _Interval(None, _joined(torch.maximum, left.hi, right.hi))
            if left.hi is None and right.hi is None:
                return _Interval(_joined(torch.minimum, left.lo, right.lo), None)
            raise _UnrecognisedError
        return self._conjunction([node])

    def _conjunction(self, terms: list[Node]) -> _Interval:
        documents = {slot for term in terms if (slot := _same_document(term)) is not None}
        real_slots = {_real_document(term, self.lifted.numbers) for term in terms}
        lo: Tensor | None = None
        hi: Tensor | None = None
        for term in terms:
            real = _real_document(term, self.lifted.numbers)
            if real is not None and real in documents:
                continue  # part of the documents' own interval
            if (slot := _same_document(term)) is not None:
                found = self._document(slot, slot in real_slots)
            elif term.op in ("or", "and"):
                found = self.interval(term)
            else:
                found = self._comparison(term)
            lo = found.lo if lo is None else lo if found.lo is None else torch.maximum(lo, found.lo)
            hi = found.hi if hi is None else hi if found.hi is None else torch.minimum(hi, found.hi)
        return _Interval(lo, hi)

    def _document(self, slot: int, real_only: bool) -> _Interval:
        ids = self.lifted.captures[slot]
        layout: DocumentOrigin | None = getattr(ids, "packflex_documents", None)
        batch, _, q_len, kv_len = self.shape
        if layout is None or layout.version != ids._version or ids.device != self.device:
            raise _UnrecognisedError
        if (batch, q_len, kv_len) != (*ids.shape, layout.seq_len):
            raise _UnrecognisedError
        self.layout = layout
        bounds = document_intervals(layout.cu_seqlens, layout.row_offsets, None, layout.seq_len, False, 0).long()
        lo, hi = bounds[0], bounds[1]
        if not real_only:  # padding sees padding: its ids are equal too
            hi = torch.where(hi > lo, hi, torch.where(lo < kv_len, kv_len, hi))
        return _Interval(lo, hi)

    def _comparison(self, node: Node) -> _Interval:
        if node.op not in _FLIPPED:
            raise _UnrecognisedError
        left, right = node.args
        if left.is_float or right.is_float:
            raise _UnrecognisedError
        op = node.op
        if right.op == "abs":
            left, right, op = right, left, _FLIPPED[op]
        if left.op == "abs" and op in ("lt", "le"):
            q, kv, rest = self._linear(left.args[0])
            _, other, limit = self._linear(right)
            if other or self._linear(right)[0]:
                raise _UnrecognisedError
            above = self._bound(op, q, kv, rest - limit)
            below = self._bound(_FLIPPED[op], q, kv, rest + limit)
            return _Interval(
                _joined(torch.maximum, above.lo, below.lo, keep=True),
                _joined(torch.minimum, above.hi, below.hi, keep=True),
            )
        a, b = self._linear(left), self._linear(right)
        return self._bound(op, a[0] - b[0], a[1] - b[1], a[2] - b[2])

    def _bound(self, op: str, q: int, kv: int, rest: Tensor) -> _Interval:
        """`q * q_idx + kv * kv_idx + rest OP 0`, solved for kv_idx."""
        if kv == -1:
            q, rest, op = -q, -rest, _FLIPPED[op]
        elif kv != 1:
            raise _UnrecognisedError
        if -q < 0:  # the bound would fall along the queries
            raise _UnrecognisedError
        queries = torch.arange(self.shape[2], device=self.device)
        bound = -q * queries - rest  # kv_idx OP bound
        return {
            "lt": _Interval(None, bound), "le": _Interval(None, bound + 1), "gt": _Interval(bound + 1, None),
            "ge": _Interval(bound, None), "eq": _Interval(bound, bound + 1),
        }[op]  # fmt: skip

    def _linear(self, node: Node) -> tuple[int, int, Tensor]:
        """(a, c, rest) when the node is a * q_idx + c * kv_idx + rest, with rest [B, 1] or a single number."""
        if node.deps <= {"b"}:
            b = torch.arange(self.shape[0], device=self.device, dtype=torch.int32)[:, None]
            lifted = self.lifted
            (value,) = evaluate([node], {"b": b}, lifted.captures, lifted.numbers)
            return 0, 0, value.to(torch.int64)
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        if node.op == "input" and node.value in ("q", "kv"):
            return (1, 0, zero) if node.value == "q" else (0, 1, zero)
        if node.op == "cast" and not node.is_float and node.dtype in (torch.int32, torch.int64):
            return self._linear(node.args[0])
        if node.op == "neg":
            a, c, rest = self._linear(node.args[0])
            return -a, -c, -rest
        if node.op in ("add", "sub"):
            (a, c, rest), (d, e, other) = (self._linear(arg) for arg in node.args)
            sign = 1 if node.op == "add" else -1
            return a + sign * d, c + sign * e, rest + sign * other
        raise _UnrecognisedError


def _terms(node: Node) -> list[Node]:
    if node.op != "and":
        return [node]
    return [term for arg in node.args for term in _terms(arg)]


def _joined(function: object, x: Tensor | None, y: Tensor | None, keep: bool = False) -> Tensor | None:
    """The function of two bounds; None, no bound, swallows the other unless `keep`."""
    if x is None or y is None:
        return (x if y is None else y) if keep else None
    return function(x, y)  # type: ignore[operator]


def _same_document(node: Node) -> int | None:
    """The slot of the ids when the node is `ids[b, q_idx] == ids[b, kv_idx]`."""
    if node.op != "eq" or any(arg.op != "read" for arg in node.args):
        return None
    left, right = node.args
    if left.value != right.value or len(left.args) != 2:
        return None
    names = {tuple(index.value for index in arg.args if index.op == "input") for arg in (left, right)}
    return left.value if names == {("b", "q"), ("b", "kv")} else None


def _real_document(node: Node, numbers: list[float | int]) -> int | None:
    """The slot of the ids when the node is `ids[b, q_idx] >= 0`, or the same of kv_idx."""
    if node.op != "ge" or node.args[0].op != "read" or node.args[1].op not in ("scalar", "constant"):
        return None
    read = node.args[0]
    names = [index.value for index in read.args if index.op == "input"]
    if len(read.args) != 2 or names not in (["b", "q"], ["b", "kv"]):
        return None
    limit = node.args[1].value if node.args[1].op == "constant" else numbers[node.args[1].value]
    return read.value if limit == 0 else None
