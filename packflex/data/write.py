"""Packed data sets on disk: shards of Parquet or Arrow beside a manifest that says how they were made.

A data set is a folder: `manifest.json` and `data-00000-of-00002.parquet` or `.arrow`. It is written aside and renamed
into place, so a folder of that name is whole; what is not is refused when it is read.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from packflex.data.errors import DataError, one_line
from packflex.data.files import only_writer, raise_full_disk, room_needed, sha256_of
from packflex.data.tokenizer import (
    chat_template_fingerprint,
    tokenizer_fingerprint,
    tokenizer_name,
    tokenizer_reference,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FileFormat = Literal["parquet", "arrow"]
MANIFEST_NAME = "manifest.json"
# Raise it when an older reader would misread what is written.
MANIFEST_VERSION = 2
# Raise it when the same documents and options give other rows: it is part of every fingerprint.
ROWS_SCHEMA_VERSION = 4
_COLUMNS = ("input_ids", "labels", "lengths")
_SHARD_BYTES = 512 * 2**20  # of Arrow memory
_ROWS_AT_ONCE = 256
_log = logging.getLogger(__name__)
_REPLACED = "replaced"  # in the work folder: the data set that another takes the place of, for a moment
_DISCARDED = "discarded"  # the same, once the other is in its place


@dataclass(frozen=True)
class PackedManifest:
    """How a packed data set was made, and what it must hold.

    Attributes:
        manifest_version: of this record; a reader refuses a later one.
        packflex_version: that wrote it.
        fingerprint: SHA-256 of everything that the rows follow from, see `pack_fingerprint`.
        file_format: "parquet" or "arrow".
        files: bytes of each shard by name, in order.
        checksums: SHA-256 of each shard by name; empty in manifests of version 1.
        rows, documents, tokens, supervised_tokens: what the shards hold; documents count pieces where one was split.
        seq_len: tokens a row can hold.
        efficiency: `tokens / (rows * seq_len)`.
        strategy, overflow, seed: arguments of `pack_dataset`.
        sources: the inputs as they were named.
        source_fingerprint: SHA-256 of the raw documents, see `documents_fingerprint`.
        document_format: "text", "prompt" or "messages".
        tokenizer: its name.
        tokenizer_fingerprint: see `packflex.data.tokenizer.tokenizer_fingerprint`.
        chat_template_fingerprint: of the template that wrote conversations, else None.
        options: how documents became tokens (train_on_prompt, turns, max_length, on_unsupervised).
        counts: what happened to documents on the way (read, dropped, truncated, split, ...).
    """

    manifest_version: int
    packflex_version: str
    fingerprint: str
    file_format: str
    files: dict[str, int]
    checksums: dict[str, str]
    rows: int
    documents: int
    tokens: int
    supervised_tokens: int
    seq_len: int
    efficiency: float
    strategy: str
    overflow: str
    seed: int
    sources: list[str]
    source_fingerprint: str
    document_format: str
    tokenizer: str
    tokenizer_fingerprint: str
    chat_template_fingerprint: str | None
    options: dict[str, Any]
    counts: dict[str, int]


@dataclass(frozen=True)
class PackedData:
    """A packed data set read from disk: its rows and its manifest."""

    dataset: Dataset
    manifest: PackedManifest


def write_packed(
    packed: Dataset,
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    strategy: str,
    overflow: str,
    seed: int,
    sources: list[str],
    source_fingerprint: str,
    document_format: str,
    options: Mapping[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
    file_format: FileFormat = "parquet",
    overwrite: bool = False,
) -> PackedManifest:
    """Write packed rows and their manifest to a new folder, all or nothing.

    Args:
        packed: columns input_ids, labels and lengths, as `pack_dataset` makes them; others are left out.
        output: the folder; its parent is made when missing.
        tokenizer: that made the ids.
        seq_len, strategy, overflow, seed, sources, source_fingerprint, document_format, options, counts: for the
            manifest.
        file_format: "parquet" (smaller) or "arrow" (read in place, without a copy).
        overwrite: replace a packed data set that is there.

    Returns:
        The manifest as written.

    Raises:
        DataError: a folder that is there already, or an empty data set.
        ValueError: an unknown file format, or rows that do not fit `seq_len`.
    """
    import packflex
    from packflex.inspect import summarise

    if file_format not in get_args(FileFormat):
        raise ValueError(f"file_format must be 'parquet' or 'arrow'; got {file_format!r}")
    folder = output_folder(output)
    check_output(folder, overwrite)
    if not len(packed):
        raise DataError("there is no packed row to write; pack at least one document")
    report = summarise(packed, seq_len)
    template = chat_template_fingerprint(tokenizer) if document_format == "messages" else None
    work = work_folder(folder)
    aside = work / "writing"
    with only_writer(work):
        put_back(work, folder)
        check_output(folder, overwrite)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            with room_needed(folder):
                aside.mkdir()
                files = _write_shards(packed.select_columns(list(_COLUMNS)), aside, file_format)
            manifest = PackedManifest(
                manifest_version=MANIFEST_VERSION,
                packflex_version=packflex.__version__,
                fingerprint=pack_fingerprint(
                    source=source_fingerprint,
                    tokenizer=tokenizer_fingerprint(tokenizer),
                    chat_template=template,
                    options=dict(options or {}),
                    seq_len=seq_len,
                    strategy=strategy,
                    overflow=overflow,
                    seed=seed,
                ),
                file_format=file_format,
                files=files,
                checksums={name: sha256_of(aside / name) for name in files},
                rows=report.rows,
                documents=report.documents,
                tokens=report.tokens,
                supervised_tokens=report.supervised_tokens,
                seq_len=seq_len,
                efficiency=report.efficiency,
                strategy=strategy,
                overflow=overflow,
                seed=seed,
                sources=list(sources),
                source_fingerprint=source_fingerprint,
                document_format=document_format,
                tokenizer=tokenizer_reference(tokenizer),
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                chat_template_fingerprint=template,
                options=dict(options or {}),
                counts=dict(counts or {}),
            )
            # Last: a folder without it is half-written.
            with room_needed(folder):
                (aside / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
            move_into_place(aside, folder, overwrite, work)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            # what a run of `packflex pack` keeps there is its own
            if all(path.name == "lock" for path in work.iterdir()):
                remove(work)
    return manifest


def check_output(output: str | Path, overwrite: bool = False) -> None:
    """Refuse a folder that `write_packed` would refuse, before the work that comes first.

    Raises:
        DataError: a folder that is there already, unless it is a packed data set and may be replaced; and what
            `output_folder` raises.
    """
    folder = _named(output)
    if not folder.exists():
        if folder.is_symlink():
            raise DataError(
                f"{folder}: is a link to {os.readlink(folder)}, which is not there; remove the link, or give the "
                "folder itself as the output"
            )
        return
    if not overwrite:
        raise DataError(f"{folder}: is there already; choose another output, or replace it (overwrite, --overwrite)")
    if not (folder / MANIFEST_NAME).is_file():
        raise DataError(
            f"{folder}: is there and is no packed data set, so it is not replaced; choose another output or remove it"
        )


def read_manifest(path: str | Path) -> PackedManifest:
    """Manifest of a packed data set, checked against the files that are there.

    Raises:
        DataError: no packed data set, one that is half-written or damaged, or one of a later packflex.
    """
    folder = Path(path).expanduser()
    file = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the output folder of `packflex pack`")
    if not file.is_file():
        raise DataError(
            f"{folder}: no {MANIFEST_NAME} in it, so it is not a packed data set, or its writing was cut short; "
            "give the output folder of `packflex pack`, or pack again"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not valid JSON ({one_line(error)}); pack the data set again") from error
    version = content.get("manifest_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{file}: not a manifest of packflex (it has no manifest_version); give another folder")
    if version > MANIFEST_VERSION:
        raise DataError(
            f"{file}: written by packflex {content.get('packflex_version')} as version {version}, and this packflex "
            f"reads up to {MANIFEST_VERSION}; upgrade packflex"
        )
    if version == 1:
        content = {"checksums": {}, **content}
    expected = {field.name for field in fields(PackedManifest)}
    if content.keys() != expected:
        raise DataError(
            f"{file}: missing {sorted(expected - content.keys())}, unknown {sorted(content.keys() - expected)}; "
            "pack the data set again"
        )
    for field in fields(PackedManifest):
        if not _is_of(content[field.name], str(field.type)):
            raise DataError(
                f"{file}: {field.name} must be {field.type}; it is {json.dumps(content[field.name])[:60]}: the "
                "manifest was changed or damaged; copy or pack the data set again"
            )
    manifest = PackedManifest(**content)
    for name, size in manifest.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise DataError(
                f"{folder / name}: {state}, and the manifest says {size:,} bytes; the data set is incomplete: copy or "
                "pack it again"
            )
    return manifest


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed data set, whole or not."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "manifest_version" in content


def _is_of(value: Any, kind: str) -> bool:
    """Whether a value of a manifest is of a field's type."""
    if kind.startswith("dict["):
        inner = kind.removeprefix("dict[str, ").removesuffix("]")
        return isinstance(value, dict) and all(inner == "Any" or _is_of(item, inner) for item in value.values())
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "str | None":
        return value is None or isinstance(value, str)
    types: Any = {"int": int, "float": (int, float), "str": str}[kind]
    return isinstance(value, types) and not isinstance(value, bool)


