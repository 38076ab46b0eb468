import dataclasses
import inspect
import os
import subprocess
import sys

import pytest
import torch

from dystress_plugin import ContrastiveLoss, recipes
from dystress_plugin.objectives import OBJECTIVES
from dystress_plugin.recipes import METHODS
from dystress_plugin.temperature import (
    Constant,
    CosineSchedule,
    DySTreSS,
    Individual,
    Learnable,
    LogitMaps,
    ModelAware,
    RobustGlobal,
    Scaled,
    Temperature,
    TemperatureFree,
    TempNet,
)

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
    "clip": (Learnable, "ntxent", {"tau": 0.07, "tau_min": 0.01}),
    "fastclip": (RobustGlobal, "gcl", {"tau": 0.07, "rho": None, "gamma": 1.0, "tau_min": 0.01, "released": False}),
    "tempnet": (TempNet, "sogclr", {"rho": None, "gamma": 1.0, "tau_min": 0.005, "tau_max": 0.05}),
    "simco": (Constant, "dual", {"tau": 0.1, "ratio": 10.0}),
    "temo": (DySTreSS, "ntxent", {"tau_min": 0.01, "tau_max": 0.05, "profile": "root", "detach": False}),
    "dystress_clip": (DySTreSS, "ntxent", {"tau_min": 0.01, "tau_max": 0.04, "profile": "cosine", "detach": True}),
}
ALONE = {"simco", "isogclr", "fastclip", "tempnet", "temo", "dystress_clip"}  # without suffix


@pytest.mark.parametrize("name", PLAIN)
def test_plain_methods_have_the_papers_temperature_objective_and_values(name):
    temperature, objective, values = PLAIN[name]
    assert METHODS[name].temperature is temperature
    assert METHODS[name].objective == objective
    assert METHODS[name].parameters.items() >= values.items()


def test_methods_are_those_of_the_contract():
    """Each but those with an objective of their own also with one suffix, for the objective or for the queue."""
    suffixed = [f"{name}_{suffix}" for name in PLAIN if name not in ALONE for suffix in ("dcl", "dclw", "dual", "moco")]
    suffixed.remove("simclr_dual")  # which is "simco"
    assert set(METHODS) == {*PLAIN, *suffixed}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PLAIN])
def test_a_suffix_changes_the_objective_or_the_layout_and_nothing_else(name):
    base, suffix = METHODS[name.rsplit("_", 1)[0]], name.rsplit("_", 1)[1]
    changed = {"queue": True} if suffix == "moco" else {"objective": suffix}
    title = f"{base.title} { {'moco': 'MoCo', 'dual': 'Dual'}.get(suffix, suffix.upper()) }"
    assert METHODS[name] == dataclasses.replace(base, name=name, title=title, **changed)
    assert not base.queue


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_is_complete(name):
    recipe = METHODS[name]
    assert recipe.name == name
    assert recipe.objective in OBJECTIVES
    assert recipe.title
    assert recipe.paper
    assert recipe.url.startswith(("https://arxiv.org/abs/", "https://openreview.net/forum?id="))
    assert recipe.url in recipe.temperature.__doc__
    assert set(recipe.defaults) <= set(inspect.signature(recipe.temperature).parameters)


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_builds_from_its_own_parameters(name):
    parameters = {
        key: 5 if value is inspect.Parameter.empty else value for key, value in METHODS[name].parameters.items()
    }
    queue_size = (8, 3) if METHODS[name].queue else None
    needed = {key: 5 for key, value in METHODS[name].parameters.items() if value is inspect.Parameter.empty}
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


def test_the_range_for_captions_warns_of_the_profile_that_inverts_there():
    assert METHODS["dystress_clip"].build_temperature().tau_max == 0.04
    with pytest.warns(UserWarning, match="above 2.04, the limit of profile 'shifted'"):
        METHODS["dystress_clip"].build_temperature(profile="shifted")


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


# Methods of other packages


class Own(Temperature):
    def __init__(self, tau=0.3):
        super().__init__()
        self.tau = tau

    def prepare(self, batch):
        return LogitMaps(Scaled(self.tau), Scaled(self.tau))


class Unfinished(Temperature):
    def __init__(self, tau=0.3):
        super().__init__()


class Bare(Own):
    __init__ = torch.nn.Module.__init__


class Sigma(Own):
    def __init__(self, sigma=0.3):
        super().__init__(sigma)


OWN = recipes.Recipe("own", "Own-1", Own, "dcl", "Own, 2026", "https://example.org", {"tau": 0.2})


@pytest.fixture
def table(monkeypatch):
    """The table, as it was afterwards."""
    for name in ("_TABLE", "_BY"):
        monkeypatch.setattr(recipes, name, dict(getattr(recipes, name)))
    monkeypatch.setattr(recipes, "_FOLLOWERS", list(recipes._FOLLOWERS))
    monkeypatch.setattr(recipes, "METHODS", recipes._TABLE)
    return recipes._TABLE


def test_a_registered_method_is_one_of_the_table(table):
    assert recipes.register(OWN) is OWN
    assert recipes.recipe("own") is recipes.METHODS["own"] is OWN
    loss = ContrastiveLoss("own")
    assert (type(loss.temperature), loss.temperature.tau, loss.objective) == (Own, 0.2, "dcl")
    assert [name for name in table if "own" in name] == ["own"]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, ["own", "own_dclw", "own_dual", "own_moco"]),
        ({"objective": "ntxent"}, ["own", "own_dcl", "own_dclw", "own_dual", "own_moco"]),
        ({"queue": True}, ["own", "own_dclw", "own_dual"]),
    ],
)
def test_variants_are_those_that_differ(table, change, names):
    own = recipes.register(dataclasses.replace(OWN, **change), variants=True)
    assert [name for name in table if name.startswith("own")] == names
    for name in names:
        assert table[name].temperature is Own
        suffix = name.partition("_")[2]
        assert table[name].objective == (suffix if suffix in OBJECTIVES else own.objective)
        assert table[name].queue == (suffix == "moco" or own.queue)


