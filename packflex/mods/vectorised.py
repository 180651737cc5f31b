"""A mod of single indices over index vectors, by `torch.vmap`: for graphs that torch.compile traces itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _ReadsByIndex(TorchFunctionMode):
    """`table[h, kv_idx]` under vmap, where `Tensor.__getitem__` would ask for the values of its indices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(i, Tensor) and i.dim() == 0 and not i.dtype.is_floating_point for i in index):
                return torch.ops.aten.index(args[0], list(index))
        return func(*args, **(kwargs or {}))


def over_indices(mod: Callable[..., Tensor], scored: bool = False) -> Callable[..., Tensor]:
    """A mod of single indices over index vectors: [B], [H], [Q], [KV] to [B, H, Q, KV].

    With `scored` the mod's first argument is a score, and the result takes scores [B, H, Q, KV] before the vectors.
    """
    over = mod
    for axis in (3, 2, 1, 0):
        in_dims = tuple(0 if i == axis else None for i in range(4))
        over = torch.vmap(over, in_dims=(0, *in_dims) if scored else in_dims)

    def evaluate(*arguments: Tensor) -> Tensor:
        with _ReadsByIndex():
            return over(*arguments)

    return evaluate
