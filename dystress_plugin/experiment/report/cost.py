"""What a training step of each method costs, measured in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch

from dystress_plugin.experiment.data.datasets import Data, Images, normalize_of
from dystress_plugin.experiment.devices import device_name
from dystress_plugin.experiment.evaluate.scores import scoring_device
from dystress_plugin.experiment.io.config import read_config
from dystress_plugin.experiment.io.files import read_table, write_table
from dystress_plugin.experiment.pretrain.module import PretrainModule
from dystress_plugin.experiment.pretrain.resolve import build_module
from dystress_plugin.experiment.report.records import Run, one_per
from dystress_plugin.experiment.spec import RunSpec

TABLE = "cost.csv"

REMEDY = "Delete it, and `dystress report` measures anew with cost=true."

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


def measured_arms(runs: Sequence[Run]) -> tuple[dict[str, Path], str]:
    """A folder for each arm whose cost a report shows, and the arm that ratios are to: the first constant, if any.

    Another constant costs the same.
    """
    arms = {run.name: run for run in one_per(runs, lambda run: run.name)}
    reference = next((name for name, run in arms.items() if run.constant is not None), next(iter(arms)))
    shown = {name: run.folder for name, run in arms.items() if run.constant is None or name == reference}
    return shown, reference


def measure(runs: Sequence[Run], table: Path) -> None:
    """Measures a step of each arm into `table`, unless that is of the same arms already."""
    if not read(runs, table):
        arms, reference = measured_arms(runs)
        machine = device_name(_device(runs[0].settings))
        found = _compared(_measure(arms), reference, machine)
        write_table(table, [f.name for f in fields(Cost)], map(vars, found))


def read(runs: Sequence[Run], table: Path) -> list[Cost]:
    """What `measure` has found for these arms; nothing where it has not."""
    arms, _ = measured_arms(runs)
    costs = read_table(table, _cost, REMEDY) if table.exists() else []
    return costs if [cost.name for cost in costs] == list(arms) else []


def _cost(cells: Mapping[str, str]) -> Cost:
    seconds, ratio, low, high = (float(cells[name]) for name in ("seconds", "ratio", "low", "high"))
    return Cost(cells["name"], seconds, ratio, low, high, int(cells["rounds"]), cells["machine"])


def _compared(seconds: Mapping[str, Sequence[float]], reference: str, machine: str) -> list[Cost]:
    found = []
    for name, taken in seconds.items():
        ratios = [mine / its for mine, its in zip(taken, seconds[reference], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        found.append(Cost(name, median(taken), median(ratios), low, high, len(ratios), machine))
    return found


def _measure(runs: Mapping[str, Path]) -> dict[str, list[float]]:
    settings = {name: read_config(run / "config.yaml") for name, run in runs.items()}
    some = next(iter(settings.values()))
    # A step is of random numbers: none of the images need be there any more.
    none = Images(np.empty(0, dtype=np.str_), np.empty(0, dtype=np.int64))
    data = Data(none, none, normalize_of(some.data.name), {}, ())
    device = _device(some)
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


def _device(spec: RunSpec) -> torch.device:
    return torch.device(scoring_device(spec))


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
