import re
import subprocess
import sys
from dataclasses import fields

import pytest

from dystress_plugin.cli import main
from dystress_plugin.experiment.commands import COMMANDS, EXAMPLES
from dystress_plugin.experiment.settings import CompareSettings, PretrainSettings, ReportSettings
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
    assert capsys.readouterr().err == "dystress: '--epochs 3' is no setting; write epochs=3\n"


def test_without_the_extras_the_command_says_what_to_install():
    program = (
        "import sys\nsys.modules['omegaconf'] = None\nfrom dystress_plugin.cli import main\n"
        "assert main(['methods']) == 0\nsys.exit(main(['pretrain']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.search(r"pip install .*\[cli\]", result.stderr)


REFUSED = """
import sys
from dystress_plugin.cli import main
for arguments in {arguments}:
    assert main(arguments) == 2, arguments
print(sorted({{name.partition(".")[0] for name in sys.modules}} & set("{heavy}".split())))
"""
HEAVY = "lightly matplotlib numpy pandas PIL pytorch_lightning scipy sklearn timm torch torchvision wandb"


def imported(arguments):
    """What is imported by the time that all these command lines are refused, in a process of its own."""
    program = REFUSED.format(arguments=arguments, heavy=HEAVY)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.count("dystress: ") == len(arguments)
    return result.stdout.strip()


def test_keys_and_values_are_refused_before_torch_is_imported():
    commands = ("pretrain", "compare", "inspect", "evaluate", "report", "long-tail")
    wrong = [[command, *more] for command in commands for more in (["outs=1"], ["--out", "x"])]
    wrong += [["pretrain", token] for token in ("epochs=abc", "epochs=0", "optimizer=adam", "warmup_epochs=30", "out=")]
    wrong += [["pretrain", "protocols=[knn_0]"], ["pretrain", "epoch=3"], ["evaluate"], ["report", "protocols=[]"]]
    wrong += [["compare", token] for token in ("seeds=[]", "methods=[ts,ts]", "seed=1", "outs=1")]
    wrong += [["compare", "methods=[ts]", token] for token in ("epochs=0", "method_kwargs.tau=1", "protocols=[x]")]
    wrong += [["inspect", token] for token in ("images=1", "constants=[0.1,0.1]", "method_kwargs.tau=1")]
    wrong += [
        [command, "checkpoint=nowhere", *out] for command, *out in (["evaluate"], ["embed", "out=x"], ["inspect"])
    ]
    wrong += [["pretrain", "data=nowhere"], ["pretrain", "data=[.,nowhere]"], ["pretrain", "val=*.none"]]
    wrong += [["compare", "methods=[ts]", "data=nowhere"], ["report", "nowhere"], ["inspect", "data=nowhere"]]
    assert imported(wrong) == "[]"


def test_methods_and_their_parameters_are_refused_with_torch_alone():
    wrong = [["pretrain", *more] for more in (["method=dystres"], ["method_kwargs.tau=1"], ["tau_max=0.3"])]
    wrong += [["pretrain", "method_kwargs.tau_min=0.5"], ["compare", "methods=[dystres]"], ["inspect", "methods=[x]"]]
    wrong += [["compare", "methods=[macl]", "method_kwargs.macl.tua=0.3"], ["inspect", "method_kwargs.ts.period=-1"]]
    assert imported(wrong) == "['numpy', 'torch']"


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
    assert "'--out' is no setting; write out=..." in capsys.readouterr().err
    odd = tmp_path / "lr=0.1"
    odd.mkdir()
    assert main(["report", str(odd)]) == 2
    assert "None of these folders holds a run" in capsys.readouterr().err


def test_alone_it_says_what_to_do_first_with_an_example_of_every_command(capsys):
    assert main([]) == 0
    guide = capsys.readouterr().out
    first, listed = guide.split("\ncommands:\n")
    assert "dystress pretrain data=digits" in first
    for name in ("methods", *COMMANDS):
        assert re.search(rf"^  {name} +\w.*\n +dystress {name}\b", listed, re.MULTILINE), name
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == guide


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_has_its_keys(name):
    structure = COMMANDS[name][1]
    keys = {field.name for field in fields(structure)}
    keys |= {field.name for field in fields(PretrainSettings)} if name == "compare" else set()
    words = EXAMPLES[name].split()[2:]
    assert {word.partition("=")[0].partition(".")[0] for word in words if "=" in word} <= keys
