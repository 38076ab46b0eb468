#!/usr/bin/env python
"""Speed and memory of the loss against other implementations, forward and backward pass together.

    python scripts/benchmarks/loss.py --out results/loss-cpu                    # the README's table; about 10 minutes
    python scripts/benchmarks/loss.py --device cuda --batches 256 1024 4096 16384 65536 --out results/loss-cuda
    python scripts/benchmarks/loss.py --layout both_ways --out results/loss-sides-cpu       # beside open_clip's, Inf-CL
    python scripts/benchmarks/loss.py --batches 65536 --only ours --repeats 0    # one huge batch, one step

Ours has DySTreSS' temperature per pair, the others a fixed one, except "dense PyTorch", which is a plain matrix with
the same per-pair temperature. They run in turn in one process, in another order each time, so that the machine's ups
and downs meet all of them; quoted are medians, as times (a GPU's by its own events) and as multiples of ours. The first
of the dims and of the dtypes meet all batches, and the compiler; the others each other's first at 256 and 1024 images,
dtypes on a GPU all.
"autocast" is embeddings in bfloat16 under bfloat16 autocast, as networks give them there. "floor" is the time of the
two full products of matrices that no exact algorithm avoids, tile by tile at the speed measured in the same run. Peak
memory is that of one call above its inputs, on a CPU in a process of its own. Writes OUT.csv and OUT.png and prints a
Markdown table for each layout.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dystress_plugin import ContrastiveLoss
from dystress_plugin.engine import ENGINES
from dystress_plugin.temperature import DySTreSS

Call = Callable[[Tensor, Tensor], Tensor]
COMPILED = "torch.compile"


def dense_pytorch(z0: Tensor, z1: Tensor) -> Tensor:
    """The same loss as one writes it: a matrix, a mask, a cross-entropy."""
    z = nn.functional.normalize(torch.cat([z0, z1]).float(), dim=1)
    s = z @ z.T
    tau = 0.15 - 0.05 * torch.cos(torch.pi * s.detach())
    logits = (s / tau).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    target = torch.arange(len(z), device=z.device).roll(len(z0))
    return nn.functional.cross_entropy(logits, target)


def dense_pytorch_both_ways(z0: Tensor, z1: Tensor) -> Tensor:
    s = nn.functional.normalize(z0.float(), dim=1) @ nn.functional.normalize(z1.float(), dim=1).T
    logits = s / (0.15 - 0.05 * torch.cos(torch.pi * s.detach()))
    target = torch.arange(len(s), device=s.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def contenders(layout: str, only: list[str] | None) -> dict[str, Call]:
    """Every implementation that is installed, by name."""

    def ours(engine: str = "auto") -> Call:
        return ContrastiveLoss(DySTreSS(), layout=layout, engine=engine)

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

    def open_clip() -> Call:
        loss, unit = importlib.import_module("open_clip.loss").ClipLoss(), partial(nn.functional.normalize, dim=1)
        return lambda z0, z1: loss(unit(z0), unit(z1), 1 / 0.15)

    def inf_cl() -> Call:
        loss, unit = importlib.import_module("inf_cl").cal_inf_loss, partial(nn.functional.normalize, dim=1)
        return lambda z0, z1: loss(unit(z0), unit(z1), scale=torch.full((), 1 / 0.15, device=z0.device))

    plain = dense_pytorch if layout == "views" else dense_pytorch_both_ways
    others: dict[str, Callable[[], Call]] = {"lightly": lightly, "solo-learn": solo_learn}
    if layout == "both_ways":
        others = {"open_clip": open_clip, "Inf-CL": inf_cl}
    builders: dict[str, Callable[[], Call]] = {
        "ours": ours,
        **{f"ours, {engine}": partial(ours, engine) for engine in ENGINES if engine != "auto"},
        f"ours, {COMPILED}": lambda: torch.compile(ours()),  # type: ignore[dict-item]
        "dense PyTorch": lambda: plain,
        f"dense PyTorch, {COMPILED}": lambda: torch.compile(plain),
        **others,
        **({"metric-learning": metric_learning} if layout == "views" else {}),
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
    dtype = "bfloat16" if dtype == "autocast" else dtype
    z = torch.randn(2, batch, dim, generator=generator).to(device, getattr(torch, dtype))
    return z[0].clone().requires_grad_(), z[1].clone().requires_grad_()


def step(loss: Call, z: tuple[Tensor, Tensor], dtype: str) -> None:
    for view in z:
        view.grad = None
    with torch.autocast(z[0].device.type, torch.bfloat16) if dtype == "autocast" else nullcontext():
        value = loss(*z)
    value.backward()


def floor(z: tuple[Tensor, Tensor], layout: str) -> None:
    """Two full products, by tiles that are thrown away: Z Z^T, or Z_0 Z_1^T."""
    rows, columns = (view.detach().float() for view in z)
    if layout == "views":
        rows = columns = torch.cat([rows, columns])
    side = 512 if rows.device.type == "cpu" else 4096
    for _ in range(2):
        for r in rows.split(side):
            for c in columns.split(side):
                torch.mm(r, c.T)


def seconds(call: Callable[[], None], device: str) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def time_all(calls: dict[str, Callable[[], None]], device: str, repeats: int | None, budget: float) -> dict[str, float]:
    """Median seconds of each; as many repeats as fit in `budget` seconds unless told."""
    for call in calls.values():
        call()
    once = sum(seconds(call, device) for call in calls.values())
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    for _ in range(repeats or max(3 if device == "cuda" else 7, min(100, int(budget / once)))):
        draw.shuffle(order)  # a small batch takes longer after a call that has filled the caches
        for name in order:
            taken[name].append(seconds(calls[name], device))
    return {name: statistics.median(values) for name, values in taken.items()}


def alone(name: str, layout: str, batch: int, dim: int, dtype: str) -> dict[str, float] | None:
    """`peak_bytes` of one step above its inputs, and its `seconds`, in a process of its own; None if it failed."""
    arguments = [sys.executable, __file__, "--measure", name, "--layout", layout, "--batches", batch, "--dims", dim]
    out = subprocess.run([*map(str, arguments), "--dtypes", dtype], capture_output=True, text=True, check=False)
    return json.loads(out.stdout.splitlines()[-1]) if out.returncode == 0 else None


def here(name: str, loss: Call, batch: int, dim: int, dtype: str) -> dict[str, float] | None:
    """The same on a GPU, whose allocator counts what is asked of it."""
    try:
        return measure(name, loss, batch, dim, dtype, "cuda")
    except Exception as error:  # out of memory, or another library's own reason
        print(f"{name}, {batch} images: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def measure(name: str, loss: Call, batch: int, dim: int, dtype: str, device: str) -> dict[str, float]:
    # Libraries, thread pools and their buffers; a compiler compiles for this size alone.
    step(loss, inputs(batch if COMPILED in name else 64, dim, dtype, device), dtype)
    z = inputs(batch, dim, dtype, device)
    return measured(lambda: step(loss, z, dtype), device)


def measured(call: Callable[[], None], device: str) -> dict[str, float]:
    """`peak_bytes` of a call above what there is before it, and its `seconds`."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = seconds(call, device)
        return {"seconds": taken, "peak_bytes": torch.cuda.max_memory_allocated() - before}
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    taken = seconds(call, device)
    return {"seconds": taken, "peak_bytes": _status("VmHWM") - before}


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def table(rows: list[dict[str, object]]) -> str:
    names = list(dict.fromkeys(str(row["implementation"]) for row in rows))
    lines = [
        "| layout | images | dim | dtype | ours | of the floor | "
        + " | ".join(n for n in names if n not in ("ours", "floor"))
        + " |",
        "|" + "---|" * (4 + len(names)),
    ]
    what = ("layout", "batch", "dim", "dtype")
    for key in dict.fromkeys(tuple(row[name] for name in what) for row in rows):
        by = {str(row["implementation"]): row for row in rows if tuple(row[name] for name in what) == key}
        ours, least = by["ours"], by["floor"]
        cells = [*map(str, key), _cell(ours, None), f"{ours['seconds'] / least['seconds']:.2f}×"]  # type: ignore[operator]
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


