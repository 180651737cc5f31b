"""The end of a run: what was trained on, how fast, what it brought, where it lies; the loss as a picture; a sample."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch

from packflex.plots import loss_curve

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENS_PER_SECOND = "throughput/tokens_per_second"


@dataclass(frozen=True)
class RunSummary:
    """What a run prints at its end.

    Attributes:
        parameters: weights of the model.
        documents: documents trained on (of the data set, however much of it the steps covered).
        rows: packed rows they fill.
        seq_len: tokens of a row.
        efficiency: share of the rows that is documents, 0 to 1.
        steps: optimizer steps done.
        tokens_per_second: median over the logged steps, over all devices, padding not counted; None without a log.
        loss_start, loss_end: mean over the supervised tokens of the held-out documents, in nats, before and after
            training; None without held-out documents.
        heldout_documents: how many those are.
        notes: what happened to documents on the way: cut, dropped, split, as sentences.
        prompt, completion: a held-out document's prompt and what the model makes of it.
        files: what was written, by what it is.
    """

    parameters: int
    documents: int
    rows: int
    seq_len: int
    efficiency: float
    steps: int
    tokens_per_second: float | None
    loss_start: float | None
    loss_end: float | None
    heldout_documents: int
    prompt: str
    completion: str
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the summary as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def facts(self) -> list[tuple[str, str]]:
        """Names and values, as they are shown."""
        lines = [
            ("parameters", f"{self.parameters:,}"),
            ("documents", f"{self.documents:,}"),
            ("rows", f"{self.rows:,} of {self.seq_len:,} tokens"),
            ("packing efficiency", f"{self.efficiency:.2%}"),
            ("steps", f"{self.steps:,}"),
        ]
        if self.tokens_per_second is not None:
            lines.append(("tokens a second", f"{self.tokens_per_second:,.0f}"))
        if self.loss_start is not None and self.loss_end is not None:
            change = f"{self.loss_start:.3f} -> {self.loss_end:.3f}"
            lines.append(("held-out loss", f"{change} nats a token, {self.heldout_documents:,} documents"))
        return lines + [("note", note) for note in self.notes]

    def __str__(self) -> str:
        sample = [
            "",
            "prompt (held out)" if self.heldout_documents else "prompt",
            _indented(self.prompt),
            "completion",
            _indented(self.completion),
            "",
        ]
        return "\n".join([_table(self.facts()), *sample, "written", _table(list(self.files.items()))])


def read_metrics(path: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric in a `metrics.csv` of Lightning's CSVLogger; empty when it was never logged."""
    steps: list[int] = []
    values: list[float] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row.get(name):
                    steps.append(int(row["step"]))
                    values.append(float(row[name]))
    return steps, values


def typical_speed(metrics: Path) -> float | None:
    """Median of the logged tokens a second, None when there are none."""
    values = read_metrics(metrics, _TOKENS_PER_SECOND)[1]
    return median(values) if values else None


def save_loss_picture(metrics: Path, picture: Path, heldout: Sequence[tuple[int, float]] = ()) -> bool:
    """Draw training loss by step from `metrics.csv`, with held-out losses as (step, loss).

    Returns:
        Whether there was anything to draw.
    """
    steps, losses = read_metrics(metrics, "train/loss")
    if not steps and not heldout:
        return False
    figure = loss_curve(steps, losses, [step for step, _ in heldout], [loss for _, loss in heldout])
    figure.savefig(picture)
    return True


def typical_document(documents: Dataset) -> dict[str, Any]:
    """The tokenised document of median length: what a sample is shown of."""
    lengths = [len(ids) for ids in documents["input_ids"]]
    return documents[sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]]


def prompt_of(input_ids: Sequence[int], labels: Sequence[int], most: int = 256) -> list[int]:
    """Ids before the first supervised token: what the model is given. The last `most` of them.

    A document that is supervised from its second token on is a text without a prompt: its first quarter is given.

    Example:
        >>> prompt_of([1, 5, 6, 7], [-100, -100, 6, 7])
        [1, 5]
    """
    first = next((i for i, label in enumerate(labels) if label != -100), len(labels))
    given = first if first > 1 else max(1, len(input_ids) // 4)
    return list(input_ids[:given])[-most:]


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
) -> tuple[str, str]:
    """The prompt and the model's completion of it, as text; the same each time, the random state is put back.

    Args:
        model: on any device; its mode is put back afterwards.
        tokenizer: for the text, and the token that ends it.
        prompt_ids: what it is given, at least one token.
        max_new_tokens: where to stop when no end token comes before.
        temperature: of sampling; 0 takes the likeliest token each time, which makes weak models repeat themselves.
    """
    training = model.training
    model.eval()
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    model.train(training)
    parts = (out[0, : ids.shape[1]], out[0, ids.shape[1] :])
    prompt, completion = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
    return prompt, completion


def _table(lines: Sequence[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def shortest(path: Path) -> str:
    """A path as it is best shown: relative to the working folder when it is inside."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _indented(text: str) -> str:
    text = text if text.strip() else "(nothing but white space)"
    return "\n".join(f"    {line}".rstrip() for line in text.strip("\n").split("\n"))
