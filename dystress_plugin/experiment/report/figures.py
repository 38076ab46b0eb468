"""The figures of a report, as SVG that takes the colour of the text around it, light or dark."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from dystress_plugin.experiment.evaluate.protocols import protocol

if TYPE_CHECKING:
    from dystress_plugin.experiment.report.differences import Difference
    from dystress_plugin.experiment.report.records import Row, Run

TEXT = "#010203"  # stands for the colour of the text, which only the page knows

COLORS = ("#e07b1a", "#2f8fd6", "#1fa37a", "#b45fc9", "#d6456b", "#a08a18")

GREY = "#8a8a8a"

DASHES = ("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))

MARKERS = ("v", "^", "s", "D")

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
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


@dataclass(frozen=True)
class Style:
    """How an arm is drawn everywhere: `line` where it is a line, `marker` where it is points."""

    color: str
    line: Any
    marker: str


def styles(methods: Sequence[str], constants: Sequence[str]) -> dict[str, Style]:
    """Methods in colour; constants and the untrained backbone grey, told apart by dashes and markers."""
    coloured = {
        name: Style(COLORS[i % len(COLORS)], ("-", *DASHES)[i // len(COLORS) % 5], "o")
        for i, name in enumerate(methods)
    }
    grey = {name: Style(GREY, DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(constants)}
    return coloured | grey | {"untrained": Style(GREY, "-", "x")}


def all_figures(
    runs: Sequence[Run],
    rows: Sequence[Row],
    found: Sequence[Difference],
    titles: Mapping[str, str],
    style: Mapping[str, Style],
) -> dict[str, list[Picture]]:
    """Every figure of the page, by section."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.name, []).append(run)
    with mpl.rc_context(STYLE):
        return {
            "differences": [_differences(found, name, titles, style) for name in _unique(d.protocol for d in found)],
            "curves": [
                _curves(arms, "knn_top1", "weighted kNN of the test images", "top-1 accuracy (%)", titles, style),
                _curves(arms, "loss", "loss", "loss (nats)", titles, style),
            ],
            "classes": [_classes(rows, name, titles, style) for name in _class_protocols(rows)],
            "training": [
                picture
                for name, mine in arms.items()
                for quantity in (("similarity", "temperature") if mine[0].constant is None else ("similarity",))
                if (picture := _histograms(mine[0].folder / "diagnostics.csv", quantity, titles[name])) is not None
            ],
            "maps": [
                _map(path, title)
                for path, title in (
                    (runs[0].folder / "untrained_map.csv", titles["untrained"]),
                    *((mine[0].folder / "map.csv", titles[name]) for name, mine in arms.items()),
                )
                if path.exists()
            ],
        }


def _differences(
    found: Sequence[Difference],
    name: str,
    titles: Mapping[str, str],
    style: Mapping[str, Style],
) -> Picture:
    mine = [d for d in found if d.protocol == name]

    def draw(axes: Axes) -> None:
        for y, d in enumerate(mine):
            color = style[d.name].color
            if d.low is not None and d.high is not None:
                axes.plot([d.low, d.high], [y, y], color=color, linewidth=2.5, solid_capstyle="butt")
            axes.plot(d.mean, y, "o", color=color, markersize=6)
        axes.axvline(0, color=TEXT, linewidth=1)
        axes.set_yticks(range(len(mine)), [titles[d.name].replace(", ", ",\n") for d in mine], fontsize=8)
        axes.set_ylim(len(mine) - 0.5, -0.5)
        axes.set(title=protocol(name).title, xlabel="difference (percentage points)")

    height = 1.1 + 0.36 * len(mine)
    return _picture(draw, f"Differences from the best constant, {protocol(name).title}", (SIZE[0], max(2.0, height)))


