"""Draw the pictures of docs/masks.md: what each mask lets a query see, and what each score mod makes of the scores.

python scripts/make_mask_pictures.py --out docs/images/masks
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from packflex import PackedLayout, masks, score_mods
from packflex.mods.vectorised import over_indices

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE, TILE = 64, 16
INK, MUTED, DARK = "#1f2933", "#7b8794", "#2f6fb3"
LAYOUT = PackedLayout.from_lengths([[20, 9, 27]], SIZE)


def mask_pictures() -> dict[str, tuple[str, Any]]:
    """For each mask the call that the picture shows, and the mod."""
    return {
        "causal": ("causal", masks.causal),
        "sliding_window": ("sliding_window(12)", masks.sliding_window(12)),
        "prefix_lm": ("prefix_lm(20)", masks.prefix_lm(20)),
        "document": ("document(layout)", masks.document(LAYOUT)),
        "dilated_window": ("dilated_window(5, 4)", masks.dilated_window(5, 4)),
        "strided": ("strided(8)", masks.strided(8)),
        "global_tokens": ("global_tokens(4)", masks.global_tokens(4)),
        "natten_2d": ("natten_2d(8, 8, 3)", masks.natten_2d(8, 8, 3)),
        "per_document": (
            "per_document(layout, prefix_lm(6))",
            masks.per_document(LAYOUT, masks.prefix_lm(6)),
        ),
        "and_masks": (
            "and_masks(document(layout), causal)",
            masks.and_masks(masks.document(LAYOUT), masks.causal),
        ),
        "or_masks": (
            "or_masks(global_tokens(4), sliding_window(12))",
            masks.or_masks(masks.global_tokens(4), masks.sliding_window(12)),
        ),
    }


def score_pictures() -> dict[str, tuple[str, Any, int, bool]]:
    """For each score mod the call, the mod, how many heads are drawn, and whether it meets random scores or zeros."""
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randn(1, 32, generator=generator).cumsum(1)
    position = torch.arange(SIZE)
    waves = torch.sin(position / 5)[:, None] * torch.cos(position / 7)
    gate = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    return {
        "alibi": ("alibi(4), heads 0 to 3", score_mods.alibi(4), 4, False),
        "relative_bias": (
            "relative_bias(table)",
            score_mods.relative_bias(buckets, bidirectional=False),
            1,
            False,
        ),
        "softcap": ("softcap(3.0)", score_mods.softcap(3.0), 1, True),
        "head_gate": ("head_gate(tensor([-3, -1, 1, 3]))", score_mods.head_gate(gate), 4, True),
        "distance_penalty": ("distance_penalty(1.0)", score_mods.distance_penalty(1.0), 1, False),
        "absolute_bias": ("absolute_bias(table)", score_mods.absolute_bias(waves), 1, False),
        "compose": (
            "compose(alibi(tensor([0.3])), softcap(3.0))",
            score_mods.compose(score_mods.alibi(torch.tensor([0.3])), score_mods.softcap(3.0)),
            1,
            True,
        ),
    }


def visible(mod: Any) -> Tensor:
    """bool [SIZE, SIZE] of the first row and head."""
    index = torch.arange(SIZE)
    return over_indices(mod)(index[:1], index[:1], index, index).expand(1, 1, SIZE, SIZE)[0, 0]


def random_scores() -> Tensor:
    """Scores with structure along both axes, from about -12 to 12."""
    steps = torch.randn(2, SIZE, 6, generator=torch.Generator().manual_seed(3)).cumsum(1)
    q, k = steps - steps.mean(1, keepdim=True)
    score = q @ k.T
    return 12 * score / score.abs().max()


def draw_mask(call: str, mod: Any) -> Figure:
    figure = _figure()
    axes = figure.add_subplot()
    _image(axes, visible(mod).numpy(), cmap=ListedColormap(["white", DARK]), vmin=0, vmax=1)
    _labels(axes, call)
    return figure


def draw_scores(call: str, mod: Any, heads: int, random: bool) -> Figure:
    """Heat maps of the scores after the mod where a causal mask lets a query see, one map a head, in one scale."""
    score = (random_scores() if random else torch.zeros(SIZE, SIZE)).expand(1, heads, SIZE, SIZE)
    values = over_indices(mod, scored=True)(score, *map(torch.arange, score.shape))[0]
    seen = visible(masks.causal).numpy()
    maps = [np.where(seen, value.numpy(), np.nan) for value in values]
    low, high = min(map(np.nanmin, maps)), max(map(np.nanmax, maps))
    figure = _figure()
    grid = figure.subplots(2, 2) if heads == 4 else np.array([figure.add_subplot()])
    for axes, values_of_head in zip(grid.flat, maps, strict=True):
        image = _image(axes, values_of_head, cmap="viridis", vmin=low, vmax=high)
    bar = figure.colorbar(image, ax=list(grid.flat), shrink=0.75, aspect=28, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=6, length=0, colors=INK)
    if heads == 4:
        for axes in grid.flat:
            axes.set_xticks([])
            axes.set_yticks([])
        figure.suptitle(call, fontsize=7.5, color=INK, family="monospace")
    else:
        _labels(grid[0], call)
    return figure


def _figure() -> Figure:
    figure = Figure(figsize=(3.2, 3.2), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _image(axes: Axes, values: np.ndarray, **colors: Any) -> Any:
    image = axes.imshow(values, extent=(0, SIZE, SIZE, 0), interpolation="nearest", **colors)
    lines = range(0, SIZE + 1, TILE)
    axes.hlines(lines, 0, SIZE, color=MUTED, linewidth=0.6)
    axes.vlines(lines, 0, SIZE, color=MUTED, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _labels(axes: Axes, call: str) -> None:
    axes.set_title(call, fontsize=7.5, color=INK, family="monospace", pad=4)
    axes.set_xlabel("key", fontsize=7, color=INK, labelpad=1)
    axes.set_ylabel("query", fontsize=7, color=INK, labelpad=1)
    axes.set_xticks(range(0, SIZE + 1, TILE))
    axes.set_yticks(range(0, SIZE + 1, TILE))
    axes.tick_params(labelsize=6, length=0, colors=INK, pad=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/masks"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {name: draw_mask(*picture) for name, picture in mask_pictures().items()}
    figures |= {name: draw_scores(*picture) for name, picture in score_pictures().items()}
    for name, figure in figures.items():
        figure.savefig(options.out / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
