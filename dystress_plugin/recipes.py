"""THE table: method name -> temperature, objective, queue, defaults, paper. Every framework reads it.

Other packages add to it: `register` says how.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

from dystress_plugin.checks import unknown_name
from dystress_plugin.errors import first_line
from dystress_plugin.objectives import OBJECTIVES
from dystress_plugin.temperature import (
    Constant,
    CosineSchedule,
    DySTreSS,
    Individual,
    Learnable,
    ModelAware,
    RobustGlobal,
    Temperature,
    TemperatureFree,
    TempNet,
)

# By contract the parameter of every temperature that keeps a table of samples, or has a network for embeddings.
TABLE, DIM = "num_samples", "dim"


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
        both_ways: more such values, for two sides: `ContrastiveLoss(name, layout="both_ways")`.
    """

    name: str
    title: str
    temperature: type[Temperature]
    objective: str
    paper: str
    url: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    queue: bool = False
    both_ways: Mapping[str, Any] = field(default_factory=dict)

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
        """The parameters that are a matter of choice: all but the lengths of a table and of embeddings, see `sized`."""
        return {name: default for name, default in self.parameters.items() if name not in (TABLE, DIM)}

    def table_length(self, settings: Mapping[str, Any]) -> int | None:
        """The length of its table according to the settings; None if they leave it open, or it keeps none."""
        return settings.get(TABLE) if self.keeps_table else None

    def sized(self, settings: Mapping[str, Any], num_samples: int = 1, dim: int = 128) -> dict[str, Any]:
        """The settings with the lengths of the table and of embeddings, where it has them and they leave them open.

        Args:
            settings: parameters of the method.
            num_samples: length of the table; 1 for hosts that learn it later, see `Temperature.resize`.
            dim: numbers in an embedding.
        """
        own = inspect.signature(self.temperature).parameters
        lengths = {TABLE: num_samples, DIM: dim}
        opened = {name: n for name, n in lengths.items() if name in own and settings.get(name) is None}
        return {**settings, **opened}

    def check_names(self, settings: Iterable[str], known: Collection[str] | None = None) -> None:
        """A ValueError at a parameter that the method, or what is `known` of it, does not have, with the nearest."""
        known = self.parameters if known is None else known
        for name in settings:
            if name not in known:
                raise ValueError(unknown_name(f"parameter of method '{self.name}'", name, known or ["(none)"]))

    def build_temperatures(self, layout: str, settings: Mapping[str, Any]) -> tuple[Temperature, ...]:
        """The temperature for a layout; one for each side of "both_ways" where it keeps a state per side.

        The length of a table may then be a pair.
        """
        if layout != "both_ways":
            return (self.build_temperature(**settings),)
        settings = {**self.both_ways, **settings}
        if not self.temperature.per_side:
            return (self.build_temperature(**settings),)
        given = settings.get(TABLE)
        lengths = given if isinstance(given, (tuple, list)) and len(given) == 2 else (given, given)
        of_sides = [{TABLE: length} if TABLE in settings else {} for length in lengths]
        return tuple(self.build_temperature(**settings | own) for own in of_sides)

    def build_temperature(self, **settings: Any) -> Temperature:
        """The temperature with some of its parameters set.

        Raises:
            ValueError: at a parameter that it does not have (with the nearest that it has), or a bad value.
            TypeError: if a parameter without default is missing.
        """
        parameters = {n: v for n, v in self.parameters.items() if n not in OBJECTIVES[self.objective].parameters}
        self.check_names(settings, parameters)
        missing = [n for n, v in parameters.items() if v is inspect.Parameter.empty and settings.get(n) is None]
        if missing:
            raise TypeError(f"Method '{self.name}' needs {', '.join(f'{n}=...' for n in missing)}.")
        return self.temperature(**{**self.defaults, **settings})


