"""The command line: `packflex pack`, `packflex inspect`, `packflex doctor`.

An error of the user's is one line on stderr and exit code 2. Heavy imports stay inside the commands, so that help and
usage errors come at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from packflex.data.write import PackedManifest

app = typer.Typer(
    name="packflex",
    help="Pack short documents into full rows for fine-tuning, and look at what was packed.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# typer >= 0.2x carries its own copy of click and earlier ones use click itself: this is `UsageError` of either.
_UsageError: Any = typer.BadParameter.__base__
_USER_ERROR = 2


class Strategy(Enum):
    """Packing strategies, see `packflex.packing`."""

    best_fit = "best_fit"
    next_fit = "next_fit"
    wrapped = "wrapped"


class Overflow(Enum):
    """What happens to a document longer than a row."""

    split = "split"
    truncate = "truncate"
    drop = "drop"
    error = "error"


class DocumentFormat(Enum):
    """Forms of a raw document."""

    auto = "auto"
    text = "text"
    prompt = "prompt"
    messages = "messages"


class Supervision(Enum):
    """Turns of the assistant that are supervised."""

    all = "all"
    last = "last"


class OnDuplicate(Enum):
    """What happens to a record whose id came before."""

    report = "report"
    error = "error"
    drop = "drop"
    keep = "keep"


class EngineName(Enum):
    """Where tokenising and writing run."""

    local = "local"
    ray = "ray"


class OnUnsupervised(Enum):
    """What happens to a document without a supervised token."""

    error = "error"
    drop = "drop"


class FileFormat(Enum):
    """Formats on disk."""

    parquet = "parquet"
    arrow = "arrow"


def main() -> None:
    """Run the command line and exit: 0 when done, 1 when a check failed, 2 for an error of the user's."""
    show_traceback = "--traceback" in sys.argv
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        _fail(f"{error.format_message().rstrip('.')} (see --help)")
    # Wrong data, options and files are ValueErrors or OSErrors throughout packflex; anything else is a bug and shows.
    except (ValueError, OSError) as error:
        if show_traceback:
            raise
        _fail(str(error))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print(f"packflex: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(_USER_ERROR)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"packflex {version('packflex')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _global_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Pack short documents into full rows for fine-tuning, and look at what was packed."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def pack(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files, folders or globs of .jsonl, .parquet or .arrow; one hub data set id; or 'stdlib'.",
        ),
    ],
    tokenizer: Annotated[str, typer.Option(metavar="DIR_OR_ID", help="Tokenizer: a folder or a hub id.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder to write; must not exist.")],
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 8192,
    strategy: Annotated[Strategy, typer.Option(help="How documents share rows.")] = Strategy.best_fit,
    overflow: Annotated[Overflow, typer.Option(help="What to do with documents longer than a row.")] = Overflow.split,
    format: Annotated[DocumentFormat, typer.Option(help="Form of a document.")] = DocumentFormat.auto,
    text_field: Annotated[str, typer.Option(help="Field of plain text.")] = "text",
    prompt_field: Annotated[str, typer.Option(help="Field of the prompt.")] = "prompt",
    completion_field: Annotated[str, typer.Option(help="Field of the completion.")] = "completion",
    messages_field: Annotated[str, typer.Option(help="Field of the list of messages.")] = "messages",
    tools_field: Annotated[str, typer.Option(help="Field of the list of tools.")] = "tools",
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Jinja chat template instead of the tokenizer's.")
    ] = None,
    train_on_prompt: Annotated[bool, typer.Option("--train-on-prompt", help="Supervise prompts too.")] = False,
    turns: Annotated[Supervision, typer.Option(help="Turns of the assistant that are supervised.")] = Supervision.all,
    max_length: Annotated[int | None, typer.Option(min=2, help="Cut documents to this many tokens first.")] = None,
    on_unsupervised: Annotated[
        OnUnsupervised,
        typer.Option(help="What to do with documents without a supervised token, also where rows cut it off."),
    ] = OnUnsupervised.error,
    id_field: Annotated[str, typer.Option(help="Field that names a record, if there is one.")] = "id",
    on_duplicate: Annotated[
        OnDuplicate,
        typer.Option(help="What to do with a record whose id came before; report keeps it, and keep does not look."),
    ] = OnDuplicate.report,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or of 'stdlib'.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Read only this many documents.")] = None,
    file_format: Annotated[FileFormat, typer.Option(help="Format on disk.")] = FileFormat.parquet,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Worker processes.")] = None,
    engine: Annotated[
        EngineName, typer.Option(help="Where the work runs: this machine, or a Ray cluster (packflex[ray]).")
    ] = EngineName.local,
    seed: Annotated[int, typer.Option(help="Seed of the order of rows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a packed data set at DIR.")] = False,
) -> None:
    """Tokenise documents, pack them into rows and write them with a manifest.

    A run that was cut short goes on where it stopped when the same command is run again.
    """
    from packflex.data.write import check_output

    check_output(output, overwrite)
    _quiet_libraries()
    from packflex.data.build import TokenizeOptions, build_packed
    from packflex.data.engines import LocalEngine, RayEngine
    from packflex.data.sources import guess_kind, read_documents
    from packflex.data.tokenizer import load_tokenizer
    from packflex.data.write import read_tables
    from packflex.inspect import summarise_tables
    from packflex.render import progress_bars, report_table

    kind = guess_kind(inputs)
    runner = RayEngine(num_proc) if engine is EngineName.ray else LocalEngine(num_proc)
    chosen = load_tokenizer(tokenizer, chat_template)
    documents = read_documents(
        kind,
        inputs[0] if kind == "hub" and len(inputs) == 1 else list(inputs),
        format=format.value,
        text_field=text_field,
        prompt_field=prompt_field,
        completion_field=completion_field,
        messages_field=messages_field,
        tools_field=tools_field,
        id_field=id_field,
        on_duplicate=on_duplicate.value,
        config=config,
        split=split,
        limit=limit,
    )
    with _warnings_shown(), progress_bars() as progress:
        manifest = build_packed(
            documents,
            output,
            chosen,
            seq_len=seq_len,
            strategy=strategy.value,
            overflow=overflow.value,
            seed=seed,
            tokenize=TokenizeOptions(train_on_prompt, turns.value, max_length, on_unsupervised.value),
            sources=inputs,
            file_format=file_format.value,
            overwrite=overwrite,
            engine=runner,
            progress=progress,
        )
    report = summarise_tables(read_tables(output, ("labels", "lengths")), seq_len)
    _console().print(report_table(f"packed into {output}", report, manifest))


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder that `packflex pack` wrote.")],
    row: Annotated[int, typer.Option(min=0, help="Row to show, from 0.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="Tokenizer to decode with; the one it was packed with.")
    ] = None,
    max_chars: Annotated[int, typer.Option(min=0, help="Show this much of each document; 0 for all.")] = 600,
    max_documents: Annotated[int, typer.Option(min=0, help="Show this many documents; 0 for all.")] = 8,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save lengths and the row's block mask as a picture.")
    ] = None,
) -> None:
    """Show what a packed data set holds: its numbers, document lengths, and one row as text."""
    _quiet_libraries()
    from packflex.data.errors import DataError
    from packflex.data.tokenizer import load_tokenizer
    from packflex.data.write import load_packed, read_manifest
    from packflex.inspect import CLOSE, OPEN, summarise, text_histogram, view_row
    from packflex.render import check_picture, print_document, report_table, save_plot

    if plot is not None:
        check_picture(plot)
    manifest = read_manifest(path)
    chosen = None if tokenizer is None else load_tokenizer(tokenizer)
    data = load_packed(path, chosen)
    if row >= manifest.rows:
        raise DataError(f"--row {row}: {path} has {manifest.rows} rows, 0 to {manifest.rows - 1}")
    report = summarise(data.dataset, manifest.seq_len)
    out = _console()
    out.print(report_table(str(path), report, manifest))
    out.print("\nDocument lengths (tokens, documents)", style="bold")
    for line in text_histogram(report.document_lengths, width=max(10, min(48, out.width - 30))):
        out.print(line, highlight=False, markup=False)
    values = data.dataset[row]
    if chosen is None:
        chosen, why = _tokenizer_of(manifest)
        if why:
            out.print(f"\n{why}", markup=False)
    views = view_row(values, chosen)
    used = views[-1].end if views else 0
    out.print(
        f"\nRow {row}: {len(views)} documents, {used:,} of {manifest.seq_len:,} tokens "
        f"({used / manifest.seq_len:.1%}); supervised text stands in {OPEN} {CLOSE}",
        style="bold",
        markup=False,
    )
    shown = views[:max_documents] if max_documents else views
    for view in shown:
        print_document(out, view, max_chars)
    if len(shown) < len(views):
        out.print(f"... {len(views) - len(shown)} more documents (--max-documents 0 shows all)", style="dim")
    if used < manifest.seq_len:
        out.rule(f"padding: {manifest.seq_len - used:,} tokens", align="left", style="dim")
    if plot is not None:
        save_plot(plot, report, values["lengths"], row)
        out.print(f"\nsaved {plot}", markup=False)


