"""What a mod that cannot become a kernel is told: its name, its line, the operation, and the way to write it."""

import functools
import inspect
import math
import re

import numpy as np
import pytest
import torch

from packflex import create_block_mask, flex_attention
from packflex.mods.errors import ModError, ModIndexError, ModTypeError
from packflex.mods.lifted import PROGRAMS

table = torch.arange(24.0).view(4, 6) / 10
floats = torch.zeros(6)
learned = torch.zeros(6, requires_grad=True)
far = torch.zeros(6, device="meta")
waves = torch.zeros(6, dtype=torch.complex64)
flags = torch.ones(6, dtype=torch.bool)
array = np.zeros(6, dtype=np.float32)
empty = torch.randn(0, 4)
sparse = torch.eye(6).to_sparse()
WHERE = "torch.where(condition, a, b)"
LARGER = "torch.maximum(a, b), torch.minimum(a, b)"
LIST = "capture the list as a torch.tensor, read as table[h]"
LOOP = "loop to the largest number with torch.where(i < h, a, b) inside"
MATH = "torch's function of that name: torch.exp for math.exp"
SLICE = "a mod reads single elements, as table[h, kv_idx]"
THERE = "read an element that is there, or capture a larger tensor"
READS = "only reads: compute a new value instead"
ELEMENT = "read one element as table[i, j]"
NUMBERS = "a mod works on single numbers: combine them by pairs, as in torch.maximum(a, b)"
MADE = "a mod works on single numbers: make it before the mod and capture it, then read table[i]"
LISTED = "write it with the operations that docs/masks.md lists"
MANY = "of scores it cannot be written (the softmax comes after the mod); of captured tensors compute it before"
DRAWN = "draw before the mod and read what was drawn, as in torch.where(keep[h, q_idx, kv_idx], score, -torch.inf)"


# Each mod's offending line ends with "# here"


def branch_on_index(score, b, h, q_idx, kv_idx):
    if q_idx >= kv_idx:  # here
        return score
    return score * 2


def branch_on_score(score, b, h, q_idx, kv_idx):
    doubled = score * 2
    return doubled if score > 0 else score  # here


def branch_on_captured(score, b, h, q_idx, kv_idx):
    return score if flags[kv_idx] else -score  # here


def python_and(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx > 3 and kv_idx > 3, score, 0.0)  # here


def python_not(score, b, h, q_idx, kv_idx):
    return torch.where(not q_idx > 3, score, 0.0)  # here


def python_max(score, b, h, q_idx, kv_idx):
    return score + max(q_idx, kv_idx)  # here


def python_max_of_scores(score, b, h, q_idx, kv_idx):
    return max(score, table[h, kv_idx])  # here


def python_min(score, b, h, q_idx, kv_idx):
    return min(score, 2.0)  # here


def python_in(score, b, h, q_idx, kv_idx):
    return torch.where(torch.tensor(kv_idx in (1, 2)), score, 0.0)  # here


def python_math(score, b, h, q_idx, kv_idx):
    return score * math.exp(h)  # here


def python_floor(score, b, h, q_idx, kv_idx):
    return score + math.floor(score)  # here


def number_argument(score, b, h, q_idx, kv_idx):
    return torch.nn.functional.hardshrink(score, table[h, kv_idx])  # here


def python_int(score, b, h, q_idx, kv_idx):
    return score + [0.5, 1.5][int(kv_idx)]  # here


def python_float(score, b, h, q_idx, kv_idx):
    return score * float(score)  # here


def python_item(score, b, h, q_idx, kv_idx):
    return score + table[h, kv_idx].item()  # here


def python_list(score, b, h, q_idx, kv_idx):
    return score + [0.5, 1.5][kv_idx]  # here


def python_range(score, b, h, q_idx, kv_idx):
    for _ in range(q_idx):  # here
        score = score + 1
    return score


def python_while(score, b, h, q_idx, kv_idx):
    while q_idx > 0:  # here
        q_idx = q_idx - 1
    return score


def python_tolist(score, b, h, q_idx, kv_idx):
    return score + q_idx.tolist()  # here


def sets_an_element(score, b, h, q_idx, kv_idx):
    floats[kv_idx] = score  # here
    return score


def sets_a_fixed_element(score, b, h, q_idx, kv_idx):
    floats[2] = 1.0  # here
    return score


