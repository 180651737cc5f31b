from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars

from packflex.data import sources
from packflex.data.errors import DataError
from packflex.data.raw_text import load_texts
from packflex.data.sources import guess_kind, load_documents, read_documents
from packflex.data.stdlib_corpus import read_stdlib

disable_progress_bars()

PAIRS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
CHAT = [
    {"role": "user", "content": "2+2?"},
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}],
    },
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "4."},
]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_jsonl_pairs_keep_order_and_name_their_lines(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", PAIRS)
    documents = load_documents("jsonl", file)
    assert documents.column_names == ["prompt", "completion", "source"]
    assert documents.to_list() == [{**pair, "source": f"{file}:{i + 1}"} for i, pair in enumerate(PAIRS)]


def test_more_records_than_a_chunk(tmp_path):
    documents = load_documents("jsonl", jsonl(tmp_path / "a.jsonl", ({"text": str(i)} for i in range(4500))))
    assert documents["text"][:] == [str(i) for i in range(4500)]


def test_other_field_names_other_fields_and_mixed_types_beside(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"q": "a", "a": "b", "id": 1}, {"q": "c", "a": "d", "id": "two", "x": {}}])
    documents = load_documents("jsonl", file, prompt_field="q", completion_field="a")
    assert documents["completion"][:] == ["b", "d"]


def test_blank_lines_byte_order_mark_crlf_and_no_last_newline(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "\xc3\xa4\\n\xe2\x80\xa8"}')
    documents = load_documents("jsonl", file)
    assert documents.to_list() == [
        {"text": "a", "source": f"{file}:1"},
        {"text": "ä\n\u2028", "source": f"{file}:4"},
    ]


def test_files_by_list_folder_glob_and_gzip(tmp_path):
    jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "notes.txt").write_text("no data")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as stream:
        stream.write('{"text": "c"}\n')
    texts = lambda path: load_documents("jsonl", path)["text"][:]  # noqa: E731
    assert texts(tmp_path) == ["a", "b", "c"]
    assert texts(str(tmp_path / "*.jsonl")) == ["a", "b"]
    assert texts([tmp_path / "b.jsonl", tmp_path / "a.jsonl"]) == ["b", "a"]


