from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

import dystress_plugin.frameworks.solo.configs as configs
from dystress_plugin import ContrastiveLoss
from dystress_plugin.frameworks.solo.registration import add_resolver
from dystress_plugin.frameworks.solo.settings import complete, label, loss_settings
from dystress_plugin.recipes import METHODS

HEAD = {"proj_hidden_dim": 8, "proj_output_dim": 4}
FILES = sorted(path.stem for path in Path(configs.__file__).parent.glob("*.yaml"))
LINEAR = [name for name in FILES if name.startswith("dystress_linear_")]
MOCO = "dystress_moco_cifar10"
PRETRAIN = sorted({*FILES} - {*LINEAR} - {MOCO, "dystress_pretrain", "dystress_linear"})
DATASETS = {"cifar10", "cifar100", "stl10", "imagenet100", "imagenet", "custom"}


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_gets_its_default(name):
    recipe = METHODS[name]
    filled, notes = complete(recipe, HEAD)
    assert notes == []
    settings = loss_settings(recipe, filled)
    assert list(settings) == list(recipe.parameters)
    if "num_samples" in settings:
        assert settings["num_samples"] is None
        settings["num_samples"] = 3
    if "dim" in settings:
        assert settings["dim"] is None
        settings["dim"] = 2
    ContrastiveLoss(name, queue_size=(4, 2) if recipe.queue else None, **settings)
    assert complete(recipe, filled) == (filled, [])


def test_temperature_is_tau_where_there_is_one():
    filled, notes = complete(METHODS["macl"], {**HEAD, "temperature": 0.2})
    assert filled["tau"] == filled["temperature"] == 0.2
    assert notes == []
    filled, notes = complete(METHODS["macl"], {**HEAD, "temperature": 0.2, "tau": 0.3})
    assert filled["tau"] == filled["temperature"] == 0.3
    assert len(notes) == 1
    filled, notes = complete(METHODS["dystress"], {**HEAD, "temperature": 0.2})
    assert filled["temperature"] is None
    assert len(notes) == 1
    assert "tau_min" in notes[0]


def test_unknown_and_missing_keys():
    with pytest.raises(ValueError, match=r"'alhpa'.*Did you mean 'alpha'"):
        complete(METHODS["macl"], {**HEAD, "alhpa": 1})
    with pytest.raises(ValueError, match=r"needs method_kwargs\.proj_output_dim"):
        complete(METHODS["macl"], {"proj_hidden_dim": 8})


def test_keys_of_other_methods_are_a_line_each():
    theirs = {"lamb": "barlow_twins", "queue_size": "mocov2plus"}
    filled, notes = complete(METHODS["macl"], {**HEAD, "lamb": 0.1, "queue_size": 8}, lambda: theirs)
    assert filled == complete(METHODS["macl"], HEAD)[0]
    assert notes == [
        "method_kwargs.lamb=0.1 is ignored: it is a setting of solo-learn's barlow_twins.",
        "method_kwargs.queue_size=8 is ignored: it is a setting of solo-learn's mocov2plus.",
    ]
    assert complete(METHODS["macl_moco"], {**HEAD, "queue_size": 8}, lambda: theirs)[0]["queue_size"] == 8
    with pytest.raises(ValueError, match=r"'alhpa'.*Did you mean 'alpha'"):
        complete(METHODS["macl"], {**HEAD, "lamb": 0.1, "alhpa": 1}, lambda: theirs)


def test_label_tells_settings_apart():
    assert label("dystress", {**HEAD, "tau_min": 0.1}, seed=5) == "-seed5"
    assert label("dystress", {**HEAD, "tau_max": 0.3, "negative_range": [0.1, 0.2]}, None) == (
        "-negative_range0.1_0.2-tau_max0.3"
    )
    assert label("macl", complete(METHODS["macl"], {**HEAD, "temperature": 0.2})[0], 1) == "-seed1-tau0.2"
    assert label("macl_moco", {**HEAD, "queue_size": 65536}, seed=1) == "-seed1"
    assert label("macl_moco", {**HEAD, "queue_size": 8}, seed=1) == "-seed1-queue_size8"
    assert label("simclr_of_theirs", {"temperature": 0.2}, seed=1) == "-seed1-temperature0.2"


def test_there_is_a_config_for_every_data_set():
    assert {name.removeprefix("dystress_") for name in PRETRAIN} == DATASETS
    assert {name.removeprefix("dystress_linear_") for name in LINEAR} == DATASETS


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_configs(name):
    add_resolver()
    with initialize_config_module("dystress_plugin.frameworks.solo.configs", version_base="1.2"):
        cfg = compose(name, ["method=macl", "dystress_hardware=cpu", "image_size=48"])
        many = compose(name, ["dystress_augmentations@augmentations=multicrop"])
    dataset = name.removeprefix("dystress_")
    assert cfg.name == f"macl-{dataset}-seed5"
    assert cfg.data.dataset == dataset
    assert not cfg.wandb.enabled
    assert cfg.augmentations[0].crop_size == 48
    assert len(cfg.devices) == 1
    assert [crop.num_crops for crop in many.augmentations] == [2, 6]


def test_config_of_mocov2plus():
    add_resolver()
    with initialize_config_module("dystress_plugin.frameworks.solo.configs", version_base="1.2"):
        cfg = compose(MOCO)
    assert cfg.name == "dystress_moco-cifar10-seed5-queue_size32768"
    assert (cfg.optimizer.name, cfg.momentum.final_tau, cfg.augmentations[0].color_jitter.hue) == ("sgd", 0.999, 0.1)
    assert cfg.augmentations[0].crop_size == 32


@pytest.mark.parametrize("name", LINEAR)
def test_linear_configs(name):
    with initialize_config_module("dystress_plugin.frameworks.solo.configs", version_base="1.2"):
        cfg = compose(name, ["pretrained_feature_extractor='a/b-ep=1.ckpt'", "pretrain_method=ts"])
    dataset = name.removeprefix("dystress_linear_")
    assert cfg.name == f"ts-{dataset}-linear"
    assert cfg.data.dataset == dataset
    assert not cfg.wandb.enabled
