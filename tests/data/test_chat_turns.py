"""Templates without marks: headers are given at inference and not learned, and the end of each turn is."""

from __future__ import annotations

import copy

import pytest
from tokenizers import AddedToken

from packflex.data.chat import ChatEncoder
from packflex.data.encoding import TextEncoder
from packflex.data.errors import DataError
from tests.data.test_chat import CALL, CHATML, encode, spoken

ASKED = {"role": "user", "content": "two plus two?"}
FOUR, SIX = ({"role": "assistant", "content": words} for words in ("four", "six"))
BARE = CHATML.split("{% if add_generation_prompt")[0]
# The first templates of Qwen: the end of a turn is written when something follows, a prompt after users only
ENDS_LATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def learned(tokenizer, template, *messages, **options):
    return spoken(tokenizer, encode(tokenizer, template, list(messages), **options)[1])


@pytest.fixture(scope="module")
def chatml(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|user|>", "<|answer|>"]}
    )
    return tokenizer


@pytest.mark.parametrize(
    "template",
    [
        BARE + "{% if add_generation_prompt and messages[-1].role == 'user' %}<assistant>\n{% endif %}",
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}" + BARE,
        BARE,
    ],
    ids=["after users only", "the word alone", "none"],
)
def test_headers_where_no_generation_prompt_is_written(plain, template):
    tool = {"role": "tool", "content": "four"}
    system = {"role": "system", "content": "Be brief."}
    assert learned(plain, template, ASKED, FOUR, tool, SIX) == ["four<|eos|>", "six<|eos|>"]
    assert learned(plain, template, ASKED, FOUR, SIX) == ["four<|eos|>", "six<|eos|>"]
    assert learned(plain, template, system, SIX) == ["six<|eos|>"]
    assert learned(plain, template, ASKED, FOUR, ASKED, SIX) == ["four<|eos|>", "six<|eos|>"]


def test_the_header_of_a_turn_that_begins_otherwise(plain):
    thinking = BARE.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
    )
    thoughtful = {**FOUR, "reasoning_content": "two"}
    assert learned(plain, thinking, ASKED, thoughtful, ASKED, SIX) == ["two</think>four<|eos|>", "six<|eos|>"]
    calling = BARE.replace("{{ m.content }}", "{% if m.tool_calls %}CALL {{ m.tool_calls | tojson }}"
                           "{% else %}CARRY {{ m.content }}{% endif %}")  # fmt: skip
    said = learned(plain, calling, ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]})
    assert len(said) == 1
    assert said[0].startswith("CALL [{"), "not cut inside the word"


def test_a_header_is_not_cut_inside_a_special_token(chatml):
    template = (
        "{% for m in messages %}{{ m.role }} {{ '<|im_start|>' if m.tool_calls else '<|im_end|>' }}"
        "{{ m.tool_calls | tojson if m.tool_calls else m.content }}{{ eos_token }}{% endfor %}"
    )
    (said,) = learned(chatml, template, ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]})
    assert said.startswith("<|im_start|>[{")


def test_what_a_kind_of_turn_was_seen_to_begin_with_is_looked_at_again(plain):
    """The prompt depends on what the user says."""
    template = BARE + "{% if add_generation_prompt and 'plus' in messages[-1].content %}<assistant>\n{% endif %}"
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = template
    chat = ChatEncoder(TextEncoder(tokenizer))
    for words in ("two plus two?", "and two?", "two plus two?"):
        _, labels = chat.encode([{"role": "user", "content": words}, FOUR])
        assert spoken(plain, labels) == ["four<|eos|>"]


def test_an_end_that_is_written_only_when_something_follows(chatml):
    ids, _ = encode(chatml, ENDS_LATE, [ASKED, FOUR])
    assert chatml.decode(ids) == ("<|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>")
    assert learned(chatml, ENDS_LATE, ASKED, FOUR, ASKED, SIX) == ["four<|im_end|>", "six<|im_end|>"]
    assert learned(chatml, ENDS_LATE, ASKED, FOUR, SIX) == ["four<|im_end|>", "six<|im_end|>"]
    assert learned(chatml, ENDS_LATE, ASKED, FOUR, ASKED, SIX, turns="last") == ["six<|im_end|>"]
    assert learned(chatml, ENDS_LATE, ASKED, FOUR, ASKED) == ["four<|im_end|>"]
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' if not loop.last }}{% endfor %}"
    assert learned(chatml, lines, ASKED, FOUR, ASKED, SIX) == ["four\n", "six\n"]


