"""Fine-tuning speed, packed and padded: real tokens a second, peak memory and MFU of whole training steps.

Every mode trains the same model from the same weights on the same documents with the same optimizer. A step is
`--tokens` tokens of packed rows; padded modes take the documents of a step in micro-batches and accumulate. Only tokens
of documents are counted. Each mode runs in a process of its own, so that memory is its own, a failure is reported by
name, and the others go on.

    python scripts/bench_finetune.py --out outputs/bench                            # 135M parameters on a GPU
    python scripts/bench_finetune.py --model tiny --seq-len 256 --tokens 512 --steps 2 --warmup 1 --out /tmp/bench
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import inspect
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from finetune_workload import Mode, make_steps, micro_batches
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig

from packflex import PackedLayout, document_mask
from packflex.integrations.transformers import enable_packflex

# The architectures of SmolLM2-135M and Llama-3.2-1B; only their shapes matter here.
MODELS: dict[str, dict[str, Any]] = {
    "smollm2_135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "llama32_1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}

# Dense bf16 FLOPs a second from the data sheets, without sparsity.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


MODES = {
    "packflex_compiled": Mode("rows", "packflex", compiled=True, what="packed, packflex, model compiled"),
    "packflex": Mode("rows", "packflex", what="packed, packflex"),
    "flex_compiled": Mode("rows", "flex_attention", compiled=True, what="packed, HF flex_attention, model compiled"),
    "flex": Mode("rows", "flex_attention", what="packed, HF flex_attention"),
    "flash_attention_2": Mode("flat", "flash_attention_2", what="packed, HF FlashAttention 2"),
    "varlen": Mode("flat", "bench_varlen", what="packed, torch varlen_attn"),
    "varlen_compiled": Mode("flat", "bench_varlen", compiled=True, what="packed, torch varlen_attn, model compiled"),
    "sdpa_packed": Mode("rows", "sdpa", what="packed, SDPA with a 4-D mask"),
    "sdpa_padded": Mode("padded", "sdpa", what="padded, SDPA, small micro-batches"),
    "sdpa_padded_full": Mode("padded", "sdpa", fill=True, what="padded, SDPA, full micro-batches"),
    "sdpa_padded_grouped": Mode(
        "padded", "sdpa", fill=True, grouped=True, what="padded, SDPA, full micro-batches of like lengths"
    ),
    "sdpa_padded_grouped_compiled": Mode(
        "padded", "sdpa", compiled=True, fill=True, grouped=True, what="padded, SDPA, like lengths, model compiled"
    ),
}


class UnavailableError(RuntimeError):
    """A mode that this machine cannot run, with the reason."""


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on the device; a packed one with its block mask, built once for all layers."""
    moved = {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor | PackedLayout) else value
        for key, value in batch.items()
    }
    if isinstance(packed := moved.get("packed"), PackedLayout):
        document_mask(packed)
    return moved


# Models


