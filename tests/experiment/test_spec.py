from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dystress
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from dystress_plugin.experiment import spec as spec_module
from dystress_plugin.experiment.data import datasets
from dystress_plugin.experiment.io.config import comparable, read_config, recorded, recorded_spec
from dystress_plugin.experiment.pretrain import command as pretrain
from dystress_plugin.experiment.pretrain.resolve import resolve
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.experiment.spec import RunSpec, part
from dystress_plugin.recipes import METHODS

PARTS = [kind for kind in vars(spec_module).values() if is_dataclass(kind) and kind.__name__.endswith("Spec")]
PARTS.remove(RunSpec)

# And a queue's keys without one, and parameters of a method.
MAY_BE_NONE = {"chunk_size", "labels", "val", "long_tail", "indices", "arm", "family"}

# As version 0.1.0 wrote it, with paths as they were typed; some keys are newer.
OF_0_1_0 = """
settings: {method: dystress, method_kwargs: {tau_min: 0.1, tau_max: 0.2, profile: cosine, detach: true}, data: digits,
  out: runs/x, epochs: 2, seed: 3, data_root: datasets, download: false, long_tail: 0.1, image_size: 8,
  batch_size: 256, num_workers: 0, backbone: resnet10t, hidden_dim: 512, projection_dim: 128, queue_size: null,
  momentum_encoder: null, optimizer: lars, lr: 1.2, momentum: 0.9, weight_decay: 1.0e-06, warmup_epochs: 0.2,
  min_scale: 0.5, jitter: 0.5, grayscale: 0.0, blur: 0.0, flip: 0.0, rotate: 15.0, knn_k: 200, knn_t: 0.1,
  gather_distributed: true, accelerator: cpu, devices: '1', strategy: auto, precision: 32-true, progress: false,
  wandb: 'off', wandb_project: dystress, tensorboard: false}
versions: {torch: 2.14.1, dystress_plugin: 0.1.0}
"""


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", root="", download=False, long_tail=None, seed=0)


def parts():
    return [f for f in fields(RunSpec) if f.type.removesuffix(" | None").endswith("Spec")]


def test_every_key_is_in_one_part():
    assert sorted(kind.__name__ for kind in PARTS) == sorted(f.type.removesuffix(" | None") for f in parts())
    keys = [key for kind in PARTS for key in map(spec_module._key, fields(kind))]
    own = [f.name for f in fields(RunSpec) if f not in parts()]
    assert sorted(keys + own) == sorted(f.name for f in fields(PretrainSettings))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_complete_and_frozen_and_its_flat_view_makes_it_again(method, digits):
    spec = resolve(PretrainSettings(method=method), digits, 2)
    flat = spec.flat()
    queue = {"queue_size", "momentum_encoder"}
    assert {key for key, value in flat.items() if value is None} == MAY_BE_NONE | (set() if spec.queue else queue)
    assert (spec.queue is not None) == method.endswith("_moco")
    assert set(spec.method_kwargs) == set(METHODS[method].parameters)
    assert spec.optimizer.lr == 0.075 * 512**0.5
    assert list(flat) == [f.name for f in fields(PretrainSettings)]
    assert RunSpec.of(PretrainSettings(**flat)) == spec
    assert asdict(PretrainSettings(**flat)) == flat
    for its in (spec, *(getattr(spec, f.name) for f in parts() if getattr(spec, f.name) is not None)):
        for f in fields(its):
            with pytest.raises(FrozenInstanceError):
                setattr(its, f.name, getattr(its, f.name))


def test_what_was_given_is_kept_and_the_settings_as_typed_are_as_they_were(digits):
    given = {"lr": 0.5, "jitter": 0.0, "queue_size": 64, "image_size": 12, "long_tail": 0.5, "out": "x"}
    settings = PretrainSettings(method="macl_moco", method_kwargs={"tau": 0.3}, **given)
    before = asdict(settings)
    spec = resolve(settings, digits, 1)
    assert {key: spec.flat()[key] for key in given} == given
    assert spec.method_kwargs["tau"] == 0.3
    assert asdict(settings) == before


