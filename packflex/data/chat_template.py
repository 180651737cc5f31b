"""`Conversation`: messages and what the tokenizer's chat template writes of them, with errors that name the record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from packflex.data.errors import DataError, one_line
from packflex.data.tokenizer import tokenizer_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
# JSON schemas; Any and not dict, because a list of dicts is no list of "dict or callable" to a type checker
Tools = list[Any] | None
Span = tuple[int, int]  # of characters: first, and first after it

OTHER_TEMPLATE = "give a template that does (chat_template=, --chat-template FILE)"


@dataclass(frozen=True)
class Conversation:
    """One conversation of a data set.

    Attributes:
        tokenizer: whose chat template writes it.
        messages: objects with a role and content (or tool calls), in order, without null members.
        tools: JSON schemas of the tools, as the template takes them; None and not an empty list.
        source: what to call the conversation in errors.

    Every method raises DataError where the template fails, and is not valid Jinja.
    """

    tokenizer: PreTrainedTokenizerBase
    messages: list[Message]
    tools: Tools
    source: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools, source: str) -> Conversation:
        """A conversation of raw messages.

        A key that is null is no key, for many templates would print "None", and no parts are no words, for "[]".
        """
        present = [
            {key: "" if value == [] and key == "content" else value for key, value in m.items() if value is not None}
            for m in messages
        ]
        return cls(tokenizer, present, tools or None, source)

    @cached_property
    def roles(self) -> list[str]:
        """Role of each message."""
        return [message["role"] for message in self.messages]

    @cached_property
    def template(self) -> str:
        """The Jinja text of the template, which may be another with tools.

        Raises:
            DataError: a tokenizer with several templates, none of which is the default.
        """
        try:
            return str(self.tokenizer.get_chat_template(tools=self.tools))
        except ValueError as error:
            known = self.tokenizer.chat_template
            names = ", ".join(map(repr, known)) if isinstance(known, dict) else "none"
            raise DataError(
                f"{self.source}: tokenizer {tokenizer_name(self.tokenizer)} has the chat templates {names} and none "
                "that is called 'default'; give the Jinja file of one (chat_template=, --chat-template FILE)"
            ) from error

    @cached_property
    def template_name(self) -> str:
        """What to call the template in errors."""
        return f"the chat template of {tokenizer_name(self.tokenizer)}"

    def replaced(self, at: int, message: Message) -> list[Message]:
        """The messages, with another one in place of message `at`."""
        return [*self.messages[:at], message, *self.messages[at + 1 :]]

    def with_messages(self, messages: list[Message]) -> Conversation:
        """The same conversation with other messages."""
        return replace(self, messages=messages)

    def text(self, messages: list[Message] | None = None, *, prompt: bool = False) -> str:
        """What the template writes of `messages` (all of them by default), and the generation prompt if wanted."""
        messages = self.messages if messages is None else messages
        template = self.template
        with self._naming_the_record(messages):
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=self.tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
            )

    def text_or_none(self, messages: list[Message], *, prompt: bool = False) -> str | None:
        """`text` of messages that are no user's but made to look at the template; None where it refuses them."""
        try:
            return self.text(messages, prompt=prompt)
        except DataError:
            return None

    def marked_text(self, messages: list[Message] | None = None) -> tuple[str, list[Span]]:
        """`text`, and the places of what each `{% generation %}` block of the template wrote, empty ones too."""
        from transformers.utils.chat_template_utils import render_jinja_template  # takes a second, and few need it

        messages = self.messages if messages is None else messages
        template = self.template
        with self._naming_the_record(messages):
            rendered: Any = render_jinja_template(  # it says str of what is a pair of lists
                conversations=[messages],
                tools=self.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **cast(Any, self.tokenizer.special_tokens_map),
            )
        (text,), (spans,) = rendered
        return text, spans

    @contextmanager
    def _naming_the_record(self, messages: list[Message]) -> Iterator[None]:
        import jinja2  # here and not above: only conversations need templates

        try:
            yield
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"{self.template_name} is not valid Jinja ({error.message}, line {error.lineno}); fix the template"
            ) from error
        # raise_exception(); None + str, odd tools, members that are not there
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            part = "the conversation"
            remedy = "fix the record or the template"
            if len(messages) < len(self.messages):
                part = f"the first {len(messages)} of {len(self.messages)} messages"
                remedy = "fix the record, or use a template with {% generation %} marks, which needs no such parts"
            raise DataError(
                f"{self.source}: {self.template_name} refuses {part} {'or its tools ' if self.tools else ''}"
                f"({one_line(error)}; roles: {', '.join(self.roles)}); {remedy}"
            ) from error
