"""What a chat template leaves out of the messages is refused, by field and message; parts of text are no obstacle."""

from __future__ import annotations

import copy

import pytest

from packflex.data.chat import ChatEncoder
from packflex.data.encoding import TextEncoder
from packflex.data.errors import DataError
from tests.data.test_chat import CALL, CHATML, MARKED, TALK, TOOLS, encode, spoken

ASKED = {"role": "user", "content": "two plus two?"}
FOUR = {"role": "assistant", "content": "four"}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {}}}
# As Llama 3, which writes parts as Python objects; Qwen 3, which skips them; Qwen 2.5, which fails on them
RAW = CHATML.replace("m.content", "m.content | trim")
SKIPPING = CHATML.replace("m.content", "m.content if m.content is string else ''")
FAILING = CHATML.replace("m.content }}", "'' + m.content }}")
TO_JSON = CHATML.replace("m.content", "m.content if m.content is string else (m.content | tojson)")
# As SmolVLM: parts only
PARTS = CHATML.replace(
    "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)
EITHER = PARTS.replace("{% for p", "{% if m.content is string %}{{ m.content }}{% else %}{% for p").replace(
    "{% endif %}{% endfor %}{{ eos", "{% endif %}{% endfor %}{% endif %}{{ eos"
)


def in_parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


@pytest.mark.parametrize("template", [RAW, SKIPPING, FAILING, TO_JSON, PARTS, EITHER, MARKED])
@pytest.mark.parametrize("form", [in_parts, list, lambda talk: [*in_parts(talk[:2]), *talk[2:]]], ids="psm")
def test_text_in_parts_is_written_as_a_string_is(plain, template, form):
    expected = encode(plain, MARKED if template is MARKED else CHATML, TALK)
    assert encode(plain, template, form(TALK)) == expected
    assert spoken(plain, expected[1]) == ["four<|eos|>", "six, I think<|eos|>"]


def test_parts_and_strings_of_one_data_set(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = RAW
    chat = ChatEncoder(TextEncoder(tokenizer))
    assert chat.encode(TALK) == chat.encode(in_parts(TALK)) == chat.encode(TALK)
    assert chat.encode([ASKED, {"role": "assistant", "content": ["fo", "ur"]}]) == chat.encode([ASKED, FOUR])
    tokenizer.chat_template = PARTS
    chat = ChatEncoder(TextEncoder(tokenizer))
    chat.encode([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])  # either form will do
    assert chat.encode([ASKED, FOUR]) == encode(plain, CHATML, [ASKED, FOUR])
    assert chat.encode([{"role": "user", "content": []}, FOUR]) == chat.encode([{"role": "user", "content": ""}, FOUR])


@pytest.mark.parametrize("content", ["  ", "\n", [{"type": "text", "text": ""}], [{"type": "text", "text": " "}], []])
@pytest.mark.parametrize("template", [CHATML, MARKED, RAW, EITHER, PARTS])
def test_a_blank_turn_teaches_no_end(plain, template, content):
    talk = [*TALK[:2], {"role": "assistant", "content": content}, *TALK[3:]]
    assert spoken(plain, encode(plain, template, talk)[1]) == ["six, I think<|eos|>"]


MARKED_TOOLS = TOOLS.replace("{% if m.tool_calls %}", "{% generation %}{% if m.tool_calls %}").replace(
    "{{ eos_token }}", "{{ eos_token }}{% endgeneration %}"
)


@pytest.mark.parametrize("template", [TOOLS, MARKED_TOOLS], ids=["plain", "marked"])
def test_words_beside_tool_calls_that_are_not_written(plain, template):
    turn = {"role": "assistant", "content": "let me see", "tool_calls": [CALL]}
    lost = r"talk.jsonl:3: .* does not write 'content' of message 1 \(assistant\) that also calls tools, .* leave such"
    with pytest.raises(DataError, match=lost):
        encode(plain, template, [ASKED, turn])
    with pytest.raises(DataError, match=r"does not write 'thinking' of message 1 .* leave 'thinking' out of such"):
        encode(plain, template, [ASKED, {**turn, "content": "", "thinking": "two"}])
    encode(plain, template, [ASKED, {**turn, "content": ""}])


def test_thoughts_that_are_written_in_the_last_turn_only(plain):
    """By design, as Qwen 3 and many others."""
    template = MARKED.replace("{{ m.content }}{{ eos_token }}{% endg", "{% if loop.last %}{{ m.reasoning_content }}"
                              "{% endif %}{{ m.content }}{{ eos_token }}{% endg")  # fmt: skip
    thoughtful = {**FOUR, "reasoning_content": "six"}
    _, labels = encode(plain, template, [ASKED, thoughtful, ASKED, thoughtful])
    assert spoken(plain, labels) == ["four<|eos|>", "sixfour<|eos|>"]


@pytest.mark.parametrize("skipped", ["system", "tool"])
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_messages_that_are_not_written(plain, template, skipped):
    template = template.replace("in messages %}", f"in messages if m.role != '{skipped}' %}}")
    talk = [TALK[0], ASKED, FOUR, {"role": "tool", "content": "four"}, FOUR]
    at = {"system": 0, "tool": 3}[skipped]
    with pytest.raises(DataError, match=rf"does not write 'content' of message {at} \({skipped}\), .* --chat-template"):
        encode(plain, template, talk)


def test_a_kind_of_message_is_looked_at_where_its_words_are_not_blank(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    chat = ChatEncoder(TextEncoder(tokenizer))
    chat.encode([{"role": "system", "content": ""}, ASKED, FOUR])
    with pytest.raises(DataError, match=r"does not write 'content' of message 0 \(system\)"):
        chat.encode(TALK[:3])


def test_a_conversation_of_which_nothing_is_written(plain):
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"does not write 'content' of message 0 \(system\)"):
        encode(plain, users, TALK[:1])
    assert encode(plain, users, [{"role": "system", "content": ""}]) == ([], [])


def test_tools_that_are_not_written(plain):
    with pytest.raises(DataError, match=r"talk.jsonl:3: .* does not write the 'tools' .* leave 'tools' out"):
        encode(plain, CHATML, TALK, tools=[SCHEMA])
    encode(plain, CHATML, TALK, tools=[])
    encode(plain, TOOLS, TALK, tools=[SCHEMA])


def test_several_templates_none_of_which_is_the_default(plain):
    with pytest.raises(
        DataError, match=r"talk.jsonl:3: .* the chat templates 'a', 'b' and none that is called 'default'"
    ):
        encode(plain, {"a": CHATML, "b": CHATML})
    assert encode(plain, {"default": CHATML, "tool_use": TOOLS}) == encode(plain, CHATML)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_text_that_is_no_unicode(plain, template):
    with pytest.raises(DataError, match=r"talk.jsonl:3: the messages hold a lone surrogate \('\\ud800'\)"):
        encode(plain, template, [ASKED, {"role": "assistant", "content": "four\ud800"}])


def test_what_no_form_of_content_mends_is_said_and_not_the_form(plain):
    turn = {**FOUR, "thinking": "six"}
    with pytest.raises(DataError, match=r"does not write 'thinking' of message 1 \(assistant\)"):
        encode(plain, PARTS, [ASKED, turn])


@pytest.mark.parametrize("template", [RAW, TO_JSON], ids=["python", "json"])
@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ([{"type": "output_text", "text": "four"}], "output_text"),
        ([{"type": "thinking", "thinking": "2+2"}, {"type": "text", "text": "four"}], "thinking"),
        ([{"type": "image"}, {"type": "text", "text": "four"}], "image"),
    ],
)
def test_parts_of_other_types_that_are_written_as_objects(plain, template, parts, named):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = template
    chat = ChatEncoder(TextEncoder(tokenizer))
    chat.encode([ASKED, FOUR])
    with pytest.raises(
        DataError, match=rf"writes the parts of message 1 \(assistant\) of the type .*'{named}'.* as obj"
    ):
        chat.encode([ASKED, {"role": "assistant", "content": parts}])


