"""What is compared: methods and fixed temperatures, each with every seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dystress_plugin import recipes
from dystress_plugin.experiment.arms import family_of, method_of
from dystress_plugin.experiment.settings import CompareSettings
from dystress_plugin.temperature import DySTreSS


@dataclass(frozen=True)
class Arm:
    """What is compared: a method with settings.

    Attributes:
        name: unique, the first part of the folders of its runs.
        method: name in `recipes.METHODS`.
        kwargs: parameters that differ from the method's own.
    """

    name: str
    method: str
    kwargs: dict[str, Any]

    @property
    def family(self) -> str:
        """The method of the constants that it is compared to."""
        return family_of(self.method)


def plan(settings: CompareSettings) -> list[Arm]:
    """The methods in the order given, then the fixed temperatures that are not among them."""
    arms = [
        Arm(name, recipes.recipe(method_of(name)).name, settings.method_kwargs.get(name, {}))
        for name in settings.methods
    ]
    families = dict.fromkeys(arm.family for arm in arms)
    return [*arms, *(arm for family in families for arm in _constants(family, arms, settings.constants))]


def _constants(family: str, arms: Sequence[Arm], chosen: Sequence[float] | None) -> list[Arm]:
    """The fixed temperatures for the methods of a family; with its objective and layout where simclr has them."""
    own = [arm for arm in arms if arm.family == family]
    taus = list(chosen) if chosen is not None else _range_of(own)
    there = {_parameters(arm)["tau"] for arm in own if arm.method == family}
    prefix = family.replace("simclr", "constant", 1)
    return [Arm(f"{prefix}-{tau:g}", family, {"tau": tau}) for tau in taus if tau not in there]


def _range_of(arms: Sequence[Arm]) -> list[float]:
    """Lowest temperature, midpoint and highest of each method that has a range; else the temperatures they have."""
    spans = [(p["tau_min"], p["tau_max"]) for p in map(_parameters, arms) if "tau_min" in p and "tau_max" in p]
    fixed = [p["tau"] for p in map(_parameters, arms) if "tau" in p]
    if not spans and not fixed:  # temperature-free
        base = DySTreSS()
        spans = [(base.tau_min, base.tau_max)]
    found = [float(f"{tau:.6g}") for low, high in spans for tau in (low, (low + high) / 2, high)]
    return sorted(set(found or fixed))


def _parameters(arm: Arm) -> dict[str, Any]:
    return recipes.recipe(arm.method).parameters | arm.kwargs
