"""How every figure looks: matplotlib's settings, and colours that mean one thing each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dystress_plugin import recipes
from dystress_plugin.temperature import Constant

# Pairs; no method has a colour close to theirs.
POSITIVE, NEGATIVE = "#1b9e77", "#d95f02"

# Methods, in the order in which the table has their temperatures; all are seen on white and on black.
COLORS = (
    "#2f8fd6",
    "#d6456b",
    "#9a5fd0",
    "#a08a18",
    "#79b52e",
    "#a8684a",
    "#3f4be8",
    "#e05ce0",
    "#3a5978",
    "#a11289",
)

# Histograms that lie on each other; as two transparent ones they would be of a third colour.
SOLID: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.35}
OUTLINE: dict[str, Any] = {"histtype": "step", "linewidth": 1.6}

GREY = "#8a8a8a"  # fixed temperatures, what others are compared with, and an untrained network

DASHES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))

MARKERS = ("o", "v", "^", "s", "D")

COMMON: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}

PNG: dict[str, Any] = COMMON | {"font.size": 10, "savefig.dpi": 150}


def method_color(method: str) -> str:
    """The colour of a method in every figure: that of its temperature, whatever the objective and the layout."""
    own = recipes.recipe(method).temperature
    if own is Constant:
        return GREY
    adaptive = dict.fromkeys(each.temperature for each in recipes.METHODS.values() if each.temperature is not Constant)
    return COLORS[list(adaptive).index(own) % len(COLORS)]


@dataclass(frozen=True)
class Style:
    """How an arm is drawn everywhere: `line` where it is a line, `marker` where it is points."""

    title: str
    color: str
    line: Any
    marker: str

    @property
    def of_line(self) -> dict[str, Any]:
        """For `Axes.plot`."""
        return {"color": self.color, "linestyle": self.line, "linewidth": 1.6}


def styles(methods: Mapping[str, str], titles: Mapping[str, str]) -> dict[str, Style]:
    """Of arms with these methods and titles: in their colours, apart by lines and markers; no grey line is solid."""
    found: dict[str, Style] = {}
    for name, method in methods.items():
        color = method_color(method)
        same = sum(style.color == color for style in found.values())
        number = 1 + same % 4 if color == GREY else same % 5
        found[name] = Style(titles[name], color, DASHES[number], MARKERS[number])
    return found
