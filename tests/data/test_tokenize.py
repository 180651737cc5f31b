from __future__ import annotations

import json

import pytest
from datasets import Dataset, disable_progress_bars

from packflex.data.errors import DataError
from packflex.data.records import check_messages
from packflex.data.sources import load_documents
from packflex.data.tokenize import tokenize_documents
from packflex.data.tokenizer import train_tokenizer

disable_progress_bars()

# Python 3.12 and later warn when a process with threads forks, as `datasets` does for its workers.
FORKS = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

BOS, EOS = 0, 1
TEXTS = ["What is two plus two? The answer is four.", "Question: answer: is it four? two plus two is four."] * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("cache"))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_supervises_all_but_the_first_token(tokenizer):
    out = tokenize_documents(Dataset.from_dict({"text": ["two plus two", "four"]}), tokenizer)
    for row, text in zip(out.dataset, ["two plus two", "four"], strict=True):
        assert row["input_ids"] == [BOS, *ids(tokenizer, text), EOS]
        assert row["labels"] == [-100, *ids(tokenizer, text), EOS]
    assert out.tokens == sum(len(row["input_ids"]) for row in out.dataset)
    assert out.supervised_tokens == out.tokens - 2
    assert (out.read, out.dropped, out.truncated, out.truncated_tokens) == (2, 0, 0, 0)


def test_prompt_and_completion_are_encoded_apart(tokenizer):
    prompt, completion = "What is two plus tw", "o? four"
    (row,) = tokenize_documents(Dataset.from_dict({"prompt": [prompt], "completion": [completion]}), tokenizer).dataset
    given, answer = [BOS, *ids(tokenizer, prompt)], [*ids(tokenizer, completion), EOS]
    assert row["input_ids"] == given + answer
    assert row["labels"] == [-100] * len(given) + answer
    assert ids(tokenizer, prompt + completion) != given[1:] + answer[:-1]  # the joint would have merged


def test_training_on_the_prompt_leaves_only_the_first_token_out(tokenizer):
    documents = Dataset.from_dict({"prompt": ["two plus two"], "completion": [" is four"]})
    out = tokenize_documents(documents, tokenizer, train_on_prompt=True)
    (row,) = out.dataset
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_beginning_and_end_are_never_doubled(tokenizer):
    out = tokenize_documents(Dataset.from_dict({"text": ["<|bos|>two<|eos|>"]}), tokenizer)
    assert out.dataset[0]["input_ids"] == [BOS, *ids(tokenizer, "two"), EOS]
    documents = Dataset.from_dict({"prompt": ["<|bos|>two"], "completion": ["four<|eos|>"]})
    (row,) = tokenize_documents(documents, tokenizer).dataset
    assert row["input_ids"] == [BOS, *ids(tokenizer, "two"), *ids(tokenizer, "four"), EOS]
    assert row["labels"] == [-100] * (1 + len(ids(tokenizer, "two"))) + [*ids(tokenizer, "four"), EOS]


def test_truncation_is_counted(tokenizer):
    long, short = "two plus two is four " * 5, "two"
    out = tokenize_documents(Dataset.from_dict({"text": [long, short]}), tokenizer, max_length=10)
    whole = [BOS, *ids(tokenizer, long), EOS]
    assert out.dataset[0]["input_ids"] == whole[:10]
    assert out.dataset[1]["input_ids"] == [BOS, *ids(tokenizer, short), EOS]
    assert (out.truncated, out.truncated_tokens) == (1, len(whole) - 10)


def test_columns_and_types_are_what_packing_takes(tokenizer):
    documents = Dataset.from_dict({"text": ["two"], "source": ["a.jsonl:1"], "extra": [3]})
    out = tokenize_documents(documents, tokenizer).dataset
    assert out.column_names == ["input_ids", "labels", "source"]
    assert out.data.schema.field("input_ids").type.value_type == "int32"
    assert out[0]["source"] == "a.jsonl:1"


@FORKS
def test_worker_processes_give_the_same(tokenizer):
    documents = Dataset.from_dict({"text": [f"two plus {i}" for i in range(50)]})
    alone = tokenize_documents(documents, tokenizer)
    shared = tokenize_documents(documents, tokenizer, num_proc=2)
    assert shared.dataset.to_list() == alone.dataset.to_list()


@FORKS
def test_errors_cross_worker_processes(tokenizer):
    documents = Dataset.from_dict({"prompt": ["two"] * 4, "completion": ["a", "b", "c", ""], "source": list("wxyz")})
    with pytest.raises(DataError, match="z: no supervised token: the completion is empty"):
        tokenize_documents(documents, tokenizer, num_proc=2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["two", ""]}, "document 1: no supervised token: the text is empty"),
        ({"prompt": ["two"], "completion": [""]}, r"document 0: no supervised token: the completion is empty.*'drop'"),
        ({"text": ["two", None]}, "document 1: 'text' must be a string; got NoneType"),
        ({"question": ["two"]}, r"documents need the columns messages, .*; these have 'question'"),
        ({"text": []}, "the data set is empty"),
    ],
)
def test_unusable_documents(tokenizer, columns, message):
    with pytest.raises(DataError, match=message):
        tokenize_documents(Dataset.from_dict(columns), tokenizer)


def test_a_prompt_that_fills_max_length_is_an_error_or_dropped_and_counted(tokenizer):
    columns = {"prompt": ["two plus two " * 9, "two"], "completion": ["four", "four"], "source": ["a:1", "a:2"]}
    documents = Dataset.from_dict(columns)
    with pytest.raises(DataError, match=r"a:1: no supervised token is left: the first is token \d+ of \d+.*raise it"):
        tokenize_documents(documents, tokenizer, max_length=12)
    out = tokenize_documents(documents, tokenizer, max_length=12, on_unsupervised="drop")
    assert (len(out.dataset), out.read, out.dropped, out.truncated) == (1, 2, 1, 0)
    assert out.dataset[0]["source"] == "a:2"
    with pytest.raises(DataError, match=r"none of 2 documents has a supervised token.*max_length=2"):
        tokenize_documents(documents, tokenizer, max_length=2, on_unsupervised="drop")


