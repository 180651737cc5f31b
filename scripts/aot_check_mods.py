"""Compile the kernels printed for common mods for sm_80 and sm_90 without a GPU; fail on needless spills.

    python scripts/aot_check_mods.py                              every mod, bf16, D 64 and 128
    python scripts/aot_check_mods.py --only alibi strided --dims 128

For each kernel the tile that would run: the first of the tables' that spills (almost) nothing, else the one that spills
least. A wgmma that ptxas serialises is a fault, and so are spills, but for some where the fastest tiles have
them, and for the gradients of tables that differ from element to element (`relative_bias`), which dQ sums in its tile.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

HEADS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[90, 80])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--only", nargs="+", default=None, help="names of mods")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    # after the switch: it decides what @triton.jit makes
    from packflex import masks, score_mods
    from packflex.attention.mods.aot import compile_mask_tiles, compile_mod_kernels

    def learned(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, requires_grad=True)

    scores = {
        "alibi": score_mods.alibi(HEADS),
        "learned_slopes": score_mods.alibi(learned(HEADS)),
        "softcap": score_mods.softcap(30.0),
        "head_gate": score_mods.head_gate(learned(HEADS)),
        "distance_penalty": score_mods.distance_penalty(0.5),
        "key_bias": score_mods.absolute_bias(learned(512)),
        "relative_bias": score_mods.relative_bias(learned(HEADS, 32), bidirectional=False),
    }
    seen = {
        "strided": masks.strided(16),
        "dilated_window": masks.dilated_window(64, 4),
        "global_window": masks.or_masks(masks.global_tokens(16), masks.sliding_window(256)),
        "natten_2d": masks.natten_2d(32, 32, 7),
    }
    chosen = options.only or [*scores, *seen]
    if unknown := set(chosen) - {*scores, *seen}:
        parser.error(f"--only takes {', '.join([*scores, *seen])}; got {', '.join(sorted(unknown))}")

    faults = 0
    print(f"{'sm':>3} {'D':>4} {'mod':<17} {'kernel':<12} {'tile':<14} {'registers':>9} {'spills':>7}")
    for capability in options.capabilities:
        for name in chosen:
            reports = []
            if name in seen:
                reports.append((0, "", compile_mask_tiles(capability, seen[name])))
            for dim in options.dims:
                for tile, report in compile_mod_kernels(
                    capability, torch.bfloat16, dim, scores.get(name), seen.get(name), group=4, long=True
                ):
                    reports.append((dim, f"{tile.block_m}x{tile.block_n}, {tile.num_warps}", report))
            for dim, tile_name, report in reports:
                spills = report.spills > (32 if report.kernel == "mod_dq" else 256) and name != "relative_bias"
                fault = spills or report.serialised
                faults += fault
                print(
                    f"{capability:>3} {dim or '':>4} {name:<17} {report.kernel:<12} {tile_name:<14} "
                    f"{report.registers:>9} {report.spills:>7}{'  wgmma serialised' if report.serialised else ''}"
                    f"{'  FAULT' if fault else ''}",
                    flush=True,
                )
    print(f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
