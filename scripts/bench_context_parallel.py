"""Attention of long packed rows that two GPUs share: packflex's context parallelism, one GPU, and torch's own.

    python scripts/bench_context_parallel.py --out outputs/context                  # rows of 64k and 128k tokens
    python scripts/bench_context_parallel.py --out /tmp/context --device cpu --lengths 2048 --heads 4 --kv-heads 2 \
        --head-dim 16 --reps 1 --layers 1 --hidden 64                               # the same on a CPU, to see it run

Milliseconds of forward and backward together, of the slowest rank, exchange included. "mixed" is long-tailed documents,
"single" one document of the whole row. torch's SDPA knows causal attention over the whole row alone, so it runs on
"single" only, with its keys repeated for each query head; its flex_attention gathers all keys on every rank. Every
output and gradient is compared with packflex's on one GPU, which the tests hold against float64. The last part trains
a few layers of a model on a shared row.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from results import environment, markdown, write
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig

from packflex import PackedLayout, document_mask, flex_attention
from packflex.integrations.transformers import enable_packflex
from packflex.losses import next_token_loss
from packflex.parallel.attention import sharded_attention
from packflex.parallel.layout import ShardedLayout, shard_batch
from packflex.testing.ranks import run_ranks
from packflex.testing.tolerances import relative_error

_EAGER_MASK = 65536  # tokens of a row
METHODS = {
    "one": "packflex, 1 GPU",
    "packflex": "packflex, context parallel",
    "torch_sdpa": "torch, context parallel SDPA (ring)",
    "torch_flex": "torch, context parallel flex_attention",
    "model_one": "layers of a model, 1 GPU",
    "model": "layers of a model, context parallel",
}


def documents(kind: str, row: int) -> list[int]:
    if kind == "single":
        return [row]
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while (left := row - sum(lengths)) > 0:
        lengths.append(min(left, max(2, int(rng.lognormal(7.24, 1.29)))))
    return lengths


@dataclass
class Problem:
    """One row on every rank: q [1, Hq, S, D], k and v [1, Hkv, S, D], the gradient of the output, and the answer."""

    kind: str
    row: int
    lengths: list[int]
    inputs: tuple[Tensor, ...]
    grad: Tensor
    out: Tensor | None = None
    grads: tuple[Tensor, ...] = ()


@dataclass
class Bench:
    arguments: argparse.Namespace
    rank: int
    ranks: int
    device: torch.device

    def problem(self, kind: str, row: int) -> Problem:
        """The same numbers on all ranks."""
        a = self.arguments
        generator = torch.Generator(self.device).manual_seed(0)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

        def normal(heads: int) -> Tensor:
            # laid out [B, S, H, D], as projections write it
            shape = (1, row, heads, a.head_dim)
            return torch.randn(shape, device=self.device, dtype=dtype, generator=generator).transpose(1, 2)

        inputs = (normal(a.heads), normal(a.kv_heads), normal(a.kv_heads))
        return Problem(kind, row, documents(kind, row), inputs, normal(a.heads))

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Median over repetitions of the slowest rank."""
        for _ in range(self.arguments.warmup):
            run()
        times = []
        for _ in range(self.arguments.reps):
            dist.barrier()
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(1000 * (time.perf_counter() - began))
        slowest = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return statistics.median(slowest.tolist())

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def worst(self, value: float) -> float:
        """The largest of all ranks; NaN stays NaN."""
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        every = [torch.empty_like(found) for _ in range(self.ranks)]
        dist.all_gather(every, found)
        return torch.stack(every).max().item()

    def error(self, pairs: list[tuple[Tensor, Tensor]]) -> float:
        return self.worst(max(relative_error(ours, exact) for ours, exact in pairs))


