"""The page of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from omegaconf import OmegaConf

from dystress_plugin.experiment import places
from dystress_plugin.experiment.evaluate.protocols import UNLABELLED, protocol
from dystress_plugin.experiment.report import cost, figures
from dystress_plugin.experiment.report.differences import FEW_SEEDS, differences, sentence
from dystress_plugin.experiment.report.records import UNTRAINED, Run, frequency_groups, one_per, unequal
from dystress_plugin.experiment.style import GREY, Style, styles


class Measure(NamedTuple):
    """What stands for a protocol without labels."""

    name: str
    title: str
    text: str


def render(runs: Sequence[Run], rows: pd.DataFrame, names: Sequence[str], out: Path, missing: Mapping[str, Any]) -> str:
    """The page as HTML, from tables alone.

    Args:
        runs: in their order on the page.
        rows: of `read_rows`.
        names: protocols; without labels those of `UNLABELLED`.
        out: where `cost.csv` and `compare.yaml` are, if anywhere.
        missing: from a run that is not on the page to what went wrong with it.
    """
    arms = {run.name: run for run in one_per(runs, lambda run: run.name)}
    titles = {name: run.title for name, run in arms.items()} | {UNTRAINED: "untrained backbone"}
    constants = [name for name, run in arms.items() if run.constant is not None]
    labelled = not set(names) & set(UNLABELLED)
    how = {name: protocol(name) for name in names} if labelled else {n: Measure(n, *UNLABELLED[n]) for n in names}
    families = {name: run.family for name, run in arms.items()} if labelled else {}
    found = differences(rows, families, constants, names)
    style = styles({name: run.settings.method for name, run in arms.items()}, titles)
    style[UNTRAINED] = Style(titles[UNTRAINED], GREY, "-", "x")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dystress_plugin.experiment.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    settings = runs[0].settings
    compared = out / "compare.yaml"
    return environment.get_template("page.html.j2").render(
        settings=settings,
        facts=_facts(runs),
        versions=runs[0].versions,
        seeds=sorted({run.settings.seed for run in runs}),
        few_seeds=FEW_SEEDS,
        labelled=labelled,
        protocols=list(how.values()),
        titles=titles,
        titles_of={name: its.title for name, its in how.items()},
        constants=constants,
        summary=summary(rows, "all"),
        groups={group: summary(rows, group) for group in frequency_groups(rows)},
        differences=found,
        sentences=[
            sentence(titles[name], mine)
            for name in arms
            if name not in constants and (mine := [d for d in found if d.name == name])
        ],
        together=[d for d in found if d.together is not None],
        comparisons=sum(d.name not in constants and d.low is not None for d in found),
        cost=cost.read(runs, out / cost.TABLE),
        reference=cost.measured_arms(runs)[1],
        missing=missing,
        unequal=unequal(runs),
        command=OmegaConf.load(compared).command if compared.exists() else "",
        figures=figures.all_figures(runs, rows, found, style),
    )


def summary(rows: pd.DataFrame, group: str) -> dict[str, dict[str, str]]:
    """From arm and protocol to "mean ± standard deviation" over the seeds."""
    arms = rows[rows["group"] == group].groupby("name", sort=False)
    return {name: its.groupby("protocol")["value"].agg(spread).to_dict() for name, its in arms}


def spread(values: Iterable[float]) -> str:
    """Mean and, of more than one, the standard deviation, with two decimals."""
    series = pd.Series(values)
    return f"{series.mean():.2f}" + (f" ± {series.std():.2f}" if len(series) > 1 else "")


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    s = runs[0].settings
    d = s.data
    tail = f", long tail {d.long_tail:g} ({d.long_tail_profile})" if d.long_tail is not None else ""
    return {
        "data": _named(d.name) + tail + (f", indices {d.indices}" if d.indices else ""),
        **({"accuracies": f"of {_named(d.val)}"} if d.val else {}),
        "backbone": f"{s.model.backbone}, {s.model.image_size} px",
        "epochs": str(s.epochs),
        "batch": str(d.batch_size),
        "optimizer": f"{s.optimizer.name}, lr {s.optimizer.lr:g}",
        "seeds": ", ".join(map(str, sorted({run.settings.seed for run in runs}))),
        "trained on": "; ".join(dict.fromkeys(run.device for run in runs)),
    }


def _named(data: str) -> str:
    """Data with its place, or by name alone where tables were kept without it."""
    return places.name_of(data) if places.is_gone(data) else data
