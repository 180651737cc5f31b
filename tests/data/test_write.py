from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars

import packflex
from packflex.data import write
from packflex.data.errors import DataError
from packflex.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from packflex.data.write import documents_fingerprint, load_packed, read_manifest, read_tables, write_packed

disable_progress_bars()

ROWS = [
    {"input_ids": [i, i + 1, i + 2, i], "labels": [-100, i + 1, -100, i], "lengths": [3, 1] if i % 2 else [4]}
    for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["some text to learn from"] * 4, 270, tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def write_rows(output, tokenizer, rows=ROWS, **options):
    return write_packed(
        Dataset.from_list(rows),
        output,
        **{
            "tokenizer": tokenizer,
            "seq_len": 5,
            "strategy": "best_fit",
            "overflow": "split",
            "seed": 3,
            "sources": ["train.jsonl"],
            "source_fingerprint": "ab" * 32,
            "document_format": "prompt",
            "counts": {"read": 60},
            **options,
        },
    )


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
@pytest.mark.parametrize("shard_bytes", [2**29, 400])
def test_what_is_written_is_read(tmp_path, tokenizer, monkeypatch, file_format, shard_bytes):
    monkeypatch.setattr(write, "_SHARD_BYTES", shard_bytes)
    manifest = write_rows(tmp_path / "out", tokenizer, file_format=file_format)
    data = load_packed(tmp_path / "out", tokenizer)
    assert data.dataset.to_list() == ROWS
    assert data.manifest == manifest == read_manifest(tmp_path / "out")
    assert [row for table in read_tables(tmp_path / "out", rows=7) for row in table.to_pylist()] == ROWS
    assert next(read_tables(tmp_path / "out", ["lengths"])).column_names == ["lengths"]
    assert (len(manifest.files) == 1) == (shard_bytes == 2**29)
    assert [*sorted(manifest.files), "manifest.json"] == sorted(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("name", "sibling"),
    [
        ("run[12]", "run1"),
        ("run*", "run1"),
        ("run?", "run1"),
        ("a [b]", "a b"),
        ("[!a]", "b"),
        ("{a,b}", "a"),
        ("**", "a"),
        ("a b", "a"),
        (".a", "a"),
        ("100%[", "100"),
    ],
)
def test_a_folder_named_like_a_pattern_is_read_and_no_other(
    tmp_path, tokenizer, monkeypatch, name, sibling, file_format
):
    write_rows(tmp_path / sibling / "out", tokenizer, rows=ROWS[5:], file_format=file_format)
    write_rows(tmp_path / name / "out", tokenizer, rows=ROWS[:35], file_format=file_format)
    assert load_packed(tmp_path / name / "out", tokenizer).dataset.to_list() == ROWS[:35]
    monkeypatch.chdir(tmp_path / name)
    assert load_packed("out", tokenizer).dataset.to_list() == ROWS[:35]


def test_a_folder_that_would_be_taken_for_an_archive(tmp_path, tokenizer, monkeypatch):
    write_rows(tmp_path / "a::b", tokenizer)
    with pytest.raises(DataError, match=r"a::b: `datasets` takes '::' .*; rename the folder, or pack with --file-form"):
        load_packed(tmp_path / "a::b")
    monkeypatch.chdir(tmp_path / "a::b")
    write_rows("out", tokenizer)
    with pytest.raises(DataError, match=r"out: `datasets` takes '::' "):
        load_packed("out")
    write_rows(tmp_path / "c::d", tokenizer, file_format="arrow")
    assert load_packed(tmp_path / "c::d").dataset.to_list() == ROWS


def test_manifest_says_how_it_was_made(tmp_path, tokenizer):
    manifest = asdict(write_rows(tmp_path / "deep" / "out", tokenizer))
    assert manifest.pop("files").keys() == {"data-00000-of-00001.parquet"}
    assert len(manifest.pop("fingerprint")) == 64
    shard = (tmp_path / "deep" / "out" / "data-00000-of-00001.parquet").read_bytes()
    assert manifest.pop("checksums") == {"data-00000-of-00001.parquet": hashlib.sha256(shard).hexdigest()}
    assert manifest == {
        "manifest_version": 2,
        "packflex_version": packflex.__version__,
        "file_format": "parquet",
        "rows": 40,
        "documents": 60,
        "tokens": 160,
        "supervised_tokens": 80,
        "seq_len": 5,
        "efficiency": 0.8,
        "strategy": "best_fit",
        "overflow": "split",
        "seed": 3,
        "sources": ["train.jsonl"],
        "source_fingerprint": "ab" * 32,
        "document_format": "prompt",
        "tokenizer": tokenizer.name_or_path,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "chat_template_fingerprint": None,
        "options": {},
        "counts": {"read": 60},
    }


def test_another_tokenizer_is_refused_by_both_names(tmp_path, tokenizer):
    write_rows(tmp_path / "out", tokenizer)
    other = train_tokenizer(["quite another text"] * 4, 265, tmp_path)
    with pytest.raises(DataError, match="packed with the tokenizer") as caught:
        load_packed(tmp_path / "out", other)
    assert tokenizer.name_or_path in str(caught.value)
    assert other.name_or_path in str(caught.value)
    assert len(load_packed(tmp_path / "out").dataset) == 40


def test_a_failed_write_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(write.os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match=r"out: the disk is full \(.*No space left on device\); free some space"):
        write_rows(tmp_path / "out", tokenizer)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_disk_that_is_full_when_rows_are_replaced_loses_neither(tmp_path, tokenizer, monkeypatch, at):
    """At the rename of what was there, of what takes its place, or of what is to be removed then."""
    out, calls = tmp_path / "out", []
    write_rows(out, tokenizer, seed=3)

    def full(old, new, real=os.rename):
        calls.append(new)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        return real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr("packflex.data.write.os.rename", full)
        with pytest.raises(DataError, match="out: the disk is full"):
            write_rows(out, tokenizer, seed=4, overwrite=True)
    assert read_manifest(out).seed == (3 if at < 3 else 4)
    load_packed(out)
    assert write_rows(out, tokenizer, seed=5, overwrite=True).seed == 5
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "hf"}


