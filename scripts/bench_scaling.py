"""From one GPU to two: real tokens a second under DDP and FSDP2, and what cost-balanced rows gain on long-tailed data.

    python scripts/bench_scaling.py --out outputs/scaling                       # 135M parameters, all GPUs there are
    python scripts/bench_scaling.py --out /tmp/scaling --ranks 2 --device cpu --model tiny --seq-len 128 \
        --long-seq-len 256 --steps 2 --warmup 1                                 # the same on a CPU, to see it run

Each rank trains on its own `--rows` packed rows of instruction lengths, so twice the GPUs do twice the work a step.
The long-tailed part has one row a rank. Its rows are the same in both orders; "slowest / mean" is the time of forward
and backward on the slowest rank over that of the mean rank, each summed over steps, measured without any communication.
Weights and optimizer are float32, the arithmetic is bf16 (autocast under DDP, bf16 copies of the shards under FSDP2).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bench_finetune import MODELS
from results import environment, markdown, write
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from packflex import document_mask
from packflex.data.collate import PackedCollator
from packflex.data.loader import PackedLoader
from packflex.integrations.lightning.shapes import token_cost
from packflex.integrations.transformers import enable_packflex
from packflex.losses import next_token_loss
from packflex.packing import best_fit
from packflex.packing.order import EpochOrder, balanced_order, rank_imbalance, row_costs
from packflex.parallel.fsdp import shard_model
from packflex.testing.ranks import run_ranks

INSTRUCTIONS, LONG_TAILED = (4.90, 1.05), (7.24, 1.29)  # mean and deviation of the logarithm of lengths
PARTS = {
    "one": "1 GPU",
    "ddp": "DDP",
    "fsdp_one": "FSDP2 on 1 GPU",
    "fsdp": "FSDP2",
    "long": "DDP, long-tailed rows",
}


class Rows:
    """Packed rows of random documents; token ids are made when a row is read."""

    def __init__(self, lengths: list[tuple[int, ...]], vocabulary: int) -> None:
        self.lengths, self.vocabulary = lengths, vocabulary

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = np.random.default_rng(index).integers(3, self.vocabulary, sum(self.lengths[index]))
        return {"input_ids": ids, "labels": ids, "lengths": self.lengths[index]}


def packed_lengths(distribution: tuple[float, float], seq_len: int, rows: int, seed: int) -> list[tuple[int, ...]]:
    """Document lengths of at least `rows` rows, packed by best fit."""
    rng = np.random.default_rng(seed)
    lengths = np.empty(0, dtype=np.int64)
    while lengths.sum() < (rows + 1) * seq_len:
        more = np.clip(rng.lognormal(*distribution, 4096), 2, seq_len).astype(np.int64)
        lengths = np.concatenate([lengths, more])
    plan = best_fit(lengths.tolist(), seq_len)
    order = np.asarray(plan.document_indices)
    packed = [tuple(lengths[order[a:b]].tolist()) for a, b in itertools.pairwise(np.asarray(plan.row_offsets))]
    # the last rows of a plan hold what is left over
    whole = [row for row in packed if sum(row) > 0.98 * seq_len]
    return [whole[i] for i in rng.permutation(len(whole))[:rows]]


def costs_of(lengths: list[tuple[int, ...]], cost: float) -> np.ndarray:
    tokens = np.array([sum(row) for row in lengths])
    squares = np.array([sum(n * n for n in row) for row in lengths])
    return row_costs(tokens, squares, cost)


class Trainee:
    """A model with its optimizer, and training steps on batches from the host."""

    def __init__(self, how: str, arguments: argparse.Namespace, compiled: bool, mesh: DeviceMesh | None) -> None:
        self.device = torch.device(
            arguments.device, torch.cuda.current_device() if arguments.device == "cuda" else None
        )
        cuda = self.device.type == "cuda"
        config = LlamaConfig(
            **MODELS[arguments.model], max_position_embeddings=arguments.long_seq_len, tie_word_embeddings=True
        )
        torch.manual_seed(arguments.seed)
        with self.device:
            model = AutoModelForCausalLM.from_config(config).train()
        enable_packflex(model, backend=arguments.backend)
        self.cost = token_cost(model)
        self.autocast = cuda and "fsdp" not in how
        if compiled:
            # all layers are one code: it is compiled once, and units of DDP and FSDP2 stay whole
            torch._dynamo.config.optimize_ddp = False
            for layer in model.model.layers:
                layer.compile(backend=arguments.compile_backend)
        if mesh is not None:
            shard_model(model, mesh, torch.bfloat16 if cuda else None)
        self.model: Any = model
        if how == "ddp":
            ids = [self.device.index] if cuda else None
            self.model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=cuda)

    def gradients(self, batch: dict[str, Any]) -> torch.Tensor:
        moved = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        document_mask(moved["packed"])
        labels = moved.pop("labels")
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            logits = self.model(**moved, use_cache=False).logits
        total, count = next_token_loss(logits, labels)
        (total / count).backward()
        return total.detach() / count

    def step(self, batch: dict[str, Any]) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.gradients(batch)
        self.optimizer.step()
        return loss

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def batches_of(loader: PackedLoader, count: int, cuda: bool) -> list[dict[str, Any]]:
    """The first batches, on the host: making them is not what is measured."""
    batches = list(itertools.islice(iter(loader), count))
    return [{k: v.pin_memory() if cuda else v for k, v in batch.items()} for batch in batches]


def timed_steps(trainee: Trainee, batches: list[dict[str, Any]], warmup: int, together: bool) -> dict[str, float]:
    """Seconds and tokens of the steps after the warm-up: of all ranks, or of this one alone."""
    for batch in batches[:warmup]:
        trainee.step(batch)
    trainee.wait()
    if together:
        dist.barrier()
    if trainee.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for batch in batches[warmup:]:
        loss = trainee.step(batch)
    trainee.wait()
    seconds = time.perf_counter() - began
    tokens = sum(batch["packed"].num_tokens for batch in batches[warmup:])
    if together:
        seconds, tokens = maximum(seconds, trainee.device), int(total(tokens, trainee.device))
    steps = len(batches) - warmup
    peak = torch.cuda.max_memory_allocated() / 2**30 if trainee.device.type == "cuda" else 0.0
    return {
        "tokens_per_second": tokens / seconds,
        "step_milliseconds": 1000 * seconds / steps,
        "peak_gib": peak,
        "last_loss": loss.item(),
    }


def maximum(value: float, device: torch.device) -> float:
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def total(value: float, device: torch.device) -> float:
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found)
    return found.item()


def apart(trainee: Trainee, batches: list[dict[str, Any]]) -> list[float]:
    """Milliseconds of forward and backward of each batch, without a word to the other ranks."""
    cuda = trainee.device.type == "cuda"
    times, events = [], []
    with trainee.model.no_sync():
        for batch in batches:
            trainee.optimizer.zero_grad(set_to_none=True)
            if cuda:
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
            began = time.perf_counter()
            trainee.gradients(batch)
            if cuda:
                pair[1].record()
                events.append(pair)
            times.append(1000 * (time.perf_counter() - began))
    trainee.wait()
    return [first.elapsed_time(last) for first, last in events] if cuda else times


def long_tailed(trainee: Trainee, arguments: argparse.Namespace, rank: int, ranks: int) -> Iterator[dict[str, Any]]:
    """Both orders of the same rows, which were drawn in groups of like cost from many."""
    steps = arguments.long_steps
    pool = packed_lengths(LONG_TAILED, arguments.long_seq_len, max(arguments.pool, ranks * steps), arguments.seed)
    chosen = balanced_order(costs_of(pool, trainee.cost), ranks, arguments.seed, 0)[: ranks * steps]
    lengths = [pool[i] for i in chosen]
    rows = Rows(lengths, MODELS[arguments.model]["vocab_size"])
    costs = costs_of(lengths, trainee.cost)
    for order in ("shuffle", "balanced"):
        loader = PackedLoader(
            rows, PackedCollator(arguments.long_seq_len), 1,
            rank=rank, world_size=ranks, order=order, seed=arguments.seed, token_cost=trainee.cost,
        )  # fmt: skip
        batches = batches_of(loader, steps, trainee.device.type == "cuda")
        for batch in batches[: arguments.warmup]:
            trainee.step(batch)
        mine = torch.tensor(apart(trainee, batches), dtype=torch.float64, device=trainee.device)
        every = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(every, mine)
        times = torch.stack(every)  # [ranks, steps]
        measured = timed_steps(trainee, batches, 0, together=True)
        yield {
            "part": f"long_{order}",
            **measured,
            "slowest_over_mean": (times.amax(0).sum() / times.mean(0).sum()).item(),
            "predicted": rank_imbalance(costs, EpochOrder(loader._epoch_rows(), 1, ranks)),
            "compute_milliseconds": times.mean().item(),
            "compute_spread": [round(x, 2) for x in (times.min().item(), times.median().item(), times.max().item())],
        }


def work(rank: int, ranks: int, arguments: argparse.Namespace) -> None:
    """Every part on every rank; the first rank writes."""
    device = arguments.device
    about = {
        "environment": environment(device, ranks),
        "settings": {key: str(value) for key, value in vars(arguments).items()},
    }
    results: list[dict[str, Any]] = []
    vocabulary = MODELS[arguments.model]["vocab_size"]
    steps = arguments.steps + arguments.warmup
    lengths = packed_lengths(INSTRUCTIONS, arguments.seq_len, ranks * arguments.rows * steps, arguments.seed)
    loader = functools.partial(
        PackedLoader, Rows(lengths, vocabulary), PackedCollator(arguments.seq_len), arguments.rows, seed=arguments.seed
    )
    alone, whole = DeviceMesh(device, [0]), DeviceMesh(device, list(range(ranks)))
    began = time.perf_counter()
    for compiled, part in itertools.product([c == "layers" for c in arguments.compile], arguments.parts):
        found: list[dict[str, Any]] = []
        if part in ("one", "fsdp_one"):
            if rank == 0:
                trainee = Trainee(part, arguments, compiled, alone if part == "fsdp_one" else None)
                batches = batches_of(loader(), steps, device == "cuda")
                found = [{"part": part, "ranks": 1, **timed_steps(trainee, batches, arguments.warmup, together=False)}]
        else:
            trainee = Trainee(
                "fsdp" if part == "fsdp" else "ddp", arguments, compiled, whole if part == "fsdp" else None
            )
            if part == "long":
                found = [{"ranks": ranks, **result} for result in long_tailed(trainee, arguments, rank, ranks)]
            else:
                batches = batches_of(loader(rank=rank, world_size=ranks), steps, device == "cuda")
                found = [
                    {"part": part, "ranks": ranks, **timed_steps(trainee, batches, arguments.warmup, together=True)}
                ]
        trainee = None  # type: ignore[assignment]
        if device == "cuda":
            torch.cuda.empty_cache()
        dist.barrier()
        if rank == 0:
            results += [{"compiled": compiled, **result} for result in found]
            write(arguments.out, about, results, table(results))
            print(
                f"{part}{', compiled' * compiled}: done at {time.perf_counter() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def table(results: list[dict[str, Any]]) -> str:
    short = [r for r in results if not r["part"].startswith("long")]
    long = [r for r in results if r["part"].startswith("long")]
    base = {(r["compiled"], r["part"]): r["tokens_per_second"] for r in short if r["ranks"] == 1}
    lines = []
    for r in short:
        one = base.get((r["compiled"], "fsdp_one" if "fsdp" in r["part"] else "one"))
        ratio = r["tokens_per_second"] / one if one and r["ranks"] > 1 else None
        lines.append(
            [
                PARTS[r["part"]], str(r["ranks"]), "layers" if r["compiled"] else "no",
                f"{r['tokens_per_second']:,.0f}", f"{r['step_milliseconds']:.1f}", f"{r['peak_gib']:.1f}",
                "" if ratio is None else f"{ratio:.3f} ({ratio / r['ranks']:.1%})",
            ]
        )  # fmt: skip
    parts = [markdown(["training", "GPUs", "compiled", "real tokens/s", "ms/step", "GiB", "times one GPU"], lines)]
    if long:
        plain = {r["compiled"]: r["tokens_per_second"] for r in long if r["part"] == "long_shuffle"}
        lines = [
            [
                r["part"].removeprefix("long_"), "layers" if r["compiled"] else "no", f"{r['slowest_over_mean']:.4f}",
                f"{r['predicted']:.4f}", f"{r['compute_milliseconds']:.1f}", f"{r['step_milliseconds']:.1f}",
                f"{r['tokens_per_second']:,.0f}", f"{r['tokens_per_second'] / plain[r['compiled']] - 1:+.1%}",
            ]
            for r in long
        ]  # fmt: skip
        head = ["order", "compiled", "slowest / mean", "predicted", "ms of a rank", "ms/step", "real tokens/s", "gain"]
        parts.append(f"Long-tailed documents, one row a rank, {long[0]['ranks']} GPUs:\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def parse() -> argparse.Namespace:
    cuda = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and table.md")
    parser.add_argument("--ranks", type=int, default=cuda or 2, help="processes, one a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--model", choices=MODELS, default="smollm2_135m", help="architecture, random weights")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--compile", nargs="+", choices=("none", "layers"), default=["none"], help="one run for each")
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step on each rank")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--long-seq-len", type=int, default=32768, help="tokens of a long-tailed row")
    parser.add_argument("--long-steps", type=int, default=24, help="timed steps of each order")
    parser.add_argument("--pool", type=int, default=2000, help="long-tailed rows that those of the steps come from")
    parser.add_argument(
        "--backend", choices=("hopper", "triton", "torch", "reference"), help="packflex's; default best"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for everything")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and arguments.ranks > cuda:
        parser.error(f"--ranks {arguments.ranks}, and there are {cuda} GPUs")
    if min(arguments.ranks, arguments.rows, arguments.steps, arguments.long_steps) < 1 or arguments.warmup < 1:
        parser.error("--ranks, --rows, --steps, --long-steps and --warmup must be at least 1")
    return arguments


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").unlink(missing_ok=True)
    try:
        run_ranks(work, arguments.ranks, arguments.ranks, arguments, device=arguments.device, timeout=arguments.limit)
    finally:
        if (arguments.out / "table.md").exists():
            print((arguments.out / "table.md").read_text())


if __name__ == "__main__":
    main()
