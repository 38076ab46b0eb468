#!/usr/bin/env python
"""How far losses on a device are from float64: value and gradient, in tiles and of the whole matrix.

    python scripts/checks/gpu_errors.py [--images 3000] [--out errors.csv]

Errors are of the value, and of the gradient relative to its largest entry, the truth being the dense engine's in
float64 on the same device, of the embeddings as the precision holds them. "TF32" lets products of float32 round to
TF32, as `torch.set_float32_matmul_precision("high")` does; "autocast" is bfloat16 embeddings under bfloat16 autocast.
"plain" is the loss as one writes it, for a constant temperature. The exit status is 1 where an error in float32 or
under autocast is above 1e-6 / tau, or that of a bfloat16 in the gradient, which is one there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import gpu_tables
import torch
from torch import Tensor

from dystress_plugin import ContrastiveLoss
from dystress_plugin.engine import ENGINES
from dystress_plugin.temperature import Constant, DySTreSS, Individual, ModelAware, TemperatureFree

SAMPLES = 100_000
TEMPERATURES: dict[str, Callable[[], torch.nn.Module]] = {
    "constant 0.1": lambda: Constant(0.1),
    "constant 0.01": lambda: Constant(0.01),
    "dystress": DySTreSS,
    "macl": ModelAware,
    "isogclr": lambda: Individual(SAMPLES),
    "tempfree": TemperatureFree,
}
LAYOUTS = ("views", "both_ways", "queue")
Result = tuple[Tensor, Tensor]


def embeddings(images: int, device: str) -> Tensor:
    random = torch.Generator().manual_seed(0)
    z = torch.randn(2, images, 128, dtype=torch.float64, generator=random)
    z[1] = z[0] + 1.5 * z[1]
    return z.to(device)


def ours(name: str, layout: str, engine: str, z: Tensor, precision: str = "float32") -> Result:
    torch.manual_seed(0)  # for the queue
    where = {"queue_size": (16384, 128)} if layout == "queue" else {"layout": layout}
    loss = ContrastiveLoss(TEMPERATURES[name](), engine=engine, **where).to(z.device).eval()
    leaf = z.clone().requires_grad_()
    with in_precision(precision, z.device.type):
        value = loss(*leaf, index=torch.arange(z.shape[1], device=z.device), epoch=0.0)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def plain(tau: float, z: Tensor, precision: str) -> Result:
    leaf = z.clone().requires_grad_()
    with in_precision(precision, z.device.type):
        units = torch.nn.functional.normalize(leaf.flatten(0, 1), dim=1)
        own = torch.arange(len(units), device=z.device)
        logits = (units @ units.T / tau).masked_fill(own[:, None] == own, -torch.inf)
        value = torch.nn.functional.cross_entropy(logits, own.roll(z.shape[1]))
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def errors(found: Result, exact: Result) -> dict[str, float]:
    by_value, by_gradient = ((a.double() - b.double()).abs().max() for a, b in zip(found, exact, strict=True))
    size = exact[0].double().abs().clamp(min=1.0)
    return {"value": (by_value / size).item(), "gradient": (by_gradient / exact[1].double().abs().max()).item()}


def is_close(row: dict[str, object]) -> bool:
    value, gradient = float(str(row["value"])), float(str(row["gradient"]))
    limit = 1e-4 if row["temperature"] == "constant 0.01" else 1e-5
    return value <= limit and gradient <= limit + (2**-8 if row["precision"] == "autocast" else 0)


def summary(rows: gpu_tables.Rows) -> gpu_tables.Rows:
    """The largest over the layouts."""
    found = []
    for precision, name in dict.fromkeys((row["precision"], row["temperature"]) for row in rows):
        one: dict[str, object] = {"precision": precision, "temperature": name}
        for engine in dict.fromkeys(str(row["engine"]) for row in rows):
            own = [r for r in rows if (r["precision"], r["temperature"], r["engine"]) == (precision, name, engine)]
            for what in ("value", "gradient"):
                errors_ = [float(str(row[what])) for row in own]
                one[f"{engine}, {what}"] = f"{max(errors_):.1e}" if errors_ else "–"
        found.append(one)
    return found


def in_precision(precision: str, device: str) -> AbstractContextManager[object]:
    torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
    return torch.autocast(device, torch.bfloat16) if precision == "autocast" else nullcontext()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: gpu_tables.Rows = []
    for precision in ("float32", "TF32", "autocast"):
        half = precision == "autocast"
        z = embeddings(args.images, args.device).to(torch.bfloat16 if half else torch.float32)
        for name in TEMPERATURES:
            for layout in LAYOUTS:
                exact = ours(name, layout, "dense", z.double())
                tried = [engine for engine in ENGINES if engine != "auto"]
                cases: dict[str, Callable[[], Result]] = {
                    e: partial(ours, name, layout, e, z, precision) for e in tried
                }
                if name.startswith("constant") and layout == "views":
                    cases["plain"] = partial(plain, float(name.split()[1]), z, precision)
                for engine, case in cases.items():
                    found = errors(case(), exact)
                    row = {"precision": precision, "temperature": name, "layout": layout, "engine": engine}
                    rows.append(row | {key: f"{value:.1e}" for key, value in found.items()})
    gpu_tables.write(rows, args.out)
    print(gpu_tables.markdown(summary(rows)))
    kept = [row for row in rows if row["engine"] != "plain" and row["precision"] != "TF32"]
    far = [row for row in kept if not is_close(row)]
    for row in far:
        print("above the limit:", *row.values())
    print(f"{len(kept) - len(far)} of {len(kept)} are as close to float64 as they should.")
    return int(bool(far))


if __name__ == "__main__":
    sys.exit(main())
