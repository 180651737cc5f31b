"""Templates without marks: the conversation is rendered turn by turn, and what a turn adds is the assistant's.

Each rendering must begin with the one before it, which is checked. The generation prompt (`<|im_start|>assistant\\n`)
is never supervised: at inference it is given. Where a template writes none, what it puts before any of the assistant's
words is taken for it, unless that is white space. Where it writes the end of a turn only when something follows (as the
first templates of Qwen), that is supervised too, and put after the last turn; a template that writes none is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packflex.data.chat_marks import Piece
from packflex.data.chat_template import Conversation, Message
from packflex.data.chat_words import as_parts, says_something, shared_length
from packflex.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "use a template with {% generation %} marks"
_PROBES = ("0", "a")  # words of an assistant that begin with different characters


class UnmarkedTurns:
    """Cuts conversations at the turns of the assistant.

    Args:
        tokenizer: its special tokens are not cut, and end turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokens = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        self._bos = tokenizer.bos_token
        self._openings: dict[Any, tuple[str, str]] = {}
        self._ends: dict[Any, str] = {}

    def pieces(self, talk: Conversation, assistant: list[int]) -> list[Piece]:
        """The conversation's text in pieces: what each of the assistant's turns adds, and what lies between.

        Args:
            talk: the conversation.
            assistant: the assistant's messages that are to be supervised.

        Raises:
            DataError: a template that writes a turn otherwise when others follow, that does not begin it with its
                generation prompt, or that writes no end of it; a conversation that starts with the assistant.
        """
        whole = talk.text()
        pieces: list[Piece] = []
        cursor = 0
        for turn in assistant:
            if turn == 0:
                raise DataError(
                    f"{talk.source}: the conversation starts with the assistant, and this chat template has no "
                    "{% generation %} marks to tell its words; put a user or system message first, or mark the template"
                )
            before = talk.text(talk.messages[:turn], prompt=True)
            after = whole if turn + 1 == len(talk.messages) else talk.text(talk.messages[: turn + 1])
            if not after.startswith(before):
                raise DataError(
                    f"{talk.source}: {talk.template_name} does not begin message {turn} with what it writes of the "
                    f"messages before and its generation prompt, so the assistant's words cannot be told apart; {_MARK}"
                )
            if not whole.startswith(after):
                raise _rewritten(talk, turn)
            before += self._header(talk, turn, before, after)
            end = self._missing_end(talk, turn)
            if len(whole) == len(after):
                whole += end
            if not whole.startswith(after + end):
                raise _rewritten(talk, turn)
            pieces += [
                (whole[cursor : len(before)], False),
                (whole[len(before) : len(after + end)], says_something(talk, turn)),
            ]
            cursor = len(after + end)
        return [*pieces, (whole[cursor:], False)]

    def _header(self, talk: Conversation, turn: int, before: str, after: str) -> str:
        """What a template that writes no generation prompt here puts before the assistant's words."""
        place = _place(talk, turn)
        prompt, header = self._openings.get(place, ("", ""))
        if place not in self._openings or not before.endswith(prompt):
            prompt, header = self._openings[place] = self._opening(talk, turn, before)
        if prompt or not header.strip():
            return ""
        length = shared_length(header, after[len(before) :])
        if length < len(header):
            length = self._between_words(after, len(before) + length) - len(before)
        return header[:length] if header[:length].strip() else ""

    def _opening(self, talk: Conversation, turn: int, before: str) -> tuple[str, str]:
        """The generation prompt at the end of `before`; where it is none, what the turn begins with whatever is said.

        What a user's message may follow as well is no prompt: some templates only end the turn before it.
        """
        earlier = talk.messages[:turn]
        prompt = before.removeprefix(talk.text(earlier))
        asked = talk.text_or_none([*earlier, _message("user", "0", talk)])
        if prompt and not (asked is not None and asked.startswith(before)):
            return prompt, ""
        one, other = (talk.text([*earlier, _message("assistant", words, talk)]) for words in _PROBES)
        return "", one[len(before) : shared_length(one, other)]

    def _between_words(self, text: str, cut: int) -> int:
        """The last place up to `cut` that is inside no special token and no word."""
        for token in self._tokens:
            start = text.rfind(token, max(0, cut - len(token) + 1), cut + len(token) - 1)
            if 0 <= start < cut < start + len(token):
                cut = start
        while 0 < cut < len(text) and text[cut - 1].isalnum() and text[cut].isalnum():
            cut -= 1
        return cut

    def _missing_end(self, talk: Conversation, turn: int) -> str:
        """What ends a turn, where the template writes it only if something follows; "" where it always does.

        Raises:
            DataError: a template that ends turns with nothing, or with what depends on the next one.
        """
        kind = _place(talk, turn)
        if kind in self._ends:
            return self._ends[kind]
        earlier = talk.messages[:turn]
        said, longer = ([*earlier, _message("assistant", words, talk)] for words in ("a", "aa"))
        text, other = talk.text_or_none(said), talk.text_or_none(longer)
        end = ""
        if text is not None and other is not None and other != text and other.startswith(text):
            asked, *others = (
                each[len(text) :] if each and each.startswith(text) else ""
                for each in (
                    talk.text_or_none([*said, _message("user", "0", talk)]),
                    talk.text_or_none([*said, _message("assistant", "0", talk)]),
                    talk.text_or_none(said, prompt=True),
                )
            )
            # Without a user's message, what the others share may be the assistant's own header
            end = self._end_in([asked, *filter(None, others)]) if asked else ""
            if not end or self._begins_messages(talk, end):
                raise DataError(
                    f"{talk.source}: {talk.template_name} writes no end of the assistant's turns, so a model would not "
                    f"learn to stop; {_MARK}, around the words and what ends them"
                )
        self._ends[kind] = end
        return end

    def _begins_messages(self, talk: Conversation, end: str) -> bool:
        """Whether a text begins the first message as well, so that it is a header and ends none."""
        first = talk.text_or_none([_message("user", "0", talk)]) or ""
        start = first.removeprefix(str(self._bos or "")).lstrip()
        return bool(end.strip()) and start.startswith(end.strip())

    def _end_in(self, nexts: list[str]) -> str:
        """The token, white space or line that begins every text that may follow a turn; "" if there is none."""
        if len(nexts) < 2:
            return ""
        same = nexts[0][: min(shared_length(nexts[0], each) for each in nexts[1:])]
        blank = same[: len(same) - len(same.lstrip())]
        token = next((token for token in self._tokens if same[len(blank) :].startswith(token)), "")
        return blank + token or same[: same.find("\n") + 1]


def _place(talk: Conversation, turn: int) -> tuple[Any, ...]:
    """What templates look at to write the beginning and end of a turn: what stands before it."""
    return (*talk.roles[max(0, turn - 2) : turn], turn < 3, bool(talk.tools))


def _message(role: str, words: str, talk: Conversation) -> Message:
    """A message in the form of the conversation's."""
    message = {"role": role, "content": words}
    return as_parts(message) if any(isinstance(m.get("content"), list) for m in talk.messages) else message


def _rewritten(talk: Conversation, turn: int) -> DataError:
    return DataError(
        f"{talk.source}: {talk.template_name} writes message {turn} differently when others follow, so the assistant's "
        f"words cannot be told apart; supervise the last turn only (turns='last', --turns last), or {_MARK}"
    )
