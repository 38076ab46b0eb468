"""THE table: method name -> temperature, objective, queue, defaults, paper. Every framework reads it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dystress_plugin.errors import unknown_name
from dystress_plugin.objectives import OBJECTIVES
from dystress_plugin.temperature import (
    Constant,
    CosineSchedule,
    DySTreSS,
    Individual,
    ModelAware,
    Temperature,
    TemperatureFree,
)

TABLE = "num_samples"  # by contract the parameter of every temperature that keeps a table of samples


@dataclass(frozen=True)
class Recipe:
    """A method: one point of the grid temperature x objective x layout.

    Attributes:
        name: what a user types.
        title: what a figure shows.
        temperature: class of the temperature.
        objective: name in `dystress_plugin.objectives.OBJECTIVES`.
        paper: title or short name, with year.
        url: where to read it.
        defaults: values of the temperature's parameters where they differ from the class's own.
        queue: anchors, momentum keys and a queue of negatives (MoCo) instead of the views of a batch.
    """

    name: str
    title: str
    temperature: type[Temperature]
    objective: str
    paper: str
    url: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    queue: bool = False

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of temperature and objective with their defaults; `inspect.Parameter.empty` where one has none."""
        signature = inspect.signature(self.temperature).parameters
        own = {name: self.defaults.get(name, parameter.default) for name, parameter in signature.items()}
        return own | dict(OBJECTIVES[self.objective].parameters)

    @property
    def keeps_table(self) -> bool:
        """Whether its temperature keeps a table of samples; the parameter `num_samples` is then its length."""
        return TABLE in inspect.signature(self.temperature).parameters

    @property
    def choices(self) -> dict[str, Any]:
        """The parameters that are a matter of choice: all but the length of a table, which the data decide."""
        return {name: default for name, default in self.parameters.items() if name != TABLE}

    def table_length(self, settings: Mapping[str, Any]) -> int | None:
        """The length of its table according to the settings; None if they leave it open, or it keeps none."""
        return settings.get(TABLE) if self.keeps_table else None

    def sized(self, settings: Mapping[str, Any], num_samples: int = 1) -> dict[str, Any]:
        """The settings with the length of the table, where it keeps one and they leave it open.

        Args:
            settings: parameters of the method.
            num_samples: length of the table; 1 for hosts that learn it later, see `Temperature.resize`.
        """
        opened = self.keeps_table and settings.get(TABLE) is None
        return {**settings, TABLE: num_samples} if opened else dict(settings)

    def check_names(self, settings: Iterable[str]) -> None:
        """A ValueError at a parameter that the method does not have, with the nearest that it has."""
        self._check_names(settings, self.parameters)

    def _check_names(self, settings: Iterable[str], known: Collection[str]) -> None:
        for name in settings:
            if name not in known:
                raise ValueError(unknown_name(f"parameter of method '{self.name}'", name, known or ["(none)"]))

    def build_temperature(self, **settings: Any) -> Temperature:
        """The temperature with some of its parameters set.

        Raises:
            ValueError: at a parameter that it does not have (with the nearest that it has), or a bad value.
            TypeError: if a parameter without default is missing.
        """
        parameters = {n: v for n, v in self.parameters.items() if n not in OBJECTIVES[self.objective].parameters}
        self._check_names(settings, parameters)
        missing = [n for n, v in parameters.items() if v is inspect.Parameter.empty and settings.get(n) is None]
        if missing:
            raise TypeError(f"Method '{self.name}' needs {', '.join(f'{n}=...' for n in missing)}.")
        return self.temperature(**{**self.defaults, **settings})


def _variants(base: Recipe) -> list[Recipe]:
    """The method itself, with DCL's two objectives, and with a queue of negatives."""
    return [
        base,
        replace(base, name=f"{base.name}_dcl", title=f"{base.title} DCL", objective="dcl"),
        replace(base, name=f"{base.name}_dclw", title=f"{base.title} DCLW", objective="dclw"),
        replace(base, name=f"{base.name}_moco", title=f"{base.title} MoCo", queue=True),
    ]


_BASES = (
    Recipe("simclr", "SimCLR", Constant, "ntxent", "SimCLR, 2020", "https://arxiv.org/abs/2002.05709"),
    Recipe("dystress", "DySTreSS", DySTreSS, "ntxent", "DySTreSS, 2023", "https://arxiv.org/abs/2308.01140"),
    Recipe("macl", "MACL", ModelAware, "macl", "MACL, 2023", "https://arxiv.org/abs/2207.07874"),
    Recipe("ts", "TS", CosineSchedule, "ntxent", "Temperature Schedules, 2023", "https://arxiv.org/abs/2303.13664"),
    Recipe(
        "tempfree",
        "Temperature-Free",
        TemperatureFree,
        "ntxent",
        "Temperature-Free Loss, 2025",
        "https://arxiv.org/abs/2501.17683",
    ),
)
# Its objective is its own, and its published form has no queue.
_ISOGCLR = Recipe("isogclr", "iSogCLR", Individual, "sogclr", "iSogCLR, 2023", "https://arxiv.org/abs/2305.11965")

METHODS: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (*_BASES, _ISOGCLR, *(v for base in _BASES for v in _variants(base)[1:]))
}


def recipe(name: str) -> Recipe:
    """The recipe of that name, or a ValueError with the nearest valid one."""
    if name not in METHODS:
        raise ValueError(unknown_name("method", name, METHODS))
    return METHODS[name]