def adds_to_an_element(score, b, h, q_idx, kv_idx):
    floats[kv_idx] += 1  # here
    return score


def adds_in_place(score, b, h, q_idx, kv_idx):
    global floats
    floats += 1  # here
    return score + floats[kv_idx]


def add_(score, b, h, q_idx, kv_idx):
    floats.add_(1)  # here
    return score


def rectifies(score, b, h, q_idx, kv_idx):
    return score + torch.nn.functional.relu(floats, inplace=True)[kv_idx]  # here


def adds_to_a_view(score, b, h, q_idx, kv_idx):
    floats[1:].mul_(2)  # here
    return score


def zeroes(score, b, h, q_idx, kv_idx):
    torch.zero_(floats)  # here
    return score


def copies(score, b, h, q_idx, kv_idx):
    floats.copy_(score)  # here
    return score


def writes_to_out(score, b, h, q_idx, kv_idx):
    torch.add(floats, 1, out=floats)  # here
    return score


def writes_a_score_to_out(score, b, h, q_idx, kv_idx):
    torch.mul(score, 2, out=floats[0])  # here
    return score


def scatters(score, b, h, q_idx, kv_idx):
    floats.index_add_(0, kv_idx, score)  # here
    return score


def sums_a_row(score, b, h, q_idx, kv_idx):
    return score + table[h].sum()  # here


def means_over_scores(score, b, h, q_idx, kv_idx):
    return score - score.mean()  # here


def multiplies_matrices(score, b, h, q_idx, kv_idx):
    return score + table[h] @ table[q_idx % 4]  # here


def softmax_of_a_row(score, b, h, q_idx, kv_idx):
    return score + torch.softmax(table[h], 0)[kv_idx]  # here


def cumsum_of_a_row(score, b, h, q_idx, kv_idx):
    return score + table[h].cumsum(0)[kv_idx]  # here


def softmax_of_the_score(score, b, h, q_idx, kv_idx):
    return torch.softmax(score, 0)  # here


def cumsum_of_the_score(score, b, h, q_idx, kv_idx):
    return torch.cumsum(score, 0)  # here


def sorts_the_score(score, b, h, q_idx, kv_idx):
    return torch.sort(score).values  # here


def sorts(score, b, h, q_idx, kv_idx):
    return score + torch.sort(table[h]).values[kv_idx]  # here


def stacks(score, b, h, q_idx, kv_idx):
    return score + torch.stack([q_idx, kv_idx]).amax()  # here


def draws(score, b, h, q_idx, kv_idx):
    return score + torch.rand_like(score)  # here


def draws_one(score, b, h, q_idx, kv_idx):
    return score + torch.randn(())  # here


def drops_out(score, b, h, q_idx, kv_idx):
    return torch.nn.functional.dropout(score, 0.5)  # here


def adds_a_row(score, b, h, q_idx, kv_idx):
    return score + table[h]  # here


def adds_a_table(score, b, h, q_idx, kv_idx):
    return score + table  # here


def makes_a_vector(score, b, h, q_idx, kv_idx):
    return score + torch.arange(3)  # here


def reads_a_vector(score, b, h, q_idx, kv_idx):
    return score + torch.arange(6)[kv_idx]  # here


def reads_ones(score, b, h, q_idx, kv_idx):
    return score + torch.ones(6)[kv_idx]  # here


def reads_an_array(score, b, h, q_idx, kv_idx):
    return score + torch.from_numpy(array)[kv_idx]  # here


def rounds_to_the_next(score, b, h, q_idx, kv_idx):
    return torch.nextafter(score, score * 2)  # here


def special_function(score, b, h, q_idx, kv_idx):
    return torch.special.i0(score)  # here


def bits_of_a_score(score, b, h, q_idx, kv_idx):
    return score + (score.bitwise_and(q_idx))  # here


def bits_of_a_table(score, b, h, q_idx, kv_idx):
    return score + (floats[kv_idx] | 1)  # here


def integer_power(score, b, h, q_idx, kv_idx):
    return score + kv_idx**7  # here


def without_grad(score, b, h, q_idx, kv_idx):
    with torch.no_grad():  # here
        factor = learned[kv_idx] * 2
    return score * factor


def another_device(score, b, h, q_idx, kv_idx):
    return score + far[kv_idx]  # here


def complex_numbers(score, b, h, q_idx, kv_idx):
    return score + waves[kv_idx].real  # here


