"""What a message says: its words, thoughts and tool calls, and the same message with others.

A message is reworded to see what a chat template does with it: what does not change when the words do was not written
from them. One field is changed at a time, and none is added, for some templates refuse messages that have both.
"""

from __future__ import annotations

import json
from typing import Any

from packflex.data.chat_template import Conversation, Message

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # transformers takes them for one another
NAMES, ARGUMENTS = "names of its tool calls", "arguments of its tool calls"
_PROBE = "a"


def is_text_only(content: Any) -> bool:
    """Whether content is a list of nothing but pieces of text."""
    return isinstance(content, list) and all(
        isinstance(part, str) or (_text_of(part) is not None and part.get("type", "text") == "text") for part in content
    )


def words(content: Any) -> str:
    """The text in a message's content, as a string or in parts; "" where there is none."""
    if isinstance(content, str):
        return content
    return "".join(_text_of(part) or "" for part in content) if isinstance(content, list) else ""


def as_string(message: Message) -> Message:
    """A message whose parts are joined to a string; itself where there are none, or others than text."""
    content = message.get("content")
    return {**message, "content": words(content)} if is_text_only(content) else message


def as_parts(message: Message) -> Message:
    """A message whose string is a list of one part of text."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def is_written_raw(content: Any, text: str) -> bool:
    """Whether parts of text stand in `text` as objects, as a template writes them that takes strings only."""
    return is_text_only(content) and any(
        raw in text
        for whole in (content, *(part for part in content if isinstance(part, dict)))
        for raw in (str(whole), json.dumps(whole), json.dumps(whole, ensure_ascii=False))
    )


def has_thoughts(message: Message) -> bool:
    """Whether a message has thoughts that are not blank."""
    return any(isinstance(message.get(key), str) and message[key].strip() for key in THOUGHTS)


def rewordings(message: Message) -> dict[str, Message]:
    """The message with other words, thoughts, or names or arguments of its last tool call, by what was changed.

    What is blank is not reworded.

    Example:
        >>> rewordings({"role": "user", "content": "two"})
        {'content': {'role': 'user', 'content': 'twoa'}}
    """
    found: dict[str, Message] = {}
    if words(message.get("content")).strip():
        found["content"] = {**message, "content": _with_more_words(message["content"])}
    if has_thoughts(message):
        more = {key: message[key] + _PROBE for key in THOUGHTS if isinstance(message.get(key), str)}
        found[next(key for key in THOUGHTS if key in more)] = {**message, **more}
    if calls := message.get("tool_calls"):
        for what, changed in ((NAMES, _renamed(calls[-1])), (ARGUMENTS, _rewritten(calls[-1]))):
            if changed != calls[-1]:
                found[what] = {**message, "tool_calls": [*calls[:-1], changed]}
    return found


def with_more_words(message: Message) -> Message:
    """A message with other words, and with some where it has none."""
    return {**message, "content": _with_more_words(message.get("content"))}


def says_something(talk: Conversation, turn: int) -> bool:
    """Whether an assistant's turn has words, thoughts or calls: of an empty one only the end would be learned."""
    message = talk.messages[turn]
    content = message.get("content")
    if words(content).strip() or message.get("tool_calls"):
        return True
    if isinstance(content, list) and not is_text_only(content):
        return True
    if not any(value for key, value in message.items() if key not in ("role", "content", "tool_calls")):
        return False
    # Templates leave thoughts out that are followed by other turns
    silent = {"role": message["role"], "content": message.get("content", "")}
    return talk.text_or_none(talk.replaced(turn, silent)) != talk.text()


def shared_length(one: Any, other: Any) -> int:
    """How many elements at the beginning of two sequences are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _text_of(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else None


def _with_more_words(content: Any) -> Any:
    if not isinstance(content, list):
        return f"{content or ''}{_PROBE}"
    last = max((i for i, part in enumerate(content) if _text_of(part) is not None), default=None)
    if last is None:
        return [*content, {"type": "text", "text": _PROBE}]
    more = f"{_text_of(content[last])}{_PROBE}"
    return [*content[:last], {**content[last], "text": more} if isinstance(content[last], dict) else more,
            *content[last + 1 :]]  # fmt: skip


def _renamed(call: Any) -> Any:
    """A tool call to another function, in either of the forms that templates take."""
    if not isinstance(call, dict):
        return call
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": {**inner, "name": f"{inner.get('name')}_"}}
    return {**call, "name": f"{call.get('name')}_"}


def _rewritten(call: Any) -> Any:
    """A tool call with other arguments; itself where it has none."""
    if not isinstance(call, dict):
        return call
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _rewritten(inner)}
    given = call.get("arguments")
    if isinstance(given, dict) and given:
        return {**call, "arguments": {f"{key}_": value for key, value in given.items()}}
    return {**call, "arguments": f"{given}_"} if isinstance(given, str) and given else call