def test_a_template_that_writes_no_end_is_refused(chatml):
    """As GLM 4.5: the header of the next message ends a turn."""
    template = (
        "{% for m in messages %}{{ '<|answer|>' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|answer|>{% endif %}"
    )
    with pytest.raises(
        DataError, match=r"talk.jsonl:3: .* writes no end of the assistant's turns.* generation %} marks"
    ):
        encode(chatml, template, [ASKED, FOUR])
    marked = template.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    assert learned(chatml, marked, FOUR) == ["four"]


@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_turn_that_does_not_begin_with_the_generation_prompt(plain, turns):
    """As DeepSeek R1; the last turn is no way out."""
    with pytest.raises(DataError, match="does not begin message 1 with what it writes of") as error:
        encode(plain, CHATML.replace("<assistant>\n", "<assistant>\n<think>"), [ASKED, FOUR], turns)
    assert "turns='last'" not in str(error.value)


def test_parts_of_a_conversation_that_are_refused(plain):
    template = "{% if messages[-1].role == 'system' %}{{ raise_exception('no user') }}{% endif %}" + CHATML
    talk = [{"role": "system", "content": "Be brief."}, FOUR]
    with pytest.raises(
        DataError,
        match=r"refuses the first 1 of 2 messages \(no user; roles: system, assistant\); .* generation %} marks",
    ):
        encode(plain, template, talk)


def test_the_header_of_the_next_turn_is_no_end(chatml):
    """As GLM 4.5 after a tool: thoughts are cut where a user follows, so that only the assistant's header is shared."""
    template = (
        "{% set ns = namespace(user=-1) %}{% for m in messages if m.role == 'user' %}{% set ns.user = loop.index0 %}"
        "{% endfor %}{% for m in messages %}<|{{ 'answer' if m.role == 'assistant' else 'user' }}|>"
        "{{ m.reasoning_content if ns.user == 0 }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|answer|>{% endif %}"
    )
    thoughtful = {**FOUR, "reasoning_content": "two"}
    talk = [ASKED, thoughtful, {"role": "tool", "content": "4"}, {**SIX, "reasoning_content": "three"}]
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = template
    chat = ChatEncoder(TextEncoder(tokenizer), "last")
    for messages in (talk, [ASKED, {**FOUR, "content": "two"}, talk[2], SIX]):
        with pytest.raises(DataError, match="writes no end of the assistant's turns"):
            chat.encode(messages)


def test_a_header_that_all_messages_share_is_no_end(chatml):
    template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match="writes no end of the assistant's turns"):
        encode(chatml, template, [ASKED, FOUR])


def test_the_line_after_an_end_mark_that_the_tokenizer_does_not_name(plain):
    """It is a special token all the same, and what a template writes after it is no word of the assistant's."""
    tokenizer = copy.deepcopy(plain)
    ends = [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    tokenizer.add_tokens([*ends, AddedToken("<|note|>", special=False)])
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    template = BARE.replace("{{ eos_token }}", "<|im_end|>")
    assert learned(tokenizer, template, ASKED, FOUR, ASKED, SIX) == ["four<|im_end|>", "six<|im_end|>"]
    ended_by_a_line = BARE.replace("{{ eos_token }}", "")
    thought = {"role": "assistant", "content": "four<|note|>"}
    assert learned(tokenizer, ended_by_a_line, ASKED, thought) == ["four<|note|>\n"], "the line is the end here"
    quoted = {"role": "assistant", "content": "four<|im_end|>"}
    assert learned(tokenizer, ended_by_a_line, ASKED, quoted) == ["four<|im_end|>\n"], "a mark of the message's own"
