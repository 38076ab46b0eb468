"""The figures of a report, as SVG that takes the colour of the text around it, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from dystress_plugin.experiment.evaluate.protocols import protocol
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.report.records import frequency_groups, read_frame
from dystress_plugin.experiment.style import COMMON, NEGATIVE, POSITIVE, Style

if TYPE_CHECKING:
    from dystress_plugin.experiment.report.differences import Difference
    from dystress_plugin.experiment.report.records import Run

TEXT = "#010203"  # stands for the colour of the text, which only the page knows

STYLE: dict[str, Any] = COMMON | {
    "font.size": 9,
    "axes.titlesize": 10,
    "svg.hashsalt": "dystress",  # the same runs give the same page
    "svg.fonttype": "path",
    "savefig.transparent": True,
    "savefig.dpi": 110,  # of what is drawn as pixels within
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), TEXT),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color", "legend.labelcolor"), TEXT),
}

SIZE = (4.2, 3.1)  # inches: its letters stay readable on a telephone

NAME_LENGTH = 24  # letters of a class in a legend

PER_CLASS = ("weighted_knn", "linear")  # where they were asked for, else the first protocol


@dataclass(frozen=True)
class Picture:
    """An SVG with its text for those who do not see it."""

    svg: str
    alt: str


def all_figures(
    runs: Sequence[Run], rows: pd.DataFrame, found: Sequence[Difference], style: Mapping[str, Style]
) -> dict[str, list[Picture]]:
    """Every figure of the page, by section."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.name, []).append(run)
    with mpl.rc_context(STYLE):
        return {
            "differences": [_differences(found, name, style) for name in dict.fromkeys(d.protocol for d in found)],
            "curves": [
                _curves(arms, "knn_top1", "weighted kNN of the test images", "top-1 accuracy (%)", style)
                if (rows["protocol"] != "effective_rank").all()
                else _curves(arms, "effective_rank", "effective rank of the features", "effective rank", style),
                _curves(arms, "loss", "loss", "loss (nats)", style),
            ],
            "classes": [_classes(rows, name, style) for name in _class_protocols(rows)],
            "training": [
                picture
                for name, mine in arms.items()
                for quantity in (("similarity", "temperature") if mine[0].constant is None else ("similarity",))
                if (picture := _histograms(mine[0].folder / "diagnostics.csv", quantity, style[name].title)) is not None
            ],
            "maps": [
                _map(path, title)
                for path, title in (
                    (runs[0].folder / "untrained_map.csv", style["untrained"].title),
                    *((mine[0].folder / "map.csv", style[name].title) for name, mine in arms.items()),
                )
                if path.exists()
            ],
        }


def _differences(found: Sequence[Difference], name: str, style: Mapping[str, Style]) -> Picture:
    mine = [d for d in found if d.protocol == name]

    def draw(axes: Axes) -> None:
        for y, d in enumerate(mine):
            color, marker = style[d.name].color, style[d.name].marker
            if d.low is not None and d.high is not None:
                axes.plot([d.low, d.high], [y, y], color=color, linewidth=2.5, solid_capstyle="butt")
            axes.plot(d.mean, y, marker, color=color, markersize=6)
        axes.axvline(0, color=TEXT, linewidth=1)
        axes.set_yticks(range(len(mine)), [style[d.name].title.replace(", ", ",\n") for d in mine], fontsize=8)
        axes.set_ylim(len(mine) - 0.5, -0.5)
        axes.set(title=protocol(name).title, xlabel="difference (percentage points)")

    height = 1.1 + 0.36 * len(mine)
    return _picture(draw, f"Differences from the best constant, {protocol(name).title}", (SIZE[0], max(2.0, height)))


def _curves(
    arms: Mapping[str, Sequence[Run]], column: str, title: str, label: str, style: Mapping[str, Style]
) -> Picture:
    def draw(axes: Axes) -> None:
        for name, mine in arms.items():
            curves = [_column(run, column) for run in mine]
            length = min(map(len, curves))
            values = np.array([curve[:length] for curve in curves])
            epochs = np.flatnonzero(np.isfinite(values).all(0))  # those that were measured
            values = values[:, epochs]
            mean = values.mean(0)
            marker = "o" if len(epochs) < 3 else "none"  # which a line of one epoch needs
            its = style[name]
            axes.plot(epochs, mean, label=its.title, marker=marker, **its.of_line)
            if len(values) > 1:
                spread = values.std(0, ddof=1)
                axes.fill_between(epochs, mean - spread, mean + spread, color=its.color, alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="epoch (the first is 0)", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend_below(axes)

    return _picture(draw, f"{title} over the epochs, mean and standard deviation over the seeds", (SIZE[0], 3.9))


def _column(run: Run, name: str) -> pd.Series:
    return read_frame(run.folder / "metrics.csv", [name], files.ROWS_IN_CHECKPOINT)[name]


def _classes(rows: pd.DataFrame, name: str, style: Mapping[str, Style]) -> Picture:
    classes = rows[(rows["protocol"] == name) & rows["group"].str.startswith("class ")]
    points = classes.groupby(["name", "group"], sort=False)[["train_images", "value"]].mean()

    def draw(axes: Axes) -> None:
        for arm, mine in points.groupby(level="name", sort=False):
            ordered, its = mine.sort_values(["train_images", "value"]), style[arm]
            x, y = ordered["train_images"], ordered["value"]
            axes.plot(x, y, its.marker, color=its.color, alpha=0.8, markersize=5, label=its.title)
        if points["train_images"].max() >= 3 * points["train_images"].min():
            axes.set_xscale("log")
            axes.xaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)),
                major_formatter=ScalarFormatter(),
                minor_locator=NullLocator(),
            )
        axes.set(title=protocol(name).title, xlabel="training images of the class", ylabel="accuracy of the class (%)")
        _legend_below(axes)

    return _picture(draw, f"Accuracy of every class by its training images, {protocol(name).title}", (SIZE[0], 3.9))


