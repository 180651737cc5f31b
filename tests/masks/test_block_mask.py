"""Block masks against torch's create_block_mask, block for block, and intervals against the mask's definition."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask

from packflex import BlockMask, PackedLayout, create_block_mask, document_mask, flex_attention, masks
from packflex.masks.intervals import document_intervals
from packflex.testing.oracle import dense_document_mask

LAYOUT = PackedLayout.from_lengths([[3, 400, 63, 111], [500], [], [1] * 500], 640)
PREFIXES = [1, 100, 63, 0, 300] + [1] * 500
VARIANTS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 50},
    "window-1": {"window": 1},
    "window-over-a-tile": {"window": 200},
    "window-bidirectional": {"window": 50, "causal": False},
    "prefix": {"prefix_lengths": PREFIXES},
    "prefix-window": {"prefix_lengths": PREFIXES, "window": 20},
}
FIELDS = [
    f"{full}{axis}_{what}" for full in ("", "full_") for axis in ("kv", "q") for what in ("num_blocks", "indices")
]


def assert_intervals_equal_dense(mask, dense):
    q, kv = torch.arange(dense.shape[1])[:, None], torch.arange(dense.shape[2])[None]
    lo, hi = mask.kv_intervals[..., None]
    assert torch.equal((kv >= lo) & (kv < hi), dense)
    lo, hi = mask.q_intervals[:, :, None]
    assert torch.equal((q >= lo) & (q < hi), dense)
    for intervals in (mask.kv_intervals, mask.q_intervals):
        assert (intervals.diff(dim=2) >= 0).all(), "tiles take their ranges from their ends: bounds must only grow"


@pytest.mark.parametrize("name", VARIANTS)
def test_document_mask_equals_its_definition(name):
    assert_intervals_equal_dense(document_mask(LAYOUT, **VARIANTS[name]), dense_document_mask(LAYOUT, **VARIANTS[name]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 20), max_size=5), min_size=1, max_size=3).filter(any),
    st.integers(0, 9),
    st.booleans(),
    st.none() | st.integers(1, 25),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_document_mask_on_random_layouts(rows, tail, causal, window, with_prefix, random):
    layout = PackedLayout.from_lengths(rows, max(map(sum, rows)) + tail)
    prefixes = [random.randint(0, n) for row in rows for n in row] if causal and with_prefix else None
    options = {"causal": causal, "window": window, "prefix_lengths": prefixes}
    assert_intervals_equal_dense(document_mask(layout, **options), dense_document_mask(layout, **options))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("block", [128, (64, 96)], ids=str)
def test_blocks_equal_torch(name, block):
    """Ranges and lists of an interval mask, and `create_block_mask`, give torch's lists to the last index."""
    dense = dense_document_mask(LAYOUT, **VARIANTS[name])

    def by_definition(b, h, q_idx, kv_idx):
        return dense[b, q_idx, kv_idx]

    size = LAYOUT.seq_len
    theirs = torch_create_block_mask(by_definition, 4, None, size, size, device="cpu", BLOCK_SIZE=block)
    ours = document_mask(LAYOUT, **VARIANTS[name])
    ours = BlockMask.from_intervals(ours.kv_intervals, ours.q_intervals, block)
    general = create_block_mask(by_definition, 4, None, size, size, device="cpu", BLOCK_SIZE=block)
    for field in FIELDS:
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
        assert torch.equal(getattr(general, field), getattr(theirs, field)), field
    assert ours.sparsity() == general.sparsity() == pytest.approx(100 - 100 * theirs.to_dense().float().mean().item())
    if block == 128:
        assert ours.sparsity() == theirs.sparsity()
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.shape == theirs.shape == (4, 1, size, size)


@pytest.mark.parametrize(
    ("mod", "q_len", "kv_len"),
    [
        (masks.causal, 300, 300),
        (masks.sliding_window(70), 300, 300),
        (masks.prefix_lm(77), 300, 300),
        (masks.prefix_lm(torch.tensor([0, 300])), 300, 300),
        (masks.or_masks(masks.sliding_window(20), lambda b, h, q, kv: kv < 10), 257, 300),
        (masks.and_masks(masks.causal, lambda b, h, q, kv: (q - kv) % (h + 1) == 0), 300, 129),
        (lambda b, h, q, kv: q == kv + 1000, 128, 128),
    ],
)
def test_create_block_mask_equals_torch(mod, q_len, kv_len):
    theirs = torch_create_block_mask(mod, 2, 3, q_len, kv_len, device="cpu")
    ours = create_block_mask(mod, 2, 3, q_len, kv_len, device="cpu")
    for field in FIELDS:
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


def test_document_mod_combines_to_the_document_mask():
    mod = masks.and_masks(masks.document(LAYOUT), masks.causal)
    general = create_block_mask(mod, 4, None, 640, 640, device="cpu")
    closed = document_mask(LAYOUT)
    assert all(torch.equal(getattr(general, field), getattr(closed, field)) for field in FIELDS)


