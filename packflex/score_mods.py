"""Common `score_mod`s, with torch's signature `score_mod(score, b, h, q_idx, kv_idx) -> score`.

Each function here returns a plain closure over its arguments, for packflex's `flex_attention` and for torch's. Tensors
among the arguments may require a gradient, and must be on the device of query. The score that comes in is scaled, and
the one that goes out is in natural units: softmax takes exp of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

__all__ = [
    "absolute_bias",
    "alibi",
    "alibi_slopes",
    "compose",
    "distance_penalty",
    "head_gate",
    "relative_bias",
    "softcap",
]


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """Slopes of `alibi`: float32 [heads], as Press et al. choose them (arXiv 2108.12409).

    8 heads have 1/2, 1/4, ..., 1/256. Heads that are no power of two take the slopes of the next smaller power, then
    every other one of the next larger: 3 heads have 1/16, 1/256 and 1/4.

    Raises:
        ValueError: a number of heads below 1.
    """
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be an integer of at least 1; got {heads!r}")
    power = 2 ** int(math.log2(heads))
    exponents = [-8 * (i + 1) / power for i in range(power)]
    exponents += [-8 * (2 * i + 1) / (2 * power) for i in range(heads - power)]
    return torch.tensor([2.0**e for e in exponents], dtype=torch.float32, device=device)


def alibi(heads: int | Tensor, device: torch.device | str | None = None) -> ScoreMod:
    """Attention with linear biases: `score - slope[h] * |q - k|` (arXiv 2108.12409).

    Args:
        heads: the number of query heads, for the paper's slopes; or slopes [Hq], which may be learned.
        device: of the paper's slopes; torch's default device when None. Slopes that are given stay where they are.

    Raises:
        ValueError: a number of heads below 1, slopes that are not [Hq].
    """
    slopes = heads if isinstance(heads, Tensor) else alibi_slopes(heads, device)
    _require_floats("slopes", slopes, ("[Hq]",), (1,))

    def alibi_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes[h] * (q_idx - kv_idx).abs()

    return alibi_score


def relative_bias(table: Tensor, max_distance: int = 128, *, bidirectional: bool = True) -> ScoreMod:
    """T5's relative position bias: `score + table[h, bucket(k - q)]` (Raffel et al., arXiv 1910.10683).

    Near distances have a bucket each, far ones share buckets that grow logarithmically up to `max_distance`. T5's own
    table is `Embedding(num_buckets, heads)`: pass `embedding.weight.T`. T5 does not scale: pass `scale=1.0`
    to `flex_attention`.

    Args:
        table: [Hq, num_buckets], may be learned.
        max_distance: from this distance on all keys share the last bucket.
        bidirectional: half of the buckets are for keys after the query (T5's encoder); otherwise those keys share
            bucket 0 with the query itself (T5's decoder).

    Raises:
        ValueError: a table of another rank, too few buckets, a `max_distance` that the near buckets reach already.
    """
    _require_floats("table", table, ("[Hq, num_buckets]",), (2,))
    half = table.shape[1] // 2
    buckets = half if bidirectional else table.shape[1]
    near = buckets // 2
    if near < 1:
        least = 4 if bidirectional else 2
        raise ValueError(
            f"table needs at least {least} buckets with bidirectional={bidirectional}; got {table.shape[1]}"
        )
    if max_distance <= near:
        raise ValueError(
            f"max_distance must be more than the {near} distances that have a bucket each; got {max_distance}"
        )
    log_range = math.log(max_distance / near)

    def relative_bias_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = (q_idx - kv_idx).abs() if bidirectional else (q_idx - kv_idx).clamp(min=0)
        # the clamp keeps log finite; near distances take the other branch of the where
        progress = torch.log(distance.clamp(min=near).float() / near) / log_range
        # A whole number of buckets at a boundary (16, 32 and 64 of T5's) must not fall below it where the device's log
        # is approximate; 1e-5 of a bucket moves no other distance.
        far = near + (progress * (buckets - near) + 1e-5).int()
        bucket = torch.where(distance < near, distance.int(), far.clamp(max=buckets - 1))
        if bidirectional:
            bucket = bucket + (kv_idx > q_idx).int() * half
        return score + table[h, bucket]

    return relative_bias_score


def softcap(cap: float | Tensor) -> ScoreMod:
    """Scores stay within `cap` of 0: `cap * tanh(score / cap)` (Gemma 2, arXiv 2408.00118).

    The `softcap=` argument of packflex's `flex_attention` does the same to the score that all mods have left.

    Args:
        cap: above 0; a number or a 0-d tensor.

    Raises:
        ValueError: a cap that is not above 0 or a tensor that is not 0-d.
    """
    if isinstance(cap, Tensor):
        _require_floats("cap", cap, ("[]",), (0,))
    elif not cap > 0:
        raise ValueError(f"cap must be above 0; got {cap}")

    def softcap_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return softcap_score


def head_gate(gate: Tensor) -> ScoreMod:
    """Each head scales its scores by a gate between 0 and 1: `score * sigmoid(gate[h])`.

    Args:
        gate: [Hq], may be learned. At -inf a head looks at all visible keys alike.

    Raises:
        ValueError: a gate that is not [Hq].
    """
    _require_floats("gate", gate, ("[Hq]",), (1,))

    def head_gate_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * torch.sigmoid(gate[h])

    return head_gate_score


def distance_penalty(strength: float | Tensor) -> ScoreMod:
    """Attention falls off with a power of the distance: `score - strength * log1p(|q - k|)` (KERPLE, arXiv 2205.09921).

    The weight of a key is divided by `(1 + |q - k|) ** strength`.

    Args:
        strength: a number, or a tensor, 0-d for all heads or [Hq], which may be learned.

    Raises:
        ValueError: a tensor of another rank.
    """
    if isinstance(strength, Tensor):
        _require_floats("strength", strength, ("[]", "[Hq]"), (0, 1))
    per_head = isinstance(strength, Tensor) and strength.dim() == 1

    def distance_penalty_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        factor = strength[h] if per_head else strength  # type: ignore[index]
        return score - factor * torch.log1p((q_idx - kv_idx).abs().float())

    return distance_penalty_score


def absolute_bias(table: Tensor) -> ScoreMod:
    """A bias read at the positions of query and key, or of the key alone.

    Args:
        table: [Hq, Q_LEN, KV_LEN], [Q_LEN, KV_LEN] for all heads, or [KV_LEN] for all heads and queries; may be
            learned. It must cover the lengths that attention is called with.

    Raises:
        ValueError: a table of another rank.
    """
    _require_floats("table", table, ("[KV_LEN]", "[Q_LEN, KV_LEN]", "[Hq, Q_LEN, KV_LEN]"), (1, 2, 3))
    rank = table.dim()

    def absolute_bias_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if rank == 1:
            return score + table[kv_idx]
        return score + (table[q_idx, kv_idx] if rank == 2 else table[h, q_idx, kv_idx])

    return absolute_bias_score


def compose(*score_mods: ScoreMod) -> ScoreMod:
    """One score_mod that applies `score_mods` from left to right.

    `compose(alibi(8), softcap(30.0))` caps the biased score.

    Raises:
        TypeError: no mods, or one that cannot be called.
    """
    if not score_mods or not all(map(callable, score_mods)):
        raise TypeError(
            f"compose takes one or more score_mods, functions of (score, b, h, q_idx, kv_idx); got {score_mods!r}"
        )

    def composed_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for mod in score_mods:
            score = mod(score, b, h, q_idx, kv_idx)
        return score

    return composed_score


def _require_floats(name: str, tensor: Tensor, shapes: tuple[str, ...], ranks: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dim() not in ranks or not tensor.is_floating_point():
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(f"{name} must be a tensor of floats {' or '.join(shapes)}; got {got}")
