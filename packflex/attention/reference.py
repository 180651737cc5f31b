"""The eager backend: exact, in fp32 (fp64 for fp64 inputs), and the CPU path.

For interval masks (documents, windows, prefixes) rows of queries are taken in chunks that end with a document or after
`MAX_CHUNK` queries, and each chunk meets only the keys that it can see: work and memory follow the documents, never
S x S. Any other mask, and any `score_mod`, is computed densely by `dense_attention`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from packflex.attention.memory import new_bshd
from packflex.masks.block_mask import MaskMod
from packflex.mods.bounds import check_elements, named
from packflex.mods.evaluate import OutOfBoundsError, evaluate
from packflex.mods.lifted import lift
from packflex.mods.nodes import INDICES
from packflex.mods.vectorised import over_indices

MAX_CHUNK = 512

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Chunk(NamedTuple):
    """Queries `q0:q1` of row `b`, and the keys `k0:k1` that at least one of them sees."""

    b: int
    q0: int
    q1: int
    k0: int
    k1: int


def attention_chunks(kv_intervals: Tensor, max_chunk: int = MAX_CHUNK) -> list[Chunk]:
    """Cut rows of queries where no later query sees an earlier key; skip queries that see nothing.

    Args:
        kv_intervals: int32 [2, B, S], half-open, both bounds growing along S.
        max_chunk: most queries of a chunk.
    """
    lo, hi = kv_intervals.cpu().numpy()
    chunks = []
    for b in range(lo.shape[0]):
        seeing = np.flatnonzero(hi[b] > lo[b])
        if not len(seeing):
            continue
        begin, end = int(seeing[0]), int(seeing[-1]) + 1
        cuts = np.flatnonzero(hi[b, begin : end - 1] <= lo[b, begin + 1 : end]) + begin + 1
        bounds = [begin, *cuts.tolist(), end]
        for start, stop in itertools.pairwise(bounds):
            for q0 in range(start, stop, max_chunk):
                q1 = min(q0 + max_chunk, stop)
                k0, k1 = int(lo[b, q0]), int(hi[b, q1 - 1])
                if k1 > k0:
                    chunks.append(Chunk(b, q0, q1, k0, k1))
    return chunks


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(x: Tensor, chunk_rows: slice, b: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, Hq, S, D] to the chunk's [Hkv, G, rows, D] in the computing dtype."""
    return x[b, :, chunk_rows].to(dtype).unflatten(0, (kv_heads, -1))


def _visible(kv_intervals: Tensor, chunk: Chunk) -> Tensor | None:
    """bool [rows, keys] of a chunk, or None when every query sees every key."""
    lo, hi = kv_intervals[:, chunk.b, chunk.q0 : chunk.q1, None]
    keys = torch.arange(chunk.k0, chunk.k1, device=lo.device)
    visible = (keys >= lo) & (keys < hi)
    return None if bool(visible.all()) else visible


