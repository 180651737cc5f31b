"""Programs rewritten for tiles: the same values, and fewer operations an element."""

import pytest
import torch

from packflex import masks
from packflex.mods.evaluate import evaluate
from packflex.mods.lifted import lift
from packflex.mods.nodes import ordered
from packflex.mods.rewrite import LOG2_E, for_tiles, in_log2, in_product_units, with_split_distances

Q_LEN, KV_LEN, BLOCK = 37, 53, 8
FAR = 2**31 - 1
LIMITS = torch.arange(Q_LEN, dtype=torch.int32) * 5 % 23


def _with(**numbers):
    """Masks of one number each, where the code has no literals."""
    n = next(iter(numbers.values()))
    return {
        "least": lambda b, h, q, kv: (q - kv >= n) & (kv >= 2),
        "past": lambda b, h, q, kv: (q - kv > n) & (q >= kv),
        "most": lambda b, h, q, kv: (n >= q - kv) & (q >= kv),
        "ahead": lambda b, h, q, kv: (kv - q < n) & (kv - q >= -3),
        "congruent": lambda b, h, q, kv: ((q - kv) % 5 == n) & (q >= kv),
        "incongruent": lambda b, h, q, kv: (kv - q) % 5 != n,
    }[next(iter(numbers))]


CASES = {
    "dilated": masks.dilated_window(6, 3),
    "strided": masks.strided(7, 3),
    "global_window": masks.or_masks(masks.global_tokens(4), masks.sliding_window(9)),
    "natten": masks.natten_2d(5, 9, 3),
    "table": lambda b, h, q, kv: (kv < LIMITS[q]) & (kv > q - 30) & (kv % 3 != 1),
    "table of keys": lambda b, h, q, kv: (q >= LIMITS[kv % Q_LEN]) & (kv <= q) & (kv > 3),
    "remainder in sums": lambda b, h, q, kv: ((q - kv) % 7 + kv) % 2 == 0,
    "two intervals": lambda b, h, q, kv: ((kv >= 3) & (kv < 9)) | ((kv <= q) & (q - kv < 4)),
    "keys alone": lambda b, h, q, kv: kv < 11,
    "one window at both ends": lambda b, h, q, kv: ((q - kv).abs() < 5) & (kv >= 2) & (kv < 40),
} | {
    f"{kind} {n}": _with(**{kind: n})
    for kind in ("least", "past", "most", "ahead", "congruent", "incongruent")
    for n in (-FAR, -7, -1, 0, 2, 4, 5, 9, FAR)
}  # fmt: skip


def _inputs(walked):
    q, kv = torch.arange(Q_LEN, dtype=torch.int32)[:, None], torch.arange(KV_LEN + 9, dtype=torch.int32)[None, :]
    if walked == "q":
        q, kv = torch.arange(Q_LEN + 9, dtype=torch.int32)[:, None], torch.arange(KV_LEN, dtype=torch.int32)[None, :]
    zero = torch.zeros((), dtype=torch.int32)
    x = kv if walked == "kv" else q
    end = torch.tensor(KV_LEN if walked == "kv" else Q_LEN, dtype=torch.int32)
    return {
        "b": zero,
        "h": zero,
        "q": q,
        "kv": kv,
        "block": x // BLOCK * BLOCK,
        "offset": x % BLOCK,
        "end": end,
        "place": x,
    }


@pytest.mark.parametrize("walked", ["kv", "q"])
@pytest.mark.parametrize("name", CASES)
def test_a_mask_for_tiles_sees_the_same(name, walked):
    lifted = lift(CASES[name], "mask", torch.device("cpu"))
    tiled = for_tiles(lifted.program, walked)
    inputs = _inputs(walked)
    inside = (inputs["q"] < Q_LEN) & (inputs["kv"] < KV_LEN)
    if any(node.op == "read" for node in ordered([lifted.program.out])):
        inputs |= {"q": inputs["q"].clamp(max=Q_LEN - 1), "kv": inputs["kv"].clamp(max=KV_LEN - 1)}
    (whole,) = evaluate([lifted.program.out], inputs, lifted.captures, lifted.numbers)
    (found,) = evaluate([tiled.program.out], inputs, lifted.captures, lifted.numbers)
    whole, found = (x.expand(inside.shape) for x in (whole, found))
    assert torch.equal(found & inside, whole & inside)
    if tiled.least is not None:
        assert not (found & ~inside).any()
        least, end = evaluate([tiled.least, tiled.end], inputs, lifted.captures, lifted.numbers)
        assert not (found & ((inputs[walked] < least) | (inputs[walked] >= end))).any()


