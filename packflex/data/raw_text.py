"""Plain text files as documents: one file, one document, for continued pre-training."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packflex.data.errors import DataError
from packflex.data.readers import matching, named

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".txt", ".md", ".rst", ".py")
_MOST_MODULES = 200  # of the standard library: enough for a first run, read in a second


def load_texts(path: str | Sequence[str] | None = None, limit: int | None = None, encoding: str = "utf-8") -> Dataset:
    """Documents from text files, with columns `text` and `source` (the file's path).

    Args:
        path: a file, a folder (searched with its subfolders for .txt, .md, .rst and .py), a glob, or a list of them;
            None for modules of the interpreter's own standard library, which every machine has.
        limit: the first so many files, by path.
        encoding: of the files.

    Raises:
        DataError: nothing found, a file that is not text in this encoding; empty files are left out, and all of them
            empty is an error.
    """
    from datasets import Dataset

    files = list(_files(path))[:limit]
    texts, sources = [], []
    for file in files:
        try:
            text = file.read_text(encoding=encoding)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}: byte {error.start} is no {encoding} text; convert the file, or set data.encoding"
            ) from error
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from error
        if text.strip():
            texts.append(text)
            sources.append(str(file))
    if not texts:
        raise DataError(f"{path}: all of the {len(files)} files are empty")
    return Dataset.from_dict({"text": texts, "source": sources})


def _files(path: str | Sequence[str] | None) -> Iterator[Path]:
    if path is None:
        modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        yield from modules[:_MOST_MODULES]
        return
    for entry in [path] if isinstance(path, str) else path:
        found = Path(named(str(entry))).expanduser()
        if found.is_dir():
            inside = sorted(file for file in found.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not inside:
                raise DataError(f"{entry}: the folder holds no text file ({', '.join(SUFFIXES)})")
            yield from inside
        elif found.is_file():
            yield found
        else:
            matched = matching(found)
            if not matched:
                raise DataError(f"{entry}: no such file or folder, and no file matches it; check the path")
            yield from matched
