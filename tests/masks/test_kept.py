"""Masks that hold no tensor are made once, all others each time."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from packflex import create_block_mask, masks
from packflex.masks import kept


@pytest.fixture(autouse=True)
def nothing_kept():
    kept.forget()
    yield
    kept.forget()


def tensors(mask_mod, length=200, block=64):
    mask = create_block_mask(mask_mod, None, None, length, length, "cpu", block)
    if mask.kv_intervals is not None:
        return [mask.kv_intervals, mask.q_intervals]
    return [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices]


@pytest.mark.parametrize("make", [lambda: masks.causal, lambda: masks.dilated_window(5, 3)])
def test_asked_for_again_it_is_the_same(make):
    first = tensors(make())
    assert all(a is b for a, b in zip(first, tensors(make()), strict=True)), "also when the mask is written again"
    assert not any(a is b for a, b in zip(first, tensors(make(), length=201), strict=True))
    kept.forget()
    again = tensors(make())
    assert not any(a is b for a, b in zip(first, again, strict=True))
    assert all(map(torch.equal, first, again))


def test_another_number_or_tile_is_another_mask():
    first = tensors(masks.dilated_window(5, 3))
    assert not torch.equal(first[0], tensors(masks.dilated_window(40, 3))[0])
    assert tensors(masks.dilated_window(5, 3), block=32)[0].shape != first[0].shape


def test_one_that_reads_a_tensor_is_made_each_time():
    limits = torch.full((200,), 100)

    def below(b, h, q_idx, kv_idx):
        return kv_idx < limits[q_idx]

    first = tensors(below)
    limits[:] = 3
    assert not torch.equal(first[0] + first[2], tensors(below)[0] + tensors(below)[2])


def test_large_ones_and_old_ones_are_not_kept(monkeypatch):
    monkeypatch.setattr(kept, "_MOST_BYTES", 1000)
    assert tensors(masks.causal)[0] is not tensors(masks.causal)[0]
    monkeypatch.undo()
    first = tensors(masks.causal, length=1)
    for length in range(2, kept._MOST + 2):
        tensors(masks.causal, length=length)
    assert len(kept._kept) == kept._MOST
    assert tensors(masks.causal, length=1)[0] is not first[0]


def test_not_in_inference_mode_and_no_fake_tensors():
    with torch.inference_mode():
        tensors(masks.causal)
    assert not kept._kept
    with FakeTensorMode():
        assert isinstance(tensors(masks.causal)[0], FakeTensor)
    assert not kept._kept
