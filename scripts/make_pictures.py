"""Draw the README's picture: a packed row and its block mask.

python scripts/make_pictures.py --out docs/images
"""

import argparse
from pathlib import Path

import numpy as np

from packflex import PackedLayout
from packflex.packing import best_fit
from packflex.plots import row_mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # lengths as in instruction data: a median of 134 tokens and a long tail
    lengths = np.exp(np.random.default_rng(3).normal(4.9, 1.05, 400)).astype(int) + 2
    plan = best_fit(lengths, 2048)
    rows = [plan.row_lengths(row).tolist() for row in range(plan.num_rows)]
    many = [row for row in rows if len(row) >= 5]
    documents = max(many, key=lambda row: np.std(np.log(row)))  # the most mixed of them
    row_mask(PackedLayout.from_lengths([documents], 2048), block_size=64).savefig(
        options.out / "packed_row.png", dpi=110
    )


if __name__ == "__main__":
    main()
