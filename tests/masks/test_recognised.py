"""Which masks become intervals, and that torch and the printed kernel agree on them with the mask's own definition."""

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from packflex import PackedLayout, create_block_mask, document_mask, masks
from packflex.masks.interval_kernel import launch_intervals
from packflex.masks.recognise import _documents, interval_formula, recognised_intervals
from packflex.mods.lifted import lift
from packflex.mods.vectorised import over_indices

S = 37
LAYOUT = PackedLayout.from_lengths([[9, 1, 13], [30]], S)
PREFIX = torch.tensor([3, 20], dtype=torch.int32)
LENGTHS = torch.tensor([[30], [37]])
CPU = torch.device("cpu")
DOCUMENT = masks.document(LAYOUT)
IDS = LAYOUT.document_ids

INTERVALS = {
    "causal": masks.causal,
    "strictly causal": lambda b, h, q, k: k < q,
    "window": masks.sliding_window(5),
    "window of both sides": lambda b, h, q, k: (q - k).abs() < 4,
    "window the other way round": lambda b, h, q, k: (k - q).abs() <= 4,
    "prefix": masks.prefix_lm(7),
    "prefix of each row": masks.prefix_lm(PREFIX),
    "length of each row": lambda b, h, q, k: (k < LENGTHS[b, 0]) & (q >= k),
    "shifted causal": lambda b, h, q, k: q + 3 >= k,
    "diagonal": lambda b, h, q, k: q == k,
    "document": DOCUMENT,
    "document without padding's rule": lambda b, h, q, k: IDS[b, q] == IDS[b, k],
    "document causal": masks.and_masks(DOCUMENT, masks.causal),
    "document window": masks.and_masks(masks.sliding_window(4), DOCUMENT),
    "document prefix": masks.and_masks(DOCUMENT, masks.prefix_lm(PREFIX)),
    "late": lambda b, h, q, k: (k >= 5) & (k <= q),
    "no key at all": lambda b, h, q, k: (k > q) & (k < q),
    "torch's noop_mask": torch_flex.noop_mask,
    "torch's and_masks": torch_flex.and_masks(masks.causal, masks.sliding_window(5), DOCUMENT),
    "torch's or_masks": torch_flex.or_masks(masks.causal, lambda b, h, q, k: k < 5),
    "negated": lambda b, h, q, k: ~(q < k) & ~~(q - k < 9),
    "chosen": lambda b, h, q, k: torch.where(q < k, False, True) & torch.where(q - k < 9, True, False),
}
LISTS = {
    "dilated": masks.dilated_window(3, 4),
    "strided": masks.strided(6, 3),
    "global": masks.global_tokens(2),
    "anticausal": lambda b, h, q, k: q + k < S,
    "per head": lambda b, h, q, k: q - k >= h,
    "changed ids": None,
    "of float": lambda b, h, q, k: q.float() >= k.float(),
    "either side": lambda b, h, q, k: (k <= q) | (k > 30),
    "nothing": lambda b, h, q, k: False,
}


def dense(mod):
    return over_indices(mod)(*map(torch.arange, (2, 1, S, S))).expand(2, 1, S, S)[:, 0]


def changed_ids():
    ids = PackedLayout.from_lengths([[9, 1, 13], [30]], S).document_ids
    ids[0, 0] = 5
    return lambda b, h, q, k: ids[b, q] == ids[b, k]


@pytest.mark.parametrize("name", INTERVALS)
def test_intervals_are_the_mask(name):
    mod = INTERVALS[name]
    mask = create_block_mask(mod, 2, None, S, S, "cpu", 8)
    assert mask.kv_intervals is not None
    keys, queries = torch.arange(S), torch.arange(S)
    lo, hi = mask.kv_intervals[..., None]
    assert torch.equal((keys >= lo) & (keys < hi), dense(mod))
    lo, hi = mask.q_intervals[..., None]
    assert torch.equal(((queries >= lo) & (queries < hi)).mT, dense(mod))
    assert (mask.kv_intervals.diff(dim=2) >= 0).all(), "bounds only grow"
    assert (mask.q_intervals.diff(dim=2) >= 0).all()


