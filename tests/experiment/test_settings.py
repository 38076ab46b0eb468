import math
import os
import typing
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dystress_plugin.cli import main
from dystress_plugin.experiment.commands import parse_compare
from dystress_plugin.experiment.compare import command as compare
from dystress_plugin.experiment.data import export, selection
from dystress_plugin.experiment.evaluate import command as evaluate
from dystress_plugin.experiment.evaluate import export as hand_on
from dystress_plugin.experiment.inspect import command as inspect
from dystress_plugin.experiment.io.config import read_config, with_files
from dystress_plugin.experiment.keys import describe, range_of, read
from dystress_plugin.experiment.pretrain import command as pretrain
from dystress_plugin.experiment.pretrain import module
from dystress_plugin.experiment.report import command as report
from dystress_plugin.experiment.settings import (
    CompareSettings,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    LongTailSettings,
    PretrainSettings,
    ReportSettings,
)

COMMANDS = {  # with what must be given, and epochs for any warm-up
    "pretrain": (PretrainSettings, ["epochs=1000000"]),
    "compare": (CompareSettings, ["methods=[simclr]"]),
    "report": (ReportSettings, []),
    "evaluate": (EvaluateSettings, ["checkpoint=x"]),
    "long-tail": (LongTailSettings, ["data=digits", "out=x", "long_tail=0.1"]),
    "inspect": (InspectSettings, []),
    "embed": (EmbedSettings, ["checkpoint=x", "out=y"]),
    "export": (ExportSettings, ["checkpoint=x", "out=y"]),
}
ENTRIES = {
    "pretrain": pretrain.pretrain,
    "compare": lambda settings: compare.compare(settings, PretrainSettings()),
    "report": report.report,
    "evaluate": evaluate.evaluate_run,
    "long-tail": export.write_long_tail,
    "inspect": inspect.inspect_temperatures,
    "embed": evaluate.embed,
    "export": hand_on.export,
}
KEYS = [
    pytest.param(command, f, str(typing.get_type_hints(structure)[f.name]), id=f"{command}-{f.name}")
    for command, (structure, _) in COMMANDS.items()
    for f in fields(structure)
]
NUMBERS = [key for key in KEYS if "int" in key.values[2] or "float" in key.values[2]]
WORDS = [key for key in KEYS if key.values[1].metadata["words"]]


