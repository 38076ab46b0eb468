"""The floors that docs/architecture.md draws are those that a machine checks, and what it names exists."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dystress_plugin"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FLOORS = re.findall(r"^\d  (.+)$", PAGE, re.MULTILINE)
ROOMS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
NAMES = sorted(set(re.findall(r"`([a-z_]+(?:\.\w+)*)`", PAGE)))

tomllib = pytest.importorskip("tomllib")  # since Python 3.11
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
CONTRACTS = {contract["id"]: contract for contract in CONFIG["contracts"]}


def exists(name):
    """Whether `dystress_plugin.name` is a module, or something in one or in its classes."""
    parts = f"dystress_plugin.{name}".split(".")
    number = 1
    while number < len(parts) and importlib.util.find_spec(".".join(parts[: number + 1])):
        number += 1
        if not hasattr(importlib.import_module(".".join(parts[:number])), "__path__"):
            break
    found = importlib.import_module(".".join(parts[:number]))
    for part in parts[number:]:
        if part in getattr(found, "__annotations__", {}):  # a field, which has no further parts
            return part == parts[-1]
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_what_the_page_names_exists():
    named = [name for name in NAMES if name.split(".")[0] in ROOMS]
    assert len(named) > 40
    assert [name for name in named if not exists(name)] == []


@pytest.mark.parametrize("name", ["rows.RowStat", "rows.RowStats.negatives", "engine.tile", "engine.tiles.forward.x"])
def test_what_is_not_there_would_be_noticed(name):
    assert not exists(name)


def test_other_words_in_backticks_are_names_of_arguments_or_files():
    others = [name for name in NAMES if name.split(".")[0] not in ROOMS]
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py"))
    assert [n for n in others if not (re.search(rf"\b{n}\b", source) or (ROOT / n).exists())] == []


def test_the_picture_shows_the_floors_that_are_checked():
    assert FLOORS
    checked = [layer.split(" | ") for layer in CONTRACTS["floors"]["layers"]]
    assert [floor.split() for floor in FLOORS] == checked
    rooms = {room.strip("()") for floor in checked for room in floor}
    assert rooms >= ROOMS - {"__init__"}
    assert {room for floor in checked for room in floor if not room.startswith("(")} <= ROOMS


def test_every_room_below_training_is_core():
    floors = [layer.split(" | ") for layer in CONTRACTS["floors"]["layers"]]
    training = next(number for number, floor in enumerate(floors) if "training" in floor[0])
    rooms = {room.strip("()") for floor in floors[training + 1 :] for room in floor} & ROOMS
    assert CONTRACTS["core"]["source_modules"] == sorted(f"dystress_plugin.{room}" for room in rooms)


def test_the_contracts_hold():
    pytest.importorskip("importlinter")
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run([sys.executable, "-c", program, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(rf"Contracts: {len(CONTRACTS)} kept, 0 broken", run.stdout)
