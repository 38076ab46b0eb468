"""How every figure looks: matplotlib's settings, and colours that mean one thing each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dystress_plugin import recipes
from dystress_plugin.experiment.arms import is_constant
from dystress_plugin.temperature import Constant

# Pairs; no method has a colour close to theirs.
POSITIVE, NEGATIVE = "#1b9e77", "#d95f02"

# Methods, in the order in which the table has them; all are seen on white and on black.
COLORS = (
    "#2f8fd6",
    "#d6456b",
    "#9a5fd0",
    "#a08a18",
    "#79b52e",
    "#a8684a",
    "#3f4be8",
    "#e05ce0",
    "#a11289",
    "#3a5978",
)

# Histograms that lie on each other; as two transparent ones they would be of a third colour.
SOLID: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.35}
OUTLINE: dict[str, Any] = {"histtype": "step", "linewidth": 1.6}

GREY = "#8a8a8a"  # fixed temperatures, what others are compared with, and an untrained network

# What tells arms of one colour apart, as many of each.
DASHES: tuple[Any, ...] = (
    *("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (9, 3)), (0, (1, 4)), (0, (9, 2, 3, 2))),
    *((0, (3, 1, 3, 4)), (0, (1, 1, 1, 1, 6, 2))),
)
MARKERS = ("o", "v", "^", "s", "D", "P", "<", ">", "p", "*")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "|||", "---", "OO")

COMMON: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.handlelength": 3.2,  # or it would not show the longest dashes
}

PNG: dict[str, Any] = COMMON | {"font.size": 10, "savefig.dpi": 150}


def method_color(method: str) -> str:
    """The colour of a method in every figure: that of its temperature, whatever the objective and the layout.

    Where the temperature is fixed it is the objective's, and grey where that is a constant's own.
    """
    if is_constant(method):
        return GREY
    kinds = dict.fromkeys(_kind(other) for name, other in recipes.METHODS.items() if not is_constant(name))
    return COLORS[list(kinds).index(_kind(recipes.recipe(method))) % len(COLORS)]


def _kind(recipe: recipes.Recipe) -> object:
    return recipe.objective if recipe.temperature is Constant else recipe.temperature


@dataclass(frozen=True)
class Style:
    """How an arm is drawn everywhere: `line` where it is a line, `marker` where it is points, `hatch` where a bar."""

    title: str
    color: str
    line: Any
    marker: str
    hatch: str = ""

    @property
    def of_line(self) -> dict[str, Any]:
        """For `Axes.plot`."""
        return {"color": self.color, "linestyle": self.line, "linewidth": 1.6}


def styles(methods: Mapping[str, str], titles: Mapping[str, str]) -> dict[str, Style]:
    """Of arms with these methods and titles: in their colours, apart by lines, markers and hatches of bars.

    No grey line is solid.
    """
    found: dict[str, Style] = {}
    for name, method in methods.items():
        color = method_color(method)
        same = sum(style.color == color for style in found.values())
        number = 1 + same % (len(DASHES) - 1) if color == GREY else same % len(DASHES)
        found[name] = Style(titles[name], color, DASHES[number], MARKERS[number], HATCHES[same % len(HATCHES)])
    return found
