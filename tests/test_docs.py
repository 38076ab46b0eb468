"""Every code block of the README and of docs/ works, every link resolves, and the notebooks are their scripts.

Python and `dystress ...` run, page by page in the order of the page and in one folder; trainings are shortened by
SHORT. Other commands are what tests of their own run, or what no test may (installations, several machines): of them it
is checked that what they name exists.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from dystress_plugin import recipes
from dystress_plugin.experiment.settings import PretrainSettings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), ROOT / "results" / "README.md", *ROOT.glob("docs/**/*.md")]
)
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))
# Added to every training: DOCS_SHORT="" runs the pages as they are written.
SHORT = os.environ.get(
    "DOCS_SHORT", "epochs=1 batch_size=16 backbone=test_resnet image_size=12 queue_size=null"
).split()
ONE_PROTOCOL = ["protocols=[knn_1]"]
FEW = "few.txt"  # the images that are trained on, where all are digits

# Pages that the site alone has, which scripts/site/hooks.py makes.
MADE = {"docs/reference/methods.md", "docs/reference/settings.md", "docs/evidence/results.md"}

BLOCK = re.compile(r"(?:<!-- (given|not run):\s*(.*?)-->\s*)?^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]*)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    """(what is given before it, whether it runs, language, code) of every block."""
    return [
        (before if kind == "given" else "", kind != "not run", language, code)
        for kind, before, language, code in BLOCK.findall(text_of(page))
    ]


def commands(code):
    """The lines of a block of the shell, continued ones joined, as words."""
    joined = re.sub(r"\\\n\s*", " ", code)
    inner = [re.sub(r"^\w+=\$\((.*)\)$", r"\1", line) for line in joined.splitlines()]  # NAME=$(command)
    lines = [shlex.split(line, comments=True) for line in inner]
    return [words for line in lines if line for words in pipeline(line)]


def pipeline(words):
    """The commands of a line that `&&` and `;` join."""
    parts = [[]]
    for word in words:
        if word in ("&&", ";", "||"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


# What a page is about is there in its folder.


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    """What a page registers is gone with it, and no adapter hears of it."""
    for name in ("METHODS", "_BY"):
        monkeypatch.setattr(recipes, name, dict(getattr(recipes, name)))
    monkeypatch.setattr(recipes, "_TABLE", recipes.METHODS)
    monkeypatch.setattr(recipes, "_FOLLOWERS", [])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a page: a flat folder, one of classes, a list of images."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(24):
        pixels = generator.integers(0, 80, (12, 12, 3)) + 80 * (number % 3)
        image = Image.fromarray(pixels.astype(np.uint8))
        for path in (Path("PHOTOS"), *(Path("FOLDER") / part / f"class{number % 3}" for part in ("train", "val"))):
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / path / f"{number}.png")
    for name in ("split1_D_i.npy", "split1_D_b.npy"):
        np.save(tmp_path / name, np.arange(24))
    kept = Path("results") / "long-tails" / "long-tail"
    for run in sorted((ROOT / kept).iterdir())[:2]:
        shutil.copytree(run, tmp_path / kept / run.name)
    for name in (FEW, "first5000.txt"):
        (tmp_path / name).write_text("\n".join(map(str, range(64))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


# What runs.


def shortened(words):
    """The words of a `dystress` command for images that are here, and few of them."""
    words = [re.sub("^data=cifar10$", "data=digits", word) for word in words if word != "download=true"]
    if words[0] in ("pretrain", "compare") and SHORT:
        small = [*SHORT, "progress=false"]
        if not any(word.startswith(("indices=", "config=", "data=FOLDER", "data=PHOTOS")) for word in words):
            small.append(f"indices={FEW}")
        if any("_moco" in word for word in words):
            small.remove("queue_size=null")
        words = [re.sub(r"^seeds=.*", "seeds=[0]", word) for word in words if word != "map=true"]
        words = [re.sub(r"^queue_size=.*", "queue_size=64", word) for word in words]
        words += small
    if words[0] == "compare" and SHORT:
        words += ONE_PROTOCOL
    return words


def dystress(words, capsys):
    """Runs one command; of a comparison its plan."""
    from dystress_plugin.cli import main

    if words[0] == "compare":  # whole comparisons are those of test_compare.py
        out = next((word.partition("=")[2] for word in words if word.startswith("out=")), "runs/compare")
        words = [*shortened(words), "plan=true"]
        capsys.readouterr()
        assert main(words) == 0, words
        return out, [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    if words[0] == "report":
        words = ["report", *(str(path) for path in Path().glob(words[1])), *ONE_PROTOCOL]
    assert main(shortened(words)) == 0, words
    return None


def run_shell(code, capsys, plans):
    for words in commands(code):
        if words[0] != "dystress":
            check_command(words)
            continue
        if words[1] == "report":
            for out, lines in plans:
                if words[2].startswith(out):
                    for line in lines[:2]:  # runs enough for a report
                        dystress(line[line.index("dystress") + 1 :], capsys)
        plan = dystress(words[1:], capsys)
        if plan:
            plans.append(plan)


def run_python(given, code, namespace, page):
    if SHORT:
        code = code.replace("epochs=10,", f'epochs=1, batch_size=16, backbone="test_resnet", indices="{FEW}",')
    exec(compile(given, f"{page}, given", "exec"), namespace)
    exec(compile(code, page, "exec"), namespace)


def module_for(name, monkeypatch):
    """The namespace of a module that is there: where classes are looked for as they are copied and pickled."""
    module = ModuleType(re.sub(r"\W", "_", name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return vars(module)


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page, folder, capsys, monkeypatch):
    namespace = module_for(page, monkeypatch)
    plans = []
    for given, runs, language, code in blocks(page):
        if language == "bash":
            run_shell(code, capsys, plans)
        elif language == "python" and runs:
            run_python(given, code, namespace, page)
        elif language == "python":
            compile(code, page, "exec")
        else:
            assert language in ("toml", "text"), language


def test_the_pages_have_code_and_hardly_any_that_does_not_run():
    found = [block for page in PAGES for block in blocks(page)]
    assert sum(language == "python" for _, _, language, _ in found) > 20
    assert sum(not runs for _, runs, _, _ in found) <= 2  # of hosts that no extra of the tests brings


# What others run.


def check_command(words):
    """Fails for a command that names what is not here, or that nobody has thought of."""
    words = [word for word in words if word not in ("export", "do", "done")]
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if not words:
        return
    name = words[0]
    if name in CHECKS:
        CHECKS[name](words[1:])
    else:
        assert (ROOT / name).is_file(), f"{name} is neither a command that is known nor a file"


def check_python(words):
    if words[0] == "-m":
        assert find_spec(words[1].removeprefix("dystress_plugin.")) or find_spec(words[1]), words
        return
    if words[0].startswith("$SOLO/"):
        configs = ROOT / "dystress_plugin" / "frameworks" / "solo" / "configs"
        assert (configs / f"{words[words.index('--config-name') + 1]}.yaml").is_file(), words
        return
    source = text_of(words[0])
    for word in words[1:]:
        if word.startswith("--"):
            assert word in source, f"{words[0]} has no {word}"
        elif re.match(r"[a-z_]+=", word):
            name = word.partition("=")[0]
            known = "KEY=VALUE" in source and name in {field.name for field in fields(PretrainSettings)}
            assert known or re.search(rf"\b{name}\b", source), f"{words[0]} has no {word}"


def check_pip(words):
    extras = re.search(r"\.\[([\w,-]+)\]", " ".join(words))
    for extra in extras[1].split(",") if extras else []:
        assert re.search(rf"^{extra} = \[", text_of("pyproject.toml"), re.MULTILINE), extra


def check_script(words):
    assert (ROOT / next(word for word in words if word.endswith((".sh", ".py")))).is_file(), words


def check_make(words):
    assert re.search(rf"^{words[0]}: .*## ", text_of("Makefile"), re.MULTILINE), words


def check_within(words):
    """A launcher before another command; `bash -c` has it in a string."""
    inner = " ".join(words)
    named = re.findall(
        r"scripts/[\w/]+\.(?:py|sh)|dystress_plugin\.frameworks\.\w+|dystress pretrain|main_\w+\.py", inner
    )
    assert named, words
    for name in named:
        assert "/" not in name or (ROOT / name).is_file(), words


def nothing(words):
    return None


CHECKS = {
    "python": check_python,
    "pip": check_pip,
    "pre-commit": nothing,
    "bash": check_script,
    "make": check_make,
    "torchrun": check_within,
    "srun": check_within,
    "pytest": nothing,
    "git": nothing,
    "grep": nothing,
    ".": nothing,
    "seq": nothing,
    "for": nothing,
}


@pytest.mark.parametrize(
    "line",
    [
        "pip install '.[ligthly]'",
        "python scripts/examples/none.py",
        "python scripts/examples/torchrun.py --methods x",
        "python $SOLO/main_pretrain.py --config-name dystress_cifar11",
        "python -m dystress_plugin.frameworks.none",
        "make everything",
        "torchrun scripts/none.py",
        "dystres methods",
    ],
)
def test_a_command_that_names_nothing_would_be_noticed(line):
    with pytest.raises((AssertionError, OSError, ModuleNotFoundError)):
        check_command(shlex.split(line))


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_what_the_code_host_runs_is_here(file):
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    for job in found.get("jobs", {}).values():
        for step in job["steps"]:
            for words in commands(re.sub(r"\$\{\{.*?\}\}", "cli", step.get("run", ""))):
                check_command(words)


# Links, lengths, generated files.


def slug(heading):
    """The anchor of a heading, as Markdown on the site and on code hosts has it."""
    plain = re.sub(r"\[(.*?)\]\(.*?\)|[`*]", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_resolves(page):
    broken = []
    for link in LINK.findall(FENCED.sub("", text_of(page))):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        headings = map(slug, HEADING.findall(target.read_text(encoding="utf-8"))) if anchor and target.is_file() else []
        made = str(target.resolve().relative_to(ROOT)) in MADE
        if not (target.exists() or made) or (anchor and anchor not in {"only-light", "only-dark", *headings}):
            broken.append(link)
    assert broken == []


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 160


def test_the_version_stands_in_one_place_and_the_citation_follows():
    from dystress_plugin import __version__

    assert f"\nversion: {__version__}\n" in text_of("CITATION.cff")
    assert "\nversion =" not in text_of("pyproject.toml").partition("[tool.")[0]


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script_and_runs(script, folder, monkeypatch):
    jupytext = pytest.importorskip("jupytext")
    cells = [(cell["cell_type"], cell["source"]) for cell in jupytext.read(script, fmt="py:percent")["cells"]]
    written = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in written] == cells
    assert {kind for kind, _ in cells} == {"markdown", "code"}
    assert not any("# %%" in source for _, source in cells)
    assert not any(output["output_type"] == "error" for cell in written for output in cell.get("outputs", ()))
    monkeypatch.setenv("EPOCHS", "1")
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), module_for(script.stem, monkeypatch))


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings", "nbconvert"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "site" / "reference" / "temperatures" / "index.html").is_file()
