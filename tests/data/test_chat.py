from __future__ import annotations

import copy

import pytest

from packflex.data.chat import ChatEncoder
from packflex.data.encoding import TextEncoder
from packflex.data.errors import DataError

# The form of Qwen, SmolLM and many others, with <|eos|> as the end of a turn.
CHATML = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
# As Qwen3 and DeepSeek R1: thoughts are cut from turns that others follow.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
TOOLS = (
    "{% if tools %}tools: {{ tools[0].function.name }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>\n{% if m.tool_calls %}call {{ m.tool_calls[0].function.name }}("
    "{{ m.tool_calls[0].function.arguments | tojson }}){% else %}{{ m.content }}{% endif %}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
STRICT = "{{ raise_exception('roles must alternate') }}"

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "two plus two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and two?"},
    {"role": "assistant", "content": "six, I think"},
]


def encode(plain, template, messages=TALK, turns="all", tools=None):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = template
    ids, labels = ChatEncoder(TextEncoder(tokenizer), turns).encode(messages, tools, "talk.jsonl:3")
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return ids, labels


def spoken(plain, labels):
    """Runs of supervised tokens as text."""
    runs, run = [], []
    for label in [*labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(plain.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_loss_on_the_assistants_turns_and_their_end_only(plain, template):
    ids, labels = encode(plain, template)
    assert spoken(plain, labels) == ["four<|eos|>", "six, I think<|eos|>"]
    text = "".join(f"<{m['role']}>\n{m['content']}<|eos|>\n" for m in TALK)
    assert plain.decode(ids) == ("<|bos|>" if template is MARKED else "") + text  # one BOS, from the template


@pytest.mark.parametrize("template", [CHATML, MARKED, FORGETFUL])
def test_last_turn_only_leaves_out_what_follows(plain, template):
    thought = "<think></think>" if template is FORGETFUL else ""
    ids, labels = encode(plain, template, [*TALK, {"role": "user", "content": "why?"}], turns="last")
    assert spoken(plain, labels) == [f"{thought}six, I think<|eos|>"]
    assert "why" not in plain.decode(ids)


def test_boundary_is_the_one_of_inference(plain):
    """The ids before an answer are those of the prompt that a model is given when it has to answer."""
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = CHATML
    ids, labels = encode(plain, CHATML, TALK[:3])
    prompt = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True)["input_ids"]
    first = next(i for i, label in enumerate(labels) if label != -100)
    assert ids[:first] == prompt


def test_template_that_rewrites_earlier_turns_is_refused_with_the_remedy(plain):
    with pytest.raises(DataError, match=r"talk\.jsonl:3: .* writes message 2 differently.*turns='last'.*generation"):
        encode(plain, FORGETFUL)
    _, labels = encode(plain, FORGETFUL, TALK[:3])  # one turn: nothing is rewritten
    assert spoken(plain, labels) == ["<think></think>four<|eos|>"]


def test_tool_calls_and_tools(plain):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}
    messages = [
        {"role": "user", "content": "two plus two?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "four"},
        {"role": "assistant", "content": "four"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    ids, labels = encode(plain, TOOLS, messages, tools=tools)
    assert plain.decode(ids).startswith("tools: add\n<user>")
    assert spoken(plain, labels) == ['call add({"a": 2, "b": null})<|eos|>', "four<|eos|>"]


def test_turns_that_follow_one_another(plain):
    messages = [*TALK[:3], {"role": "assistant", "content": "no"}]
    _, labels = encode(plain, CHATML, messages)
    assert spoken(plain, labels) == ["four<|eos|>", "no<|eos|>"]


def test_without_an_end_mark_all_of_the_turn_is_supervised(plain):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    _, labels = encode(plain, template, TALK[:3])
    assert spoken(plain, labels) == ["four\n"]


def test_errors(plain):
    with pytest.raises(DataError, match=r"has no chat template.*--chat-template FILE"):
        ChatEncoder(TextEncoder(plain))
    with pytest.raises(
        DataError, match=r"talk\.jsonl:3: .* refuses the conversation \(roles must alternate; roles: sys"
    ):
        encode(plain, STRICT)
    with pytest.raises(DataError, match=r"not valid Jinja \(.*, line 1\); fix the template"):
        encode(plain, "{% for %}")
    with pytest.raises(DataError, match=r"talk\.jsonl:3: the conversation starts with the assistant"):
        encode(plain, CHATML, TALK[2:])


@pytest.mark.parametrize(
    "comment",
    [
        "{# marks: {% generation %} #}",
        "{{ '{% generation %}' if false }}",
        "{% raw %}{% endraw %}{#- {%- generation -%} #}",
    ],
)
def test_words_about_marks_are_no_marks(plain, comment):
    ids, labels = encode(plain, comment + CHATML)
    assert (ids, labels) == encode(plain, CHATML)
    assert spoken(plain, labels) == ["four<|eos|>", "six, I think<|eos|>"]


@pytest.mark.parametrize("mark", ["{%- generation -%}", "{%+ generation %}", "{%generation%}"])
def test_marks_in_any_form(plain, mark):
    assert encode(plain, MARKED.replace("{% generation %}", mark)) == encode(plain, MARKED)


def test_the_header_of_a_template_without_a_generation_prompt(plain):
    """The name of the assistant is given at inference, whether the template can write it by itself or not."""
    bare = CHATML.split("{% if add_generation_prompt")[0]
    assert encode(plain, bare) == encode(plain, CHATML)
    calls = [*TALK[:2], {"role": "assistant", "content": None, "tool_calls": [CALL]}, *TALK[3:]]
    bare = TOOLS.split("{% if add_generation_prompt")[0]
    assert encode(plain, bare, calls) == encode(plain, TOOLS, calls)
    blank = (
        "{% for m in messages %}"
        "{{ '[' + m.content + ']' if m.role != 'assistant' else ' ' + m.content + eos_token }}{% endfor %}"
    )
    assert spoken(plain, encode(plain, blank)[1]) == [" four<|eos|>", " six, I think<|eos|>"], (
        "a blank belongs to the word"
    )


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def test_a_mark_in_a_comment_is_no_mark(plain):
    commented = "{# no {% generation %} here #}" + CHATML
    assert spoken(plain, encode(plain, commented)[1]) == spoken(plain, encode(plain, CHATML)[1])
    assert len(spoken(plain, encode(plain, commented)[1])) == 2


def test_a_header_is_not_supervised_where_the_template_has_no_generation_prompt(plain):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|eos|>{% endfor %}"
    assert spoken(plain, encode(plain, template)[1]) == ["four<|eos|>", "six, I think<|eos|>"]


def test_calls_that_the_template_does_not_write_are_refused(plain):
    calls = [*TALK[:2], {"role": "assistant", "content": "let me see", "tool_calls": [CALL]}]
    schema = [{"type": "function", "function": {"name": CALL["function"]["name"], "parameters": {}}}]
    silent = CHATML.replace("{% for m", "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for m", 1)
    for template in (CHATML, MARKED, silent):
        with pytest.raises(
            DataError,
            match=r"talk.jsonl:3: the assistant calls tools in message 2, .* not write the names of",
        ):
            encode(plain, template, calls, tools=schema)
    calls[2] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    encode(plain, TOOLS, calls, tools=schema)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_an_empty_turn_teaches_no_end(plain, template):
    empty = [*TALK[:2], {"role": "assistant", "content": ""}, *TALK[3:]]
    _, labels = encode(plain, template, empty)
    assert spoken(plain, labels) == ["six, I think<|eos|>"]
    _, labels = encode(plain, template, empty[:3])
    assert set(labels) == {-100}


def test_thoughts_without_words_are_learned(plain):
    thinking = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content | default('') }}{{ m.content }}")
    talk = [*TALK[:2], {"role": "assistant", "content": "", "reasoning_content": "two and two", "name": "x"}, *TALK[3:]]
    _, labels = encode(plain, thinking, talk)
    assert spoken(plain, labels) == ["two and two<|eos|>", "six, I think<|eos|>"]
    with pytest.raises(DataError, match=r"does not write 'reasoning_content' of message 2 \(assistant\), so its words"):
        encode(plain, CHATML, talk)


@pytest.mark.parametrize("template", [MARKED, CHATML], ids=["marked", "plain"])
def test_the_last_turn_says_nothing_and_no_other_is_taken_for_it(plain, template):
    _, labels = encode(plain, template, [*TALK[:4], {"role": "assistant", "content": ""}], turns="last")
    assert set(labels) == {-100}


# Two marked runs a turn, the first of them thoughts
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.reasoning_content or '' }}{% endgeneration %}<sep>"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_a_turn_may_have_several_marked_runs(plain):
    asked = {"role": "user", "content": "two plus two?"}
    thought = {"role": "assistant", "content": "four", "reasoning_content": "six"}
    empty = {"role": "assistant", "content": ""}

    def learned(*messages, turns="all"):
        return spoken(plain, encode(plain, THINKING, list(messages), turns)[1])

    assert "".join(learned(asked, thought)) == "sixfour"
    assert "".join(learned(asked, thought, turns="last")) == "sixfour"
    assert "".join(learned(asked, thought, asked, empty)) == "sixfour"
    assert "".join(learned(asked, empty, asked, thought)) == "sixfour"
    assert "".join(learned(asked, thought, asked, thought, turns="last")) == "sixfour"
    assert "".join(learned(asked, thought, asked, empty, turns="last")) == ""