def float_index(score, b, h, q_idx, kv_idx):
    return score + floats[kv_idx / 2]  # here


def short_index(score, b, h, q_idx, kv_idx):
    return score + floats[kv_idx.short()]  # here


def uses_numpy(score, b, h, q_idx, kv_idx):
    return score + np.tanh(score)  # here


def bool_index(score, b, h, q_idx, kv_idx):
    return score + floats[kv_idx > 2]  # here


def constant_out_of_range(score, b, h, q_idx, kv_idx):
    return score + table[7, kv_idx]  # here


def constant_before_the_start(score, b, h, q_idx, kv_idx):
    return score + table[q_idx, -7]  # here


def constant_in_two_steps(score, b, h, q_idx, kv_idx):
    return score + table[kv_idx % 4][6]  # here


def constants_alone(score, b, h, q_idx, kv_idx):
    return score + table[0, 6]  # here


def selects_out_of_range(score, b, h, q_idx, kv_idx):
    return score + torch.select(table, 0, 4)[kv_idx]  # here


def reads_nothing(score, b, h, q_idx, kv_idx):
    return score + empty[q_idx, h]  # here


def reads_nothing_in_two_steps(score, b, h, q_idx, kv_idx):
    return score + empty[q_idx][h]  # here


def takes(score, b, h, q_idx, kv_idx):
    return score + torch.take(table, kv_idx)  # here


def takes_a_long(score, b, h, q_idx, kv_idx):
    return score + table.take(kv_idx.long())  # here


def reads_a_sparse_tensor(score, b, h, q_idx, kv_idx):
    return score + sparse[q_idx, kv_idx]  # here


def slice_from_a_query(score, b, h, q_idx, kv_idx):
    return score + table[h, q_idx:][0]  # here


def slice_of_an_index(score, b, h, q_idx, kv_idx):
    return score + floats[kv_idx:].sum()  # here


def too_many_indices(score, b, h, q_idx, kv_idx):
    return score + floats[h, kv_idx]  # here


def own_mistake(score, b, h, q_idx, kv_idx):
    return score + {}["bias"]  # here


def type_mistake(score, b, h, q_idx, kv_idx):
    return score + "bias"  # here


def unknown_name(score, b, h, q_idx, kv_idx):
    return score + bias[kv_idx]  # noqa: F821  # here