@pytest.mark.parametrize("name", INTERVALS)
def test_the_printed_kernel_equals_torch(name):
    lifted = lift(INTERVALS[name], "mask", CPU)
    shape = (2, 1, S, S)
    documents = _documents(lifted, shape, CPU)
    formula = interval_formula(lifted.key, tuple(lifted.numbers), tuple(documents))
    expected = recognised_intervals(lifted, shape, CPU)
    kv_intervals, q_intervals = launch_intervals(lifted, formula, documents, shape, CPU)
    assert torch.equal(kv_intervals, expected.kv_intervals)
    assert torch.equal(q_intervals, expected.q_intervals)


@pytest.mark.parametrize("window", [None, 7])
def test_padded_tails_are_those_of_document_mask(window):
    """Kernels count on the same bounds for what nothing sees, whoever made the mask."""
    layout = PackedLayout.from_lengths([[3, 17, 9], [S], [], [1]], S)
    mod = masks.and_masks(masks.document(layout), masks.causal)
    if window is not None:
        mod = masks.and_masks(mod, masks.sliding_window(window))
    ours, theirs = create_block_mask(mod, 4, None, S, S, "cpu"), document_mask(layout, window=window)
    assert torch.equal(ours.kv_intervals, theirs.kv_intervals)
    assert torch.equal(ours.q_intervals, theirs.q_intervals)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 50), (50, 1), (130, 257), (257, 130)])
def test_other_lengths(q_len, kv_len):
    lifted = lift(masks.sliding_window(20), "mask", CPU)
    shape = (1, 1, q_len, kv_len)
    expected = recognised_intervals(lifted, shape, CPU)
    formula = interval_formula(lifted.key, tuple(lifted.numbers), ())
    for ours, theirs in zip(
        launch_intervals(lifted, formula, {}, shape, CPU), (expected.kv_intervals, expected.q_intervals), strict=True
    ):
        assert torch.equal(ours, theirs)
    lo, hi = expected.kv_intervals[:, 0, :, None]
    seen = (torch.arange(kv_len) >= lo) & (torch.arange(kv_len) < hi)
    distance = torch.arange(q_len)[:, None] - torch.arange(kv_len)
    assert torch.equal(seen, (distance >= 0) & (distance < 20))


@pytest.mark.parametrize("name", LISTS)
def test_other_masks_are_lists(name):
    mod = changed_ids() if name == "changed ids" else LISTS[name]
    mask = create_block_mask(mod, 2, 2 if name == "per head" else None, S, S, "cpu", 8)
    assert mask.kv_intervals is None


def test_a_changed_window_keeps_the_kernel():
    from packflex.mods import source

    shape = (1, 1, S, S)
    before = None
    for window in (3, 9, 30):
        lifted = lift(masks.sliding_window(window), "mask", CPU)
        formula = interval_formula(lifted.key, tuple(lifted.numbers), ())
        launch_intervals(lifted, formula, {}, shape, CPU)
        misses = source.load.cache_info().misses
        assert before in (None, misses)
        before = misses


def test_masks_without_tensors_are_made_once():
    first, second = (create_block_mask(masks.sliding_window(6), None, None, S, S, "cpu") for _ in range(2))
    assert first.kv_intervals is second.kv_intervals
    other = create_block_mask(masks.sliding_window(7), None, None, S, S, "cpu")
    assert not torch.equal(other.kv_intervals, first.kv_intervals)
    ids = LAYOUT.document_ids
    third, fourth = (create_block_mask(DOCUMENT, 2, None, S, S, "cpu") for _ in range(2))
    assert third.kv_intervals is not fourth.kv_intervals, "ids may be written to"
    with torch.inference_mode():
        inference = create_block_mask(masks.sliding_window(8), None, None, S, S, "cpu")
    assert inference.kv_intervals.is_inference()
    assert not create_block_mask(masks.sliding_window(8), None, None, S, S, "cpu").kv_intervals.is_inference()
    assert ids is LAYOUT.document_ids