@pytest.mark.parametrize(("owner", "function"), [(write, "shard_writer"), (write.Path, "write_text")])
def test_a_full_disk_under_rows_and_manifest(tmp_path, tokenizer, monkeypatch, owner, function):
    monkeypatch.setattr(owner, function, lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="out: the disk is full"):
        write_rows(tmp_path / "out", tokenizer)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


def test_existing_folders_are_replaced_only_on_request_and_only_packed_ones(tmp_path, tokenizer):
    write_rows(tmp_path / "out", tokenizer)
    with pytest.raises(DataError, match=r"out: is there already; choose another output.*--overwrite"):
        write_rows(tmp_path / "out", tokenizer)
    write_rows(tmp_path / "out", tokenizer, rows=ROWS[:3], overwrite=True)
    assert len(load_packed(tmp_path / "out").dataset) == 3
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="precious: is there and is no packed data set, so it is not replaced"):
        write_rows(tmp_path / "precious", tokenizer, overwrite=True)


@pytest.mark.parametrize("output", ["", " ", ".", "..", "/"])
def test_an_output_without_a_name(tmp_path, tokenizer, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"the output '{output}' is no name of a folder to make; give one"):
        write_rows(output, tokenizer, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_incomplete_and_damaged_data_sets_are_refused(tmp_path, tokenizer):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="out: no such folder"):
        load_packed(out)
    write_rows(out, tokenizer)
    shard = next(out.glob("*.parquet"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(DataError, match=rf"parquet: has {len(content) - 10:,} bytes, and the manifest says"):
        load_packed(out)
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(DataError, match="the shards cannot be read"):
        load_packed(out, verify=False)
    shard.unlink()
    with pytest.raises(DataError, match="parquet: is missing, and the manifest says"):
        load_packed(out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "manifest_version": 3}))
    with pytest.raises(DataError, match=r"as version 3, and this packflex reads up to 2; upgrade"):
        load_packed(out)
    del manifest["seq_len"]
    (out / "manifest.json").write_text(json.dumps({**manifest, "sequence": 1}))
    with pytest.raises(DataError, match=r"missing \['seq_len'\], unknown \['sequence'\]"):
        load_packed(out)
    (out / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="not a manifest of packflex"):
        load_packed(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: not valid JSON"):
        load_packed(out)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json in it.*cut short"):
        load_packed(out)


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
def test_a_shard_that_was_changed_is_refused(tmp_path, tokenizer, file_format):
    """Of the same size: an Arrow shard would load with other tokens in some row."""
    out = tmp_path / "out"
    manifest = write_rows(out, tokenizer, file_format=file_format)
    shard = out / next(iter(manifest.files))
    content = bytearray(shard.read_bytes())
    at = content.index(np.array(ROWS[7]["input_ids"], np.int32).tobytes()) if file_format == "arrow" else 40
    content[at : at + 4] = bytes(4)
    shard.write_bytes(content)
    if file_format == "arrow":
        assert len(load_packed(out, verify=False).dataset) == 40
    with pytest.raises(DataError, match=rf"data-00000-of-00001\.{file_format}: not as it was written .*; copy or pack"):
        load_packed(out)


def test_a_manifest_of_version_1_is_read(tmp_path, tokenizer):
    out = tmp_path / "out"
    write_rows(out, tokenizer)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["checksums"]
    (out / "manifest.json").write_text(json.dumps({**manifest, "manifest_version": 1}))
    assert load_packed(out, tokenizer).manifest.checksums == {}
    assert len(load_packed(out).dataset) == 40


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("files", None, r"files must be dict\[str, int\]; it is null"),
        ("files", {"a": "b"}, r'files must be dict\[str, int\]; it is {"a": "b"}'),
        ("seq_len", "abc", 'seq_len must be int; it is "abc"'),
        ("rows", True, "rows must be int; it is true"),
        ("efficiency", [], r"efficiency must be float; it is \[\]"),
        ("sources", [1], r"sources must be list\[str\]; it is \[1\]"),
        ("chat_template_fingerprint", 3, r"chat_template_fingerprint must be str \| None; it is 3"),
    ],
)
def test_fields_of_other_types_are_named(tmp_path, tokenizer, field, value, message):
    write_rows(tmp_path / "out", tokenizer)
    file = tmp_path / "out" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(
        DataError, match=rf"manifest\.json: {message}: the manifest was changed or damaged; copy or pack"
    ):
        load_packed(tmp_path / "out")


