"""Reads records one by one from JSON Lines, Parquet, Arrow and the Hugging Face hub; finds the files.

Each reader yields `Record`s, and turns what the libraries underneath raise into a `DataError` with file, line and
remedy.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from packflex.data.errors import DataError, one_line
from packflex.data.records import Record, without_nulls
from packflex.data.write import is_packed

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_ROWS_AT_ONCE = 1000
_NO_DATA = ("dataset_infos.json",)  # what the hub says of a data set
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
_UTF8_BOM = b"\xef\xbb\xbf"
_STREAM_END, _OLD_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0"  # of an Arrow stream; before Arrow 0.15


def find_files(path: str | Path | Sequence[str | Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Files of a path, a folder, a glob or a list of them.

    A file is taken whatever its name; folders give the files in them (not below them) with one of the suffixes. A
    folder made by `save_to_disk` is kept as it is.

    Raises:
        DataError: a path without a file or without a name, and what `files_in` raises.
    """
    entries = [path] if isinstance(path, (str, Path)) else list(path)
    if not entries:
        raise DataError("the list of input paths is empty; give at least one file")
    return [file for entry in entries for file in _expand(named(str(entry)), suffixes)]


def named(entry: str) -> str:
    """The name of an input as it is, for without one the current folder would be read.

    Raises:
        DataError: a name that is empty or blank.
    """
    if not entry.strip():
        raise DataError(f"the name of an input is {'blank' if entry else 'empty'}; give a file, a folder or a glob")
    return entry


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files in a folder, not below it, with one of the suffixes, in order. Others and hidden ones are passed over.

    Raises:
        DataError: where a part of the data would be read, or none is meant: compressed files or names in capitals that
            are not read beside others, .json files beside JSON Lines, a packed data set.
    """
    if is_packed(folder):
        raise DataError(
            f"{folder}: holds a packed data set, which is not packed again; train on it (data=packed "
            f"data.path={folder}), or give the documents that it was made from"
        )
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if _is_file(entry) and entry.name not in _NO_DATA]
    found = [file for file in files if file.name.endswith(suffixes)]
    for file in files:
        name = file.name.lower()
        for ending in _COMPRESSED:
            name = name.removesuffix(ending)
        if name.endswith(suffixes) and not file.name.endswith(suffixes):
            raise DataError(f"{unknown_kind(file)}; unpack or rename it{_by_pattern(folder, found)}")
    objects = [file for file in found if file.name.endswith(".json")]
    if 0 < len(objects) < len(found):
        raise several_kinds(folder, found)
    return found


def matching(pattern: Path) -> list[Path]:
    """Files that a glob matches, in order; folders that are there are first taken as they are named, [ and * too."""
    folder = next(parent for parent in pattern.parents if parent.is_dir())
    literal = Path(glob.escape(str(folder))) / pattern.relative_to(folder)
    names = glob.glob(str(literal), recursive=True) or glob.glob(str(pattern), recursive=True)
    return sorted(path for path in map(Path, names) if _is_file(path))


def unknown_kind(file: str | Path) -> str:
    """What to say of a file whose name tells no kind."""
    return f"{file}: unknown kind of file; expected .jsonl, .jsonl.gz, .parquet or .arrow"


def several_kinds(folder: Path, files: list[Path]) -> DataError:
    """What to say of a folder whose files are of several kinds, of which one would be taken."""
    first = {file.suffix: file.name for file in reversed(files)}
    return DataError(
        f"{folder}: holds files of several kinds ({', '.join(sorted(first.values()))}), and one kind is read at a "
        f"time; name the files{_by_pattern(folder, files)}"
    )


def _by_pattern(folder: Path, files: list[Path]) -> str:
    """How to choose some files of a folder: those like the largest, and .json files, which may be notes, last."""
    if not files:
        return ""
    chosen = max(files, key=lambda file: (file.suffix != ".json", file.lstat().st_size))
    suffix = ".jsonl.gz" if chosen.name.endswith(".jsonl.gz") else chosen.suffix
    return f", or choose by a pattern such as '{glob.escape(str(folder))}/*{suffix}'"


def _is_file(path: Path) -> bool:
    """Whether a path is a file, or a link to one that is gone, which is refused when it is read and not passed over."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` made the folder, of one data set or of several splits."""
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _expand(entry: str, suffixes: tuple[str, ...]) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_file() or is_saved_dataset(path):
        return [path]
    if path.is_dir():
        files = files_in(path, suffixes)
        if not files:
            raise DataError(f"{entry}: the folder holds no file ending in {' or '.join(suffixes)}; check the path")
        return files
    if any(mark in entry for mark in "*?["):
        found = matching(path)
        if not found:
            raise DataError(f"{entry}: no file matches this pattern; check it (quote it so that the shell leaves it)")
        return found
    parent = path.parent if path.parent.is_dir() else None
    near = sorted(file.name for file in parent.iterdir() if file.name.endswith(suffixes))[:5] if parent else []
    hint = f"the folder holds {', '.join(near)}" if near else "check the path"
    raise DataError(f"{entry}: no such file or folder; {hint}")


def read_jsonl(file: Path) -> Iterator[Record]:
    """Records of a JSON Lines file (gzip by suffix), one object a line; blank lines are passed over.

    Raises:
        DataError: a file that cannot be read or is empty, a line that is not UTF-8, not JSON or no object.
    """
    found = False
    for number, line in enumerate(_lines(file), start=1):
        if number == 1:
            line = line.removeprefix(_UTF8_BOM)
        if not line.strip():
            continue
        found = True
        source = f"{file}:{number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); "
                "save the file as UTF-8"
            ) from error
        except json.JSONDecodeError as error:
            if number == 1 and line.lstrip()[:1] == b"[":
                raise DataError(_array_message(source)) from error
            raise DataError(
                f"{source}: not valid JSON ({error.msg} at column {error.colno}); "
                "each line must be one whole JSON object: fix or remove it"
            ) from error
        except ValueError as error:  # a number of thousands of digits
            raise DataError(f"{source}: a number that is too long to read; fix or remove the line") from error
        except RecursionError as error:
            raise DataError(f"{source}: JSON nested too deeply to read; fix or remove the line") from error
        if not isinstance(value, dict):
            if isinstance(value, list) and number == 1:
                raise DataError(_array_message(source))
            raise DataError(f'{source}: expected a JSON object such as {{"text": ...}}; got {type(value).__name__}')
        yield Record(source, value)
    if not found:
        raise DataError(f"{file}: the file is empty; expected one JSON object a line")


