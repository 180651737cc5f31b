"""`create_block_mask` of any mask: block for block torch's, on the host and by the tile kernel in the interpreter."""

import dataclasses
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex

from packflex import BlockMask, PackedLayout, create_block_mask, document_mask, flex_attention, masks
from packflex.masks.block_mask import BlockLists
from packflex.masks.tile_kernel import launch_tile_lists
from packflex.mods.lifted import lift
from packflex.testing.mod_case import dense_mask, index_grids, modified_attention
from packflex.testing.mods import mod_cases
from packflex.testing.tolerances import RELATIVE, relative_error

CPU = torch.device("cpu")
FIELDS = [
    f"{full}{axis}_{what}" for full in ("", "full_") for axis in ("kv", "q") for what in ("num_blocks", "indices")
]
CASES = {case.name: case for case in mod_cases() if case.mods().mask_mod is not None}
MASKS = {name: case for name, case in CASES.items() if name.startswith(("mask-", "documents-"))}
DOCUMENTS = {"documents-of-a-mask", "documents-of-ids", "mask-per-document", "mask-documents-dilated"}
INTERVALS = {"documents-of-a-mask", "mask-causal", "mask-prefix", "mask-lengths"}
# (Q_LEN, KV_LEN, BLOCK_SIZE); masks of documents take Q_LEN for both
SHAPES = [(150, 150, 64), (77, 200, (64, 32)), (257, 129, 128)]


def sized(name, q_len, kv_len, block):
    return dataclasses.replace(
        MASKS[name], q_len=q_len, kv_len=None if name in DOCUMENTS else kv_len, block_size=block, heads=3
    )


def assert_same_lists(ours, theirs):
    assert theirs.to_dense().any()
    for field in FIELDS:
        one, other = getattr(ours, field), getattr(theirs, field)
        assert one.dtype == other.dtype == torch.int32, field
        assert torch.equal(one, other), field


def by_tile_kernel(mask_mod, shape, tile):
    """The mask that a GPU makes, through Triton's interpreter."""
    kv_lists, q_lists = launch_tile_lists(lift(mask_mod, "mask", CPU), shape, tile, CPU)
    return BlockMask(shape[2:], tile, mask_mod, kv_lists=kv_lists, q_lists=q_lists)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_lists_equal_torch(name, shape):
    case = sized(name, *shape)
    mods = case.mods()
    batch, heads = case.shape[0] if mods.per_row else 1, case.shape[1] if mods.per_head else 1
    sizes = (batch, heads, *case.shape[2:])
    theirs = torch_create_block_mask(mods.mask_mod, *sizes, device="cpu", BLOCK_SIZE=case.block_size)
    ours = case.block_mask(mods)
    assert_same_lists(ours, theirs)
    assert ours.shape == tuple(theirs.shape) == sizes
    assert (ours.kv_intervals is not None) == (name in INTERVALS)
    assert_same_lists(by_tile_kernel(mods.mask_mod, sizes, ours.BLOCK_SIZE), theirs)


@pytest.mark.parametrize(
    ("batch", "heads", "block"), [(None, None, 16), (2, None, 32), (None, 3, (64, 32)), (2, 3, (48, 80)), (2, 2, 128)]
)
def test_batch_and_heads(batch, heads, block):
    lengths = torch.tensor([90, 41])

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx < lengths[b]) & ((q_idx - kv_idx) % (h + 1) == 0)

    theirs = torch_create_block_mask(mask_mod, batch, heads, 100, 70, device="cpu", BLOCK_SIZE=block)
    assert_same_lists(create_block_mask(mask_mod, batch, heads, 100, 70, "cpu", block), theirs)
    tile = (block, block) if isinstance(block, int) else block
    assert_same_lists(by_tile_kernel(mask_mod, (batch or 1, heads or 1, 100, 70), tile), theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: lambda b, h, q, k: x[q] > 0,
        lambda x: lambda b, h, q, k: (x[k] * 2 <= 0.1) & (q >= k),
        lambda x: lambda b, h, q, k: (x[q] > 0) | (x[k] < -1),
    ],
)
def test_floats_of_one_axis(make):
    mask_mod = make(torch.randn(200, generator=torch.Generator().manual_seed(0)).cumsum(0))
    theirs = torch_create_block_mask(mask_mod, None, None, 200, 150, device="cpu", BLOCK_SIZE=32)
    assert_same_lists(by_tile_kernel(mask_mod, (1, 1, 200, 150), (32, 32)), theirs)


