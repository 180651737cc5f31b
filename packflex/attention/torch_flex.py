"""The "torch" backend: torch's own flex_attention, compiled on a GPU, with softcap and sinks on top."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from packflex.attention.reference import ScoreMod
from packflex.masks.block_mask import BlockMask


def torch_flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    score_mod: ScoreMod | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out and lse as `flex_attention` gives them; lse is empty unless `want_lse` or there are sinks."""
    mod = _with_softcap(score_mod, softcap) if softcap else score_mod
    options: dict[str, Any] = {
        "score_mod": mod,
        "block_mask": None if mask is None else mask.to_torch(),
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    flex = _flex(q.is_cuda and not torch.compiler.is_compiling())
    if not want_lse and sinks is None:
        return flex(q, k, v, **options), q.new_empty(0)
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = flex(q, k, v, **options, return_aux=AuxRequest(lse=True))
    lse = aux.lse
    if sinks is not None:
        sink = sinks.to(lse.dtype).view(1, -1, 1)
        seeing = lse > -torch.inf
        finite = torch.where(seeing, lse, 0)  # keeps -inf out of the gradients of what follows
        out = out * torch.where(seeing, torch.sigmoid(finite - sink), 0)[..., None].to(out.dtype)
        lse = torch.where(seeing, torch.logaddexp(finite, sink), -torch.inf)
    return out, lse


def _with_softcap(score_mod: ScoreMod | None, softcap: float) -> ScoreMod:
    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if score_mod is not None:
            score = score_mod(score, b, h, q_idx, kv_idx)
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _flex(compiled: bool) -> Any:
    """torch's op; outside a compiled model it is compiled here, since eager it would build the whole score matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
