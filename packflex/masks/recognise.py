"""Masks whose program shows that each query sees one interval of keys, and the formula of that interval.

Recognised are comparisons that are linear in `q_idx` and `kv_idx` (causal, windows, `abs` of a difference), bounds that
depend on the row of the batch alone (prefixes, lengths), equality of document ids, and conjunctions; disjunctions where
both sides begin at key 0 or both end at the last. Each bound grows along the queries by its form, which is what
`BlockMask`'s intervals need; document ids do so by their origin: the tensor must be a layout's own `document_ids`.

A formula is made once for a program. `recognised_intervals` evaluates it with torch on a CPU, and in one printed kernel
on a GPU (`packflex.masks.interval_kernel`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from packflex.layout import DocumentOrigin, is_on
from packflex.masks.intervals import document_intervals
from packflex.masks.kept import kept
from packflex.mods.evaluate import evaluate
from packflex.mods.lifted import PROGRAMS, Lifted
from packflex.mods.nodes import Node

_FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq"}


@dataclass(frozen=True)
class Intervals:
    """int32 [2, B, Q_LEN] and [2, B, KV_LEN] as `BlockMask` takes them, and its hint for tiles."""

    kv_intervals: Tensor
    q_intervals: Tensor
    long_spans: bool


@dataclass(frozen=True)
class Linear:
    """`q * q_idx + sum(sign * node) + plus`; the nodes depend on b alone."""

    q: int
    rest: tuple[tuple[int, Node], ...]
    plus: int = 0


@dataclass(frozen=True)
class DocumentBound:
    """First key (or, with `end`, the end of the keys) of the query's document.

    `real_only`: tokens of a padded tail see nothing; otherwise they see one another, as equal ids say.
    """

    slot: int
    end: bool
    real_only: bool


@dataclass(frozen=True)
class Joined:
    """The "max" or "min" of two bounds."""

    op: str
    first: Bound
    second: Bound


Bound = Linear | DocumentBound | Joined


@dataclass(frozen=True)
class Formula:
    """`lo <= kv_idx < hi`; None for no bound."""

    lo: Bound | None = None
    hi: Bound | None = None

    def bounds(self) -> list[Bound]:
        """Every bound in it, parts before what they are part of."""
        found: list[Bound] = []

        def walk(bound: Bound | None) -> None:
            if isinstance(bound, Joined):
                walk(bound.first)
                walk(bound.second)
            if bound is not None and bound not in found:
                found.append(bound)

        walk(self.lo)
        walk(self.hi)
        return found


class _UnrecognisedError(Exception):
    pass


def recognised_intervals(lifted: Lifted, shape: tuple[int, int, int, int], device: torch.device) -> Intervals | None:
    """The intervals of a mask over (B, H, Q_LEN, KV_LEN), or None when its program does not show any."""
    documents = _documents(lifted, shape, device)
    numbers = tuple(lifted.numbers)
    formula = interval_formula(lifted.key, numbers, tuple(documents))
    if formula is None:
        return None
    long = not documents and formula.lo is None and shape[3] >= 2048
    for origin in documents.values():
        if origin.num_tokens and not torch.compiler.is_compiling():
            long = origin.sum_squared_lengths / origin.num_tokens / 2 >= 1024

    def make() -> tuple[Tensor, Tensor]:
        if device.type == "cuda":
            from packflex.masks.interval_kernel import launch_intervals  # Triton only where it runs

            return launch_intervals(lifted, formula, documents, shape, device)
        return _by_torch(lifted, formula, documents, shape, device)

    return Intervals(*kept(lifted, device, ("intervals", shape), make), long)


def _documents(lifted: Lifted, shape: tuple[int, int, int, int], device: torch.device) -> dict[int, DocumentOrigin]:
    """The captured tensors that are a layout's own document ids, unchanged and for these lengths, by slot."""
    found = {}
    for slot, ids in enumerate(lifted.captures):
        origin: DocumentOrigin | None = getattr(ids, "packflex_documents", None)
        fits = origin is not None and (*ids.shape, origin.seq_len) == (shape[0], shape[2], shape[3])
        if origin is not None and fits and origin.version == ids._version and is_on(ids.device, device):
            found[slot] = origin
    return found


