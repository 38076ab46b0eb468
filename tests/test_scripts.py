"""scripts/ is sorted, and every folder says what is in it. test_reproduce.py has the commands of scripts/reproduce."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
FOLDERS = ["benchmarks", "checks", "examples", "reproduce", "site", "upstream"]
TOP = {"setup.sh", "demo.sh", "docs.sh", "test.sh", "test_packaging.sh", "test_versions.sh"}


def names(folder):
    return {path.name for path in folder.iterdir() if path.name != "__pycache__"}


def test_at_the_top_is_what_a_user_starts_with():
    assert names(SCRIPTS) == {*FOLDERS, *TOP}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_script_is_in_the_readme_of_its_folder(folder):
    text = (SCRIPTS / folder / "README.md").read_text()
    scripts = {name for name in names(SCRIPTS / folder) - {"__init__.py"} if name.endswith((".py", ".sh"))}
    assert scripts
    assert {name for name in scripts if f"`{name}`" not in text} == set()
