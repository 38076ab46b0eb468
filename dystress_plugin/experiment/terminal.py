"""What the commands print."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dystress_plugin.recipes import Recipe

MEASURES = {"knn_top1": "weighted kNN", "linear_top1": "linear probe", "effective_rank": "effective rank"}


def methods_table() -> str:
    """The methods with their temperature, objective, parameters and paper; then their variants, a line each."""
    from dystress_plugin.recipes import METHODS  # torch with it, which other tables do without

    variants = {
        name: base
        for name in METHODS
        if (base := name.rpartition("_")[0]) in METHODS and METHODS[name].temperature is METHODS[base].temperature
    }
    lines = columns(
        [("method", "temperature", "objective", "paper")]
        + [
            (recipe.name, recipe.temperature.__name__, recipe.objective, f"{recipe.paper}, {recipe.url}")
            for recipe in METHODS.values()
            if recipe.name not in variants
        ]
    )
    lines += ["", *columns([("parameters and defaults, method_kwargs.NAME=VALUE", "")])]
    lines += columns([(name, _defaults(METHODS[name])) for name in METHODS if name not in variants])
    lines += ["", "variants: as the method before the underscore, but for what stands here"]
    lines += columns([(name, *_difference(METHODS[name], METHODS[base])) for name, base in variants.items()])
    return "\n".join(lines)


def _defaults(recipe: Recipe, other: Mapping[str, Any] | None = None) -> str:
    """Its parameters; those that `other` has with another default, or not at all."""
    nothing = object()
    return ", ".join(
        name if default is inspect.Parameter.empty else f"{name}={default}"
        for name, default in recipe.parameters.items()
        if other is None or other.get(name, nothing) != default
    )


def _difference(recipe: Recipe, base: Recipe) -> tuple[str, str]:
    if recipe.queue:
        return (
            f"objective {recipe.objective}",
            "a queue of negatives and a momentum encoder: queue_size, momentum_encoder",
        )
    return f"objective {recipe.objective}", _defaults(recipe, other=base.parameters)


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of text as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def summary_table(summary: dict[str, Any]) -> str:
    """The accuracies of a run, in percent, or what stands for them without labels, beside its untrained backbone's."""
    lines = [
        f"{summary['method']} on {summary['data']}, seed {summary['seed']}, {summary['epochs']} epochs, "
        f"{summary['seconds']} s{_speed(summary)}",
        f"{'top-1 accuracy (%)' if 'knn_top1' in summary else '':<22}{'untrained':>10}{'trained':>10}{'gain':>8}",
    ]
    for name, label in MEASURES.items():
        if name in summary:
            before, after = summary[f"untrained_{name}"], summary[name]
            lines.append(f"{label:<22}{before:>10.2f}{after:>10.2f}{after - before:>+8.2f}")
    last = [f"{name} {summary[name]:.4g}" for name in ("loss", "alignment", "uniformity") if name in summary]
    return "\n".join([*lines, *([f"last epoch: {', '.join(last)}"] if last else [])])


def _speed(summary: dict[str, Any]) -> str:
    """How fast it has trained; nothing where nothing was left to train, or of an earlier version."""
    speed = summary.get("images_per_second")
    return "" if speed is None else f", {speed:,.0f} images/s in training"
