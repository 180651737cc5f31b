"""Templates with `{% generation %}` marks: the characters that are marked, and no others, whatever the tokens are."""

from __future__ import annotations

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from packflex.data.chat import ChatEncoder
from packflex.data.encoding import TextEncoder
from packflex.data.errors import DataError
from tests.data.test_chat import CALL, encode, spoken

WORDS_ONLY = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ASKED = {"role": "user", "content": "two plus two?"}


def says(words, **more):
    return {"role": "assistant", "content": words, **more}


def learned(tokenizer, template, *messages, **options):
    return spoken(tokenizer, encode(tokenizer, template, list(messages), **options)[1])


def test_characters_of_several_tokens(plain):
    assert learned(plain, WORDS_ONLY, ASKED, says("four 😀"), ASKED, says("是")) == ["four 😀", "是"]


def test_a_tokenizer_that_falls_back_to_bytes():
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    texts = ["two plus two? four user assistant < >"] * 20
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=""
    )
    assert learned(tokenizer, WORDS_ONLY, ASKED, says("four是"), ASKED, says("😀")) == ["four是", "😀"]


def test_a_normaliser_that_composes_characters(plain):
    composing = copy.deepcopy(plain)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    assert learned(composing, WORDS_ONLY, ASKED, says("cafe\u0301"), ASKED, says("six")) == ["caf\u00e9", "six"]


def test_a_tokenizer_that_trims_blanks_off_tokens(plain):
    trimming = copy.deepcopy(plain)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    blank = WORDS_ONLY.replace("{% generation %}", "{% generation %} ")
    assert learned(trimming, blank, ASKED, says("four"), ASKED, says("six")) == [" four", " six"]


@pytest.mark.parametrize("beginning", ["{{ bos_token }}", ""])
def test_empty_marks_at_the_beginning(plain, beginning):
    template = beginning + (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.reasoning_content or '' }}"
        "{% endgeneration %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
    )
    assert learned(plain, template, says("four"), ASKED, says("six")) == ["four<|eos|>", "six<|eos|>"]


NO_HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
)


def test_marks_that_follow_one_another_are_told_apart(plain):
    assert learned(plain, NO_HEADER, ASKED, says("four"), says("six"), turns="last") == ["six<|eos|>"]
    assert learned(plain, NO_HEADER, ASKED, says("four"), says("")) == ["four<|eos|>"]


@pytest.mark.parametrize("between", ["", "!"])
def test_an_end_that_is_marked_by_itself_goes_with_its_turn(plain, between):
    end = between + "{% generation %}{{ eos_token }}{% endgeneration %}"
    template = NO_HEADER.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}" + end)

    def heard(*messages, **options):
        return "".join(learned(plain, template, *messages, **options))

    assert heard(ASKED, says("four"), ASKED, says("six"), turns="last") == "six<|eos|>"
    assert heard(ASKED, says("four"), ASKED, says("")) == "four<|eos|>"
    assert heard(ASKED, says(""), ASKED, says("six")) == "six<|eos|>"
    if not between:
        assert heard(ASKED, says("four"), says("six"), turns="last") == "six<|eos|>"


def test_no_token_straddles_a_mark(plain):
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    assert len(plain.tokenize(" two")) == 1
    ids, labels = encode(plain, template, [ASKED, says("two")])
    assert spoken(plain, labels) == ["two<|eos|>"]
    assert plain.decode(ids) == "user: two plus two?\nassistant: two<|eos|>"


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ("{% macro say(m) %}<assistant>", "{% endmacro %}{{ say(messages[1]) }}", "a macro"),
        ("{% set m = messages[1] %}{% filter trim %}<assistant>", "{% endfilter %}", "a filter block"),
        ("{% set m = messages[1] %}{% set said %}<assistant>", "{% endset %}{{ said }}", "a set block"),
        (
            "{% macro twice() %}{{ caller() }}{% endmacro %}{% set m = messages[1] %}{% call twice() %}<assistant>",
            "{% endcall %}",
            "a call block",
        ),
        ("{% set m = messages[1] %}{% generation %}<assistant>", "{% endgeneration %}", "other marks"),
        ("{% for m in messages[1:] recursive %}<assistant>", "{% endfor %}", "a recursive loop"),
    ],
)
def test_marks_whose_place_is_not_known_are_refused(plain, before, after, place):
    marks = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    template = "{{ messages[0].content }}" + before + marks + after
    with pytest.raises(DataError, match=rf"talk.jsonl:3: .* marks inside {place} \(line 1\), .* put them where"):
        encode(plain, template, [ASKED, says("four")])


