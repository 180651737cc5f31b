"""`tokenize_documents`: raw documents to `input_ids` and `labels`.

    text        beginning + text + end                    every token but the first is supervised
    prompt      beginning + prompt + completion + end     the completion and the end are
    messages    as the chat template writes it            what the assistant says is

Prompt and completion are tokenised apart and joined: at inference the model is given the prompt's ids, so this is the
boundary it must know. Beginning and end are those that the tokenizer itself means, never twice. Labels are not shifted
(the model's loss shifts), and the first token of a document is never supervised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from packflex.data.chat import ChatEncoder, Turns
from packflex.data.encoding import TextEncoder
from packflex.data.errors import DataError
from packflex.data.labels import IGNORED
from packflex.data.records import check_messages, without_nulls

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

OnUnsupervised = Literal["error", "drop"]
_Pair = tuple[list[int], list[int]]  # input_ids, labels


@dataclass(frozen=True)
class TokenizedDocuments:
    """Tokenised documents and what happened to them on the way.

    Attributes:
        dataset: columns input_ids and labels (lists of int32, of equal length) and source (string).
        read: documents before.
        dropped: documents left out because no token of theirs was supervised.
        truncated: documents cut to `max_length`, among those kept.
        truncated_tokens: tokens cut from them.
        tokens: tokens kept.
        supervised_tokens: tokens kept with a label other than -100.
    """

    dataset: Dataset
    read: int
    dropped: int
    truncated: int
    truncated_tokens: int
    tokens: int
    supervised_tokens: int


def tokenize_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on_prompt: bool = False,
    turns: Turns = "all",
    max_length: int | None = None,
    on_unsupervised: OnUnsupervised = "error",
    num_proc: int | None = None,
) -> TokenizedDocuments:
    """Tokenise documents as `load_documents` gives them.

    Args:
        documents: columns text, or prompt and completion, or messages (and tools); messages as lists or JSON text
            (in lists, members that are null are left out: Arrow gives every object the members of all others).
            A `source` column names documents in errors; without it they are called "document 12".
        tokenizer: with an end-of-sequence token, and a chat template for messages.
        train_on_prompt: supervise the prompt too.
        turns: supervise "all" turns of the assistant or the "last" only.
        max_length: cut longer documents to this many tokens, counted in the result; keep them whole by default, and
            let packing decide.
        on_unsupervised: what to do with a document that has no supervised token (an empty completion, no assistant's
            turn, or all cut off): "error" names it, "drop" leaves it out and counts it.
        num_proc: worker processes; none by default, which is best below about 50,000 documents.

    Returns:
        `TokenizedDocuments`; its `dataset` goes to `packflex.pack_dataset`.

    Raises:
        DataError: a document that cannot be used, named by its source; or nothing left after dropping.
        ValueError: options out of range or unknown.

    Example:
        >>> documents = load_documents("jsonl", "train.jsonl")            # prompt "1+1=", completion "2"
        >>> tokenize_documents(documents, tokenizer).dataset[0]["labels"]  # <bos> 1 + 1 = | 2 <eos>
        [-100, -100, -100, -100, -100, 20, 1]
    """
    import datasets  # here and not above: it takes a second, and the options above are checked without it

    check_options(on_unsupervised, max_length)
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, or None for no worker; got {num_proc}")
    if not len(documents):
        raise DataError("there is no document to tokenise: the data set is empty")
    form, drop = form_of(documents.column_names), on_unsupervised == "drop"
    first = documents[0]["source"] if "source" in documents.column_names else "document 0"
    encode = DocumentEncoder(tokenizer, form, train_on_prompt, turns, max_length, drop, first)
    ids = datasets.List(datasets.Value("int32"))
    mapped = documents.map(
        encode,
        batched=True,
        with_indices=True,
        num_proc=min(num_proc, len(documents)) if num_proc and num_proc > 1 else None,
        remove_columns=documents.column_names,
        features=datasets.Features(
            {"input_ids": ids, "labels": ids, "source": datasets.Value("string"), "cut": datasets.Value("int32")}
        ),
        desc="Tokenising",
    )
    if not len(mapped):
        raise DataError(
            f"none of {len(documents)} documents has a supervised token, so all were dropped; check the fields and "
            f"max_length={max_length}"
        )
    cut = mapped.with_format("numpy")["cut"][:]
    kept = mapped.remove_columns("cut")
    tokens, supervised = _count(kept)
    return TokenizedDocuments(
        kept, len(documents), len(documents) - len(kept), int((cut > 0).sum()), int(cut.sum()), tokens, supervised
    )


def check_options(on_unsupervised: str, max_length: int | None) -> None:
    """Refuse options that are unknown or out of range.

    Raises:
        ValueError: which.
    """
    if on_unsupervised not in get_args(OnUnsupervised):
        raise ValueError(f"on_unsupervised must be 'error' or 'drop'; got {on_unsupervised!r}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, one token to see and one to predict; got {max_length}")


def form_of(columns: list[str]) -> str:
    """ "messages", "prompt" or "text", by the columns that documents have.

    Raises:
        DataError: columns that no document is made of.
    """
    if "messages" in columns:
        return "messages"
    if "prompt" in columns and "completion" in columns:
        return "prompt"
    if "text" in columns:
        return "text"
    raise DataError(
        "documents need the columns messages, or prompt and completion, or text; these have "
        f"{', '.join(map(repr, columns)) or 'none'}: read them with load_documents, which renames fields"
    )


def _count(dataset: Dataset) -> tuple[int, int]:
    tokens = supervised = 0
    for batch in dataset.with_format("arrow").iter(batch_size=10_000):
        labels = batch["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        tokens += len(labels)
        supervised += int((labels != IGNORED).sum())
    return tokens, supervised


@dataclass
class DocumentEncoder:
    """Batches of raw documents to lists of `input_ids`, `labels`, `source` and `cut` (tokens past `max_length`).

    What `Dataset.map` calls on each batch; picklable, so that worker processes can have it. Arguments and errors as in
    `tokenize_documents`; `first` is what the first document is called.
    """

    tokenizer: PreTrainedTokenizerBase
    form: str
    train_on_prompt: bool
    turns: Turns
    max_length: int | None
    drop: bool
    first: InitVar[str] = ""

    def __post_init__(self, first: str) -> None:
        self.encoder = TextEncoder(self.tokenizer)
        self.chat = ChatEncoder(self.encoder, self.turns, first) if self.form == "messages" else None

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Tokens of the documents of a batch; those without supervision are left out where that is wanted."""
        sources = batch["source"] if "source" in batch else [f"document {i}" for i in indices]
        out: dict[str, list[Any]] = {"input_ids": [], "labels": [], "source": [], "cut": []}
        for i, (source, (ids, labels)) in enumerate(zip(sources, self._pairs(batch, sources), strict=True)):
            if labels:
                labels[0] = IGNORED
            cut = max(0, len(ids) - self.max_length) if self.max_length is not None else 0
            kept = labels[: self.max_length]
            if all(label == IGNORED for label in kept):
                if self.drop:
                    continue
                raise DataError(
                    f"{source}: {self._why(ids, labels, {key: values[i] for key, values in batch.items()})}"
                )
            out["input_ids"].append(ids[: self.max_length])
            out["labels"].append(kept)
            out["source"].append(source)
            out["cut"].append(cut)
        return out

    def _pairs(self, batch: Mapping[str, list[Any]], sources: list[str]) -> list[_Pair]:
        if self.form == "text":
            texts = _strings(batch, "text", sources)
            return [self._text(ids) for ids in self.encoder.encode(texts)]
        if self.form == "prompt":
            prompts = self.encoder.encode(_strings(batch, "prompt", sources))
            completions = self.encoder.encode_continuations(_strings(batch, "completion", sources))
            return [self._joined(p, c) for p, c in zip(prompts, completions, strict=True)]
        tools = batch.get("tools", [None] * len(sources))
        return [self._conversation(m, t, s) for m, t, s in zip(batch["messages"], tools, sources, strict=True)]

    def _text(self, text: list[int]) -> _Pair:
        ids = self.encoder.head(text) + text + self.encoder.tail(text)
        return ids, (list(ids) if text else [IGNORED] * len(ids))

    def _joined(self, prompt: list[int], completion: list[int]) -> _Pair:
        given = self.encoder.head(prompt + completion) + prompt
        answer = completion + self.encoder.tail(completion)
        if not completion:
            return given + answer, [IGNORED] * (len(given) + len(answer))
        return given + answer, (list(given) if self.train_on_prompt else [IGNORED] * len(given)) + answer

    def _conversation(self, messages: Any, tools: Any, source: str) -> _Pair:
        assert self.chat is not None
        messages, tools = _plain(messages), _plain(tools)
        check_messages(messages, source)
        ids, labels = self.chat.encode(messages, tools, source)
        return ids, (list(ids) if self.train_on_prompt else labels)

    def _why(self, ids: list[int], labels: list[int], document: Mapping[str, Any]) -> str:
        remedy = "leave such documents out with on_unsupervised='drop' (--on-unsupervised drop)"
        first = next((i for i, label in enumerate(labels) if label != IGNORED), None)
        if first is not None:
            return (
                f"no supervised token is left: the first is token {first} of {len(ids)}, and max_length="
                f"{self.max_length} cuts it off; raise it, or {remedy}"
            )
        what = {
            "text": "the text is empty or one token long",
            "prompt": "the completion is empty",
            "messages": "the assistant says nothing in this conversation",
        }[self.form]
        if self.form == "messages":
            roles = [message["role"] for message in _plain(document["messages"])]
            if "assistant" not in roles:
                what += f": no message has its role, for they have {', '.join(map(repr, dict.fromkeys(roles)))}"
        return f"no supervised token: {what}; fix the record, or {remedy}"


def _plain(column: Any) -> Any:
    """Messages or tools as objects. Those of JSON text are as they were; Arrow's nulls may be no member of theirs."""
    return json.loads(column) if isinstance(column, str) else without_nulls(column)


def _strings(batch: Mapping[str, list[Any]], column: str, sources: list[str]) -> list[str]:
    for source, value in zip(sources, batch[column], strict=True):
        if not isinstance(value, str):
            raise DataError(f"{source}: {column!r} must be a string; got {type(value).__name__}; fix the record")
    return batch[column]


def _ends(ids: list[int], end: tuple[int, ...]) -> bool:
    return tuple(ids[-len(end) :]) == end