def test_torch_round_trip():
    ours = document_mask(LAYOUT)
    theirs = ours.to_torch()
    back = BlockMask.from_torch(theirs)
    assert all(torch.equal(getattr(theirs, field), getattr(ours, field)) for field in FIELDS)
    assert all(torch.equal(getattr(back, field), getattr(ours, field)) for field in FIELDS)
    index = torch.arange(640)
    dense = theirs.mask_mod(torch.arange(4)[:, None, None], torch.tensor(0), index[:, None], index[None])
    assert torch.equal(dense, dense_document_mask(LAYOUT))


def test_ranges_are_the_four_integers_of_a_tile():
    mask = document_mask(PackedLayout.from_lengths([[640]]))
    assert mask.kv_ranges[0, 0].tolist() == [[0, 1, 1, 1], [0, 0, 1, 2], [0, 0, 2, 3], [0, 0, 3, 4], [0, 0, 4, 5]]
    assert mask.q_ranges[0, 0].tolist() == [[0, 1, 5, 5], [1, 2, 5, 5], [2, 3, 5, 5], [3, 4, 5, 5], [4, 5, 5, 5]]
    assert mask.sparsity() == pytest.approx(100 * 10 / 25)


def test_a_mask_of_inference_mode_serves_training():
    layout = PackedLayout.from_lengths([[3, 4]], 8)
    with torch.inference_mode():
        remembered = document_mask(layout)
    q = torch.randn(1, 1, 8, 16, requires_grad=True)
    assert document_mask(layout) is remembered
    flex_attention(q, q, q, block_mask=document_mask(layout)).sum().backward()
    assert q.grad is not None


def test_masks_are_remembered_on_the_layout():
    layout = PackedLayout.from_lengths([[3, 4]], 8)
    mask = document_mask(layout)
    assert document_mask(layout) is mask
    assert document_mask(layout, window=8) is mask, "a window as long as the row limits nothing"
    assert document_mask(layout, window=2) is not mask
    assert document_mask(layout, causal=False) is not mask
    prefix = document_mask(layout, prefix_lengths=[3, 0])
    assert prefix.kv_intervals[1, 0].tolist() == [3, 3, 3, 4, 5, 6, 7, 7]
    assert document_mask(layout, prefix_lengths=[0, 4]).kv_intervals[1, 0].tolist() == [1, 2, 3, 7, 7, 7, 7, 7]


def test_picture():
    assert document_mask(PackedLayout.from_lengths([[256, 200]], 512)).to_string() == "░···\n█░··\n··░·\n··░░"
    text = repr(document_mask(PackedLayout.from_lengths([[128 * 100]])))
    assert text.startswith("BlockMask(shape=(1, 1, 12800, 12800), intervals, BLOCK_SIZE=(128, 128), sparsity=49.50%")
    assert max(map(len, text.splitlines()[1:])) <= 48


@pytest.mark.parametrize("name", VARIANTS)
def test_interval_kernel_equals_the_torch_path(name):
    """The Triton kernel that builds intervals on a GPU, here in the interpreter."""
    from packflex.masks.kernels import launch_document_intervals

    options = dict(VARIANTS[name])
    prefixes = options.pop("prefix_lengths", None)
    prefixes = None if prefixes is None else torch.tensor(prefixes, dtype=torch.int32)
    for layout in (LAYOUT, PackedLayout.from_lengths([[]], 7), PackedLayout.from_lengths([[1], [2, 1]], 3)):
        if prefixes is not None and layout is not LAYOUT:
            continue
        arguments = (layout.cu_seqlens, layout.row_offsets, prefixes, layout.seq_len)
        arguments = (*arguments, options.get("causal", True), options.get("window", 0))
        assert torch.equal(launch_document_intervals(*arguments), document_intervals(*arguments))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: document_mask(LAYOUT, window=0), ValueError, "window must be at least 1"),
        (lambda: document_mask(LAYOUT, causal=False, prefix_lengths=PREFIXES), ValueError, "need causal=True"),
        (
            lambda: document_mask(LAYOUT, prefix_lengths=[1]),
            ValueError,
            "must be 505 integers, one for each document; got 1",
        ),
        (
            lambda: document_mask(LAYOUT, prefix_lengths=[4, *PREFIXES[1:]]),
            ValueError,
            "prefix_lengths[0]=4 must be from 0 to",
        ),
        (lambda: document_mask(LAYOUT, prefix_lengths=torch.ones(3)), ValueError, "got torch.float32 (3,)"),
        (
            lambda: create_block_mask(lambda b, h, q, kv: q - kv, 1, 1, 8, 8, "cpu"),
            TypeError,
            "must return a bool tensor",
        ),
        (lambda: create_block_mask(masks.causal, 0, 1, 8, 8, "cpu"), ValueError, "B must be at least 1; got 0"),
        (lambda: create_block_mask(masks.causal, 1, 1, 8, 8, "cpu", 0), ValueError, "BLOCK_SIZE must be"),
        (lambda: masks.sliding_window(0), ValueError, "window must be at least 1"),
        (lambda: masks.and_masks(), TypeError, "and_masks takes one or more mask_mods"),
        (lambda: create_block_mask(masks.strided(2), 1, 1, 8, 8, "cpu").kv_ranges, ValueError, "document_mask"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
