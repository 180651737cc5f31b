"""The operations that docs/masks.md lists are those that have kernel forms, of scores and of learned values."""

import itertools
import re
import warnings
from pathlib import Path

import pytest
import torch

from packflex import flex_attention
from packflex.mods import aten
from packflex.mods.errors import ModError
from packflex.mods.evaluate import evaluate
from packflex.mods.lifted import lift
from packflex.testing.mod_case import SMALL_TILES

TEXT = (Path(__file__).parents[2] / "docs/masks.md").read_text().split("\n## Operations\n")[1].split("\n## ")[0]
SPACES = {"torch.nn.functional": torch.nn.functional, "torch.special": torch.special, "torch": torch}
# By the names of aten that a user does not write, or that have another name in torch
ALIASES = {
    "clamp_min": "clamp", "clamp_max": "clamp", "sgn": "sign", "log_sigmoid_forward": "logsigmoid", "rsub": "sub",
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor", "fill": "full_like",
    "__lshift__": "bitwise_left_shift", "__rshift__": "bitwise_right_shift",
}  # fmt: skip
CONVERSIONS = {"_to_copy", "convert_element_type"}
MAKERS = {"full", "zeros", "ones", "scalar_tensor", "new_zeros", "new_ones", "new_full"}  # of no number
WITHOUT_DERIVATIVE = {"prelu", "digamma"}  # torch has no pointwise rule for it
MORE = {"full_like": (2.0,), "threshold": (0.5, 2.0)}  # arguments that are no tensors
BITWISE = {
    "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "bitwise_left_shift", "bitwise_right_shift"
}  # fmt: skip
# What torch's autograd refuses, by what has the same values and the derivative that is meant
MEANT = {
    "floor_divide": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "heaviside": lambda x, y: torch.where(x == 0, y, (x > 0).to(x.dtype)),
}
POINTS = torch.linspace(-3.03, 3.11, 48)
CPU = torch.device("cpu")


def listed():
    """(space, name) of each function in the section's lists."""
    found = []
    for bullet in re.findall(r"^- (.*?\.)$", TEXT, re.MULTILINE | re.DOTALL):
        head, names = bullet.split(": ", 1)
        space = re.match(r"`(.*?)`", head).group(1)
        found += [(space, name) for name in re.findall(r"`(.*?)`", names)]
    return found


def is_supported(function, more=()):
    """Whether some call with one, two or three numbers, floats or integers, has a kernel form."""
    for numbers in (lambda s, q, kv: (s, s * 0.5 + 1, s.abs() + 0.25), lambda s, q, kv: (q, kv + 1, q - kv)):
        for count in (1, 2, 3):

            def mod(score, b, h, q_idx, kv_idx, numbers=numbers, count=count):
                given = numbers(score, q_idx, kv_idx)[:count]
                if function is torch.where:
                    given = (given[0] > 0, *given[1:])
                return score + function(*given, *more).float()

            try:
                lift(mod, "score", torch.device("cpu"))
            except ModError:
                continue
            return True
    return False


def numbers_of(x, count, function):
    """`count` numbers that depend on x, for a function to be called with."""
    given = (x, x * 0.5 + 1.07, x.abs() * 0.75 + 0.25)[:count]
    return (given[0] > 0, *given[1:]) if function is torch.where else given


def calls(function, x, more=()):
    """How many tensors the function takes of those numbers, by torch's own word."""
    for count in (1, 2, 3):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = function(*numbers_of(x, count, function), *more)
        except (TypeError, RuntimeError):
            continue
        if isinstance(result, torch.Tensor):  # torch.where of a condition alone is another function
            yield count