def verify_checksums(folder: Path, manifest: PackedManifest) -> None:
    """Read every shard and compare it with the manifest: about a second a gigabyte.

    Raises:
        DataError: a shard that was changed since it was written.
    """
    for name, expected in manifest.checksums.items():
        if sha256_of(folder / name) != expected:
            raise DataError(
                f"{folder / name}: not as it was written (its SHA-256 is another than the manifest's), so some rows "
                "would hold other tokens; copy or pack the data set again"
            )


def load_packed(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, verify: bool = True
) -> PackedData:
    """Read a packed data set, after checking that it is whole and made with `tokenizer`.

    Arrow shards are mapped into memory; Parquet shards go through the cache of `datasets`, which maps them too.

    Args:
        path: the folder that `write_packed` (or `packflex pack`) made.
        tokenizer: the model's; ids of another one would be other words. Not checked when None.
        verify: read the shards through once and compare their checksums.

    Raises:
        DataError: a data set that is missing, incomplete or damaged, or made with another tokenizer (both are named).
    """
    import datasets

    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    if manifest.file_format == "parquet" and "::" in str(folder.absolute()):
        raise DataError(
            f"{folder}: `datasets` takes '::' in the name of a Parquet file for an archive; rename the folder, or pack "
            "with --file-format arrow"
        )
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{folder}: packed with the tokenizer {manifest.tokenizer}, and {tokenizer_name(tokenizer)} gives other "
            "ids; use the first, or pack the data set again with the second"
        )
    if verify:
        verify_checksums(folder, manifest)
    shards = [str(folder / name) for name in manifest.files]
    try:
        if manifest.file_format == "arrow":
            dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(shard) for shard in shards])
        else:
            # it takes patterns, and puts the current folder before relative ones
            dataset = datasets.Dataset.from_parquet([glob.escape(os.path.abspath(shard)) for shard in shards])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        with room_needed(
            Path(datasets.config.HF_DATASETS_CACHE),
            f"the Parquet shards of {folder} are unpacked there: free some space, or name another with "
            "HF_DATASETS_CACHE; --file-format arrow is read in place",
        ):
            raise_full_disk(error)
        raise DataError(
            f"{folder}: the shards cannot be read ({one_line(error)}); copy or pack the data set again"
        ) from error
    if len(dataset) != manifest.rows:
        raise DataError(
            f"{folder}: the shards hold {len(dataset):,} rows, and the manifest says {manifest.rows:,}; "
            "copy or pack the data set again"
        )
    return PackedData(dataset, manifest)


