"""What is said of packages that are not installed: a command that works, for the extra that has them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dystress_plugin
from dystress_plugin import errors

PACKAGE = Path(dystress_plugin.__file__).parent
CLONE = Path(__file__).parents[1]


def module_not_found(name):
    return ModuleNotFoundError(f"No module named '{name}'", name=name)


@pytest.mark.parametrize(
    ("module", "needed", "extra"),
    [
        ("jinja2", "cli", "cli"),
        ("umap", "cli", "umap"),
        ("umap.plot", "solo", "umap"),
        ("seaborn", "solo", "umap"),
        ("einops", "umap", "solo"),
        ("hydra", "cli", "solo"),
        ("sklearn", "cli", "cli"),
        ("sklearn", "solo", "solo"),
        ("sentence_transformers", "cli", "sentences"),
        ("lightly_train", "cli", "lightly-train"),
        ("of_nobody", "solo", "solo"),
    ],
)
def test_the_extra_is_the_one_that_has_the_package(module, needed, extra):
    for error in (module_not_found(module), f"ModuleNotFoundError: No module named '{module}'"):
        assert re.fullmatch(rf'pip install .*\[{extra}\].*"', errors.to_install(needed, error))


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({"url": "file:///home/me/clone", "dir_info": {}}, "dystress-plugin[umap] @ file:///home/me/clone"),
        (
            {"url": "https://host/a.git", "vcs_info": {"vcs": "git", "commit_id": "0f1"}},
            "dystress-plugin[umap] @ git+https://host/a.git@0f1",
        ),
        (None, "dystress-plugin[umap]"),
    ],
)
def test_an_installed_package_is_installed_again_from_where_it_came(origin, expected, tmp_path):
    (tmp_path / "dystress_plugin").mkdir()
    shutil.copy(PACKAGE / "errors.py", tmp_path / "dystress_plugin")
    info = tmp_path / "dystress_plugin-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: dystress-plugin\nVersion: 9\nRequires-Dist: umap-learn; extra == 'umap'\n")
    if origin:
        (info / "direct_url.json").write_text(json.dumps(origin))
    program = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom dystress_plugin.errors import to_install\n"
        "print(to_install('cli', \"No module named 'umap'\"))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f'pip install "{expected}"'


@pytest.mark.parametrize(
    ("imported", "missing", "extra"),
    [
        ("dystress_plugin.frameworks.sentence_transformers", "sentence_transformers", "sentences"),
        ("dystress_plugin.frameworks.sentence_transformers.sts", "transformers", "sentences"),
        ("dystress_plugin.frameworks.lightly.modules", "lightly", "lightly"),
        ("dystress_plugin.frameworks.lightly.modules", "torchvision", "lightly"),
    ],
)
def test_an_import_says_what_brings_a_missing_package(imported, missing, extra):
    program = f"import sys\nsys.modules[{missing!r}] = None\nimport {imported}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert re.fullmatch(rf'Install what it needs: pip install .*\[{extra}\].*"', done.stderr.splitlines()[-1])


def test_a_clone_is_installed_as_one():
    if not (PACKAGE.parent / "pyproject.toml").exists():
        pytest.skip("the package that is tested is installed from elsewhere")
    assert errors.to_install("cli") == f'pip install -e "{PACKAGE.parent}[cli]"'


@pytest.mark.parametrize("folder", ["dystress_plugin", "hydra_plugins", "scripts"])
def test_nothing_else_names_an_index_that_lacks_the_package(folder):
    named = [path for path in (CLONE / folder).rglob("*.py") if "dystress-plugin[" in path.read_text()]
    assert named == []
