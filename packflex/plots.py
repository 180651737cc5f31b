"""Pictures as matplotlib figures: document lengths, the block mask of a packed row, a loss curve, a
measurement by step.

Each function returns a `Figure` of its own (no pyplot, no global state); save it with `figure.savefig("out.png")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from packflex.layout import PackedLayout

_INK = "#1f2933"
_MUTED = "#7b8794"
_GRID = "#e4e7eb"
_BLUE = "#2f6fb3"
_ORANGE = "#d9772b"
_EMPTY, _PARTIAL, _FULL = "#f3f5f7", "#9dc3e6", "#2f6fb3"
_DOCUMENTS = ("#e9b872", "#7fb7be", "#c98bb9", "#9cc069", "#8d99ae", "#e07a5f")
_PAD = "#ffffff"
_DPI = 150
# More lines than this are a grey smear, not boundaries.
_MOST_OUTLINES = 200


def length_histogram(
    lengths: Sequence[int] | np.ndarray, seq_len: int | None = None, title: str = "Document lengths"
) -> Figure:
    """Histogram of document lengths on a logarithmic axis, with the median, the 95th percentile and the row length.

    Args:
        lengths: tokens of each document, at least one document.
        seq_len: tokens of a row, drawn as a line when given.
        title: above the picture.

    Raises:
        ValueError: no length, or one below 1.
    """
    figure, (axes,) = _figure(7.2, 3.6)
    _draw_histogram(axes, lengths, seq_len, title)
    return figure


def _draw_histogram(axes: Axes, lengths: Sequence[int] | np.ndarray, seq_len: int | None, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    values = np.asarray(lengths)
    if values.size == 0 or values.min() < 1:
        raise ValueError(f"lengths must be at least one number of at least 1; got {values[:8].tolist()}")
    top = max(int(values.max()), seq_len or 0, 2)
    edges = np.unique(np.round(np.geomspace(1, top + 1, 49)).astype(int))
    axes.hist(values, bins=edges.tolist(), color=_BLUE, edgecolor="white", linewidth=0.5, zorder=2)
    axes.set_xscale("log")
    axes.set_xlim(max(1, values.min() * 0.8), top * 1.25)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.set_xlabel("tokens in a document (logarithmic)")
    axes.set_ylabel("documents")
    marks = [(float(np.percentile(values, p)), f"{name} {np.percentile(values, p):,.0f}", _ORANGE, style)
             for p, name, style in ((50, "median", "-"), (95, "95%", "--"))]  # fmt: skip
    if seq_len is not None:
        marks.append((float(seq_len), f"row {seq_len:,}", _INK, ":"))
    for x, label, color, style in marks:
        axes.axvline(x, color=color, linestyle=style, linewidth=1.4, label=label, zorder=3)
    axes.legend(loc="upper right", facecolor="white", edgecolor="white", framealpha=0.9, fontsize=9, labelcolor=_INK)
    _title(axes, title, f"{values.size:,} documents, {int(values.sum()):,} tokens, longest {int(values.max()):,}")


def row_mask(
    layout: PackedLayout, row: int = 0, *, block_size: int = 128, causal: bool = True, window: int | None = None
) -> Figure:
    """The block mask of one packed row: tiles that are computed whole, computed with a mask, and skipped.

    Documents are outlined along the diagonal and shown as a coloured strip along the keys; the padded tail is white.

    Args:
        layout: the batch's layout.
        row: which row of it.
        block_size: tokens along each side of a tile.
        causal, window: as in `document_mask`.

    Raises:
        ValueError: a row that the layout does not have.
    """
    figure, (axes,) = _figure(6.4, 7.0)
    _draw_mask(axes, layout, row, block_size, causal, window)
    return figure


def overview(
    lengths: Sequence[int] | np.ndarray,
    layout: PackedLayout,
    row: int = 0,
    *,
    row_name: str | None = None,
    block_size: int = 128,
) -> Figure:
    """`length_histogram` of all documents beside the causal `row_mask` of one row.

    Args:
        lengths: tokens of each document.
        layout, row: which row.
        row_name: what the picture calls it; "Row 0" by default.
        block_size: tokens along each side of a tile.

    Raises:
        ValueError: as those two.
    """
    figure, (left, right) = _figure(13.6, 6.4, columns=2)
    _draw_histogram(left, lengths, layout.seq_len, "Document lengths")
    _draw_mask(right, layout, row, block_size, True, None, row_name)
    return figure


def _draw_mask(
    axes: Axes,
    layout: PackedLayout,
    row: int,
    block_size: int,
    causal: bool,
    window: int | None,
    name: str | None = None,
) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch, Rectangle

    kinds = tile_kinds(layout, row, block_size=block_size, causal=causal, window=window)
    lengths = layout.lengths[row]
    size = layout.seq_len
    extent = len(kinds) * block_size
    axes.grid(False)
    axes.imshow(
        kinds, cmap=ListedColormap([_EMPTY, _PARTIAL, _FULL]), vmin=0, vmax=2, extent=(0, extent, extent, 0),
        interpolation="nearest", zorder=1,
    )  # fmt: skip
    if len(kinds) <= 80:
        lines = np.arange(1, len(kinds)) * block_size
        axes.hlines(lines, 0, extent, color="white", linewidth=0.6, zorder=2)
        axes.vlines(lines, 0, extent, color="white", linewidth=0.6, zorder=2)
    strip = 0.035 * extent
    ends = np.cumsum(lengths)
    for index, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        start, color = int(end) - length, _DOCUMENTS[index % len(_DOCUMENTS)]
        axes.add_patch(
            Rectangle((start, -1.5 * strip), length, strip, facecolor=color, edgecolor="white",
                      linewidth=0.5 if len(lengths) <= _MOST_OUTLINES else 0, clip_on=False)
        )  # fmt: skip
        if len(lengths) <= _MOST_OUTLINES:
            axes.add_patch(
                Rectangle((start, start), length, length, fill=False, edgecolor=_INK, linewidth=0.9, zorder=3)
            )
    used = int(ends[-1]) if len(lengths) else 0
    if used < size:
        axes.add_patch(
            Rectangle((used, -1.5 * strip), size - used, strip, facecolor=_PAD, edgecolor=_MUTED, linewidth=0.6,
                      hatch="//////", clip_on=False)
        )  # fmt: skip
    axes.set_xlim(0, extent)
    axes.set_ylim(extent, -1.7 * strip)
    axes.set_xlabel("key token")
    axes.set_ylabel("query token")
    ticks = np.unique(np.linspace(0, extent, 5).astype(int))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    counts = [int((kinds == kind).sum()) for kind in (2, 1, 0)]
    handles = [
        Patch(facecolor=color, edgecolor=_MUTED, linewidth=0.5, label=f"{name} {count / kinds.size:.1%}")
        for name, color, count in zip(("whole", "masked", "skipped"), (_FULL, _PARTIAL, _EMPTY), counts, strict=True)
    ]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False, fontsize=9,
                labelcolor=_INK)  # fmt: skip
    kind = "causal" if causal else "bidirectional"
    kind += f", window {window:,}" if window is not None else ""
    _title(
        axes,
        f"{name or f'Row {row}'}: {len(lengths):,} documents in {size:,} tokens",
        f"{used / size:.1%} full, {kind}, tiles of {block_size} x {block_size}",
    )


def tile_kinds(
    layout: PackedLayout, row: int, *, block_size: int = 128, causal: bool = True, window: int | None = None
) -> np.ndarray:
    """What each tile of a row's score matrix needs: 0 nothing, 1 some of its scores, 2 all of them.

    Returns:
        int8 [query tiles, key tiles]. A last tile that sticks out of the row counts as whole when all of its part
        inside the row is seen.

    Example:
        >>> tile_kinds(PackedLayout.from_lengths([[4, 4]]), 0, block_size=2).tolist()
        [[1, 0, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 2, 1]]

    Raises:
        ValueError: a row that the layout does not have, or a block size below 1.
    """
    if not 0 <= row < layout.batch_size:
        raise ValueError(f"row must be 0 to {layout.batch_size - 1}; got {row}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1; got {block_size}")
    size = layout.seq_len
    lengths = np.asarray(layout.lengths[row], dtype=np.int64)
    ends = np.repeat(np.cumsum(lengths), lengths)
    query = np.arange(len(ends))
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    last = query if causal else ends - 1
    if window is not None:
        first, last = np.maximum(first, query - window + 1), np.minimum(last, query + window - 1)
    starts = np.arange(0, size, block_size)
    stops = np.minimum(starts + block_size, size)
    # Every query sees one interval of keys, so its share of a tile is an overlap of two intervals: [tokens, key tiles].
    seen = np.minimum(last[:, None] + 1, stops) - np.maximum(first[:, None], starts)
    rows = np.zeros((size, len(starts)), dtype=np.int64)  # the padded tail sees nothing
    rows[: len(ends)] = np.maximum(seen, 0)
    tiles = np.add.reduceat(rows, starts, axis=0)
    area = (stops - starts)[:, None] * (stops - starts)
    return (tiles > 0).astype(np.int8) + (tiles == area).astype(np.int8)


def loss_curve(
    steps: Sequence[int],
    train_loss: Sequence[float],
    heldout_steps: Sequence[int] = (),
    heldout_loss: Sequence[float] = (),
    title: str = "Loss",
) -> Figure:
    """Training loss by step with a running mean, and held-out points.

    Args:
        steps, train_loss: the training curve, in nats a supervised token; equally long.
        heldout_steps, heldout_loss: held-out measurements; equally long, may be empty.
        title: above the picture.

    Raises:
        ValueError: nothing to draw, or numbers that do not pair.
    """
    if len(steps) != len(train_loss) or len(heldout_steps) != len(heldout_loss):
        raise ValueError(
            "steps and losses must pair; got "
            f"{len(steps)} and {len(train_loss)} (training), {len(heldout_steps)} and {len(heldout_loss)} (held out)"
        )
    if not len(steps) and not len(heldout_steps):
        raise ValueError("there is no loss to draw: both curves are empty")
    figure, (axes,) = _figure(7.2, 4.0)
    if len(steps):
        loss = np.asarray(train_loss, dtype=float)
        axes.plot(steps, loss, color=_BLUE, alpha=0.3, linewidth=1, label="training", zorder=2)
        span = max(1, len(loss) // 20)
        if span > 1:
            sums = np.cumsum(np.concatenate([[0.0], loss]))
            index = np.arange(1, len(loss) + 1)
            begin = np.maximum(0, index - span)
            mean = (sums[index] - sums[begin]) / (index - begin)
            axes.plot(steps, mean, color=_BLUE, linewidth=1.8, label=f"training, mean of {span} steps", zorder=3)
    if len(heldout_steps):
        axes.plot(heldout_steps, heldout_loss, color=_ORANGE, marker="o", markersize=5, linewidth=1.6,
                  label="held out", zorder=4)  # fmt: skip
        for at, offset in {0: (6, 6), len(heldout_loss) - 1: (-4, 9)}.items():
            axes.annotate(
                f"{heldout_loss[at]:.2f}", (heldout_steps[at], heldout_loss[at]), textcoords="offset points",
                xytext=offset, color=_ORANGE, fontsize=9, ha="left" if at == 0 else "right",
            )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a supervised token)")
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    _title(axes, title, "")
    return figure


def step_curve(steps: Sequence[int], values: Sequence[float], label: str, title: str, percent: bool = False) -> Figure:
    """A measurement by step, with its median as a line.

    Args:
        steps, values: equally long, at least one.
        label: of the vertical axis.
        title: above the picture.
        percent: whether values are shares of 1, drawn from 0 to 100%.

    Raises:
        ValueError: nothing to draw, or numbers that do not pair.
    """
    if len(steps) != len(values) or not len(steps):
        raise ValueError(f"steps and values must pair and not be empty; got {len(steps)} and {len(values)}")
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, (axes,) = _figure(7.2, 3.0)
    axes.plot(steps, values, color=_BLUE, linewidth=1.2, marker="o" if len(steps) == 1 else None, zorder=2)
    middle = float(np.median(values))
    shown = f"{middle:.2%}" if percent else f"{middle:,.0f}"
    axes.axhline(middle, color=_ORANGE, linewidth=1.2, linestyle="--", label=f"median {shown}", zorder=3)
    axes.set_ylim(0, 1.05 if percent else max(max(values), middle) * 1.1 or 1)
    if not percent:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}" if percent else f"{y:,.0f}"))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="lower right")
    _title(axes, title, "")
    return figure


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # here and not above: pictures are the rare case of a command line
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=engine, facecolor="white")
    all_axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in all_axes:
        axes.grid(True, color=_GRID, linewidth=0.8, zorder=0)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_MUTED)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.xaxis.label.set(color=_INK, size=10)
        axes.yaxis.label.set(color=_INK, size=10)
    return figure, all_axes


def _title(axes: Axes, title: str, subtitle: str) -> None:
    text = title if not subtitle else f"{title}\n"
    axes.set_title(text, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=8)
    if subtitle:
        axes.annotate(
            subtitle, (0, 1), xycoords="axes fraction", textcoords="offset points", xytext=(0, 9),
            fontsize=9, color=_MUTED,
        )  # fmt: skip