def test_a_part_of_a_new_type_is_looked_at(plain):
    """And one that is quoted in the words is no object."""
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = EITHER.replace("{% endif %}{% endfor %}{% endif %}",
        "{% elif p.type != 'image' %}{{ p }}{% endif %}{% endfor %}{% endif %}")  # fmt: skip
    chat = ChatEncoder(TextEncoder(tokenizer))
    quoting = {"type": "text", "text": "What is {'type': 'image'}?"}
    chat.encode([{"role": "user", "content": [{"type": "image"}, quoting]}, FOUR])
    with pytest.raises(DataError, match=r"of message 0 \(user\) of the type 'audio' as objects"):
        chat.encode([{"role": "user", "content": [{"type": "audio"}, quoting]}, FOUR])


def test_parts_of_thoughts_that_are_not_written(plain):
    parts = [{"type": "thinking", "thinking": "2+2"}, {"type": "text", "text": "four"}]
    with pytest.raises(DataError, match=r"does not write the beginning of 'content' of message 1 \(assistant\)"):
        encode(plain, EITHER, [ASKED, {"role": "assistant", "content": parts}])


CUT = "{{ m.content.split('</think>')[-1] if COND else m.content }}"


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("words", ["<think>\n2+2\n</think>\n\nfour", "2+2</think>four"])
def test_thoughts_in_the_words_that_are_not_written(plain, template, words):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = template.replace("{{ m.content }}", CUT.replace("COND", "true"))
    chat = ChatEncoder(TextEncoder(tokenizer))
    chat.encode([ASKED, FOUR])
    with pytest.raises(
        DataError, match=r"does not write the beginning of 'content' of message 1 \(assistant\), .* lea"
    ):
        chat.encode([ASKED, {"role": "assistant", "content": words}])
    chat.encode([ASKED, {"role": "assistant", "content": "<think>\n\n</think>\n\nfour"}])


