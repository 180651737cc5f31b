"""Checks one raw record and brings it to the common form: text, prompt and completion, or messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packflex.data.errors import DataError

Format = Literal["auto", "text", "prompt", "messages"]


@dataclass(frozen=True)
class Record:
    """A raw record and where it came from ("train.jsonl:7", "train.parquet:row 6", "stdlib:heapq:heapify")."""

    source: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Fields:
    """What the fields are called in a source."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    tools: str = "tools"
    id: str = "id"

    def names(self) -> tuple[str, ...]:
        """The names of what a document is made of, in the order of their definition."""
        return (self.text, self.prompt, self.completion, self.messages, self.tools)


def detect_format(record: Record, fields: Fields) -> Literal["text", "prompt", "messages"]:
    """Form of a record by its fields: messages before prompt and completion before text.

    Raises:
        DataError: a record with none of them.
    """
    present = record.values.keys()
    if fields.messages in present:
        return "messages"
    if fields.prompt in present and fields.completion in present:
        return "prompt"
    if fields.text in present:
        return "text"
    raise DataError(
        f"{record.source}: expected {fields.messages!r}, or {fields.prompt!r} and {fields.completion!r}, or "
        f"{fields.text!r}; the fields here are {_names(present)}: name yours with messages_field, prompt_field and "
        "completion_field, or text_field (--messages-field, ... on the command line)"
    )


def normalise(record: Record, format: str, fields: Fields) -> dict[str, str]:
    """The common columns of a record (without `source`): strings only, messages and tools as JSON text.

    Example:
        >>> normalise(Record("a.jsonl:1", {"q": "1+1", "a": "2"}), "prompt", Fields(prompt="q", completion="a"))
        {'prompt': '1+1', 'completion': '2'}

    Raises:
        DataError: a missing field, a wrong type, or messages that are no conversation.
    """
    if format == "text":
        return {"text": _string(record, fields.text, "text_field")}
    if format == "prompt":
        return {
            "prompt": _string(record, fields.prompt, "prompt_field"),
            "completion": _string(record, fields.completion, "completion_field"),
        }
    messages = _json_list(record, fields.messages, "messages_field")
    check_messages(messages, record.source, fields.messages)
    tools = [] if record.values.get(fields.tools) is None else _json_list(record, fields.tools, "tools_field")
    return {"messages": json.dumps(messages), "tools": json.dumps(tools)}


def check_messages(messages: Any, source: str, field: str = "messages") -> None:
    """Check that `messages` is a conversation: a list of objects with a role and content.

    The content may be missing from an assistant's message that calls tools. Parts of content are strings or objects,
    and tool calls are objects.

    Raises:
        DataError: naming the record and the message that is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{source}: {field!r} must be a list of at least one message; got {_shown(messages)}; fix or remove it"
        )
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(
                f"{source}: message {at} of {field!r} must be an object with 'role' and 'content'; "
                f"got {_shown(message)}"
            )
        if not isinstance(message.get("role"), str):
            hint = (
                "rename 'from' to 'role' (human is user, gpt is assistant) and 'value' to 'content'"
                if "from" in message
                else "give each message a role: system, user, assistant or tool"
            )
            raise DataError(f"{source}: message {at} of {field!r} has no 'role' ({_names(message)}); {hint}")
        content = message.get("content")
        calls_tools = message["role"] == "assistant" and bool(message.get("tool_calls"))
        if not isinstance(content, (str, list)) and not (content is None and calls_tools):
            remedy = (
                "rename 'function_call' to 'tool_calls', a list of objects with a 'function'"
                if message.get("function_call")
                else "only an assistant's message with 'tool_calls' may have none"
            )
            raise DataError(
                f"{source}: 'content' of message {at} ({message['role']}) must be a string or a list of parts; "
                f"got {_shown(content)}; {remedy}"
            )
        for part in content if isinstance(content, list) else ():
            if not _is_part(part):
                raise DataError(
                    f"{source}: a part of the content of message {at} ({message['role']}) is {_shown(part)}; parts are "
                    "strings, or objects with a 'type', and those of the type 'text' have a string 'text'"
                )
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise DataError(
                f"{source}: 'tool_calls' of message {at} ({message['role']}) must be a list of objects; got "
                f"{_shown(calls)}; give each call a 'function' with 'name' and 'arguments'"
            )


def _is_part(part: Any) -> bool:
    if isinstance(part, dict) and part.get("type") == "text":
        return isinstance(part.get("text"), str)
    return isinstance(part, (str, dict))


def without_nulls(value: Any) -> Any:
    """Nested objects without null members: Arrow gives every object the members of all others, as nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [without_nulls(member) for member in value]
    return value


def _string(record: Record, field: str, option: str) -> str:
    value = _present(record, field, option)
    if not isinstance(value, str):
        raise DataError(
            f"{record.source}: field {field!r} must be a string; got {_shown(value)}; "
            f"fix the record or choose another field with {option}"
        )
    return value


def _json_list(record: Record, field: str, option: str) -> list[Any]:
    value = _present(record, field, option)
    if isinstance(value, str):  # the usual way to keep conversations in Parquet
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{record.source}: field {field!r} is a string but not JSON ({error.msg} at character {error.pos}); "
                "it must be a list, or JSON text of one"
            ) from error
    if not isinstance(value, list):
        raise DataError(
            f"{record.source}: field {field!r} must be a list; got {_shown(value)}; "
            f"fix the record or choose another field with {option}"
        )
    return value


def _present(record: Record, field: str, option: str) -> Any:
    if field not in record.values:
        flag = option.replace("_", "-")
        raise DataError(
            f"{record.source}: field {field!r} is missing (fields here: {_names(record.values)}); "
            f"add it, or name another with {option} (--{flag} on the command line)"
        )
    return record.values[field]


def _names(keys: Any) -> str:
    shown = [repr(key) for key in keys]
    text = ", ".join(shown[:12]) or "none"
    return text if len(shown) <= 12 else f"{text}, ... {len(shown) - 12} more"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
