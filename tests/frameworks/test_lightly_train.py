"""LightlyTrain itself runs here, on the CPU, with a tiny network in the place of a ResNet."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import dystress_plugin
from dystress_plugin.recipes import METHODS

# What LightlyTrain, albumentations and Lightning say of each other's versions is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES = 24


class Tiny(nn.Module):
    """A model in the way LightlyTrain wants its own ones; smooth, so that rounding is not blown up by training."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 4, stride=4)

    def forward_features(self, x):
        return {"features": torch.tanh(self.convolution(x))}

    def forward_pool(self, x):
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}

    def feature_dim(self):
        return 8

    def get_model(self):
        return self


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """LightlyTrain with our methods, and its augmentations drawn from a seed."""
    if importlib.util.find_spec("lightly_train") is None:
        pytest.skip('LIGHTLYTRAIN IS NOT TESTED: pip install -e ".[lightly-train]"')
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("LIGHTLY_TRAIN_EVENTS_DISABLED", "1")
        patch.setenv("LIGHTLY_TRAIN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        import lightly_train
        from lightly_train._methods import method_helpers
        from lightly_train._transforms import view_transform

        from dystress_plugin.frameworks.lightly_train.methods import CLASSES

        # albumentations 2 takes no notice of the seed of LightlyTrain, whose own runs therefore differ.
        patch.setattr(view_transform, "Compose", functools.partial(view_transform.Compose, seed=0))
        # Our simclr, which LightlyTrain's own hides.
        patch.setitem(method_helpers._method_name_to_cls.ours, "our_simclr", CLASSES["simclr"])
        yield SimpleNamespace(
            train=lightly_train, helpers=method_helpers, classes={name: CLASSES[name] for name in METHODS}
        )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    for number, image in enumerate(load_digits().images[:IMAGES]):
        path = root / str(number % 2) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32)).convert("RGB").save(path)
    return str(root)


@pytest.fixture
def pretrain(host, digits, tmp_path):
    """Trains Tiny in six steps; returns the rows of the log and the state that the checkpoint has."""

    def run(method, **settings):
        out = tmp_path / "out"
        torch.manual_seed(0)  # LightlyTrain sows its seed too late for a model that is given to it
        if not settings.get("resume_interrupted"):
            shutil.rmtree(out, ignore_errors=True)
        shared = {
            "data": digits,
            "model": Tiny(),
            "epochs": 2,
            "batch_size": 8,
            "num_workers": 0,
            "devices": 1,
            "accelerator": "cpu",
            "precision": "32-true",
            "transform_args": {"image_size": (16, 16)},
            "loggers": {"jsonl": {}, "tensorboard": None},
            "trainer_args": {"log_every_n_steps": 1},
        }
        host.train.pretrain(out=out, method=method, **(shared | settings))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
        return [row for row in rows if "train_loss" in row], state

    return run


def test_nothing_else_imports_the_adapter():
    package = Path(dystress_plugin.__file__).parent
    own = package / "frameworks" / "lightly_train"
    others = [path for path in package.rglob("*.py") if own not in path.parents]
    assert len(others) > 20
    assert [path for path in others if "lightly_train" in path.read_text()] == []


def test_every_method_is_listed_and_lightly_trains_own_stay(host):
    assert set(METHODS) <= set(host.train.list_methods())
    assert host.helpers.get_method_cls("simclr").__module__ == "lightly_train._methods.simclr.simclr"
    assert host.helpers.get_method_cls("dystress") is host.classes["dystress"]


def test_registering_again_changes_nothing(host):
    from dystress_plugin.frameworks.lightly_train import register

    table = host.helpers._method_name_to_cls
    register()
    assert host.helpers._method_name_to_cls is table


