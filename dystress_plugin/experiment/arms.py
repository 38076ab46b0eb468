"""Arms: what the names of `methods=[...]` mean, methods with settings of their own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from dystress_plugin import recipes
from dystress_plugin.checks import unknown_name
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.objectives import OBJECTIVES
from dystress_plugin.temperature import Constant


def method_of(arm: str) -> str:
    """Of `NAME` or `NAME-WORD`."""
    return arm.partition("-")[0]


def family_of(method: str) -> str:
    """The method with a fixed temperature and the same word behind the underscore, such as simclr_moco; else simclr."""
    named = "_".join(["simclr", *method.split("_")[1:]])
    return named if named in recipes.METHODS else "simclr"


def is_constant(method: str) -> bool:
    """Whether a method is a fixed temperature and nothing else: SimCo's is fixed as well."""
    return recipes.recipe(method).temperature is Constant and family_of(method) == method


def check_family(method: str) -> None:
    """A ValueError for what is no method of a fixed temperature."""
    constants = [name for name in recipes.METHODS if is_constant(name)]
    if method not in constants:
        raise ValueError(unknown_name("family", method, constants))


def loss_in_batch(method: str, settings: Mapping[str, Any], *lengths: int) -> ContrastiveLoss:
    """Of a method, with or without a queue, for the negatives of a batch.

    Args:
        method: its name.
        settings: parameters of its temperature and objective.
        *lengths: of a table and of embeddings, where the settings leave them open, see `Recipe.sized`.
    """
    recipe = recipes.recipe(method)
    objective = {name: settings[name] for name in OBJECTIVES[recipe.objective].parameters if name in settings}
    own = {name: value for name, value in recipe.sized(settings, *lengths).items() if name not in objective}
    return ContrastiveLoss(recipe.build_temperature(**own), objective=recipe.objective, **objective)


def check(methods: Sequence[str], method_kwargs: Mapping[str, Mapping[str, Any]]) -> None:
    """An error for a method that is not there, or a parameter that it does not have or that cannot have its value."""
    for arm in methods:
        recipe = recipes.recipe(method_of(arm))
        own = method_kwargs.get(arm, {})
        recipe.check_names(own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which the one that is trained with will give
            # The length of a table is checked where the data are known.
            loss_in_batch(recipe.name, {name: own[name] for name in recipe.choices if name in own})
