"""Measure packflex against its peers on packed documents: forward, backward, mask building, errors.

    python scripts/bench_attention.py --out results            # on a GPU: the six workloads, a table, JSON and a PNG
    python scripts/bench_attention.py --others                 # the distributions that must not fall off as well
    python scripts/bench_attention.py --device cpu --seq-len 256 --peers reference torch   # does the script run?

TFLOP/s count the attended pairs alone (4 D a pair and head forward, 10 D backward). Times are medians over CUDA events,
warm, on random data; each peer's output and gradients are checked on sampled documents against float64 first. A peer
that cannot run is a row with its reason. `roof` is the larger of the arithmetic and the memory time of the exact work
at the ceilings (matmul, copy) measured in the same run, over the measured time. `mask us` is the time of building the
mask from call to end, `GPU us` what of it the GPU spends in kernels.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from attention_workloads import NAMES, OTHER_NAMES, Workload, make_workload
from torch import Tensor

from packflex import PackedLayout, document_mask, flex_attention

# A peer takes q, k, v as [B, H, S, D] and gives out in the same order.
Run = Callable[[Tensor, Tensor, Tensor], Tensor]
PEERS = ["packflex", "flex", "flex_autotuned", "varlen", "cudnn", "fa4"]


@dataclass
class Result:
    """One peer on one workload; times in milliseconds, `error` the largest relative error, or why it did not run."""

    workload: str
    peer: str
    forward_ms: float = float("nan")
    backward_ms: float = float("nan")
    forward_tflops: float = float("nan")
    backward_tflops: float = float("nan")
    forward_roof: float = float("nan")
    backward_roof: float = float("nan")
    mask_us: float = float("nan")
    mask_kernels_us: float = float("nan")
    error: float = float("nan")
    note: str = ""


def median_ms(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of one call, by device events on a GPU and by the clock on a CPU."""
    for _ in range(3):
        call()
    times = []
    if device.type != "cuda":
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start_event, end_event in pairs:
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(start_event.elapsed_time(end_event) for start_event, end_event in pairs)


def kernel_us(call: Callable[[], Any], repeats: int) -> float:
    """Microseconds of one call that the GPU spends in kernels, whatever the CPU needs to launch them."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    kernels = (event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(event.device_time_total for event in kernels) / repeats


def make_peer(peer: str, work: Workload, layout: PackedLayout) -> tuple[Run, Callable[[], Any] | None]:
    """The peer's attention on this layout, and what builds its mask (None where the layout alone is enough)."""
    gqa = work.heads != work.kv_heads
    options: dict[str, Any] = {"enable_gqa": gqa}
    if peer in ("packflex", "hopper", "triton", "reference", "torch"):
        backend = None if peer == "packflex" else peer  # what a user gets who names none

        def build() -> Any:
            layout._block_masks.clear()
            return document_mask(layout, causal=work.causal, window=work.window)

        mask = build()
        return lambda q, k, v: flex_attention(q, k, v, block_mask=mask, backend=backend, **options), build
    if peer in ("flex", "flex_autotuned"):
        from torch.nn.attention.flex_attention import create_block_mask
        from torch.nn.attention.flex_attention import flex_attention as torch_flex

        ids = layout.document_ids

        def seen(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            same = (ids[b, q_idx] == ids[b, kv_idx]) & (ids[b, q_idx] >= 0)
            if work.causal:
                same = same & (q_idx >= kv_idx)
            return same & (q_idx - kv_idx < work.window) if work.window is not None else same

        size, batch = work.seq_len, len(work.lengths)
        compiled_mask = torch.compile(create_block_mask)

        def build_flex() -> Any:
            return compiled_mask(seen, batch, None, size, size, device=str(ids.device))

        block_mask = build_flex()
        torch._functorch.config.donated_buffer = False  # it forbids retain_graph, with which backward is repeated
        mode = "max-autotune-no-cudagraphs" if peer == "flex_autotuned" else None
        compiled = torch.compile(torch_flex, dynamic=False, mode=mode)
        return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, **options), build_flex
    if peer == "cudnn":
        if work.window is not None or any(row != (work.seq_len,) for row in work.lengths):
            raise ValueError("cuDNN through SDPA has no document mask; it runs on whole rows only")
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=work.causal, **options)

        return cudnn, None
    return _varlen_peer(peer, work, layout), None


