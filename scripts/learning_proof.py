"""Does packing learn as well as padding? The same model, documents, tokens and schedule, both ways, over several seeds.

    python scripts/learning_proof.py --data gsm8k/train.jsonl --out outputs/learning   # 135M parameters, all GPUs
    python scripts/learning_proof.py --data gsm8k/train.jsonl --out /tmp/learning --model tiny --limit-documents 300 \
        --seq-len 512 --tokens 1024 --epochs 1                                         # on a CPU, to see it run

Packed: rows of best fit in the seed's random order, packflex attention. Padded: documents in the seed's random order,
transformers' SDPA; a step's documents lie in micro-batches of like lengths, as large as a packed step, which is the
fastest that padding can be made. Both have equally many optimizer steps, the learning rate follows the share of
supervised tokens seen, and a step's loss is the sum over its supervised tokens divided by their number. With
--same-steps a padded step has the very documents of the packed one, which leaves nothing but the computation to differ;
without, the orders differ as they would between two users. Each run's held-out loss is computed both ways. Runs are
dealt to the GPUs, one at a time on each, so clocks are fair.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing as mp
import queue
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_finetune import MODELS
from results import environment, markdown, write
from transformers import AutoModelForCausalLM, LlamaConfig

from packflex import document_mask
from packflex.data.collate import PackedCollator, PaddedCollator
from packflex.data.sources import load_documents
from packflex.data.tokenize import tokenize_documents
from packflex.data.tokenizer import train_tokenizer
from packflex.integrations.transformers import enable_packflex
from packflex.losses import next_token_loss
from packflex.packing import best_fit
from packflex.packing.order import row_order

WAYS = ("padded", "packed")  # the slower first, so that the last runs to be dealt out are short
Document = dict[str, np.ndarray]
Batch = dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    train: list[Document]
    heldout: list[Document]
    vocabulary: int  # of the tokenizer


def read(arguments: argparse.Namespace) -> Corpus:
    """Tokenised documents; the tokenizer is trained on those for training unless one is given."""
    documents = load_documents("gsm8k", str(arguments.data), limit=arguments.limit_documents)
    order = np.random.default_rng(0).permutation(len(documents))
    held = max(1, round(0.05 * len(documents)))
    train, heldout = documents.select(np.sort(order[held:])), documents.select(np.sort(order[:held]))
    texts = [p + c for p, c in zip(train["prompt"], train["completion"], strict=True)]
    tokenizer = train_tokenizer(texts, arguments.vocabulary, arguments.out / "tokenizer")

    def tokens(split: Any) -> list[Document]:
        found = tokenize_documents(split, tokenizer).dataset
        return [
            {"input_ids": np.array(ids)[: arguments.seq_len], "labels": np.array(labels)[: arguments.seq_len]}
            for ids, labels in zip(found["input_ids"], found["labels"], strict=True)
        ]

    return Corpus(tokens(train), tokens(heldout), len(tokenizer))


def supervised(documents: list[Document]) -> int:
    return sum(int((document["labels"][1:] != -100).sum()) for document in documents)


# A step is a list of micro-batches.


def packed_rows(documents: list[Document], seq_len: int) -> list[list[Document]]:
    plan = best_fit([len(d["input_ids"]) for d in documents], seq_len)
    bounds = np.asarray(plan.row_offsets)
    which = np.asarray(plan.document_indices)
    return [[documents[i] for i in which[a:b]] for a, b in itertools.pairwise(bounds)]


def packed_batch(rows: list[list[Document]], seq_len: int) -> Batch:
    records = [
        {
            "input_ids": np.concatenate([d["input_ids"] for d in row]),
            "labels": np.concatenate([d["labels"] for d in row]),
            "lengths": [len(d["input_ids"]) for d in row],
        }
        for row in rows
    ]
    return PackedCollator(seq_len)(records)


def padded_batches(documents: list[Document], slots: int) -> list[Batch]:
    """Micro-batches of like lengths with at most `slots` places each, padding included."""
    batches: list[list[Document]] = [[]]
    for document in sorted(documents, key=lambda d: len(d["input_ids"])):
        if batches[-1] and (len(batches[-1]) + 1) * _width(document) > slots:
            batches.append([])
        batches[-1].append(document)
    return [PaddedCollator(pad_to=_width(batch[-1]))(batch) for batch in batches]


def _width(document: Document) -> int:
    """A whole multiple of 8, for tensor cores."""
    return -(-len(document["input_ids"]) // 8) * 8


def make_steps(way: str, corpus: Corpus, arguments: argparse.Namespace, seed: int, epoch: int) -> list[list[Batch]]:
    """The steps of one epoch."""
    rows_per_step = arguments.tokens // arguments.seq_len
    rows = packed_rows(corpus.train, arguments.seq_len)
    count = math.ceil(len(rows) / rows_per_step)
    row_numbers = row_order(len(rows), seed, epoch)
    groups = [[rows[i] for i in row_numbers[k * rows_per_step : (k + 1) * rows_per_step]] for k in range(count)]
    if way == "packed":
        return [[packed_batch(group, arguments.seq_len)] for group in groups]
    if arguments.same_steps:
        return [padded_batches([document for row in group for document in row], arguments.tokens) for group in groups]
    order = np.random.default_rng([seed, epoch, 1]).permutation(len(corpus.train))
    documents = [corpus.train[i] for i in order]
    # as many supervised tokens in each step as the packed steps have on average; the last packed one may be smaller
    each = np.cumsum([supervised([d]) for d in documents])
    share = np.minimum((np.arange(count) + 1) * rows_per_step / len(rows), 1.0) * each[-1]
    ends = np.searchsorted(each, share)
    ends[-1] = len(documents) - 1
    bounds = [0, *(ends + 1)]
    return [padded_batches(documents[a:b], arguments.tokens) for a, b in itertools.pairwise(bounds) if b > a]


# Training


def build(arguments: argparse.Namespace, corpus: Corpus, seed: int, device: torch.device) -> Any:
    shape = {**MODELS[arguments.model]}
    shape["vocab_size"] = max(shape["vocab_size"], corpus.vocabulary)
    # SmolLM2's initialisation: weights of standard deviation 1 / 24
    config = LlamaConfig(
        **shape, max_position_embeddings=arguments.seq_len, tie_word_embeddings=True, initializer_range=1 / 24
    )
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config).train()


def use(model: Any, way: str, backend: str | None) -> None:
    if way == "packed":
        enable_packflex(model, backend=backend)
    else:
        model.set_attn_implementation("sdpa")


def batch_loss(model: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    labels = moved.pop("labels")
    if "packed" in moved:
        document_mask(moved["packed"])
    cuda = device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
        logits = model(**moved, use_cache=False).logits
    return next_token_loss(logits, labels)


@torch.no_grad()
def heldout_loss(model: Any, way: str, corpus: Corpus, arguments: argparse.Namespace, device: torch.device) -> float:
    """Mean over all supervised tokens of the held-out documents."""
    use(model, way, arguments.backend)
    if way == "packed":
        rows = packed_rows(corpus.heldout, arguments.seq_len)
        batches = [packed_batch([row], arguments.seq_len) for row in rows]
    else:
        batches = padded_batches(corpus.heldout, arguments.seq_len)
    model.eval()
    sums = [batch_loss(model, batch, device) for batch in batches]
    model.train()
    return sum(total.item() for total, _ in sums) / sum(count.item() for _, count in sums)


def train(way: str, seed: int, corpus: Corpus, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One run: what it learned and how long training took, held-out losses not included."""
    cuda = device.type == "cuda"
    if cuda:
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape of padding, for a second or so
    steps = [step for epoch in range(arguments.epochs) for step in make_steps(way, corpus, arguments, seed, epoch)]
    if cuda:
        steps = [[{k: v.pin_memory() for k, v in batch.items()} for batch in step] for step in steps]
    counts = [sum(int((batch["labels"] != -100).sum()) for batch in step) for step in steps]
    seen = np.concatenate([[0], np.cumsum(counts)[:-1]]) / sum(counts)
    model = build(arguments, corpus, seed, device)
    before = heldout_loss(model, way, corpus, arguments, device)
    use(model, way, arguments.backend)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), fused=cuda)
    batch_loss(model, steps[0][0], device)[0].backward()  # kernels are loaded and compiled before the clock starts
    curve = []
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for step, count, share in zip(steps, counts, seen, strict=True):
        rate = arguments.lr * min(1.0, (share + 1e-3) / arguments.warmup_share)
        if share > arguments.warmup_share:
            rate *= 0.5 * (1 + math.cos(math.pi * (share - arguments.warmup_share) / (1 - arguments.warmup_share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for batch in step:
            total, _ = batch_loss(model, batch, device)
            (total / count).backward()
            loss += total.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(loss / count)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    other = WAYS[1 - WAYS.index(way)]
    tokens = arguments.epochs * sum(len(d["input_ids"]) for d in corpus.train)
    return {
        "way": way,
        "seed": seed,
        "steps": len(steps),
        "tokens": tokens,
        "supervised": sum(counts),
        "supervised_per_step": [int(np.mean(counts)), float(np.std(counts))],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "slots": sum(batch["input_ids"].numel() for step in steps for batch in step),
        "heldout_before": before,
        "heldout": heldout_loss(model, way, corpus, arguments, device),
        "heldout_other_way": heldout_loss(model, other, corpus, arguments, device),
        "curve": [round(x, 4) for x in torch.stack(curve).tolist()],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def work(index: int, jobs: Any, results: Any, corpus: Corpus, arguments: argparse.Namespace) -> None:
    """One device: runs as long as there are any."""
    device = torch.device(arguments.device, index if arguments.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # threads that wait for one another in several processes take ten times as long
    while True:
        try:
            way, seed = jobs.get_nowait()
        except queue.Empty:
            return
        try:
            results.put({"device": index, **train(way, seed, corpus, arguments, device)})
        except Exception as error:
            results.put({"device": index, "way": way, "seed": seed, "failed": f"{type(error).__name__}: {error}"})
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def summary(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Means, standard deviations and speed-up, once both ways have a run."""
    good = [r for r in results if "failed" not in r]
    by = {way: [r for r in good if r["way"] == way] for way in WAYS}
    if not all(by.values()):
        return None
    found: dict[str, Any] = {}
    for way, runs in by.items():
        losses = [r["heldout"] for r in runs]
        found[way] = {
            "seeds": len(runs),
            "heldout_mean": statistics.mean(losses),
            "heldout_std": statistics.stdev(losses) if len(losses) > 1 else float("nan"),
            "seconds": statistics.mean(r["seconds"] for r in runs),
            "tokens_per_second": statistics.mean(r["tokens_per_second"] for r in runs),
        }
    found["difference"] = found["packed"]["heldout_mean"] - found["padded"]["heldout_mean"]
    found["standard_error"] = math.sqrt(sum(found[way]["heldout_std"] ** 2 / found[way]["seeds"] for way in WAYS))
    seeds = sorted({r["seed"] for r in by["packed"]} & {r["seed"] for r in by["padded"]})
    of = {(r["way"], r["seed"]): r["heldout"] for r in good}
    found["by_seed"] = {seed: of["packed", seed] - of["padded", seed] for seed in seeds}
    apart = list(found["by_seed"].values())
    found["paired_standard_error"] = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else float("nan")
    found["speed_up"] = found["padded"]["seconds"] / found["packed"]["seconds"]
    return found


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for r in sorted(results, key=lambda r: (r["way"], r["seed"])):
        if "failed" in r:
            lines.append([r["way"], str(r["seed"]), *[""] * 7, f"failed: {r['failed'][:100]}"])
            continue
        lines.append(
            [
                r["way"], str(r["seed"]), str(r["steps"]), f"{r['tokens']:,}", f"{r['supervised']:,}",
                f"{r['heldout_before']:.3f}", f"{r['heldout']:.4f}", f"{r['heldout_other_way']:.4f}",
                f"{r['seconds']:.1f}", f"{r['tokens_per_second']:,.0f}",
            ]
        )  # fmt: skip
    head = [
        "run", "seed", "steps", "tokens", "supervised", "held-out before", "held-out after", "computed the other way",
        "seconds", "real tokens/s",
    ]  # fmt: skip
    text = markdown(head, lines)
    if (found := summary(results)) is not None:
        packed, padded = found["packed"], found["padded"]
        text += (
            f"\n\nHeld-out loss: packed {packed['heldout_mean']:.4f} ({packed['heldout_std']:.4f} over "
            f"{packed['seeds']} seeds), padded {padded['heldout_mean']:.4f} ({padded['heldout_std']:.4f} over "
            f"{padded['seeds']}); difference {found['difference']:+.4f}, its standard error "
            f"{found['standard_error']:.4f}. By seed, whose initial weights are the same: "
            f"{', '.join(f'{x:+.4f}' for x in found['by_seed'].values())}, standard error of their mean "
            f"{found['paired_standard_error']:.4f}.\nTraining: packed {packed['seconds']:.1f} s, padded "
            f"{padded['seconds']:.1f} s, speed-up {found['speed_up']:.2f}."
        )
    return text


def parse() -> argparse.Namespace:
    cuda = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl: question and answer a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and table.md")
    parser.add_argument("--model", choices=MODELS, default="smollm2_135m", help="architecture, random weights")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a step, a multiple of --seq-len")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest rate")
    parser.add_argument("--warmup-share", type=float, default=0.1, help="of the supervised tokens")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the tokenizer that is trained")
    parser.add_argument("--limit-documents", type=int, help="stop after this many")
    parser.add_argument("--same-steps", action="store_true", help="padded steps take the documents of packed ones")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--devices", type=int, default=cuda or 1, help="processes, one a GPU")
    parser.add_argument(
        "--backend", choices=("hopper", "triton", "torch", "reference"), help="packflex's; default best"
    )
    parser.add_argument("--limit", type=float, default=400, help="seconds for everything")
    arguments = parser.parse_args()
    if arguments.tokens < arguments.seq_len or arguments.tokens % arguments.seq_len:
        parser.error(f"--tokens {arguments.tokens} must be a multiple of --seq-len {arguments.seq_len}")
    if not arguments.data.is_file():
        parser.error(f"--data {arguments.data}: no such file")
    if arguments.device == "cuda" and arguments.devices > cuda:
        parser.error(f"--devices {arguments.devices}, and there are {cuda} GPUs")
    return arguments


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").unlink(missing_ok=True)
    began = time.monotonic()
    corpus = read(arguments)
    about = {
        "environment": environment(arguments.device, arguments.devices),
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "documents": [len(corpus.train), len(corpus.heldout)],
        "heldout_supervised": supervised(corpus.heldout),
    }
    context = mp.get_context("spawn")
    jobs, done = context.Queue(), context.Queue()
    wanted = [(way, seed) for way in WAYS for seed in arguments.seeds]
    for job in wanted:
        jobs.put(job)
    processes = [
        context.Process(target=work, args=(i, jobs, done, corpus, arguments), daemon=True)
        for i in range(arguments.devices)
    ]
    for process in processes:
        process.start()
    results: list[dict[str, Any]] = []
    while len(results) < len(wanted) and time.monotonic() - began < arguments.limit:
        try:
            results.append(done.get(timeout=1))
        except queue.Empty:
            if not any(process.is_alive() for process in processes) and done.empty():
                break
            continue
        r = results[-1]
        print(f"{r['way']} seed {r['seed']}: at {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        write(arguments.out, about, {"runs": results, "summary": summary(results)}, table(results))
    for process in processes:
        process.kill()
    if results:
        print((arguments.out / "table.md").read_text())
    if len(results) < len(wanted) or any("failed" in r for r in results):
        raise SystemExit(f"{sum('failed' not in r for r in results)} of {len(wanted)} runs gave a result")


if __name__ == "__main__":
    main()
