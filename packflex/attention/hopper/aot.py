"""Ahead-of-time compilation of the Hopper kernels for sm_90, without a GPU: registers, spills, warnings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from packflex.attention.hopper.backward import _hopper_bwd_kernel
from packflex.attention.hopper.cases import backward_boxes, backward_constants, forward_constants, launch_options
from packflex.attention.hopper.descriptors import box_layout
from packflex.attention.hopper.forward import _hopper_fwd_kernel
from packflex.attention.hopper.mods import BoundMod, bound_mod
from packflex.attention.hopper.order import _work_order_kernel
from packflex.attention.hopper.tiles import ROWS, BackwardTile, ForwardTile
from packflex.attention.mods.aot import mod_types
from packflex.attention.triton.aot import Compiled, _assemble
from packflex.mods.lifted import lift
from packflex.mods.printer import Printer


@dataclass(frozen=True)
class CompiledHopper(Compiled):
    """`Compiled`, and `loop_spills`: most instructions that move spilled registers in a loop over unmasked blocks.

    Spills elsewhere cost a few cycles a tile of thousands; ptxas makes some where the roles of the warps part. Two such
    instructions in a loop of more than 400, reloads of its bound and the like, are let pass, and 16 in the backward:
    its fastest tiles at head dim 128 have 7 and 15, and no fewer make it faster (docs/log.md). Under mods up to 88 are:
    two consumers that spill so many are a fifth faster there than one that spills a dozen.
    """

    loop_spills: int = 0
    allowed: int = 2

    @property
    def clean(self) -> bool:
        """No more spills in the loops over unmasked blocks than `allowed`, and no serialised wgmma (ptxas C75xx)."""
        return self.loop_spills <= self.allowed and not self.serialised


TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def descriptor_type(block: list[int], dtype: torch.dtype, swizzle: int = -1) -> str:
    """The signature of a TMA descriptor for boxes of shape `block`."""
    return f"tensordesc<{TYPE_NAMES[dtype]}{block},{box_layout(block, dtype, swizzle)!r}>"


def compile_forward(
    tile: ForwardTile,
    dtype: torch.dtype,
    head_dim: int,
    group: int = 4,
    *,
    softcap: bool = False,
    sinks: bool = False,
    score_mod: Callable[..., Any] | None = None,
) -> CompiledHopper:
    """Compile the forward kernel for sm_90 and report on it; with a `score_mod`, whose tensors are on the CPU.

    Raises:
        RuntimeError: a kernel that does not assemble.
    """
    heads = tile.heads(group)
    rows = descriptor_type([1, ROWS // heads, heads, head_dim], dtype)
    keys = descriptor_type([1, tile.block_n, 1, head_dim], dtype)
    signature = {"q_desc": rows, "o_desc": rows, "k_desc": keys, "v_desc": keys}
    mod, types = _lifted(score_mod)
    constants = forward_constants(tile, head_dim, group, softcap, sinks, mod.functions if mod else None)
    return _compile(_hopper_fwd_kernel, signature | types, constants, launch_options(tile), gluon=True)


def _lifted(score_mod: Callable[..., Any] | None) -> tuple[BoundMod | None, dict[str, Any]]:
    if score_mod is None:
        return None, {"mod_args": ("i32",)}
    lifted = lift(score_mod, "score", torch.device("cpu"))
    types = mod_types("x", lifted.program, False)
    names = Printer(lifted.program, "x").parameters()
    mod = bound_mod(lifted.program, lifted.captures, lifted.numbers)
    packed: list[str] = []
    for name in names:
        packed += [types[name]] if types.get(name, "i32") != "i32" else ["fp32", "fp32"]
    return mod, {"mod_args": tuple(packed) or ("i32",)}


def compile_backward(
    tile: BackwardTile,
    dtype: torch.dtype,
    head_dim: int,
    group: int = 4,
    *,
    softcap: bool = False,
    score_mod: Callable[..., Any] | None = None,
) -> CompiledHopper:
    """Compile the backward kernel for sm_90 and report on it; raises as `compile_forward`."""
    fp32 = ("lse_desc", "delta_desc", "dq_desc")
    mod, types = _lifted(score_mod)
    signature: dict[str, Any] = {
        name: descriptor_type(block, torch.float32 if name in fp32 else dtype, swizzle)
        for name, (block, swizzle) in backward_boxes(tile, head_dim, group).items()
    }
    signature |= {"GRAD_K": f"*{TYPE_NAMES[dtype]}", "GRAD_V": f"*{TYPE_NAMES[dtype]}"}
    constants = backward_constants(tile, head_dim, group, softcap, mod.functions if mod else None)
    report = _compile(_hopper_bwd_kernel, signature | types, constants, launch_options(tile), gluon=True)
    return replace(report, allowed=16 if mod is None else 88)


def compile_order(rows: int, columns: int) -> CompiledHopper:
    """Compile the kernel of the work order and report on it."""
    return _compile(_work_order_kernel, {}, {"ROWS": rows, "COLUMNS": columns, "TILES": 64}, {"num_warps": 4})


def _compile(
    kernel: Any, types: dict[str, Any], constants: dict[str, Any], options: dict[str, Any], gluon: bool = False
) -> CompiledHopper:
    signature: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name in ("scale", "sm", "cap_in", "cap_out"):
            signature[name] = "fp32"
        elif name in ("KV_LO", "KV_HI", "Q_LO", "Q_HI", "INTERVALS", "PLAN"):
            signature[name] = "*i32"
        elif name.isupper():
            signature[name] = "*fp32"
        else:
            signature[name] = "i32"
    kind = GluonASTSource if gluon else ASTSource
    source = kind(fn=kernel, signature=signature, constexprs=constants, attrs={})  # as at launch: no alignment is known
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    log = _assemble(compiled.asm["ptx"], 90)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    loop_spills = _loop_spills(compiled.asm["cubin"])
    return CompiledHopper(kernel.fn.__name__, registers, spills, compiled.metadata.shared, "C75" in log, loop_spills)


def _loop_spills(cubin: bytes) -> int:
    """Local loads and stores in the loops over unmasked blocks, of the consumer that has most.

    Each consumer has three innermost wgmma loops side by side, the shortest of which has no mask.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = [
        (int(m[1], 16), m[2])
        for line in listing.splitlines()
        if (m := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", line))
    ]
    end = max(address for address, text in code if "EXIT" in text)  # what waits for barriers lies behind it
    loops = []
    for address, text in code:
        branch = re.search(r"\bBRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address < end:
            body = [line for at, line in code if int(branch[1], 16) <= at <= address]
            loops.append((int(branch[1], 16), address, body))
    loops = [loop for loop in loops if any("HGMMA" in line for line in loop[2])]
    inner = [
        a
        for a in loops
        if not any(b is not a and a[0] <= b[0] and b[1] <= a[1] and len(b[2]) < len(a[2]) for b in loops)
    ]
    if not inner:
        return 0
    products = [sum("HGMMA" in line for line in body) for _, _, body in inner]
    bodies = [body for (_, _, body), n in sorted(zip(inner, products, strict=True)) if n == max(products)]
    unmasked = [min(bodies[i : i + 3], key=len) for i in range(0, len(bodies), 3)]
    return max(sum("LDL" in line or "STL" in line for line in body) for body in unmasked)