def refused(command, token, capsys):
    """The one line that a command says of a setting when it ends with status 2."""
    assert main([command, *COMMANDS[command][1], token]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dystress: ")
    assert said.count("\n") == 1
    return said.removeprefix("dystress: ")


def beside(side, bound, whole):
    """Of the numbers at the end of a range, the last inside and the first outside of it."""
    outwards = -math.inf if side in ("at least", "above") else math.inf
    if side in ("above", "below"):
        return math.nextafter(bound, -outwards), bound
    return bound, bound + int(math.copysign(1, outwards)) if whole else math.nextafter(bound, outwards)


def test_values_get_the_type_of_their_key():
    settings = read(PretrainSettings, ["epochs=3", "lr=0.5", "devices=2", "long_tail=0.01", "progress=false"])
    assert (settings.epochs, settings.lr, settings.devices) == (3, 0.5, "2")
    assert (settings.long_tail, settings.progress) == (0.01, False)


def test_method_kwargs_are_open_for_the_parameters_of_every_method():
    settings = read(PretrainSettings, ["method_kwargs.tau_max=0.3", "method_kwargs.negative_range=[0.1,0.2]"])
    assert settings.method_kwargs == {"tau_max": 0.3, "negative_range": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("epoch=3", "Unknown key 'epoch'. Did you mean 'epochs'?"),
        ("--epochs", "'--epochs' is no setting; write epochs="),
        ("epochs=many", "epochs: Value 'many'"),
        ("epochs.x=3", "epochs"),
        ("lr=[1]", "lr: "),
    ],
)
def test_a_wrong_token_is_named(token, message):
    with pytest.raises(ValueError, match="^" + message.replace("?", r"\?").replace("'", ".").split("(")[0]):
        read(PretrainSettings, [token])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        *((typed, f"'{typed}' is no setting; write epochs=3") for typed in ("--epochs 3", "--epochs=3", "-epochs 3")),
        *((typed, f"'{typed}' is no setting; write epochs=3") for typed in ("epochs = 3", "epochs= 3", "epochs =3")),
        ("--batch-size 64", "'--batch-size 64' is no setting; write batch_size=64"),
        ("+lr=0.1", "'+lr=0.1' is no setting; write lr=0.1"),
        ("--progress lr=1", "'--progress' is no setting; write progress=..."),
        ("--epochs --lr 1", "'--epochs' is no setting; write epochs=..."),
        ("lr=1 --epochs 3", "'--epochs 3' is no setting; write epochs=3"),
        ("--epoch 3", "'--epoch' is no setting; write key=value. Unknown key 'epoch'. Did you mean 'epochs'?"),
        ("data=my pictures", "'pictures' is no setting; write key=value, or quote 'data=my pictures' if that is one."),
        ("/", "'/' is no setting; write data=/"),
        ("tau_max=0.3", "Unknown key 'tau_max'. Did you mean 'method_kwargs.tau_max', a parameter of the method?"),
        ("tau_mx=0.3", "Unknown key 'tau_mx'. Did you mean 'method_kwargs.tau_max', a parameter"),
        ("rate=3", "Unknown key 'rate'. Did you mean 'method_kwargs.rate', a parameter"),  # and not 'rotate'
        ("sigma=3", "Unknown key 'sigma'. Did you mean 'method_kwargs.sigma', a parameter"),
        (
            "--alpha 3",
            "'--alpha' is no setting; write key=value. Unknown key 'alpha'. Did you mean 'method_kwargs.alpha'",
        ),
    ],
)
def test_a_setting_in_another_style_is_told_how_it_is_written_here(typed, said, capsys):
    assert main(["pretrain", *typed.split(" ")]) == 2
    assert capsys.readouterr().err.startswith(f"dystress: {said}")


@pytest.mark.parametrize("command", ["compare", "inspect"])
def test_a_parameter_of_one_of_several_methods_is_told_whose_it_is(command, capsys):
    for methods, token, meant in (
        ("[ts]", "tau_max=0.3", "ts.tau_max"),
        ("[dystress,macl]", "alpha=1", "macl.alpha"),
        ("[simclr]", "tau_max=0.3", "dystress.tau_max"),
    ):
        assert main([command, f"methods={methods}", token]) == 2
        assert f"Did you mean 'method_kwargs.{meant}', a parameter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "key"), [("evaluate", "checkpoint"), ("inspect", "checkpoint"), ("long-tail", "data")]
)
def test_a_folder_without_a_key_is_told_which(command, key, tmp_path, capsys):
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"dystress: '{tmp_path}' is no setting; write {key}={tmp_path}\n"