def test_who_follows_the_table_is_told_of_what_is_there_and_of_what_comes(table):
    told = []
    recipes.follow(told.append)
    assert told == list(METHODS.values())
    recipes.register(OWN, variants=True)
    assert [recipe.name for recipe in told[len(METHODS) :]] == ["own", "own_dclw", "own_dual", "own_moco"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "dystress"}, ValueError, "Method 'dystress' is there already, by dystress_plugin: choose another"),
        ({"title": "DySTreSS"}, ValueError, "title='DySTreSS' of method 'own' is that of 'dystress', by dystress_pl"),
        ({"title": "Temperature Free"}, ValueError, "is that of 'tempfree'"),
        ({"name": "own-1"}, ValueError, "name='own-1' must be of letters, digits and underscores"),
        ({"name": None}, ValueError, "name=None must be of letters"),
        ({"title": "--"}, ValueError, "title='--' must have letters first"),
        ({"title": "2 Own"}, ValueError, "title='2 Own' must have letters first"),
        ({"temperature": "Own"}, TypeError, "temperature='Own', which must be a subclass of Temperature"),
        ({"temperature": Own()}, TypeError, "which must be a subclass of Temperature"),
        ({"temperature": torch.nn.Linear}, TypeError, "which must be a subclass of Temperature"),
        ({"temperature": Unfinished}, TypeError, "temperature=Unfinished, which lacks prepare"),
        (
            {"temperature": Bare, "defaults": {}},
            ValueError,
            "Bare takes args, and hosts set its parameters by name",
        ),
        ({"temperature": Sigma, "defaults": {}}, ValueError, "Sigma's parameter 'sigma' is an objective's"),
        ({"objective": "ntxnt"}, ValueError, "Unknown objective of method 'own' 'ntxnt'. Did you mean 'ntxent'"),
        ({"defaults": {"tao": 1}}, ValueError, "Unknown parameter of Own 'tao'. Did you mean 'tau'"),
    ],
)
def test_what_no_host_could_train_is_refused_and_leaves_the_table_alone(table, change, error, message):
    before = dict(table)
    with pytest.raises(error, match=message):
        recipes.register(dataclasses.replace(OWN, **change), variants=True)
    assert table == before


def test_a_method_that_is_no_recipe_is_refused(table):
    with pytest.raises(TypeError, match=r"'own' must be a dystress_plugin.recipes.Recipe, not str"):
        recipes.register("own")


def test_a_variant_whose_name_is_taken_refuses_all_of_them(table):
    recipes.register(dataclasses.replace(OWN, name="own_moco", title="Other"))
    with pytest.raises(ValueError, match=f"Method 'own_moco' is there already, by {__name__}: "):
        recipes.register(OWN, variants=True)
    assert "own" not in table


MODULE = """
import dystress_plugin as dp
from dystress_plugin.recipes import METHODS, Recipe, register
from dystress_plugin.temperature import Constant

assert "simclr" in METHODS and dp.ContrastiveLoss and dp.RowStats  # all is there when a package is asked


def recipe(name):
    return Recipe(name, name.title(), Constant, "ntxent", "Own, 2026", "https://example.org")


ONE = recipe("one")
MANY = [recipe("two"), recipe("three")]
AT_IMPORT = register(recipe("five"))


def make():
    return recipe("four")


def fail():
    raise RuntimeError("no such luck.\\nSecond line")
"""
POINTS = """[dystress_plugin.methods]
one = own:ONE
many = own:MANY
make = own:make
five = own:AT_IMPORT
taken = own:fail
text = own:__name__
twice = own:ONE
missing = own:NOTHING
absent = no_such_module:ONE
"""


def test_methods_of_installed_packages_are_in_the_table_and_broken_ones_are_warned_of(tmp_path):
    (tmp_path / "own.py").write_text(MODULE)
    (tmp_path / "own-1.0.dist-info").mkdir()
    (tmp_path / "own-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: own-pack\nVersion: 1.0\n")
    (tmp_path / "own-1.0.dist-info" / "entry_points.txt").write_text(POINTS)
    program = """
import sys, warnings
import dystress_plugin
assert "own" not in sys.modules  # not before somebody reads the table
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from dystress_plugin.recipes import METHODS
print(*list(METHODS)[-5:])
print(*[x.message for x in caught], sep="\\n")
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.stderr == ""
    names, *warned = run.stdout.splitlines()
    assert names.split() == ["five", "one", "two", "three", "four"]
    assert [line.partition(": ")[0] for line in warned] == [
        f"Package 'own-pack' cannot add its method '{point}', {value}"
        for point, value in [
            ("taken", "own:fail"),
            ("text", "own:__name__"),
            ("missing", "own:NOTHING"),
            ("absent", "no_such_module:ONE"),
        ]
    ]
    assert [line.partition(": ")[2] for line in warned] == [
        "RuntimeError: no such luck.",
        "TypeError: 'own' must be a dystress_plugin.recipes.Recipe, not str.",
        "AttributeError: module 'own' has no attribute 'NOTHING'.",
        "ModuleNotFoundError: No module named 'no_such_module'.",
    ]
