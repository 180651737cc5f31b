"""What the Hopper kernels take: asked when a backend is chosen, on host numbers alone and without importing Triton."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

HEAD_DIMS = (64, 128)


def _has_gluon() -> bool:
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 6)


_HAS_GLUON = _has_gluon()  # at import: a compiled model traces `refusal`


def refusal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Why the Hopper kernels cannot run this case, or None when they can. Masks must be intervals besides."""
    if q.device.type != "cuda":
        return f"it runs on CUDA devices; the tensors are on {q.device}"
    if why := card_refusal(q.device):
        return why
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes float16 and bfloat16; got {q.dtype}"
    if q.shape[3] not in HEAD_DIMS or v.shape[3] != q.shape[3]:
        return f"it takes equal head dims of 64 or 128; D is {q.shape[3]} and Dv {v.shape[3]}"
    if not scale > 0:
        return f"it takes a scale above 0; got {scale}"
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return f"it takes no empty batch or sequence; got query {tuple(q.shape)} and key {tuple(k.shape)}"
    return None


def card_refusal(device: torch.device | None = None) -> str | None:
    """Why no case can run on a CUDA device, or None; the current device by default."""
    card = torch.cuda.get_device_properties(device)
    if card.major != 9:
        return f"it needs compute capability 9.0 (H100, H200); {card.name} has {card.major}.{card.minor}"
    return None if _HAS_GLUON else "it needs Triton 3.6 or later, with Gluon; that is not installed"