def write(rows: list[dict[str, object]], path: Path) -> None:
    """So far: what is interrupted leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def sweep(dtypes: list[str], dims: list[int], batches: list[int], device: str) -> list[tuple[str, int, list[int]]]:
    """(dtype, dim, batches) to measure: a star, not a grid."""
    few = [batch for batch in batches if batch in (256, 1024)]
    return [
        (dtypes[0], dims[0], batches),
        *((dtypes[0], dim, few) for dim in dims[1:]),
        *((dtype, dims[0], few if device == "cpu" else batches) for dtype in dtypes[1:]),
    ]


def most(name: str, device: str) -> int:
    """Images up to which it is tried: on a CPU, as most hold the matrix several times over."""
    if name == "metric-learning":  # which lists every positive with every negative, 4 s and 2 GiB for 256
        return 64
    return 4096 if device == "cpu" and name != "ours" else 10**9


def compared(
    found: dict[str, Call], layout: str, dtype: str, dim: int, batch: int, args: argparse.Namespace
) -> list[dict[str, object]]:
    """What every implementation takes for one size; without those that cannot."""
    device = args.device
    losses = {name: loss for name, loss in found.items() if batch <= most(name, device)}
    if (layout, dtype, dim) != (args.layout[0], args.dtypes[0], args.dims[0]):  # a compiler takes seconds a size
        losses = {name: loss for name, loss in losses.items() if COMPILED not in name}
    if device == "cpu":
        torch.compiler.reset()  # so that each size has a graph of its own; on a GPU, one for all but the first
    single = {
        name: alone(name, layout, batch, dim, dtype) if device == "cpu" else here(name, loss, batch, dim, dtype)
        for name, loss in losses.items()
    }
    done = {name: result for name, result in single.items() if result is not None}
    z = inputs(batch, dim, dtype, device)
    calls: dict[str, Callable[[], None]] = {name: partial(step, losses[name], z, dtype) for name in done}
    calls["floor"] = partial(floor, z, layout)
    if args.repeats == 0:
        times = {name: result["seconds"] for name, result in done.items()}
        times["floor"] = seconds(calls["floor"], device)
    else:
        times = time_all(calls, device, args.repeats, args.seconds)
    peaks = {name: result["peak_bytes"] for name, result in done.items()}
    return [{"implementation": n, "seconds": s, "peak_bytes": peaks.get(n, -1)} for n, s in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    layouts = ["views", "both_ways"]
    parser.add_argument("--layout", choices=layouts, nargs="+", default=["views"], help="the figure is of the first")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096, 8192, 16384])
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64, 256, 512])
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=[*dtypes, "autocast"])
    parser.add_argument("--only", nargs="+", help="names of implementations; 'ours' is always there")
    parser.add_argument(
        "--repeats",
        type=int,
        help="default: as many as fit into --seconds, at least 7, on a GPU 3; 0: the one step whose memory is measured",
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="that the repeats of one size may take")
    parser.add_argument("--out", type=Path, help="where to write OUT.csv and OUT.png")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of the other libraries' imports

    torch.set_float32_matmul_precision("highest")

    if args.measure:
        loss = contenders(args.layout[0], [args.measure])[args.measure]
        print(json.dumps(measure(args.measure, loss, args.batches[0], args.dims[0], args.dtypes[0], args.device)))
        return

    rows: list[dict[str, object]] = []
    for layout in args.layout:
        begun = len(rows)
        found = contenders(layout, args.only and [*args.only, "ours"])
        for dtype, dim, batches in sweep(args.dtypes, args.dims, args.batches, args.device):
            for batch in batches:
                row = {"device": args.device, "layout": layout, "dtype": dtype, "dim": dim, "batch": batch}
                rows += [row | own for own in compared(found, layout, dtype, dim, batch, args)]
                print(table(rows[begun:]).splitlines()[-1], file=sys.stderr, flush=True)
                if args.out:
                    write(rows, args.out.with_suffix(".csv"))
        print(f"{table(rows[begun:])}\n", flush=True)
    if args.out:
        what = ("layout", "dim", "dtype")
        first = [r for r in rows if all(r[key] == rows[0][key] for key in what)]
        name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        figure(
            first,
            args.out.with_suffix(".png"),
            f"Forward and backward, {first[0]['dim']} dims, {first[0]['dtype']}, {name}",
        )


if __name__ == "__main__":
    main()
