"""Writes how far training on two processes is from training on one, for every cell of the grid, as CSV.

    python scripts/checks/distributed_differences.py [--out results/distributed.csv]

Temperature x objective x layout x batch sizes of the ranks, on gloo in float64; the cells are those of
tests/test_distributed.py. "gradient": the largest difference, over two steps, between the mean over ranks of the
gradients of a network's parameters and the gradient of one process with the whole batch, relative to its largest entry.
"loss": the same of the loss, relative to the loss or to 1 if it is smaller.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import gloo
from test_distributed import GRID, SIZES, grid_on_a_rank, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("results/distributed.csv"))


def relative(found, expected, least: float = 0.0) -> float:
    """The largest difference relative to the largest entry; 0 where both are zero."""
    largest = max(float(expected.abs().max()), least)
    return float((found - expected).abs().max()) / largest if largest else float(found.abs().max())


def main() -> None:
    out = parser.parse_args().out
    warnings.filterwarnings("ignore", "rho=")
    with tempfile.TemporaryDirectory() as folder:
        ranks = gloo.run(grid_on_a_rank, 2, Path(folder))
    rows = []
    for cell in (cell for cell in GRID if len(SIZES[cell.sizes]) == 2):
        (value, *gradients), _ = train(cell, slice(None))
        (found, *found_gradients), _ = ranks[0][cell]  # averaged, so the same on both
        of_network = [relative(*pair) for pair in zip(found_gradients[:2], gradients[:2], strict=True)]
        rows.append((*cell, "+".join(map(str, SIZES[cell.sizes])), max(of_network), relative(found, value, 1.0)))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("temperature", "objective", "layout", "sizes", "engine", "images", "gradient", "loss"))
        writer.writerows((*row[:6], f"{row[6]:.2e}", f"{row[7]:.2e}") for row in rows)
    for name, column in (("gradient", 6), ("loss", 7)):
        worst = max(rows, key=lambda row: row[column])
        print(
            f"{len(rows)} cells, largest relative difference of the {name}: {worst[column]:.1e} ({'-'.join(worst[:5])})"
        )


if __name__ == "__main__":
    main()
