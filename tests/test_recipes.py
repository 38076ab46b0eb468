import dataclasses
import inspect

import pytest
import torch

from dystress_plugin import ContrastiveLoss, recipes
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


def test_methods_are_those_of_the_contract():
    """Each but isogclr also with one suffix, for the objective or for the queue."""
    suffixed = [f"{name}_{suffix}" for name in PLAIN if name != "isogclr" for suffix in ("dcl", "dclw", "moco")]
    assert set(METHODS) == {*PLAIN, *suffixed}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PLAIN])
def test_a_suffix_changes_the_objective_or_the_layout_and_nothing_else(name):
    base, suffix = METHODS[name.rsplit("_", 1)[0]], name.rsplit("_", 1)[1]
    changed = {"queue": True} if suffix == "moco" else {"objective": suffix}
    title = f"{base.title} {'MoCo' if suffix == 'moco' else suffix.upper()}"
    assert METHODS[name] == dataclasses.replace(base, name=name, title=title, **changed)
    assert not base.queue


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
    queue_size = (8, 3) if METHODS[name].queue else None
    needed = {"num_samples": 5} if name == "isogclr" else {}
    built, plain = (ContrastiveLoss(name, queue_size=queue_size, **own) for own in (parameters, needed))
    assert repr(built) == repr(plain)
    assert type(built.temperature) is METHODS[name].temperature
    assert built.objective == METHODS[name].objective


def test_parameters_of_the_objective_stand_beside_those_of_the_temperature():
    assert METHODS["dystress_dclw"].parameters == {**METHODS["dystress"].parameters, "sigma": 0.5}
    assert METHODS["dystress_dcl"].parameters == METHODS["dystress"].parameters
    assert ContrastiveLoss("dystress_dclw", sigma=0.3, tau_max=0.19).objective_settings == {"sigma": 0.3}


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
