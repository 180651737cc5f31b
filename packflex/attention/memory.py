"""Room for results in the memory order B, S, H, D, the order in which models produce and consume them."""

from __future__ import annotations

import torch
from torch import Tensor


def new_bshd(like: Tensor, last_dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Empty [B, H, S, last_dim], dense as [B, S, H, last_dim], in `like`'s dtype unless another is given."""
    batch, heads, length, dim = like.shape
    room = like.new_empty((batch, length, heads, dim if last_dim is None else last_dim), dtype=dtype or like.dtype)
    return room.transpose(1, 2)