BAD = [
    (branch_on_index, "a Python `if`", WHERE),
    (branch_on_score, "a Python `if`", WHERE),
    (branch_on_captured, "a Python `if`", WHERE),
    (python_and, "`and`", "&, |, ~ between conditions"),
    (python_not, "`not`", "&, |, ~ between conditions"),
    (python_max, "max() or min()", LARGER),
    (python_max_of_scores, "max() or min()", LARGER),
    (python_min, "max() or min()", LARGER),
    (python_in, "`in`", WHERE),
    (python_math, "a function of Python's math", MATH),
    (python_floor, "a function of Python's math", MATH),
    (number_argument, "an argument that must be a number", WHERE),
    (python_int, "int()", "write .int()"),
    (python_float, "float()", "write .float()"),
    (python_item, ".item()", "leave it out"),
    (python_list, "a list's index", LIST),
    (python_range, "range()", LOOP),
    (python_while, "a Python `if`", WHERE),
    (python_tolist, ".tolist()", "leave it out"),
    (sets_an_element, "setitem changes a captured tensor in place", READS),
    (sets_a_fixed_element, "setitem changes a captured tensor in place", READS),
    (adds_to_an_element, "changes a captured tensor in place", READS),
    (adds_in_place, "add changes a captured tensor in place", READS),
    (add_, "add changes a captured tensor in place", READS),
    (rectifies, "relu changes a captured tensor in place", READS),
    (adds_to_a_view, "mul changes a captured tensor in place", READS),
    (zeroes, "zero changes a captured tensor in place", READS),
    (copies, "copy changes a captured tensor in place", READS),
    (writes_to_out, "add changes a captured tensor in place", READS),
    (writes_a_score_to_out, "mul changes a captured tensor in place", READS),
    (scatters, "index_add changes a captured tensor in place", READS),
    (sums_a_row, "sum is not pointwise", ELEMENT),
    (means_over_scores, "`: mean is of many numbers", MANY),
    (multiplies_matrices, "is not pointwise", ELEMENT),
    (softmax_of_a_row, "softmax is not pointwise", ELEMENT),
    (cumsum_of_a_row, "cumsum is not pointwise", ELEMENT),
    (softmax_of_the_score, "`: softmax is of many numbers", MANY),
    (cumsum_of_the_score, "`: cumsum is of many numbers", MANY),
    (sorts_the_score, "`: sort is of many numbers", MANY),
    (sorts, "sort is not pointwise", ELEMENT),
    (stacks, "makes a tensor of shape (2,)", NUMBERS),
    (draws, "`: rand_like draws random numbers", DRAWN),
    (draws_one, "`: randn draws random numbers", DRAWN),
    (drops_out, "`: dropout draws random numbers", DRAWN),
    (adds_a_row, "add is not pointwise", ELEMENT),
    (adds_a_table, "add is not pointwise", ELEMENT),
    (makes_a_vector, "`: arange makes a tensor of shape (3,)", MADE),
    (reads_a_vector, "`: arange makes a tensor of shape (6,)", MADE),
    (reads_ones, "`: ones makes a tensor of shape (6,)", MADE),
    (reads_an_array, "a tensor made inside the mod is used as a table", MADE),
    (special_function, "i0 has no kernel form", LISTED),
    (rounds_to_the_next, "nextafter has no kernel form", LISTED),
    (bits_of_a_score, "bitwise_and of torch.float32", "convert with .int(), or compare first"),
    (bits_of_a_table, "or of torch.float32", "convert with .int(), or compare first"),
    (integer_power, "an integer power of an integer has no kernel form", "use floats"),
    (without_grad, "torch.no_grad()", "write .detach() on what gets no gradient"),
    (another_device, "a captured tensor of shape (6,) is on meta, query on cpu", "move it with .to('cpu')"),
    (complex_numbers, "torch.complex64", "kernels take bool, integers and floats"),
    (float_index, "an index of torch.float32", "convert with .int()"),
    (short_index, "an index of torch.int16", "convert with .int()"),
    (uses_numpy, "numpy cannot be traced", "write torch's function of that name"),
    (bool_index, "an index of torch.bool", "torch.where"),
    (slice_of_an_index, "a slice's bound", SLICE),
    (slice_from_a_query, "a slice's bound", SLICE),
    (constant_out_of_range, "index 7 into an axis of 4", THERE),
    (constant_before_the_start, "index -7 into an axis of 6", THERE),
    (constant_in_two_steps, "index 6 into an axis of 6", THERE),
    (constants_alone, "index 6 into an axis of 6", THERE),
    (selects_out_of_range, "index 4 into its axis", THERE),
    (takes, "take is not pointwise", "or as table.flatten()[i]"),
    (takes_a_long, "take is not pointwise", "or as table.flatten()[i]"),
    (reads_a_sparse_tensor, "a captured tensor of torch.sparse_coo", "capture it as .to_dense()"),
    (too_many_indices, "2 indices into a tensor of shape (6,)", "it takes 1, one for each axis"),
    (own_mistake, "KeyError", "# here`: KeyError: 'bias'"),
    (type_mistake, "# here`: TypeError: ", "str"),
    (unknown_name, "NameError", "# here`: NameError: name 'bias' is not defined"),
]


def attend(score_mod, backend, block_mask=None):
    q, k, v = (torch.zeros(1, 2, 6, 16, requires_grad=True) for _ in range(3))
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, backend=backend)


def message(error, call, *arguments):
    with pytest.raises(error) as caught:
        call(*arguments)
    return str(caught.value)


def line_of(function):
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if line.rstrip().endswith("# here"))


@pytest.mark.parametrize("backend", ["triton", "reference", None])
@pytest.mark.parametrize(("mod", "operation", "remedy"), BAD, ids=lambda x: getattr(x, "__name__", ""))
def test_the_message_names_everything(mod, operation, remedy, backend):
    values, versions = [x.clone() for x in (table, floats)], [x._version for x in (table, floats)]
    programs = len(PROGRAMS)
    text = message(ModError, attend, mod, backend)
    assert mod.__name__ in text
    assert f"test_errors.py:{line_of(mod)}" in text
    assert inspect.getsource(mod).splitlines()[line_of(mod) - inspect.getsourcelines(mod)[1]].strip() in text
    assert operation in text
    assert remedy
    assert remedy in text
    assert "\n" not in text.strip()
    assert len(PROGRAMS) == programs, "nothing is kept of a mod that was refused"
    assert [x._version for x in (table, floats)] == versions, "the mod was run on the user's own tensors"
    assert all(map(torch.equal, values, (table, floats)))