def reference_forward(
    q: Tensor, k: Tensor, v: Tensor, kv_intervals: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Forward of interval attention.

    Args:
        q: [B, Hq, S, D]; k: [B, Hkv, KV, D]; v: [B, Hkv, KV, Dv]; Hq a multiple of Hkv.
        kv_intervals: int32 [2, B, S].
        sinks: [Hq] or None, a logit of each head that takes part in the softmax and carries no value.
        scale: factor on the scores.
        softcap: `softcap * tanh(score / softcap)` when above 0.

    Returns:
        out [B, Hq, S, Dv] in q's dtype, lse [B, Hq, S] float32 (float64 for fp64), natural log, sink included. Queries
        that see nothing have out 0 and lse -inf.
    """
    dtype = _compute_dtype(q.dtype)
    kv_heads = k.shape[1]
    out = new_bshd(q, v.shape[3]).zero_()
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for chunk in attention_chunks(kv_intervals):
        rows, keys = slice(chunk.q0, chunk.q1), slice(chunk.k0, chunk.k1)
        k_c, v_c = (x[chunk.b, :, None, keys].to(dtype) for x in (k, v))
        scores, _ = _chunk_scores(_grouped(q, rows, chunk.b, kv_heads, dtype), k_c, kv_intervals, chunk, scale, softcap)
        lse_c = torch.logsumexp(scores, -1)
        if sinks is not None:
            seeing = lse_c > -torch.inf
            with_sink = torch.logaddexp(lse_c, sinks.to(dtype).view(kv_heads, -1, 1))
            lse_c = torch.where(seeing, with_sink, lse_c)
        shift = lse_c.masked_fill(lse_c == -torch.inf, 0)
        out[chunk.b, :, rows] = ((scores - shift[..., None]).exp() @ v_c).flatten(0, 1).to(out.dtype)
        lse[chunk.b, :, rows] = lse_c.flatten(0, 1)
    return out, lse


def reference_max_scores(q: Tensor, k: Tensor, kv_intervals: Tensor, scale: float, softcap: float) -> Tensor:
    """The largest score of each query [B, Hq, S], -inf where it sees nothing; arguments as `reference_forward`."""
    dtype = _compute_dtype(q.dtype)
    found = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for chunk in attention_chunks(kv_intervals):
        rows, keys = slice(chunk.q0, chunk.q1), slice(chunk.k0, chunk.k1)
        q_c, k_c = _grouped(q, rows, chunk.b, k.shape[1], dtype), k[chunk.b, :, None, keys].to(dtype)
        scores, _ = _chunk_scores(q_c, k_c, kv_intervals, chunk, scale, softcap)
        found[chunk.b, :, rows] = scores.amax(-1).flatten(0, 1)
    return found


def _chunk_scores(
    q_c: Tensor, k_c: Tensor, kv_intervals: Tensor, chunk: Chunk, scale: float, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """Scores [Hkv, G, rows, keys] with -inf where hidden, and d(score)/d(scaled product) when there is a softcap."""
    scores = (q_c @ k_c.transpose(-1, -2)) * scale
    slope = None
    if softcap:
        squashed = torch.tanh(scores / softcap)
        slope = 1 - squashed * squashed
        scores = softcap * squashed
    visible = _visible(kv_intervals, chunk)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores, slope


def reference_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_intervals: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `reference_forward` to q, k, v and the sinks, from its results and the gradients of both.

    With P = exp(score - lse) and delta = sum(grad_out * out) - grad_lse:
    dV = P^T grad_out, dS = P * (grad_out V^T - delta), dQ = scale dS K, dK = scale dS^T Q,
    dsink = -sum exp(sink - lse) delta.
    """
    dtype = _compute_dtype(q.dtype)
    kv_heads = k.shape[1]
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype)
    grad_q, grad_k, grad_v = (new_bshd(x, dtype=dtype).zero_() for x in (q, k, v))
    for chunk in attention_chunks(kv_intervals):
        b, rows, keys = chunk.b, slice(chunk.q0, chunk.q1), slice(chunk.k0, chunk.k1)
        q_c, do_c = (_grouped(x, rows, b, kv_heads, dtype) for x in (q, grad_out))
        k_c, v_c = (x[b, :, None, keys].to(dtype) for x in (k, v))
        lse_c, delta_c = (x[b, :, rows].unflatten(0, (kv_heads, -1))[..., None] for x in (lse, delta))
        scores, slope = _chunk_scores(q_c, k_c, kv_intervals, chunk, scale, softcap)
        p = (scores - lse_c.masked_fill(lse_c == -torch.inf, 0)).exp()
        ds = p * (do_c @ v_c.transpose(-1, -2) - delta_c)
        if slope is not None:
            ds = ds * slope
        grad_v[b, :, keys] += (p.transpose(-1, -2) @ do_c).sum(1)
        grad_k[b, :, keys] += (ds.transpose(-1, -2) @ q_c).sum(1) * scale
        grad_q[b, :, rows] = ((ds @ k_c) * scale).flatten(0, 1)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), sink_gradient(sinks, lse, delta)


def sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """Gradient of the sinks [Hq] from lse and delta [B, Hq, S]; queries that see nothing give none."""
    if sinks is None:
        return None
    share = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse)
    return torch.where(lse > -torch.inf, -share * delta, 0).sum((0, 2)).to(sinks.dtype)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_mod: MaskMod | None,
    score_mod: ScoreMod | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attention through the whole [B, Hq, Q_LEN, KV_LEN] score matrix, differentiable by autograd.

    Arguments and results as `reference_forward`; `mask_mod` and `score_mod` in torch's sense, `score_mod` on the scaled
    score and before the softcap.
    """
    dtype = _compute_dtype(q.dtype)
    scores = _dense_scores(q, k, mask_mod, score_mod, scale, softcap)
    v_all = v.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    top = scores.amax(-1, keepdim=True).detach()
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    seeing = total > 0
    if sinks is not None:
        sink = sinks.to(dtype).view(1, -1, 1, 1)
        total = total + torch.where(seeing, (sink - top).exp(), 0)
    total = torch.where(seeing, total, 1)
    lse = torch.where(seeing, total.log() + top, -torch.inf)[..., 0]
    return ((weights / total) @ v_all).to(q.dtype), lse


def dense_max_scores(
    q: Tensor, k: Tensor, mask_mod: MaskMod | None, score_mod: ScoreMod | None, scale: float, softcap: float
) -> Tensor:
    """As `reference_max_scores`, through the whole score matrix; arguments as `dense_attention`."""
    return _dense_scores(q, k, mask_mod, score_mod, scale, softcap).amax(-1)


def _dense_scores(
    q: Tensor, k: Tensor, mask_mod: MaskMod | None, score_mod: ScoreMod | None, scale: float, softcap: float
) -> Tensor:
    """Scores [B, Hq, Q_LEN, KV_LEN], -inf where hidden."""
    dtype = _compute_dtype(q.dtype)
    k_all = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.to(dtype) @ k_all.transpose(-1, -2)) * scale
    indices = [torch.arange(n, device=q.device, dtype=torch.int32) for n in scores.shape]
    seen = None if mask_mod is None else _over(mask_mod, "mask", dtype, None, indices)
    if score_mod is not None:
        scores = _over(score_mod, "score", dtype, scores, indices, seen).to(dtype).expand_as(scores)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def _over(
    mod: Callable[..., Tensor],
    kind: str,
    dtype: torch.dtype,
    scores: Tensor | None,
    indices: list[Tensor],
    seen: Tensor | None = None,
) -> Tensor:
    """A mod over whole index vectors, by its traced program; by `torch.vmap` where torch.compile does the tracing."""
    if torch.compiler.is_compiling():
        return over_indices(mod, scored=scores is not None)(*([] if scores is None else [scores]), *indices)
    lifted = lift(mod, kind, indices[0].device)
    if all(map(len, indices)):
        check_elements(mod, lifted, indices[0].device)
    shapes = ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
    inputs = {name: x.view(shape) for name, x, shape in zip(INDICES, indices, shapes, strict=True)}
    if scores is not None:
        inputs["score"] = scores
    everywhere = torch.ones((), dtype=torch.bool, device=indices[0].device)
    arguments = (lifted.captures, lifted.numbers, dtype)
    try:
        if scores is None or seen is None:
            return evaluate([lifted.program.out], inputs, *arguments, everywhere if seen is None else seen)[0]
        with torch.no_grad():  # for its checks of what a kernel reads
            evaluate([lifted.program.out], inputs, *arguments, seen)
    except OutOfBoundsError as error:
        raise named(error, mod, lifted, indices[0].device) from None
    # visible elements alone: of others a mod may have no derivative, and 0 times NaN would reach what it captures
    visible = seen.expand_as(scores).nonzero(as_tuple=True)
    inputs = {name: x.to(torch.int32) for name, x in zip(INDICES, visible, strict=True)} | {"score": scores[visible]}
    values = evaluate([lifted.program.out], inputs, *arguments)[0].to(dtype)
    return torch.full_like(scores, -torch.inf).index_put(visible, values.expand(len(visible[0])))