def test_thoughts_in_the_words_that_are_cut_from_earlier_turns(plain):
    """By design; and a template that writes them again from between their marks leaves none out."""
    thoughtful = {"role": "assistant", "content": "<think>2+2</think>four"}
    talk = [ASKED, thoughtful, ASKED, thoughtful]
    earlier = MARKED.replace("{{ m.content }}{{ eos_token }}{% endg", CUT.replace("COND", "not loop.last")
                             + "{{ eos_token }}{% endg")  # fmt: skip
    assert spoken(plain, encode(plain, earlier, talk)[1]) == ["four<|eos|>", "<think>2+2</think>four<|eos|>"]
    again = MARKED.replace(
        "{{ m.content }}{{ eos_token }}{% endg",
        "<think>{{ m.content.split('</think>')[0].split('<think>')[-1] }}</think>{{ m.content.split('</think>')[-1] }}"
        "{{ eos_token }}{% endg",
    )
    assert spoken(plain, encode(plain, again, talk)[1]) == ["<think>2+2</think>four<|eos|>"] * 2


@pytest.mark.parametrize("content", ["Let me look.", ""])
def test_a_function_call_that_is_not_written(plain, content):
    call = {"name": "add", "arguments": '{"a": 2}'}
    turn = {"role": "assistant", "content": content, "function_call": call}
    with pytest.raises(DataError, match=r"does not write 'function_call' of message 1 .* rename it to 'tool_calls'"):
        encode(plain, CHATML, [ASKED, turn])
    writing = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.function_call.name if m.function_call }}")
    assert spoken(plain, encode(plain, writing, [ASKED, turn])[1]) == [f"{content}add<|eos|>"]


def test_what_is_written_does_not_depend_on_the_order_of_conversations(plain):
    """As Mistral, which writes the system's words with the last message if that is the user's."""
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = MARKED.replace("{% for m", "{% if messages[-1].role == 'user' %}{{ messages[0].content }}"
        "{% endif %}{% for m").replace("in messages %}", "in messages if m.role != 'system' %}")  # fmt: skip
    chat = ChatEncoder(TextEncoder(tokenizer))
    for talk in (TALK[:4], TALK[:3], TALK[:4], TALK[:3]):
        if talk[-1]["role"] == "user":
            chat.encode(talk)
            continue
        with pytest.raises(DataError, match=r"does not write 'content' of message 0 \(system\)"):
            chat.encode(talk)


CALLING = "{% for c in m.tool_calls or [] %}call {{ c.function.name }}(ARGUMENTS){% endfor %}{{ m.content }}"
# As Qwen 2.5; as Qwen 3.5, which fails on strings; as DeepSeek V3, which fails on objects; and Python objects
TO_JSON_CALLS = CALLING.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
OBJECTS = CALLING.replace(
    "ARGUMENTS", "{ {%- for k, v in c.function.arguments | items %}{{ k | tojson }}: {{ v | tojson }}{% endfor -%} }"
)
STRINGS = CALLING.replace("ARGUMENTS", "{{ '' + c.function.arguments }}")
PYTHON = CALLING.replace("ARGUMENTS", "{{ c.function.arguments }}")


def calling(*arguments, content=""):
    calls = [{"type": "function", "function": {"name": "add", "arguments": each}} for each in arguments]
    return {"role": "assistant", "content": content, "tool_calls": calls}


