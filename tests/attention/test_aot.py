"""The default tiles compile ahead of time for sm_80 and sm_90 with no spills and no serialised wgmma (ptxas C751x)."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_check.py"


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_default_tiles(capability, dtype):
    # a process of its own: here the kernels are the interpreter's
    command = [sys.executable, str(SCRIPT), "--capabilities", capability, "--dtypes", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "_flex_" in line]
    assert len(lines) == 4 * (4 + 4 + 3), "four head dims; four kernels plain and with softcap, three for long spans"


def test_a_spilling_tile_is_found():
    code = (
        "import torch\n"
        "from packflex.attention.triton.aot import compile_kernels\n"
        "from packflex.attention.triton.tiles import KernelTiles, Tile\n"
        "greedy = KernelTiles(*[Tile(128, 128, 4, 2)] * 3)\n"
        "report, = compile_kernels(90, torch.bfloat16, 128, tiles=greedy, kernels=('dq',))\n"
        "print(report.clean, report.spills)\n"
    )
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    clean, spills = done.stdout.split()
    assert clean == "False"
    assert int(spills) > 100
