import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

from dystress_plugin.frameworks.solo import locate
from dystress_plugin.frameworks.solo.__main__ import main


def make_home(folder):
    (folder / "solo" / "methods").mkdir(parents=True)
    for name in ("main_pretrain.py", "solo/__init__.py", "solo/methods/__init__.py", "solo/methods/base.py"):
        (folder / name).touch()
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without solo-learn, with its cache and its site-packages in tmp_path."""
    monkeypatch.delenv("SOLO_LEARN_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def test_none_at_all_is_two_lines(nowhere, capsys):
    assert main(["where"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "solo-learn is not installed."
    assert len(lines) == 2
    assert "install" in lines[1]
    assert "SOLO_LEARN_HOME" in lines[1]


def test_version_of_the_package_index_is_refused(tmp_path, monkeypatch, capsys):
    package = tmp_path / "site" / "solo"
    (package / "methods").mkdir(parents=True)
    (package / "__init__.py").touch()
    info = tmp_path / "site" / "solo_learn-1.0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: solo-learn\nVersion: 1.0.2\n")
    monkeypatch.delenv("SOLO_LEARN_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [name for name in sys.modules if name == "solo" or name.startswith("solo.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["knn"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("solo-learn 1.0.2 in ")
    assert len(lines) == 2


def test_home_by_name(nowhere, monkeypatch, capsys):
    monkeypatch.setenv("SOLO_LEARN_HOME", str(nowhere))
    assert main(["where"]) == 1
    assert f"SOLO_LEARN_HOME={nowhere} has no main_pretrain.py" in capsys.readouterr().err
    make_home(nowhere)
    assert main(["where"]) == 0
    assert capsys.readouterr().out.strip() == str(nowhere.resolve())


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_install_clones_once_at_the_commit(nowhere, monkeypatch, capsys):
    source = make_home(nowhere / "source")
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"], ["commit", "-qm", "two", "--allow-empty"]):
        subprocess.run([*git, *command], check=True)
    first = subprocess.run([*git, "rev-parse", "HEAD~1"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(locate, "COMMIT", first)

    home = locate.install(str(source))
    assert locate.commit_of(home) == first
    assert (nowhere / "site" / "dystress_solo_learn.pth").read_text() == f"{home}\n"
    assert locate.find() == home
    assert locate.install("/no/such/place") == home  # there is nothing left to clone

    shutil.rmtree(home)
    assert main(["install", "--source", str(nowhere / "no_such_place")]) == 1
    assert "no_such_place" in capsys.readouterr().err
    assert list(home.parent.iterdir()) == []


def test_unknown_arguments_are_errors(capsys):
    with pytest.raises(SystemExit):
        main(["where", "--sauce", "x"])
    assert "--sauce" in capsys.readouterr().err


def test_launcher_names_what_is_missing(tmp_path):
    home = make_home(tmp_path)
    (home / "solo" / "methods" / "__init__.py").write_text("import no_such_module\n")
    done = subprocess.run(
        [sys.executable, "-m", "dystress_plugin.frameworks.solo", "knn"],
        env={**os.environ, "SOLO_LEARN_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "No module named 'no_such_module'" in done.stderr
    assert re.search(r"pip install .*\[solo\]", done.stderr)


def test_other_hydra_programs_pay_nothing(tmp_path):
    (tmp_path / "conf.yaml").write_text("a: 1\n")
    (tmp_path / "program.py").write_text(
        "import hydra, sys\n"
        "@hydra.main(version_base='1.2', config_path='.', config_name='conf')\n"
        "def main(cfg):\n"
        "    print('ours', 'hydra_plugins.dystress_solo_learn' in sys.modules)\n"
        "    print('cost', sorted({'torch', 'dystress_plugin'} & set(sys.modules)))\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "program.py", "hydra.run.dir=."], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["ours True", "cost []"]


@pytest.mark.parametrize("option", ["--k=0", "--k=-3", "--k=1.5", "--temperature=0", "--temperature=nan"])
def test_numbers_of_the_knn_have_a_range(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["knn", option])
    assert stop.value.code == 2
    assert f"argument {option.partition('=')[0]}: " in capsys.readouterr().err