@pytest.mark.parametrize("calls", [TO_JSON_CALLS, OBJECTS, STRINGS, PYTHON], ids=["json", "objects", "strings", "raw"])
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_arguments_are_brought_to_the_form_that_a_template_takes(plain, template, calls):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = template.replace("{{ m.content }}", calls)
    chat = ChatEncoder(TextEncoder(tokenizer))
    for _ in range(2):
        for arguments in ({"city": "Köln"}, '{"city": "Köln"}'):
            _, labels = chat.encode([ASKED, calling(arguments), {"role": "tool", "content": "four"}, FOUR])
            assert spoken(plain, labels) == ['call add({"city": "Köln"})<|eos|>', "four<|eos|>"]


def test_arguments_that_are_no_object_are_named(plain):
    named = r"'arguments' of the 'tool_calls' in message 1 .*give an object, or the JSON text of one"
    for calls in (TO_JSON_CALLS, OBJECTS):
        tokenizer = copy.deepcopy(plain)
        tokenizer.chat_template = CHATML.replace("{{ m.content }}", calls)
        chat = ChatEncoder(TextEncoder(tokenizer))
        chat.encode([ASKED, calling('{"city": "Bonn"}')])
        with pytest.raises(DataError, match=named):
            chat.encode([ASKED, calling('{"city": "Bo')])
    encode(plain, CHATML.replace("{{ m.content }}", TO_JSON_CALLS), [ASKED, calling("2 + 2")])  # free text


def test_calls_without_content_where_the_template_reads_it(plain):
    """As OpenAI has it, and DeepSeek V3 not."""
    template = CHATML.replace("{{ m.content }}", TO_JSON_CALLS.replace("m.content", "'' + m.content"))
    turn = calling({"city": "Bonn"}, content=None)
    expected = encode(plain, template, [ASKED, {**turn, "content": ""}])
    assert spoken(plain, expected[1]) == ['call add({"city": "Bonn"})<|eos|>']
    assert encode(plain, template, [ASKED, turn]) == expected


def test_parallel_calls_of_which_the_first_is_written(plain):
    with pytest.raises(DataError, match=r"writes only the first of the 2 'tool_calls' in message 1 \(assistant\)"):
        encode(plain, TOOLS, [ASKED, calling({"a": 2}, {"a": 3})])
    with pytest.raises(DataError, match="does not write the names of these 'tool_calls'"):
        encode(plain, CHATML, [ASKED, calling({"a": 2}, {"a": 3}, content="let me see")])


def encoder(plain, template):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = template
    return ChatEncoder(TextEncoder(tokenizer))


def test_blank_thoughts_do_not_stand_for_others(plain):
    """A template that cuts thoughts out of the words loses those that are not blank, whatever came before."""
    chat = encoder(plain, CHATML.replace("m.content", "m.content.split('</think>')[-1] | trim"))
    said = [[ASKED, {"role": "assistant", "content": f"<think>\n{x}\n</think>\n\nfour"}] for x in ("", "two and two")]
    assert spoken(plain, chat.encode(said[0])[1]) == ["four<|eos|>"]
    for _ in range(2):
        with pytest.raises(DataError, match="does not write the beginning of 'content' of message 1"):
            chat.encode(said[1])


def test_one_part_does_not_stand_for_two(plain):
    chat = encoder(plain, CHATML.replace("m.content", "(m.content[0].text if m.content is not string else '')"))
    one, two = ([{"type": "text", "text": x} for x in said] for said in (["four"], ["six, ", "I think"]))
    assert spoken(plain, chat.encode([ASKED, {"role": "assistant", "content": one}])[1]) == ["four<|eos|>"]
    with pytest.raises(DataError, match="does not write 'content' of message"):
        chat.encode([ASKED, {"role": "assistant", "content": two}])


@pytest.mark.parametrize("arguments", [{"a": "two"}, '{"a": "two"}'])
@pytest.mark.parametrize("quoting", [{"a": "two"}, '{"a": "two"}'])
def test_results_of_tools_may_quote_the_arguments(plain, arguments, quoting):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    talk = [
        ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": f"got {quoting!r}: four"}, FOUR,
    ]  # fmt: skip
    assert spoken(plain, encode(plain, TOOLS, talk)[1])[-1] == "four<|eos|>"
    raw = TOOLS.replace(" | tojson", "")
    kept = encoder(plain, raw)
    if isinstance(arguments, dict):
        kept.encode(
            [ASKED, {"role": "assistant", "tool_calls": [{**call, "function": {"name": "add", "arguments": {}}}]}]
        )
    assert '{"a": "two"}' in spoken(plain, kept.encode(talk)[1])[0]
