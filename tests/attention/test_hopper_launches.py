"""A launch that skips Triton's look at its arguments is one that Triton would not have told apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton", exc_type=ImportError)
from triton import knobs
from triton.compiler import CompiledKernel

from packflex.attention.hopper.fixed import FixedLaunch


def fuzz(*arguments):
    # a process of its own: here the kernels are the interpreter's
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("hopper_launch_fuzz.py")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_fixed_launch_has_one_specialisation():
    done = fuzz("--rounds", "12")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(":")[1]) > 500, "of which many were launched again"


@pytest.mark.parametrize(
    "forgotten",
    ["alignment", "dtypes", "sinks_dtype", "softcap", "q_strides", "grad_lse_strides", "kv_intervals_strides"],
)
def test_what_a_key_lacks_is_found(forgotten):
    done = fuzz("--rounds", "12", "--forget", forgotten)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERS" in done.stdout


class Compiled(CompiledKernel):
    """What Triton's look-up gives, without a card."""

    def __init__(self, said):
        self.said = said

    def __getitem__(self, grid):
        return lambda *arguments: self.said.append(("direct", grid, arguments))

    def __del__(self):
        pass


class Kernel:
    """A jitted kernel of two arguments and a constant."""

    def __init__(self, gives):
        self.arg_names = ["x", "n", "BLOCK"]
        self.said = []
        self.pre_run_hooks = []
        self.gives = gives

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.said.append(("looked up", grid, arguments, options))
            return self.gives(self.said)

        return launch


def ways(kernel):
    return [what[0] for what in kernel.said]


def test_the_first_launch_is_looked_up_and_the_others_direct():
    kernel = Kernel(Compiled)
    fixed = FixedLaunch(kernel, (7, 1, 1), {"BLOCK": 16}, num_warps=4)
    x = torch.zeros(2)
    for _ in range(3):
        fixed(x, 5)
    assert kernel.said == [
        ("looked up", (7, 1, 1), (x, 5), {"BLOCK": 16, "num_warps": 4}),
        *[("direct", (7, 1, 1), (x, 5, 16))] * 2,
    ]


@pytest.mark.parametrize("gives", [lambda said: None, lambda said: object()], ids=["interpreter", "promise"])
def test_what_is_no_compiled_kernel_is_looked_up_again(gives):
    kernel = Kernel(gives)
    fixed = FixedLaunch(kernel, (1, 1, 1), {"BLOCK": 16})
    fixed(0, 1)
    fixed(0, 1)
    assert ways(kernel) == ["looked up"] * 2


def test_switches_of_triton_are_heeded_at_any_time(monkeypatch):
    kernel = Kernel(Compiled)
    fixed = FixedLaunch(kernel, (1, 1, 1), {"BLOCK": 16})
    fixed(0, 1)
    with knobs.runtime.scope():
        knobs.runtime.debug = True
        fixed(0, 1)
    monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "consan")
    fixed(0, 1)
    monkeypatch.undo()
    kernel.pre_run_hooks.append(lambda *arguments, **options: None)
    fixed(0, 1)
    kernel.pre_run_hooks.clear()
    fixed(0, 1)
    assert ways(kernel) == ["looked up"] * 4 + ["direct"]


def test_constants_are_the_last_parameters():
    with pytest.raises(AssertionError):
        FixedLaunch(Kernel(Compiled), (1, 1, 1), {"n": 16})