def _array_message(source: str) -> str:
    return (
        f"{source}: the file holds a JSON array, and JSON Lines (one object a line) are needed; "
        "convert it: jq -c '.[]' data.json > data.jsonl"
    )


def _lines(file: Path) -> Iterator[bytes]:
    number = 0
    try:
        with _open(file) as stream:
            for line in stream:
                number += 1
                yield line
    except (OSError, EOFError, zlib.error) as error:
        if number or not isinstance(error, OSError):
            raise DataError(
                f"{file}:{number + 1}: cannot be read on after {number:,} lines ({one_line(error)}), so the file is "
                "cut short or damaged; copy it or write it again"
            ) from error
        raise DataError(f"{file}: cannot be read ({error}); check the file and its permissions") from error


def _open(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.name.endswith(".gz") else file.open("rb")


def read_parquet(file: Path, columns: Iterable[str], also: Iterable[str] = ()) -> Iterator[Record]:
    """Records of a Parquet file with those of `columns` and `also` that it has; rows are named from 0.

    Raises:
        DataError: a file that is not Parquet, is cut short, or is empty.
    """
    import pyarrow as pa  # here and not above: JSON Lines need no Arrow until the end
    import pyarrow.parquet as pq

    try:
        reader = pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "a Parquet file", (b"PAR1",), error) from error
    with reader:
        chosen = _chosen(file, reader.schema_arrow.names, columns, also)
        yield from _rows(file, reader.iter_batches(batch_size=_ROWS_AT_ONCE, columns=chosen))


def read_arrow(file: Path, columns: Iterable[str], also: Iterable[str] = ()) -> Iterator[Record]:
    """Records of an Arrow file (file or stream form) or a folder made by `Dataset.save_to_disk`; rows from 0.

    Raises:
        DataError: a file that is not Arrow, is cut short or is empty, or a folder with several splits.
    """
    import pyarrow as pa

    if file.is_dir():
        yield from _dataset_records(str(file), _load_from_disk(file), columns, also)
        return
    try:
        with pa.memory_map(str(file)) as source:
            is_file_form = source.read(6) == b"ARROW1"
            source.seek(0)
            table = pa.ipc.open_file(source).read_all() if is_file_form else _whole_stream(file, source)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "an Arrow file", (b"ARROW1", b"\xff\xff\xff\xff"), error) from error
    yield from _rows(file, table.select(_chosen(file, table.column_names, columns, also)).to_batches(_ROWS_AT_ONCE))


