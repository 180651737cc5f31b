"""Conversations to token ids and labels: the loss is on what the assistant says, as the chat template writes it.

Two ways to tell what the assistant says. A template with `{% generation %}` marks says so itself (`chat_marks.py`).
Otherwise the conversation is rendered turn by turn (`chat_turns.py`). Either way the text is cut where the assistant's
words begin and end, and the pieces are tokenised apart, as at inference; what a template leaves out is refused
(`chat_checks.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from packflex.data.chat_checks import WrittenWords
from packflex.data.chat_marks import MarkedTurns, Piece, is_marked
from packflex.data.chat_template import Conversation, Tools
from packflex.data.chat_turns import UnmarkedTurns
from packflex.data.errors import DataError
from packflex.data.labels import IGNORED
from packflex.data.tokenizer import tokenizer_name

if TYPE_CHECKING:
    from packflex.data.encoding import TextEncoder

Turns = Literal["all", "last"]


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    Args:
        encoder: text encoder of the tokenizer, which must have a chat template.
        turns: supervise "all" assistant turns, or the "last" one only (what follows it is left out).
        first: what to call the first conversation, where there is no template for it.

    Raises:
        DataError: a tokenizer without a chat template.
        ValueError: unknown `turns`.

    Example:
        >>> chat = ChatEncoder(TextEncoder(tokenizer))
        >>> ids, labels = chat.encode([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}])
        >>> tokenizer.decode([label for label in labels if label != -100])
        '2<|im_end|>'
    """

    def __init__(self, encoder: TextEncoder, turns: Turns = "all", first: str = "") -> None:
        if turns not in get_args(Turns):
            raise ValueError(f"turns must be 'all' or 'last'; got {turns!r}")
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.turns = turns
        if not self.tokenizer.chat_template:
            said = f"{first}: " if first else ""
            raise DataError(
                f"{said}tokenizer {tokenizer_name(self.tokenizer)} has no chat template, and conversations need one; "
                "give a Jinja file (chat_template=, --chat-template FILE), or an instruct model's tokenizer"
            )
        # some tokenizers do not name the end of a turn among their special tokens, and the template writes it
        added, template = self.tokenizer.added_tokens_decoder, str(self.tokenizer.chat_template)
        written = (token_id for token_id, token in added.items() if token.special and token.content in template)
        self._special = frozenset((*self.tokenizer.all_special_ids, *written))
        self._written = WrittenWords()
        self._marked = MarkedTurns()
        self._unmarked = UnmarkedTurns(self.tokenizer)

    def encode(
        self, messages: list[dict[str, Any]], tools: Tools = None, source: str = "conversation"
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels (-100 outside the assistant's turns) of one conversation.

        Args:
            messages: objects with a role and content (or tool calls), in order.
            tools: JSON schemas of the tools, as the template takes them.
            source: what to call the conversation in errors.

        Returns:
            Two lists of the same length; empty ones where the template writes nothing of messages that say nothing.

        Raises:
            DataError: a template that fails on these messages, that leaves some of their words out, or by which it
                cannot be told what the assistant says; text that is no valid Unicode.
        """
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        last_only = self.turns == "last"
        if last_only and assistant:
            assistant = assistant[-1:]
            messages = messages[: assistant[0] + 1]
        talk = self._written.brought_to_form(Conversation.of(self.tokenizer, messages, tools, source))
        marked = is_marked(talk.template)
        pieces = self._marked.pieces(talk, assistant, last_only) if marked else self._unmarked.pieces(talk, assistant)
        return self._encoded([piece for piece in pieces if piece[0]], source, trimmed=not marked)

    def _encoded(self, pieces: list[Piece], source: str, trimmed: bool) -> tuple[list[int], list[int]]:
        """Token ids and labels of the pieces of a text; `trimmed` leaves out the white space after turns' end marks."""
        texts = [text for text, _ in pieces]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{source}: the messages hold a lone surrogate ({error.object[error.start]!r}), which is no valid "
                "text; remove it or write the file again as UTF-8"
            ) from error
        encoded = (self.encoder.encode(texts[:1]) if texts else []) + (
            self.encoder.encode_continuations(texts[1:]) if texts[1:] else []
        )
        ids: list[int] = []
        labels: list[int] = []
        for (_, said), tokens in zip(pieces, encoded, strict=True):
            supervised = (self._said(tokens) if trimmed else len(tokens)) if said else 0
            ids += tokens
            labels += tokens[:supervised] + [IGNORED] * (len(tokens) - supervised)
        return ids, labels

    def _said(self, tokens: list[int]) -> int:
        """How many tokens of a turn are the assistant's: not the white space that templates put after its end mark."""
        last_mark = max((i for i, token in enumerate(tokens) if token in self._special), default=None)
        if last_mark is None or str(self.tokenizer.decode(tokens[last_mark + 1 :])).strip():
            return len(tokens)
        return last_mark + 1
