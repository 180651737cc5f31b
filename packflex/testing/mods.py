"""The mods that packflex is tried on: `mod_cases()`, each as a user writes it.

One function makes one case. Names of the indices are short here: `q` and `kv` for q_idx and kv_idx.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from packflex import masks, score_mods
from packflex.masks import BlockMask, document_mask
from packflex.masks.block_mask import lists_of_tiles
from packflex.testing.mod_case import Maker, ModCase, Mods
from packflex.testing.oracle import dense_document_mask

_CASES: dict[str, ModCase] = {}


def mod_cases() -> list[ModCase]:
    """All cases."""
    return list(_CASES.values())


def _case(name: str, **shape: Any) -> Callable[[Callable[[Maker], Mods]], Callable[[Maker], Mods]]:
    def register(make: Callable[[Maker], Mods]) -> Callable[[Maker], Mods]:
        assert name not in _CASES
        _CASES[name] = ModCase(name, make, **shape)
        return make

    return register


# The library's score mods, each against its formula


@_case("alibi", heads=3, kv_heads=1)
def _alibi(m):
    exponents = torch.tensor({3: [4.0, 8.0, 2.0], 6: [2.0, 4.0, 6.0, 8.0, 1.0, 3.0]}[m.heads])
    return Mods(
        score_mods.alibi(m.heads, m.device),
        formula=lambda score, b, h, q, kv: score - 2.0 ** -exponents[h] * (q - kv).abs(),
    )


@_case("alibi-learned", heads=4)
def _alibi_learned(m):
    slopes = m.floats(m.heads, size=0.3)
    return Mods(
        score_mods.alibi(slopes),
        None,
        {"slopes": slopes},
        formula=lambda s, b, h, q, kv: s - slopes[h] * (q - kv).abs(),
    )


def _t5_bucket(distance, buckets, furthest):
    near = buckets // 2
    edges = [near * (furthest / near) ** (i / (buckets - near)) for i in range(1, buckets - near)]
    far = near + sum((distance >= edge - 1e-6).long() for edge in edges)
    return torch.where(distance < near, distance, far)


@_case("t5-encoder", heads=4)
def _t5_encoder(m):
    table = m.floats(m.heads, 12)
    return Mods(
        score_mods.relative_bias(table, 40),
        captured={"table": table},
        formula=lambda s, b, h, q, kv: s + table[h, _t5_bucket((q - kv).abs(), 6, 40) + 6 * (kv > q).long()],
    )


@_case("t5-decoder", heads=4, q_len=77)
def _t5_decoder(m):
    table = m.floats(m.heads, 9)
    return Mods(
        score_mods.relative_bias(table, 33, bidirectional=False),
        masks.causal,
        {"table": table},
        formula=lambda s, b, h, q, kv: s + table[h, _t5_bucket((q - kv).clamp(min=0), 9, 33)],
    )


@_case("softcap", heads=3, kv_heads=3)
def _softcap(m):
    return Mods(score_mods.softcap(1.5), masks.causal, formula=lambda s, b, h, q, kv: 1.5 * torch.tanh(s / 1.5))


@_case("softcap-learned")
def _softcap_learned(m):
    cap = m.floats(grad=False).abs().add(0.5).requires_grad_()
    return Mods(
        score_mods.softcap(cap), captured={"cap": cap}, formula=lambda s, b, h, q, kv: cap * torch.tanh(s / cap)
    )


@_case("head-gate", heads=4, kv_heads=2)
def _head_gate(m):
    gate = m.floats(m.heads)
    return Mods(
        score_mods.head_gate(gate),
        masks.causal,
        {"gate": gate},
        formula=lambda s, b, h, q, kv: s / (1 + (-gate[h]).exp()),
    )


@_case("distance-penalty", q_len=111)
def _distance_penalty(m):
    return Mods(
        score_mods.distance_penalty(0.7), formula=lambda s, b, h, q, kv: s - 0.7 * torch.log(1.0 + (q - kv).abs())
    )


@_case("distance-penalty-learned", heads=3, kv_heads=1)
def _distance_penalty_learned(m):
    strength = m.floats(m.heads)
    return Mods(
        score_mods.distance_penalty(strength),
        masks.sliding_window(20),
        {"strength": strength},
        formula=lambda s, b, h, q, kv: s - strength[h] * torch.log(1.0 + (q - kv).abs()),
    )


@_case("bias-k", kv_len=77)
def _bias_k(m):
    table = m.floats(m.kv_len)
    return Mods(score_mods.absolute_bias(table), None, {"table": table}, formula=lambda s, b, h, q, kv: s + table[kv])


@_case("bias-qk")
def _bias_qk(m):
    table = m.floats(m.q_len, m.kv_len)
    return Mods(
        score_mods.absolute_bias(table), masks.causal, {"table": table}, formula=lambda s, b, h, q, kv: s + table[q, kv]
    )


@_case("bias-hqk", rows=((3, 20), (30,)), q_len=37, kv_len=63)
def _bias_hqk(m):
    table = m.floats(m.heads, m.q_len, m.kv_len)
    return Mods(
        score_mods.absolute_bias(table), None, {"table": table}, formula=lambda s, b, h, q, kv: s + table[h, q, kv]
    )


@_case("composed", heads=4)
def _composed(m):
    slopes, gate = m.floats(m.heads, size=0.2), m.floats(m.heads)
    return Mods(
        score_mods.compose(score_mods.alibi(slopes), score_mods.softcap(3.0), score_mods.head_gate(gate)),
        masks.causal,
        {"slopes": slopes, "gate": gate},
        formula=lambda s, b, h, q, kv: 3 * torch.tanh((s - slopes[h] * (q - kv).abs()) / 3) / (1 + (-gate[h]).exp()),
    )


# What is read: several tensors, one tensor twice, indices of all kinds


@_case("per-document-bias")
def _per_document_bias(m):
    ids, bias = m.layout.document_ids, m.floats(m.heads, 8)
    return Mods(lambda score, b, h, q, kv: score + bias[h, ids[b, kv]], masks.causal, {"bias": bias})


@_case("per-document-scale")
def _per_document_scale(m):
    ids, scale = m.layout.document_ids, m.floats(8)
    return Mods(
        lambda score, b, h, q, kv: score * scale[ids[b, q]],
        captured={"scale": scale},
        block_mask=lambda: document_mask(m.layout),
        seen=dense_document_mask(m.layout)[:, None] if m.exact else None,
    )


@_case("two-tables", heads=3, kv_heads=3)
def _two_tables(m):
    left, right = m.floats(m.heads, m.q_len), m.floats(m.heads, m.kv_len)
    return Mods(lambda score, b, h, q, kv: score + left[h, q] * right[h, kv], None, {"left": left, "right": right})


@_case("three-captures", heads=4)
def _three_captures(m):
    gate, bias, slope = m.floats(m.heads), m.floats(m.kv_len), m.floats(m.batch, m.heads, size=0.1)

    def mod(score, b, h, q, kv):
        return score * torch.exp(0.3 * gate[h]) + bias[kv] - slope[b, h] * (q - kv).abs()

    return Mods(mod, masks.causal, {"gate": gate, "bias": bias, "slope": slope})


@_case("one-tensor-twice")
def _one_tensor_twice(m):
    table = m.floats(m.heads, max(m.q_len, m.kv_len))
    return Mods(lambda score, b, h, q, kv: score + table[h, q] * table[h, kv], masks.causal, {"table": table})


@_case("one-tensor-thrice", heads=3, kv_heads=1)
def _one_tensor_thrice(m):
    table = m.floats(m.batch, 5)

    def mod(score, b, h, q, kv):
        return score * table[b, q % 5] + table[b, kv % 5] + torch.sin(table[b, (q + kv) % 5])

    return Mods(mod, None, {"table": table})


@_case("index-through-index")
def _index_through_index(m):
    ids, kinds, table = m.layout.document_ids, m.integers(0, 4, 6, m.kv_len), m.floats(6, 4)
    return Mods(
        lambda score, b, h, q, kv: score + table[ids[b, q] + 1, kinds[ids[b, q] + 1, kv]], None, {"table": table}
    )


@_case("index-by-score-and-key")
def _index_by_score_and_key(m):
    table = m.floats(m.kv_len, 2, size=0.1)  # what rounding puts on the other side weighs little
    return Mods(lambda score, b, h, q, kv: score + table[kv, (score > 0.25).int()], masks.causal, {"table": table})


@_case("index-by-score", heads=4)
def _index_by_score(m):
    table = m.floats(m.heads + 1, size=0.1)
    return Mods(lambda score, b, h, q, kv: score + table[(score > 0.25).int() + h], None, {"table": table})


@_case("index-arithmetic", heads=4)
def _index_arithmetic(m):
    table = m.floats(m.heads, 16)
    return Mods(lambda score, b, h, q, kv: score + table[h, (q - kv).abs().clamp(max=15)], None, {"table": table})


@_case("negative-index", heads=4)
def _negative_index(m):
    table = m.floats(m.heads, m.kv_len)
    return Mods(lambda score, b, h, q, kv: score + table[h, kv - q - 1], masks.causal, {"table": table})


@_case("basic-indices")
def _basic_indices(m):
    table, other = m.floats(3, m.heads, m.kv_len), m.floats(m.heads, 2, m.kv_len)

    def mod(score, b, h, q, kv):
        return score + table[1][h, kv] * table[-1, h, ..., kv] + other[:, 1, 3:][h][kv // 2] - other[h, 0][kv]

    def formula(score, b, h, q, kv):
        return score + table[1, h, kv] * table[2, h, kv] + other[h, 1, 3 + kv // 2] - other[h, 0, kv]

    return Mods(mod, None, {"table": table, "other": other}, formula=formula)


@_case("strided-captures")
def _strided_captures(m):
    wide, tall, row = m.floats(m.kv_len, 2 * m.heads), m.floats(2 * m.kv_len), m.floats(m.kv_len)
    turned, sparse, spread = wide.T, tall[::2], row.expand(m.heads, m.kv_len)

    def mod(score, b, h, q, kv):
        return score + turned[h, kv] + sparse[kv] * spread[h, q.clamp(max=30)]

    return Mods(mod, masks.causal, {"wide": wide, "tall": tall, "row": row})


@_case("made-inside")
def _made_inside(m):
    gate, table = m.floats(m.heads), m.floats(m.kv_len, m.heads)

    def mod(score, b, h, q, kv):
        return score * torch.sigmoid(gate)[h] + table.T.contiguous()[h, kv] + (2 * gate - 1)[h] * (kv == q)

    return Mods(mod, None, {"gate": gate, "table": table})


# What types they have


def _integer_capture(m, dtype):
    low = 0 if dtype == torch.uint8 else -3
    weights, table = m.integers(low, 4, m.heads, m.kv_len, dtype=dtype), m.floats(7)
    kinds = m.integers(0, 7, m.q_len, dtype=dtype)

    def mod(score, b, h, q, kv):
        return score * (1 + 0.2 * weights[h, kv]) + table[kinds[q].int()] * (kv - 5 * weights[h, kv] > q)

    return Mods(mod, None, {"table": table})


for _dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
    _case(f"capture-{_dtype}".replace("torch.", ""))(functools.partial(_integer_capture, dtype=_dtype))


@_case("small-integers-wrap")
def _small_integers_wrap(m):
    signed, unsigned = (
        m.integers(-128, 128, m.kv_len, dtype=torch.int8),
        m.integers(0, 256, m.kv_len, dtype=torch.uint8),
    )

    def mod(score, b, h, q, kv):
        return score + 0.01 * (signed[kv] * 3) - 0.01 * (unsigned[kv] - 40) + 0.01 * (signed[kv] + signed[q])

    return Mods(mod)


@_case("capture-bool")
def _capture_bool(m):
    flags, loud = m.bools(m.batch, m.kv_len), m.floats(m.heads)

    def mod(score, b, h, q, kv):
        return torch.where(flags[b, kv], score * loud[h], 0.5 * score) + 0.3 * flags[b, q]

    return Mods(mod, None, {"loud": loud})


def _float_capture(m, dtype):
    table, slopes = m.floats(m.heads, m.kv_len, dtype=dtype), m.floats(m.heads, dtype=dtype, size=0.1)

    def mod(score, b, h, q, kv):
        return score + table[h, kv] - slopes[h] * (q - kv)

    return Mods(mod, masks.causal, {"table": table, "slopes": slopes})


for _dtype in (torch.float16, torch.bfloat16, torch.float64):
    _case(f"capture-{_dtype}".replace("torch.", ""))(functools.partial(_float_capture, dtype=_dtype))


@_case("float64-scalars")
def _float64_scalars(m):
    third = torch.tensor(1 / 3, dtype=torch.float64)
    return Mods(lambda score, b, h, q, kv: score * third + (q - kv) * (0.1 * third) - math.pi * 1e-3 * kv, masks.causal)


@_case("python-scalars")
def _python_scalars(m):
    flag, slope, shift = True, 0.125, 7
    return Mods(
        lambda score, b, h, q, kv: (score * 2 if flag else score) - slope * (q - kv + shift).abs() + (kv == shift) * 1.5
    )


@_case("tensor-scalars")
def _tensor_scalars(m):
    """0-d tensors: on the host, on the device, of integers, of bools."""
    host, here = m.floats(grad=False, host=True), m.floats(grad=True)
    step, on = torch.tensor(3), torch.tensor(True)

    def mod(score, b, h, q, kv):
        return torch.where(on & (kv % step == 0), score * here, score) + host * ((q - kv) // step)

    return Mods(mod, masks.sliding_window(30), {"here": here})


@_case("casts")
def _casts(m):
    table = m.floats(m.kv_len)

    def mod(score, b, h, q, kv):
        steps = ((q - kv).double() / 4).to(torch.int32)
        near = (q // 8).bool()
        return (
            score.to(torch.float64) + table[kv].float() * steps.float() * 0.2 + near.int() * kv.to(torch.float32) / 50
        )

    return Mods(mod, masks.causal, {"table": table})


# What is computed


@_case("where-both-branches", heads=3, kv_heads=1)
def _where_both_branches(m):
    near, far = m.floats(m.heads), m.floats(m.kv_len)
    return Mods(
        lambda score, b, h, q, kv: torch.where(q >= kv + 3, score * near[h], score + far[kv]),
        None,
        {"near": near, "far": far},
    )


@_case("where-on-score")
def _where_on_score(m):
    leak = m.floats(m.heads)
    return Mods(lambda score, b, h, q, kv: torch.where(score > 0, score, leak[h] * score), masks.causal, {"leak": leak})


@_case("minimum-maximum-clamp")
def _minimum_maximum_clamp(m):
    floor, top = m.floats(m.heads), m.floats(m.kv_len)

    def mod(score, b, h, q, kv):
        bounded = torch.minimum(torch.maximum(score, floor[h] - 1), top[kv] + 1)
        return bounded.clamp(-1.2, 1.2) + score.clamp(min=0) - (0.1 * score).clamp_max(0.05)

    return Mods(mod, None, {"floor": floor, "top": top})


@_case("exact-quotients")
def _exact_quotients(m):
    width = m.floats(m.heads).abs() * 0 + 41

    def mod(score, b, h, q, kv):
        same = (q / 47).int() == (kv / 47).int()
        steps = ((q - kv).abs() / width[h]).floor() + ((q * q).float().sqrt().floor() - q) + (kv / 83).trunc()
        return torch.where(same, score + 0.3, score - 0.05 * steps)

    return Mods(mod, masks.causal)


@_case("functions-of-unlike-shapes")
def _functions_of_unlike_shapes(m):
    heads = m.floats(m.heads)

    def mod(score, b, h, q, kv):
        angle = torch.atan2(q * 1.0, kv + 1.0) + 0.01 * torch.hypot(kv * 1.0, q * 1.0)
        odd = torch.fmod(q * 1.0, kv + 1.0) - torch.remainder(kv * 1.0, q + 1.0)
        return score + angle + 0.01 * odd + 0.1 * (kv + 1.0) ** heads[h].abs().clamp(max=0.5)

    return Mods(mod, masks.causal, {"heads": heads})


@_case("truths-of-a-head")
def _truths_of_a_head(m):
    sign = m.floats(m.heads)

    def mod(score, b, h, q, kv):
        return torch.where((sign[h] > 0) & (q - kv > 3), score, score - 1.0) + torch.where(
            sign[h].isnan() | (kv > 9), 0.2, 0
        )

    return Mods(mod, masks.causal)


def _function(name: str, **shape: Any) -> Callable[[Any], Any]:
    """A case whose mod is a function of the score and of t = table[h, kv], a learned table."""

    def register(function):
        def make(m):
            table = m.floats(m.heads, m.kv_len)
            return Mods(lambda score, b, h, q, kv: function(score, table[h, kv]), masks.causal, {"table": table})

        _case(name, **shape)(make)
        return function

    return register


@_function("exp-log")
def _exp_log(score, t):
    return (
        torch.log(1 + torch.exp(0.5 * score)) + torch.exp2(0.3 * t) - torch.log2(3 + t * t) + torch.log10(2 + score**2)
    )


@_function("roots-and-powers")
def _roots_and_powers(score, t):
    positive = score * score + 0.5
    powers = positive**1.7 * 0.1 + positive**-0.5 + score**3 * 0.05 + t**2 - 1 / (t**4 + 1) + positive ** (0.2 * t)
    return (
        powers + torch.sqrt(positive) - torch.rsqrt(t.abs() + 1) + torch.square(t) - torch.reciprocal(positive) + 2.0**t
    )


@_function("trigonometric")
def _trigonometric(score, t):
    return torch.sin(score) + torch.cos(2 * t) + torch.tan(0.3 * score) + torch.atan(t) - torch.atan2(score, t * t + 1)


@_function("arcs")
def _arcs(score, t):
    inner = 0.9 * torch.tanh(score)
    return (
        torch.asin(inner)
        - torch.acos(0.8 * torch.sin(t))
        + torch.atanh(inner)
        + torch.asinh(t)
        + torch.acosh(1.5 + t * t)
    )


@_function("hyperbolic")
def _hyperbolic(score, t):
    return torch.tanh(score) + 0.2 * torch.sinh(t) - 0.1 * torch.cosh(0.5 * score) + torch.hypot(score, t + 3)


@_function("sigmoid-and-error-function")
def _sigmoid_and_error_function(score, t):
    return 2 * torch.sigmoid(score) + torch.erf(t) - torch.erfc(0.5 * score) + torch.special.expit(t)


@_function("log1p-expm1")
def _log1p_expm1(score, t):
    return torch.log1p(score * score) + torch.expm1(0.4 * t) + torch.log1p(0.001 * torch.sigmoid(t)) * 100


@_function("activations")
def _activations(score, t):
    f = torch.nn.functional
    return f.gelu(score) + f.silu(t) + f.softplus(score) - f.relu(t) + f.logsigmoid(score) + 0.3 * f.leaky_relu(t, 0.2)


@_function("signs-and-magnitudes")
def _signs_and_magnitudes(score, t):
    return (
        torch.abs(score)
        + torch.sign(t) * score
        - torch.neg(t)
        + torch.copysign(t, score)
        + 0.5 * torch.lerp(score, t, 0.3)
    )


@_case("rounding")
def _rounding(m):
    table = m.floats(m.heads, m.kv_len)

    def mod(score, b, h, q, kv):
        ratio = (q - kv) / 8 + 0.01
        whole = torch.floor(ratio) + torch.ceil(ratio) * 2 - torch.round(ratio) + torch.trunc(ratio) * 0.5
        return score + 0.1 * whole * table[h, kv] + torch.fmod(ratio, 1.3) - torch.remainder(ratio, 1.3)

    return Mods(mod, None, {"table": table})


@_case("integer-division", q_len=77)
def _integer_division(m):
    divisors, table = m.integers(1, 6, m.heads), m.floats(9)

    def mod(score, b, h, q, kv):
        d = q - kv
        by_tensor = d // divisors[h] + d % divisors[h] - d // -divisors[h]
        by_number = d // 7 - d % 7 + d // -5 + d % -5 + torch.div(d, 3, rounding_mode="trunc") + torch.fmod(d, 4)
        return score + 0.02 * by_tensor - 0.03 * by_number + table[(kv - q) % 9] + 1 / (1 + d % 3)

    return Mods(mod, None, {"table": table})


@_case("integer-division-64")
def _integer_division_64(m):
    offsets = m.integers(-(2**40), 2**40, m.kv_len)

    def mod(score, b, h, q, kv):
        return (
            score + 0.3 * (offsets[kv] % 5) - 0.2 * (offsets[kv] // 2**38) + 0.1 * torch.remainder(q - offsets[kv], 7)
        )

    return Mods(mod)


@_case("bits")
def _bits(m):
    codes, table = m.integers(0, 64, m.kv_len, dtype=torch.int32), m.floats(m.heads, 64)

    def mod(score, b, h, q, kv):
        mixed = (codes[kv] ^ q) & 63
        shifted = ((q << 2) | (kv & 3)) >> 1
        return score + table[h, mixed] - 0.01 * shifted + 0.01 * ~kv + 0.2 * ((kv - q) >> 2) * ((q & 1) ^ (kv & 1))

    return Mods(mod, None, {"table": table})


@_case("logic")
def _logic(m):
    flags = m.bools(m.batch, m.kv_len)

    def mod(score, b, h, q, kv):
        odd = torch.logical_xor(q % 2 == 1, flags[b, kv])
        far = torch.logical_and(q - kv > 9, torch.logical_not(flags[b, kv])) | (kv == 0)
        return torch.where(odd & ~far, score, 0.3 * score) + (odd ^ far) * 0.5 - torch.logical_or(odd, q) * 0.2

    return Mods(mod)


# What becomes of the score


@_case("sink-key")
def _sink_key(m):
    """A sink as a score_mod: key 0 stands for it, with a learned logit for each head."""
    sink = m.floats(m.heads)
    return Mods(lambda score, b, h, q, kv: torch.where(kv == 0, sink[h], score), masks.causal, {"sink": sink})


@_case("score-ignored", still=frozenset({"dq", "dk"}))
def _score_ignored(m):
    bias = m.floats(m.heads, m.kv_len)
    return Mods(lambda score, b, h, q, kv: bias[h, kv] - 0.1 * (q - kv).abs(), None, {"bias": bias})


@_case("score-constant", still=frozenset({"dq", "dk"}))
def _score_constant(m):
    return Mods(lambda score, b, h, q, kv: torch.zeros_like(score), masks.causal)


@_case("minus-infinity")
def _minus_infinity(m):
    return Mods(lambda score, b, h, q, kv: torch.where((q >= kv) & (q - kv < 20), score, float("-inf")))


@_case("minus-infinity-rows", q_len=77)
def _minus_infinity_rows(m):
    """Some queries see nothing, by the score alone."""
    slopes = m.floats(m.heads, size=0.1)

    def mod(score, b, h, q, kv):
        return torch.where((q % 5 != 3) & (kv % 3 != 1), score - slopes[h] * (q - kv).abs(), -torch.inf)

    return Mods(mod, masks.causal, {"slopes": slopes})


@_case("hidden-nan")
def _hidden_nan(m):
    """The log of a negative number, and a read out of bounds, for keys that the mask hides."""
    strength, table = m.floats(m.heads), m.floats(m.q_len)
    return Mods(
        lambda score, b, h, q, kv: score - strength[h] * torch.log((q - kv + 1).float()) + table[q - kv],
        masks.causal,
        {"strength": strength, "table": table},
    )


@_case("mod-and-softcap", softcap=1.5)
def _mod_and_softcap(m):
    bias = m.floats(m.heads, m.kv_len)
    return Mods(lambda score, b, h, q, kv: 2 * score + bias[h, kv], masks.causal, {"bias": bias})


@_case("mod-and-sinks", sinks=True, heads=3, kv_heads=1)
def _mod_and_sinks(m):
    slopes = m.floats(m.heads, size=0.1)
    return Mods(lambda score, b, h, q, kv: score - slopes[h] * (q - kv), masks.causal, {"slopes": slopes})


# How it is written


def _scaled(score, b, h, q, kv, *, factor, bias):
    return factor * score + bias[kv]


@_case("partial")
def _partial(m):
    bias = m.floats(m.kv_len)
    return Mods(functools.partial(_scaled, factor=1.7, bias=bias), None, {"bias": bias})


@_case("nested-closures")
def _nested_closures(m):
    gate = m.floats(m.heads)

    def outer(factor):
        def middle(inner):
            def mod(score, b, h, q, kv):
                return inner(score, b, h, q, kv) * factor + gate[h] * (kv < 9)

            return mod

        return middle(lambda score, b, h, q, kv: score * gate[h])

    return Mods(outer(1.5), None, {"gate": gate})


class _Bias:
    def __init__(self, table: Tensor, factor: float) -> None:
        self.table, self.factor = table, factor

    def __call__(self, score, b, h, q, kv):
        return score + self.factor * self.table[h, kv]

    def method(self, score, b, h, q, kv):
        return score - self.factor * self.table[h, kv]


@_case("callable-object")
def _callable_object(m):
    table = m.floats(m.heads, m.kv_len)
    return Mods(_Bias(table, 2.0), None, {"table": table})


@_case("bound-method")
def _bound_method(m):
    table = m.floats(m.heads, m.kv_len)
    return Mods(_Bias(table, 2.0).method, masks.causal, {"table": table})


class _Gated(nn.Module):
    def __init__(self, table: Tensor, gate: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.inner = nn.ParameterDict({"gate": nn.Parameter(gate)})

    def forward(self, score, b, h, q, kv):
        return score * torch.sigmoid(self.inner["gate"][h]) + self.table[h, (q - kv).abs() % 7]


@_case("module")
def _module(m):
    module = _Gated(m.floats(m.heads, 7, grad=False), m.floats(m.heads, grad=False))
    return Mods(module, None, dict(module.named_parameters()))


@_case("detach")
def _detach(m):
    gate, table = m.floats(m.heads), m.floats(m.kv_len)

    def mod(score, b, h, q, kv):
        held = (0.3 * score * gate[h]).detach()
        return score * gate[h].detach() + table.detach()[kv] + gate[h] * (kv < 20) + held

    return Mods(mod, masks.causal, {"gate": gate})


@_case("without-gradient")
def _without_gradient(m):
    """One captured tensor learns, the others do not."""
    bias, fixed, gate = m.floats(m.kv_len), m.floats(m.heads, m.kv_len, grad=False), m.floats(m.heads, grad=False)
    return Mods(lambda score, b, h, q, kv: score * gate[h] + bias[kv] * fixed[h, kv], None, {"bias": bias})


# Documents in four ways


@_case("documents-of-a-layout")
def _documents_of_a_layout(m):
    slopes = m.floats(m.heads, size=0.1)
    return Mods(
        lambda score, b, h, q, kv: score - slopes[h] * (q - kv),
        captured={"slopes": slopes},
        block_mask=lambda: document_mask(m.layout),
        seen=dense_document_mask(m.layout)[:, None] if m.exact else None,
    )


@_case("documents-of-a-mask")
def _documents_of_a_mask(m):
    slopes = m.floats(m.heads, size=0.1)
    return Mods(
        lambda score, b, h, q, kv: score - slopes[h] * (q - kv),
        masks.and_masks(masks.document(m.layout), masks.causal),
        {"slopes": slopes},
        seen=dense_document_mask(m.layout)[:, None] if m.exact else None,
        per_row=True,
    )


@_case("documents-of-ids")
def _documents_of_ids(m):
    """Ids that are no layout's own: nothing says that documents are contiguous."""
    slopes, ids = m.floats(m.heads, size=0.1), m.layout.document_ids.clone()
    return Mods(
        lambda score, b, h, q, kv: score - slopes[h] * (q - kv),
        lambda b, h, q, kv: (ids[b, q] == ids[b, kv]) & (q >= kv) & (ids[b, q] >= 0),
        {"slopes": slopes},
        seen=dense_document_mask(m.layout)[:, None] if m.exact else None,
        per_row=True,
    )


