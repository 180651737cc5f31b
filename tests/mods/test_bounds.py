"""Reads past the end of a captured tensor, checked when asked for: the message names the line, the index and where."""

import pytest
import torch

from packflex import create_block_mask, flex_attention, masks
from packflex.mods.errors import ModIndexError

S = 40
TABLE = torch.arange(10.0)
SHORT = torch.zeros(2, 30, dtype=torch.int32)


def by_distance(score, b, h, q_idx, kv_idx):
    return score + TABLE[(q_idx - kv_idx).abs()]


def by_score(score, b, h, q_idx, kv_idx):
    return score + TABLE[(score * 100).int()]


def by_key(score, b, h, q_idx, kv_idx):
    return score + TABLE[kv_idx]


def short_ids(b, h, q_idx, kv_idx):
    return SHORT[b, q_idx] == SHORT[b, kv_idx]


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, S, 16, generator=generator) for heads in (4, 2, 2)]


def window(size):
    return create_block_mask(masks.sliding_window(size), None, None, S, S, "cpu", 16)


def test_a_read_past_the_end_is_named():
    with pytest.raises(ModIndexError) as caught:
        flex_attention(*inputs(), score_mod=by_distance, enable_gqa=True, check_bounds=True)
    message = str(caught.value)
    assert "by_distance" in message
    assert "test_bounds.py:15 `return score + TABLE[(q_idx - kv_idx).abs()]`" in message
    assert "shape (10,) with index 10 in axis 0, which has 10, at q_idx=0, kv_idx=10: clamp the index" in message
    assert isinstance(caught.value, IndexError)


def test_what_the_mask_hides_is_not_read():
    flex_attention(*inputs(), score_mod=by_distance, block_mask=window(10), enable_gqa=True, check_bounds=True)
    with pytest.raises(ModIndexError, match="index 10 in axis 0, which has 10, at q_idx=10, kv_idx=0"):
        flex_attention(*inputs(), score_mod=by_distance, block_mask=window(11), enable_gqa=True, check_bounds=True)


def test_an_index_of_a_key_alone_is_read_for_every_key():
    hidden = create_block_mask(lambda b, h, q, k: (k < 10) & (q >= k), None, None, S, S, "cpu", 16)
    with pytest.raises(ModIndexError, match="at kv_idx=10"):
        flex_attention(*inputs(), score_mod=by_key, block_mask=hidden, enable_gqa=True, check_bounds=True)


def test_an_index_made_of_the_score():
    with pytest.raises(ModIndexError, match=r"by_score.*at b=0, h=0, q_idx=\d+, kv_idx=\d+"):
        flex_attention(*inputs(), score_mod=by_score, enable_gqa=True, check_bounds=True)


def test_masks():
    with pytest.raises(ModIndexError, match=r"mask_mod short_ids.*with index 30 in axis 1.*at b=0, q_idx=30"):
        create_block_mask(short_ids, 2, None, S, S, "cpu", check_bounds=True)
    create_block_mask(short_ids, 2, None, 30, 30, "cpu", check_bounds=True)


SHORT_LENGTHS = torch.tensor([5, 6])


def short_lengths(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (kv_idx < SHORT_LENGTHS[b])


@pytest.mark.parametrize(
    ("mod", "batch", "length", "read"),
    [
        (short_ids, 2, S, r"SHORT\[b, q_idx\] == .*\(2, 30\) with index 30 in axis 1, which has 30, at b=0, q_idx=30"),
        (short_ids, 3, 30, r"SHORT\[b, q_idx\] == .*with index 2 in axis 0, which has 2, at b=2, q_idx=0"),
        (short_lengths, 3, S, r"SHORT_LENGTHS\[b\]\)`: reads .*with index 2 in axis 0, which has 2, at b=2"),
    ],
    ids=["query", "row", "row-of-intervals"],
)
def test_a_mask_made_on_a_cpu_names_the_read_unasked(mod, batch, length, read):
    with pytest.raises(ModIndexError, match=rf"mask_mod {mod.__name__} \(.*test_bounds\.py:\d+ `return .*{read}"):
        create_block_mask(mod, batch, None, length, length, "cpu", 16)


def test_negative_indices_count_from_the_end():
    generous = torch.zeros(2 * S)
    flex_attention(*inputs(), score_mod=lambda s, b, h, q, k: s + generous[q - k], enable_gqa=True, check_bounds=True)
    with pytest.raises(ModIndexError, match="index -11"):
        flex_attention(*inputs(), score_mod=lambda s, b, h, q, k: s + TABLE[-k - 1], enable_gqa=True, check_bounds=True)


def test_the_reference_backend_always_checks():
    with pytest.raises(ModIndexError, match="by_distance"):
        flex_attention(*inputs(), score_mod=by_distance, enable_gqa=True, backend="reference")


def test_not_inside_a_compiled_graph():
    @torch.compile(fullgraph=True, backend="eager")
    def run(q, k, v):
        return flex_attention(q, k, v, score_mod=by_distance, enable_gqa=True, check_bounds=True, backend="triton")

    with pytest.raises(Exception, match="check_bounds=True waits for values"):
        run(*inputs())


def test_a_message_names_its_own_function_and_not_one_of_the_same_structure():
    def first(score, b, h, q_idx, kv_idx):
        return score + TABLE[(q_idx - kv_idx).abs()] * 2

    def second(score, b, h, q_idx, kv_idx):
        return score + TABLE[(q_idx - kv_idx).abs()] * 3

    flex_attention(*inputs(), score_mod=first, block_mask=window(5), enable_gqa=True)
    for options in ({"check_bounds": True}, {"backend": "reference"}):
        with pytest.raises(ModIndexError, match=r"second .*\* 3`"):
            flex_attention(*inputs(), score_mod=second, enable_gqa=True, **options)
