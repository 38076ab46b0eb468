"""Draws the pictures of docs/images, each for a light and for a dark page:

    python scripts/site/diagrams.py

The curves are the package's own maps; only the two pictures of boxes are drawn by hand. A second run writes the same
files to the byte.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from dystress_plugin import temperature
from dystress_plugin.experiment.style import method_color
from dystress_plugin.temperature import Batch, Temperature

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "images"
INK = {"light": "#1f2430", "dark": "#e6e8ef"}
PALE = {"light": "#e8eaf6", "dark": "#303650"}
SIZE = {"profiles": (10.4, 4.6), "grid": (9.6, 3.6), "layers": (9.6, 4.4)}

COSINES = torch.linspace(-1, 1, 401, dtype=torch.float64)
ALIGNED, EPOCH = 0.6, 100.0  # a batch in the middle of a training, for what depends on it
SHOWN: list[tuple[str, str, Temperature, Any]] = [
    ("constant 0.1", "simclr", temperature.Constant(), "-"),
    ("DySTreSS", "dystress", temperature.DySTreSS(), "-"),
    ("DySTreSS, shifted", "dystress", temperature.DySTreSS(profile="shifted"), "--"),
    ("DySTreSS, constant above -0.2", "dystress", temperature.DySTreSS(profile="cosine_constant"), "-."),
    ("DySTreSS, exponential", "dystress", temperature.DySTreSS(profile="exponential"), ":"),
    ("DySTreSS, linear", "dystress", temperature.DySTreSS(profile="linear"), (0, (6, 2, 1, 2, 1, 2))),
    ("DySTreSS, root (TeMo)", "dystress", temperature.DySTreSS(profile="root"), (0, (1, 1))),
    (f"MACL, aligned to {ALIGNED}", "macl", temperature.ModelAware(), "-"),
    ("TS, a quarter of the cycle", "ts", temperature.CosineSchedule(), "-"),
    ("temperature-free", "tempfree", temperature.TemperatureFree(), "-"),
    ("CLIP and FastCLIP at their start", "clip", temperature.Learnable(), "-"),
    ("iSogCLR at its start", "isogclr", temperature.Individual(4), (0, (1, 3))),
]


def profiles(_: str) -> None:
    """Temperature and logit over the cosine of a pair."""
    left, right = plt.gcf().subplots(1, 2)
    batch = Batch(torch.full((2, 1), ALIGNED, dtype=torch.float64), torch.arange(2), EPOCH, 2, torch.mean)
    with torch.no_grad():
        for label, method, shown, line in SHOWN:
            map_ = shown.prepare(batch).negative
            style: dict[str, Any] = {"color": method_color(method), "linestyle": line}
            left.plot(COSINES, map_.temperature(COSINES.expand(2, -1))[0], label=label, **style)
            right.plot(COSINES, map_.logit(COSINES.expand(2, -1))[0], **style)
    left.set(yscale="log", ylim=(0.04, 1), xlabel="cosine of the pair", title="temperature")
    left.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"], minor=False)
    left.minorticks_off()
    right.set(ylim=(-15, 15), xlabel="cosine of the pair", title="logit")
    plt.gcf().legend(loc="outside right center", frameon=False)


def grid(mode: str) -> None:
    """The three axes, side by side."""
    axes = {
        "temperature": ["constant", "per pair (DySTreSS)", "per batch (MACL)", "per epoch (TS)", "per image (iSogCLR)",
                        "per anchor (TempNet)", "learned (CLIP, FastCLIP)", "none (temperature-free)"],
        "objective": ["NT-Xent", "MACL", "DCL", "DCLW", "SogCLR", "GCL", "dual (SimCo)"],
        "layout": ["views of a batch (SimCLR)", "views of a class (SupCon)", "a queue of keys (MoCo)",
                   "one way (SimCSE)", "both ways (CLIP)"],
    }  # fmt: skip
    ax = bare(9.6, 3.6)
    for number, (name, values) in enumerate(axes.items()):
        x = 0.1 + 3.3 * number
        box(ax, x, 0.15, 2.8, 3.3, PALE[mode])
        ax.text(x + 1.4, 3.16, name, ha="center", va="center", fontsize=13, fontweight="bold")
        for row, value in enumerate(values):
            ax.text(x + 0.2, 2.72 - 0.32 * row, value, va="center", fontsize=10.5)
        if number:
            ax.text(x - 0.25, 1.8, "×", ha="center", va="center", fontsize=22)


def layers(mode: str) -> None:
    """The floors that lint-imports checks, read from the page that names them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    floors = re.findall(r"^\d  (.+)$", page, re.MULTILINE)
    ax = bare(9.6, 4.4)
    height = 4.2 / len(floors)
    for number, floor in enumerate(floors):
        y = 4.3 - height * (number + 1)
        rooms = floor.split()
        width = 8.6 / len(rooms)
        ax.text(0.25, y + height / 2, str(len(floors) - number), ha="center", va="center", fontsize=12)
        for place, room in enumerate(rooms):
            box(ax, 0.6 + width * place, y + 0.05, width - 0.1, height - 0.1, PALE[mode])
            ax.text(0.55 + width * (place + 0.5), y + height / 2, room, ha="center", va="center", fontsize=9.5)


def bare(width: float, height: float) -> Axes:
    ax = plt.gcf().add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return ax


def box(ax: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    shape = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, edgecolor="none"))


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for mode, ink in INK.items():
        style = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
        fixed = {
            "svg.hashsalt": "dystress_plugin",
            "svg.fonttype": "path",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
        with mpl.rc_context({**style, **fixed, "axes.titlesize": 11}):
            for draw in (profiles, grid, layers):
                plt.figure(figsize=SIZE[draw.__name__], layout="constrained" if draw is profiles else "none")
                draw(mode)
                path = OUT / f"{draw.__name__}-{mode}.svg"
                plt.savefig(path, transparent=True, metadata={"Date": None})
                plt.close()
                path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


if __name__ == "__main__":
    main()
