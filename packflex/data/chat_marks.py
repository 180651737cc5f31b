"""Templates with `{% generation %}` marks: what they mark, cut at the very characters, is what the assistant says.

transformers' own token mask is not used: it asks the tokenizer for the tokens of characters, and loses characters of
several tokens, what normalisers compose, and blanks that are trimmed off tokens. White space that is marked after the
end of a turn is learned: the template says so.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from packflex.data.chat_checks import kind_of
from packflex.data.chat_template import Conversation, Span
from packflex.data.chat_words import THOUGHTS, rewordings, says_something, shared_length, with_more_words
from packflex.data.errors import DataError

logger = logging.getLogger(__name__)

Piece = tuple[str, bool]  # text, and whether it is supervised


class MarkedTurns:
    """Cuts conversations at the marks of their template."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._has_looked_at_users = False

    def pieces(self, talk: Conversation, assistant: list[int], last_only: bool) -> list[Piece]:
        """The conversation's text in pieces, one for each mark and one for what lies between two.

        Args:
            talk: the conversation.
            assistant: the assistant's messages that are to be supervised.
            last_only: whether the assistant has others before, whose marks are left out.

        Raises:
            DataError: marks that miss the words or calls of one of these messages, that are shared with another, or
                that stand where their places are not known.
        """
        if place := _marks(talk.template)[1]:
            raise DataError(
                f"{talk.source}: {talk.template_name} has {{% generation %}} marks inside {place}, where it is not "
                "known which characters they mark; put them where the messages are looped over"
            )
        text, spans = talk.marked_text()
        kept = set(range(len(spans)))
        if last_only:
            kept = set(_spans_of(talk, assistant[-1], text, spans)) if assistant else set()
        if not self._has_looked_at_users and "user" in talk.roles:
            self._has_looked_at_users = True
            _warn_of_users_words(talk, text, spans)
        for turn in assistant:
            if says_something(talk, turn):
                self._require_marks(talk, turn, text, spans)
            else:
                kept -= set(_spans_of(talk, turn, text, spans))
        pieces: list[Piece] = []
        cursor = 0
        for number, (start, stop) in enumerate(spans):
            pieces += [(text[cursor:start], False), (text[start:stop], number in kept)]
            cursor = stop
        return [*pieces, (text[cursor:], False)]

    def _require_marks(self, talk: Conversation, turn: int, text: str, spans: list[Span]) -> None:
        """See that what a turn says is marked. Its thoughts may be left out, beside words or calls."""
        kind = kind_of(talk, turn)
        if kind in self._seen:
            return
        marked = _cut(text, spans)
        changes = rewordings(talk.messages[turn])
        for what, other in changes.items():
            if what in THOUGHTS and len(changes) > 1:
                continue
            try:
                now = _cut(*talk.marked_text(talk.replaced(turn, other)))
            except DataError:  # a template that refuses other words looks at them
                continue
            if now == marked:
                raise DataError(
                    f"{talk.source}: {talk.template_name} does not mark the {what} of message {turn} with "
                    "{% generation %}, so they would not be learned; mark them in the template, supervise the last "
                    "turn only if that is the one it marks (turns='last', --turns last), or leave such conversations "
                    "out"
                )
        self._seen.add(kind)


def _warn_of_users_words(talk: Conversation, text: str, spans: list[Span]) -> None:
    """Say that what a user says changes what is marked: a template may be meant so, and most are not."""
    turn = max(i for i, role in enumerate(talk.roles) if role == "user")
    other = talk.replaced(turn, with_more_words(talk.messages[turn]))
    try:
        is_learned = _cut(*talk.marked_text(other)) != _cut(text, spans)
    except DataError:  # a template that refuses other words
        return
    if is_learned:
        logger.warning(
            "%s: %s marks words of message %d (user) with {%% generation %%}, so they are learned as the assistant's "
            "are; mark the assistant's alone in the template, unless that is meant",
            talk.source, talk.template_name, turn,
        )  # fmt: skip