def backward_of(attend: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> Callable[[], Any]:
    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        out = attend(*leaves)
        return out, torch.autograd.grad(out, leaves, grad)

    return run


def answer(bench: Bench, problem: Problem) -> Callable[[], Any]:
    """Every rank computes the whole, which is what the others are compared with; how it did is returned."""
    layout = PackedLayout.from_lengths([problem.lengths]).to(bench.device)
    mask = document_mask(layout)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend=bench.arguments.backend)

    run = backward_of(attend, tuple(x.detach().requires_grad_() for x in problem.inputs), problem.grad)
    out, problem.grads = run()
    problem.out = out.detach()
    return run


def one(bench: Bench, problem: Problem) -> dict[str, Any]:
    return {"milliseconds": bench.milliseconds(answer(bench, problem)), "error": 0.0}


def packflex(bench: Bench, problem: Problem) -> dict[str, Any]:
    began = time.perf_counter()
    layout = ShardedLayout(problem.lengths, problem.row, bench.ranks, bench.rank).to(bench.device)
    layout.group = dist.group.WORLD
    plan = layout.exchange()
    bench.wait()
    planned = 1000 * (time.perf_counter() - began)
    starts = np.cumsum([0, *problem.lengths])
    mine = torch.from_numpy(
        np.concatenate([np.arange(starts[p.document] + p.start, starts[p.document] + p.end) for p in layout.mine])
    ).to(bench.device)

    def local(whole: Tensor) -> Tensor:
        """This rank's tokens, [1, H, S', D], zeros in the padding."""
        part = whole.new_zeros(1, layout.seq_len, whole.shape[1], whole.shape[3])
        part[:, : len(mine)] = whole.transpose(1, 2)[:, mine]
        return part.transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sharded_attention(q, k, v, layout, backend=bench.arguments.backend)

    run = backward_of(attend, tuple(local(x.detach()).requires_grad_() for x in problem.inputs), local(problem.grad))
    out, grads = run()
    assert problem.out is not None
    exact = (problem.out, *problem.grads)
    error = bench.error(
        [(a.detach()[:, :, : len(mine)], b[:, :, mine]) for a, b in zip((out, *grads), exact, strict=True)]
    )
    del out, grads
    pairs = torch.tensor(float(layout.attention_pairs()), dtype=torch.float64, device=bench.device)
    every = [torch.empty_like(pairs) for _ in range(bench.ranks)]
    dist.all_gather(every, pairs)
    work = torch.stack(every)
    return {
        "milliseconds": bench.milliseconds(run),
        "error": error,
        "plan_milliseconds": bench.worst(planned),
        "keys_received": bench.worst(float(sum(plan.receive_counts))),
        "imbalance": (work.max() / work.mean()).item(),
    }


def torch_sdpa(bench: Bench, problem: Problem) -> dict[str, Any]:
    if problem.kind != "single":
        raise NotImplementedError("SDPA has no document mask")
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mesh = init_device_mesh(bench.device.type, (bench.ranks,))
    groups = problem.inputs[0].shape[1] // problem.inputs[1].shape[1]
    q, k, v = (x.detach().clone().contiguous() for x in problem.inputs)
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    assert problem.out is not None
    # the context cuts buffers in place, and what is compared is cut the same way
    buffers = [q, k, v, problem.grad.clone().contiguous(), problem.out.clone().contiguous()]
    buffers += [x.clone().contiguous() for x in problem.grads]
    with (
        context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * len(buffers), no_restore_buffers=set(buffers)),
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    ):
        leaves = tuple(x.detach().requires_grad_() for x in buffers[:3])
        grad, *exact = buffers[3:]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        run = backward_of(attend, leaves, grad)
        out, (dq, dk, dv) = run()
        dk, dv = (x.unflatten(1, (-1, groups)).float().sum(2) for x in (dk, dv))
        error = bench.error(list(zip((out, dq, dk, dv), exact, strict=True)))
        del out, dq, dk, dv
        return {"milliseconds": bench.milliseconds(run), "error": error}


