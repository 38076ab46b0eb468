"""Finished runs, and the rows of `results.csv`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from dystress_plugin import recipes
from dystress_plugin.errors import first_line
from dystress_plugin.experiment.arms import family_of, is_constant
from dystress_plugin.experiment.evaluate.protocols import UNLABELLED
from dystress_plugin.experiment.evaluate.scores import TABLE, UNTRAINED_TABLE, is_labelled
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.config import comparable, read_config
from dystress_plugin.experiment.places import check_folders
from dystress_plugin.experiment.spec import RunSpec

UNTRAINED = "untrained"

TAUS = ("tau", "tau_min", "tau_max")

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
        """Name of the arm: as recorded, else the method and what differs from its defaults."""
        if self.settings.arm is not None:
            return self.settings.arm
        method = self.settings.method
        own = recipes.recipe(method).choices
        kwargs = self.settings.method_kwargs.items()
        changed = [f"{k}={v}" for k, v in kwargs if k in own and v != own[k]]
        return "-".join([method, *changed])

    @property
    def family(self) -> str:
        """The method of the constants it is compared to: as recorded, else by its own."""
        return family_of(self.settings.method) if self.settings.family is None else self.settings.family

    @property
    def constant(self) -> float | None:
        """The fixed temperature, if the run has that and nothing else."""
        return float(self.settings.method_kwargs["tau"]) if is_constant(self.settings.method) else None

    @cached_property
    def device(self) -> str:
        """What it was trained on; of a run by an earlier version what was asked for."""
        return files.read_json(self.folder / "summary.json").get("device") or self.settings.hardware.accelerator

    @property
    def title(self) -> str:
        """For the page."""
        recipe = recipes.recipe(self.settings.method)
        _, dash, word = self.name.partition("-")
        if self.constant is not None:
            return f"{recipe.title}, constant {self.constant:g}"
        return recipe.title + (f" {word}" if dash else "")


def run_folders(paths: Iterable[Path]) -> list[Path]:
    """The runs, each once, among folders of runs, that hold runs, or of `dystress compare`; files are passed over.

    Raises:
        ValueError: for a path that is not there, or none with a run.
    """
    found = []
    paths = [path.expanduser() for path in paths]
    check_folders(paths)
    for path in paths:
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
    for key in ("data", "labels", "val", "long_tail", "long_tail_profile", "indices"):
        values = {str(comparable(run.settings)[key]) for run in runs}
        if len(values) > 1:
            raise ValueError(f"The runs differ in {key}: {', '.join(sorted(values))}. A report is of one data set.")


def read_rows(runs: Sequence[Run], protocols: Sequence[str]) -> pd.DataFrame:
    """What `results.csv` has, from the tables in the runs' folders: their scores, then those of what they started from.

    A line is an accuracy, `value`, in percent of `n` test images, of one run; or, without labels, one of `UNLABELLED`.
    """
    if not is_labelled(runs[0].folder):
        return pd.DataFrame(_unlabelled_rows(runs))
    parts = [_rows(run.folder / TABLE, protocols, _described(run)) for run in runs]
    for run in one_per(runs, lambda run: run.settings.seed):
        about = {"name": UNTRAINED, "method": UNTRAINED, **dict.fromkeys(TAUS), "seed": run.settings.seed}
        parts.append(_rows(run.folder / UNTRAINED_TABLE, protocols, about))
    return pd.DataFrame([row for part in parts for row in part])


def read_frame(path: Path, numbers: Sequence[str], remedy: str, least: int = 1, **how: Any) -> pd.DataFrame:
    """A table of a run, as pandas reads it.

    Raises:
        ValueError: for a file that has not so many rows, or not numbers in these columns.
    """
    try:
        found = pd.read_csv(path, **how)
        if missing := [name for name in numbers if name not in found]:
            raise ValueError(f"it has no column '{missing[0]}'")
        found[list(numbers)].to_numpy(float)
        if len(found) < least:
            raise ValueError("it has no rows")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {first_line(error)} {remedy}") from None
    return found


def frequency_groups(rows: pd.DataFrame) -> list[str]:
    """Groups of classes by their training images, such as tail; none where all classes have about equally many."""
    return [group for group in rows["group"].unique() if group != "all" and not group.startswith("class ")]


def _unlabelled_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What stands for accuracies, from the summaries of the runs."""
    start = "untrained_effective_rank"
    summaries = {run.folder: files.read_json(run.folder / "summary.json", (*UNLABELLED, start)) for run in runs}
    rows = [
        {**_described(run), "protocol": name, "group": "all", "value": summaries[run.folder][name]}
        for run in runs
        for name in UNLABELLED
    ]
    for run in one_per(runs, lambda run: run.settings.seed):
        about = {**_described(run), "name": UNTRAINED, "method": UNTRAINED, **dict.fromkeys(TAUS)}
        rank = summaries[run.folder][start]
        rows.append({**about, "protocol": "effective_rank", "group": "all", "value": rank})
    return rows


def _described(run: Run) -> dict[str, Any]:
    taus = {key: run.settings.method_kwargs.get(key) for key in TAUS}
    return {"name": run.name, "method": run.settings.method, **taus, "seed": run.settings.seed}


def _rows(table: Path, protocols: Sequence[str], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    scores = pd.read_csv(table).set_index("protocol", drop=False)
    return [{**about, **score} for name in protocols for score in scores.loc[[name]].to_dict("records")]


def one_per(runs: Sequence[Run], key: Any) -> list[Run]:
    """The first run for each value of a key."""
    return list({key(run): run for run in reversed(runs)}.values())[::-1]


def unequal(runs: Sequence[Run]) -> list[str]:
    """Keys that differ between the runs although they should not."""
    values = [comparable(run.settings) for run in runs]
    keys = [key for key in values[0] if key not in OF_A_RUN and len({str(its[key]) for its in values}) > 1]
    queue = ("queue_size", "momentum_encoder") if len({run.family for run in runs}) > 1 else ()
    return [key for key in keys if key not in queue]