@_case("documents-of-a-score")
def _documents_of_a_score(m):
    slopes, ids = m.floats(m.heads, size=0.1), m.layout.document_ids

    def mod(score, b, h, q, kv):
        seen = (ids[b, q] == ids[b, kv]) & (q >= kv) & (ids[b, q] >= 0)
        return torch.where(seen, score - slopes[h] * (q - kv), float("-inf"))

    return Mods(mod, None, {"slopes": slopes}, seen=dense_document_mask(m.layout)[:, None] if m.exact else None)


# Masks, with and without a score_mod


def _mask(name: str, make: Callable[[Maker], Any], learned: bool = False, per_row: bool = False, per_head: bool = False,
          **shape: Any) -> None:  # fmt: skip
    def mods(m):
        mask_mod = make(m)
        if not learned:
            return Mods(None, mask_mod, per_row=per_row, per_head=per_head)
        table, near = m.floats(m.heads, m.kv_len), m.floats(m.heads, m.q_len, 5)

        def mod(score, b, h, q, kv):
            return score + table[h, kv] + near[h, q, (q - kv).abs().clamp(max=4)]

        return Mods(mod, mask_mod, {"table": table, "near": near}, per_row=per_row, per_head=per_head)

    _case(name, **shape)(mods)


def _per_head(m):
    return lambda b, h, q, kv: (q >= kv) & ((q - kv) % (h + 2) == 0)


