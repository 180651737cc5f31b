"""Measure attention under ten common mods, their first calls, and the building of block masks, against torch's.

    TRITON_CACHE_DIR=$(mktemp -d) python scripts/bench_mods.py --output results/mods.json     # on a GPU
    python scripts/bench_mods.py --only alibi softcap --parts attention
    python scripts/bench_mods.py --device cpu --seq-len 256 --mask-len 256 --peers reference torch  # does it run?

Attention: six score mods on a causal mask and four masks, bf16, forward and backward, medians over CUDA events, warm.
`packflex` is `flex_attention(..., backend="triton")`, with `--backend hopper` or `best` those kernels or what it takes
itself; `torch` is its compiled flex_attention. Both get the same callables and the block mask that their own
`create_block_mask` returns. `of plain` is the time over the peer's own causal attention without a mod: the cost of the
mod for score mods, and for masks also the work that they leave. `difference` is the largest relative difference of
output and gradients from the first peer's, in Frobenius norm.

First call: seconds of the first forward and backward, tracing and compilation included. Caches are cold when the
folder of TRITON_CACHE_DIR is empty; without that variable a temporary one is used. The first row of each peer pays
for what its compiler loads as well.

Start: the same first call in two processes, one after the other over one cold cache: what a second process still pays.

Masks: `create_block_mask` of both (torch's compiled), in both directions, from call to end (clock, waiting for the
device) and in kernels alone, with the peak of memory above what was in use; the visited tiles must be the same.
packflex keeps masks that hold no tensor, and then makes nothing: `packflex, anew` is told to forget them before each
call.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_workloads import lognormal_row
from bench_attention import kernel_us, median_ms, versions
from torch import Tensor

from packflex import PackedLayout, create_block_mask, flex_attention, masks, score_mods
from packflex.masks.kept import forget

NAN = float("nan")
PEERS = ["packflex", "torch"]
FAILURES = (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError)


@dataclass(frozen=True)
class Case:
    """A score_mod, a mask_mod, the captured tensors that get a gradient, and the rows that the mask is for."""

    mask_mod: Callable[..., Tensor]
    score_mod: Callable[..., Tensor] | None = None
    learned: list[Tensor] = field(default_factory=list)
    mask_batch: int | None = None


@dataclass
class AttentionResult:
    """One peer under one mod; milliseconds, and seconds of the first call."""

    case: str
    peer: str
    forward_ms: float = NAN
    backward_ms: float = NAN
    first_call_s: float = NAN
    difference: float = NAN
    note: str = ""


@dataclass
class MaskResult:
    """One peer's building of one mask: call to end and kernels alone in milliseconds, peak memory in MiB."""

    case: str
    peer: str
    build_ms: float = NAN
    kernels_ms: float = NAN
    peak_mib: float = NAN
    first_call_s: float = NAN
    note: str = ""


@dataclass
class StartResult:
    """One process: seconds of tracing the mod, and of the first forward and backward, tracing included."""

    case: str
    process: str
    trace_s: float = NAN
    first_call_s: float = NAN
    note: str = ""


def _layout(options: argparse.Namespace, seq_len: int) -> PackedLayout:
    rng = np.random.default_rng(0)
    rows = [lognormal_row(rng, 900, 1.3, 32, seq_len, seq_len) for _ in range(options.batch)]
    return PackedLayout.from_lengths(rows, seq_len).to(options.device)


