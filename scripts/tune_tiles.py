"""Time candidate tiles of each kernel on the attention workloads, for the tables in `packflex/attention/*/tiles.py`.

    python scripts/tune_tiles.py --out results                    # bf16, all six workloads
    python scripts/tune_tiles.py --workloads sft --kernels dkdv
    python scripts/tune_tiles.py --backend hopper --out results   # the Gluon kernels: see hopper_candidates.py

Candidates are compiled first, in parallel processes, on a small problem of the same shapes; then each is timed with the
other kernels at their defaults. Prints the fastest of each workload and kernel, and writes every time to JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
from attention_workloads import NAMES, Workload, make_workload
from bench_attention import median_ms, versions

from packflex import PackedLayout, document_mask, flex_attention

# block_m, block_n, warps, stages
CANDIDATES: dict[tuple[str, int], list[tuple[int, ...]]] = {
    ("forward", 64): [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    ("forward", 128): [
        (64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
    ],
    ("dkdv", 64): [(32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 3)],
    ("dkdv", 128): [(32, 64, 4, 3), (32, 64, 4, 4), (64, 64, 8, 3), (64, 128, 8, 2)],
    ("dq", 64): [(64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3)],
    ("dq", 128): [(64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
}  # fmt: skip
HEADS = (1, 4)
KERNELS = {"triton": ["forward", "dkdv", "dq"], "hopper": ["forward", "backward"]}


def candidates(kernel: str, work: Workload) -> list[tuple[int, ...]]:
    """Tiles to time: block_m, block_n, warps, stages, heads."""
    heads = HEADS if work.heads != work.kv_heads else (1,)
    return [(*base, h) for base in CANDIDATES[kernel, work.head_dim] for h in heads]


def options_of(kernel: str, candidate: tuple[int, ...]) -> dict[str, int]:
    names = ("block_m", "block_n", "num_warps", "num_stages", "max_heads")
    return {f"{kernel}_{name}": value for name, value in zip(names, candidate, strict=True)}


def problem(work: Workload) -> tuple[Any, ...]:
    layout = PackedLayout.from_lengths(work.lengths, work.seq_len).to("cuda")
    mask = document_mask(layout, causal=work.causal, window=work.window)
    shape = (len(work.lengths), work.seq_len)
    tensors = [
        torch.randn(*shape, heads, work.head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (work.heads, work.kv_heads, work.kv_heads, work.heads)
    ]
    return *(x.requires_grad_() for x in tensors[:3]), tensors[3], mask


def time_candidate(kernel: str, candidate: tuple[int, ...], data: tuple[Any, ...], repeats: int) -> float:
    """Median milliseconds of forward, or of the whole backward with this kernel's tile."""
    q, k, v, grad, mask = data
    options = options_of(kernel, candidate)

    def forward() -> Any:
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend="triton", kernel_options=options)

    if kernel == "forward":
        with torch.no_grad():
            return median_ms(forward, torch.device("cuda"), repeats)
    out = forward()
    return median_ms(
        lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), torch.device("cuda"), repeats
    )


def warm(job: tuple[str, tuple[int, ...], Workload]) -> str:
    """Compile one candidate on a small problem; returns why it failed, or nothing."""
    kernel, candidate, work = job
    try:
        time_candidate(kernel, candidate, problem(work), 1)
    except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    except Exception as error:  # Triton's OutOfResources and compiler errors share no base class
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    return ""