def _curves(
    arms: Mapping[str, Sequence[Run]],
    column: str,
    title: str,
    label: str,
    titles: Mapping[str, str],
    style: Mapping[str, Style],
) -> Picture:
    def draw(axes: Axes) -> None:
        for name, mine in arms.items():
            curves = [_column(run.folder / "metrics.csv", column) for run in mine]
            length = min(map(len, curves))
            values = np.array([curve[:length] for curve in curves])
            epochs, mean = np.arange(1, length + 1), values.mean(0)
            marker = "o" if length < 3 else "none"  # which a line of one epoch needs
            color, line = style[name].color, style[name].line
            axes.plot(epochs, mean, color=color, linestyle=line, label=titles[name], linewidth=1.6, marker=marker)
            if len(values) > 1:
                spread = values.std(0, ddof=1)
                axes.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="epochs trained", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend_below(axes)

    return _picture(draw, f"{title} over the epochs, mean and standard deviation over the seeds", (SIZE[0], 3.9))


def _classes(rows: Sequence[Row], name: str, titles: Mapping[str, str], style: Mapping[str, Style]) -> Picture:
    def draw(axes: Axes) -> None:
        counts = set()
        for arm in _unique(row.name for row in rows):
            points: dict[str, list[Row]] = {}
            for row in rows:
                if (row.name, row.protocol) == (arm, name) and row.group.startswith("class "):
                    points.setdefault(row.group, []).append(row)
            at = sorted((_mean(p, "train_images"), _mean(p, "value")) for p in points.values())
            counts |= {x for x, _ in at}
            x, y = zip(*at, strict=True)
            axes.plot(x, y, style[arm].marker, color=style[arm].color, alpha=0.8, markersize=5, label=titles[arm])
        if max(counts) >= 3 * min(counts):
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
    """Shares of the pairs over training, positives above negatives."""
    if not table.exists():
        return None
    with table.open(newline="") as file:
        lines = [row for row in csv.DictReader(file) if row["quantity"] == quantity]
    if not lines:
        return None
    top = max(float(line["bin_high"]) for line in lines)
    low = min(float(line["bin_low"]) for line in lines)
    edges = np.linspace(low, top * 1.02, 41)

    def draw(axes: Sequence[Axes]) -> None:
        for panel, pairs in zip(axes, ("positive", "negative"), strict=True):
            mine = [line for line in lines if line["pairs"] == pairs]
            steps = [int(line["step"]) for line in mine]
            shares = np.array([_rebinned(line, edges) for line in mine]).T
            width = steps[1] - steps[0] if len(steps) > 1 else 1
            panel.grid(visible=False)
            mesh = panel.pcolormesh(
                [*steps, steps[-1] + width], edges, 100 * shares, cmap="viridis", vmin=0, rasterized=True
            )
            panel.plot(np.array(steps) + width / 2, [float(line["mean"]) for line in mine], color="white", linewidth=1)
            panel.set(ylabel=f"{quantity}\nof {pairs}s")
            colorbar = panel.figure.colorbar(mesh, ax=panel, pad=0.02)
            colorbar.set_label("share of pairs (%)", fontsize=8)
            colorbar.outline.set_visible(False)
        axes[0].set_title(title)
        axes[-1].set_xlabel("training step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))

    return _picture(draw, f"{title}: histograms of the {quantity} over training", (SIZE[0], 3.9), panels=2)


def _rebinned(line: Mapping[str, str], edges: np.ndarray) -> np.ndarray:
    """Shares in other bins: the values of a bin are spread evenly over it."""
    counts = [int(value) for key, value in line.items() if re.fullmatch(r"bin_\d+", key)]
    own = np.linspace(float(line["bin_low"]), float(line["bin_high"]), len(counts) + 1)
    cumulated = np.concatenate([[0.0], np.cumsum(counts) / max(1, sum(counts))])
    shares: np.ndarray = np.diff(np.interp(edges, own, cumulated))
    return shares


def _map(path: Path, title: str) -> Picture:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    x, y, c = np.array([[float(row[key]) for key in ("x", "y", "class")] for row in rows]).T
    # A map of an earlier version has numbers alone.
    names = {int(row["class"]): _short(row.get("name", row["class"])) for row in rows}

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


def _column(table: Path, name: str) -> list[float]:
    with table.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(getattr(row, key) for row in rows)


def _class_protocols(rows: Sequence[Row]) -> list[str]:
    there = _unique(row.protocol for row in rows)
    return [name for name in PER_CLASS if name in there] or there[:1]


def _unique(names: Any) -> list[str]:
    return list(dict.fromkeys(names))
