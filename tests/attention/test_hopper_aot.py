"""The Hopper kernels' default tiles compile for sm_90: no serialised wgmma (ptxas C75xx), few spills in loops."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton", exc_type=ImportError)
SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_check_hopper.py"


def run(*arguments):
    # a process of its own: here the kernels are the interpreter's
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("dim", ["64", "128"])
def test_default_tiles(dim):
    done = run("--dims", dim, "--dtypes", "bf16", "--variants", "plain")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "_hopper_" in line or "_work_order_" in line]
    assert len(lines) == 2 * 3, "short and long; three kernels"


@pytest.mark.slow
def test_softcap_and_sinks_in_fp16():
    done = run("--dims", "64", "--dtypes", "fp16", "--variants", "softcap", "--kernels", "forward", "backward")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("fp16   64") == 4


@pytest.mark.slow
@pytest.mark.parametrize("dim", ["64", "128"])
def test_score_mods(dim):
    done = run("--dims", dim, "--dtypes", "bf16", "--variants", "alibi", "tanh", "--kernels", "forward", "backward")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("_hopper_") == 2 * 2 * 2, "mods, spans, kernels"


def test_a_tile_that_spills_is_found():
    """A block of 128 keys at head dim 128 needs more registers than each of three consumers can have."""
    tile = ("--tile", "3", "128", "2", "1")
    done = run("--dims", "128", "--dtypes", "bf16", "--variants", "plain", "--kernels", "forward", *tile)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAULT" in done.stdout
    spilled = [int(line.split()[7]) for line in done.stdout.splitlines() if "_hopper_fwd_kernel" in line]
    assert min(spilled) > 2