def tune_hopper(options: argparse.Namespace) -> dict[str, Any]:
    """Check and time the candidates of the Hopper kernels; prints a table of the fastest and of what failed."""
    from hopper_candidates import MAX_ERROR, candidates, check_all, describe, time_all

    works = {name: make_workload(name) for name in options.workloads}
    record: dict[str, Any] = {"times": [], "failed": []}
    for kernel in options.kernels:
        jobs = []
        for work in works.values():
            for candidate in candidates(kernel, work.head_dim, work.heads // work.kv_heads):
                job = (candidate, (2 * work.heads // work.kv_heads, 2))
                if job not in jobs:
                    jobs.append(job)
        verdicts = check_all(jobs, options.processes, options.seconds)
        for (candidate, heads), why in zip(jobs, verdicts, strict=True):
            if why:
                record["failed"].append(f"{candidate}, heads {heads}: {why}")
                print(f"FAILED {record['failed'][-1]}", flush=True)
        good = {job for job, why in zip(jobs, verdicts, strict=True) if not why}
        for name, work in works.items():
            heads = (2 * work.heads // work.kv_heads, 2)
            tiles = [c for c in candidates(kernel, work.head_dim, work.heads // work.kv_heads) if (c, heads) in good]
            results, portable = time_all(name, kernel, tiles, options.repeats, options.seconds)
            tflops = work.flops(kernel != "forward") / 1e9
            timed = []
            for candidate, result in zip(tiles, results, strict=True):
                entry = {"workload": name, "kernel": kernel, "tile": candidate.options}
                if isinstance(result, tuple) and result[1] <= MAX_ERROR:
                    timed.append((result[0], describe(candidate.tile)))
                    record["times"].append(entry | {"ms": result[0], "error": result[1]})
                else:
                    record["failed"].append(f"{name}, {candidate}: {result}")
                    print(f"FAILED {record['failed'][-1]}", flush=True)
            timed.sort()
            print(f"{name} {kernel}: portable {portable:.3f} ms {tflops / portable:.0f} TFLOP/s")
            for ms, tile in timed[: options.shown]:
                print(f"    {ms:8.3f} ms {tflops / ms:5.0f} TFLOP/s  {tile}", flush=True)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--backend", choices=list(KERNELS), default="triton")
    parser.add_argument("--kernels", nargs="+", choices=sorted({*itertools.chain(*KERNELS.values())}), default=None)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--shown", type=int, default=5, help="fastest candidates to print")
    parser.add_argument("--seconds", type=float, default=120, help="longest silence of a process (hopper)")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    options.kernels = options.kernels or KERNELS[options.backend]
    if set(options.kernels) - set(KERNELS[options.backend]):
        parser.error(f"the kernels of --backend {options.backend} are {', '.join(KERNELS[options.backend])}")
    if options.backend == "hopper":
        record = tune_hopper(options)
        title = versions(torch.device("cuda"))  # last: its processes are forked, and CUDA must be new in each
        print(title)
        return write(record | {"title": title}, options.out, "hopper_tiles.json")
    works = {name: make_workload(name) for name in options.workloads}

    jobs, seen = [], set()
    for work in works.values():
        small = Workload(work.name, 256, ((100, 156),) * 2, work.heads, work.kv_heads, work.head_dim, work.causal)
        for kernel in options.kernels:
            for candidate in candidates(kernel, work):
                key = (kernel, candidate, work.head_dim, work.heads // work.kv_heads)
                if key not in seen:
                    seen.add(key)
                    jobs.append((kernel, candidate, small))
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        failures = pool.map(warm, jobs, chunksize=1)
    failed = {(k, c, w.head_dim, w.heads // w.kv_heads): f for (k, c, w), f in zip(jobs, failures, strict=True) if f}

    title = versions(torch.device("cuda"))
    record: dict[str, Any] = {"title": title, "times": [], "failed": [f"{key}: {why}" for key, why in failed.items()]}
    print(title)
    for name, work in works.items():
        data = problem(work)
        for kernel in options.kernels:
            times = []
            for candidate in candidates(kernel, work):
                if (kernel, candidate, work.head_dim, work.heads // work.kv_heads) not in failed:
                    times.append((time_candidate(kernel, candidate, data, options.repeats), candidate))
            times.sort()
            record["times"] += [{"workload": name, "kernel": kernel, "tile": c, "ms": ms} for ms, c in times]
            tflops = work.flops(kernel != "forward") / 1e9
            best = "; ".join(f"{c} {ms:.3f} ms {tflops / ms:.0f}" for ms, c in times[: options.shown])
            print(f"{name:<9} {kernel:<8} {best}", flush=True)
    return write(record, options.out, "tiles.json")


def write(record: dict[str, Any], folder: Path | None, name: str) -> int:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
