import os

import pytest

from dystress_plugin.experiment.settings import EvaluateSettings, PretrainSettings, describe, parse


def test_values_get_the_type_of_their_key():
    settings = parse(PretrainSettings, ["epochs=3", "lr=0.5", "devices=2", "long_tail=0.01", "progress=false"])
    assert (settings.epochs, settings.lr, settings.devices) == (3, 0.5, "2")
    assert (settings.long_tail, settings.progress) == (0.01, False)


def test_method_kwargs_are_open_for_the_parameters_of_every_method():
    settings = parse(PretrainSettings, ["method_kwargs.tau_max=0.3", "method_kwargs.negative_range=[0.1,0.2]"])
    assert settings.method_kwargs == {"tau_max": 0.3, "negative_range": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("epoch=3", "Unknown key 'epoch'. Did you mean 'epochs'?"),
        ("--epochs", "'--epochs' is no setting; write key=value. Unknown key 'epochs'. Did you mean 'epochs'?"),
        ("epochs=many", "epochs: Value 'many'"),
        ("epochs.x=3", "epochs"),
        ("lr=[1]", "lr: "),
    ],
)
def test_a_wrong_token_is_named(token, message):
    with pytest.raises(ValueError, match="^" + message.replace("?", r"\?").replace("'", ".").split("(")[0]):
        parse(PretrainSettings, [token])


def test_a_missing_required_key_is_named():
    with pytest.raises(ValueError, match=r"checkpoint=\.\.\. must be given"):
        parse(EvaluateSettings, [])


@pytest.mark.parametrize("structure", [PretrainSettings, EvaluateSettings])
def test_help_lists_every_key_with_its_default(structure):
    lines = describe(structure).splitlines()
    assert [line.split("=")[0].strip() for line in lines] == list(structure.__dataclass_fields__)
    assert all(len(line.split("  ")[-1].strip()) > 3 for line in lines)


@pytest.mark.parametrize(
    "text", ["a #1", "a: b", "[a", "{a}", "01", "1e3", "off", "- a", "~", "'a'", "a | b", "$(a) `b`; c"]
)
def test_a_text_is_taken_as_it_stands(text):
    assert parse(PretrainSettings, [f"data={text}"]).data == os.path.expanduser(text)


def test_null_is_none_and_what_is_no_yaml_is_an_error():
    assert parse(PretrainSettings, ["out=x", "out=null"]).out is None
    with pytest.raises(ValueError, match=r"method_kwargs.tau=\[1 is no key=value in YAML"):
        parse(PretrainSettings, ["method_kwargs.tau=[1"])
