"""Ahead-of-time compilation of the kernels for a named architecture, without a GPU: registers, spills, warnings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from packflex.attention.triton.backward import _flex_bwd_delta_kernel, _flex_bwd_dkdv_kernel, _flex_bwd_dq_kernel
from packflex.attention.triton.forward import _flex_fwd_kernel
from packflex.attention.triton.launch import _PRECISION, DELTA_ROWS, _dims
from packflex.attention.triton.tiles import KernelTiles, Tile, default_tiles, edge_rows, heads_per_tile

_TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of one kernel: `spills` in bytes of loads and stores, `shared` memory in bytes."""

    kernel: str
    registers: int
    spills: int
    shared: int
    serialised: bool

    @property
    def clean(self) -> bool:
        """No register spills and no serialised wgmma (ptxas C7510 to C7519)."""
        return self.spills == 0 and not self.serialised


def compile_kernels(
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    group: int = 4,
    *,
    softcap: bool = False,
    sinks: bool = False,
    long: bool = False,
    tiles: KernelTiles | None = None,
    kernels: tuple[str, ...] = ("forward", "delta", "dkdv", "dq"),
) -> list[Compiled]:
    """Compile the kernels for compute capability `capability` (80, 90) and report on each.

    Args:
        capability: 80 for A100, 90 for H100 and H200.
        dtype: of q, k and v.
        head_dim: D, and Dv.
        group: query heads on a KV head.
        softcap: compile with a softcap.
        sinks: compile the forward with sinks.
        long: take the table's tiles for long spans.
        tiles: the table's by default.
        kernels: which of the four.

    Raises:
        RuntimeError: a kernel that does not assemble.
    """
    tiles = tiles or default_tiles(dtype, head_dim, capability, softcap, long)
    dims = _dims(head_dim, head_dim)
    reports = []
    for name in kernels:
        if name == "delta":
            constants: dict[str, Any] = {
                "V_DIM": head_dim,
                "BLOCK_DV": dims["BLOCK_DV"],
                "BLOCK_M": DELTA_ROWS,
                "HAS_GRAD_LSE": False,
            }
            reports.append(compile_for(_flex_bwd_delta_kernel, capability, dtype, constants, 4, 1))
            continue
        tile: Tile = getattr(tiles, name)
        constants = {
            "GROUP": group,
            "HEADS": heads_per_tile(group, tile),
            **dims,
            "SOFTCAP": softcap,
            "PRECISION": _PRECISION,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        if name == "forward":
            constants["HAS_SINKS"] = sinks
        if name == "dkdv":
            constants["EDGE_M"] = edge_rows(tile)
        kernel = {"forward": _flex_fwd_kernel, "dkdv": _flex_bwd_dkdv_kernel, "dq": _flex_bwd_dq_kernel}[name]
        reports.append(compile_for(kernel, capability, dtype, constants, tile.num_warps, tile.num_stages))
    return reports


def compile_for(
    kernel: Any,
    capability: int,
    dtype: torch.dtype,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    types: dict[str, str] | None = None,
) -> Compiled:
    """Compile one kernel whose parameters are named as all of ours are; `types` are those of others."""
    types = types or {}
    signature: dict[str, str] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name in ("LSE", "LSE2", "DELTA", "GRAD_LSE", "SINKS"):
            signature[name] = "*fp32"
        elif name.endswith(("_LO", "_HI", "NUM_BLOCKS", "INDICES")):
            signature[name] = "*i32"
        elif name.isupper():
            signature[name] = "*" + _TYPE_NAMES[dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride_") and name != "stride_is":
                attrs[(index,)] = [["tt.divisibility", 16]]
    # Triton bakes an argument equal to 1 into the kernel, as it does at launch for the intervals' stride
    if "stride_is" in signature:
        signature["stride_is"] = "constexpr"
        constants = constants | {"stride_is": 1}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    log = _assemble(compiled.asm["ptx"], capability)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    return Compiled(kernel.fn.__name__, registers, spills, compiled.metadata.shared, "C751" in log)


def _assemble(ptx: str, capability: int) -> str:
    """ptxas's resource report on a PTX module, warnings included."""
    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    ptxas = triton.knobs.nvidia.ptxas.path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={architecture}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout + done.stderr
