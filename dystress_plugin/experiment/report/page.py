"""The page of a report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf

from dystress_plugin.experiment.evaluate.protocols import protocol
from dystress_plugin.experiment.report import figures
from dystress_plugin.experiment.report.cost import costs
from dystress_plugin.experiment.report.differences import FEW_SEEDS, differences, sentence
from dystress_plugin.experiment.report.records import UNTRAINED, Row, Run, family, one_per, unequal


def render(
    runs: Sequence[Run], rows: Sequence[Row], names: Sequence[str], out: Path, missing: Mapping[str, Any]
) -> str:
    """The page as HTML."""
    arms = {run.name: run for run in one_per(runs, lambda run: run.name)}
    titles = {name: run.title for name, run in arms.items()} | {UNTRAINED: "untrained backbone"}
    constants = {name: family(run.settings.method) for name, run in arms.items() if run.constant is not None}
    found = differences(rows, constants, names)
    style = figures.styles([name for name in arms if name not in constants], list(constants))
    reference = next(iter(constants), next(iter(arms)))
    measured = {n: run.folder for n, run in arms.items() if n not in constants or n == reference}
    cost = costs(measured, reference, out / "cost.csv")
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
        protocols=[protocol(name) for name in names],
        titles=titles,
        titles_of={name: protocol(name).title for name in names},
        constants=constants,
        summary=_summary(rows, "all"),
        groups={group: _summary(rows, group) for group in _groups(rows)},
        differences=found,
        sentences=[
            sentence(titles[name], mine)
            for name in arms
            if name not in constants and (mine := [d for d in found if d.name == name])
        ],
        comparisons=sum(d.name not in constants and d.low is not None for d in found),
        cost=cost,
        reference=reference,
        missing=missing,
        unequal=unequal(runs),
        command=OmegaConf.load(compared).command if compared.exists() else "",
        figures=figures.all_figures(runs, rows, found, titles, style),
    )


def _summary(rows: Sequence[Row], group: str) -> dict[str, dict[str, str]]:
    """From arm and protocol to "mean ± standard deviation" over the seeds."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.group == group:
            values.setdefault(row.name, {}).setdefault(row.protocol, []).append(row.value)
    return {name: {p: spread(v) for p, v in of_name.items()} for name, of_name in values.items()}


def spread(values: Sequence[float]) -> str:
    """Mean and, of more than one, the standard deviation, with two decimals."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _groups(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.group for row in rows if row.group != "all" and not row.group.startswith("class ")))


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    s = runs[0].settings
    d = s.data
    tail = f", long tail {d.long_tail:g} ({d.long_tail_profile})" if d.long_tail is not None else ""
    return {
        "data": d.name + tail + (f", indices {d.indices}" if d.indices else ""),
        "backbone": f"{s.model.backbone}, {s.model.image_size} px",
        "epochs": str(s.epochs),
        "batch": str(d.batch_size),
        "optimizer": f"{s.optimizer.name}, lr {s.optimizer.lr:g}",
        "seeds": ", ".join(map(str, sorted({run.settings.seed for run in runs}))),
    }