def _unreadable(file: Path, kind: str, beginnings: tuple[bytes, ...], error: Exception) -> DataError:
    """What to say of a file that cannot be opened, by how files of its kind begin."""
    try:
        with file.open("rb") as stream:
            beginning = stream.read(8)
    except OSError:  # as `error` says
        beginning = b""
    said = one_line(error)
    if beginning.startswith(beginnings):
        return DataError(f"{file}: {kind} that is cut short or damaged ({said}); copy or write it again")
    return DataError(f"{file}: not {kind} ({said}); check the file or its suffix")


def _whole_stream(file: Path, source: Any) -> pa.Table:
    """The table of an Arrow stream; one that was cut between two batches lacks only the mark of its end."""
    import pyarrow as pa

    reader = pa.ipc.open_stream(source)
    batches = []
    end = source.tell()
    for batch in iter(partial(_next_batch, reader), None):
        batches.append(batch)
        end = source.tell()
    source.seek(end)
    mark = source.read(8)
    if mark != _STREAM_END and mark[:4] != _OLD_STREAM_END:
        raise DataError(
            f"{file}: cut short after {sum(map(len, batches)):,} rows: the mark of an Arrow stream's end is missing; "
            "copy or write the file again"
        )
    return pa.Table.from_batches(batches, reader.schema)


def _next_batch(reader: Any) -> pa.RecordBatch | None:
    try:
        return reader.read_next_batch()
    except StopIteration:
        return None


def read_hub(
    name: str, config: str | None, split: str, columns: Iterable[str], also: Iterable[str] = ()
) -> Iterator[Record]:
    """Records of a data set on the Hugging Face hub, through the cache of `datasets`; rows from 0.

    Raises:
        DataError: a data set, configuration or split that does not exist, or no way to reach the hub.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        raise DataError(
            f"{name}: the Hugging Face hub cannot be reached and the data set is not in the local cache; connect, or "
            "download it elsewhere and give the files by path (data=jsonl data.path=..., packflex pack FILE)"
        ) from error
    # load_dataset raises these for names, configurations, splits and files; RuntimeError for old script data sets
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: the data set could not be loaded with config={config!r}, split={split!r} ({one_line(error)}); "
            "check the names on its page on the hub"
        ) from error
    yield from _dataset_records(name, dataset, columns, also)


def _load_from_disk(folder: Path) -> Dataset:
    import datasets
    import pyarrow as pa

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"{folder}: not a folder that Dataset.save_to_disk wrote ({one_line(error)}); save the data set again"
        ) from error
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(f"{folder}: holds the splits {', '.join(map(str, loaded))}; give the folder of one of them")
    for file in loaded.cache_files:  # datasets takes a file that was cut between two batches for whole
        with pa.memory_map(file["filename"]) as source:
            _whole_stream(Path(file["filename"]), source)
    return loaded


def _dataset_records(name: str, dataset: Dataset, columns: Iterable[str], also: Iterable[str]) -> Iterator[Record]:
    chosen = _chosen(name, dataset.column_names, columns, also)
    number = 0
    for batch in dataset.select_columns(chosen).with_format(None).iter(batch_size=_ROWS_AT_ONCE):
        for row in zip(*(batch[column] for column in chosen), strict=True):
            values = {column: without_nulls(value) for column, value in zip(chosen, row, strict=True)}
            yield Record(f"{name}:row {number}", values)
            number += 1
    if not number:
        raise DataError(f"{name}: the data set has no rows")


def _rows(file: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            for values in batch.to_pylist():
                yield Record(f"{file}:row {number}", {key: without_nulls(value) for key, value in values.items()})
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: broken after row {number} ({one_line(error)}); write the file again") from error
    if not number:
        raise DataError(f"{file}: the file has no rows")


def _chosen(name: str | Path, present: Sequence[str], wanted: Iterable[str], also: Iterable[str]) -> list[str]:
    chosen = [column for column in dict.fromkeys(wanted) if column in present]
    if not chosen:
        raise DataError(
            f"{name}: none of the columns {', '.join(map(repr, dict.fromkeys(wanted)))} is there; it has "
            f"{', '.join(map(repr, present)) or 'none'}: name yours with text_field, prompt_field and "
            "completion_field, or messages_field (--text-field, ... on the command line)"
        )
    return chosen + [column for column in also if column in present and column not in chosen]