def test_turns_are_told_apart_where_templates_write_the_last_one_otherwise(plain):
    """Thoughts are written in the last turn alone, which must end the conversation."""
    forgetful = THINKING.replace("m.reasoning_content or ''", "m.reasoning_content if loop.last else ''")
    forgetful = (
        "{% if messages[-1].role != 'assistant' or messages[0].role == 'assistant' %}"
        "{{ raise_exception('must end with the assistant') }}{% endif %}" + forgetful
    )
    asked = {"role": "user", "content": "two plus two?"}
    thought = {"role": "assistant", "content": "four", "reasoning_content": "six"}
    empty = {"role": "assistant", "content": ""}

    def learned(*messages, turns="all"):
        return "".join(spoken(plain, encode(plain, forgetful, list(messages), turns)[1]))

    assert learned(asked, thought, asked, thought) == "foursixfour"
    assert learned(asked, thought, asked, thought, turns="last") == "sixfour"
    assert learned(asked, thought, thought, turns="last") == "sixfour"
    assert learned(asked, thought, asked, empty) == "four"
    assert learned(asked, empty, asked, thought) == "sixfour"


def test_marks_that_two_turns_share_are_refused(plain):
    template = (
        "<user>{{ messages[0].content }}{% generation %}{% for m in messages[1:] %}{{ m.content }}{{ eos_token }}"
        "{% endfor %}{% endgeneration %}"
    )
    talk = [TALK[1], TALK[2], {"role": "assistant", "content": ""}]
    with pytest.raises(DataError, match=r"talk.jsonl:3: .* marks message 2 together with message 1.* mark each"):
        encode(plain, template, talk)
    with pytest.raises(DataError, match=r"talk.jsonl:3: .* marks message 2 together with message 1.* mark each"):
        encode(plain, template, [*talk[:2], {"role": "assistant", "content": "six"}], turns="last")
    assert spoken(plain, encode(plain, template, talk[:2])[1]) == ["four<|eos|>"]


