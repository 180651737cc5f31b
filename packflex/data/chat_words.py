"""What a message says: its words, thoughts and tool calls, and the same message with others.

A message is reworded to see what a chat template does with it: what does not change when the words do was not written
from them. One field is changed at a time, and none is added, for some templates refuse messages that have both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from packflex.data.chat_template import Conversation, Message

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # transformers takes them for one another
LEGACY_CALL = "function_call"  # what OpenAI called the one tool call of a message
NAMES, ARGUMENTS = "names of its tool calls", "arguments of its tool calls"
_PROBE = "a"
_THOUGHT_ENDS = ("</think>", "</thinking>", "</reasoning>", "[/THINK]", "<channel|>", "<|channel|>")
# What words may begin with that is no word: blank thoughts, and the mark that opens thoughts
_OPENING = re.compile(r"\s*(?:<(\w+)>\s*</\1>\s*)?(<[^<>\s/]+>|\[[A-Z]+\])?\s*")


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
    """A message whose parts are joined to a string, "" where it has no content; itself where there are other parts."""
    content = message.get("content", [])
    return {**message, "content": words(content)} if is_text_only(content) else message


def as_parts(message: Message) -> Message:
    """A message whose string is a list of one part of text, "" where it has no content."""
    content = message.get("content")
    if content is None:
        return {**message, "content": ""}
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def part_types(content: Any) -> tuple[str, ...]:
    """The types of the parts of content, each once; () where it is a string."""
    parts = content if isinstance(content, list) else ()
    return tuple(dict.fromkeys(str(part.get("type", "text")) if isinstance(part, dict) else "text" for part in parts))


def raw_types(content: Any, text: str) -> tuple[str, ...]:
    """The types of the parts that stand in `text` as objects, as a template writes them that takes strings only."""
    if not isinstance(content, list):
        return ()
    said = words(content)
    raw = [part for part in content if isinstance(part, dict) and is_raw(part, text) and not is_raw(part, said)]
    return part_types(raw or (content if is_raw(content, text) and not is_raw(content, said) else []))


def is_raw(value: Any, text: str) -> bool:
    """Whether an object or a list stands in `text` as Python or JSON."""
    return any(raw in text for raw in (str(value), json.dumps(value), json.dumps(value, ensure_ascii=False)))


def argument_kinds(message: Message) -> tuple[str, ...]:
    """What the arguments of a message's tool calls are, each kind once: types, or strings that hold an object."""
    found = [arguments for call in message.get("tool_calls") or () for arguments in _arguments(call)]
    kinds = ("object in a string" if _is_json(each) else type(each).__name__ for each in found)
    none = ("none",) if any(each in ({}, "{}", "", None) for each in found) else ()
    return (*dict.fromkeys(kinds), *none)


def with_objects(message: Message) -> Message:
    """A message whose tool calls have objects for arguments, as far as their strings are JSON of one."""
    return _with_arguments(message, _parsed)


def with_strings(message: Message) -> Message:
    """A message whose tool calls have JSON text for arguments."""
    return _with_arguments(
        message, lambda given: json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given
    )


def wrong_arguments(message: Message, text: str) -> str:
    """What is wrong with how the last call's arguments stand in `text`: JSON within JSON, objects as Python; or ""."""
    for given in _arguments(message["tool_calls"][-1]):
        if _is_json(given) and (json.dumps(given) in text or json.dumps(given, ensure_ascii=False) in text):
            return "a string within JSON"
        if isinstance(given, dict) and given and str(given) in text and str(given) != json.dumps(given):
            return "a Python object"
    return ""


def has_thoughts(message: Message) -> bool:
    """Whether a message has thoughts that are not blank."""
    return any(isinstance(message.get(key), str) and message[key].strip() for key in THOUGHTS)


def rewordings(message: Message) -> dict[str, Message]:
    """The message with other words, thoughts, or another name or arguments of its last call, by what was changed.

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
    if call := message.get(LEGACY_CALL):
        found[LEGACY_CALL] = {**message, LEGACY_CALL: _renamed(call) if isinstance(call, dict) else f"{call}_"}
    return found


def other_beginnings(message: Message) -> list[Message]:
    """The message with other words where its thoughts begin, in its content and in parts that are thoughts.

    Example:
        >>> other_beginnings({"role": "assistant", "content": "<think>2+2</think>4"})
        [{'role': 'assistant', 'content': '<think>a2+2</think>4'}]
    """
    content = message.get("content")
    if isinstance(content, str):
        return [{**message, "content": _begun(content)}] if content.strip() else []
    found: list[Message] = []
    parts = content if isinstance(content, list) else []
    first = next((i for i, part in enumerate(parts) if (_text_of(part) or "").strip()), None)
    for at, part in enumerate(parts):
        changed = {"text": _begun(part["text"])} if at == first and isinstance(part, dict) else {}
        if isinstance(part, dict):
            changed |= {k: part[k] + _PROBE for k in THOUGHTS if isinstance(part.get(k), str) and part[k].strip()}
        if changed or at == first:
            other = {**part, **changed} if isinstance(part, dict) else _begun(part)
            found.append({**message, "content": [*parts[:at], other, *parts[at + 1 :]]})
    return found


def opening(content: Any) -> tuple[str | None, str | None]:
    """What stands before a message's first word: the name of blank thoughts, and the mark that opens thoughts.

    Example:
        >>> opening("<think>\\n\\n</think>4"), opening("<think>2+2</think>4")
        (('think', None), (None, '<think>'))
    """
    found = _OPENING.match(words(content))
    return (found[1], found[2]) if found else (None, None)


def thought_ends(content: Any) -> tuple[str, ...]:
    """The marks in a message's words that end thoughts, at which templates cut them."""
    said = words(content)
    return tuple(end for end in _THOUGHT_ENDS if end in said)


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


def _begun(text: str) -> str:
    """A text with another beginning, after what opens its thoughts."""
    opening = _OPENING.match(text)
    cut = opening.end() if opening else 0
    return f"{text[:cut]}{_PROBE}{text[cut:]}"


def _arguments(call: Any) -> list[Any]:
    """The arguments of a tool call, in either of the forms that templates take; [] where it has none."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    return [inner["arguments"]] if isinstance(inner, dict) and "arguments" in inner else []


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    if not any(_arguments(call) for call in message.get("tool_calls") or ()):
        return message
    calls = []
    for call in message["tool_calls"]:
        for given in _arguments(call):
            if isinstance(call.get("function"), dict):
                call = {**call, "function": {**call["function"], "arguments": change(given)}}
            else:
                call = {**call, "arguments": change(given)}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _is_json(given: Any) -> bool:
    return isinstance(given, str) and given.lstrip().startswith("{")


def _parsed(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        found = json.loads(given or "{}")
    except json.JSONDecodeError:
        return given
    return found if isinstance(found, dict) else given


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