def _per_batch(m):
    steps = m.integers(2, 6, m.batch)
    return lambda b, h, q, kv: ((q - kv) % steps[b] == 0) | (kv < 3)


def _random(m):
    table = m.bools(m.batch, m.q_len, m.kv_len, share=0.2)
    return lambda b, h, q, kv: table[b, q, kv]


def _random_heads(m):
    table = m.bools(m.heads, m.q_len // 8 + 1, m.kv_len // 8 + 1, share=0.4)
    return lambda b, h, q, kv: table[h, q // 8, kv // 8]


def _prefix(m):
    return masks.prefix_lm(m.integers(1, m.kv_len, m.batch))


def _lengths(m):
    lengths = m.integers(1, m.kv_len, m.batch, dtype=torch.int32)
    return lambda b, h, q, kv: (kv < lengths[b]) & (q >= kv)


def _natten(m):
    width = int(m.q_len**0.5)
    return masks.natten_2d(m.q_len // width, width, (5, 3))


def _global_window(m):
    return masks.or_masks(masks.sliding_window(12), masks.and_masks(masks.global_tokens(3), masks.causal))


_mask("mask-causal", lambda m: masks.causal, heads=3, kv_heads=1)
_mask("mask-dilated", lambda m: masks.dilated_window(6, 4), block_size=16, q_len=77)
_mask("mask-dilated-learned", lambda m: masks.dilated_window(6, 4), learned=True, block_size=32, heads=4, kv_heads=2)
_mask("mask-strided", lambda m: masks.strided(9, 4), block_size=(64, 32), q_len=111)
_mask("mask-global-window", _global_window, block_size=64, q_len=77)
_mask("mask-global-window-learned", _global_window, learned=True, block_size=16)
_mask("mask-natten", _natten, q_len=63, block_size=16)
_mask(
    "mask-per-document",
    lambda m: masks.per_document(m.layout, masks.and_masks(masks.causal, masks.global_tokens(4))),
    per_row=True,
    block_size=16,
)
_mask(
    "mask-documents-dilated",
    lambda m: masks.and_masks(masks.document(m.layout), masks.dilated_window(5, 3)),
    learned=True,
    per_row=True,
)
_mask("mask-per-head", _per_head, per_head=True, block_size=128, heads=3, kv_heads=1)
_mask("mask-per-head-learned", _per_head, learned=True, per_head=True, heads=4, kv_heads=2)
_mask("mask-per-batch", _per_batch, per_row=True, kv_len=77)
_mask("mask-prefix", _prefix, learned=True, per_row=True, heads=3, kv_heads=3)
_mask("mask-lengths", _lengths, per_row=True)
_mask("mask-random", _random, learned=True, per_row=True, rows=((3, 20), (30,)), q_len=37, kv_len=77)
_mask("mask-random-heads", _random_heads, per_head=True, block_size=16, q_len=77, kv_len=63, heads=4)
_mask(
    "length-one",
    lambda m: lambda b, h, q, kv: (q == kv) & (kv % 2 == 0),
    learned=False,
    q_len=1,
    kv_len=63,
    rows=((), ()),
)
_mask("decode", lambda m: lambda b, h, q, kv: kv % 3 != 1, learned=True, q_len=1, kv_len=111, rows=((), (1,)))


@_case("mask-of-another-library", q_len=77, kv_len=63, heads=3, kv_heads=1)
def _mask_of_another_library(m):
    """Lists whose wholly visible tiles reach past both lengths, and torch's tensors in place of ours."""
    bias, causal = m.floats(m.heads, m.kv_len), torch.ones(m.q_len, m.kv_len, dtype=torch.bool).tril(20)

    def blocks():
        rows, columns = -(-m.q_len // 32), -(-m.kv_len // 32)
        room = (0, columns * 32 - m.kv_len, 0, rows * 32 - m.q_len)
        tiles = nn.functional.pad(causal, room, value=True).unflatten(0, (rows, 32)).unflatten(2, (columns, 32))
        full = tiles.all(3).all(1)
        partial = tiles.any(3).any(1) & ~full
        lists = lists_of_tiles(partial[None, None].to(m.device), full[None, None].to(m.device))
        return BlockMask.from_kv_blocks(*lists, 32, lambda b, h, q, kv: q + 20 >= kv, (m.q_len, m.kv_len))

    return Mods(lambda score, b, h, q, kv: score + bias[h, kv], None, {"bias": bias}, blocks, seen=causal)


def larger(case: ModCase) -> ModCase:
    """The case at awkward lengths of several default tiles, with packed rows whose tails are empty."""
    _, _, q_len, kv_len = case.shape
    lengths = {63: 301, 37: 197, 1: 1}
    return dataclasses.replace(
        case,
        rows=((3, 110, 63), (111,), ()) if q_len > 1 else ((1,), (), ()),
        q_len=lengths.get(q_len, 333),
        kv_len=None if kv_len == q_len else {63: 301, 111: 1111}.get(kv_len, 417),
        head_dim=64,
    )
