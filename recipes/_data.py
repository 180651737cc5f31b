"""From the `data` group to packed rows: documents, the tokenizer that goes with the model, tokens, rows."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from hydra.utils import get_object, instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from packflex import pack_dataset
from packflex.data.errors import DataError
from packflex.data.pack import name_of, plan_dataset, unsupervised_documents
from packflex.data.sources import load_documents
from packflex.data.tokenize import TokenizedDocuments
from packflex.data.tokenized_stream import TokenizedStream
from packflex.data.tokenizer import load_tokenizer, train_tokenizer
from packflex.data.write import load_packed, read_manifest
from packflex.models import is_pretrained
from packflex.packing import PackingPlan

# For a tokenizer that is trained here, which comes without one.
_PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\\n' + (message.content or '') }}"
    "{{ (eos_token if message.role == 'assistant' else '') + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)

_FIRST = 10_000  # documents of a stream that train its tokenizer
# What happens, on the screen and in the run's log file, once for all ranks.
say = rank_zero_only(logging.getLogger("finetune").info)


@dataclass(frozen=True)
class PackedSplits:
    """Packed rows for training, tokenised and packed held-out documents (None without any), and how they were made.

    `train` is a `TokenizedStream` where documents are packed while training; their number, that of rows and the
    efficiency are 0 until then. `plan` is None there, and for rows that were packed before.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Dataset | TokenizedStream
    heldout: Dataset | None
    heldout_documents: Dataset | None
    train_documents: Dataset
    num_documents: int
    efficiency: float
    plan: PackingPlan | None
    notes: tuple[str, ...]


def prepare(config: DictConfig) -> PackedSplits:
    """Read, tokenise and pack what the config asks for.

    Raises:
        DataError: data that cannot be used; one line with file, line and remedy.
    """
    if get_object(config.data._target_) is load_packed:
        return _prepare_packed(config)
    if is_stream(config):
        return _prepare_stream(config)
    say("Reading documents")
    train, heldout = load_splits(config)
    say("Tokenising %s documents", f"{len(train) + len(heldout or ()):,}")
    tokenizer = choose_tokenizer(config, train)
    tokenize = instantiate(config.tokenize)
    tokens: TokenizedDocuments = tokenize(train, tokenizer)
    plan = _plan(tokens.dataset, config)
    held = None if heldout is None else tokenize(heldout, tokenizer).dataset
    say(
        "Packed %s documents into %s rows of %s tokens, %.2f%% full; %s held out",
        f"{plan.num_documents:,}", f"{plan.num_rows:,}", f"{plan.seq_len:,}", 100 * plan.efficiency,
        "none" if held is None else f"{len(held):,}",
    )  # fmt: skip
    return PackedSplits(
        tokenizer=tokenizer,
        train=pack_dataset(tokens.dataset, plan=plan),
        heldout=None if held is None else pack_dataset(held, plan=_plan(held, config)),
        heldout_documents=held,
        train_documents=tokens.dataset,
        num_documents=plan.num_documents,
        efficiency=plan.efficiency,
        plan=plan,
        notes=_notes(tokens, plan),
    )


def _prepare_packed(config: DictConfig) -> PackedSplits:
    """Rows that are packed already; their tokenizer must be the model's."""
    load = instantiate(config.data)
    manifest = read_manifest(load.keywords["path"])
    if manifest.seq_len != config.packing.seq_len:
        say("Rows of %s tokens, as they were packed", f"{manifest.seq_len:,}")
        config.packing.seq_len = manifest.seq_len
    chosen = config.tokenizer
    if chosen.path is not None or is_pretrained(config.model.path, config.model.init):
        tokenizer = choose_tokenizer(config, Dataset.from_dict({}))
    else:  # a model that knows no words yet takes the rows' own tokenizer
        try:
            tokenizer = load_tokenizer(manifest.tokenizer, chosen.chat_template)
        except DataError as error:
            raise DataError(
                f"{config.data.path}: was packed with a tokenizer that is not found now ({error}); say where it is "
                "(tokenizer.path=...)"
            ) from error
    rows = load(tokenizer=tokenizer).dataset
    held = 0
    if config.heldout.percent and config.heldout.path is None and config.heldout.split is None:
        held = max(1, round(len(rows) * config.heldout.percent / 100))
        if held >= len(rows):
            raise DataError(
                f"{config.data.path}: {len(rows)} row cannot be shared between training and held-out; go without "
                "(heldout.percent=0)"
            )
    elif config.heldout.path is not None or config.heldout.split is not None:
        raise DataError("packed rows hold out rows of their own (heldout.percent); leave heldout.path and split unset")
    order = np.random.default_rng(config.seed).permutation(len(rows))
    train, heldout = rows.select(np.sort(order[held:])), rows.select(np.sort(order[:held]))
    tokens, documents = _count(train)
    say("Read %s rows of %s documents; %s rows held out", f"{len(train):,}", f"{documents:,}", f"{held:,}")
    return PackedSplits(
        tokenizer=tokenizer,
        train=train,
        heldout=heldout if held else None,
        heldout_documents=documents_of(heldout) if held else None,
        train_documents=documents_of(train.select(range(min(64, len(train))))),
        num_documents=documents,
        efficiency=tokens / (len(train) * manifest.seq_len),
        plan=None,
        notes=tuple(f"{what}: {count:,}, when they were packed" for what, count in manifest.counts.items() if count),
    )


