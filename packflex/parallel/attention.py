"""Attention of a rank's queries over its own keys and those that the mask needs from other ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from packflex.attention import flex_attention
from packflex.parallel.layout import ShardedLayout


def sharded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ShardedLayout,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """As `flex_attention` with `document_mask` over the whole batch, for the queries of one rank.

    Every rank must call it for the same layers in the same order. Where no document is split nothing is sent; else only
    keys and values that some query of another rank sees, in one exchange forward and one backward.

    Args:
        query: [1, Hq, S, D], S being `layout.seq_len`.
        key: [1, Hkv, S, D].
        value: [1, Hkv, S, Dv].
        layout: the rank's part of the batch, its `group` set.
        causal, window: as in `document_mask`.
        scale, softcap, sinks, backend: as in `flex_attention`.

    Returns:
        [1, Hq, S, Dv].

    Raises:
        ValueError: tensors of another shape, or a layout without a process group that needs one.
    """
    if query.shape[0] != 1 or query.shape[2] != layout.seq_len or key.shape[2] != layout.seq_len:
        raise ValueError(
            f"a sharded batch is one row of {layout.seq_len} tokens; got query {tuple(query.shape)} and key "
            f"{tuple(key.shape)}"
        )
    plan = layout.exchange(causal, window)
    if plan.moves:
        if layout.group is None:
            raise ValueError(
                "documents are split over ranks and the layout has no process group: set packed.group, or use the "
                "ContextParallel callback"
            )
        dim = key.shape[3]
        own = torch.cat([key, value], 3)[0].transpose(0, 1)  # [S, Hkv, D + Dv]
        sent = own.index_select(0, plan.send_index)
        received = _AllToAll.apply(sent, plan.send_counts, plan.receive_counts, layout.group)
        seen = torch.cat([own, received]).index_select(0, plan.gather).transpose(0, 1)[None]
        key, value = seen[..., :dim], seen[..., dim:]
    else:
        key, value = (x.index_select(2, plan.gather) for x in (key, value))
    return flex_attention(
        query,
        key,
        value,
        block_mask=plan.mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        softcap=softcap,
        sinks=sinks,
        backend=backend,
    )


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks they go to; gradients come back the same way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_counts: tuple[int, ...], receive_counts: tuple[int, ...], group: Any
    ) -> Tensor:
        ctx.send_counts, ctx.receive_counts, ctx.group = send_counts, receive_counts, group
        return _all_to_all(rows, send_counts, receive_counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad, ctx.receive_counts, ctx.send_counts, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send_counts: tuple[int, ...], receive_counts: tuple[int, ...], group: Any) -> Tensor:
    out = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), list(receive_counts), list(send_counts), group=group)
    return out
