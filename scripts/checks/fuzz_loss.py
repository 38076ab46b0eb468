"""Draws random losses and batches and checks what tests/test_properties.py states, more often than the tests do.

    python scripts/checks/fuzz_loss.py [--cases 10000] [--seed 0]

Shapes, dtypes, lengths of rows, zero, identical and opposite rows x temperature x objective x layout x engine. Ends
with the number of cases of each dtype, or with the smallest failing case that hypothesis finds and exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path

import hypothesis
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from test_properties import check, scenarios

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cases", type=int, default=10_000)
parser.add_argument("--seed", type=int, default=0)


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(1)  # the batches are tiny
    drawn: collections.Counter[str] = collections.Counter()

    @hypothesis.seed(args.seed)
    @hypothesis.settings(
        max_examples=args.cases,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )
    @hypothesis.given(scenarios())
    def fuzz(scenario):
        check(scenario)
        drawn[scenario.dtype] += 1

    start = time.perf_counter()
    fuzz()
    seconds = time.perf_counter() - start
    parts = ", ".join(f"{number} {dtype}" for dtype, number in sorted(drawn.items()))
    print(f"{drawn.total()} cases in {seconds:.0f} s, none failed: {parts}")


if __name__ == "__main__":
    main()
