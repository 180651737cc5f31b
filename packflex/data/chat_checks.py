"""`WrittenWords`: sees that the chat template writes what the messages hold; many leave some of it out without a word.

A template may skip whole roles (tool, system), words beside tool calls, calls in some turns, thoughts, or tools, and
write parts of text as Python objects or not at all. Each is seen by rewording a message: what a template writes changes
with it. Messages of a kind are looked at once, so that this costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from packflex.data.chat_template import OTHER_TEMPLATE, Conversation, Message
from packflex.data.chat_words import (
    ARGUMENTS,
    LEGACY_CALL,
    NAMES,
    THOUGHTS,
    argument_kinds,
    as_parts,
    as_string,
    has_thoughts,
    is_text_only,
    opening,
    other_beginnings,
    part_types,
    raw_types,
    rewordings,
    thought_ends,
    with_objects,
    with_strings,
    words,
    wrong_arguments,
)
from packflex.data.errors import DataError

BEGINNING = "the beginning of 'content'"
_Form = Callable[[Message], Message]


def _as_it_is(message: Message) -> Message:
    return message


# In what form a template takes the arguments of calls and the content of messages, the first that will do
_FORMS: tuple[tuple[_Form, _Form], ...] = tuple(
    product((_as_it_is, with_objects, with_strings), (_as_it_is, as_string, as_parts))
)


class WrittenWords:
    """Finds the form of messages that a template takes, and refuses those of which it leaves something out."""

    def __init__(self) -> None:
        self._forms: dict[Any, tuple[_Form, _Form]] = {}
        self._seen: set[Any] = set()

    def brought_to_form(self, talk: Conversation) -> Conversation:
        """The conversation, its content as strings or as parts of text where the template takes only those.

        Likewise, missing content is "" and arguments of tool calls are objects or JSON text.

        Raises:
            DataError: a template that leaves out words, thoughts, calls or tools, whatever the form of the content; it
                names the message, the field and the remedy.
        """
        shapes = frozenset((m["role"], _shape(m.get("content")), argument_kinds(m)) for m in talk.messages)
        key = shapes, bool(talk.tools)
        refused: DataError | None = None
        lost = ""
        tried: list[list[Message]] = []
        for form in (self._forms.get(key, _FORMS[0]), *_FORMS):
            arguments, content = form
            found = talk.with_messages([arguments(content(message)) for message in talk.messages])
            if found.messages in tried:
                continue
            tried.append(found.messages)
            unseen = {at: kind for at in range(len(found.messages)) if (kind := kind_of(found, at)) not in self._seen}
            try:
                whole = found.text() if unseen else None
            except DataError as error:
                refused = refused or error
                continue
            wrong = _wrong_content(found, unseen, whole or "") or _wrong_calls(found, unseen, whole or "")
            if not wrong:
                self._forms[key] = form
                self._require_the_rest(found, unseen, whole)
                return found
            lost = lost or wrong
        if lost:
            raise DataError(f"{talk.source}: {lost}")
        assert refused is not None
        for at, message in enumerate(talk.messages):
            if {"str", "object in a string"} & {*argument_kinds(with_objects(message))}:
                raise DataError(
                    f"{refused}; the 'arguments' of the 'tool_calls' in message {at} are a string that is no JSON "
                    "object: give an object, or the JSON text of one"
                )
        raise refused

    def _require_the_rest(self, talk: Conversation, unseen: dict[int, Any], whole: str | None) -> None:
        """See that thoughts, calls and tools are written, whatever the form of the content."""
        tools = ("tools", *talk.roles[:1], *talk.roles[-1:])
        new_tools = bool(talk.tools) and tools not in self._seen
        for at in unseen:
            for what, other in rewordings(talk.messages[at]).items():
                if what in ("content", NAMES, ARGUMENTS) or talk.text_or_none(talk.replaced(at, other)) != whole:
                    continue
                if what not in THOUGHTS or not _written_last(talk, at, other):
                    raise DataError(f"{talk.source}: {_lost(talk, at, what)}")
        if new_tools:
            without = Conversation.of(talk.tokenizer, talk.messages, None, talk.source)
            if without.text_or_none(talk.messages) == (talk.text() if whole is None else whole):
                raise DataError(
                    f"{talk.source}: {talk.template_name} does not write the 'tools' of this conversation, so they "
                    f"would be lost; {OTHER_TEMPLATE}, or leave 'tools' out of the records"
                )
            self._seen.add(tools)
        self._seen.update(unseen.values())


def kind_of(talk: Conversation, at: int) -> tuple[Any, ...]:
    """What a template may treat message `at` by: its role, what it holds, and the roles beside it and at the end."""
    message = talk.messages[at]
    calls = message.get("tool_calls") or []
    return (
        frozenset((key, type(value)) for key, value in message.items() if value),
        _shape(message.get("content")), bool(words(message.get("content")).strip()), has_thoughts(message),
        opening(message.get("content")), thought_ends(message.get("content")), part_types(message.get("content")),
        message["role"], min(len(calls), 2), argument_kinds(message), bool(talk.tools),
        *talk.roles[at - 1 : at], ":", *talk.roles[at + 1 : at + 2], ":", talk.roles[-1],
    )  # fmt: skip


def _shape(content: Any) -> tuple[str, int]:
    """Of what type content is, and whether it has several parts: some templates write the first one alone."""
    parts = min(len(content), 2) if isinstance(content, list) else 0
    return "text parts" if is_text_only(content) else type(content).__name__, parts


def _wrong_content(talk: Conversation, unseen: dict[int, Any], whole: str) -> str:
    """What is wrong with how a template writes content: left out, or as objects; "" where it is all there."""
    for at in unseen:
        message = talk.messages[at]
        other = rewordings(message).get("content")
        if other and talk.text_or_none(talk.replaced(at, other)) == whole:
            return _lost(talk, at, "content")
        if types := raw_types(message.get("content"), whole):
            return (
                f"{talk.template_name} writes the parts of message {at} ({message['role']}) of the type "
                f"{', '.join(map(repr, types))} as objects and not as text; give content as a string, or a template "
                "that takes such parts"
            )
        for other in other_beginnings(message):
            if talk.text_or_none(talk.replaced(at, other)) != whole:
                continue
            if message["role"] != "assistant" or not _written_last(talk, at, other):
                return _lost(talk, at, BEGINNING)
    return ""


def _wrong_calls(talk: Conversation, unseen: dict[int, Any], whole: str) -> str:
    """What is wrong with how a template writes tool calls: left out, or arguments as other text; "" if nothing."""
    for at in unseen:
        message = talk.messages[at]
        changes = rewordings(message)
        texts = {
            what: talk.text_or_none(talk.replaced(at, changes[what])) for what in (NAMES, ARGUMENTS) if what in changes
        }
        for what, text in texts.items():
            if text == whole:
                return _lost(talk, at, what)
        # in the other arguments' text: results of tools may quote these
        if (text := texts.get(ARGUMENTS)) and (wrong := wrong_arguments(changes[ARGUMENTS], text)):
            return (
                f"{talk.template_name} writes the 'arguments' of the 'tool_calls' in message {at} ({message['role']}) "
                f"as {wrong}; give an object, or the JSON text of one"
            )
    return ""


def _written_last(talk: Conversation, at: int, other: Message) -> bool:
    """Whether thoughts that are not written in a turn that others follow, by design, are where it is the last one."""
    texts = [talk.text_or_none([*talk.messages[:at], message]) for message in (talk.messages[at], other)]
    return texts[0] is None or texts[0] != texts[1]


def _is_first_written_alone(talk: Conversation, at: int) -> bool:
    """Whether the first of a message's calls is written and the others make no difference."""
    one = {**talk.messages[at], "tool_calls": talk.messages[at]["tool_calls"][:1]}
    whole = talk.text_or_none(talk.messages)
    renamed = rewordings(one).get(NAMES, one)
    return talk.text_or_none(talk.replaced(at, one)) == whole != talk.text_or_none(talk.replaced(at, renamed))


