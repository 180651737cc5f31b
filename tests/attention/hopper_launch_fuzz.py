"""Launches of the Hopper kernels as Triton would look at them: one specialisation for each `FixedLaunch`.

Run in a process of its own, without a card and without the interpreter. Every launch is shown to Triton's own binder in
place of a card: its arguments, in their order, and what they are specialised on. It must also be what a case that is
made for this call alone launches. With `--forget`, what a case's key holds under that name is left out, which the run
must find.
"""

from __future__ import annotations

import argparse
import inspect
import random
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from packflex.attention.hopper import cases, launch
from packflex.attention.hopper.fixed import FixedLaunch

BACKEND = make_backend(GPUTarget("cuda", 90, 32))


class DiffersError(Exception):
    """A launch that Triton would have told apart from that kernel's first."""


def comparable(argument: Any) -> Any:
    """What two launches over other memory must have in common."""
    if isinstance(argument, Tensor):
        return (argument.dtype, argument.data_ptr() % 16, argument.shape, argument.stride())
    if hasattr(argument, "block_shape"):
        base = (argument.base.dtype, argument.base.data_ptr() % 16)
        return (*base, argument.shape, argument.strides, argument.block_shape, repr(argument.layout), argument.padding)
    return argument


class Recorder:
    """In the place of `FixedLaunch.__call__`."""

    def __init__(self) -> None:
        self.first: dict[int, tuple[str, FixedLaunch]] = {}
        self.binders: dict[int, Any] = {}
        self.again = 0
        self.launched: list[Any] = []

    def __call__(self, fixed: FixedLaunch, arguments: tuple[Any, ...]) -> None:
        kernel = fixed.kernel
        binder = self.binders.setdefault(
            id(kernel), create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        )
        bound, specialisation, options = binder(*arguments, **fixed.constants, **fixed.options)
        direct = (*arguments, *fixed.values)
        if not all(a is b for a, b in zip(direct, bound.values(), strict=True)):
            raise DiffersError(f"{kernel.__name__}: arguments in another order")
        found = f"{specialisation} {options}"
        self.launched.append((kernel.__name__, fixed.grid, fixed.constants, fixed.options, *map(comparable, arguments)))
        first, _ = self.first.setdefault(id(fixed), (found, fixed))
        self.again += first is not found
        if first != found:
            raise DiffersError(f"{kernel.__name__}:\n{first}\n{found}")


CHOICES: dict[str, list[Any]] = {
    "batch": [1, 2], "kv_heads": [1, 2], "group": [1, 4], "dim": [64, 128], "length": [1, 64],
    **{x: ["bshd", "bhsd", "fused", "offset", "expanded", "padded", "odd"] for x in ("q", "k", "v", "grad_out")},
    **{x: ["one", "one row", "offset", "dense"] for x in ("kv_intervals", "q_intervals")},
    "whole": [torch.int32, torch.int64], "sinks": [None, torch.float32, torch.bfloat16, "offset"],
    "scale": [0.125, 1.0, 2.0], "softcap": [0.0, 1.0, 16.0], "long": [False, True], "lse": [0, 1, 4],
    "grad_lse": [None, "sum", "offset", "transposed", "dense", "half"], "want_delta": [False, True],
}  # fmt: skip
HALF = torch.bfloat16


def tensor(kind: str, batch: int, heads: int, length: int, dim: int) -> Tensor:
    dense = torch.zeros(batch, length, heads, dim, dtype=HALF).transpose(1, 2)
    if kind == "bhsd":
        return dense.contiguous()
    if kind == "fused":
        return torch.zeros(batch, length, 3, heads, dim, dtype=HALF)[:, :, 1].transpose(1, 2)
    if kind == "offset":
        return offset(dense.numel(), 4, HALF).view(batch, length, heads, dim).transpose(1, 2)
    if kind == "expanded":
        return torch.zeros(1, heads, length, dim, dtype=HALF).expand(batch, heads, length, dim)
    if kind == "padded":
        return torch.zeros(batch, heads, length + 3, dim, dtype=HALF)[:, :, 1 : length + 1]
    return torch.zeros(batch, heads, length, dim + 1, dtype=HALF)[..., 1:] if kind == "odd" else dense


