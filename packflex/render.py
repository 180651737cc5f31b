"""What the command line draws with rich: the table of a packed data set, a document of a row, a saved picture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from packflex.data.errors import DataError
from packflex.data.files import room_needed
from packflex.inspect import CLOSE, OPEN, DocumentView, PackedReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

    from packflex.data.write import PackedManifest

_PICTURES = (".png", ".pdf", ".svg")


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int | None], None]]:
    """A function of step, done and total that draws a bar for each step, on stderr where someone watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    tasks: dict[str, TaskID] = {}

    def show(step: str, done: int, total: int | None) -> None:
        if step not in tasks:
            tasks[step] = bars.add_task(step, total=total)
        bars.update(tasks[step], completed=done, total=total)

    with bars:
        yield show


def report_table(title: str, report: PackedReport, manifest: PackedManifest) -> Table:
    """The numbers of a packed data set and how it was made."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    table.add_row("rows", f"{report.rows:,} of {report.seq_len:,} tokens")
    table.add_row("documents", f"{report.documents:,}")
    table.add_row("tokens", f"{report.tokens:,}")
    share = report.supervised_tokens / report.tokens
    table.add_row("supervised tokens", f"{report.supervised_tokens:,} ({share:.1%})")
    if report.unsupervised_documents:
        table.add_row("documents without supervision", f"{report.unsupervised_documents:,} (cut by packing)")
    table.add_row("efficiency", f"{report.efficiency:.2%}")
    table.add_row("padding", f"{report.padding:,} tokens")
    table.add_row("documents per row", f"{report.documents_per_row}  (least / median / mean / most)")
    table.add_row("supervised per row", f"{report.supervised_per_row}")
    table.add_row("causal pairs per row", f"{report.pairs_per_row}  (what attention costs)")
    for name, count in manifest.counts.items():
        table.add_row(name, f"{count:,}")
    table.add_row("packing", f"{manifest.strategy}, overflow {manifest.overflow}, seed {manifest.seed}")
    table.add_row("tokenizer", escape(manifest.tokenizer))
    files = f"{len(manifest.files)} file{'s' if len(manifest.files) > 1 else ''}"
    table.add_row("format", f"{manifest.document_format} in {manifest.file_format}, {files}")
    return table


def print_document(out: Console, view: DocumentView, max_chars: int) -> None:
    """A rule with the numbers of a document, then its text, at most `max_chars` of it (0 for all).

    What is supervised is green and stands between marks, so it can be told without colour.
    """
    from rich.text import Text

    count = view.end - view.start
    out.rule(
        f"document {view.index}: tokens {view.start}-{view.end - 1} ({count}), {view.supervised} supervised",
        align="left",
        style="dim",
    )
    text = Text()
    room = max_chars or sum(len(piece) for piece, _ in view.pieces)
    for piece, said in view.pieces:
        if room <= 0:
            break
        cut = piece[:room]
        room -= len(cut)
        text.append(f"{OPEN}{cut}{CLOSE}" if said else cut, style="green" if said else "")
    rest = sum(len(piece) for piece, _ in view.pieces) - (max_chars or sys.maxsize)
    if rest > 0:
        text.append(f" ... {rest:,} more characters", style="dim")
    out.print(text)


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be saved, before the work.

    Raises:
        DataError: a name that is no picture's, or a folder that is not there.
    """
    if path.suffix.lower() not in _PICTURES:
        raise DataError(f"{path}: a picture's name must end in {', '.join(_PICTURES)}")
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist; make it first")


def save_plot(path: Path, report: PackedReport, lengths: list[int], row: int) -> None:
    """Save the document lengths beside the block mask of row number `row`, which holds `lengths`, as a picture."""
    from packflex.layout import PackedLayout
    from packflex.plots import overview

    # At least 16 tiles a side, so that short rows show something too.
    block = 128
    while block > 8 and report.seq_len < 16 * block:
        block //= 2
    layout = PackedLayout.from_lengths([lengths], report.seq_len)
    with room_needed(path):
        overview(report.document_lengths, layout, row_name=f"Row {row}", block_size=block).savefig(path)
