"""Candidate tiles of the Hopper kernels and the workers that check and time them, for `scripts/tune_tiles.py`.

Every candidate is compiled and checked on small packed rows in a process of its own first, many at a time; those that
pass are checked again and timed on the workloads, one process a workload. A process that says nothing for too long is
ended, its candidate reported, and the next one takes over: a kernel that hangs costs its time-out and no more.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from typing import Any

import torch
from attention_workloads import Workload, make_workload
from bench_attention import median_ms

from packflex import PackedLayout, document_mask, flex_attention
from packflex.attention.hopper.tiles import BackwardTile, ForwardTile

FORK = multiprocessing.get_context("fork")  # torch is imported once; the parent must not touch CUDA
CHECKED_ROWS = [[1, 2, 300, 29, 700, 64, 64, 32, 1] + [13] * 65 + [1000], [3000], [63] * 20 + [111] * 8, []]
MAX_ERROR = 8e-3


@dataclass(frozen=True)
class Candidate:
    """A tile of one kernel for one head dim."""

    kernel: str
    head_dim: int
    tile: Any

    @property
    def options(self) -> dict[str, int]:
        """As `kernel_options` of `flex_attention`."""
        return {f"{self.kernel}_{name}": value for name, value in asdict(self.tile).items()}

    def __str__(self) -> str:
        return f"{self.kernel} D{self.head_dim} {describe(self.tile)}"


def describe(tile: Any) -> str:
    """A tile in few characters; what is at its default is left out."""
    short = {
        "consumers": "c", "block_n": "n", "block_m": "m", "stages": "s", "q_stages": "q", "per_sm": "sm",
        "max_heads": "h", "persistent": "p", "section_mib": "L", "ping_pong": "pp", "ahead": "a",
    }  # fmt: skip
    return " ".join(f"{short.get(name, name)}{value}" for name, value in asdict(tile).items())


def _forward(head_dim: int) -> list[ForwardTile]:
    wide = 2 if head_dim == 128 else 4  # stages of 128 keys that fit
    both = [
        ForwardTile(2, 64, 4, 2),
        ForwardTile(2, 64, 4, 2, ping_pong=1),
        ForwardTile(2, 64, 4, 2, max_heads=1),
        ForwardTile(3, 64, 3, 2),
        ForwardTile(3, 64, 4, 1),
        ForwardTile(3, 64, 3, 2, max_heads=1),
        ForwardTile(3, 64, 4, 1, max_heads=1, persistent=0),
        ForwardTile(2, 128, wide, 2),
        ForwardTile(2, 128, wide, 2, ping_pong=1),
        ForwardTile(2, 128, wide, 2, max_heads=1),
        ForwardTile(2, 128, wide, 2, max_heads=1, ping_pong=1),
        ForwardTile(2, 128, wide, 2, max_heads=1, section_mib=8),
        ForwardTile(2, 128, wide, 2, max_heads=1, section_mib=32),
        ForwardTile(2, 128, wide, 1, max_heads=1, persistent=0),
        ForwardTile(2, 128, wide, 1, max_heads=1, persistent=0, ping_pong=1),
        ForwardTile(2, 128, wide, 1, max_heads=1, persistent=0, section_mib=32),
        ForwardTile(2, 128, wide, 1, persistent=0),
        ForwardTile(2, 64, 4, 1, persistent=0),
        ForwardTile(1, 64, 2, 2, 2),
        ForwardTile(1, 64, 2, 1, 2, persistent=0),
    ]
    if head_dim == 64:
        both += [
            ForwardTile(1, 64, 3, 2, 3),
            ForwardTile(1, 64, 3, 1, 3, persistent=0),
            ForwardTile(1, 128, 2, 2, 2),
            ForwardTile(1, 64, 3, 2, 3, max_heads=1),
            ForwardTile(1, 64, 2, 2, 4),
            ForwardTile(3, 128, 2, 2),
            ForwardTile(3, 128, 2, 2, max_heads=1),
        ]
    return both


def _backward(head_dim: int) -> list[BackwardTile]:
    if head_dim == 128:  # working ahead spills
        return [
            BackwardTile(2, 2, ahead=0),
            BackwardTile(2, 2, max_heads=2, ahead=0),
            BackwardTile(2, 2, max_heads=1, ahead=0),
            BackwardTile(2, 2, max_heads=1, section_mib=16, ahead=0),
            BackwardTile(2, 2, max_heads=1, section_mib=96, ahead=0),
            BackwardTile(2, 2, max_heads=4, section_mib=96, ahead=0),
            BackwardTile(1, 2, ahead=0),
            BackwardTile(1, 2, max_heads=1, ahead=0),
        ]
    return [
        BackwardTile(2, 2),
        BackwardTile(2, 2, max_heads=1),
        BackwardTile(2, 2, max_heads=1, ahead=0),
        BackwardTile(2, 3, max_heads=1),
        BackwardTile(1, 2, per_sm=2),
        BackwardTile(1, 2, per_sm=2, max_heads=2),
        BackwardTile(1, 2, per_sm=2, max_heads=1),
        BackwardTile(1, 2, per_sm=2, ahead=0),
        BackwardTile(1, 3, per_sm=2),
        BackwardTile(1, 2, per_sm=2, section_mib=96),
        *(BackwardTile(1, n, per_sm=2, persistent=2, held=held) for n in (2, 3) for held in (0, 1)),
        *(BackwardTile(2, n, persistent=p, held=1) for n in (2, 3) for p in (0, 2)),
    ]


MAKERS: dict[str, Callable[[int], Any]] = {"forward": _forward, "backward": _backward}


def candidates(kernel: str, head_dim: int, group: int) -> list[Candidate]:
    """Tiles to time, those that `group` query heads on a KV head make alike once."""
    tiles = {dataclasses.replace(tile, max_heads=min(tile.max_heads, group)): None for tile in MAKERS[kernel](head_dim)}
    return [Candidate(kernel, head_dim, tile) for tile in tiles]


def problem(rows: Any, seq_len: int, heads: tuple[int, int], dim: int, causal: bool, window: int | None) -> Any:
    """q, k, v that want gradients, the gradient of the output, and the mask."""
    torch.manual_seed(0)
    layout = PackedLayout.from_lengths(rows, seq_len).to("cuda")
    shape = (len(rows), seq_len)
    q, k, v, grad = (
        torch.randn(*shape, n, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    mask = document_mask(layout, causal=causal, window=window)
    return *(x.requires_grad_() for x in (q, k, v)), grad, mask


def outcome(data: Any, backend: str, options: dict[str, int] | None, backward: bool) -> tuple[torch.Tensor, ...]:
    """out and lse, or the three gradients."""
    q, k, v, grad, mask = data
    out, lse = flex_attention(
        q, k, v, block_mask=mask, enable_gqa=True, return_lse=True, backend=backend, kernel_options=options
    )
    if not backward:
        return out.detach(), lse.detach()
    return torch.autograd.grad(out, (q, k, v), grad)


def error_of(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Largest relative error, on the card; -inf where it is expected counts as equal. NaN passes no comparison."""

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = (x.float().nan_to_num(nan=torch.nan, neginf=-1e4) for x in (a, b))
        return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()

    errors = [error(a, b) for a, b in zip(results, expected, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def check_small(candidate: Candidate, heads: tuple[int, int]) -> str:
    """Compile a candidate and compare it with the portable kernels on small rows; why it fails, or nothing."""
    length = max(map(sum, CHECKED_ROWS)) + 37
    backward = candidate.kernel != "forward"
    for causal, window in ((True, None), (True, 100), (False, None)):
        data = problem(CHECKED_ROWS, length, heads, candidate.head_dim, causal, window)
        expected = outcome(data, "triton", None, backward)
        error = error_of(outcome(data, "hopper", candidate.options, backward), expected)
        if not error <= MAX_ERROR:
            return f"wrong by {error:.1e} (causal {causal}, window {window})"
    return ""


def time_workload(work: Workload, kernel: str, tiles: list[Candidate], repeats: int, say: Callable[..., None]) -> None:
    """Check and time each candidate on a workload, and the portable kernels; says (index, ms, error) of each."""
    heads = (work.heads, work.kv_heads)
    data = problem(work.lengths, work.seq_len, heads, work.head_dim, work.causal, work.window)
    q, k, v, grad, mask = data
    backward = kernel != "forward"
    expected = outcome(data, "triton", None, backward)

    def milliseconds(backend: str, options: dict[str, int] | None) -> float:
        def forward() -> Any:
            return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend=backend, kernel_options=options)

        if not backward:
            with torch.no_grad():
                return median_ms(forward, torch.device("cuda"), repeats)
        out = forward()
        return median_ms(
            lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), torch.device("cuda"), repeats
        )

    say(-1, milliseconds("triton", None), 0.0)
    for index, candidate in enumerate(tiles):
        error = error_of(outcome(data, "hopper", candidate.options, backward), expected)
        say(index, milliseconds("hopper", candidate.options), error)