def _varlen_peer(peer: str, work: Workload, layout: PackedLayout) -> Run:
    """Peers that take tokens as [T, H, D] and cu_seqlens; a padded tail becomes documents of its own."""
    ends: list[int] = [0]
    for row in work.lengths:
        for length in (*row, work.seq_len - sum(row)):
            if length:
                ends.append(ends[-1] + length)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=layout.device)
    longest = max(b - a for a, b in itertools.pairwise(ends))

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    left = work.window - 1 if work.window is not None else -1
    if peer == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, Any] = {"window_size": (left, 0 if work.causal else -1)}
        if work.heads != work.kv_heads and "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True  # before torch 2.12 it takes fewer heads of keys as they are

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    elif peer == "fa4":
        from flash_attn.cute import flash_attn_varlen_func

        window = (left, 0) if work.window is not None else (None, None)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest,
                causal=work.causal, window_size=window,
            )  # fmt: skip
            return result[0] if isinstance(result, tuple) else result
    else:
        raise ValueError(f"unknown peer {peer!r}")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = call(flat(q), flat(k), flat(v))
        return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2)

    return run


def largest_error(work: Workload, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, grads: Any) -> float:
    """Largest relative error of out, dq, dk, dv over sampled documents of each row, against float64.

    NaN when no sampled document is short enough (16384 tokens) for its scores to be held in float64.
    """
    errors = [float("nan")]
    for b, row in enumerate(work.lengths):
        start = 0
        sampled = {0, len(row) // 2, len(row) - 1}
        for index, length in enumerate(row):
            if index in sampled and length <= 16384 and (length <= 4096 or b == 0):
                errors.append(_document_error(work, b, slice(start, start + length), q, k, v, out, grad, grads))
            start += length
    return max(errors[1:], default=errors[0])


def _document_error(
    work: Workload, b: int, at: slice, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, grads: Any
) -> float:
    """Of the query heads of the first KV group, one by one: a long document's scores are held for one head only."""
    kd, vd = (x[b, 0, at].detach().double().requires_grad_() for x in (k, v))
    index = torch.arange(kd.shape[0], device=q.device)
    distance = index[:, None] - index[None]
    seen = distance >= 0 if work.causal else torch.ones_like(distance, dtype=torch.bool)
    if work.window is not None:
        seen = seen & (distance < work.window)
    exact_dk, exact_dv = torch.zeros_like(kd), torch.zeros_like(vd)
    pairs = []
    for head in range(work.heads // work.kv_heads):
        qd = q[b, head, at].detach().double().requires_grad_()
        exact = (qd @ kd.T * work.head_dim**-0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ vd
        exact_dq, head_dk, head_dv = torch.autograd.grad(exact, (qd, kd, vd), grad[b, head, at].double())
        exact_dk += head_dk
        exact_dv += head_dv
        pairs += [(out[b, head, at], exact.detach()), (grads[0][b, head, at], exact_dq)]
    pairs += [(grads[1][b, 0, at], exact_dk), (grads[2][b, 0, at], exact_dv)]
    return max(((ours.double() - e).norm() / e.norm().clamp(min=1e-30)).item() for ours, e in pairs)


def measure(
    peer: str, work: Workload, device: torch.device, dtype: torch.dtype, repeats: int, roofs: tuple[float, float]
) -> Result:
    """Check, then time one peer on one workload."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # a compiled peer starts afresh: past its limit of recompilations it would run eagerly
    layout = PackedLayout.from_lengths(work.lengths, work.seq_len).to(device)
    run, build = make_peer(peer, work, layout)
    batch = len(work.lengths)

    def fresh(heads: int) -> Tensor:
        x = torch.randn(batch, work.seq_len, heads, work.head_dim, device=device, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    q, k, v = fresh(work.heads), fresh(work.kv_heads), fresh(work.kv_heads)
    grad = torch.randn(batch, work.seq_len, work.heads, work.head_dim, device=device, dtype=dtype).transpose(1, 2)
    result = Result(work.name, peer)
    backward = peer != "torch" or device.type == "cuda"
    if backward:
        out = run(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        result.error = largest_error(work, q, k, v, out, grad, grads)
        result.backward_ms = median_ms(
            lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), device, repeats
        )
    with torch.no_grad():
        result.forward_ms = median_ms(lambda: run(q, k, v), device, repeats)
        if build is not None:
            result.mask_us = 1e3 * median_ms(build, device, repeats)
            if device.type == "cuda":
                result.mask_kernels_us = kernel_us(build, repeats)
    for name in ("forward", "backward"):
        seconds = getattr(result, f"{name}_ms") / 1e3
        flops, moved = work.flops(name == "backward"), work.bytes_moved(name == "backward")
        setattr(result, f"{name}_tflops", flops / seconds / 1e12)
        setattr(result, f"{name}_roof", max(flops / roofs[0], moved / roofs[1]) / seconds)
    return result


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Matmul FLOP/s and copy bytes/s of this device, measured."""
    size, length = (8192, 2**30) if device.type == "cuda" else (512, 2**24)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(length // 4, device=device)
    target = torch.empty_like(source)
    matmul = 2 * size**3 / (median_ms(lambda: a @ b, device, 20) / 1e3)
    copy = 2 * length / (median_ms(lambda: target.copy_(source), device, 20) / 1e3)
    return matmul, copy


def print_table(results: list[Result]) -> None:
    print(
        f"{'workload':<13} {'peer':<15} {'fwd ms':>8} {'bwd ms':>8} {'fwd TF/s':>9} {'bwd TF/s':>9} {'roof':>11} "
        f"{'mask us':>8} {'GPU us':>7} {'error':>8}  note"
    )
    for r in results:
        print(
            f"{r.workload:<13} {r.peer:<15} {r.forward_ms:>8.3f} {r.backward_ms:>8.3f} {r.forward_tflops:>9.1f} "
            f"{r.backward_tflops:>9.1f} {r.forward_roof:>5.0%}/{r.backward_roof:>4.0%} {r.mask_us:>8.1f} "
            f"{r.mask_kernels_us:>7.1f} {r.error:>8.1e}  {r.note[:60]}"
        )


def plot(results: list[Result], title: str, path: Path) -> None:
    """Bars of TFLOP/s for each workload and peer, forward above backward."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    workloads = list(dict.fromkeys(r.workload for r in results))
    peers = list(dict.fromkeys(r.peer for r in results))
    for axes, what in zip(figure.subplots(2, 1), ("forward", "backward"), strict=True):
        for at, peer in enumerate(peers):
            heights = {r.workload: getattr(r, f"{what}_tflops") for r in results if r.peer == peer}
            xs = [i + (at - (len(peers) - 1) / 2) * 0.8 / len(peers) for i in range(len(workloads))]
            axes.bar(xs, [heights.get(name, float("nan")) for name in workloads], 0.8 / len(peers), label=peer)
        axes.set_xticks(range(len(workloads)), workloads)
        axes.set_ylabel(f"{what} TFLOP/s")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(ncols=len(peers), frameon=False, loc="upper left")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def write_results(results: list[Result], title: str, out: Path) -> None:
    """`attention.json` and `attention.png` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"title": title, "results": [asdict(result) for result in results]}
    (out / "attention.json").write_text(json.dumps(record, indent=1))
    plot(results, title, out / "attention.png")


def versions(device: torch.device) -> str:
    names = [f"torch {torch.__version__}"]
    try:
        import triton

        names.append(f"triton {triton.__version__}")
    except ImportError:
        names.append("no triton")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{card}, {', '.join(names)}, {time.strftime('%Y-%m-%d')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=NAMES + OTHER_NAMES, default=NAMES)
    parser.add_argument("--others", action="store_true", help="add the distributions that must not fall off")
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "hopper", "triton", "torch", "reference"], default=PEERS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default=None)
    parser.add_argument("--seq-len", type=int, default=None, help="shrink every row to this length")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=None, help="folder for attention.json and attention.png")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --seq-len 256 --peers reference tries the script")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))

    roofs = ceilings(device, dtype)
    title = f"{versions(device)}; matmul {roofs[0] / 1e12:.0f} TFLOP/s, copy {roofs[1] / 1e12:.2f} TB/s, {dtype}"
    print(title, flush=True)
    results: list[Result] = []
    for name in [*options.workloads, *(OTHER_NAMES if options.others else [])]:
        work = make_workload(name, options.seq_len)
        for peer in options.peers:
            try:
                result = measure(peer, work, device, dtype, options.repeats, roofs)
            except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
                result = Result(name, peer, note=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            results.append(result)
            print_table([result])
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if options.out is not None:  # after each workload: a run that is cut off keeps what it measured
            write_results(results, title, options.out)
    print(f"\n{title}")
    print_table(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