@pytest.mark.parametrize(("name", "most"), [("dilated", 3), ("strided", 6), ("global_window", 3)])
@pytest.mark.parametrize("walked", ["kv", "q"])
def test_few_operations_an_element_are_left(name, most, walked):
    program = lift(CASES[name], "mask", torch.device("cpu")).program
    walks = {walked, "offset", "place"}

    def count(out):
        return sum(bool(node.deps & walks) and bool(node.deps - walks - {"end", "block"}) for node in ordered([out]))

    tiled = for_tiles(program, walked)
    assert count(tiled.program.out) <= most < count(program.out)


def test_what_is_bounded_says_so():
    device = torch.device("cpu")
    assert for_tiles(lift(CASES["dilated"], "mask", device).program, "kv").least is not None
    assert for_tiles(lift(CASES["global_window"], "mask", device).program, "kv").least is None


def test_an_added_bias_is_in_log2_units():
    slopes, table = torch.rand(4), torch.rand(4, Q_LEN, KV_LEN)

    def mod(score, b, h, q, kv):
        return score - slopes[h] * (q - kv).abs() * 0.5 + table[h, q, kv]

    lifted = lift(mod, "score", torch.device("cpu"))
    scaled = in_log2(lifted.program)
    assert scaled is not None
    inputs = _inputs("kv")
    inputs |= {"kv": inputs["kv"].clamp(max=KV_LEN - 1), "h": torch.tensor(2), "score": torch.randn(Q_LEN, KV_LEN + 9)}
    (natural,) = evaluate([lifted.program.out], inputs, lifted.captures, lifted.numbers)
    inputs["score"] = inputs["score"] * LOG2_E
    (found,) = evaluate([scaled.out], inputs, lifted.captures, lifted.numbers)
    torch.testing.assert_close(found, natural * LOG2_E)
    less = in_log2(lifted.program, less=True)
    assert less is not None
    inputs["lse"] = torch.randn(Q_LEN, 1)
    (found,) = evaluate([less.out], inputs, lifted.captures, lifted.numbers)
    torch.testing.assert_close(found, natural * LOG2_E - inputs["lse"])


@pytest.mark.parametrize(
    "mod",
    [
        lambda score, b, h, q, kv: score * 2 + q,
        lambda score, b, h, q, kv: q - score,
        lambda score, b, h, q, kv: torch.where(q >= kv, score, -1.0),
        lambda score, b, h, q, kv: score + score,
        lambda score, b, h, q, kv: score,
    ],
)
def test_other_mods_keep_natural_units(mod):
    assert in_log2(lift(mod, "score", torch.device("cpu")).program) is None


SLOPES = torch.rand(4)
TABLE = torch.rand(4, Q_LEN, KV_LEN)
HOMOGENEOUS = {
    "sum": lambda score, b, h, q, kv: score - SLOPES[h] * (q - kv).abs() * 0.5 + TABLE[h, q, kv],
    "sum to the right": lambda score, b, h, q, kv: 3.0 - score,
    "gate": lambda score, b, h, q, kv: score * torch.sigmoid(SLOPES[h]) / 1.5,
    "gate and bias": lambda score, b, h, q, kv: -(SLOPES[h] * (score + 0.1 * (kv - q))),
    "where": lambda score, b, h, q, kv: torch.where(q >= kv, score + SLOPES[h], -1.0),
    "logarithm": lambda score, b, h, q, kv: score - 0.2 * torch.log1p((q - kv).abs().float()),
    "twice": lambda score, b, h, q, kv: score + score * 0.5,
}
LOWEST = {
    "lowest times a mask": lambda score, b, h, q, kv: (
        score + (1.0 - (q >= kv).float()) * torch.finfo(torch.bfloat16).min
    ),
    "lowest of a table": lambda score, b, h, q, kv: score + (q < kv) * (SLOPES[h] - 2.9e38),
    "where": lambda score, b, h, q, kv: torch.where(q >= kv, score, torch.finfo(torch.float32).min),
    "minus infinity": lambda score, b, h, q, kv: score + torch.where(q >= kv, 0.0, -torch.inf),
}


