"""TokenizedStream: the documents that preparing would give, from any place on, file by file."""

import copy
import json
import logging
import re
from itertools import chain, islice

import pytest

from packflex.data.collate import PackedCollator
from packflex.data.errors import DataError
from packflex.data.sources import load_documents
from packflex.data.stream import PackedStream
from packflex.data.tokenize import tokenize_documents
from packflex.data.tokenized_stream import TokenizedStream
from packflex.data.tokenizer import train_tokenizer

SIZES = (130, 7, 70)  # more than are tokenised at once, and fewer


def record(number):
    return {"prompt": f"What is {number} plus {number}?\n", "completion": f"It is {2 * number}."}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("stream")
    number = 0
    for file, size in enumerate(SIZES):
        lines = [json.dumps(record(number + i)) for i in range(size)]
        (place / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
        number += size
    return place


@pytest.fixture(scope="module")
def tokenizer(place):
    texts = [r["prompt"] + r["completion"] for r in map(record, range(sum(SIZES)))]
    return train_tokenizer(texts, 300, place / "cache")


@pytest.fixture(scope="module")
def stream(place, tokenizer):
    return TokenizedStream("jsonl", place, tokenizer)


def test_it_gives_what_preparing_would(place, tokenizer, stream):
    prepared = tokenize_documents(load_documents("jsonl", place), tokenizer).dataset
    found = list(stream)
    assert found == list(prepared)
    assert found == list(stream), "each time the same"
    assert found[130]["source"].endswith("1.jsonl:1")


@pytest.mark.parametrize("at", [1, 5, 63, 64, 65, 129, 130, 131, 137, 138, 206, 207])
def test_it_goes_on_from_any_document(stream, at):
    whole = list(stream)
    first = copy.copy(stream)
    list(islice(iter(first), at))
    second = copy.copy(stream)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert list(second) == whole[at:]
    assert list(second) == whole, "and the next time from the start"


def test_what_is_dropped_moves_no_place(tmp_path, tokenizer, caplog):
    records = [record(i) if i % 3 else {"prompt": "Well?\n", "completion": ""} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    stream = TokenizedStream("jsonl", tmp_path / "a.jsonl", tokenizer, on_unsupervised="drop", max_length=12)
    with caplog.at_level(logging.WARNING):
        whole = list(stream)
    assert len(whole) == 66
    assert max(len(document["input_ids"]) for document in whole) == 12
    assert "34 documents without a supervised token were dropped" in caplog.text
    assert "66 documents were cut to 12 tokens" in caplog.text
    for at in (1, 40, 43, 44, 65):
        first, second = copy.copy(stream), copy.copy(stream)
        list(islice(iter(first), at))
        second.load_state_dict(first.state_dict())
        assert list(second) == whole[at:]


def test_files_are_shards(stream):
    whole = [document["source"] for document in stream]
    parts = [[document["source"] for document in stream.shard(2, index)] for index in range(2)]
    assert stream.num_shards == 3
    assert [stream.shard(2, index).num_shards for index in range(2)] == [2, 1]
    assert sorted(chain(*parts)) == sorted(whole)
    assert not set(parts[0]) & set(parts[1])


def test_packed_on_ranks_with_workers_every_document_comes_once_and_resumes(stream):
    whole = sum(len(document["input_ids"]) for document in stream)

    def batches(rank, workers, state=None, count=None):
        packed = PackedStream(
            stream, PackedCollator(64), 2, seq_len=64, num_batches=40, pool=16, lanes=4, repeat=False, rank=rank,
            world_size=2, num_workers=workers, fingerprint=stream.fingerprint,
        )  # fmt: skip
        if state is not None:
            packed.load_state_dict(state)
        return [(batch["input_ids"].tolist(), batch["packed"].num_tokens) for batch in islice(packed, count)], packed

    found = [batches(rank, 0)[0] for rank in range(2)]
    assert all(len(part) == 40 for part in found)
    assert sum(tokens for part in found for _, tokens in part) == whole
    for rank in range(2):
        begun, packed = batches(rank, 1, count=5)
        assert begun == found[rank][:5]
        state = packed.state_dict()
        assert batches(rank, 0, state)[0] == found[rank][5:]


def test_the_report_counts_what_is_in_rows(stream):
    """Over several passes, batch by batch, with and without workers, and after a resume."""

    def begin(workers, state=None):
        packed = PackedStream(
            stream, PackedCollator(64), 2, seq_len=64, num_batches=60, pool=16, num_workers=workers, lanes=2
        )
        if state is not None:
            packed.load_state_dict(state)
        return packed

    def follow(packed, expected):
        for batch in packed:
            layout = batch["packed"]
            expected["rows"] += sum(1 for row in layout.lengths if sum(row))
            expected["documents"] += layout.num_documents
            expected["tokens"] += layout.num_tokens
            assert {**packed.report(), "passes": 0} == {**expected, "passes": 0}
            yield packed.report()["passes"]

    for workers in (0, 1):
        packed, expected = begin(workers), dict.fromkeys(("rows", "documents", "tokens"), 0)
        passes = list(islice(follow(packed, expected), 45))
        assert passes == sorted(passes)
        assert passes[0] == 1 < passes[-1]
        assert list(follow(begin(1 - workers, packed.state_dict()), expected))[-1] >= passes[-1]


def test_the_fingerprint_follows_files_tokenizer_and_options(place, tokenizer, stream, tmp_path):
    other = train_tokenizer(["quite other words are in here", "and here"], 270, tmp_path)
    (tmp_path / "0.jsonl").write_text(json.dumps(record(1)) + "\n")
    streams = [
        stream,
        TokenizedStream("jsonl", place, tokenizer, max_length=20),
        TokenizedStream("jsonl", place, other),
        TokenizedStream("jsonl", place / "0.jsonl", tokenizer),
        TokenizedStream("jsonl", tmp_path / "0.jsonl", tokenizer),
    ]
    assert len({s.fingerprint for s in streams}) == 5
    assert TokenizedStream("jsonl", place, tokenizer).fingerprint == stream.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hub"}, "kind must be one of jsonl, parquet, arrow"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"on_unsupervised": "ignore"}, "on_unsupervised must be 'error' or 'drop'"),
    ],
)
def test_wrong_options(options, message, place, tokenizer):
    with pytest.raises(ValueError, match=message):
        TokenizedStream(**{"kind": "jsonl", "path": place, "tokenizer": tokenizer, **options})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "What?", "completion": ""}', "bad.jsonl:2: no supervised token: the completion is empty"),
        ('{"prompt": "What?"}', "bad.jsonl:2: .*completion"),
        ("{", "bad.jsonl:2"),
    ],
)
def test_wrong_documents_are_named_when_they_come(line, message, tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text(json.dumps(record(1)) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        list(TokenizedStream("jsonl", tmp_path / "bad.jsonl", tokenizer))


def test_conversations_without_a_template_are_named(tmp_path, tokenizer):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(talk) + "\n")
    stream = TokenizedStream("jsonl", tmp_path, tokenizer)
    for read in (lambda: list(stream), lambda: tokenize_documents(load_documents("jsonl", tmp_path), tokenizer)):
        with pytest.raises(
            DataError, match=r"a\.jsonl:2: tokenizer \S+ has no chat template, and conversations need one"
        ):
            read()


def test_no_files(tmp_path, tokenizer):
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        TokenizedStream("jsonl", tmp_path / "none", tokenizer)