def is_stream(config: DictConfig) -> bool:
    """Whether documents are read and packed while training."""
    return get_object(config.data._target_) is TokenizedStream


def _prepare_stream(config: DictConfig) -> PackedSplits:
    """A stream to train on; its first documents train the tokenizer where there is none."""
    settings = {str(name): value for name, value in config.data.items() if name not in ("_target_", "_partial_")}
    encoding = {name: config.tokenize[name] for name in ("train_on_prompt", "turns", "max_length", "on_unsupervised")}
    say("Reading the first documents of the stream")
    # the tokenizer is chosen by documents, and the stream is made with the tokenizer
    reading = {name: value for name, value in settings.items() if name not in ("kind", "path")}
    fields = {name: value for name, value in reading.items() if name != "limit"}
    first = load_documents(settings["kind"], settings["path"], on_duplicate="keep", limit=_FIRST, **fields)
    tokenizer = choose_tokenizer(config, first)
    train = TokenizedStream(settings["kind"], settings["path"], tokenizer, **reading, **encoding)
    tokenize = instantiate(config.tokenize)
    held = None
    if config.heldout.path is not None:
        documents = load_documents(settings["kind"], config.heldout.path, limit=config.heldout.limit, **fields)
        held = tokenize(documents, tokenizer).dataset
    say("Streaming %s files, packed as they come; %s documents held out",
        f"{train.num_shards:,}", "none" if held is None else f"{len(held):,}")  # fmt: skip
    return PackedSplits(
        tokenizer=tokenizer,
        train=train,
        heldout=None if held is None else pack_dataset(held, plan=_plan(held, config)),
        heldout_documents=held,
        train_documents=tokenize(first.select(range(min(64, len(first)))), tokenizer).dataset,
        num_documents=0,
        efficiency=0.0,
        plan=None,
        notes=(),
    )


