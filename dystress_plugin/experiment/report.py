"""`dystress report`: one tidy table and one self-contained page from finished runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf
from scipy import stats

from dystress_plugin import recipes
from dystress_plugin.experiment import files, report_figures
from dystress_plugin.experiment.cost import costs
from dystress_plugin.experiment.folders import check_outside
from dystress_plugin.experiment.lock import alone
from dystress_plugin.experiment.protocols import Score, protocol, score_run, score_untrained, write_table
from dystress_plugin.experiment.settings import PretrainSettings, ReportSettings, checked, comparable, read_config
from dystress_plugin.temperature import Constant

LEVEL = 0.95
FEW_SEEDS = 5  # below, the page says that the intervals are wide
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
    settings: PretrainSettings
    versions: Mapping[str, str]

    @cached_property
    def name(self) -> str:
        """Name of the arm: the folder's without the seed if it starts with the method, else from the settings."""
        name, dash, seed = self.folder.name.rpartition("-")
        method = self.settings.method
        named = name == method or name.startswith((f"{method}-", "constant-", "constant_"))
        if dash and seed == str(self.settings.seed) and named:
            return name
        own = recipes.recipe(method).parameters
        kwargs = self.settings.method_kwargs.items()
        changed = [f"{k}={v}" for k, v in kwargs if k in own and v != own[k] and k != "num_samples"]
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


@dataclass(frozen=True)
class Difference:
    """How much better than the best constant an arm is, by one protocol, seed by seed.

    Attributes:
        name: of the arm.
        protocol: its name.
        constant: name of the constant with the highest mean.
        seeds: number of seeds that both have.
        mean: of the differences, in percentage points.
        low: lower end of the 95 % confidence interval (t, paired); None for one seed.
        high: its upper end.
    """

    name: str
    protocol: str
    constant: str
    seeds: int
    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """In words."""
        if self.low is None or self.high is None:
            return "one seed: nothing can be said"
        if self.low <= 0 <= self.high:
            return "inside the noise"
        return "better" if self.mean > 0 else "worse"


def family(method: str) -> str:
    """What a method shares with the constants it is compared to: "", "dcl", "dclw" or "moco"."""
    return method.partition("_")[2]


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
    check_outside(out, runs[0].settings.data)
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


def differences(rows: Sequence[Row], constants: Mapping[str, str], protocols: Sequence[str]) -> list[Difference]:
    """Of every arm to the best constant of its family, by every protocol.

    Args:
        rows: the whole table.
        constants: from an arm with a fixed temperature to its family.
        protocols: their names.
    """
    families = {row.name: family(row.method) for row in rows if row.name != UNTRAINED}
    found = []
    for name in protocols:
        by_seed: dict[str, dict[int, float]] = {}
        for row in rows:
            if (row.protocol, row.group) == (name, "all") and row.name != UNTRAINED:
                by_seed.setdefault(row.name, {})[row.seed] = row.value
        for arm, values in by_seed.items():
            rivals = [c for c, its in constants.items() if its == families[arm] and c in by_seed]
            if not rivals:
                continue
            best = max(rivals, key=lambda c: statistics.fmean(by_seed[c].values()))
            paired = [values[seed] - by_seed[best][seed] for seed in values if seed in by_seed[best]]
            if arm != best and paired:
                found.append(Difference(arm, name, best, len(paired), *interval(paired)))
    return found


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the ends of its 95 % confidence interval by Student's t; None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def sentence(title: str, found: Sequence[Difference]) -> str:
    """What the differences of one arm say, in words."""
    if all(d.low is None for d in found):
        return f"{title}: one seed, so that nothing can be said about the difference from the best constant."
    parts = []
    for verdict, words in (("better", "better than"), ("worse", "worse than")):
        if chosen := [d for d in found if d.verdict == verdict]:
            each = "; ".join(
                f"{protocol(d.protocol).title} {d.mean:+.2f} ({d.low:+.2f} to {d.high:+.2f})" for d in chosen
            )
            parts.append(f"{words} the best constant by {len(chosen)} of {len(found)} protocols: {each}")
    noise = sum(d.verdict == "inside the noise" for d in found)
    if noise:
        every = "every protocol" if noise == len(found) else f"{noise} of {len(found)} protocols"
        parts.append(f"inside the noise by {every}")
    return f"{title}: {', and '.join(parts)}."


def read_run(folder: Path) -> Run:
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
    kwargs = run.settings.method_kwargs
    tau, low, high = (kwargs.get(key) for key in ("tau", "tau_min", "tau_max"))
    name, method, seed = run.name, run.settings.method, run.settings.seed
    return [Row(name, method, tau, low, high, seed, **asdict(score)) for score in scores]


def one_per(runs: Sequence[Run], key: Any) -> list[Run]:
    return list({key(run): run for run in reversed(runs)}.values())[::-1]


def _mapped(run: Run, runs: Sequence[Run]) -> bool:
    return run.settings.seed == min(other.settings.seed for other in runs if other.name == run.name)


def render(runs: Sequence[Run], rows: Sequence[Row], names: Sequence[str], out: Path, missing: Mapping[str, Any]) -> str:
    arms = {run.name: run for run in one_per(runs, lambda run: run.name)}
    titles = {name: run.title for name, run in arms.items()} | {UNTRAINED: "untrained backbone"}
    constants = {name: family(run.settings.method) for name, run in arms.items() if run.constant is not None}
    found = differences(rows, constants, names)
    style = report_figures.styles([name for name in arms if name not in constants], list(constants))
    reference = next(iter(constants), next(iter(arms)))
    measured = {n: run.folder for n, run in arms.items() if n not in constants or n == reference}
    cost = costs(measured, reference, out / "cost.csv")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dystress_plugin.experiment", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    settings = runs[0].settings
    compared = out / "compare.yaml"
    return environment.get_template("report.html.j2").render(
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
        figures=report_figures.all_figures(runs, rows, found, titles, style),
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
    tail = f", long tail {s.long_tail:g} ({s.long_tail_profile})" if s.long_tail is not None else ""
    return {
        "data": s.data + tail + (f", indices {s.indices}" if s.indices else ""),
        "backbone": f"{s.backbone}, {s.image_size} px",
        "epochs": str(s.epochs),
        "batch": str(s.batch_size),
        "optimizer": f"{s.optimizer}, lr {s.lr:g}",
        "seeds": ", ".join(map(str, sorted({run.settings.seed for run in runs}))),
    }


def unequal(runs: Sequence[Run]) -> list[str]:
    """Keys that differ between the runs although they should not."""
    values = [comparable(run.settings) for run in runs]
    keys = [key for key in values[0] if key not in OF_A_RUN and len({str(its[key]) for its in values}) > 1]
    queue = ("queue_size", "momentum_encoder") if len({family(run.settings.method) for run in runs}) > 1 else ()
    return [key for key in keys if key not in queue]