def test_auto_workers_are_the_cores_that_can_be_used_but_one(monkeypatch):
    for cores, workers in ((1, 0), (2, 1), (9, 8), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        for structure, given in COMMANDS.values():
            if "num_workers" in structure.__dataclass_fields__:
                assert read(structure, [*given, "num_workers=auto"]).num_workers == workers
    for token in ("epochs=auto", "num_workers=automatic"):
        with pytest.raises(ValueError, match=token.split("=")[0]):
            read(PretrainSettings, [token])


def test_a_file_has_keys_and_those_after_it_win(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("method: macl\nepochs: 7\ndata: 'a #1'\nlr: null\nmethod_kwargs: {tau: 0.2, alpha: 1}\n")
    settings = read(PretrainSettings, with_files(["epochs=3", f"config={file}", "method_kwargs.tau=0.3", "seed=4"]))
    expected = PretrainSettings("macl", {"tau": 0.3, "alpha": 1}, "a #1", epochs=7, seed=4)
    assert settings == expected
    assert read(PretrainSettings, with_files([f"config={file}", "epochs=3", "data=digits"])).epochs == 3
    other = read(PretrainSettings, with_files([f"config={file}", "method=ts"]))  # without another method's parameters
    assert (other.method, other.method_kwargs, other.epochs) == ("ts", {}, 7)
    file.write_text("methods: [macl, ts]\nepochs: 5\n")
    settings, common = parse_compare(with_files([f"config={file}"]))
    assert (settings.methods, common.epochs) == (["macl", "ts"], 5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("epoch: 3", "Unknown key 'epoch'. Did you mean 'epochs'?"),
        ("epochs: many", "epochs: Value 'many'"),
        ("tau_max: 1", "Unknown key 'tau_max'. Did you mean 'method_kwargs.tau_max'"),
        ("[1]", "config=x.yaml holds no keys."),
        ("a: [", "config=x.yaml cannot be read: "),
        (None, "config=x.yaml cannot be read: [Errno 2] No such file"),
        ("settings: {epochs: 0}", "x.yaml is no config.yaml of `dystress pretrain`, or is damaged: epochs=0 must be"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(content, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("x.yaml").write_text(content)
    assert main(["pretrain", "config=x.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"dystress: {said}")


def test_a_missing_required_key_is_named():
    with pytest.raises(ValueError, match=r"checkpoint=\.\.\. must be given"):
        read(EvaluateSettings, [])


@pytest.mark.parametrize("structure", [PretrainSettings, EvaluateSettings])
def test_help_lists_every_key_with_its_default(structure):
    lines = describe(structure).splitlines()
    assert [line.split("=")[0].strip() for line in lines] == list(structure.__dataclass_fields__)
    assert all(len(line.split("  ")[-1].strip()) > 3 for line in lines)


@pytest.mark.parametrize(
    "text", ["a #1", "a: b", "[a", "{a}", "01", "1e3", "off", "- a", "~", "'a'", "a | b", "$(a) `b`; c"]
)
def test_a_text_is_taken_as_it_stands(text):
    assert read(PretrainSettings, [f"data={text}"]).data == os.path.expanduser(text)


def test_null_is_none_and_what_is_no_yaml_is_an_error():
    assert read(PretrainSettings, ["out=x", "out=null"]).out is None
    with pytest.raises(ValueError, match=r"method_kwargs.tau=\[1 is no key=value in YAML"):
        read(PretrainSettings, ["method_kwargs.tau=[1"])


@pytest.mark.parametrize(("command", "f", "hint"), NUMBERS)
def test_every_number_has_a_range_and_what_is_outside_is_refused_by_name(command, f, hint, capsys):
    structure, given = COMMANDS[command]
    sides = set(f.metadata["bounds"])
    assert len(sides) == len(sides & {"at least", "above"}) + len(sides & {"at most", "below"}) == 2
    (line,) = (line for line in describe(structure).splitlines() if line.startswith(f"  {f.name}="))
    assert line.endswith(f"[{range_of(f)}]")

    spelled = f"{f.name}=[{{}}]" if "list" in hint else f"{f.name}={{}}"
    for side, bound in f.metadata["bounds"].items():
        inside, outside = beside(side, bound, whole="int" in hint)
        found = getattr(read(structure, [*given, spelled.format(inside)]), f.name)
        assert found == ([inside] if "list" in hint else inside)
        said = refused(command, spelled.format(outside), capsys)
        assert f" must be {range_of(f)}: " in said
        assert said.startswith(f"{f.name}=")
        assert str(outside) in said
    for odd in ("nan", ".inf", "-.inf", "1e400", "true", "abc", "{a: 1}", "9" * 400, "9" * 5000):
        assert refused(command, spelled.format(odd), capsys).startswith(f"{f.name}"), odd
    if "int" in hint:
        assert refused(command, spelled.format(2.5), capsys).startswith(f"{f.name}")


@pytest.mark.parametrize(("command", "f", "hint"), NUMBERS)
def test_a_program_is_refused_what_a_command_is(command, f, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    structure, given = COMMANDS[command]
    (bound, *_) = f.metadata["bounds"].values()
    for wrong in (bound - 1, math.nan, True, "abc"):
        settings = read(structure, given)
        setattr(settings, f.name, [wrong] if "list" in hint else wrong)
        with pytest.raises(ValueError, match=rf"^{f.name}"):
            ENTRIES[command](settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "f", "hint"), WORDS)
def test_a_word_that_is_none_of_a_keys_gets_the_nearest(command, f, hint, capsys):
    for word in f.metadata["words"]:
        assert getattr(read(COMMANDS[command][0], [*COMMANDS[command][1], f"{f.name}={word}"]), f.name) == word
    longest = max(f.metadata["words"], key=len)
    said = refused(command, f"{f.name}={longest}x", capsys)
    assert said.startswith(f"Unknown {f.name} '{longest}x'. Did you mean '{longest}'? Choose from: ")


def test_the_words_are_those_that_there_is_something_for():
    words = {
        f.name: f.metadata["words"] for structure in (LongTailSettings, PretrainSettings) for f in fields(structure)
    }
    assert words["long_tail_profile"] == tuple(selection.TAIL_PROFILES)
    assert words["optimizer"] == tuple(module.OPTIMIZERS)


@pytest.mark.parametrize(
    ("command", "token", "message"),
    [
        ("compare", "methods=[]", "methods=[] must be at least one"),
        ("compare", "methods=[ts,ts]", "methods=['ts', 'ts'] must be each once"),
        ("compare", "methods=[ts-a/b]", "methods=['ts-a/b']: the folders of ts-a/b's runs are named by it"),
        ("compare", "seeds=[]", "seeds=[] must be at least one"),
        ("compare", "seeds=[3,3]", "seeds=[3, 3] must be each once"),
        ("compare", "seeds=[0,-1]", "seeds=[0, -1]: -1 must be at least 0"),
        ("compare", "seeds=3", "seeds: one or several are a list; write seeds=[3]"),
        ("compare", "methods=ts,macl", "methods: one or several are a list; write methods=[ts,macl]"),
        ("pretrain", "protocols=linear", "protocols: one or several are a list; write protocols=[linear]"),
        ("compare", "constants=[0.1,0.10000001]", "constants=[0.1, 0.10000001] must be different in six digits"),
        ("inspect", "constants=[0.1,0.1]", "constants=[0.1, 0.1] must be different in six digits"),
        ("inspect", "methods=[ts,ts]", "methods=['ts', 'ts'] must be each once"),
        *(
            (command, f"protocols=[{names}]", message)
            for command in ("compare", "report")
            for names, message in {
                "": "protocols=[] must be at least one",
                "linear,linear": "protocols=['linear', 'linear'] must be each once",
                "knn_0": "Unknown protocol 'knn_0'. Did you mean 'knn_10'?",
                "few_shot_0": "Unknown protocol 'few_shot_0'.",
                "few_shot_0pct": "Unknown protocol 'few_shot_0pct'.",
                "few_shot_101pct": "Unknown protocol 'few_shot_101pct'.",
                "knn_" + "9" * 5000: "Unknown protocol 'knn_999",
            }.items()
        ),
        ("compare", "methods=[{a: 1}]", "methods=[{'a': 1}] must be a list of plain values"),
        ("pretrain", "out=", "out= is empty: folder of the results"),
        ("evaluate", "checkpoint=", "checkpoint= is empty"),
    ],
)
def test_lists_and_texts_are_checked_before_anything_is_written(command, token, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["x"] if command == "report" else []
    (tmp_path / "x").mkdir()
    assert main([command, *given, *COMMANDS[command][1], token]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"dystress: {message}")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["x"]


def test_a_config_with_a_value_out_of_its_range_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    OmegaConf.save({"settings": {"knn_k": 0}}, path)
    with pytest.raises(ValueError, match=rf"^{path} is no config.yaml .*knn_k=0 must be at least 1 .*neighbours of"):
        read_config(path)
