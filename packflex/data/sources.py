"""`load_documents`: raw documents of any source as one `Dataset` with the same columns.

Every source ends as one of three forms, each with a `source` column that names the record in later errors:

    text        text, source
    prompt      prompt, completion, source
    messages    messages, tools, source     both JSON text: Arrow would give every message the keys of all others

Records are read and checked here one by one, so that a wrong one is named by file and line. They are held in memory in
Arrow (about the size of the text).
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from packflex.data.errors import DataError
from packflex.data.ids import hash_of_id
from packflex.data.readers import (
    Record,
    files_in,
    find_files,
    is_saved_dataset,
    named,
    read_arrow,
    read_hub,
    read_jsonl,
    read_parquet,
    several_kinds,
    unknown_kind,
)
from packflex.data.records import Fields, Format, detect_format, normalise
from packflex.data.stdlib_corpus import Split, StdlibCorpus, read_stdlib

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Kind = Literal["stdlib", "jsonl", "parquet", "arrow", "hub", "gsm8k", "chat"]
OnDuplicate = Literal["report", "error", "drop", "keep"]
Paths = str | Path | Sequence[str | Path]

logger = logging.getLogger(__name__)

_SUFFIXES: dict[str, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".json", ".jsonl.gz"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
# A question and its worked answer; the prompt ends in a newline so that the answer starts a token of its own.
_GSM8K_PROMPT = "Question: {question}\nAnswer:\n"
_CHUNK_ROWS = 2000  # of Arrow tables: keeps a chunk of long documents far from Arrow's 2 GiB of string offsets
_MAX_TEXT_BYTES = 2**31 - 2  # of one string of an Arrow column


def load_documents(
    kind: Kind,
    path: Paths | None = None,
    *,
    format: Format = "auto",
    text_field: str = "text",
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    messages_field: str = "messages",
    tools_field: str = "tools",
    id_field: str = "id",
    on_duplicate: OnDuplicate = "report",
    config: str | None = None,
    split: str = "train",
    heldout_percent: int = 5,
    limit: int | None = None,
) -> Dataset:
    """Documents of a source as a `Dataset` of raw text.

    Args:
        kind: "stdlib" (the interpreter's own library), "jsonl", "parquet", "arrow" (an Arrow file or a folder made by
            `save_to_disk`), "hub" (`path` is a data set id), "gsm8k" (`path` is a JSON Lines file with question and
            answer; the hub without it), "chat" (JSON Lines, Parquet or Arrow with a list of messages).
        path: a file, a folder, a glob, or a list of them; files are read in sorted order for a folder or a glob. Of a
            folder's files those of the kind are read, and not those of folders below it.
        format: "text", "prompt" (prompt and completion), "messages", or "auto": by the fields of the first record,
            messages before prompt and completion before text.
        text_field, prompt_field, completion_field, messages_field, tools_field: what the fields are called in the
            source. `tools_field` may be absent from a record.
        id_field, on_duplicate: as in `read_documents`.
        config: hub configuration (subset).
        split: hub split such as "train" or "train[:1000]"; for "stdlib" "train", "heldout" or "all".
        heldout_percent: share of "stdlib" that is held out.
        limit: stop after this many records.

    Returns:
        `Dataset` with the columns of its form, see the module's docstring.

    Raises:
        DataError: anything wrong with the data; one line with file, line and remedy.
        ValueError: an unknown kind or format, or an argument out of range.

    Example:
        >>> load_documents("jsonl", "train.jsonl", prompt_field="question", completion_field="answer").column_names
        ['prompt', 'completion', 'source']
    """
    return _to_dataset(
        read_documents(
            kind, path, format=format, text_field=text_field, prompt_field=prompt_field,
            completion_field=completion_field, messages_field=messages_field, tools_field=tools_field,
            id_field=id_field, on_duplicate=on_duplicate, config=config, split=split, heldout_percent=heldout_percent,
            limit=limit,
        )
    )  # fmt: skip


def read_documents(
    kind: Kind,
    path: Paths | None = None,
    *,
    format: Format = "auto",
    text_field: str = "text",
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    messages_field: str = "messages",
    tools_field: str = "tools",
    id_field: str = "id",
    on_duplicate: OnDuplicate = "report",
    config: str | None = None,
    split: str = "train",
    heldout_percent: int = 5,
    limit: int | None = None,
) -> Iterator[dict[str, str]]:
    """Documents of a source one by one, as `load_documents` has them in its rows: for more than fits into memory.

    Args:
        kind, path, format, text_field, prompt_field, completion_field, messages_field, tools_field, config, split,
            heldout_percent, limit: as in `load_documents`.
        id_field: what the field is called that names a record. A record without it, or with null, is distinct. A field
            that is asked for (another than "id", or with "error" or "drop") must be in some record.
        on_duplicate: what to do with a record whose id came before: "report" keeps it and logs a warning at the end
            with the number of such records and the first of them, "error" names both, "drop" leaves it out, "keep" does
            not look. Ids are known by 64 bits of their hash, 8 bytes a record to report and some 90 to refuse or drop.

    Raises:
        DataError: anything wrong with the data, when it is reached; one line with file, line and remedy.
        ValueError: an unknown kind, format or way with duplicates, or an argument out of range.
    """
    if on_duplicate not in get_args(OnDuplicate):
        raise ValueError(f"on_duplicate must be one of {', '.join(get_args(OnDuplicate))}; got {on_duplicate!r}")
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}; got {kind!r}")
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}; got {format!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all records; got {limit}")
    fields = Fields(text_field, prompt_field, completion_field, messages_field, tools_field, id_field)
    if kind in ("stdlib", "gsm8k") and (on_duplicate in ("error", "drop") or id_field != "id"):
        raise ValueError(
            f"documents of kind {kind!r} have no ids; leave id_field and on_duplicate as they are (--id-field, "
            "--on-duplicate)"
        )
    if kind == "stdlib":
        return _normalised(islice(_stdlib_records(split, heldout_percent), limit), "prompt", Fields())
    if kind == "gsm8k":
        return _normalised(islice(_gsm8k_records(path, split), limit), "prompt", Fields())
    if kind == "chat":
        kind, format = guess_kind(path), "messages"
    if kind == "hub" and not isinstance(path, str):
        raise DataError(f"a hub data set is named by one id such as openai/gsm8k; got path={path!r}")

    def records() -> Iterator[Record]:
        if kind == "hub":
            return read_hub(str(path), config, split, fields.names(), (fields.id,))
        return chain.from_iterable(_READERS[kind](file, fields) for file in files_of(kind, path))

    iterator = islice(records(), limit) if on_duplicate == "keep" else _Ids(fields.id, records).of(on_duplicate, limit)
    first = next(iterator, None)
    if first is None:
        raise DataError(f"{path}: holds no record")  # each reader says so itself, with the file's name
    found = detect_format(first, fields) if format == "auto" else format
    return _normalised(chain([first], iterator), found, fields)


class _Ids:
    """Compares the ids of records as they pass; a record without one is distinct."""

    def __init__(self, field: str, records: Callable[[], Iterator[Record]]) -> None:
        self.field, self.records = field, records

    def of(self, on_duplicate: str, limit: int | None) -> Iterator[Record]:
        """The first `limit` records, without those whose id came before if they are dropped."""
        is_strict = on_duplicate != "report"
        seen: set[int] = set()
        hashes = array("Q")
        found, passed = False, 0
        for record in self.records():
            if (value := record.values.get(self.field)) is not None:
                found = True
                if not (isinstance(value, float) and math.isnan(value)):
                    key = hash_of_id(value)
                    if not is_strict:
                        hashes.append(key)
                    elif key in seen:
                        if on_duplicate == "drop":
                            continue
                        raise DataError(self._duplicate(record, key))
                    else:
                        seen.add(key)
                elif is_strict:
                    raise DataError(
                        f"{record.source}: {self.field!r} is NaN, which names no record; give it an id, or null for a "
                        "record without one"
                    )
            yield record
            passed += 1
            if passed == limit:
                break
        if not found and (is_strict or self.field != "id"):
            raise DataError(
                f"none of the {passed:,} records has the field {self.field!r}, so their ids cannot be compared; name "
                "yours with id_field (--id-field), or choose on_duplicate='keep' (--on-duplicate)"
            )
        self._report(hashes, limit)

    def _report(self, hashes: array[int], limit: int | None) -> None:
        if len(hashes) < 2:
            return
        import numpy as np

        keys, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_counts=True)
        repeated = {int(key) for key in keys[counts > 1]}
        if not repeated:
            return
        seen: set[int] = set()
        for record in islice(self.records(), limit):  # read again, as far as the first that came before
            value = record.values.get(self.field)
            key = None if value is None else hash_of_id(value)
            if key in seen:
                logger.warning(
                    "%d records have an id that came before and are kept; the first is %s",
                    len(hashes) - len(keys), self._duplicate(record, key),
                )  # fmt: skip
                return
            if key in repeated:
                seen.add(key)

    def _duplicate(self, record: Record, key: int) -> str:
        value = record.values[self.field]
        same = (r.source for r in self.records() if hash_of_id(r.values.get(self.field)) == key)
        return (
            f"{record.source}: {self.field!r} is {value!r}, as in {next(same, 'a record before')}; remove one, keep "
            "the first with on_duplicate='drop' or both with 'keep' (--on-duplicate), or name another field with "
            "id_field (--id-field)"
        )


def guess_kind(path: Paths | None) -> Kind:
    """Kind of a path by its suffix: "jsonl", "parquet" or "arrow"; "stdlib" by that name; else "hub" for an id.

    Raises:
        DataError: paths or folders of several kinds, a suffix that is not known, a packed data set, or a path that
            does not exist or has no name.

    Example:
        >>> guess_kind("train.jsonl"), guess_kind("openai/gsm8k")
        ('jsonl', 'hub')
    """
    if path is None:
        raise DataError("no input was given; name a file, a folder, a glob, a hub data set id or 'stdlib'")
    entries = [path] if isinstance(path, (str, Path)) else list(path)
    kinds: set[Kind] = {_guess_one(str(entry)) for entry in entries}
    if len(kinds) != 1:
        raise DataError(
            f"inputs of one kind are needed at a time; got {', '.join(sorted(kinds)) or 'none'} "
            f"from {', '.join(map(str, entries)) or 'an empty list'}"
        )
    return kinds.pop()


def _guess_one(entry: str) -> Kind:
    if entry == "stdlib":
        return "stdlib"
    path = Path(named(entry)).expanduser()
    if is_saved_dataset(path):
        return "arrow"
    if path.is_dir():
        return _kind_in(path)
    for kind, suffixes in _SUFFIXES.items():
        if entry.endswith(suffixes):
            return kind  # type: ignore[return-value]
    if path.exists():
        raise DataError(unknown_kind(entry))
    if any(mark in entry for mark in "*?["):
        raise DataError(f"{entry}: the pattern tells no kind of file; let it end in .jsonl, .parquet or .arrow")
    # Hub ids are "name" or "owner/name"; a single name that ends like a file's is a file that is not there.
    is_file_name = "/" not in entry and path.suffix[1:].isalpha()
    if entry.count("/") > 1 or entry.startswith((".", "/", "~")) or "\\" in entry or is_file_name:
        raise DataError(f"{entry}: no such file or folder; check the path")
    return "hub"


def _kind_in(folder: Path) -> Kind:
    found = {kind: files for kind, suffixes in _SUFFIXES.items() if (files := files_in(folder, suffixes))}
    if not found:
        raise DataError(f"{folder}: the folder holds no .jsonl, .parquet or .arrow file")
    if len(found) > 1:
        raise several_kinds(folder, [file for files in found.values() for file in files])
    (kind,) = found
    return kind  # type: ignore[return-value]


def _jsonl(file: Path, _fields: Fields) -> Iterator[Record]:
    return read_jsonl(file)


def _parquet(file: Path, fields: Fields) -> Iterator[Record]:
    return read_parquet(file, fields.names(), (fields.id,))


def _arrow(file: Path, fields: Fields) -> Iterator[Record]:
    return read_arrow(file, fields.names(), (fields.id,))


_READERS = {"jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow}


def files_of(kind: str, path: Paths | None) -> list[Path]:
    """The files of a source of kind "jsonl", "parquet" or "arrow".

    Raises:
        DataError: no path, or nothing there.
    """
    if path is None:
        raise DataError(f"data of kind {kind!r} needs a path: a file, a folder, a glob or a list of them")
    return find_files(path, _SUFFIXES[kind])


def _stdlib_records(split: str, heldout_percent: int) -> Iterator[Record]:
    if split not in get_args(Split):
        raise ValueError(f"split of 'stdlib' must be one of {', '.join(get_args(Split))}; got {split!r}")
    corpus = _stdlib()
    for i in corpus.select(split, heldout_percent):  # type: ignore[arg-type]
        yield Record(f"stdlib:{corpus.sources[i]}", {"prompt": corpus.prompts[i], "completion": corpus.completions[i]})


@lru_cache(maxsize=1)
def _stdlib() -> StdlibCorpus:
    # Parsing takes seconds, and train and held-out documents are asked for one after the other.
    return read_stdlib()


def _gsm8k_records(path: Paths | None, split: str) -> Iterator[Record]:
    fields = Fields(prompt="question", completion="answer")
    if path is None:
        records = read_hub("openai/gsm8k", "main", split, fields.names())
    else:
        records = chain.from_iterable(read_jsonl(file) for file in files_of("jsonl", path))
    for record in records:
        values = normalise(record, "prompt", fields)
        prompt = _GSM8K_PROMPT.format(question=values["prompt"])
        yield Record(record.source, {"prompt": prompt, "completion": values["completion"]})


def _normalised(records: Iterable[Record], format: str, fields: Fields) -> Iterator[dict[str, str]]:
    return ({**normalise(record, format, fields), "source": record.source} for record in records)


def _to_dataset(rows: Iterator[dict[str, str]]) -> Dataset:
    import pyarrow as pa  # here and not above: naming a kind of source must not cost the second that these take
    from datasets import Dataset

    tables = []
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        tables.append(table_of(chunk))
    if not tables:
        raise DataError("this split holds no document; choose another split or a larger heldout_percent")
    return Dataset(pa.concat_tables(tables))


def table_of(rows: list[dict[str, str]]) -> pa.Table:
    """Documents of `read_documents` as an Arrow table.

    Raises:
        DataError: text that no encoding allows or that is too long for Arrow, with its source.
    """
    import pyarrow as pa

    return pa.table({name: _string_column([row[name] for row in rows], name, rows) for name in rows[0]})


def _string_column(values: list[str], name: str, rows: list[dict[str, str]]) -> Any:
    import pyarrow as pa

    for value, row in zip(values, rows, strict=True):
        if 4 * len(value) > _MAX_TEXT_BYTES and (size := len(value.encode("utf-8", "replace"))) > _MAX_TEXT_BYTES:
            raise DataError(
                f"{row['source']}: {name!r} is {size:,} bytes long, and a text may have {_MAX_TEXT_BYTES:,}; cut it "
                "into several documents"
            )
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        at = next(i for i, value in enumerate(values) if not _encodable(value))
        raise DataError(
            f"{rows[at]['source']}: {name!r} holds a lone surrogate ({error.object[error.start]!r}), which is no "
            "valid text; remove it or write the file again as UTF-8"
        ) from error


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
