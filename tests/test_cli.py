import subprocess
import sys

import pytest

from dystress_plugin.cli import main
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
    assert "pip install 'dystress-plugin[cli]'" in result.stderr
