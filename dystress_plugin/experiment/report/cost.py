"""What a training step of each method costs, measured in turn in one process."""

from __future__ import annotations

import csv
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median, quantiles

import torch

from dystress_plugin.experiment.data.datasets import load_for_run
from dystress_plugin.experiment.io.config import read_config
from dystress_plugin.experiment.io.tables import write_table
from dystress_plugin.experiment.pretrain.module import PretrainModule
from dystress_plugin.experiment.pretrain.resolve import build_module

WARM_UP = 2

ROUNDS = (5, 30)  # at least and at most

SECONDS = 60.0  # in all, unless that is fewer than the least rounds


@dataclass(frozen=True)
class Cost:
    """Time of a step: forward and backward pass of encoder and loss, without loading, augmentation and optimizer.

    Attributes:
        name: of the arm.
        seconds: the median.
        ratio: median over the rounds of this time to the reference's in the same round.
        low: a quarter of the ratios is below.
        high: a quarter of the ratios is above.
        rounds: how often it was measured.
        machine: where.
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int
    machine: str


def costs(runs: Mapping[str, Path], reference: str, table: Path) -> list[Cost]:
    """Measures a step of each arm; what `table` has for the same arms already is not measured again.

    Args:
        runs: from the name of an arm to the folder of one of its runs.
        reference: the arm that ratios are to.
        table: a CSV.
    """
    if table.exists():
        with table.open(newline="") as file:
            found = [_cost(row) for row in csv.DictReader(file)]
        if [cost.name for cost in found] == list(runs):
            return found
    seconds = _measure(runs)
    rounds = len(seconds[reference])
    machine = _machine()
    found = []
    for name, taken in seconds.items():
        ratios = [mine / its for mine, its in zip(taken, seconds[reference], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        found.append(Cost(name, median(taken), median(ratios), low, high, rounds, machine))
    write_table(table, [f.name for f in fields(Cost)], map(vars, found))
    return found


def _cost(row: Mapping[str, str]) -> Cost:
    numbers = {name: float(row[name]) for name in ("seconds", "ratio", "low", "high")}
    return Cost(name=row["name"], rounds=int(row["rounds"]), machine=row["machine"], **numbers)


def _measure(runs: Mapping[str, Path]) -> dict[str, list[float]]:
    settings = {name: read_config(run / "config.yaml") for name, run in runs.items()}
    name, some = next(iter(settings.items()))
    data = load_for_run(runs[name], some).data
    device = "cuda" if some.hardware.accelerator in ("auto", "gpu") and torch.cuda.is_available() else "cpu"
    size, batch = some.model.image_size, some.data.batch_size
    modules = {name: build_module(run, data).to(device) for name, run in settings.items()}
    views = [torch.randn(batch, 3, size, size, device=device) for _ in range(2)]
    index = torch.arange(batch, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    started = time.perf_counter()
    for number in range(WARM_UP + ROUNDS[1]):
        if number >= WARM_UP + ROUNDS[0] and time.perf_counter() - started > SECONDS:
            break
        for name, module in modules.items():
            taken = _step(module, views, index)
            if number >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def _step(module: PretrainModule, views: list[torch.Tensor], index: torch.Tensor) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    module.loss(*module.embed(views), index=index, epoch=0.0).backward()
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - started
    module.zero_grad(set_to_none=True)
    return taken


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU with {torch.get_num_threads()} threads"
