"""`dystress report`: table and page of finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from dystress_plugin.experiment.evaluate.protocols import UNLABELLED
from dystress_plugin.experiment.evaluate.scores import has_weights, is_labelled, score_run
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.lock import alone
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.places import check_outside
from dystress_plugin.experiment.report import cost
from dystress_plugin.experiment.report.page import render
from dystress_plugin.experiment.report.records import (
    Run,
    check_together,
    in_order,
    one_per,
    read_rows,
    read_run,
    run_folders,
)
from dystress_plugin.experiment.settings import ReportSettings


def report(settings: ReportSettings) -> dict[str, str]:
    """Rebuilds `results.csv` and `report.html` from finished runs; returns their paths.

    Raises:
        ValueError: for folders without a finished run, or runs that do not belong on one page.
    """
    settings = checked(settings)
    if not settings.runs:
        raise ValueError("Name the folders of the runs: dystress report runs/*")
    folders = run_folders(map(Path, settings.runs))
    out = Path(settings.out) if settings.out else _beside(folders)
    with alone(out):
        return write(folders, out, settings.protocols, measure_cost=settings.cost)


def _beside(folders: Sequence[Path]) -> Path:
    parent, *others = {folder.resolve().parent for folder in folders}
    if others:
        raise ValueError(f"The runs are in {1 + len(others)} folders: say where the report goes, out=FOLDER.")
    return parent.parent if parent.name == "runs" and (parent.parent / "compare.yaml").exists() else parent


def write(
    folders: Sequence[Path],
    out: Path,
    names: Sequence[str],
    failures: Mapping[str, str] | None = None,
    *,
    measure_cost: bool = False,
    progress: bool = True,
) -> dict[str, str]:
    """Scores what is not scored yet, then reads the tables of the runs and writes table and page to `out`.

    Args:
        folders: of runs; unfinished ones are named on the page.
        out: where to.
        names: protocols.
        failures: from a run to what went wrong with it.
        progress: whether a terminal shows how many runs are scored.
        measure_cost: whether to measure what a step of each method costs where `cost.csv` in `out` does not say it.

    Raises:
        ValueError: for no finished run, or runs that do not belong on one page.
    """
    runs = [read_run(folder) for folder in folders if (folder / "summary.json").exists()]
    if not runs:
        raise ValueError(f"None of the {len(folders)} runs has been run to the end: there is nothing to report.")
    missing = dict.fromkeys(f.name for f in folders if not (f / "summary.json").exists()) if failures is None else {}
    runs = in_order(runs)
    check_together(runs)
    check_outside(out, data=runs[0].settings.data.name, val=runs[0].settings.data.val)
    out.mkdir(parents=True, exist_ok=True)
    labelled = is_labelled(runs[0].folder)
    _score_missing(runs, names if labelled else [], progress)
    if measure_cost:
        cost.measure(runs, out / cost.TABLE)
    names = names if labelled else list(UNLABELLED)
    rows = read_rows(runs, names)
    table, page = out / "results.csv", out / "report.html"
    files.write_text(table, rows.to_csv(index=False, float_format="%.8g", lineterminator="\n"))
    files.write_text(page, render(runs, rows, names, out, {**missing, **(failures or {})}))
    return {"results": str(table), "report": str(page)}


def _score_missing(runs: Sequence[Run], names: Sequence[str], progress: bool) -> None:
    """Scores the runs by what they have not been scored by, and once per seed what they started from.

    A run of which only tables were kept gets no map: that takes weights and images.
    """
    first_seed = min(run.settings.seed for run in runs)
    for run in tqdm(runs, "scoring", unit="run", disable=None if progress else True):  # None: shown by terminals alone
        own_first = min(other.settings.seed for other in runs if other.name == run.name)
        score_run(run.folder, names, with_map=run.settings.seed == own_first and has_weights(run.folder))
    for run in one_per(runs, lambda run: run.settings.seed):
        with_map = run.settings.seed == first_seed and has_weights(run.folder)
        score_run(run.folder, names, with_map=with_map, untrained=True)
