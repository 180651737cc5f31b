"""Conversations to token ids and labels: the loss is on what the assistant says, as the chat template writes it.

Two ways to tell which tokens the assistant says. A template with `{% generation %}` marks says so itself. Otherwise the
conversation is rendered turn by turn: what a turn adds after the generation prompt is the assistant's, provided that
each rendering begins with the one before it, which is checked.

The generation prompt (`<|im_start|>assistant\\n`) is never supervised: at inference it is given. Of a template that
writes none, what it puts before any of the assistant's words is taken for it, unless that is white space.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from packflex.data.errors import DataError, one_line
from packflex.data.labels import IGNORED
from packflex.data.tokenizer import tokenizer_name

if TYPE_CHECKING:
    from packflex.data.encoding import TextEncoder

Turns = Literal["all", "last"]
# JSON schemas; Any and not dict, because a list of dicts is no list of "dict or callable" to a type checker
Tools = list[Any] | None

_PROBES = ("0", "a")  # words of an assistant that begin with different characters


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    Args:
        encoder: text encoder of the tokenizer, which must have a chat template.
        turns: supervise "all" assistant turns, or the "last" one only (what follows it is left out).

    Raises:
        DataError: a tokenizer without a chat template.
        ValueError: unknown `turns`.

    Example:
        >>> chat = ChatEncoder(TextEncoder(tokenizer))
        >>> ids, labels = chat.encode([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}])
        >>> tokenizer.decode([label for label in labels if label != -100])
        '2<|im_end|>'
    """

    def __init__(self, encoder: TextEncoder, turns: Turns = "all") -> None:
        if turns not in get_args(Turns):
            raise ValueError(f"turns must be 'all' or 'last'; got {turns!r}")
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.turns = turns
        if not self.tokenizer.chat_template:
            raise DataError(
                f"tokenizer {tokenizer_name(self.tokenizer)} has no chat template, and conversations need one; give a "
                "Jinja file (chat_template=, --chat-template FILE), or an instruct model's tokenizer"
            )
        self._special = frozenset(self.tokenizer.all_special_ids)
        self._written_calls: set[str] = set()  # kinds of turns whose tool calls the template was seen to write

    def encode(
        self, messages: list[dict[str, Any]], tools: Tools = None, source: str = "conversation"
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels (-100 outside the assistant's turns) of one conversation.

        Args:
            messages: objects with a role and content (or tool calls), in order.
            tools: JSON schemas of the tools, as the template takes them.
            source: what to call the conversation in errors.

        Raises:
            DataError: a template that fails on these messages, or that rewrites earlier turns so that the turns of
                the assistant cannot be told apart.
        """
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.turns == "last" and assistant:
            assistant = assistant[-1:]
            messages = messages[: assistant[0] + 1]
        self._require_written_calls(messages, tools, source)
        template = self.tokenizer.get_chat_template(tools=tools or None)
        if _is_marked(template) and self.tokenizer.is_fast:
            return self._encode_marked(messages, assistant, tools, source)
        return self._encode_turn_by_turn(messages, assistant, tools, source)

    def _encode_marked(
        self, messages: list[dict[str, Any]], assistant: list[int], tools: Tools, source: str
    ) -> tuple[list[int], list[int]]:
        ids, runs = self._marked(messages, tools, source)
        words = [ids[run.start : run.stop] for run in runs]
        kept = range(len(runs))
        if self.turns == "last" and assistant:
            kept = self._runs_of(assistant[-1], messages, words, tools, source)
        silent: set[int] = set()
        for turn in assistant:
            if not self._says_something(messages, turn, tools, source):
                silent |= set(self._silent_runs(turn, messages, words, tools, source))
        labels = [IGNORED] * len(ids)
        for number in set(kept) - silent:
            run = runs[number]
            labels[run.start : run.stop] = ids[run.start : run.stop]
        return ids, labels

    def _marked(self, messages: list[dict[str, Any]], tools: Tools, source: str) -> tuple[list[int], list[range]]:
        """Token ids, and the places of each marked run of them."""
        out = self._apply(messages, tools, source, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mask = list(out["assistant_masks"])
        edges = [i for i, (one, before) in enumerate(zip([*mask, 0], [0, *mask], strict=True)) if one != before]
        return list(out["input_ids"]), [range(*pair) for pair in zip(edges[::2], edges[1::2], strict=True)]

    def _runs_of(
        self, turn: int, messages: list[dict[str, Any]], words: list[list[int]], tools: Tools, source: str
    ) -> range:
        """Which of the marked runs, whose tokens are `words`, are a turn's: those that change when its words do."""
        other = [*messages[:turn], _reworded(messages[turn]), *messages[turn + 1 :]]
        ids, runs = self._marked(other, tools, source)
        found = [ids[run.start : run.stop] for run in runs]
        before = _common(words, found)
        after = _common(words[before:][::-1], found[before:][::-1])
        return range(before, len(words) - after)

    def _silent_runs(
        self, turn: int, messages: list[dict[str, Any]], words: list[list[int]], tools: Tools, source: str
    ) -> range:
        """`_runs_of` a turn that says nothing: they hold end marks and no word.

        Raises:
            DataError: a run that it shares with another turn.
        """
        runs = self._runs_of(turn, messages, words, tools, source)
        if any(str(self.tokenizer.decode(words[i], skip_special_tokens=True)).strip() for i in runs):
            raise DataError(
                f"{source}: the assistant says nothing in message {turn}, and the chat template of "
                f"{tokenizer_name(self.tokenizer)} marks it together with other words; leave the message out"
            )
        return runs

    def _encode_turn_by_turn(
        self, messages: list[dict[str, Any]], assistant: list[int], tools: Tools, source: str
    ) -> tuple[list[int], list[int]]:
        whole = self._apply(messages, tools, source, tokenize=False)
        has_prompt = "add_generation_prompt" in self.tokenizer.get_chat_template(tools=tools or None)
        pieces: list[tuple[str, bool]] = []
        cursor = 0
        for turn in assistant:
            if turn == 0:
                raise DataError(
                    f"{source}: the conversation starts with the assistant, and this chat template has no "
                    "{% generation %} marks to tell its words; put a user or system message first, or mark the template"
                )
            before = self._apply(messages[:turn], tools, source, tokenize=False, add_generation_prompt=True)
            after = self._apply(messages[: turn + 1], tools, source, tokenize=False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"{source}: the chat template of {tokenizer_name(self.tokenizer)} writes message {turn} "
                    "differently when others follow, so the assistant's words cannot be told apart; supervise the last "
                    "turn only (turns='last', --turns last), or use a template with {% generation %} marks"
                )
            if not has_prompt:
                before += self._header(messages[:turn], before, after, tools, source)
            said = self._says_something(messages, turn, tools, source)
            pieces += [(whole[cursor : len(before)], False), (whole[len(before) : len(after)], said)]
            cursor = len(after)
        pieces.append((whole[cursor:], False))
        pieces = [piece for piece in pieces if piece[0]]
        encoded = self.encoder.encode([pieces[0][0]])
        if len(pieces) > 1:
            encoded += self.encoder.encode_continuations([text for text, _ in pieces[1:]])
        ids: list[int] = []
        labels: list[int] = []
        for (_, said), tokens in zip(pieces, encoded, strict=True):
            supervised = self._said(tokens) if said else 0
            ids += tokens
            labels += tokens[:supervised] + [IGNORED] * (len(tokens) - supervised)
        return ids, labels

    def _header(self, earlier: list[dict[str, Any]], before: str, after: str, tools: Tools, source: str) -> str:
        """What a template without a generation prompt writes before the assistant's words, whatever they are."""
        probes = [
            self._apply([*earlier, {"role": "assistant", "content": words}], tools, source, tokenize=False)
            for words in _PROBES
        ]
        same = next((i for i, (a, b) in enumerate(zip(*probes, strict=False)) if a != b), 0)
        header = probes[0][len(before) : same]
        return header if header.strip() and after.startswith(before + header) else ""

    def _said(self, tokens: list[int]) -> int:
        """How many tokens of a turn are the assistant's: not the white space that templates put after its end mark."""
        last_mark = max((i for i, token in enumerate(tokens) if token in self._special), default=None)
        if last_mark is None or str(self.tokenizer.decode(tokens[last_mark + 1 :])).strip():
            return len(tokens)
        return last_mark + 1

    def _says_something(self, messages: list[dict[str, Any]], turn: int, tools: Tools, source: str) -> bool:
        """Whether an assistant's turn has words, thoughts or calls: of an empty one only the end would be learned."""
        message = messages[turn]
        if message.get("content") or message.get("tool_calls"):
            return True
        if not any(value for key, value in message.items() if key not in ("role", "content", "tool_calls")):
            return False
        empty = {"role": message["role"], "content": ""}
        later = messages[turn + 1 :]  # templates leave thoughts out that are followed by other turns
        texts = [
            self._apply([*messages[:turn], each, *later], tools, source, tokenize=False) for each in (message, empty)
        ]
        return bool(texts[0] != texts[1])

    def _require_written_calls(self, messages: list[dict[str, Any]], tools: Tools, source: str) -> None:
        """See that the template writes what the assistant calls; many forget it without a word, in some turns or all.

        Looked at once for turns of a kind: with words or thoughts or without, with one call or more, by what follows.

        Raises:
            DataError: a template that leaves out their names or their arguments.
        """
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or not message.get("tool_calls"):
                continue
            calls = message["tool_calls"]
            roles = [m["role"] for m in messages]
            kind = (
                frozenset((key, type(value)) for key, value in message.items() if value), min(len(calls), 2),
                bool(tools), roles[turn - 1 : turn], roles[turn + 1 : turn + 2],
            )  # fmt: skip
            key = repr(kind)
            if key in self._written_calls:
                continue
            written = self._apply(messages, tools, source, tokenize=False)
            for what, changed in (("names", _renamed(calls[-1])), ("arguments", _rewritten(calls[-1]))):
                if changed == calls[-1]:
                    continue
                other = {**message, "tool_calls": [*calls[:-1], changed]}
                try:
                    text = self._apply([*messages[:turn], other, *messages[turn + 1 :]], tools, source, tokenize=False)
                except DataError:  # a template that refuses another call looks at it
                    continue
                if text == written:
                    raise DataError(
                        f"{source}: the assistant calls tools in message {turn}, and the chat template of "
                        f"{tokenizer_name(self.tokenizer)} does not write the {what} of these 'tool_calls', so they "
                        "would be lost; give a template that does (chat_template=, --chat-template FILE), or leave "
                        "such conversations out"
                    )
            self._written_calls.add(key)

    def _apply(self, messages: list[dict[str, Any]], tools: Tools, source: str, **options: Any) -> Any:
        import jinja2  # here and not above: only conversations need templates

        # A key that is null is a key that is not there; many templates would print "None".
        present = [{key: value for key, value in m.items() if value is not None} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(present, tools=tools or None, **options)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template of {tokenizer_name(self.tokenizer)} is not valid Jinja "
                f"({error.message}, line {error.lineno}); fix the template"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # raise_exception(); None + str; odd tools
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{source}: the chat template of {tokenizer_name(self.tokenizer)} refuses the conversation "
                f"{'or its tools ' if tools else ''}({one_line(error)}; roles: {roles}); fix the record or the template"
            ) from error


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


def _reworded(message: dict[str, Any]) -> dict[str, Any]:
    """A turn with other words, thoughts and calls."""
    other = {"content": message.get("content") or "", **message}
    for key, value in other.items():
        if key in ("role", "name"):
            continue
        if isinstance(value, str) or value is None:
            other[key] = f"{value or ''}a"
        elif key == "tool_calls":
            other[key] = [_rewritten(_renamed(call)) for call in value]
        elif isinstance(value, list):
            other[key] = [{**x, "text": f"{x['text']}a"} if isinstance(x, dict) and "text" in x else x for x in value]
    return other


def _common(one: list[Any], other: list[Any]) -> int:
    """How many elements at the beginning of two lists are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@lru_cache(maxsize=8)
def _is_marked(template: str) -> bool:
    """Whether a template has a `{% generation %}` block, and not the words in a comment or a string."""
    import jinja2

    try:
        tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template) if kind != "whitespace"]
    except jinja2.TemplateSyntaxError:  # said when it is rendered
        return False
    return any(
        kind == "block_begin" and following == ("name", "generation") for (kind, _), following in pairwise(tokens)
    )