def _small_worker(pipe: Any, candidate: Candidate, heads: tuple[int, int]) -> None:
    try:
        pipe.send(check_small(candidate, heads))
    except Exception as error:  # compilers and launchers share no base class
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")


def check_all(jobs: list[tuple[Candidate, tuple[int, int]]], processes: int, seconds: float) -> list[str]:
    """`check_small` of each job in a process of its own, `processes` at a time, each for at most `seconds`."""
    verdicts = ["" for _ in jobs]
    waiting, running = list(range(len(jobs))), {}
    while waiting or running:
        while waiting and len(running) < processes:
            index = waiting.pop(0)
            ours, theirs = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_small_worker, args=(theirs, *jobs[index]), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (index, process, time.monotonic() + seconds)
        wait(list(running), timeout=0.5)
        for pipe, (index, process, deadline) in list(running.items()):
            if pipe.poll():
                try:
                    verdicts[index] = pipe.recv()
                except EOFError:
                    verdicts[index] = f"its process ended with code {process.exitcode}"
            elif time.monotonic() > deadline:
                verdicts[index] = f"said nothing for {seconds:.0f} s"
            else:
                continue
            _end(process)
            del running[pipe]
    return verdicts


def _time_worker(pipe: Any, name: str, kernel: str, tiles: list[Candidate], repeats: int) -> None:
    try:
        time_workload(make_workload(name), kernel, tiles, repeats, lambda *said: pipe.send(said))
        pipe.send(None)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")


def time_all(name: str, kernel: str, tiles: list[Candidate], repeats: int, seconds: float) -> tuple[list[Any], float]:
    """For each candidate (milliseconds, error) or why there is none, and the milliseconds of the portable kernels."""
    results: list[Any] = [None] * len(tiles)
    portable = float("nan")
    start = 0
    while start < len(tiles):
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_time_worker, args=(theirs, name, kernel, tiles[start:], repeats), daemon=True)
        process.start()
        theirs.close()
        done = 0  # candidates of this process
        while True:
            try:
                said = ours.recv() if ours.poll(seconds) else f"said nothing for {seconds:.0f} s"
            except EOFError:
                said = "its process ended without a word"
            if said is None or isinstance(said, str):
                break
            index, ms, error = said
            if index < 0:
                portable = ms
            else:
                results[start + index] = (ms, error)
                done = index + 1
        _end(process)
        if said is None:
            break
        if start + done < len(tiles):
            results[start + done] = said
        start += done + 1
    return results, portable


def _end(process: Any) -> None:
    process.join(0.2)
    if process.is_alive():
        process.kill()
        process.join(10)