def test_options_are_checked(tokenizer):
    documents = Dataset.from_dict({"text": ["two"]})
    with pytest.raises(ValueError, match="on_unsupervised must be 'error' or 'drop'; got 'keep'"):
        tokenize_documents(documents, tokenizer, on_unsupervised="keep")
    with pytest.raises(ValueError, match=r"max_length must be at least 2.*got 1"):
        tokenize_documents(documents, tokenizer, max_length=1)
    with pytest.raises(ValueError, match=r"num_proc must be at least 1.*got 0"):
        tokenize_documents(documents, tokenizer, num_proc=0)
    with pytest.raises(ValueError, match="turns must be 'all' or 'last'; got 'first'"):
        tokenize_documents(Dataset.from_dict({"messages": ["[]"]}), with_template(tokenizer), turns="first")


def with_template(tokenizer):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    return chatty


ASKED = {"role": "user", "content": "two"}
CALLING = (
    "{% for m in messages %}[{{ m.role }}] {{ m.tool_calls | tojson if m.tool_calls else m.content }}{{ eos_token }}"
    "{% endfor %}"
)


def calls(name, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]}


def test_nulls_that_arrow_adds_to_arguments_are_not_learned(tokenizer):
    chatty = with_template(tokenizer)
    chatty.chat_template = CALLING
    documents = Dataset.from_list([calls("weather", city="Rome"), calls("add", a=2, b=2)])
    assert documents[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "city": "Rome",
        "a": None,
        "b": None,
    }
    said = [[x for x in each["labels"] if x != -100] for each in tokenize_documents(documents, chatty).dataset]
    assert [tokenizer.decode(each).split('"arguments": ')[1] for each in said] == [
        '{"city": "Rome"}}}]<|eos|>',
        '{"a": 2, "b": 2}}}]<|eos|>',
    ]
    texts = Dataset.from_dict({"messages": [json.dumps(calls("add", a=None)["messages"])]})
    (only,) = tokenize_documents(texts, chatty).dataset
    assert '{"a": null}' in tokenizer.decode([x for x in only["labels"] if x != -100]), "JSON text says what it means"


@pytest.mark.parametrize("tool_calls", [{"name": "add"}, "add(1)", 5, ["add"], [None]])
def test_tool_calls_that_are_none(tokenizer, tmp_path, tool_calls):
    messages = [ASKED, {"role": "assistant", "content": "four", "tool_calls": tool_calls}]
    chatty = with_template(tokenizer)
    with pytest.raises(
        DataError, match=r"document 0: 'tool_calls' of message 1 \(assistant\) must be a list of objects"
    ):
        tokenize_documents(Dataset.from_dict({"messages": [json.dumps(messages)]}), chatty)
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=r"calls.jsonl:1: 'tool_calls' of message 1 .* 'name' and 'arguments'"):
        load_documents("jsonl", path)


@pytest.mark.parametrize("part", [None, 3, {"type": "text"}, {"type": "text", "text": None}])
def test_parts_that_are_none(tokenizer, part):
    messages = json.dumps([ASKED, {"role": "assistant", "content": [part]}])
    with pytest.raises(DataError, match=r"document 0: a part of the content of message 1 \(assistant\) is .* 'text'"):
        tokenize_documents(Dataset.from_dict({"messages": [messages]}), with_template(tokenizer))


def test_a_lone_surrogate_that_json_hides(tokenizer, tmp_path):
    path = tmp_path / "talk.jsonl"
    messages = [ASKED, {"role": "assistant", "content": "four\ud800"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=r"talk.jsonl:1: the messages hold a lone surrogate \('\\ud800'\).* as UTF-8"):
        tokenize_documents(load_documents("jsonl", path), with_template(tokenizer))


def test_roles_that_are_not_the_assistants_are_named(tokenizer):
    messages = [[ASKED, {"role": "gpt", "content": "four"}]]
    with pytest.raises(
        DataError, match=r"the assistant says nothing in this conversation: .* they have 'user', 'gpt';"
    ):
        tokenize_documents(Dataset.from_dict({"messages": messages}), with_template(tokenizer))


def test_messages_as_lists_or_json_text(tokenizer):
    messages = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "four"}]
    chatty = with_template(tokenizer)
    as_lists = tokenize_documents(Dataset.from_dict({"messages": [messages]}), chatty)
    as_text = tokenize_documents(Dataset.from_dict({"messages": [json.dumps(messages)], "tools": ["[]"]}), chatty)
    assert as_lists.dataset[0]["labels"] == as_text.dataset[0]["labels"]
    said = [label for label in as_text.dataset[0]["labels"] if label != -100]
    assert tokenizer.decode(said) == "four<|eos|>"
    with pytest.raises(DataError, match=r"document 0: no supervised token: the assistant says nothing.* have 'user';"):
        tokenize_documents(Dataset.from_dict({"messages": [messages[:1]]}), chatty)
    with pytest.raises(DataError, match="document 0: message 0 of 'messages' has no 'role'"):
        tokenize_documents(Dataset.from_dict({"messages": [[{"content": "two"}]]}), chatty)


def test_a_function_call_is_named_where_content_is_missing():
    call = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}
    with pytest.raises(DataError, match=r"'content' of message 1 .* rename 'function_call' to 'tool_calls'"):
        check_messages([{"role": "user", "content": "2+2?"}, call], "talk.jsonl:3")
