"""Numbers of a packed run: exact attention work, model FLOPs, throughput, MFU. Pure functions and plain classes.

FLOPs count a multiply-add as two. A model's step is `4 N + 2 T` a real token for the N weights that multiply it, T of
them trained (forward, gradient of the input, gradient of the weight: `6 N` where all are), plus attention on the pairs
that the document mask lets through: `4 D` a pair and query head forward (QK^T and PV) and `8 D` backward. Hardware may
do more (recomputed scores, padding); that is what MFU leaves out (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import nn

from packflex.layout import PackedLayout
from packflex.parallel.layout import ShardedLayout

# Dense bf16 FLOP/s without sparsity, from the makers' data sheets, by the name that torch reports. Longest match wins.
PEAK_BF16_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def attention_pairs(layout: PackedLayout | ShardedLayout, causal: bool = True, window: int | None = None) -> int:
    """Pairs (query, key) that a document mask lets through, of one head.

    Example:
        >>> attention_pairs(PackedLayout.from_lengths([[3, 4]]))  # 1 + 2 + 3 and 1 + 2 + 3 + 4
        16
    """
    if isinstance(layout, ShardedLayout):
        return layout.attention_pairs(causal, window)
    total = 0
    for row in layout.lengths:
        for n in row:
            w = n if window is None else min(window, n)
            one_sided = w * (w + 1) // 2 + (n - w) * w
            total += one_sided if causal else 2 * one_sided - n
    return total


@dataclass(frozen=True)
class AttentionShape:
    """What attention costs in one model: for each layer its window (None for none), and heads times head dim."""

    windows: tuple[int | None, ...]
    width: int
    causal: bool = True

    def flops(self, layout: PackedLayout | ShardedLayout) -> int:
        """FLOPs of forward and backward over all layers: 12 D a pair and query head."""
        pairs = {w: attention_pairs(layout, self.causal, w) for w in set(self.windows)}
        return 12 * self.width * sum(pairs[w] for w in self.windows)


def matmul_parameters(model: nn.Module, trained_only: bool = False) -> int:
    """Weights that multiply every token: matrices outside embeddings, an output layer tied to one included.

    Args:
        model: the model.
        trained_only: leave out those that are frozen.
    """
    total = 0
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            matrices = (p for p in module.parameters(recurse=False) if p.dim() >= 2)
            total += sum(p.numel() for p in matrices if p.requires_grad or not trained_only)
    return total


def matmul_flops(model: nn.Module) -> int:
    """FLOPs of a token's matrix products, forward and backward: 6 a trained weight, 4 a frozen one.

    A frozen weight (under adapters) has no gradient of its own, but passes on that of its output. That is counted for
    all of them, also for those before the first trained one, which autograd leaves out: under adapters those of the
    first layer's queries, keys and values.

    Example:
        >>> matmul_flops(nn.Sequential(nn.Linear(8, 16).requires_grad_(False), nn.Linear(16, 4)))  # 4 * 128 + 6 * 64
        896
    """
    return 4 * matmul_parameters(model) + 2 * matmul_parameters(model, trained_only=True)


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device, or None when it is not known: an MFU must not be made up."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [known for known in PEAK_BF16_FLOPS if name.startswith(known)]
    return PEAK_BF16_FLOPS[max(known, key=len)] if known else None


class Throughput:
    """Rates over the last steps: tokens, documents and FLOPs over the seconds they took.

    Args:
        window: steps that the rates look back on.
    """

    def __init__(self, window: int = 20) -> None:
        self._steps: deque[tuple[float, int, int, float]] = deque(maxlen=window + 1)
        self._tokens = self._documents = 0
        self._flops = 0.0

    @property
    def started(self) -> bool:
        """Whether the clock runs."""
        return bool(self._steps)

    def update(self, seconds: float, tokens: int = 0, documents: int = 0, flops: float = 0.0) -> None:
        """Add a step that ended at clock time `seconds`. The first call only starts the clock."""
        self._tokens += tokens
        self._documents += documents
        self._flops += flops
        self._steps.append((seconds, self._tokens, self._documents, self._flops))

    def rates(self) -> tuple[float, float, float] | None:
        """Tokens, documents and FLOPs a second over the window; None before two updates."""
        if len(self._steps) < 2:
            return None
        first, last = self._steps[0], self._steps[-1]
        seconds = last[0] - first[0]
        if seconds <= 0:
            return None
        return (last[1] - first[1]) / seconds, (last[2] - first[2]) / seconds, (last[3] - first[3]) / seconds
