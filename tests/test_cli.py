import re
import subprocess
import sys

import pytest

from dystress_plugin.cli import main
from dystress_plugin.experiment.settings import CompareSettings, ReportSettings
from dystress_plugin.recipes import METHODS


def test_methods_prints_the_table(capsys):
    assert main(["methods"]) == 0
    papers, parameters, variants = (part.splitlines()[1:] for part in capsys.readouterr().out.split("\n\n"))
    first = [[line.split()[0] for line in part] for part in (papers, parameters, variants)]
    assert first[0] == first[1] == [name for name in METHODS if "_" not in name]
    assert first[0] + first[2] == list(METHODS)
    assert "https://arxiv.org/abs/2308.01140" in papers[1]
    assert "tau_min=0.1, tau_max=0.2, profile=cosine" in parameters[1]
    assert variants[1].split() == ["simclr_dclw", "objective", "dclw", "sigma=0.5"]
    assert "queue_size" in variants[2]


@pytest.mark.parametrize("command", ["pretrain", "evaluate"])
def test_help_shows_the_keys(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "knn_k=200" in capsys.readouterr().out


def test_options_of_another_style_are_named(capsys):
    assert main(["pretrain", "--epochs", "3"]) == 2
    assert "'--epochs' is no setting; write key=value." in capsys.readouterr().err


def test_without_the_extras_the_command_says_what_to_install():
    program = (
        "import sys\nsys.modules['omegaconf'] = None\nfrom dystress_plugin.cli import main\n"
        "assert main(['methods']) == 0\nsys.exit(main(['pretrain']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.search(r"pip install .*\[cli\]", result.stderr)


@pytest.mark.parametrize(("command", "structure"), [("compare", CompareSettings), ("report", ReportSettings)])
def test_help_of_many_runs_shows_their_keys(command, structure, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.split("keys and their defaults:\n")[1].splitlines()
    assert [line.split("=")[0].strip() for line in lines] == list(structure.__dataclass_fields__)
    assert "  protocols=['weighted_knn', 'knn_1', 'knn_10'" in "\n".join(lines)


def test_report_takes_folders_and_keys(capsys, tmp_path):
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert f"There is no folder {tmp_path / 'nothing'}" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "protocol=[knn_1]"]) == 2
    assert "Unknown key 'protocol'. Did you mean 'protocols'?" in capsys.readouterr().err
    assert main(["report", "--out", "x"]) == 2
    assert "'--out' is no setting; write key=value." in capsys.readouterr().err
    odd = tmp_path / "lr=0.1"
    odd.mkdir()
    assert main(["report", str(odd)]) == 2
    assert "None of these folders holds a run" in capsys.readouterr().err
