"""Compile the attention kernels for sm_80 and sm_90 without a GPU and fail on register spills or serialised wgmma.

python scripts/aot_check.py                            every tile of the tables
python scripts/aot_check.py --dims 64 --dtypes bf16
"""

import argparse
import os
import sys
import time
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VARIANTS: dict[str, Any] = {
    "plain": {},
    "softcap": {"softcap": True, "sinks": True},
    "long": {"long": True, "kernels": ("forward", "dkdv", "dq")},
}
SHARED_LIMIT = {80: 101_376, 90: 232_448}  # bytes a block may take; the sm_80 tables serve sm_86 and sm_89 too


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[90, 80])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 80, 128, 256])
    parser.add_argument("--group", type=int, default=4, help="query heads on a KV head")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    from packflex.attention.triton.aot import compile_kernels  # after the switch: it decides what @triton.jit makes

    faults = 0
    print(f"{'sm':>3} {'dtype':>5} {'D':>4} {'variant':<8} {'kernel':<24} {'registers':>9} {'spills':>7} {'shared':>7}")
    for capability in options.capabilities:
        for dtype in options.dtypes:
            for dim in options.dims:
                for variant in options.variants:
                    start = time.time()
                    reports = compile_kernels(capability, DTYPES[dtype], dim, options.group, **VARIANTS[variant])
                    for report in reports:
                        fault = not report.clean or report.shared > SHARED_LIMIT[capability]
                        faults += fault
                        print(
                            f"{capability:>3} {dtype:>5} {dim:>4} {variant:<8} "
                            f"{report.kernel:<24} {report.registers:>9} {report.spills:>7} {report.shared:>7}"
                            f"{'  wgmma serialised' if report.serialised else ''}{'  FAULT' if fault else ''}"
                        )
                    print(f"    {time.time() - start:.1f} s", file=sys.stderr, flush=True)
    print(f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