def test_constant_masks():
    for value in (True, False):
        ours = by_tile_kernel(lambda b, h, q_idx, kv_idx, value=value: value, (1, 1, 64, 40), (32, 32))
        assert ours.full_kv_num_blocks.tolist() == [[[int(value)] * 2]]
        assert ours.kv_num_blocks.tolist() == [[[int(value)] * 2]], "the ragged tiles are partial"


# Masks of no particular meaning: what the bounds of the tile kernel and the recognition make of any expression


NUMBER = st.integers(-20, 90)
COUNT = st.integers(1, 40)
TABLES = {
    "int8": torch.arange(-64, 64, dtype=torch.int8).flip(0),
    "uint8": torch.randint(0, 256, (128,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
    "int64": torch.randint(-50, 50, (128,), generator=torch.Generator().manual_seed(1)),
}


@st.composite
def integers(draw, depth=2):
    """An integer expression of (h, q, kv)."""
    kind = draw(st.integers(0, 11 if depth else 2))
    if kind <= 2:
        n = draw(NUMBER)
        return [lambda h, q, kv: q, lambda h, q, kv: kv, lambda h, q, kv: q * 0 + h * 3 + n][kind]
    x = draw(integers(depth=depth - 1))
    if kind == 3:
        y, sign = draw(integers(depth=depth - 1)), draw(st.sampled_from([-1, 1]))
        return lambda h, q, kv: x(h, q, kv) + sign * y(h, q, kv)
    if kind == 4:
        d = draw(COUNT)
        return lambda h, q, kv: x(h, q, kv) // d
    if kind == 5:
        d = draw(COUNT)
        return lambda h, q, kv: x(h, q, kv) % d
    if kind == 6:
        return lambda h, q, kv: x(h, q, kv).abs()
    if kind == 7:
        low, high = draw(NUMBER), draw(NUMBER)
        return lambda h, q, kv: x(h, q, kv).clamp(min(low, high), max(low, high))
    if kind == 8:
        y = draw(integers(depth=depth - 1))
        function = draw(
            st.sampled_from([torch.minimum, torch.maximum, torch.mul, torch.bitwise_xor, torch.bitwise_and])
        )
        return lambda h, q, kv: function(x(h, q, kv), y(h, q, kv))
    if kind == 9:
        table = TABLES[draw(st.sampled_from(sorted(TABLES)))]
        return lambda h, q, kv: table[x(h, q, kv).clamp(-128, 127)] + 0 * q
    if kind == 10:
        seen, y = draw(bools(depth=depth - 1)), draw(integers(depth=depth - 1))
        return lambda h, q, kv: torch.where(seen(h, q, kv), x(h, q, kv), y(h, q, kv))
    y = draw(integers(depth=depth - 1))
    return lambda h, q, kv: -x(h, q, kv) + y(h, q, kv).long()


@st.composite
def bools(draw, depth=2):
    """A bool expression of (h, q, kv)."""
    kind = draw(st.integers(0, 5 if depth else 2))
    if kind <= 2:
        compare = draw(st.sampled_from([torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne]))
        x = draw(integers())
        if kind == 0:
            n = draw(NUMBER)
            return lambda h, q, kv: compare(x(h, q, kv), n)
        y = draw(integers())
        return lambda h, q, kv: compare(x(h, q, kv), y(h, q, kv))
    x, y = draw(bools(depth=depth - 1)), draw(bools(depth=depth - 1))
    if kind == 3:
        return lambda h, q, kv: x(h, q, kv) & y(h, q, kv)
    if kind == 4:
        return lambda h, q, kv: x(h, q, kv) | ~y(h, q, kv)
    return lambda h, q, kv: x(h, q, kv) ^ y(h, q, kv)


@st.composite
def interval_masks(draw):
    """Conjunctions of bounds that only grow along the queries, and of whole rows of the batch."""
    terms = []
    for _ in range(draw(st.integers(1, 4))):
        n, kind = draw(NUMBER), draw(st.integers(0, 6))
        terms.append(
            [
                lambda b, q, kv, n=n: q + n >= kv,
                lambda b, q, kv, n=n: q - kv < n,
                lambda b, q, kv, n=n: (kv - q).abs() <= n,
                lambda b, q, kv, n=n: (kv < n) | (kv <= q),
                lambda b, q, kv, n=n: kv >= n,
                lambda b, q, kv, n=n: n > kv - q,
                lambda b, q, kv, n=n: kv < n + b * 7,
            ][kind]
        )

    def mask_mod(b, h, q_idx, kv_idx):
        seen = terms[0](b, q_idx, kv_idx)
        for term in terms[1:]:
            seen = seen & term(b, q_idx, kv_idx)
        return seen

    return mask_mod


def tiled(dense, tile):
    """Lists by definition, from bool [B, H, Q, KV]: both directions."""
    rows, columns = (-(-n // size) for n, size in zip(dense.shape[2:], tile, strict=True))
    room = (0, columns * tile[1] - dense.shape[3], 0, rows * tile[0] - dense.shape[2])
    counts = (
        torch.nn.functional.pad(dense, room).unflatten(3, (columns, tile[1])).unflatten(2, (rows, tile[0])).sum((3, 5))
    )
    full, partial = counts == tile[0] * tile[1], (counts > 0) & (counts < tile[0] * tile[1])

    def listed(tiles):
        order = [
            [[[*row.nonzero()[:, 0].tolist(), *(~row).nonzero()[:, 0].tolist()] for row in head] for head in batch]
            for batch in tiles
        ]
        return tiles.sum(-1, dtype=torch.int32), torch.tensor(order, dtype=torch.int32)

    return [BlockLists(*listed(p), *listed(f)) for p, f in ((partial, full), (partial.mT, full.mT))]


def assert_lists_are(mask, dense):
    for axis, expected in zip(("kv", "q"), tiled(dense, mask.BLOCK_SIZE), strict=True):
        fields = (f"{axis}_num_blocks", f"{axis}_indices", f"full_{axis}_num_blocks", f"full_{axis}_indices")
        for field, lists in zip(fields, expected, strict=True):
            assert torch.equal(getattr(mask, field), lists), field


LENGTHS = st.integers(1, 60)
BLOCKS = st.sampled_from([(16, 16), (32, 16), (16, 64)])


@settings(deadline=None, max_examples=20)
@given(bools(), LENGTHS, LENGTHS, BLOCKS)
def test_any_expression(expression, q_len, kv_len, tile):
    def mask_mod(b, h, q_idx, kv_idx):
        return expression(h, q_idx, kv_idx)

    shape = (1, 2, q_len, kv_len)
    dense = mask_mod(*(x.int() for x in index_grids(shape))).expand(shape)
    assert_lists_are(create_block_mask(mask_mod, *shape, "cpu", tile), dense)
    assert_lists_are(by_tile_kernel(mask_mod, shape, tile), dense)


@settings(deadline=None, max_examples=60)
@given(interval_masks(), LENGTHS, LENGTHS, BLOCKS)
def test_random_intervals(mask_mod, q_len, kv_len, tile):
    shape = (2, 1, q_len, kv_len)
    mask = create_block_mask(mask_mod, *shape, "cpu", tile)
    dense = mask_mod(*(x.int() for x in index_grids(shape))).expand(shape)
    assert mask.kv_intervals is not None
    lo, hi = mask.kv_intervals[..., None]
    keys, queries = torch.arange(kv_len), torch.arange(q_len)[:, None]
    assert torch.equal((keys >= lo) & (keys < hi), dense[:, 0])
    lo, hi = mask.q_intervals[:, :, None]
    assert torch.equal((queries >= lo) & (queries < hi), dense[:, 0])
    assert (mask.kv_intervals.diff(dim=2) >= 0).all()
    assert (mask.q_intervals.diff(dim=2) >= 0).all()
    assert_lists_are(mask, dense)


IDS32 = torch.tensor([-2_000_000_000, 2_000_000_000], dtype=torch.int32)[torch.arange(150) // 16 % 2]
IDS8 = (torch.arange(150) // 25).to(torch.uint8)
WRAPPING = {
    "difference": lambda b, h, q, kv: (IDS32[q] - IDS32[kv]) == 0,
    "sum": lambda b, h, q, kv: (IDS32[q] + IDS32[kv]) < 0,
    "product": lambda b, h, q, kv: (IDS32[q] * IDS32[kv]) > 0,
    "bytes": lambda b, h, q, kv: (IDS8[q] - IDS8[kv]) == 255,
    "negative": lambda b, h, q, kv: (-IDS8[q] + 0 * kv) > 200,
}


@pytest.mark.parametrize("name", WRAPPING)
def test_numbers_that_wrap_around_hide_no_tile(name):
    shape = (1, 1, 150, 150)
    dense = WRAPPING[name](*(x.int() for x in index_grids(shape))).expand(shape)
    assert dense.any()
    assert_lists_are(create_block_mask(WRAPPING[name], *shape, "cpu", 32), dense)
    assert_lists_are(by_tile_kernel(WRAPPING[name], shape, (32, 32)), dense)


@pytest.mark.parametrize("number", [sys.maxsize, 2**40, 2**31])
def test_numbers_beyond_32_bits(number):
    shape = (1, 1, 60, 60)

    def window(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < number)

    def strided(b, h, q_idx, kv_idx):
        return window(b, h, q_idx, kv_idx) & ((q_idx - kv_idx) % 3 == 0)

    for mod in (window, strided):
        dense = mod(*index_grids(shape)).expand(shape)
        assert_lists_are(create_block_mask(mod, *shape, "cpu", 16), dense)
        assert_lists_are(by_tile_kernel(mod, shape, (16, 16)), dense)


# With torch's op


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(
    "make", [document_mask, lambda x: create_block_mask(masks.document(x), 1, None, 40, 40, "cpu")]
)
def test_a_mask_of_one_row_serves_a_batch(make):
    layout = PackedLayout.from_lengths([[17, 20]], 40)
    mask = make(layout)
    q = torch.randn(3, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    for score_mod in (None, lambda s, b, h, q, kv: s * (b + 1)):
        whole = flex_attention(q, q, q, score_mod=score_mod, block_mask=mask)
        for row in range(3):
            one = q[row : row + 1]
            factor = None if score_mod is None else row + 1
            alone = flex_attention(
                one, one, one, block_mask=mask, score_mod=factor and (lambda s, b, h, q, kv, f=factor: s * f)
            )
            torch.testing.assert_close(whole[row : row + 1], alone)
    if make is document_mask:
        theirs = torch_flex(q, q, q, block_mask=mask.to_torch())[:, :, :37]
        torch.testing.assert_close(flex_attention(q, q, q, block_mask=mask)[:, :, :37], theirs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", ["mask-causal", "mask-dilated", "mask-per-head", "documents-of-ids", "mask-random"])
def test_masks_serve_torch_and_back(name):
    case = dataclasses.replace(MASKS[name], heads=3, kv_heads=3)
    mods, (batch, heads, q_len, kv_len) = case.mods(), case.shape
    mask = case.block_mask(mods)
    theirs = mask.to_torch()
    back = BlockMask.from_torch(theirs)
    assert_same_lists(mask, theirs)
    assert_same_lists(back, theirs)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, n, 16, generator=generator) for n in (q_len, kv_len, kv_len))
    expected, _ = modified_attention(
        q.double(), k.double(), v.double(), dense_mask(case, case.exact_mods()), None, None, None
    )
    results = [torch_flex(q, k, v, block_mask=theirs)]
    results += [flex_attention(q, k, v, block_mask=given, backend=backend) for given in (mask, back)
                for backend in ("triton", "reference")]  # fmt: skip
    for result in results:
        assert relative_error(result, expected) < RELATIVE[torch.float32]
