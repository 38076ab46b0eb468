"""scripts/ is sorted, and every folder says what is in it. test_reproduce.py has the commands of scripts/reproduce."""

import subprocess
import sys
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


def test_what_is_for_a_gpu_runs_on_a_cpu_and_writes_a_summary_of_what_it_found(tmp_path):
    script = [sys.executable, SCRIPTS / "checks" / "gpu.py", "--device", "cpu", "--quick", "--out", tmp_path]
    done = subprocess.run([*script, "--sections", "errors"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "README.md").read_text()
    assert "## errors: passed" in text
    assert "| float32 | constant 0.1 |" in text
    assert "72 of 72 are as close to float64 as they should." in text
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "log.txt", "errors.csv"}
