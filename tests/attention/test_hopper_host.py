"""What of the Hopper backend runs without a Hopper card: refusals, tiles, and its plain Triton kernels interpreted."""

import dataclasses

import pytest
import torch

from packflex import PackedLayout, document_mask, flex_attention
from packflex.attention.hopper import support
from packflex.attention.hopper.tiles import (
    OPTIONS,
    BackwardTile,
    ForwardTile,
    default_backward_tile,
    default_forward_tile,
    resolve_backward_tile,
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
    assert BackwardTile(consumers=2).columns(128) == 64
    assert BackwardTile(consumers=1).columns(64) == 64


def test_options_overlay_the_table():
    assert tile_list(None) == []
    options = {"forward_consumers": 2, "forward_persistent": 0, "backward_stages": 3}
    tiles = tile_list(options)
    assert len(tiles) == len(OPTIONS)
    forward = default_forward_tile(128, 4, long=False)
    assert resolve_forward_tile([], 128, 4, long=False) == forward
    expected = dataclasses.replace(forward, consumers=2, persistent=0)
    assert resolve_forward_tile(tiles, 128, 4, long=False) == expected
    backward = default_backward_tile(64, long=True)
    assert resolve_backward_tile(tiles, 64, long=True) == dataclasses.replace(backward, stages=3)
    with pytest.raises(ValueError, match="kernel_options has no 'forward_block_m'; the tiles of backend=\"hopper\""):
        tile_list({"forward_block_m": 64})
    with pytest.raises(ValueError, match="must be an integer, 0 or more; got -1"):
        tile_list({"forward_stages": -1})
    with pytest.raises(ValueError, match=r"'backward_persistent'\] must be 0, 1 or 2; got 3"):
        tile_list({"backward_persistent": 3})


def test_units_of_a_section_fit_the_budget():
    from packflex.attention.hopper.order import units_per_section

    assert units_per_section(8, 16384, 128, 1, 16 << 20) == 2  # 8 MiB of K and V a head
    assert units_per_section(8, 16384, 128, 4, 16 << 20) == 8
    assert units_per_section(6, 16384, 128, 1, 33 << 20) == 3, "a divisor of the heads"
    assert units_per_section(8, 1 << 20, 128, 1, 16 << 20) == 1


@pytest.mark.parametrize("rows", [16, 48, 128])
@pytest.mark.parametrize("of_keys", [False, True])
def test_work_order_is_a_permutation_by_falling_work(rows, of_keys):
    from packflex.attention.hopper.order import HEADER, WorkOrder

    layout = PackedLayout.from_lengths([[300, 1, 63, 111], [20] * 20, []], 500).to(DEVICE)
    mask = document_mask(layout, window=200)
    intervals = mask.q_intervals if of_keys else mask.kv_intervals
    plan = WorkOrder(intervals.shape, intervals.stride(), rows, 64, tuple(range(9)))(intervals).cpu()
    assert plan[:9].tolist() == list(range(9))
    lo, hi = intervals.cpu()
    for b, records in enumerate(plan[HEADER.value :].view(3, -1, 4)):
        assert sorted(records[:, 0].tolist()) == list(range(0, 500, rows))
        blocks = records[:, 2].tolist()
        assert blocks == sorted(blocks, reverse=True)
        for first_row, first, count, last in records.tolist():
            end = int(hi[b, min(first_row + rows, 500) - 1])
            assert (first, count, last) == (int(lo[b, first_row]), -(-max(end - first, 0) // 64), int(hi[b, -1]) - 64)


@pytest.mark.parametrize("packed", [1, 2])
@pytest.mark.parametrize("with_lse", [False, True])
def test_statistics_of_the_rows(packed, with_lse):
    from packflex.attention.hopper.prepare import STATS_BEFORE, _hopper_bwd_prepare_kernel, stat_copies

    torch.manual_seed(0)
    batch, heads, length, dim = 2, 4, 50, 64
    out, grad = (torch.randn(batch, length, heads, dim, device=DEVICE).transpose(1, 2) for _ in range(2))
    lse, grad_lse = (torch.randn(batch, heads, length, device=DEVICE) for _ in range(2))
    lse[1, :, 40:] = -torch.inf
    grad[1, :, 40:] = torch.nan
    rows, copies, before = batch * heads * length, stat_copies(packed), STATS_BEFORE.value
    lse_2, delta = (torch.full((copies, before + rows), torch.nan, device=DEVICE) for _ in range(2))
    sums = torch.full((batch * length * heads, dim), torch.nan, device=DEVICE)
    _hopper_bwd_prepare_kernel[(2, heads, batch)](
        out, grad, grad_lse, lse, lse_2, delta, sums, *out.stride()[:3], *grad.stride()[:3], *grad_lse.stride(),
        length, heads, before + rows, HEADS=packed, D=dim, BLOCK_M=32, COPIES=copies, HAS_GRAD_LSE=with_lse,
    )  # fmt: skip
    assert not sums.any()
    expected = (out * grad).sum(-1) - (grad_lse if with_lse else 0)
    blind = lse == -torch.inf
    assert copies == 4 // packed
    for stats in (lse_2, delta):
        assert not stats[0, :before].any()
        for i in range(1, copies):  # row r of copy i lies i * packed before that of the first copy
            assert torch.equal(stats[i, : before + rows - i * packed], stats[0, i * packed :])
    lse_2, delta = (
        x[0, before:].view(batch, heads // packed, length, packed).transpose(2, 3).reshape(batch, heads, length)
        for x in (lse_2, delta)
    )
    torch.testing.assert_close(delta, expected.masked_fill(blind, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse_2, lse.masked_fill(blind, 0) * 1.4426950408889634, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [1, 2])
def test_the_cast_scales_and_puts_heads_in_order(packed):
    from packflex.attention.hopper.prepare import _hopper_bwd_cast_kernel

    batch, heads, length, dim = 2, 4, 50, 64
    sums = torch.randn(batch, heads // packed, length, packed, dim, device=DEVICE)
    grad = torch.full((batch, length, heads, dim), torch.nan, device=DEVICE, dtype=torch.float16)
    _hopper_bwd_cast_kernel[(2, heads, batch)](sums, grad, length, heads, 0.125, HEADS=packed, D=dim, BLOCK_M=32)
    expected = sums.permute(0, 2, 1, 3, 4).reshape(batch, length, heads, dim)
    assert torch.equal(grad, (expected * 0.125).half())
