"""`dystress report`: table and page of finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from dystress_plugin.experiment.evaluate.protocols import protocol
from dystress_plugin.experiment.evaluate.scores import score_run, score_untrained
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.lock import alone
from dystress_plugin.experiment.io.tables import write_table
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.places import check_outside
from dystress_plugin.experiment.report.page import render
from dystress_plugin.experiment.report.records import (
    UNTRAINED,
    Row,
    Run,
    check_together,
    in_order,
    one_per,
    read_run,
    rows_of,
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
    for name in settings.protocols:
        protocol(name)
    folders = run_folders(map(Path, settings.runs))
    out = Path(settings.out) if settings.out else _beside(folders)
    with alone(out):
        return write(folders, out, settings.protocols)


def _beside(folders: Sequence[Path]) -> Path:
    parent, *others = {folder.resolve().parent for folder in folders}
    if others:
        raise ValueError(f"The runs are in {1 + len(others)} folders: say where the report goes, out=FOLDER.")
    return parent.parent if parent.name == "runs" and (parent.parent / "compare.yaml").exists() else parent


def write(
    folders: Sequence[Path], out: Path, names: Sequence[str], failures: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Scores what is not scored yet, and writes the table and the page to `out`.

    Args:
        folders: of runs; unfinished ones are named on the page.
        out: where to.
        names: protocols.
        failures: from a run to what went wrong with it.

    Raises:
        ValueError: for no finished run, or runs that do not belong on one page.
    """
    runs = [read_run(folder) for folder in folders if (folder / "summary.json").exists()]
    if not runs:
        raise ValueError(f"None of the {len(folders)} runs has been run to the end: there is nothing to report.")
    missing = dict.fromkeys(f.name for f in folders if not (f / "summary.json").exists()) if failures is None else {}
    runs = in_order(runs)
    check_together(runs)
    check_outside(out, runs[0].settings.data.name)
    first_seed = min(run.settings.seed for run in runs)
    rows = [row for run in runs for row in rows_of(run, score_run(run.folder, names, with_map=_mapped(run, runs)))]
    for run in one_per(runs, lambda run: run.settings.seed):
        scores = score_untrained(run.folder, names, with_map=run.settings.seed == first_seed)
        rows += [Row(UNTRAINED, UNTRAINED, None, None, None, run.settings.seed, **asdict(score)) for score in scores]
    out.mkdir(parents=True, exist_ok=True)
    table, page = out / "results.csv", out / "report.html"
    write_table(table, [f.name for f in fields(Row)], map(vars, rows))
    files.write_text(page, render(runs, rows, names, out, {**missing, **(failures or {})}))
    return {"results": str(table), "report": str(page)}


def _mapped(run: Run, runs: Sequence[Run]) -> bool:
    return run.settings.seed == min(other.settings.seed for other in runs if other.name == run.name)
