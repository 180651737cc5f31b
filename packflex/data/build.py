"""`build_packed`: from any number of raw documents to a packed data set on disk, in bounded memory, restartable.

Four steps over files of a work folder `.NAME.packing` beside the output:

    read       documents in chunks of some thousands       text-00007.arrow     one process, order and fingerprint
    tokenise   each chunk by itself                        tokens-00007.arrow   any number of processes or nodes
    plan       all rows at once, from lengths alone        plan-*.npy           one process
    write      each shard of rows by itself                rows/data-*.parquet  any number of processes or nodes

Every file appears whole or not at all and says what it was made from, so a run that was killed goes on where it
stopped: documents are read again (that also finds a changed input), chunks and shards that are there are kept. The
output folder appears last, by one rename. Memory holds one chunk and one block of rows for each process, and about 100
bytes a document for the plan.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from packflex.data.chat import Turns
from packflex.data.engines import Counts, Engine, LocalEngine
from packflex.data.errors import DataError, one_line, too_long_message
from packflex.data.files import only_writer, room_needed, save_array, sha256_of, written_whole
from packflex.data.labels import IGNORED
from packflex.data.sources import table_of
from packflex.data.supervision import cut_bare_message, documents_cut_bare, supervised_in_pieces
from packflex.data.tokenize import DocumentEncoder, OnUnsupervised, form_of
from packflex.data.tokenizer import chat_template_fingerprint, tokenizer_fingerprint, tokenizer_reference
from packflex.data.write import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    ROWS_SCHEMA_VERSION,
    DocumentsDigest,
    FileFormat,
    PackedManifest,
    check_output,
    is_replacing,
    move_into_place,
    output_folder,
    pack_fingerprint,
    put_back,
    remove,
    shard_writer,
    work_folder,
)
from packflex.packing import plan_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from packflex.packing import PackingPlan

logger = logging.getLogger(__name__)

_CHUNK_DOCUMENTS = 10_000
_CHUNK_CHARACTERS = 32_000_000
_SHARD_TOKENS = 64 * 2**20  # of a file of rows: 512 MiB of ids and labels
_BLOCK_TOKENS = 2 * 2**20  # gathered at a time
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class TokenizeOptions:
    """How documents become tokens; see `packflex.data.tokenize.tokenize_documents`.

    `on_unsupervised` is also for documents that lose every supervised token where packing cuts them.
    """

    train_on_prompt: bool = False
    turns: Turns = "all"
    max_length: int | None = None
    on_unsupervised: OnUnsupervised = "error"


def build_packed(
    documents: Iterable[Mapping[str, str]],
    output: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int = 8192,
    strategy: str = "best_fit",
    overflow: str = "split",
    seed: int = 0,
    tokenize: TokenizeOptions | None = None,
    sources: Iterable[str] = (),
    file_format: FileFormat = "parquet",
    overwrite: bool = False,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> PackedManifest:
    """Tokenise, pack and write documents.

    Args:
        documents: as `packflex.data.sources.read_documents` gives them.
        output: the folder to make.
        tokenizer: with a chat template for conversations.
        seq_len, strategy, overflow, seed: as in `packflex.pack_dataset`.
        tokenize: how documents become tokens.
        sources: what to call the inputs in the manifest.
        file_format: "parquet" or "arrow".
        overwrite: replace a packed data set that is there.
        engine: where tokenising and writing run; this process by default.
        progress: called with the step's name, what is done, and how much there is (None while it is not known).

    Returns:
        The manifest as written. The same documents, tokenizer and options give the same rows and the same
        `fingerprint`, whatever the engine, and however often the run was cut short.

    Raises:
        DataError: what is wrong with the documents, the disk or the output, in one line with its remedy.
        ValueError: packing arguments out of range.
    """
    folder = output_folder(output)
    check_output(folder, overwrite)
    plan_rows([1], seq_len, strategy, overflow=overflow, seed=seed)  # checks the arguments before the long work
    options = tokenize or TokenizeOptions()
    work = work_folder(folder)
    engine = engine or LocalEngine()
    report = progress or (lambda step, done, total: None)
    with only_writer(work):
        put_back(work, folder)
        check_output(folder, overwrite)
        run = _Run(work, tokenizer, options, engine, report)
        try:
            run.read(documents)
            run.tokenise()
            plan = run.plan(seq_len, strategy, overflow, seed)
            fingerprint = run.fingerprint(plan)
            files, checksums, counts = run.write(plan, fingerprint, file_format)
            manifest = run.manifest(plan, fingerprint, files, checksums, counts, sources, file_format)
            with written_whole(run.rows / MANIFEST_NAME) as path:
                path.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
            move_into_place(run.rows, folder, overwrite, work)
        except BaseException:
            run.leave()
            raise
        remove(work)
    return manifest


@dataclass(frozen=True)
class _Tokenising:
    """What a process needs to tokenise chunks."""

    work: Path
    encode: DocumentEncoder
    settings: str

    def tokens(self, number: int) -> Path:
        return self.work / f"tokens-{number:06d}.arrow"

    def text(self, number: int) -> Path:
        return self.work / f"text-{number:06d}.arrow"


@dataclass(frozen=True)
class _Writing:
    """What a process needs to write shards of rows."""

    work: Path
    rows: Path
    names: tuple[str, ...]
    bounds: tuple[int, ...]  # rows of each shard
    fingerprint: str
    file_format: FileFormat
    rows_at_once: int

    def sidecar(self, number: int) -> Path:
        return self.work / f"rows-{number:05d}.json"


class _Run:
    """The steps of one run over its work folder."""

    def __init__(
        self,
        work: Path,
        tokenizer: PreTrainedTokenizerBase,
        options: TokenizeOptions,
        engine: Engine,
        report: Progress,
    ) -> None:
        self.work, self.rows = work, work / "rows"
        self.tokenizer, self.options, self.engine, self.report = tokenizer, options, engine, report
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self.form = ""
        self.chunk_sizes: list[int] = []
        self.source_fingerprint = ""
        self.kept = 0

    def read(self, documents: Iterable[Mapping[str, str]]) -> None:
        """Write each chunk's text, unless its tokens are there already."""
        digest: DocumentsDigest | None = None
        todo: list[int] = []
        for number, chunk in enumerate(_chunks(documents)):
            if digest is None:
                columns = [name for name in chunk[0] if name != "source"]
                self.form, digest = form_of(columns), DocumentsDigest(columns)
                self._prepare(chunk[0].get("source", "document 0"))
            chunk_digest = _with_sources(digest.update(chunk), chunk)
            if self._is_done(number, chunk_digest):
                self.kept += 1
            else:
                table = table_of([dict(row) for row in chunk]).replace_schema_metadata({"digest": chunk_digest})
                _write_arrow(table, self.jobs.text(number))
                todo.append(number)
            self.chunk_sizes.append(len(chunk))
            self.report("reading", sum(self.chunk_sizes), None)
        if digest is None:
            raise DataError("there is no document to pack: the input is empty")
        if self.kept:
            logger.info("%d chunks of documents were tokenised by an earlier run and are kept", self.kept)
        self.todo, self.source_fingerprint = todo, digest.hexdigest()
        self.digest = digest

    def _prepare(self, first: str) -> None:
        encode = DocumentEncoder(
            self.tokenizer,
            self.form,
            self.options.train_on_prompt,
            self.options.turns,
            self.options.max_length,
            self.options.on_unsupervised == "drop",
            first,
        )
        self.template = chat_template_fingerprint(self.tokenizer) if self.form == "messages" else None
        # what a chunk's tokens follow from besides its text
        settings = [ROWS_SCHEMA_VERSION, self.form, self.tokenizer_fingerprint, self.template, asdict(self.options)]
        self.jobs = _Tokenising(self.work, encode, hashlib.sha256(json.dumps(settings).encode()).hexdigest())

    def _is_done(self, number: int, digest: str) -> bool:
        path = self.jobs.tokens(number)
        if not path.is_file() or (meta := _metadata(path)).get("key") != _key(self.jobs.settings, digest):
            return False
        try:
            return meta.get("sha256") == _tokens_digest(_open_arrow(path))
        except (DataError, ValueError):  # damaged since: tokenise again
            return False

    def tokenise(self) -> None:
        """Make the chunks' tokens that are missing."""
        done, total = 0, sum(self.chunk_sizes)
        done = total - sum(self.chunk_sizes[number] for number in self.todo)
        self.report("tokenising", done, total)
        for counts in self.engine.run(_tokenise_chunk, self.jobs, self.todo):
            done += counts["read"]
            self.report("tokenising", done, total)
        # an earlier run may have had more documents
        for path in self.work.glob("tokens-[0-9]*.arrow"):
            if int(path.stem.split("-")[1]) >= len(self.chunk_sizes):
                path.unlink()

    def plan(self, seq_len: int, strategy: str, overflow: str, seed: int) -> PackingPlan:
        """Plan all rows from the lengths of the chunks' documents, and save what the shards are written from."""
        self.counts: dict[str, int] = {}
        lengths = []
        for number in range(len(self.chunk_sizes)):
            meta = _metadata(self.jobs.tokens(number))
            for name, count in json.loads(meta["counts"]).items():
                self.counts[name] = self.counts.get(name, 0) + count
            lengths.append(_read_lengths(self.jobs.tokens(number)))
        starts = np.cumsum([0, *map(len, lengths)])
        if not starts[-1]:
            raise DataError(
                f"none of {self.counts['read']} documents has a supervised token, so all were dropped; check the "
                f"fields and max_length={self.options.max_length}"
            )
        plan = self._plan(np.concatenate(lengths), starts, seq_len, strategy, overflow, seed)
        del lengths
        if not plan.num_rows:
            raise DataError(
                f"all {plan.num_dropped} documents are longer than --seq-len {seq_len} and --overflow drop leaves "
                "none; raise --seq-len, or choose --overflow split"
            )
        arrays = {"starts": starts, **{name: getattr(plan, name) for name in _PLAN_ARRAYS}}
        for name, array in arrays.items():
            save_array(self.work / f"plan-{name}.npy", array)
        self.report("planning", plan.num_rows, plan.num_rows)
        return plan

    def _plan(
        self, lengths: np.ndarray, starts: np.ndarray, seq_len: int, strategy: str, overflow: str, seed: int
    ) -> PackingPlan:
        """The plan, without the documents of which it would cut off every supervised token, if those are dropped."""
        too_long = np.flatnonzero(lengths > seq_len)
        if overflow == "error" and len(too_long):
            first = int(too_long[0])
            raise DataError(too_long_message(self._name(first, starts), int(lengths[first]), len(too_long), seq_len))
        plan = plan_rows(lengths, seq_len, strategy, overflow=overflow, seed=seed)
        left = np.arange(0)
        while len(bare := documents_cut_bare(plan, lengths, partial(_supervised, self.jobs, starts))):
            if len(bare) == len(np.unique(plan.document_indices)):
                raise DataError(
                    f"rows of {seq_len} tokens with overflow {overflow} cut off every supervised token; raise "
                    "--seq-len, or choose --overflow split"
                )
            if self.options.on_unsupervised == "error":
                said = cut_bare_message(self._name(int(bare[0]), starts), len(bare), seq_len)
                other = "" if overflow == "split" else " choose --overflow split,"
                raise DataError(
                    f"{said}; raise --seq-len,{other} or leave such documents out with on_unsupervised='drop' "
                    "(--on-unsupervised drop)"
                )
            self.counts["cut_bare"] = self.counts.get("cut_bare", 0) + len(bare)
            left = np.setdiff1d(left if len(left) else np.arange(len(lengths)), bare)
            plan = plan_rows(lengths[left], seq_len, strategy, overflow=overflow, seed=seed)
            plan = replace(plan, document_indices=left[plan.document_indices])
        return plan

    def _name(self, document: int, starts: np.ndarray) -> str:
        """Where a tokenised document was read from."""
        chunk = int(np.searchsorted(starts, document, side="right")) - 1
        table = _open_arrow(self.jobs.tokens(chunk))
        if "source" not in table.column_names:
            return f"document {document}"
        return table.column("source")[document - int(starts[chunk])].as_py()

    def fingerprint(self, plan: PackingPlan) -> str:
        """Of everything that the rows follow from."""
        return pack_fingerprint(
            source=self.source_fingerprint,
            tokenizer=self.tokenizer_fingerprint,
            chat_template=self.template,
            options=asdict(self.options),
            seq_len=plan.seq_len,
            strategy=plan.strategy,
            overflow=plan.overflow,
            seed=plan.seed,
        )

    def write(
        self, plan: PackingPlan, fingerprint: str, file_format: FileFormat
    ) -> tuple[dict[str, int], dict[str, str], Counts]:
        """Write the shards that are missing; bytes and SHA-256 of each file, and what they hold together."""
        with room_needed(self.rows):
            self.rows.mkdir(exist_ok=True)
        count = max(1, min(plan.num_rows, -(-plan.num_tokens // _SHARD_TOKENS)))
        names = tuple(f"data-{index:05d}-of-{count:05d}.{file_format}" for index in range(count))
        bounds = tuple(index * plan.num_rows // count for index in range(count + 1))
        jobs = _Writing(
            self.work, self.rows, names, bounds, fingerprint, file_format,
            max(1, _BLOCK_TOKENS // plan.seq_len),
        )  # fmt: skip
        for path in self.rows.iterdir():  # of an earlier run with other settings
            if path.name not in names:
                path.unlink()
        todo = [number for number in range(count) if not _is_written(jobs, number)]
        if len(todo) < count:
            logger.info("%d shards of rows were written by an earlier run and are kept", count - len(todo))
        done = count - len(todo)
        self.report("writing", done, count)
        for _ in self.engine.run(_write_shard, jobs, todo):
            done += 1
            self.report("writing", done, count)
        sidecars = [json.loads(jobs.sidecar(number).read_text()) for number in range(count)]
        totals = {name: sum(s["counts"][name] for s in sidecars) for name in sidecars[0]["counts"]}
        sizes, sums = ({name: s[key] for name, s in zip(names, sidecars, strict=True)} for key in ("bytes", "sha256"))
        return sizes, sums, totals

    def manifest(
        self,
        plan: PackingPlan,
        fingerprint: str,
        files: dict[str, int],
        checksums: dict[str, str],
        totals: Counts,
        sources: Iterable[str],
        file_format: FileFormat,
    ) -> PackedManifest:
        """The manifest, from what was counted while writing."""
        import packflex

        assert totals["tokens"] == plan.num_tokens, "every token of the plan is written"
        return PackedManifest(
            manifest_version=MANIFEST_VERSION,
            packflex_version=packflex.__version__,
            fingerprint=fingerprint,
            file_format=file_format,
            files=files,
            checksums=checksums,
            rows=plan.num_rows,
            documents=totals["documents"],
            tokens=totals["tokens"],
            supervised_tokens=totals["supervised"],
            seq_len=plan.seq_len,
            efficiency=plan.efficiency,
            strategy=plan.strategy,
            overflow=plan.overflow,
            seed=-1 if plan.seed is None else plan.seed,
            sources=list(sources),
            source_fingerprint=self.source_fingerprint,
            document_format=self.form,
            tokenizer=tokenizer_reference(self.tokenizer),
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            chat_template_fingerprint=self.template,
            options=asdict(self.options),
            counts={
                "documents read": self.counts["read"],
                "without supervision, dropped": self.counts["dropped"],
                "cut to --max-length": self.counts["truncated"],
                "tokens cut off": self.counts["truncated_tokens"] + plan.truncated_tokens,
                "longer than a row, split": plan.num_split,
                "longer than a row, truncated": plan.num_truncated,
                "longer than a row, dropped": plan.num_dropped,
                "pieces left without supervision": totals["unsupervised"],
                **({"supervision cut off, dropped": self.counts["cut_bare"]} if "cut_bare" in self.counts else {}),
            },
        )

    def leave(self) -> None:
        """Keep what a later run can use; nothing is worth keeping before the first chunk is done."""
        if not any(self.work.glob("tokens-*.arrow")) and not is_replacing(self.work):
            shutil.rmtree(self.work, ignore_errors=True)


_SHARD_COUNTS = ("rows", "documents", "tokens", "supervised", "unsupervised")
_PLAN_ARRAYS = ("document_indices", "piece_starts", "piece_lengths", "row_offsets")


def _chunks(documents: Iterable[Mapping[str, str]]) -> Iterator[list[Mapping[str, str]]]:
    """Documents in chunks that follow from the documents alone."""
    chunk: list[Mapping[str, str]] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += sum(map(len, document.values()))
        if len(chunk) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _key(settings: str, digest: str) -> str:
    return hashlib.sha256(f"{settings}{digest}".encode()).hexdigest()


def _with_sources(digest: str, chunk: list[Mapping[str, str]]) -> str:
    """The digest of a chunk and of where its documents were read from, which its tokens keep for messages."""
    return _key(digest, "\n".join(row.get("source", "") for row in chunk))


def _tokenise_chunk(jobs: _Tokenising, number: int) -> Counts:
    """Tokens of one chunk: a supervised token as its id, any other as the complement of its id."""
    import pyarrow as pa

    table = _open_arrow(jobs.text(number))
    digest = table.schema.metadata[b"digest"].decode()
    values: list[np.ndarray] = []
    lengths: list[int] = []
    sources: list[str] = []
    counts = {"read": table.num_rows, "dropped": 0, "truncated": 0, "truncated_tokens": 0}
    for batch in table.to_batches(1000):
        columns = batch.to_pydict()
        out = jobs.encode(columns, list(range(batch.num_rows)))
        for ids, labels in zip(out["input_ids"], out["labels"], strict=True):
            tokens = np.array(ids, dtype=np.int32)
            values.append(np.where(np.array(labels, dtype=np.int32) == IGNORED, ~tokens, tokens))
            lengths.append(len(ids))
        sources += out["source"]
        counts["dropped"] += batch.num_rows - len(out["input_ids"])
        counts["truncated"] += sum(cut > 0 for cut in out["cut"])
        counts["truncated_tokens"] += sum(out["cut"])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens_of = np.concatenate(values) if values else np.zeros(0, np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens_of))
    made = {"tokens": column}
    if "source" in table.column_names:
        made["source"] = pa.array(sources, pa.large_string())
    tokens = pa.table(made)
    meta = {"key": _key(jobs.settings, digest), "counts": json.dumps(counts), "sha256": _tokens_digest(tokens)}
    _write_arrow(tokens.replace_schema_metadata(meta), jobs.tokens(number))
    jobs.text(number).unlink()
    return counts


def _write_shard(jobs: _Writing, number: int) -> Counts:
    """One file of rows, gathered block by block from the chunks' tokens."""
    import pyarrow as pa

    plan = {name: np.load(jobs.work / f"plan-{name}.npy", mmap_mode="r") for name in ("starts", *_PLAN_ARRAYS)}
    first, last = jobs.bounds[number], jobs.bounds[number + 1]
    counts = dict.fromkeys(_SHARD_COUNTS, 0) | {"rows": last - first}
    path = jobs.rows / jobs.names[number]
    jobs.sidecar(number).unlink(missing_ok=True)
    with written_whole(path) as partial, shard_writer(partial, jobs.file_format) as writer:
        for row in range(first, last, jobs.rows_at_once):
            offsets = np.asarray(plan["row_offsets"][row : min(row + jobs.rows_at_once, last) + 1])
            at = slice(offsets[0], offsets[-1])
            index, starts, sizes = (np.asarray(plan[name][at]) for name in _PLAN_ARRAYS[:3])
            tokens = _gather(jobs, np.asarray(plan["starts"]), index, starts, sizes)
            is_supervised = tokens >= 0
            ids = np.where(is_supervised, tokens, ~tokens)
            begins = np.cumsum(sizes) - sizes
            is_supervised[begins] = False
            labels = np.where(is_supervised, ids, np.int32(IGNORED))
            ends = np.concatenate([[0], np.cumsum(sizes)])[offsets - offsets[0]]
            columns = [_lists(ids, ends), _lists(labels, ends), _lists(sizes, offsets - offsets[0])]
            writer.write_table(pa.table(columns, names=["input_ids", "labels", "lengths"]))
            counts["documents"] += len(sizes)
            counts["tokens"] += len(ids)
            counts["supervised"] += int(is_supervised.sum())
            counts["unsupervised"] += int((supervised_in_pieces(is_supervised, sizes) == 0).sum())
    record = {
        "fingerprint": jobs.fingerprint,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "counts": counts,
    }
    with written_whole(jobs.sidecar(number)) as partial:
        partial.write_text(json.dumps(record))
    return counts


def _supervised(
    jobs: _Tokenising, chunk_starts: np.ndarray, index: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    return _gather(jobs, chunk_starts, index, starts, sizes) >= 0


def _is_written(jobs: _Writing, number: int) -> bool:
    path, sidecar = jobs.rows / jobs.names[number], jobs.sidecar(number)
    if not (path.is_file() and sidecar.is_file()):
        return False
    try:
        record = json.loads(sidecar.read_text())
        known = (record["fingerprint"], record["bytes"], record["sha256"])
        whole = all(isinstance(record["counts"][name], int) for name in _SHARD_COUNTS)
    except (ValueError, KeyError, TypeError):  # damaged: write the shard again
        return False
    return whole and known == (jobs.fingerprint, path.stat().st_size, sha256_of(path))


def _gather(
    jobs: _Tokenising | _Writing, chunk_starts: np.ndarray, index: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """int32 tokens of the pieces one after the other; chunks are mapped only while they are read."""
    out = np.empty(int(sizes.sum()), dtype=np.int32)
    begins = np.cumsum(sizes) - sizes
    chunk_of = np.searchsorted(chunk_starts, index, side="right") - 1
    by_chunk = np.argsort(chunk_of, kind="stable")
    cuts = np.searchsorted(chunk_of[by_chunk], np.arange(len(chunk_starts)))
    for chunk in np.unique(chunk_of).tolist():
        here = by_chunk[cuts[chunk] : cuts[chunk + 1]]
        column = _open_arrow(jobs.work / f"tokens-{chunk:06d}.arrow").column("tokens").chunk(0)
        values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        source = offsets[index[here] - chunk_starts[chunk]] + starts[here]
        count = sizes[here]
        ramp = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        out[np.repeat(begins[here], count) + ramp] = values[np.repeat(source, count) + ramp]
        del values, offsets, column
    return out


def _lists(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))


def _write_arrow(table: pa.Table, path: Path) -> None:
    import pyarrow as pa

    with written_whole(path) as partial, pa.ipc.new_file(str(partial), table.schema) as writer:
        writer.write_table(table)


def _open_arrow(path: Path) -> pa.Table:
    """A table mapped into memory."""
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: missing or damaged ({one_line(error)}); remove the folder {path.parent} and pack again"
        ) from error


def _tokens_digest(table: pa.Table) -> str:
    """SHA-256 of a chunk's tokens, lengths and sources."""
    digest = hashlib.sha256()
    for chunk in table.column("tokens").chunks:
        digest.update(chunk.value_lengths().to_numpy().tobytes())
        digest.update(chunk.flatten().to_numpy().tobytes())
    if "source" in table.column_names:
        digest.update("\n".join(table.column("source").to_pylist()).encode())
    return digest.hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            found = pa.ipc.open_file(source).schema.metadata or {}
    except (pa.ArrowException, OSError):
        return {}
    return {name.decode(): value.decode() for name, value in found.items()}


def _read_lengths(path: Path) -> np.ndarray:
    column = _open_arrow(path).column("tokens")
    return np.diff(column.chunk(0).offsets.to_numpy()) if column.num_chunks else np.zeros(0, np.int32)
