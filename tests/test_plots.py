from __future__ import annotations

import numpy as np
import pytest

from packflex.layout import PackedLayout
from packflex.plots import length_histogram, loss_curve, row_mask, step_curve, tile_kinds


def dense_kinds(layout, row, block, causal, window):
    """From the definition, token by token."""
    ids = layout.document_ids[row].numpy()
    size = len(ids)
    q, k = np.arange(size)[:, None], np.arange(size)[None, :]
    seen = (ids[:, None] == ids[None, :]) & (ids[:, None] >= 0)
    if causal:
        seen &= k <= q
    if window is not None:
        seen &= np.abs(q - k) < window
    tiles = -(-size // block)
    kinds = np.zeros((tiles, tiles), int)
    for i in range(tiles):
        for j in range(tiles):
            tile = seen[i * block : (i + 1) * block, j * block : (j + 1) * block]
            kinds[i, j] = int(tile.any()) + int(tile.all())
    return kinds


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(
    ("lengths", "size"), [([5, 1, 20, 7], 40), ([1] * 16, 16), ([], 16), ([33], 33), ([8, 8, 8], 24), ([2, 30], 37)]
)
def test_tiles_are_those_of_the_definition(lengths, size, causal, window):
    layout = PackedLayout.from_lengths([[size], lengths], size)
    kinds = tile_kinds(layout, 1, block_size=8, causal=causal, window=window)
    assert np.array_equal(kinds, dense_kinds(layout, 1, 8, causal, window))


def test_pictures_can_be_saved(tmp_path):
    layout = PackedLayout.from_lengths([[300, 41, 700], []], 1200)
    figures = [
        row_mask(layout),
        row_mask(layout, 1, causal=False, window=64),
        length_histogram([1]),
        length_histogram([5, 90, 4000], seq_len=8192),
        loss_curve(range(50), np.linspace(5, 2, 50), [0, 49], [5.0, 2.1]),
        loss_curve([], [], [0], [3.0]),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")
    assert figures[0].axes[0].get_title(loc="left").startswith("Row 0: 3 documents in 1,200 tokens")


def test_histogram_counts_every_document():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5000, 1000)
    figure = length_histogram(np.append(lengths, [1, 9000]), seq_len=8192)
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 1002


def test_pictures_use_no_global_state():
    import sys

    loss_curve([0], [1.0])
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_errors():
    layout = PackedLayout.from_lengths([[4]])
    with pytest.raises(ValueError, match="row must be 0 to 0; got 1"):
        row_mask(layout, 1)
    with pytest.raises(ValueError, match="block_size must be at least 1; got 0"):
        tile_kinds(layout, 0, block_size=0)
    with pytest.raises(ValueError, match=r"at least one number of at least 1; got \[\]"):
        length_histogram([])
    with pytest.raises(ValueError, match=r"at least one number of at least 1; got \[3, 0\]"):
        length_histogram([3, 0])
    with pytest.raises(ValueError, match="must pair; got 2 and 1"):
        loss_curve([0, 1], [1.0])
    with pytest.raises(ValueError, match="no loss to draw"):
        loss_curve([], [])


def test_step_curve():
    figure = step_curve([1, 2, 3], [0.9, 1.0, 0.95], "efficiency", "Padding", percent=True)
    axes = figure.axes[0]
    assert axes.get_legend().get_texts()[0].get_text() == "median 95.00%"
    assert axes.get_ylim() == (0, 1.05)
    assert step_curve([5], [0.0], "documents", "Documents").axes[0].get_ylim() == (0, 1)
    ticks = step_curve([1, 2], [2.0, 3.0], "documents", "Documents").axes[0].get_yticks()
    assert all(tick == int(tick) for tick in ticks), "no fractions, which would be shown as the same number twice"
    with pytest.raises(ValueError, match="must pair and not be empty; got 1 and 0"):
        step_curve([1], [], "x", "y")
