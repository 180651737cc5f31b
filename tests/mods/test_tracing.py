"""Traces are made once, programs kept by structure: what changes no kernel, what does; and no change is missed."""

import collections
import functools
import gc
import math
import random
import sys
import time
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch

from packflex import PackedLayout, create_block_mask, document_mask, flex_attention, masks, score_mods
from packflex.mods import lifted as lifted_module
from packflex.mods import source
from packflex.mods.fingerprint import Fingerprint, UnknownValueError
from packflex.mods.lifted import PROGRAMS, lift
from packflex.testing.mod_case import SMALL_TILES, modified_attention
from packflex.testing.tolerances import relative_error

CPU = torch.device("cpu")
H, S = 2, 40


def tensors(length=S, batch=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, H, length, 16, generator=generator).requires_grad_() for _ in range(3)]


def attend(score_mod=None, block_mask=None, length=S, backend="triton"):
    """out, with the backward done."""
    leaves = tensors(length, 1 if block_mask is None else block_mask.shape[0])
    options = SMALL_TILES if backend == "triton" else None
    out = flex_attention(*leaves, score_mod=score_mod, block_mask=block_mask, backend=backend, kernel_options=options)
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    return out.detach()


def expected(score, seen=None, length=S):
    """By the oracle, from a formula."""
    q, k, v = (x.detach().double() for x in tensors(length, 1 if seen is None else len(seen)))
    seen = torch.ones((), dtype=torch.bool) if seen is None else seen
    seen = seen.expand(len(q), H, length, length)
    return modified_attention(q, k, v, seen, score, None, None)[0]


def key(mod, kind="score"):
    return lift(mod, kind, CPU).key


def counters():
    """Programs, printed files, and what was asked of the printer in vain."""
    info = source.load.cache_info()
    return len(PROGRAMS), info.currsize, info.misses


@pytest.fixture
def traces(monkeypatch):
    """Counts calls of the tracer, which remembers nothing of other tests."""
    count = []
    monkeypatch.setattr(lifted_module, "_traces", OrderedDict())
    trace = lifted_module.trace
    monkeypatch.setattr(lifted_module, "trace", lambda *arguments: count.append(1) or trace(*arguments))
    return count


def scaled(factor, table):
    def mod(score, b, h, q_idx, kv_idx):
        return score * factor + table[h, kv_idx]

    return mod


# One kernel


def test_a_changed_scalar_or_tensor_keeps_the_kernel():
    tables = [torch.randn(H, S) for _ in range(3)]
    attend(scaled(0.5, tables[0]))
    before = counters()
    assert min(before) > 0
    for factor, table in ((0.5, tables[1]), (1.75, tables[0]), (-3.0, tables[2]), (1e-3, torch.zeros(H, S))):
        found = attend(scaled(factor, table))
        exact = expected(lambda s, b, h, q, kv, factor=factor, table=table: s * factor + table.double()[h, kv])
        assert relative_error(found, exact) < 3e-6
    assert counters() == before


def test_lengths_and_shapes_keep_the_kernel():
    attend(scaled(0.5, torch.randn(H, S)))
    before = counters()
    for length in (1, 17, 63):
        table = torch.randn(H, length)
        found = attend(scaled(2.0, table), length=length)
        exact = expected(lambda s, b, h, q, kv, table=table: 2 * s + table.double()[h, kv], length=length)
        assert relative_error(found, exact) < 3e-6
    assert counters() == before


def documents(layout, window):
    ids = layout.document_ids

    def mod(score, b, h, q_idx, kv_idx):
        return torch.where(ids[b, kv_idx] % 2 == 0, score, score * 0.5)

    dilated = masks.and_masks(masks.document(layout), masks.dilated_window(window, 2))
    return mod, create_block_mask(dilated, 2, None, layout.seq_len, layout.seq_len, device="cpu", BLOCK_SIZE=32)


def test_a_changed_layout_keeps_the_kernel():
    def run(rows, length, window):
        layout = PackedLayout.from_lengths(rows, length)
        mod, mask = documents(layout, window)
        found = attend(mod, mask, length)
        attend(mod, document_mask(layout), length)
        ids = layout.document_ids
        q, kv = torch.arange(length)[:, None], torch.arange(length)
        same = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] >= 0)
        seen = (same & (q >= kv) & (q - kv < 2 * window) & ((q - kv) % 2 == 0))[:, None]
        exact = expected(lambda s, b, h, q, kv: torch.where(ids[b, kv] % 2 == 0, s, s * 0.5), seen, length)
        assert relative_error(found, exact) < 3e-6

    run([[3, 20, 9], [30]], S, 4)
    before = counters()
    run([[1] * 20, [40]], S, 4)
    run([[40], []], S, 9)
    run([[5, 50], [63]], 63, 2)
    assert counters() == before


