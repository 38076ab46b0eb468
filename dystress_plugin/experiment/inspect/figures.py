"""The figures of `dystress inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dystress_plugin.experiment.inspect.effects import Effect, Similarities, on_grid, relative_weight
from dystress_plugin.experiment.style import NEGATIVE, OUTLINE, PNG, POSITIVE, SOLID, Style

BINS = 60

FEW_BINS = 20  # of the positives, which are as few as the anchors

COSINE = "cosine similarity"

Effects: TypeAlias = Mapping[str, Effect]

Styles: TypeAlias = Mapping[str, Style]


def draw(effects: Effects, style: Styles, seen: Similarities, folder: Path, title: str) -> None:
    """Writes `similarities.png`, `temperatures.png`, `weights.png`, `gradients.png` and `measures.png`.

    Args:
        effects: by the name to show.
        style: how each is drawn.
        seen: the pairs that they are the effects on.
        folder: where to.
        title: the data and the network.
    """
    with mpl.rc_context(PNG):
        for name, plot in (
            ("similarities", _similarities),
            ("temperatures", _temperatures),
            ("weights", _weights),
            ("gradients", _gradients),
            ("measures", _measures),
        ):
            figure = Figure(figsize=(9, 4.2), layout="constrained")
            plot(figure, effects, style, seen)
            figure.suptitle(f"{figure.get_suptitle()}\n{title}", fontsize=11)
            figure.savefig(folder / f"{name}.png")


def _similarities(figure: Figure, _effects: Effects, _style: Styles, seen: Similarities) -> None:
    axes = figure.subplots()
    for cosine, color, shape, name in (
        (seen.negative, NEGATIVE, SOLID, "negative"),
        (seen.positive, POSITIVE, OUTLINE, "positive"),
    ):
        label = f"{name} pairs: mean {float(cosine.mean()):.2f}"
        axes.hist(cosine.flatten().numpy(), bins=BINS, range=(-1, 1), density=True, color=color, label=label, **shape)
    axes.set(xlim=(-1, 1), xlabel=COSINE, ylabel="density of pairs (per unit of cosine)")
    axes.legend(frameon=False)
    figure.suptitle("Similarities")


def _temperatures(figure: Figure, effects: Effects, style: Styles, seen: Similarities) -> None:
    left, right = figure.subplots(1, 2)
    pairs = ("positive", "negative")
    highest = max(found.measures[f"tau_{its}_max"] for found in effects.values() for its in pairs)
    for name, found in effects.items():
        for axes, what in ((left, "temperature"), (right, "logit")):
            grid, values = on_grid(found.maps.negative, len(seen.positive), what)
            axes.plot(grid, values.median(dim=0).values, label=name, **style[name].of_line)
            if what == "logit":
                for low, high in found.measures["falling"]:
                    inside = (grid >= low) & (grid <= high)
                    thick = {"color": style[name].color, "linewidth": 5, "alpha": 0.3}
                    axes.plot(grid[inside], values.median(dim=0).values[inside], **thick)
    left.set(title="Temperature", xlabel=COSINE, ylabel="temperature (median anchor)", ylim=(0, 1.15 * highest))
    right.set(title="Logit; thick where it falls", xlabel=COSINE, ylabel="logit (nats)")
    _legend(figure, left)
    figure.suptitle("What a cosine is divided by, and the result")


def _weights(figure: Figure, effects: Effects, style: Styles, seen: Similarities) -> None:
    axes = figure.subplots()
    density = axes.twinx()
    density.hist(seen.negative.flatten().numpy(), bins=BINS, density=True, color=NEGATIVE, alpha=0.2)
    density.set(ylabel="density of negative pairs (area)")
    density.grid(visible=False)
    for name, found in effects.items():
        axes.plot(*relative_weight(found, seen), label=name, **style[name].of_line)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(yscale="log", xlabel=f"{COSINE} of a negative", ylabel="softmax weight / mean weight (median anchor)")
    _legend(figure, axes)
    figure.suptitle("How much a negative counts")


def _gradients(figure: Figure, effects: Effects, style: Styles, seen: Similarities) -> None:
    left, right = figure.subplots(1, 2)
    left.hist(seen.negative.flatten().numpy(), bins=BINS, density=True, color=NEGATIVE, alpha=0.2, label="pairs")
    for name, found in effects.items():
        share, middle = _binned(seen.negative, found.push.abs(), BINS, density=True)
        left.plot(middle, share, label=name, **style[name].of_line)
        total, middle = _binned(seen.positive, found.pull.abs() / found.pull.abs().mean(), FEW_BINS)
        number, _ = _binned(seen.positive, torch.ones_like(found.pull), FEW_BINS)
        right.plot(middle[number > 0], (total / number)[number > 0], marker="o", markersize=3, **style[name].of_line)
    left.set(title="Negatives: where the push is", xlabel=COSINE, ylabel="share of the gradient (per unit of cosine)")
    right.set(title="Positives: the pull on a pair", xlabel=COSINE, ylabel="gradient / mean pair's", ylim=(0, None))
    _legend(figure, left)
    figure.suptitle("Size of the gradient |dL/ds| over similarity")


def _measures(figure: Figure, effects: Effects, style: Styles, seen: Similarities) -> None:
    panels = figure.subplots(1, 4, sharey=True)
    names = list(effects)
    for axes, key, title, scale, unit in (
        (panels[0], "hardest_1_percent", "hardest 1 %", 1.0, "of the push (%)"),
        (panels[1], "hardest_10_percent", "hardest 10 %", 1.0, "of the push (%)"),
        (panels[2], "effective_negatives", "effective negatives", 100 / seen.negative.shape[1], "of all negatives (%)"),
        (panels[3], "inverted_percent", "inverted order", 1.0, "of the pairs (%)"),
    ):
        values = [scale * found.measures[key] for found in effects.values()]
        bars = axes.barh(names, values, color=[style[name].color for name in names], edgecolor="white", linewidth=0)
        for bar, name in zip(bars, names, strict=True):
            bar.set_hatch(style[name].hatch)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=8)
        axes.set(title=title, xlabel=unit, xlim=(0, 1.25 * max([*values, 1.0])))
        axes.grid(visible=False)
    panels[0].invert_yaxis()
    figure.suptitle(f"Hardness, with {seen.negative.shape[1]} negatives an anchor")


def _binned(cosine: Tensor, strength: Tensor, bins: int, *, density: bool = False) -> tuple[Tensor, Tensor]:
    """The sum of the strength in every bin of cosines, with `density` as a share over the width; and their middles."""
    span = (float(cosine.min()), float(cosine.max()))
    sums, edges = torch.histogram(cosine.flatten(), bins, range=span, weight=strength.flatten(), density=density)
    return sums, (edges[1:] + edges[:-1]) / 2


def _legend(figure: Figure, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
