"""Whether a mod reads its captured tensors within their bounds: checked eagerly, in bands of queries, on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packflex.mods.errors import ModIndexError, located, without_elements
from packflex.mods.evaluate import OutOfBoundsError, evaluate
from packflex.mods.lifted import Lifted, describe, lift
from packflex.mods.nodes import INDICES, Node, ordered

_BAND = 1 << 22  # elements evaluated at once

Scores = Callable[[int, int, slice], Tensor]


def check_reads(
    mod: Callable[..., Any],
    kind: str,
    shape: tuple[int, int, int, int],
    device: torch.device,
    mask_mod: Callable[..., Any] | None = None,
    scores: Scores | None = None,
) -> None:
    """Evaluate every read of a mod over (B, H, Q_LEN, KV_LEN), as its kernels would.

    Reads that differ from element to element count where `mask_mod` lets the key be seen, all others everywhere. Memory
    is that of a few million elements; time grows with B x H x Q_LEN x KV_LEN as far as the reads depend on them.

    Args:
        mod: a score_mod or mask_mod.
        kind: "score" or "mask".
        shape: (B, H, Q_LEN, KV_LEN).
        device: where captured tensors are.
        mask_mod: of the block mask that a score_mod runs under; None lets all be seen.
        scores: for mods that index by the score: (b, h, queries) to scores [len(queries), KV_LEN].

    Raises:
        ModIndexError: the first read past the end, with the mod's line, the index, and where it happened.
    """
    lifted = describe(mod, kind, device)
    reads = [node for node in ordered(lifted.program.roots()) if node.op == "read" and node.args]
    if not reads:
        return
    indices = [index for read in reads for index in read.args]
    deps = frozenset[str]().union(*(index.deps for index in indices))
    seen_by = None if mask_mod is None else lift(mask_mod, "mask", device)
    if seen_by is not None:
        deps |= seen_by.program.out.deps
    batch, heads, q_len, kv_len = (size if name in deps else 1 for name, size in zip(INDICES, shape, strict=True))
    if "score" in deps:
        batch, heads, q_len, kv_len = shape
    band = max(1, _BAND // kv_len)
    kv = torch.arange(kv_len, device=device, dtype=torch.int32)[None, :]
    for b in range(batch):
        for h in range(heads):
            for start in range(0, q_len, band):
                rows = slice(start, min(start + band, q_len))
                q = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int32)[:, None]
                number = [torch.tensor(i, device=device, dtype=torch.int32) for i in (b, h)]
                inputs = dict(zip(INDICES, (*number, q, kv), strict=True))
                seen = torch.ones((len(q), kv_len), dtype=torch.bool, device=device)
                if seen_by is not None:
                    seen = _value(seen_by.program.out, inputs, seen_by).expand(seen.shape)
                if "score" in deps:
                    assert scores is not None
                    inputs["score"] = scores(b, h, rows)
                _check(reads, inputs, lifted, seen)


def check_elements(mod: Callable[..., Any], lifted: Lifted, device: torch.device) -> None:
    """Refuse reads of captured tensors that have no element, which no kernel survives; `lifted` is the mod's.

    Raises:
        ModIndexError: the first such read, with the mod's line.
    """
    if all(tensor.numel() for tensor in lifted.captures):
        return
    own = describe(mod, lifted.program.kind, device)
    for node in ordered(own.program.roots()):
        if node.op == "read" and not own.captures[node.value].numel():
            shape = tuple(own.captures[node.value].shape)
            raise ModIndexError(f"{located(own.program.name, node.where)}: {without_elements(shape)}")


def _value(node: Node, inputs: dict[str, Tensor], lifted: Lifted) -> Tensor:
    return evaluate([node], inputs, lifted.captures, lifted.numbers)[0]


def _check(reads: list[Node], inputs: dict[str, Tensor], lifted: Lifted, seen: Tensor) -> None:
    try:
        evaluate(reads, inputs, lifted.captures, lifted.numbers, seen=seen)
    except OutOfBoundsError as error:
        raise _out_of_bounds(error, lifted) from None


def named(error: OutOfBoundsError, mod: Callable[..., Any], lifted: Lifted, device: torch.device) -> ModIndexError:
    """What a user is told of a read past the end that `lifted`, the interned form of `mod`, met."""
    own = describe(mod, lifted.program.kind, device)
    place = ordered(lifted.program.roots()).index(error.node)
    node = ordered(own.program.roots())[place]  # interned programs are equal node for node
    return _out_of_bounds(OutOfBoundsError(node, error.axis, error.index, error.size, error.element), own)


def _out_of_bounds(error: OutOfBoundsError, lifted: Lifted) -> ModIndexError:
    program = lifted.program
    shape = tuple(lifted.captures[error.node.value].shape)
    return ModIndexError(
        f"{program.kind}_mod {located(program.name, error.node.where)}: reads a captured tensor of shape {shape} with "
        f"index {error.index} in axis {error.axis}, which has {error.size}, {error.place()}: clamp the index, as in "
        f"i.clamp(0, {error.size - 1}), or capture a larger tensor"
    )