def _lost(talk: Conversation, at: int, what: str) -> str:
    role = talk.roles[at]
    if what == LEGACY_CALL:
        return (
            f"{talk.template_name} does not write {what!r} of message {at} ({role}), so the call would be lost; rename "
            "it to 'tool_calls', a list of objects with a 'function' that has its 'name' and 'arguments'"
        )
    if what == BEGINNING:
        return (
            f"{talk.template_name} does not write the beginning of 'content' of message {at} ({role}), such as "
            f"thoughts in it, so its words would be lost; {OTHER_TEMPLATE}, or leave thoughts out of such messages"
        )
    if what in (NAMES, ARGUMENTS):
        calls = talk.messages[at]["tool_calls"]
        if len(calls) > 1 and _is_first_written_alone(talk, at):
            return (
                f"{talk.template_name} writes only the first of the {len(calls)} 'tool_calls' in message {at} "
                f"({role}), so the others would be lost; {OTHER_TEMPLATE}, or give each call a message of its own"
            )
        return (
            f"the {role} calls tools in message {at}, and {talk.template_name} does not write the {what.split()[0]} of "
            f"these 'tool_calls', so they would be lost; {OTHER_TEMPLATE}, or leave such conversations out"
        )
    beside = " that also calls tools" if talk.messages[at].get("tool_calls") else ""
    leave = f"{what!r} out of such messages" if what in THOUGHTS else "such messages out"
    return (
        f"{talk.template_name} does not write {what!r} of message {at} ({role}){beside}, so its words would be lost; "
        f"{OTHER_TEMPLATE}, or leave {leave}"
    )