def is_marked(template: str) -> bool:
    """Whether a template has a `{% generation %}` block, and not the words in a comment or a string."""
    return _marks(template)[0]


def _spans_of(talk: Conversation, turn: int, text: str, spans: list[Span]) -> range:
    """Which of the marked spans are a turn's: those that change with its words, and those around them.

    Raises:
        DataError: a span that it shares with another turn.
    """
    assistant = [i for i, role in enumerate(talk.roles) if role == "assistant"]
    earlier = max((i for i in assistant if i < turn), default=None)
    later = min((i for i in assistant if i > turn), default=None)
    mine = _changed(talk, turn, text, spans)
    if mine is None:
        return range(0)
    first, last = 0, len(spans)
    for other in (earlier, later):
        theirs = None if other is None else _changed(talk, other, text, spans)
        if other is None or theirs is None:
            continue
        if set(theirs) & set(mine):
            raise DataError(
                f"{talk.source}: {talk.template_name} marks message {turn} together with message {other}, so what "
                "the assistant says in one cannot be learned without the other; mark each message in the template, or "
                "leave such conversations out"
            )
        if other == earlier:
            first = _first_of_later(talk, other, turn, text, spans, range(theirs.stop, mine.start))
        else:
            last = _first_of_later(talk, turn, other, text, spans, range(mine.stop, theirs.start))
    return range(first, last)


def _changed(talk: Conversation, turn: int, text: str, spans: list[Span]) -> range | None:
    """The spans that change when a turn says something else; None where it is not marked."""
    message = talk.messages[turn]
    words = _cut(text, spans)
    found: list[range] = []
    refused: DataError | None = None
    changes = [*rewordings(message).values()]
    for at, other in enumerate([*changes, with_more_words(message)]):
        if at == len(changes) and found:  # words are added where thoughts alone change nothing, in an earlier turn
            break
        try:
            now = _cut(*talk.marked_text(talk.replaced(turn, other)))
        except DataError as error:
            refused = refused or error
            continue
        before = shared_length(words, now)
        if before < max(len(words), len(now)):
            found.append(
                range(before, max(before, len(words) - shared_length(words[before:][::-1], now[before:][::-1])))
            )
    if refused and not found:
        raise DataError(
            f"{talk.source}: cannot tell which {{% generation %}} marks are those of message {turn}: {refused}"
        ) from refused
    if not found:
        return None
    return range(min(each.start for each in found), max(each.stop for each in found))


def _first_of_later(talk: Conversation, earlier: int, later: int, text: str, spans: list[Span], between: range) -> int:
    """The first of the spans between two turns' words that is the later turn's.

    A message between them parts the spans. Otherwise the earlier turn has those that go on where its words end.
    """
    if not between:
        return between.start
    if later - earlier > 1:
        other = with_more_words(talk.messages[earlier + 1])
        edge = shared_length(text, talk.text_or_none(talk.replaced(earlier + 1, other)) or "")
        return next((i for i in between if spans[i][0] >= edge), between.stop)
    return next((i for i in between if spans[i][0] != spans[i - 1][1]), between.stop)


def _cut(text: str, spans: list[Span]) -> list[str]:
    return [text[start:stop] for start, stop in spans]


@lru_cache(maxsize=8)
def _marks(template: str) -> tuple[bool, str]:
    """Whether a template has marks, and what block has one inside of which the text before it is not known."""
    import jinja2
    from jinja2 import ext, nodes, parser

    class Marks(ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    try:
        tree = jinja2.Environment(extensions=[Marks, "jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError:  # said when it is rendered
        return False, ""
    blocks = {
        nodes.Macro: "a macro", nodes.CallBlock: "a call block", nodes.FilterBlock: "a filter block",
        nodes.AssignBlock: "a set block", nodes.Scope: "other marks", nodes.For: "a recursive loop",
    }  # fmt: skip
    for block in tree.find_all(tuple(blocks)):
        if block.find(nodes.Scope) and getattr(block, "recursive", True):
            return True, f"{blocks[type(block)]} (line {block.lineno})"
    return tree.find(nodes.Scope) is not None, ""
