"""The documents and batches of `bench_finetune.py`: the same documents for every mode, laid out in its way."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packflex import PackedLayout
from packflex.packing import best_fit


@dataclass(frozen=True)
class Mode:
    """One way to train: how the batch is laid out, which attention, whether the model is compiled."""

    batch: str  # rows: packed rows; flat: all rows of a step end to end, one row; padded: a document a row
    attention: str
    compiled: bool = False
    fill: bool = False  # padded micro-batches as large as a packed step, not of --padded-batch documents
    grouped: bool = False  # padded micro-batches of documents of like length
    what: str = ""


# Documents


def document_lengths(arguments: argparse.Namespace, rng: np.random.Generator) -> np.ndarray:
    """Enough document lengths for all steps: drawn from a lognormal, or from the lines of a file."""
    wanted = (arguments.steps + arguments.warmup) * arguments.tokens
    pool = np.array(list(lengths_of_file(arguments.data, arguments.bytes_per_token))) if arguments.data else None
    lengths = np.empty(0, dtype=np.int64)
    while lengths.sum() < 1.1 * wanted:
        more = (
            rng.choice(pool, 4096) if pool is not None else rng.lognormal(arguments.log_mean, arguments.log_std, 4096)
        )
        lengths = np.concatenate([lengths, np.clip(more, 2, arguments.seq_len).astype(np.int64)])
    return lengths[: int(np.searchsorted(lengths.cumsum(), 1.1 * wanted)) + 1]


def lengths_of_file(path: Path, bytes_per_token: float) -> Iterator[int]:
    """Tokens of each line of a JSONL file: its `input_ids`, its `length`, or the bytes of its texts by a ratio."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise SystemExit(f"{path}:{number}: not JSON ({error}); one object a line is expected") from error
            if not isinstance(record, dict):
                raise SystemExit(f"{path}:{number}: expected an object; got {type(record).__name__}")
            if "input_ids" in record:
                yield len(record["input_ids"])
            elif "length" in record:
                yield int(record["length"])
            else:
                text = "".join(value for value in record.values() if isinstance(value, str))
                yield max(1, round(len(text.encode()) / bytes_per_token))


def make_steps(arguments: argparse.Namespace, vocabulary: int) -> list[list[list[np.ndarray]]]:
    """Token ids of the documents of each row of each step; the same for every mode."""
    rng = np.random.default_rng(arguments.seed)
    lengths = document_lengths(arguments, rng)
    plan = best_fit(lengths.tolist(), arguments.seq_len)
    offsets = np.asarray(plan.row_offsets)
    rows = [np.asarray(plan.document_indices)[a:b] for a, b in pairwise(offsets)]
    rng.shuffle(rows)
    rows_per_step = arguments.tokens // arguments.seq_len
    steps = arguments.steps + arguments.warmup
    assert len(rows) >= steps * rows_per_step, (len(rows), steps, rows_per_step)
    documents = {int(i): rng.integers(3, vocabulary, lengths[i]) for row in rows for i in row}
    return [
        [[documents[int(i)] for i in row] for row in rows[step * rows_per_step : (step + 1) * rows_per_step]]
        for step in range(steps)
    ]


# Batches


def packed_rows(rows: list[list[np.ndarray]], seq_len: int) -> dict[str, Any]:
    layout = PackedLayout.from_lengths([[len(d) for d in row] for row in rows], seq_len)
    ids = torch.zeros(len(rows), seq_len, dtype=torch.long)
    for row, documents in zip(ids, rows, strict=True):
        tokens = torch.from_numpy(np.concatenate(documents))
        row[: len(tokens)] = tokens
    starts = (layout.position_ids == 0) | (layout.document_ids < 0)
    labels = ids.masked_fill(starts, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": layout.position_ids, "packed": layout}


def padded(documents: list[np.ndarray]) -> dict[str, Any]:
    longest = -(-max(map(len, documents)) // 8) * 8  # as data collators do for tensor cores
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.from_numpy(document)
        mask[row, : len(document)] = 1
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def micro_batches(mode: Mode, rows: list[list[np.ndarray]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The batches of one step, on the host."""
    documents = [document for row in rows for document in row]
    if mode.batch == "padded":
        groups: list[list[np.ndarray]] = [[]]
        if mode.grouped:
            documents = sorted(documents, key=len)
        for document in documents:
            group = groups[-1]
            longest = max(map(len, [*group, document]))
            full = (len(group) + 1) * longest > arguments.tokens if mode.fill else len(group) == arguments.padded_batch
            groups = [*groups, [document]] if group and full else [*groups[:-1], [*group, document]]
        return [padded(group) for group in groups]
    if mode.batch == "rows":
        batch = packed_rows(rows, arguments.seq_len)
        if mode.attention != "packflex":
            del batch["packed"]
        return [batch]
    # End to end in one row: what is left of it is one more document without labels, so that shapes stay the same.
    batch = packed_rows([documents], arguments.tokens)
    layout: PackedLayout = batch.pop("packed")
    rest = arguments.tokens - layout.num_tokens
    whole = PackedLayout.from_lengths([[*layout.lengths[0], *([rest] if rest else [])]])
    batch.update(
        position_ids=whole.position_ids,
        cu_seq_lens_q=whole.cu_seqlens,
        cu_seq_lens_k=whole.cu_seqlens,
        max_length_q=whole.max_length,
        max_length_k=whole.max_length,
    )
    return [batch]