def read_tables(path: str | Path, columns: Sequence[str] = _COLUMNS, rows: int = 1000) -> Iterator[pa.Table]:
    """The rows of a packed data set as Arrow tables, straight from its shards, without the cache of `datasets`.

    Args:
        path: the folder.
        columns: of input_ids, labels and lengths.
        rows: of a table, at most.

    Raises:
        DataError: as `read_manifest`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    for name in manifest.files:
        if manifest.file_format == "parquet":
            with pq.ParquetFile(folder / name) as file:
                for batch in file.iter_batches(rows, columns=list(columns)):
                    yield pa.Table.from_batches([batch])
        else:
            with pa.memory_map(str(folder / name)) as source:
                for batch in pa.ipc.open_stream(source):
                    yield pa.Table.from_batches([batch]).select(list(columns))


class DocumentsDigest:
    """SHA-256 of raw documents as they come: their columns and texts in order, without where they were read from.

    Args:
        columns: of the documents, `source` not among them.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._whole = hashlib.sha256(json.dumps(self._columns).encode())

    def update(self, documents: Iterable[Mapping[str, Any]]) -> str:
        """Add documents; the digest of these alone."""
        part = hashlib.sha256(json.dumps(self._columns).encode())
        for document in documents:
            text = json.dumps([document[column] for column in self._columns]).encode()
            for digest in (self._whole, part):
                digest.update(len(text).to_bytes(8, "little"))
                digest.update(text)
        return part.hexdigest()

    def hexdigest(self) -> str:
        """The digest of all documents so far."""
        return self._whole.hexdigest()


def documents_fingerprint(documents: Dataset) -> str:
    """SHA-256 of raw documents; see `DocumentsDigest`."""
    columns = [name for name in documents.column_names if name != "source"]
    digest = DocumentsDigest(columns)
    for batch in documents.select_columns(columns).iter(batch_size=_ROWS_AT_ONCE):
        digest.update(
            dict(zip(columns, row, strict=True)) for row in zip(*(batch[column] for column in columns), strict=True)
        )
    return digest.hexdigest()