def torch_flex(bench: Bench, problem: Problem) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

    experimental: Any = importlib.import_module("torch.distributed.tensor.experimental._context_parallel")
    mesh = init_device_mesh(bench.device.type, (bench.ranks,))
    cuda = bench.device.type == "cuda"
    ids = PackedLayout.from_lengths([problem.lengths]).to(bench.device).document_ids[0]

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (ids[q_idx] == ids[kv_idx])

    # compiling its mask takes a minute; uncompiled it evaluates every element into memory, 4 GiB a copy at 64k
    compiled = cuda and problem.row > _EAGER_MASK
    began = time.perf_counter()
    whole = (torch.compile(create_block_mask, dynamic=False) if compiled else create_block_mask)(
        mask_mod, 1, 1, problem.row, problem.row, device=str(bench.device)
    )
    if problem.kind == "single":
        balancer = experimental._HeadTailLoadBalancer(problem.row, bench.ranks, bench.device)
    else:
        balancer = experimental._PTRRLoadBalancer(whole, bench.ranks)
    assert problem.out is not None
    tensors = [*problem.inputs, problem.grad, problem.out, *problem.grads]
    tensors = [x.contiguous() for x in tensors]
    *cut, mask = experimental._context_parallel_shard(mesh, [*tensors, whole], [2] * (len(tensors) + 1), balancer)
    bench.wait()
    planned = 1000 * (time.perf_counter() - began)
    q, k, v, grad, *exact = (x.detach().clone() for x in cut)
    group = mesh.get_group().group_name
    kernel = torch.compile(torch_flex_attention, dynamic=False) if cuda else torch_flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = experimental.flex_cp_allgather(k.contiguous(), v.contiguous(), 2, group)
        return kernel(q, keys, values, block_mask=mask, enable_gqa=True)

    run = backward_of(attend, tuple(x.requires_grad_() for x in (q, k, v)), grad)
    out, grads = run()
    error = bench.error(list(zip((out.detach(), *grads), exact, strict=True)))
    del out, grads
    return {"milliseconds": bench.milliseconds(run), "error": error, "plan_milliseconds": bench.worst(planned)}


