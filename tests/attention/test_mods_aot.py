"""Printed kernels compile ahead of time: what the interpreter lets pass, the compiler may not."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_check_mods.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dim", "mods"),
    [("90", "128", ["learned_slopes", "dilated_window"]), ("80", "64", ["key_bias", "natten_2d"])],
)
def test_printed_kernels_compile(capability, dim, mods):
    # a process of its own: here the kernels are the interpreter's
    command = [sys.executable, str(SCRIPT), "--capabilities", capability, "--dims", dim, "--only", *mods]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " mod_" in line or " mask_tiles" in line]
    assert len(lines) == 3 + 4, "forward, dK/dV and dQ of both, and the tiles of the mask"
