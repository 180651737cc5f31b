"""Measure packing: documents a second and how full rows get, packflex beside the textbook algorithms, on one core.

    python scripts/bench_packing.py --out results                         # lognormal lengths of instruction data
    python scripts/bench_packing.py --lengths document_lengths.npz        # every array of lengths in a file
    python scripts/bench_packing.py --order                               # how evenly ranks share the work
    python scripts/bench_packing.py --by-counts 1000000000                # a billion documents, known by their counts

next_fit opens a row when a document does not fit. ffd is first-fit decreasing over all documents (a tree finds the
first row with room). windowed is best-fit decreasing inside windows of documents in their order, as trainers do to
bound memory. All of them are plain Python and numpy, like packflex's, but only count rows, where packflex's make whole
plans (which document lies where, cut, ordered, checked); the slow ones are timed on fewer documents.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np

from packflex.packing import plan_rows
from packflex.packing.order import EpochOrder, balanced_order, rank_imbalance, row_costs, row_order
from packflex.packing.strategies import best_fit_patterns
from packflex.packing.stream import StreamPacker

FEWER = {"ffd": 200_000, "windowed": 1_000_000, "stream": 1_000_000}


def textbook_next_fit(lengths: np.ndarray, seq_len: int) -> int:
    """Rows of next-fit."""
    rows, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            rows, room = rows + 1, seq_len
        room -= length
    return rows


def first_fit_decreasing(lengths: np.ndarray, seq_len: int) -> int:
    """Rows of first-fit decreasing, each document's row found in a tree of the rows' room."""
    size = 1 << max(1, (len(lengths) - 1).bit_length())
    tree = [seq_len] * (2 * size)
    used = 0
    for length in np.sort(lengths)[::-1].tolist():
        node = 1
        while node < size:
            node *= 2
            if tree[node] < length:
                node += 1
        used = max(used, node - size + 1)
        tree[node] -= length
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return used


def windowed_best_fit(lengths: np.ndarray, seq_len: int, window: int = 10_000) -> int:
    """Rows of best-fit decreasing inside windows of documents."""
    rows = 0
    for start in range(0, len(lengths), window):
        rooms: list[int] = []
        for length in np.sort(lengths[start : start + window])[::-1].tolist():
            at = bisect_left(rooms, length)
            room = rooms.pop(at) if at < len(rooms) else seq_len
            rows += room == seq_len
            if room > length:
                insort(rooms, room - length)
    return rows


def packflex_rows(strategy: str) -> Callable[[np.ndarray, int], int]:
    """Rows of one of packflex's plans."""
    return lambda lengths, seq_len: plan_rows(lengths, seq_len, strategy).num_rows


def online(lengths: np.ndarray, seq_len: int, pool: int = 1000) -> int:
    """Rows of packflex's packer of streams, with a pool of documents."""
    packer = StreamPacker[int](seq_len, pool)
    rows = 0
    for index, length in enumerate(lengths.tolist()):
        packer.add(index, length)
        if packer.is_full:
            packer.take_row()
            rows += 1
    while packer.take_row():
        rows += 1
    return rows


ALGORITHMS: dict[str, Callable[[np.ndarray, int], int]] = {
    "packflex best_fit": packflex_rows("best_fit"),
    "packflex next_fit": packflex_rows("next_fit"),
    "packflex wrapped": packflex_rows("wrapped"),
    "packflex stream, pool 1000": online,
    "textbook next_fit": textbook_next_fit,
    "textbook ffd": first_fit_decreasing,
    "textbook windowed best fit": windowed_best_fit,
}


def measure(lengths: np.ndarray, seq_len: int) -> list[dict[str, float | str]]:
    """Time every algorithm on the lengths, cut to a row first."""
    results: list[dict[str, float | str]] = []
    lengths = np.minimum(lengths, seq_len)
    for name, rows_of in ALGORITHMS.items():
        most = next((count for part, count in FEWER.items() if part in name), len(lengths))
        some = lengths[:most]
        began = time.perf_counter()
        rows = rows_of(some, seq_len)
        seconds = time.perf_counter() - began
        results.append(
            {
                "algorithm": name,
                "documents": len(some),
                "seconds": seconds,
                "documents_per_second": len(some) / seconds,
                "efficiency": float(some.sum()) / (rows * seq_len),
            }
        )
        speed, share = len(some) / seconds, results[-1]["efficiency"]
        print(f"{name:<28}{len(some):>12,}{seconds:>9.2f} s{speed:>14,.0f}/s{share:>10.3%}", flush=True)
    return results