def _values(lifted, roots, **more):
    inputs = _inputs("kv") | {"h": torch.tensor(2)} | more
    inputs["kv"] = inputs["kv"].clamp(max=KV_LEN - 1)
    return evaluate(roots, inputs, lifted.captures, lifted.numbers)


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_a_homogeneous_mod_takes_products(name):
    lifted = lift(HOMOGENEOUS[name], "score", torch.device("cpu"))
    products = in_product_units(lifted.program)
    assert products is not None
    scale, product = 0.125, torch.randn(Q_LEN, KV_LEN + 9)
    (score,) = _values(lifted, [lifted.program.out], score=product * scale)
    (found,) = _values(lifted, [products.out], score=product, unit=torch.tensor(1 / scale))
    torch.testing.assert_close(found * scale, score)


@pytest.mark.parametrize(
    "mod",
    [
        lambda score, b, h, q, kv: 20.0 * torch.tanh(score / 20.0),
        lambda score, b, h, q, kv: score * score,
        lambda score, b, h, q, kv: 1.0 / score,
        lambda score, b, h, q, kv: torch.where(score > 0, score, 0.1 * score),
        lambda score, b, h, q, kv: 0.0 * q,
    ],
)
def test_other_mods_take_scores(mod):
    assert in_product_units(lift(mod, "score", torch.device("cpu")).program) is None


@pytest.mark.parametrize("name", LOWEST)
def test_the_lowest_numbers_hide_in_other_units_too(name):
    lifted = lift(LOWEST[name], "score", torch.device("cpu"))
    product = torch.randn(Q_LEN, KV_LEN + 9)
    (score,) = _values(lifted, [lifted.program.out], score=product * 0.0883)
    inputs = _inputs("kv")
    seen = inputs["q"] >= inputs["kv"].clamp(max=KV_LEN - 1)
    for program, given, unit in (
        (in_product_units(lifted.program), product, 0.0883),
        (in_log2(lifted.program), product * 0.0883 * LOG2_E, 1 / LOG2_E),
    ):
        if program is None:  # a selection adds to no score
            assert name == "where"
            continue
        (found,) = _values(lifted, [program.out], score=given, unit=torch.tensor(1 / unit))
        torch.testing.assert_close((found * unit)[seen], score[seen])
        assert (found[~seen] < -1e37).all()


@pytest.mark.parametrize("walked", ["q", "kv"])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_distances_of_two_parts_are_the_same(name, heads, walked):
    """Parts as the Hopper kernels make them of a block's columns, `heads` for each index."""
    lifted = lift(HOMOGENEOUS[name], "score", torch.device("cpu"))
    split = with_split_distances(lifted.program, walked)
    index = torch.arange(Q_LEN)[:, None] if walked == "q" else torch.arange(KV_LEN + 9).clamp(max=KV_LEN - 1)[None]
    length = 64 // heads
    start, column = index // length * length, index % length * heads
    parts = {"near": (start + (column & 6) // heads).float(), "far": ((column & ~6) // heads).float()}
    assert torch.equal(parts["near"] + parts["far"], index.float())
    score = torch.randn(Q_LEN, KV_LEN + 9)
    (expected,) = _values(lifted, [lifted.program.out], score=score)
    (found,) = _values(lifted, [split.out], score=score, **parts)
    assert torch.equal(found, expected)
    distances = [node for node in ordered([lifted.program.out]) if node.op == "sub" and node.args[0].op == "cast"]
    used = {node.value for node in ordered([split.out]) if node.op == "input"} & {"near", "far"}
    assert used == ({"near", "far"} if distances else set())