def as_mask(mod):
    """The same line in a mask_mod."""

    @functools.wraps(mod)
    def mask_mod(b, h, q_idx, kv_idx):
        return mod(q_idx * 1.0, b, h, q_idx, kv_idx) > 0

    del mask_mod.__wrapped__
    return mask_mod


@pytest.mark.parametrize(("mod", "operation", "remedy"), BAD, ids=lambda x: getattr(x, "__name__", ""))
def test_masks_are_told_the_same(mod, operation, remedy):
    text = message(ModError, create_block_mask, as_mask(mod), None, None, 6, 6, "cpu")
    assert mod.__name__ in text
    assert f"test_errors.py:{line_of(mod)}" in text
    assert operation in text
    assert remedy
    assert remedy in text


# Derivatives


def digamma_of_score(score, b, h, q_idx, kv_idx):
    return torch.digamma(score)  # here


def digamma_of_learned(score, b, h, q_idx, kv_idx):
    halved = learned[kv_idx] / 2
    return score * 2 + torch.digamma(halved)  # here


@pytest.mark.parametrize("backend", ["triton", "reference", None])
@pytest.mark.parametrize(("mod", "name"), [(digamma_of_score, "digamma"), (digamma_of_learned, "digamma")])
def test_what_has_no_derivative_is_named(mod, name, backend):
    text = message(ModError, attend, mod, backend)
    assert text.startswith(f"{mod.__name__} (")
    assert f"test_errors.py:{line_of(mod)}" in text
    assert f"`: {name} has no derivative here" in text
    assert "write .detach() on what it takes" in text


