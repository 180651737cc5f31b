"""The six packed-attention workloads of the benchmarks, and distributions that must not fall off.

Lengths are drawn from a generator seeded by the workload's name, so every run and every version measures the same work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Workload:
    """Document lengths of each row, heads, head dim and mask."""

    name: str
    seq_len: int
    lengths: tuple[tuple[int, ...], ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    causal: bool = True
    window: int | None = None

    @property
    def pairs(self) -> int:
        """Attended (query, key) pairs of one head: the exact work that the mask asks for."""
        n = np.array([length for row in self.lengths for length in row], dtype=np.int64)
        if self.window is not None:
            short = np.minimum(n, self.window)
            return int((short * (short + 1) // 2 + (n - short) * self.window).sum())
        return int((n * (n + 1) // 2).sum() if self.causal else (n * n).sum())

    def flops(self, backward: bool) -> float:
        """Multiply-adds of the attended pairs, twice 2 D forward and five times 2 D backward, over all query heads."""
        return self.pairs * self.heads * self.head_dim * (10 if backward else 4)

    def bytes_moved(self, backward: bool) -> float:
        """Fewest bytes in half precision: every tensor read or written once."""
        tokens = len(self.lengths) * self.seq_len
        q, kv = tokens * self.heads * self.head_dim * 2, tokens * self.kv_heads * self.head_dim * 2
        statistics = tokens * self.heads * 4
        return 4 * q + 4 * kv + 2 * statistics if backward else 2 * q + 2 * kv + statistics


def lognormal_row(rng: np.random.Generator, median: float, sigma: float, low: int, high: int, total: int) -> list[int]:
    """Lengths that fill `total` tokens exactly, the last one cut to fit."""
    lengths: list[int] = []
    left = total
    while left:
        length = min(int(np.clip(rng.lognormal(np.log(median), sigma), low, high)), left)
        lengths.append(length)
        left -= length
    return lengths


def _rows(name: str, rows: int, draw: Callable[[np.random.Generator], list[int]]) -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(sum(map(ord, name)))
    return tuple(tuple(draw(rng)) for _ in range(rows))


def make_workload(name: str, seq_len: int | None = None) -> Workload:
    """A workload by name; `seq_len` shrinks its rows, for trying a script where there is no GPU.

    Raises:
        KeyError: a name that is not in `NAMES` or `OTHER_NAMES`.
    """
    n = seq_len or {"pretrain": 32768, "single": 16384, "window": 32768, "one_128k": 131072, "mixed": 32768}.get(
        name, 8192
    )

    def lognormal(rows: int, median: float, sigma: float, low: int, high: int) -> tuple[tuple[int, ...], ...]:
        return _rows(name, rows, lambda rng: lognormal_row(rng, median, sigma, low, min(high, n), n))

    small = {"heads": 16, "kv_heads": 4, "head_dim": 64}
    makers: dict[str, Callable[[], Workload]] = {
        "sft": lambda: Workload(name, n, lognormal(8, 220, 0.9, 16, 4096)),
        "sft_d64": lambda: replace(Workload(name, n, lognormal(8, 220, 0.9, 16, 4096)), **small),
        "pretrain": lambda: Workload(name, n, lognormal(2, 900, 1.3, 32, n)),
        "single": lambda: Workload(name, n, ((n,),) * 4),
        "window": lambda: Workload(name, n, lognormal(2, 6000, 1.0, 64, n), window=min(1024, n)),
        "encoder": lambda: Workload(
            name, n, lognormal(8, 400, 0.8, 16, 4096), heads=16, kv_heads=16, head_dim=64, causal=False
        ),
        "docs_of_20": lambda: Workload(name, n, ((20,) * (n // 20),) * 8),
        "docs_of_63": lambda: Workload(name, n, ((63,) * (n // 63),) * 8),
        "one_128k": lambda: Workload(name, n, ((n,),)),
        "mixed": lambda: Workload(name, n, ((n // 2, *(50,) * (n // 2 // 50)),) * 2),
        "half_padding": lambda: Workload(
            name, n, _rows(name, 8, lambda r: lognormal_row(r, 220, 0.9, 16, 4096, n // 2))
        ),
    }
    return makers[name]()


NAMES = ["sft", "sft_d64", "pretrain", "single", "window", "encoder"]
OTHER_NAMES = ["docs_of_20", "docs_of_63", "one_128k", "mixed", "half_padding"]