def register_varlen() -> None:
    """Make torch's varlen_attn the attention implementation "bench_varlen" of transformers."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    takes_scale, takes_groups = "scale" in names, "enable_gqa" in names
    if takes_groups:
        options["enable_gqa"] = True

    def varlen_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """For one row of documents."""
        if not takes_groups:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        bounds, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        more = {**options, "scale": scaling} if takes_scale else options
        out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **more)
        return out[None], None

    AttentionInterface.register("bench_varlen", varlen_attention)
    AttentionMaskInterface.register("bench_varlen", lambda **kwargs: None)


def check_available(mode: Mode, device: torch.device) -> None:
    if mode.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UnavailableError("flash_attn is not installed")
    if mode.attention == "bench_varlen" and (
        device.type != "cuda" or importlib.util.find_spec("torch.nn.attention.varlen") is None
    ):
        raise UnavailableError("varlen_attn needs CUDA and torch 2.10")


def build_model(mode: Mode, arguments: argparse.Namespace, device: torch.device) -> Any:
    config = LlamaConfig(**MODELS[arguments.model], max_position_embeddings=arguments.tokens, tie_word_embeddings=True)
    if mode.attention == "bench_varlen":
        register_varlen()
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_config(config).to(device, getattr(torch, arguments.dtype)).train()
    if mode.attention == "packflex":
        enable_packflex(model, backend=arguments.backend)
    else:
        model.set_attn_implementation(mode.attention)
    return torch.compile(model, backend=arguments.compile_backend) if mode.compiled else model


def step_flops(model: Any, rows: list[list[np.ndarray]]) -> float:
    """FLOPs of a training step on the documents alone, forward and backward.

    6 for each weight of a matrix product and token (the tied embedding is one: the output layer), and
    12 * head_dim * heads * layers for each of the L (L + 1) / 2 causal pairs of a document: two products forward and
    twice that backward. Recomputation is not counted.
    """
    config = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    lengths = np.array([len(document) for row in rows for document in row], dtype=np.float64)
    pairs = (lengths * (lengths + 1) / 2).sum()
    attention = 12.0 * config.head_dim * config.num_attention_heads * config.num_hidden_layers * pairs
    return float(6.0 * weights * lengths.sum() + attention)


# Measuring


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one mode: warm-up, then timed steps. Medians over steps.

    As in a training loop, the host waits for nothing: batches lie ready in pinned memory, losses are read at the end,
    and a step is the time from its predecessor's last kernel to its own.
    """
    mode, device = MODES[name], torch.device(arguments.device)
    check_available(mode, device)
    cuda = device.type == "cuda"
    steps = make_steps(arguments, MODELS[arguments.model]["vocab_size"])
    if cuda and mode.batch == "padded":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, for a second or so
    model = build_model(mode, arguments, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    options = {} if mode.attention == "packflex" else {"use_cache": False}  # HF detects packing without a cache only

    prepared = [_prepare(mode, rows, arguments, device) for rows in steps]
    ends, losses = [], []
    for index, (batches, count) in enumerate(prepared):
        if index == arguments.warmup:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            ends.append(_mark(cuda))
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for batch in batches:
            moved = to_device(batch, device)
            if mode.compiled and mode.batch == "padded":  # one compilation for all sizes, and one for single documents
                for tensor in moved.values():
                    torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))
            loss = model(**moved, **options, num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
        if index >= arguments.warmup:
            ends.append(_mark(cuda))
    if cuda:
        torch.cuda.synchronize()
    times = [_seconds(begin, end) for begin, end in pairwise(ends)]
    timed = steps[arguments.warmup :]
    rates = [sum(len(d) for row in rows for d in row) / t for rows, t in zip(timed, times, strict=True)]
    flop_rates = [step_flops(model, rows) / t for rows, t in zip(timed, times, strict=True)]
    losses = [loss.item() for loss in losses]
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    if not math.isfinite(losses[0]):
        raise RuntimeError(f"the loss is {losses[0]} at the first step")
    top = peak_flops(arguments, device)
    return {
        "tokens_per_second": statistics.median(rates),
        "step_milliseconds": 1000 * statistics.median(times),
        "peak_gib": peak / 2**30 if cuda else None,
        "mfu": statistics.median(flop_rates) / top if top else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _prepare(
    mode: Mode, rows: list[list[np.ndarray]], arguments: argparse.Namespace, device: torch.device
) -> tuple[list[dict[str, Any]], Tensor]:
    """A step's batches, in pinned memory for a GPU, and on the device the number of tokens that have a label."""
    batches = micro_batches(mode, rows, arguments)
    if device.type == "cuda":
        batches = [{k: v.pin_memory() if hasattr(v, "pin_memory") else v for k, v in b.items()} for b in batches]
    # a tensor: a number would be part of the compiled graph
    return batches, torch.tensor(sum(len(document) - 1 for row in rows for document in row), device=device)


def _mark(cuda: bool) -> torch.cuda.Event | float:
    """This moment on the device's stream, or by the clock where there is none."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(begin, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000
    return end - begin


def peak_flops(arguments: argparse.Namespace, device: torch.device) -> float | None:
    if arguments.peak_tflops is not None:
        return arguments.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


# Processes and tables


def run_isolated(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One mode in a process of its own; its output goes to `<out>/<mode>.log`."""
    result_path, log_path = arguments.out / f"{name}.json", arguments.out / f"{name}.log"
    result_path.unlink(missing_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    with log_path.open("w") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=arguments.timeout, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"mode": name, "status": f"failed: no result in {arguments.timeout} s"}
    if code == 0 and result_path.exists():
        return json.loads(result_path.read_text())
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    reason = (errors or lines or ["no output"])[-1]
    return {"mode": name, "status": f"failed (exit {code}): {reason[:160]}; see {log_path}"}


def work(name: str, arguments: argparse.Namespace) -> None:
    """Body of a mode's own process."""
    try:
        result = {"mode": name, "status": "ok", **measure(name, arguments)}
    except UnavailableError as reason:
        result = {"mode": name, "status": f"skipped: {reason}"}
    (arguments.out / f"{name}.json").write_text(json.dumps(result))


def table(results: list[dict[str, Any]]) -> str:
    head = ("mode", "real tok/s", "ms/step", "peak GiB", "MFU", "first loss", "")
    rows = [head]
    for result in results:
        if result["status"] != "ok":
            rows.append((result["mode"], "", "", "", "", "", result["status"]))
            continue
        gib, mfu = result["peak_gib"], result["mfu"]
        rows.append(
            (
                result["mode"],
                f"{result['tokens_per_second']:,.0f}",
                f"{result['step_milliseconds']:.1f}",
                "" if gib is None else f"{gib:.1f}",
                "" if mfu is None else f"{mfu:.1%}",
                f"{result['first_loss']:.4f}",
                MODES[result["mode"]].what,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    texts = [
        "  ".join(
            cell.ljust(w) if i in (0, 6) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    texts = [text.rstrip() for text in texts]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:], *_other_losses(results)])


def _other_losses(results: list[dict[str, Any]], tolerance: float = 0.01) -> list[str]:
    """A line for each mode whose first loss is not the others': the same documents and weights must give one."""
    losses = {r["mode"]: r["first_loss"] for r in results if r["status"] == "ok"}
    if len(losses) < 2:
        return []
    middle = statistics.median(losses.values())
    return [
        f"{mode}: its first loss is {loss:.4f} where the others have {middle:.4f}: it computes something else"
        for mode, loss in losses.items()
        if abs(loss - middle) > tolerance * middle
    ]


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    cuda = arguments.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(arguments.device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else "none",
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, results.csv and logs")
    parser.add_argument("--model", choices=MODELS, default="smollm2_135m", help="architecture, random weights")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a step, a multiple of --seq-len")
    parser.add_argument("--padded-batch", type=int, default=8, help="documents of a padded micro-batch")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--data", type=Path, help="JSONL whose documents give the lengths; lognormal without")
    parser.add_argument("--bytes-per-token", type=float, default=4.0, help="for lines of --data that hold text")
    parser.add_argument("--log-mean", type=float, default=4.90, help="of the lognormal lengths of instruction data")
    parser.add_argument("--log-std", type=float, default=1.05)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32")
    backends = ("hopper", "triton", "torch", "reference")
    parser.add_argument("--backend", choices=backends, help="packflex's; the best by default")
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU; known for H100, H200, A100, B200")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one mode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tokens < arguments.seq_len or arguments.tokens % arguments.seq_len:
        parser.error(f"--tokens {arguments.tokens} must be a multiple of --seq-len {arguments.seq_len}")
    if arguments.steps < 1 or arguments.warmup < 0:
        parser.error(f"--steps must be at least 1 and --warmup at least 0; got {arguments.steps}, {arguments.warmup}")
    if arguments.data is not None and not arguments.data.is_file():
        parser.error(f"--data {arguments.data}: no such file")
    return arguments


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.worker is not None:
        work(arguments.worker, arguments)
        return
    results = []
    for name in arguments.modes:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(run_isolated(name, arguments))
        print(f"{name}: {results[-1]['status']}", file=sys.stderr, flush=True)
    about = environment(arguments)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    source = arguments.data or f"lognormal({arguments.log_mean}, {arguments.log_std})"
    print(f"{arguments.model} {arguments.dtype}, {arguments.tokens} tokens a step, lengths {source}\n")
    print(table(results))
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("worker", "modes")}
    whole = {"environment": about, "settings": settings, "modes": {k: asdict(m) for k, m in MODES.items()}}
    (arguments.out / "results.json").write_text(json.dumps({**whole, "results": results}, indent=2) + "\n")
    columns = ["mode", "status", "tokens_per_second", "step_milliseconds", "peak_gib", "mfu", "first_loss", "last_loss"]
    with (arguments.out / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(results)
    if not any(result["status"] == "ok" for result in results):
        raise SystemExit("no mode gave a result")


if __name__ == "__main__":
    main()