@lru_cache(maxsize=1024)
def interval_formula(key: str, numbers: tuple[float | int, ...], documents: tuple[int, ...]) -> Formula | None:
    """The formula of a program of `PROGRAMS`, or None.

    Args:
        key: of the program.
        numbers: its scalars, of which only `ids >= 0` looks at a value.
        documents: slots of captured tensors that are a layout's document ids.
    """
    out = PROGRAMS[key].out
    if out.op == "constant" and out.value:
        return Formula()
    if not out.deps or "h" in out.deps:
        return None
    try:
        return _Reader(numbers, documents).formula(out)
    except _UnrecognisedError:
        return None


class _Reader:
    """Reads formulas off a program's nodes."""

    def __init__(self, numbers: tuple[float | int, ...], documents: tuple[int, ...]) -> None:
        self.numbers = numbers
        self.documents = documents

    def formula(self, node: Node) -> Formula:
        """The formula that a bool node stands for."""
        if node.op == "and":
            return self._conjunction(_terms(node))
        if node.op == "or":
            left, right = (self.formula(arg) for arg in node.args)
            if left.lo is None and right.lo is None:
                return Formula(None, _either("max", left.hi, right.hi))
            if left.hi is None and right.hi is None:
                return Formula(_either("min", left.lo, right.lo), None)
            raise _UnrecognisedError
        return self._conjunction([node])

    def _conjunction(self, terms: list[Node]) -> Formula:
        documents = {slot for term in terms if (slot := _same_document(term)) is not None}
        real_slots = {_real_document(term, self.numbers) for term in terms}
        lo: Bound | None = None
        hi: Bound | None = None
        for term in terms:
            real = _real_document(term, self.numbers)
            if real is not None and real in documents:
                continue  # part of the documents' own interval
            if (slot := _same_document(term)) is not None:
                if slot not in self.documents:
                    raise _UnrecognisedError
                found = Formula(*(DocumentBound(slot, end, slot in real_slots) for end in (False, True)))
            elif term.op in ("or", "and"):
                found = self.formula(term)
            else:
                found = self._comparison(term)
            lo, hi = _both("max", lo, found.lo), _both("min", hi, found.hi)
        return Formula(lo, hi)

    def _comparison(self, node: Node) -> Formula:
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
            limit_q, limit_kv, limit = self._linear(right)
            if limit_q or limit_kv:
                raise _UnrecognisedError
            above = self._bound(op, q, kv, rest + _negated(limit))
            below = self._bound(_FLIPPED[op], q, kv, rest + limit)
            return Formula(_both("max", above.lo, below.lo), _both("min", above.hi, below.hi))
        a, b = self._linear(left), self._linear(right)
        return self._bound(op, a[0] - b[0], a[1] - b[1], a[2] + _negated(b[2]))

    def _bound(self, op: str, q: int, kv: int, rest: tuple[tuple[int, Node], ...]) -> Formula:
        """`q * q_idx + kv * kv_idx + rest OP 0`, solved for kv_idx."""
        if kv == -1:
            q, rest, op = -q, _negated(rest), _FLIPPED[op]
        elif kv != 1:
            raise _UnrecognisedError
        if -q < 0:  # the bound would fall along the queries
            raise _UnrecognisedError
        at, after = (Linear(-q, _negated(rest), plus) for plus in (0, 1))  # kv_idx OP at
        return {
            "lt": Formula(None, at), "le": Formula(None, after), "gt": Formula(after, None), "ge": Formula(at, None),
            "eq": Formula(at, after),
        }[op]  # fmt: skip

    def _linear(self, node: Node) -> tuple[int, int, tuple[tuple[int, Node], ...]]:
        """(a, c, rest) when the node is a * q_idx + c * kv_idx + rest, with rest of nodes of b alone."""
        if node.deps <= {"b"}:
            return 0, 0, ((1, node),)
        if node.op == "input" and node.value in ("q", "kv"):
            return (1, 0, ()) if node.value == "q" else (0, 1, ())
        if node.op == "cast" and not node.is_float and node.dtype in (torch.int32, torch.int64):
            return self._linear(node.args[0])
        if node.op == "neg":
            a, c, rest = self._linear(node.args[0])
            return -a, -c, _negated(rest)
        if node.op in ("add", "sub"):
            (a, c, rest), (d, e, other) = (self._linear(arg) for arg in node.args)
            sign = 1 if node.op == "add" else -1
            return a + sign * d, c + sign * e, rest + (other if sign > 0 else _negated(other))
        raise _UnrecognisedError