def _histograms(table: Path, quantity: str, title: str) -> Picture | None:
    """Shares of the pairs over training, positives above negatives; of a single sample as bars."""
    if not table.exists():
        return None
    numbers = ("step", "bin_low", "bin_high", "mean")
    lines = read_frame(table, numbers, "Delete it, and the page goes without its figures.", least=0)
    lines = lines[lines["quantity"] == quantity]
    if lines.empty:
        return None
    edges = np.linspace(lines["bin_low"].min(), lines["bin_high"].max() * 1.02, 41)
    if lines["step"].nunique() == 1:
        text = f"{title}: histograms of the {quantity} at training step {lines['step'].iloc[0]}"
        return _picture(partial(_bars, lines=lines, edges=edges, title=title), text, (SIZE[0], 3.9), panels=2)

    def draw(axes: Sequence[Axes]) -> None:
        for panel, pairs in zip(axes, ("positive", "negative"), strict=True):
            mine = lines[lines["pairs"] == pairs]
            steps = mine["step"].tolist()
            shares = np.array([_rebinned(line, edges) for _, line in mine.iterrows()]).T
            width = steps[1] - steps[0]
            panel.grid(visible=False)
            mesh = panel.pcolormesh(
                [*steps, steps[-1] + width], edges, 100 * shares, cmap="viridis", vmin=0, rasterized=True
            )
            panel.plot(np.array(steps) + width / 2, mine["mean"], color="white", linewidth=1)
            panel.set(ylabel=f"{quantity}\nof {pairs}s")
            colorbar = panel.figure.colorbar(mesh, ax=panel, pad=0.02)
            colorbar.set_label("share of pairs (%)", fontsize=8)
            colorbar.outline.set_visible(False)
        axes[0].set_title(title)
        axes[-1].set_xlabel("training step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return _picture(draw, f"{title}: histograms of the {quantity} over training", (SIZE[0], 3.9), panels=2)


def _bars(axes: Sequence[Axes], lines: pd.DataFrame, edges: np.ndarray, title: str) -> None:
    for panel, (_, line), color in zip(axes, lines.iterrows(), (POSITIVE, NEGATIVE), strict=True):
        panel.stairs(100 * _rebinned(line, edges), edges, fill=True, color=color)
        panel.axvline(line["mean"], color=TEXT, linewidth=1)
        panel.set_ylabel(f"share of\n{line['pairs']}s (%)")
    axes[0].set_title(f"{title}, training step {line['step']}")
    axes[-1].set_xlabel(line["quantity"])
    axes[-1].xaxis.set_major_locator(MaxNLocator(5))


def _rebinned(line: pd.Series, edges: np.ndarray) -> np.ndarray:
    """Shares in other bins: the values of a bin are spread evenly over it."""
    counts = line.filter(regex=r"^bin_\d+$").to_numpy(float)
    own = np.linspace(line["bin_low"], line["bin_high"], len(counts) + 1)
    cumulated = np.concatenate([[0.0], np.cumsum(counts) / max(1, counts.sum())])
    shares: np.ndarray = np.diff(np.interp(edges, own, cumulated))
    return shares


def _map(path: Path, title: str) -> Picture:
    # A class may be called 007 or NA. A map of an earlier version has numbers alone.
    rows = read_frame(path, ("x", "y", "class"), files.ANEW, dtype={"name": str}, keep_default_na=False)
    x, y, c = rows[["x", "y", "class"]].to_numpy(float).T
    labels = rows.get("name", rows["class"].astype(str))
    names = {number: _short(name) for number, name in zip(rows["class"], labels, strict=True)}

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        axes.set(title=title, xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
        if len(names) > 10:
            axes.scatter(x, y, s=5, c=c, cmap="hsv", linewidths=0, rasterized=True)
            return
        for i, number in enumerate(sorted(names)):
            mine = c == number
            color = mpl.colormaps["tab10"](i)
            axes.scatter(x[mine], y[mine], s=5, color=color, linewidths=0, rasterized=True, label=str(number))
        legend = axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.12),
            ncols=5 if max(map(len, names.values())) <= 10 else 2,
            frameon=False,
            fontsize=8,
            title="class",
            handletextpad=0,
            columnspacing=0.8,
            markerscale=2,
        )
        for text, number in zip(legend.get_texts(), sorted(names), strict=True):
            text.set(text=names[number], parse_math=False)  # a folder's name, whatever it begins with or contains

    return _picture(draw, f"t-SNE map of the test images' features, {title}", (SIZE[0], 3.9))


def _picture(draw: Callable[[Any], None], alt: str, size: tuple[float, float] = SIZE, panels: int = 1) -> Picture:
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(panels, sharex=True))
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor")
    # The page says how wide: with the view box alone it scales. Names that every figure uses would not be unique.
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return Picture(re.sub(r' id="\w+_\d+"', "", svg), alt)


def _legend_below(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=2, frameon=False, fontsize=8)


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def _class_protocols(rows: pd.DataFrame) -> list[str]:
    """By which classes are drawn over their frequency; by none where that is the same for all of them."""
    if not frequency_groups(rows):
        return []
    there = list(rows["protocol"][rows["group"] != "all"].unique())
    return [name for name in PER_CLASS if name in there] or there[:1]
