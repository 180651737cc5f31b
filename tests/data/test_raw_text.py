"""Plain text files as documents."""

import pytest

from packflex.data.errors import DataError
from packflex.data.raw_text import load_texts


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "two", "a.md": "one", "sub/c.txt": "three", "d.bin": "no", "e.txt": " \n"}.items():
        (tmp_path / name).write_text(text)
    assert load_texts(str(tmp_path))["text"] == ["one", "two", "three"]
    assert load_texts(str(tmp_path / "**" / "*.txt"))["text"] == ["two", "three"]
    both = load_texts([str(tmp_path / "d.bin"), str(tmp_path / "a.md")])
    assert both["text"] == ["no", "one"]
    assert both["source"][0] == str(tmp_path / "d.bin")
    assert load_texts(str(tmp_path), limit=1)["text"] == ["one"]


def test_the_standard_library():
    texts = load_texts(limit=20)
    assert len(texts) == 20
    assert all(source.endswith(".py") for source in texts["source"])


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder, and no file matches it"):
        load_texts(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="the folder holds no text file"):
        load_texts(str(tmp_path))
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"x\.txt: byte 3 is no utf-8 text; convert the file, or set data.encoding"):
        load_texts(str(tmp_path))
    assert load_texts(str(tmp_path), encoding="latin-1")["text"] == ["caf\xe9"]
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(DataError, match="all of the 1 files are empty"):
        load_texts(str(tmp_path))