def _negated(rest: tuple[tuple[int, Node], ...]) -> tuple[tuple[int, Node], ...]:
    return tuple((-sign, node) for sign, node in rest)


def _terms(node: Node) -> list[Node]:
    if node.op != "and":
        return [node]
    return [term for arg in node.args for term in _terms(arg)]


def _both(op: str, first: Bound | None, second: Bound | None) -> Bound | None:
    """Two bounds that hold together; None is no bound."""
    if first is None or second is None:
        return second if first is None else first
    return Joined(op, first, second)


def _either(op: str, first: Bound | None, second: Bound | None) -> Bound | None:
    """Two bounds of which one holds; None, no bound, swallows the other."""
    return None if first is None or second is None else Joined(op, first, second)


def _same_document(node: Node) -> int | None:
    """The slot of the ids when the node is `ids[b, q_idx] == ids[b, kv_idx]`."""
    if node.op != "eq" or any(arg.op != "read" for arg in node.args):
        return None
    left, right = node.args
    if left.value != right.value or len(left.args) != 2:
        return None
    names = {tuple(index.value for index in arg.args if index.op == "input") for arg in (left, right)}
    return left.value if names == {("b", "q"), ("b", "kv")} else None


def _real_document(node: Node, numbers: tuple[float | int, ...]) -> int | None:
    """The slot of the ids when the node is `ids[b, q_idx] >= 0`, or the same of kv_idx."""
    if node.op != "ge" or node.args[0].op != "read" or node.args[1].op not in ("scalar", "constant"):
        return None
    read = node.args[0]
    names = [index.value for index in read.args if index.op == "input"]
    if len(read.args) != 2 or names not in (["b", "q"], ["b", "kv"]):
        return None
    limit = node.args[1].value if node.args[1].op == "constant" else numbers[node.args[1].value]
    return read.value if limit == 0 else None


def _by_torch(
    lifted: Lifted,
    formula: Formula,
    documents: dict[int, DocumentOrigin],
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """A formula's intervals of keys for each query, and of queries for each key."""
    batch, _, q_len, kv_len = shape
    rows = torch.arange(batch, device=device, dtype=torch.int32)[:, None]
    queries = torch.arange(q_len, device=device)
    spans = {
        slot: document_intervals(x.cu_seqlens, x.row_offsets, None, x.seq_len, False, 0).long()
        for slot, x in documents.items()
    }

    def value(bound: Bound) -> Tensor:
        if isinstance(bound, Joined):
            join = torch.maximum if bound.op == "max" else torch.minimum
            return join(value(bound.first), value(bound.second))
        if isinstance(bound, DocumentBound):
            begin, end = spans[bound.slot][0], spans[bound.slot][1]
            if not bound.end:
                return begin
            return end if bound.real_only else torch.where(end > begin, end, torch.where(begin < kv_len, kv_len, end))
        total = bound.q * queries + bound.plus
        for sign, node in bound.rest:
            (found,) = evaluate([node], {"b": rows}, lifted.captures, lifted.numbers)
            total = total + sign * found.to(torch.int64)
        return total

    zero = torch.zeros((batch, q_len), dtype=torch.int64, device=device)
    lo = zero if formula.lo is None else (zero + value(formula.lo)).clamp(0, kv_len)
    hi = zero + kv_len if formula.hi is None else (zero + value(formula.hi)).clamp(0, kv_len)
    lo = torch.minimum(lo, hi)  # rows that see nothing, in a padded tail above all, end where the last key does
    keys = torch.arange(kv_len, device=device).expand(batch, kv_len).contiguous()
    # both bounds grow: the queries that see a key are those whose `hi` is past it and whose `lo` is not
    # queries past the last that sees anything are no key's, and keys that none sees end where that query does
    seeing = (lo < hi[:, -1:]).sum(1, keepdim=True)
    q_lo = torch.minimum(torch.searchsorted(hi.contiguous(), keys, right=True), seeing)
    q_hi = torch.minimum(torch.searchsorted(lo.contiguous(), keys, right=True), seeing)
    q_intervals = torch.stack([q_lo, torch.maximum(q_lo, q_hi)]).to(torch.int32)
    return torch.stack([lo, hi]).to(torch.int32), q_intervals