@pytest.mark.parametrize("make", [
    lambda n: masks.sliding_window(n + 1), lambda n: masks.global_tokens(n + 1),
    lambda n: masks.dilated_window(n + 2, n + 3), lambda n: masks.strided(n + 2, n + 1),
    lambda n: masks.prefix_lm(n + 2), lambda n: masks.prefix_lm(torch.tensor([n, n + 4])),
    lambda n: masks.natten_2d(6 + n, 5, 3),
    lambda n: masks.per_document(PackedLayout.from_lengths([[n + 1, 5], [9]], S), masks.global_tokens(n + 1)),
])  # fmt: skip
def test_masks_of_other_numbers_are_one_program(make):
    assert len({key(make(n), "mask") for n in (0, 1, 5, 30)}) == 1


@pytest.mark.parametrize("make", [
    lambda n: score_mods.alibi(torch.randn(n + 1)), lambda n: score_mods.softcap(n + 0.5),
    lambda n: score_mods.distance_penalty(0.1 * n), lambda n: score_mods.relative_bias(torch.randn(2, 32), 100 + n),
    lambda n: score_mods.absolute_bias(torch.randn(n + 1, 7)),
    lambda n: lambda s, b, h, q, kv: s * n + (q // (n + 1)) % (n + 2) + torch.tensor(n / 7),
])  # fmt: skip
def test_score_mods_of_other_numbers_are_one_program(make):
    assert len({key(make(n)) for n in (2, 3, 5, 30)}) == 1


def test_functions_that_compute_alike_are_one_program():
    def first(score, b, h, q_idx, kv_idx):
        return score - 0.1 * (q_idx - kv_idx)

    def second(score, batch, head, query, key_):
        distance = query - key_
        return score - distance * 0.7

    assert key(first) == key(second)
    table = torch.randn(3, S)
    assert key(lambda s, b, h, q, kv: s * 7 + table[h, kv]) == key(scaled(0.5, torch.randn(2, 9)))


# Another kernel


@pytest.mark.parametrize(("one", "other"), [
    (lambda s, b, h, q, kv: s + q, lambda s, b, h, q, kv: s - q),
    (lambda s, b, h, q, kv: s + q, lambda s, b, h, q, kv: s + kv),
    (lambda s, b, h, q, kv: s - (q - kv), lambda s, b, h, q, kv: s - (kv - q)),
    (lambda s, b, h, q, kv: s**2, lambda s, b, h, q, kv: s**3),
    (lambda s, b, h, q, kv: s.clamp(min=0.5), lambda s, b, h, q, kv: s.clamp(max=0.5)),
    (score_mods.head_gate(torch.zeros(2)), score_mods.head_gate(torch.zeros(2, requires_grad=True))),
    (score_mods.head_gate(torch.zeros(2)), score_mods.head_gate(torch.zeros(2, dtype=torch.float16))),
    (score_mods.absolute_bias(torch.zeros(4)), score_mods.absolute_bias(torch.zeros(4, 4))),
    (score_mods.absolute_bias(torch.zeros(4, 4)), score_mods.absolute_bias(torch.zeros(4, 8)[:, ::2])),
    (lambda s, b, h, q, kv: s + s.detach(), lambda s, b, h, q, kv: s + s),
    (lambda s, b, h, q, kv: s * float("inf"), lambda s, b, h, q, kv: s * 2.0),
])  # fmt: skip
def test_another_structure_is_another_program(one, other):
    assert key(one) != key(other)


def test_one_tensor_in_two_places_is_another_program_than_two():
    """Their gradients go to one tensor or to two."""

    def mod(left, right):
        return lambda s, b, h, q, kv: s + left[q] + right[kv]

    first, second = (torch.zeros(S, requires_grad=True) for _ in range(2))
    assert key(mod(first, second)) != key(mod(first, first))
    assert lift(mod(first, first), "score", CPU).captures == [first]
    lifted = lift(mod(second, first), "score", CPU)
    assert [x is y for x, y in zip(lifted.captures, (second, first), strict=True)] == [True, True]


# The tracer runs once, and again when what it saw has changed


def test_a_mod_is_traced_once(traces):
    table = torch.randn(H, S)
    mod = scaled(0.25, table)
    for _ in range(3):
        attend(mod)
    attend(scaled(0.25, torch.randn(H, S)))
    assert len(traces) == 1
    attend(scaled(0.75, table))
    assert len(traces) == 2, "a number is part of what a trace is remembered by, not of its kernel"


def test_fresh_closures_over_fresh_layouts_are_traced_once(traces):
    for rows in ([[3, 20], [30]], [[1] * 9, [40]], [[40], []]):
        attend(*documents(PackedLayout.from_lengths(rows, S), 4))
    assert len(traces) == 2, "one mask, one score_mod"


def changed(mod, change, before, after):
    """The mod gives `before`, and after `change()` it gives `after`; both backends."""
    for backend in ("triton", "reference"):
        assert relative_error(attend(mod, backend=backend), expected(before)) < 3e-6
    programs = counters()
    change()
    for backend in ("triton", "reference"):
        assert relative_error(attend(mod, backend=backend), expected(after)) < 3e-6
    assert relative_error(expected(after), expected(before)) > 1e-2
    return programs


def test_the_value_of_a_tensor_on_the_host_is_read_at_each_call(traces):
    factor, step = torch.tensor(2.0), torch.tensor(3)

    def mod(score, b, h, q_idx, kv_idx):
        return score * factor + (q_idx // step - kv_idx % step)

    def change():
        factor.fill_(-0.5)
        step.add_(4)

    programs = changed(
        mod,
        change,
        lambda s, b, h, q, kv: s * 2 + (q // 3 - kv % 3),
        lambda s, b, h, q, kv: s * -0.5 + (q // 7 - kv % 7),
    )
    assert counters() == programs
    assert len(traces) == 1


def test_values_of_tables_are_read_at_each_call():
    table = torch.zeros(S)
    programs = changed(
        lambda s, b, h, q, kv: s + table[kv],
        lambda: table.copy_(torch.arange(S) / 9),
        lambda s, b, h, q, kv: s,
        lambda s, b, h, q, kv: s + kv / 9,
    )
    assert counters() == programs


def test_what_is_computed_of_captured_tensors_is_computed_at_each_call(traces):
    gate, row = torch.zeros(H), torch.ones(S)
    changed(
        lambda s, b, h, q, kv: s * torch.sigmoid(gate)[h] + (row * 2).cumsum(0)[kv],
        lambda: (gate.fill_(3.0), row.mul_(-0.05)),
        lambda s, b, h, q, kv: s * 0.5 + 2 * (kv + 1),
        lambda s, b, h, q, kv: s / (1 + math.exp(-3)) - 0.1 * (kv + 1),
    )
    assert len(traces) == 1


FACTOR = 2.0
HELPER = torch.neg


def uses_globals(score, b, h, q_idx, kv_idx):
    return HELPER(score) * FACTOR


def test_a_rebound_global_is_seen(monkeypatch):
    changed(
        uses_globals,
        lambda: monkeypatch.setitem(globals(), "FACTOR", 0.5),
        lambda s, b, h, q, kv: -2 * s,
        lambda s, b, h, q, kv: -0.5 * s,
    )
    changed(
        uses_globals,
        lambda: monkeypatch.setitem(globals(), "HELPER", torch.sin),
        lambda s, b, h, q, kv: -0.5 * s,
        lambda s, b, h, q, kv: 0.5 * torch.sin(s),
    )


def test_a_changed_closure_is_seen():
    factor = 2.0

    def mod(score, b, h, q_idx, kv_idx):
        return score * factor

    def change():
        nonlocal factor
        factor = -1.0

    changed(mod, change, lambda s, b, h, q, kv: 2 * s, lambda s, b, h, q, kv: -s)


class Settings:
    def __init__(self):
        self.factor, self.flip, self.table, self.nested = 2.0, False, torch.zeros(S), {"shift": [0.0, 1.0]}

    def __call__(self, score, b, h, q_idx, kv_idx):
        sign = -1 if self.flip else 1
        return sign * score * self.factor + self.table[kv_idx] + self.nested["shift"][0] * kv_idx

    def method(self, score, b, h, q_idx, kv_idx):
        return self(score, b, h, q_idx, kv_idx)


@pytest.mark.parametrize("how", ["object", "method", "closure", "partial", "default"])
@pytest.mark.parametrize(
    ("change", "after"),
    [
        (lambda x: setattr(x, "factor", 0.5), lambda s, b, h, q, kv: 0.5 * s),
        (lambda x: setattr(x, "flip", True), lambda s, b, h, q, kv: -2 * s),
        (lambda x: setattr(x, "table", torch.arange(S) / 10), lambda s, b, h, q, kv: 2 * s + kv / 10),
        (lambda x: x.nested["shift"].__setitem__(0, 0.25), lambda s, b, h, q, kv: 2 * s + kv / 4),
    ],
    ids=["number", "branch", "tensor", "list in a dict"],
)
def test_a_changed_attribute_is_seen(change, after, how):
    settings = Settings()
    mod = {
        "object": settings,
        "method": settings.method,
        "closure": lambda *arguments: settings(*arguments),
        "partial": functools.partial(lambda s, b, h, q, kv, x: x(s, b, h, q, kv), x=settings),
        "default": lambda s, b, h, q, kv, x=settings: x.method(s, b, h, q, kv),
    }[how]
    found = attend(mod)
    assert relative_error(found, expected(lambda s, b, h, q, kv: 2 * s)) < 3e-6
    change(settings)
    assert relative_error(attend(mod), expected(after)) < 3e-6


def test_a_changed_module_is_seen():
    class Bias(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Module() for _ in range(2)])
            for layer in self.layers:
                layer.bias = torch.nn.Parameter(torch.zeros(S))
            self.register_buffer("factor", torch.ones(H))

        def forward(self, score, b, h, q_idx, kv_idx):
            for layer in self.layers:
                score = score + layer.bias[kv_idx]
            return score * self.factor[h] if self.training else score

    module = Bias()
    assert relative_error(attend(module), expected(lambda s, b, h, q, kv: s)) < 3e-6
    module.factor = torch.tensor([2.0, 3.0])
    assert relative_error(attend(module), expected(lambda s, b, h, q, kv: s * (h + 2))) < 3e-6
    module.layers[1].bias = torch.nn.Parameter(torch.arange(S) / 7)
    assert relative_error(attend(module), expected(lambda s, b, h, q, kv: (s + kv / 7) * (h + 2))) < 3e-6
    module.eval()
    assert relative_error(attend(module), expected(lambda s, b, h, q, kv: s + kv / 7)) < 3e-6
    module.layers.append(torch.nn.Module())
    module.layers[2].bias = torch.nn.Parameter(-torch.arange(S) / 7)
    assert relative_error(attend(module), expected(lambda s, b, h, q, kv: s)) < 3e-6


def test_whether_a_gradient_is_wanted_is_seen():
    bias = torch.zeros(S, requires_grad=True)

    def mod(score, b, h, q_idx, kv_idx):
        return score + (2 * bias)[kv_idx]

    with torch.no_grad():
        flex_attention(*tensors(), score_mod=mod, backend="triton", kernel_options=SMALL_TILES)
    attend(mod)
    assert bias.grad.norm() > 1e-3
    bias.grad = None
    bias.requires_grad_(False)
    attend(mod)
    assert bias.grad is None


def test_each_call_has_its_own_tensors():
    """A remembered trace hands no tensor of an older closure to a newer one."""
    for seed in range(4):
        table = torch.randn(H, S, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        found = attend(scaled(1.0, table))
        exact = expected(lambda s, b, h, q, kv, table=table: s + table.detach().double()[h, kv])
        assert relative_error(found, exact) < 3e-6
        assert table.grad.norm() > 1e-3


def test_a_mod_that_cannot_be_compared_is_traced_at_each_call(traces):
    """An object without a dict may have changed in any way; it is never remembered."""

    class Slots:
        __slots__ = ("factor",)

    holder = Slots()
    holder.factor = 2.0
    with pytest.raises(UnknownValueError):
        Fingerprint(lambda s, b, h, q, kv: s * holder.factor)
    changed(
        lambda s, b, h, q, kv: s * holder.factor,
        lambda: setattr(holder, "factor", -1.0),
        lambda s, b, h, q, kv: 2 * s,
        lambda s, b, h, q, kv: -s,
    )
    assert len(traces) == 4


class Slope:
    """Reads its factor in every way that a class has."""

    shared = 2.0
    indirect = None

    def __init__(self):
        self.factor = 2.0
        self.other = 1.0
        self.table = torch.full((S,), 2.0)

    def helper(self, score):
        return score * self.factor

    @property
    def slope(self):
        return self.factor

    @staticmethod
    def of_class(score):
        return score * Slope.shared

    @classmethod
    def by_class(cls, score):
        return score * cls.shared

    def __getitem__(self, index):
        return self.factor


class Config:
    factor = 2.0


def with_attribute(score, b, h, q_idx, kv_idx):
    return score * with_attribute.factor


def chained(*mods):
    def mod(score, *indices):
        for each in mods:
            score = each(score, *indices)
        return score

    return mod


def twice_named(x):
    """Two functions that read different attributes of one object."""
    return chained(lambda s, b, h, q, kv: s * x.other, lambda s, b, h, q, kv: s * x.factor)


def replace_table(x):
    x.table = torch.full((S,), -1.0)


WAYS = {
    "helper": (lambda x: lambda s, b, h, q, kv: x.helper(s), lambda x: setattr(x, "factor", -1.0)),
    "bound helper": (lambda x: lambda s, b, h, q, kv, f=x.helper: f(s), lambda x: setattr(x, "factor", -1.0)),
    "property": (lambda x: lambda s, b, h, q, kv: s * x.slope, lambda x: setattr(x, "factor", -1.0)),
    "item": (lambda x: lambda s, b, h, q, kv: s * x[0], lambda x: setattr(x, "factor", -1.0)),
    "table": (lambda x: lambda s, b, h, q, kv: s * x.table[kv], replace_table),
    "class attribute": (lambda x: lambda s, b, h, q, kv: s * x.shared, lambda x: setattr(Slope, "shared", -1.0)),
    "staticmethod": (lambda x: lambda s, b, h, q, kv: x.of_class(s), lambda x: setattr(Slope, "shared", -1.0)),
    "classmethod": (lambda x: lambda s, b, h, q, kv: x.by_class(s), lambda x: setattr(Slope, "shared", -1.0)),
    "class": (lambda x: lambda s, b, h, q, kv: s * Config.factor, lambda x: setattr(Config, "factor", -1.0)),
    "function attribute": (lambda x: with_attribute, lambda x: setattr(with_attribute, "factor", -1.0)),
    "two readers": (twice_named, lambda x: setattr(x, "factor", -1.0)),
    "name in parts": (
        lambda x: lambda s, b, h, q, kv: s * getattr(x, f"fac{'tor'}"),
        lambda x: setattr(x, "factor", -1.0),
    ),
}


class Private(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self._kind = kind
        self.act = torch.nn.Identity()

    def mod(self, score, b, h, q_idx, kv_idx):
        return score * 2 if self._kind == "double" else -self.act(score)


class Made:
    def __init__(self):
        self.factor = Config.factor


class Counted(set):
    pass


def importing(x):
    def mod(score, b, h, q_idx, kv_idx):
        import packflex_settings_of_a_test as settings

        return score * settings.factor

    sys.modules["packflex_settings_of_a_test"] = x
    return mod


def wrapped_as_torch_s(x):
    @functools.wraps(torch.exp)
    def factor_of(score):
        return score * x.factor

    return lambda s, b, h, q, kv: factor_of(s)


def hooked(x):
    module = Private("")
    x.hook = module.act.register_forward_hook(lambda module, inputs, output: -2 * output)
    return module.mod


def captured_get(x):
    x.settings = {"a": 2.0}
    return lambda s, b, h, q, kv, get=x.settings.get: s * get("a")


def of_a_set(x):
    x.counted = Counted({1, 2})
    return lambda s, b, h, q, kv, c=x.counted: s * sum(c) * 2 / 3


def private(x):
    x.module = Private("double")
    return x.module.mod


class Scaling(torch.nn.Module):
    """A module whose `forward` alone reads `Config.factor`, called in every way there is."""

    def forward(self, score):
        return score * Config.factor

    def called(self, score, *indices):
        return self(score)

    def called_as_another(this, score, *indices):  # noqa: N805
        return this(score)

    def handed_on(self, score, *indices):
        return call(self, score)

    def renamed(self, score, *indices):
        module = self
        return module(score)

    def inside(self, score, *indices):
        return (lambda: self(score))()

    def dunder(self, score, *indices):
        return self.__call__(score)

    def by_super(self, score, *indices):
        return super().__call__(score)

    def in_two_steps(self, score, *indices):
        return self.called(score)

    def by_property(self, score, *indices):
        return self.itself(score)

    @property
    def itself(self):
        return self

    @classmethod
    def made(cls, score, *indices):
        return cls()(score)

    def __getitem__(self, score):
        return self(score)


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.layers = Scaling(), torch.nn.ModuleList([Scaling()])

    def called(self, score, *indices):
        return self.inner(score)

    def deeper(self, score, *indices):
        return self.inner.called(score)

    def renamed(self, score, *indices):
        act = self.inner
        return act(score)

    def listed(self, score, *indices):
        return self.layers[0](score)

    def children_called(self, score, *indices):
        return next(self.children())(score)


def call(module, score):
    return module(score)


def set_factor(x):
    Config.factor = -1.0


WAYS |= {
    f"module: {name}": (lambda x, name=name: getattr(Scaling(), name), set_factor)
    for name in vars(Scaling) if not name.startswith("_") and name not in ("forward", "itself")
}  # fmt: skip
WAYS |= {
    f"module in a module: {name}": (lambda x, name=name: getattr(Outer(), name), set_factor)
    for name in vars(Outer) if not name.startswith("_")
}  # fmt: skip
WAYS |= {
    "module: closure": (lambda x: (lambda c: lambda s, b, h, q, kv: c(s))(Scaling()), set_factor),
    "module: closure's item": (lambda x: (lambda c: lambda s, b, h, q, kv: c[s])(Scaling()), set_factor),
    "module: partial": (lambda x: functools.partial(lambda c, s, b, h, q, kv: c(s), Scaling()), set_factor),
    "module: made": (lambda x: lambda s, b, h, q, kv: Scaling()(s), set_factor),
    "module: in a list": (lambda x: (lambda c: lambda s, b, h, q, kv: c[0](s))([Scaling()]), set_factor),
    "module: two names": (
        lambda x: (lambda c: chained(lambda s, *_: s * len(c._modules) + s, lambda s, *_, d=c: d(s)))(Scaling()),
        set_factor,
    ),
}
WAYS |= {
    "private attribute of a module": (private, lambda x: setattr(x.module, "_kind", "other")),
    "import": (importing, lambda x: setattr(x, "factor", -1.0)),
    "captured method": (captured_get, lambda x: x.settings.update(a=-1.0)),
    "made object": (lambda x: lambda s, b, h, q, kv: s * Made().factor, lambda x: setattr(Config, "factor", -1.0)),
    "wrapped as torch's": (wrapped_as_torch_s, lambda x: setattr(x, "factor", -1.0)),
    "hook": (hooked, lambda x: x.hook.remove()),
    "set": (of_a_set, lambda x: (x.counted.clear(), x.counted.add(-1.5))),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_value_found_by_any_way_is_seen_to_change(way, monkeypatch):
    monkeypatch.setattr(Slope, "shared", 2.0)
    monkeypatch.setattr(Config, "factor", 2.0)
    monkeypatch.setattr(with_attribute, "factor", 2.0, raising=False)
    make, change = WAYS[way]
    slope = Slope()
    mod = make(slope)
    assert relative_error(attend(mod), expected(lambda s, b, h, q, kv: 2 * s)) < 3e-6
    assert relative_error(attend(mod), expected(lambda s, b, h, q, kv: 2 * s)) < 3e-6
    change(slope)
    assert relative_error(attend(mod), expected(lambda s, b, h, q, kv: -s)) < 3e-6


def test_two_modules_that_read_through_a_helper_keep_their_own_parameters():
    class RelativeBias(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(H, S, generator=torch.Generator().manual_seed(seed)))

        def bias(self, h, distance):
            return self.w[h, distance.abs()]

        def score_mod(self, score, b, h, q_idx, kv_idx):
            return score + self.bias(h, q_idx - kv_idx)

    layers = [RelativeBias(seed) for seed in range(2)]
    for layer in layers:
        w = layer.w.detach().double()
        found = attend(layer.score_mod)
        assert relative_error(found, expected(lambda s, b, h, q, kv, w=w: s + w[h, (q - kv).abs()])) < 3e-6
    norms = [layer.w.grad.norm() for layer in layers]
    assert min(norms) > 1e-3
    assert norms[0] != norms[1]


class SelfAttention(torch.nn.Module):
    """The usual attention module: its mod reads it, and its forward reads what no walk could follow."""

    def __init__(self, way="closure"):
        super().__init__()
        self.project = torch.nn.Linear(8, 3 * H * 16)
        self.table = torch.nn.Parameter(torch.randn(H, S, generator=torch.Generator().manual_seed(0)))
        self.factor, self.way, self.steps = 2.0, way, 0

    def near(self, score, b, h, q_idx, kv_idx):
        return score * self.factor + self.bias(h, q_idx - kv_idx)

    def bias(self, h, distance):
        return self.table[h, distance.abs()]

    def doubled(self, score, b, h, q_idx, kv_idx):
        return self.near(score, b, h, q_idx, kv_idx) * 2

    def closure(self):
        return lambda s, b, h, q, kv: s * self.factor + self.table[h, (q - kv).abs()]

    def forward(self, x):
        import packflex

        self.steps += 1
        q, k, v = self.project(x).view(1, S, 3, H, 16).permute(2, 0, 3, 1, 4)
        mod = self.near if getattr(self, "way", None) == "method" else self.closure()
        return packflex.flex_attention(q, k, v, score_mod=mod, backend="triton", kernel_options=SMALL_TILES)


@pytest.mark.parametrize("way", ["closure", "method"])
def test_an_attention_module_is_traced_once_and_seen_to_change(way, traces):
    module = SelfAttention(way)
    x = torch.randn(1, S, 8)

    def found_and_exact():
        q, k, v = module.project(x).view(1, S, 3, H, 16).permute(2, 0, 3, 1, 4).detach().double()
        table, factor = module.table.detach().double(), module.factor
        seen = torch.ones(1, H, S, S, dtype=torch.bool)
        score = lambda s, b, h, q, kv: s * factor + table[h, (q - kv).abs()]  # noqa: E731
        return module(x), modified_attention(q, k, v, seen, score, None, None)[0]

    for _ in range(3):
        out, exact = found_and_exact()
        assert relative_error(out, exact) < 3e-6
        out.square().sum().backward()
    assert len(traces) == 1
    assert module.table.grad.norm() > 1e-3
    module.table = torch.nn.Parameter(torch.randn(H, S))
    assert relative_error(*found_and_exact()) < 3e-6
    assert len(traces) == 1, "another parameter of the same kind"
    for name, value in (("factor", -0.5), ("table", torch.nn.Parameter(torch.randn(H, 2 * S)))):
        setattr(module, name, value)
        before = len(traces)
        assert relative_error(*found_and_exact()) < 3e-6
        assert relative_error(*found_and_exact()) < 3e-6
        assert len(traces) == before + (name == "factor") + (name == "table")


def test_usual_mods_are_traced_once(traces):
    """A key that is never the same would cost milliseconds at each call, and no result would show it."""
    table = torch.nn.Parameter(torch.randn(H, S))
    layout = PackedLayout.from_lengths([[20, S - 20]], S)
    module, slope, attention = Private("double"), Slope(), SelfAttention()
    attention.register_forward_hook(lambda module, inputs, output: None)

    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(H, S))
            self.layers = torch.nn.ModuleList([torch.nn.Embedding(2, 2)])

        def near(self, h, distance):
            return self.table[h, distance.abs()]

        def forward(self, score, b, h, q_idx, kv_idx):
            return score + self.near(h, q_idx - kv_idx)

    mods = [
        lambda s, b, h, q, kv: s + table[h, kv],
        functools.partial(lambda s, b, h, q, kv, *, w: s * w, w=2.0),
        Learned(), Learned().forward, module.mod, lambda s, b, h, q, kv: slope.helper(s),
        attention.closure(), attention.near, attention.doubled, lambda s, b, h, q, kv: s + attention.table[h, kv],
        score_mods.alibi(H), score_mods.softcap(3.0), score_mods.relative_bias(torch.randn(H, 32)),
        score_mods.compose(score_mods.alibi(H), score_mods.distance_penalty(0.5)),
    ]  # fmt: skip
    for mod in mods:
        before = len(traces)
        for _ in range(3):
            lift(mod, "score", CPU)
        assert len(traces) == before + 1, mod
    for mask in (
        masks.causal, masks.sliding_window(4), masks.document(layout), masks.dilated_window(4, 2),
        masks.natten_2d(8, 5, 3),
        masks.and_masks(masks.document(layout), masks.strided(3)), masks.per_document(layout, masks.global_tokens(2)),
    ):  # fmt: skip
        before = len(traces)
        for _ in range(3):
            lift(mask, "mask", CPU)
        assert len(traces) == before + 1, mask


def test_masks_that_torch_composes_are_looked_into(traces):
    from torch.nn.attention.flex_attention import and_masks, or_masks

    settings = Slope()
    strided = lambda b, h, q, kv: (q - kv) % settings.factor == 0  # noqa: E731
    for compose in (and_masks, or_masks):
        settings.factor = 2
        mod = compose(strided, masks.sliding_window(9))
        for factor in (2, 3, 2):
            settings.factor = factor
            mask = create_block_mask(mod, None, None, S, S, "cpu", 1)
            grids = torch.meshgrid(torch.arange(1), torch.arange(1), torch.arange(S), torch.arange(S), indexing="ij")
            assert torch.equal(mask.to_dense().bool()[0, 0], mod(*grids)[0, 0])
    before = len(traces)
    for _ in range(3):
        lift(and_masks(masks.causal, masks.strided(3)), "mask", CPU)
    assert len(traces) == before + 1


def test_sizes_sets_and_named_tuples_are_compared(traces):
    Config2 = collections.namedtuple("Config2", "factor limit")
    settings, size, some = Config2(2.0, 3), torch.zeros(2, 3).shape, frozenset({1, 2})

    def mod(score, b, h, q_idx, kv_idx):
        return score * settings.factor * size[1] * len(some)

    for _ in range(3):
        key(mod)
    assert len(traces) == 1
    settings = Config2(-1.0, 3)
    found = attend(mod)
    assert relative_error(found, expected(lambda s, b, h, q, kv: -6 * s)) < 3e-6


def test_a_remembered_trace_keeps_no_tensor_alive():
    gone = []
    for length in range(20, 24):
        table = torch.zeros(length)
        gone.append(weakref.ref(table))
        key(lambda s, b, h, q, kv, table=table: s + (table * 2)[kv])
        del table
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


NUMBER = torch.tensor(2.0)
ROW = torch.full((3,), 2.0)
FLAG = torch.tensor(True)
READERS = {
    "item": (NUMBER, lambda s, b, h, q, kv: s * NUMBER.item()),
    "float": (NUMBER, lambda s, b, h, q, kv: s * float(NUMBER)),
    "element": (ROW, lambda s, b, h, q, kv: s * float(ROW[1])),
    "list": (ROW, lambda s, b, h, q, kv: s * ROW.tolist()[1]),
    "numpy": (ROW, lambda s, b, h, q, kv: s * float(ROW.numpy()[1])),
    "nonzero": (FLAG, lambda s, b, h, q, kv: s * 2 if torch.is_nonzero(FLAG) else s * -1),
    "flag": (FLAG, lambda s, b, h, q, kv: s * 2 if FLAG else s * -1),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_value_that_the_mod_reads_itself_is_seen_to_change(reader):
    tensor, mod = READERS[reader]
    before = tensor.clone()
    try:
        assert relative_error(attend(mod), expected(lambda s, b, h, q, kv: 2 * s)) < 3e-6
        tensor.fill_(False if tensor.dtype == torch.bool else -1)
        assert relative_error(attend(mod), expected(lambda s, b, h, q, kv: -s)) < 3e-6
    finally:
        tensor.copy_(before)


def test_sizes_and_kinds_are_no_values(traces):
    table = torch.zeros(S)

    def mod(score, b, h, q_idx, kv_idx):
        return score * len(table) * table.shape[0] * table.dim() if table.is_floating_point() else score

    for _ in range(3):
        key(mod)
    assert len(traces) == 1


IDS = torch.arange(S) % 4
BOUND = torch.tensor(4)
SIZES = {
    "unique": lambda: torch.unique(IDS).numel(),
    "unique_consecutive": lambda: len(torch.unique_consecutive(IDS)),
    "nonzero": lambda: IDS.nonzero().shape[0],
    "argwhere": lambda: torch.argwhere(IDS).size(0),
    "where": lambda: torch.where(IDS > 0)[0].numel(),
    "masked": lambda: len(IDS[IDS > 0]),
    "masked_select": lambda: torch.masked_select(IDS, IDS > 2).shape.numel(),
    "bincount": lambda: torch.bincount(IDS).shape[-1],
    "repeat_interleave": lambda: torch.repeat_interleave(IDS, IDS).numel(),
    "one_hot": lambda: torch.nn.functional.one_hot(IDS.long()).shape[1],
    "sparse": lambda: IDS.to_sparse().values().numel(),
    "stride": lambda: IDS.nonzero().expand(-1, 2).T.contiguous().stride(0),
    "loop": lambda: sum(1 for _ in range(len(IDS.nonzero()))),
    "iteration": lambda: sum(1 for _ in torch.nonzero(IDS).flatten()),
    "slice": lambda: IDS[: BOUND - 1].numel(),
    "arange": lambda: torch.arange(BOUND).numel(),
}


@pytest.mark.parametrize("way", SIZES)
def test_the_size_of_what_a_mod_computes_is_seen_to_change(way, traces):
    count = SIZES[way]
    before = IDS.clone(), BOUND.clone()

    def mod(score, b, h, q_idx, kv_idx):
        return score * 0.1 * count()

    try:
        seen = []
        for ids in (before[0], torch.cat([torch.zeros(5, dtype=IDS.dtype), before[0].flip(0)[5:] % 3 * 2])):
            IDS.copy_(ids)
            BOUND.fill_(int(ids.max()))
            n = count()
            seen.append(n)
            for _ in range(2):
                found = attend(mod)
                assert relative_error(found, expected(lambda s, *_, n=n: s * 0.1 * n)) < 3e-6
        assert seen[0] != seen[1]
        assert len(traces) == 2 or way in ("slice", "arange"), "traced again where the size is another, and only there"
    finally:
        IDS.copy_(before[0])
        BOUND.copy_(before[1])


def test_a_table_of_another_size_is_read_by_that_size():
    table = torch.linspace(-3, 3, S)

    def mod(score, b, h, q_idx, kv_idx):
        above = table[table > 0]
        return score + above[kv_idx % len(above)]

    for shift in (0.0, 1.0, -2.0):
        table.add_(shift)
        above = table[table > 0].double()
        found = attend(mod)
        exact = expected(lambda s, b, h, q, kv, above=above: s + above[kv % len(above)])
        assert relative_error(found, exact) < 3e-6


def test_the_number_of_real_tokens_in_a_mask_is_seen_to_change():
    pad = torch.arange(S) < 30

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx < pad[pad].shape[0]) & (q_idx >= kv_idx)

    for real in (30, 7, 7, 40):
        pad.copy_(torch.arange(S) < real)
        mask = create_block_mask(mask_mod, None, None, S, S, "cpu", 1).to_dense().bool()[0, 0]
        assert torch.equal(mask, torch.ones(S, S).tril().bool() & pad)


def test_a_slice_at_a_tensor_is_that_of_each_closure():
    table = torch.arange(S) / 9.0

    def make(start):
        return lambda s, b, h, q, kv: s + table[start:][kv % 3]

    for start in (2, 20):
        found = attend(make(torch.tensor(start)))
        exact = expected(lambda s, b, h, q, kv, start=start: s + (kv % 3 + start) / 9.0)
        assert relative_error(found, exact) < 3e-6


@pytest.mark.parametrize(
    "draw", [lambda: random.random(), random.random, lambda: np.random.rand(), np.random.rand, lambda: time.time()]
)
def test_what_varies_by_itself_is_asked_for_at_each_call(draw):
    def mod(score, b, h, q_idx, kv_idx):
        return score * float(draw())

    found = []
    for _ in range(2):
        found.append(lift(mod, "score", CPU).numbers)
        time.sleep(0.01)
    assert found[0] != found[1]


def test_modes_that_a_mod_may_ask_for_are_part_of_the_key(traces):
    def mod(score, b, h, q_idx, kv_idx):
        return score * (2.0 if torch.are_deterministic_algorithms_enabled() else -1.0)

    assert relative_error(attend(mod), expected(lambda s, b, h, q, kv: -s)) < 3e-6
    torch.use_deterministic_algorithms(True)
    try:
        assert relative_error(attend(mod), expected(lambda s, b, h, q, kv: 2 * s)) < 3e-6
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_tensor_that_the_walk_did_not_see_is_never_remembered(traces, monkeypatch):
    """Whatever way a mod found to a tensor, another call may find another there."""
    tables = iter([torch.full((S,), 2.0), torch.full((S,), -1.0)])
    monkeypatch.setattr(math, "hidden", lambda: next(tables), raising=False)  # libraries are not looked into

    def mod(score, b, h, q_idx, kv_idx):
        return score * math.hidden()[kv_idx]

    for factor in (2.0, -1.0):
        out = flex_attention(*tensors(), score_mod=mod, backend="triton", kernel_options=SMALL_TILES)
        assert relative_error(out, expected(lambda s, b, h, q, kv, factor=factor: s * factor)) < 3e-6


def test_traces_are_forgotten_in_the_end(monkeypatch):
    """A number of its own for each call fills no memory: the oldest traces go."""
    monkeypatch.setattr(lifted_module, "_traces", OrderedDict())
    monkeypatch.setattr(lifted_module, "_MOST_TRACES", 3)
    table = torch.zeros(S)
    gone = weakref.ref(table)
    programs = {key(lambda s, b, h, q, kv, table=table: s + 0.1 * table[kv])}
    del table
    for n in range(3):
        other = torch.zeros(S)
        programs.add(key(lambda s, b, h, q, kv, n=n, table=other: s + (n + 0.5) * table[kv]))
    gc.collect()
    assert len(lifted_module._traces) == 3
    assert len(programs) == 1
    assert gone() is None