def test_the_remedy_of_what_has_no_derivative_works():
    def detached(score, b, h, q_idx, kv_idx):
        return score + torch.digamma(score.detach() + learned[kv_idx].detach() + 1.5)

    found, exact = (attend(detached, backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, exact)


# What is returned and what is taken


def returns_a_table(score, b, h, q_idx, kv_idx):
    return table


def returns_a_row(score, b, h, q_idx, kv_idx):
    return table[h]


def returns_an_index(score, b, h, q_idx, kv_idx):
    return q_idx - kv_idx


def returns_a_bool(score, b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def returns_nothing(score, b, h, q_idx, kv_idx):
    score + 1


def returns_a_pair(score, b, h, q_idx, kv_idx):
    return score, kv_idx


def four_arguments(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def five_arguments(score, b, h, q_idx, kv_idx):
    return score


def keyword_only(score, b, h, q_idx, *, kv_idx):
    return score


class FewArguments:
    def __call__(self, score, b, h, q_idx):
        return score


RETURNS = [
    (returns_a_table, "must return one number; it returned a whole tensor"),
    (returns_a_row, "must return one number; it returned a whole tensor"),
    (returns_an_index, "must return a float tensor, the modified score; it returned torch.int32"),
    (returns_a_bool, "must return a float tensor, the modified score; it returned torch.bool"),
    (returns_nothing, "must return a tensor; it returned NoneType"),
    (returns_a_pair, "must return a tensor; it returned tuple"),
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("mod", "text"), RETURNS, ids=lambda x: getattr(x, "__name__", ""))
def test_results_of_score_mods(mod, text, backend):
    first = inspect.getsourcelines(mod)[1]
    assert re.search(rf"score_mod {mod.__name__} \(.*test_errors.py:{first}\) {re.escape(text)}", message(
        ModTypeError, attend, mod, backend
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda b, h, q, kv: q - kv, "must return a bool tensor; it returned torch.int32: compare, as in x != 0"),
        (lambda b, h, q, kv: (q - kv).float(), "must return a bool tensor; it returned torch.float32"),
        (lambda b, h, q, kv: flags, "must return one number; it returned a whole tensor"),
        (lambda b, h, q, kv: 1, "must return a bool tensor; it returned torch.float32"),
        (lambda b, h, q, kv: None, "must return a tensor; it returned NoneType"),
    ],
)
def test_results_of_mask_mods(value, text):
    found = message(ModTypeError, create_block_mask, value, None, None, 6, 6, "cpu")
    assert text in found
    assert f"test_errors.py:{value.__code__.co_firstlineno}" in found


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    "mod", [four_arguments, keyword_only, FewArguments(), functools.partial(five_arguments, 1), lambda s: s]
)
def test_numbers_of_arguments(mod, backend):
    text = message(ModTypeError, attend, mod, backend)
    assert "is called with 5 positional arguments (score, b, h, q_idx, kv_idx)" in text
    assert "test_errors.py:" in text
    assert (
        f"score_mod {getattr(mod, '__name__', '')}" in text
        or "five_arguments" in text
        or "FewArguments.__call__" in text
    )


def test_arguments_of_mask_mods():
    text = message(ModTypeError, create_block_mask, five_arguments, None, None, 6, 6, "cpu")
    assert "mask_mod five_arguments" in text
    assert "is called with 4 positional arguments (b, h, q_idx, kv_idx)" in text
    assert "must be a function of (b, h, q_idx, kv_idx); got 3" in message(
        ModTypeError, create_block_mask, 3, None, None, 6, 6, "cpu"
    )


def test_kinds_of_errors():
    """They are ValueError, and TypeError or IndexError where Python has one for it."""
    assert issubclass(ModError, ValueError)
    with pytest.raises(TypeError):
        attend(four_arguments, "triton")
    for mod in (too_many_indices, constant_out_of_range, reads_nothing):
        with pytest.raises(IndexError):
            attend(mod, "triton")
    assert issubclass(ModIndexError, ModError)


@pytest.mark.parametrize("backend", ["triton", "reference", None])
@pytest.mark.parametrize("mod", [reads_nothing, reads_nothing_in_two_steps])
def test_reads_of_tensors_without_elements_are_refused(mod, backend):
    texts = [
        message(ModIndexError, attend, mod, backend),
        message(ModIndexError, create_block_mask, as_mask(mod), None, None, 6, 6, "cpu"),
    ]
    for text in texts:
        assert text.startswith(f"{mod.__name__} (")
        assert f"test_errors.py:{line_of(mod)}" in text
        assert "a captured tensor of shape (0, 4) has no element to read; capture one with at least one" in text


def test_no_queries_read_nothing():
    q = torch.zeros(1, 2, 0, 16)
    none = torch.zeros(2, 0)
    out = flex_attention(q, q, q, score_mod=lambda s, b, h, q_idx, kv_idx: s + none[h, kv_idx], backend="triton")
    assert out.shape == q.shape


def test_a_table_that_became_empty_is_refused():
    tables = [torch.zeros(6)]

    def mod(score, b, h, q_idx, kv_idx):
        return score + tables[0][kv_idx]

    attend(mod, "triton")
    tables[0] = torch.zeros(0)
    assert "of shape (0,) has no element to read" in message(ModIndexError, attend, mod, "triton")


def test_the_remedies_of_reads_work():
    def mod(score, b, h, q_idx, kv_idx):
        return score + table.flatten()[kv_idx] + sparse.to_dense()[q_idx, kv_idx] + torch.tensor([0.5, 1.5])[h]

    found, exact = (attend(mod, backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, exact)


def test_a_partial_a_method_and_a_module_are_named():
    class Biased(torch.nn.Module):
        def forward(self, score, b, h, q_idx, kv_idx):
            return score + table[h].sum()  # here

        def method(self, score, b, h, q_idx, kv_idx):
            return score + table[h].sum()

    line = Biased.forward.__code__.co_firstlineno
    text = message(ModError, attend, Biased(), "triton")
    assert "Biased.forward" in text
    assert f"test_errors.py:{line + 1}" in text
    assert "Biased.method" in message(ModError, attend, Biased().method, "triton")
    factor = functools.partial(lambda score, b, h, q_idx, kv_idx, factor: score * table[h].sum(), factor=2)
    assert "<lambda> (" in message(ModError, attend, factor, "triton")


def test_the_line_is_that_of_the_inner_function():
    def helper(x):
        return x.cumsum(0)  # here

    def outer(score, b, h, q_idx, kv_idx):
        return score + helper(table[h])[kv_idx]

    text = message(ModError, attend, outer, "triton")
    assert text.startswith("outer (")
    assert f"test_errors.py:{line_of(helper)}" in text
    assert "return x.cumsum(0)" in text
