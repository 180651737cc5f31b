"""`TextEncoder`: text to token ids with the tokenizer's own beginning and end, in pieces that can be joined.

A document is tokenised in pieces (prompt, completion; the turns of a conversation) and the pieces are concatenated. At
inference the model is given exactly the first piece's ids, so training sees the same boundary, and a token never
straddles what is supervised and what is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from packflex.data.errors import DataError
from packflex.data.tokenizer import tokenizer_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Put before a piece so that it is not the start of a text, then taken off again; the second for pieces that merge with
# the first, as a leading newline may.
_ANCHORS = ("\n", "a")


class TextEncoder:
    """Encodes documents and pieces of documents with one tokenizer.

    Attributes:
        beginning: ids the tokenizer puts before a text; empty when it means none (GPT-2, Qwen).
        end: ids that end a document: what the tokenizer puts after a text, and its EOS unless that is the last of it.

    Raises:
        DataError: a tokenizer without an end-of-sequence token.

    Example:
        >>> encoder = TextEncoder(tokenizer)  # of `train_tokenizer`: <|bos|> is 0, <|eos|> is 1
        >>> (ids,) = encoder.encode(["1"])
        >>> encoder.head(ids) + ids + encoder.tail(ids)
        [0, 20, 1]
    """

    beginning: tuple[int, ...]
    end: tuple[int, ...]

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        bare = self.encode(["a"])[0]
        dressed = tokenizer("a")["input_ids"]
        starts = [i for i in range(len(dressed) - len(bare) + 1) if dressed[i : i + len(bare)] == bare]
        if not bare or not starts:
            raise DataError(
                f"tokenizer {tokenizer_name(tokenizer)}: 'a' is {bare} without and {dressed} with special tokens; "
                "expected the first inside the second: check the tokenizer's files"
            )
        self.beginning = tuple(dressed[: starts[-1]])
        end = tuple(dressed[starts[-1] + len(bare) :])
        if tokenizer.eos_token_id is not None and end[-1:] != (tokenizer.eos_token_id,):
            end = (*end, tokenizer.eos_token_id)
        if not end:
            raise DataError(
                f"tokenizer {tokenizer_name(tokenizer)} has no end-of-sequence token, so a model could not learn "
                "where to stop; set tokenizer.eos_token to a token of its vocabulary and save it again"
            )
        self.end = end
        # SentencePiece tokenizers (Llama 2, Mistral) put a blank before every text, so also before a completion.
        joined = str(tokenizer.decode(bare + bare, clean_up_tokenization_spaces=False))
        self._marks_starts = joined.strip() != "aa"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text by itself, without special tokens around it."""
        out = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return out["input_ids"]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as it goes on after other text: without a blank that marks the start of a text."""
        if not self._marks_starts:
            return self.encode(texts)
        out = self._behind(_ANCHORS[0], texts)
        merged = [i for i, ids in enumerate(out) if ids is None]
        again = self._behind(_ANCHORS[1], [texts[i] for i in merged])
        for i, ids in zip(merged, again, strict=True):
            out[i] = ids
        for text, ids in zip(texts, out, strict=True):
            if ids is None:
                raise DataError(
                    f"tokenizer {tokenizer_name(self.tokenizer)} cannot encode {text[:40]!r} after other text: it "
                    "merges with what stands before it; use a byte-level tokenizer"
                )
        return [ids for ids in out if ids is not None]

    def head(self, ids: Sequence[int]) -> list[int]:
        """What to put before a document's `ids`: the beginning, or nothing when they start with it already."""
        return [] if tuple(ids[: len(self.beginning)]) == self.beginning else list(self.beginning)

    def tail(self, ids: Sequence[int]) -> list[int]:
        """What to put after a document's `ids`: the end, or nothing when they end with it already."""
        return [] if tuple(ids[-len(self.end) :]) == self.end else list(self.end)

    def _behind(self, anchor: str, texts: Sequence[str]) -> list[list[int] | None]:
        if not texts:
            return []
        lead = self.encode([anchor])[0]
        whole = self.encode([anchor + text for text in texts])
        return [ids[len(lead) :] if ids[: len(lead)] == lead else None for ids in whole]
