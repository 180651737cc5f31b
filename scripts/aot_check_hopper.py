"""Compile the Hopper attention kernels for sm_90 without a GPU; fail on serialised wgmma or too many spills in a loop.

The limits are `CompiledHopper`'s: 2 in the forward, 16 in the backward, 88 there under a score mod.

python scripts/aot_check_hopper.py                                   every tile of the tables
python scripts/aot_check_hopper.py --dims 64 --dtypes bf16
python scripts/aot_check_hopper.py --dims 128 --tile 2 128 2 2       a forward tile of your own: consumers, block_n, ...
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = ("plain", "softcap")
MODS = ("alibi", "tanh")  # score mods, which add and which do not
KERNELS = ("forward", "order", "backward")
SHARED_LIMIT = 232_448  # bytes a block may take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--dims", type=int, nargs="+", choices=[64, 128], default=[64, 128])
    parser.add_argument("--group", type=int, default=4, help="query heads on a KV head")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS + MODS, default=VARIANTS + MODS)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--tile", type=int, nargs="+", default=None)
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    # after the switch: it decides what @triton.jit makes
    from packflex import score_mods
    from packflex.attention.hopper.aot import compile_backward, compile_forward, compile_order
    from packflex.attention.hopper.tiles import ForwardTile, default_backward_tile, default_forward_tile

    def reports(dtype: torch.dtype, dim: int, long: bool, variant: str) -> Iterator[tuple[Any, Any]]:
        """Tile and report of each kernel."""
        softcap, group = variant == "softcap", options.group
        mod = {"alibi": score_mods.alibi(group), "tanh": score_mods.softcap(20.0)}.get(variant)
        tile = ForwardTile(*options.tile) if options.tile else default_forward_tile(dim, group, long, softcap)
        if "forward" in options.kernels:
            yield tile, compile_forward(tile, dtype, dim, group, softcap=softcap, sinks=softcap, score_mod=mod)
        if "order" in options.kernels and variant == "plain":
            yield tile, compile_order(tile.positions(group), tile.block_n)
        if "backward" in options.kernels:
            tile = default_backward_tile(dim, long and mod is None, softcap)
            yield tile, compile_backward(tile, dtype, dim, group, softcap=softcap, score_mod=mod)

    faults = 0
    head = f"{'dtype':>5} {'D':>4} {'spans':<6} {'variant':<8} {'kernel':<22} {'registers':>9} {'spills':>7}"
    print(f"{head} {'in loops':>8} {'shared':>7}")
    for name, dim, long, variant in itertools.product(options.dtypes, options.dims, (False, True), options.variants):
        start = time.time()
        for tile, report in reports(DTYPES[name], dim, long, variant):
            fault = not report.clean or report.shared * tile.per_sm > SHARED_LIMIT
            faults += fault
            print(
                f"{name:>5} {dim:>4} {'long' if long else 'short':<6} {variant:<8} {report.kernel:<22} "
                f"{report.registers:>9} {report.spills:>7} {report.loop_spills:>8} {report.shared:>7}"
                f"{'  wgmma serialised' if report.serialised else ''}{'  FAULT' if fault else ''}"
            )
        print(f"    {time.time() - start:.1f} s", file=sys.stderr, flush=True)
    print(f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
