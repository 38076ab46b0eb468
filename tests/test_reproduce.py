"""The scripts in scripts/reproduce say what can be run: every command in them is parsed, none is."""

import os
import re
import shutil
import subprocess
from itertools import takewhile
from pathlib import Path

import pytest

from dystress_plugin import recipes
from dystress_plugin.experiment.commands import parse_compare
from dystress_plugin.experiment.compare.plan import plan
from dystress_plugin.experiment.keys import parse
from dystress_plugin.experiment.settings import LongTailSettings, PretrainSettings
from dystress_plugin.frameworks.lightly import __main__ as launcher
from dystress_plugin.frameworks.lightly.modules import BENCHMARK_METHODS
from dystress_plugin.frameworks.solo.settings import complete

FOLDER = Path(__file__).parents[1] / "scripts" / "reproduce"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
CONFIGS = FOLDER.parents[1] / "dystress_plugin" / "frameworks" / "solo" / "configs"
LIGHTLY = {"simclr", "dcl", "dclw"}  # in lightly's own table


def commands(script, tmp_path, arguments=(), **environment):
    """What the script would run, with stand-ins for the two programs that write their arguments down."""
    tools, log = tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    for name in ("dystress", "python"):
        (tools / name).write_text(
            f"#!/bin/sh\nprintf '%s\\037' {name} \"$@\" >> {log}\nprintf '\\n' >> {log}\necho PLACE\n"
        )
        (tools / name).chmod(0o755)
    environment = {"DATA": "cifar10"} | environment
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    subprocess.run(
        [shutil.which("bash"), str(script), *arguments],
        cwd=tmp_path,
        env={"PATH": path, **environment},
        check=True,
        capture_output=True,
    )
    return [line.split("\037")[:-1] for line in log.read_text().splitlines()]


def check(command):
    """Raises where the program would refuse its arguments."""
    program, first, *rest = command
    if program == "dystress" and first == "compare":
        settings, common = parse_compare(rest)
        for arm in plan(settings):
            build(arm.method, arm.kwargs)
        check_values(common)
    elif program == "dystress" and first == "pretrain":
        settings = parse(PretrainSettings, rest)
        build(settings.method, settings.method_kwargs)
        check_values(settings)
    elif program == "dystress" and first == "long-tail":
        assert parse(LongTailSettings, rest).long_tail == 0.01
    elif rest[:1] == ["dystress_plugin.frameworks.lightly"]:
        check_benchmark(rest[1:])
    elif first == "-m":
        assert rest == ["dystress_plugin.frameworks.solo", "where"]
    else:
        check_solo(first, rest)


def build(method, kwargs):
    recipe = recipes.recipe(method)
    recipe.build_temperature(**({"num_samples": 9} if "num_samples" in recipe.parameters else {}) | kwargs)


def check_values(settings):
    assert settings.optimizer in ("lars", "sgd")
    assert settings.backbone in ("resnet18", "resnet50")
    assert settings.epochs > settings.warmup_epochs


def check_benchmark(arguments):
    start = arguments.index("--methods") + 1
    methods = list(takewhile(lambda word: not word.startswith("--"), arguments[start:]))
    assert methods
    assert set(methods) <= LIGHTLY | set(BENCHMARK_METHODS)
    if "LIGHTLY_HOME" in os.environ:
        main = (launcher.benchmark_directory(None) / "main.py").read_text()
        options = re.findall(r'add_argument\("(--[a-z0-9-]+)"', main)
        assert {word for word in arguments if word.startswith("--")} <= set(options)


def check_solo(script, arguments):
    assert script == "PLACE/main_pretrain.py"
    assert arguments[0] == "--config-name"
    assert (CONFIGS / f"{arguments[1]}.yaml").exists()
    given = dict(word.lstrip("+").split("=", 1) for word in arguments[2:])
    kwargs = {key.partition(".")[2]: value for key, value in given.items() if key.startswith("method_kwargs.")}
    complete(recipes.recipe(given["method"]), kwargs | {"proj_hidden_dim": 2048, "proj_output_dim": 256})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_command_is_one_that_its_program_takes(script, tmp_path):
    found = commands(script, tmp_path, SPLITS="a.npy b.npy")
    assert found
    for command in found:
        check(command)


def test_without_splits_three_are_drawn(tmp_path):
    found = commands(FOLDER / "temperature_schedules_cifar_lt.sh", tmp_path)
    drawn = [command for command in found if command[1] == "long-tail"]
    assert len(drawn) == len({tuple(command) for command in drawn}) == 3
    for command in found:
        check(command)


@pytest.mark.parametrize(
    "script",
    [path for path in SCRIPTS if "dystress compare" in path.read_text()],
    ids=lambda path: path.stem,
)
def test_settings_of_ones_own_win(script, tmp_path):
    found = commands(script, tmp_path, ["epochs=1", "warmup_epochs=0", "seeds=[7]"], SPLITS="a.npy")
    for command in found:
        settings, common = parse_compare(command[2:])
        assert (settings.seeds, common.epochs) == ([7], 1)


def test_the_check_notices_what_is_wrong():
    for command in (
        ["dystress", "compare", "methods=[simclr]", "epoch=3"],
        ["dystress", "compare", "methods=[dystress]", "method_kwargs.dystress.tau_mx=3"],
        ["dystress", "pretrain", "method_kwargs.profile=round"],
        ["python", "PLACE/main_pretrain.py", "--config-name", "dystress_cifar10", "method=ts", "+method_kwargs.tau=1"],
    ):
        with pytest.raises(ValueError, match=r"Did you mean|Unknown"):
            check(command)
    with pytest.raises(AssertionError):
        check(["python", "-m", "dystress_plugin.frameworks.lightly", "--methods", "byoll", "--epochs", "1"])


def test_every_script_states_paper_result_cost_and_a_small_trial():
    for script in SCRIPTS:
        head = script.read_text().partition("set -euo pipefail")[0]
        for words in ("https://arxiv.org/abs/", "# Cost: ", "GPU hour", "# Try it small", f"reproduce/{script.name}"):
            assert words in head, (script.name, words)
        assert script.stat().st_mode & 0o100