def derived(value, x):
    """d(sum of value) / dx, 0 where it does not depend on x."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def traced(operation, of):
    """(value, gradient) of `operation` of the score or of a learned number, by its program in float64."""
    table = POINTS.clone()[None].requires_grad_()

    def mod(score, b, h, q_idx, kv_idx):
        return operation(score if of == "score" else table[h, kv_idx]).float()

    lifted = lift(mod, "score", CPU)
    program = lifted.program
    zero = torch.zeros(1, dtype=torch.int32)
    inputs = {"b": zero, "h": zero, "q": zero, "kv": torch.arange(len(POINTS), dtype=torch.int32)}
    inputs |= {"score": POINTS.double(), "grad": torch.ones(len(POINTS), dtype=torch.float64)}
    roots = [program.out, program.grad_score, *(g.value for g in program.gradients)]
    with torch.no_grad():
        value, grad_score, *grads = evaluate(roots, inputs, lifted.captures, lifted.numbers, torch.float64)
    grad = grad_score if of == "score" else sum(grads, torch.zeros(()))
    return value.expand(len(POINTS)), grad.expand(len(POINTS)).double()


def check(operation, of, meant=None):
    x = POINTS.double().requires_grad_()
    value = (meant or operation)(x).double()
    found, grad = traced(operation, of)
    torch.testing.assert_close(found, value.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad, derived(value, x), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("of", ["score", "learned"])
@pytest.mark.parametrize(("space", "name"), [pair for pair in listed() if pair[1] not in BITWISE])
def test_what_is_listed_is_differentiated_as_torch_does(space, name, of):
    function, more = getattr(SPACES[space], name), MORE.get(name, ())
    counts = list(calls(function, POINTS.double(), more))
    assert counts
    for count in counts:
        meant = MEANT.get(name, function)
        check(
            lambda x, count=count: function(*numbers_of(x, count, function), *more), of,
            lambda x, count=count, meant=meant: meant(*numbers_of(x, count, function), *more),
        )  # fmt: skip


OPERATORS = {
    "x + 2": lambda x: x + 2, "2 - x": lambda x: 2 - x, "x * 1.5": lambda x: x * 1.5, "x / 3": lambda x: x / 3,
    "1.5 / x": lambda x: 1.5 / x, "x % 0.25": lambda x: x % 0.26, "x ** 3": lambda x: x**3, "2 ** x": lambda x: 2**x,
    "abs": abs, "-x": lambda x: -x, "x < 1": lambda x: x < 1, "(x < 1) & (x > 0)": lambda x: (x < 1) & (x > 0),
    "(x < 1) | ~(x > 0)": lambda x: (x < 1) | ~(x > 0), "(x < 1) ^ (x > 0)": lambda x: (x < 1) ^ (x > 0),
    "int": lambda x: x.int(), "bool": lambda x: x.bool(),
}  # fmt: skip
OPERATORS_MEANT = {
    "x // 0.26": (lambda x: x // 0.26, lambda x: torch.div(x, 0.26, rounding_mode="floor")),
    "x // 2": (lambda x: x // 2, lambda x: torch.div(x, 2, rounding_mode="floor")),
    "1.0 // x": (lambda x: 1.0 // x, lambda x: torch.div(torch.ones_like(x), x, rounding_mode="floor")),
    "2 // x": (lambda x: 2 // x, lambda x: torch.div(2 * torch.ones_like(x), x, rounding_mode="floor")),
    "1.0 % x": (lambda x: 1.0 % x, lambda x: 1 - (1 / x).floor().detach() * x),
    "remainder(2, x)": (lambda x: torch.remainder(2, x), lambda x: 2 - (2 / x).floor().detach() * x),
    "x //= 0.26": (lambda x: x.clone().floor_divide_(0.26), lambda x: torch.div(x, 0.26, rounding_mode="floor")),
}


@pytest.mark.parametrize("of", ["score", "learned"])
@pytest.mark.parametrize("text", [*OPERATORS, *OPERATORS_MEANT])
def test_operators_are_differentiated_as_torch_does(text, of):
    check(*((OPERATORS[text], of) if text in OPERATORS else (OPERATORS_MEANT[text][0], of, OPERATORS_MEANT[text][1])))


@pytest.mark.parametrize("of", ["score", "learned"])
@pytest.mark.parametrize("name", sorted(BITWISE))
def test_operations_of_bits_are_of_integers(name, of):
    function = getattr(torch, name)
    count = 1 if name == "bitwise_not" else 2
    check(lambda x: function(*((x * 8).int(), (x.abs() * 2).int())[:count]), of)
    with pytest.raises(ModError, match=rf"test_operations.py:\d+.*{name}"):
        traced(lambda x: function(*numbers_of(x, count, function)), of)


@pytest.mark.parametrize("of", ["score", "learned"])
@pytest.mark.parametrize("operation", [
    lambda x: torch.lgamma(x.abs() * 4 + 0.1), lambda x: torch.lgamma(x - 0.3), torch.nn.functional.hardshrink,
    torch.nn.functional.softshrink, lambda x: torch.sgn(x) * x, lambda x: torch.heaviside(x, x) + x,
    lambda x: x // 0.26 + x, lambda x: 1.0 // (x.abs() + 0.3) + x, lambda x: 1.0 % (x.abs() + 0.3),
], ids=itertools.count())  # fmt: skip
def test_kernels_of_what_torch_does_not_derive(operation, of):
    """Against the reference, whose operations the tests above compare with torch's."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 2, 20, 16, generator=generator) for _ in range(3)]
    learned = torch.randn(2, 20, generator=generator)

    def run(backend):
        q, k, v, table = (x.clone().requires_grad_() for x in (*leaves, learned))

        def mod(score, b, h, q_idx, kv_idx):
            return operation(score) if of == "score" else score + operation(table[h, kv_idx])

        options = SMALL_TILES if backend == "triton" else None
        out = flex_attention(q, k, v, score_mod=mod, backend=backend, kernel_options=options)
        out.square().sum().backward()
        return [out.detach(), q.grad, k.grad, v.grad, *([table.grad] if of == "learned" else [])]

    for found, exact in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_digamma_is_that_of_torch():
    """Of numbers that need no gradient, where digamma is no derivative."""
    table = torch.cat([torch.linspace(-5.3, 12.0, 60), torch.tensor([0.0, -3.0, 1e-6, 1e6])])
    one = torch.ones(1, 1, 1, 16)

    def known(x):  # a softmax passes over NaN
        return torch.where(torch.isnan(x), 99.0, x)

    for i in range(len(table)):

        def mod(score, b, h, q_idx, kv_idx, i=i):
            return known(torch.digamma(table[kv_idx + i]))

        _, lse = flex_attention(one, one, one, score_mod=mod, return_lse=True, backend="triton")
        torch.testing.assert_close(lse.reshape(()), known(torch.digamma(table[i])), rtol=2e-5, atol=2e-6)


def test_the_lists_are_read():
    assert len(listed()) > 100
    assert len(set(listed())) == len(listed())


@pytest.mark.parametrize("space", SPACES)
def test_what_is_listed_has_a_kernel_form(space):
    names = [name for of, name in listed() if of == space]
    assert names
    assert [name for name in names if not is_supported(getattr(SPACES[space], name), MORE.get(name, ()))] == []


def test_what_has_a_kernel_form_is_listed():
    names = {name for _, name in listed()}
    known = (aten._KEPT | aten._UNMARKED) - aten.IDENTITIES - CONVERSIONS - MAKERS - WITHOUT_DERIVATIVE
    assert {ALIASES.get(name, name) for name in known} - names == set()


@pytest.mark.parametrize("name", ["prelu", "erfinv", "i0", "nextafter", "igamma", "softmax", "cumsum", "rand_like"])
def test_what_has_none_is_not_listed(name):
    assert not is_supported(getattr(torch, name, None) or getattr(torch.nn.functional, name))
    assert name not in {name for _, name in listed()}
