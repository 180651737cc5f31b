"""A mod of single indices over index vectors, by `torch.vmap`: for graphs that torch.compile traces itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex


def over_indices(mod: Callable[..., Tensor], scored: bool = False) -> Callable[..., Tensor]:
    """A mod of single indices over index vectors: [B], [H], [Q], [KV] to [B, H, Q, KV].

    With `scored` the mod's first argument is a score, and the result takes scores [B, H, Q, KV] before the vectors.
    """
    over = mod
    for axis in (3, 2, 1, 0):
        in_dims = tuple(0 if i == axis else None for i in range(4))
        over = torch.vmap(over, in_dims=(0, *in_dims) if scored else in_dims)

    def evaluate(*arguments: Tensor) -> Tensor:
        with TransformGetItemToIndex():  # lets a captured tensor be read at a vmapped index, as torch's own does
            return over(*arguments)

    return evaluate