def pack_fingerprint(
    *,
    source: str,
    tokenizer: str,
    chat_template: str | None,
    options: Mapping[str, Any],
    seq_len: int,
    strategy: str,
    overflow: str,
    seed: int | None,
) -> str:
    """SHA-256 of everything that packed rows follow from: change one, and it is another data set.

    Args:
        source: fingerprint of the raw documents.
        tokenizer, chat_template: their fingerprints; None for documents that need no template.
        options: how documents became tokens.
        seq_len, strategy, overflow, seed: how tokens became rows.
    """
    parts = [ROWS_SCHEMA_VERSION, source, tokenizer, chat_template, dict(options), seq_len, strategy, overflow, seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def output_folder(output: str | Path) -> Path:
    """The folder that `output` names; where that is a link to one, what it links to, which is then replaced.

    Raises:
        DataError: no name of a folder: an empty or blank one, or the current folder, the one above it or the root.
    """
    folder = _named(output)
    if not folder.is_symlink():
        return folder
    linked = folder.resolve()
    return linked if linked.exists() or is_replacing(work_folder(linked)) else folder


def _named(output: str | Path) -> Path:
    folder = Path(output).expanduser()
    if not str(output).strip() or folder.name in ("", ".."):
        raise DataError(f"the output {str(output)!r} is no name of a folder to make; give one (--output DIR)")
    return folder


def work_folder(folder: Path) -> Path:
    """Where everything lies that is not finished yet."""
    return folder.parent / f".{folder.name}.packing"


def move_into_place(aside: Path, folder: Path, overwrite: bool, work: Path) -> None:
    """Give a finished folder its name, with `overwrite` in place of a packed data set that is there.

    Args:
        aside: the finished folder.
        folder: its name.
        overwrite: whether a packed data set of that name is replaced.
        work: where that one is for a moment, a folder of this writer's; after a kill `put_back` finds it there.

    Raises:
        DataError: a folder that came there meanwhile, and is not to be replaced; it and `aside` are left as they are.
            A disk that is full, or a place where nothing may be written.
    """
    with room_needed(folder):
        check_output(folder, overwrite)
        if folder.exists():
            os.rename(folder, work / _REPLACED)
            try:
                os.rename(aside, folder)
            except BaseException:
                os.rename(work / _REPLACED, folder)
                raise
            _discard(work)
            return
        try:
            os.rename(aside, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            check_output(folder, overwrite)  # somebody made it between the two lines above
            raise


def put_back(work: Path, folder: Path) -> None:
    """Undo what a kill left half-done in `move_into_place`."""
    if not (work / _REPLACED).exists():
        return
    with room_needed(folder):
        if folder.exists():
            _discard(work)
        else:
            os.rename(work / _REPLACED, folder)


def is_replacing(work: Path) -> bool:
    """Whether the work folder holds the only copy of a data set that was to be replaced."""
    return (work / _REPLACED).exists()


def _discard(work: Path) -> None:
    """Remove the replaced data set; renamed first, so that half of it is never taken for the whole."""
    aside = work / f"{_DISCARDED}-{os.urandom(4).hex()}"
    os.rename(work / _REPLACED, aside)
    remove(aside)


def remove(folder: Path) -> None:
    """Remove a folder that is of no use any more, or say what is left of it: what it was for has been done."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _log.warning("%s could not be removed whole (%s); remove it", folder, one_line(error))


def shard_writer(path: Path, file_format: FileFormat) -> Any:
    """A context manager whose `write_table` writes rows (input_ids, labels, lengths: lists of int32) to one file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = rows_schema()
    if file_format == "parquet":
        return pq.ParquetWriter(path, schema, compression="zstd")
    return pa.ipc.new_stream(str(path), schema)


def rows_schema() -> pa.Schema:
    """Arrow schema of packed rows."""
    import pyarrow as pa

    return pa.schema([(name, pa.list_(pa.int32())) for name in _COLUMNS])


def _write_shards(packed: Dataset, folder: Path, file_format: FileFormat) -> dict[str, int]:
    count = min(len(packed), max(1, -(-packed.data.nbytes // _SHARD_BYTES)))
    files: dict[str, int] = {}
    for index in range(count):
        path = folder / f"data-{index:05d}-of-{count:05d}.{file_format}"
        shard = packed.shard(count, index, contiguous=True).with_format("arrow")
        with shard_writer(path, file_format) as writer:
            for batch in shard.iter(batch_size=_ROWS_AT_ONCE):
                writer.write_table(batch.cast(rows_schema()))
        files[path.name] = path.stat().st_size
    return files