def test_a_key_that_is_open_has_no_part_and_its_name_is_said(digits):
    complete = PretrainSettings(**resolve(PretrainSettings(method="simclr_moco"), digits, 1).flat())
    default = PretrainSettings()
    open_keys = [f.name for f in fields(PretrainSettings) if getattr(default, f.name) is None]
    for key in set(open_keys) - MAY_BE_NONE - {"out"}:
        with pytest.raises(ValueError, match=f"^{key}=null must have a value"):
            RunSpec.of(replace(complete, **{key: None}))
    assert RunSpec.of(replace(complete, out=None)).out == "runs/simclr_moco-digits-0"
    for kind in (spec_module.DataSpec, spec_module.HardwareSpec, spec_module.EvaluationSpec):
        assert part(kind, default) == part(kind, complete)  # before anything is resolved


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("given", [{}, {"epochs": 1}, {"epochs": 100}, {"batch_size": 16, "epochs": 40}])
def test_a_run_has_forty_samples_of_diagnostics_or_one_a_step(given, devices, digits):
    settings = PretrainSettings(**given)
    spec = resolve(settings, digits, devices)
    steps = settings.epochs * (len(digits.train.labels) // devices // settings.batch_size)
    samples = len(range(0, steps, spec.logging.diagnostics_every_n_steps))
    assert samples == steps if steps < 80 else 40 <= samples < 80
    assert resolve(replace(settings, diagnostics_every_n_steps=0), digits, 1).logging.diagnostics_every_n_steps == 0


def test_a_queue_for_a_method_without_one_is_refused_with_all_else_that_is_wrong(digits):
    for given in ({"queue_size": 64}, {"momentum_encoder": 0.5}):
        with pytest.raises(ValueError, match=f"^{next(iter(given))}=.* is for methods with a queue"):
            resolve(PretrainSettings(method="simclr", **given), digits, 1)


def test_a_config_of_0_1_0_is_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(OF_0_1_0)
    spec = read_config(path)
    settings = OmegaConf.to_container(OmegaConf.create(OF_0_1_0).settings)
    here = {"out": str(tmp_path), "data_root": str(tmp_path / "datasets")}
    assert {key: spec.flat()[key] for key in settings} == settings | here
    assert spec.logging.nan_guard
    assert spec.data.long_tail_profile == "exponential"
    assert spec.queue is None
    del settings["out"]  # as its checkpoints have it
    assert comparable(recorded_spec(settings, tmp_path, spec)) == comparable(spec)


def test_a_config_that_leaves_a_key_open_is_damaged(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(OF_0_1_0.replace("lr: 1.2", "lr: null"))
    with pytest.raises(ValueError, match=rf"^{path} is no config.yaml .*: lr=null must have a value"):
        read_config(path)


@pytest.mark.parametrize("method", ["dystress_moco", "isogclr"])
def test_loggers_checkpoint_and_config_record_the_same_run_as_it_was_resolved(method, tiny, quick, monkeypatch):
    import wandb

    known, finish = [], wandb.finish
    monkeypatch.setattr(wandb, "finish", lambda: (known.append(dict(wandb.run.config)), finish()))
    given = tiny | {"method": method, "epochs": 1, "wandb": "offline", "tensorboard": "true"}
    assert dystress("pretrain", given) == 0
    out = Path(tiny["out"])
    config = OmegaConf.to_container(OmegaConf.load(out / "config.yaml").settings)
    assert config == recorded(read_config(out / "config.yaml"))
    assert config["lr"] == pytest.approx(0.075 * 6**0.5)
    assert config["method_kwargs"]
    assert known == [config]
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["settings"] == config
    assert OmegaConf.to_container(OmegaConf.load(out / "tensorboard" / "hparams.yaml")) == config
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    shown = metadata.parse_session_start_info_plugin_data(content).hparams
    assert np.isclose(shown["lr"].number_value, config["lr"])
    assert all(f"method_kwargs/{name}" in shown for name in config["method_kwargs"])


def test_a_finished_run_is_told_before_a_network_is_made(tiny, quick, monkeypatch):
    settings = tiny | {"epochs": 1}
    assert dystress("pretrain", settings) == 0
    for name in ("build_module", "check_network"):
        monkeypatch.setattr(pretrain, name, lambda *args: pytest.fail("made a network"))
    assert dystress("pretrain", settings) == 0
    assert dystress("pretrain", settings | {"lr": 0.3}) == 2
