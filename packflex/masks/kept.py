"""Masks that hold no tensor are the same whenever they are asked for: their parts are made once and kept.

Nothing writes to a mask's tensors, so that any number of masks may share them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from packflex.mods.lifted import Lifted

Made = TypeVar("Made")
_MOST, _MOST_BYTES = 32, 2**24
_kept: dict[Hashable, Any] = {}


def kept(lifted: Lifted, device: torch.device, what: Hashable, make: Callable[[], Made]) -> Made:
    """What `make()` gives, from before if a mask with the same program and numbers has asked for the same `what`.

    Args:
        lifted: the mask; one that captures tensors is made anew each time, for their values may have changed.
        device: where the tensors are.
        what: which of the mask's parts, and every size that it depends on.
        make: gives tensors, or a tuple or list of such.
    """
    if lifted.captures or not _good_for_later(device):
        return make()
    key = (lifted.key, tuple(lifted.numbers), device, what)
    if key not in _kept:
        made = make()
        tensors = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
        if any(type(x) is not Tensor for x in tensors) or sum(x.nbytes for x in tensors) > _MOST_BYTES:
            return made  # fake tensors, which have no values, among others
        _kept[key] = made
        if len(_kept) > _MOST:
            _kept.pop(next(iter(_kept)))
    return _kept[key]


def forget() -> None:
    """Keep nothing of what has been made so far."""
    _kept.clear()


def _good_for_later(device: torch.device) -> bool:
    """Whether tensors made now are: not those of inference mode, nor those in a CUDA graph's memory."""
    if torch.is_inference_mode_enabled():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