def test_classes_can_be_pickled(host):
    assert [pickle.loads(pickle.dumps(cls)) for cls in host.classes.values()] == list(host.classes.values())


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_constant_temperature_trains_as_lightly_trains_own_simclr(pretrain, precision):
    theirs, _ = pretrain("simclr", precision=precision, seed=5)
    losses = [row["train_loss"] for row in theirs]
    assert len(losses) == 6
    assert len(set(losses)) == 6
    for method, settings in (("our_simclr", {}), ("dystress", {"tau_min": 0.1, "tau_max": 0.1})):
        ours, _ = pretrain(method, precision=precision, seed=5, method_args=settings)
        assert [row["train_loss"] for row in ours] == pytest.approx(losses, rel=1e-5 if "32" in precision else 1e-11)


@pytest.mark.parametrize("method", ["dystress", "macl_dclw", "tempfree"])
def test_methods_of_views_train_and_log_their_temperatures(pretrain, method):
    rows, _ = pretrain(method)
    assert [row["step"] for row in rows] == list(range(6))
    assert len({row["train_loss"] for row in rows}) == 6
    for row in rows:
        low, mean, high = (row[f"tau_positive_{name}"] for name in ("min", "mean", "max"))
        assert 0 < low <= mean * (1 + 1e-6) <= high * (1 + 2e-6)


def test_a_schedule_follows_the_epochs_and_warns_where_it_ends_early(pretrain):
    with pytest.warns(UserWarning, match="never comes down to tau_min"):
        rows, _ = pretrain("ts", method_args={"period": 4.0})
    taus = [row["tau_negative_mean"] for row in rows]
    assert taus == pytest.approx([1.0] * 3 + [0.55] * 3)


def test_a_temperature_for_every_image_resumes_and_gives_way_to_a_new_run(pretrain, monkeypatch, tmp_path):
    # LightlyTrain sets it by itself only in later versions: without it, 0.13.0 resumes no method under torch 2.6.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    _, state = pretrain("isogclr", method_args={"rho": 0.4})
    assert state["criterion.temperature.visited"].tolist() == [True] * IMAGES
    tau = state["criterion.temperature.tau"]
    assert len(tau.unique()) > IMAGES / 2

    # Two more epochs at a step size of 0, so that what is read stays as it is.
    rows, state = pretrain("isogclr", method_args={"rho": 0.4, "eta": 0.0}, epochs=4, resume_interrupted=True)
    assert [row["step"] for row in rows] == list(range(12))
    torch.testing.assert_close(state["criterion.temperature.tau"], tau, rtol=0, atol=0)

    # Weights of one method start another, whose table is fresh.
    shutil.copy(tmp_path / "out" / "checkpoints" / "last.ckpt", tmp_path / "weights.ckpt")
    _, state = pretrain("isogclr", method_args={"eta": 0.0}, checkpoint=tmp_path / "weights.ckpt")
    assert state["criterion.temperature.tau"].tolist() == [0.1] * IMAGES
    _, state = pretrain("dystress", checkpoint=tmp_path / "weights.ckpt")
    assert not any(name.startswith("criterion.temperature.tau") for name in state)


def test_a_third_partys_table_and_warm_up(host, warm, pretrain, monkeypatch):
    from dystress_plugin.frameworks.lightly_train import methods
    from dystress_plugin.training import method_class

    for name, recipe in warm.items():
        body = {"recipe": recipe, "args": methods.args_class(recipe)}
        cls = method_class(recipe, methods.BASES[recipe.queue], methods.__name__, body)
        monkeypatch.setitem(host.helpers._method_name_to_cls.ours, name, cls)
    for name in ("warm_isogclr", "warm_isogclr_moco"):
        _, state = pretrain(name, method_args={"epochs": 1.0})
        assert state["criterion.temperature.temperature.visited"].tolist() == [True] * IMAGES
    with pytest.warns(UserWarning, match="warm-up never arrives at ModelAware"):
        pretrain("warm_macl", method_args={"epochs": 3.0})


def test_the_same_images_have_the_same_numbers_however_they_are_listed(host):
    from dystress_plugin.frameworks.lightly_train.methods import sample_numbers

    names = ["b.png", "a.png", "b.png"]
    assert sample_numbers(SimpleNamespace(image_filenames=names)) == {"a.png": 0, "b.png": 1}
    assert sample_numbers(SimpleNamespace(image_filenames=[{"filenames": name} for name in names])) == {
        "a.png": 0,
        "b.png": 1,
    }
    with pytest.raises(ValueError, match="list does not list its image_filenames"):
        sample_numbers([])


