"""The operations that docs/masks.md lists are those that have kernel forms."""

import re
from pathlib import Path

import pytest
import torch

from packflex.mods import aten
from packflex.mods.errors import ModError
from packflex.mods.lifted import lift

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
WITHOUT_DERIVATIVE = {"prelu", "softshrink"}  # torch has no pointwise rule for it
MORE = {"full_like": (2.0,), "threshold": (0.5, 2.0)}  # arguments that are no tensors


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


@pytest.mark.parametrize("name", ["digamma", "erfinv", "i0", "nextafter", "igamma", "softmax", "cumsum", "rand_like"])
def test_what_has_none_is_not_listed(name):
    assert not is_supported(getattr(torch, name))
    assert name not in {name for _, name in listed()}
