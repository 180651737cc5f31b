"""What of the Hopper backend runs without a Hopper card: refusals, tiles, and its plain Triton kernels interpreted."""

import dataclasses

import pytest
import torch

from packflex import PackedLayout, document_mask, flex_attention
from packflex.attention.hopper import support
from packflex.attention.hopper.tiles import (
    OPTIONS,
    ForwardTile,
    default_forward_tile,
    resolve_forward_tile,
    tile_list,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_cpu_is_refused_by_reason():
    q = torch.randn(1, 2, 8, 64, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r'"hopper" cannot run this: it runs on CUDA devices.*"triton"'):
        flex_attention(q, q, q, backend="hopper")
    assert "tensors are on cpu" in support.refusal(q, q, q, 1.0)


def test_heads_share_a_tile_where_the_group_allows():
    tile = ForwardTile(consumers=2, max_heads=4)
    assert [tile.heads(group) for group in (1, 2, 3, 4, 6, 8, 9, 12)] == [1, 2, 1, 4, 2, 4, 1, 4]
    assert [tile.positions(group) for group in (1, 2, 3, 4)] == [128, 64, 128, 32]
    assert ForwardTile(max_heads=16).heads(16) == 8, "8 positions are left to a consumer"


def test_options_overlay_the_table():
    assert tile_list(None) == []
    options = {"forward_consumers": 2, "forward_persistent": 0}
    tiles = tile_list(options)
    assert len(tiles) == len(OPTIONS)
    forward = default_forward_tile(128, 4, long=False)
    assert resolve_forward_tile([], 128, 4, long=False) == forward
    expected = dataclasses.replace(forward, consumers=2, persistent=0)
    assert resolve_forward_tile(tiles, 128, 4, long=False) == expected
    with pytest.raises(ValueError, match="kernel_options has no 'forward_block_m'; the tiles of backend=\"hopper\""):
        tile_list({"forward_block_m": 64})
    with pytest.raises(ValueError, match="must be an integer, 0 or more; got -1"):
        tile_list({"forward_stages": -1})


def test_units_of_a_section_fit_the_budget():
    from packflex.attention.hopper.order import units_per_section

    assert units_per_section(8, 16384, 128, 1, 16 << 20) == 2  # 8 MiB of K and V a head
    assert units_per_section(8, 16384, 128, 4, 16 << 20) == 8
    assert units_per_section(6, 16384, 128, 1, 33 << 20) == 3, "a divisor of the heads"
    assert units_per_section(8, 1 << 20, 128, 1, 16 << 20) == 1


@pytest.mark.parametrize("rows", [16, 48, 128])
@pytest.mark.parametrize("of_keys", [False, True])
def test_work_order_is_a_permutation_by_falling_work(rows, of_keys):
    from packflex.attention.hopper.order import work_order

    layout = PackedLayout.from_lengths([[300, 1, 63, 111], [20] * 20, []], 500).to(DEVICE)
    mask = document_mask(layout, window=200)
    intervals = mask.q_intervals if of_keys else mask.kv_intervals
    every = work_order(intervals, rows, 64).cpu()
    lo, hi = intervals.cpu()
    for b, records in enumerate(every):
        assert sorted(records[:, 0].tolist()) == list(range(0, 500, rows))
        blocks = records[:, 2].tolist()
        assert blocks == sorted(blocks, reverse=True)
        for first_row, first, count, last in records.tolist():
            end = int(hi[b, min(first_row + rows, 500) - 1])
            assert (first, count, last) == (int(lo[b, first_row]), -(-max(end - first, 0) // 64), int(hi[b, -1]) - 64)