def _variants(base: Recipe) -> list[Recipe]:
    """The method itself, with DCL's two objectives, with SimCo's, and with a queue of negatives."""
    return [
        base,
        replace(base, name=f"{base.name}_dcl", title=f"{base.title} DCL", objective="dcl"),
        replace(base, name=f"{base.name}_dclw", title=f"{base.title} DCLW", objective="dclw"),
        replace(base, name=f"{base.name}_dual", title=f"{base.title} Dual", objective="dual"),
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
_CLIP = Recipe("clip", "CLIP", Learnable, "ntxent", "CLIP, 2021", "https://arxiv.org/abs/2103.00020")
_FASTCLIP = Recipe("fastclip", "FastCLIP", RobustGlobal, "gcl", "FastCLIP, 2024", "https://arxiv.org/abs/2407.01445")
_TEMPNET = Recipe("tempnet", "TempNet", TempNet, "sogclr", "TempNet, 2024", "https://arxiv.org/abs/2404.04575")
# Its objective is its own, and its published form has no queue; the same holds for FastCLIP and TempNet.
_ISOGCLR = Recipe(
    "isogclr",
    "iSogCLR",
    Individual,
    "sogclr",
    "iSogCLR, 2023",
    "https://arxiv.org/abs/2305.11965",
    both_ways={"tau_init": 0.01, "tau_min": 0.005, "rho": 6.0, "beta": 0.9, "clip": 5.0},
)

# What `simclr_dual` would be.
_SIMCO = Recipe("simco", "SimCo", Constant, "dual", "SimCo, 2022", "https://arxiv.org/abs/2203.17248")
_TEMO = Recipe(
    "temo",
    "TeMo",
    DySTreSS,
    "ntxent",
    "TeMo, 2025",
    "https://openreview.net/forum?id=rIv5ftmR3v",
    defaults={"tau_min": 0.01, "tau_max": 0.05, "profile": "root", "detach": False},
)
# What TeMo's code compares itself with: the ranges of DySTreSS' paper are those of images alone.
_DYSTRESS_CLIP = Recipe(
    "dystress_clip",
    "DySTreSS CLIP",
    DySTreSS,
    "ntxent",
    "DySTreSS, 2023",
    "https://arxiv.org/abs/2308.01140",
    defaults={"tau_min": 0.01, "tau_max": 0.04},
)

GROUP = "dystress_plugin.methods"

METHODS: dict[str, Recipe]  # `__getattr__` has it
_TABLE = {recipe.name: recipe for recipe in (*_BASES, _ISOGCLR, _CLIP, _FASTCLIP, _TEMPNET, _TEMO, _SIMCO)}
_TABLE |= {recipe.name: recipe for base in (*_BASES, _CLIP) for recipe in _variants(base)[1:]}
del _TABLE["simclr_dual"]
_TABLE[_DYSTRESS_CLIP.name] = _DYSTRESS_CLIP
_BY = dict.fromkeys(_TABLE, "dystress_plugin")
_FOLLOWERS: list[Callable[[Recipe], None]] = []


def __getattr__(name: str) -> Any:
    if name == "METHODS":
        return _methods()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _methods() -> dict[str, Recipe]:
    """The table, with what installed packages add to it.

    They are asked when it is read first: `import dystress_plugin` stays quick, and they find it whole.
    """
    if "METHODS" not in globals():
        globals()["METHODS"] = _TABLE  # before the packages, which may read it
        for point in metadata.entry_points(group=GROUP):
            _load(point)
    return _TABLE


def recipe(name: str) -> Recipe:
    """The recipe of that name, or a ValueError with the nearest valid one."""
    if name not in _methods():
        raise ValueError(unknown_name("method", name, _methods()))
    return _methods()[name]


def class_name(recipe: Recipe) -> str:
    """The title of a method as the name of a class."""
    return "".join(letter for letter in recipe.title if letter.isalnum())


def follow(function: Callable[[Recipe], None]) -> None:
    """Calls `function` with every recipe of the table, and from then on with each that is registered."""
    for known in list(_methods().values()):
        function(known)
    _FOLLOWERS.append(function)


def register(recipe: Recipe, *, variants: bool = False) -> Recipe:
    """Makes a method of one's own `method=name` in every host, as those of the table are.

    1. Write the temperature, a subclass of `dystress_plugin.temperature.Temperature`, in a module of your package. Its
       `prepare(batch)` returns `LogitMaps`; their maps are mostly `Scaled(tau)`, tau a number or a (rows, 1) tensor.
       State goes into buffers or parameters and moves in `update` alone; where ranks learn of images of their own,
       from those of all, `dystress_plugin.distributed.all_rows`. The constructor names its parameters, with defaults;
       the length of a table of samples is `num_samples`, that of embeddings `dim`, and they have none.
    2. Let a test of yours call `dystress_plugin.testing.check_temperature(YourTemperature())`.
    3. Describe the method, in the same module:

           RECIPE = Recipe("yours", "Yours", YourTemperature, "ntxent", "Paper, 2026", "https://...")

    4. Name it in your package's pyproject.toml, and install the package:

           [project.entry-points."dystress_plugin.methods"]
           yours = "your_module:RECIPE"

       The value is a recipe, several of them, or a function that returns either.
    5. `dystress methods` lists it, and `method=yours` trains: in `dystress pretrain`, in solo-learn's own scripts, in
       lightly's benchmark, in LightlyTrain, and as `ContrastiveLoss("yours")`.

    Where there is no package to install, in a notebook or a script, call `register(RECIPE)` instead of step 4: in every
    process, those that a launcher or data loader starts too, and before solo-learn's `main` runs. Adapters that are
    imported already take it in.

    Args:
        recipe: the method.
        variants: whether to register `..._dcl`, `..._dclw`, `..._dual` and `..._moco` too, as far as they differ.

    Returns:
        The recipe.

    Raises:
        ValueError: for a name or title that is taken, or a recipe that no host could train.
        TypeError: for what is no recipe, or a temperature that is no subclass of `Temperature`.
    """
    _add(recipe, by=sys._getframe(1).f_globals.get("__name__", "?"), variants=variants)
    return recipe


def _load(point: metadata.EntryPoint) -> None:
    """Adds what an installed package offers; a fault of its own is a warning, as it must not stop other methods."""
    package = point.dist.name if point.dist else point.value
    try:
        for offered in _recipes(point.load()):
            if _TABLE.get(offered.name) != offered:  # else its module has registered it already
                _add(offered, by=package)
    except Exception as error:  # whatever its code may raise
        warnings.warn(
            f"Package '{package}' cannot add its method '{point.name}', {point.value}: {type(error).__name__}: "
            f"{first_line(error)}",
            stacklevel=4,
        )


def _recipes(value: Any) -> Iterator[Recipe]:
    """The recipes in what an entry point names."""
    value = value if isinstance(value, (Recipe, Iterable)) or not callable(value) else value()
    for found in value if isinstance(value, Iterable) and not isinstance(value, str) else [value]:
        yield _typed(found)


def _add(recipe: Recipe, *, by: str, variants: bool = False) -> None:
    _check(recipe)
    added = [recipe]
    if variants:
        points = {(recipe.objective, recipe.queue)}
        added += [v for v in _variants(recipe)[1:] if (v.objective, v.queue) not in points]
    for new in added:  # all, before the first is added
        _check_free(new)
    for new in added:
        _TABLE[new.name] = new
        _BY[new.name] = by
        for function in _FOLLOWERS:
            function(new)


def _typed(recipe: Any) -> Recipe:
    if not isinstance(recipe, Recipe):
        raise TypeError(f"{recipe!r} must be a dystress_plugin.recipes.Recipe, not {type(recipe).__name__}.")
    return recipe


def _check(recipe: Recipe) -> None:
    """An error unless every host can train it."""
    name, kind = _typed(recipe).name, recipe.temperature
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name={name!r} must be of letters, digits and underscores: it is typed as method=name.")
    if not (isinstance(recipe.title, str) and class_name(recipe).isidentifier()):
        raise ValueError(f"title={recipe.title!r} must have letters first: classes of method '{name}' are called so.")
    if not (isinstance(kind, type) and issubclass(kind, Temperature)):
        raise TypeError(f"Method '{name}' has temperature={kind!r}, which must be a subclass of Temperature.")
    if inspect.isabstract(kind):
        lacks = ", ".join(sorted(kind.__abstractmethods__))
        raise TypeError(f"Method '{name}' has temperature={kind.__name__}, which lacks {lacks}.")
    if recipe.objective not in OBJECTIVES:
        raise ValueError(unknown_name(f"objective of method '{name}'", recipe.objective, OBJECTIVES))
    signature = inspect.signature(kind).parameters
    for parameter in signature.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(
                f"{kind.__name__} takes {parameter.name}, and hosts set its parameters by name: give it an __init__ "
                "that spells them out."
            )
    for objective in OBJECTIVES.values():  # of any, as users may choose another
        if shared := set(signature) & set(objective.parameters):
            raise ValueError(f"{kind.__name__}'s parameter '{min(shared)}' is an objective's: give it another name.")
    for default in recipe.defaults:
        if default not in signature:
            raise ValueError(unknown_name(f"parameter of {kind.__name__}", default, signature or ["(none)"]))


def _check_free(recipe: Recipe) -> None:
    for taken in _TABLE.values():
        if taken.name == recipe.name:
            raise ValueError(f"Method '{recipe.name}' is there already, by {_BY[taken.name]}: choose another name.")
        if class_name(taken) == class_name(recipe):
            raise ValueError(
                f"title='{recipe.title}' of method '{recipe.name}' is that of '{taken.name}', by {_BY[taken.name]}: "
                "choose another, as classes are called so."
            )