def test_limit_stops_before_what_follows(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\nnot json\n')
    assert load_documents("jsonl", file, limit=2)["text"][:] == ["a", "b"]
    with pytest.raises(ValueError, match=r"limit must be at least 1.*got 0"):
        load_documents("jsonl", file, limit=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.jsonl: the file is empty; expected one JSON object a line"),
        (b"\n \n", r"bad\.jsonl: the file is empty"),
        (b'{"text": "a"}\nnope\n', r"bad\.jsonl:2: not valid JSON \(Expecting value at column 1\); each line must be"),
        (b'{"text": "a"}\n\n{"text": "b"\n', r"bad\.jsonl:3: not valid JSON"),
        (b'[{"text": "a"}]', r"bad\.jsonl:1: the file holds a JSON array.*jq -c"),
        (b'[\n{"text": "a"}\n]', r"bad\.jsonl:1: the file holds a JSON array"),
        (b'{"text": "a"}\n"b"\n', r"bad\.jsonl:2: expected a JSON object .*; got str"),
        (
            b'{"text": "a"}\n{"txt": "b"}\n',
            r"bad\.jsonl:2: field 'text' is missing \(fields here: 'txt'\).*--text-field",
        ),
        (b'{"text": "a"}\n{"text": 7}\n', r"bad\.jsonl:2: field 'text' must be a string; got int 7"),
        (b'{"text": null}\n', r"bad\.jsonl:1: field 'text' must be a string; got null"),
        (b'{"text": "\xff"}\n', r"bad\.jsonl:1: not UTF-8 \(byte 0xff at column 11\)"),
        (b'{"text": "a"}\n{"text": "\\udc00"}\n', r"bad\.jsonl:2: 'text' holds a lone surrogate"),
        (b'{"question": "a"}\n', r"bad\.jsonl:1: expected 'messages', or 'prompt' and 'completion'.*'question'"),
        (b"[" * 100_000, r"bad\.jsonl:1: "),
        (b'{"messages": []}', r"bad\.jsonl:1: 'messages' must be a list of at least one message; got list \[\]"),
        (b'{"messages": "hi"}', r"bad\.jsonl:1: field 'messages' is a string but not JSON"),
        (b'{"messages": {"role": "user"}}', r"bad\.jsonl:1: field 'messages' must be a list; got dict"),
        (b'{"messages": ["hi"]}', r"bad\.jsonl:1: message 0 of 'messages' must be an object"),
        (b'{"messages": [{"from": "human", "value": "hi"}]}', r"message 0 .*no 'role'.*rename 'from' to 'role'"),
        (b'{"messages": [{"role": "user"}]}', r"'content' of message 0 \(user\) must be a string.*got null"),
        (b'{"messages": [{"role": "user", "content": 1}]}', r"'content' of message 0 \(user\).*got int 1"),
    ],
)
def test_bad_lines_are_named_in_one_line(tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_documents("jsonl", file)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_bad_gzip(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read \(Not a gzipped file"):
        load_documents("jsonl", tmp_path / "a.jsonl.gz")


def test_wrong_paths(tmp_path):
    jsonl(tmp_path / "train.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file or folder; the folder holds train\.jsonl"):
        load_documents("jsonl", tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"\*\.jsonnl: no file matches this pattern"):
        load_documents("jsonl", str(tmp_path / "*.jsonnl"))
    with pytest.raises(DataError, match=r"the folder holds no file ending in \.parquet"):
        load_documents("parquet", tmp_path)
    with pytest.raises(DataError, match="data of kind 'jsonl' needs a path"):
        load_documents("jsonl")
    with pytest.raises(DataError, match="list of input paths is empty"):
        load_documents("jsonl", [])
    with pytest.raises(ValueError, match=r"kind must be one of stdlib, .*; got 'csv'"):
        load_documents("csv", tmp_path)
    with pytest.raises(ValueError, match=r"format must be one of auto, .*; got 'chatml'"):
        load_documents("jsonl", tmp_path, format="chatml")


def test_messages_and_tools_keep_their_own_keys(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    other = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": tools}, {"messages": other}])
    for kind in ("jsonl", "chat"):
        documents = load_documents(kind, file)
        assert documents.column_names == ["messages", "tools", "source"]
        assert [json.loads(m) for m in documents["messages"]] == [CHAT, other]
        assert [json.loads(t) for t in documents["tools"]] == [tools, []]


def test_forms_are_preferred_in_order_and_can_be_asked_for(tmp_path):
    record = {"messages": CHAT, "prompt": "p", "completion": "c", "text": "t"}
    file = jsonl(tmp_path / "a.jsonl", [record])
    assert "messages" in load_documents("jsonl", file).column_names
    assert load_documents("jsonl", file, format="text").column_names == ["text", "source"]
    assert load_documents("jsonl", file, format="prompt")["completion"][0] == "c"


def test_parquet_with_rows_named_from_zero(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "n": [1, 2]}), tmp_path / "a.parquet")
    documents = load_documents("parquet", tmp_path / "a.parquet")
    assert documents.to_list()[1] == {"prompt": "b", "completion": "d", "source": f"{tmp_path}/a.parquet:row 1"}


def test_parquet_messages_lose_the_nulls_that_arrow_adds(tmp_path):
    other = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}, {"messages": other}]), tmp_path / "a.parquet")
    documents = load_documents("parquet", tmp_path)
    first, second = (json.loads(messages) for messages in documents["messages"])
    assert second == other
    assert "content" not in first[1]
    assert first[1]["tool_calls"][0]["function"]["arguments"] == {"a": 2}


