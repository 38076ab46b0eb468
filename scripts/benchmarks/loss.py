#!/usr/bin/env python
"""Speed and memory of the loss against other implementations, forward and backward pass together.

    python scripts/benchmarks/loss.py --out results/loss-cpu                    # the README's table; about 10 minutes
    python scripts/benchmarks/loss.py --device cuda --batches 256 1024 4096 16384 65536 --out results/loss-cuda
    python scripts/benchmarks/loss.py --batches 65536 --only ours --repeats 0    # one huge batch, one step

Ours has DySTreSS' temperature per pair, the others a fixed one, except "dense PyTorch", which is a plain matrix with
the same per-pair temperature. They run in turn in one process, so that the machine's ups and downs meet all of them;
quoted are medians, as times and as multiples of ours. The first of the dims and of the dtypes meet all batches, the
others each other's first at 256 and 1024 images. "floor" is the time of the two full products of matrices that no
exact algorithm avoids, tile by tile at the speed measured in the same run. Peak memory is that of one call above its
inputs, in a process of its own. Writes OUT.csv and OUT.png and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dystress_plugin import ContrastiveLoss

Call = Callable[[Tensor, Tensor], Tensor]
# Images up to which an implementation is tried on a CPU: it holds the matrix several times over; metric-learning also
# lists every positive with every negative, 4 s and 2 GiB for 256.
CPU_LIMIT = {"ours": 10**9, "metric-learning": 64}
CPU_LIMIT_OTHERS = 4096


def dense_pytorch(z0: Tensor, z1: Tensor) -> Tensor:
    """The same loss as one writes it: a matrix, a mask, a cross-entropy."""
    z = nn.functional.normalize(torch.cat([z0, z1]).float(), dim=1)
    s = z @ z.T
    tau = 0.15 - 0.05 * torch.cos(torch.pi * s.detach())
    logits = (s / tau).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    target = torch.arange(len(z), device=z.device).roll(len(z0))
    return nn.functional.cross_entropy(logits, target)


def contenders(only: list[str] | None) -> dict[str, Call]:
    """Every implementation that is installed, by name."""

    def lightly() -> Call:
        return importlib.import_module("lightly.loss").NTXentLoss(temperature=0.15)

    def solo_learn() -> Call:
        if home := os.environ.get("SOLO_LEARN_HOME"):
            sys.path.insert(0, home)
        loss = importlib.import_module("solo.losses.simclr").simclr_loss_func
        return lambda z0, z1: loss(torch.cat([z0, z1]), torch.arange(len(z0), device=z0.device).repeat(2), 0.15)

    def metric_learning() -> Call:
        loss = importlib.import_module("pytorch_metric_learning.losses").NTXentLoss(temperature=0.15)
        return lambda z0, z1: loss(torch.cat([z0, z1]), torch.arange(len(z0), device=z0.device).repeat(2))

    builders: dict[str, Callable[[], Call]] = {
        "ours": lambda: ContrastiveLoss("dystress"),
        "ours, dense": lambda: ContrastiveLoss("dystress", engine="dense"),
        "dense PyTorch": lambda: dense_pytorch,
        "lightly": lightly,
        "solo-learn": solo_learn,
        "metric-learning": metric_learning,
    }
    found = {}
    for name, build in builders.items():
        if only and name not in only:
            continue
        try:
            found[name] = build()
        except ImportError as error:
            print(f"{name}: not installed, left out ({error})", file=sys.stderr)
    return found


def inputs(batch: int, dim: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, batch, dim, generator=generator).to(device, getattr(torch, dtype))
    return z[0].clone().requires_grad_(), z[1].clone().requires_grad_()


def step(loss: Call, z: tuple[Tensor, Tensor]) -> None:
    for view in z:
        view.grad = None
    loss(*z).backward()


def floor(z: tuple[Tensor, Tensor]) -> None:
    """Two full products Z Z^T, by tiles that are thrown away."""
    rows = torch.cat(z).detach().float()
    side = 512 if rows.device.type == "cpu" else 4096
    for _ in range(2):
        for r in rows.split(side):
            for c in rows.split(side):
                torch.mm(r, c.T)


def seconds(call: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def time_all(losses: dict[str, Call], z: tuple[Tensor, Tensor], device: str, repeats: int | None) -> dict[str, float]:
    calls: dict[str, Callable[[], None]] = {
        name: (lambda loss=loss: step(loss, z))
        for name, loss in losses.items()  # type: ignore[misc]
    }
    calls["floor"] = lambda: floor(z)
    once = sum(seconds(call, device) for call in calls.values())
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats or max(7, min(100, int(6 / once)))):
        for name, call in calls.items():
            taken[name].append(seconds(call, device))
    return {name: statistics.median(values) for name, values in taken.items()}


def alone(name: str, batch: int, dim: int, dtype: str, device: str) -> dict[str, float] | None:
    """`peak_bytes` of one step above its inputs, and its `seconds`, in a process of its own; None if it failed."""
    arguments = [sys.executable, __file__, "--measure", name, "--batches", batch, "--dims", dim, "--dtypes", dtype]
    out = subprocess.run([*map(str, arguments), "--device", device], capture_output=True, text=True, check=False)
    return json.loads(out.stdout.splitlines()[-1]) if out.returncode == 0 else None


def measure(loss: Call, batch: int, dim: int, dtype: str, device: str) -> dict[str, float]:
    step(loss, inputs(64, dim, dtype, device))  # libraries, thread pools and their buffers
    z = inputs(batch, dim, dtype, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = seconds(lambda: step(loss, z), device)
        return {"seconds": taken, "peak_bytes": torch.cuda.max_memory_allocated() - before}
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    taken = seconds(lambda: step(loss, z), device)
    return {"seconds": taken, "peak_bytes": _status("VmHWM") - before}


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def table(rows: list[dict[str, object]]) -> str:
    names = list(dict.fromkeys(str(row["implementation"]) for row in rows))
    lines = [
        "| images | dim | dtype | ours | of the floor | "
        + " | ".join(n for n in names if n not in ("ours", "floor"))
        + " |",
        "|" + "---|" * (3 + len(names)),
    ]
    for key in dict.fromkeys((r["batch"], r["dim"], r["dtype"]) for r in rows):
        by = {str(r["implementation"]): r for r in rows if (r["batch"], r["dim"], r["dtype"]) == key}
        ours, least = by["ours"], by["floor"]
        cells = [f"{key[0]}", f"{key[1]}", f"{key[2]}", _cell(ours, None), f"{ours['seconds'] / least['seconds']:.2f}×"]  # type: ignore[operator]
        cells += [_cell(by[n], ours) if n in by else "–" for n in names if n not in ("ours", "floor")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, object], ours: dict[str, object] | None) -> str:
    memory = int(row["peak_bytes"])  # type: ignore[call-overload]
    mib = f", {memory / 2**20:.0f} MiB" if memory >= 0 else ""
    value = float(row["seconds"])  # type: ignore[arg-type]
    return f"{value * 1e3:.2f} ms{mib}" if ours is None else f"{value / float(ours['seconds']):.2f}×{mib}"  # type: ignore[arg-type]


def figure(rows: list[dict[str, object]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 4), layout="constrained")
    for axes, key, label, scale in zip(
        canvas.subplots(1, 2),
        ("seconds", "peak_bytes"),
        ("time (s)", "peak memory above inputs (MiB)"),
        (1, 2**20),
        strict=True,
    ):
        for name in dict.fromkeys(str(row["implementation"]) for row in rows):
            points = [(r["batch"], r[key] / scale) for r in rows if r["implementation"] == name and r[key] > 0]  # type: ignore[operator]
            if points:
                style = {"floor": {"linestyle": ":", "color": "black"}, "ours": {"linewidth": 3}}.get(name, {})
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)  # type: ignore[arg-type]
        axes.set(xscale="log", yscale="log", xlabel="images in the batch", ylabel=label)
        axes.grid(alpha=0.25)
    canvas.axes[0].legend(frameon=False, fontsize=8)
    canvas.suptitle(title)
    canvas.savefig(path, dpi=150)


def sweep(dtypes: list[str], dims: list[int], batches: list[int]) -> list[tuple[str, int, list[int]]]:
    """(dtype, dim, batches) to measure: a star, not a grid."""
    few = [batch for batch in batches if batch in (256, 1024)]
    return [
        (dtypes[0], dims[0], batches),
        *((dtypes[0], dim, few) for dim in dims[1:]),
        *((dtype, dims[0], few) for dtype in dtypes[1:]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096, 8192, 16384])
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64, 256, 512])
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=dtypes)
    parser.add_argument("--only", nargs="+", help="names of implementations; 'ours' is always there")
    parser.add_argument(
        "--repeats",
        type=int,
        help="default: as many as fit in six seconds, at least 7; 0: the one step whose memory is measured",
    )
    parser.add_argument("--out", type=Path, help="where to write OUT.csv and OUT.png")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of the other libraries' imports

    if args.measure:
        loss = contenders([args.measure])[args.measure]
        print(json.dumps(measure(loss, args.batches[0], args.dims[0], args.dtypes[0], args.device)))
        return

    found = contenders(args.only and [*args.only, "ours"])
    rows: list[dict[str, object]] = []
    for dtype, dim, batches in sweep(args.dtypes, args.dims, args.batches):
        for batch in batches:
            losses = {
                name: loss
                for name, loss in found.items()
                if args.device != "cpu" or batch <= CPU_LIMIT.get(name, CPU_LIMIT_OTHERS)
            }
            single = {name: alone(name, batch, dim, dtype, args.device) for name in losses}
            done = {name: result for name, result in single.items() if result is not None}
            losses = {name: loss for name, loss in losses.items() if name in done}
            z = inputs(batch, dim, dtype, args.device)
            if args.repeats == 0:
                times = {name: result["seconds"] for name, result in done.items()}
                times["floor"] = seconds(lambda z=z: floor(z), args.device)  # type: ignore[misc]
            else:
                times = time_all(losses, z, args.device, args.repeats)
            for name, value in times.items():
                row = {"device": args.device, "dtype": dtype, "dim": dim, "batch": batch, "implementation": name}
                rows.append(row | {"seconds": value, "peak_bytes": done[name]["peak_bytes"] if name in done else -1})
            print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        first = [r for r in rows if (r["dim"], r["dtype"]) == (rows[0]["dim"], rows[0]["dtype"])]
        name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        figure(
            first,
            args.out.with_suffix(".png"),
            f"Forward and backward, {first[0]['dim']} dims, {first[0]['dtype']}, {name}",
        )


if __name__ == "__main__":
    main()