def test_marks_that_miss_a_turn_are_refused(plain):
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{{ m.tool_calls | tojson }}{{ eos_token }}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    talk = [ASKED, says("", tool_calls=[CALL]), {"role": "tool", "content": "four"}, says("four")]
    with pytest.raises(DataError, match=r"talk.jsonl:3: .* does not mark the names of its tool calls of message 1"):
        encode(plain, template, talk)
    assert learned(plain, template, *talk, turns="last") == ["four<|eos|>"]
    last = WORDS_ONLY.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(DataError, match=r"does not mark the content of message 1 .*turns='last'"):
        encode(plain, last, [ASKED, says("four"), ASKED, says("six")])
    assert learned(plain, last, ASKED, says("four"), ASKED, says("six"), turns="last") == ["six"]
    assert learned(plain, last, ASKED, says(""), ASKED, says("six")) == ["six"]


def test_thoughts_may_be_left_unmarked(plain):
    template = WORDS_ONLY.replace("{% generation %}", "<think>{{ m.reasoning_content }}</think>{% generation %}")
    assert learned(plain, template, ASKED, says("four", reasoning_content="two and two")) == ["four"]


def test_an_empty_turn_with_a_marked_header(plain):
    template = NO_HEADER.replace("{% generation %}", "{% generation %}<think></think>")
    assert learned(plain, template, ASKED, says(""), ASKED, says("six")) == ["<think></think>six<|eos|>"]


def test_no_field_is_added_to_tell_marks_apart(plain):
    """As gpt-oss, which refuses content beside thoughts and calls, and channels that it does not know."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.content and m.thinking %}{{ raise_exception('cannot pass both') }}{% endif %}"
        "{% if m.channel and m.channel != 'final' %}{{ raise_exception('unknown channel') }}{% endif %}"
        "{% generation %}{{ m.thinking or '' }}{{ m.tool_calls | tojson if m.tool_calls else m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}<user>{{ m.content }}{% endif %}{% endfor %}"
    )
    turn = {"role": "assistant", "thinking": "two", "tool_calls": [CALL]}
    (said,) = learned(plain, template, ASKED, says("four"), ASKED, turn, turns="last")
    assert said.startswith("two[{")
    assert said.endswith("<|eos|>")
    assert learned(plain, template, ASKED, says("four", channel="final"), turns="last") == ["four<|eos|>"]


def test_without_the_role_of_the_assistant_there_is_no_last_turn(plain):
    template = NO_HEADER.replace("'assistant'", "'model'")
    talk = [ASKED, {"role": "model", "content": "four"}]
    assert learned(plain, template, *talk) == ["four<|eos|>"]
    assert learned(plain, template, *talk, turns="last") == []


def test_thoughts_alone_in_an_earlier_turn_of_a_template_that_leaves_them_out(plain):
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }};{% endif %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    talk = [ASKED, says("four"), ASKED, says("", reasoning_content="two and two"), ASKED, says("six")]
    assert learned(plain, template, *talk, turns="last") == ["six<|eos|>"]
    assert learned(plain, template, *talk) == ["four<|eos|>", "six<|eos|>"]


@pytest.mark.parametrize("turns", ["all", "last"])
def test_marks_around_the_words_of_users_are_reported_once(plain, caplog, turns):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}<{{ m.role }}>{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    chat = ChatEncoder(TextEncoder(tokenizer), turns)
    system = {"role": "system", "content": "Be brief."}
    chat.encode([system, says("four")], None, "a.jsonl:1")
    assert not caplog.records
    for line in (2, 3):
        _, labels = chat.encode([system, ASKED, says("four")], None, f"a.jsonl:{line}")
        assert spoken(plain, labels) == ["<system>Be brief.<user>two plus two?<assistant>four"]
    (record,) = caplog.records
    assert record.getMessage().startswith("a.jsonl:2: the chat template of ")
    assert "marks words of message 1 (user) with {% generation %}, so they are learned" in record.getMessage()


@pytest.mark.parametrize("turns", ["all", "last"])
def test_marks_around_the_assistants_words_are_not_reported(plain, caplog, turns):
    strict = "{% if messages[0].content != 'two plus two?' %}{{ raise_exception('no') }}{% endif %}"
    learned(plain, WORDS_ONLY, ASKED, says("four"), turns=turns)
    learned(plain, strict + WORDS_ONLY, ASKED, says("four"), turns=turns)
    assert not caplog.records
