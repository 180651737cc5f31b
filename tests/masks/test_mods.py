"""Mask mods against loops over their definitions."""

import re
from pathlib import Path

import pytest
import torch

from packflex import PackedLayout, create_block_mask, masks, score_mods
from packflex.mods.vectorised import over_indices

ROOT = Path(__file__).resolve().parents[2]
S = 37
LAYOUT = PackedLayout.from_lengths([[9, 1, 13], [30]], S)


def dense(mod, batch=2, heads=1, q_len=S, kv_len=S):
    return over_indices(mod)(*map(torch.arange, (batch, heads, q_len, kv_len))).expand(batch, heads, q_len, kv_len)


def looped(seen, batch=2, heads=1, q_len=S, kv_len=S):
    """The mask as its definition says for one query and key at a time, in Python's numbers."""
    cells = [
        [[[bool(seen(b, h, q, k)) for k in range(kv_len)] for q in range(q_len)] for h in range(heads)]
        for b in range(batch)
    ]
    return torch.tensor(cells)


def dilated_keys(window, dilation):
    return lambda b, h, q, k: k in [q - i * dilation for i in range(window)]


def strided_keys(stride, local):
    return lambda b, h, q, k: k in range(q - local + 1, q + 1) or k in range(q, -1, -stride)


def neighbours(height, width, rows, columns):
    """NATTEN's windows: start at the query minus half the kernel, moved so that they lie in the image."""

    def seen(b, h, q, k):
        if q >= height * width:
            return False
        top = min(max(q // width - rows // 2, 0), height - rows)
        left = min(max(q % width - columns // 2, 0), width - columns)
        return k // width in range(top, top + rows) and k % width in range(left, left + columns)

    return seen


def place(b, token):
    """Index of the token's document in row b and position in it, or None in the padded tail."""
    start = 0
    for index, length in enumerate(LAYOUT.lengths[b]):
        if token < start + length:
            return index, token - start
        start += length
    return None


def in_documents(seen):
    def packed(b, h, q, k):
        query, key = place(b, q), place(b, k)
        return bool(query and key and query[0] == key[0] and seen(b, h, query[1], key[1]))

    return packed


DEFINITIONS = {
    "causal": (masks.causal, lambda b, h, q, k: k <= q),
    "sliding_window": (masks.sliding_window(5), lambda b, h, q, k: k in range(q - 4, q + 1)),
    "prefix_lm": (masks.prefix_lm(7), lambda b, h, q, k: k <= q or k < 7),
    "prefix_lm-batch": (masks.prefix_lm(torch.tensor([3, 20])), lambda b, h, q, k: k <= q or k < (3, 20)[b]),
    "document": (masks.document(LAYOUT), in_documents(lambda b, h, q, k: True)),
    "dilated_window": (masks.dilated_window(3, 4), dilated_keys(3, 4)),
    "dilated_window-1": (masks.dilated_window(1, 5), lambda b, h, q, k: q == k),
    "dilated_window-past-the-row": (masks.dilated_window(9, 7), dilated_keys(9, 7)),
    "strided": (masks.strided(6, 3), strided_keys(6, 3)),
    "strided-default": (masks.strided(6), strided_keys(6, 6)),
    "strided-1": (masks.strided(1, 1), lambda b, h, q, k: k <= q),
    "global_tokens": (masks.global_tokens(3), lambda b, h, q, k: q < 3 or k < 3),
    "natten_2d": (masks.natten_2d(6, 6, 3), neighbours(6, 6, 3, 3)),
    "natten_2d-oblong": (masks.natten_2d(4, 9, (3, 5)), neighbours(4, 9, 3, 5)),
    "natten_2d-whole": (masks.natten_2d(7, 5, (7, 5)), neighbours(7, 5, 7, 5)),
    "and_masks": (
        masks.and_masks(masks.causal, masks.global_tokens(3), masks.prefix_lm(2)),
        lambda b, h, q, k: k <= q and (q < 3 or k < 3),
    ),
    "or_masks": (
        masks.or_masks(masks.global_tokens(3), masks.sliding_window(5)),
        lambda b, h, q, k: q < 3 or k < 3 or k in range(q - 4, q + 1),
    ),
    "document-dilated": (
        masks.and_masks(masks.document(LAYOUT), masks.dilated_window(3, 2)),
        in_documents(dilated_keys(3, 2)),
    ),
    "per_document-global": (
        masks.per_document(LAYOUT, masks.global_tokens(3)),
        in_documents(lambda b, h, q, k: q < 3 or k < 3),
    ),
    "per_document-natten": (masks.per_document(LAYOUT, masks.natten_2d(3, 4, 3)), in_documents(neighbours(3, 4, 3, 3))),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_mask_equals_its_definition(name):
    mod, seen = DEFINITIONS[name]
    assert torch.equal(dense(mod), looped(seen))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_block_mask_keeps_every_element(name):
    """Tiles are whole, partial or empty as the elements say."""
    mod, seen = DEFINITIONS[name]
    mask = create_block_mask(mod, 2, None, S, S, device="cpu", BLOCK_SIZE=8)
    padded = torch.nn.functional.pad(looped(seen)[:, 0], (0, 3, 0, 3)).unflatten(1, (5, 8)).unflatten(3, (5, 8))
    counts = padded.sum((2, 4))
    assert torch.equal(mask.to_dense()[:, 0], (counts > 0).int())
    assert torch.equal(mask.full_kv_num_blocks[:, 0], (counts == 64).sum(-1, dtype=torch.int32))


def test_relations_between_masks():
    assert torch.equal(dense(masks.dilated_window(5, 1)), dense(masks.sliding_window(5)))
    assert torch.equal(
        dense(masks.per_document(LAYOUT, masks.sliding_window(4))),
        dense(masks.and_masks(masks.document(LAYOUT), masks.sliding_window(4))),
    )
    image = dense(masks.natten_2d(6, 6, (3, 5)), 1, 1, 36, 36)
    assert (image.sum(-1) == 15).all(), "a window at the border keeps its size"
    assert dense(masks.natten_2d(1, 1, 1), 1, 1, 3, 3).nonzero().tolist() == [[0, 0, 0, 0]]


def test_masks_of_more_queries_than_keys():
    assert torch.equal(dense(masks.strided(4, 2), 1, 1, 20, 11), looped(strided_keys(4, 2), 1, 1, 20, 11))
    assert torch.equal(dense(masks.dilated_window(3, 2), 1, 1, 5, 11), looped(dilated_keys(3, 2), 1, 1, 5, 11))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.dilated_window(0, 2), ValueError, "window must be an integer of at least 1 (keys that a query"),
        (lambda: masks.dilated_window(4, 0), ValueError, "dilation must be an integer of at least 1 (tokens from"),
        (lambda: masks.dilated_window(4, 1.5), ValueError, "got 1.5"),
        (lambda: masks.strided(0), ValueError, "stride must be an integer of at least 1"),
        (lambda: masks.strided(4, 0), ValueError, "local must be an integer of at least 1"),
        (lambda: masks.global_tokens(0), ValueError, "count must be an integer of at least 1"),
        (lambda: masks.natten_2d(0, 4, 1), ValueError, "height must be an integer of at least 1"),
        (lambda: masks.natten_2d(4, -1, 1), ValueError, "width must be an integer of at least 1"),
        (lambda: masks.natten_2d(8, 8, 4), ValueError, "so that the query is in its middle; got 4"),
        (lambda: masks.natten_2d(8, 8, (3, 3, 3)), ValueError, "one or two odd numbers"),
        (lambda: masks.natten_2d(4, 8, (5, 3)), ValueError, "5 x 3 does not fit in an image of 4 x 8"),
        (lambda: masks.per_document(LAYOUT, None), TypeError, "per_document takes one or more mask_mods"),
        (lambda: masks.or_masks(masks.causal, 3), TypeError, "or_masks takes one or more mask_mods"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


PUBLIC_MASKS = [name for name in masks.__all__ if getattr(masks, name).__module__ == "packflex.masks.mods"]
PUBLIC_SCORE_MODS = [name for name in score_mods.__all__ if name != "alibi_slopes"]


def test_every_mod_is_documented_with_its_picture():
    page = (ROOT / "docs" / "masks.md").read_text()
    assert len(PUBLIC_MASKS) > 10
    assert len(PUBLIC_SCORE_MODS) > 6
    assert set(re.findall(r"^### `(\w+)`$", page, re.M)) == {*PUBLIC_MASKS, *PUBLIC_SCORE_MODS}
    for name in PUBLIC_MASKS:
        assert f"masks.{name}" in page, name
    for name in score_mods.__all__:
        assert f"score_mods.{name}" in page, name
    pictures = {path.stem for path in (ROOT / "docs" / "images" / "masks").glob("*.png")}
    assert pictures == {*PUBLIC_MASKS, *PUBLIC_SCORE_MODS}
    for name in pictures:
        assert f"(images/masks/{name}.png)" in page, name


def test_the_code_of_the_page_runs():
    """Each section's lines in the names of the first block, and its mod in attention."""
    first, *blocks, own = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "masks.md").read_text(), re.S)
    names = {}
    exec(first, names)
    assert names["out"].shape == (2, 4, 64, 16)
    assert len(blocks) == len(PUBLIC_MASKS) + len(PUBLIC_SCORE_MODS)
    tensors = [names[name] for name in ("query", "key", "value")]
    for block in blocks:
        given = dict(names)
        exec(block, given)
        if "mask_mod" in given:
            mask = masks.create_block_mask(given["mask_mod"], 2, None, 64, 64, device="cpu", BLOCK_SIZE=16)
            out = names["flex_attention"](*tensors, block_mask=mask, backend="reference")
        else:
            out = names["flex_attention"](*tensors, score_mod=given["score_mod"], backend="reference")
        assert out.isfinite().all(), block
        assert not torch.equal(out, names["out"]), block
    exec(own, names)
    assert names["learned"].grad.shape == (4, 64)
    assert names["learned"].grad.norm() > 0