def test_a_queue_keeps_keys_of_a_momentum_encoder(pretrain):
    rows, state = pretrain("dystress_moco", method_args={"momentum_start": 0.5, "momentum_end": 0.5}, seed=1)
    assert len(rows) == 6
    assert state["criterion.queue.keys"].shape == (IMAGES // 2, 128)
    weights = [state[f"{name}.wrapped_model.convolution.weight"] for name in ("embedding_model", "key_embedding_model")]
    assert 0 < (weights[0] - weights[1]).abs().max() < 0.1
    rows, state = pretrain("simclr_moco", method_args={"queue_size": 5, "momentum_start": 1.0, "momentum_end": 1.0})
    assert state["criterion.queue.keys"].shape == (5, 128)


def test_diagnostics_are_written_on_request(pretrain, tmp_path):
    pretrain("dystress", method_args={"diagnostics_every_n_steps": 2})
    assert len(list(tmp_path.rglob("diagnostics.csv"))) == 1


@pytest.mark.parametrize("rate", [None, 0.002])
def test_what_a_temperature_learns_has_a_rate_of_its_own(pretrain, tmp_path, rate):
    _, state = pretrain("clip", epochs=1, method_args={"temperature_lr": rate})
    *others, own = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=False)["optimizer_states"][
        0
    ]["param_groups"]
    (network,) = {group["initial_lr"] for group in others}
    assert own["initial_lr"] == (rate or network / 10)
    assert (own["weight_decay"], len(own["params"])) == (0.0, 1)
    assert state["criterion.temperature.log_tau"].exp() != pytest.approx(0.07, rel=1e-6)


@pytest.mark.parametrize("method", ["dystress", "dystress_moco"])
def test_in_chunks_it_trains_alike_and_the_model_sees_no_more(pretrain, method, monkeypatch):
    seen, states = [], []
    features = Tiny.forward_features
    monkeypatch.setattr(Tiny, "forward_features", lambda self, x: (seen.append(len(x)), features(self, x))[1])
    for chunk_size, most in ((None, 16 if method == "dystress" else 8), (3, 3)):
        seen.clear()
        states.append(pretrain(method, epochs=1, method_args={"chunk_size": chunk_size})[1])
        assert max(seen) == most
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("method", ["dystress", "isogclr"])
def test_a_last_batch_of_one_image_trains(pretrain, method):
    rows, _ = pretrain(method, batch_size=IMAGES - 1, loader_args={"drop_last": False})
    losses = [row["train_loss"] for row in rows]
    assert len(losses) == 4
    assert [loss == 0 for loss in losses] == [False, True, False, True]


def test_a_batch_larger_than_the_data_is_cut_by_lightly_train_or_refused(pretrain):
    try:
        rows, _ = pretrain("dystress", batch_size=IMAGES + 1)
    except ValueError as error:  # of versions that do not cut it
        message = str(error)
    else:
        message = f"{len(rows)} steps"
    assert re.match(f"2 steps|batch_size / devices={IMAGES + 1} makes no full batch of {IMAGES} training", message)


def test_defaults_are_the_tables_and_lightly_trains(host):
    theirs = host.helpers.get_method_cls("simclr").method_args_cls()()
    for name, cls in host.classes.items():
        args = cls.method_args_cls()()
        parameters = METHODS[name].choices
        assert {key: getattr(args, key) for key in parameters} == parameters
        assert args.hidden_dim == theirs.hidden_dim
        assert "temperature" not in args.model_dump()