def measure_counts(lengths: np.ndarray, seq_len: int, documents: int) -> list[dict[str, float]]:
    """Time the rows' patterns of many documents whose lengths occur as these do; only counts are ever held."""
    share = np.bincount(np.minimum(lengths, seq_len), minlength=seq_len + 1) / len(lengths)
    counts = np.random.default_rng(1).multinomial(documents, share)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    patterns, repeats = best_fit_patterns(counts, seq_len)
    seconds = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    rows = int(repeats.sum())
    efficiency = float(counts @ np.arange(seq_len + 1)) / (rows * seq_len)
    print(
        f"{documents:,} documents: {rows:,} rows in {len(patterns):,} patterns, {efficiency:.4%} full, {seconds:.2f} s,"
        f" peak memory {grown:.1f} MiB above the process's own"
    )
    return [{"documents": documents, "rows": rows, "efficiency": efficiency, "seconds": seconds, "mib": grown}]


def measure_order(lengths: np.ndarray, seq_len: int, token_cost: float) -> list[dict[str, float]]:
    """How much longer a step takes than if ranks shared its work evenly, before and after balancing."""
    plan = plan_rows(np.minimum(lengths, seq_len), seq_len)
    costs = row_costs(plan.row_tokens, plan.row_sum_squares, token_cost)
    results = []
    for ranks in (2, 8, 64):
        for batch in (1, 4):
            if plan.num_rows < 4 * ranks * batch:
                continue
            shuffled = EpochOrder(row_order(plan.num_rows, 0, 0), batch, ranks)
            balanced = EpochOrder(balanced_order(costs, batch * ranks, 0, 0, ranks), batch, ranks)
            before, after = rank_imbalance(costs, shuffled), rank_imbalance(costs, balanced)
            results.append({"ranks": ranks, "batch_size": batch, "shuffle": before, "balanced": after})
            print(f"{ranks:>4} ranks x {batch} rows: shuffle {before:.3f}, balanced {after:.4f}", flush=True)
    return results


def plot(results: list[dict[str, float | str]], path: Path, title: str) -> None:
    """Padding and speed of each algorithm, as bars."""
    from matplotlib.figure import Figure

    names = [str(result["algorithm"]) for result in results]
    colors = ["#2f6fb3" if name.startswith("packflex") else "#d9772b" for name in names]
    padding = [100 * (1 - float(result["efficiency"])) for result in results]
    speed = [float(result["documents_per_second"]) / 1e6 for result in results]
    figure = Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for column, (values, label, text) in enumerate(
        [(padding, "padding, % of the rows", "{:.3f}%"), (speed, "million documents a second, one core", "{:.1f}")]
    ):
        axes = figure.add_subplot(1, 2, column + 1)
        axes.barh(names, values, color=colors)
        for row, value in enumerate(values):
            axes.annotate(text.format(value), (value, row), textcoords="offset points", xytext=(3, -3), fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel(label)
        axes.tick_params(labelsize=8, labelleft=column == 0)
    figure.savefig(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--lengths", type=Path, help="an .npz of length arrays, each drawn from with replacement")
    parser.add_argument(
        "--lognormal", type=float, nargs=2, default=(4.9, 1.05), metavar=("MU", "SIGMA"),
        help="lengths to draw; 4.9 1.05 is like instructions, 7.24 1.29 like source code and long text",
    )  # fmt: skip
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--order", action="store_true", help="measure how evenly ranks share the work instead")
    parser.add_argument("--by-counts", type=int, help="plan this many documents from the counts of lengths alone")
    parser.add_argument("--token-cost", type=float, default=7000.0, help="see packflex.packing.row_costs")
    parser.add_argument("--out", type=Path, help="folder for packing.json and packing-*.png")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    if arguments.lengths is None:
        mu, sigma = arguments.lognormal
        sets = {
            f"lognormal({mu:g}, {sigma:g})": np.exp(rng.normal(mu, sigma, arguments.documents)).astype(np.int64) + 1
        }
    else:
        with np.load(arguments.lengths) as file:
            sets = {name: rng.choice(file[name].astype(np.int64), arguments.documents) for name in file.files}
    about = {"python": platform.python_version(), "numpy": np.__version__, "date": date.today().isoformat()}
    print(about)
    results = {}
    for name, lengths in sets.items():
        print(f"\n{name}: mean {lengths.mean():.0f}, longest {lengths.max():,}; rows of {arguments.seq_len:,}")
        if arguments.by_counts:
            results[name] = measure_counts(lengths, arguments.seq_len, arguments.by_counts)
        elif arguments.order:
            results[name] = measure_order(lengths, arguments.seq_len, arguments.token_cost)
        else:
            results[name] = measure(lengths, arguments.seq_len)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "packing.json").write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
        if not (arguments.order or arguments.by_counts):
            for name, found in results.items():
                safe = "".join(c if c.isalnum() else "-" for c in name).strip("-")
                plot(found, arguments.out / f"packing-{safe}.png", f"{name}, rows of {arguments.seq_len:,}")


if __name__ == "__main__":
    main()