def test_calls_that_a_template_writes_in_some_turns_only(plain):
    """Seen whatever conversations came before."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls and not m.content %}{{ m.tool_calls | tojson }}"
        "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = template
    chat = ChatEncoder(TextEncoder(tokenizer))
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"x": 1}}}]
    asked = {"role": "user", "content": "two plus two?"}
    chat.encode([asked, {"role": "assistant", "content": "", "tool_calls": calls}])
    with pytest.raises(DataError, match=r"in message 1, and the chat template of .* does not write the names of"):
        chat.encode([asked, {"role": "assistant", "content": "let me", "tool_calls": calls}])


def test_tools_that_are_no_schemas(plain):
    with pytest.raises(DataError, match=r"talk.jsonl:3: the chat template of .* or its tools .*; fix the record or"):
        encode(plain, TOOLS, tools=[1, 2])


def test_arguments_that_a_template_leaves_out(plain):
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}("
        "{{ c.arguments }}){% endfor %}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"x": 1}}}]
    with pytest.raises(DataError, match="does not write the arguments of these 'tool_calls'"):
        encode(plain, template, [TALK[1], {"role": "assistant", "content": "", "tool_calls": calls}])


def test_a_template_that_knows_its_tools(plain):
    """It refuses the call with another name that packflex tries."""
    template = TOOLS.replace("call {{", "{% if m.tool_calls[0].function.name != 'weather' %}"
                             "{{ raise_exception('unknown tool') }}{% endif %}call {{")  # fmt: skip
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"x": 1}}}]
    encode(plain, template, [TALK[1], {"role": "assistant", "content": "", "tool_calls": calls}])