def test_the_tokenizer_is_found_from_another_folder(tmp_path, tokenizer, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tok")
    monkeypatch.chdir(tmp_path)
    manifest = write_rows(tmp_path / "out", load_tokenizer("tok"))
    assert manifest.tokenizer == str(tmp_path / "tok")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    load_packed(tmp_path / "out", load_tokenizer(read_manifest(tmp_path / "out").tokenizer))


def test_fewer_rows_than_the_manifest_says(tmp_path, tokenizer):
    out = tmp_path / "out"
    write_rows(out, tokenizer)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "rows": 41}))
    with pytest.raises(DataError, match="the shards hold 40 rows, and the manifest says 41"):
        load_packed(out)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_kill_while_rows_are_replaced_loses_neither(tmp_path, tokenizer, monkeypatch, at):
    out = tmp_path / "out"
    first = write_rows(out, tokenizer)
    calls = []

    class KilledError(BaseException):
        pass

    def counted(old, new, real=os.rename):
        calls.append(new)
        if len(calls) >= at:
            raise KilledError
        return real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr("packflex.data.write.os.rename", counted)
        with pytest.raises(KilledError):
            write_rows(out, tokenizer, seed=4, overwrite=True)
    with pytest.raises(DataError, match="is there already"):
        write_rows(out, tokenizer, seed=5)
    assert read_manifest(out).seed == (first.seed if at < 3 else 4)
    load_packed(out)  # whole, by its checksums
    assert write_rows(out, tokenizer, seed=5, overwrite=True).seed == 5
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "hf"}


def test_what_cannot_be_written(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="file_format must be 'parquet' or 'arrow'; got 'csv'"):
        write_rows(tmp_path / "out", tokenizer, file_format="csv")
    with pytest.raises(ValueError, match=r"row 0: 1 documents of 4 tokens .* seq_len=3"):
        write_rows(tmp_path / "out", tokenizer, seq_len=3)
    with pytest.raises(DataError, match="no packed row to write"):
        write_packed(
            Dataset.from_dict({"input_ids": [], "labels": [], "lengths": []}),
            tmp_path / "out",
            tokenizer=tokenizer,
            seq_len=5,
            strategy="best_fit",
            overflow="split",
            seed=0,
            sources=[],
            source_fingerprint="",
            document_format="text",
        )


def test_documents_fingerprint_is_of_texts_in_order_only():
    documents = Dataset.from_dict({"text": ["a", "b"], "source": ["x:1", "x:2"]})
    moved = Dataset.from_dict({"text": ["a", "b"], "source": ["y:1", "y:2"]})
    assert documents_fingerprint(documents) == documents_fingerprint(moved)
    assert documents_fingerprint(documents) != documents_fingerprint(Dataset.from_dict({"text": ["b", "a"]}))
    assert documents_fingerprint(documents) != documents_fingerprint(Dataset.from_dict({"text": ["ab", ""]}))


def test_a_full_disk_under_the_cache_is_named(monkeypatch, tmp_path, tokenizer):
    """What `datasets` says of it hides the cause."""
    import errno

    import datasets

    write_rows(tmp_path / "out", tokenizer)

    def full(*args, **kwargs):
        cause = OSError(errno.ENOSPC, "No space left on device")
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from cause

    monkeypatch.setattr(datasets.Dataset, "from_parquet", full)
    with pytest.raises(DataError, match=r"hf: the disk is full .* or name another with HF_DATASETS_CACHE"):
        load_packed(tmp_path / "out")