def model_steps(bench: Bench, row: int) -> dict[str, dict[str, Any]]:
    """Forward and backward of a few layers of Llama-3.2-1B's shape, whole and shared."""
    a = bench.arguments
    config = LlamaConfig(
        hidden_size=a.hidden, intermediate_size=4 * a.hidden, num_hidden_layers=a.layers,
        num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, head_dim=a.hidden // a.heads, vocab_size=1024,
        max_position_embeddings=row,
    )  # fmt: skip
    torch.manual_seed(0)
    with bench.device:
        model = AutoModelForCausalLM.from_config(config).train()
    model.to(torch.bfloat16 if bench.device.type == "cuda" else torch.float32)
    enable_packflex(model, backend=a.backend)
    layout = PackedLayout.from_lengths([documents("mixed", row)])
    ids = torch.randint(0, 1024, (1, row), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(layout.position_ids == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": layout.position_ids, "packed": layout}
    count = float((labels != -100).sum())

    def runner(part: dict[str, Any]) -> Callable[[], Tensor]:
        inputs = {name: value.to(bench.device) for name, value in part.items()}
        targets = inputs.pop("labels")

        def run() -> Tensor:
            model.zero_grad()
            total, _ = next_token_loss(model(**inputs, use_cache=False).logits, targets)
            (total / count).backward()
            return total.detach() / count

        return run

    found = {}
    run = runner(batch)
    exact_loss = run()
    exact = [p.grad.clone() for p in model.parameters()]
    found["model_one"] = {"milliseconds": bench.milliseconds(run), "error": 0.0}
    part = shard_batch(batch, bench.ranks, bench.rank)
    part["packed"].group = dist.group.WORLD
    run = runner(part)

    def shared() -> Tensor:
        loss = run()
        for p in model.parameters():  # as DDP would
            dist.all_reduce(p.grad)
        return loss

    loss = shared()
    dist.all_reduce(loss)
    pairs = [(p.grad, g) for p, g in zip(model.parameters(), exact, strict=True)]
    found["model"] = {
        "error": bench.error([(loss, exact_loss), *pairs]), "milliseconds": bench.milliseconds(shared)
    }  # fmt: skip
    return found


def work(rank: int, ranks: int, arguments: argparse.Namespace) -> None:
    """Every case on every rank; what fails on one fails on all, and the next goes on."""
    device = torch.device(arguments.device, torch.cuda.current_device() if arguments.device == "cuda" else None)
    bench = Bench(arguments, rank, ranks, device)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    about = {"environment": environment(arguments.device, ranks), "settings": settings}
    results: list[dict[str, Any]] = []
    began = time.perf_counter()

    def keep(method: str, kind: str, row: int, found: dict[str, Any]) -> None:
        results.append({"method": method, "documents": kind, "row": row, **found})
        if rank == 0:
            write(arguments.out, about, results, table(results))
            print(f"{method} {kind} {row}: at {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    def attempt(method: str, run: Callable[[Bench, Problem], dict[str, Any]], problem: Problem) -> None:
        try:
            found = run(bench, problem)
        except Exception as error:  # torch's prototypes raise anything; the table says what
            text = " ".join(str(error).split()) or type(error).__name__
            found = {"reason": f"does not run: {text[:120]}"}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        keep(method, problem.kind, problem.row, found)

    cases = [(kind, row) for row in arguments.lengths for kind in arguments.documents]
    for kind, row in cases:
        problem = bench.problem(kind, row)
        attempt("one", one, problem)
        attempt("packflex", packflex, problem)
    del problem
    if arguments.layers:
        for row in arguments.lengths[:1]:
            for method, found in model_steps(bench, row).items():
                keep(method, "mixed", row, found)
    gc.collect()
    others = (("torch_sdpa", torch_sdpa), ("torch_flex", torch_flex))  # the second compiles for a minute
    for method, run in others if arguments.torch else ():
        for kind, row in cases:
            problem = bench.problem(kind, row)
            answer(bench, problem)
            attempt(method, run, problem)


def table(results: list[dict[str, Any]]) -> str:
    base = {
        (r["documents"], r["row"], r["method"].startswith("model")): r["milliseconds"]
        for r in results
        if r["method"] in ("one", "model_one") and "milliseconds" in r
    }
    lines = []
    for r in sorted(results, key=lambda r: (r["method"].startswith("model"), r["row"], r["documents"])):
        if "reason" in r:
            lines.append([METHODS[r["method"]], f"{r['row']:,}", r["documents"], "", "", "", "", "", r["reason"]])
            continue
        alone = base.get((r["documents"], r["row"], r["method"].startswith("model")))
        received, planned = r.get("keys_received"), r.get("plan_milliseconds")
        lines.append(
            [
                METHODS[r["method"]], f"{r['row']:,}", r["documents"], f"{r['milliseconds']:.2f}",
                "" if alone is None else f"{alone / r['milliseconds']:.2f}",
                "" if r["method"] in ("one", "model_one") else f"{r['error']:.1e}",
                "" if received is None else f"{received:,.0f}",
                "" if planned is None else f"{planned:.1f}",
                f"slowest rank has {r['imbalance']:.3f} of the mean work" if "imbalance" in r else "",
            ]
        )  # fmt: skip
    head = ["attention", "row", "documents", "fwd + bwd ms", "speed-up", "error", "keys received", "plan ms", ""]
    return markdown(head, lines)


def parse() -> argparse.Namespace:
    cuda = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and table.md")
    parser.add_argument("--ranks", type=int, default=2, help="processes, one a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--lengths", nargs="+", type=int, default=[65536, 131072], help="tokens of a row")
    parser.add_argument("--documents", nargs="+", choices=("mixed", "single"), default=["mixed", "single"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="of the model; 0 for none")
    parser.add_argument("--hidden", type=int, default=2048, help="of the model")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave torch's own out")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument(
        "--backend", choices=("hopper", "triton", "torch", "reference"), help="packflex's; default best"
    )
    parser.add_argument("--limit", type=float, default=240, help="seconds for everything")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and arguments.ranks > cuda:
        parser.error(f"--ranks {arguments.ranks}, and there are {cuda} GPUs")
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
