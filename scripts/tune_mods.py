"""Time the tiles that printed kernels choose from, for each mod of `bench_mods.py`: which spill, and which are fast.

    python scripts/tune_mods.py --output results/tune_mods.json          # on a GPU; compiles in 12 processes first
    python scripts/tune_mods.py --only alibi head_gate --kernels dkdv

One kernel's tile varies, the others are what packflex takes by itself; that choice is the line "own".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench_attention import median_ms
from bench_mods import Case, attention_cases
from torch import Tensor

from packflex import create_block_mask, flex_attention

Numbers = tuple[int, int, int, int]
CANDIDATES: dict[str, list[Numbers]] = {  # block_m, block_n, warps, stages
    "forward": [(128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)],
    "dkdv": [(64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3), (32, 64, 4, 3), (32, 64, 4, 2), (16, 64, 4, 3)],
    "dq": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)],
}
NAMES = ("block_m", "block_n", "num_warps", "num_stages")


def variants(kernels: list[str]) -> list[tuple[str, dict[str, int]]]:
    found: list[tuple[str, dict[str, int]]] = [("own", {})]
    for kernel in kernels:
        for numbers in CANDIDATES[kernel]:
            options = {f"{kernel}_{name}": value for name, value in zip(NAMES, numbers, strict=True)}
            found.append((f"{kernel} {numbers}", options))
    return found


def measure(case: Case, options: argparse.Namespace, tiles: dict[str, int], repeats: int) -> tuple[float, float]:
    """Milliseconds of forward and backward."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)

    def fresh(heads: int) -> Tensor:
        shape = (options.batch, options.seq_len, heads, options.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2)

    q, k, v = (fresh(n).requires_grad_() for n in (options.heads, options.kv_heads, options.kv_heads))
    grad = fresh(options.heads)
    shape = (case.mask_batch, None, options.seq_len, options.seq_len)
    mask = create_block_mask(case.mask_mod, *shape, device=device)

    def run() -> Tensor:
        return flex_attention(
            q, k, v, score_mod=case.score_mod, block_mask=mask, enable_gqa=True, backend="triton",
            kernel_options=tiles or None,
        )  # fmt: skip

    out = run()
    backward = median_ms(
        lambda: torch.autograd.grad(out, (q, k, v, *case.learned), grad, retain_graph=True), device, repeats
    )
    with torch.no_grad():
        return median_ms(run, device, repeats), backward


def compile_all(names: list[str], options: argparse.Namespace) -> None:
    """Fill Triton's cache: one process a mod, on short rows of the same kind."""
    command = [sys.executable, __file__, "--compile-only", "--kernels", *options.kernels]
    waiting = [[*command, "--only", name] for name in names]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < options.processes:
            running.append(subprocess.Popen(waiting.pop(0)))
        running.pop(0).wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--kernels", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--compile-only", action="store_true", help="run each variant once")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    options.device, options.dtype = "cuda", torch.bfloat16
    cases = attention_cases(options)
    names = options.only or list(cases)
    if not options.compile_only:
        compile_all(names, options)
    record: dict[str, Any] = {}
    for name in names:
        case = cases[name]()
        lines: dict[str, tuple[float, float] | str] = {}
        for label, tiles in variants(options.kernels):
            try:
                lines[label] = measure(case, options, tiles, 1 if options.compile_only else options.repeats)
            except Exception as error:  # a tile may not fit, which is an answer too
                lines[label] = f"{type(error).__name__}: {str(error)[:60]}"
        if options.compile_only:
            continue
        record[name] = lines
        for label, result in lines.items():
            text = result if isinstance(result, str) else f"{result[0]:.3f} {result[1]:.3f}"
            print(f"{name:<17} {label:<24} {text}", flush=True)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
