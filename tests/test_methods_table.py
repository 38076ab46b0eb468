import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dystress_plugin.recipes import METHODS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "checks" / "make_methods_table.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_table_is_not_stale(script):
    assert script.main(["--check"]) == 0, "run python scripts/checks/make_methods_table.py"


def test_a_stale_table_is_reported(script, tmp_path, capsys):
    target = tmp_path / "METHODS.md"
    assert script.main(["--check"], target) == 1
    assert script.main([], target) == 0
    assert script.main(["--check"], target) == 0
    target.write_text(target.read_text() + " ")
    assert script.main(["--check"], target) == 1
    assert "METHODS.md is stale: run python scripts/checks/make_methods_table.py" in capsys.readouterr().err


def test_every_method_has_a_row_with_links_that_lead_somewhere(script):
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in script.table().splitlines()]
    rows = [row for row in rows if len(row) > 1]
    assert [row[0].strip("`") for row in rows[2:]] == list(METHODS)
    assert len({len(row) for row in rows}) == 1
    for row in rows[2:]:
        for link in row[-1].split(", "):
            assert (ROOT / link.split("](")[1].rstrip(")")).is_file()


def test_solo_learns_column_is_what_the_adapter_registers(script):
    home = os.environ.get("SOLO_LEARN_HOME")
    if not home:
        pytest.skip("SOLO_LEARN_HOME does not name solo-learn's source")
    program = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import solo.methods\nown = set(solo.methods.METHODS)\n"
        "from dystress_plugin.frameworks.solo.methods import CLASSES\n"
        "print('registered', *sorted(set(CLASSES) - own))\nprint('own', *sorted(set(CLASSES) & own))"
    )
    environment = os.environ | {"PYTHONPATH": home}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    lines = {line.split()[0]: set(line.split()[1:]) for line in result.stdout.splitlines() if line.strip()}
    assert lines["own"] == script.HOSTS_OWN, result.stderr
    served = {name for name, recipe in METHODS.items() if recipe.queue in script._served_by("solo")}
    assert lines["registered"] == served - script.HOSTS_OWN
