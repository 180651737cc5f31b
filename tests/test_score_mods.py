"""Score mods against loops over their definitions, and against the models that they come from."""

import math
import re

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

import packflex
from packflex import flex_attention, score_mods
from packflex.mods.vectorised import over_indices

B, H, Q, K = 2, 3, 11, 13
SLOPES = torch.tensor([0.5, 0.25, 1.5])
GATE = torch.tensor([-1.0, 0.0, 2.0])


def scores():
    return torch.randn(B, H, Q, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def table(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def applied(mod, score):
    return over_indices(mod, scored=True)(score, *map(torch.arange, score.shape))


def looped(definition):
    """The definition on one score at a time, in Python's numbers."""
    score = scores()
    for index in torch.cartesian_prod(*map(torch.arange, score.shape)).tolist():
        score[tuple(index)] = definition(score[tuple(index)].item(), *index)
    return score


BIAS_K, BIAS_QK, BIAS_HQK = table(K), table(Q, K), table(H, Q, K)
DEFINITIONS = {
    "alibi": (score_mods.alibi(SLOPES), lambda s, b, h, q, k: s - SLOPES[h].item() * abs(q - k)),
    "alibi-heads": (score_mods.alibi(H), lambda s, b, h, q, k: s - (1 / 16, 1 / 256, 1 / 4)[h] * abs(q - k)),
    "softcap": (score_mods.softcap(2.5), lambda s, b, h, q, k: 2.5 * math.tanh(s / 2.5)),
    "softcap-tensor": (score_mods.softcap(torch.tensor(2.5)), lambda s, b, h, q, k: 2.5 * math.tanh(s / 2.5)),
    "head_gate": (score_mods.head_gate(GATE), lambda s, b, h, q, k: s / (1 + math.exp(-GATE[h].item()))),
    "distance_penalty": (score_mods.distance_penalty(0.7), lambda s, b, h, q, k: s - 0.7 * math.log(1 + abs(q - k))),
    "distance_penalty-heads": (
        score_mods.distance_penalty(SLOPES),
        lambda s, b, h, q, k: s - SLOPES[h].item() * math.log(1 + abs(q - k)),
    ),
    "absolute_bias-k": (score_mods.absolute_bias(BIAS_K), lambda s, b, h, q, k: s + BIAS_K[k].item()),
    "absolute_bias-qk": (score_mods.absolute_bias(BIAS_QK), lambda s, b, h, q, k: s + BIAS_QK[q, k].item()),
    "absolute_bias-hqk": (score_mods.absolute_bias(BIAS_HQK), lambda s, b, h, q, k: s + BIAS_HQK[h, q, k].item()),
    "compose": (
        score_mods.compose(score_mods.absolute_bias(BIAS_K), score_mods.softcap(2.0), score_mods.head_gate(GATE)),
        lambda s, b, h, q, k: 2 * math.tanh((s + BIAS_K[k].item()) / 2) / (1 + math.exp(-GATE[h].item())),
    ),
    "compose-one": (score_mods.compose(score_mods.softcap(2.0)), lambda s, b, h, q, k: 2 * math.tanh(s / 2)),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_score_mod_equals_its_definition(name):
    mod, definition = DEFINITIONS[name]
    torch.testing.assert_close(applied(mod, scores()), looped(definition), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 16, 20, 31])
def test_alibi_slopes_are_those_of_bloom(heads):
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]  # the bias of key 1 is the slope
    torch.testing.assert_close(score_mods.alibi_slopes(heads), theirs, rtol=1e-6, atol=0)


def test_alibi_slopes_of_the_paper():
    assert score_mods.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (64, 256), (16, 64), (32, 1000), (6, 20), (320, 800)])
def test_relative_bias_takes_the_buckets_of_t5(buckets, max_distance, bidirectional):
    """Over all distances to 1100 in both directions; each entry of the table is its own index, so the bias shows it."""
    number = torch.arange(buckets, dtype=torch.float32)
    mod = score_mods.relative_bias(torch.stack([number, -number]), max_distance, bidirectional=bidirectional)
    q, k = torch.tensor([0, 550, 1100]), torch.arange(1101)
    evaluate = over_indices(mod, scored=True)
    ours = evaluate(torch.zeros(1, 2, 3, 1101), torch.arange(1), torch.arange(2), q, k)[0]
    theirs = T5Attention._relative_position_bucket(k[None] - q[:, None], bidirectional, buckets, max_distance)
    assert torch.equal(ours[0].long(), theirs)
    assert torch.equal(ours[1], -ours[0])
    assert len(theirs.unique()) > buckets // 2, "the distances must reach most of the buckets"