def _count(rows: Dataset) -> tuple[int, int]:
    """Tokens and documents of packed rows."""
    tokens = documents = 0
    for batch in rows.select_columns(["lengths"]).with_format("arrow").iter(1000):
        sizes = batch["lengths"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        tokens, documents = tokens + int(sizes.sum()), documents + len(sizes)
    return tokens, documents


def documents_of(rows: Dataset) -> Dataset:
    """The documents of packed rows, one by one again."""
    out: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row in rows.iter(1):
        ends = np.cumsum(row["lengths"][0])
        for start, end in zip(ends - row["lengths"][0], ends, strict=True):
            for name, values in out.items():
                values.append(row[name][0][start:end])
    return Dataset.from_dict(out)


def load_splits(config: DictConfig) -> tuple[Dataset, Dataset | None]:
    """Raw documents to train on, and held-out ones if the config wants any."""
    load, heldout = instantiate(config.data), config.heldout
    documents = load()
    if heldout.path is not None or heldout.split is not None:
        where = {"path": heldout.path, "split": heldout.split}
        given = {name: value for name, value in where.items() if value is not None}
        found = load(**given, limit=None)
        count = min(len(found), heldout.limit or len(found))
        # spread over all of them: files are often sorted, and the first would be of one kind
        return documents, found.select(np.linspace(0, len(found) - 1, count).round().astype(int))
    if not heldout.percent:
        return documents, None
    count = max(1, round(len(documents) * heldout.percent / 100))
    count = min(count, heldout.limit or count)
    if count >= len(documents):
        raise DataError(
            f"{config.data.path}: {len(documents)} document cannot be shared between training and held-out; give "
            "another file (heldout.path=...), or go without (heldout.percent=0)"
        )
    order = np.random.default_rng(config.seed).permutation(len(documents))
    return documents.select(np.sort(order[count:])), documents.select(np.sort(order[:count]))


def choose_tokenizer(config: DictConfig, documents: Dataset) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, else the pretrained model's, else one trained on the documents."""
    chosen = config.tokenizer
    if chosen.path is not None or is_pretrained(config.model.path, config.model.init):
        name = chosen.path if chosen.path is not None else config.model.path
        return load_tokenizer(name, chosen.chat_template, config.model.revision if chosen.path is None else None)
    tokenizer = train_tokenizer(_texts(documents), chosen.vocab_size, config.paths.cache_dir)
    if chosen.chat_template is not None:
        path = Path(chosen.chat_template)
        if not path.is_file():
            raise DataError(f"{path}: no such chat template file; give a file with a Jinja template")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif "messages" in documents.column_names:
        tokenizer.chat_template = _PLAIN_CHAT_TEMPLATE
    return tokenizer


def _texts(documents: Dataset) -> list[str]:
    if "messages" in documents.column_names:
        conversations = (json.loads(messages) for messages in documents["messages"])
        return [
            f"{m['role']}:\n{m['content']}"
            for messages in conversations
            for m in messages
            if isinstance(m.get("content"), str)
        ]
    if "text" in documents.column_names:
        return list(documents["text"])
    return [p + c for p, c in zip(documents["prompt"], documents["completion"], strict=True)]


def _plan(documents: Dataset, config: DictConfig) -> PackingPlan:
    packing = config.packing
    try:
        plan = plan_dataset(documents, packing.seq_len, packing.strategy, packing.overflow, config.seed)
    except ValueError as error:  # a packing setting that does not go with these documents
        raise DataError(f"{error} (packing.seq_len={packing.seq_len}, packing.overflow={packing.overflow})") from error
    if not plan.num_rows:
        raise DataError(
            f"all {plan.num_dropped} documents are longer than packing.seq_len={packing.seq_len}, and "
            "packing.overflow=drop leaves none; raise it, or choose packing.overflow=split"
        )
    return plan


def _notes(tokens: TokenizedDocuments, plan: PackingPlan) -> tuple[str, ...]:
    bare = unsupervised_documents(tokens.dataset, plan)
    first = name_of(tokens.dataset, int(bare[0])) if len(bare) else ""
    notes = {
        "documents without a supervised token were dropped": tokens.dropped,
        f"documents were cut to tokenize.max_length ({tokens.truncated_tokens:,} tokens)": tokens.truncated,
        "documents longer than a row were split": plan.num_split,
        f"documents longer than a row were truncated ({plan.truncated_tokens:,} tokens)": plan.num_truncated,
        f"documents longer than a row were dropped ({plan.dropped_tokens:,} tokens)": plan.num_dropped,
        f"documents lost every supervised token to rows of packing.seq_len={plan.seq_len} (the first is {first})": len(
            bare
        ),
    }
    return tuple(f"{count:,} {what}" for what, count in notes.items() if count)


class DocumentNames:
    """Names documents of packed rows by their place in the data and their first words, for whoever must look at them.

    Args:
        data: what the rows were packed from.
    """

    def __init__(self, data: PackedSplits) -> None:
        self._data = data

    def __call__(self, row: list[int], lengths: list[int], document: int) -> str:
        """Document `document` of the packed row with these `input_ids` and documents of these lengths."""
        start = sum(lengths[:document])
        words = repr(
            " ".join(str(self._data.tokenizer.decode(row[start : start + min(24, lengths[document])])).split())
        )
        text = f"({lengths[document]} tokens: {words} ...)"
        if isinstance(self._data.train, TokenizedStream):
            return f"a document of the stream {text}"
        for index, candidate in enumerate(self._data.train.iter(1)):
            if candidate["input_ids"][0] == row:
                plan = self._data.plan
                number = document if plan is None else plan.document_indices[int(plan.row_offsets[index]) + document]
                where = f"document {number} of training row {index}" if plan is None else f"training document {number}"
                return f"{where} {text}"
        return f"document {document} of a row that is none of the training rows {text}"