def offset(count: int, by: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(count + by, dtype=dtype)[by:]


def of_rows(kind: str | None, shape: tuple[int, int, int]) -> Tensor | None:
    """A gradient of lse."""
    batch, heads, length = shape
    kinds = {
        "sum": torch.zeros(1).expand(shape),
        "offset": offset(batch * heads * length, 1, torch.float32).view(shape),
        "transposed": torch.zeros(batch, length, heads).transpose(1, 2),
        "dense": torch.zeros(shape),
        "half": torch.zeros(shape, dtype=HALF),
    }
    return None if kind is None else kinds[kind]


def intervals(kind: str, batch: int, length: int, dtype: torch.dtype) -> Tensor:
    kinds = {
        "one": torch.zeros(2, 1, 1, dtype=dtype).expand(2, batch, length),
        "one row": torch.zeros(2, 1, length, dtype=dtype).expand(2, batch, length),
        "offset": offset(2 * batch * length, 1, dtype).view(2, batch, length),
        "dense": torch.zeros(2, batch, length, dtype=dtype),
    }
    return kinds[kind]


def call(chosen: dict[str, Any]) -> None:
    """A forward and a backward."""
    batch, kv_heads, dim, length = (chosen[name] for name in ("batch", "kv_heads", "dim", "length"))
    heads = kv_heads * chosen["group"]
    q, grad_out = (tensor(chosen[name], batch, heads, length, dim) for name in ("q", "grad_out"))
    k, v = (tensor(chosen[name], batch, kv_heads, length, dim) for name in ("k", "v"))
    of_queries, of_keys = (
        intervals(chosen[name], batch, length, chosen["whole"]) for name in ("kv_intervals", "q_intervals")
    )
    sinks = chosen["sinks"]
    if sinks is not None:
        sinks = offset(heads, 1, torch.float32) if sinks == "offset" else torch.zeros(heads, dtype=sinks)
    scale, softcap, long = (chosen[name] for name in ("scale", "softcap", "long"))
    out, lse = launch.launch_forward(q, k, v, of_queries, sinks, scale, softcap, [], long)
    lse = offset(lse.numel(), chosen["lse"], torch.float32).view(lse.shape)
    grad_lse = of_rows(chosen["grad_lse"], (batch, heads, length))
    launch.launch_backward(
        grad_out, grad_lse, q, k, v, out, lse, of_queries, of_keys, scale, softcap, [], long, chosen["want_delta"]
    )


def forgetful(case: Any, name: str) -> Any:
    """A case's cache whose key lacks the argument `name`, but for what it was when the case was made."""
    made: dict[Any, Any] = {}
    parameters = list(inspect.signature(case).parameters)
    place = parameters.index(name)

    def found(*key: Any) -> Any:
        return made.setdefault((*key[:place], *key[place + 1 :]), case(*key))

    return found


def compared(recorder: Recorder, kept: tuple[Any, Any], chosen: dict[str, Any]) -> None:
    """A call with cases that are kept, and one with its own."""
    found = []
    for launch.forward_case, launch.backward_case in (kept, (cases.ForwardCase, cases.BackwardCase)):
        recorder.launched = []
        call(chosen)
        found.append(recorder.launched)
    for ours, fresh in zip(*found, strict=True):
        if ours != fresh:
            raise DiffersError(f"{ours}\n{fresh}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--forget", default=None)
    arguments = parser.parse_args()
    cases.multiprocessors = lambda device: 132  # type: ignore[assignment]
    recorder = Recorder()
    FixedLaunch.__call__ = lambda self, *given: recorder(self, given)  # type: ignore[method-assign]
    kept = (launch.forward_case, launch.backward_case)
    if arguments.forget is not None:
        kept = tuple(
            forgetful(case, arguments.forget) if arguments.forget in inspect.signature(case).parameters else case
            for case in (cases.ForwardCase, cases.BackwardCase)
        )
    rng = random.Random(0)
    try:
        for _ in range(arguments.rounds):
            chosen = {name: rng.choice(given) for name, given in CHOICES.items()}
            compared(recorder, kept, chosen)
            for name, given in CHOICES.items():  # all but one as before
                for other in given:
                    compared(recorder, kept, {**chosen, name: other})
    except DiffersError as found:
        print("DIFFERS", found)
        raise SystemExit(1) from None
    print("launched again:", recorder.again)


if __name__ == "__main__":
    main()
