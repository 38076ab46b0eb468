import dataclasses
import inspect

import pytest
import torch

from dystress_plugin import recipes
from dystress_plugin.objectives import OBJECTIVES
from dystress_plugin.recipes import METHODS
from dystress_plugin.temperature import Constant, CosineSchedule, DySTreSS, Individual, ModelAware, TemperatureFree

PLAIN = {
    "simclr": (Constant, "ntxent", {"tau": 0.1}),
    "dystress": (DySTreSS, "ntxent", {"tau_min": 0.1, "tau_max": 0.2, "profile": "cosine", "detach": True}),
    "macl": (ModelAware, "macl", {"tau": 0.1, "alpha": 0.5, "threshold": 0.0}),
    "ts": (CosineSchedule, "ntxent", {"tau_min": 0.1, "tau_max": 1.0, "period": 400.0}),
    "isogclr": (
        Individual,
        "sogclr",
        {
            "tau_init": 0.1,
            "tau_min": 0.05,
            "tau_max": 1.0,
            "rho": 0.4,
            "gamma": 0.8,
            "beta": 0.5,
            "eta": 0.03,
            "clip": 3.0,
        },
    ),
    "tempfree": (TemperatureFree, "ntxent", {"clamp": 1e-6}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_methods_have_the_papers_temperature_objective_and_values(name):
    temperature, objective, values = PLAIN[name]
    assert METHODS[name].temperature is temperature
    assert METHODS[name].objective == objective
    assert METHODS[name].parameters.items() >= values.items()


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_is_complete(name):
    recipe = METHODS[name]
    assert recipe.name == name
    assert recipe.objective in OBJECTIVES
    assert recipe.title
    assert recipe.paper
    assert recipe.url.startswith("https://arxiv.org/abs/")
    assert recipe.url in recipe.temperature.__doc__
    assert set(recipe.defaults) <= set(inspect.signature(recipe.temperature).parameters)


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_builds_from_its_own_parameters(name):
    parameters = {
        key: 5 if value is inspect.Parameter.empty else value for key, value in METHODS[name].parameters.items()
    }
    built = METHODS[name].build_temperature(**parameters)
    assert repr(built) == repr(METHODS[name].build_temperature(**({"num_samples": 5} if name == "isogclr" else {})))
    assert type(built) is METHODS[name].temperature


def test_defaults_of_a_recipe_stand_unless_they_are_set():
    recipe = dataclasses.replace(METHODS["dystress"], defaults={"tau_min": 0.07, "profile": "linear"})
    assert repr(recipe.build_temperature()) == repr(DySTreSS(0.07, 0.2, "linear"))
    assert repr(recipe.build_temperature(tau_min=0.08)) == repr(DySTreSS(0.08, 0.2, "linear"))
    assert recipe.parameters["profile"] == "linear"
    assert recipe.parameters["tau_max"] == 0.2


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        METHODS["dystress"].objective = "macl"


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        (
            "dystress",
            {"tau_mni": 0.1},
            ValueError,
            "Unknown parameter of method 'dystress' 'tau_mni'. Did you mean 'tau_min'",
        ),
        (
            "macl",
            {"A_0": 0.1},
            ValueError,
            "Unknown parameter of method 'macl' 'A_0'.*Choose from: tau, alpha, threshold",
        ),
        ("isogclr", {}, TypeError, "Method 'isogclr' needs num_samples="),
        ("isogclr", {"num_samples": None}, TypeError, "Method 'isogclr' needs num_samples="),
        ("ts", {"period": -1}, ValueError, "period=-1.0 must be above 0"),
    ],
)
def test_bad_settings_raise_and_name_the_nearest(name, settings, error, message):
    with pytest.raises(error, match=message):
        METHODS[name].build_temperature(**settings)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("dystres", "dystress"),
        ("DySTreSS", "dystress"),
        ("iSogCLR", "isogclr"),
        ("temp_free", "tempfree"),
        ("mcl", "macl"),
    ],
)
def test_unknown_method_raises_and_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"Unknown method '{name}'. Did you mean '{nearest}'\\? Choose from: simclr, "):
        recipes.recipe(name)


def test_a_method_like_no_other_gets_no_guess():
    with pytest.raises(ValueError, match=r"Unknown method 'qqq'\. Choose from"):
        recipes.recipe("qqq")


def test_every_build_is_a_new_temperature():
    first, second = (METHODS["isogclr"].build_temperature(num_samples=3) for _ in range(2))
    first.tau[0] = 0.5
    assert torch.equal(second.tau, torch.full((3,), 0.1, dtype=torch.float64))