def test_a_parameter_of_any_type_is_taken(host, tmp_path):
    np.save(tmp_path / "counts.npy", np.array([3, 1, 2]))
    for offset in ([3, 1, 2], str(tmp_path / "counts.npy")):
        loss = host.classes["ts"].method_args_cls()(offset=offset).criterion()
        assert loss.temperature.counts.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("dystress", {"tau_mx": 0.3}, "Unknown key: 'tau_mx'"),
        ("dystress", {"temperature": 0.3}, "Unknown key: 'temperature'"),
        ("dystress", {"tau_max": "0.3"}, "Invalid type for key 'tau_max'"),
        ("dystress", {"tau_max": 0.05}, "tau_min=0.1 is above tau_max=0.05"),
        ("dystress", {"profile": "cosin"}, "Did you mean 'cosine'"),
        ("macl_dclw", {"sigma": 0.001}, "sigma=0.001 must be at least 0.01"),
        ("isogclr", {"num_samples": 5}, "Unknown key: 'num_samples'"),
        ("dystress_moco", {"queue_size": "all"}, "queue_size"),
        ("dystress_moco", {"momentum_end": 1.5}, "momentum_end"),
        ("dystress", {"chunk_size": 0}, "chunk_size"),
        ("clip", {"temperature_lr": 0.0}, "temperature_lr"),
    ],
)
def test_method_args_are_checked_as_lightly_train_checks_its_own(host, method, settings, message):
    from lightly_train._configs.validate import pydantic_model_validate
    from lightly_train.errors import ConfigValidationError

    with pytest.raises(ConfigValidationError) as caught:
        pydantic_model_validate(host.classes[method].method_args_cls(), settings)
    assert message in str(caught.value)


def test_a_list_of_the_command_line_stands_for_a_pair(host):
    args = host.classes["dystress"].method_args_cls()(negative_range=[0.1, 0.3])
    assert args.criterion().temperature.negative_range == (0.1, 0.3)


@pytest.mark.parametrize("version", ["0.12.4", None])
def test_other_versions_are_refused_with_what_is_supported(monkeypatch, host, version):
    from dystress_plugin.frameworks.lightly_train import register

    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(ImportError, match=r"supports LightlyTrain 0.13.0 to 0.18.0, and .* installed.\nInstall"):
        register()


def test_a_newer_version_is_tried_with_a_warning(monkeypatch, host):
    from dystress_plugin.frameworks.lightly_train import register

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.0")
    with pytest.warns(UserWarning, match=r"0.19.0 is installed, and nobody has tried it yet"):
        register()


def test_a_version_with_other_insides_is_refused(monkeypatch, host):
    from dystress_plugin.frameworks.lightly_train import register

    monkeypatch.delattr(host.helpers, "_method_name_to_cls")
    with pytest.raises(ImportError, match=r"does not work: .*_method_name_to_cls"):
        register()


def test_its_command_line_trains_in_two_processes_and_exports_and_embeds(host, digits, tmp_path):
    out = tmp_path / "out"
    model = "torchvision/shufflenet_v2_x0_5"
    command = (
        f"-W ignore -m dystress_plugin.frameworks.lightly_train pretrain out={out} data={digits} model={model} "
        "method=dystress method_args.tau_max=0.3 epochs=2 batch_size=8 num_workers=0 devices=2 accelerator=cpu "
        "transform_args.image_size=[32,32] loggers.jsonl={} loggers.tensorboard=null trainer_args.log_every_n_steps=1"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command.split()], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in done.stdout + done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taus = [row["tau_negative_max"] for row in rows if "train_loss" in row]
    assert len(taus) == 6
    assert all(0.1 < tau <= 0.3 for tau in taus)

    checkpoint = out / "checkpoints" / "last.ckpt"
    host.train.export(out=tmp_path / "model.pt", checkpoint=checkpoint, part="model", format="torch_state_dict")
    exported = torch.load(tmp_path / "model.pt", weights_only=True)
    final = torch.load(out / "exported_models" / "exported_last.pt", weights_only=True)
    assert exported.keys() == final.keys()
    assert all(torch.equal(exported[name], final[name]) for name in final)
    host.train.embed(
        out=tmp_path / "z.pt", data=digits, checkpoint=checkpoint, format="torch", image_size=(32, 32), num_workers=0
    )
    embedded = torch.load(tmp_path / "z.pt", weights_only=False)
    assert len(set(embedded["filenames"])) == IMAGES
    assert embedded["embeddings"].shape == (IMAGES, 1024)
    assert embedded["embeddings"].std(0).max() > 0
