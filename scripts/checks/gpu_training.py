#!/usr/bin/env python
"""`dystress pretrain` of digits in mixed precision: whether it ends, with finite losses and a network that learned.

    python scripts/checks/gpu_training.py [--out training.csv]

All at once, each a process with a few seconds of work; on a CPU one alone, as 16-mixed needs a GPU. The exit status is
1 where one fails, where a loss is not finite, or where the kNN accuracy is not far above that of chance, 10 %.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_tables

# A table of samples, and a queue.
METHODS = ("isogclr", "dystress_moco")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
LEAST = 40.0  # per cent; after two epochs about 80


def command(method: str, precision: str, device: str, out: Path) -> list[str]:
    keys = {
        "method": method,
        "data": "digits",
        "epochs": 1 if device == "cpu" else 2,
        "out": out,
        "accelerator": "gpu" if device == "cuda" else "cpu",
        "precision": precision,
        "progress": "false",
    }
    return [sys.executable, "-m", "dystress_plugin.cli", "pretrain", *(f"{key}={value}" for key, value in keys.items())]


def outcome(out: Path) -> dict[str, object]:
    """What a training that ended has left."""
    summary = json.loads((out / "summary.json").read_text())
    with (out / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    found = {key: f"{summary[key]:.1f}" for key in ("knn_top1", "linear_top1", "seconds")}
    finite = all(map(math.isfinite, losses))
    learned = "trained" if summary["knn_top1"] > LEAST else f"kNN below {LEAST:g} %"
    return {"outcome": learned if finite else "loss not finite", "loss": f"{losses[-1]:.4f}", **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--few", action="store_true", help="not also in float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = list(itertools.product(METHODS, PRECISIONS[1:] if args.few else PRECISIONS))
    if args.device == "cpu":
        runs = [("isogclr", "bf16-mixed")]
    rows: gpu_tables.Rows = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for method, precision in runs:
            out = Path(folder, f"{method}-{precision}")
            line = command(method, precision, args.device, out)
            with Path(f"{out}.txt").open("w") as said:
                running[method, precision] = out, subprocess.Popen(line, stdout=said, stderr=subprocess.STDOUT)
        for (method, precision), (out, process) in running.items():
            row: dict[str, object] = {"method": method, "precision": precision}
            if process.wait():
                text = Path(f"{out}.txt").read_text()
                print(f"{method} in {precision}: exit status {process.returncode}\n{text[-3000:]}")
                row["outcome"] = f"exit status {process.returncode}"
            else:
                row |= outcome(out)
            rows.append(row | {"seconds_in_all": f"{time.monotonic() - started:.1f}"})
    gpu_tables.write(rows, args.out)
    print(gpu_tables.markdown(rows))
    trained = sum(row["outcome"] == "trained" for row in rows)
    print(f"{trained} of {len(rows)} trained.")
    return int(trained < len(rows))


if __name__ == "__main__":
    sys.exit(main())
