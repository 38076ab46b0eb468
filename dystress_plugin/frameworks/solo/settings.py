"""`method_kwargs`: what a user gave, checked and completed from the table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from dystress_plugin.checks import check_positive, unknown_name
from dystress_plugin.chunks import check_chunks
from dystress_plugin.recipes import METHODS, Recipe

HEAD = ("proj_hidden_dim", "proj_output_dim")  # of the projector, named as solo-learn's SimCLR names them
DIAGNOSTICS = "diagnostics_every_n_steps"  # None or 0 for none; changes nothing about what is trained
TEMPERATURE_LR = "temperature_lr"  # of what a temperature learns; None for a tenth of optimizer.lr
CHUNK = "chunk_size"  # images that are embedded at a time; None for all
# What a method with a queue has beside the temperature and the objective, with solo-learn's own default.
QUEUE: dict[str, Any] = {"queue_size": 65536}


def complete(
    recipe: Recipe, given: Mapping[str, Any], of_others: Callable[[], Mapping[str, str]] = dict
) -> tuple[dict[str, Any], list[str]]:
    """A method's parameters with their defaults filled in, and what the user should know, one line each.

    None stands for the default, and remains where only the data set can tell.

    A config may have been written for another method of solo-learn. Its keys are ignored with a note, but for
    `temperature`, which is tau where the method has one.

    Args:
        recipe: the method.
        given: the user's `method_kwargs`.
        of_others: returns keys of solo-learn's own methods, with the method that has each; only asked where needed.

    Raises:
        ValueError: for a key that no method has (with the nearest that this one has), a missing one, a queue without
            keys, a size of chunks that is no whole number of at least 1, or a rate that is not above 0.
    """
    parameters, notes = parameters_of(recipe), []
    known = [*parameters, *HEAD, DIAGNOSTICS, CHUNK, TEMPERATURE_LR, "temperature"]
    for key in [key for key in given if key not in known]:
        owner = of_others().get(key)
        if owner is None:
            raise ValueError(unknown_name(f"key in method_kwargs of method '{recipe.name}'", str(key), known))
        notes.append(f"method_kwargs.{key}={given[key]} is ignored: it is a setting of solo-learn's {owner}.")
    missing = [key for key in HEAD if given.get(key) is None]
    if missing:
        example = ", ".join(f"method_kwargs.{key}=2048" for key in missing)
        raise ValueError(f"Method '{recipe.name}' needs {example}, or another size of your projector.")

    filled = {key: given[key] for key in HEAD} | {key: given.get(key) for key in (DIAGNOSTICS, CHUNK, TEMPERATURE_LR)}
    check_chunks(filled[CHUNK], name=f"method_kwargs.{CHUNK}")
    if filled[TEMPERATURE_LR] is not None:
        check_positive(f"method_kwargs.{TEMPERATURE_LR}", filled[TEMPERATURE_LR])
    for name, default in parameters.items():
        value = given.get(name)
        filled[name] = (None if default is inspect.Parameter.empty else default) if value is None else value
    keys = filled.get("queue_size", 1)
    if not isinstance(keys, int) or keys < 1:  # solo-learn would fail at it first, without naming it
        raise ValueError(f"method_kwargs.queue_size={keys!r} must be an int of at least 1, such as 65536.")

    temperature = given.get("temperature")
    if "tau" not in parameters:
        if temperature is not None:
            names = ", ".join(parameters)
            notes.append(f"method_kwargs.temperature={temperature} is ignored: method '{recipe.name}' has {names}.")
        temperature = None
    elif given.get("tau") is None and temperature is not None:
        filled["tau"] = temperature
    elif temperature is not None and temperature != filled["tau"]:
        notes.append(f"method_kwargs.temperature={temperature} is ignored beside tau={filled['tau']}.")
    # solo-learn's SimCLR reads the key, so it has to be there.
    filled["temperature"] = filled.get("tau")
    return filled, notes


def parameters_of(recipe: Recipe) -> dict[str, Any]:
    """Parameters of temperature, objective and layout with their defaults."""
    return recipe.parameters | (QUEUE if recipe.queue else {})


def loss_settings(recipe: Recipe, method_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of completed `method_kwargs` that temperature and objective take, lists as tuples."""
    values = ((name, method_kwargs[name]) for name in recipe.parameters)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values}


def label(method: str, given: Mapping[str, Any], seed: int | None) -> str:
    """The seed and what differs from the method's defaults, for the name of a run: `-seed5-tau_max0.3`.

    solo-learn looks for runs to resume by their name, among other things, so two settings must not share one.
    """
    defaults = parameters_of(METHODS[method]) if method in METHODS else {}
    parts = [] if seed is None else [f"seed{seed}"]
    if "tau" in defaults and given.get("temperature") == given.get("tau", defaults["tau"]):
        given = {key: value for key, value in given.items() if key != "temperature"}
    for key in sorted(given):
        value = given[key]
        if key not in (*HEAD, DIAGNOSTICS) and value is not None and value != defaults.get(key):
            text = "_".join(map(str, value)) if not isinstance(value, (str, int, float)) else str(value)
            parts.append(f"{key}{text}")
    return "".join(f"-{part}" for part in parts)
