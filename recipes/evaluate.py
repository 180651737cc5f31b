"""Loss and perplexity of each document of a data set, whatever row it is packed into.

    python recipes/evaluate.py model.path=outputs/2026-11-23/10-00-00/model data=jsonl data.path=test.jsonl

Writes `documents.csv` (tokens, loss and perplexity of each) and `summary.json` to Hydra's output folder, and prints the
mean over tokens, which long documents dominate, and the median over documents.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in finetune.py

import hydra
import numpy as np
import torch
from _booleans import check_booleans
from _checks import check_options, check_whole_number, check_words
from _command import USER_ERRORS, run_command, stop
from _data import documents_of
from _errors import unwritten
from datasets import Dataset
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from packflex.data.tokenized_stream import TokenizedStream
from packflex.data.tokenizer import load_tokenizer
from packflex.data.write import load_packed
from packflex.evaluate import document_losses
from packflex.integrations.lightning import is_out_of_memory
from packflex.models import SetupError, checked_name, is_pretrained
from packflex.report import shortest

PRECISIONS = {"16": torch.float16, "bf16": torch.bfloat16, "32": None}
_LOWER = "a lower packing.batch_size, a lower packing.seq_len"


def evaluate(config: DictConfig) -> dict[str, float | int]:
    """Run a config; returns what summary.json holds."""
    for setting, least in (("packing.batch_size", 1), ("packing.seq_len", 2)):
        check_whole_number(config, setting, least)
    check_booleans(config)
    check_options(config, ("data", "tokenize"))
    check_words(config)
    if get_object(config.data._target_) is TokenizedStream:
        raise SetupError(
            "data=stream has no end to evaluate; read the same files whole: data=jsonl (or data=packed after packflex "
            f"pack) data.path={config.data.path}"
        )
    is_pretrained(config.model.path, config.model.init)
    if config.model.path is not None:
        checked_name(config.model.path)
    out = Path(config.paths.output_dir)
    out.mkdir(parents=True, exist_ok=True)  # before the long work
    device = _device(config.device)
    autocast = _precision(str(config.precision), device)
    name = config.tokenizer.path if config.tokenizer.path is not None else config.model.path
    tokenizer = load_tokenizer(
        name, config.tokenizer.chat_template, config.model.revision if config.tokenizer.path is None else None
    )
    documents, dropped, notes = _documents(config, tokenizer)
    model = instantiate(config.model, tokenizer=tokenizer).to(device)
    began = time.perf_counter()
    found = document_losses(
        model,
        documents,
        seq_len=config.packing.seq_len,
        batch_size=config.packing.batch_size,
        backend=config.attention.backend,
        autocast=autocast,
    )
    seconds = time.perf_counter() - began
    found.save(out / "documents.csv")
    each = found.document_perplexities[found.supervised > 0]
    summary = {
        "documents": len(documents),
        "dropped": dropped,
        "tokens": int(found.tokens.sum()),
        "supervised": int(found.supervised.sum()),
        "loss": found.loss,
        "perplexity": found.perplexity,
        "median_document_perplexity": float(np.median(each)),
        "tokens_per_second": float(found.tokens.sum() / seconds),
    }
    # JSON knows neither NaN nor infinity
    finite = {name: value if np.isfinite(value) else None for name, value in summary.items()}
    (out / "summary.json").write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
    OmegaConf.save(config, out / "config.yaml", resolve=True)
    print(
        f"documents   {summary['documents']:,}, {summary['supervised']:,} supervised tokens"
        + (f"; {dropped:,} without one were left out" if dropped else "")
    )
    for note in notes:
        print(f"note        {note}")
    print(f"loss        {found.loss:.4f} nats a token")
    print(
        f"perplexity  {found.perplexity:.3f} over tokens, {summary['median_document_perplexity']:.3f} median document"
    )
    print(f"speed       {summary['tokens_per_second']:,.0f} tokens a second")
    print(f"written     {shortest(out / 'documents.csv')}")
    if len(found.not_finite):
        raise SetupError(
            f"{len(found.not_finite):,} of {len(documents):,} documents have a loss that is not finite, the first is "
            f"document {found.not_finite[0]} of documents.csv; the weights may come from a run that diverged, or "
            "precision=16 is too short for them (precision=32)"
        )
    return summary


def _documents(config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, int, list[str]]:
    """Tokenised documents, how many were left out, and what else became of them."""
    if get_object(config.data._target_) is load_packed:
        packed = instantiate(config.data)(tokenizer=tokenizer)
        notes = [f"{what}: {count:,}, when they were packed" for what, count in packed.manifest.counts.items() if count]
        return documents_of(packed.dataset), 0, notes
    tokens = instantiate(config.tokenize)(instantiate(config.data)(), tokenizer)
    notes = []
    if tokens.truncated:
        notes.append(
            f"{tokens.truncated:,} documents were cut to tokenize.max_length ({tokens.truncated_tokens:,} tokens)"
        )
    return tokens.dataset, tokens.dropped, notes


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise SetupError(f"device={name} must be auto, cpu or cuda (cuda:1 for the second GPU)")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SetupError(f"device={name}: torch can use {torch.cuda.device_count()} GPUs here; set device=cpu or auto")
    return device


def _precision(name: str, device: torch.device) -> torch.dtype | None:
    name = ("bf16" if device.type == "cuda" else "32") if name == "auto" else name
    if name not in PRECISIONS:
        raise SetupError(f"precision={name} must be auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def run(config: DictConfig) -> None:
    """The run itself."""
    try:
        evaluate(config)
    except USER_ERRORS as error:
        stop(error, lower=_LOWER)
    except OSError as error:
        stop(unwritten(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        stop(error, lower=_LOWER)


if __name__ == "__main__":
    run_command(run)
