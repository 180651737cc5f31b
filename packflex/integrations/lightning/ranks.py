"""What callbacks ask the other ranks."""

from __future__ import annotations

from typing import Any

import torch


def gathered(value: Any, ranks: int) -> list[Any]:
    """Every rank's value, in their order; the value alone where there is one rank, or no process group."""
    if ranks == 1 or not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(values, value)
    return values