def mask_cases(options: argparse.Namespace, seq_len: int) -> dict[str, Callable[[], Case]]:
    """The masks, for attention and for building."""
    window = min(1024, seq_len // 4)

    def causal_documents() -> Case:
        layout = _layout(options, seq_len)
        return Case(masks.and_masks(masks.document(layout), masks.causal), mask_batch=options.batch)

    return {
        "document": causal_documents,
        "sliding_window": lambda: Case(masks.sliding_window(window)),
        "dilated_window": lambda: Case(masks.dilated_window(window // 4, 4)),
        "global_window": lambda: Case(masks.or_masks(masks.global_tokens(64), masks.sliding_window(window))),
    }


def attention_cases(options: argparse.Namespace) -> dict[str, Callable[[], Case]]:
    """The baseline, six score mods and four masks."""
    heads, device = options.heads, options.device

    def learned(make: Callable[[Tensor], Any], *shape: int) -> Callable[[], Case]:
        def build() -> Case:
            tensor = (torch.randn(*shape, device=device) / 4).requires_grad_()
            return Case(masks.causal, make(tensor), [tensor])

        return build

    def slopes() -> Case:
        tensor = score_mods.alibi_slopes(heads, device).requires_grad_()  # negative ones would be ill-conditioned
        return Case(masks.causal, score_mods.alibi(tensor), [tensor])

    return {
        "plain": lambda: Case(masks.causal),
        "alibi": lambda: Case(masks.causal, score_mods.alibi(heads, device)),
        "softcap": lambda: Case(masks.causal, score_mods.softcap(30.0)),
        "relative_bias": learned(lambda table: score_mods.relative_bias(table, bidirectional=False), heads, 32),
        "head_gate": learned(score_mods.head_gate, heads),
        "distance_penalty": lambda: Case(masks.causal, score_mods.distance_penalty(0.5)),
        "learned_slopes": slopes,
        **mask_cases(options, options.seq_len),
    }


def make_peer(peer: str, case: Case, options: argparse.Namespace) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The peer's attention with its own block mask."""
    shape = (case.mask_batch, None, options.seq_len, options.seq_len)
    if peer != "torch":
        mask = create_block_mask(case.mask_mod, *shape, device=options.device)
        backend = {"best": None}.get(options.backend, options.backend) if peer == "packflex" else peer
        return lambda q, k, v: flex_attention(
            q, k, v, score_mod=case.score_mod, block_mask=mask, enable_gqa=True, backend=backend
        )
    from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

    block_mask = torch_create_block_mask(case.mask_mod, *shape, device=options.device)
    torch._functorch.config.donated_buffer = False  # it forbids retain_graph, with which backward is repeated
    compiled = torch.compile(torch_flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, score_mod=case.score_mod, block_mask=block_mask, enable_gqa=True)


def measure_attention(
    name: str, peer: str, case: Case, options: argparse.Namespace, expected: list[Tensor]
) -> AttentionResult:
    """Time one peer; `expected` takes the first peer's output and gradients, and the others are compared with it."""
    device = torch.device(options.device)
    torch._dynamo.reset()  # past its limit of recompilations a compiled peer would run eagerly
    torch.manual_seed(0)

    def fresh(heads: int) -> Tensor:
        x = torch.randn(options.batch, options.seq_len, heads, options.head_dim, device=device, dtype=options.dtype)
        return x.transpose(1, 2)

    backward = device.type == "cuda" or peer != "torch"  # torch has no backward on CPUs
    q, k, v = (fresh(n).requires_grad_(backward) for n in (options.heads, options.kv_heads, options.kv_heads))
    grad = fresh(options.heads)
    inputs = (q, k, v, *case.learned)
    run = make_peer(peer, case, options)
    result = AttentionResult(name, peer)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    if backward:
        out = run(q, k, v)
        results = [out.detach(), *torch.autograd.grad(out, inputs, grad, retain_graph=True)]
    else:
        with torch.no_grad():
            results = [run(q, k, v)]
    wait()
    result.first_call_s = time.perf_counter() - start
    if expected:
        pairs = zip(results, expected, strict=False)
        result.difference = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
    else:
        expected.extend(results)
    del results
    if backward:

        def gradients() -> Any:
            return torch.autograd.grad(out, inputs, grad, retain_graph=True)

        start = time.perf_counter()
        gradients()
        wait()
        slow = time.perf_counter() - start > 0.5  # torch's sums of captured gradients take seconds
        result.backward_ms = median_ms(gradients, device, 3 if slow else options.repeats)
    with torch.no_grad():
        result.forward_ms = median_ms(lambda: run(q, k, v), device, options.repeats)
    return result


def measure_mask(name: str, peer: str, case: Case, options: argparse.Namespace, expected: list[Tensor]) -> MaskResult:
    """Time one peer's `create_block_mask`; `expected` takes the first peer's visited tiles."""
    device = torch.device(options.device)
    torch._dynamo.reset()
    shape = (case.mask_batch, None, options.mask_len, options.mask_len)

    if peer == "torch":
        from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask

        compiled = torch.compile(torch_create_block_mask)

    def build() -> Any:
        if peer == "torch":
            return compiled(case.mask_mod, *shape, device=options.device)
        if peer != "packflex":
            forget()
        mask = create_block_mask(case.mask_mod, *shape, device=options.device)
        if mask.kv_intervals is None:
            _ = mask.q_indices, mask.full_q_indices  # made when asked for; torch makes them at once
        return mask

    result = MaskResult(name, peer)
    start = time.perf_counter()
    mask = build()
    if device.type == "cuda":
        torch.cuda.synchronize()
    result.first_call_s = time.perf_counter() - start
    visited = mask.to_dense().bool()
    del mask
    if expected and not torch.equal(visited, expected[0]):
        result.note = "visits other tiles than the first peer"
    expected.append(visited)
    result.build_ms = _clock_ms(build, device, options.repeats)
    if device.type == "cuda":
        result.kernels_ms = kernel_us(build, options.repeats) / 1e3
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        build()
        result.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    return result


def _clock_ms(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median milliseconds from the call until the device has done."""
    taken = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken[3:])


def first_call(name: str, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of one trace of the mod alone, and of its first forward and backward, in this process."""
    from packflex.mods.lifted import lift

    case, device = attention_cases(options)[name](), torch.device(options.device)
    shape = (case.mask_batch, None, options.seq_len, options.seq_len)
    mask = create_block_mask(case.mask_mod, *shape, device=device)
    x = torch.randn(options.batch, options.heads, options.seq_len, options.head_dim, device=device, dtype=options.dtype)
    x.requires_grad_()
    start = time.perf_counter()
    if case.score_mod is not None:
        lift(case.score_mod, "score", x.device)
    traced = time.perf_counter()
    out = flex_attention(x, x, x, score_mod=case.score_mod, block_mask=mask, backend=options.start_backend)
    torch.autograd.grad(out.sum(), (x, *case.learned))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return traced - start, time.perf_counter() - start


def measure_start(name: str, options: argparse.Namespace) -> list[StartResult]:
    """The first call in two processes over one cache, which starts empty."""
    results = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = os.environ | {"TRITON_CACHE_DIR": folder}
        arguments = ["--child", name, "--device", options.device, "--seq-len", str(options.seq_len)]
        for process in ("first", "second"):
            done = subprocess.run(
                [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                results.append(StartResult(name, process, note=done.stderr.strip().splitlines()[-1][:160]))
                continue
            numbers = map(float, done.stdout.strip().splitlines()[-1].split())
            results.append(StartResult(name, process, *numbers))
    return results


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def _number(value: float, form: str = ".3f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def _plain(record: dict[str, list[Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results as JSON takes them: null for what was not measured."""
    return {
        part: [{key: None if value != value else value for key, value in asdict(r).items()} for r in results]
        for part, results in record.items()
    }


def attention_table(results: list[AttentionResult]) -> list[str]:
    """Markdown: packflex's and torch's times side by side, one row for each mod."""
    peers = list(dict.fromkeys(r.peer for r in results))
    found = {(r.case, r.peer): r for r in results}
    head = ["mod"]
    for what in ("fwd", "bwd"):
        for peer in peers:
            head += [f"{peer} {what} ms", *(["of plain"] if peer != "torch" else [])]
    head += [*(f"{peer} first call s" for peer in peers), "difference"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in dict.fromkeys(r.case for r in results):
        cells = [case]
        for what in ("forward_ms", "backward_ms"):
            for peer in peers:
                ms = getattr(found.get((case, peer), AttentionResult(case, peer)), what)
                plain = getattr(found.get(("plain", peer), AttentionResult("plain", peer)), what)
                cells += [_number(ms), *([_number(ms / plain, ".2f")] if peer != "torch" else [])]
        rows = [found.get((case, peer), AttentionResult(case, peer)) for peer in peers]
        cells += [_number(row.first_call_s, ".2f") for row in rows]
        differences = [row.difference for row in rows if not math.isnan(row.difference)]
        cells.append(_number(max(differences, default=NAN), ".1e"))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def mask_table(results: list[MaskResult]) -> list[str]:
    """Markdown: one row for each mask and peer."""
    head = ["mask", "peer", "build ms", "kernels ms", "peak MiB", "first call s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        numbers = [
            _number(r.build_ms),
            _number(r.kernels_ms),
            _number(r.peak_mib, ".1f"),
            _number(r.first_call_s, ".2f"),
        ]
        lines.append("| " + " | ".join([r.case, r.peer, *numbers]) + " |")
    return lines


def start_table(results: list[StartResult]) -> list[str]:
    """Markdown: one row for each mod and process."""
    lines = ["| mod | process | trace s | first call s |", "|---|---|---|---|"]
    for r in results:
        lines.append(f"| {r.case} | {r.process} | {_number(r.trace_s)} | {_number(r.first_call_s, '.2f')} |")
    return lines


def _cold_caches() -> tuple[str, Any]:
    """Point Triton's and Inductor's caches at one folder; says whether it is cold, and keeps a temporary one alive."""
    temporary = None
    if "TRITON_CACHE_DIR" not in os.environ:
        temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        os.environ["TRITON_CACHE_DIR"] = temporary.name
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    cold = not folder.exists() or not any(folder.iterdir())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    return ("cold" if cold else "warm") + " caches", temporary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts_known = ["attention", "masks", "start"]
    parser.add_argument("--parts", nargs="+", choices=parts_known, default=parts_known)
    parser.add_argument("--start", nargs="+", default=["alibi", "relative_bias"], help="mods of the part of that name")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)  # one process of "start"
    parser.add_argument("--only", nargs="+", default=None, help="names of mods and masks; plain runs with any of them")
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "reference"], default=PEERS)
    parser.add_argument("--backend", choices=["triton", "hopper", "best"], default="triton", help="packflex's kernels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=8192, help="for attention")
    parser.add_argument("--mask-len", type=int, default=32768, help="for create_block_mask")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default=None)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file, written after each measurement")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --seq-len 256 --mask-len 256 --peers reference torch tries it")
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    options.start_backend = "triton" if device.type == "cuda" else "reference"
    if options.child is not None:
        print(*first_call(options.child, options))
        return 0
    parts = {
        "attention": attention_cases(options),
        "masks": {"causal": lambda: Case(masks.causal), **mask_cases(options, options.mask_len)},
    }
    names = {name for cases in parts.values() for name in cases}
    if options.only and (unknown := set(options.only) - names):
        parser.error(f"--only takes {', '.join(sorted(names))}; got {', '.join(sorted(unknown))}")

    caches, temporary = _cold_caches()
    shape = f"B={options.batch} Hq={options.heads} Hkv={options.kv_heads} D={options.head_dim}"
    title = (
        f"{versions(device)}; {shape}, S={options.seq_len}, {options.dtype}; "
        f"masks of {options.mask_len} x {options.mask_len}; {caches}"
    )
    print(title, flush=True)
    record: dict[str, list[Any]] = {"attention": [], "masks": [], "start": []}
    measures: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "attention": (measure_attention, AttentionResult),
        "masks": (measure_mask, MaskResult),
    }
    if "start" in options.parts:
        record["start"] = [result for name in options.start for result in measure_start(name, options)]
    for part in (part for part in options.parts if part != "start"):
        measure, empty = measures[part]
        for name, build in parts[part].items():
            if options.only and name not in options.only and name != "plain":
                continue
            case, expected = build(), []
            peers = [peer for peer in options.peers if part == "attention" or peer in PEERS]
            if part == "masks" and "packflex" in peers:
                peers.insert(peers.index("packflex") + 1, "packflex, anew")
            for peer in peers:
                try:
                    result = measure(name, peer, case, options, expected)
                except FAILURES as error:
                    result = empty(name, peer, note=_reason(error))
                record[part].append(result)
                print(part, " ".join(f"{key}={value}" for key, value in asdict(result).items()), flush=True)
                if options.output is not None:  # a run that is cut off keeps what it measured
                    options.output.parent.mkdir(parents=True, exist_ok=True)
                    options.output.write_text(json.dumps({"title": title, **_plain(record)}, indent=1))
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    print(f"\n{title}\n")
    for part, table in (("attention", attention_table), ("masks", mask_table), ("start", start_table)):
        if record[part]:
            print("\n".join([*table(record[part]), ""]))
    for result in (r for results in record.values() for r in results if r.note):
        print(f"{result.case}, {getattr(result, 'peer', None) or result.process}: {result.note}")
    if temporary is not None:
        temporary.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