@app.command()
def doctor() -> None:
    """Print versions, devices and the attention backend, and check its numbers against float64."""
    from rich.table import Table

    from packflex import doctor as examine

    out = _console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, version in examine.versions().items():
        table.add_row(name, version)
    for index, device in enumerate(examine.devices()):
        table.add_row("devices" if index == 0 else "", device)
    backend, reason = examine.backend_and_reason()
    table.add_row("attention", f"{backend}: {reason}")
    out.print(table)
    checks = examine.check_numerics()
    out.print("\nflex_attention against float64, relative errors", style="bold")
    results = Table(box=None, pad_edge=False)
    for heading in ("backend", "device", "dtype", *checks[0].errors, "allowed", ""):
        results.add_column(heading)
    for check in checks:
        errors = [f"{error:.1e}" for error in check.errors.values()]
        verdict = "[green]ok[/]" if check.passed else "[bold red]WRONG[/]"
        results.add_row(check.backend, check.device, check.dtype, *errors, f"{check.tolerance:.0e}", verdict)
    out.print(results)
    leaks = examine.check_leaks()
    out.print("\ndocuments that see one another, tiny models of each family", style="bold")
    for leak in leaks:
        out.print(f"{leak.family:<12}{leak.device:<6}", end="")
        out.print("[green]none[/]" if leak.passed else "[bold red]LEAKS[/]")
        if not leak.passed:
            out.print(leak.finding, markup=False)
    if not (all(check.passed for check in checks) and all(leak.passed for leak in leaks)):
        print("packflex: attention is wrong on this machine; please report the lines above", file=sys.stderr)
        raise typer.Exit(1)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Our own warnings as lines on stderr."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("packflex: warning: %(message)s"))
    ours = logging.getLogger("packflex")
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)


def _quiet_libraries() -> None:
    """Leave stderr to our own lines: no retry chatter of the hub, bars only where someone watches."""
    import datasets

    for name in ("huggingface_hub", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _tokenizer_of(manifest: PackedManifest) -> tuple[PreTrainedTokenizerBase | None, str]:
    """The tokenizer a data set was packed with if it is on this machine, else None and a line that says so."""
    from packflex.data.errors import DataError
    from packflex.data.tokenizer import load_tokenizer, tokenizer_fingerprint

    hint = "token ids are shown; give --tokenizer to see text"
    try:
        tokenizer = load_tokenizer(manifest.tokenizer, local_files_only=True)
    except DataError:
        return None, f"tokenizer {manifest.tokenizer} is not on this machine: {hint}"
    if tokenizer_fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        return None, f"tokenizer {manifest.tokenizer} has changed since packing: {hint}"
    return tokenizer, ""