def test_bad_parquet(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file"):
        load_documents("parquet", tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["a", None], "completion": ["c", "d"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet:row 1: field 'prompt' must be a string; got null"):
        load_documents("parquet", tmp_path / "b.parquet")
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet: none of the columns 'text', .*it has 'question'"):
        load_documents("parquet", tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: the file has no rows"):
        load_documents("parquet", tmp_path / "d.parquet")


def test_files_that_are_cut_short_are_told_from_those_of_another_kind(tmp_path):
    table = pa.table({"text": [str(i) for i in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for kind, name in (("parquet", "a Parquet file"), ("arrow", "an Arrow file")):
        file = tmp_path / f"a.{kind}"
        content = file.read_bytes()
        for size in (len(content) - 1, len(content) // 2, 10):
            file.write_bytes(content[:size])
            with pytest.raises(
                DataError, match=rf"a\.{kind}: {name} that is cut short or damaged .*; copy or write it"
            ):
                load_documents(kind, file)
        for other in (b"", b"PK" + content[2:-1], b'{"text": "a"}\n'):
            file.write_bytes(other)
            with pytest.raises(DataError, match=rf"a\.{kind}: not {name} \(.*\); check the file or its suffix"):
                load_documents(kind, file)


def test_arrow_file_stream_and_saved_data_set(tmp_path):
    table = pa.table({"text": ["a", "b"]})
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("file.arrow", "stream.arrow", "saved"):
        documents = load_documents("arrow", tmp_path / name)
        assert documents["text"][:] == ["a", "b"]
        assert documents["source"][1] == f"{tmp_path / name}:row 1"
    (tmp_path / "bad.arrow").write_text("nonsense")
    with pytest.raises(DataError, match=r"bad\.arrow: not an Arrow file"):
        load_documents("arrow", tmp_path / "bad.arrow")
    DatasetDict({"train": Dataset(table), "test": Dataset(table)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"splits: holds the splits train, test; give the folder of one of them"):
        load_documents("arrow", tmp_path / "splits")


def arrow_stream(path, batches=4):
    """A stream of ten rows a batch, and where each batch ends."""
    schema, ends = pa.schema({"text": pa.string()}), []
    with path.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in range(batches):
            writer.write_batch(pa.record_batch({"text": [f"{batch} {i}" for i in range(10)]}, schema))
            ends.append(file.tell())
    return ends


def test_an_arrow_stream_that_is_cut_anywhere_is_refused(tmp_path):
    ends = arrow_stream(tmp_path / "whole.arrow")
    content = (tmp_path / "whole.arrow").read_bytes()
    assert len(load_documents("arrow", tmp_path / "whole.arrow")) == 40
    cut = tmp_path / "cut.arrow"
    for end, rows in ((ends[1], 20), (ends[3], 40)):
        cut.write_bytes(content[:end])
        with pytest.raises(DataError, match=rf"cut\.arrow: cut short after {rows} rows: .*write the file again"):
            load_documents("arrow", cut)
    for end in (ends[1] - 8, len(content) - 4, len(content) - 1):
        cut.write_bytes(content[:end])
        with pytest.raises(
            DataError, match=r"cut\.arrow: an Arrow file that is cut short or damaged \(.*; copy or write"
        ):
            load_documents("arrow", cut)
    cut.write_bytes(content[:-8] + b"\0\0\0\0")
    assert len(load_documents("arrow", cut)) == 40, "the end that Arrow wrote before 0.15"
    arrow_stream(tmp_path / "none.arrow", batches=0)
    with pytest.raises(DataError, match=r"none\.arrow: the file has no rows"):
        load_documents("arrow", tmp_path / "none.arrow")


def test_a_saved_data_set_that_is_cut_between_batches_is_refused(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("data-*.arrow")
    ends = arrow_stream(file)
    assert len(load_documents("arrow", tmp_path / "saved")) == 40
    file.write_bytes(file.read_bytes()[: ends[1]])
    with pytest.raises(DataError, match=rf"{file.name}: cut short after 20 rows"):
        load_documents("arrow", tmp_path / "saved")


def test_gsm8k_from_a_file(tmp_path):
    file = jsonl(tmp_path / "train.jsonl", [{"question": "1+1?", "answer": "1+1 = 2\n#### 2"}])
    assert load_documents("gsm8k", file).to_list() == [
        {"prompt": "Question: 1+1?\nAnswer:\n", "completion": "1+1 = 2\n#### 2", "source": f"{file}:1"}
    ]
    jsonl(file, [{"question": "1+1?"}])
    with pytest.raises(DataError, match=r"train\.jsonl:1: field 'answer' is missing"):
        load_documents("gsm8k", file)


def test_stdlib_splits_do_not_share_a_document(tmp_path, monkeypatch):
    for i in range(200):
        (tmp_path / f"module_{i}.py").write_text(f'def f{i}():\n    """Number {i}."""\n    return {i}\n')
    small = read_stdlib(tmp_path)
    monkeypatch.setattr(sources, "_stdlib", lambda: small)
    train, heldout = (
        load_documents("stdlib", split=split, heldout_percent=20)["source"][:] for split in ("train", "heldout")
    )
    assert sorted(train + heldout) == sorted(f"stdlib:module_{i}:f{i}" for i in range(200))
    assert 20 < len(heldout) < 60
    first = load_documents("stdlib", split="all", limit=1).to_list()
    assert first == [
        {"prompt": 'def f0():\n    """Number 0."""\n', "completion": "    return 0\n", "source": "stdlib:module_0:f0"}
    ]
    with pytest.raises(DataError, match="this split holds no document; choose another split or a larger heldout"):
        load_documents("stdlib", split="heldout", heldout_percent=0)
    with pytest.raises(ValueError, match="split of 'stdlib' must be one of train, heldout, all; got 'test'"):
        load_documents("stdlib", split="test")


def test_kinds_are_guessed_from_paths(tmp_path):
    jsonl(tmp_path / "a.jsonl", PAIRS)
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    assert guess_kind("x.jsonl") == guess_kind("x.jsonl.gz") == guess_kind(tmp_path) == "jsonl"
    assert guess_kind(["a.parquet", "b.parquet"]) == "parquet"
    assert guess_kind(tmp_path / "saved") == guess_kind("x.arrow") == "arrow"
    assert guess_kind("openai/gsm8k") == "hub"
    assert guess_kind("wikitext") == guess_kind("org/data.v2") == "hub"
    assert guess_kind("stdlib") == "stdlib"
    with pytest.raises(DataError, match=r"train\.csv: no such file or folder"):
        guess_kind("train.csv")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of file; expected \.jsonl"):
        guess_kind(tmp_path / "a.csv")
    with pytest.raises(DataError, match="inputs of one kind are needed at a time; got jsonl, parquet"):
        guess_kind(["a.jsonl", "b.parquet"])
    with pytest.raises(DataError, match=r"\./nowhere: no such file or folder"):
        guess_kind("./nowhere")


def folder_of(path, *names):
    """A folder of files with a document each, as their names say; of other names, with a word."""
    path.mkdir()
    for name in names:
        file = path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": [name]}), file)
        elif name.endswith(".gz"):
            file.write_bytes(gzip.compress(json.dumps({"text": name}).encode()))
        else:
            file.write_text(json.dumps({"text": name}) if "json" in name.lower() else "word")
    return path


@pytest.mark.parametrize(
    ("names", "shown", "pattern"),
    [
        (("a.jsonl", "b.parquet"), "a.jsonl, b.parquet", "*.parquet"),
        (("meta.json", "b.parquet"), "b.parquet, meta.json", "*.parquet"),
        (("a.jsonl", "b.jsonl", "meta.json", "README.md"), "a.jsonl, meta.json", "*.jsonl"),
        (("a.jsonl.gz", "meta.json"), "a.jsonl.gz, meta.json", "*.jsonl.gz"),
    ],
)
@pytest.mark.parametrize("folder", ["data", "data[1]", "data.jsonl"])
def test_a_folder_of_several_kinds_is_refused_with_a_pattern_that_reads_one(tmp_path, names, shown, pattern, folder):
    folder = folder_of(tmp_path / folder, *names)
    with pytest.raises(
        DataError, match=re.escape(f"several kinds ({shown}), and one kind is read at a time")
    ) as caught:
        guess_kind(folder)
    with pytest.raises(DataError, match="several kinds"):
        load_documents("chat", folder)
    chosen = re.search("pattern such as '(.*)'", str(caught.value))[1]
    assert chosen.endswith(pattern)
    texts = load_documents(guess_kind(chosen), chosen)["text"][:]
    assert texts == [name for name in sorted(names) if name.endswith(pattern[1:])]


def test_a_kind_that_is_named_chooses_its_files(tmp_path):
    folder = folder_of(tmp_path / "data", "meta.json", "b.parquet")
    assert load_documents("parquet", folder)["text"][:] == ["b.parquet"]
    (folder / "c.jsonl").write_text('{"text": "c"}')
    with pytest.raises(DataError, match=r"several kinds \(c\.jsonl, meta\.json\)"):
        load_documents("jsonl", folder)


@pytest.mark.parametrize("name", ["b.json.gz", "b.JSONL", "b.jsonl.zst", "b.parquet.gz", "b.Parquet", "b.ndjson.xz"])
def test_files_that_are_not_read_alone_are_not_passed_over_beside_others(tmp_path, name):
    for other in ([], ["a.jsonl"]):
        folder = folder_of(tmp_path / f"data{len(other)}", *other, name)
        for path in (folder, folder / name):
            with pytest.raises(DataError, match=rf"{re.escape(name)}: unknown kind of file; expected \.jsonl"):
                guess_kind(path)
    if "parquet" not in name.lower():
        with pytest.raises(
            DataError, match=r"unpack or rename it, or choose by a pattern such as '.*/data1/\*\.jsonl'"
        ):
            load_documents("jsonl", folder)


def test_what_lies_beside_data_is_passed_over(tmp_path):
    beside = ["README.md", "README.txt", "LICENSE.txt", ".gitattributes", "dataset_infos.json", "_SUCCESS", "a.csv"]
    for kind, name in (("jsonl", "a.jsonl"), ("parquet", "a.parquet")):
        folder = folder_of(tmp_path / kind, name, *beside)
        (folder / "below").mkdir()
        assert guess_kind(folder) == kind
        assert load_documents(kind, folder)["text"][:] == [name]
    with pytest.raises(DataError, match=r"the folder holds no \.jsonl, \.parquet or \.arrow file"):
        guess_kind(folder_of(tmp_path / "none", *beside))


@pytest.mark.parametrize("name", ["data-00000-of-00001.parquet", "data-00000-of-00001.arrow"])
def test_a_packed_data_set_is_no_input(tmp_path, name):
    folder = folder_of(tmp_path / "packed", name)
    (folder / "manifest.json").write_text('{"manifest_version": 2}')
    for read in (guess_kind, lambda path: load_documents(name.rpartition(".")[2], path)):
        with pytest.raises(
            DataError, match=r"packed: holds a packed data set, .*data=packed data\.path=.*, or give the"
        ):
            read(folder)
    (folder / "manifest.json").write_text('{"text": "of something else"}')
    with pytest.raises(DataError, match=r"several kinds|no file ending in"):
        guess_kind(folder)


@pytest.mark.parametrize("entry", ["", " ", "\n"])
def test_an_input_without_a_name_is_not_the_current_folder(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(folder_of(tmp_path / "here", "a.jsonl", "a.txt"))
    shown = "blank" if entry else "empty"
    for read in (guess_kind, partial(load_documents, "jsonl"), partial(load_documents, "chat"), load_texts):
        for path in (entry, ["a.jsonl", entry]):
            with pytest.raises(DataError, match=f"the name of an input is {shown}; give a file, a folder or a glob"):
                read(path)


def test_a_link_to_a_file_that_is_gone_is_not_passed_over(tmp_path):
    folder = folder_of(tmp_path / "data", "a.jsonl")
    (folder / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for path in (folder, str(folder / "*.jsonl")):
        with pytest.raises(DataError, match=r"b\.jsonl: cannot be read \(.*No such file"):
            load_documents("jsonl", path)


def test_a_pattern_that_tells_no_kind(tmp_path):
    folder = folder_of(tmp_path / "data", "a.jsonl")
    with pytest.raises(DataError, match=r"\*: the pattern tells no kind of file; let it end in \.jsonl"):
        guess_kind(str(folder / "*"))


@pytest.mark.parametrize(
    ("name", "sibling"), [("run[12]", "run1"), ("run*", "run1"), ("run?", "run1"), ("a [b]", "a b")]
)
def test_a_folder_named_like_a_pattern_is_read_and_no_other(tmp_path, monkeypatch, name, sibling):
    for folder in (sibling, name):
        folder_of(tmp_path / folder, "x.jsonl", "x.txt")
        (tmp_path / folder / "x.jsonl").write_text(json.dumps({"text": folder}))
        (tmp_path / folder / "x.txt").write_text(folder)
        Dataset.from_dict({"text": [folder]}).save_to_disk(tmp_path / folder / "saved")
    monkeypatch.chdir(tmp_path)
    for base in (tmp_path / name, name):
        for path in (base, f"{base}/x.jsonl", f"{base}/*.jsonl", f"{base}/**/x*"):
            assert load_documents("jsonl", path, limit=1)["text"][:] == [name]
        assert load_documents("arrow", f"{base}/saved")["text"][:] == [name]
        for path in (str(base), f"{base}/x.txt", f"{base}/*.txt"):
            assert load_texts(path)["text"][:] == [name]
    assert load_texts([tmp_path / name / "x.txt"])["text"][:] == [name]
    both = load_documents("jsonl", "[ra]*/x.jsonl")["text"][:]
    assert sorted(both) == sorted([name, sibling]), "a pattern all the same where no such folder is there"


def test_a_pattern_that_is_a_folder_too_matches_as_one_where_the_folder_has_nothing(tmp_path):
    (tmp_path / "run[1]").mkdir()
    folder_of(tmp_path / "run1", "x.jsonl")
    assert len(load_documents("jsonl", f"{tmp_path}/run[1]/*.jsonl")) == 1


def test_hidden_files_are_passed_over(tmp_path):
    """Locks of an editor, and what file systems keep beside files."""
    folder = folder_of(tmp_path / "data", "a.jsonl")
    (folder / ".#a.jsonl").symlink_to("someone@somewhere.1234")
    (folder / "._a.jsonl").write_bytes(b"\0\5\x16\7")
    (folder / ".meta.json").write_text("{}")
    assert guess_kind(str(folder)) == "jsonl"
    assert len(load_documents("jsonl", folder)) == 1


def test_hub_that_cannot_be_reached_gives_one_line():
    script = (
        "from packflex.data.sources import load_documents\n"
        "from packflex.data.errors import DataError\n"
        "try:\n    load_documents('hub', 'packflex-tests/no-such-data')\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.startswith("packflex-tests/no-such-data: the Hugging Face hub cannot be reached")
    assert out.stdout.count("\n") == 1


def test_hub_records_go_through_the_same_checks(monkeypatch):
    import datasets

    def fake(name, config, split):
        assert (name, config, split) == ("some/data", "main", "train[:2]")
        return Dataset.from_dict({"question": ["a", "b"], "answer": ["c", None], "idx": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    options = {"config": "main", "split": "train[:2]", "prompt_field": "question", "completion_field": "answer"}
    with pytest.raises(DataError, match=r"some/data:row 1: field 'answer' must be a string; got null"):
        load_documents("hub", "some/data", **options)
    assert load_documents("hub", "some/data", limit=1, **options)["completion"][:] == ["c"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ValueError("Unknown split x")))
    with pytest.raises(DataError, match=r"some/data: .*split='x' \(Unknown split x\); check the names"):
        load_documents("hub", "some/data", split="x")


TWICE = [{"id": i, "text": "t"} for i in (1, 2, None, 1, 3, None, 2, 1)]


def test_ids_that_come_twice_are_reported_by_default(tmp_path, caplog):
    file = jsonl(tmp_path / "a.jsonl", TWICE)
    assert len(load_documents("jsonl", file)) == 8
    assert re.search(
        r"3 records have an id that came before and are kept; the first is .*a\.jsonl:4: 'id' is 1, as in "
        r".*a\.jsonl:1; remove one, keep the first with on_duplicate='drop'",
        caplog.text,
    )
    caplog.clear()
    assert len(load_documents("jsonl", file, limit=3)) == 3
    assert len(load_documents("jsonl", file, on_duplicate="keep")) == 8
    jsonl(file, [{"text": "a"}, {"text": "a"}, {"id": float("nan"), "text": "b"}, {"id": float("nan"), "text": "c"}])
    assert len(load_documents("jsonl", file)) == 4
    assert not caplog.records, "none of these has an id that came before"
    jsonl(file, [{"uid": "x", "text": "a"}, {"uid": "x", "text": "a"}])
    load_documents("jsonl", file, id_field="uid")
    assert "1 records have an id that came before" in caplog.text


@pytest.mark.parametrize("options", [{"on_duplicate": "error"}, {"on_duplicate": "drop"}, {}])
def test_an_id_field_that_no_record_has_is_refused(tmp_path, options):
    file = jsonl(tmp_path / "a.jsonl", TWICE)
    with pytest.raises(DataError, match=r"none of the 8 records has the field 'idd', .*id_field .--id-field."):
        load_documents("jsonl", file, id_field="idd", **options)
    with pytest.raises(DataError, match="none of the 2 records has the field 'idd'"):
        load_documents("jsonl", file, id_field="idd", limit=2, **options)
    with pytest.raises(ValueError, match="kind 'stdlib' have no ids"):
        load_documents("stdlib", id_field="idd", **options)


@pytest.mark.parametrize("on_duplicate", ["error", "drop"])
def test_ids_that_are_nan_are_refused_where_ids_count(tmp_path, on_duplicate):
    file = jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": "a"}, *[{"id": float("nan"), "text": "b"}] * 2])
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'id' is NaN, which names no record; give it an id, or null"):
        load_documents("jsonl", file, on_duplicate=on_duplicate)
    jsonl(file, [{"id": [float("nan")], "text": "b"}] * 2)  # unlike itself, and the same text
    if on_duplicate == "error":
        with pytest.raises(DataError, match=r"a\.jsonl:2: 'id' is \[nan\], as in .*a\.jsonl:1; remove one"):
            load_documents("jsonl", file, on_duplicate=on_duplicate)
    else:
        assert len(load_documents("jsonl", file, on_duplicate=on_duplicate)) == 1


def test_limit_counts_records_that_are_kept(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [*TWICE, {"id": 9}])
    ids = [d["source"].rpartition(":")[2] for d in read_documents("jsonl", file, on_duplicate="drop", limit=5)]
    assert ids == ["1", "2", "3", "5", "6"]


def test_a_text_that_is_too_long_for_arrow_is_named(tmp_path, monkeypatch):
    file = jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "\u00e4" * 60}, {"text": "b"}])
    monkeypatch.setattr(sources, "_MAX_TEXT_BYTES", 120)
    assert len(load_documents("jsonl", file)) == 3
    monkeypatch.setattr(sources, "_MAX_TEXT_BYTES", 119)
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'text' is 120 bytes long, and a text may have 119; cut it into"):
        load_documents("jsonl", file)


def test_compressed_lines_that_end_too_early(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(30).hex().encode() for _ in range(2000))
    whole = gzip.compress(lines)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"a\.jsonl\.gz:\d+: cannot be read on after [\d,]+ lines \(.*\), so the file is cut sh"
    ):
        load_documents("jsonl", file)