def test_relative_bias_is_safe_of_rounding_at_the_boundaries():
    """A log that is wrong in the last places must not move a distance into another bucket."""
    table_of_buckets = torch.arange(32, dtype=torch.float32)[None]
    mod = score_mods.relative_bias(table_of_buckets)
    distances = torch.tensor([15, 16, 31, 32, 63, 64, 127, 128])
    zero = torch.tensor(0)
    log = torch.log
    for error in (0.0, 4e-7, -4e-7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "log", lambda x, error=error: log(x) + error)
            ours = torch.stack([mod(torch.tensor(0.0), zero, zero, d, zero) for d in distances])
        assert ours.tolist() == [9, 10, 11, 12, 13, 14, 15, 15]


def test_gradients_reach_the_captured_tensors():
    """Through attention, against the same bias added by hand."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, 9, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    captured = [table(H).double(), table(H, 8, seed=2).double(), table(H).double(), table(9, 9, seed=3).double()]
    captured = [x.requires_grad_() for x in captured]
    slopes, buckets, gate, bias = captured
    distance = torch.arange(9)[:, None] - torch.arange(9)
    bucket = T5Attention._relative_position_bucket(-distance, True, 8, 20)

    mod = score_mods.compose(
        score_mods.alibi(slopes),
        score_mods.relative_bias(buckets, 20),
        score_mods.head_gate(gate),
        score_mods.absolute_bias(bias),
    )
    ours = flex_attention(q, k, v, score_mod=mod, backend="reference")
    score = q @ k.mT / 2
    score = score - slopes[:, None, None] * distance.abs() + buckets[:, bucket]
    theirs = (score * gate.sigmoid()[:, None, None] + bias).softmax(-1) @ v
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad(out, captured, weight) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 1e-3


def test_a_gate_learns_and_a_strength_learns():
    strength, cap = torch.tensor(0.5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    mod = score_mods.compose(score_mods.distance_penalty(strength), score_mods.softcap(cap))
    score = torch.tensor(4.0)
    mod(score, *map(torch.tensor, (0, 0, 4, 1))).backward()
    inner = 4 - 0.5 * math.log(4)
    slope = 1 - math.tanh(inner / 2) ** 2
    assert strength.grad.item() == pytest.approx(-math.log(4) * slope)
    assert cap.grad.item() == pytest.approx(math.tanh(inner / 2) - inner / 2 * slope)


def test_the_module_is_a_public_name():
    assert packflex.score_mods is score_mods
    assert "score_mods" in packflex.__all__


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: score_mods.alibi(0), ValueError, "heads must be an integer of at least 1; got 0"),
        (lambda: score_mods.alibi(torch.ones(2, 2)), ValueError, "slopes must be a tensor of floats [Hq]; got"),
        (lambda: score_mods.alibi(torch.ones(2).int()), ValueError, "got torch.int32 [2]"),
        (lambda: score_mods.softcap(0), ValueError, "cap must be above 0; got 0"),
        (lambda: score_mods.softcap(float("nan")), ValueError, "cap must be above 0; got nan"),
        (lambda: score_mods.softcap(torch.ones(3)), ValueError, "cap must be a tensor of floats []; got"),
        (lambda: score_mods.head_gate(0.5), ValueError, "gate must be a tensor of floats [Hq]; got 0.5"),
        (lambda: score_mods.distance_penalty(torch.ones(2, 3)), ValueError, "floats [] or [Hq]; got"),
        (lambda: score_mods.absolute_bias(torch.ones(1, 1, 1, 1)), ValueError, "[KV_LEN] or [Q_LEN, KV_LEN] or [Hq,"),
        (lambda: score_mods.relative_bias(torch.ones(32)), ValueError, "must be a tensor of floats [Hq, num_buckets]"),
        (lambda: score_mods.relative_bias(torch.ones(1, 3)), ValueError, "at least 4 buckets with bidirectional=True"),
        (lambda: score_mods.relative_bias(torch.ones(1, 32), 8), ValueError, "more than the 8 distances"),
        (lambda: score_mods.compose(), TypeError, "compose takes one or more score_mods"),
        (lambda: score_mods.compose(3), TypeError, "compose takes one or more score_mods"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
