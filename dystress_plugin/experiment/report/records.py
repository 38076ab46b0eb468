"""Finished runs, and the rows of `results.csv`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dystress_plugin import recipes
from dystress_plugin.experiment.evaluate.scores import Score
from dystress_plugin.experiment.io.config import comparable, read_config
from dystress_plugin.experiment.spec import RunSpec
from dystress_plugin.temperature import Constant

UNTRAINED = "untrained"

OF_A_RUN = ("method", "method_kwargs", "seed", "out")  # what may differ between the runs of a page


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: what `dystress pretrain` wrote.
        settings: from its `config.yaml`.
        versions: from its `config.yaml`.
    """

    folder: Path
    settings: RunSpec
    versions: Mapping[str, str]

    @cached_property
    def name(self) -> str:
        """Name of the arm: the folder's without the seed if it starts with the method, else from the settings."""
        name, dash, seed = self.folder.name.rpartition("-")
        method = self.settings.method
        named = name == method or name.startswith((f"{method}-", "constant-", "constant_"))
        if dash and seed == str(self.settings.seed) and named:
            return name
        own = recipes.recipe(method).choices
        kwargs = self.settings.method_kwargs.items()
        changed = [f"{k}={v}" for k, v in kwargs if k in own and v != own[k]]
        return "-".join([method, *changed])

    @property
    def constant(self) -> float | None:
        """The fixed temperature, if it is one."""
        fixed = recipes.recipe(self.settings.method).temperature is Constant
        return float(self.settings.method_kwargs["tau"]) if fixed else None

    @property
    def title(self) -> str:
        """For the page."""
        recipe = recipes.recipe(self.settings.method)
        _, dash, word = self.name.partition("-")
        if self.constant is not None:
            return f"{recipe.title}, constant {self.constant:g}"
        return recipe.title + (f" {word}" if dash else "")


@dataclass(frozen=True)
class Row:
    """A line of `results.csv`: an accuracy in percent of `n` test images, of one run."""

    name: str
    method: str
    tau: float | None
    tau_min: float | None
    tau_max: float | None
    seed: int
    protocol: str
    group: str
    value: float
    n: int
    train_images: int


def family(method: str) -> str:
    """What a method shares with the constants it is compared to: "", "dcl", "dclw" or "moco"."""
    return method.partition("_")[2]


def run_folders(paths: Iterable[Path]) -> list[Path]:
    """The runs, each once, among folders of runs, that hold runs, or of `dystress compare`; files are passed over.

    Raises:
        ValueError: for a path that is not there, or none with a run.
    """
    found = []
    for path in (path.expanduser() for path in paths):
        if not path.exists():
            raise ValueError(f"There is no folder {path}.")
        if (path / "config.yaml").exists():
            found.append(path)
        else:
            found += sorted(config.parent for part in ("*", "runs/*") for config in path.glob(f"{part}/config.yaml"))
    if not found:
        raise ValueError("None of these folders holds a run of `dystress pretrain` or `dystress compare`.")
    return list(dict.fromkeys(folder.resolve() for folder in found))


def read_run(folder: Path) -> Run:
    """The run in a folder."""
    return Run(folder, read_config(folder / "config.yaml"), dict(OmegaConf.load(folder / "config.yaml").versions))


def in_order(runs: Sequence[Run]) -> list[Run]:
    """Adaptive methods in the table's order, then constants by temperature; seeds in order."""
    order = list(recipes.METHODS)
    return sorted(
        runs,
        key=lambda run: (
            run.constant is not None,
            order.index(run.settings.method),
            run.constant or 0.0,
            run.name,
            run.settings.seed,
        ),
    )


def check_together(runs: Sequence[Run]) -> None:
    """Raises a ValueError for runs that do not belong on one page."""
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.name, run.settings.seed), run)
        if other is not run:
            raise ValueError(f"{other.folder} and {run.folder} are both {run.name} with seed {run.settings.seed}.")
    for key in ("data", "long_tail", "long_tail_profile", "indices"):
        values = {str(comparable(run.settings)[key]) for run in runs}
        if len(values) > 1:
            raise ValueError(f"The runs differ in {key}: {', '.join(sorted(values))}. A report is of one data set.")


def rows_of(run: Run, scores: Sequence[Score]) -> list[Row]:
    """The scores of a run as rows of `results.csv`."""
    kwargs = run.settings.method_kwargs
    tau, low, high = (kwargs.get(key) for key in ("tau", "tau_min", "tau_max"))
    name, method, seed = run.name, run.settings.method, run.settings.seed
    return [Row(name, method, tau, low, high, seed, **asdict(score)) for score in scores]


def one_per(runs: Sequence[Run], key: Any) -> list[Run]:
    """The first run for each value of a key."""
    return list({key(run): run for run in reversed(runs)}.values())[::-1]


def unequal(runs: Sequence[Run]) -> list[str]:
    """Keys that differ between the runs although they should not."""
    values = [comparable(run.settings) for run in runs]
    keys = [key for key in values[0] if key not in OF_A_RUN and len({str(its[key]) for its in values}) > 1]
    queue = ("queue_size", "momentum_encoder") if len({family(run.settings.method) for run in runs}) > 1 else ()
    return [key for key in keys if key not in queue]
