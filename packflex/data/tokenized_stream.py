"""`TokenizedStream`: documents of files that are read and tokenised while they are trained on."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from packflex.data.records import Format
from packflex.data.sources import Paths, files_of, read_documents
from packflex.data.tokenize import DocumentEncoder, OnUnsupervised, check_options, form_of
from packflex.data.tokenizer import chat_template_fingerprint, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from packflex.data.chat import Turns

logger = logging.getLogger(__name__)

KINDS = ("jsonl", "parquet", "arrow")  # of files that are read as they come
_AT_ONCE = 64  # documents tokenised together, and again after a resume
_PLACE = ("file", "read", "given")  # documents read of it before those tokenised together, and given of those
_START = (0, 0, 0)


class TokenizedStream:
    """Tokenised documents in the order of their files, the same each time: a source for `PackedStream`.

    Ids of records are not looked at: leave records that come twice out before. Each file is a shard; a stream over
    several ranks or workers is read fastest from as many files. Nothing is kept: each pass reads and tokenises again.

    Args:
        kind: "jsonl", "parquet" or "arrow".
        path: a file, a folder, a glob, or a list of them.
        tokenizer: with an end-of-sequence token, and a chat template for messages.
        format, text_field, prompt_field, completion_field, messages_field, tools_field: as in `load_documents`.
        train_on_prompt, turns, max_length, on_unsupervised: as in `tokenize_documents`; what is dropped or cut is
            counted in the log at the end of each file.
        limit: stop after this many documents of each file.

    Raises:
        DataError: no such files; and while it is iterated, a document that cannot be used, by file and line.
        ValueError: an unknown kind, or options out of range.

    Example:
        >>> source = TokenizedStream("jsonl", "shards/", tokenizer)
        >>> stream = PackedStream(source, PackedCollator(8192), seq_len=8192, num_batches=1000)
    """

    def __init__(
        self,
        kind: str,
        path: Paths,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: Format = "auto",
        text_field: str = "text",
        prompt_field: str = "prompt",
        completion_field: str = "completion",
        messages_field: str = "messages",
        tools_field: str = "tools",
        train_on_prompt: bool = False,
        turns: Turns = "all",
        max_length: int | None = None,
        on_unsupervised: OnUnsupervised = "error",
        limit: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, whose files are read as they come; got {kind!r}")
        check_options(on_unsupervised, max_length)
        self.kind, self.tokenizer = kind, tokenizer
        self.files = files_of(kind, path)
        self._reading = {
            "format": format, "text_field": text_field, "prompt_field": prompt_field, "tools_field": tools_field,
            "completion_field": completion_field, "messages_field": messages_field, "limit": limit,
        }  # fmt: skip
        self._encoding: dict[str, Any] = {"train_on_prompt": train_on_prompt, "turns": turns, "max_length": max_length}
        self._drop = on_unsupervised == "drop"
        self._place = self._resume = _START

    @property
    def num_shards(self) -> int:
        """Files."""
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """Of the files' names and sizes, the tokenizer and every option: what a resumed stream must share."""
        files = [(file.name, file.stat().st_size) for file in self.files]
        told = [files, self.kind, self._reading, self._encoding, self._drop]
        marks = [tokenizer_fingerprint(self.tokenizer), chat_template_fingerprint(self.tokenizer)]
        return hashlib.sha256(repr([*told, *marks]).encode()).hexdigest()[:16]

    def shard(self, num_shards: int, index: int) -> TokenizedStream:
        """The stream of every `num_shards`-th file from number `index` on."""
        part = copy.copy(self)
        part.files = self.files[index::num_shards]
        return part

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands after the last document it gave."""
        return dict(zip(_PLACE, self._place, strict=True))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Have the next iteration begin after that document; what lies before is read but not tokenised."""
        self._resume = (state["file"], state["read"], state["given"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Documents with `input_ids`, `labels` and `source`."""
        (first, passed, given_before), self._resume = self._resume, _START
        for number, file in enumerate(self.files[first:], first):
            documents = self._read(file)
            read = sum(1 for _ in islice(documents, passed))
            kept, cut, encode = read, 0, None
            while batch := list(islice(documents, _AT_ONCE)):
                columns = {name: [document.get(name) for document in batch] for name in batch[0]}
                if encode is None:
                    form = form_of(list(columns))
                    named = batch[0]["source"]
                    encode = DocumentEncoder(self.tokenizer, form, drop=self._drop, first=named, **self._encoding)
                tokens = encode(columns, list(range(read, read + len(batch))))
                cut += sum(map(bool, tokens.pop("cut")))
                for given, values in enumerate(zip(*tokens.values(), strict=True), 1):
                    if given > given_before:
                        self._place = (number, read, given)
                        yield dict(zip(tokens, values, strict=True))
                read, kept, given_before = read + len(batch), kept + len(tokens["input_ids"]), 0
            passed = given_before = 0
            if kept < read:
                logger.warning("%s: %d documents without a supervised token were dropped", file, read - kept)
            if cut:
                logger.warning("%s: %d documents were cut to %s tokens", file, cut, self._encoding["max_length"])

    def _read(self, file: Any) -> Iterator[dict[str, str]]:
        return read_documents(self.kind, file, on_duplicate="keep", **self._reading)  # type: ignore[arg-type]
